"""Arbitrary arrays, names and files, and files made to harm: data, or an error that says why."""

import gzip
import io
import pickle
import struct
import tarfile

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
from helpers.arbitrary import (
    OBJECTS,
    arrays,
    assert_refused,
    examples,
    explore,
    explore_file,
    npy,
    refused,
)
from hypothesis import strategies as st

from ntt_eqx.data import DatasetError, Split, batches, hold_out, load_dataset
from ntt_eqx.data._cifar import decode_binary, decode_python
from ntt_eqx.data._idx import read_idx
from ntt_eqx.data._mat5 import read_mat5
from ntt_eqx.data._registry import check_dataset_name

MEGABYTE = 1 << 20


@examples(60, 1500)
def test_arbitrary_data_sets(examples):
    def holds(x, y, size, seed, fraction, mean, std):
        split = refused(lambda: Split(x, y), DatasetError, begins="Split")
        if split is None:
            return
        parts = refused(lambda: hold_out(split, fraction, seed=seed), ValueError, begins="hold_out")
        assert parts is None or sum(map(len, parts)) == len(split)
        batch = refused(
            lambda: next(batches(split, size, seed=seed, mean=mean, std=std)),
            ValueError,
            begins="(batches|standardise)",
        )
        assert batch is None or batch.x.shape == (size, *x.shape[1:])

    numbers = st.one_of(st.floats(), st.lists(st.floats(), max_size=4))
    explore(
        holds,
        examples,
        x=st.one_of(arrays(), arrays([(4, 3)], ["f4", "u1"])),
        y=st.one_of(hnp.arrays("i4", 4), arrays()),
        size=st.integers(-1, 5),
        seed=st.integers(-1, 3),
        fraction=st.floats(),
        mean=numbers,
        std=numbers,
    )


@examples(100, 3000)
def test_arbitrary_names(examples):
    usual = st.from_regex(r"(mnist|svhn)(:[0-9,]*)?(:\d*)?(\+mnist)?")

    def check(text):
        refused(lambda: check_dataset_name(text), DatasetError)

    explore(check, examples, text=st.one_of(st.text(), usual))


def idx(array):
    sizes = struct.pack(f">{array.ndim}I", *array.shape)
    return bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes()


def mat5():
    body = struct.pack("<IIII", 6, 8, 6, 0) + struct.pack("<IIii", 5, 8, 1, 2)
    body += struct.pack("<HH4s", 1, 1, b"y") + struct.pack("<IIdd", 9, 16, 3.0, 4.0)
    header = b"MATLAB 5.0 MAT-file".ljust(124) + struct.pack("<H", 0x0100) + b"IM"
    return header + struct.pack("<II", 14, len(body)) + body


def archive():
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as file:
        for name in ("cifar-100-binary/train.bin", "../escaped", "cifar-100-binary/test.bin"):
            info = tarfile.TarInfo(name)
            info.size = 3074
            file.addfile(info, io.BytesIO(bytes(range(250)) * 12 + bytes(74)))
    return out.getvalue()


def read_images(path):
    return read_idx(path, 3)


def read_binary(path):
    return decode_binary(path, path.read_bytes(), num_labels=2)


def read_pickle(path):
    return decode_python(path, path.read_bytes(), labels="fine_labels")


def read_npy(path):
    (path.parent / "train_x.npy").write_bytes(path.read_bytes())
    (path.parent / "test_x.npy").write_bytes(npy(np.eye(2, 3, dtype=np.float32)))
    return load_dataset(f"npy:{path.parent}")


def read_archive(path):
    folder = path.parent / "tar"
    folder.mkdir(exist_ok=True)
    (folder / "cifar-100-binary.tar.gz").write_bytes(path.read_bytes())
    return load_dataset("cifar-100", folder, verify=False, download=False)


IMAGES = idx(np.arange(24, dtype=np.uint8).reshape(2, 3, 4))
CIFAR = {"fine_labels": [1], "data": np.zeros((1, 3072), np.uint8)}
FILES = {
    "idx": (IMAGES, read_images),
    "idx.gz": (gzip.compress(IMAGES), read_images),
    "cifar pickle": (pickle.dumps(CIFAR, 3), read_pickle),
    "cifar binary": (
        bytes(3074),
        read_binary,
    ),
    "cifar archive": (archive(), read_archive),
    "mat": (mat5(), read_mat5),
    "npy": (npy(np.eye(2, 3, dtype=np.float32)), read_npy),
    "pickled npy": (OBJECTS, read_npy),
}


@examples(40, 2000)
@pytest.mark.parametrize("name", FILES)
def test_changed_files(name, examples, tmp_path):
    content, read = FILES[name]
    explore_file(content, read, (DatasetError,), tmp_path, examples)


LYING = npy(np.zeros(4, np.float32)).replace(b"(4,), ", b"(99999,), ")
HOSTILE = {
    "objects as samples": (OBJECTS, read_npy, "cannot be read as a .npy array"),
    "samples that lie": (LYING, read_npy, "cannot be read as a .npy array"),
    "an endless gzip file": (
        gzip.compress(b"\0\0\x08\x03" + struct.pack(">III", 1, 2, 2) + bytes(64 * MEGABYTE)),
        read_images,
        "longer than the 4 bytes",
    ),
    "a gzip file that promises too much": (
        gzip.compress(b"\0\0\x08\x03" + struct.pack(">III", 1 << 12, 1 << 10, 1 << 10)),
        read_images,
        "announces an impossible shape",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused_unexecuted_and_small(name, tmp_path):
    content, read, message = HOSTILE[name]
    assert_refused(content, read, DatasetError, message, tmp_path)
