"""One look for all figures: a colour and a marker for each method, sizes for a text column."""

import dataclasses
import io
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .._errors import require
from .._files import write_bytes
from ..settings import METHODS, SCOPES

COLUMN = 3.5
"""Width in inches of one column of a two-column page."""

PAGE = 7.0
"""Width in inches of both columns."""


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


def scope_panels(scopes: Iterable[str | None]) -> list[str | None]:
    """One panel for each scope when there are several, else one for all."""
    found = {scope for scope in scopes if scope}
    return [s for s in SCOPES if s in found] if len(found) > 1 else [None]


def in_panel(scope: str | None, panel: str | None) -> bool:
    """Whether a line belongs into a panel; dense networks, which have no scope, into all."""
    return panel is None or not scope or scope == panel


@contextmanager
def panel_figure(
    panels: Sequence[str | None], height: float, labels: Iterable[str]
) -> Iterator[tuple[Any, list[Any]]]:
    """A figure with one axes for each panel side by side, and room for a legend of `labels`."""
    width = COLUMN if len(panels) == 1 else PAGE
    height += 0.16 * -(-len(set(labels)) // _legend_columns(width, labels))
    with new_figure(width, height, columns=len(panels), sharey=True) as (figure, axes):
        if len(panels) > 1:
            for one, panel in zip(axes, panels, strict=True):
                one.set_title("ranked per layer" if panel == "layer" else "ranked over all layers")
        yield figure, axes


def method_order(method: str) -> int:
    """Where `method` stands in legends."""
    return METHODS.index(method) if method in METHODS else len(METHODS)


@contextmanager
def new_figure(
    width: float, height: float, rows: int = 1, columns: int = 1, **options: Any
) -> Iterator[Any]:
    """A figure with `rows` times `columns` axes, in the style of this library.

    **Arguments:**

    - `width`, `height`: in inches.
    - `rows`, `columns`: numbers of axes above and beside one another.
    - `options`: passed to `Figure.subplots`.
    """
    matplotlib = require("matplotlib")
    figures = require("matplotlib.figure")
    with matplotlib.rc_context(_RC):
        figure = figures.Figure(figsize=(width, height), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False, **options)
        yield figure, list(axes.ravel())


@contextmanager
def styled() -> Iterator[None]:
    """The style of this library, for a figure that lays out its own axes."""
    with require("matplotlib").rc_context(_RC):
        yield


def legend_below(figure: Any, *axes: Any, columns: int | None = None) -> None:
    """Put one legend of all `axes` under the figure, where it covers no data."""
    entries: dict[str, Any] = {}
    for one in axes:
        for handle, label in zip(*one.get_legend_handles_labels(), strict=True):
            line = handle[0] if isinstance(handle, tuple) else handle  # without error bars
            entries.setdefault(label, line)
    if len(entries) > 1:
        columns = columns or _legend_columns(figure.get_figwidth(), entries)
        figure.legend(
            list(entries.values()),
            list(entries),
            loc="outside lower center",
            ncols=min(columns, len(entries)),
        )


def _legend_columns(width: float, labels: Iterable[str]) -> int:
    """How many columns of the longest label fit into `width` inches."""
    longest = max((len(label) for label in labels), default=1)
    return max(1, int((width - 0.2) / (0.55 + 0.062 * longest)))


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
    some = low > 0 and high / low < 300
    subs = (1.0, 2.0, 5.0) if few else (1.0, 3.0) if some else (1.0,)
    axis.set_major_locator(ticker.LogLocator(subs=subs))
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
