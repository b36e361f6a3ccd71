"""Sanity ablations: does a mask's structure, or the sign of a score, matter at all?"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import PRNGKeyArray

from .._checks import check_key
from .._sparse import SparseModel, map_masked
from .._types import MaskTree, PyTree, ScoreTree
from ._collapse import check_mask_tree


def shuffle_mask(mask: MaskTree, key: PRNGKeyArray) -> MaskTree:
    """Put the kept weights of every layer in random places; the counts stay exact.

    "Layerwise shuffling" of Frankle et al. (ICLR 2021, arXiv 2009.08576): a method whose masks do
    no better than their shuffled selves chose densities of layers, not weights.

    **Arguments:**

    - `mask`: a mask tree.
    - `key`: every leaf draws from its own fold of it.

    **Returns:**

    A mask tree with as many kept weights in every leaf.

    **Raises:**

    `ValueError` for what is no mask, or when `key` is not one random key.
    """
    check_key("shuffle_mask", key)
    check_mask_tree("shuffle_mask", mask)
    return _shuffle_leaves(mask, key)


def reinitialise(
    sparse: SparseModel,
    key: PRNGKeyArray,
    initialise: Callable[[PRNGKeyArray], Any] | None = None,
) -> SparseModel:
    """The same mask over other initial weights (Frankle et al., ICLR 2021, arXiv 2009.08576).

    **Arguments:**

    - `sparse`: the sparse model.
    - `key`: source of the new weights.
    - `initialise`: `key -> model`, a fresh model of the same structure, biases and all. Without
      one the stored prunable weights of every layer are shuffled, which for weights that were
      drawn independently is another draw.

    **Returns:**

    A `SparseModel` with the mask of `sparse`.

    **Raises:**

    `ValueError` when `initialise` makes a model of another structure or shape, `sparse` is no
    `SparseModel`, or `key` is not one random key.
    """
    if not isinstance(sparse, SparseModel):
        raise ValueError(
            f"reinitialise: needs a SparseModel, got {type(sparse).__name__}; prune or sparsify "
            "makes one."
        )
    check_key("reinitialise", key)
    if initialise is not None:
        return SparseModel(initialise(key), sparse.mask)
    weights = jax.tree.map(
        lambda m, w: None if m is None else w,
        sparse.mask,
        sparse.model,
        is_leaf=lambda m: m is None,
    )
    shuffled = iter(jax.tree.leaves(_shuffle_leaves(weights, key)))
    return SparseModel(
        map_masked(lambda w, m: next(shuffled), sparse.model, sparse.mask), sparse.mask
    )


def invert_scores(scores: ScoreTree) -> ScoreTree:
    """The scores in reverse order: what was kept first goes first.

    A method whose inverted scores do as well has a sign that means nothing.

    **Arguments:**

    - `scores`: a float array for every prunable weight, `None` elsewhere.

    **Returns:**

    The negated scores, of the same structure.

    **Raises:**

    `ValueError` for a leaf that is no floating-point array.
    """
    for path, leaf in jtu.tree_leaves_with_path(scores):
        dtype = getattr(leaf, "dtype", None)
        if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
            raise ValueError(
                f"invert_scores: scores{jtu.keystr(path)} must be a floating-point array, got "
                f"{getattr(leaf, 'dtype', type(leaf).__name__)}."
            )
    return jax.tree.map(jnp.negative, scores)


def _shuffle_leaves(tree: PyTree, key: PRNGKeyArray) -> PyTree:
    leaves, treedef = jax.tree.flatten(tree)
    shuffled = [
        jax.random.permutation(jax.random.fold_in(key, i), leaf.reshape(-1)).reshape(leaf.shape)
        for i, leaf in enumerate(leaves)
    ]
    return jax.tree.unflatten(treedef, shuffled)
