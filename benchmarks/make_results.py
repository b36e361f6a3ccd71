"""Make docs/results.md, and the table of the README, from the raw results.

    python benchmarks/make_results.py
    python benchmarks/make_results.py --collect mnist_notebooks runs/notebooks

The first makes the pages; the second puts runs with their curves among the raw results before. The
text is benchmarks/pages/results.md, with places for numbers. Those come from the files in
benchmarks/results; what a sentence claims of them is checked here, so that text and data cannot
part.
"""

import argparse
import json
import pathlib
import re
import statistics
from collections.abc import Iterable, Mapping
from typing import Any

ROOT = pathlib.Path(__file__).parents[1]
RAW = ROOT / "benchmarks" / "results"
TEXT = ROOT / "benchmarks" / "pages" / "results.md"
PAGE = ROOT / "docs" / "results.md"
README = ROOT / "README.md"

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
    ("random", "random", "fashion_mnist_fair", "layer", "erk"),
    ("synflow", "SynFlow", "fashion_mnist_beyond", "global", ""),
    ("snip", "SNIP", "fashion_mnist_fair", "global", ""),
    ("magnitude", "magnitude", "fashion_mnist_fair", "global", ""),
    ("ntt", "**NTT**, active, as published", "fashion_mnist_steps", "layer", ""),
    ("random", "random", "fashion_mnist_steps", "layer", ""),
)
SHARES = {"global": "over all layers", "layer": "same in each layer", None: "–", "erk": "ERK"}


def fair_values(row: tuple[str, str, str, str | None, str], density: float) -> list[float]:
    """The accuracies of one row of the fair table at one density."""
    method, _, file, scope, mask = row
    found = [r for r in load(file) if r.get("mask", "") == mask]
    return values(found, method=method, scope=scope, density=density if scope else 1.0)


def fair_cells(
    row: tuple[str, str, str, str | None, str], densities: Iterable[float], between: str
) -> tuple[list[str], int]:
    """Mean and standard error of a row at each density, and the number of its seeds."""
    of_each = [fair_values(row, density) for density in densities]
    errors = [statistics.stdev(found) / len(found) ** 0.5 for found in of_each]
    pairs = zip(of_each, errors, strict=True)
    return [f"{mean(v):.1f}{between}{error:.1f}" for v, error in pairs], len(of_each[0])


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


def readme_table(*densities: float) -> str:
    """The fair table in few words."""
    rows = []
    for row in FAIR:
        _, name, _, scope, mask = row
        cells, _ = fair_cells(row, densities, "±")
        shares = {"global": "global", "layer": "uniform", None: "–", "erk": "ERK"}[mask or scope]
        rows.append([f"{name.split(',')[0]}, {shares}" if scope else name, *cells])
    header = ["method, shares", *(f"{100 * density:g} %" for density in densities)]
    return table(header, [False] + [True] * len(densities), rows)


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


def collect(name: str, *runs: pathlib.Path) -> None:
    """Write the results of runs with their curves: `[steps, kernel, target]`, `[steps, %]`."""
    results = []
    for path in sorted(path for run in runs for path in (run / "cells").glob("*/result.json")):
        result = json.loads(path.read_text())
        lines = (path.parent / "metrics.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        results.append(result)
        result["lost_classes"] = lost_classes(path.with_name("model.eqx"))
        if transfer := json.loads(path.with_name("config.json").read_text())["transfer"]:
            result["transfer"] = transfer
        result["transfer_curve"] = [
            [row["step"], *(row["validation"][f"{d}_distance"] for d in ("kernel", "target"))]
            for row in rows
            if row["phase"] == "transfer"
            and row["step"] in (0, 100, 1000, 5000, 10000, result["transfer_steps"])
        ]
        result["accuracy_curve"] = [
            [row["step"], round(100 * row["test"]["accuracy"], 2)]
            for row in rows
            if row["phase"] == "train"
        ]
    (RAW / f"{name}.json").write_text(json.dumps(results) + "\n")


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


def facts() -> dict[str, str]:
    """What the page is filled with; raises where a sentence of it would be untrue."""
    main, sparsity = load("fashion_mnist_lenet300100"), load("fashion_mnist_sparsity")
    lenet5, evolution = load("mnist_lenet5"), load("fashion_mnist_evolution")
    beyond, steps = load("fashion_mnist_beyond"), load("fashion_mnist_steps")
    digits, conv = load("mnist_sparsity"), load("fashion_mnist_lenet5")
    conv_digits, vit = load("mnist_lenet5_sparsity"), load("fashion_mnist_vit")

    # Lost classes are those of the run; with seeds 1 and 2 a random mask loses none.
    fair = {(row[0], row[4] or row[3]): row for row in FAIR}
    averages = {d: {k: mean(fair_values(row, d)) for k, row in fair.items()} for d in (0.01, 0.03)}
    global_ntt, erk = ("ntt-sketch", "global"), ("random", "erk")
    claim(
        abs(averages[0.03][global_ntt] - averages[0.03][erk]) < 0.3
        and 0 < averages[0.01][global_ntt] - averages[0.01][erk] < 1,
        "NTT over all layers is as good as random with ERK at 3 %, half a point ahead at 1 %.",
    )
    best = max(averages[0.01], key=lambda key: (key[1] is not None, averages[0.01][key]))
    claim(best == ("ntk-sap", "global"), "NTK-SAP is the best at 1 %.")
    claim(
        averages[0.03][global_ntt] > averages[0.03]["ntt", "layer"] + 0.3,
        "The published shares cost NTT half a point at 3 %.",
    )
    claim(
        averages[0.01]["magnitude", "global"] == 10, "Magnitudes over all layers lose one at 1 %."
    )

    ntt, random = values(main, method="ntt"), values(main, method="random")
    gap = min(ntt[seed] - random[seed] for seed in (1, 2))
    claim(gap > 1, "A random mask that loses no class is still below NTT.")

    at = lambda method, density, scope="layer": mean(
        values(sparsity, method=method, density=density, scope=scope)
    )
    others = ("random", "magnitude", "snip", "logit-snip")
    for density in (0.01, 0.02, 0.03, 0.05):
        best = max(at(method, density) for method in others)
        claim(
            max(at("ntt", density), at("ntt-ambient", density)) > best,
            "With the same share in every layer NTT is ahead up to 5 %.",
        )
    for density in (0.1, 0.3):
        within = [abs(at("ntt", density) - at(method, density)) < 1 for method in others]
        claim(sum(within) >= 3, "From 10 % on most are within a point.")
    free = {d: at("ntt-ambient", d, "global") for d in (0.01, 0.03)}
    for rival in ("ntk-sap", "synflow"):
        claim(abs(free[0.01] - at(rival, 0.01, "global")) < 1, "within a point at 1 %")
    spread_at_3 = [free[0.03], *(at(m, 0.03, "global") for m in ("snip", "synflow", "ntk-sap"))]
    claim(max(spread_at_3) - min(spread_at_3) < 0.5, "At 3 % all four are as good.")

    for density in (0.01, 0.03):
        means = [mean(values(beyond, method=m, density=density)) for m, _ in BEYOND]
        claim(max(means) - min(means) < 1, "All label-free scores are within a point.")
    kept = values(load("fashion_mnist_kept_mask"))
    sap = values(beyond, method="ntk-sap", density=0.01)[: len(kept)]
    claim(0.8 < mean(sap) - mean(kept) < 1.3, "NTK-SAP's mask with NTT's weights is a point below.")
    leads = [
        mean(values(found, method=ntt, scope="layer", density=0.01))
        - mean(values(found, method="random", scope="layer", density=0.01))
        for found, ntt in ((steps, "ntt-sketch"), (sparsity, "ntt-ambient"))
    ]
    claim(leads[0] > leads[1] + 5, "With all its steps NTT is ahead at 1 % by far more.")
    whole = lambda method, density: mean(values(steps, method=method, density=density))
    over = lambda rivals, density: (
        whole("ntt-sketch", density) - max(whole(method, density) for method in rivals)
    )
    for density, simple, scores in (
        (0.01, 30, 14),
        (0.02, 7, 2),
        (0.03, 1.5, -0.5),
        (0.05, 0.5, 0),
    ):
        claim(over(SIMPLE, density) > simple, "With all its steps NTT is ahead of three.")
        claim(over(SCORES, density) > scores, "It is ahead of SynFlow and NTK-SAP at 1 and 2 %.")
    for method in ("ntt", "ntt-ambient"):
        claim(abs(whole(method, 0.03) - whole("ntt-sketch", 0.03)) < 0.5, "no better at 3 %")
        claim(whole(method, 0.01) < whole("ntt-sketch", 0.01) - 1, "behind at 1 %")
    for density in (0.1, 0.3):
        level = [whole(method, density) for method in LAYERS["layer"]]
        claim(max(level) - min(level) < 0.5, "From 10 % on all are within half a point.")

    timed = load("fashion_mnist_time")
    reached = lambda *which: mean(values(time_values(timed, *which)))
    took = lambda *which: mean(r["transfer_seconds"] for r in time_values(timed, *which))
    active, sketched = ("ntt", None), ("ntt-sketch", 2)
    eight = ("ntt-sketch", 8)
    lost = [r["lost_classes"] for r in time_values(timed, ("ntt-sketch", 1), 3)]
    claim(sum(n > 0 for n in lost) == 2 and len(lost) == 3, "two of three masks lose a class.")
    for epochs in (3, 10, 20):
        claim(reached(eight, epochs) > reached(active, epochs), "R = 8 reaches as much.")
        claim(took(eight, epochs) < 0.5 * took(active, epochs), "R = 8 takes less than half.")
    for epochs in (1, 10, 20):
        claim(reached(sketched, epochs) > reached(active, epochs) - 0.2, "R = 2 within 0.2.")
        claim(took(sketched, epochs) < took(active, epochs) / 4, "R = 2 takes less than a quarter.")

    for density in (0.01, 0.02, 0.03, 0.05):
        on_digits = lambda m, density=density: mean(values(digits, method=m, density=density))
        best = max(on_digits(m) for m in (*SIMPLE, *SCORES))
        claim(on_digits("ntt-sketch") > best, "On MNIST NTT is ahead up to 5 %.")

    on_fashion = lambda method, density: mean(values(conv, method=method, density=density))
    for density, points in ((0.01, 15), (0.03, 0.75)):
        beaten = max(on_fashion(m, density) for m in SIMPLE)
        claim(
            on_fashion("ntt-sketch", density) > beaten + points, "LeNet-5 by NTT is ahead of three."
        )
    rivals = [[on_fashion(m, d) for m in SCORES] for d in (0.01, 0.03)]
    behind = min(rivals[0]) - on_fashion("ntt-sketch", 0.01)
    claim(behind > 2, "At 1 % it is behind SynFlow and NTK-SAP.")
    apart = max(abs(r - on_fashion("ntt-sketch", 0.03)) for r in rivals[1])
    claim(apart < 0.5, "At 3 % it is level with them.")
    for density in (0.1, 0.3):
        together = [on_fashion(m, density) for m in LAYERS["layer"]]
        claim(max(together) - min(together) < 2, "From 10 % on all are within two points.")

    on_mnist = lambda method, density: mean(values(conv_digits, method=method, density=density))
    for density, points in ((0.01, 20), (0.03, 1)):
        gains = [on_mnist("ntt-sketch", density) - on_mnist(method, density) for method in SIMPLE]
        claim(min(gains) > points, "On MNIST LeNet-5 by NTT is ahead of three.")
        claim(density == 0.01 or max(gains) < 3.5, "At 3 % by one to three points.")
    ahead = [on_mnist(method, 0.01) for method in SCORES]
    claim(1.5 < mean(ahead) - on_mnist("ntt-sketch", 0.01) < 2.5, "Scores are ahead at 1 %.")
    for density, points in ((0.03, 0.5), (0.1, 1), (0.3, 1)):
        those = LAYERS["layer"] if density > 0.03 else ("ntt-sketch", *SCORES)
        together = [on_mnist(m, density) for m in those]
        claim(max(together) - min(together) < points, "LeNet-5 on MNIST: these are level.")

    shared_out = [r for r in vit if r["mask"] == "erk"]
    vit = [r for r in vit if r["mask"] == ""]
    of_vit = {r["method"]: dict(map(tuple, r["accuracy_curve"])) for r in vit}
    first, *_, last = sorted(of_vit["random"])[1:]
    gain = lambda step: of_vit["ntt-sketch"][step] - of_vit["random"][step]
    claim(gain(first) > 1 > 0.5 > abs(gain(last)), "Of the ViT NTT is ahead after one epoch only.")
    lost = {r["method"]: r["lost_classes"] for r in vit}
    claim((lost["random"], lost["ntt-sketch"]) == (0, 1), "NTT has lost a class of the ViT.")
    for method in ("magnitude", "snip"):
        best = 100 - 10 * lost[method]
        claim(best - 6 < of_vit[method][last] < best + 3, "They end where their classes let them.")
    by_erk = [values(shared_out, method=m) for m in ("ntt-sketch", "random", "magnitude")]
    level = list(map(mean, by_erk))
    claim(max(level) - min(level) < 0.5, "Shared out by ERK the three are level.")
    uniform = [values(vit, method=m)[0] for m in ("ntt-sketch", "random")]
    claim(min(map(min, by_erk)) > max(uniform), "ERK is better for each of the three.")
    claim(not any(r["lost_classes"] for r in shared_out), "With ERK no output is lost.")

    published, mnist = load("published_notebooks"), load("mnist_notebooks")
    claim(least_gain(mnist, "ntt-ambient", "ntt-sketch") > 1.5, "ahead by more than 1.5 points.")
    conv_gain = least_gain(lenet5, "ntt-sketch")
    claim(conv_gain > 1, "The transfer of LeNet-5 is ahead at every look.")
    conv_end = {m: mean(values(lenet5, method=m)) for m in ("ntt-sketch", "random")}
    for name, method in (("ntt", "ntt-sketch"), ("random", "random")):
        theirs = [dict(map(tuple, curve)) for curve in published["lenet-5"]["accuracy"][name]]
        ours = [dict(map(tuple, r["accuracy_curve"])) for r in lenet5 if r["method"] == method]
        for step in (1000, 5000, 20000):
            apart = mean(c[step] for c in ours) - mean(c[step] for c in theirs)
            claim(abs(apart) < 0.5, "LeNet-5's curves are the published ones.")
    ends = [mean(values(mnist, method=m)) for m in ("ntt-ambient", "ntt-sketch")]
    claim(abs(ends[0] - ends[1]) < 0.3, "The sketched transfer is as good as the full one.")

    studies: dict[str, str] = {}
    for name, results, ranked in (
        ("steps", steps, WHOLE),
        ("digits", digits, LAYERS),
        ("conv", conv, LAYERS),
        ("conv_digits", conv_digits, LAYERS),
    ):
        dense = values(results, method="dense")
        studies[f"{name}_table"] = sparsity_table(results, ranked)
        studies[f"{name}_lost"] = lost_table(results, ranked["layer"])
        studies[f"{name}_dense"], studies[f"{name}_seeds"] = spread(dense, 1), str(len(dense))

    ambient, active = minutes(main, "ntt-ambient"), minutes(main, "ntt")
    return {
        "main_table": main_table(main),
        "readme_table": readme_table(0.01, 0.03),
        "fair_table": fair_table(0.01, 0.03),
        "networks": str(len(main)),
        "minutes": f"{sum(r['seconds'] for r in main) / 60:.0f}",
        "ambient_minutes": f"{ambient[0]:.0f} to {ambient[1]:.0f}",
        "active_minutes": f"{active[0]:.1f} to {active[1]:.0f}",
        "lossless_gap": f"{gap:.1f}",
        "sparsity_table": sparsity_table(sparsity, SHORT),
        "sparsity_networks": str(len(sparsity)),
        "dense_short": spread(values(sparsity, method="dense"), 1),
        "over_random": f"{at('ntt', 0.01) - at('random', 0.01):.0f}",
        "over_snip": f"{at('ntt', 0.01) - at('snip', 0.01):.0f}",
        "free_over_snip": f"{free[0.01] - at('snip', 0.01, 'global'):.0f}",
        "lenet5_table": notebooks_table(published["lenet-5"], lenet5),
        "lenet5_seeds": str(len(values(lenet5, method="ntt-sketch"))),
        "lenet5_gain": f"{conv_gain:.1f}",
        "lenet5_lead": f"{conv_end['ntt-sketch'] - conv_end['random']:.1f}",
        "beyond_table": beyond_table(beyond),
        "kept": spread(kept, 2),
        "vit_table": epochs_table(vit),
        "vit_erk_table": epochs_table(shared_out),
        "vit_gain": f"{gain(first):.1f}",
        "vit_minutes": f"{sum(r['seconds'] for r in vit) / 60:.0f}",
        "vit_transfer": f"{minutes(vit, 'ntt-sketch')[1]:.0f}",
        **studies,
        "notebooks_table": notebooks_table(published["lenet-300-100"], mnist),
        "time_table": time_table(timed),
        "evolution_table": evolution_table(evolution),
    }


def page() -> str:
    """The text of docs/results.md."""
    return TEXT.read_text().format(**facts())


def readme() -> str:
    """The README with its table filled in, between two lines that mark its place."""
    begin, end = "<!-- made by benchmarks/make_results.py -->", "<!-- end -->"
    pattern = re.compile(f"{re.escape(begin)}\n.*?{re.escape(end)}", re.DOTALL)
    filled = f"{begin}\n\n{facts()['readme_table']}\n\n{end}"
    text, count = pattern.subn(lambda _: filled, README.read_text())
    claim(count == 1, f"{begin} ... {end} stand once in the README")
    return text


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Make docs/results.md from the raw results.")
    parser.add_argument(
        "--collect", nargs="+", metavar="NAME RUN", help="put runs among the raw results first"
    )
    if given := parser.parse_args().collect:
        collect(given[0], *map(pathlib.Path, given[1:]))
    PAGE.write_text(page())
    README.write_text(readme())
    print(f"wrote {PAGE} and the table of {README}")
