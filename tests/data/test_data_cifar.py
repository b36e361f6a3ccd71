"""CIFAR-10 and CIFAR-100 in all four published forms, whole, broken and hostile."""

import gzip
import os
import pickle
import pickletools
import tarfile

import numpy as np
import pytest
from helpers.published_formats import (
    cifar10_binary,
    cifar10_python,
    cifar100_binary,
    cifar100_python,
    cifar_arrays,
    python2_pickle,
    tar_gz,
    with_digests,
)
from hypothesis import given, settings, strategies as st

from ntt_eqx.data import DATASETS, DatasetError, load_dataset
from ntt_eqx.data._pickle import read_pickle

TEN = ("data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5", "test_batch")
FORMS = {
    ("cifar-10", "python"): ("cifar-10-batches-py", TEN, cifar10_python, 10),
    ("cifar-10", "binary"): (
        "cifar-10-batches-bin",
        tuple(f"{name}.bin" for name in TEN),
        cifar10_binary,
        10,
    ),
    ("cifar-100", "python"): ("cifar-100-python", ("train", "test"), cifar100_python, 100),
    ("cifar-100", "binary"): ("cifar-100-binary", ("train.bin", "test.bin"), cifar100_binary, 100),
}


def made(rng, name, version, size=20):
    """Folder name, files, and the splits that reading must give."""
    folder, files, encode, num_classes = FORMS[name, version]
    batches = [cifar_arrays(rng, size, num_classes) for _ in files]
    contents = {file: encode(*batch) for file, batch in zip(files, batches, strict=True)}
    x = np.concatenate([pixels for pixels, _ in batches]).reshape(-1, 3, 32, 32)
    y = np.concatenate([labels for _, labels in batches])
    return folder, contents, (x[:-size], y[:-size], x[-size:], y[-size:])


def write(folder, contents):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        (folder / name).write_bytes(content)


def same(data, expected):
    x, y, test_x, test_y = expected
    np.testing.assert_array_equal(data.train.x, x)
    np.testing.assert_array_equal(data.train.y, y)
    np.testing.assert_array_equal(data.test.x, test_x)
    np.testing.assert_array_equal(data.test.y, test_y)


@pytest.mark.parametrize("name, version", FORMS)
def test_archives_and_folders_read_alike(tmp_path, rng, name, version):
    folder, contents, expected = made(rng, name, version)
    write(tmp_path / "a" / folder, contents)
    same(load_dataset(name, tmp_path / "a", verify=False, download=False), expected)
    write(tmp_path / "b" / name, contents)
    same(load_dataset(name, tmp_path / "b", verify=False, download=False), expected)
    archive = tar_gz(
        {f"{folder}/readme.html": b"<html>"}
        | {f"{folder}/{file}": contents[file] for file in reversed(contents)}
    )
    write(tmp_path / "c", {f"{name}-{version}.tar.gz": archive})
    data = load_dataset(name, tmp_path / "c", verify=False, download=False)
    same(data, expected)
    assert data.num_classes == (10 if name == "cifar-10" else 100)
    assert data.input_shape == (3, 32, 32) and len(data.mean) == len(data.std) == 3
    pixels = expected[0] / 255
    np.testing.assert_allclose(data.mean, pixels.mean((0, 2, 3)), rtol=1e-10)
    np.testing.assert_allclose(data.std, pixels.std((0, 2, 3)), rtol=1e-10)


@pytest.mark.parametrize("name, version", FORMS)
@pytest.mark.parametrize("archived", [True, False])
def test_checksums(monkeypatch, tmp_path, rng, name, version, archived):
    folder, contents, expected = made(rng, name, version)
    if archived:
        archive = tar_gz({f"{folder}/{file}": data for file, data in contents.items()})
        contents = {f"{name}-{version}.tar.gz": archive}
    write(tmp_path, contents)
    number = ["python", "binary"].index(version) * 2 + (not archived)
    sizes = {"num_train": len(expected[0]), "num_test": len(expected[2])}
    monkeypatch.setitem(DATASETS, name, with_digests(DATASETS[name], number, contents, **sizes))
    same(load_dataset(name, tmp_path, download=False), expected)
    for file, content in contents.items():
        (tmp_path / file).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(DatasetError, match=f"{tmp_path / file}: wrong checksum; its SHA256 is"):
            load_dataset(name, tmp_path, download=False)
        (tmp_path / file).write_bytes(content)


def test_the_published_md5_sums_are_checked_too(tmp_path, rng):
    folder, contents, _ = made(rng, "cifar-10", "python")
    write(tmp_path / folder, contents)
    with pytest.raises(DatasetError, match="data_batch_1: wrong checksum; its MD5 is"):
        load_dataset("cifar-10", tmp_path)


@pytest.mark.parametrize("name, version", FORMS)
def test_truncated_files_are_named(tmp_path, rng, name, version):
    folder, contents, _ = made(rng, name, version, size=3)
    write(tmp_path, contents)
    for file in (list(contents)[0], list(contents)[-1]):
        content = contents[file]
        for size in (0, 1, 100, len(content) // 2, len(content) - 1):
            (tmp_path / file).write_bytes(content[:size])
            with pytest.raises(DatasetError, match=f"^{tmp_path / file}: truncated or damaged"):
                load_dataset(name, tmp_path, verify=False, download=False)
        (tmp_path / file).write_bytes(content)
        (tmp_path / file).unlink()
        with pytest.raises(DatasetError, match=f"{tmp_path / file} is missing"):
            load_dataset(name, tmp_path)
        (tmp_path / file).write_bytes(content)


def test_truncated_archives_are_named(tmp_path, rng):
    folder, contents, _ = made(rng, "cifar-100", "python", size=3)
    content = tar_gz({f"{folder}/{file}": data for file, data in contents.items()})
    path = tmp_path / "cifar-100-python.tar.gz"
    for size in (0, 5, 50, len(content) // 2, len(content) * 9 // 10):
        path.write_bytes(content[:size])
        with pytest.raises(DatasetError, match=f"^{path}.*: truncated or"):
            load_dataset("cifar-100", tmp_path, verify=False, download=False)


@pytest.mark.parametrize(
    "change, message",
    [
        ({b"data": None}, "`data` is not an array of shape"),
        ({b"data": np.zeros((20, 3071), np.uint8)}, "`data` is not an array of shape"),
        ({b"data": [1, 2]}, "`data` is not an array of shape"),
        ({b"labels": None}, "`labels` is not a list of integers"),
        ({b"labels": [b"cat"] * 20}, "`labels` is not a list of integers"),
        ({b"labels": [0] * 19}, "holds 19 labels for 20 images"),
        ({b"labels": [10] * 20}, None),
        ({b"labels": [300] * 20}, "labels outside"),
    ],
)
def test_wrong_contents_are_named(tmp_path, rng, change, message):
    folder, contents, _ = made(rng, "cifar-10", "python")
    pixels, labels = cifar_arrays(rng, 20, 10)
    items = {b"labels": [int(n) for n in labels], b"data": pixels} | change
    items = {key: item for key, item in items.items() if item is not None}
    contents["data_batch_3"] = python2_pickle(items)
    write(tmp_path, contents)
    path = tmp_path / "data_batch_3"
    message = f"{path}: .*{message}" if message else "cifar-10: train labels reach from 0 to 10"
    with pytest.raises(DatasetError, match=message):
        load_dataset("cifar-10", tmp_path, verify=False, download=False)


class Hostile:
    """Pickles to a call of `function(*arguments)`."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def hostile_pickles(target):
    """Pickles that create the file `target` when Python's own reader loads them."""
    made = Hostile(os.mkdir, str(target))
    command = f"cos\nsystem\n(S'touch {target}'\ntR.".encode()
    yield "protocol 0", pickle.dumps({"data": made, "labels": []}, protocol=0)
    yield "protocol 2", pickle.dumps({b"data": made, b"labels": []}, protocol=2)
    yield "protocol 3", pickle.dumps({b"data": made}, protocol=3)
    yield "system", command
    yield "inst", f"(S'touch {target}'\nios\nsystem\n.".encode()
    yield "obj", f"\x80\x02(cos\nsystem\nS'touch {target}'\no.".encode("latin-1")
    yield "in a list", pickle.dumps({b"labels": [made]}, protocol=2)
    yield "as a key", pickle.dumps({b"data": 1}, protocol=2)[:-1] + command
    yield "protocol 4", pickle.dumps({b"data": made}, protocol=4)
    yield "protocol 5", pickle.dumps(made, protocol=5)


HOSTILE = [name for name, _ in hostile_pickles("x")]


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_pickles_are_refused_and_run_nothing(tmp_path, name):
    target = tmp_path / "owned"
    content = dict(hostile_pickles(target))[name]
    try:
        pickle.loads(content)
    except Exception:  # some leave Python's reader in the end, after the deed
        pass
    assert target.exists() or name == "as a key"
    if target.exists():
        target.rmdir() if target.is_dir() else target.unlink()
    folder = tmp_path / "data"
    write(folder, {"train": content, "test": content})
    with pytest.raises(DatasetError, match=f"{folder / 'train'}: (refused to unpickle|truncated)"):
        load_dataset("cifar-100", folder, verify=False, download=False)
    assert not target.exists()


@pytest.mark.parametrize(
    "value",
    [
        np.zeros(3),
        np.array([object()]),
        np.zeros(2, [("a", "u1")]),
        np.uint8(3),
        {1, 2},
        complex(1, 2),
        print,
        range(3),
        np.ndarray,
    ],
)
@pytest.mark.parametrize("protocol", [0, 2, 3, 4])
def test_values_that_no_published_file_holds_are_refused(tmp_path, value, protocol):
    content = pickle.dumps({"data": value}, protocol=protocol)
    with pytest.raises(DatasetError, match="refused to unpickle|truncated or damaged"):
        read_pickle(tmp_path / "file", content)


def test_pickles_of_python_3_are_read(tmp_path):
    content = {"labels": [1, 255, 65536, -1], "name": "text", "pair": (1, None, True)}
    for protocol in (2, 3):
        found = read_pickle(tmp_path, pickle.dumps(content, protocol=protocol))
        assert found["labels"] == content["labels"] and found["pair"] == content["pair"]
    array = np.arange(6, dtype=np.uint8).reshape(2, 3)
    for data in (array, np.asfortranarray(array)):
        found = read_pickle(tmp_path, pickle.dumps({"data": data}, protocol=3))
        np.testing.assert_array_equal(found["data"], array)


def test_the_test_writer_agrees_with_pythons_own_reader(rng):
    pixels, labels = cifar_arrays(rng, 300, 10)
    content = cifar10_python(pixels, labels)
    found = pickle.loads(content, encoding="bytes")
    np.testing.assert_array_equal(found[b"data"], pixels)
    assert found[b"labels"] == list(labels) and found[b"batch_label"] == b"training batch 1 of 5"
    assert max(op.proto for op, _, _ in pickletools.genops(content)) == 2


VALID = cifar100_python(*cifar_arrays(np.random.default_rng(1), 2, 100))


@given(
    st.one_of(
        st.binary(max_size=60),
        st.lists(st.tuples(st.integers(0, 250), st.binary(min_size=1, max_size=4)), max_size=4),
    )
)
@settings(max_examples=500, deadline=None)
def test_arbitrary_pickles_give_a_dict_or_the_documented_error(tmp_path_factory, change):
    if isinstance(change, bytes):
        content = change
    else:
        content = bytearray(VALID)
        for position, new in change:
            content[position : position + len(new)] = new
    try:
        assert isinstance(read_pickle(tmp_path_factory.getbasetemp(), bytes(content)), dict)
    except DatasetError:
        pass


def test_hostile_archives_write_nothing_and_read_only_their_own(tmp_path, rng):
    folder, contents, expected = made(rng, "cifar-100", "binary", size=3)
    secret = tmp_path / "secret"
    secret.write_bytes(contents["train.bin"])
    place = tmp_path / "data"
    path = place / "cifar-100-binary.tar.gz"

    def link(name, kind, target):
        info = tarfile.TarInfo(name)
        info.type, info.linkname = kind, target
        return info

    def load(members):
        write(place, {path.name: tar_gz(members)})
        return load_dataset("cifar-100", place, verify=False, download=False)

    def snapshot():
        return sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*"))

    whole = {f"{folder}/{file}": data for file, data in contents.items()}
    load(whole)
    before = snapshot()
    traversal = {
        "../escaped": b"x",
        f"{folder}/../../escaped": b"x",
        str(tmp_path / "escaped"): b"x",
        "link": link("link", tarfile.SYMTYPE, str(tmp_path)),
        "device": link("device", tarfile.CHRTYPE, ""),
    }
    same(load(traversal | whole), expected)
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE):
        name = f"{folder}/train.bin"
        with pytest.raises(DatasetError, match="it lacks cifar-100-binary/train.bin"):
            load(whole | {name: link(name, kind, str(secret))})
    assert snapshot() == before


def test_an_archive_that_announces_too_much_is_refused(tmp_path):
    info = tarfile.TarInfo("cifar-100-binary/train.bin")
    info.size = 1 << 40
    content = gzip.compress(info.tobuf() + bytes(2048))
    write(tmp_path, {"cifar-100-binary.tar.gz": content})
    with pytest.raises(DatasetError, match="impossibly large"):
        load_dataset("cifar-100", tmp_path, verify=False, download=False)


@given(st.binary(max_size=200), st.booleans())
@settings(max_examples=100, deadline=None)
def test_arbitrary_archives_give_the_documented_error(tmp_path_factory, content, zipped):
    folder = tmp_path_factory.getbasetemp() / "fuzz-tar"
    write(folder, {"cifar-100-binary.tar.gz": gzip.compress(content) if zipped else content})
    with pytest.raises(DatasetError):
        load_dataset("cifar-100", folder, verify=False, download=False)
