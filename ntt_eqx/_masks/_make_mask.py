"""`make_mask`: the weights with the highest scores, at an exact density."""

from typing import Any, Literal

from jax.core import Tracer

from .._types import MaskTree, ScoreTree
from ._allocation import Allocation, Density, check_density
from ._collapse import check_collapse, is_traced
from ._make import build_mask
from ._pattern import AbstractPattern
from ._sparsity import Sparsity


def make_mask(
    scores: ScoreTree,
    density: Density | Sparsity,
    *,
    scope: Literal["layer", "global"] = "layer",
    allocation: Allocation | None = None,
    pattern: AbstractPattern | None = None,
) -> MaskTree:
    """Keep the weights with the highest scores.

    Counts are exact: `round(density * size)` of every layer, or of all layers together. Ties go
    to the lowest index: row-major within a leaf, leaves in tree order. Deterministic, and fast
    enough for the inside of a training step (`scores` may be traced; `density` is static).

    **Arguments:**

    - `scores`: the structure of a model with a float array at every prunable weight and `None`
      elsewhere; the highest are kept.
    - `density`: share of weights to keep, in `(0, 1]`; or, with `scope="layer"`, a mapping from
      the path of every layer (`".layers[0].weight"`) to its own density; or a `Sparsity`, which
      says the rest, too.
    - `scope`: `"layer"` takes the highest of each layer, `"global"` of all of them together.
    - `allocation`: with `scope="layer"`, how the density is shared out over the layers:
      `"uniform"` (the default) or `"erk"`, see `allocate`. The counts of `"erk"` add up to
      `round(density * size)` of the whole network.
    - `pattern`: keep or drop weights together: `NM`, `Block`, `Channels`, `ConstantFanIn` or an
      `AbstractLayerPattern` of your own. A density counts groups instead of weights. `NM` fixes the
      density: it must be `n / m`, or 1 in layers that are to stay dense.

    **Returns:**

    The structure of `scores` with boolean arrays, `True` where a weight is kept.

    **Raises:**

    `ValueError` for a density that is NaN, not above 0 or above 1, one that leaves a layer without
    a weight (it names the layer), a pattern that does not fit a layer, options that contradict
    each other, scores that are not floating point, and, when they are concrete, scores that are
    NaN. Traced NaN scores rank below all others.

    **Warns:**

    `LayerCollapseWarning` when `scope="global"` empties a layer, if the scores are concrete.
    """
    if isinstance(density, Sparsity):
        _check_alone(scope, allocation, pattern)
        return density.mask(scores)
    given: Any = density
    if isinstance(given, Tracer):
        check_density(given, "make_mask")
    mask, _ = build_mask(scores, density, scope=scope, allocation=allocation, pattern=pattern)
    if scope == "global" and not is_traced(mask):
        check_collapse(mask, caller="make_mask")
    return mask


def _check_alone(scope: str, allocation: Any, pattern: Any) -> None:
    if scope != "layer" or allocation is not None or pattern is not None:
        raise ValueError(
            "make_mask: a Sparsity says scope, allocation and pattern; give these to Sparsity."
        )
