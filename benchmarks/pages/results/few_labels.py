"""The page on training with few labelled images."""

from .raw import (
    SETS,
    claim,
    is_ahead,
    is_level,
    leads_over,
    load,
    mask_of,
    mean,
    standard_error,
    table,
    values,
    with_error,
    with_lead,
)
from .rivals import GRADUAL, ON_TWO_SETS

LABELS = (50, 200, 1000)
OURS = "**NTT**, ERK, on a sixth"
ROWS = {  # method, scope and mask, by what a row is called
    OURS: ("ntt-sketch", "layer", mask_of("ntt-sketch", "1/6")),
    "random, ERK, on a sixth": ("random", "layer", mask_of("random", "1/6")),
    "random by variance, ERK, on a sixth": (
        *("weighted-random", "layer", mask_of("weighted-random", "1/6")),
    ),
    "NTK-SAP, on a sixth": ("ntk-sap", "global", mask_of("ntk-sap", "1/6")),
    "SynFlow, on a sixth": ("synflow", "global", mask_of("synflow", "1/6")),
    "SNIP, on a sixth (sees labels)": ("snip", "global", mask_of("snip", "1/6")),
    GRADUAL: ("ntt-sketch", "layer", "erk"),
    **{name: (method, scope, mask) for method, name, _, scope, mask in ON_TWO_SETS},
    "dense": ("dense", None, ""),
}


def few_labels_values(dataset: str, labels: int, name: str) -> list[float]:
    """The accuracies of one mask after training on so many labelled images, by seed."""
    method, scope, mask = ROWS[name]
    where = {"dataset": dataset, "labels": labels, "method": method, "mask": mask}
    return values([r for r in load("few_labels") if (r["scope"] or None) == scope], **where)


def few_labels_leads(dataset: str, labels: int) -> dict[str, list[float]]:
    """How far NTT on a sixth of the units is ahead of each other mask, by seed."""
    others = {n: few_labels_values(dataset, labels, n) for n in ROWS if n != OURS}
    return leads_over(few_labels_values(dataset, labels, OURS), others)


def few_labels_table(dataset: str) -> str:
    """Each mask after training on few labelled images, and NTT's lead; a clear one is bold."""
    rows = []
    for name in ROWS:
        cells = []
        for labels in LABELS:
            cells.append(with_error(few_labels_values(dataset, labels, name)))
            shown = "–" if name == OURS else with_lead(few_labels_leads(dataset, labels)[name])
            cells.append(shown)
        rows.append([name, *cells])
    header = [cell for labels in LABELS for cell in (f"{labels:,} labels", "NTT's lead")]
    return table([f"mask, {SETS[dataset]}", *header], [False] + [True] * len(header), rows)


def facts() -> dict[str, str]:
    """Make the page's tables of few labels; raise where a sentence beside them would be untrue."""
    digits = {labels: few_labels_leads("mnist", labels) for labels in LABELS}
    fashion = {labels: few_labels_leads("fashion-mnist", labels) for labels in LABELS}
    behind = lambda leads: is_ahead([-lead for lead in leads])
    by_variance = [name for name in ROWS if "variance" in name]
    sixth = [n for n in ROWS if n.endswith(("sixth", "sixth (sees labels)"))]
    sixth = [name for name in sixth if name not in (OURS, *by_variance)]
    *others, sap_shares = sorted(
        (n for n in ROWS if n not in (OURS, "dense", *by_variance)),
        key=lambda n: n == "random, NTK-SAP's shares",
    )
    for labels, leads in digits.items():
        claim(all(mean(leads[name]) > 0 for name in (*others, sap_shares)), "First on MNIST.")
        clear = [name for name in (*others, sap_shares) if is_ahead(leads[name])]
        unclear = {50: 1, 200: 3, 1000: 0}[labels]
        claim(len(clear) == len(others) + 1 - unclear, "All clear but one, three and none.")
    claim(not is_ahead(digits[200][sap_shares]), "At 200 level with random, NTK-SAP's shares.")
    for name in sixth:
        snip = "SNIP" in name
        claim(snip or all(is_ahead(found[name]) for found in digits.values()), "Of the same part.")
    on_sixth = by_variance[0]
    for leads in digits.values():
        claim(is_level(leads[on_sixth]), "Random by variance on the same sixth are level.")
    claim(all(is_ahead(fashion[50][name]) for name in by_variance), "On Fashion-MNIST not at 50.")
    claim(behind(fashion[1000][on_sixth]), "There NTT is behind them at 1,000.")
    for leads in (digits[50], fashion[50]):
        claim(abs(mean(leads["dense"])) < standard_error(leads["dense"]), "50: level with dense.")
    claim(
        all(mean(fashion[50][name]) > 0 for name in (*others, sap_shares))
        and not any(is_ahead(fashion[50][name]) for name in ("random, ERK, on a sixth", GRADUAL)),
        "On Fashion-MNIST first at 50 labels, not clearly.",
    )
    for labels in (200, 1000):
        best = max(
            ROWS, key=lambda n: mean(few_labels_values("fashion-mnist", labels, n)) * (n != "dense")
        )
        claim(best != OURS, "Not first there with more labels.")
    claim(behind(fashion[1000]["SynFlow, on a sixth"]), "Behind SynFlow at 1,000 labels.")
    return {
        "few_mnist_table": few_labels_table("mnist"),
        "few_fashion_table": few_labels_table("fashion-mnist"),
        **{f"few_variance_{n}": with_error(leads[on_sixth]) for n, leads in digits.items()},
        "few_digits_random": f"{mean(digits[50]['random, ERK, on a sixth']):.1f}",
        "few_digits_random_1000": f"{mean(digits[1000]['random, ERK, on a sixth']):.1f}",
    }
