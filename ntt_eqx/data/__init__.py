"""Datasets in their published formats, and Grain pipelines over them."""

from ._dataset import (
    Dataset as Dataset,
    Split as Split,
    hold_out as hold_out,
    make_dataset as make_dataset,
    select_classes as select_classes,
    unite as unite,
)
from ._errors import DatasetError as DatasetError
from ._pipeline import (
    BatchIterator as BatchIterator,
    as_batch as as_batch,
    batches as batches,
)
from ._registry import (
    DATASETS as DATASETS,
    DatasetInfo as DatasetInfo,
    check_dataset_name as check_dataset_name,
    list_datasets as list_datasets,
    load_dataset as load_dataset,
    prepare_dataset as prepare_dataset,
)
from ._views import Batch as Batch
