"""Tables of results: one row a network, or its mean over seeds; as Markdown, CSV and LaTeX."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ._errors import require
from .methods import Line, method
from .results import Run, standard_error

if TYPE_CHECKING:
    import pandas

Cells = tuple[list[str], list[list[str]], list[bool]]
"""Header, body, and which columns hold numbers."""

_PLACE = ("dataset", "model", "method", "scope", "density", "mask")
_MEASURED = (
    *("test_accuracy", "train_accuracy", "held_out_accuracy", "test_loss", "train_loss"),
    *("transfer_steps", "train_steps"),
    *("mask_seconds", "transfer_seconds", "train_seconds", "seconds"),
    *("kept_density", "effective_density", "units", "live_units"),
    *("kernel_distance", "target_distance", "test_images"),
)


def runs_frame(runs: Sequence[Run]) -> "pandas.DataFrame":
    """One row for each network, those that failed included; accuracies are shares of 1."""
    frame = results_frame([{**run.config, **(run.result or {})} for run in runs])
    return frame.assign(
        state=[run.state for run in runs], folder=[str(run.directory) for run in runs]
    )


def results_frame(results: Sequence[dict[str, Any]]) -> "pandas.DataFrame":
    """One row for each result, with what no network can lack first; NaN for what is not known."""
    rows = []
    for result in results:
        line = Line.of(result)
        place = {**{name: result[name] for name in ("dataset", "model")}, **line._asdict()}
        place |= {"density": float(result["density"]), "seed": result["seed"]}
        rows.append(
            {
                **{name: place[name] for name in (*_PLACE, "seed")},
                **{name: result.get(name) for name in _MEASURED},
                "settings": result.get("settings_id") or "",
            }
        )
    frame = require("pandas").DataFrame(rows, columns=[*_PLACE, "seed", *_MEASURED, "settings"])
    return frame.astype({name: float for name in _MEASURED})


def summarise(results: Sequence[dict[str, Any]]) -> "pandas.DataFrame":
    """Mean and spread over seeds, in percent: dense first, then by density, NTT before the others.

    Its columns are `dataset`, `model`, `method`, `kernel` (of a transfer, else empty), `scope`,
    `density`, `mask` (empty for plain ones), `settings` (empty where there is one only), `kept`
    (the share of prunable weights that is kept: another than `density` where that counts groups, or
    a pattern leaves layers whole), `seeds` (how many), `test` and `train` (mean accuracies),
    `test_spread` (sample standard deviation over seeds) and `test_error` (standard error by the
    number of test images). NaN stands for what is not known: an accuracy of a network that was not
    trained, the spread of one seed.
    """
    frame = results_frame(results)
    frame["error"] = [standard_error(result) for result in results]
    for name in ("test_accuracy", "train_accuracy", "error"):
        frame[name] = 100.0 * frame[name].astype(float)
    table = (
        frame.groupby([*_PLACE, "settings"], sort=False)
        .agg(
            kept=("kept_density", "mean"),
            seeds=("seed", "size"),
            test=("test_accuracy", "mean"),
            test_spread=("test_accuracy", "std"),
            train=("train_accuracy", "mean"),
            test_error=("error", lambda errors: errors.mean(skipna=False)),
        )
        .reset_index()
    )
    several = table.groupby([*_PLACE]).settings.transform("size") > 1
    table["settings"] = table.settings.where(several, "")
    table.insert(3, "kernel", [method(name).kernel for name in table.method])
    order = [row.Index for row in sorted(rows_of(table), key=_order)]
    return table.loc[order].reset_index(drop=True)


def rows_of(table: "pandas.DataFrame") -> list[Any]:
    """The rows of a table, its columns as their attributes."""
    return list(table.itertuples())


def line_in(row: Any) -> Line:
    """The line of figures to which a row of a table belongs."""
    return Line(row.method, row.scope, row.mask)


def shown(table: "pandas.DataFrame") -> Cells:
    """The rows of `summarise` as text, columns that say nothing left out."""
    number = lambda column: [_EMPTY if value != value else f"{value:.2f}" for value in column]
    spread = ["" if value != value else f" ± {value:.2f}" for value in table.test_spread]
    text = require("pandas").DataFrame(
        {
            "Dataset": table.dataset,
            "Model": table.model,
            "Method": [method(name).label for name in table.method],
            "Scope": table.scope,
            "Density": [f"{density:g}" for density in table.density],
            "Kept": [_EMPTY if kept != kept else f"{kept:.3g}" for kept in table.kept],
            "Mask": table["mask"],
            "Settings": table.settings,
            "Test accuracy (%)": map("".join, zip(number(table.test), spread, strict=True)),
            "Standard error": number(table.test_error),
            "Train accuracy (%)": number(table.train),
            "Seeds": table.seeds.astype(str),
        }
    )
    text = text.replace("", _EMPTY)
    alike = [name for name in ("Dataset", "Model") if text[name].nunique() == 1]
    empty = [n for n in ("Mask", "Settings", "Standard error") if set(text[n]) == {_EMPTY}]
    apart = (table.kept / table.density - 1).abs() > _APART
    asked = [] if apart.any() else ["Kept"]
    text = text.drop(columns=alike + empty + asked)
    return list(text), text.to_numpy().tolist(), [name in _NUMBERS for name in text]


def markdown(cells: Cells) -> str:
    """A Markdown table, columns aligned to be read as text too."""
    header, body, right = cells
    body = [[_one_line(cell).translate(_IN_MARKDOWN) for cell in line] for line in body]
    sides = ["right" if numeric else "left" for numeric in right]
    frame = require("pandas").DataFrame(body, columns=header)
    return frame.to_markdown(index=False, colalign=sides, disable_numparse=True) + "\n"


def latex(cells: Cells) -> str:
    """A LaTeX `tabular` with booktabs rules."""
    header, body, right = cells
    lines = [[_one_line(cell).translate(_IN_LATEX) for cell in line] for line in (header, *body)]
    style = require("pandas").DataFrame(lines[1:], columns=lines[0]).style.hide(axis="index")
    return style.to_latex(hrules=True, column_format="".join("r" if r else "l" for r in right))


def to_csv(table: "pandas.DataFrame") -> str:
    """The rows of `summarise` with every field and full precision.

    A text that a spreadsheet would take for a formula begins with an apostrophe.
    """
    safe = lambda value: f"'{value}" if value.lstrip()[:1] in _FORMULA else value
    cell = lambda value: safe(value) if isinstance(value, str) and value else value
    return table.map(cell).to_csv(index=False, lineterminator="\n")


_EMPTY = "–"
_APART = 0.02  # the share by which kept weights may differ from a density unsaid
_NUMBERS = ("Density", "Kept", "Test accuracy (%)", "Standard error", "Train accuracy (%)", "Seeds")

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


def _order(row: Any) -> tuple[Any, ...]:
    return (row.dataset, row.model, -row.density, line_in(row).order, row.settings)
