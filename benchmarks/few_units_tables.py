"""The tables of docs/results.md on masks that lie on a part of the hidden units."""

from typing import Any

from result_tables import (
    GRADUAL,
    SETS,
    claim,
    gradual_values,
    is_ahead,
    leads_over,
    load,
    mean,
    rivals_on,
    table,
    values,
    with_error,
)
from search_tables import search_rivals, search_table

UNITS = {
    "ERK_SIXTH_NTT_MASK": "**NTT's mask**, a sixth of the units, initial weights",
    "ERK_SIXTH_NTT": "**NTT**, a sixth of the units",
    "ERK_SIXTH": "random, a sixth of the units",
    "ERK_THIRD": "random, a third of the units",
}
RIVALS = ("random@erk", "ntk-sap@global", "synflow@global", "random-sixth-of-units")


def units_values(dataset: str, name: str) -> list[float]:
    """The accuracies of masks on a part of the units, by seed."""
    return values(load("few_units"), dataset=dataset, method=f"few_units.py:{name}")


def units_leads(dataset: str, name: str) -> dict[str, list[float]]:
    """How far they are ahead of all masks on all units, by seed."""
    others = {GRADUAL: gradual_values(dataset), **rivals_on(dataset)}
    return leads_over(units_values(dataset, name), others)


def units_table() -> str:
    """Masks on a part of the units, and the best on all of them, on two data sets."""
    ntk_sap = next(iter(rivals_on("mnist")))
    rows = []
    for name, shown in UNITS.items():
        cells = []
        for dataset in SETS:
            lead = units_leads(dataset, name)[ntk_sap]
            cells += [with_error(units_values(dataset, name)), with_error(lead, sign="+")]
        rows.append([shown, *cells])
    for name in [GRADUAL, *rivals_on("mnist")]:
        cells = []
        for dataset in SETS:
            found = {GRADUAL: gradual_values(dataset), **rivals_on(dataset)}
            lead = leads_over(found[name], {ntk_sap: found[ntk_sap]})[ntk_sap]
            cells += [
                with_error(found[name]),
                "–" if name == ntk_sap else with_error(lead, None, "+"),
            ]
        rows.append([f"{name}, all units", *cells])
    over = "over NTK-SAP"
    header = ["mask (ERK's counts on few units)", "MNIST", over, "Fashion-MNIST", over]
    return table(header, [False] + [True] * 4, rows)


def units_facts() -> dict[str, Any]:
    """Make the page's tables of few units; raise where a sentence beside them would be untrue."""
    return {
        "units_table": units_table(),
        **{
            f"units_{place}": search_table(load(f"search_units{end}"), RIVALS)
            for place, end in (("fashion", ""), ("digits", "_mnist"))
        },
    }
