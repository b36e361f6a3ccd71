"""SVHN, the cropped street-view house numbers, from its MAT-files."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ._dataset import Split
from ._digest import check_digest
from ._errors import DatasetError
from ._mat5 import read_mat5
from ._sources import DataFile, DataFormat, DatasetSpec, Digests, Splits

_TRAIN, _TEST = "train_32x32.mat", "test_32x32.mat"


def read_svhn(paths: Mapping[str, Path], digests: Digests) -> Splits:
    """Read `X[H, W, C, N]` and `y[N, 1]` of both files; the label 10 stands for the digit 0."""
    for name, path in paths.items():
        check_digest(path, digests[name])
    return _read(paths[_TRAIN]), _read(paths[_TEST])


def _read(path: Path) -> Split:
    arrays = read_mat5(path)
    if "X" not in arrays or "y" not in arrays:
        raise DatasetError(f"{path}: truncated or foreign, it lacks the variable X or y.")
    x, y = arrays["X"], arrays["y"]
    if x.dtype != np.uint8 or x.ndim != 4 or x.shape[:3] != (32, 32, 3):
        raise DatasetError(f"{path}: X is {x.dtype} {x.shape}, expected uint8 (32, 32, 3, N).")
    if y.shape != (x.shape[3], 1):
        raise DatasetError(f"{path}: y has shape {y.shape} for {x.shape[3]} images.")
    if not np.all(np.isin(y, np.arange(1, 11))):
        raise DatasetError(f"{path}: y holds labels outside of 1 to 10.")
    labels = y[:, 0].astype(np.int32) % np.int32(10)
    return Split(np.ascontiguousarray(x.transpose(3, 2, 0, 1)), labels)


SVHN = DatasetSpec(
    name="svhn",
    input_shape=(3, 32, 32),
    num_classes=10,
    num_train=73_257,
    num_test=26_032,
    formats=(
        DataFormat(
            files=(
                DataFile(
                    _TRAIN,
                    "435e94d69a87fde4fd4d7f3dd208dfc32cb6ae8af2240d066de1df7508d083b8",
                    url=f"http://ufldl.stanford.edu/housenumbers/{_TRAIN}",
                ),
                DataFile(
                    _TEST,
                    "cdce80dfb2a2c4c6160906d0bd7c68ec5a99d7ca4831afa54f09182025b6a75b",
                    url=f"http://ufldl.stanford.edu/housenumbers/{_TEST}",
                ),
            ),
            folders=("svhn", "SVHN", ""),
            read=read_svhn,
        ),
    ),
)
