"""Raw results of benchmarks/results, their statistics, and how tables show them."""

import functools
import json
import pathlib
import statistics
from collections.abc import Iterable, Mapping
from typing import Any

from ntt_eqx.experiment.results import standard_error as of_test_images

RAW = pathlib.Path(__file__).parents[2] / "results"

NAMES = {
    "dense": "dense",
    "ntt": "**NTT, active kernel**",
    "ntt-ambient": "**NTT, ambient kernel**",
    "ntt-sketch": "**NTT, sketched kernel**",
    "magnitude": "magnitude",
    "random": "random",
    "weighted-random": "random by variance",
    "snip": "SNIP",
    "logit-snip": "logit-SNIP",
    "grasp": "GraSP",
    "synflow": "SynFlow",
    "ntk-sap": "NTK-SAP",
}
LABELS = {"dense": "–", "snip": "yes", "grasp": "yes"}  # all others: no
SETS = {"mnist": "MNIST", "fashion-mnist": "Fashion-MNIST"}
OF_LAYERS = ("ntt-sketch", "random", "weighted-random", "wanda")  # others rank over all layers

Results = list[dict[str, Any]]


def claim(holds: bool, sentence: str) -> None:
    """Raise unless the data still say what a sentence of the page says."""
    if not holds:
        raise SystemExit(f"make_results: the results no longer say: {sentence}")


def load(name: str) -> Any:
    """The raw results of one file, not to be changed."""
    return _parsed((RAW / f"{name}.json").read_text())


@functools.cache
def _parsed(text: str) -> Any:
    return json.loads(text)


def values(results: Results, key: str = "test_accuracy", **where: Any) -> list[float]:
    """One value of each result that has all of `where`, in percent, by seed."""
    chosen = [r for r in results if all(r[name] == value for name, value in where.items())]
    return [100 * r[key] for r in sorted(chosen, key=lambda r: r["seed"])]


def mean(numbers: Iterable[float]) -> float:
    return statistics.fmean(list(numbers))


def standard_error(numbers: list[float]) -> float:
    return statistics.stdev(numbers) / len(numbers) ** 0.5


def is_ahead(leads: list[float]) -> bool:
    """Whether a mean is more than two standard errors above zero."""
    return mean(leads) > 2 * standard_error(leads)


def leads_over(ours: list[float], others: Mapping[str, list[float]]) -> dict[str, list[float]]:
    """How far our transfers are ahead of each of the others, by seed."""
    return {
        name: [one - other for one, other in zip(ours, theirs, strict=True)]
        for name, theirs in others.items()
    }


def with_error(numbers: list[float], error: float | None = None, sign: str = "") -> str:
    """A mean and its standard error, which one number does not tell."""
    if error is None and len(numbers) > 1:
        error = standard_error(numbers)
    return f"{mean(numbers):{sign}.2f}" + ("" if error is None else f" ± {error:.2f}")


def of_one(result: dict[str, Any]) -> str:
    """The accuracy of one network, and the standard error that its test images leave."""
    error = of_test_images(result) or 0.0
    return with_error([100 * result["test_accuracy"]], 100 * error)


def with_lead(leads: list[float]) -> str:
    """A lead and its error, in bold if it is clear; a dash for a mask beside itself."""
    if not any(leads):
        return "–"
    shown = with_error(leads, sign="+")
    return f"**{shown}**" if is_ahead(leads) else shown


def spread(numbers: list[float], digits: int) -> str:
    return f"{mean(numbers):.{digits}f} ± {statistics.stdev(numbers):.{digits}f}"


def rounded(numbers: list[float], between: str) -> str:
    """A mean and its standard error to one digit."""
    return f"{mean(numbers):.1f}{between}{standard_error(numbers):.1f}"


def table(header: list[str], right: list[bool], rows: list[list[str]]) -> str:
    line = lambda cells: "| " + " | ".join(cells) + " |"
    rule = ["---:" if flag else "---" for flag in right]
    return "\n".join([line(header), line(rule), *map(line, rows)])


def lead(ours: list[float], others: list[float]) -> list[float]:
    """How far one mask is ahead of another, by seed."""
    return leads_over(ours, {"": others})[""]


def is_level(leads: list[float]) -> bool:
    """Whether a mean is within two standard errors of zero."""
    return abs(mean(leads)) < 2 * standard_error(leads)


def mask_of(method: str, share: str | None, initial: bool = False) -> str:
    """The label of a mask in the results, on a share of the channels; `None` is all of them."""
    parts = ["erk"] if method in OF_LAYERS else []
    parts += [f"few-channels:{share}"] if share else []
    return ", ".join(parts + ["initial"] * initial)
