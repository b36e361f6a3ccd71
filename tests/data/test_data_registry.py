"""Finding, downloading, checking and listing datasets by name."""

import contextlib
import dataclasses
import functools
import gzip
import hashlib
import http.server
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from helpers.published_formats import IDX_NAMES, idx_bytes, with_digests, write_mnist

from ntt_eqx.data import (
    DATASETS,
    DatasetError,
    check_dataset_name,
    list_datasets,
    load_dataset,
    prepare_dataset,
)
from ntt_eqx.data._mnist import FASHION_MNIST, MNIST
from ntt_eqx.data._sources import cache_folder

SYSTEM = Path("/usr/share/datasets/fashion-mnist")


def contents(folder):
    return {name: (folder / name).read_bytes() for name in IDX_NAMES}


@pytest.fixture
def small_mnist(monkeypatch, tmp_path, rng):
    """`mnist` with the checksums of small files, which are in the folder that is returned."""
    folder = tmp_path / "published"
    arrays = write_mnist(folder, rng)
    spec = with_digests(MNIST, 0, contents(folder), num_train=24, num_test=12)
    monkeypatch.setitem(DATASETS, "mnist", spec)
    return folder, arrays


def test_the_bundled_set_is_there_without_anything():
    data = load_dataset("fashion-mnist-mini", download=False)
    assert data.train.x.shape == (6000, 1, 28, 28) and data.test.x.shape == (1000, 1, 28, 28)
    assert data.input_shape == (1, 28, 28) and data.num_classes == 10 and data.labelled
    np.testing.assert_array_equal(data.train.y[:8], [9, 0, 0, 3, 0, 2, 7, 2])
    np.testing.assert_array_equal(data.test.y[:8], [9, 2, 1, 1, 6, 1, 4, 6])
    pixels = data.train.x / 255
    np.testing.assert_allclose([data.mean, data.std], [pixels.mean(), pixels.std()], rtol=1e-10)


@pytest.mark.skipif(not SYSTEM.is_dir(), reason="the package dataset-fashion-mnist is not there")
def test_the_system_package_holds_the_original_of_the_bundled_set():
    full, mini = load_dataset("fashion-mnist", download=False), load_dataset("fashion-mnist-mini")
    assert len(full.train) == 60_000 and len(full.test) == 10_000
    np.testing.assert_array_equal(full.train.x[:6000], mini.train.x)
    np.testing.assert_array_equal(full.train.y[:6000], mini.train.y)
    np.testing.assert_array_equal(full.test.x[:1000], mini.test.x)
    np.testing.assert_array_equal(full.test.y[:1000], mini.test.y)
    assert abs(full.mean - 0.2860) < 1e-4 and abs(full.std - 0.3530) < 1e-4


@pytest.mark.parametrize("within", ["", "mnist", "MNIST/raw"])
@pytest.mark.parametrize("zipped", [False, True])
def test_files_are_found_in_a_data_folder(tmp_path, rng, within, zipped):
    images, labels, test_images, test_labels = write_mnist(tmp_path / within, rng, zipped=zipped)
    data = load_dataset("mnist", tmp_path, verify=False, download=False)
    np.testing.assert_array_equal(data.train.x[:, 0], images)
    np.testing.assert_array_equal(data.train.y, labels)
    np.testing.assert_array_equal(data.test.x[:, 0], test_images)
    np.testing.assert_array_equal(data.test.y, test_labels)


@pytest.mark.parametrize("zipped", [(), (0, 2), (0, 1, 2, 3)])
@pytest.mark.parametrize("dotted", [(), (1, 2), (0, 1, 2, 3)])
def test_each_file_may_be_gzipped_or_plain_under_either_of_its_names(small_mnist, zipped, dotted):
    folder, arrays = small_mnist
    for number, name in enumerate(IDX_NAMES):
        content = (folder / name).read_bytes()
        (folder / name).unlink()
        other = name.replace("-idx", ".idx") if number in dotted else name
        if number in zipped:
            (folder / f"{other}.gz").write_bytes(gzip.compress(content))
        else:
            (folder / other).write_bytes(content)
    data = load_dataset("mnist", folder, download=False)
    read = (data.train.x[:, 0], data.train.y, data.test.x[:, 0], data.test.y)
    for found, expected in zip(read, arrays, strict=True):
        np.testing.assert_array_equal(found, expected)


def test_the_command_reads_a_folder_and_checks_its_sums(small_mnist, capsys):
    pytest.importorskip("tyro")
    from ntt_eqx.experiment.cli import main

    folder, _ = small_mnist
    assert main(["data", "mnist", "--data-dir", str(folder)]) == 0
    assert f"mnist: whole, in {folder}" in capsys.readouterr().out.replace("\n", " ")
    labels = folder / IDX_NAMES[3]
    labels.write_bytes(labels.read_bytes()[:-1] + b"\x09")
    assert main(["data", "mnist", "--data-dir", str(folder)]) == 2
    assert f"{labels}: wrong checksum" in capsys.readouterr().err


def test_places_are_tried_in_the_documented_order(monkeypatch, tmp_path, rng):
    places = {name: tmp_path / name for name in ("argument", "environment", "system")}
    spec = dataclasses.replace(MNIST, system_folders=(places["system"],))
    monkeypatch.setitem(DATASETS, "mnist", spec)
    monkeypatch.setenv("NTT_EQX_DATA", str(places["environment"]))
    places["cache"] = cache_folder() / "mnist"
    places["argument"].mkdir()
    for name, size in (("cache", 40), ("system", 30), ("environment", 20), ("argument", 10)):
        write_mnist(places[name], rng, num_train=size)
        data = load_dataset("mnist", places["argument"], verify=False, download=False)
        assert len(data.train) == size
        (info,) = (i for i in list_datasets(places["argument"]) if i.name == "mnist")
        assert info.available and info.location == places[name]
        assert [p.name for p in info.searched[:3]] == ["argument", "environment", "system"]


def test_the_published_files_pass_and_changed_ones_are_named(small_mnist):
    folder, arrays = small_mnist
    data = load_dataset("mnist", folder, download=False)
    np.testing.assert_array_equal(data.train.x[:, 0], arrays[0])
    for name in IDX_NAMES:
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        with pytest.raises(DatasetError, match=f"{folder / name}: wrong checksum"):
            load_dataset("mnist", folder, download=False)
        (folder / name).write_bytes(whole)


def test_half_a_dataset_is_never_loaded(small_mnist, tmp_path, rng):
    folder, arrays = small_mnist
    for name in IDX_NAMES:
        whole = (folder / name).read_bytes()
        (folder / name).unlink()
        with pytest.raises(DatasetError, match=f"^mnist: {folder / name} is missing"):
            load_dataset("mnist", folder)
        (info,) = (i for i in list_datasets(folder) if i.name == "mnist")
        assert not info.available and "is missing" in info.problem
        (folder / name).write_bytes(whole)
    labels = folder / IDX_NAMES[1]
    labels.write_bytes(idx_bytes(arrays[1][:-1]))
    with pytest.raises(DatasetError, match=f"{labels}: holds 23 labels for the 24 images"):
        load_dataset("mnist", folder, verify=False)


def test_another_number_of_samples_is_refused(monkeypatch, small_mnist):
    folder, _ = small_mnist
    spec = dataclasses.replace(DATASETS["mnist"], num_train=60_000)
    monkeypatch.setitem(DATASETS, "mnist", spec)
    with pytest.raises(DatasetError, match="holds 24 train and 12 test samples; mnist has 60000"):
        load_dataset("mnist", folder)


def test_labels_out_of_range_are_refused(tmp_path, rng):
    _, labels, _, _ = write_mnist(tmp_path, rng)
    labels[3] = 10
    (tmp_path / IDX_NAMES[1]).write_bytes(idx_bytes(labels))
    with pytest.raises(DatasetError, match=r"mnist: train labels reach from 0 to 10.*\[0, 10\)"):
        load_dataset("mnist", tmp_path, verify=False)


def test_unknown_and_absent_datasets_say_what_to_do(tmp_path):
    with pytest.raises(DatasetError, match="unknown dataset 'imagenet'; known are fashion-mnist-m"):
        load_dataset("imagenet")
    with pytest.raises(DatasetError, match=r"mnist: not found in .*train-images-idx3-ubyte.gz, t"):
        load_dataset("mnist", tmp_path, download=False)
    with pytest.raises(DatasetError, match=f"data folder {tmp_path / 'no'} does not exist"):
        load_dataset("mnist", tmp_path / "no")
    with pytest.raises(DatasetError, match="more than two"):
        load_dataset("fashion-mnist-mini+fashion-mnist-mini+fashion-mnist-mini")
    for choice in ("a,b", "0;1", "0,1:x", "0,,1"):
        with pytest.raises(DatasetError, match="does not choose classes"):
            load_dataset(f"fashion-mnist-mini:{choice}")


def test_names_are_checked_without_looking_for_files():
    for name in ("mnist", "cifar-100:0,99:3", "mnist+fashion-mnist", "svhn:0,1+svhn", "npy:/no:+"):
        check_dataset_name(name)
    for name in (
        "",
        "imagenet",
        "mnist+",
        "mnist:0,10",
        "cifar-10:1",
        "mnist:x",
        "mnist+mnist+svhn",
    ):
        with pytest.raises(DatasetError):
            check_dataset_name(name)


def test_listing_reads_no_file_and_tells_the_sizes(tmp_path):
    infos = {info.name: info for info in list_datasets(tmp_path)}
    assert list(infos) == list(DATASETS)
    assert infos["fashion-mnist-mini"].available
    assert (infos["cifar-100"].num_classes, infos["cifar-100"].num_train) == (100, 50_000)
    assert infos["svhn"].input_shape == (3, 32, 32) and infos["svhn"].num_test == 26_032
    mnist = infos["mnist"]
    assert not mnist.available and mnist.problem == "not found" and mnist.searched[0] == tmp_path
    for name in IDX_NAMES:
        (tmp_path / name).write_bytes(b"")
    assert next(info for info in list_datasets(tmp_path) if info.name == "mnist").available


def test_classes_and_unions_by_name(tmp_path, rng):
    arrays = write_mnist(tmp_path / "mnist", rng, num_train=40)
    load = functools.partial(load_dataset, data_dir=tmp_path, verify=False, download=False)
    two = load("mnist:7,3")
    assert two.num_classes == 2 and two.name == "mnist:7,3"
    np.testing.assert_array_equal(two.train.x[:, 0], arrays[0][np.isin(arrays[1], [3, 7])])
    np.testing.assert_array_equal(two.train.y, [1, 0] * 4)
    limited = load("mnist:7,3:2")
    assert len(limited.train) == 4 and len(limited.test) == 2
    np.testing.assert_array_equal(limited.train.x, two.train.x[:4])
    union = load("mnist+fashion-mnist-mini")
    assert not union.labelled and union.num_classes == 10 and len(union.train) == 6040
    assert set(union.train.y) == set(union.test.y) == {-1}
    np.testing.assert_array_equal(union.train.x[:40, 0], arrays[0])
    for classes in ("0,0", "0,10", "-1,2", "3"):
        with pytest.raises(DatasetError, match="at least two different classes out of 0 to 9"):
            load(f"mnist:{classes}")
    with pytest.raises(DatasetError, match="cannot take 9 train samples of class 0, which has 4"):
        load("mnist:0,1:9")


@contextlib.contextmanager
def served(folder):
    """A web server of a folder on this machine; yields its address and the paths asked for."""
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(folder))

        def log_message(self, format, *args):
            asked.append(self.path)

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", asked
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def published(tmp_path, rng):
    pytest.importorskip("pooch")
    folder = tmp_path / "web"
    write_mnist(folder, rng)
    return folder


@pytest.mark.parametrize("target", ["argument", "environment", "cache"])
def test_download_once_with_checked_sums(monkeypatch, published, tmp_path, target):
    place = tmp_path / "place"
    if target == "environment":
        monkeypatch.setenv("NTT_EQX_DATA", str(place))
    if target == "argument":
        place.mkdir()
    with served(published) as (url, asked):
        files = contents(published)
        spec = with_digests(FASHION_MNIST, 0, files, num_train=24, num_test=12, url=url)
        monkeypatch.setitem(DATASETS, "fashion-mnist", spec)
        argument = place if target == "argument" else None
        info = prepare_dataset("fashion-mnist", argument)
        assert len(asked) == 4
        assert len(load_dataset("fashion-mnist", argument).train) == 24
        assert len(asked) == 4
    expected = (cache_folder() if target == "cache" else place) / "fashion-mnist"
    assert info.location == expected
    assert sorted(path.name for path in expected.iterdir()) == sorted(IDX_NAMES)


def test_gzipped_downloads_have_a_sum_of_their_own(monkeypatch, published):
    files = contents(published)
    spec = with_digests(MNIST, 0, files, num_train=24, num_test=12)
    zipped = {name: gzip.compress(content, mtime=0) for name, content in files.items()}
    for name, content in zipped.items():
        (published / f"{name}.gz").write_bytes(content)
    with served(published) as (url, _):
        form = spec.formats[0]
        form = dataclasses.replace(
            form,
            files=tuple(
                dataclasses.replace(
                    file,
                    url=f"{url}/{file.name}.gz",
                    url_sha256=hashlib.sha256(zipped[file.name]).hexdigest(),
                )
                for file in form.files
            ),
        )
        monkeypatch.setitem(DATASETS, "mnist", dataclasses.replace(spec, formats=(form,)))
        assert len(load_dataset("mnist").train) == 24


@pytest.mark.parametrize("target", ["argument", "cache"])
def test_an_interrupted_download_goes_on(monkeypatch, published, tmp_path, target):
    argument = tmp_path if target == "argument" else None
    folder = (argument or cache_folder()) / "mnist"
    folder.mkdir(parents=True)
    with served(published) as (url, asked):
        files = contents(published)
        spec = with_digests(MNIST, 0, files, num_train=24, num_test=12, url=url)
        monkeypatch.setitem(DATASETS, "mnist", spec)
        (folder / IDX_NAMES[0]).write_bytes(files[IDX_NAMES[0]])
        with pytest.raises(DatasetError, match=f"{IDX_NAMES[1]} is missing"):
            load_dataset("mnist", argument, download=False)
        assert len(load_dataset("mnist", argument).train) == 24
        assert len(asked) == 3


def test_a_download_replaces_no_file(monkeypatch, published, tmp_path):
    own = tmp_path / "mnist" / IDX_NAMES[0]
    own.parent.mkdir()
    own.write_bytes(b"my own")
    with served(published) as (url, asked):
        spec = with_digests(MNIST, 0, contents(published), num_train=24, num_test=12, url=url)
        monkeypatch.setitem(DATASETS, "mnist", spec)
        with pytest.raises(DatasetError, match=f"{own}: wrong checksum; its SHA256"):
            load_dataset("mnist", tmp_path)
    assert own.read_bytes() == b"my own" and not asked


def test_a_download_with_a_wrong_sum_leaves_nothing(monkeypatch, published):
    with served(published) as (url, _):
        spec = with_digests(MNIST, 0, contents(published), num_train=24, num_test=12, url=url)
        monkeypatch.setitem(DATASETS, "mnist", spec)
        (published / IDX_NAMES[0]).write_bytes(b"something else")
        with pytest.raises(DatasetError, match=f"downloading {url}/{IDX_NAMES[0]} to .* failed"):
            load_dataset("mnist")
        assert list((cache_folder() / "mnist").iterdir()) == []
        with pytest.raises(DatasetError, match="failed"):
            load_dataset("mnist")


def test_without_a_network_the_error_says_what_to_do(monkeypatch, published):
    with served(published) as (url, _):
        pass
    spec = with_digests(FASHION_MNIST, 0, contents(published), num_train=24, num_test=12, url=url)
    monkeypatch.setitem(DATASETS, "fashion-mnist", spec)
    with pytest.raises(DatasetError, match=r"fashion-mnist: downloading .*apt install dataset-fa"):
        load_dataset("fashion-mnist")


def test_without_pooch_the_error_names_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "pooch", None)
    with pytest.raises(DatasetError, match=r"mnist: not found, and the package `pooch`.*Put train"):
        load_dataset("mnist")
