"""One look for all figures: sizes for a text column, captions, legends and ticks."""

import io
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from .._errors import require
from ..methods import Line
from ..results import Run, keeps_another_share

COLUMN = 3.5
"""Width in inches of one column of a two-column page; a figure of several panels has two."""

_FILLS = ("full", "none", "left", "right", "bottom", "top")  # of the markers of a method's lines
_SCOPES = {"layer": "ranked per layer", "global": "ranked over all layers"}


def line_of(run: Run) -> Line:
    """The line to which a run belongs."""
    told = {name: (run.result or {}).get(name) for name in ("mask", "settings")}
    return Line.of({**run.config, **told})


def describe(runs: Sequence[Run], band: str = "", alone: str = "") -> str:
    """The title of a figure: dataset, model, density, number of seeds, what a band or bars are.

    That is `band` where some of the runs differ in their seed alone, and `alone` where none do.
    """
    fields = lambda name: list(dict.fromkeys(run.config[name] for run in runs))
    pruned = [run for run in runs if run.config["method"] != "dense"]
    densities = sorted({run.config["density"] for run in pruned})
    share = [f"{100 * d:g} % of weights kept" for d in densities]
    kept = lambda run: (run.result or {}).get("kept_density")
    if any(keeps_another_share(kept(run), run.config["density"]) for run in pruned):
        share = [f"density {d:g}" for d in densities]
    share = share if len(share) == 1 else []
    groups: dict[tuple[Any, ...], set[int]] = {}
    for run in runs:
        key = (line_of(run), run.config["density"])
        groups.setdefault(key, set()).add(run.config["seed"])
    counts = sorted({len(seeds) for seeds in groups.values()})
    seeds = f"{counts[0]} seed" if counts == [1] else f"{'–'.join(map(str, counts))} seeds"
    if counts[-1] > 1 and band:
        seeds = f"mean of {seeds}, {band}"
    elif counts[-1] == 1 and alone:
        seeds += f", {alone}"
    return ", ".join([*fields("dataset"), *fields("model"), *share]) + f"\n{seeds}"


def arrange(lines: Iterable[Line]) -> tuple[list[str | None], dict[Line, dict[str, Any]]]:
    """The panels of a figure, and of each line the label and the fill of its markers.

    Where scopes are compared, of several methods, there is a panel for each. Otherwise methods are,
    each with its own scope, in one panel; labels name the scope, and the markers of one method's
    lines are filled differently.
    """
    lines = list(dict.fromkeys(lines))
    scopes: dict[Any, list[str]] = {}
    for line in filter(lambda line: line.scope, lines):
        scopes.setdefault((line.method, line.mask), []).append(line.scope)
    found = {scope for several in scopes.values() for scope in several}
    crossed = found == set(_SCOPES) and sum(len(several) > 1 for several in scopes.values()) > 1
    looks, variants = {}, {}
    for line in lines:
        like = variants.setdefault((line.method, line.scope if crossed else ""), [])
        fill = _FILLS[len(like) % len(_FILLS)]
        like.append(line)
        looks[line] = {
            "label": line.label(len(found) > 1 and not crossed),
            **({} if fill == "full" else {"fillstyle": fill, "ms": 5.0}),
        }
    return [*_SCOPES] if crossed else [None], looks


def in_panel(line: Line, panel: str | None) -> bool:
    """Whether a line belongs into a panel; dense networks, which have no scope, into all."""
    return panel is None or not line.scope or line.scope == panel


@contextmanager
def new_figure(
    caption: str,
    height: float,
    labels: Iterable[str | Mapping[str, Any]] = (),
    panels: Sequence[str | None] = (None,),
    rows: int = 1,
    *,
    width: float = COLUMN,
    columns: int = 0,
    **options: Any,
) -> Iterator[tuple[Any, Any]]:
    """A figure and its axes, with `caption` above and a legend of `labels`, or of looks, below.

    The axes are `[rows, panels]`, each column with its scope as a title, or `[rows, columns]`.
    """
    labels = list(dict.fromkeys(x if isinstance(x, str) else x["label"] for x in labels))
    width = width if len(panels) == 1 else 2 * COLUMN
    longest = max((len(label) for label in labels), default=1)
    across = max(1, int((width - 0.2) / (0.55 + 0.062 * longest)))
    text = "\n".join(textwrap.fill(line, int(18 * width)) for line in caption.split("\n"))
    height += 0.16 * -(-len(labels) // across) + 0.13 * (text.count("\n") + 1)
    with require("matplotlib").rc_context(_RC):
        figure = require("matplotlib.figure").Figure((width, height), layout="constrained")
        figure.suptitle(
            text,
            parse_math=False,
            x=0.02,
            ha="left",
            fontsize=6.5,
            color="#444444",
            linespacing=1.2,
        )
        axes = figure.subplots(rows, columns or len(panels), squeeze=False, **options)
        for one, panel in zip(axes[0], panels, strict=False):
            one.set_title(_SCOPES.get(panel or "", ""))
        yield figure, axes
        entries: dict[str, Any] = {}
        for one in axes.flat:
            for handle, label in zip(*one.get_legend_handles_labels(), strict=True):
                line = handle[0] if isinstance(handle, tuple) else handle  # without error bars
                entries.setdefault(label, line)
        if entries:
            place: Any = {"loc": "outside lower center", "ncols": min(across, len(entries))}
            figure.legend(list(entries.values()), list(entries), **place)


def render_figure(figure: Any, name: str) -> dict[str, bytes]:
    """The contents of `name.png` and `name.svg`; the same figure gives the same bytes."""
    found = {}
    with require("matplotlib").rc_context(_RC):
        for kind, metadata in (("png", {"Software": None}), ("svg", {"Date": None})):
            buffer = io.BytesIO()
            figure.savefig(buffer, format=kind, metadata=metadata)
            found[f"{name}.{kind}"] = buffer.getvalue()
    return found


def thousands(axis: Any) -> None:
    """Label large step counts as 5k, 10k."""
    ticker = require("matplotlib.ticker")
    axis.set_major_locator(ticker.MaxNLocator(6, steps=[1, 2, 5, 10], integer=True))
    text = lambda v, _: f"{v / 1000:g}k" if abs(v) >= 1000 else f"{v:g}"
    axis.set_major_formatter(ticker.FuncFormatter(text))


def plain_decades(axis: Any) -> None:
    """Ticks of a logarithmic axis: plain numbers, between the decades where there is room."""
    ticker = require("matplotlib.ticker")
    low, high = axis.get_view_interval()
    few = low > 0 and high / low < 30
    some = low > 0 and high / low < 300
    subs = (1.0, 2.0, 5.0) if few else (1.0, 3.0) if some else (1.0,)
    axis.set_major_locator(ticker.LogLocator(subs=subs))
    if few and sum(low <= tick <= high for tick in axis.get_majorticklocs()) < 3:
        axis.set_major_locator(ticker.MaxNLocator(5))
    axis.set_major_formatter(ticker.FuncFormatter(lambda v, _: f"{v:g}"))
    minor_ticks(axis)


def minor_ticks(axis: Any) -> None:
    """Mark 2 to 9 of every decade of a logarithmic axis, without labels."""
    ticker = require("matplotlib.ticker")
    axis.set_minor_locator(ticker.LogLocator(subs=range(2, 10), numticks=99))
    axis.set_minor_formatter(ticker.NullFormatter())


_RC = {
    "font.size": 8.0,
    **dict.fromkeys(("axes.titlesize", "axes.labelsize"), 8.0),
    **dict.fromkeys(("legend.fontsize", "xtick.labelsize", "ytick.labelsize"), 7.0),
    "legend.frameon": False,
    "legend.handlelength": 2.6,
    "legend.columnspacing": 1.2,
    **dict.fromkeys(("axes.spines.top", "axes.spines.right"), False),
    **dict.fromkeys(("axes.linewidth", "xtick.major.width", "ytick.major.width"), 0.6),
    **dict.fromkeys(("xtick.minor.width", "ytick.minor.width"), 0.4),
    **dict.fromkeys(("axes.grid", "axes.axisbelow"), True),
    "grid.color": "#E3E3E3",
    "grid.linewidth": 0.5,
    "lines.linewidth": 1.3,
    "lines.markersize": 4.0,
    "savefig.dpi": 220,
    "figure.facecolor": "white",
    "svg.hashsalt": "ntt-eqx",
    "svg.fonttype": "none",
    "font.family": "DejaVu Sans",
}
