"""The page on runs with published numbers: notebooks, a lottery ticket, the output evolution."""

from typing import Any

from .raw import NAMES, Results, claim, load, mean, table, values


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


def lottery_facts() -> dict[str, str]:
    """A lottery ticket beside random masks and the dense network; checked as above."""
    found = {r["method"]: 100 * r["test_accuracy"] for r in load("lottery")}
    claim(found["lottery-ticket"] > found["dense"] - 0.1, "The ticket is as accurate as dense.")
    claim(found["lottery-ticket"] - found["random"] > 0.5, "A random mask is not.")
    return {f"lottery_{name.split('-')[0]}": f"{value:.2f}" for name, value in found.items()}


def facts() -> dict[str, str]:
    """The numbers of the page; raises where one of its sentences would be untrue."""
    lenet5 = load("mnist_lenet5")
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
    return {
        "lenet5_table": notebooks_table(published["lenet-5"], lenet5),
        "lenet5_seeds": str(len(values(lenet5, method="ntt-sketch"))),
        "lenet5_gain": f"{conv_gain:.1f}",
        "lenet5_lead": f"{conv_end['ntt-sketch'] - conv_end['random']:.1f}",
        "notebooks_table": notebooks_table(published["lenet-300-100"], mnist),
        "evolution_table": evolution_table(load("fashion_mnist_evolution")),
        **lottery_facts(),
    }
