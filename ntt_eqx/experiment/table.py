"""Tables of results: mean and spread over seeds, as Markdown, CSV and LaTeX."""

import csv
import dataclasses
import io
import statistics
from collections.abc import Sequence
from typing import Any

from .settings import METHODS

_KERNELS = {"ntt": "active", "ntt-ambient": "ambient"}


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of a table: a method at a density, over its seeds.

    Attributes:
        dataset: images trained and tested on.
        model: architecture.
        method: how the mask was chosen.
        kernel: `active` or `ambient` for NTT, else empty.
        scope: `layer`, `global`, or empty for dense networks.
        density: share of weights kept.
        mask: how its weights are kept together or ablated, empty for plain masks.
        settings: tells apart rows got under different settings; empty where there is one only.
        seeds: number of seeds.
        test: mean test accuracy in percent, `None` when not trained.
        test_spread: sample standard deviation over seeds, `None` for one seed.
        train: mean accuracy on the images trained on, in percent.
        seconds: mean time of a network, transfer and training.
    """

    dataset: str
    model: str
    method: str
    kernel: str
    scope: str
    density: float
    mask: str
    settings: str
    seeds: int
    test: float | None
    test_spread: float | None
    train: float | None
    seconds: float | None


def make_rows(results: Sequence[dict[str, Any]]) -> list[Row]:
    """Group `results` by all but the seed: dense first, then by density, NTT before the others."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for result in results:
        groups.setdefault(_group(result), []).append(result)
    several = _several_settings(groups)
    rows = []
    for key in sorted(groups, key=_order):
        dataset, model, method, scope, density, mask, settings = key
        members = groups[key]
        test, train = _percent(members, "test_accuracy"), _percent(members, "train_accuracy")
        seconds = [m["seconds"] for m in members if m.get("seconds") is not None]
        rows.append(
            Row(
                dataset,
                model,
                method,
                _KERNELS.get(method, ""),
                scope,
                density,
                mask,
                settings if key[:-1] in several else "",
                len(members),
                statistics.fmean(test) if test else None,
                statistics.stdev(test) if len(test) > 1 else None,
                statistics.fmean(train) if train else None,
                statistics.fmean(seconds) if seconds else None,
            )
        )
    return rows


def markdown(rows: Sequence[Row]) -> str:
    """A Markdown table, columns aligned to be read as text too."""
    header, body = _cells(rows, plus_minus="±", empty="–")
    widths = [max(len(line[i]) for line in [header, *body]) for i in range(len(header))]
    numeric = _numeric(header)
    lines = [_align(header, widths, numeric)]
    lines.append(
        "| "
        + " | ".join(
            ("-" * (w - 1) + ":") if n else "-" * w for w, n in zip(widths, numeric, strict=True)
        )
        + " |"
    )
    lines += [_align(line, widths, numeric) for line in body]
    return "\n".join(lines) + "\n"


def plain_cells(rows: Sequence[Row]) -> tuple[list[str], list[list[str]], list[bool]]:
    """Header, body and which columns hold numbers, for a terminal."""
    header, body = _cells(rows, plus_minus="±", empty="–")
    return header, body, _numeric(header)


def latex(rows: Sequence[Row]) -> str:
    """A LaTeX `tabular` with booktabs rules."""
    header, body = _cells(rows, plus_minus=r"$\pm$", empty="--")
    escape = lambda text: text.replace("%", r"\%").replace("_", r"\_").replace("&", r"\&")
    columns = "".join("r" if n else "l" for n in _numeric(header))
    lines = [rf"\begin{{tabular}}{{{columns}}}", r"\toprule"]
    lines.append(" & ".join(map(escape, header)) + r" \\")
    lines.append(r"\midrule")
    lines += [" & ".join(map(escape, line)) + r" \\" for line in body]
    lines += [r"\bottomrule", r"\end{tabular}"]
    return "\n".join(lines) + "\n"


def to_csv(rows: Sequence[Row]) -> str:
    """The rows with every field and full precision."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    names = [field.name for field in dataclasses.fields(Row)]
    writer.writerow(names)
    for row in rows:
        values = [getattr(row, name) for name in names]
        writer.writerow(["" if value is None else value for value in values])
    return buffer.getvalue()


def _cells(
    rows: Sequence[Row], *, plus_minus: str, empty: str
) -> tuple[list[str], list[list[str]]]:
    columns: dict[str, list[str]] = {}
    if len({row.dataset for row in rows}) > 1:
        columns["Dataset"] = [row.dataset for row in rows]
    if len({row.model for row in rows}) > 1:
        columns["Model"] = [row.model for row in rows]
    columns["Method"] = [row.method for row in rows]
    if any(row.kernel for row in rows):
        columns["Kernel"] = [row.kernel or empty for row in rows]
    columns["Scope"] = [row.scope or empty for row in rows]
    columns["Density"] = [f"{row.density:g}" for row in rows]
    if any(row.mask for row in rows):
        columns["Mask"] = [row.mask or empty for row in rows]
    if any(row.settings for row in rows):
        columns["Settings"] = [row.settings or empty for row in rows]
    columns["Test accuracy (%)"] = [
        _mean_spread(row.test, row.test_spread, plus_minus, empty) for row in rows
    ]
    columns["Train accuracy (%)"] = [_mean_spread(row.train, None, "", empty) for row in rows]
    columns["Seeds"] = [str(row.seeds) for row in rows]
    columns["Seconds"] = [empty if row.seconds is None else f"{row.seconds:.0f}" for row in rows]
    return list(columns), [list(line) for line in zip(*columns.values(), strict=True)]


def _numeric(header: Sequence[str]) -> list[bool]:
    words = {"Dataset", "Model", "Method", "Kernel", "Scope", "Mask", "Settings"}
    return [name not in words for name in header]


def _align(line: Sequence[str], widths: Sequence[int], numeric: Sequence[bool]) -> str:
    padded = [
        text.rjust(width) if right else text.ljust(width)
        for text, width, right in zip(line, widths, numeric, strict=True)
    ]
    return "| " + " | ".join(padded) + " |"


def _mean_spread(mean: float | None, spread: float | None, plus_minus: str, empty: str) -> str:
    if mean is None:
        return empty
    return f"{mean:.2f}" if spread is None else f"{mean:.2f} {plus_minus} {spread:.2f}"


def _percent(members: Sequence[dict[str, Any]], name: str) -> list[float]:
    return [100.0 * m[name] for m in members if m.get(name) is not None]


def _group(result: dict[str, Any]) -> tuple[Any, ...]:
    names = ("dataset", "model", "method", "scope", "density", "mask", "settings_id")
    return tuple("" if result.get(name) is None else result[name] for name in names)


def _several_settings(groups: dict[tuple[Any, ...], Any]) -> set[tuple[Any, ...]]:
    seen: dict[tuple[Any, ...], int] = {}
    for key in groups:
        seen[key[:-1]] = seen.get(key[:-1], 0) + 1
    return {key for key, count in seen.items() if count > 1}


def _order(key: tuple[Any, ...]) -> tuple[Any, ...]:
    dataset, model, method, scope, density, mask, settings = key
    place = METHODS.index(method) if method in METHODS else len(METHODS)
    return (dataset, model, -density, place, scope != "layer", scope, mask, settings)
