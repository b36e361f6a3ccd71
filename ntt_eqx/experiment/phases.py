"""The two phases of a cell: the label-free transfer and the supervised training."""

import functools
from collections.abc import Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from .._sparse import SparseModel
from .._supervised import TrainConfig, evaluate, rescale_by_density, train_init, train_step
from .._transfer import NTTConfig, NTTState, ntt_evaluate, ntt_init, ntt_step
from .cells import Cell
from .images import Images
from .methods import SUPERVISED, pruned_at_start
from .phase import Phase, epochs_to_steps

_CURVE_IMAGES = 10_000
_VALIDATION_IMAGES = 128


def transfer_phase(cell: Cell, teacher: Any, images: Images, title: str) -> Phase:
    """Neural Tangent Transfer from `teacher`, on images without their labels."""
    settings = cell.transfer
    assert settings is not None and settings.l2_weight is not None
    used, held_out = images.parts(settings.held_out, cell.seed)
    steps = epochs_to_steps(settings.epochs, used.size, settings.batch_size)
    config = NTTConfig(
        density=cell.density,
        num_steps=steps,
        scope=cell.scope or "layer",
        mask_every=settings.mask_every or None,
        kernel="ambient" if cell.method == "ntt-ambient" else "active",
        kernel_weight=settings.kernel_weight,
        l2_weight=settings.l2_weight,
    )
    first = None
    if settings.initial_mask != "magnitude" or cell.mask is not None:
        if settings.initial_mask in SUPERVISED:
            images.check_labelled()
        count = cell.scoring.examples if cell.scoring is not None else None
        seen_first = None if count is None else used.examples(count, seed=cell.seed)
        key = jax.random.fold_in(jax.random.key(cell.seed), 1)
        first = pruned_at_start(cell, teacher, seen_first, key).mask
    watched = min(held_out.size, _VALIDATION_IMAGES) // 2 * 2
    seen = held_out.first(watched).x if watched else None

    def step(state: NTTState, batch: Any) -> tuple[NTTState, Mapping[str, Array]]:
        state, metrics = _transfer_step(state, jnp.asarray(batch.x))
        return state, _fields(metrics)

    def observe(state: NTTState, at: int) -> dict[str, Any]:
        if seen is None:
            return {}
        return {"validation": _floats(_fields(_evaluated(state, seen)))}

    return Phase(
        name="transfer",
        title=f"{title}, transfer",
        num_steps=steps,
        log_every=min(settings.log_every, steps),
        state=ntt_init(teacher, config, _adam(settings.learning_rate), mask=first),
        batches=used.batches(settings.batch_size, seed=cell.seed),
        step=step,
        observe=observe,
        shown=_shown_distances,
        advice=f"Try a smaller --transfer.learning-rate (now {settings.learning_rate:g}).",
    )


def training_phase(cell: Cell, start: SparseModel, images: Images, title: str) -> Phase:
    """Supervised training of the sparse network `start`."""
    settings = cell.training
    assert settings is not None
    used, _ = images.parts(settings.held_out, cell.seed)
    steps = epochs_to_steps(settings.epochs, used.size, settings.batch_size)
    each = settings.evaluate_every or max(1, used.size // settings.batch_size)
    dropout = cell.model.endswith("-dropout")
    model = rescale_by_density(start) if settings.rescale else start
    model = jax.tree.map(lambda a: jnp.copy(a) if eqx.is_array(a) else a, model)  # donated below
    key = jax.random.fold_in(jax.random.key(cell.seed), 2)

    def step(state: Any, batch: Any) -> tuple[Any, Mapping[str, Array]]:
        state, metrics = _training_step((jnp.asarray(batch.x), jnp.asarray(batch.y)), state)
        return state, {"loss": metrics.loss, "accuracy": metrics.metrics["accuracy"]}

    def observe(state: Any, at: int) -> dict[str, Any]:
        return {"test": evaluate(state.model, images.test.first(_CURVE_IMAGES))}

    return Phase(
        name="train",
        title=f"{title}, training",
        num_steps=steps,
        log_every=min(each, steps),
        state=train_init(
            model,
            TrainConfig(settings.l2),
            _adam(settings.learning_rate),
            key=key if dropout else None,
        ),
        batches=used.batches(settings.batch_size, seed=cell.seed),
        step=step,
        observe=observe,
        shown=lambda row: {
            "test accuracy": row["test"]["accuracy"],
            "loss": row["train"]["loss"],
        },
        advice=f"Try a smaller --training.learning-rate (now {settings.learning_rate:g}).",
    )


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


_transfer_step = eqx.filter_jit(ntt_step)
_evaluated = eqx.filter_jit(ntt_evaluate)


@eqx.filter_jit(donate="all-except-first")
def _training_step(batch: Any, state: Any) -> Any:
    return train_step(state, batch)


@functools.lru_cache
def _adam(learning_rate: float) -> optax.GradientTransformation:
    # One object for one rate: a new one would make every cell compile its steps again.
    return optax.adam(learning_rate)


def _fields(metrics: Any) -> Mapping[str, Array]:
    names = ("loss", "kernel_distance", "target_distance", "weight_norm", "density")
    return {name: getattr(metrics, name) for name in names}


def _floats(metrics: Mapping[str, Array]) -> dict[str, float]:
    return {name: float(value) for name, value in jax.device_get(dict(metrics)).items()}


def _shown_distances(row: dict[str, Any]) -> Mapping[str, float]:
    seen = row.get("validation", row["train"])
    return {"kernel": seen["kernel_distance"], "target": seen["target_distance"]}
