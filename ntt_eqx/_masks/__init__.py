"""Masks from scores: which weights stay, at an exact density."""

from ._ablation import (
    invert_scores as invert_scores,
    reinitialise as reinitialise,
    shuffle_mask as shuffle_mask,
)
from ._allocation import allocate as allocate
from ._collapse import (
    LayerCollapseWarning as LayerCollapseWarning,
    check_collapse as check_collapse,
    is_traced as is_traced,
)
from ._coupled import CoupledAxis as CoupledAxis, CoupledChannels as CoupledChannels
from ._fan_in import ConstantFanIn as ConstantFanIn
from ._few_channels import ChosenIndices as ChosenIndices, FewChannels as FewChannels
from ._layout import InLayout as InLayout
from ._make_mask import make_mask as make_mask
from ._n_m import NM as NM
from ._pattern import (
    AbstractLayerPattern as AbstractLayerPattern,
    AbstractPattern as AbstractPattern,
    Unstructured as Unstructured,
)
from ._sparsity import GradualDensity as GradualDensity, Sparsity as Sparsity
from ._tiles import Block as Block, Channels as Channels
