"""The page on other rates of training, and on fewer steps of it."""

from .few_channels import few_values
from .raw import (
    SETS,
    Results,
    claim,
    is_ahead,
    is_level,
    lead,
    load,
    mask_of,
    mean,
    table,
    values,
    with_error,
    with_lead,
)

OURS = "**NTT**, ERK, on a third"
INITIAL = "**NTT's mask**, initial weights, on a third"
RANDOM = "random, ERK, on a third"
VARIANCE = "random by variance, ERK, on a third"
SAP = "NTK-SAP, on a third"
ROWS = {  # method, scope and mask, by what a row is called
    OURS: ("ntt-sketch", "layer", mask_of("ntt-sketch", "1/3")),
    INITIAL: ("ntt-sketch", "layer", mask_of("ntt-sketch", "1/3", initial=True)),
    RANDOM: ("random", "layer", mask_of("random", "1/3")),
    VARIANCE: ("weighted-random", "layer", mask_of("weighted-random", "1/3")),
    SAP: ("ntk-sap", "global", mask_of("ntk-sap", "1/3")),
    "SNIP, on a third (sees labels)": ("snip", "global", mask_of("snip", "1/3")),
    "random, ERK": ("random", "layer", mask_of("random", None)),
    "NTK-SAP, over all layers": ("ntk-sap", "global", ""),
    "SynFlow, over all layers": ("synflow", "global", ""),
    "SNIP, over all layers (sees labels)": ("snip", "global", ""),
    "dense": ("dense", None, ""),
}
STEPS = (100, 300, 843)
USUAL = "constant, 1e-3, as on other pages"
BEST = "cosine, from 1e-2 to 0"
TRAININGS = {  # course and rate of Adam's rate, by what a row is called
    USUAL: ("constant", 0.001),
    "constant, 3e-3": ("constant", 0.003),
    "constant, 1e-2": ("constant", 0.01),
    BEST: ("cosine", 0.01),
}
ON_ALL = ("random, ERK", "NTK-SAP, over all layers", "SynFlow, over all layers")


def _found(
    dataset: str, name: str, epochs: int, course: str = "constant", rate: float = 0.01
) -> Results:
    """The results of one mask after one training, by seed."""
    method, scope, mask = ROWS[name]
    place = {"dataset": dataset, "method": method, "mask": mask}
    training = {"epochs": epochs, "schedule": course, "learning_rate": rate}
    chosen = [
        r
        for r in load("other_training")
        if (r["scope"] or None) == scope
        and all(r[key] == value for key, value in place.items())
        # a configuration leaves out what is at its default
        and all({"schedule": "constant", **r["training"]}[k] == v for k, v in training.items())
    ]
    return sorted(chosen, key=lambda r: r["seed"])


def at_step(dataset: str, name: str, step: int) -> list[float]:
    """The accuracies of one mask after so many steps of an epoch, by seed."""
    return _after(step, _found(dataset, name, 1))


def _after(step: int, results: Results) -> list[float]:
    return [dict(map(tuple, r["accuracy_curve"]))[step] for r in results]


def trained(dataset: str, name: str, training: str) -> list[float]:
    """The accuracies of one mask after 20 epochs of one training, by seed."""
    if training == USUAL:
        return few_values(dataset, ROWS[name][0], "1/3")
    return values(_found(dataset, name, 20, *TRAININGS[training]))


def steps_table(dataset: str) -> str:
    """Each mask after few steps, and NTT's lead."""
    rows = []
    for name in ROWS:
        row = [name]
        for step in STEPS:
            ours, other = (at_step(dataset, each, step) for each in (OURS, name))
            row += [with_error(other), with_lead(lead(ours, other))]
        rows.append(row)
    header = [cell for step in STEPS for cell in (f"{step} steps", "NTT's lead")]
    return table([f"mask, {SETS[dataset]}", *header], [False] + [True] * len(header), rows)


def rates_table(dataset: str) -> str:
    """NTT and two others on a third of the units after 20 epochs of each training."""
    rows = []
    for training in TRAININGS:
        ours = trained(dataset, OURS, training)
        row = [training, with_error(ours)]
        for name in (RANDOM, VARIANCE, SAP):
            other = trained(dataset, name, training)
            row += [with_error(other), with_lead(lead(ours, other))]
        rows.append(row)
    header = [f"Adam's rate, {SETS[dataset]}", "**NTT**"]
    for name in ("random", "random by variance", "NTK-SAP"):
        header += [name, "NTT's lead"]
    return table(header, [False] + [True] * (len(header) - 1), rows)


def on_all_table() -> str:
    """Masks on all units, trained as suits random masks best, and NTT's lead on a third."""
    rows = []
    for name in ON_ALL:
        row = [name]
        for dataset in SETS:
            ours, other = (trained(dataset, each, BEST) for each in (OURS, name))
            row += [with_error(other), with_lead(lead(ours, other))]
        rows.append(row)
    header = [cell for shown in SETS.values() for cell in (shown, "NTT's lead")]
    return table(["mask on all units", *header], [False] + [True] * len(header), rows)


def facts() -> dict[str, str]:
    """Make the page's tables; raise where a sentence beside them would be untrue."""
    leads = {
        (dataset, training): lead(
            trained(dataset, OURS, training), trained(dataset, RANDOM, training)
        )
        for dataset in SETS
        for training in TRAININGS
    }
    digits = {training: leads["mnist", training] for training in TRAININGS}
    claim(all(map(is_ahead, digits.values())), "On MNIST ahead of random at every rate.")
    means = [mean(found) for found in digits.values()]
    for dataset in SETS:
        ends = {training: mean(trained(dataset, RANDOM, training)) for training in TRAININGS}
        claim(max(ends, key=ends.__getitem__) == BEST, "The cosine suits random masks best.")
        for rate in (0.005, 0.02):
            found = values(_found(dataset, RANDOM, 20, "cosine", rate))
            beside = trained(dataset, RANDOM, BEST)[: len(found)]
            claim(mean(found) < mean(beside) + 0.01, "Nor does another cosine suit them better.")
        epochs = {r: values(_found(dataset, RANDOM, 1, rate=r))[:3] for r in (0.003, 0.01, 0.03)}
        place = {"dataset": dataset, "mask": ROWS[RANDOM][2], "density": 0.01}
        usual = [r for r in load("few_channels") if all(r[k] == v for k, v in place.items())]
        epochs[0.001] = _after(STEPS[-1], usual)
        claim(max(epochs, key=lambda r: mean(epochs[r])) == 0.01, "1e-2 suits an epoch best.")
    by_variance = [
        lead(trained(dataset, OURS, training), trained(dataset, VARIANCE, training))
        for dataset in SETS
        for training in TRAININGS
    ]
    claim(all(map(is_level, by_variance)), "Level with random by variance in each training.")
    fashion = {
        name: lead(trained("fashion-mnist", OURS, BEST), trained("fashion-mnist", name, BEST))
        for name in (RANDOM, SAP, *ON_ALL)
    }
    level = (RANDOM, SAP, "NTK-SAP, over all layers")
    claim(all(is_level(fashion[name]) for name in level), "On Fashion-MNIST level with these.")
    others = [found for name, found in fashion.items() if name not in level]
    claim(all(map(is_ahead, others)), "There ahead of random and SynFlow on all units.")
    early = {
        (dataset, step, name): lead(at_step(dataset, OURS, step), at_step(dataset, name, step))
        for dataset in SETS
        for step in STEPS
        for name in ROWS
        if name != OURS
    }
    chance = [mean(early["mnist", step, RANDOM]) for step in STEPS]
    free = (RANDOM, SAP, *ON_ALL)
    claim(
        all(is_ahead(early["mnist", step, name]) for step in STEPS for name in free),
        "On MNIST ahead of every label-free mask after 100, 300 and 843 steps.",
    )
    as_early = [mean(early["mnist", step, VARIANCE]) for step in STEPS]
    claim(
        all(is_level(early["mnist", step, VARIANCE]) for step in STEPS) and max(as_early) < 0.1,
        "On MNIST random masks by variance are as early.",
    )
    claim(
        all(is_level(early["fashion-mnist", step, RANDOM]) for step in STEPS),
        "On Fashion-MNIST level with random masks.",
    )
    behind = [mean(leads["fashion-mnist", training]) for training in list(TRAININGS)[:2]]
    claim(all(-0.3 < found < 0 for found in behind), "A little behind them at lower rates.")
    return {
        "other_mnist_rates": rates_table("mnist"),
        "other_fashion_rates": rates_table("fashion-mnist"),
        "other_on_all": on_all_table(),
        "other_mnist_steps": steps_table("mnist"),
        "other_fashion_steps": steps_table("fashion-mnist"),
        "other_least": f"{min(means):.1f}",
        "other_most": f"{max(means):.1f}",
        "other_best": f"{mean(digits[BEST]):.1f}",
        "other_fashion_gain": f"{min(mean(found) for found in others):.1f}",
        "other_early_least": f"{min(chance):.1f}",
        "other_early_most": f"{max(chance):.1f}",
    }
