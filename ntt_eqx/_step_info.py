"""`StepInfo`: what a step tells its loss and its refresh."""

from typing import Any

import equinox as eqx
from jaxtyping import Array, Int, PRNGKeyArray


class StepInfo(eqx.Module):
    """Information about a step, for its loss and its refresh.

    Attributes:
        step: number of steps done, int32.
        key: the step's own PRNG key, another one at every step.
        density: share of prunable weights asked for at this step, a number; where each layer has
            its own, the share that the mask keeps.
        support: where the mask's kept weights are, as `NTTState.support`. The kernel compares it
            with any mask but the very array that it is of; `None` where they are not known.
        metric_mask: the mask that the active kernel counts by, where it is not the student's: see
            `RefreshView.dense_gradient`.
    """

    step: Int[Array, ""]
    key: PRNGKeyArray
    density: Any
    support: Any = None
    metric_mask: Any = None
