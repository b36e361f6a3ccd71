"""The page on masks with the same share in every layer, as they were published."""

from collections.abc import Iterable, Mapping
from typing import Any

from .raw import LABELS, NAMES, Results, claim, load, mean, spread, table, values

ON_EXAMPLES = ("snip", "logit-snip")  # scored on 100 examples
SHORT = {
    "layer": ("ntt", "ntt-ambient", "random", "magnitude", "snip", "logit-snip"),
    "global": ("ntt-ambient", "snip", "logit-snip", "grasp", "synflow", "ntk-sap"),
}
SIMPLE, SCORES = ("random", "magnitude", "snip"), ("synflow", "ntk-sap")
LAYERS = {"layer": ("ntt-sketch", *SIMPLE, *SCORES)}
# The same with random masks by the variance of pixels, up to 5 %
DIGITS = {"layer": ("ntt-sketch", "random", "weighted-random", *SIMPLE[1:], *SCORES)}
WHOLE = {"layer": ("ntt", "ntt-ambient", *DIGITS["layer"])}
TRANSFERS = {  # the variants of the study of time, and what their rows are called
    ("ntt", None): "NTT, active",
    ("ntt-ambient", None): "NTT, ambient",
    ("ntt-sketch", 1): "NTT, sketched, R = 1",
    ("ntt-sketch", 2): "NTT, sketched, R = 2",
    ("ntt-sketch", 8): "NTT, sketched, R = 8",
}


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


def minutes(results: Results, method: str) -> tuple[float, float]:
    """Shortest and longest transfer."""
    found = [r["transfer_seconds"] / 60 for r in results if r["method"] == method]
    return min(found), max(found)


def facts() -> dict[str, str]:
    """The numbers of the page; raises where one of its sentences would be untrue."""
    main, sparsity = load("fashion_mnist_lenet300100"), load("fashion_mnist_sparsity")
    steps, digits = load("fashion_mnist_steps"), load("mnist_sparsity")
    conv, conv_digits = load("fashion_mnist_lenet5"), load("mnist_lenet5_sparsity")
    vit = load("fashion_mnist_vit")
    # Lost classes are those of the run; with seeds 1 and 2 a random mask loses none.
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
        best = max(on_digits(m) for m in DIGITS["layer"][1:])
        claim(on_digits("ntt-sketch") > best, "On MNIST NTT is ahead up to 5 %.")
        on_clothes = whole("ntt-sketch", density) - whole("weighted-random", density)
        claim(on_clothes > 0.5, "On Fashion-MNIST it is ahead of random masks by variance, too.")

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

    studies: dict[str, str] = {}
    for name, results, ranked in (
        ("steps", steps, WHOLE),
        ("digits", digits, DIGITS),
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
        "vit_table": epochs_table(vit),
        "vit_erk_table": epochs_table(shared_out),
        "vit_gain": f"{gain(first):.1f}",
        "vit_minutes": f"{sum(r['seconds'] for r in vit) / 60:.0f}",
        "vit_transfer": f"{minutes(vit, 'ntt-sketch')[1]:.0f}",
        "time_table": time_table(timed),
        **studies,
    }
