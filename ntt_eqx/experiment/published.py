"""Published accuracies under the protocols that presets name, to be printed beside ours."""

import dataclasses
import types
from collections.abc import Mapping, Sequence
from typing import Any

from .cells import Cell, plan
from .methods import method
from .presets import PRESETS
from .settings import CompareSettings, MaskSettings
from .table import accuracy, line_in, markdown, rows_of, summarise


@dataclasses.dataclass(frozen=True)
class Published:
    """One number of a paper."""

    dataset: str  # images trained and tested on
    model: str  # architecture, as the command calls it
    method: str  # as the command calls it, or the paper, where the command does not have it
    density: float  # share of weights kept
    accuracy: float  # on the test images, in percent
    source: str  # where it stands


def _rows(
    dataset: str, model: str, density: float, source: str, numbers: Mapping[str, float]
) -> tuple[Published, ...]:
    return tuple(
        Published(dataset, model, name, 1.0 if name == "dense" else density, accuracy, source)
        for name, accuracy in numbers.items()
    )


_CHTS = "Zhang et al., NeurIPS 2025, Table 4"
_SIGN_IN = "Gadhikar et al. (Sign-In), NeurIPS 2025"

PUBLISHED: Mapping[str, tuple[Published, ...]] = types.MappingProxyType(
    {
        "vgg-19": (
            *_rows(
                *("cifar-10", "vgg-19-bn", 0.02, "Wang et al. (GraSP), ICLR 2020"),
                {"snip": 92.05, "grasp": 92.19},
            ),
            *_rows(
                *("cifar-10", "vgg-19-bn", 0.02, "Hubens et al. (one-cycle pruning), 2021"),
                {"one-cycle magnitude": 93.44},
            ),
        ),
        "resnet-20": (
            *_rows(
                *("cifar-10", "resnet-20-bn", 0.1, _SIGN_IN),
                {"random": 86.25, "random, Sign-In": 87.83},
            ),
            *_rows(
                *("cifar-10", "resnet-20-bn", 0.05, _SIGN_IN),
                {"random": 83.56, "random, Sign-In": 84.74},
            ),
        ),
        "ultra-sparse": (
            *_rows(
                *("mnist", "mlp-1568", 0.01, _CHTS),
                {"set": 98.14, "rigl": 98.61, "gmp": 98.62, "CHTs": 98.81, "dense": 98.78},
            ),
            *_rows(
                *("fashion-mnist", "mlp-1568", 0.01, _CHTS),
                {"set": 89.00, "rigl": 89.91, "gmp": 90.29, "CHTs": 90.93, "dense": 90.88},
            ),
            *_rows(
                *("cifar-10", "mlp-1568", 0.01, _CHTS),
                {"set": 62.70, "rigl": 63.90, "gmp": 65.11, "CHTs": 69.97, "dense": 62.85},
            ),
        ),
    }
)
"""By preset. Liu & Zenke (2020) print the accuracies of Conv-4 as curves, not as numbers."""


def protocol_of(cell: Cell) -> str | None:
    """The preset whose protocol makes `cell` to the letter, `None` if there is none.

    The method, the seed, the density and the shares of the layers are free. All else is as in the
    preset: network, pattern, recipe, and what the method's score or transfer is told.
    """
    for name in PUBLISHED:
        if cell.model in PRESETS[name].models and cell in plan(_like(PRESETS[name], cell)):
            return name
    return None


def _like(preset: CompareSettings, cell: Cell) -> CompareSettings:
    """The comparison of one network that the preset makes with the free choices of `cell`."""
    allocation = (cell.mask or MaskSettings()).allocation
    return dataclasses.replace(
        preset,
        datasets=(cell.dataset,),
        models=(cell.model,),
        methods=(cell.method if cell.scope is None else f"{cell.method}@{cell.scope}",),
        densities=(cell.density,),
        seeds=(cell.seed,),
        mask=dataclasses.replace(preset.mask, allocation=allocation),
    )


def published_beside(results: Sequence[dict[str, Any]]) -> str:
    """A Markdown table of published numbers beside the results under the same protocol.

    Empty where no result follows a protocol with published numbers for its images.
    """
    lines = []
    for preset, numbers in PUBLISHED.items():
        mine = [result for result in results if result.get("protocol") == preset]
        if not mine:
            continue
        rows = rows_of(summarise(mine))
        seen = {row.dataset for row in rows}
        lines += [line for n in numbers if n.dataset in seen for line in _lines(n, rows)]
    if not lines:
        return ""
    header = ["Dataset", "Model", "Method", "Density", "Published (%)", "Ours (%)", "Source"]
    numeric = [name in ("Density", "Published (%)", "Ours (%)") for name in header]
    return markdown((header, lines, numeric))


def _lines(number: Published, rows: Sequence[Any]) -> list[list[str]]:
    """A line for each scope in which the method of `number` was run here; one if it was not."""
    place = (number.dataset, number.model, number.method, number.density)
    ours = [r for r in rows if (r.dataset, r.model, r.method, r.density) == place]
    begin = [number.dataset, number.model]
    end = [f"{number.density:g}", f"{number.accuracy:.2f}"]
    if not ours:
        return [[*begin, method(number.method).label, *end, "–", number.source]]
    return [[*begin, line_in(r).label(True), *end, accuracy(r), number.source] for r in ours]
