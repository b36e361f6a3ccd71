"""The page on masks that serve several tasks."""

from .few_channels import few_values
from .raw import (
    SETS,
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
)
from .rivals import rivals_on

GREY = "npy:runs/grey"  # CIFAR-10 in grey, by grey_images.py
TASKS = {**SETS, GREY: "CIFAR-10, grey"}
IMAGES = {**TASKS, "mnist+fashion-mnist": "MNIST and Fashion-MNIST"}
SIXTH = {
    "random": "random, ERK, on a sixth",
    "weighted-random": "random by variance, ERK, on a sixth",
    "ntk-sap": "NTK-SAP, on a sixth",
    "synflow": "SynFlow, on a sixth",
    "snip": "SNIP, on a sixth (sees labels)",
}
WHOLE = {  # the same on all units, by the names of their rows elsewhere
    "random": "random, ERK (NTT's shares)",
    "ntk-sap": "NTK-SAP, over all layers",
    "synflow": "SynFlow, over all layers",
    "snip": "SNIP, over all layers (sees labels)",
}


def transferred(task: str, images: str) -> list[float]:
    """The accuracies on a task of the masks that transfers on `images` found, by seed."""
    mask = mask_of("ntt-sketch", "1/6")
    rows = [r for r in load("tasks") if (r["method"], r["mask"]) == ("ntt-sketch", mask)]
    source = lambda r: r["transfer"]["dataset"] or r["dataset"]
    return values([r for r in rows if source(r) == images], dataset=task)


def rival(task: str, method: str, share: str | None) -> list[float]:
    """The accuracies of another mask on a task, on a share of the units or on all."""
    if task == GREY:
        return values(load("tasks"), dataset=GREY, method=method, mask=mask_of(method, share))
    return few_values(task, method, share) if share else rivals_on(task)[WHOLE[method]]


def tasks_table() -> str:
    """Where the images of a transfer came from, and what its network was trained on."""
    rows = []
    for images, name in IMAGES.items():
        found = [with_error(transferred(task, images)) for task in TASKS]
        rows.append([f"**NTT** on images of {name}", *found])
    for share, names in (("1/6", SIXTH), (None, WHOLE)):
        for method, name in names.items():
            found = [with_error(rival(task, method, share)) for task in TASKS]
            rows.append([name, *found])
    header = ["mask", *(f"trained on {name}" for name in TASKS.values())]
    return table(header, [False] + [True] * len(TASKS), rows)


def facts() -> dict[str, str]:
    """Make the page's table of tasks; raise where a sentence beside it would be untrue."""
    over = lambda task, images, method: lead(transferred(task, images), rival(task, method, "1/6"))
    behind = lambda leads: is_ahead([-each for each in leads])
    below = lambda task, images: [-each for each in over(task, images, "random")]
    for images in IMAGES:
        for method in ("random", "ntk-sap"):
            claim(is_ahead(over("mnist", images, method)), "Any images serve MNIST.")
    for task, images in ((GREY, "mnist"), (GREY, "fashion-mnist"), ("fashion-mnist", "mnist")):
        claim(behind(over(task, images, "random")), "Images of simpler tasks harm.")
    for task in (GREY, "fashion-mnist"):
        claim(is_level(over(task, GREY, "random")), "Grey images of CIFAR-10 harm no task.")
        claim(is_level(over(task, task, "random")), "Nor is a task's own ahead of random there.")
    own = lead(rival("mnist", "weighted-random", "1/6"), transferred("mnist", "mnist"))
    claim(mean(own) > 0, "NTT is not ahead of random masks by variance on MNIST.")
    lost = {t: mean(lead(transferred(t, t), transferred(t, GREY))) for t in SETS}
    claim(0.4 < lost["mnist"] < 0.6, "On MNIST they lose half a point to its own.")
    return {
        "tasks_table": tasks_table(),
        "tasks_grey": with_error(over("mnist", GREY, "random")),
        "tasks_variance": with_error(own),
        "tasks_own": with_error(over("mnist", "mnist", "random")),
        "tasks_harm": with_error(below("fashion-mnist", "mnist")),
        "tasks_harm_grey": with_error(below(GREY, "fashion-mnist")),
    }
