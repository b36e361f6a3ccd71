"""Masks on all units beside which several pages put theirs."""

from .raw import load, mean, values

FAIR = (  # method, what its row is called, the file of its results, scope, mask
    ("dense", "dense", "fashion_mnist_steps", None, ""),
    ("ntk-sap", "NTK-SAP", "fashion_mnist_beyond", "global", ""),
    ("ntt-sketch", "**NTT**, sketched", "fashion_mnist_beyond", "global", ""),
    ("synflow", "random", "fashion_mnist_shuffled", "global", "shuffle"),
    ("random", "random", "fashion_mnist_fair", "layer", "erk"),
    ("synflow", "SynFlow", "fashion_mnist_beyond", "global", ""),
    ("snip", "SNIP", "fashion_mnist_fair", "global", ""),
    ("magnitude", "magnitude", "fashion_mnist_fair", "global", ""),
    ("ntt", "**NTT**, active, as published", "fashion_mnist_steps", "layer", ""),
    ("random", "random", "fashion_mnist_steps", "layer", ""),
)
VARIANCE = "random by variance, ERK"
ON_TWO_SETS = (  # method, what its row is called, file of the Fashion-MNIST results, scope, mask
    ("ntk-sap", "NTK-SAP, over all layers", "fashion_mnist_beyond", "global", ""),
    ("synflow", "SynFlow, over all layers", "fashion_mnist_beyond", "global", ""),
    ("ntk-sap", "random, NTK-SAP's shares", "fashion_mnist_shuffled", "global", "shuffle"),
    ("synflow", "random, SynFlow's shares", "fashion_mnist_shuffled", "global", "shuffle"),
    ("weighted-random", VARIANCE, "fashion_mnist_fair", "layer", "erk"),
    ("snip", "SNIP, over all layers (sees labels)", "fashion_mnist_fair", "global", ""),
    ("random", "random, ERK (NTT's shares)", "fashion_mnist_fair", "layer", "erk"),
)
GRADUAL = "**NTT**, ERK, the density falls"


def fair_values(row: tuple[str, str, str, str | None, str], density: float) -> list[float]:
    """The accuracies of one row of the fair table at one density."""
    method, _, file, scope, mask = row
    found = [r for r in load(file) if r.get("mask", "") == mask]
    return values(found, method=method, scope=scope, density=density if scope else 1.0)


def shuffled_values(method: str, density: float) -> list[float]:
    """The accuracies of random masks that keep as many weights of each layer as a method's."""
    return values(load("fashion_mnist_shuffled"), method=method, density=density)


def mnist_values(method: str, scope: str | None, mask: str) -> list[float]:
    """The accuracies on MNIST at 1 %, none where that was not run."""
    found = [r for r in load("mnist_rivals") if (r["scope"] or None, r["mask"]) == (scope, mask)]
    return values(found, method=method)


def rivals_on(dataset: str) -> dict[str, list[float]]:
    """The accuracies of the rivals of our transfers at 1 %, by the names of their rows."""
    if dataset == "mnist":
        return {row[1]: mnist_values(row[0], row[3], row[4]) for row in ON_TWO_SETS}
    return {row[1]: fair_values(row, 0.01) for row in ON_TWO_SETS}


def gradual_values(dataset: str) -> list[float]:
    """The accuracies after transfers whose density falls, at 1 %."""
    return values(load("gradual"), dataset=dataset)


def fair_means() -> dict[float, dict[tuple[str, str | None], float]]:
    """Mean accuracies of the rows of `FAIR` at each density, by method and shares."""
    keys = {(row[0], row[4] or row[3]): row for row in FAIR}
    return {d: {k: mean(fair_values(row, d)) for k, row in keys.items()} for d in (0.01, 0.03)}
