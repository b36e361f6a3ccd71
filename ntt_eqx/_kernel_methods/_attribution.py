"""Data attribution: products of the loss gradients of samples, from the kernel of the loss.

The loss of one sample, as a model with one output, has a tangent kernel, and its entries are the
products of gradients. So the engine computes them from factors, and no gradient is ever stored.
"""

import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, Shaped

from .._batch import as_array, pair
from .._checks import check_batch, check_count, check_finite, check_key
from .._examples import check_examples, softmax_cross_entropy
from .._ntk import ntk_operator, ntk_tiles
from .._parameters import Fixed
from .._sparse import SparseModel
from .._types import KernelKind, PyTree
from ._features import features

Loss = Callable[[Array, Array], Array]
"""`(outputs of one sample, its target) -> loss`, a scalar."""


def cross_entropy(logits: Array, label: Array) -> Array:
    """Softmax cross-entropy of one sample with an integer label, the default loss."""
    return softmax_cross_entropy(logits[None], label[None])[0]


class LossModel(eqx.Module):
    """The loss of a model as a model of a sample together with its target; `loss_model` makes it.

    Attributes:
        model: the model with the parameters.
        loss: `(outputs, target) -> loss` of one sample.
        sample: shape and dtype of one sample.
        target: shape and dtype of its target.
    """

    model: PyTree
    loss: Fixed
    sample: jax.ShapeDtypeStruct = eqx.field(static=True)
    target: jax.ShapeDtypeStruct = eqx.field(static=True)

    def __call__(self, z: Float[Array, " size"]) -> Float[Array, " 1"]:
        """The loss of one packed sample, `[1]`.

        Args:
            z: a row of what `loss_model` packs.
        """
        cut = lambda part, like: part.reshape(like.shape).astype(like.dtype)
        size = math.prod(self.sample.shape)
        x, y = cut(z[:size], self.sample), cut(z[size:], self.target)
        return jnp.reshape(self.loss.value(self.model(x), y), (1,))


def loss_model(model: PyTree, *batches: Any, loss: Loss = cross_entropy) -> tuple[Any, ...]:
    """A model whose tangent kernel has the products of per-sample loss gradients as entries.

    `ntk`, `ntk_tiles`, `ntk_to_zarr` and `ntk_operator` take it, with the packed batches.

    **Arguments:**

    - `model`: any model that `ntk` takes. A `SparseModel` stays one.
    - `batches`: pairs `(x [B, ...], y [B, ...])` with samples and targets of one shape and dtype.
    - `loss`: `(outputs, target) -> loss` of one sample; softmax cross-entropy by default.

    **Returns:**

    The model, and of each batch an array `[B, size]` with sample and target beside each other, in
    the samples' dtype where that is a float, otherwise in float32.

    **Raises:**

    `ValueError` for batches of different samples, for complex numbers and integers that the dtype
    cannot hold, and with cross-entropy for what are no labels of the model's classes.
    """
    caller = "loss_model"
    if not batches:
        raise ValueError(f"{caller}: needs a batch (x, y) at least.")
    pairs = [
        tuple(as_array(caller, n, a) for n, a in zip("xy", pair(caller, batch), strict=True))
        for batch in batches
    ]
    first = [jax.ShapeDtypeStruct(a.shape[1:], a.dtype) for a in pairs[0]]
    for x, y in pairs:
        check_batch(caller, x)
        if len(x) != len(y) or [(a.shape[1:], a.dtype) for a in (x, y)] != [
            (like.shape, like.dtype) for like in first
        ]:
            raise ValueError(
                f"{caller}: batches must be of samples {first[0].dtype}{list(first[0].shape)} with "
                f"as many targets {first[1].dtype}{list(first[1].shape)}, got {x.dtype}"
                f"{list(x.shape)} and {y.dtype}{list(y.shape)}."
            )
        if loss is cross_entropy:  # a label of no class would have no gradient, in silence
            check_examples(caller, model, (x, y))
    dtype = first[0].dtype if jnp.issubdtype(first[0].dtype, jnp.floating) else jnp.float32
    packed = [_packed(caller, x, y, dtype) for x, y in pairs]
    if not isinstance(model, SparseModel):
        return LossModel(model, Fixed(loss), *first), *packed
    dense: Any = LossModel(model.model, Fixed(loss), *first)
    mask: Any = LossModel(model.mask, Fixed(None), *first)
    return SparseModel(dense, mask), *packed


def gradient_products(
    model: PyTree,
    train: Any,
    test: Any = None,
    *,
    loss: Loss = cross_entropy,
    tile: tuple[int, int] = (256, 256),
    **options: Any,
) -> Float[np.ndarray, "t n"]:
    """The products of the loss gradients of test samples with those of training samples.

        G[t, n] = <dL(test_t)/d theta, dL(train_n)/d theta>

    To first order a step of gradient descent with the rate `eta` on training sample n lowers the
    loss of test sample t by `eta G[t, n]` (GradDot: Charpiat et al., NeurIPS 2019; summed up over
    checkpoints, TracIn: Pruthi et al., NeurIPS 2020).

    **Arguments:**

    - `model`, `loss`: see `loss_model`.
    - `train`, `test`: pairs `(x, y)` of N and T examples; `None` for the training samples.
    - `tile`: most test and training samples at once; see `ntk_tiles`.
    - `options`: those of `ntk`, such as `kernel` or `metric`.

    **Returns:**

    `[T, N]`, in the host's memory. For more than fits there, `loss_model` and `ntk_to_zarr`.

    **Raises:**

    What `loss_model` and `ntk_tiles` raise.
    """
    given = (train,) if test is None else (train, test)
    model, *packed = loss_model(model, *given, loss=loss)
    packed = [np.asarray(z) for z in packed]
    columns, rows = packed[0], packed[-1]
    sides = (columns, None) if test is None else (rows, columns)
    found: np.ndarray | None = None
    for row, column, theta in ntk_tiles(model, *sides, tile=tile, **options):
        if found is None:
            found = np.empty((len(rows), len(columns)), theta.dtype)
        found[row, column] = theta[..., 0, 0]
    assert found is not None
    return found


def projected_gradients(
    model: PyTree,
    batch: Any,
    num_projections: int,
    *,
    key: PRNGKeyArray,
    loss: Loss = cross_entropy,
    kernel: KernelKind = "active",
    batch_size: int | None = None,
) -> Float[Array, "n r"]:
    """The loss gradients of samples, projected to R random directions of the parameters.

    `phi = g P / sqrt(R)` with normal `P`, so that `E phi_n phi_m` is the product of the gradients:
    features of N samples for TRAK (Park et al., ICML 2023), as forward derivatives, without the
    gradients themselves. The same key gives the same directions.

    **Arguments:**

    - `model`, `batch`, `loss`: see `loss_model`.
    - `num_projections`: R.
    - `key`: of the directions.
    - `kernel`: `"active"` for the parameters that a mask keeps, `"ambient"` for all.
    - `batch_size`: samples at once; see `ntk_operator`.

    **Returns:**

    `[N, R]`, in the dtype of sums.

    **Raises:**

    What `loss_model` raises, and `ValueError` for a count below 1 or no key.
    """
    caller = "projected_gradients"
    check_count(f"{caller}: num_projections", num_projections)
    check_key(caller, key)
    model, z = loss_model(model, batch, loss=loss)
    operator = ntk_operator(model, z, kernel=kernel, batch_size=batch_size)
    return features(operator, jax.random.split(key, num_projections))[:, 0]


def _packed(
    caller: str, x: Shaped[Array, "b ..."], y: Shaped[Array, "b ..."], dtype: Any
) -> Float[Array, "b size"]:
    most = 2 ** (jnp.finfo(dtype).nmant + 1)
    for name, a in (("x", x), ("y", y)):
        check_finite(caller, name, a)
        if jnp.iscomplexobj(a):
            raise ValueError(
                f"{caller}: {name} must be real, got {a.dtype}; give real and imaginary parts "
                "along an axis, and let the model put them together."
            )
        whole = jnp.issubdtype(a.dtype, jnp.integer)
        if whole and a.size and max(int(a.max()), -int(a.min())) > most:
            raise ValueError(f"{caller}: {name} has integers above {most}, too large for {dtype}.")
    flat = lambda a: a.reshape(len(a), -1).astype(dtype)
    return jnp.concatenate([flat(x), flat(y)], axis=1)
