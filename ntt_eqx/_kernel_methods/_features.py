"""Random features of a tangent kernel, and ridge regression on them: one pass over any data."""

from collections.abc import Iterable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, Shaped

from .._batch import as_stream, pair
from .._checks import check_count, check_key
from .._ntk import NTKOperator, along, drawn_direction, ntk_operator
from .._types import PyTree
from ._solve import positive_ridge, targets_of

_TOGETHER = 16  # directions that share a pass through the model


def random_features(
    model: PyTree,
    x: Shaped[Array | np.ndarray, "n ..."],
    num_features: int,
    *,
    key: PRNGKeyArray,
    **options: Any,
) -> Float[Array, "n k r"]:
    """Features of samples whose products have the tangent kernel as their mean.

        phi = J diag(sqrt(c)) P / sqrt(R),    E sum_r phi[n,k,r] phi[m,l,r] = Theta[n,m,k,l]

    with normal `P [parameters, R]`, as forward derivatives: no gradient is formed. The products
    have the variance `(Theta[n,m,k,l]^2 + Theta[n,n,k,k] Theta[m,m,l,l]) / R` (the projection of
    Johnson & Lindenstrauss 1984).

    **Arguments:**

    - `model`, `x`: those of `ntk`.
    - `num_features`: R.
    - `key`: of the directions; the same key gives the features of other samples that go with these.
    - `options`: those of `ntk_operator`, such as `kernel`, `metric` and `batch_size`.

    **Returns:**

    `[N, K, R]`, in the kernel's dtype.

    **Raises:**

    What `ntk_operator` raises, and `ValueError` for a count below 1 or no key.
    """
    caller = "random_features"
    check_count(f"{caller}: num_features", num_features)
    check_key(caller, key)
    return features(ntk_operator(model, x, **options), jax.random.split(key, num_features))


def features(operator: NTKOperator, keys: Array) -> Array:
    """The features of an operator's rows along one direction a key."""
    parts = [_features(operator, keys[n : n + _TOGETHER]) for n in range(0, len(keys), _TOGETHER)]
    found = jnp.concatenate(parts, axis=2)
    return found / jnp.sqrt(jnp.asarray(len(keys), found.dtype))


@eqx.filter_jit
def _features(operator: NTKOperator, keys: Array) -> Array:
    return along(operator, jax.vmap(lambda key: drawn_direction(operator, key))(keys))


class FeatureRidge(eqx.Module):
    """Ridge regression on random features; `fit_kernel_ridge_features` makes it.

    Attributes:
        first: the operator of the first batch, for model and settings.
        direction: the direction in which the parameters move, an array for each of them.
    """

    first: NTKOperator
    direction: list[Array]

    def __call__(self, x: Shaped[Array | np.ndarray, "n ..."]) -> Float[Array, "n k"]:
        """Predict at new samples, by one forward derivative of the model: `J direction`.

        Args:
            x: the new samples.
        """
        first = self.first
        operator = ntk_operator(
            first.model,
            x,
            kernel=first.kernel,
            metric=first.metric,
            batch_size=first.batch_size,
            precision=first.precision,
        )
        return _along(operator, self.direction)


@eqx.filter_jit
def _along(operator: NTKOperator, direction: list[Array]) -> Array:
    return along(operator, direction)


def fit_kernel_ridge_features(
    model: PyTree,
    batches: Iterable[Any],
    num_features: int,
    *,
    key: PRNGKeyArray,
    ridge: float | int,
    **options: Any,
) -> FeatureRidge:
    """Fit ridge regression on R random features of the tangent kernel, in one pass over the data.

    The kernel of the regression is that of `random_features`: kernel ridge regression as R grows.
    Training takes R forward derivatives a sample and memory for `[R, R]` and one batch; a
    prediction takes one forward derivative, whatever N and R are.

    **Arguments:**

    - `model`: that of `ntk`.
    - `batches`: a pair `(x, targets [B, K])`, or anything that yields such pairs once. To train on
      labels give what is missing at the model's outputs, `one_hot - outputs`.
    - `num_features`: R.
    - `key`: of the features.
    - `ridge`: above 0, in the units of the kernel.
    - `options`: those of `ntk_operator`, such as `kernel`, `metric` and `batch_size`.

    **Returns:**

    A `FeatureRidge`; call it on new samples. Add the outputs of the model.

    **Raises:**

    `ValueError` for bad batches or settings, and for no batch at all.
    """
    caller = "fit_kernel_ridge_features"
    check_count(f"{caller}: num_features", num_features)
    check_key(caller, key)
    ridge = positive_ridge(caller, ridge)
    keys, first = jax.random.split(key, num_features), None
    system, right = np.zeros((num_features,) * 2), np.zeros(num_features)
    for batch in as_stream(f"{caller}: batches", batches):
        x, y = pair(caller, batch)
        operator = ntk_operator(model, x, **options)
        first = operator if first is None else first
        samples, outputs = operator.out_structure().shape
        targets = targets_of(caller, samples, outputs, y)
        phi = np.asarray(features(operator, keys), np.float64).reshape(-1, num_features)
        system += phi.T @ phi
        right += phi.T @ targets.reshape(-1)
    if first is None:
        raise ValueError(f"{caller}: there was no batch.")
    system[np.diag_indices_from(system)] += ridge
    weights = np.linalg.solve(system, right) / np.sqrt(num_features)
    first = eqx.tree_at(lambda operator: operator.x1, first, first.x1[:1])
    weights = jnp.asarray(weights, first.out_structure().dtype)
    return FeatureRidge(first, _combined(first, keys, weights))


@eqx.filter_jit
def _combined(operator: NTKOperator, keys: Array, weights: Array) -> list[Array]:
    """The sum of the directions with these weights, one direction at a time."""

    def add(total: list[Array], given: tuple[Array, Array]) -> tuple[list[Array], None]:
        drawn = drawn_direction(operator, given[0])
        return [a + given[1].astype(a.dtype) * t for a, t in zip(total, drawn, strict=True)], None

    like = jax.eval_shape(lambda: drawn_direction(operator, keys[0]))
    zeros = [jnp.zeros(a.shape, a.dtype) for a in like]
    return jax.lax.scan(add, zeros, (keys, weights))[0]
