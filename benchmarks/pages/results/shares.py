"""The page on shares of the layers: random masks with those that a method gives."""

from .raw import (
    Results,
    claim,
    load,
    mean,
    spread,
    standard_error,
    table,
    values,
    with_error,
)
from .rivals import fair_means, fair_values, shuffled_values

SHUFFLED = (  # rows like those of FAIR, each of which has random masks with its shares
    ("ntk-sap", "NTK-SAP, over all layers", "fashion_mnist_beyond", "global", ""),
    ("ntt-sketch", "**NTT**, sketched, over all layers", "fashion_mnist_beyond", "global", ""),
    ("synflow", "SynFlow, over all layers", "fashion_mnist_beyond", "global", ""),
    ("snip", "SNIP, over all layers", "fashion_mnist_fair", "global", ""),
)
BEYOND = (
    ("ntt-sketch", "**NTT, sketched, over all layers**"),
    ("synflow", "SynFlow"),
    ("ntk-sap", "NTK-SAP"),
)


def gains_within_shares(row: tuple[str, str, str, str | None, str], density: float) -> list[float]:
    """How far a method is ahead of random masks with its shares, by seed."""
    pairs = zip(fair_values(row, density), shuffled_values(row[0], density), strict=True)
    return [one - other for one, other in pairs]


def shuffled_table(*densities: float) -> str:
    """Each method, random masks with its shares, and what its choice within layers gains."""
    rows = []
    for row in SHUFFLED:
        cells = [row[1]]
        for density in densities:
            cells += [with_error(fair_values(row, density))]
            cells += [with_error(shuffled_values(row[0], density))]
            cells += [with_error(gains_within_shares(row, density), sign="+")]
        rows.append(cells)
    header = ["method"]
    for density in densities:
        header += [f"{100 * density:g} %", "random, its shares", "gain"]
    return table(header, [False] + [True] * (3 * len(densities)), rows)


def beyond_table(results: Results) -> str:
    """NTT over all layers, beside the strongest label-free scores."""
    rows = []
    for method, name in BEYOND:
        cells = []
        for density in (0.01, 0.03):
            found = values(results, method=method, scope="global", density=density)
            cells += [spread(found, 2), ", ".join(f"{v:.1f}" for v in found)]
        rows.append([name, *cells])
    header = ["method", "1 %", "of each seed", "3 %", "of each seed"]
    return table(header, [False, True, False, True, False], rows)


def facts() -> dict[str, str]:
    """The numbers of the page; raises where one of its sentences would be untrue."""
    averages, beyond = fair_means(), load("fashion_mnist_beyond")
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
    best = max((key for key in averages[0.03] if key[1]), key=lambda key: averages[0.03][key])
    claim(best == chance, "Random masks with SynFlow's shares are the best at 3 %.")
    for density in (0.01, 0.03):
        means = [mean(values(beyond, method=m, density=density)) for m, _ in BEYOND]
        claim(max(means) - min(means) < 1, "All label-free scores are within a point.")
    kept = values(load("fashion_mnist_kept_mask"))
    sap = values(beyond, method="ntk-sap", density=0.01)[: len(kept)]
    claim(0.8 < mean(sap) - mean(kept) < 1.3, "NTK-SAP's mask with NTT's weights is a point below.")
    (ntt,) = (row for row in SHUFFLED if row[0] == "ntt-sketch")
    return {
        "shares_gain": with_error(gains_within_shares(ntt, 0.01)),
        "shuffled_table": shuffled_table(0.01, 0.03),
        "beyond_table": beyond_table(beyond),
        "kept": spread(kept, 2),
    }
