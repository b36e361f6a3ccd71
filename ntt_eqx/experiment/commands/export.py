"""`ntt-eqx export`."""

import dataclasses
import json
import os
import typing
from pathlib import Path
from typing import Any, Literal

from tyro.conf import Positional

from ...export import (
    ExportError,
    save_numpy,
    save_onnx,
    save_runner,
    save_safetensors,
    save_stablehlo,
)
from .._errors import ExperimentError
from ..images import StandardisedSplit
from ..model_file import LoadedModel
from ..progress import Display
from ..results import model_path
from .evaluate import images_of, load_own

Format = Literal[
    "numpy", "onnx", "onnx-sparse", "onnx-int8", "stablehlo", "safetensors", "safetensors-dense"
]

_ENDS = {"numpy": ".npz", "onnx": ".onnx", "stablehlo": ".stablehlo", "safetensors": ".safetensors"}
_IMAGES = 64  # to compare a file on


@dataclasses.dataclass(frozen=True)
class Export:
    """Write a network from a file for other programs."""

    network: Positional[Path]  # model file, or directory of a run that holds one
    # `numpy` runs on NumPy and SciPy alone, with sparse weights, by numpy_runner.py, which is
    # written beside it; `onnx` runs everywhere, `onnx-sparse` is smaller and for onnxruntime,
    # `onnx-int8` has weights of 8 bits; `stablehlo` is for XLA. All of these are first run on test
    # images and compared. `safetensors` stores indices and values of the weights that are kept,
    # `safetensors-dense` every weight, both in the shapes of the architecture
    format: Format = "safetensors"
    out: Path | None = None  # file to write; left out, beside the network
    overwrite: bool = False  # replace the file if there is one
    compact: bool = True  # keep what cannot matter, too
    measure: bool = True  # do not time 1 and 64 images, beside the network with all weights
    # images to compare a file on; left out, those that the network's file names
    dataset: str | None = None
    model: str | None = None  # the network's code, if it is your own: package.module:Object
    data_dir: Path | None = None  # folder with datasets

    def run(self) -> int:
        """Write the network; returns the exit status."""
        path = model_path(self.network)
        loaded = load_own(path, self.model)
        kind, _, layout = typing.cast(Any, self.format.partition("-"))
        out = self.out or path.with_suffix(_ENDS[kind])
        if not out.parent.is_dir():
            raise ExperimentError(f"out: the folder {out.parent} does not exist.")
        if out.resolve() == path.resolve():
            raise ExperimentError(f"out: {out} is the network itself; name another file.")
        runner = out.with_name("numpy_runner.py") if kind == "numpy" else None
        for file in (out, runner):
            if file is not None and os.path.lexists(file) and not self.overwrite:
                raise ExperimentError(f"out: {file} exists; name another file, or add --overwrite.")
        note = ""
        try:
            if kind == "safetensors":
                names, layout = {"ntt_eqx": json.dumps(loaded.header)}, layout or "sparse"
                save_safetensors(out, loaded.model, layout=layout, metadata=names)
                note = f": {out.stat().st_size:,} bytes"
            else:
                note = self._write(out, path, loaded, kind, layout)
            if runner is not None:
                save_runner(runner)
                note += f"; {runner.name} runs it"
        except (ExportError, NotImplementedError) as error:
            raise ExperimentError(f"{path}: {error}") from error
        with Display() as display:
            display.say(
                f"{out}: {self.format}, {100 * float(loaded.model.density()):.4g} % of the weights "
                f"kept{note}"
            )
        return 0

    def _write(self, out: Path, path: Path, loaded: LoadedModel, kind: str, layout: str) -> str:
        images = images_of(path, loaded, self.dataset, self.data_dir, labels=False)
        x = StandardisedSplit(images, images.test).first(_IMAGES).x
        options: dict[str, Any] = {"compact": self.compact, "measure": self.measure}
        if kind == "onnx":
            options |= {"layout": "sparse"} if layout == "sparse" else {}
            options |= {"quantise": "dynamic"} if layout == "int8" else {}
        save = {"numpy": save_numpy, "onnx": save_onnx, "stablehlo": save_stablehlo}[kind]
        return f": {save(out, loaded.model, x, **options)} on {len(x)} test images"
