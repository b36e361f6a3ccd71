"""The tables of docs/results.md on CIFAR-10, and the lottery ticket beside its paper."""

from few_channels_tables import lead, mask_of
from result_tables import claim, is_ahead, leads_over, load, mean, table, values, with_error

METHODS = {
    "ntt-sketch": "**NTT**, ERK",
    "random": "random, ERK",
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


def cifar_facts() -> dict[str, str]:
    """Make the page's table of CIFAR-10; raise where a sentence beside it would be untrue."""
    few, whole = ({m: cifar_values(m, share) for m in METHODS} for share in ("1/6", None))
    for method in ("random", "ntk-sap", "synflow"):
        claim(mean(lead(few[method], whole[method])) < 0, "Few units gain nothing there.")
    others = leads_over(whole["ntk-sap"], {**few, **{m: whole[m] for m in whole if m != "ntk-sap"}})
    claim(all(map(is_ahead, others.values())), "NTK-SAP on all units is ahead of all others.")
    for masks in (few, whole):
        gap = lead(masks["ntt-sketch"], masks["random"])
        claim(not is_ahead(gap), "NTT is level with random masks.")
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
    return {
        "cifar_table": cifar_table(),
        "cifar_conv_few": with_error(conv["1/4"]),
        "cifar_conv_all": with_error(conv[None]),
        "cifar_conv_seconds": f"{seconds['1/4']:.0f}",
        "cifar_conv_seconds_all": f"{seconds[None]:.0f}",
    }


def lottery_facts() -> dict[str, str]:
    """A lottery ticket beside random masks and the dense network; checked as above."""
    found = {r["method"]: 100 * r["test_accuracy"] for r in load("lottery")}
    claim(found["lottery-ticket"] > found["dense"] - 0.1, "The ticket is as accurate as dense.")
    claim(found["lottery-ticket"] - found["random"] > 0.5, "A random mask is not.")
    return {f"lottery_{name.split('-')[0]}": f"{value:.2f}" for name, value in found.items()}
