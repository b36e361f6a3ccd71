"""Datasets in memory and in folders of `.npy` arrays: held-out parts, classes, unions, refusals."""

import os

import numpy as np
import pytest
from helpers.refusals import unchecked

from ntt_eqx.data import (
    Dataset,
    DatasetError,
    Split,
    as_batch,
    batches,
    hold_out,
    load_dataset,
    make_dataset,
    select_classes,
    unite,
)


def split(rng, size=20, shape=(1, 4, 4), classes=4, dtype=np.uint8):
    x = rng.integers(0, 256, (size, *shape)).astype(dtype)
    return Split(x, (np.arange(size) % classes).astype(np.int32))


def dataset(rng, name="own", **options):
    return make_dataset(name, split(rng, **options), split(rng, **options), 4)


def save(folder, **arrays):
    folder.mkdir(exist_ok=True)
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)


@pytest.mark.parametrize("dtype", [np.uint8, np.float32, np.float64])
@pytest.mark.parametrize("shape", [(1, 5, 5), (3, 4, 4), (7,)])
def test_a_folder_of_arrays(tmp_path, rng, dtype, shape):
    x = rng.integers(0, 99, (12, *shape)).astype(dtype)
    y = np.arange(12) % 3
    save(tmp_path, train_x=x, train_y=y, test_x=x[:4], test_y=y[:4])
    data = load_dataset(f"npy:{tmp_path}")
    assert isinstance(data, Dataset) and data.input_shape == shape and data.num_classes == 3
    np.testing.assert_array_equal(data.train.x, x)
    np.testing.assert_array_equal(data.train.y, y)
    unit = 255 if dtype == np.uint8 else 1
    axes = (0, 2, 3) if shape[0] == 3 else 0 if shape == (7,) and dtype != np.uint8 else None
    np.testing.assert_allclose(data.mean, (x / unit).mean(axes), rtol=1e-6)
    np.testing.assert_allclose(data.std, (x / unit).std(axes), rtol=1e-6)
    batch = next(batches(data.train, 4, seed=0, mean=data.mean, std=data.std))
    assert batch.x.shape == (4, *shape)


def test_a_folder_without_labels_is_for_transfer_only(tmp_path, rng):
    x = rng.normal(size=(6, 3)).astype(np.float32)
    save(tmp_path, train_x=x, test_x=x)
    data = load_dataset(f"npy:{tmp_path}")
    assert not data.labelled and set(data.train.y) == {-1}
    with pytest.raises(DatasetError, match="has no labels to choose classes by"):
        select_classes(data, (0, 1))


def test_broken_folders_are_named(tmp_path, rng):
    x, y = rng.normal(size=(6, 3)).astype(np.float32), np.arange(6) % 2
    whole = {"train_x": x, "train_y": y, "test_x": x, "test_y": y}

    def refused(match, **change):
        folder = tmp_path / "folder"
        for file in folder.glob("*") if folder.exists() else ():
            file.unlink()
        save(folder, **{k: v for k, v in (whole | change).items() if v is not None})
        with pytest.raises(DatasetError, match=match):
            load_dataset(f"npy:{folder}")
        return folder

    for name in whole:
        refused(f"{name}.npy: cannot be read", **{name: None})
    refused("train_x.npy: samples must be uint8 or floating-point", train_x=y)
    refused("train_x.npy: samples must be uint8", train_x=x.astype(complex))
    refused(r"test_x.npy: samples must be .* got float32 \(6,\)", test_x=x[:, 0])
    refused(r"train_y.npy: labels must be .*\(6,\), got int64 \(5,\)", train_y=y[:5])
    refused("train_y.npy: labels must be integers", train_y=y * 1.0)
    refused("train_y.npy: labels reach from -1", train_y=y - 1)
    sparse = "train_y.npy: 3 different labels, of which the largest is 2147483646"
    refused(sparse, train_y=y * (2**31 - 2))
    refused("3 different labels, of which the largest is 255, would make 256", train_y=y * 255)
    refused("train_y.npy: labels reach from 0 to 4294967296", train_y=y.astype(np.int64) << 32)
    refused(r"train and test samples differ: \(3,\) float32 and \(2,\) float32", test_x=x[:, :2])
    refused("train and test samples differ", test_x=x.astype(np.float64))
    wide = x.astype(np.float64)
    for bad in (np.nan, np.inf, -np.inf, 1e39):
        values = np.where(x > 0, wide, bad)
        refused("the train split holds values that float32 cannot", train_x=values, test_x=wide)
        refused("the test split holds values that float32 cannot", train_x=wide, test_x=values)
    refused("is constant", train_x=np.ones_like(x))
    refused("the test split is empty", test_x=x[:0], test_y=y[:0])
    folder = refused("train_x.npy: samples must be", train_x=y)
    with pytest.raises(DatasetError, match="is not a folder"):
        load_dataset(f"npy:{folder / 'train_x.npy'}")


def test_broken_and_hostile_arrays_are_named(tmp_path, rng):
    x, y = rng.normal(size=(6, 3)).astype(np.float32), np.arange(6) % 2
    save(tmp_path, train_x=x, train_y=y, test_x=x, test_y=y)
    path, labels = tmp_path / "train_x.npy", tmp_path / "train_y.npy"
    content = path.read_bytes()
    for size in (0, 5, 40, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:size])
        with pytest.raises(DatasetError, match=f"^{path}: cannot be read as a .npy array"):
            load_dataset(f"npy:{tmp_path}")
    path.write_bytes(content)
    target = tmp_path / "owned"

    class Hostile:
        def __reduce__(self):
            return os.mkdir, (str(target),)

    np.save(labels, np.array([Hostile()] * 6, object), allow_pickle=True)
    with pytest.raises(DatasetError, match=f"^{labels}: cannot be read.*allow_pickle=False"):
        load_dataset(f"npy:{tmp_path}")
    np.save(path, np.array([[Hostile()]] * 6, object), allow_pickle=True)
    with pytest.raises(DatasetError, match=f"^{path}: cannot be read"):
        load_dataset(f"npy:{tmp_path}")
    with path.open("wb") as file:
        np.savez(file, x=x)
    with pytest.raises(DatasetError, match=f"^{path}: is a .npz archive"):
        load_dataset(f"npy:{tmp_path}")
    assert not target.exists()


def test_hold_out_divides_without_overlap(rng):
    whole = Split(np.arange(500, dtype=np.float32)[:, None], np.arange(500, dtype=np.int32))
    rest, held = hold_out(whole, 0.1, seed=3)
    assert len(held) == 50 and len(rest) == 450
    assert sorted([*rest.y, *held.y]) == list(range(500))
    assert list(held.y) == sorted(held.y)
    np.testing.assert_array_equal(held.x[:, 0], held.y)
    again, other = hold_out(whole, 0.1, seed=3)[1], hold_out(whole, 0.1, seed=4)[1]
    np.testing.assert_array_equal(held.y, again.y)
    assert set(held.y) != set(other.y)
    assert len(hold_out(whole, 0.002, seed=0)[1]) == 1
    assert len(hold_out(whole, 1e-9, seed=0)[1]) == 1


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, 2.0, float("nan"), 0.999, "half", None])
def test_impossible_fractions_are_refused(rng, fraction):
    with (
        unchecked(),
        pytest.raises(ValueError, match="hold_out: .*(fraction must lie|leaves none)"),
    ):
        hold_out(split(rng), fraction, seed=0)


@pytest.mark.parametrize("seed", [-1, None, 0.5, "a"])
def test_what_is_no_seed_is_refused(rng, seed):
    with unchecked(), pytest.raises(ValueError, match="hold_out: seed must not be negative"):
        hold_out(split(rng), 0.5, seed=seed)


def test_select_classes_keeps_their_samples_and_relabels(rng):
    data = dataset(rng)
    two = select_classes(data, (3, 1), per_class=2)
    assert two.name == "own:3,1:2" and two.num_classes == 2
    np.testing.assert_array_equal(two.train.y, [1, 0, 1, 0])
    np.testing.assert_array_equal(two.train.x, data.train.x[[1, 3, 5, 7]])


def test_unions_hold_all_samples_and_no_labels(rng):
    one, two = dataset(rng, "one"), dataset(rng, "two", size=8)
    union = unite(one, two)
    assert union.name == "one+two" and len(union.train) == 28 and not union.labelled
    np.testing.assert_array_equal(union.train.x, np.concatenate([one.train.x, two.train.x]))
    with pytest.raises(DatasetError, match=r"samples differ: \(1, 4, 4\) uint8 and \(2, 4, 4\)"):
        unite(one, dataset(rng, shape=(2, 4, 4)))
    with pytest.raises(DatasetError, match="samples differ"):
        unite(one, dataset(rng, dtype=np.float32))


@pytest.mark.parametrize(
    "x, y, message",
    [
        (np.zeros((3, 2), np.int32), np.zeros(3, np.int32), "x must be uint8 or floating"),
        (np.zeros((3, 2), np.uint8), np.zeros(3, np.int64), "y must be int32"),
        (np.zeros((3, 2), np.uint8), np.zeros(2, np.int32), r"x must be \[N, ...\] and y \[N\]"),
        (np.zeros(3, np.uint8), np.zeros(3, np.int32), r"x must be \[N, ...\]"),
    ],
)
def test_impossible_splits_are_refused(x, y, message):
    with pytest.raises(DatasetError, match=message):
        Split(x, y)


def test_statistics_of_a_large_set_are_exact(rng):
    x = rng.integers(0, 256, (9000, 1, 3, 3), np.uint8)
    data = make_dataset("big", Split(x, np.zeros(9000, np.int32)), split(rng, shape=(1, 3, 3)), 4)
    np.testing.assert_allclose([data.mean, data.std], [(x / 255).mean(), (x / 255).std()], 1e-12)


def test_features_far_from_zero_keep_their_precision(rng):
    x = 1e7 + rng.normal(size=(500, 4))
    part = Split(x, np.zeros(500, np.int32))
    data = make_dataset("far", part, part, 1)
    np.testing.assert_allclose([data.mean, data.std], [x.mean(0), x.std(0)], rtol=1e-9)
    whole = as_batch(data.train, mean=data.mean, std=data.std)
    np.testing.assert_allclose(whole.x, (x - x.mean(0)) / x.std(0), atol=1e-5)
    swapped = Split(x.astype(">f8"), np.zeros(500, np.int32))  # as a file may hold it
    np.testing.assert_array_equal(as_batch(swapped, mean=data.mean, std=data.std).x, whole.x)


def test_each_feature_of_a_table_has_its_own_scale():
    """One mean and deviation for all left the small ones at 0."""
    rng = np.random.default_rng(1)
    x = (rng.normal(size=(5000, 4)) * [1e-3, 1, 1e3, 0] + [5, 0, -1e4, 7]).astype(np.float32)
    part = Split(x, np.zeros(5000, np.int32))
    data = make_dataset("table", part, part, 1)
    whole = np.asarray(as_batch(data.train, mean=data.mean, std=data.std).x)
    np.testing.assert_allclose(whole[:, :3].mean(0), 0, atol=2e-3)
    np.testing.assert_allclose(whole[:, :3].std(0), 1, atol=2e-3)
    assert (whole[:, 3] == 0).all() and data.std[3] == 1
    one = make_dataset("column", part[:10], part[:10], 1)
    assert len(one.mean) == 4
    constant = Split(np.ones((9, 2), np.float32), np.zeros(9, np.int32))
    with pytest.raises(DatasetError, match="table: the train split is constant"):
        make_dataset("table", constant, constant, 1)


def test_a_constant_of_which_rounding_leaves_a_deviation_is_refused():
    """Means of 0.3 and 0.1 in float64 are other numbers, and 1e-17 is no deviation to divide by."""
    x = np.random.default_rng(2).normal(size=(50, 3, 6, 6))
    x[:, 2] = 0.3
    labels = np.zeros(50, np.int32)
    with pytest.raises(DatasetError, match="own: channel 2 of the train split is constant"):
        make_dataset("own", Split(x, labels), Split(x, labels), 1)
    for shape in ((1000, 1, 6, 6), (1000, 6, 6), (1000, 1)):
        same = Split(np.full(shape, 0.1), np.zeros(1000, np.int32))
        with pytest.raises(DatasetError, match="own: the train split is constant"):
            make_dataset("own", same, same, 1)


@pytest.mark.parametrize("shape", [(32, 32, 3), (28, 28, 1), (48, 64, 4)])
def test_channels_at_the_end_are_not_taken_for_rows(rng, shape):
    last = split(rng, shape=shape)
    with pytest.raises(DatasetError, match=r"channels last.*hand over x.transpose\(0, 3, 1, 2\)"):
        make_dataset("own", last, last, 4)
    first = Split(last.x.transpose(0, 3, 1, 2), last.y)
    assert make_dataset("own", first, first, 4).input_shape == (shape[2], *shape[:2])
    meant = make_dataset("own", last, last, 4, channels_first=True)
    assert select_classes(meant, (0, 1)).input_shape == shape


@pytest.mark.parametrize("shape", [(16, 4, 4), (4, 4, 1), (8, 100, 1), (3, 32, 32), (3, 4, 4)])
def test_feature_maps_are_no_images_with_channels_last(rng, shape):
    part = split(rng, shape=shape)
    assert make_dataset("own", part, part, 4).input_shape == shape


@pytest.mark.parametrize("classes", [0, -1])
def test_a_number_of_classes_is_one(rng, classes):
    with pytest.raises(DatasetError, match="own: num_classes must be"):
        make_dataset("own", split(rng), split(rng), classes)
