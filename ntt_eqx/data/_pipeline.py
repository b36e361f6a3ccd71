"""Batches through Grain: deterministic, resumable, of static shape, standardised as float32."""

import sys
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from .._checks import check_count, is_count
from .._distribute import Layout, layout_in_use
from ._dataset import Split
from ._views import Batch, RandomViews, SamplesOnDevice

Moment = float | Sequence[float]


@runtime_checkable
class BatchIterator(Protocol):
    """The iterator that `batches` returns: Grain's, with a small JSON-able dict as its state."""

    def __iter__(self) -> "BatchIterator": ...

    def __next__(self) -> Batch: ...

    def get_state(self) -> Any:
        """The position of the iterator."""
        ...

    def set_state(self, state: Any) -> None:
        """Move to the position of `get_state`, in an iterator with the same arguments."""
        ...


def batches(
    split: Split,
    batch_size: int,
    *,
    seed: int,
    mean: Moment = 0.0,
    std: Moment = 1.0,
    shuffle: bool = True,
    num_epochs: int | None = None,
    num_threads: int = 0,
    crop: int = 0,
    flip: bool = False,
    on_device: bool = False,
) -> BatchIterator:
    """Iterate over a split in shuffled, standardised batches.

    Inside `ntt.distribute` with several processes a batch is one global array, of which each
    process loads the rows of its devices; the order is the same for any number of processes.

    Every epoch has its own order. A batch may span two epochs, so that every sample comes exactly
    once per epoch and every batch is full. The batches depend on
    nothing but the arguments: not on `num_threads`, nor on where an iterator was resumed.

    **Arguments:**

    - `split`: the samples.
    - `batch_size`: samples per batch, at most `len(split)`.
    - `seed`: which shuffled orders; a non-negative integer.
    - `mean`, `std`: `Dataset.mean` and `Dataset.std`; a float or one per channel or feature. A
      batch is `(x / 255 - mean) / std` for uint8 pixels and `(x - mean) / std` for float features.
    - `shuffle`: `False` goes through the samples in their order.
    - `num_epochs`: stop after so many epochs, without the last batch if it is not full; `None`
      goes on for ever.
    - `num_threads`: threads that prepare batches ahead; 0 prepares each when it is asked for.
    - `crop`: cut each image at random from itself with so many pixels of zeros around it, zeros of
      the stored values, as is usual: black pixels. 0 leaves it as it is.
    - `flip`: mirror each image, left to right, with probability 1/2.
    - `on_device`: keep all samples on the device, as they are stored, and prepare batches there:
      for accelerators, where a batch of pixels takes longer to copy than to use. Samples are uint8
      or float32. Not inside `ntt.distribute`, whose processes load rows of their own.

    The crop and the flip of the batch with a number follow from `seed` and that number alone.

    **Returns:**

    A Grain iterator of `Batch`, with `get_state()` and `set_state(state)`.

    **Raises:**

    `ValueError` for a batch size, seed, number of epochs or statistics that cannot be used, for
    crops and flips of what are no images, and for samples that cannot be kept on the device.
    """
    import grain  # here, for it is slow to import and imports Orbax where that is installed

    _check(split, batch_size, seed, num_epochs, num_threads)
    offset, scale = _offset_and_scale(split.x, mean, std)
    source = _ShuffledBatches(len(split), batch_size, seed if shuffle else None, num_epochs)
    layout = layout_in_use()
    draws = RandomViews(split.x, crop, flip, seed)
    device = SamplesOnDevice(split, offset, scale, draws, layout) if on_device else None

    def gather(number: int, indices: np.ndarray) -> Batch:
        views = draws.of_batch(number, len(indices))
        if device is not None:
            return device.batch(indices, views)

        def x(rows: slice) -> np.ndarray:
            samples = draws.cut(split.x[indices[rows]], *(v[rows] for v in views))
            return _standardise(samples, offset, scale)

        y = lambda rows: split.y[indices[rows]]
        return _load(layout, (len(indices), *split.x.shape[1:]), x, y)

    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=2 * num_threads)
    numbered = grain.MapDataset.source(source).map_with_index(gather)
    return iter(numbered.to_iter_dataset(options))


def as_batch(split: Split, *, mean: Moment = 0.0, std: Moment = 1.0) -> Batch:
    """All samples of a split, in their order, standardised like those of `batches`.

    **Arguments:**

    - `split`: the samples.
    - `mean`, `std`: `Dataset.mean` and `Dataset.std`; see `batches`.

    **Returns:**

    One `Batch` of the size of the split. Like those of `batches` it is one global array inside
    `ntt.distribute` with several processes.
    """
    offset, scale = _offset_and_scale(split.x, mean, std)
    x = lambda rows: _standardise(split.x[rows], offset, scale)
    return _load(layout_in_use(), split.x.shape, x, lambda rows: split.y[rows])


_Rows = Callable[[slice], np.ndarray]


def _load(layout: Layout | None, shape: tuple[int, ...], x: _Rows, y: _Rows) -> Batch:
    """A batch of samples `shape`; each of several processes loads the rows of its own devices."""
    if layout is None or layout.processes == 1:
        return Batch(jnp.asarray(x(slice(None))), jnp.asarray(y(slice(None))))
    return Batch(_own_rows(layout, shape, x), _own_rows(layout, shape[:1], y))


def _own_rows(layout: Layout, shape: tuple[int, ...], rows: _Rows) -> Array:
    sharding = layout.sharding(layout.spec_of_samples(shape))
    own = lambda index: rows(index[0])  # pyright: ignore[reportOptionalSubscript]
    return jax.make_array_from_callback(shape, sharding, own)


class _ShuffledBatches:
    """Sample indices, batch by batch: a Grain source that shuffles, repeats and batches at once.

    Grain's own `shuffle`, `repeat` and `batch` make one Python call per sample and stage, which is
    most of the cost of a batch from memory (0.96 ms of 0.99 ms for 64 images); its epochs are also
    seeded `seed + epoch`, so that neighbouring seeds see each other's orders.
    """

    def __init__(self, size: int, batch_size: int, seed: int | None, num_epochs: int | None):
        self._size, self._batch_size, self._seed = size, batch_size, seed
        self._length = (
            sys.maxsize // batch_size if num_epochs is None else size * num_epochs // batch_size
        )
        self._latest: tuple[int, np.ndarray] | None = None

    def __repr__(self) -> str:
        return f"ShuffledBatches(size={self._size}, batch_size={self._batch_size})"

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> np.ndarray:
        start = int(index) * self._batch_size
        epoch, offset = divmod(start, self._size)
        indices = self._order(epoch)[offset : offset + self._batch_size]
        if len(indices) < self._batch_size:
            rest = self._order(epoch + 1)[: self._batch_size - len(indices)]
            indices = np.concatenate([indices, rest])
        return indices

    def _order(self, epoch: int) -> np.ndarray:
        latest = self._latest  # one read: threads may replace it meanwhile
        if latest is None or latest[0] != epoch:
            order = np.arange(self._size)
            if self._seed is not None:
                order = np.random.default_rng([self._seed, 1, epoch]).permutation(order)
            latest = self._latest = (epoch, order)
        return latest[1]


def _check(
    split: Split, batch_size: int, seed: int, num_epochs: int | None, num_threads: int
) -> None:
    if not (is_count(batch_size) and batch_size <= len(split)):
        raise ValueError(
            f"batches: batch_size must lie in [1, {len(split)}] for {len(split)} samples, "
            f"got {batch_size!r}."
        )
    if not is_count(seed, 0):
        raise ValueError(f"batches: seed must not be negative, and a whole number, got {seed!r}.")
    check_count("batches: num_epochs", num_epochs, none=True)
    if not is_count(num_threads, 0):
        raise ValueError(
            f"batches: num_threads must not be negative, and a whole number, got {num_threads!r}."
        )


def _standardise(x: np.ndarray, offset: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """`(x - offset) * scale` as float32; float64 samples are rounded after the subtraction."""
    x = np.subtract(x, offset).astype(np.float32, copy=False)
    x *= scale
    return x


def _offset_and_scale(x: np.ndarray, mean: Moment, std: Moment) -> tuple[np.ndarray, np.ndarray]:
    """Arrays that broadcast over samples, in units of the samples as they are stored."""
    means, stds = np.atleast_1d(np.asarray(mean, float)), np.atleast_1d(np.asarray(std, float))
    channels = x.shape[1]
    for name, value in (("mean", means), ("std", stds)):
        if value.shape not in ((1,), (channels,)) or not np.all(np.isfinite(value)):
            raise ValueError(
                f"standardise: {name} must be finite, a float or one per channel or feature "
                f"({channels}), got {value.tolist()}."
            )
    if not np.all(stds > 0):
        raise ValueError(f"standardise: std must be positive, got {stds.tolist()}.")
    unit = 255.0 if x.dtype == np.uint8 else 1.0
    shape = (-1, *[1] * (x.ndim - 2))
    # of any byte order; what is wider than float32 may lie far from zero
    precision = np.float64 if x.dtype.itemsize > 4 else np.float32
    offset, scale = (unit * means).astype(precision), (1 / (unit * stds)).astype(np.float32)
    return offset.reshape(shape), scale.reshape(shape)
