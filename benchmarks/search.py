"""Search for a transfer that is ahead of random masks: variants, a ladder of seeds, a verdict.

    python benchmarks/search.py --out runs/search
    python benchmarks/search.py --out runs/search-units --units --epochs 20
    python benchmarks/search.py --out runs/tiny --images fashion-mnist-mini --steps 60 --epochs 1

Interrupted, the same command goes on where it was, and several of it share the work: each takes the
variants in an order of its own, so that they seldom wait for each other. Each round trains the
variants that are left with more seeds, and the better half goes on; the baselines take part in
every round.

The rule for being ahead is fixed here, before any run: over the seeds that both have, the mean
difference of test accuracy to a baseline is above two standard errors of these differences, with
five seeds or more. A variant is ahead if that holds against each baseline (published scores, random
masks with given shares, rescaled or not), random masks with the variant's own shares and weights
that are rescaled like its own among them. Those of a variant on a part of the units (`--units`) lie
on the same part.
"""

import argparse
import dataclasses
import json
import math
import random
import statistics
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

import ntt_eqx as ntt
from ntt_eqx.experiment.part import inside, whole_of

LEAST_SEEDS = 5
BASELINES = ("random@erk", "ntk-sap@global", "synflow@global")
Results = dict[str, dict[int, float]]  # accuracies by name and seed
Rule = Literal["erk", "equal", "output"]
Shares = Literal["uniform", "global", "ntk-sap", "synflow"] | Rule


class SensitivityRefresh(ntt.AbstractPeriodicRefresh):
    """Magnitude of weight times gradient of the transfer loss."""

    every: int = 100
    until: int | None = None

    def scores(self, view: ntt.AbstractRefreshView) -> Any:
        """`|w dL/dw|`, with the gradient of pruned weights too."""
        return jax.tree.map(lambda w, g: jnp.abs(w * g), view.weights(), view.dense_gradient())


class FallingShares(ntt.AbstractPeriodicRefresh):
    """Magnitude, with every layer on its way from all of its weights to a share of its own.

    While the density of the whole network falls from 1 to D, a layer with the final share f keeps
    `1 - (1 - f) c` of its weights, with one c that rises from 0 to 1. Of n weights the r-th
    smallest therefore goes at `c = r / n / (1 - f)`, which is its score over all layers.
    """

    shares: tuple[float, ...] = eqx.field(static=True)
    every: int = eqx.field(static=True, default=100)
    until: int | None = eqx.field(static=True, default=None)

    def scores(self, view: ntt.AbstractRefreshView) -> Any:
        """When each weight goes."""
        leaves, tree = jax.tree.flatten(view.weights())

        def when(w: jax.Array, share: float) -> jax.Array:
            rank = 1 + jnp.argsort(jnp.argsort(jnp.abs(w).ravel())).reshape(w.shape)
            return rank.astype(jnp.float32) / (w.size * max(1 - share, 1e-6))

        return tree.unflatten([when(w, f) for w, f in zip(leaves, self.shares, strict=True)])


class NoDistance(ntt.AbstractDistance):
    """A distance that is always zero."""

    def __call__(self, student: Any, teacher: Any) -> jax.Array:
        """Zero."""
        return jnp.zeros((), student.dtype)


@dataclasses.dataclass(frozen=True)
class Variant:
    """One transfer: a method of `ntt.experiment.compare`."""

    steps: int
    shares: Shares = "erk"
    refresh: Literal["magnitude", "lamp", "sensitivity", "rigl", "synflow", "ntk-sap", "none"] = (
        "magnitude"
    )
    gradual: bool = False  # from dense to the density within half of the steps
    kernel_weight: float = 1e-3
    match: Literal["both", "kernel"] = "both"  # outputs and kernel, or the kernel alone
    alignment: bool = False  # of the kernels, instead of their squared distance
    sketch_size: int = 8
    learning_rate: float = 1e-3
    weights: Literal["transferred", "initial", "rescaled"] = "transferred"
    units: float = 1.0  # the share of hidden units, drawn at random, that a mask may use

    def sparsity(self, teacher: Any, x: Any, density: float, key: Any) -> ntt.Sparsity:
        """The shares of the layers, at this density."""
        end = max(1, self.steps // 2)
        schedule: Any = ntt.GradualDensity(density, end) if self.gradual else density
        few = part(teacher, x, self.units, key)
        if self.shares == "global":
            return ntt.Sparsity(schedule, "global", pattern=few)
        if self.shares in ("uniform", "erk"):
            return ntt.Sparsity(schedule, "layer", self.shares, few)
        if self.shares in ("ntk-sap", "synflow"):
            found = ranked(self.shares, teacher, x, density, key, few)
            return ntt.Sparsity(density, pattern=few).of_mask(found)
        return by_rule(self.shares, teacher, density)

    def __call__(self, teacher: Any, examples: Any, density: float, key: Any) -> ntt.SparseModel:
        """The sparse network of this transfer; `examples` are used without their labels."""
        x = np.asarray(examples[0])
        every = min(100, max(1, self.steps // 20))
        refreshes = {
            "magnitude": ntt.MagnitudeRefresh(every),
            "lamp": ntt.ScoreRefresh(ntt.scores.LAMP(), every),
            "sensitivity": SensitivityRefresh(every),
            "rigl": ntt.RigLRefresh(every, max(1, 3 * self.steps // 4)),
            # These rank the kept weights alone, so that they need a density that falls.
            "synflow": ntt.ScoreRefresh(ntt.scores.SynFlow(), every),
            "ntk-sap": ntt.ScoreRefresh(ntt.scores.NTKSAP(key), every),
            "none": ntt.NoRefresh(),
        }
        sparsity, refresh = self.sparsity(teacher, x, density, key), refreshes[self.refresh]
        if self.gradual and isinstance(sparsity.density, Mapping):
            # The fall is one of the whole network, which the refresh shares out.
            refresh = FallingShares(shares=tuple(sparsity.density.values()), every=every)
            falling = ntt.GradualDensity(density, max(1, self.steps // 2))
            sparsity = ntt.Sparsity(falling, "global", pattern=sparsity.pattern)
        dense, cut = ntt.sparsify(teacher), None
        if isinstance(sparsity.pattern, ntt.FewChannels):
            cut = ntt.compact(dense.with_mask(sparsity.widest(dense.mask)), x[:1])
            sparsity = inside(sparsity, dense.mask, cut)
        rate = optax.cosine_decay_schedule(self.learning_rate, self.steps, 0.05)
        method = ntt.NeuralTangentTransfer(
            sparsity=sparsity,
            optimizer=optax.adam(rate),
            loss=ntt.KernelMatching(
                "ambient",
                ntt.Sketch(self.sketch_size),
                kernel_weight=self.kernel_weight,
                kernel_distance=ntt.Alignment() if self.alignment else ntt.MeanSquare(),
                output_distance=ntt.MeanSquare() if self.match == "both" else NoDistance(),
            ),
            refresh=refresh,
            num_steps=self.steps,
            pruned="zero" if self.refresh == "rigl" else "free",
        )
        student = None if cut is None else cut.take(dense).model
        state = ntt.ntt_init(teacher, method, student=student, key=key)
        state, _ = ntt.transfer(state, _batches(x, key), num_steps=self.steps, log_every=None)
        found = whole_of(cut, state.student, dense)
        if self.weights == "transferred":
            return found
        return start(teacher, found.mask, self.weights)


@dataclasses.dataclass(frozen=True)
class WithItsShares:
    """A random mask with the shares of the layers that a variant's mask has."""

    variant: Variant

    def __call__(self, teacher: Any, examples: Any, density: float, key: Any) -> ntt.SparseModel:
        """The dense initialisation under the variant's mask, shuffled within each layer."""
        found, again = self.variant(teacher, examples, density, key), jax.random.fold_in(key, 1)
        few = part(teacher, np.asarray(examples[0]), self.variant.units, key)
        if few is None:
            mask = ntt.shuffle_mask(found.mask, again)
        else:  # on the same units
            counts = ntt.Sparsity(density, pattern=few).of_mask(found.mask)
            mask = counts.mask(ntt.scores.Random(again)(teacher))
        return start(teacher, mask, self.variant.weights)


@dataclasses.dataclass(frozen=True)
class RandomMask:
    """A random mask with shares by a rule, or those of a score, of which nothing else is used."""

    shares: Rule | Literal["ntk-sap", "synflow"]
    weights: Literal["initial", "rescaled"] = "initial"
    units: float = 1.0

    def __call__(self, teacher: Any, examples: Any, density: float, key: Any) -> ntt.SparseModel:
        """The dense initialisation under this mask."""
        x = np.asarray(examples[0])
        if self.shares in ("erk", "equal", "output"):
            counts = by_rule(self.shares, teacher, density)
            few = part(teacher, x, self.units, key)
            sparsity = ntt.Sparsity(counts.density, "layer", counts.allocation, few)
            scores = ntt.scores.Random(jax.random.fold_in(key, 1))
            mask = ntt.prune(teacher, scores, sparsity).mask
        else:
            mask = ranked(self.shares, teacher, x, density, key)
            mask = ntt.shuffle_mask(mask, jax.random.fold_in(key, 1))
        return start(teacher, mask, self.weights)


@dataclasses.dataclass(frozen=True)
class ScoreMask:
    """The mask of a score over all layers, on a part of the units."""

    score: Literal["ntk-sap", "synflow"]
    units: float

    def __call__(self, teacher: Any, examples: Any, density: float, key: Any) -> ntt.SparseModel:
        """The dense initialisation under this mask."""
        x = np.asarray(examples[0])
        few = part(teacher, x, self.units, key)
        return ntt.SparseModel(teacher, ranked(self.score, teacher, x, density, key, few))


def part(teacher: Any, x: Any, share: float, key: Any) -> ntt.FewChannels | None:
    """A random part of the units of every hidden layer, `None` for all of them."""
    if share == 1:
        return None
    return ntt.few_channels(teacher, x[:1], share, key=jax.random.fold_in(key, 2))


def by_rule(rule: Rule, teacher: Any, density: float) -> ntt.Sparsity:
    """Shares by a rule that sees the shapes alone.

    By `equal` all layers keep the same number of weights, or all they have; `output` keeps the last
    layer whole and shares the rest out by ERK.
    """
    if rule == "erk":
        return ntt.Sparsity(density, allocation="erk")
    mask = ntt.sparsify(teacher).mask
    erk = ntt.allocate(mask, density, "erk")
    sizes = dict(zip(erk, (leaf.size for leaf in jax.tree.leaves(mask)), strict=True))
    budget = density * sum(sizes.values())
    if rule == "equal":
        shares = {}
        for done, name in enumerate(sorted(sizes, key=lambda name: sizes[name])):
            shares[name] = min(1.0, budget / (len(sizes) - done) / sizes[name])
            budget -= shares[name] * sizes[name]
        return ntt.Sparsity({name: shares[name] for name in sizes})
    *rest, last = erk
    scale = (budget - sizes[last]) / sum(erk[name] * sizes[name] for name in rest)
    return ntt.Sparsity({**{name: scale * erk[name] for name in rest}, last: 1.0})


def ranked(
    score: str,
    teacher: Any,
    x: Any,
    density: float,
    key: Any,
    few: ntt.FewChannels | None = None,
) -> Any:
    """The mask of a score over all layers, found in as many rounds as its authors take."""
    method, rounds = {
        "ntk-sap": (ntt.scores.NTKSAP(key), 20),
        "synflow": (ntt.scores.SynFlow(), 100),
    }[score]
    whole = ntt.Sparsity(density, "global", pattern=few)
    return ntt.prune(teacher, method, whole, x[:100], steps=rounds).mask


def start(teacher: Any, mask: Any, weights: str) -> ntt.SparseModel:
    """The initial weights under a mask, rescaled by the density of their layer or as they are."""
    initial = ntt.SparseModel(teacher, mask)
    return ntt.rescale_by_density(initial) if weights == "rescaled" else initial


def _batches(x: np.ndarray, key: Any, size: int = 64) -> Iterator[np.ndarray]:
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
    while True:
        order = rng.permutation(len(x))
        for start in range(0, len(x) - size + 1, size):
            yield x[order[start : start + size]]


def variants(steps: int) -> dict[str, Variant]:
    """All variants of the first round, by name."""
    base = Variant(steps)
    change = lambda **fields: dataclasses.replace(base, **fields)
    best = lambda **fields: change(**{"gradual": True, "kernel_weight": 1e-2, **fields})
    return {
        "base": base,
        "shares-uniform": change(shares="uniform"),
        "shares-global": change(shares="global"),
        "shares-ntk-sap": change(shares="ntk-sap"),
        "lamp-global": change(shares="global", refresh="lamp"),
        "sensitivity": change(refresh="sensitivity"),
        "rigl-refresh": change(refresh="rigl"),
        "no-refresh": change(refresh="none"),
        "gradual": change(gradual=True),
        "no-kernel": change(kernel_weight=0.0),
        "kernel-x10": change(kernel_weight=1e-2),
        "kernel-alone": change(match="kernel"),
        "alignment": change(alignment=True, kernel_weight=0.1),
        "alignment-alone-initial": change(
            match="kernel", alignment=True, kernel_weight=1.0, weights="initial"
        ),
        "sketch-2": change(sketch_size=2),
        "slow": change(learning_rate=2e-4),
        "initial-weights": change(weights="initial"),
        "rescaled-initial": change(weights="rescaled"),
        "ntk-sap-initial": change(shares="ntk-sap", weights="initial"),
        "shares-synflow": change(shares="synflow"),
        "synflow-initial": change(shares="synflow", weights="initial"),
        "synflow-rescaled": change(shares="synflow", weights="rescaled"),
        "synflow-refresh": change(shares="global", refresh="synflow", gradual=True),
        "synflow-refresh-rescaled": change(
            shares="global", refresh="synflow", gradual=True, weights="rescaled"
        ),
        "ntk-sap-refresh": change(shares="global", refresh="ntk-sap", gradual=True),
        # Combinations of what was best in the first round of those above.
        "gradual-sensitivity": change(gradual=True, refresh="sensitivity"),
        "gradual-slow": change(gradual=True, learning_rate=2e-4),
        "gradual-kernel-x10": change(gradual=True, kernel_weight=1e-2),
        "sensitivity-slow": change(refresh="sensitivity", learning_rate=2e-4),
        "ntk-sap-sensitivity": change(shares="ntk-sap", refresh="sensitivity"),
        "ntk-sap-slow": change(shares="ntk-sap", learning_rate=2e-4),
        "ntk-sap-sensitivity-slow": change(
            shares="ntk-sap", refresh="sensitivity", learning_rate=2e-4
        ),
        "ntk-sap-sensitivity-initial": change(
            shares="ntk-sap", refresh="sensitivity", weights="initial"
        ),
        "synflow-sensitivity": change(shares="synflow", refresh="sensitivity"),
        # The falling density, ahead on MNIST, with what else did well.
        "gradual-ntk-sap": best(shares="ntk-sap"),
        "gradual-ntk-sap-initial": best(shares="ntk-sap", weights="initial"),
        "gradual-synflow": best(shares="synflow"),
        "gradual-equal": best(shares="equal"),
        "gradual-output": best(shares="output"),
        "gradual-sketch-2": best(sketch_size=2),
        "gradual-initial": best(weights="initial"),
        "gradual-kernel-alone": best(match="kernel"),
        "gradual-kernel-x100": best(kernel_weight=1e-1),
    }


def on_units(steps: int) -> dict[str, Variant]:
    """The variants on a part of the hidden units, by name."""
    base = Variant(steps, gradual=True, kernel_weight=1e-2, units=1 / 3)
    third = lambda **fields: dataclasses.replace(base, **fields)
    return {
        "third": third(),
        "sixth": third(units=1 / 6),
        "half": third(units=1 / 2),
        "third-initial": third(weights="initial"),
        "third-long": third(steps=4 * steps),
        "third-long-slow": third(steps=4 * steps, learning_rate=2e-4),
        "half-long": third(units=1 / 2, steps=4 * steps),
        "third-constant": third(gradual=False),
        "third-kernel-alone": third(match="kernel"),
        "third-kernel-x10": third(kernel_weight=1e-1),
        "third-sketch-2": third(sketch_size=2),
        "third-global": third(shares="global"),
        "third-ntk-sap": third(shares="ntk-sap"),
        "third-ntk-sap-initial": third(shares="ntk-sap", weights="initial"),
        "third-synflow": third(shares="synflow"),
    }


# What costs nothing: shares and scale alone, the weights of each layer drawn at random.
CONTROLS = {
    "random-erk-rescaled": RandomMask("erk", "rescaled"),
    "random-equal-counts": RandomMask("equal"),
    "random-output-whole": RandomMask("output"),
    "random-synflow-shares": RandomMask("synflow"),
    "random-ntk-sap-shares": RandomMask("ntk-sap"),
}
CONTROLS_ON_UNITS = {
    "random-ntk-sap-shares": RandomMask("ntk-sap"),
    "random-third": RandomMask("erk", units=1 / 3),
    "random-sixth": RandomMask("erk", units=1 / 6),
    "ntk-sap-third": ScoreMask("ntk-sap", 1 / 3),
}


def trained(methods: Any, name: str, out: Path, **settings: Any) -> tuple[Results, float | None]:
    """Test accuracy in percent by name and seed, and the seconds that one network takes.

    A network that diverged has no accuracy, and neither has a variant that cannot be run: the
    library refuses, for example, scores by which no mask can be made.
    """
    try:
        frame: Any = ntt.experiment.compare(methods, out=out / name, **settings)
    except ValueError as error:
        print(f"{name} cannot be run: {error}", flush=True)
        return {}, None
    found: Results = {}
    for row in frame.itertuples():
        scoped = isinstance(row.scope, str) and row.scope
        which = f"{row.method}@{row.scope}" if scoped else row.method
        if math.isfinite(row.test_accuracy):
            found.setdefault(which, {})[row.seed] = 100 * row.test_accuracy
    return found, float(frame.seconds.median())


def lead(one: dict[int, float], other: dict[int, float]) -> dict[str, Any]:
    """Mean of `one - other` over common seeds, its standard error, and whether that is ahead.

    The mean of no seeds and the error of one are `None`.
    """
    gaps = [one[seed] - other[seed] for seed in sorted(set(one) & set(other))]
    mean = statistics.mean(gaps) if gaps else None
    error = statistics.stdev(gaps) / len(gaps) ** 0.5 if len(gaps) > 1 else None
    ahead = mean is not None and error is not None and mean > 2 * error
    ahead = ahead and len(gaps) >= LEAST_SEEDS
    return {"mean": mean, "error": error, "seeds": len(gaps), "ahead": ahead}


def shown(lead: dict[str, Any]) -> str:
    """A lead and its standard error, as far as they are known."""
    if lead["mean"] is None:
        return "?"
    return f"{lead['mean']:+.2f}" + ("" if lead["error"] is None else f" ± {lead['error']:.2f}")


def main() -> None:
    """Run the ladder and write what was found."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--images", default="fashion-mnist")
    parser.add_argument("--density", type=float, default=0.01)
    parser.add_argument("--steps", type=int, default=3000, help="of a transfer (default: 3000)")
    parser.add_argument("--epochs", type=float, default=5.0, help="of a training (default: 5)")
    parser.add_argument("--ladder", type=int, nargs="+", default=[1, 3, 5], help="seeds a round")
    parser.add_argument("--units", action="store_true", help="variants on a part of the units")
    parser.add_argument("--only", nargs="+", help="variants to begin with")
    options = parser.parse_args()
    left = on_units(options.steps) if options.units else variants(options.steps)
    controls = CONTROLS_ON_UNITS if options.units else CONTROLS
    if options.only:
        left = {name: left[name] for name in options.only}
    log: list[dict[str, Any]] = []
    common = {
        "models": "lenet-300-100",
        "datasets": options.images,
        "densities": options.density,
        "scoring": {"examples": 1_000 if "mini" in options.images else 50_000},
        "training": {"epochs": options.epochs},
        "preset": "paper",
        "progress": False,
    }
    published = {**common, "scoring": {}}
    for number, seeds in enumerate(options.ladder):
        last = number == len(options.ladder) - 1
        methods: dict[str, Any] = left | controls
        if last:
            methods |= {f"{name}-shuffled": WithItsShares(v) for name, v in left.items()}
        found, cost = {}, {}
        for name in random.sample(list(methods), len(methods)):
            method = methods[name]
            one, cost[name] = trained(
                {name: method}, name, options.out, seeds=range(seeds), **common
            )
            found |= one
        baselines, _ = trained(
            list(BASELINES), "baselines", options.out, seeds=range(seeds), **published
        )
        baselines |= {name: found.get(name, {}) for name in controls}
        order = sorted(
            left, key=lambda n: -statistics.mean([*found.get(n, {}).values(), 0.0][:seeds])
        )
        for name in order:
            against = {b: lead(found.get(name, {}), rows) for b, rows in baselines.items()}
            if last:
                against["its shares"] = lead(found.get(name, {}), found.get(f"{name}-shuffled", {}))
            row = {
                "round": number,
                "variant": name,
                "settings": dataclasses.asdict(left[name]),
                "accuracy": found.get(name, {}),
                "seconds": cost.get(name),
                "against": against,
                "ahead": all(value["ahead"] for value in against.values()),
            }
            log.append(row)
            gaps = ", ".join(f"{rival} {shown(value)}" for rival, value in against.items())
            mean = statistics.mean(row["accuracy"].values()) if row["accuracy"] else math.nan
            verdict = "AHEAD" if row["ahead"] else ""
            print(f"round {number}  {name:<18} {mean:6.2f}  {gaps}  {verdict}", flush=True)
        found = {"variants": log, "rivals": baselines}
        (options.out / "search.json").write_text(json.dumps(found, indent=1) + "\n")
        if not last:
            left = {name: left[name] for name in order[: max(1, math.ceil(len(order) / 2))]}


if __name__ == "__main__":
    main()
