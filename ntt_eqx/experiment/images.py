"""The image sets of a run: loaded once, cut into parts, standardised."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import jax
import numpy as np

from .. import Recipe, evaluate
from .._distribute import layout_in_use
from ..data import (
    DATASETS,
    Batch,
    BatchIterator,
    Dataset,
    Split,
    as_batch,
    batches,
    check_dataset_name,
    hold_out,
    load_dataset,
)
from ._errors import ExperimentError, check_choice
from .own import own_dataset, unknown_code
from .references import is_reference

_CHUNK = 1000

Shelf: TypeAlias = Callable[[str], Dataset]
"""Finds image sets by name."""


def shelf_of(data_dir: Path | None) -> Shelf:
    """A shelf that looks into `data_dir`, too, and loads each set once."""
    return functools.cache(lambda name: own_dataset(name) or load_dataset(name, data_dir))


@dataclasses.dataclass(frozen=True)
class StandardisedSplit:
    """Some images of a set, standardised by the mean and deviation that the set names."""

    images: Dataset
    split: Split

    @property
    def size(self) -> int:
        """Number of images."""
        return len(self.split)

    def batches(self, batch_size: int, *, seed: int) -> BatchIterator:
        """Endless shuffled batches; `ExperimentError` if one needs more images than there are."""
        self.check_batch(batch_size)
        return batches(self.split, batch_size, seed=seed, **self._moments)

    def training_batches(self, recipe: Recipe, *, seed: int) -> BatchIterator:
        """`batches` as a recipe of training has them, prepared on an accelerator that has room.

        `ExperimentError` for a batch with more images than there are, or crops of what are none.
        """
        self.check_batch(recipe.batch_size)
        there = _fits_device(self.split)
        try:
            return recipe.batches(self.split, seed=seed, on_device=there, **self._moments)
        except ValueError as error:
            said = str(error).removeprefix("batches: ")
            raise ExperimentError(f"{self.images.name}: {said}") from None

    def check_batch(self, batch_size: int) -> None:
        """Raise `ExperimentError` for a batch that is larger than the split."""
        check_batch(self.images.name, self.size, batch_size)

    @property
    def _moments(self) -> Any:
        return {"mean": self.images.mean, "std": self.images.std}

    def examples(self, count: int, *, seed: int) -> Batch:
        """`count` random images, the same for the same seed."""
        return next(self.batches(min(count, self.size), seed=seed))

    def first(self, count: int, start: int = 0) -> Batch:
        """`count` images from number `start` on, or as many as there are."""
        return as_batch(self.split[start : start + count], **self._moments)

    def evaluate(self, model: Any) -> dict[str, float]:
        """Loss and accuracy of `model` on all images, a bounded number at a time."""
        return evaluate(model, (self.first(_CHUNK, at) for at in range(0, self.size, _CHUNK)))


def check_batch(name: str, size: int, batch_size: int, what: str = "") -> None:
    """Raise `ExperimentError` for a batch that is larger than the `size` images of a set."""
    if batch_size > size:
        raise ExperimentError(
            f"{what}{name}: a batch of {batch_size} images does not fit into {size}."
        )


def _fits_device(split: Split) -> bool:
    """Whether there is one accelerator, of whose memory the samples take a small part.

    The batches are the same bits there, so no result depends on it.
    """
    kind = split.x.dtype
    if jax.default_backend() == "cpu" or layout_in_use() is not None:
        return False
    if not kind.isnative or kind not in (np.uint8, np.float32):
        return False
    room = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit", 0)
    return split.x.nbytes <= room / 8


def parts(
    images: Dataset, held_out: float, seed: int, labels: int | None = None
) -> tuple[StandardisedSplit, StandardisedSplit]:
    """The training images to use and those to hold out: a random share, the same per seed.

    `labels` limits the images to use to so many, as many of each class as there can be.
    Raises `ExperimentError` when there are fewer.
    """
    used, kept = images.train, images.train[:0]
    if held_out > 0:
        used, kept = hold_out(images.train, held_out, seed=seed)
    if labels is not None:
        if labels > len(used):
            raise ExperimentError(
                f"training.labels: {labels} labelled images of {images.name}, which has "
                f"{len(used)} to train on."
            )
        used = used[_balanced(used.y, labels, seed)]
    return StandardisedSplit(images, used), StandardisedSplit(images, kept)


@functools.lru_cache(maxsize=8)
def size_of_used(images: Dataset, held_out: float, labels: int | None) -> int:
    """How many images `parts` finds to use, which is the same for each seed."""
    return parts(images, held_out, 0, labels)[0].size


def _balanced(y: np.ndarray, count: int, seed: int) -> np.ndarray:
    """The places of `count` random samples, in order: as many of each class as there can be."""
    order = np.random.default_rng([seed, 3]).permutation(len(y))
    turn = np.empty(len(y), np.int64)  # of each sample within its class
    for label in np.unique(y):
        mine = order[y[order] == label]
        turn[mine] = np.arange(len(mine))
    return np.sort(order[np.argsort(turn[order], kind="stable")][:count])


def check_dataset(name: str) -> None:
    """Raise unless `name` is a dataset, some of its classes, two of them, a folder, or own code."""
    if own_dataset(name) is not None:
        return
    if is_reference(name):
        raise ExperimentError(unknown_code("dataset", name))
    for part in [] if name.startswith("npy:") else name.split("+"):
        check_choice("dataset", part.partition(":")[0], DATASETS)
    check_dataset_name(name)


def check_labelled(images: Dataset) -> None:
    """Raise `ExperimentError` for a set without labels, which cannot be trained on."""
    if not images.labelled:
        raise ExperimentError(
            f"dataset {images.name!r} has no labels; it serves --transfer.dataset only."
        )


def standardised_for(path: Path, header: Mapping[str, Any], images: Dataset) -> Dataset:
    """The images with the mean and deviation that the network in the file `path` was trained with.

    The set's own where the file does not say, which was so up to version 0.2. Raises
    `ExperimentError` for what cannot be a mean or a deviation of these images.
    """
    given = header.get("mean"), header.get("std")
    if None in given:
        return images
    try:
        mean, std = (np.asarray(each, np.float64) for each in given)
        like = np.shape(images.mean)
        good = all(each.shape in ((), like) for each in (mean, std))
        good = good and bool(np.isfinite(mean).all() and np.isfinite(std).all() and (std > 0).all())
    except (TypeError, ValueError):
        good = False
    if not good:
        raise ExperimentError(
            f"{path}: damaged: its mean and deviation are not those of images like {images.name}."
        )
    plain = lambda each: float(each) if each.ndim == 0 else tuple(each.tolist())
    return dataclasses.replace(images, mean=plain(mean), std=plain(std))


def check_network(
    path: Path, header: Mapping[str, Any], images: Dataset, *, labels: bool = True
) -> None:
    """Raise `ExperimentError` unless the network in the file `path` takes these images.

    With `labels`, it must know all their classes, too.
    """
    shape, known = list(header["arguments"]["input_shape"]), header["arguments"]["num_classes"]
    if shape != list(images.input_shape):
        raise ExperimentError(
            f"{path}: its network takes images of shape {shape}, but {images.name} has "
            f"{list(images.input_shape)}."
        )
    if labels and known < images.num_classes:
        raise ExperimentError(
            f"{path}: its network knows {known} classes, but {images.name} has "
            f"{images.num_classes}."
        )
