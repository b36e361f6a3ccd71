"""One look for all figures: a colour and a marker for each method, sizes for a text column."""

import dataclasses
import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .._errors import require
from .._files import write_bytes
from ..settings import METHODS

COLUMN = 3.5
"""Width in inches of one column of a two-column page."""


@dataclasses.dataclass(frozen=True)
class MethodStyle:
    """How a method is drawn in every figure."""

    label: str
    colour: str
    marker: str


# Okabe and Ito's palette, which readers with any colour vision can tell apart, and three more from
# Tol's muted palette; markers repeat what the colours say.
_STYLES = {
    "dense": MethodStyle("dense", "#000000", "_"),
    "ntt": MethodStyle("NTT (active)", "#0072B2", "o"),
    "ntt-ambient": MethodStyle("NTT (ambient)", "#56B4E9", "s"),
    "random": MethodStyle("random", "#8A8A8A", "X"),
    "magnitude": MethodStyle("magnitude", "#7A5230", "v"),
    "snip": MethodStyle("SNIP", "#D55E00", "^"),
    "logit-snip": MethodStyle("logit-SNIP", "#E69F00", "D"),
    "grasp": MethodStyle("GraSP", "#009E73", "P"),
    "synflow": MethodStyle("SynFlow", "#CC79A7", "<"),
    "ntk-sap": MethodStyle("NTK-SAP", "#882255", ">"),
    "px": MethodStyle("PX", "#117733", "h"),
    "ntt-gradient": MethodStyle("NTT gradient", "#332288", "p"),
}
_SCOPES = {"layer": "-", "global": (0, (4, 1.5)), "": "-"}


def method_style(method: str) -> MethodStyle:
    """The style of `method`; an unknown one is grey."""
    return _STYLES.get(method, MethodStyle(method, "#555555", "*"))


def line_style(scope: str | None) -> Any:
    """Solid lines for masks per layer, dashes for global ones."""
    return _SCOPES.get(scope or "", "-")


def line_label(method: str, scope: str | None, *, several_scopes: bool, mask: str = "") -> str:
    """What the legend calls a line."""
    label = method_style(method).label
    label = f"{label}, {scope}" if several_scopes and scope else label
    return f"{label}, {mask}" if mask else label


def method_order(method: str) -> int:
    """Where `method` stands in legends."""
    return METHODS.index(method) if method in METHODS else len(METHODS)


@contextmanager
def new_figure(width: float, height: float, rows: int = 1, **options: Any) -> Iterator[Any]:
    """A figure with `rows` axes, in the style of this library.

    **Arguments:**

    - `width`, `height`: in inches.
    - `rows`: number of axes above one another.
    - `options`: passed to `Figure.subplots`.
    """
    matplotlib = require("matplotlib")
    figures = require("matplotlib.figure")
    with matplotlib.rc_context(_RC):
        figure = figures.Figure(figsize=(width, height), layout="constrained")
        axes = figure.subplots(rows, 1, squeeze=False, **options)[:, 0]
        yield figure, list(axes)


@contextmanager
def styled() -> Iterator[None]:
    """The style of this library, for a figure that lays out its own axes."""
    with require("matplotlib").rc_context(_RC):
        yield


def legend_below(figure: Any, axes: Any, *, columns: int = 3) -> None:
    """Put the legend of `axes` under the figure, where it covers no data."""
    handles, labels = axes.get_legend_handles_labels()
    if len(handles) > 1:
        figure.legend(handles, labels, loc="outside lower center", ncols=min(columns, len(handles)))


def save_figure(figure: Any, stem: Path) -> list[Path]:
    """Write `stem.png` and `stem.svg`; the same figure gives the same bytes."""
    matplotlib = require("matplotlib")
    paths = []
    with matplotlib.rc_context(_RC):
        for kind, metadata in (("png", {"Software": None}), ("svg", {"Date": None})):
            buffer = io.BytesIO()
            figure.savefig(buffer, format=kind, metadata=metadata)
            path = stem.with_name(f"{stem.name}.{kind}")
            write_bytes(path, buffer.getvalue())
            paths.append(path)
    return paths


def thousands(axis: Any) -> None:
    """Label large step counts as 5k, 10k."""
    ticker = require("matplotlib.ticker")
    axis.set_major_locator(ticker.MaxNLocator(6, steps=[1, 2, 5, 10], integer=True))
    axis.set_major_formatter(
        ticker.FuncFormatter(lambda v, _: f"{v / 1000:g}k" if abs(v) >= 1000 else f"{v:g}")
    )


def plain_decades(axis: Any) -> None:
    """Label a logarithmic axis in plain numbers, and between the decades where there is room."""
    ticker = require("matplotlib.ticker")
    low, high = axis.get_view_interval()
    few = low > 0 and high / low < 30
    axis.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 5.0) if few else (1.0,)))
    if few and sum(low <= tick <= high for tick in axis.get_majorticklocs()) < 3:
        axis.set_major_locator(ticker.MaxNLocator(5))
    axis.set_major_formatter(ticker.FuncFormatter(lambda v, _: f"{v:g}"))
    axis.set_minor_formatter(ticker.NullFormatter())


def spread(values: Sequence[Sequence[float]]) -> tuple[list[float], list[float]]:
    """Mean and sample standard deviation over seeds, point by point; 0 for one seed."""
    numpy = require("numpy")
    stacked = numpy.asarray(values, dtype=float)
    deviation = stacked.std(axis=0, ddof=1) if len(stacked) > 1 else 0.0 * stacked[0]
    return stacked.mean(axis=0).tolist(), deviation.tolist()


_RC = {
    "font.size": 8.0,
    "axes.titlesize": 8.0,
    "axes.labelsize": 8.0,
    "legend.fontsize": 7.0,
    "legend.frameon": False,
    "legend.handlelength": 2.2,
    "legend.columnspacing": 1.2,
    "xtick.labelsize": 7.0,
    "ytick.labelsize": 7.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E3E3E3",
    "grid.linewidth": 0.5,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "lines.linewidth": 1.3,
    "lines.markersize": 4.0,
    "savefig.dpi": 220,
    "figure.facecolor": "white",
    "svg.hashsalt": "ntt-eqx",
    "svg.fonttype": "none",
    "font.family": "DejaVu Sans",
}
