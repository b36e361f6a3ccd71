"""The two phases of a cell: the label-free transfer and the supervised training."""

import functools
from typing import Any

import numpy as np
import optax

from .. import (
    Compacted,
    KernelObserver,
    NTTConfig,
    RoundRefresh,
    SparseModel,
    Sparsity,
    ntt_init,
    rescale_by_density,
    sparsify,
    train_steps,
    transfer,
)
from .._checks import sample_of
from .._examples import num_classes
from ..data import Dataset
from .cells import Cell
from .images import Shelf, StandardisedSplit, check_batch, check_labelled, parts, size_of_used
from .loop import Phase
from .own import draws_in_training, find_method
from .part import densities_of_whole, dynamic_inside, inside
from .pruning import dynamic_of, pruned_at_start, transfer_sparsity

_CURVE_IMAGES = 10_000
_VALIDATION_IMAGES = 128


def transfer_phase(
    cell: Cell, teacher: Any, images: Dataset, title: str, part: Compacted | None = None
) -> Phase:
    """Neural Tangent Transfer from `teacher` to itself or a part of it, on unlabelled images."""
    settings = cell.transfer
    assert settings is not None and settings.l2_weight is not None
    used, held_out = parts(images, settings.held_out, cell.seed)
    steps = steps_in(settings.epochs, used.size, settings.batch_size)
    sparsity = transfer_sparsity(cell, teacher, images.input_shape, steps)
    dense, small, noted = sparsify(teacher), None, lambda row: row
    if part is not None:
        sparsity, small = inside(sparsity, dense.mask, part), part.take(dense)
        noted = densities_of_whole(small, dense)
    config = NTTConfig(
        density=sparsity.density,
        num_steps=steps,
        scope=sparsity.scope,
        mask_every=settings.mask_every or None,
        kernel="ambient" if find_method(cell.method).kernel == "ambient" else "active",
        outputs="full" if settings.sketch_size is None else "sketch",
        sketch_size=settings.sketch_size or NTTConfig.sketch_size,
        kernel_weight=settings.kernel_weight,
        l2_weight=settings.l2_weight,
        allocation=sparsity.allocation,
        pattern=sparsity.pattern,
    )
    first = None
    if settings.initial_mask != "magnitude":
        if find_method(settings.initial_mask).labels:
            check_labelled(images)
        count = cell.scoring.examples if cell.scoring is not None else None
        seen = None if count is None else used.examples(count, seed=cell.seed)
        first = pruned_at_start(cell, teacher, images.input_shape, seen, cell.key(1)).mask
        first = first if part is None else part.take(dense.with_mask(first)).mask
    watched = min(held_out.size, _VALIDATION_IMAGES) // 2 * 2

    def shown(row: dict[str, Any]) -> dict[str, float]:
        values = row.get("validation", row["train"])
        return {"kernel": values["kernel_distance"], "target": values["target_distance"]}

    return Phase(
        name="transfer",
        title=f"{title}, transfer",
        num_steps=steps,
        log_every=min(settings.log_every, steps),
        state=ntt_init(
            teacher,
            config,
            _adam(settings.learning_rate, settings.decay, steps),
            mask=first,
            student=None if small is None else small.model,
        ),
        batches=used.batches(settings.batch_size, seed=cell.seed),
        run=functools.partial(transfer, validation=held_out.first(watched).x if watched else None),
        shown=shown,
        advice=f"Try a smaller --transfer.learning-rate (now {settings.learning_rate:g}).",
        noted=noted,
    )


def training_phase(
    cell: Cell, start: SparseModel, images: Dataset, title: str, part: Compacted | None = None
) -> Phase:
    """Supervised training of the sparse network `start`, or of a part of it."""
    settings = cell.training
    assert settings is not None
    used, _ = parts(images, settings.held_out, cell.seed, settings.labels)
    steps = steps_in(settings.epochs, used.size, settings.batch_size)
    recipe = settings.recipe()
    each = settings.evaluate_every or max(1, used.size // settings.batch_size)
    key = cell.key(2) if draws_in_training(cell.model, start.model) else None
    model = rescale_by_density(start) if settings.rescale else start
    model = model if part is None else part.take(model)
    dynamic = dynamic_of(cell, start.model, images.input_shape, steps)
    if part is not None and dynamic is not None:
        dynamic = dynamic_inside(dynamic, start.mask, part)
    test, observe = StandardisedSplit(images, images.test), {}
    if settings.kernel_images:
        x, y = test.first(settings.kernel_images)
        logits = num_classes("train", start, sample_of(x))  # there may be more than classes
        observe["kernel"] = KernelObserver(x, np.eye(logits, dtype=np.float32)[y])
    return Phase(
        name="train",
        title=f"{title}, training",
        num_steps=_all_trainings(cell, steps),
        log_every=min(each, steps),
        state=recipe.init(model, steps, key=key, dynamic=dynamic),
        batches=used.training_batches(recipe, seed=cell.seed),
        run=functools.partial(train_steps, test_set=test.first(_CURVE_IMAGES), observe=observe),
        shown=lambda row: {
            "test accuracy": row["test"]["accuracy"],
            "loss": row["train"]["loss"],
        },
        advice=f"Try a smaller --training.learning-rate (now {settings.learning_rate:g}).",
    )


def planned_steps(cell: Cell, shelf: Shelf) -> dict[str, int]:
    """The phases of a cell, and the steps of each.

    Raises `ExperimentError` for a batch that is larger than its images.
    """
    found = {}
    for name, settings in (("transfer", cell.transfer), ("train", cell.training)):
        if settings is not None:
            source = getattr(settings, "dataset", None) or cell.dataset
            labels = getattr(settings, "labels", None)
            images = shelf(source)
            size = size_of_used(images, settings.held_out, labels)
            part = "training" if name == "train" else name
            check_batch(images.name, size, settings.batch_size, f"{part}.batch_size: ")
            steps = steps_in(settings.epochs, size, settings.batch_size)
            found[name] = steps if name == "transfer" else _all_trainings(cell, steps)
    return found


def _all_trainings(cell: Cell, steps: int) -> int:
    """The steps of all trainings of `steps` steps; a lottery ticket is trained after each round."""
    record = find_method(cell.method)
    if record.dynamic is None or cell.start is not None:
        return steps
    refresh = record.dynamic(Sparsity(cell.density), steps, cell.seed).refresh
    return refresh.num_steps if isinstance(refresh, RoundRefresh) else steps


def steps_in(epochs: float, samples: int, batch_size: int) -> int:
    """Steps in so many passes over `samples`, in whole batches a pass; at least 1."""
    return max(1, round(epochs * (samples // batch_size)))


@functools.lru_cache
def _adam(learning_rate: float, decay: float = 1.0, steps: int = 0) -> optax.GradientTransformation:
    # One object for one rate: a new one would make every cell compile its steps again.
    if decay == 1:
        return optax.adam(learning_rate)
    return optax.adam(optax.cosine_decay_schedule(learning_rate, steps, decay))
