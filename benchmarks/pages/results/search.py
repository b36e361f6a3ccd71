"""The page on short transfers: a falling density, and the search (`search.py`) that found it."""

from collections.abc import Sequence
from typing import Any

from .raw import (
    SETS,
    Results,
    claim,
    is_ahead,
    leads_over,
    load,
    mean,
    standard_error,
    table,
    values,
    with_error,
)
from .rivals import GRADUAL, gradual_values, rivals_on

RIVALS = {  # of the transfers in the search: how their rows and columns are called
    "ntk-sap@global": "NTK-SAP",
    "random-ntk-sap-shares": "random, NTK-SAP's shares",
    "random-synflow-shares": "random, SynFlow's shares",
    "synflow@global": "SynFlow",
    "random-equal-counts": "random, as many weights in every layer",
    "random-output-whole": "random, last layer whole, else ERK",
    "random@erk": "random, ERK",
    "random-erk-rescaled": "random, ERK, rescaled",
    "its shares": "random, its shares",  # those of each transfer
    "random-third": "random, ERK, on a third",
    "random-sixth": "random, ERK, on a sixth",
    "ntk-sap-third": "NTK-SAP, on a third",
}
USUAL = ("random@erk", "ntk-sap@global", "synflow@global", "its shares")


def steady_values(dataset: str) -> list[float]:
    """The accuracies of transfers at one density throughout, at 1 % on all units, by seed."""
    where = {"dataset": dataset, "method": "ntt-sketch", "mask": "erk"}
    return values(load("tasks"), **where)


def others_on(dataset: str) -> dict[str, list[float]]:
    """The rivals, and a transfer of the same steps at one density."""
    steady = {"NTT, ERK, the same steps at 1 % throughout, R = 2": steady_values(dataset)}
    return steady | rivals_on(dataset)


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


def search_rows(found: dict[str, Any]) -> Results:
    """The last row of each variant of the search, the best of the last round first."""
    last = {row["variant"]: row for row in found["variants"]}
    return sorted(last.values(), key=lambda r: (-r["round"], -mean(r["accuracy"].values())))


def search_rivals(found: dict[str, Any]) -> str:
    """The rivals of all transfers, each of which costs less than a transfer."""
    rows = []
    for rival, name in RIVALS.items():
        if rival in found["rivals"]:
            reached = list(found["rivals"][rival].values())
            rows.append([name, str(len(reached)), with_error(reached)])
    return table(["mask", "seeds", "accuracy (%)"], [False, True, True], rows)


def search_table(found: dict[str, Any], rivals: Sequence[str] = USUAL) -> str:
    """Every variant at its last round, and its leads over some rivals; standard errors."""
    rows = []
    for row in search_rows(found):
        cells = [f"`{row['variant']}`", str(len(row["accuracy"]))]
        cells.append(with_error(list(row["accuracy"].values())))
        for rival in rivals:
            lead = row["against"].get(rival)
            cells.append("–" if lead is None else with_error([lead["mean"]], lead["error"], "+"))
            cells[-1] = f"**{cells[-1]}**" if lead is not None and lead["ahead"] else cells[-1]
        rows.append([*cells, f"{row['seconds']:.0f}"])
    header = ["variant", "seeds", "accuracy (%)", *(f"over {RIVALS[rival]}" for rival in rivals)]
    return table([*header, "seconds"], [False] + [True] * (3 + len(rivals)), rows)


ON_UNITS = ("random@erk", "synflow@global", "ntk-sap@global", "random-third", "ntk-sap-third")


def facts_on_units() -> dict[str, str]:
    """The numbers of the search on a part of the units."""
    found = load("search_units")
    claim(not any(row["ahead"] for row in found["variants"]), "No transfer is ahead of all.")
    finalists = [row for row in search_rows(found) if "its shares" in row["against"]]
    claim(len(finalists) == 4, "Four went to the last round.")
    reached = [mean(row["accuracy"].values()) for row in finalists]
    third, ntk_sap = (
        mean(found["rivals"][rival].values()) for rival in ("random-third", "ntk-sap-third")
    )
    for row in finalists:
        against = row["against"]
        for rival in ("random@erk", "synflow@global"):
            claim(against[rival]["ahead"], "They are ahead of SynFlow and random ERK on all units.")
        behind = abs(against["ntk-sap@global"]["mean"])
        claim(behind < 0.05, "They are level with NTK-SAP on all units.")
        claim(not against["random-third"]["ahead"], "None is ahead of random on a third.")
        claim(not against["ntk-sap-third"]["ahead"], "None is ahead of NTK-SAP on a third.")
    return {
        "units_table": search_table(found, ON_UNITS),
        "units_rivals": search_rivals(found),
        "units_variants": str(len(search_rows(found))),
        "units_best": f"{max(reached):.2f}",
        "units_worst": f"{min(reached):.2f}",
        "units_third": f"{third:.2f}",
        "units_ntk_sap": f"{ntk_sap:.2f}",
    }


def facts() -> dict[str, str]:
    """The numbers of the page; raises where one of its sentences would be untrue."""
    search = load("search")
    finalists = [row for row in search_rows(search) if "its shares" in row["against"]]
    claim(not any(row["ahead"] for row in search["variants"]), "No transfer is ahead of all.")
    strong = [f"{score}@global" for score in ("synflow", "ntk-sap")]
    strong += [f"random-{score}-shares" for score in ("synflow", "ntk-sap")]
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
    ntk_sap, synflow, *their_shares, variance, snip, random_erk = rivals_on("mnist")
    leads = leads_of_gradual("mnist")
    for found in leads.values():
        claim(is_ahead(found), "The falling density is ahead on MNIST.")
    on_fashion = leads_of_gradual("fashion-mnist")
    claim(-0.5 < mean(on_fashion[ntk_sap]) < -0.3, "It is behind NTK-SAP on Fashion-MNIST.")
    for name in their_shares:
        found = on_fashion[name]
        claim(abs(mean(found)) < standard_error(found), "Random masks with shares are level.")
    for rival in (random_erk, snip, synflow, variance):
        found = on_fashion[rival]
        claim(is_ahead(found), "It is ahead of the others there.")
    return facts_on_units() | {
        "search_table": search_table(search),
        "search_rivals": search_rivals(search),
        "search_variants": str(len(search_rows(search))),
        "search_lead": between(ahead_of("random@erk")),
        "search_within": between(ahead_of("its shares")),
        "search_mnist_table": search_table(on_mnist),
        "search_mnist_rivals": search_rivals(on_mnist),
        "gradual_table": gradual_table(),
        "gradual_lead": f"{mean(leads[ntk_sap]):.1f}",
        "gradual_variance": f"{mean(leads[variance]):.1f}",
        "gradual_gain": f"{mean(leads[random_erk]):.1f}",
        "gradual_loss": f"{-mean(on_fashion[ntk_sap]):.1f}",
    }
