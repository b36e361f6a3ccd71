"""Downloads with a checked SHA-256, by pooch where that is installed."""

from pathlib import Path

from ._digest import check_digest
from ._errors import DatasetError
from ._sources import DatasetSpec, download_folder


def download(spec: DatasetSpec, data_dir: Path | None) -> Path:
    """Download the files of a dataset that are not there yet.

    They go to a folder with the dataset's name in `data_dir`, else in `$NTT_EQX_DATA`, else in the
    cache. A file is put in place only when it is whole and its SHA-256 is the published one; a
    file that is there already is kept.

    **Returns:**

    The folder.

    **Raises:**

    `DatasetError` when pooch is not installed, a file cannot be fetched, or its sum is wrong.
    """
    form = next((form for form in spec.formats if form.downloadable), None)
    if form is None:
        raise DatasetError(f"{spec.name}: has no files to download. {spec.hint}".rstrip())
    try:
        import pooch
    except ImportError as error:
        raise DatasetError(
            f"{spec.name}: not found, and the package `pooch`, which would download it, is not "
            f"installed. {how_to_get(spec)}"
        ) from error
    folder = download_folder(spec, data_dir)
    for file in form.files:
        assert file.url is not None
        name, sha256 = file.url.rsplit("/", 1)[-1], file.url_sha256 or file.digest
        if (folder / name).exists():  # never replaced: it may be the user's own
            check_digest(folder / name, sha256)
            continue
        try:
            pooch.retrieve(file.url, known_hash=f"sha256:{sha256}", fname=name, path=folder)
        except Exception as error:  # requests', urllib's, pooch's own: any means no file
            raise DatasetError(
                f"{spec.name}: downloading {file.url} to {folder} failed ({error}). "
                f"{how_to_get(spec)}"
            ) from error
    return folder


def how_to_get(spec: DatasetSpec) -> str:
    """A sentence that says which files to put where."""
    form = spec.formats[0]
    names = ", ".join((*file.variants, file.name)[0] for file in form.files)
    text = f"Put {names} into a folder and name it by `data_dir` or $NTT_EQX_DATA."
    return f"{text} {spec.hint}".rstrip()
