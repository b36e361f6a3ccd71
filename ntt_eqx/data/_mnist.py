"""MNIST, Fashion-MNIST and the part of the latter that comes with the package, as IDX files."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ._dataset import Split
from ._errors import DatasetError
from ._idx import read_idx
from ._sources import DataFile, DataFormat, DatasetSpec, Digests, Splits

_NAMES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


def read_mnist(paths: Mapping[str, Path], digests: Digests) -> Splits:
    """Read the four IDX files into train and test splits with images `[N, 1, H, W]`."""
    images, labels, test_images, test_labels = _NAMES
    train = _read_pair(paths, digests, images, labels)
    return train, _read_pair(paths, digests, test_images, test_labels)


def _read_pair(paths: Mapping[str, Path], digests: Digests, images: str, labels: str) -> Split:
    x = read_idx(paths[images], 3, sha256=digests[images])
    y = read_idx(paths[labels], 1, sha256=digests[labels])
    if len(x) != len(y):
        raise DatasetError(
            f"{paths[labels]}: holds {len(y)} labels for the {len(x)} images of {paths[images]}."
        )
    return Split(x[:, None], y.astype(np.int32))


def _idx_format(
    contents: tuple[str, ...],
    folders: tuple[str, ...],
    url: str | None = None,
    zipped: tuple[str | None, ...] = (None,) * 4,
) -> DataFormat:
    """The four files with the SHA-256 of their contents and of their published .gz files."""
    files = tuple(
        DataFile(name, content, _other_names(name), url and f"{url}{name}.gz", gz)
        for name, content, gz in zip(_NAMES, contents, zipped, strict=True)
    )
    return DataFormat(files, folders, read_mnist)


def _other_names(name: str) -> tuple[str, ...]:
    """Gzipped, and with the dot that some programs write when they unpack the published files."""
    dotted = name.replace("-idx", ".idx")
    return f"{name}.gz", dotted, f"{dotted}.gz"


MNIST = DatasetSpec(
    name="mnist",
    input_shape=(1, 28, 28),
    num_classes=10,
    num_train=60_000,
    num_test=10_000,
    formats=(
        _idx_format(
            contents=(
                "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
                "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
                "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
                "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
            ),
            folders=("mnist", "MNIST/raw", "MNIST", ""),
            url="https://storage.googleapis.com/cvdf-datasets/mnist/",
            zipped=(
                "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
                "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
                "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
                "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
            ),
        ),
    ),
)

FASHION_MNIST = DatasetSpec(
    name="fashion-mnist",
    input_shape=(1, 28, 28),
    num_classes=10,
    num_train=60_000,
    num_test=10_000,
    formats=(
        _idx_format(
            contents=(
                "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
                "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
                "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
                "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
            ),
            folders=("fashion-mnist", "FashionMNIST/raw", "FashionMNIST", ""),
            url=(
                "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/"
                "data/fashion/"
            ),
            zipped=(
                "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
                "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
                "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
                "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
            ),
        ),
    ),
    system_folders=(Path("/usr/share/datasets/fashion-mnist"),),
    hint="On Debian and Ubuntu, `apt install dataset-fashion-mnist` installs it.",
)

FASHION_MNIST_MINI = DatasetSpec(
    name="fashion-mnist-mini",
    input_shape=(1, 28, 28),
    num_classes=10,
    num_train=6_000,
    num_test=1_000,
    formats=(
        _idx_format(
            contents=(
                "6dded81672539b5d148c1a85358069d1808c316dc6f6c0abfd12ba3ced5dd394",
                "d7c464914ae4b919728c5c99c3cdde5a0259febf1e99ddc6927a15768731d7dc",
                "7a6d8e07ea021ec5bc73135ebd0a5770799557ec6f8242d8749c4f32a3cf4643",
                "b40abac7ec8228f434940f579deb7cf7b6e3103b5274cb91d1545771f5ef1c8b",
            ),
            folders=("",),
        ),
    ),
    bundled=Path(__file__).parent / "_files",
)
