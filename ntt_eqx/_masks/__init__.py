"""Masks from scores: which weights stay, at an exact density."""

from ._collapse import (
    LayerCollapseWarning as LayerCollapseWarning,
    check_collapse as check_collapse,
)
from ._make import make_mask as make_mask
