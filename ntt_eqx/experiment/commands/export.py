"""`ntt-eqx export`."""

import dataclasses
import json
import os
import typing
from pathlib import Path
from typing import Any, Literal

from tyro.conf import Positional

from ...export import ExportError, save_onnx, save_safetensors
from .._errors import ExperimentError
from ..images import Part
from ..model_file import LoadedModel
from ..progress import Display
from ..results import model_path
from .evaluate import images_of, load_own


@dataclasses.dataclass(frozen=True)
class Export:
    """Write a network from a file for other programs: safetensors or ONNX."""

    network: Positional[Path]  # model file, or directory of a run that holds one
    # `safetensors` stores indices and values of the weights that are kept, `safetensors-dense`
    # every weight; `onnx` runs everywhere, `onnx-sparse` is smaller and for onnxruntime. ONNX files
    # are first run on test images and compared
    format: Literal["safetensors", "safetensors-dense", "onnx", "onnx-sparse"] = "safetensors"
    out: Path | None = None  # file to write; left out, beside the network
    overwrite: bool = False  # replace the file if there is one
    # images to compare an ONNX file on; left out, those that the network's file names
    dataset: str | None = None
    model: str | None = None  # the network's code, if it is your own: package.module:Object
    data_dir: Path | None = None  # folder with datasets

    def run(self) -> int:
        """Write the network; returns the exit status."""
        path = model_path(self.network)
        loaded = load_own(path, self.model)
        kind, _, layout = typing.cast(Any, self.format.partition("-"))
        out, note = self.out or path.with_suffix(f".{kind}"), ""
        if not out.parent.is_dir():
            raise ExperimentError(f"out: the folder {out.parent} does not exist.")
        if out.resolve() == path.resolve():
            raise ExperimentError(f"out: {out} is the network itself; name another file.")
        if os.path.lexists(out) and not self.overwrite:
            raise ExperimentError(f"out: {out} exists; name another file, or add --overwrite.")
        try:
            if kind == "onnx":
                note = self._write_onnx(out, path, loaded, layout or "dense")
            else:
                names, layout = {"ntt_eqx": json.dumps(loaded.header)}, layout or "sparse"
                save_safetensors(out, loaded.model, layout=layout, metadata=names)
        except (ExportError, NotImplementedError) as error:
            raise ExperimentError(f"{path}: {error}") from error
        with Display() as display:
            display.say(
                f"{out}: {self.format}, {out.stat().st_size:,} bytes, "
                f"{100 * float(loaded.model.density()):.4g} % of the weights kept{note}"
            )
        return 0

    def _write_onnx(self, out: Path, path: Path, loaded: LoadedModel, layout: Any) -> str:
        images = images_of(path, loaded, self.dataset, self.data_dir, labels=False)
        x = Part(images, images.test).first(64).x
        difference = save_onnx(out, loaded.model, x, layout=layout)
        return f"; on {len(x)} test images its logits differ by {difference:.2g}"
