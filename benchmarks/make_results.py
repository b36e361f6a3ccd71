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

from cifar_tables import cifar_facts, lottery_facts
from few_channels_tables import units_facts, units_rows
from few_labels_tables import few_labels_facts
from result_tables import (
    BEYOND,
    FAIR,
    LAYERS,
    RAW,
    SCORES,
    SHORT,
    SHUFFLED,
    SIMPLE,
    WHOLE,
    beyond_table,
    claim,
    epochs_table,
    evolution_table,
    fair_table,
    fair_values,
    gains_within_shares,
    gradual_table,
    is_ahead,
    leads_of_gradual,
    least_gain,
    load,
    lost_classes,
    lost_table,
    main_table,
    mean,
    minutes,
    notebooks_table,
    readme_table,
    rivals_on,
    shuffled_table,
    sparsity_table,
    spread,
    standard_error,
    time_table,
    time_values,
    values,
)
from search_tables import search_rivals, search_rows, search_table
from tasks_tables import tasks_facts
from ultra_sparse_tables import ultra_facts

ROOT = pathlib.Path(__file__).parents[1]
TEXT = ROOT / "benchmarks" / "pages" / "results.md"
PAGE = ROOT / "docs" / "results.md"
README = ROOT / "README.md"


def collect(name: str, *runs: pathlib.Path) -> None:
    """Write the results of runs with their curves: `[steps, kernel, target]`, `[steps, %]`."""
    results = []
    for path in sorted(path for run in runs for path in (run / "cells").glob("*/result.json")):
        result = json.loads(path.read_text())
        lines = (path.parent / "metrics.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        results.append(result)
        result["lost_classes"] = lost_classes(path.with_name("model.eqx"))
        config = json.loads(path.with_name("config.json").read_text())
        if transfer := config["transfer"]:
            result["transfer"] = transfer
        if labels := (config["training"] or {}).get("labels"):
            result["labels"] = labels
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

    errors = lambda gains: mean(gains) / standard_error(gains)
    gained = {
        (row[0], d): errors(gains_within_shares(row, d)) for row in SHUFFLED for d in averages
    }
    for method in ("snip", "synflow"):
        claim(gained[method, 0.01] < -2, "SNIP and SynFlow keep worse weights than chance at 1 %.")
    for method in ("ntk-sap", "ntt-sketch"):
        claim(gained[method, 0.01] > 2, "NTK-SAP and NTT keep better ones than chance at 1 %.")
        claim(abs(gained[method, 0.03]) < 2, "Neither does at 3 %.")
    chance = ("synflow", "shuffle")
    best = max((key for key in fair if key[1]), key=lambda key: averages[0.03][key])
    claim(best == chance, "Random masks with SynFlow's shares are the best at 3 %.")
    claim(
        abs(averages[0.01][chance] - averages[0.01][global_ntt]) < 0.3,
        "Random masks with SynFlow's shares are as good as NTT at 1 %.",
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

    search = load("search")
    finalists = [row for row in search_rows(search) if "its shares" in row["against"]]
    claim(not any(row["ahead"] for row in search["variants"]), "No transfer is ahead of all.")
    strong = [f"{score}@global" for score in SCORES]
    strong += [f"random-{score}-shares" for score in SCORES]
    for rival in strong:
        ahead = any(row["against"][rival]["ahead"] for row in finalists)
        claim(not ahead, "No transfer is ahead of NTK-SAP, SynFlow or their shares.")
    ahead_of = lambda rival: [
        row["against"][rival]["mean"] for row in finalists if row["against"][rival]["ahead"]
    ]
    claim(len(ahead_of("random@erk")) >= 8, "The best are ahead of random with ERK.")
    claim(len(ahead_of("its shares")) >= 6, "They are ahead of random with their own shares.")
    between = lambda numbers: f"{min(numbers):.1f} to {max(numbers):.1f}"
    rivals = {name: mean(found.values()) for name, found in search["rivals"].items()}
    for rule in ("random-equal-counts", "random-output-whole"):
        above = rivals[rule] - rivals["random@erk"]
        claim(0.3 < above < 0.4, "Two rules are a third of a point above ERK.")
    good = [rivals[rival] for rival in strong]
    good += [mean(row["accuracy"].values()) for row in finalists[:6]]
    claim(max(good) - min(good) < 0.26, "Ten of them end within a quarter of a point.")

    on_mnist = load("search_mnist")
    ahead = [row for row in on_mnist["variants"] if row["ahead"]]
    claim(len(ahead) == 3 == len(on_mnist["variants"]) - 1, "Three of four are ahead on MNIST.")
    ntk_sap, synflow, *their_shares, snip, random_erk = rivals_on("mnist")
    leads = leads_of_gradual("mnist")
    for found in leads.values():
        claim(is_ahead(found), "The falling density is ahead on MNIST.")
    on_fashion = leads_of_gradual("fashion-mnist")
    claim(-0.5 < mean(on_fashion[ntk_sap]) < -0.3, "It is behind NTK-SAP on Fashion-MNIST.")
    for name in their_shares:
        found = on_fashion[name]
        claim(abs(mean(found)) < standard_error(found), "Random masks with shares are level.")
    for rival in (random_erk, snip, synflow):
        found = on_fashion[rival]
        claim(is_ahead(found), "It is ahead of the others there.")

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
        "readme_table": readme_table(units_rows(), 0.01, 0.03),
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
        "shuffled_table": shuffled_table(0.01, 0.03),
        "search_table": search_table(search),
        "search_rivals": search_rivals(search),
        "search_variants": str(len(search_rows(search))),
        "search_lead": between(ahead_of("random@erk")),
        "search_within": between(ahead_of("its shares")),
        "search_mnist_table": search_table(on_mnist),
        "search_mnist_rivals": search_rivals(on_mnist),
        "gradual_table": gradual_table(),
        "gradual_lead": f"{mean(leads[ntk_sap]):.1f}",
        "gradual_gain": f"{mean(leads[random_erk]):.1f}",
        "gradual_loss": f"{-mean(on_fashion[ntk_sap]):.1f}",
        **tasks_facts(),
        **few_labels_facts(),
        **ultra_facts(),
        **cifar_facts(),
        **lottery_facts(),
        **units_facts(),
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
