"""ONNX files, run by `onnxruntime` on test images."""

import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import onnx
import onnxruntime
import pytest

from ntt_eqx.export import ExportError, save_onnx


def run(path, x):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": np.asarray(x)})[0]


@pytest.mark.parametrize("layout", ["dense", "sparse"])
def test_the_file_gives_the_same_logits(tmp_path, network, images, layout):
    path = tmp_path / "network.onnx"
    found = save_onnx(path, network, images, layout=layout)
    assert 0 <= found.difference <= 1e-5 and found.bytes == path.stat().st_size
    assert found.compacted.compact_parameters < found.compacted.parameters
    onnx.checker.check_model(onnx.load(path))
    more = jnp.concatenate([images, -images[:7]])  # another number of samples
    np.testing.assert_allclose(run(path, more), jax.vmap(network)(more), atol=1e-5)
    assert list(tmp_path.iterdir()) == [path]


def test_weights_of_a_sparse_file_are_sparse(tmp_path, sparse_networks, images):
    sparse = sparse_networks["lenet-300-100"]
    save_onnx(tmp_path / "a.onnx", sparse, images, layout="sparse", compact=False)
    graph = onnx.load(tmp_path / "a.onnx").graph
    kept = sorted(tensor.values.dims[0] for tensor in graph.sparse_initializer)
    assert kept == sorted(int(mask.sum()) for mask in jax.tree.leaves(sparse.mask))
    save_onnx(tmp_path / "b.onnx", sparse, images, compact=False)
    sizes = [(tmp_path / name).stat().st_size for name in ("a.onnx", "b.onnx")]
    assert sizes[0] < 0.12 * sizes[1]


@pytest.mark.parametrize("how", ["dynamic", "static"])
def test_weights_of_8_bits(tmp_path, sparse_networks, images, how):
    sparse = sparse_networks["lenet-300-100"]
    found = save_onnx(tmp_path / "a.onnx", sparse, images, quantise=how, compact=False)
    assert 1e-5 < found.difference < 0.5 and found.agreement > 0.8
    assert found.bytes < 0.3 * 4 * sum(m.size for m in jax.tree.leaves(sparse.mask))
    expected = jax.vmap(sparse)(images)
    assert abs(run(tmp_path / "a.onnx", images) - expected).max() <= found.difference + 1e-6


def test_half_precision_is_compared_by_its_own_rounding(tmp_path, getkey):
    model = eqx.nn.MLP(16, 5, 64, 2, dtype=jnp.float16, key=getkey())
    x = jax.random.normal(getkey(), (32, 16), jnp.float16)
    found = save_onnx(tmp_path / "a.onnx", model, x)
    assert run(tmp_path / "a.onnx", x).dtype == np.float16 and 0 < found.difference < 0.01
    with pytest.raises(ExportError, match="`tolerance` accepts more"):
        save_onnx(tmp_path / "b.onnx", model, x, tolerance=1e-6)


def test_dropout_is_off_and_plain_models_and_integers_go(tmp_path, getkey):
    class Tokens(eqx.Module):
        embed: eqx.nn.Embedding
        drop: eqx.nn.Dropout
        head: eqx.nn.Linear

        def __call__(self, tokens):
            h = jnp.mean(jax.vmap(self.embed)(tokens), axis=0)
            return self.head(self.drop(jax.nn.relu(h)))

    model = Tokens(
        eqx.nn.Embedding(11, 8, key=getkey()),
        eqx.nn.Dropout(0.5),
        eqx.nn.Linear(8, 3, key=getkey()),
    )
    tokens = jax.random.randint(getkey(), (4, 6), 0, 11)
    save_onnx(tmp_path / "a.onnx", model, tokens)
    expected = jax.vmap(eqx.nn.inference_mode(model))(tokens)
    np.testing.assert_allclose(run(tmp_path / "a.onnx", tokens), expected, atol=1e-5)


def test_a_file_that_computes_something_else_is_not_written(tmp_path, small, monkeypatch):
    sparse, x = small
    import jax2onnx

    convert = jax2onnx.to_onnx
    wrong = eqx.tree_at(
        lambda m: m.layers[1].bias, sparse.to_dense(), replace_fn=lambda b: b + 1e-3
    )
    monkeypatch.setattr(
        jax2onnx, "to_onnx", lambda f, *args, **kwargs: convert(jax.vmap(wrong), *args, **kwargs)
    )
    with pytest.raises(ExportError, match="^save_onnx: the outputs of the file differ .* by 0.001"):
        save_onnx(tmp_path / "a.onnx", sparse, x)
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_exported_is_named(tmp_path, small, monkeypatch):
    sparse, x = small
    with pytest.raises(ValueError, match="^save_onnx: the model fails on one sample"):
        save_onnx(tmp_path / "a.onnx", sparse, jnp.ones((2, 5)))
    with pytest.raises(ValueError, match="^save_onnx: layout must be"):
        save_onnx.__wrapped__(tmp_path / "a.onnx", sparse, x, layout="csr")
    with pytest.raises(ValueError, match="^save_onnx: x has NaN"):
        save_onnx(tmp_path / "a.onnx", sparse, x * jnp.nan)

    class Special(eqx.Module):
        w: jax.Array

        def __call__(self, x):
            return jax.pure_callback(np.sin, x, self.w * x, vmap_method="expand_dims")

    with pytest.raises(NotImplementedError, match="^save_onnx: jax2onnx cannot convert Special"):
        save_onnx(tmp_path / "a.onnx", Special(jnp.ones(4)), x)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(
        ImportError, match=r"'onnxruntime'; install it with: pip install 'ntt-eqx\[ex"
    ):
        save_onnx(tmp_path / "a.onnx", sparse, x)
    assert not list(tmp_path.iterdir())
