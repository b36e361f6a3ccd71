"""`ntt-eqx export`: a network from a file in a format that other programs read."""

import dataclasses
import json
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from ..export import ExportError, save_onnx, save_safetensors
from ._errors import ExperimentError, MissingExtra
from .images import ImageShelf
from .model_file import LoadedModel, load_model
from .progress import make_display
from .results import MODEL, TRANSFERRED


@dataclasses.dataclass(frozen=True)
class Export:
    """Write a network from a file for other programs: safetensors or ONNX.

    Attributes:
        network: model file, or directory of a run that holds one.
        format: `safetensors` stores indices and values of the weights that are kept,
            `safetensors-dense` every weight; `onnx` runs everywhere, `onnx-sparse` is smaller and
            for onnxruntime. ONNX files are first run on test images and compared.
        out: file to write; left out, beside the network.
        dataset: images to compare an ONNX file on; left out, those that the network's file names.
        data_dir: folder with datasets.
    """

    network: Positional[Path]
    format: Literal["safetensors", "safetensors-dense", "onnx", "onnx-sparse"] = "safetensors"
    out: Path | None = None
    dataset: str | None = None
    data_dir: Path | None = None


def export_network(options: Export) -> int:
    """Write a network for other programs; returns the exit status."""
    path = _network_path(options.network)
    loaded = load_model(path)
    kind, _, layout = options.format.partition("-")
    out = options.out or path.with_suffix(f".{kind}")
    if not out.parent.is_dir():
        raise ExperimentError(f"out: the folder {out.parent} does not exist.")
    if out.resolve() == path.resolve():
        raise ExperimentError(f"out: {out} is the network itself; name another file.")
    try:
        if kind == "onnx":
            note = _write_onnx(out, path, loaded, layout == "sparse", options)
        else:
            names = {"ntt_eqx": json.dumps(loaded.header)}
            layout = "dense" if layout else "sparse"
            save_safetensors(out, loaded.model, layout=layout, metadata=names)
            note = ""
    except ImportError as error:
        raise MissingExtra(str(error), name=error.name) from None
    except (ExportError, NotImplementedError) as error:
        raise ExperimentError(f"{path}: {error}") from error
    with make_display() as display:
        kept = float(loaded.model.density())
        display.say(
            f"{out}: {options.format}, {out.stat().st_size:,} bytes, "
            f"{100 * kept:.4g} % of the weights kept{note}"
        )
    return 0


def _write_onnx(out: Path, path: Path, loaded: LoadedModel, sparse: bool, options: Export) -> str:
    name = options.dataset or loaded.header.get("dataset")
    if not isinstance(name, str):
        raise ExperimentError(f"{path}: does not name a dataset; give --dataset.")
    images = ImageShelf(options.data_dir).load(name)
    images.check_network(path, loaded.header, labels=False)
    x = images.test.first(64).x
    layout = "sparse" if sparse else "dense"
    difference = save_onnx(out, loaded.model, x, layout=layout)
    return f"; on {len(x)} test images its logits differ by {difference:.2g}"


def _network_path(path: Path) -> Path:
    if not path.is_dir():
        return path
    for name in (MODEL, TRANSFERRED):
        if (path / name).is_file():
            return path / name
    raise ExperimentError(f"{path}: no model file in this directory; expected {MODEL}.")
