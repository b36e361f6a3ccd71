"""Random output directions: a kernel over K outputs seen through R of them."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from .._checks import check_key


def sketch_directions(
    key: PRNGKeyArray, num_directions: int, num_outputs: int
) -> tuple[Float[Array, "r k"], Float[Array, "r k"]]:
    """Directions V, W for the two sides of a kernel, unbiased for squared distances.

    For any `D[k,l]`, such as the difference of two kernels at a pair of samples,

        E mean_rs (V D W^T)_rs^2 = mean_kl D_kl^2,

    because rows of V and W are uniform on the unit sphere and independent between the sides. Rows
    of one side are orthogonal, which lowers the variance; with R = K the sketch is exact.

    **Arguments:**

    - `key`: the PRNG key; another one for every step of a training.
    - `num_directions`: R, from 1 to K.
    - `num_outputs`: K.

    **Returns:**

    Two float32 arrays `[R, K]` with orthonormal rows.

    **Raises:**

    `ValueError` if R is not in [1, K], or `key` is not one random key.
    """
    check_key("sketch_directions", key)
    if not 1 <= num_directions <= num_outputs:
        raise ValueError(
            f"sketch_directions: needs 1 <= R <= K, got R = {num_directions}, K = {num_outputs}."
        )

    def one(key: PRNGKeyArray) -> Array:
        q, r = jnp.linalg.qr(jax.random.normal(key, (num_outputs, num_directions), jnp.float32))
        return (q * jnp.sign(jnp.diagonal(r))[None]).T  # uniform: Mezzadri 2007, section 5

    first, second = jax.random.split(key)
    return one(first), one(second)
