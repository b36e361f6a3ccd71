"""The page on 1 % of a large perceptron."""

from typing import Any

from ntt_eqx.experiment.published import published_beside

from .raw import SETS, claim, load, mean, of_one, table, values, with_error

ULTRA = {  # by method, scope and mask
    ("synflow", "global", "block:1x1"): "SynFlow, over all layers",
    ("ntk-sap", "global", "block:1x1"): "NTK-SAP, over all layers",
    ("ntt-sketch", "global", "block:1x1"): "**NTT**, over all layers",
    ("ntt-sketch", "layer", "erk, block:1x1"): "**NTT**, ERK",
    ("random", "layer", "erk, block:1x1"): "random, ERK",
    ("synflow", "global", "block:1x1, shuffle"): "random, SynFlow's shares",
    ("set", "layer", "erk, block:1x1"): "SET, ERK (sees labels, changes its mask)",
    ("rigl", "layer", "erk, block:1x1"): "RigL, ERK (sees labels, changes its mask)",
    ("gmp", "layer", "erk, block:1x1"): "GMP, ERK (sees labels, falls from dense)",
    ("random", "layer", "erk, few-channels:1/10"): "random, ERK, on a tenth of the units",
    ("weighted-random", "layer", "erk, few-channels:1/10"): "random by variance, ERK, on a tenth",
    ("ntt-sketch", "layer", "erk, few-channels:1/10"): "**NTT**, ERK, on a tenth",
    ("ntk-sap", "global", "few-channels:1/10"): "NTK-SAP, on a tenth",
    ("synflow", "global", "few-channels:1/10"): "SynFlow, on a tenth",
    ("set", "layer", "erk, few-channels:1/10"): "SET, ERK, on a tenth (as above)",
    ("rigl", "layer", "erk, few-channels:1/10"): "RigL, ERK, on a tenth (as above)",
    ("gmp", "layer", "erk, few-channels:1/10"): "GMP, ERK, on a tenth (as above)",
    ("random", "layer", "channels"): "dense, 67 units a layer: as many weights",
}


TENTH = "erk, few-channels:1/10"


def ultra_result(method: str, scope: str, mask: str, dataset: str) -> dict[str, Any] | None:
    """The result of one mask at 1 % of the large perceptron, `None` where it was not run."""
    place = {"method": method, "scope": scope, "mask": mask, "dataset": dataset, "seed": 0}
    found = [r for r in load("ultra_sparse") if all(r[k] == v for k, v in place.items())]
    return found[0] if found else None


def ultra_accuracy(method: str, scope: str, mask: str, dataset: str = "fashion-mnist") -> float:
    """Its accuracy in percent."""
    result = ultra_result(method, scope, mask, dataset)
    assert result is not None, (method, scope, mask, dataset)
    return 100 * result["test_accuracy"]


def ultra_all_table() -> str:
    """Accuracy, live units and time of all methods that were run on the large perceptron."""
    rows = []
    for place, name in ULTRA.items():
        results = [ultra_result(*place, dataset) for dataset in SETS]
        cells = []
        for result in results:
            if result is None:
                cells.append("–")
                continue
            cells.append(of_one(result))
        ran = [result for result in results if result is not None]
        live = f"{100 * ran[-1]['live_units'] / ran[-1]['units']:.0f}"
        # Both runs do the same work; the faster one shared its core with less.
        rows.append([name, *cells, live, f"{min(r['seconds'] for r in ran) / 60:.0f}"])
    header = ["mask", *SETS.values(), "live units (%)", "minutes"]
    return table(header, [False, True, True, True, True], rows)


def facts() -> dict[str, str]:
    """Make the page's tables of the large perceptron, likewise checked against its sentences."""
    by_layer = lambda method: ultra_accuracy(method, "layer", "erk, block:1x1")
    over_all = lambda method: ultra_accuracy(method, "global", "block:1x1")
    ours, chance, synflow = by_layer("ntt-sketch"), by_layer("random"), over_all("synflow")
    changing = [by_layer(method) for method in ("set", "rigl")]
    claim(0 < synflow - max(changing) < 0.4, "SynFlow ends as high as SET and RigL.")
    claim(0.6 < ours - chance < 0.8, "NTT is one and a half errors ahead of random with ERK.")
    claim(abs(over_all("ntt-sketch") - chance) < 0.3, "It is level with random over all layers.")
    claim(0.8 < over_all("ntk-sap") - ours < 1.2, "NTK-SAP is a point ahead.")

    def share(method: str, scope: str, mask: str) -> float:
        result = ultra_result(method, scope, mask, "fashion-mnist")
        assert result is not None
        return result["live_units"] / result["units"]

    few = (share("synflow", "global", "block:1x1"), share("rigl", "layer", "erk, block:1x1"))
    claim(max(few) < 0.5, "Most units are gone.")
    claim(share("ntt-sketch", "layer", "erk, block:1x1") > 0.99, "NTT's live.")
    tenth = ultra_accuracy("random", "layer", TENTH)
    claim(abs(tenth - synflow) < 0.4, "A tenth of the units is level with SynFlow.")
    claim(tenth > max(changing), "It is not behind SET and RigL.")
    erk = "erk, block:1x1"
    on_mnist = {m: ultra_accuracy(m, "layer", erk, "mnist") for m in ("set", "rigl")}
    claim(on_mnist["set"] > 98.14 and changing[0] > 89.00, "SET ends above its published numbers.")
    gmp = {dataset: ultra_accuracy("gmp", "layer", erk, dataset) for dataset in SETS}
    claim(gmp["mnist"] > 98.62, "GMP ends above its published number on MNIST.")
    claim(0 < 90.29 - gmp["fashion-mnist"] < 0.3, "It is within an error of it on Fashion-MNIST.")
    for dataset, found in gmp.items():
        every = [ultra_result(*place, dataset) for place in ULTRA]
        claim(
            found == max(100 * result["test_accuracy"] for result in every if result),
            "GMP on all units is ahead of all.",
        )
    marks = {
        dataset: {m: ultra_accuracy(m, "layer", TENTH, dataset) for m in ("gmp", "rigl", "set")}
        for dataset in SETS
    }
    on_fashion = [abs(found - tenth) for found in marks["fashion-mnist"].values()]
    claim(max(on_fashion) < 0.3, "On Fashion-MNIST labels add nothing on a tenth of the units.")
    digits = ultra_accuracy("random", "layer", TENTH, "mnist")
    claim(digits > max(on_mnist.values()) - 0.17, "Nor is it on MNIST, by one standard error.")
    on_all = ultra_accuracy("random", "layer", erk, "mnist")
    on_digits = ultra_accuracy("synflow", "global", "block:1x1", "mnist")
    shares = ultra_accuracy("synflow", "global", "block:1x1, shuffle")
    claim(shares < chance, "SynFlow's shares alone end below ERK's.")
    for dataset in SETS:
        gain = ultra_accuracy("ntt-sketch", "layer", TENTH, dataset)
        gain -= ultra_accuracy("random", "layer", TENTH, dataset)
        claim(gain < 0.2, "A transfer adds nothing there.")
        gain = ultra_accuracy("weighted-random", "layer", TENTH, dataset)
        gain -= ultra_accuracy("random", "layer", TENTH, dataset)
        claim(gain < 0.2, "Neither do variances.")
    claim(0.1 < min(marks["mnist"].values()) - digits < 0.4, "On MNIST labels add little.")
    claim(max(marks["mnist"].values()) > 98.62, "GMP ends where it was published.")
    seeds = lambda dataset, mask: values(
        load("ultra_sparse"), dataset=dataset, method="random", mask=mask
    )
    by_seed = {dataset: with_error(seeds(dataset, TENTH)) for dataset in SETS}
    small = {dataset: seeds(dataset, "channels") for dataset in SETS}
    gaps = {d: mean(small[d]) - mean(seeds(d, TENTH)) for d in SETS}
    claim(0.1 < gaps["mnist"] < 0.3, "A small dense network is ahead of random on MNIST.")
    claim(-0.3 < gaps["fashion-mnist"] < 0, "It is a little behind it on Fashion-MNIST.")
    level = abs(mean(small["mnist"]) - on_mnist["set"]) < 0.1
    others = (on_mnist["rigl"], on_all, on_digits)
    claim(level and mean(small["mnist"]) > max(others), "It is level with SET there.")
    claim(abs(mean(small["fashion-mnist"]) - synflow) < 0.1, "It is level with SynFlow here.")
    claim(mean(small["fashion-mnist"]) > max(*changing, over_all("ntk-sap")), "Ahead of others.")
    over_small = {d: max(marks[d].values()) - mean(small[d]) for d in SETS}
    claim(0.1 < min(over_small.values()) and max(over_small.values()) < 0.4, "Labels add little.")
    return {
        **{f"ultra_{m}": f"{found:.2f}" for m, found in marks["mnist"].items()},
        "ultra_gmp_all": f"{gmp['mnist']:.2f}",
        "ultra_gmp_all_fashion": f"{gmp['fashion-mnist']:.2f}",
        "ultra_gmp_lead": f"{gmp['mnist'] - mean(small['mnist']):.1f}",
        "ultra_gmp_lead_fashion": f"{gmp['fashion-mnist'] - mean(small['fashion-mnist']):.1f}",
        "ultra_gmp_below": f"{90.29 - gmp['fashion-mnist']:.1f}",
        "ultra_rigl_below": f"{98.61 - on_mnist['rigl']:.1f}",
        "ultra_rigl_below_fashion": f"{89.91 - changing[1]:.1f}",
        "ultra_small_mnist": with_error(small["mnist"]),
        "ultra_small_fashion": with_error(small["fashion-mnist"]),
        "ultra_over_small": f"{max(over_small.values()):.1f}",
        "ultra_seeds_mnist": by_seed["mnist"],
        "ultra_seeds_fashion": by_seed["fashion-mnist"],
        "ultra_tenth": f"{tenth:.2f}",
        "ultra_digits": f"{digits:.2f}",
        "ultra_few_gain": f"{tenth - chance:.1f}",
        "ultra_digits_gain": f"{digits - on_all:.1f}",
        "ultra_digits_lead": f"{digits - on_digits:.1f}",
        "ultra_shares_loss": f"{synflow - shares:.1f}",
        "ultra_all_table": ultra_all_table(),
        "ultra_table": published_beside(load("ultra_sparse")).strip(),
        "ultra_gain": f"{ours - chance:.1f}",
        "ultra_loss": f"{synflow - ours:.1f}",
    }
