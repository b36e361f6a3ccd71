"""The locations and the checksums of the datasets' files."""

import dataclasses
import os
from collections.abc import Callable, Mapping
from pathlib import Path

from ._dataset import Split
from ._errors import DatasetError

Digests = Mapping[str, str | None]
Splits = tuple[Split, Split]


@dataclasses.dataclass(frozen=True)
class DataFile:
    """One published file.

    Attributes:
        name: its name on disk.
        digest: the digest that its reader checks: hexadecimal SHA-256, or `md5:` and an MD5 where
            no other is published; of the uncompressed content for IDX files.
        variants: other names it may have, such as the gzipped one.
        url: where it can be downloaded, or `None`.
        url_sha256: the SHA-256 of what the URL gives, when that is not `digest`.
    """

    name: str
    digest: str
    variants: tuple[str, ...] = ()
    url: str | None = None
    url_sha256: str | None = None


@dataclasses.dataclass(frozen=True)
class DataFormat:
    """One way in which a dataset is published.

    Attributes:
        files: all files that it takes.
        folders: where these lie within a data folder, in the order in which they are tried.
        read: `(path of each file by name, digest of each or None, sizes or None) -> splits`.
    """

    files: tuple[DataFile, ...]
    folders: tuple[str, ...]
    read: Callable[[Mapping[str, Path], Digests], Splits]

    @property
    def downloadable(self) -> bool:
        """Whether every file has a URL."""
        return all(file.url is not None for file in self.files)


@dataclasses.dataclass(frozen=True)
class DatasetSpec:
    """A published dataset.

    Attributes:
        name: its name in `DATASETS`.
        input_shape: `(C, H, W)`.
        num_classes: the number of classes.
        num_train: samples in the train split.
        num_test: samples in the test split.
        formats: the ways in which it is published, the preferred one first.
        system_folders: folders of operating-system packages that hold it.
        bundled: the folder of this package that holds it, in which case no other is looked at.
        hint: how to get it without a download, for messages.
    """

    name: str
    input_shape: tuple[int, int, int]
    num_classes: int
    num_train: int
    num_test: int
    formats: tuple[DataFormat, ...]
    system_folders: tuple[Path, ...] = ()
    bundled: Path | None = None
    hint: str = ""


@dataclasses.dataclass(frozen=True)
class Found:
    """A complete set of files.

    Attributes:
        format: what they are.
        folder: where they are.
        paths: the path of each, by the name of its `DataFile`.
    """

    format: DataFormat
    folder: Path
    paths: Mapping[str, Path]


def find(spec: DatasetSpec, data_dir: Path | None, *, completing: bool = False) -> Found | None:
    """The first complete set of files of a dataset, or `None`.

    Looks in `data_dir`, `$NTT_EQX_DATA`, the folders of system packages and the download cache.

    **Arguments:**

    - `spec`: the dataset.
    - `data_dir`: the folder to look in first.
    - `completing`: whether a download may complete what is in the folder that it goes to.

    **Raises:**

    `DatasetError` when no place has all files but one has some of them.
    """
    incomplete = None
    completed = download_folder(spec, data_dir) if completing else None
    for place in search_places(spec, data_dir):
        for form in spec.formats:
            for folder in dict.fromkeys(place / name for name in form.folders):
                paths = {file.name: _existing(folder, file) for file in form.files}
                present = {name: path for name, path in paths.items() if path is not None}
                if len(present) == len(paths):
                    return Found(form, folder, present)
                if present and incomplete is None and folder != completed:
                    missing = next(name for name, path in paths.items() if path is None)
                    incomplete = f"{spec.name}: {folder / missing} is missing."
    if incomplete is not None:
        raise DatasetError(incomplete)
    return None


def search_places(spec: DatasetSpec, data_dir: Path | None) -> list[Path]:
    """The folders that `find` looks in, in their order.

    **Raises:**

    `DatasetError` when `data_dir` is not a folder.
    """
    if spec.bundled is not None:
        return [spec.bundled]
    if data_dir is not None and not data_dir.is_dir():
        raise DatasetError(f"{spec.name}: the data folder {data_dir} does not exist.")
    named = [data_dir, environment_folder(), *spec.system_folders, cache_folder()]
    return [place for place in named if place is not None]


def download_folder(spec: DatasetSpec, data_dir: Path | None) -> Path:
    """The folder of downloads: within `data_dir`, else `$NTT_EQX_DATA`, else the cache."""
    return (data_dir or environment_folder() or cache_folder()) / spec.name


def environment_folder() -> Path | None:
    """The folder that `$NTT_EQX_DATA` names, if any."""
    name = os.environ.get("NTT_EQX_DATA")
    return Path(name).expanduser() if name else None


def cache_folder() -> Path:
    """The folder `ntt-eqx` in the user's cache."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "ntt-eqx"


def _existing(folder: Path, file: DataFile) -> Path | None:
    candidates = (folder / name for name in (file.name, *file.variants))
    return next((path for path in candidates if path.is_file()), None)
