"""Tables of results: mean and spread over seeds, as Markdown, CSV and LaTeX."""

import csv
import dataclasses
import io
import statistics
from collections import Counter
from collections.abc import Sequence
from typing import Any

from .methods import Line, method
from .results import standard_error

Cells = tuple[list[str], list[list[str]], list[bool]]
"""Header, body, and which columns hold numbers."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of a table: a method at a density, over its seeds."""

    dataset: str  # images trained and tested on
    model: str  # architecture
    method: str  # how the mask was chosen, as the command line calls it
    kernel: str  # `active` or `ambient` for NTT, else empty
    scope: str  # `layer`, `global`, `erk`, or empty for dense networks
    density: float  # share of weights kept
    mask: str  # how its weights are kept together or ablated, empty for plain masks
    settings: str  # tells apart rows got under different settings; empty where there is one only
    seeds: int  # number of seeds
    test: float | None  # mean test accuracy in percent, `None` when not trained
    test_spread: float | None  # sample standard deviation over seeds, `None` for one seed
    train: float | None  # mean accuracy on the images trained on, in percent
    # standard error of `test` by the number of test images, in percent; `None` where not known
    test_error: float | None = None

    @property
    def line(self) -> Line:
        """The line of figures to which it belongs."""
        return Line(self.method, self.scope, self.mask)


def make_rows(results: Sequence[dict[str, Any]]) -> list[Row]:
    """Group `results` by all but the seed: dense first, then by density, NTT before the others."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for result in results:
        place = [result[name] for name in ("dataset", "model", "density")]
        key = (*place, Line.of(result), result.get("settings_id") or "")
        groups.setdefault(key, []).append(result)
    alike = Counter(key[:-1] for key in groups)
    percent = lambda members, name: [100.0 * m[name] for m in members if m.get(name) is not None]
    rows = []
    for (*place, settings), members in groups.items():
        dataset, model, density, (name, scope, mask) = place
        test, train = (percent(members, f"{part}_accuracy") for part in ("test", "train"))
        settings = settings if alike[tuple(place)] > 1 else ""
        first = dataset, model, name, method(name).kernel, scope, density, mask, settings
        spread = statistics.stdev(test) if len(test) > 1 else None
        means = [statistics.fmean(values) if values else None for values in (test, train)]
        errors = [error for one in members if (error := standard_error(one)) is not None]
        error = 100 * statistics.fmean(errors) if len(errors) == len(test) > 0 else None
        rows.append(Row(*first, len(members), means[0], spread, means[1], error))
    return sorted(rows, key=_order)


def table_cells(rows: Sequence[Row]) -> Cells:
    """The rows as text, columns that say nothing left out."""
    empty = "–"
    spread = lambda row: "" if row.test_spread is None else f" ± {row.test_spread:.2f}"
    percent = lambda value: empty if value is None else f"{value:.2f}"
    words = {
        "Dataset": [row.dataset for row in rows],
        "Model": [row.model for row in rows],
        "Method": [method(row.method).label for row in rows],
        "Scope": [row.scope or empty for row in rows],
        "Density": [f"{row.density:g}" for row in rows],
        "Mask": [row.mask or empty for row in rows],
        "Settings": [row.settings or empty for row in rows],
    }
    numbers = {
        "Test accuracy (%)": [percent(row.test) + spread(row) for row in rows],
        "Standard error": [percent(row.test_error) for row in rows],
        "Train accuracy (%)": [percent(row.train) for row in rows],
        "Seeds": [str(row.seeds) for row in rows],
    }
    for name in ("Dataset", "Model"):
        if len(set(words[name])) == 1:
            del words[name]
    for name in ("Mask", "Settings"):
        if set(words[name]) == {empty}:
            del words[name]
    if set(numbers["Standard error"]) == {empty}:
        del numbers["Standard error"]
    columns = words | numbers
    body = [list(line) for line in zip(*columns.values(), strict=True)]
    return list(columns), body, [name in numbers or name == "Density" for name in columns]


def markdown(rows: Sequence[Row]) -> str:
    """A Markdown table, columns aligned to be read as text too."""
    return as_markdown(*table_cells(rows))


def as_markdown(header: list[str], body: list[list[str]], right: list[bool]) -> str:
    """A Markdown table of these cells; the columns `right` are aligned to the right."""
    body = [[_one_line(cell).translate(_IN_MARKDOWN) for cell in line] for line in body]
    widths = [max(map(len, column)) for column in zip(header, *body, strict=True)]
    rule = ["-" * (width - r) + ":" * r for width, r in zip(widths, right, strict=True)]
    lines = [
        [c.rjust(w) if r else c.ljust(w) for c, w, r in zip(line, widths, right, strict=True)]
        for line in (header, rule, *body)
    ]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def latex(rows: Sequence[Row]) -> str:
    """A LaTeX `tabular` with booktabs rules."""
    header, body, right = table_cells(rows)
    escape = lambda text: _one_line(text).translate(_IN_LATEX)
    columns = "".join("r" if numeric else "l" for numeric in right)
    first, *rest = (" & ".join(map(escape, line)) + r" \\" for line in (header, *body))
    lines = [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", first, r"\midrule", *rest]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"


def to_csv(rows: Sequence[Row]) -> str:
    """The rows with every field and full precision.

    A text that a spreadsheet would take for a formula begins with an apostrophe.
    """
    text = lambda value: f"'{value}" if value.lstrip()[:1] in _FORMULA else value
    cell = lambda value: text(value) if isinstance(value, str) and value else value
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(field.name for field in dataclasses.fields(Row))
    for row in rows:
        writer.writerow("" if v is None else cell(v) for v in dataclasses.astuple(row))
    return buffer.getvalue()


# What a name may hold that the language of a table reads as its own.
_FORMULA = ("=", "+", "-", "@", "")  # the last: nothing but spaces, tabs or line ends
_IN_MARKDOWN = str.maketrans({c: f"\\{c}" for c in "\\`*_[]|~$"} | {"<": "&lt;", "&": "&amp;"})
_IN_LATEX = str.maketrans(
    {
        **{c: f"\\{c}" for c in "%_&#{}"},
        "$": r"\$",
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "<": r"\textless{}",
        ">": r"\textgreater{}",
        "|": r"\textbar{}",
        '"': r"\textquotedbl{}",
        "`": r"\textasciigrave{}",
        "±": r"$\pm$",
        "–": "--",
        # after the end of a line these would be an argument of it
        "[": "{[}",
        "]": "{]}",
        "*": "{*}",
    }
)


def _one_line(text: str) -> str:
    """`text` with a space for each line end and control character."""
    return "".join(c if c.isprintable() else " " for c in text)


def _order(row: Row) -> tuple[Any, ...]:
    return (row.dataset, row.model, -row.density, row.line.order, row.settings)
