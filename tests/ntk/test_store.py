"""Kernels on disk: whole, resumed, and never a mixture of two."""

import jax
import numpy as np
import pytest

import ntt_eqx as ntt
from ntt_eqx._ntk import _store, _tiles

tensorstore = pytest.importorskip("tensorstore")


def model_and_samples(getkey, n=11, m=7):
    model = ntt.models.make_model("lenet-300-100", (1, 4, 4), 3, key=getkey())
    sparse = ntt.prune(model, ntt.scores.Magnitude(), 0.3)
    return (
        sparse,
        jax.random.normal(getkey(), (n, 1, 4, 4)),
        jax.random.normal(getkey(), (m, 1, 4, 4)),
    )


@pytest.mark.parametrize("outputs, symmetric", [("trace", True), ("full", False)])
def test_the_array_is_the_kernel(getkey, tmp_path, outputs, symmetric):
    model, x1, x2 = model_and_samples(getkey)
    x2 = None if symmetric else x2
    store = ntt.ntk_to_zarr(tmp_path / "k", model, x1, x2, tile=(4, 3), outputs=outputs)
    kernel = ntt.ntk(model, x1, x2, outputs=outputs)
    found = store.read().result()
    assert found.shape == kernel.shape and found.dtype == kernel.dtype
    np.testing.assert_allclose(found, kernel, rtol=1e-5, atol=1e-5)


def test_goes_on_where_it_stopped(getkey, tmp_path, monkeypatch):
    model, x, _ = model_and_samples(getkey)
    calls = []

    def counted(*args, **options):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return ntt.ntk(*args, **options)

    monkeypatch.setattr(_tiles, "ntk", counted)
    write = lambda: ntt.ntk_to_zarr(tmp_path / "k", model, x, tile=(4, 4), outputs="trace")
    with pytest.raises(KeyboardInterrupt):
        write()
    store = write()
    assert len(calls) == 3 + 6 - 2  # six tiles of the upper triangle, of which two were there
    kernel = ntt.ntk(model, x, outputs="trace")
    np.testing.assert_allclose(store.read().result(), kernel, rtol=1e-5, atol=1e-5)
    write()
    assert len(calls) == 7


def test_another_kernel_is_refused(getkey, tmp_path):
    model, x, other = model_and_samples(getkey)
    ntt.ntk_to_zarr(tmp_path / "k", model, x, outputs="trace")
    for args, options in (
        ((model, other), {"outputs": "trace"}),
        ((model, x), {"outputs": "trace", "kernel": "ambient"}),
        ((model, x, x), {"outputs": "trace"}),
        ((model.to_dense(), x), {"outputs": "trace"}),
        ((model, x), {"outputs": "trace", "tile": (2, 2)}),
    ):
        with pytest.raises(ValueError, match="ntk_to_zarr: .* holds the kernel of another model"):
            ntt.ntk_to_zarr(tmp_path / "k", *args, **options)
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "a.txt").write_text("a")
    with pytest.raises(ValueError, match="holds something else"):
        ntt.ntk_to_zarr(tmp_path / "letters", model, x)
    with pytest.raises(ValueError, match="ntk_to_zarr: tile"):
        ntt.ntk_to_zarr(tmp_path / "new", model, x, tile=(0, 1))


def test_samples_that_are_read_in_parts_are_the_same(getkey, tmp_path, monkeypatch):
    """Whole or in parts, from memory or mapped from a file, in either byte order."""
    model, x, _ = model_and_samples(getkey)
    x = np.asarray(x)
    mapped = np.lib.format.open_memmap(tmp_path / "x.npy", "w+", x.dtype, x.shape)
    mapped[:] = x
    given = (x, mapped, x.astype(x.dtype.newbyteorder()))
    whole = [_store._identity(model, (z, z), True, {}) for z in given]
    monkeypatch.setattr(_store, "_READ", 100)
    parts = [_store._identity(model, (z, z), True, {}) for z in given]
    assert len({*whole, *parts}) == 1
    assert _store._identity(model, (x[::-1], x), True, {}) != whole[0]
