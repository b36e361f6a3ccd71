"""What an index says, in plain terms."""

import jax
import numpy as np

from ntt_eqx._ntk import is_index


def known(support):
    """The places that an index knows, one for each mask that has few entries."""
    leaves = jax.tree.leaves(support, is_leaf=is_index)
    return [leaf.places for leaf in leaves if leaf is not None and leaf.places is not None]


def flat_indices(places):
    """The flat indices of the entries of `GatheredRows`, in their order."""
    rows, columns = np.asarray(places.rows)[:, None], np.asarray(places.columns)
    return (rows * places.shape[1] + columns)[columns < places.shape[1]]
