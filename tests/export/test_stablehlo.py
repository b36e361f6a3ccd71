"""StableHLO files, read here and by JAX itself."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ntt_eqx as ntt
from ntt_eqx.export import load_stablehlo, save_stablehlo


@pytest.fixture
def file(tmp_path, small):
    sparse, x = small
    found = save_stablehlo(tmp_path / "a.stablehlo", sparse, x)
    assert 0 <= found.difference <= 1e-5
    return tmp_path / "a.stablehlo", sparse


def test_any_number_of_samples(file):
    path, sparse = file
    for read in (load_stablehlo, lambda p: jax.export.deserialize(bytearray(p.read_bytes()))):
        exported = read(path)
        assert set(exported.platforms) == {"cpu", "cuda", "rocm", "tpu"}
        for n in (1, 5):
            x = jax.random.normal(jax.random.key(n), (n, 4))
            np.testing.assert_allclose(exported.call(x), jax.vmap(sparse)(x), atol=1e-5)


def test_changed_and_foreign_bytes_are_refused(file):
    path, _ = file
    whole = path.read_bytes()
    for place in range(0, len(whole), max(1, len(whole) // 50)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(ValueError, match="^load_stablehlo: .*a.stablehlo is damaged, or no fi"):
            load_stablehlo(path)
    for content in (b"", whole[:-1], whole[: len(whole) // 2], b"hello"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="is damaged, or no file of save_stablehlo"):
            load_stablehlo(path)


def test_what_cannot_be_exported_is_named(tmp_path, small):
    class Special(eqx.Module):
        w: jax.Array

        def __call__(self, x):
            return jax.pure_callback(np.sin, x, self.w * x, vmap_method="expand_dims")

    with pytest.raises(NotImplementedError, match="^save_stablehlo: Special cannot be exported"):
        save_stablehlo(tmp_path / "a", Special(jnp.ones(4)), jnp.ones((2, 4)))
    assert not list(tmp_path.iterdir())


def test_a_model_that_cannot_be_smaller_is_exported_as_it_is(tmp_path, getkey):
    class Fixed(eqx.Module):
        """Its middle must have 6 units, whatever its arrays hold."""

        one: eqx.nn.Linear
        two: eqx.nn.Linear

        def __call__(self, x):
            h = self.one(x)
            return self.two(h * (1.0 if h.shape == (6,) else jnp.nan))

    model = Fixed(eqx.nn.Linear(4, 6, key=getkey()), eqx.nn.Linear(6, 2, key=getkey()))
    mask = jax.tree.map(lambda m: m.at[0].set(False), ntt.sparsify(model).mask)
    sparse, x = ntt.SparseModel(model, mask), jnp.ones((3, 4))
    found = save_stablehlo(tmp_path / "a", sparse, x)
    assert found.compacted is None and "is another function once it is smaller" in found.reason
    assert f"not compacted: {found.reason}" in str(found)
