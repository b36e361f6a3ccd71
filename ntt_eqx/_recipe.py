"""`Recipe`: a published way of training as one object, from which optimiser and batches follow."""

import dataclasses
import functools
import numbers
from collections.abc import Sequence
from typing import Any, Literal

from jaxtyping import PRNGKeyArray

from ._checks import check_count, check_weight, is_count
from ._masks._sparsity import Schedule
from ._prunable import marks_of
from ._supervised import CrossEntropy, DynamicSparsity, TrainConfig, TrainState, train_init
from ._types import GradientTransformation, PyTree
from .data import BatchIterator, Split, batches
from .data._pipeline import Moment


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a classifier is trained: optimiser, learning rate, decay, loss and batches.

    The defaults are those of Liu & Zenke (2020): Adam at a constant rate. All shares are shares of
    the whole training, so that a shorter run keeps the form of its schedule. A field that would do
    nothing beside the others is refused.

    Attributes:
        epochs: passes over the training samples; a part of one, too.
        batch_size: samples of one step.
        optimizer: `"adam"`, or `"sgd"`.
        learning_rate: the rate, at its highest.
        momentum: of SGD.
        nesterov: whether the momentum of SGD is Nesterov's.
        schedule: the course of the rate after its warm-up: `"constant"`; `"steps"`, multiplied by
            `step_factor` at each milestone; `"cosine"` or `"linear"`, down to `final_share` of it.
        milestones: shares of the training at which `"steps"` lowers the rate, rising.
        step_factor: what a milestone multiplies the rate by.
        final_share: share of `learning_rate` at which `"cosine"` and `"linear"` end.
        warm_up: share of the training during which the rate rises linearly to `learning_rate`.
        weight_decay: lambda. It acts on the weights that `prunable_weights` marks by default, not
            on biases and normalisations; a pruned weight is zero and stays so.
        decay: `"l2"` adds `lambda w` to the gradient before the optimiser sees it, the gradient of
            `lambda / 2 |w|^2`, as `weight_decay` of PyTorch's SGD does; `"decoupled"` subtracts
            `rate lambda w` from the weight beside the optimiser's step, which makes AdamW of Adam
            (Loshchilov & Hutter, 2019).
        l2: coefficient of the sum of squared kept weights in the loss, as in `TrainConfig`:
            `weight_decay=2 * l2` has the same gradient, and this one is seen in the loss.
        label_smoothing: see `CrossEntropy`.
        ema: decay of the moving average of the weights, see `TrainConfig`; 0 for none.
        crop: pixels of padding from which a random crop is cut; see `ntt.data.batches`.
        flip: whether half of the images are flipped; see `ntt.data.batches`.
    """

    epochs: float = 50.0
    batch_size: int = 64
    optimizer: Literal["adam", "sgd"] = "adam"
    learning_rate: float = 1e-3
    momentum: float = 0.0
    nesterov: bool = False
    schedule: Literal["constant", "steps", "cosine", "linear"] = "constant"
    milestones: Sequence[float] = (0.5, 0.75)
    step_factor: float = 0.1
    final_share: float = 0.0
    warm_up: float = 0.0
    weight_decay: float = 0.0
    decay: Literal["l2", "decoupled"] = "l2"
    l2: float = 1e-8
    label_smoothing: float = 0.0
    ema: float = 0.0
    crop: int = 0
    flip: bool = False

    def __post_init__(self) -> None:
        """Reject values out of range, and fields that would do nothing.

        Raises:
            ValueError: a value cannot be used, or does nothing beside the others.
        """
        object.__setattr__(self, "milestones", tuple(self.milestones))
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"Recipe: {name} must be one of {allowed}, got {getattr(self, name)!r}."
                )
        for name in ("epochs", "learning_rate"):
            check_weight(f"Recipe: {name}", getattr(self, name))
            if getattr(self, name) == 0:
                raise ValueError(f"Recipe: {name} must be above 0.")
        for name in ("weight_decay", "l2", "step_factor"):
            check_weight(f"Recipe: {name}", getattr(self, name))
        for name in ("momentum", "warm_up", "label_smoothing", "ema"):
            _check_share(name, getattr(self, name), below_one=True)
        _check_share("final_share", self.final_share, below_one=False)
        check_count("Recipe: batch_size", self.batch_size)
        check_count("Recipe: crop", self.crop, 0)
        self._check_milestones()
        self._check_idle()

    def num_steps(self, samples: int) -> int:
        """The steps of the whole training on so many samples: whole batches a pass, at least 1."""
        if not is_count(samples, self.batch_size):
            raise ValueError(
                f"Recipe: a batch of {self.batch_size} samples does not fit into {samples!r}."
            )
        return max(1, round(self.epochs * (samples // self.batch_size)))

    def rate(self, num_steps: int) -> Schedule | float:
        """The learning rate, a number if it is constant, else a function of the number of steps.

        Raises:
            ValueError: `num_steps` is no number of steps, such as one of epochs.
        """
        check_count("Recipe: num_steps", num_steps, 0)
        return _rate(self, num_steps)

    def transformation(self, num_steps: int) -> GradientTransformation:
        """The optimiser for a run of `num_steps` steps; the same object for the same arguments.

        A step compiles once for each optimiser, so that runs with one recipe share their programs.

        Raises:
            ValueError: `num_steps` is no number of steps, such as one of epochs.
        """
        check_count("Recipe: num_steps", num_steps, 0)  # before the cache, to which 50.0 is 50
        return _transformation(self, num_steps)

    def config(self, dynamic: DynamicSparsity | None = None) -> TrainConfig:
        """The loss of the training; `dynamic` changes the mask."""
        objective = CrossEntropy(self.label_smoothing)
        return TrainConfig(self.l2, objective, ema=self.ema, dynamic=dynamic)

    def init(
        self,
        model: PyTree,
        num_steps: int,
        *,
        key: PRNGKeyArray | None = None,
        dynamic: DynamicSparsity | None = None,
    ) -> TrainState:
        """The state before the first of `num_steps` steps, for `train_steps`; see `train_init`."""
        optimizer = self.transformation(num_steps)
        return train_init(model, self.config(dynamic), optimizer, key=key)

    def batches(
        self,
        split: Split,
        *,
        seed: int,
        mean: Moment = 0.0,
        std: Moment = 1.0,
        on_device: bool = False,
    ) -> BatchIterator:
        """Endless batches of this recipe; see `ntt.data.batches`."""
        return batches(
            split,
            self.batch_size,
            seed=seed,
            mean=mean,
            std=std,
            crop=self.crop,
            flip=self.flip,
            on_device=on_device,
        )

    def _check_milestones(self) -> None:
        shares = self.milestones
        for share in shares:
            _check_share("milestones", share, below_one=True)
        early = self.schedule == "steps" and bool(shares) and shares[0] <= self.warm_up
        if list(shares) != sorted(set(shares)) or early:
            raise ValueError(
                f"Recipe: milestones must rise and lie after the warm-up, got {shares}."
            )

    def _check_idle(self) -> None:
        """Raise for a field that is set but does nothing: it was meant to do something."""
        idle = {
            "momentum": self.optimizer != "sgd",
            "nesterov": self.momentum == 0,
            "milestones": self.schedule != "steps",
            "step_factor": self.schedule != "steps",
            "final_share": self.schedule not in ("cosine", "linear"),
            "decay": self.weight_decay == 0,
        }
        needs = {
            "momentum": "optimizer='sgd'",
            "nesterov": "a momentum",
            "milestones": "schedule='steps'",
            "step_factor": "schedule='steps'",
            "final_share": "schedule='cosine' or 'linear'",
            "decay": "a weight_decay",
        }
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        for name, nothing in idle.items():
            if nothing and getattr(self, name) != defaults[name]:
                raise ValueError(
                    f"Recipe: {name}={getattr(self, name)!r} does nothing without {needs[name]}."
                )


_CHOICES = {
    "optimizer": ("adam", "sgd"),
    "schedule": ("constant", "steps", "cosine", "linear"),
    "decay": ("l2", "decoupled"),
    "nesterov": (False, True),
    "flip": (False, True),
}


def _check_share(name: str, value: Any, *, below_one: bool) -> None:
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    share = float(value) if real else -1.0
    if not 0 <= share <= 1 or (below_one and share == 1):
        raise ValueError(
            f"Recipe: {name} must be in [0, 1{')' if below_one else ']'}, got {value!r}."
        )


def _rate(recipe: Recipe, num_steps: int) -> Schedule | float:
    import optax

    highest, rising = recipe.learning_rate, round(recipe.warm_up * num_steps)
    if recipe.schedule == "constant" and rising == 0:
        return highest
    left = max(1, num_steps - rising)
    if recipe.schedule == "steps":
        # the join below counts from the end of the warm-up; in a short run milestones may coincide
        drops: dict[int, float] = {}
        for share in recipe.milestones:
            at = max(0, round(share * num_steps) - rising)
            drops[at] = drops.get(at, 1.0) * recipe.step_factor
        falling = optax.piecewise_constant_schedule(highest, drops)
    elif recipe.schedule == "cosine":
        falling = optax.cosine_decay_schedule(highest, left, recipe.final_share)
    elif recipe.schedule == "linear":
        falling = optax.linear_schedule(highest, recipe.final_share * highest, left)
    else:
        falling = optax.constant_schedule(highest)
    if rising == 0:
        return falling
    # the first step has a rate, too: highest / rising
    climbing = lambda step: highest * (step + 1) / rising
    return optax.join_schedules([climbing, falling], [rising])


@functools.lru_cache(maxsize=256)
def _transformation(recipe: Recipe, num_steps: int) -> GradientTransformation:
    import optax

    decay = optax.add_decayed_weights(recipe.weight_decay, mask=_decayed)
    parts = []
    if recipe.weight_decay and recipe.decay == "l2":
        parts.append(decay)
    if recipe.optimizer == "adam":
        parts.append(optax.scale_by_adam())
    elif recipe.momentum:
        parts.append(optax.trace(recipe.momentum, recipe.nesterov))
    if recipe.weight_decay and recipe.decay == "decoupled":
        parts.append(decay)
    return optax.chain(*parts, optax.scale_by_learning_rate(recipe.rate(num_steps)))


def _decayed(params: PyTree) -> PyTree:
    """Which parameters decay: the weights of layers, never a bias or a normalisation."""
    return marks_of(params, None)
