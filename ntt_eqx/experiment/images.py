"""The image sets of a run: loaded once, cut into parts, standardised."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .. import evaluate
from ..data import (
    DATASETS,
    Batch,
    BatchIterator,
    Dataset,
    DatasetError,
    Split,
    as_batch,
    batches,
    check_dataset_name,
    hold_out,
    load_dataset,
)
from ._errors import ExperimentError, check_choice

_CHUNK = 10_000


def check_dataset(name: str) -> None:
    """Raise `ExperimentError` unless `name` is a dataset, some of its classes, two, or a folder."""
    for part in [] if name.startswith("npy:") else name.split("+"):
        check_choice("dataset", part.partition(":")[0], DATASETS)
    try:
        check_dataset_name(name)
    except DatasetError as error:
        raise ExperimentError(str(error)) from error


class ImageShelf:
    """Loads image sets by name, each once."""

    def __init__(self, data_dir: Path | None = None):
        self._data_dir = data_dir
        self._loaded: dict[str, Images] = {}

    def load(self, name: str) -> "Images":
        """The image set called `name`."""
        if name not in self._loaded:
            self._loaded[name] = Images(load_dataset(name, self._data_dir))
        return self._loaded[name]


class Images:
    """One image set.

    Attributes:
        name: what it was loaded by.
        input_shape: `(C, H, W)` of one image.
        num_classes: number of labels.
        mean: of the training images, one float or one per channel.
        std: likewise.
        test: the test images.
    """

    def __init__(self, dataset: Dataset):
        self._dataset = dataset
        self.name = dataset.name
        self.input_shape = dataset.input_shape
        self.num_classes = dataset.num_classes
        self.mean, self.std = dataset.mean, dataset.std
        self.test = Part(dataset, dataset.test)

    def parts(self, held_out: float, seed: int) -> tuple["Part", "Part"]:
        """The training images to use and those to hold out: a random share, the same per seed."""
        train = self._dataset.train
        if held_out == 0.0:
            return Part(self._dataset, train), Part(self._dataset, train[:0])
        used, kept = hold_out(train, held_out, seed=seed)
        return Part(self._dataset, used), Part(self._dataset, kept)

    def check_labelled(self) -> None:
        """Raise `ExperimentError` for a set without labels, which cannot be trained on."""
        if not self._dataset.labelled:
            raise ExperimentError(
                f"dataset {self.name!r} has no labels; it serves --transfer.dataset only."
            )

    def check_network(self, path: Path, header: Mapping[str, Any], *, labels: bool = True) -> None:
        """Raise `ExperimentError` unless the network in the file `path` takes these images.

        With `labels`, it must know all their classes, too.
        """
        arguments = header["arguments"]
        shape, known = list(arguments["input_shape"]), arguments["num_classes"]
        if shape != list(self.input_shape):
            raise ExperimentError(
                f"{path}: its network takes images of shape {shape}, but {self.name} has "
                f"{list(self.input_shape)}."
            )
        if labels and known < self.num_classes:
            raise ExperimentError(
                f"{path}: its network knows {known} classes, but {self.name} has "
                f"{self.num_classes}."
            )


class Part:
    """Some images of a set, standardised by the set's own mean and deviation."""

    def __init__(self, dataset: Dataset, split: Split):
        self._name, self._split = dataset.name, split
        self._moments: Any = {"mean": dataset.mean, "std": dataset.std}
        self._first: tuple[int, Batch] | None = None

    @property
    def size(self) -> int:
        """Number of images."""
        return len(self._split)

    def batches(self, batch_size: int, *, seed: int) -> BatchIterator:
        """Endless shuffled batches; `ExperimentError` if one needs more images than there are."""
        if batch_size > self.size:
            raise ExperimentError(
                f"{self._name}: a batch of {batch_size} images does not fit into {self.size}."
            )
        return batches(self._split, batch_size, seed=seed, **self._moments)

    def examples(self, count: int, *, seed: int) -> Batch:
        """`count` random images, the same for the same seed."""
        return next(self.batches(min(count, self.size), seed=seed))

    def first(self, count: int) -> Batch:
        """The first `count` images, or all if there are fewer; kept in memory."""
        count = min(count, self.size)
        if self._first is None or self._first[0] != count:
            self._first = count, as_batch(self._split[:count], **self._moments)
        return self._first[1]

    def evaluate(self, model: Any) -> dict[str, float]:
        """Loss and accuracy of `model` on all images, a bounded number at a time."""
        sizes, found = [], []
        for start in range(0, self.size, _CHUNK):
            part = self._split[start : start + _CHUNK]
            sizes.append(len(part))
            found.append(evaluate(model, as_batch(part, **self._moments)))
        return {
            name: float(np.average([values[name] for values in found], weights=sizes))
            for name in found[0]
        }
