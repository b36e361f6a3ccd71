"""The tables of docs/results.md on masks that lie on a part of the hidden units."""

from result_tables import (
    FAIR,
    GRADUAL,
    SETS,
    claim,
    fair_values,
    gradual_values,
    is_ahead,
    leads_over,
    load,
    mean,
    rivals_on,
    rounded,
    standard_error,
    table,
    values,
    with_error,
)

UNITS = {
    "ERK_SIXTH_NTT_MASK": "**NTT's mask**, initial weights, on a sixth",
    "ERK_SIXTH_NTT": "**NTT** on a sixth",
    "ERK_THIRD_NTT_MASK": "**NTT's mask**, initial weights, on a third",
    "ERK_THIRD_NTT": "**NTT** on a third",
    "ERK_HALF": "random on half",
    "ERK_THIRD": "random on a third",
    "ERK_SIXTH": "random on a sixth",
    "ERK_TENTH": "random on a tenth",
}
CHANNELS = ("random-channels", "random", "ntk-sap", "synflow")
UNITS_AT_THREE = ("ERK_HALF", "ERK_THIRD")


def units_values(dataset: str, name: str, density: float = 0.01) -> list[float]:
    """The accuracies of masks on a part of the units, by seed."""
    where = {"dataset": dataset, "density": density, "method": f"few_units.py:{name}"}
    return values(load("few_units"), **where)


def on_all_units(dataset: str) -> dict[str, list[float]]:
    """The accuracies of the masks that may use every unit; NTK-SAP's are the first."""
    return {**rivals_on(dataset), GRADUAL: gradual_values(dataset)}


def lead(ours: list[float], others: list[float]) -> list[float]:
    """How far one mask is ahead of another, by seed."""
    return leads_over(ours, {"": others})[""]


def units_rows() -> list[list[str]]:
    """The rows of the README's table: MNIST and Fashion-MNIST at 1 %, Fashion-MNIST at 3 %."""
    rows = []
    for name, shown in {
        "ERK_SIXTH_NTT": "**NTT**, ERK, 1/6 of units",
        "ERK_SIXTH": "random, ERK, 1/6 of units",
        "ERK_THIRD": "random, ERK, 1/3 of units",
    }.items():
        cells = [rounded(units_values(dataset, name), "±") for dataset in SETS]
        denser = units_values("fashion-mnist", name, 0.03)
        rows.append([shown, *cells, rounded(denser, "±") if denser else "–"])
    return rows


def units_table() -> str:
    """Masks on a part of the units, and those on all of them, on two data sets."""
    rows = {name: list[str]() for name in (*UNITS.values(), *on_all_units("mnist"))}
    for dataset in SETS:
        on_all = on_all_units(dataset)
        on_few = {shown: units_values(dataset, name) for name, shown in UNITS.items()}
        for name, found in (on_few | on_all).items():
            leads = lead(found, next(iter(on_all.values())))
            shown = with_error(leads, sign="+") if any(leads) else "–"
            rows[name] += [with_error(found), f"**{shown}**" if is_ahead(leads) else shown]
    over = "over NTK-SAP"
    header = ["mask", "MNIST", over, "Fashion-MNIST", over]
    return table(header, [False] + [True] * 4, [[name, *cells] for name, cells in rows.items()])


def units_facts() -> dict[str, str]:
    """Make the page's table of few units; raise where a sentence beside it would be untrue."""
    few = {d: {n: units_values(d, n) for n in UNITS} for d in SETS}
    leads = {
        d: {n: leads_over(found, on_all_units(d)) for n, found in few[d].items()} for d in SETS
    }
    within = lambda d, name: lead(few[d][name + "_NTT"], few[d][name])
    level = lambda found: abs(mean(found)) < 2 * standard_error(found)
    ntk_sap, synflow, *shares, snip, erk, _ = on_all_units("mnist")
    digits, fashion = leads["mnist"], leads["fashion-mnist"]
    for name, found in digits["ERK_SIXTH"].items():
        ahead = level(found) if name in (GRADUAL, snip) else is_ahead(found)
        claim(ahead, "On MNIST random on a sixth is ahead of all but SNIP and NTT on all units.")
    for name in (name for name in UNITS if "NTT" in name):
        claim(all(map(is_ahead, digits[name].values())), "NTT on few units is ahead of all.")
        claim(abs(mean(few["mnist"][name]) - 95.1) < 0.1, "A third and a sixth are alike.")
        for other in (synflow, snip, erk):
            claim(is_ahead(fashion[name][other]), "On Fashion-MNIST it is ahead of three.")
        for other in (ntk_sap, *shares):
            claim(not is_ahead(fashion[name][other]), "It is not ahead of the others.")
    for part in ("ERK_SIXTH", "ERK_THIRD"):
        claim(is_ahead(within("mnist", part)), "It is ahead of random on the same part there.")
    claim(all(map(is_ahead, fashion["ERK_THIRD"].values())), "Random on a third is ahead of all.")
    sixth_behind = [-gap for gap in fashion["ERK_SIXTH"][ntk_sap]]
    claim(is_ahead(sixth_behind), "Random on a sixth is behind NTK-SAP there.")
    claim(level(within("fashion-mnist", "ERK_SIXTH")), "On a sixth NTT is level with random.")
    behind = lead(few["fashion-mnist"]["ERK_THIRD"], few["fashion-mnist"]["ERK_THIRD_NTT"])
    claim(is_ahead(behind), "On a third it is behind random.")
    channels = {m: values(load("few_channels"), method=m) for m in CHANNELS}
    on_lenet5 = leads_over(channels["random-channels"], channels)
    for score in ("synflow", "ntk-sap"):
        claim(is_ahead(on_lenet5[score]), "On LeNet-5 it is ahead of both scores.")
    claim(not is_ahead(on_lenet5["random"]), "Three seeds do not tell it from random ERK.")
    (erk_row,) = (row for row in FAIR if row[4] == "erk")
    denser = {name: units_values("fashion-mnist", name, 0.03) for name in UNITS_AT_THREE}
    for found in denser.values():
        claim(level(lead(found, fair_values(erk_row, 0.03))), "At 3 % few units gain nothing.")
    return {
        "units_table": units_table(),
        **{f"channels_{m.replace('-', '_')}": with_error(found) for m, found in channels.items()},
        "channels_lead": with_error(on_lenet5["random"], sign="+"),
        "units_gain": f"{mean(within('mnist', 'ERK_SIXTH')):.1f}",
        "units_loss": f"{mean(behind):.1f}",
        "units_free": f"{mean(digits['ERK_SIXTH'][ntk_sap]):.1f}",
        "units_sixth_loss": f"{mean(sixth_behind):.1f}",
        "units_third_free": with_error(fashion["ERK_THIRD"][ntk_sap]),
        "units_over_ntk_sap": f"{mean(digits['ERK_SIXTH_NTT'][ntk_sap]):.1f}",
        "units_half_at_three": f"{mean(denser['ERK_HALF']):.1f}",
        "units_third_at_three": f"{mean(denser['ERK_THIRD']):.1f}",
    }
