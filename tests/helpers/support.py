"""What a support says, in plain terms."""

import jax
import numpy as np

from ntt_eqx._ntk import is_support
from ntt_eqx.kernels import GatheredRows


def known(support):
    """The places that a support knows, one for each mask that has few entries."""
    leaves = jax.tree.leaves(support, is_leaf=is_support)
    return [leaf for leaf in leaves if isinstance(leaf, GatheredRows)]


def flat_indices(places):
    """The flat indices of the entries of `GatheredRows`, in their order."""
    rows, columns = np.asarray(places.rows)[:, None], np.asarray(places.columns)
    return (rows * places.shape[1] + columns)[columns < places.shape[1]]
