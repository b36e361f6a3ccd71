"""The first page: each method as its authors rank it, and the table of the README."""

from collections.abc import Iterable
from typing import Any

from . import cifar_10, few_channels, few_labels, other_training, search, shares, ultra_sparse
from .raw import LABELS, claim, rounded, table
from .rivals import FAIR, fair_means, fair_values, mnist_values

SHARES = {
    "global": "over all layers",
    "layer": "same in each layer",
    None: "–",
    "erk": "ERK",
    "shuffle": "SynFlow's",
}


def fair_cells(
    row: tuple[str, str, str, str | None, str], densities: Iterable[float], between: str
) -> tuple[list[str], int]:
    """Mean and standard error of a row at each density, and the number of its seeds."""
    of_each = [fair_values(row, density) for density in densities]
    return [rounded(found, between) for found in of_each], len(of_each[0])


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


def readme_table(first: list[list[str]], *densities: float) -> str:
    """The fair table in few words, with MNIST at the first density where that was run.

    The rows `first` stand behind the dense network's. Others are on the page alone.
    """
    rows = []
    for row in FAIR:
        method, name, _, scope, mask = row
        if (method, scope) in (("ntt-sketch", "global"), ("magnitude", "global")):
            continue
        cells, _ = fair_cells(row, densities, "±")
        on_mnist = mnist_values(method, scope, mask)
        cells.insert(0, rounded(on_mnist, "±") if on_mnist else "–")
        shares = {**SHARES, "global": "global", "layer": "uniform"}[mask or scope]
        rows.append([f"{name.split(',')[0]}, {shares}" if scope else name, *cells])
    rows[1:1] = first
    header = ["method, shares", f"MNIST {100 * densities[0]:g} %"]
    header += [f"Fashion {100 * density:g} %" for density in densities]
    return table(header, [False] + [True] * (len(densities) + 1), rows)


def facts() -> dict[str, Any]:
    """The numbers of the page, and those of other pages by their names; checked as theirs are."""
    averages = fair_means()
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
    chance = ("synflow", "shuffle")
    claim(
        abs(averages[0.01][chance] - averages[0.01][global_ntt]) < 0.3,
        "Random masks with SynFlow's shares are as good as NTT at 1 %.",
    )
    return {
        "cifar_10": cifar_10.facts(),
        "few_channels": few_channels.facts(),
        "search": search.facts(),
        "shares": shares.facts(),
        "few_labels": few_labels.facts(),
        "other_training": other_training.facts(),
        "ultra_sparse": ultra_sparse.facts(),
        "fair_table": fair_table(0.01, 0.03),
        "readme_table": readme_table(few_channels.units_rows(), 0.01, 0.03),
    }
