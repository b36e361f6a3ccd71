"""The two phases of a cell: the label-free transfer and the supervised training."""

import functools
from collections.abc import Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

from .. import (
    NTTConfig,
    NTTState,
    SparseModel,
    TrainConfig,
    evaluate,
    ntt_evaluate,
    ntt_init,
    ntt_step,
    rescale_by_density,
    train_init,
    train_step,
)
from .cells import Cell
from .images import Images, ImageShelf
from .loop import Phase
from .methods import METHODS
from .pruning import pruned_at_start

_CURVE_IMAGES = 10_000
_VALIDATION_IMAGES = 128


def transfer_phase(cell: Cell, teacher: Any, images: Images, title: str) -> Phase:
    """Neural Tangent Transfer from `teacher`, on images without their labels."""
    settings = cell.transfer
    assert settings is not None and settings.l2_weight is not None
    used, held_out = images.parts(settings.held_out, cell.seed)
    steps = steps_in(settings.epochs, used.size, settings.batch_size)
    config = NTTConfig(
        density=cell.density,
        num_steps=steps,
        scope=cell.scope or "layer",
        mask_every=settings.mask_every or None,
        kernel="ambient" if METHODS[cell.method].kernel == "ambient" else "active",
        kernel_weight=settings.kernel_weight,
        l2_weight=settings.l2_weight,
    )
    first = None
    if settings.initial_mask != "magnitude" or cell.mask is not None:
        if METHODS[settings.initial_mask].labels:
            images.check_labelled()
        count = cell.scoring.examples if cell.scoring is not None else None
        seen_first = None if count is None else used.examples(count, seed=cell.seed)
        first = pruned_at_start(cell, teacher, seen_first, cell.key(1)).mask
    watched = min(held_out.size, _VALIDATION_IMAGES) // 2 * 2
    seen: Any = held_out.first(watched).x if watched else None

    def validate(state: NTTState) -> Mapping[str, float]:
        metrics = _evaluated(state, seen)
        names = ("loss", "kernel_distance", "target_distance", "weight_norm", "density")
        return {name: float(getattr(metrics, name)) for name in names}

    def shown(row: dict[str, Any]) -> Mapping[str, float]:
        values = row.get("validation", row["train"])
        return {"kernel": values["kernel_distance"], "target": values["target_distance"]}

    return Phase(
        name="transfer",
        title=f"{title}, transfer",
        num_steps=steps,
        log_every=min(settings.log_every, steps),
        state=ntt_init(teacher, config, _adam(settings.learning_rate), mask=first),
        batches=used.batches(settings.batch_size, seed=cell.seed),
        step=lambda state, batch: _transfer_step(state, jnp.asarray(batch.x)),
        observe={} if seen is None else {"validation": validate},
        shown=shown,
        advice=f"Try a smaller --transfer.learning-rate (now {settings.learning_rate:g}).",
    )


def training_phase(cell: Cell, start: SparseModel, images: Images, title: str) -> Phase:
    """Supervised training of the sparse network `start`."""
    settings = cell.training
    assert settings is not None
    used, _ = images.parts(settings.held_out, cell.seed)
    steps = steps_in(settings.epochs, used.size, settings.batch_size)
    each = settings.evaluate_every or max(1, used.size // settings.batch_size)
    dropout = cell.model.endswith("-dropout")
    model = rescale_by_density(start) if settings.rescale else start
    model = jax.tree.map(lambda a: jnp.copy(a) if eqx.is_array(a) else a, model)  # donated below

    return Phase(
        name="train",
        title=f"{title}, training",
        num_steps=steps,
        log_every=min(each, steps),
        state=train_init(
            model,
            TrainConfig(settings.l2),
            _adam(settings.learning_rate),
            key=cell.key(2) if dropout else None,
        ),
        batches=used.batches(settings.batch_size, seed=cell.seed),
        step=lambda state, batch: _training_step(
            (jnp.asarray(batch.x), jnp.asarray(batch.y)), state
        ),
        observe={"test": lambda state: evaluate(state.model, images.test.first(_CURVE_IMAGES))},
        shown=lambda row: {
            "test accuracy": row["test"]["accuracy"],
            "loss": row["train"]["loss"],
        },
        advice=f"Try a smaller --training.learning-rate (now {settings.learning_rate:g}).",
    )


def planned_steps(cell: Cell, shelf: ImageShelf) -> dict[str, int]:
    """The phases of a cell, and the steps of each."""
    found = {}
    for name, settings in (("transfer", cell.transfer), ("train", cell.training)):
        if settings is not None:
            source = cell.transfer.dataset if name == "transfer" and cell.transfer else None
            used, _ = shelf.load(source or cell.dataset).parts(settings.held_out, cell.seed)
            found[name] = steps_in(settings.epochs, used.size, settings.batch_size)
    return found


def examples_for(cell: Cell, images: Images) -> Any | None:
    """The labelled examples that the cell's score sees, `None` when it needs none."""
    if cell.scoring is None or cell.scoring.examples is None:
        return None
    held_out = cell.training.held_out if cell.training is not None else 0.0
    used, _ = images.parts(held_out, cell.seed)
    return used.examples(cell.scoring.examples, seed=cell.seed)


def final_accuracies(cell: Cell, model: SparseModel, images: Images) -> dict[str, float]:
    """Accuracy and loss on all test images, on those trained on and on those held out."""
    assert cell.training is not None
    used, held_out = images.parts(cell.training.held_out, cell.seed)
    parts = {"test": images.test, "train": used, "held_out": held_out}
    scores = {name: part.evaluate(model) for name, part in parts.items() if part.size}
    return {f"{n}_{what}": value for n, found in scores.items() for what, value in found.items()}


def steps_in(epochs: float, samples: int, batch_size: int) -> int:
    """Steps in so many passes over `samples`, in whole batches a pass; at least 1."""
    return max(1, round(epochs * (samples // batch_size)))


_transfer_step = eqx.filter_jit(ntt_step)
_evaluated = eqx.filter_jit(ntt_evaluate)


@eqx.filter_jit(donate="all-except-first")
def _training_step(batch: Any, state: Any) -> Any:
    return train_step(state, batch)


@functools.lru_cache
def _adam(learning_rate: float) -> optax.GradientTransformation:
    # One object for one rate: a new one would make every cell compile its steps again.
    return optax.adam(learning_rate)
