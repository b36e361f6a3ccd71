"""The tables of two regimes: few labelled images, and 1 % of a large perceptron."""

from typing import Any

from result_tables import (
    GRADUAL,
    ON_TWO_SETS,
    SETS,
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

from ntt_eqx.experiment.published import published_beside
from ntt_eqx.experiment.results import standard_error as of_test_images

LABELS = (200, 1000)
FEW = {
    GRADUAL: ("ntt-sketch", "layer", "erk"),
    **{name: (method, scope, mask) for method, name, _, scope, mask in ON_TWO_SETS},
    "dense": ("dense", None, ""),
}
ULTRA = {
    ("synflow", "global"): "SynFlow, over all layers",
    ("ntk-sap", "global"): "NTK-SAP, over all layers",
    ("ntt-sketch", "global"): "**NTT**, over all layers",
    ("ntt-sketch", "layer"): "**NTT**, ERK",
    ("random", "layer"): "random, ERK",
    ("few_units.py:THIRD", None): "random, ERK, on a third of the units",
    ("few_units.py:TENTH", None): "random, ERK, on a tenth of the units",
    ("shuffled synflow", "global"): "random, SynFlow's shares",
    ("set", "layer"): "SET, ERK (sees labels, changes its mask)",
    ("rigl", "layer"): "RigL, ERK (sees labels, changes its mask)",
}


def few_values(dataset: str, labels: int, name: str) -> list[float]:
    """The accuracies of one mask after training on so many labelled images, by seed."""
    method, scope, mask = FEW[name]
    where = {"dataset": dataset, "labels": labels, "method": method, "mask": mask}
    return values([r for r in load("few_labels") if (r["scope"] or None) == scope], **where)


def few_leads(dataset: str, labels: int) -> dict[str, list[float]]:
    """How far NTT is ahead of each other mask, by seed."""
    others = {name: few_values(dataset, labels, name) for name in FEW if name != GRADUAL}
    return leads_over(few_values(dataset, labels, GRADUAL), others)


def few_labels_table(dataset: str) -> str:
    """Each mask after training on few labelled images, and NTT's lead; a clear one is bold."""
    rows = []
    for name in FEW:
        cells = []
        for labels in LABELS:
            cells.append(with_error(few_values(dataset, labels, name)))
            lead = "–"
            if name != GRADUAL:
                leads = few_leads(dataset, labels)[name]
                lead = with_error(leads, sign="+")
                lead = f"**{lead}**" if is_ahead(leads) else lead
            cells.append(lead)
        rows.append([name, *cells])
    header = [cell for labels in LABELS for cell in (f"{labels:,} labels", "NTT's lead")]
    return table([f"mask, {SETS[dataset]}", *header], [False] + [True] * len(header), rows)


def few_labels_facts() -> dict[str, str]:
    """Make the page's tables of few labels; raise where a sentence beside them would be untrue."""
    sap, sap_shares = "NTK-SAP, over all layers", "random, NTK-SAP's shares"
    erk = "random, ERK (NTT's shares)"
    digits = {labels: few_leads("mnist", labels) for labels in LABELS}
    fashion = {labels: few_leads("fashion-mnist", labels) for labels in LABELS}
    behind = lambda leads: is_ahead([-lead for lead in leads])
    for leads in digits.values():
        claim(abs(mean(leads[sap])) < standard_error(leads[sap]), "Level with NTK-SAP on MNIST.")
        others = [name for name in leads if name not in (sap, sap_shares, "dense")]
        claim(all(is_ahead(leads[name]) for name in others), "Ahead of the others there.")
    claim(behind(digits[200][sap_shares]), "At 200 labels behind random with NTK-SAP's shares.")
    claim(is_ahead(digits[1000][sap_shares]), "At 1,000 ahead of them.")
    for leads in fashion.values():
        claim(behind(leads[sap]), "Behind NTK-SAP on Fashion-MNIST.")
    claim(behind(fashion[200][erk]), "At 200 labels behind random with ERK there.")
    claim(not is_ahead(fashion[1000][erk]), "At 1,000 not ahead of it.")
    return {
        "few_mnist_table": few_labels_table("mnist"),
        "few_fashion_table": few_labels_table("fashion-mnist"),
    }


def ultra_accuracy(method: str, scope: str | None) -> float:
    """The accuracy of one method at 1 % of the large perceptron, in percent."""
    return 100 * _ultra()[method, scope]["test_accuracy"]


def ultra_all_table() -> str:
    """Accuracy, live units and time of all methods that were run on the large perceptron."""
    rows = []
    for place, name in ULTRA.items():
        result = _ultra()[place]
        accuracy, error = 100 * result["test_accuracy"], 100 * (of_test_images(result) or 0.0)
        live = f"{100 * result['live_units'] / result['units']:.0f}"
        minutes = f"{result['seconds'] / 60:.0f}"
        rows.append([name, f"{accuracy:.2f} ± {error:.2f}", live, minutes])
    header = ["mask", "accuracy (%)", "live units (%)", "minutes"]
    return table(header, [False, True, True, True], rows)


def _ultra() -> dict[tuple[str, str | None], Any]:
    name = lambda r: f"shuffled {r['method']}" if "shuffle" in r["mask"] else r["method"]
    return {(name(r), r["scope"]): r for r in load("ultra_sparse")}


def ultra_facts() -> dict[str, str]:
    """Make the page's tables of the large perceptron, likewise checked against its sentences."""
    ours, chance = ultra_accuracy("ntt-sketch", "layer"), ultra_accuracy("random", "layer")
    changing = [ultra_accuracy(method, "layer") for method in ("set", "rigl")]
    scores = {method: ultra_accuracy(method, "global") for method in ("synflow", "ntk-sap")}
    claim(0 < scores["synflow"] - max(changing) < 0.4, "SynFlow ends as high as SET and RigL.")
    claim(0.6 < ours - chance < 0.8, "NTT is one and a half errors ahead of random with ERK.")
    level = ultra_accuracy("ntt-sketch", "global") - chance
    claim(abs(level) < 0.3, "It is level with random over all layers.")
    claim(0.8 < scores["ntk-sap"] - ours < 1.2, "NTK-SAP is a point ahead.")
    share = lambda place: _ultra()[place]["live_units"] / _ultra()[place]["units"]
    claim(max(share(("synflow", "global")), share(("rigl", "layer"))) < 0.5, "Most units are gone.")
    claim(min(share(("ntt-sketch", where)) for where in ("layer", "global")) > 0.99, "NTT's live.")
    third = ultra_accuracy("few_units.py:THIRD", None)
    claim(third - chance > 1.4, "A third of the units is more than three errors above all of them.")
    claim(abs(third - scores["ntk-sap"]) < 0.3, "It is level with NTK-SAP.")
    tenth = ultra_accuracy("few_units.py:TENTH", None)
    claim(abs(tenth - scores["synflow"]) < 0.2, "A tenth of the units is level with SynFlow.")
    claim(0.2 < tenth - max(changing) < 0.6, "It is an error above SET, more above RigL.")
    shares = ultra_accuracy("shuffled synflow", "global")
    claim(shares < chance, "SynFlow's shares alone end below ERK's.")
    return {
        "ultra_third": f"{third:.2f}",
        "ultra_tenth": f"{tenth:.2f}",
        "ultra_few_gain": f"{tenth - chance:.1f}",
        "ultra_shares_loss": f"{scores['synflow'] - shares:.1f}",
        "ultra_all_table": ultra_all_table(),
        "ultra_table": published_beside(load("ultra_sparse")).strip(),
        "ultra_gain": f"{ours - chance:.1f}",
        "ultra_loss": f"{scores['synflow'] - ours:.1f}",
    }
