"""The page on CIFAR-10."""

from collections.abc import Mapping
from typing import Any

from ntt_eqx.experiment.results import standard_error as of_test_images

from .raw import (
    claim,
    is_ahead,
    is_level,
    lead,
    leads_over,
    load,
    mask_of,
    mean,
    of_one,
    table,
    values,
    with_error,
)

METHODS = {
    "ntt-sketch": "**NTT**, ERK",
    "random": "random, ERK",
    "weighted-random": "random by variance, ERK",
    "ntk-sap": "NTK-SAP",
    "synflow": "SynFlow",
    "snip": "SNIP (sees labels)",
}


def cifar_values(method: str, share: str | None, model: str = "lenet-300-100") -> list[float]:
    """The accuracies on CIFAR-10 by seed, on a share of the channels or on all."""
    where = {"model": model, "method": method, "mask": mask_of(method, share)}
    return values(load("cifar"), **where)


def cifar_table() -> str:
    """Perceptrons on CIFAR-10, on all units and on a sixth."""
    rows = []
    for method, name in METHODS.items():
        found = [cifar_values(method, share) for share in ("1/6", None)]
        rows.append([name, *(with_error(f) if f else "–" for f in found)])
    return table(["mask", "on a sixth of the units", "on all units"], [False, True, True], rows)


BY_LAYER = ("random", "snip", "ntt-sketch")  # with the same share in every layer of Conv-4


CONV = {  # method and mask at 3 % of Conv-4, by what a row is called
    "**NTT**, ERK, on a quarter": ("ntt-sketch", mask_of("ntt-sketch", "1/4")),
    "**NTT's mask**, initial weights": ("ntt-sketch", mask_of("ntt-sketch", "1/4", True)),
    "random, ERK, on a quarter": ("random", mask_of("random", "1/4")),
    "NTK-SAP, on a quarter": ("ntk-sap", mask_of("ntk-sap", "1/4")),
    "dense, 17 % of the channels: as many weights": ("random", "channels"),
}


RESNET = {  # method and mask of ResNet-20, by what a row is called
    "dense": ("dense", ""),
    "random, ERK": ("random", "erk"),
    "**NTT**, ERK": ("ntt-sketch", "erk"),
}


def result_of(name: str, method: str, mask: str) -> dict[str, Any]:
    """The only result of one mask in a file."""
    (found,) = (r for r in load(name) if (r["method"], r["mask"]) == (method, mask))
    return found


def clear_lead(result: dict[str, Any]) -> float:
    """Two standard errors of a difference from one network, by its test images, in points."""
    return 2 * 2**0.5 * 100 * (of_test_images(result) or 0.0)


def networks_table(name: str, places: Mapping[str, tuple[str, str]]) -> str:
    """Networks of one file, each with what its mask and its training took."""
    rows = []
    for row, place in places.items():
        result = result_of(name, *place)
        cells = [of_one(result), f"{100 * result['kept_density']:.1f}"]
        cells += [f"{result[f'{phase}_seconds'] / 60:.0f}" for phase in ("transfer", "train")]
        rows.append([row, *cells])
    header = ["mask", "accuracy (%)", "weights (%)", "minutes of transfer", "of training"]
    return table(header, [False] + [True] * 4, rows)


def facts() -> dict[str, str]:
    """Make the page's table of CIFAR-10; raise where a sentence beside it would be untrue."""
    few, whole = ({m: cifar_values(m, share) for m in METHODS} for share in ("1/6", None))
    for method in ("random", "ntk-sap", "synflow"):
        claim(mean(lead(few[method], whole[method])) < 0, "Few units gain nothing there.")
    others = leads_over(whole["ntk-sap"], {**few, **{m: whole[m] for m in whole if m != "ntk-sap"}})
    claim(all(map(is_ahead, others.values())), "NTK-SAP on all units is ahead of all others.")
    for masks in (few, whole):
        gap = lead(masks["ntt-sketch"], masks["random"])
        claim(not is_ahead(gap), "NTT is level with random masks.")
        gap = lead(masks["weighted-random"], masks["random"])
        claim(is_level(gap), "Random masks by variance are level with plain ones.")
    conv = {share: cifar_values("random", share, "conv-4") for share in ("1/4", None)}
    claim(mean(conv["1/4"]) - max(conv[None]) > 2, "On Conv-4 a quarter is well ahead.")
    seconds = {
        share: mean(
            r["train_seconds"]
            for r in load("cifar")
            if (r["model"], r["method"]) == ("conv-4", "random")
            and r["mask"] == mask_of("random", share)
        )
        for share in ("1/4", None)
    }
    reached = {
        n: 100 * result_of("cifar_conv", *place)["test_accuracy"] for n, place in CONV.items()
    }
    *names, small = CONV
    chance, sap = names[-2:]
    clear = clear_lead(result_of("cifar_conv", *CONV[chance]))
    apart = lambda one, two: abs(reached[one] - reached[two]) > clear
    claim(not any(apart(n, small) for n in names if n != sap), "All but one are level with dense.")
    claim(apart(sap, small), "NTK-SAP is ahead of the small dense network.")
    claim(not any(apart(name, chance) for name in names), "All are level with random.")
    layer = {method: result_of("cifar_conv", method, "") for method in BY_LAYER}
    ends = {method: 100 * result["test_accuracy"] for method, result in layer.items()}
    over = ends["ntt-sketch"] - ends["random"]
    claim(over > 3, "By layer NTT is far ahead of random masks.")
    claim(ends["ntt-sketch"] > ends["snip"] + 2, "It is ahead of SNIP.")
    claim(max(ends.values()) < mean(conv[None]), "ERK's shares are worth more.")
    deep = {name: result_of("cifar_resnet", *place) for name, place in RESNET.items()}
    dense, chance, ours = (100 * result["test_accuracy"] for result in deep.values())
    clear = clear_lead(deep["random, ERK"])
    claim(abs(ours - chance) < clear, "On ResNet-20 NTT is level with random masks.")
    claim(dense - chance > clear, "Dense is ahead of the random mask.")
    return {
        "resnet_table": networks_table("cifar_resnet", RESNET),
        "resnet_dense": f"{dense - chance:.1f}",
        "resnet_steps": str(deep["**NTT**, ERK"]["transfer_steps"]),
        "conv_layer_lead": f"{over:.1f}",
        "conv_layer_ntt": of_one(layer["ntt-sketch"]),
        "conv_layer_snip": of_one(layer["snip"]),
        "conv_layer_random": of_one(layer["random"]),
        "conv_layer_steps": str(layer["ntt-sketch"]["transfer_steps"]),
        "conv_table": networks_table("cifar_conv", CONV),
        "conv_sap": f"{reached[sap] - reached[small]:.1f}",
        "cifar_table": cifar_table(),
        "cifar_conv_few": with_error(conv["1/4"]),
        "cifar_conv_all": with_error(conv[None]),
        "cifar_conv_seconds": f"{seconds['1/4']:.0f}",
        "cifar_conv_seconds_all": f"{seconds[None]:.0f}",
    }
