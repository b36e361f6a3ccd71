"""The pages of docs/results: for each a text (`NAME.md`) and the numbers in it (`NAME.py`).

Numbers come from the files in benchmarks/results. What a sentence claims of them is checked where
they are made, so that text and data cannot part. `raw` has what all pages need, `rivals` the masks
that several show; other modules are pages of their own.
"""

import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from . import (
    cifar_10,
    few_channels,
    few_labels,
    index,
    many_tasks,
    other_training,
    published,
    same_share,
    search,
    shares,
    ultra_sparse,
)

PAGES: dict[str, Callable[[], Mapping[str, Any]]] = {
    "index": index.facts,
    "few-channels": few_channels.facts,
    "search": search.facts,
    "shares": shares.facts,
    "few-labels": few_labels.facts,
    "other-training": other_training.facts,
    "many-tasks": many_tasks.facts,
    "cifar-10": cifar_10.facts,
    "ultra-sparse": ultra_sparse.facts,
    "same-share": same_share.facts,
    "published": published.facts,
}
"""Name -> the numbers of a page, in the order in which they are read."""


def text(name: str) -> str:
    """A page with its numbers; raises `SystemExit` where the data contradict a sentence."""
    return (pathlib.Path(__file__).parent / f"{name}.md").read_text().format(**PAGES[name]())
