"""The table of docs/results.md on masks that serve several tasks."""

from few_channels_tables import few_values, mask_of
from result_tables import (
    SETS,
    load,
    rivals_on,
    table,
    values,
    with_error,
)

GREY = "npy:runs/grey"  # CIFAR-10 in grey, by grey_images.py
TASKS = {**SETS, GREY: "CIFAR-10, grey"}
IMAGES = {**TASKS, "mnist+fashion-mnist": "MNIST and Fashion-MNIST"}
SIXTH = {
    "random": "random, ERK, on a sixth",
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
    rows = [r for r in load("tasks") if r["mask"] == mask]
    return values([r for r in rows if r["transfer"]["dataset"] == images], dataset=task)


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
            rows.append([name, *(with_error(rival(task, method, share)) for task in TASKS)])
    header = ["mask", *(f"trained on {name}" for name in TASKS.values())]
    return table(header, [False] + [True] * len(TASKS), rows)
