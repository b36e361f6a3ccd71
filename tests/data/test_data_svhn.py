"""SVHN's MAT-files, written by an independent implementation of the format."""

import struct
import zlib

import numpy as np
import pytest
import scipy.io
from helpers.published_formats import with_digests
from hypothesis import given, settings, strategies as st

from ntt_eqx.data import DATASETS, DatasetError, load_dataset
from ntt_eqx.data._mat5 import read_mat5

NAMES = ("train_32x32.mat", "test_32x32.mat")


def arrays(rng, size):
    """`X[H, W, C, N]` and `y[N, 1]` with labels 1 to 10."""
    x = rng.integers(0, 256, (32, 32, 3, size), np.uint8)
    return {"X": x, "y": (np.arange(size) % 10 + 1).astype(np.uint8)[:, None]}


@pytest.fixture
def folder(tmp_path, rng):
    for name, size in zip(NAMES, (20, 10), strict=True):
        scipy.io.savemat(tmp_path / name, arrays(rng, size), do_compression=True)
    return tmp_path


def load(folder):
    return load_dataset("svhn", folder, verify=False, download=False)


def test_images_and_digits(folder):
    data = load(folder)
    expected = scipy.io.loadmat(folder / NAMES[0])
    assert data.train.x.shape == (20, 3, 32, 32) and data.test.x.shape == (10, 3, 32, 32)
    for n in range(20):
        np.testing.assert_array_equal(data.train.x[n], expected["X"][..., n].transpose(2, 0, 1))
    np.testing.assert_array_equal(data.train.y, [*range(1, 10), 0] * 2)
    assert data.num_classes == 10


@pytest.mark.parametrize("compressed", [True, False])
@pytest.mark.parametrize("dtype", ["u1", "i2", "u4", "f4", "f8"])
def test_the_reader_agrees_with_scipy(tmp_path, rng, compressed, dtype):
    path = tmp_path / "file.mat"
    content = {
        "a": rng.integers(0, 99, (3, 4, 5)).astype(dtype),
        "one": np.ones((1, 1), dtype),
        "a_longer_name": np.zeros((0, 3), dtype),
    }
    scipy.io.savemat(path, content, do_compression=compressed)
    found = read_mat5(path)
    assert set(found) == set(content)
    for name, array in content.items():
        np.testing.assert_array_equal(found[name], array)
        assert found[name].shape == array.shape


def test_big_endian_files_are_read(tmp_path):
    numbers = struct.pack(">2H", 300, 7)
    body = struct.pack(">IIII", 6, 8, 11, 0) + struct.pack(">IIii", 5, 8, 1, 2)
    body += struct.pack(">HH4s", 1, 1, b"y") + struct.pack(">HH", 4, 4) + numbers
    header = b"MATLAB 5.0 MAT-file".ljust(124) + struct.pack(">H", 0x0100) + b"MI"
    path = tmp_path / "file.mat"
    path.write_bytes(header + struct.pack(">II", 14, len(body)) + body)
    np.testing.assert_array_equal(read_mat5(path)["y"], [[300, 7]])
    np.testing.assert_array_equal(scipy.io.loadmat(path)["y"], [[300, 7]])


def test_checksums(monkeypatch, folder):
    contents = {name: (folder / name).read_bytes() for name in NAMES}
    spec = with_digests(DATASETS["svhn"], 0, contents, num_train=20, num_test=10)
    monkeypatch.setitem(DATASETS, "svhn", spec)
    assert len(load_dataset("svhn", folder, download=False).train) == 20
    path = folder / NAMES[1]
    path.write_bytes(contents[NAMES[1]] + b" ")
    with pytest.raises(DatasetError, match=f"{path}: wrong checksum"):
        load_dataset("svhn", folder, download=False)


def test_truncated_files_are_named(folder):
    path = folder / NAMES[0]
    content = path.read_bytes()
    for size in (0, 100, 127, 128, 130, 140, 200, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:size])
        with pytest.raises(DatasetError, match=f"^{path}: (truncated|wrong magic number)"):
            load(folder)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda c: c.pop("y"), "lacks the variable X or y"),
        (lambda c: c.update(X=c["X"][..., 0]), "X is uint8"),
        (lambda c: c.update(X=c["X"].astype(float)), "X is float64"),
        (lambda c: c.update(X=c["X"][:31]), r"X is uint8 \(31, 32, 3, 20\)"),
        (lambda c: c.update(y=c["y"][:-1]), r"y has shape \(19, 1\) for 20 images"),
        (lambda c: c.update(y=c["y"] - 1), "labels outside of 1 to 10"),
        (lambda c: c.update(y=c["y"] + 0.5), "labels outside of 1 to 10"),
        (lambda c: c.update(y=c["y"] * np.nan), "labels outside of 1 to 10"),
        (lambda c: c.update(s={"a": 1}), "truncated or damaged .*class 2"),
        (lambda c: c.update(s="text"), "truncated or damaged .*class 4"),
        (lambda c: c.update(s=np.array([[1j]])), "truncated or damaged .*not a real numeric"),
        (lambda c: c.update(s=np.array([["a"]], object)), "truncated or damaged .*class 1"),
    ],
)
def test_wrong_contents_are_named(folder, rng, change, message):
    content = arrays(rng, 20)
    change(content)
    scipy.io.savemat(folder / NAMES[0], content, do_compression=True)
    with pytest.raises(DatasetError, match=f"{folder / NAMES[0]}: .*{message}"):
        load(folder)


def test_other_formats_are_refused(folder):
    path = folder / NAMES[0]
    scipy.io.savemat(path, {"y": np.ones((3, 1))}, format="4")
    with pytest.raises(DatasetError, match=f"{path}: wrong magic number, not a MAT-file of level"):
        load(folder)


def test_a_decompression_bomb_is_refused(folder, monkeypatch):
    monkeypatch.setattr("ntt_eqx.data._mat5._LARGEST", 1 << 16)
    path = folder / NAMES[0]
    bomb = zlib.compress(bytes(1 << 20), 9)
    path.write_bytes(path.read_bytes()[:128] + struct.pack("<II", 15, len(bomb)) + bomb)
    with pytest.raises(DatasetError, match="compressed variable is truncated or too large"):
        load(folder)


@given(st.lists(st.tuples(st.integers(0, 300), st.binary(min_size=1, max_size=4)), max_size=4))
@settings(max_examples=200, deadline=None)
def test_arbitrary_files_give_arrays_or_the_documented_error(tmp_path_factory, changes):
    path = tmp_path_factory.getbasetemp() / "fuzz.mat"
    scipy.io.savemat(path, {"X": np.arange(12, dtype=np.uint8), "y": np.ones((2, 2))})
    content = bytearray(path.read_bytes())
    for position, new in changes:
        content[position : position + len(new)] = new
    path.write_bytes(content)
    try:
        assert isinstance(read_mat5(path), dict)
    except DatasetError as error:
        assert str(path) in str(error)
