"""Is it where a mask's weights are, or on how few units? Masks on a part of the hidden units.

    few=benchmarks/few_units.py
    ntt-eqx compare --preset ultra-sparse --mask.pattern None --densities 0.0126 --seeds 0 \
      --datasets fashion-mnist --methods $few:THIRD $few:TENTH $few:THIRD_NTT

Scores over all layers leave most units of a very sparse perceptron without a weight. Here a random
part of the units of every hidden layer is all that a mask may use, with the counts of ERK in every
layer and the last one whole: a random mask on them, and Neural Tangent Transfer with magnitude
refreshes among them. The density that is asked for counts the last layer, too; the hidden ones keep
what the preset `ultra-sparse` gives them.
"""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

import ntt_eqx as ntt


class RefreshWithin(ntt.AbstractPeriodicRefresh):
    """The largest weights among those that may be kept."""

    may: Any
    every: int = eqx.field(static=True, default=100)
    until: int | None = eqx.field(static=True, default=None)

    def scores(self, view: ntt.AbstractRefreshView) -> Any:
        """The absolute value of each weight that may be kept, -1 for the others."""
        within = lambda w, may: jnp.where(may, jnp.abs(w), -1.0)
        return jax.tree.map(within, view.weights(), self.may)


@dataclasses.dataclass(frozen=True)
class OnFewUnits:
    """A mask on a random part of the units of every hidden layer of a perceptron."""

    share: float  # of the units
    steps: int = 0  # of a transfer; 0 for a random mask
    hidden: float = 0.01  # density of all layers but the last

    def __call__(self, teacher: Any, examples: Any, density: float, key: Any) -> ntt.SparseModel:
        """The sparse network; `examples` are used without their labels, and by a transfer alone."""
        erk = ntt.Sparsity(self.hidden, allocation="erk", pattern=ntt.Block((1, 1)))
        random = ntt.scores.Random(jax.random.fold_in(key, 1))
        whole = ntt.prune(teacher, random, erk)
        may = self.may(whole.mask, jax.random.fold_in(key, 2))
        counts = ntt.Sparsity(self.hidden).of_mask(whole.mask)
        scores = jax.tree.map(lambda s, m: jnp.where(m, s, -1.0), random(teacher), may)
        mask = ntt.make_mask(scores, counts)
        if not self.steps:
            return ntt.SparseModel(teacher, mask)
        x = np.asarray(examples[0])
        images = ntt.data.Split(x, np.zeros(len(x), np.int32))
        seed = int(jax.random.randint(key, (), 0, 2**31 - 1))
        batches = ntt.data.batches(images, 64, seed=seed)
        method = ntt.NeuralTangentTransfer(
            sparsity=counts,
            optimizer=optax.adam(optax.cosine_decay_schedule(1e-3, self.steps, 0.05)),
            loss=ntt.KernelMatching("ambient", ntt.Sketch(2)),
            refresh=RefreshWithin(may=may),
            num_steps=self.steps,
        )
        state = ntt.ntt_init(teacher, method, key=key, mask=mask)
        state, _ = ntt.transfer(state, batches, num_steps=self.steps, log_every=None)
        return state.student

    def may(self, mask: Any, key: Any) -> Any:
        """Which weights lie between units of the chosen part; outputs and inputs are all of it."""
        leaves, tree = jax.tree.flatten(mask)
        before, chosen = jnp.ones(leaves[0].shape[1], bool), []
        for number, leaf in enumerate(leaves):
            units = jnp.ones(leaf.shape[0], bool)
            if number < len(leaves) - 1:
                order = jax.random.permutation(jax.random.fold_in(key, number), leaf.shape[0])
                units = order < round(self.share * leaf.shape[0])
                chosen.append(units[:, None] & before[None])
            else:
                chosen.append(jnp.ones_like(leaf))  # the last layer is whole
            before = units
        return tree.unflatten(chosen)


THIRD, SIXTH, TENTH = (OnFewUnits(share) for share in (1 / 3, 1 / 6, 1 / 10))
THIRD_NTT, SIXTH_NTT = (OnFewUnits(share, 3057) for share in (1 / 3, 1 / 6))
