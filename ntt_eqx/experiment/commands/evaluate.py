"""`ntt-eqx evaluate`."""

import dataclasses
import json
from pathlib import Path

from tyro.conf import Positional

from ...data import Dataset
from ...data._registry import published_classes
from .._errors import ExperimentError
from ..images import (
    StandardisedSplit,
    check_dataset,
    check_labelled,
    check_network,
    shelf_of,
    standardised_for,
)
from ..model_file import LoadedModel, load_model
from ..own import enter
from ..results import model_path


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """Test a network from a file."""

    network: Positional[Path]  # model file, or directory of a run that holds one
    # images to test on, standardised as those of the training; left out, those that the file names
    dataset: str | None = None
    model: str | None = None  # the network's code, if it is your own: package.module:Object
    data_dir: Path | None = None  # folder with datasets
    json: bool = False  # print one JSON object instead of text

    def run(self) -> int:
        """Test the network; returns the exit status."""
        path = model_path(self.network)
        loaded = load_own(path, self.model)
        images = images_of(path, loaded, self.dataset, self.data_dir)
        check_labelled(images)
        _check_classes(path, loaded, images)
        scores = StandardisedSplit(images, images.test).evaluate(loaded.model)
        found = {
            "network": str(path),
            "dataset": images.name,
            "density": float(loaded.model.density()),
            "test_accuracy": scores["accuracy"],
            "test_loss": scores["loss"],
            "images": len(images.test),
        }
        said = (
            f"{path}: {loaded.header['model']} at density {found['density']:.4g}, "
            f"{len(images.test)} test images of {images.name}: accuracy "
            f"{100 * scores['accuracy']:.2f} %, loss {scores['loss']:.4f}"
        )
        print(json.dumps(found) if self.json else said)
        return 0


def _check_classes(path: Path, loaded: LoadedModel, images: Dataset) -> None:
    """Raise `ExperimentError` if the labels number other classes than the network's outputs do."""
    trained = loaded.header.get("dataset") or images.name
    known, asked = published_classes(trained), published_classes(images.name)
    if known is not None and asked is not None and asked != known[: len(asked)]:
        raise ExperimentError(
            f"{path}: its outputs are for the classes {', '.join(map(str, known))} of "
            f"{trained}, but {images.name} numbers {', '.join(map(str, asked))} from 0."
        )


def load_own(path: Path, model: str | None) -> LoadedModel:
    """Read a network, of the architecture in code of one's own if `model` names that."""
    name = None if model is None else enter("model", model)
    loaded = load_model(path)
    if name not in (None, loaded.header["model"]):
        raise ExperimentError(f"{path}: is a {loaded.header['model']}, not a {name}; see --model.")
    return loaded


def images_of(
    path: Path,
    loaded: LoadedModel,
    name: str | None,
    data_dir: Path | None,
    *,
    labels: bool = True,
) -> Dataset:
    """The images called `name`, or those that a network's file names, checked to suit it.

    They are standardised like those on which the network was trained.
    """
    # a file may name code, but only the command may have it run
    name = enter("dataset", name) if name else loaded.header.get("dataset")
    if not isinstance(name, str):
        raise ExperimentError(f"{path}: does not name a dataset; give one with --dataset.")
    check_dataset(name)
    images = shelf_of(data_dir)(name)
    check_network(path, loaded.header, images, labels=labels)
    return standardised_for(path, loaded.header, images)
