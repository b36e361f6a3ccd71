"""Datasets by name: load one, list all, fetch one ahead of its use."""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path

from ._cifar import CIFAR10, CIFAR100
from ._dataset import Dataset, check_classes, make_dataset, select_classes, unite
from ._download import download as download_files, how_to_get
from ._errors import DatasetError
from ._mnist import FASHION_MNIST, FASHION_MNIST_MINI, MNIST
from ._npy import load_npy_folder
from ._sources import DatasetSpec, Found, find, search_places
from ._svhn import SVHN

DATASETS: Mapping[str, DatasetSpec] = {
    spec.name: spec for spec in (FASHION_MNIST_MINI, FASHION_MNIST, MNIST, CIFAR10, CIFAR100, SVHN)
}
"""The published datasets by name."""


@dataclasses.dataclass(frozen=True)
class DatasetInfo:
    """One dataset in the list of `list_datasets`.

    Attributes:
        name: the name to load it by.
        input_shape: `(C, H, W)`.
        num_classes: the number of classes.
        num_train: samples in the train split.
        num_test: samples in the test split.
        location: the folder where a complete set of files is, or `None`.
        searched: the folders that were looked in, in their order.
        problem: what is wrong or missing when `location` is `None`, else an empty string.
    """

    name: str
    input_shape: tuple[int, ...]
    num_classes: int
    num_train: int
    num_test: int
    location: Path | None
    searched: tuple[Path, ...]
    problem: str

    @property
    def available(self) -> bool:
        """Whether `load_dataset` needs no network for it."""
        return self.location is not None


def load_dataset(
    name: str,
    data_dir: str | os.PathLike[str] | None = None,
    *,
    download: bool = True,
    verify: bool = True,
) -> Dataset:
    """Load a dataset into memory.

    Its files are looked for in `data_dir`, in `$NTT_EQX_DATA`, in the folder of Debian's package
    `dataset-fashion-mnist` and in the download cache, in this order; each of the first two may hold
    them directly or in a folder with the dataset's name. Each file of MNIST and Fashion-MNIST may
    be gzipped or plain. What is found nowhere is downloaded.

    **Arguments:**

    - `name`: a key of `DATASETS`. With `:0,1` behind it, only these classes, relabelled from 0;
      with `:0,1:250`, the first 250 train samples of each and at most as many test samples. Two
      names joined by `+` give their label-free union. `npy:FOLDER` is your own data: a folder with
      `train_x.npy` and `test_x.npy` (uint8 or floating-point, `[N, C, H, W]` or a table `[N, F]`)
      and, for labels,
      `train_y.npy` and `test_y.npy` (integers, `[N]`).
    - `data_dir`: a folder to look in first.
    - `download`: whether the network may be used.
    - `verify`: `False` accepts files of the right format whose contents are not the published
      ones, of any number of samples.

    **Returns:**

    A `Dataset`.

    **Raises:**

    `DatasetError` for an unknown name, absent or incomplete files, and files that are truncated,
    of another format, or of the wrong checksum; the message names the file.
    """
    if name.startswith("npy:"):
        return load_npy_folder(Path(name[4:]).expanduser())
    folder = None if data_dir is None else Path(data_dir).expanduser()
    datasets = []
    for part in _parse(name):
        dataset = _load(part.spec, folder, download, verify)
        if part.classes is not None:
            dataset = select_classes(dataset, part.classes, per_class=part.per_class)
        datasets.append(dataset)
    return datasets[0] if len(datasets) == 1 else unite(*datasets)


def check_dataset_name(name: str) -> None:
    """Raise unless `load_dataset` knows what `name` means; looks at no file.

    **Arguments:**

    - `name`: what one would give to `load_dataset`.

    **Raises:**

    `DatasetError` for an unknown dataset or classes that it does not have.
    """
    if not name.startswith("npy:"):
        _parse(name)


def published_classes(name: str) -> tuple[int, ...] | None:
    """The published label of each class of a dataset, which `NAME:3,5` numbers from 0.

    `None` for data of one's own and for unions, whose classes have no published labels.
    """
    if "+" in name or name.partition(":")[0] not in DATASETS:
        return None
    (part,) = _parse(name)
    return part.classes or tuple(range(part.spec.num_classes))


def list_datasets(data_dir: str | os.PathLike[str] | None = None) -> list[DatasetInfo]:
    """List every dataset in `DATASETS` and its location, without reading a file.

    **Arguments:**

    - `data_dir`: a folder to look in first.

    **Returns:**

    One `DatasetInfo` for each.
    """
    folder = None if data_dir is None else Path(data_dir).expanduser()
    return [_info(spec, folder) for spec in DATASETS.values()]


def prepare_dataset(name: str, data_dir: str | os.PathLike[str] | None = None) -> DatasetInfo:
    """Make sure that a dataset is there and whole: download it if need be, and read it once.

    **Arguments:**

    - `name`, `data_dir`: those of `load_dataset`; a plain name of `DATASETS`.

    **Returns:**

    The `DatasetInfo` that tells where it is.

    **Raises:**

    `DatasetError`, like `load_dataset`.
    """
    load_dataset(name, data_dir)
    return _info(_spec(name), None if data_dir is None else Path(data_dir).expanduser())


@dataclasses.dataclass(frozen=True)
class _Part:
    """One dataset of a name such as `mnist:0,1:250`."""

    spec: DatasetSpec
    classes: tuple[int, ...] | None
    per_class: int | None


def _parse(name: str) -> list[_Part]:
    parts = []
    for text in name.split("+"):
        base, _, choice = text.partition(":")
        spec, classes, per_class = _spec(base), None, None
        if choice:
            labels, _, limit = choice.partition(":")
            try:
                classes = tuple(int(label) for label in labels.split(","))
                per_class = int(limit) if limit else None
            except ValueError as error:
                raise DatasetError(
                    f"load_dataset: {choice!r} does not choose classes of {base}; "
                    "write NAME:0,1 or NAME:0,1:250."
                ) from error
            check_classes(base, spec.num_classes, classes)
        parts.append(_Part(spec, classes, per_class))
    if len(parts) > 2:
        raise DatasetError(f"load_dataset: {name!r} unites more than two datasets.")
    return parts


def _spec(name: str) -> DatasetSpec:
    if name not in DATASETS:
        raise DatasetError(
            f"load_dataset: unknown dataset {name!r}; known are {', '.join(DATASETS)}, two of "
            "them joined by +, and npy:FOLDER."
        )
    return DATASETS[name]


def _load(spec: DatasetSpec, folder: Path | None, download: bool, verify: bool) -> Dataset:
    found = find(spec, folder, completing=download)
    if found is None and download and spec.bundled is None:
        download_files(spec, folder)
        found = find(spec, folder)
    if found is None:
        places = ", ".join(map(str, search_places(spec, folder)))
        raise DatasetError(f"{spec.name}: not found in {places}. {how_to_get(spec)}")
    return read_found(spec, found, verify=verify)


def read_found(spec: DatasetSpec, found: Found, *, verify: bool) -> Dataset:
    """Read a complete set of files and check it against what is published."""
    digests = {file.name: file.digest if verify else None for file in found.format.files}
    train, test = found.format.read(found.paths, digests)
    sizes, expected = (len(train), len(test)), (spec.num_train, spec.num_test)
    if verify and sizes != expected:
        raise DatasetError(
            f"{found.folder}: holds {sizes[0]} train and {sizes[1]} test samples; "
            f"{spec.name} has {expected[0]} and {expected[1]}."
        )
    return make_dataset(spec.name, train, test, spec.num_classes)


def _info(spec: DatasetSpec, folder: Path | None) -> DatasetInfo:
    found, problem, places = None, "", []
    try:
        places = search_places(spec, folder)
        found = find(spec, folder)
        problem = "" if found else "not found"
    except DatasetError as error:
        problem = str(error)
    return DatasetInfo(
        name=spec.name,
        input_shape=spec.input_shape,
        num_classes=spec.num_classes,
        num_train=spec.num_train,
        num_test=spec.num_test,
        location=found.folder if found else None,
        searched=tuple(places),
        problem=problem,
    )
