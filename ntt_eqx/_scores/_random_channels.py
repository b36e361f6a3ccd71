"""RandomChannels: a random mask that lies on few channels."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from .._batch import as_array, inputs_of
from .._checks import check_key
from .._compact import coupled_channels
from .._examples import Samples
from .._masks import make_mask
from .._sparse import sparsify
from .._types import PyTree, ScoreTree
from ._base import AbstractLabelFreeScore, batch_of_shape
from ._random import Random


class RandomChannels(AbstractLabelFreeScore):
    """Independent uniform scores, above 1 for all weights between a random part of the channels.

    Channels are the units of hidden layers and the filters of convolutions, as `coupled_channels`
    finds them; the network's inputs and outputs all take part. A mask of few weights therefore lies
    on this part of the network alone, and `compact` leaves the rest out. A layer that is to keep
    more weights than lie there keeps others, too. Weights are not used, and of the inputs their
    shape alone.

    With 1 % of its weights LeNet-300-100 trains to a higher accuracy by such masks than by random
    ones on all channels. Every round of iterative pruning has the same scores, and so the same
    channels.

    Attributes:
        key: the PRNG key.
        share: the share of the channels, in `(0, 1]`, of every set of coupled ones.
    """

    key: PRNGKeyArray
    share: float = eqx.field(static=True, default=1 / 6)

    def __check_init__(self) -> None:
        """Reject what is no key or no share."""
        check_key("RandomChannels", self.key)
        if not 0 < self.share <= 1:
            raise ValueError(f"RandomChannels: share must be in (0, 1], got {self.share!r}.")

    def __call__(self, model: PyTree, x: Samples | None = None) -> ScoreTree:
        """Score the prunable weights of `model`; its program is read for inputs like `x`.

        **Raises:**

        `ValueError` without inputs, and for a model without such channels.
        """
        sparse = sparsify(model)
        shape = batch_of_shape("RandomChannels", x)
        like = as_array("RandomChannels", "x", inputs_of("RandomChannels", x))
        pattern = coupled_channels(sparse, jnp.zeros(shape, like.dtype))
        of_channels, of_weights = jax.random.split(self.key)
        chosen = make_mask(Random(of_channels)(sparse), self.share, pattern=pattern)
        return jax.tree.map(lambda m, s: jnp.where(m, 1 + s, s), chosen, Random(of_weights)(sparse))
