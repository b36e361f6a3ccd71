"""The page on masks that lie on a part of the channels."""

from .raw import (
    SETS,
    claim,
    is_ahead,
    is_level,
    lead,
    leads_over,
    load,
    mask_of,
    mean,
    rounded,
    table,
    values,
    with_error,
    with_lead,
)
from .rivals import FAIR, GRADUAL, VARIANCE, fair_values, gradual_values, rivals_on

ROWS = (  # method, what its row is called, share of the units, whether with initial weights
    ("ntt-sketch", "**NTT**, ERK, on a sixth", "1/6", False),
    ("ntt-sketch", "**NTT's mask**, initial weights, on a sixth", "1/6", True),
    ("ntt-sketch", "**NTT**, ERK, on a third", "1/3", False),
    ("random", "random, ERK, on half", "1/2", False),
    ("random", "random, ERK, on a third", "1/3", False),
    ("random", "random, ERK, on a sixth", "1/6", False),
    ("random", "random, ERK, on a tenth", "1/10", False),
    ("weighted-random", "random by variance, ERK, on a third", "1/3", False),
    ("weighted-random", "random by variance, ERK, on a sixth", "1/6", False),
    ("wanda", "Wanda, ERK, on a third", "1/3", False),
    ("ntk-sap", "NTK-SAP, on a third", "1/3", False),
    ("ntk-sap", "NTK-SAP, on a sixth", "1/6", False),
    ("synflow", "SynFlow, on a sixth", "1/6", False),
    ("snip", "SNIP, on a sixth (sees labels)", "1/6", False),
)


def few_values(
    dataset: str,
    method: str,
    share: str | None,
    initial: bool = False,
    model: str = "lenet-300-100",
    density: float = 0.01,
) -> list[float]:
    """The accuracies of masks on a share of the channels, by seed."""
    where = {"dataset": dataset, "model": model, "method": method, "density": density}
    return values(load("few_channels"), mask=mask_of(method, share, initial), **where)


def small_values(dataset: str, model: str = "lenet-300-100") -> list[float]:
    """The accuracies of dense networks of fewer channels with as many weights, by seed."""
    where = {"dataset": dataset, "model": model, "method": "random", "mask": "channels"}
    return values(load("few_channels"), **where)


def on_all_units(dataset: str) -> dict[str, list[float]]:
    """The accuracies of the masks that may use every unit; NTK-SAP's are the first."""
    return {**rivals_on(dataset), GRADUAL: gradual_values(dataset)}


ON_A_THIRD = {
    "ntt-sketch": "**NTT**, ERK, on a third",
    "weighted-random": "random by variance, ERK, on a third",
    "random": "random, ERK, on a third",
    "ntk-sap": "NTK-SAP, on a third",
}


def units_rows() -> list[list[str]]:
    """The rows of the README's table: MNIST and Fashion-MNIST at 1 %, Fashion-MNIST at 3 %."""
    where = [(dataset, 0.01) for dataset in SETS] + [("fashion-mnist", 0.03)]
    rows = []
    for method, name in ON_A_THIRD.items():
        found = [few_values(dataset, method, "1/3", density=d) for dataset, d in where]
        short = name.replace("on a third", "1/3 units")
        rows.append([short, *(rounded(each, "±") for each in found)])
    return rows


def third_leads(dataset: str, method: str) -> list[float]:
    """How far NTT on a third of the units is ahead of another mask there at 3 %, by seed."""
    ours, other = (few_values(dataset, m, "1/3", density=0.03) for m in ("ntt-sketch", method))
    return lead(ours, other)


def third_table() -> str:
    """Masks of 3 % on a third of the units, on two data sets."""
    rows = []
    for method, name in ON_A_THIRD.items():
        cells = []
        for dataset in SETS:
            cells.append(with_error(few_values(dataset, method, "1/3", density=0.03)))
            cells.append(with_lead(third_leads(dataset, method)))
        rows.append([name, *cells])
    header = ["mask of 3 %", "MNIST", "NTT's lead", "Fashion-MNIST", "NTT's lead"]
    return table(header, [False] + [True] * 4, rows)


def pixel_share(dataset: str, method: str, share: str) -> float:
    """The percentage of the first layer's weights that read pixels that hardly vary."""
    where = {"dataset": dataset, "method": method, "mask": mask_of(method, share)}
    return mean(values(load("pixels")["networks"], "share", density=0.01, **where))


def units_table() -> str:
    """Masks on a part of the units, and those on all of them, on two data sets."""
    few = {shown: (method, share, initial) for method, shown, share, initial in ROWS}
    rows = {name: list[str]() for name in (*few, *on_all_units("mnist"))}
    for dataset in SETS:
        on_all = on_all_units(dataset)
        on_few = {shown: few_values(dataset, *row) for shown, row in few.items()}
        for name, found in (on_few | on_all).items():
            leads = lead(found, next(iter(on_all.values())))
            rows[name] += [with_error(found), with_lead(leads)]
    over = "over NTK-SAP on all"
    header = ["mask", "MNIST", over, "Fashion-MNIST", over]
    return table(header, [False] + [True] * 4, [[name, *cells] for name, cells in rows.items()])


def facts() -> dict[str, str]:
    """Make the page's table of few units; raise where a sentence beside it would be untrue."""
    few = {d: {(m, s, i): few_values(d, m, s, i) for m, _, s, i in ROWS} for d in SETS}
    whole = {d: on_all_units(d) for d in SETS}
    over = lambda d, ours, other: lead(few[d][ours], few[d][other])
    over_all = lambda d, ours: leads_over(few[d][ours], whole[d])
    ntk_sap, synflow, *_, snip, erk, _ = whole["mnist"]
    ntt, third_ntt = ("ntt-sketch", "1/6", False), ("ntt-sketch", "1/3", False)
    sixth, third = ("random", "1/6", False), ("random", "1/3", False)
    by_variance = {s: ("weighted-random", s, False) for s in ("1/6", "1/3")}
    others = [(m, s, i) for m, _, s, i in ROWS if m not in ("ntt-sketch", "weighted-random")]
    for ours in (ntt, third_ntt, ("ntt-sketch", "1/6", True)):
        claim(all(map(is_ahead, over_all("mnist", ours).values())), "NTT is ahead of all units.")
        for other in others:
            claim(is_ahead(over("mnist", ours, other)), "NTT is ahead of all others on few units.")
    for part in (sixth, third):
        for name, found in over_all("mnist", part).items():
            ahead = name in (GRADUAL, snip, VARIANCE) or is_ahead(found)
            claim(ahead, "On MNIST random on few units is ahead of all but these three on all.")
    for method in ("ntk-sap", "synflow"):
        same = over("mnist", (method, "1/6", False), sixth)
        claim(is_level(same), "Neither score is ahead of random on the same sixth.")
    claim(is_ahead(over("mnist", ("snip", "1/6", False), sixth)), "SNIP, with labels, is.")
    over_ntt = over("mnist", by_variance["1/6"], ntt)
    claim(is_level(over_ntt) and mean(over_ntt) > 0, "On a sixth random by variance are level.")
    claim(is_level(over("mnist", by_variance["1/3"], third_ntt)), "On a third they are, too.")
    best = over_all("mnist", by_variance["1/3"])[ntk_sap]
    claim(1.8 < mean(best) < 2, "The README: 1.9 points above NTK-SAP on MNIST.")
    best = over_all("fashion-mnist", by_variance["1/3"])[ntk_sap]
    claim(is_level(best), "The README: level with it on Fashion-MNIST.")
    over_scores = leads_over(whole["mnist"][VARIANCE], whole["mnist"])
    claim(is_ahead(over_scores[ntk_sap]), "On all units they are ahead of NTK-SAP.")
    claim(mean(over_scores[synflow]) > 0, "SynFlow is not ahead of them.")
    behind_gradual = [-each for each in over_scores[GRADUAL]]
    claim(is_ahead(behind_gradual), "On all units NTT's transfer is ahead of them.")
    for part, plain in (("1/6", sixth), ("1/3", third)):
        same = over("fashion-mnist", by_variance[part], plain)
        claim(is_level(same), "On Fashion-MNIST they are level with plain ones.")
    blind = [pixel_share("mnist", m, "1/6") for m in ("random", "ntk-sap", "synflow")]
    claim(max(blind) - min(blind) < 1, "Masks that see no data spend alike.")
    for ours in (ntt, third_ntt):
        found = over_all("fashion-mnist", ours)
        claim(-0.3 < mean(found[ntk_sap]) < 0, "On Fashion-MNIST NTT is behind NTK-SAP on all.")
        claim(is_ahead(found[synflow]) and is_ahead(found[erk]), "It is ahead of both others.")
        same = over("fashion-mnist", ours, ("random", ours[1], False))
        claim(-0.3 < mean(same) < 0.1, "Nor is it ahead of random masks on the same part.")
    for part in (sixth, third):
        found = over_all("fashion-mnist", part)
        claim(is_ahead(found[synflow]) and is_ahead(found[erk]), "Random is ahead of both, too.")
        claim(not is_ahead(found[ntk_sap]), "It is not ahead of NTK-SAP.")
    best = over_all("fashion-mnist", ("ntk-sap", "1/3", False))
    claim(all(map(is_ahead, best.values())), "NTK-SAP on a third is ahead of all on all units.")
    behind = over("fashion-mnist", ("ntk-sap", "1/3", False), third_ntt)
    claim(is_ahead(behind), "NTT on the same third is behind it.")
    lenet5 = lambda method, share: few_values("fashion-mnist", method, share, model="lenet-5")
    channels = {m: lenet5(m, None) for m in ("random", "ntk-sap", "synflow")}
    on_sixth = lenet5("random", "1/6")
    channel_leads = leads_over(on_sixth, channels)
    claim(all(map(is_ahead, channel_leads.values())), "On LeNet-5 it is ahead of all three.")
    for dataset in SETS:
        claim(is_ahead(third_leads(dataset, "random")), "At 3 % NTT is ahead of random on both.")
        claim(is_level(third_leads(dataset, "weighted-random")), "Of random by variance it is not.")
    claim(is_ahead(third_leads("mnist", "ntk-sap")), "It is ahead of NTK-SAP on MNIST.")
    at_three = few_values("fashion-mnist", "ntt-sketch", "1/3", density=0.03)
    on_all = {(row[0], row[4] or row[3]): fair_values(row, 0.03) for row in FAIR}
    for name in (("ntk-sap", "global"), ("synflow", "global"), ("random", "erk")):
        claim(is_level(lead(at_three, on_all[name])), "It is level with three on all units.")
    shares = lead(on_all["synflow", "shuffle"], at_three)
    claim(is_ahead(shares), "It is behind random masks with SynFlow's shares.")
    small = {dataset: small_values(dataset) for dataset in SETS}
    claim(max(map(max, small.values())) < 70, "A dense LeNet-300-100 of as many weights fails.")
    small_conv = small_values("fashion-mnist", "lenet-5")
    claim(is_level(lead(on_sixth, small_conv)), "On LeNet-5 it is level with random on a sixth.")
    return {
        **{f"units_small_{d.partition('-')[0]}": with_error(v) for d, v in small.items()},
        "channels_small": with_error(small_conv),
        **{f"channels_{m.replace('-', '_')}": with_error(v) for m, v in channels.items()},
        "channels_sixth": with_error(on_sixth),
        "channels_lead": with_error(channel_leads["random"]),
        "units_table": units_table(),
        "third_table": third_table(),
        "third_behind": with_error(shares),
        "pixels_mnist": f"{100 * load('pixels')['pixels']['mnist']:.0f}",
        "pixels_fashion": f"{100 * load('pixels')['pixels']['fashion-mnist']:.0f}",
        "pixels_blind": f"{mean(blind):.0f}",
        "pixels_ntt": f"{pixel_share('mnist', 'ntt-sketch', '1/3'):.0f}",
        "pixels_snip": f"{pixel_share('mnist', 'snip', '1/6'):.0f}",
        "pixels_variance": f"{pixel_share('mnist', 'weighted-random', '1/3'):.1f}",
        "variance_over_ntt": with_error(over_ntt),
        "variance_over_ntk_sap": f"{mean(over_scores[ntk_sap]):.1f}",
        "gradual_over_variance": with_error(behind_gradual),
        "both_gain": f"{mean(over_all('mnist', by_variance['1/6'])[erk]):.1f}",
        "units_gain": f"{mean(over('mnist', ntt, sixth)):.1f}",
        "units_free": f"{mean(over_all('mnist', sixth)[ntk_sap]):.1f}",
        "units_over_ntk_sap": f"{mean(over_all('mnist', ntt)[ntk_sap]):.1f}",
        "units_best": with_error(best[ntk_sap]),
        "units_behind_all": " and ".join(
            with_error([-x for x in over_all("fashion-mnist", ours)[ntk_sap]])
            for ours in (ntt, third_ntt)
        ),
        "units_behind": f"{mean(behind):.1f}",
    }
