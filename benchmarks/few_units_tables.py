"""The table of docs/results.md on masks that lie on a part of the hidden units."""

from result_tables import (
    GRADUAL,
    SETS,
    gradual_values,
    is_ahead,
    leads_over,
    load,
    rivals_on,
    rounded,
    table,
    values,
    with_error,
)

UNITS = {
    "ERK_SIXTH_NTT_MASK": "**NTT's mask**, initial weights, on a sixth",
    "ERK_SIXTH_NTT": "**NTT** on a sixth",
    "ERK_SIXTH": "random on a sixth",
    "ERK_THIRD_NTT_MASK": "**NTT's mask**, initial weights, on a third",
    "ERK_THIRD_NTT": "**NTT** on a third",
    "ERK_THIRD": "random on a third",
}


def units_values(dataset: str, name: str, density: float = 0.01) -> list[float]:
    """The accuracies of masks on a part of the units, by seed."""
    where = {"dataset": dataset, "density": density, "method": f"few_units.py:{name}"}
    return values(load("few_units"), **where)


def on_all_units(dataset: str) -> dict[str, list[float]]:
    """The accuracies of the masks that may use every unit; NTK-SAP's are the first."""
    return {**rivals_on(dataset), GRADUAL: gradual_values(dataset)}


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
            leads = leads_over(found, {"": next(iter(on_all.values()))})[""]
            shown = with_error(leads, sign="+") if any(leads) else "–"
            rows[name] += [with_error(found), f"**{shown}**" if is_ahead(leads) else shown]
    over = "over NTK-SAP"
    header = ["mask", "MNIST", over, "Fashion-MNIST", over]
    return table(header, [False] + [True] * 4, [[name, *cells] for name, cells in rows.items()])
