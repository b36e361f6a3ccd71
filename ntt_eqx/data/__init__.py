"""Datasets in their published formats, and Grain pipelines over them."""

from ._dataset import (
    Dataset as Dataset,
)
from ._dataset import (
    Split as Split,
)
from ._dataset import (
    hold_out as hold_out,
)
from ._dataset import (
    make_dataset as make_dataset,
)
from ._dataset import (
    select_classes as select_classes,
)
from ._dataset import (
    unite as unite,
)
from ._errors import DatasetError as DatasetError
from ._pipeline import Batch as Batch
from ._pipeline import BatchIterator as BatchIterator
from ._pipeline import as_batch as as_batch
from ._pipeline import batches as batches
from ._registry import (
    DATASETS as DATASETS,
)
from ._registry import (
    DatasetInfo as DatasetInfo,
)
from ._registry import (
    list_datasets as list_datasets,
)
from ._registry import (
    load_dataset as load_dataset,
)
from ._registry import (
    prepare_dataset as prepare_dataset,
)
