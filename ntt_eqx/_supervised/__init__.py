"""The supervised phase: objectives, the step, runs of steps, evaluation, rescaling."""

from ._dynamic import (
    DynamicSparsity as DynamicSparsity,
    TrainView as TrainView,
    lottery_ticket as lottery_ticket,
)
from ._evaluate import evaluate as evaluate
from ._objective import (
    AbstractObjective as AbstractObjective,
    CrossEntropy as CrossEntropy,
    Objective as Objective,
    SquaredError as SquaredError,
)
from ._rescale import rescale_by_density as rescale_by_density
from ._step import (
    TrainConfig as TrainConfig,
    TrainMetrics as TrainMetrics,
    TrainState as TrainState,
    train_init as train_init,
    train_step as train_step,
)
from ._train import train as train, train_steps as train_steps
