"""Random crops and flips: against a loop over pixels, the same on host and device, resumed."""

import itertools
import json

import numpy as np
import pytest
from helpers.refusals import unchecked
from hypothesis import given, settings, strategies as st

import ntt_eqx as ntt
from ntt_eqx.data import Split, batches
from ntt_eqx.data._views import RandomViews


def split(shape=(12, 3, 5, 4), dtype=np.uint8, seed=0):
    draw = np.random.default_rng(seed)
    x = draw.integers(1, 256, shape, np.uint8)  # no zeros, so that the border can be told
    return Split(x.astype(dtype), np.arange(len(x), dtype=np.int32))


def xs(iterator, count):
    return [np.asarray(batch.x) for batch in itertools.islice(iterator, count)]


def one_view(image, pad, down, right, flipped):
    """The view pixel by pixel."""
    channels, height, width = image.shape
    out = np.zeros_like(image)
    for c, i, j in np.ndindex(channels, height, width):
        column = width - 1 - j if flipped else j
        row, column = i + down - pad, column + right - pad
        if 0 <= row < height and 0 <= column < width:
            out[c, i, j] = image[c, row, column]
    return out


@settings(max_examples=30, deadline=None)
@given(
    pad=st.integers(0, 6),
    flip=st.booleans(),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 5)),
    seed=st.integers(0, 2**40),
    number=st.integers(0, 2**40),
)
def test_a_view_is_what_a_loop_over_pixels_makes(pad, flip, shape, seed, number):
    x = split((4, *shape)).x
    views = RandomViews(x, pad, flip, seed)
    drawn = views.of_batch(number, 4)
    expected = np.stack([one_view(x[i], pad, *(v[i] for v in drawn)) for i in range(4)])
    np.testing.assert_array_equal(views.cut(x.copy(), *drawn), expected)
    assert all(0 <= v <= 2 * pad for v in (*drawn.down, *drawn.right))
    assert flip or not drawn.flipped.any()


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
@pytest.mark.parametrize("how", [{}, {"crop": 2}, {"flip": True}, {"crop": 2, "flip": True}])
def test_the_device_prepares_the_bits_of_the_host(dtype, how):
    given = {"seed": 3, "mean": (0.1, 0.2, 0.3), "std": (0.5, 0.6, 0.7), **how}
    host = xs(batches(split(dtype=dtype), 5, **given), 6)
    device = xs(batches(split(dtype=dtype), 5, on_device=True, **given), 6)
    np.testing.assert_array_equal(device, host)


def test_a_table_is_kept_on_the_device_too():
    table = Split(np.arange(12, dtype=np.float32).reshape(6, 2), np.arange(6, dtype=np.int32))
    host, device = (xs(batches(table, 4, seed=1, on_device=on), 3) for on in (False, True))
    np.testing.assert_array_equal(device, host)


def test_without_crop_and_flip_the_batches_are_what_they_were():
    plain = xs(batches(split(), 5, seed=3), 4)
    order = np.concatenate([np.random.default_rng([3, 1, e]).permutation(12) for e in range(2)])
    expected = split().x[order[:20]].astype(np.float32).reshape(4, 5, 3, 5, 4)
    np.testing.assert_allclose(np.stack(plain) * 255, expected, rtol=1e-6)


def test_the_padding_is_black_and_not_the_mean():
    image = Split(np.full((1, 1, 3, 3), 255, np.uint8), np.zeros(1, np.int32))
    seen = np.concatenate(xs(batches(image, 1, seed=0, mean=0.5, std=0.25, crop=2), 40))
    assert set(np.unique(seen)) == {-2.0, 2.0}


def test_every_offset_and_both_sides_come_up():
    drawn = [RandomViews(split().x, 1, True, 0).of_batch(n, 12) for n in range(20)]
    seen = {(int(d), int(r), int(f)) for views in drawn for d, r, f in zip(*views, strict=True)}
    assert seen == set(itertools.product(range(3), range(3), range(2)))


@pytest.mark.parametrize("threads", [0, 2])
@pytest.mark.parametrize("on_device", [False, True])
def test_a_resumed_iterator_goes_on_with_the_same_views(threads, on_device):
    how = {"seed": 2, "crop": 1, "flip": True, "num_threads": threads, "on_device": on_device}
    one = batches(split(), 5, **how)
    xs(one, 7)
    state = json.loads(json.dumps(one.get_state()))
    other = batches(split(), 5, **how)
    other.set_state(state)
    np.testing.assert_array_equal(xs(other, 5), xs(one, 5))


def test_seeds_and_batches_have_views_of_their_own():
    views = {tuple(RandomViews(split().x, 4, True, s).of_batch(n, 12).down) for s in (0, 1, 2)
             for n in range(3)}  # fmt: skip
    assert len(views) == 9


@pytest.mark.parametrize(
    ("samples", "how", "message"),
    [
        (split(), {"crop": -1}, "crop must be a number of pixels, got -1"),
        (split(), {"crop": 1.5}, "crop must be a number of pixels, got 1.5"),
        (split((6, 4)), {"crop": 1}, r"crop and flip are for images .*samples \(4,\)"),
        (split((6, 4)), {"flip": True}, "crop and flip are for images"),
        (split(dtype=np.float64), {"on_device": True}, "on_device takes samples of .*float64"),
        (split(dtype=">f4"), {"on_device": True}, "on_device takes samples of .*>f4"),
    ],
)
def test_what_cannot_be_is_refused(samples, how, message):
    with unchecked(), pytest.raises(ValueError, match=message):
        batches(samples, 3, seed=0, **how)


def test_inside_a_mesh_samples_are_not_kept_on_one_device():
    with ntt.distribute(), pytest.raises(ValueError, match="not inside ntt.distribute"):
        batches(split(), 4, seed=0, on_device=True)
