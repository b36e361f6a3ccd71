"""Random views of images, cropped and flipped, on the host or on the device that has them."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int32

from .._checks import is_count
from .._distribute import Layout
from ._dataset import Split


class Batch(NamedTuple):
    """One batch.

    Attributes:
        x: `[batch, C, H, W]`, float32, standardised.
        y: `[batch]`, int32 labels; -1 for samples without one.
    """

    x: Float32[Array, "batch ..."]
    y: Int32[Array, " batch"]


class Views(NamedTuple):
    """The random views of a batch: how far down and right each crop starts, and what is flipped."""

    down: np.ndarray
    right: np.ndarray
    flipped: np.ndarray


class RandomViews:
    """Random crops from images with `pad` pixels of zeros around them, and flips left to right."""

    def __init__(self, x: np.ndarray, crop: int, flip: bool, seed: int):
        """Check that `x` holds images, if they are to be changed.

        Raises:
            ValueError: `crop` is no number of pixels, or the samples are no images.
        """
        if not is_count(crop, 0):
            raise ValueError(f"batches: crop must be a number of pixels, got {crop!r}.")
        if (crop or flip) and x.ndim != 4:
            raise ValueError(
                f"batches: crop and flip are for images [N, C, H, W], got samples {x.shape[1:]}."
            )
        self.pad, self.flip = int(crop), bool(flip)
        self._seed = seed

    def of_batch(self, number: int, size: int) -> Views:
        """The views of the batch with this number; they follow from it and the seed alone."""
        if not (self.pad or self.flip):
            return Views(*np.zeros((3, size), np.int32))
        draw = np.random.default_rng([self._seed, 2, number])
        down, right = draw.integers(0, 2 * self.pad + 1, (2, size), np.int32)
        flipped = draw.integers(0, 2, size, np.int32) if self.flip else np.zeros(size, np.int32)
        return Views(down, right, flipped)

    def cut(self, x: np.ndarray, *views: np.ndarray) -> np.ndarray:
        """The views of the images `x`, which may be changed."""
        down, right, flipped = views
        if self.pad:
            height, width = x.shape[2:]
            around = ((0, 0), (0, 0), (self.pad, self.pad), (self.pad, self.pad))
            windows = np.lib.stride_tricks.sliding_window_view(
                np.pad(x, around), (height, width), axis=(2, 3)
            )
            x = windows[np.arange(len(x)), :, down, right]
        if self.flip:
            chosen = flipped.astype(bool)
            x[chosen] = x[chosen][..., ::-1]
        return x


class SamplesOnDevice:
    """All samples of a split on the device, as they are stored; batches are prepared there."""

    def __init__(
        self,
        split: Split,
        offset: np.ndarray,
        scale: np.ndarray,
        draws: RandomViews,
        layout: Layout | None,
    ):
        """Copy the samples to the device.

        Raises:
            ValueError: they are neither uint8 nor float32, or a mesh is in use.
        """
        kind = split.x.dtype
        if layout is not None:
            raise ValueError("batches: on_device is for one device, not inside ntt.distribute.")
        if not kind.isnative or kind not in (np.uint8, np.float32):
            raise ValueError(
                f"batches: on_device takes samples of uint8 or float32 of this machine, got {kind}."
            )
        arrays = (split.x, split.y, offset[None], scale[None])
        self._arrays = tuple(jnp.asarray(array) for array in arrays)
        self._how: Any = {"pad": draws.pad, "flip": draws.flip}

    def batch(self, indices: np.ndarray, views: Views) -> Batch:
        """The batch of these samples in these views: the bits that the host would prepare."""
        return _gathered(*self._arrays, indices.astype(np.int32), views, **self._how)


@functools.partial(jax.jit, static_argnames=("pad", "flip"))
def _gathered(
    x: Array,
    y: Array,
    offset: Array,
    scale: Array,
    indices: Array,
    views: Views,
    *,
    pad: int,
    flip: bool,
) -> Batch:
    chosen, labels = x[indices], y[indices]
    if pad:
        padded = jnp.pad(chosen, ((0, 0), (0, 0), (pad, pad), (pad, pad)))
        cut = lambda image, down, right: jax.lax.dynamic_slice(
            image, (jnp.zeros_like(down), down, right), x.shape[1:]
        )
        chosen = jax.vmap(cut)(padded, views.down, views.right)
    if flip:
        mirrored = views.flipped.astype(bool)[:, None, None, None]
        chosen = jnp.where(mirrored, chosen[..., ::-1], chosen)
    return Batch((chosen.astype(jnp.float32) - offset) * scale, labels)
