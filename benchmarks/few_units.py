"""Is it where a mask's weights are, or on how few units? Masks on a part of the hidden units.

    few=benchmarks/few_units.py
    ntt-eqx compare --preset ultra-sparse --mask.pattern None --densities 0.0126 --seeds 0 \
      --datasets fashion-mnist --methods $few:THIRD $few:TENTH $few:THIRD_NTT
    ntt-eqx compare --preset paper --densities 0.01 --seeds 0 1 2 3 4 --training.epochs 20 \
      --datasets mnist fashion-mnist --methods $few:ERK_SIXTH $few:ERK_SIXTH_NTT

Scores over all layers leave most units of a very sparse perceptron without a weight. Here a random
part of the units of every hidden layer is all that a mask may use: a random mask on them, and
Neural Tangent Transfer with magnitude refreshes among them. The names with ERK have its counts at
the density that is asked for. The others have the last layer whole, for which the density counts,
and in the hidden ones what the preset `ultra-sparse` gives them.
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
    """The largest weights among those that may be kept, and before there are few enough, others."""

    may: Any
    every: int = eqx.field(static=True, default=100)
    until: int | None = eqx.field(static=True, default=None)

    def scores(self, view: ntt.AbstractRefreshView) -> Any:
        """The absolute value of each weight that may be kept; below these, the others in order."""
        within = lambda w, may: jnp.where(may, jnp.abs(w), -1 / (1e-3 + jnp.abs(w)))
        return jax.tree.map(within, view.weights(), self.may)


def between_few_units(mask: Any, share: float, key: Any) -> Any:
    """Which weights of a perceptron lie between units of a random part of every hidden layer.

    Inputs and outputs are all of it. `mask` says which weights there are.
    """
    leaves, tree = jax.tree.flatten(mask)
    before, chosen = jnp.ones(leaves[0].shape[1], bool), []
    for number, leaf in enumerate(leaves):
        units = jnp.ones(leaf.shape[0], bool)
        if number < len(leaves) - 1:
            order = jax.random.permutation(jax.random.fold_in(key, number), leaf.shape[0])
            units = order < round(share * leaf.shape[0])
        chosen.append(units[:, None] & before[None])
        before = units
    return tree.unflatten(chosen)


def random_within(teacher: Any, may: Any, counts: ntt.Sparsity, key: Any) -> Any:
    """A random mask with these counts, of weights that may be kept as long as there are any."""
    scores = ntt.scores.Random(jax.random.fold_in(key, 1))(teacher)
    first = jax.tree.map(lambda s, m: jnp.where(m, s, s - 10), scores, may)
    return ntt.make_mask(first, counts)


@dataclasses.dataclass(frozen=True)
class OnFewUnits:
    """A mask on a random part of the units of every hidden layer of a perceptron."""

    share: float  # of the units
    steps: int = 0  # of a transfer; 0 for a random mask
    hidden: float | None = 0.01  # density of all layers but the last; None for ERK in all of them
    gradual: bool = False  # whether the density falls from 1 within half of the steps
    kernel_weight: float = 1e-3
    initial: bool = False  # whether the mask alone is taken from the transfer

    def __call__(self, teacher: Any, examples: Any, density: float, key: Any) -> ntt.SparseModel:
        """The sparse network; `examples` are used without their labels, and by a transfer alone."""
        dense = ntt.sparsify(teacher).mask
        may = between_few_units(dense, self.share, jax.random.fold_in(key, 2))
        if self.hidden is None:
            counts = ntt.Sparsity(density, allocation="erk")
        else:
            erk = ntt.Sparsity(self.hidden, allocation="erk", pattern=ntt.Block((1, 1)))
            random = ntt.scores.Random(key)  # of its mask the counts alone are used
            counts = ntt.Sparsity(self.hidden).of_mask(ntt.prune(teacher, random, erk).mask)
            *rest, last = jax.tree.leaves(may)
            may = jax.tree.structure(may).unflatten([*rest, jnp.ones_like(last)])
        mask = random_within(teacher, may, counts, key)
        if not self.steps:
            return ntt.SparseModel(teacher, mask)
        if self.gradual:
            falling = ntt.GradualDensity(density, self.steps // 2)
            counts, mask = ntt.Sparsity(falling, allocation="erk"), None
        x = np.asarray(examples[0])
        images = ntt.data.Split(x, np.zeros(len(x), np.int32))
        seed = int(jax.random.randint(key, (), 0, 2**31 - 1))
        batches = ntt.data.batches(images, 64, seed=seed)
        method = ntt.NeuralTangentTransfer(
            sparsity=counts,
            optimizer=optax.adam(optax.cosine_decay_schedule(1e-3, self.steps, 0.05)),
            loss=ntt.KernelMatching("ambient", ntt.Sketch(2), kernel_weight=self.kernel_weight),
            refresh=RefreshWithin(may=may),
            num_steps=self.steps,
        )
        state = ntt.ntt_init(teacher, method, key=key, mask=mask)
        state, _ = ntt.transfer(state, batches, num_steps=self.steps, log_every=None)
        found = state.student
        return ntt.SparseModel(teacher, found.mask) if self.initial else found


THIRD, SIXTH, TENTH = (OnFewUnits(share) for share in (1 / 3, 1 / 6, 1 / 10))
THIRD_NTT, SIXTH_NTT, TENTH_NTT = (OnFewUnits(share, 3057) for share in (1 / 3, 1 / 6, 1 / 10))
ERK_HALF, ERK_THIRD, ERK_SIXTH, ERK_TENTH = (OnFewUnits(1 / n, hidden=None) for n in (2, 3, 6, 10))
ERK_THIRD_NTT, ERK_SIXTH_NTT = (
    OnFewUnits(share, 3057, None, gradual=True, kernel_weight=1e-2) for share in (1 / 3, 1 / 6)
)
ERK_THIRD_NTT_MASK, ERK_SIXTH_NTT_MASK = (
    dataclasses.replace(one, initial=True) for one in (ERK_THIRD_NTT, ERK_SIXTH_NTT)
)
