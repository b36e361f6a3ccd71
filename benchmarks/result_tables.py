"""The tables of docs/results.md, made of raw results in benchmarks/results."""

import json
import pathlib
import statistics
from collections.abc import Iterable, Mapping
from typing import Any

RAW = pathlib.Path(__file__).parent / "results"

NAMES = {
    "dense": "dense",
    "ntt": "**NTT, active kernel**",
    "ntt-ambient": "**NTT, ambient kernel**",
    "ntt-sketch": "**NTT, sketched kernel**",
    "magnitude": "magnitude",
    "random": "random",
    "snip": "SNIP",
    "logit-snip": "logit-SNIP",
    "grasp": "GraSP",
    "synflow": "SynFlow",
    "ntk-sap": "NTK-SAP",
}
LABELS = {"dense": "–", "snip": "yes", "grasp": "yes"}  # all others: no
ON_EXAMPLES = ("snip", "logit-snip")  # scored on 100 examples
BEYOND = (
    ("ntt-sketch", "**NTT, sketched, over all layers**"),
    ("synflow", "SynFlow"),
    ("ntk-sap", "NTK-SAP"),
)
SHORT = {
    "layer": ("ntt", "ntt-ambient", "random", "magnitude", "snip", "logit-snip"),
    "global": ("ntt-ambient", "snip", "logit-snip", "grasp", "synflow", "ntk-sap"),
}
SIMPLE, SCORES = ("random", "magnitude", "snip"), ("synflow", "ntk-sap")
LAYERS = {"layer": ("ntt-sketch", *SIMPLE, *SCORES)}
WHOLE = {"layer": ("ntt", "ntt-ambient", *LAYERS["layer"])}

Results = list[dict[str, Any]]


def load(name: str) -> Any:
    """The raw results of one file."""
    return json.loads((RAW / f"{name}.json").read_text())


def values(results: Results, key: str = "test_accuracy", **where: Any) -> list[float]:
    """One value of each result that has all of `where`, in percent, by seed."""
    chosen = [r for r in results if all(r[name] == value for name, value in where.items())]
    return [100 * r[key] for r in sorted(chosen, key=lambda r: r["seed"])]


def mean(numbers: Iterable[float]) -> float:
    return statistics.fmean(list(numbers))


def standard_error(numbers: list[float]) -> float:
    return statistics.stdev(numbers) / len(numbers) ** 0.5


def with_error(numbers: list[float], error: float | None = None, sign: str = "") -> str:
    """A mean and its standard error, which one number does not tell."""
    if error is None and len(numbers) > 1:
        error = standard_error(numbers)
    return f"{mean(numbers):{sign}.2f}" + ("" if error is None else f" ± {error:.2f}")


def spread(numbers: list[float], digits: int) -> str:
    return f"{mean(numbers):.{digits}f} ± {statistics.stdev(numbers):.{digits}f}"


def table(header: list[str], right: list[bool], rows: list[list[str]]) -> str:
    line = lambda cells: "| " + " | ".join(cells) + " |"
    rule = ["---:" if flag else "---" for flag in right]
    return "\n".join([line(header), line(rule), *map(line, rows)])


def claim(holds: bool, sentence: str) -> None:
    """Raise unless the data still say what a sentence of the page says."""
    if not holds:
        raise SystemExit(f"make_results: the results no longer say: {sentence}")


def main_table(results: Results) -> str:
    rows = []
    for method in ("dense", "ntt", "ntt-ambient", "magnitude", "random", "snip", "logit-snip"):
        test = values(results, method=method)
        name = NAMES[method] + (" (100 % of the weights)" if method == "dense" else "")
        name += " (100 examples)" if method in ON_EXAMPLES else ""
        each = ", ".join(f"{v:.2f}" for v in test)
        train = f"{mean(values(results, 'train_accuracy', method=method)):.2f}"
        rows.append([name, LABELS.get(method, "no"), spread(test, 2), each, train])
    header = ["method", "needs labels", "test accuracy (%), mean ± sd", "of each seed"]
    return table([*header, "train accuracy (%)"], [False, False, True, False, True], rows)


FAIR = (  # method, what its row is called, the file of its results, scope, mask
    ("dense", "dense", "fashion_mnist_steps", None, ""),
    ("ntk-sap", "NTK-SAP", "fashion_mnist_beyond", "global", ""),
    ("ntt-sketch", "**NTT**, sketched", "fashion_mnist_beyond", "global", ""),
    ("synflow", "random", "fashion_mnist_shuffled", "global", "shuffle"),
    ("random", "random", "fashion_mnist_fair", "layer", "erk"),
    ("synflow", "SynFlow", "fashion_mnist_beyond", "global", ""),
    ("snip", "SNIP", "fashion_mnist_fair", "global", ""),
    ("magnitude", "magnitude", "fashion_mnist_fair", "global", ""),
    ("ntt", "**NTT**, active, as published", "fashion_mnist_steps", "layer", ""),
    ("random", "random", "fashion_mnist_steps", "layer", ""),
)
SHARES = {
    "global": "over all layers",
    "layer": "same in each layer",
    None: "–",
    "erk": "ERK",
    "shuffle": "SynFlow's",
}


def fair_values(row: tuple[str, str, str, str | None, str], density: float) -> list[float]:
    """The accuracies of one row of the fair table at one density."""
    method, _, file, scope, mask = row
    found = [r for r in load(file) if r.get("mask", "") == mask]
    return values(found, method=method, scope=scope, density=density if scope else 1.0)


def rounded(numbers: list[float], between: str) -> str:
    """A mean and its standard error to one digit."""
    return f"{mean(numbers):.1f}{between}{standard_error(numbers):.1f}"


def fair_cells(
    row: tuple[str, str, str, str | None, str], densities: Iterable[float], between: str
) -> tuple[list[str], int]:
    """Mean and standard error of a row at each density, and the number of its seeds."""
    of_each = [fair_values(row, density) for density in densities]
    return [rounded(found, between) for found in of_each], len(of_each[0])


def fair_table(*densities: float) -> str:
    """Each method with the shares of its authors, and random masks with ERK's; standard errors."""
    rows = []
    for row in FAIR:
        method, name, _, scope, mask = row
        cells, seeds = fair_cells(row, densities, " ± ")
        shares = SHARES[mask or scope]
        rows.append([name, shares, LABELS.get(method, "no"), *cells, str(seeds)])
    header = ["method", "shares of the layers", "labels"]
    header += [f"{100 * density:g} %" for density in densities] + ["seeds"]
    return table(header, [False] * 3 + [True] * (len(densities) + 1), rows)


SHUFFLED = (  # rows like those of FAIR, each of which has random masks with its shares
    ("ntk-sap", "NTK-SAP, over all layers", "fashion_mnist_beyond", "global", ""),
    ("ntt-sketch", "**NTT**, sketched, over all layers", "fashion_mnist_beyond", "global", ""),
    ("synflow", "SynFlow, over all layers", "fashion_mnist_beyond", "global", ""),
    ("snip", "SNIP, over all layers", "fashion_mnist_fair", "global", ""),
)


def shuffled_values(method: str, density: float) -> list[float]:
    """The accuracies of random masks that keep as many weights of each layer as a method's."""
    return values(load("fashion_mnist_shuffled"), method=method, density=density)


def gains_within_shares(row: tuple[str, str, str, str | None, str], density: float) -> list[float]:
    """How far a method is ahead of random masks with its shares, by seed."""
    pairs = zip(fair_values(row, density), shuffled_values(row[0], density), strict=True)
    return [one - other for one, other in pairs]


def shuffled_table(*densities: float) -> str:
    """Each method, random masks with its shares, and what its choice within layers gains."""
    rows = []
    for row in SHUFFLED:
        cells = [row[1]]
        for density in densities:
            cells += [with_error(fair_values(row, density))]
            cells += [with_error(shuffled_values(row[0], density))]
            cells += [with_error(gains_within_shares(row, density), sign="+")]
        rows.append(cells)
    header = ["method"]
    for density in densities:
        header += [f"{100 * density:g} %", "random, its shares", "gain"]
    return table(header, [False] + [True] * (3 * len(densities)), rows)


ON_TWO_SETS = (  # method, what its row is called, file of the Fashion-MNIST results, scope, mask
    ("ntk-sap", "NTK-SAP, over all layers", "fashion_mnist_beyond", "global", ""),
    ("synflow", "SynFlow, over all layers", "fashion_mnist_beyond", "global", ""),
    ("ntk-sap", "random, NTK-SAP's shares", "fashion_mnist_shuffled", "global", "shuffle"),
    ("synflow", "random, SynFlow's shares", "fashion_mnist_shuffled", "global", "shuffle"),
    ("snip", "SNIP, over all layers (sees labels)", "fashion_mnist_fair", "global", ""),
    ("random", "random, ERK (NTT's shares)", "fashion_mnist_fair", "layer", "erk"),
)
GRADUAL = "**NTT**, ERK, the density falls"
SETS = {"mnist": "MNIST", "fashion-mnist": "Fashion-MNIST"}


def mnist_values(method: str, scope: str | None, mask: str) -> list[float]:
    """The accuracies on MNIST at 1 %, none where that was not run."""
    found = [r for r in load("mnist_rivals") if (r["scope"] or None, r["mask"]) == (scope, mask)]
    return values(found, method=method)


def rivals_on(dataset: str) -> dict[str, list[float]]:
    """The accuracies of the rivals of our transfers at 1 %, by the names of their rows."""
    if dataset == "mnist":
        return {row[1]: mnist_values(row[0], row[3], row[4]) for row in ON_TWO_SETS}
    return {row[1]: fair_values(row, 0.01) for row in ON_TWO_SETS}


def gradual_values(dataset: str) -> list[float]:
    """The accuracies after transfers whose density falls, at 1 %."""
    return values(load("gradual"), dataset=dataset)


def steady_values(dataset: str) -> list[float]:
    """The accuracies of transfers at one density throughout, at 1 % on all units, by seed."""
    where = {"dataset": dataset, "method": "ntt-sketch", "mask": "erk"}
    return values(load("tasks"), **where)


def others_on(dataset: str) -> dict[str, list[float]]:
    """The rivals, and a transfer of the same steps at one density."""
    steady = {"NTT, ERK, the same steps at 1 % throughout, R = 2": steady_values(dataset)}
    return steady | rivals_on(dataset)


def leads_over(ours: list[float], others: Mapping[str, list[float]]) -> dict[str, list[float]]:
    """How far our transfers are ahead of each of the others, by seed."""
    return {
        name: [one - other for one, other in zip(ours, theirs, strict=True)]
        for name, theirs in others.items()
    }


def is_ahead(leads: list[float]) -> bool:
    """Whether a mean is more than two standard errors above zero."""
    return mean(leads) > 2 * standard_error(leads)


def leads_of_gradual(dataset: str) -> dict[str, list[float]]:
    """How far transfers whose density falls are ahead of all others, by seed."""
    return leads_over(gradual_values(dataset), others_on(dataset))


def gradual_table() -> str:
    """Transfers whose density falls beside all others, on two data sets."""
    rows = {GRADUAL: list[str]()}
    for dataset in SETS:
        rows[GRADUAL] += [with_error(gradual_values(dataset)), "–"]
        leads = leads_of_gradual(dataset)
        for name, theirs in others_on(dataset).items():
            cells = [with_error(theirs), with_error(leads[name], sign="+")]
            rows[name] = rows.get(name, []) + cells
    header = ["mask", "MNIST", "NTT's lead", "Fashion-MNIST", "NTT's lead"]
    return table(header, [False] + [True] * 4, [[name, *row] for name, row in rows.items()])


def readme_table(first: list[list[str]], *densities: float) -> str:
    """The fair table in few words, with MNIST at the first density where that was run.

    The rows `first` stand behind the dense network's. Others are on the page alone.
    """
    rows = []
    for row in FAIR:
        method, name, _, scope, mask = row
        if (method, scope) in (("ntt-sketch", "global"), ("magnitude", "global")):
            continue
        cells, _ = fair_cells(row, densities, "±")
        on_mnist = mnist_values(method, scope, mask)
        cells.insert(0, rounded(on_mnist, "±") if on_mnist else "–")
        shares = {**SHARES, "global": "global", "layer": "uniform"}[mask or scope]
        rows.append([f"{name.split(',')[0]}, {shares}" if scope else name, *cells])
    rows[1:1] = first
    header = ["method, shares", f"MNIST {100 * densities[0]:g} %"]
    header += [f"Fashion {100 * density:g} %" for density in densities]
    return table(header, [False] + [True] * (len(densities) + 1), rows)


def densities(results: Results) -> list[float]:
    """All densities of sparse networks, the lowest first."""
    return sorted({r["density"] for r in results if r["scope"]})


def sparsity_table(results: Results, orders: Mapping[str, Iterable[str]]) -> str:
    """Accuracy at each density, of the methods of each scope."""
    rows, columns = [], densities(results)
    for scope, methods in orders.items():
        for method in methods:
            cells = []
            for density in columns:
                found = values(results, method=method, scope=scope, density=density)
                cells.append(spread(found, 1) if found else "–")
            ranked = {"layer": "per layer", "global": "over all"}[scope]
            name = NAMES[method].replace(" kernel", "")
            rows.append([name, LABELS.get(method, "no"), ranked, *cells])
    shares = [f"{100 * density:g} %" for density in columns]
    right = [False] * 3 + [True] * len(columns)
    return table(["method", "labels", "ranked", *shares], right, rows)


def lost_table(results: Results, methods: Iterable[str]) -> str:
    """How many masks leave a class without a path from the input, of how many."""
    rows, columns = [], densities(results)
    for method in methods:
        cells = []
        for density in columns:
            found = [r for r in results if (r["method"], r["density"]) == (method, density)]
            lost = sum(r["lost_classes"] > 0 for r in found)
            cells.append(f"{lost} of {len(found)}" if found else "–")
        rows.append([NAMES[method].replace(" kernel", ""), *cells])
    shares = [f"{100 * density:g} %" for density in columns]
    return table(["method", *shares], [False, *[True] * len(columns)], rows)


def lost_classes(network: pathlib.Path) -> int:
    """The outputs that no input reaches, of a network whose layers follow one another.

    A feature of a convolution is reached where any of its weights is kept, and all of its positions
    are with it. Of other networks, in which ways meet, the outputs without a weight of their own.
    """
    import jax
    import numpy as np

    from ntt_eqx.experiment.model_file import load_model

    model = load_model(network).model
    masks = [np.asarray(mask) for mask in jax.tree.leaves(model.mask)]
    if type(model.model).__name__ not in ("LeNet300100", "LeNet5", "Conv4", "VGG11"):
        return int((~masks[-1].any(axis=1)).sum())
    reached: np.ndarray = np.ones(1, bool)
    for mask in masks:
        kept: Any = mask.reshape(*mask.shape[:2], -1).any(axis=2)
        reached = (kept & np.repeat(reached, kept.shape[1] // len(reached))).any(axis=1)
    return int((~reached).sum())


def beyond_table(results: Results) -> str:
    """NTT over all layers, beside the strongest label-free scores."""
    rows = []
    for method, name in BEYOND:
        cells = []
        for density in (0.01, 0.03):
            found = values(results, method=method, scope="global", density=density)
            cells += [spread(found, 2), ", ".join(f"{v:.1f}" for v in found)]
        rows.append([name, *cells])
    header = ["method", "1 %", "of each seed", "3 %", "of each seed"]
    return table(header, [False, True, False, True, False], rows)


TRANSFERS = {  # the variants of the study of time, and what their rows are called
    ("ntt", None): "NTT, active",
    ("ntt-ambient", None): "NTT, ambient",
    ("ntt-sketch", 1): "NTT, sketched, R = 1",
    ("ntt-sketch", 2): "NTT, sketched, R = 2",
    ("ntt-sketch", 8): "NTT, sketched, R = 8",
}


def variant(result: dict[str, Any]) -> tuple[str, int | None]:
    """Which transfer a result is of: the method, and the number of its random directions."""
    return result["method"], result["transfer"].get("sketch_size")


def time_values(results: Results, which: tuple[str, int | None], epochs: float) -> Results:
    """The results of one variant of the transfer and one length of it."""
    return [r for r in results if variant(r) == which and r["transfer"]["epochs"] == epochs]


def time_table(results: Results) -> str:
    """Accuracy after training, and seconds of the transfer, for each length of it."""
    lengths = sorted({r["transfer"]["epochs"] for r in results})
    rows = []
    for which, name in TRANSFERS.items():
        cells = []
        for epochs in lengths:
            found = time_values(results, which, epochs)
            seconds = mean(r["transfer_seconds"] for r in found)
            cells.append(f"{spread(values(found), 1)} in {seconds:.{seconds < 9.5:d}f} s")
        rows.append([name, *cells])
    header = [f"{epochs:g} epoch{'s' * (epochs > 1)}" for epochs in lengths]
    return table(["transfer", *header], [False, *[True] * len(lengths)], rows)


def epochs_table(results: Results) -> str:
    """Accuracy after each epoch of training and lost outputs, of every network."""
    rows = []
    for method in ("dense", *LAYERS["layer"]):
        for r in (r for r in results if r["method"] == method):
            curve = [f"{value:.1f}" for _, value in r["accuracy_curve"][1:]]
            what = [NAMES[method].replace(" kernel", ""), LABELS.get(method, "no"), str(r["seed"])]
            rows.append([*what, *curve, str(r["lost_classes"])])
    header = [f"{n} epoch{'s' * (n > 1)}" for n in range(1, len(rows[0]) - 3)]
    right = [False, False] + [True] * (len(header) + 2)
    return table(["method", "labels", "seed", *header, "without weights"], right, rows)


def evolution_table(results: Results) -> str:
    rows = []
    for r in results:
        ratio = r["ntt_distance"] / r["random_distance"]
        seed = f"{r['seed']} (figure)" if r["seed"] == 0 else str(r["seed"])
        aligned = f"{r['ntt_alignment']:.2f} / {r['random_alignment']:.2f}"
        distances = f"{r['ntt_distance']:.2f}", f"{r['random_distance']:.2f}"
        rows.append([seed, *distances, f"{ratio:.2f}", aligned])
    header = ["seed", "NTT: mean distance", "random: mean distance", "ratio"]
    return table([*header, "kernel alignment with dense, NTT / random"], [True] * 5, rows)


def notebooks_table(published: dict[str, Any], results: Results) -> str:
    """Distances of the transfer and accuracies of the training, there and here: means over runs."""

    def row(name: str, steps: str, transfers: list[Any], curves: list[Any], time: str) -> list[str]:
        ends = [(t[0], t[-1]) for t in transfers]
        distances = [
            f"{mean(a[n] for a, _ in ends):.{d}f} → {mean(b[n] for _, b in ends):.{d}f}"
            for n, d in ((1, 0), (2, 3))
            if ends
        ]
        shown = []
        for at in (1000, 5000, 20000, None):
            reached = [[v for s, v in c if at is None or s <= at][-1] for c in curves]
            shown.append(f"{mean(reached):.2f}")
        return [name, steps, *(distances or ["–", "–"]), *shown, time]

    rows = [
        row("published, NTT", "18,720", published["transfer"], published["accuracy"]["ntt"], "–"),
        row("published, random", "–", [], published["accuracy"]["random"], "–"),
    ]
    for method in ("ntt-ambient", "ntt-sketch", "random", "dense"):
        found = [r for r in results if r["method"] == method]
        if found:
            steps, seconds = found[0]["transfer_steps"], mean(r["transfer_seconds"] for r in found)
            transfers = [r["transfer_curve"] for r in found if r["transfer_curve"]]
            rows.append(
                row(
                    NAMES[method].replace(" kernel", ""),
                    f"{steps:,}" if steps else "–",
                    transfers,
                    [r["accuracy_curve"] for r in found],
                    f"{seconds / 60:.1f}" if steps else "–",
                )
            )
    header = ["network", "steps", "kernel distance", "target distance"]
    header += [f"{at} steps" for at in ("1,000", "5,000", "20,000")] + ["end"]
    return table([*header, "minutes"], [False, True, True, True] + [True] * 5, rows)


def least_gain(results: Results, *methods: str) -> float:
    """The least lead over the random mask of the same seed, at any look from the first step on."""
    curves = {(r["method"], r["seed"]): dict(map(tuple, r["accuracy_curve"])) for r in results}
    seeds = {seed for method, seed in curves if method == methods[0]}
    return min(
        curves[method, seed][step] - curves["random", seed][step]
        for method in methods
        for seed in seeds
        for step in curves[method, seed]
        if step
    )


def minutes(results: Results, method: str) -> tuple[float, float]:
    """Shortest and longest transfer."""
    found = [r["transfer_seconds"] / 60 for r in results if r["method"] == method]
    return min(found), max(found)
