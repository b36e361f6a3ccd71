"""`ntt-eqx evaluate`."""

import dataclasses
import json
from pathlib import Path

from tyro.conf import Positional

from .._errors import ExperimentError
from ..images import Images, ImageShelf, check_dataset
from ..model_file import LoadedModel, load_model
from ..results import model_path


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """Test a network from a file."""

    network: Positional[Path]  # model file, or directory of a run that holds one
    dataset: str | None = None  # images to test on; left out, those that the file names
    data_dir: Path | None = None  # folder with datasets
    json: bool = False  # print one JSON object instead of text

    def run(self) -> int:
        """Test the network; returns the exit status."""
        path = model_path(self.network)
        loaded = load_model(path)
        images = images_of(path, loaded, self.dataset, self.data_dir)
        images.check_labelled()
        scores = images.test.evaluate(loaded.model)
        found = {
            "network": str(path),
            "dataset": images.name,
            "density": float(loaded.model.density()),
            "test_accuracy": scores["accuracy"],
            "test_loss": scores["loss"],
            "images": images.test.size,
        }
        if self.json:
            print(json.dumps(found))
            return 0
        print(
            f"{path}: {loaded.header['model']} at density {found['density']:.4g}, "
            f"{images.test.size} test images of {images.name}: accuracy "
            f"{100 * scores['accuracy']:.2f} %, loss {scores['loss']:.4f}"
        )
        return 0


def images_of(
    path: Path,
    loaded: LoadedModel,
    name: str | None,
    data_dir: Path | None,
    *,
    labels: bool = True,
) -> Images:
    """The images called `name`, or those that a network's file names, checked to suit it."""
    name = name or loaded.header.get("dataset")
    if not isinstance(name, str):
        raise ExperimentError(f"{path}: does not name a dataset; give one with --dataset.")
    check_dataset(name)
    images = ImageShelf(data_dir).load(name)
    images.check_network(path, loaded.header, labels=labels)
    return images
