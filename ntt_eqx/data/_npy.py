"""The user's own data: a folder of `.npy` arrays."""

from pathlib import Path

import numpy as np

from ._dataset import Dataset, Split, make_dataset
from ._errors import DatasetError

_SLACK = 10  # classes without a sample, beside as many as there are labels


def load_npy_folder(folder: Path) -> Dataset:
    """Load `train_x.npy` and `test_x.npy`, with labels in `train_y.npy` and `test_y.npy`.

    Samples are uint8 pixels or floating-point features of any shape `[N, ...]` (`[N, C, H, W]`
    for images, `[N, F]` for a table), labels integers `[N]`, of which the largest tells the number
    of classes: at most 10 more than twice as many as there are different labels. Without the two
    label files the set is label-free, for transfer only. Samples are mapped from disk, not read
    into memory.

    **Arguments:**

    - `folder`: where the files are.

    **Raises:**

    `DatasetError` that names the file when one is missing, damaged, or of another shape or type;
    an array of Python objects, which would need unpickling, is refused.
    """
    if not folder.is_dir():
        raise DatasetError(f"{folder}: is not a folder.")
    labelled = (folder / "train_y.npy").exists() or (folder / "test_y.npy").exists()
    train, test = (_read_split(folder, part, labelled) for part in ("train", "test"))
    num_classes = 1 + max(int(split.y.max(initial=-1)) for split in (train, test))
    found = len(np.unique(np.concatenate([train.y, test.y])))
    if labelled and num_classes > 2 * found + _SLACK:
        raise DatasetError(
            f"{folder / 'train_y.npy'}: {found} different labels, of which the largest is "
            f"{num_classes - 1}, would make {num_classes} classes. Number the labels from 0: "
            "np.unique(y, return_inverse=True)[1], of both splits together; or name the number of "
            "classes to ntt.data.make_dataset."
        )
    name = f"npy:{folder}"
    return make_dataset(name, train, test, num_classes, labelled=labelled)


def _read_split(folder: Path, part: str, labelled: bool) -> Split:
    path = folder / f"{part}_x.npy"
    x = _read_array(path, mapped=True)
    if x.dtype != np.uint8 and not np.issubdtype(x.dtype, np.floating) or x.ndim < 2:
        raise DatasetError(
            f"{path}: samples must be uint8 or floating-point [N, ...], got {x.dtype} {x.shape}."
        )
    if not labelled:
        return Split(x, np.full(len(x), -1, np.int32))
    path = folder / f"{part}_y.npy"
    y = _read_array(path, mapped=False)
    if not np.issubdtype(y.dtype, np.integer) or y.shape != x.shape[:1]:
        raise DatasetError(
            f"{path}: labels must be integers of shape ({len(x)},), got {y.dtype} {y.shape}."
        )
    if y.size and not 0 <= int(y.min()) <= int(y.max()) < 2**31 - 1:
        raise DatasetError(f"{path}: labels reach from {y.min()} to {y.max()}.")
    return Split(x, y.astype(np.int32))


def _read_array(path: Path, *, mapped: bool) -> np.ndarray:
    try:
        array = np.load(path, mmap_mode="r" if mapped else None, allow_pickle=False)
    except Exception as error:  # NumPy raises many kinds for a broken header
        raise DatasetError(f"{path}: cannot be read as a .npy array ({error}).") from error
    if not isinstance(array, np.ndarray):
        array.close()
        raise DatasetError(f"{path}: is a .npz archive, not a .npy array.")
    return array
