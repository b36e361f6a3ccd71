"""Tables of results: one row a network, or its mean over seeds; as Markdown, CSV and LaTeX."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ._errors import require
from .methods import Line, method
from .results import Run, keeps_another_share, standard_error

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
        state=[run.state for run in runs],
        note=[run.note for run in runs],
        folder=[str(run.directory) for run in runs],
    )


def results_frame(results: Sequence[dict[str, Any]]) -> "pandas.DataFrame":
    """One row for each result, with what no network can lack first; NaN for what is not known."""
    rows = []
    for result in results:
        line = Line.of(result)._asdict()
        place = {**{name: result[name] for name in ("dataset", "model")}, **line}
        place |= {"density": float(result["density"]), "seed": result["seed"]}
        rows.append(
            {
                **{name: place[name] for name in (*_PLACE, "seed")},
                **{name: result.get(name) for name in _MEASURED},
                "settings": line["settings"] or result.get("settings_id") or "",
            }
        )
    frame = require("pandas").DataFrame(rows, columns=[*_PLACE, "seed", *_MEASURED, "settings"])
    return frame.astype({name: float for name in _MEASURED})


def summarise(results: Sequence[dict[str, Any]]) -> "pandas.DataFrame":
    """Mean and error over seeds, in percent: dense first, then by density, NTT before the others.

    Its columns are `dataset`, `model`, `method`, `kernel` (of a transfer, else empty), `scope`,
    `density`, `mask` (empty for plain ones), `settings` (empty where nothing differs), `kept`
    (the share of prunable weights that is kept: another than `density` where that counts groups, or
    a pattern leaves layers whole), `seeds` (how many), `test` and `train` (mean accuracies),
    `test_spread` (sample standard deviation over seeds), `test_error` (standard error of `test`:
    over seeds, or, of one seed, by the number of test images), `lead` and `lead_error` (mean of the
    differences from random masks of the scope `reference`, seed by seed, and its standard error).
    NaN stands for what is not known: an accuracy of a network that was not trained, the spread of
    one seed.
    """
    frame = results_frame(results)
    frame["images"] = [standard_error(result) for result in results]
    for name in ("test_accuracy", "train_accuracy", "images"):
        frame[name] = 100.0 * frame[name].astype(float)
    several = frame.groupby([*_PLACE]).settings.transform("nunique").to_numpy() > 1
    told = np.array([bool(result.get("settings")) for result in results], bool)
    frame["settings"] = frame.settings.where(several | told, "")
    frame["difference"] = _differences(frame)
    groups = frame.groupby([*_PLACE, "settings"], sort=False)
    table = groups.agg(
        kept=("kept_density", "mean"),
        seeds=("seed", "size"),
        test=("test_accuracy", "mean"),
        test_spread=("test_accuracy", "std"),
        train=("train_accuracy", "mean"),
        test_error=("test_accuracy", "sem"),
        images=("images", lambda errors: errors.mean(skipna=False)),
        lead=("difference", "mean"),
        lead_error=("difference", "sem"),
    ).reset_index()
    table["test_error"] = table.test_error.fillna(table.pop("images"))
    table.insert(3, "kernel", [method(name).kernel for name in table.method])
    order = [row.Index for row in sorted(rows_of(table), key=_order)]
    return table.loc[order].reset_index(drop=True)


def reference(table: "pandas.DataFrame") -> str | None:
    """The scope of the random masks from which leads are counted, ERK before others.

    `None` where there are none.
    """
    scopes = {row.scope for row in rows_of(table) if row.method == "random"}
    return min(scopes, key=lambda scope: (scope != "erk", scope != "layer"), default=None)


def _differences(frame: "pandas.DataFrame") -> "pandas.Series":
    """The accuracy of each network above that of the random one of its seed, trained like it.

    That has a mask of the same kind, or a plain one where there is none and for random masks.
    """
    shared = ["dataset", "model", "density", "seed", "training"]
    place = frame.assign(training=[_training(settings) for settings in frame.settings])
    random = place[(frame.method == "random") & (frame.scope == reference(frame))]
    known = random.groupby([*shared, "mask"], as_index=False).test_accuracy.mean()
    plain = known[known["mask"] == ""].drop(columns="mask")
    find = lambda known, on: place[on].merge(known, how="left", on=on).test_accuracy.to_numpy()
    like, other = find(known, [*shared, "mask"]), find(plain, shared)
    itself = frame.index.isin(random.index)
    found = np.where(itself | np.isnan(like), other, like)
    return (frame.test_accuracy - found).where(~(itself & (frame["mask"] == "")))


def _training(settings: str) -> str:
    """The words on the training alone, without those on how the mask was found."""
    words = settings.split(", ")
    return ", ".join(w for w in words if not w.startswith(("transfer.", "scoring.")))


def rows_of(table: "pandas.DataFrame") -> list[Any]:
    """The rows of a table, its columns as their attributes."""
    return list(table.itertuples())


def line_in(row: Any) -> Line:
    """The line of figures to which a row of a table belongs."""
    return Line(row.method, row.scope, row.mask, row.settings)


def shown(table: "pandas.DataFrame") -> Cells:
    """The rows of `summarise` as text, columns that say nothing left out."""
    several = table.scope[table.method == "random"].nunique() > 1
    over = f"Over {Line('random', reference(table) or '', '').label(several)}"
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
            "Test accuracy (%)": [accuracy(row) for row in rows_of(table)],
            over: [_with_error(row.lead, row.lead_error, "+") for row in rows_of(table)],
            "Train accuracy (%)": [_with_error(row.train) for row in rows_of(table)],
            "Seeds": table.seeds.astype(str),
        }
    )
    text = text.replace("", _EMPTY)
    alike = [name for name in ("Dataset", "Model") if text[name].nunique() == 1]
    empty = [n for n in ("Mask", "Settings", over) if set(text[n]) == {_EMPTY}]
    apart = any(keeps_another_share(row.kept, row.density) for row in rows_of(table))
    asked = [] if apart else ["Kept"]
    text = text.drop(columns=alike + empty + asked)
    return list(text), text.to_numpy().tolist(), [name in (*_NUMBERS, over) for name in text]


def accuracy(row: Any) -> str:
    """The test accuracy of a row of `summarise`, with its standard error where that is known."""
    return _with_error(row.test, row.test_error)


def _with_error(value: float, error: float = math.nan, sign: str = "") -> str:
    if value != value:
        return _EMPTY
    return f"{value:{sign}.2f}" + ("" if error != error else f" ± {error:.2f}")


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
_NUMBERS = ("Density", "Kept", "Test accuracy (%)", "Train accuracy (%)", "Seeds")

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
    return (row.dataset, row.model, -row.density, line_in(row).order)
