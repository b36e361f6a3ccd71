"""Compare the engine with the explicit Jacobian: values, gradients, and by how much they differ."""

import jax
import jax.numpy as jnp
import numpy as np

_ROUNDING = 1e-18  # products of derivatives that are 0 but for rounding are below 1e-28


def every_array(path, owner, leaf):
    """For `sparsify`: a mask on every parameter, biases and scalars too."""
    return True


def random_mask(mask, density, seed=0):
    """Keep about this share of every leaf; at least one entry, and an empty row, where possible."""
    rng = np.random.default_rng(seed)

    def one(m):
        kept = np.asarray(rng.random(m.shape) < density)
        if 0 < density < 1 and m.size:
            if m.ndim and len(m) > 1:
                kept[rng.integers(1, len(m))] = False
            kept[(0,) * m.ndim] = True
        return jnp.asarray(kept)

    return jax.tree.map(one, mask)


def counts(mask):
    """Weights that each layer keeps."""
    return [int(m.sum()) for m in jax.tree.leaves(mask)]


def wide(leaf):
    return np.asarray(leaf, np.complex128 if np.iscomplexobj(leaf) else np.float64)


def largest(tree):
    leaves = [np.abs(wide(leaf)) for leaf in jax.tree.leaves(tree)]
    return max((leaf.max() for leaf in leaves if leaf.size), default=0.0)


def relative_error(found, expected):
    """The largest difference in two trees as a share of the largest entry of the second.

    A tree of entries below `_ROUNDING` is zero but for rounding, and so must the other be.
    """
    found, expected = jax.tree.leaves(found), jax.tree.leaves(expected)
    assert [f.shape for f in found] == [e.shape for e in expected]
    assert all(np.isfinite(wide(f)).all() for f in found)
    error = largest([wide(f) - wide(e) for f, e in zip(found, expected, strict=True)])
    return error if error == 0 else error / max(largest(expected), _ROUNDING)


def weighted_sum(theta, seed=7):
    """A sum of all entries with random weights: its gradient sees every one of them."""
    g = np.random.default_rng(seed).normal(size=theta.shape)
    return jnp.sum(jnp.asarray(g, theta.dtype) * theta)


def some_of_every_row(mask):
    """The mask, and something of every row: without, a norm of a row has no gradient."""
    return jax.tree.map(lambda m: m.at[..., 0].set(True) if m.ndim else m, mask)
