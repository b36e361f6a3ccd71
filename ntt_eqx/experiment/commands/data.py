"""`ntt-eqx data`."""

import dataclasses
from pathlib import Path

from tyro.conf import Positional

from ...data import DATASETS, list_datasets, prepare_dataset
from .._errors import check_choice
from ..progress import Display

_WHERE = """\
Searched: --data-dir, $NTT_EQX_DATA, folders of system packages, the download cache. \
`ntt-eqx data NAME` fetches and checks one.
NAME:0,1 keeps two classes, NAME:0,1:250 the first 250 images of each; NAME+OTHER is the \
label-free union, for --transfer.dataset."""


@dataclasses.dataclass(frozen=True)
class Data:
    """List the datasets and where they are; with names, fetch and check them."""

    # datasets to prepare: found, or downloaded with a checked SHA-256, and read once
    names: Positional[tuple[str, ...]] = ()
    data_dir: Path | None = None  # folder with datasets

    def run(self) -> int:
        """List or prepare datasets; returns the exit status."""
        with Display() as display:
            for name in self.names:
                check_choice("dataset", name, DATASETS)
                display.say(f"{name}: looking for its files, downloading them if need be")
                info = prepare_dataset(name, self.data_dir)
                display.say(f"{name}: whole, in {info.location}")
            if self.names:
                return 0
            body, notes = [], []
            for info in list_datasets(self.data_dir):
                shape = " x ".join(map(str, info.input_shape))
                where = str(info.location) if info.available else "not here"
                sizes = (f"{info.num_train:,}", f"{info.num_test:,}", str(info.num_classes))
                body.append([info.name, shape, *sizes, where])
                if not info.available and info.problem != "not found":
                    notes.append(f"{info.name}: {info.problem}")
            header = ["Dataset", "Shape", "Train", "Test", "Classes", "Where"]
            display.table((header, body, [False, False, True, True, True, False]))
            for note in (*notes, _WHERE):
                display.say(note)
        return 0
