"""`Dataset` and `Split`: images and labels in memory, and the sets that are made from others."""

import dataclasses
import math
import numbers
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from .._checks import is_count
from ._errors import DatasetError

_CHUNK = 4096  # samples per step of the statistics, which bounds their memory
_LEAST = float(np.finfo(np.float32).tiny)  # a deviation that float32 cannot divide by is none


@dataclasses.dataclass(frozen=True, eq=False)
class Split:
    """Samples and labels, unstandardised.

    Attributes:
        x: `[N, C, H, W]` images or a table `[N, F]`, of uint8 pixels or floating-point features.
        y: `[N]`, int32 labels in `[0, num_classes)`, or -1 everywhere in a label-free set.
    """

    x: np.ndarray
    y: np.ndarray

    def __post_init__(self) -> None:
        if self.x.ndim < 2 or self.y.ndim != 1 or len(self.x) != len(self.y):
            raise DatasetError(
                f"Split: x must be [N, ...] and y [N], got {self.x.shape} and {self.y.shape}."
            )
        if self.x.dtype != np.uint8 and not np.issubdtype(self.x.dtype, np.floating):
            raise DatasetError(f"Split: x must be uint8 or floating-point, got {self.x.dtype}.")
        if self.y.dtype != np.int32:
            raise DatasetError(f"Split: y must be int32, got {self.y.dtype}.")

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: Any) -> "Split":
        """The samples that a slice, an index array or a boolean array chooses."""
        return Split(self.x[index], self.y[index])


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """A train and a test split with what is needed to standardise them and to size a model.

    Attributes:
        name: the name it was loaded by.
        train: the train split.
        test: the test split.
        num_classes: the number of classes; of a label-free set, the largest of its parts'.
        mean: the mean of the train split, of `x / 255` for uint8 pixels; one float per channel of
            images and per feature of a floating-point table, a float where there is one or where
            all entries are of a kind.
        std: the standard deviation of the train split, likewise.
        labelled: whether `y` holds labels (a union of datasets does not).
    """

    name: str
    train: Split
    test: Split
    num_classes: int
    mean: float | tuple[float, ...]
    std: float | tuple[float, ...]
    labelled: bool = True

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The shape of one sample, `(C, H, W)` for images."""
        return self.train.x.shape[1:]


def make_dataset(
    name: str,
    train: Split,
    test: Split,
    num_classes: int,
    *,
    labelled: bool = True,
    channels_first: bool = False,
) -> Dataset:
    """Check two splits against each other and take the mean and deviation of the train split.

    **Arguments:**

    - `name`: what to call the dataset in messages and results.
    - `train`, `test`: splits with samples of the same shape and dtype.
    - `num_classes`: the number of classes.
    - `labelled`: `False` for a set whose labels are all -1.
    - `channels_first`: `True` says that samples are `[C, H, W]` although they look like `[H, W, C]`
      with 1, 3 or 4 channels.

    **Returns:**

    A `Dataset`.

    **Raises:**

    `DatasetError` when a split is empty, the two differ in shape or dtype, a label is out of
    range, a value is not finite in float32, the train split is constant, or its channels seem to be
    last.
    """
    if not is_count(num_classes, int(labelled)):
        raise DatasetError(f"{name}: num_classes must be a number of classes, got {num_classes!r}.")
    if not channels_first and _seems_channels_last(train.x.shape):
        raise DatasetError(
            f"{name}: samples of shape {train.x.shape[1:]} seem to have their channels last, but "
            "images are [N, C, H, W]: hand over x.transpose(0, 3, 1, 2). If channels are first, "
            "say so by make_dataset(..., channels_first=True)."
        )
    if train.x.shape[1:] != test.x.shape[1:] or train.x.dtype != test.x.dtype:
        raise DatasetError(
            f"{name}: train and test samples differ: {train.x.shape[1:]} {train.x.dtype} and "
            f"{test.x.shape[1:]} {test.x.dtype}."
        )
    for part, split in (("train", train), ("test", test)):
        if len(split) == 0:
            raise DatasetError(f"{name}: the {part} split is empty.")
        if not all(map(_is_finite, _chunks(split.x))):
            raise DatasetError(f"{name}: the {part} split holds values that float32 cannot.")
        low, high = int(split.y.min()), int(split.y.max())
        if labelled and not 0 <= low <= high < num_classes:
            raise DatasetError(
                f"{name}: {part} labels reach from {low} to {high}; "
                f"they must lie in [0, {num_classes})."
            )
    mean, std = _statistics(name, train.x)
    return Dataset(name, train, test, num_classes, mean, std, labelled)


def hold_out(split: Split, fraction: float, *, seed: int) -> tuple[Split, Split]:
    """Split off a random share of the samples, for validation.

    **Arguments:**

    - `split`: the samples to divide.
    - `fraction`: the share to hold out, in (0, 1); `round(fraction * N)` samples, at least one
      (0.002 for the distances during transfer and 0.1 for the supervised phase in the paper).
    - `seed`: which random samples; the same seed holds out the same ones.

    **Returns:**

    `(rest, held_out)`, each in the original order.

    **Raises:**

    `ValueError` for a fraction outside (0, 1) or one that would leave nothing, or a negative seed.
    """
    if not (isinstance(fraction, numbers.Real) and 0.0 < float(fraction) < 1.0):
        raise ValueError(f"hold_out: fraction must lie in (0, 1), got {fraction!r}.")
    if not is_count(seed, 0):
        raise ValueError(f"hold_out: seed must not be negative, and a whole number, got {seed!r}.")
    size = max(1, round(fraction * len(split)))
    if size >= len(split):
        raise ValueError(f"hold_out: {fraction} of {len(split)} samples leaves none to train on.")
    chosen = np.zeros(len(split), bool)
    chosen[np.random.default_rng([seed, 2]).permutation(len(split))[:size]] = True
    return split[~chosen], split[chosen]


def select_classes(
    dataset: Dataset, classes: Sequence[int], *, per_class: int | None = None
) -> Dataset:
    """Keep some classes only, labelled `0, 1, ...` in the order in which they are given.

    **Arguments:**

    - `dataset`: a labelled dataset.
    - `classes`: two or more different labels of `dataset`.
    - `per_class`: keep the first so many train samples of each class and at most as many test
      samples (the paper's two-way classification uses 250); `None` keeps all.

    **Returns:**

    A `Dataset` with its own mean and deviation; its name tells the choice.

    **Raises:**

    `DatasetError` for an unlabelled dataset, unknown or repeated classes, or too few samples.
    """
    if not dataset.labelled:
        raise DatasetError(f"{dataset.name}: has no labels to choose classes by.")
    check_classes(dataset.name, dataset.num_classes, classes)
    for label in classes:
        available = int(np.sum(dataset.train.y == label))
        if per_class is not None and not 1 <= per_class <= available:
            raise DatasetError(
                f"{dataset.name}: cannot take {per_class} train samples of class {label}, "
                f"which has {available}."
            )
    train = _only(dataset.train, classes, per_class)
    test = _only(dataset.test, classes, per_class)
    suffix = ",".join(map(str, classes)) + ("" if per_class is None else f":{per_class}")
    name = f"{dataset.name}:{suffix}"
    return make_dataset(name, train, test, len(classes), channels_first=True)


def check_classes(name: str, num_classes: int, classes: Sequence[int]) -> None:
    """Raise `DatasetError` unless these are two or more different ones of the classes."""
    known = set(range(num_classes))
    if len(classes) < 2 or len(set(classes)) != len(classes) or not set(classes) <= known:
        raise DatasetError(
            f"{name}: choose at least two different classes out of 0 to {num_classes - 1}, "
            f"got {', '.join(map(str, classes))}."
        )


def unite(first: Dataset, second: Dataset) -> Dataset:
    """The label-free union of two datasets, for transfer: all samples of both, labels -1.

    Both are standardised by the mean and the deviation of the united train split.

    **Arguments:**

    - `first`, `second`: datasets with samples of the same shape and dtype.

    **Returns:**

    A `Dataset` called `first+second`.

    **Raises:**

    `DatasetError` when the samples differ in shape or dtype.
    """
    name = f"{first.name}+{second.name}"
    train = _concatenate(name, first.train, second.train)
    test = _concatenate(name, first.test, second.test)
    classes = max(first.num_classes, second.num_classes)
    return make_dataset(name, train, test, classes, labelled=False, channels_first=True)


def _only(split: Split, classes: Sequence[int], per_class: int | None) -> Split:
    y = np.full(len(split), -1, np.int32)
    for new, old in enumerate(classes):
        y[np.flatnonzero(split.y == old)[:per_class]] = new
    return Split(split.x[y >= 0], y[y >= 0])


def _concatenate(name: str, one: Split, two: Split) -> Split:
    if one.x.shape[1:] != two.x.shape[1:] or one.x.dtype != two.x.dtype:
        raise DatasetError(
            f"{name}: samples differ: {one.x.shape[1:]} {one.x.dtype} and "
            f"{two.x.shape[1:]} {two.x.dtype}."
        )
    x = np.concatenate([one.x, two.x])
    return Split(x, np.full(len(x), -1, np.int32))


def _statistics(
    name: str, x: np.ndarray
) -> tuple[float | tuple[float, ...], float | tuple[float, ...]]:
    """Mean and deviation, per channel of images that have several and per feature of a table.

    A table of uint8 is one of pixels, which are of a kind.
    """
    if x.ndim == 2 and x.shape[1] > 1 and x.dtype != np.uint8:
        return _of_features(name, x)
    channels = x.shape[1] if x.ndim == 4 and x.shape[1] > 1 else 1
    moments = [_moments(x[:, c] if channels > 1 else x) for c in range(channels)]
    mean, std = tuple(m for m, _ in moments), tuple(s for _, s in moments)
    if min(std) <= _LEAST:
        which = "" if max(std) <= _LEAST else f"channel {std.index(min(std))} of "
        raise DatasetError(
            f"{name}: {which}the train split is constant and cannot be standardised."
        )
    return (mean[0], std[0]) if channels == 1 else (mean, std)


def _of_features(name: str, x: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of each feature; one that is the same everywhere becomes 0."""
    low = np.min([chunk.min(0) for chunk in _chunks(x)], axis=0)
    varies = low < np.max([chunk.max(0) for chunk in _chunks(x)], axis=0)
    if not varies.any():
        raise DatasetError(f"{name}: the train split is constant and cannot be standardised.")
    mean = sum(np.sum(chunk, axis=0, dtype=np.float64) for chunk in _chunks(x)) / len(x)
    spread = sum(np.sum(np.square(chunk - mean), axis=0) for chunk in _chunks(x)) / len(x)
    std = np.sqrt(spread)
    varies &= std > _LEAST
    std, mean = np.where(varies, std, 1.0), np.where(varies, mean, low.astype(np.float64))
    return tuple(map(float, mean)), tuple(map(float, std))


def _seems_channels_last(shape: tuple[int, ...]) -> bool:
    """Whether `[N, H, W, C]` is more likely than `[N, C, H, W]`; one channel tells of squares."""
    if len(shape) != 4:
        return False
    height, width, channels = shape[1:]
    if channels == 1:
        return height == width > 4
    return channels in (3, 4) and min(height, width) > 4


def _moments(x: np.ndarray) -> tuple[float, float]:
    """Mean and standard deviation; of pixels only the histogram is needed."""
    if x.dtype == np.uint8:
        counts = sum(np.bincount(chunk.ravel(), minlength=256) for chunk in _chunks(x))
        value = np.arange(256) / 255
        first = float(counts @ value / x.size)
        return first, math.sqrt(float(counts @ (value - first) ** 2 / x.size))
    low = min(float(chunk.min()) for chunk in _chunks(x))
    if low == max(float(chunk.max()) for chunk in _chunks(x)):
        return low, 0.0  # a rounded mean would leave a deviation, by which padding is divided
    first = sum(float(np.sum(chunk, dtype=np.float64)) for chunk in _chunks(x)) / x.size
    # around the mean, for the raw second moment of features far from zero would cancel
    spread = sum(float(np.sum(np.square(chunk - np.float64(first)))) for chunk in _chunks(x))
    return first, math.sqrt(spread / x.size)


def _chunks(x: np.ndarray) -> Iterator[np.ndarray]:
    return (x[start : start + _CHUNK] for start in range(0, len(x), _CHUNK))


def _is_finite(x: np.ndarray) -> bool:
    with np.errstate(over="ignore"):
        return x.dtype == np.uint8 or bool(np.all(np.isfinite(x.astype(np.float32))))
