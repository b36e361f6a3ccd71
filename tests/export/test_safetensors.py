"""`.safetensors` files: what other programs find in them, and the way back."""

import json
import struct
import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load, load_file, save_file

import ntt_eqx as ntt
from ntt_eqx.export import load_safetensors, save_safetensors


def blank(sparse):
    return eqx.filter_eval_shape(lambda m: m, sparse.model)


def same(a, b):
    return bool(eqx.tree_equal(a, b))


def test_a_sparse_file_gives_the_same_mask_weights_and_logits(tmp_path, network, images):
    save_safetensors(tmp_path / "a.safetensors", network)
    again = load_safetensors(tmp_path / "a.safetensors", blank(network))
    assert isinstance(again, ntt.SparseModel)
    assert same(again.mask, network.mask) and same(again.to_dense(), network.to_dense())
    np.testing.assert_array_equal(jax.vmap(again)(images), jax.vmap(network)(images))


def test_a_dense_file_gives_the_plain_model(tmp_path, network, images):
    save_safetensors(tmp_path / "a.safetensors", network, layout="dense")
    again = load_safetensors(tmp_path / "a.safetensors", blank(network))
    assert same(again, network.to_dense())
    np.testing.assert_array_equal(jax.vmap(again)(images), jax.vmap(network)(images))


def test_what_the_library_itself_reads(tmp_path, network):
    """The reader of the format knows nothing of this package: the documented names suffice."""
    dense, sparse = tmp_path / "dense.safetensors", tmp_path / "sparse.safetensors"
    save_safetensors(dense, network, layout="dense", metadata={"trained_on": "nothing"})
    save_safetensors(sparse, network)
    whole, parts = load_file(dense), load_file(sparse)
    with safe_open(dense, "np") as file:
        assert file.metadata()["trained_on"] == "nothing"
    with safe_open(sparse, "np") as file:
        shapes = json.loads(file.metadata()["shapes"])
    assert "output.bias" in whole and len(shapes) == len(jax.tree.leaves(network.mask))
    for name, values in whole.items():
        if name in shapes:
            rebuilt = np.zeros(shapes[name], np.float32)
            rebuilt.reshape(-1)[parts[f"{name}.indices"]] = parts[f"{name}.values"]
            assert len(parts[f"{name}.values"]) == round(0.03 * values.size)
        else:
            rebuilt = parts[name]
        np.testing.assert_array_equal(rebuilt, values)
    np.testing.assert_array_equal(whole["output.bias"], network.model.output.bias)


def test_a_kept_weight_of_zero_stays_kept_and_an_empty_row_empty(tmp_path, small):
    sparse, _ = small
    save_safetensors(tmp_path / "a.safetensors", sparse)
    again = load_safetensors(tmp_path / "a.safetensors", sparse.model)
    assert bool(again.mask.layers[0].weight[2, 1]) and not bool(
        again.mask.layers[0].weight[5].any()
    )
    assert same(again.mask, sparse.mask)
    assert again.model.activation is sparse.model.activation


class Odd(eqx.Module):
    """Arrays of every kind, under names that need care."""

    parts: dict
    key: jax.Array
    scale: np.ndarray
    count: int


def test_other_dtypes_and_random_keys(tmp_path):
    odd = Odd(
        {
            "half": jnp.arange(3, dtype=jnp.bfloat16),
            "flags": jnp.array([True, False]),
            "number": jnp.array(7),
        },
        jax.random.key(5),
        np.arange(4, dtype=np.float16),
        3,
    )
    save_safetensors(tmp_path / "a.safetensors", odd, layout="dense")
    again = load_safetensors(tmp_path / "a.safetensors", odd)
    assert again.parts["half"].dtype == jnp.bfloat16 and again.parts["number"].shape == ()
    np.testing.assert_array_equal(
        jax.random.key_data(again.key), jax.random.key_data(jax.random.key(5))
    )
    assert again.count == 3 and isinstance(again.scale, np.ndarray)
    np.testing.assert_array_equal(again.scale, odd.scale)
    np.testing.assert_array_equal(again.parts["half"], odd.parts["half"])


def test_what_does_not_fit_is_named(tmp_path, small):
    sparse, _ = small
    path = tmp_path / "a.safetensors"
    with pytest.raises(ValueError, match="^save_safetensors: MLP has no mask"):
        save_safetensors(path, sparse.model)
    with pytest.raises(ValueError, match="^save_safetensors: layout must be 'sparse' or 'dense'"):
        save_safetensors.__wrapped__(path, sparse, layout="csr")  # past the types of the tests
    with pytest.raises(ValueError, match="^save_safetensors: the metadata 'shapes'"):
        save_safetensors(path, sparse, metadata={"shapes": "mine"})
    assert not list(tmp_path.iterdir())

    save_safetensors(path, sparse)
    wide = eqx.nn.MLP(4, 3, 9, depth=1, key=jax.random.key(0))
    with pytest.raises(
        ValueError, match=r"layers\.0\.weight do not fit|layers\.0\.bias is float32"
    ):
        load_safetensors(path, wide)
    deep = eqx.nn.MLP(4, 3, 8, depth=2, key=jax.random.key(0))
    with pytest.raises(ValueError, match="has no array for layers.2|is float32"):
        load_safetensors(path, deep)
    short = eqx.tree_at(lambda m: m.layers, sparse.model, sparse.model.layers[:1])
    with pytest.raises(ValueError, match="holds layers.1.*, for which there is no place"):
        load_safetensors(path, short)


def test_damaged_files_are_named(tmp_path, small):
    sparse, _ = small
    path = tmp_path / "a.safetensors"
    save_safetensors(path, sparse)
    content = path.read_bytes()
    for size in (0, 7, 8, 40, len(content) - 1):
        path.write_bytes(content[:size])
        with pytest.raises(ValueError, match=f"^load_safetensors: {path} is damaged"):
            load_safetensors(path, sparse.model)
    (length,) = struct.unpack("<Q", content[:8])
    for places in ([3, 2], [-1, 2], [0, 32], [1, 1]):  # out of order, out of range, twice
        tensors = dict(load(content))
        tensors["layers.0.weight.indices"] = np.array(places, np.int32)
        tensors["layers.0.weight.values"] = np.ones(2, np.float32)
        save_file(tensors, path, json.loads(content[8 : 8 + length])["__metadata__"])
        with pytest.raises(ValueError, match="indices of layers.0.weight do not fit"):
            load_safetensors(path, sparse.model)
    save_file({"w": np.ones(2)}, path)
    with pytest.raises(ValueError, match="was not written by save_safetensors"):
        load_safetensors(path, sparse.model)
    with pytest.raises(FileNotFoundError):
        load_safetensors(tmp_path / "absent", sparse.model)


def test_a_missing_package_is_named(tmp_path, small, monkeypatch):
    sparse, _ = small
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.delitem(sys.modules, "safetensors.numpy", raising=False)
    with pytest.raises(
        ImportError, match=r"^save_safetensors: needs the package 'safetensors'.*ex"
    ):
        save_safetensors(tmp_path / "a", sparse)
    assert not (tmp_path / "a").exists()


def state_dict(model, **changes):
    """The arrays of a small convolutional network as PyTorch calls and shapes them."""
    found = {
        "features.0.weight": model.conv1.weight,
        "features.0.bias": model.conv1.bias.reshape(-1),
        "features.3.weight": model.conv2.weight,
        "features.3.bias": model.conv2.bias.reshape(-1),
        "fc.weight": model.hidden.weight,
        "fc.bias": model.hidden.bias,
        "output.weight": model.output.weight,
        "output.bias": model.output.bias,
    }
    found = {name: np.asarray(array) for name, array in found.items()} | changes
    return {name: array for name, array in found.items() if array is not None}


def torch_names(model):
    names = {"conv1": "features.0", "conv2": "features.3", "hidden": "fc"}
    parts = ("weight", "bias")
    return {f"{ours}.{p}": f"{theirs}.{p}" for ours, theirs in names.items() for p in parts}


@pytest.fixture
def foreign(tmp_path, sparse_networks):
    model = sparse_networks["lenet-5"].model
    return tmp_path / "torch.safetensors", model, torch_names(model)


def test_a_state_dict_of_another_program_comes_by_its_names(foreign, images):
    path, model, names = foreign
    save_file(state_dict(model), path)
    again = load_safetensors(path, eqx.filter_eval_shape(lambda m: m, model), names=names)
    assert same(again, model)
    by_function = lambda name: names.get(name, name)
    assert same(load_safetensors(path, model, names=by_function), model)
    np.testing.assert_array_equal(jax.vmap(again)(images), jax.vmap(model)(images))


def test_halves_become_whole_and_counters_are_ignored(foreign):
    path, model, names = foreign
    half = np.asarray(model.output.weight).astype(np.float16)
    more = {"output.weight": half, "norm.num_batches_tracked": np.array(3)}
    save_file(state_dict(model, **more), path)
    again = load_safetensors(path, model, names=names, ignore=["*.num_batches_tracked"])
    assert again.output.weight.dtype == jnp.float32
    np.testing.assert_array_equal(again.output.weight, half.astype(np.float32))


def test_a_state_dict_that_does_not_fit_is_explained(foreign):
    path, model, names = foreign
    wide = np.zeros((500, 800))
    for changes, message in [
        ({"fc.weight": None}, r"it lacks 'fc.weight' \(for hidden.weight\)\. names maps"),
        ({"fc.wait": wide}, "it holds 'fc.wait', for which there is no place"),
        ({"fc.weight": wide.T}, r"hidden.weight is float64\[800, 500\], but the model needs"),
        ({"fc.weight": wide}, r"is float64\[500, 800\], but the model needs float32"),
        ({"output.bias": np.zeros(10, np.int32)}, r"output.bias is int32\[10\]"),
    ]:
        save_file(state_dict(model, **changes), path)
        with pytest.raises(
            ValueError, match=f"^load_safetensors: .*torch.safetensors: .*{message}"
        ):
            load_safetensors(path, model, names=names)
    save_file(state_dict(model), path)
    with pytest.raises(ValueError, match="lacks .*and 1 more; it holds .* and 1 more"):
        load_safetensors(path, model, names={})
    with pytest.raises(ValueError, match="names: the model has no array 'head.weight'"):
        load_safetensors(path, model, names={"head.weight": "fc.weight"})
    with pytest.raises(ValueError, match="several arrays of the model take 'fc.weight'"):
        load_safetensors(path, model, names={**names, "output.weight": "fc.weight"})
    with pytest.raises(ValueError, match="was not written by save_safetensors; give names="):
        load_safetensors(path, model)
