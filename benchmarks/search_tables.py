"""The tables of docs/results.md on the search for a better transfer (`search.py`)."""

from typing import Any

from result_tables import Results, mean, table, with_error


def search_rows(found: dict[str, Any]) -> Results:
    """The last row of each variant of the search, the best of the last round first."""
    last = {row["variant"]: row for row in found["variants"]}
    return sorted(last.values(), key=lambda r: (-r["round"], -mean(r["accuracy"].values())))


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
}


def search_rivals(found: dict[str, Any]) -> str:
    """The rivals of all transfers, each of which costs less than a transfer."""
    rows = []
    for rival, name in RIVALS.items():
        if rival in found["rivals"]:
            reached = list(found["rivals"][rival].values())
            rows.append([name, str(len(reached)), with_error(reached)])
    return table(["mask", "seeds", "accuracy (%)"], [False, True, True], rows)


def search_table(found: dict[str, Any]) -> str:
    """Every variant at its last round, and its leads over four rivals; standard errors."""
    rivals = ("random@erk", "ntk-sap@global", "synflow@global", "its shares")
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
    return table([*header, "seconds"], [False] + [True] * 7, rows)
