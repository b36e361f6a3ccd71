"""CIFAR-10 and CIFAR-100: the Python version and the binary one, as archives or unpacked."""

import functools
import tarfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from ._dataset import Split
from ._digest import check_digest
from ._errors import DatasetError
from ._pickle import read_pickle
from ._sources import DataFile, DataFormat, DatasetSpec, Digests, Splits

_SHAPE = (3, 32, 32)
_PIXELS = 3 * 32 * 32
_LARGEST = 1 << 29  # bytes of one file in an archive; the largest published one has 155 million

Decode = Callable[[Path, bytes], tuple[np.ndarray, np.ndarray]]


def decode_python(path: Path, data: bytes, *, labels: str) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels of one pickled batch, which is a dict with `data` and `labels`."""
    content = read_pickle(path, data)
    pixels, numbers = content.get("data"), content.get(labels)
    if not isinstance(pixels, np.ndarray) or pixels.ndim != 2 or pixels.shape[1] != _PIXELS:
        raise DatasetError(f"{path}: `data` is not an array of shape (N, {_PIXELS}).")
    if not isinstance(numbers, list) or not all(type(n) is int for n in numbers):
        raise DatasetError(f"{path}: `{labels}` is not a list of integers.")
    if len(numbers) != len(pixels):
        raise DatasetError(f"{path}: holds {len(numbers)} labels for {len(pixels)} images.")
    if not all(0 <= n < 256 for n in numbers):
        raise DatasetError(f"{path}: holds labels outside of [0, 256).")
    return pixels, np.asarray(numbers, np.int32)


def decode_binary(path: Path, data: bytes, *, num_labels: int) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels of a binary batch: records of label bytes (the last one counts), pixels."""
    size = num_labels + _PIXELS
    if not data or len(data) % size:
        raise DatasetError(
            f"{path}: truncated or damaged, {len(data):,} bytes are no multiple of {size}."
        )
    records = np.frombuffer(data, np.uint8).reshape(-1, size)
    return records[:, num_labels:], records[:, num_labels - 1].astype(np.int32)


def read_folder(
    paths: Mapping[str, Path], digests: Digests, *, decode: Decode, test: str
) -> Splits:
    """Read unpacked batches; the file called `test` is the test split, the others train."""
    batches = {}
    for name, path in paths.items():
        check_digest(path, digests[name])
        try:
            data = path.read_bytes()
        except OSError as error:
            raise DatasetError(f"{path}: cannot be read ({error}).") from error
        batches[name] = decode(path, data)
    return _splits(batches, test)


def read_archive(
    paths: Mapping[str, Path], digests: Digests, *, decode: Decode, members: tuple[str, ...]
) -> Splits:
    """Read the batches within a .tar.gz, of which the last member is the test split.

    Nothing is unpacked to disk. Only regular files with exactly the published names are read, so
    that links and paths that lead elsewhere have no effect.
    """
    ((name, path),) = paths.items()
    check_digest(path, digests[name])
    batches = {}
    try:
        with tarfile.open(path, "r:gz") as archive:
            for member in archive:
                if member.name in members and member.isreg() and member.name not in batches:
                    if member.size > _LARGEST:
                        raise DatasetError(f"{path}: {member.name} is impossibly large.")
                    file = archive.extractfile(member)
                    data = b"" if file is None else file.read()
                    batches[member.name] = decode(path / member.name, data)
    except (tarfile.TarError, EOFError, zlib.error, OSError, ValueError) as error:
        if isinstance(error, DatasetError):
            raise
        raise DatasetError(f"{path}: truncated or damaged archive ({error}).") from error
    missing = [member for member in members if member not in batches]
    if missing:
        raise DatasetError(f"{path}: truncated or foreign archive, it lacks {missing[0]}.")
    return _splits({member: batches[member] for member in members}, members[-1])


def _splits(batches: Mapping[str, tuple[np.ndarray, np.ndarray]], test: str) -> Splits:
    train = [batch for name, batch in batches.items() if name != test]
    return _split(train), _split([batches[test]])


def _split(batches: list[tuple[np.ndarray, np.ndarray]]) -> Split:
    x = np.concatenate([pixels for pixels, _ in batches]).reshape(-1, *_SHAPE)
    return Split(x, np.concatenate([labels for _, labels in batches]))


def _formats(
    *,
    name: str,
    python: tuple[str, str, Decode],
    python_files: Mapping[str, str],
    binary: tuple[str, str, Decode],
    binary_files: Mapping[str, str],
) -> tuple[DataFormat, ...]:
    """Archive and folder of either version: (folder, SHA-256 of the archive, decoder), files."""
    formats = []
    versions = ((python, python_files, "python"), (binary, binary_files, "binary"))
    for (folder, sha256, decode), files, version in versions:
        archive = f"{name}-{version}.tar.gz"
        members = tuple(f"{folder}/{file}" for file in files)
        read_tar = functools.partial(read_archive, decode=decode, members=members)
        url = f"https://www.cs.toronto.edu/~kriz/{archive}"
        formats.append(DataFormat((DataFile(archive, sha256, url=url),), (name, ""), read_tar))
        read_dir = functools.partial(read_folder, decode=decode, test=list(files)[-1])
        unpacked = tuple(DataFile(file, digest) for file, digest in files.items())
        formats.append(DataFormat(unpacked, (f"{name}/{folder}", folder, name, ""), read_dir))
    return tuple(formats)


CIFAR10 = DatasetSpec(
    name="cifar-10",
    input_shape=_SHAPE,
    num_classes=10,
    num_train=50_000,
    num_test=10_000,
    formats=_formats(
        name="cifar-10",
        python=(
            "cifar-10-batches-py",
            "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",
            functools.partial(decode_python, labels="labels"),
        ),
        python_files={
            "data_batch_1": "md5:c99cafc152244af753f735de768cd75f",
            "data_batch_2": "md5:d4bba439e000b95fd0a9bffe97cbabec",
            "data_batch_3": "md5:54ebc095f3ab1f0389bbae665268c751",
            "data_batch_4": "md5:634d18415352ddfa80567beed471001a",
            "data_batch_5": "md5:482c414d41f54cd18b22e5b47cb7c3cb",
            "test_batch": "md5:40351d587109b95175f43aff81a1287e",
        },
        binary=(
            "cifar-10-batches-bin",
            "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
            functools.partial(decode_binary, num_labels=1),
        ),
        binary_files={
            "data_batch_1.bin": "cee916563c9f80d84e3cc88e17fdc0941787f1244f00a67874d45b261883ada5",
            "data_batch_2.bin": "a591ca11fa1708a91ee40f54b3da4784ccd871ecf2137de63f51ada8b3fa57ed",
            "data_batch_3.bin": "bbe8596564c0f86427f876058170b84dac6670ddf06d79402899d93ceea26f67",
            "data_batch_4.bin": "014e562d6e23c72197cc727519169a60359f5eccd8945ad5a09d710285ff4e48",
            "data_batch_5.bin": "755304fc0b379caeae8c14f0dac912fbc7d6cd469eb67a1029a08a39453a9add",
            "test_batch.bin": "8e2eb146ae340b09e24670f29cabc6326dba54da8789dab6768acf480273f65b",
        },
    ),
)

CIFAR100 = DatasetSpec(
    name="cifar-100",
    input_shape=_SHAPE,
    num_classes=100,
    num_train=50_000,
    num_test=10_000,
    formats=_formats(
        name="cifar-100",
        python=(
            "cifar-100-python",
            "85cd44d02ba6437773c5bbd22e183051d648de2e7d6b014e1ef29b855ba677a7",
            functools.partial(decode_python, labels="fine_labels"),
        ),
        python_files={
            "train": "md5:16019d7e3df5f24257cddd939b257f8d",
            "test": "md5:f0ef6b0ae62326f3e7ffdfab6717acfc",
        },
        binary=(
            "cifar-100-binary",
            "58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
            functools.partial(decode_binary, num_labels=2),
        ),
        binary_files={
            "train.bin": "f31298fc616915fa142368359df1c4ca2ae984d6915ca468b998a5ec6aeebf29",
            "test.bin": "d8b1e6b7b3bee4020055f0699b111f60b1af1e262aeb93a0b659061746f8224a",
        },
    ),
)
