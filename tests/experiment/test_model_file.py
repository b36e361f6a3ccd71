"""Model files come back bit for bit; broken, foreign, newer and hostile ones are named."""

import hashlib
import io
import json
import pickle
import re
import struct
import zipfile

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.tiers import FAMILIES, default_only

from ntt_eqx import (
    SparseModel,
    TrainConfig,
    make_mask,
    ntk,
    scores,
    sparsify,
    train_init,
    train_step,
)
from ntt_eqx.experiment._errors import ExperimentError
from ntt_eqx.experiment.cli import main
from ntt_eqx.experiment.model_file import encode_model, load_model
from ntt_eqx.models import MODELS, make_model

from .conftest import TwoLayers

HEADER = {
    "model": "tiny",
    "arguments": {"input_shape": [1, 4, 4], "num_classes": 3},
    "method": "random",
    "density": 0.2,
    "seed": 0,
}
MAGIC = b"ntt-eqx model 2\n"


def save_model(path, model, header):
    path.write_bytes(encode_model(model, header))


def dense_under_a_mask():
    sparse = sparsify(TwoLayers((1, 4, 4), 3, key=jax.random.key(3)))
    return sparse.with_mask(make_mask(scores.Random(jax.random.key(1))(sparse), 0.2))


def network():
    """A network as its file gives it back: pruned weights are zero."""
    sparse = dense_under_a_mask()
    return SparseModel(sparse.to_dense(), sparse.mask)


@pytest.mark.parametrize("name", default_only(MODELS, *FAMILIES))
def test_every_architecture_comes_back(name, tmp_path):
    """Also those with numbers that are no arrays, such as where a pool starts its maximum."""
    shape = (1, 28, 28) if name.startswith("lenet") else (3, 32, 32)
    sparse = sparsify(make_model(name, shape, 10, key=jax.random.key(0)))
    arguments = {"input_shape": list(shape), "num_classes": 10}
    save_model(tmp_path / "net.eqx", sparse, {**HEADER, "model": name, "arguments": arguments})
    found = load_model(tmp_path / "net.eqx").model
    assert eqx.tree_equal(found, sparse)


@pytest.fixture
def path(tmp_path):
    save_model(tmp_path / "net.eqx", network(), HEADER)
    return tmp_path / "net.eqx"


def parts(content):
    (length,) = struct.unpack("<Q", content[len(MAGIC) :][:8])
    start = len(MAGIC) + 8
    return json.loads(content[start : start + length]), content[start + length : -32]


def join(header, payload):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    content = MAGIC + struct.pack("<Q", len(text)) + text + payload
    return content + hashlib.sha256(content).digest()


def of_version_2(content):
    buffer = io.BytesIO()
    eqx.tree_serialise_leaves(buffer, dense_under_a_mask())
    return with_header(with_payload(content, buffer.getvalue()), version=2)


def of_version_1(content):
    header, _ = parts(content)
    sparse, buffer = dense_under_a_mask(), io.BytesIO()
    eqx.tree_serialise_leaves(buffer, (sparse.model, sparse.masks))  # weights first
    payload = buffer.getvalue()
    digest = hashlib.sha256(payload).hexdigest()
    old = {**header, "version": 1, "bytes": len(payload), "sha256": digest}
    text = json.dumps(old).encode()
    return b"ntt-eqx model\n" + struct.pack("<Q", len(text)) + text + payload


def with_header(content, **changes):
    header, payload = parts(content)
    header.update(changes)
    return join({k: v for k, v in header.items() if v is not ...}, payload)


def with_payload(content, payload):
    return with_header(join(parts(content)[0], payload), bytes=len(payload))


def npy(array, **options):
    buffer = io.BytesIO()
    np.save(buffer, array, **options)
    return buffer.getvalue()


def test_a_file_gives_back_every_bit(path):
    found = load_model(path)
    assert found.header.items() >= HEADER.items()
    for a, b in zip(jax.tree.leaves(found.model), jax.tree.leaves(network()), strict=True):
        assert a.dtype == b.dtype and np.array_equal(a, b)


def test_the_same_network_gives_the_same_file(path, tmp_path):
    save_model(tmp_path / "again", load_model(path).model, HEADER)
    assert (tmp_path / "again").read_bytes() == path.read_bytes()


def zipped():
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("../../evil", "x")
    return buffer.getvalue()


class Evil:
    """Leaves a trace if it is unpickled."""

    def __reduce__(self):
        return (exec, ("import builtins; builtins.was_executed = True",))


def beyond(payload):
    """The last bit of the second mask, 18 entries in 3 bytes, is set."""
    bits = payload.index(b"(3,)")
    start = payload.index(b"\n", bits) + 1
    return payload[: start + 2] + bytes([payload[start + 2] | 1]) + payload[start + 3 :]


def more(payload):
    start = payload.index(b"\n") + 1
    return payload[:start] + b"\xff" + payload[start + 1 :]


def arguments(**changes):
    return {"arguments": {**HEADER["arguments"], **changes}}


LIE = npy(np.zeros(4, np.float32)).replace(b"(4,), ", b"(9999999999999999,), ".ljust(6))
BROKEN = {
    "empty": (lambda c: b"", "not an ntt-eqx model file"),
    "text": (lambda c: b"hello\n", "not an ntt-eqx model file"),
    "zip": (lambda c: zipped(), "not an ntt-eqx model file"),
    "pickle": (lambda c: pickle.dumps(Evil()), "not an ntt-eqx model file"),
    "npy": (lambda c: npy(np.zeros(3)), "not an ntt-eqx model file"),
    "magic only": (lambda c: MAGIC, "truncated"),
    "half a length": (lambda c: c[: len(MAGIC) + 4], "truncated"),
    "half a header": (lambda c: c[: len(MAGIC) + 60], "header is not whole"),
    "no arrays": (lambda c: join(parts(c)[0], b""), "truncated: 0 of"),
    "last byte missing": (lambda c: c[:-1], "truncated: "),
    "one byte more": (lambda c: c + b"\0", "truncated: "),
    "its end missing": (lambda c: c[:-33], "truncated: "),
    "other class list": (lambda c: c.replace(b'"num_classes": 3', b'"num_classes": 1'), "checksum"),
    "other density": (lambda c: c.replace(b'"density": 0.2', b'"density": 0.3'), "checksum"),
    "other version": (lambda c: c.replace(b'"version": 3', b'"version": 0'), "checksum"),
    "density of 3": (lambda c: with_header(c, density=3), "'density' is 3, which is not above 0"),
    "seed below 0": (lambda c: with_header(c, seed=-1), "field 'seed' is -1, which is not 0 to"),
    "endless header": (lambda c: MAGIC + struct.pack("<Q", 2**63) + c, "header is not whole"),
    "flipped bit": (lambda c: c[:-1] + bytes([c[-1] ^ 1]), "checksum"),
    "header of bytes": (lambda c: join(b"\xff\xfe", b""), "not JSON"),
    "deep header": (lambda c: join(b"[" * 50_000, b""), "not JSON"),
    "header is a list": (lambda c: join([1], b""), "does not name a version"),
    "no version": (lambda c: with_header(c, version=...), "does not name a version"),
    "version true": (lambda c: with_header(c, version=True), "does not name a version"),
    "newer": (lambda c: with_header(c, version=4), r"newer version \(format 4.*update ntt-eqx"),
    "no model": (lambda c: with_header(c, model=...), "header: field 'model' is missing"),
    "model of a list": (lambda c: with_header(c, model=["tiny"]), "field 'model'"),
    "density of text": (lambda c: with_header(c, density="x"), "field 'density'"),
    "unknown model": (lambda c: with_header(c, model="huge"), "unknown model 'huge'"),
    "no arguments": (lambda c: with_header(c, arguments={}), "cannot build the model"),
    "shape of text": (lambda c: with_header(c, **arguments(input_shape="abc")), "cannot build"),
    "negative shape": (lambda c: with_header(c, **arguments(input_shape=[1, -4, 4])), "net.eqx: "),
    "short shape": (lambda c: with_header(c, **arguments(input_shape=[4])), "cannot build"),
    "classes of text": (lambda c: with_header(c, **arguments(num_classes="3")), "cannot build"),
    "other classes": (lambda c: with_header(c, **arguments(num_classes=2)), "do not fit 'tiny'"),
    "memory bomb": (
        lambda c: with_header(c, **arguments(input_shape=[1, 10**6, 10**4])),
        "do not fit 'tiny' .too few bytes",
    ),
    "pickled arrays": (
        lambda c: with_payload(
            c, npy(np.array([Evil()], dtype=object), allow_pickle=True) + bytes(2000)
        ),
        "do not fit 'tiny'",
    ),
    "array that lies": (lambda c: with_payload(c, LIE + bytes(2000)), "do not fit 'tiny'"),
    "noise": (lambda c: with_payload(c, bytes(range(256)) * 20), "do not fit 'tiny'"),
    "bits beyond the mask": (lambda c: with_payload(c, beyond(parts(c)[1])), "more entries than"),
    "a mask that keeps more": (lambda c: with_payload(c, more(parts(c)[1])), "changed shape"),
    "one array more": (lambda c: with_payload(c, parts(c)[1] + npy(np.zeros(2))), "more arrays"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_is_named_and_nothing_is_executed(case, path):
    import builtins

    change, message = BROKEN[case]
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ExperimentError, match=message) as caught:
        load_model(path)
    assert str(path) in str(caught.value)
    assert not hasattr(builtins, "was_executed")


def test_every_flipped_bit_is_noticed(path):
    """In the header as in the arrays: the class list, mean and deviation, density and seed."""
    whole = path.read_bytes()
    end = len(whole) - len(parts(whole)[1])
    for place in (*range(0, end, 3), *range(end, len(whole), 97), len(whole) - 1):
        path.write_bytes(
            whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :]
        )
        with pytest.raises(ExperimentError):
            load_model(path)


def test_files_of_version_1_are_read_with_a_warning(path):
    path.write_bytes(of_version_1(path.read_bytes()))
    with pytest.warns(UserWarning, match="net.eqx: written by ntt-eqx 0.2 or earlier"):
        found = load_model(path)
    assert eqx.tree_equal(found.model, dense_under_a_mask())
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(ExperimentError, match="checksum"):
        load_model(path)


def test_files_of_version_2_are_read_with_every_weight(path):
    path.write_bytes(of_version_2(path.read_bytes()))
    assert eqx.tree_equal(load_model(path).model, dense_under_a_mask())
    path.write_bytes(with_payload(path.read_bytes(), parts(path.read_bytes())[1][:-1]))
    with pytest.raises(ExperimentError, match="do not fit 'tiny'"):
        load_model(path)


def test_a_file_holds_kept_weights_and_a_bit_for_each_other(tmp_path):
    """66,550 bytes of a LeNet-300-100 at 3 %: 6.2 % of its dense weights, and the header."""
    sparse = sparsify(make_model("lenet-300-100", (1, 28, 28), 10, key=jax.random.key(0)))
    sparse = sparse.with_mask(make_mask(scores.Magnitude()(sparse), 0.03))
    arguments = {"input_shape": [1, 28, 28], "num_classes": 10}
    content = encode_model(sparse, {**HEADER, "model": "lenet-300-100", "arguments": arguments})
    sizes = [mask.size for mask in jax.tree.leaves(sparse.mask)]
    kept = sum(4 * round(0.03 * size) + -(-size // 8) for size in sizes)
    assert kept + 4 * 410 < len(content) < kept + 4 * 410 + 2000
    assert len(content) < 0.065 * 4 * (sum(sizes) + 410)


def test_a_file_of_64_bit_types_says_what_reads_it(path, tmp_path):
    with jax.enable_x64(True):
        wide = tmp_path / "wide.eqx"
        save_model(wide, dense_under_a_mask(), HEADER)
        assert load_model(wide).model.model.output.weight.dtype == np.float64
        with pytest.raises(ExperimentError, match="made with JAX_ENABLE_X64=0; set it to read"):
            load_model(path)
    with pytest.raises(ExperimentError, match="made with JAX_ENABLE_X64=1; set it to read"):
        load_model(wide)


@pytest.mark.parametrize("keep", ["all", "none", "one", "an empty row"])
def test_outputs_and_kernels_have_the_same_bits(path, keep):
    """Also of masks that keep nothing, and with NaN, infinity and -0 among the weights."""
    sparse = dense_under_a_mask()
    odd = jnp.asarray([jnp.nan, jnp.inf, -0.0])
    change = lambda w: w.at[1, :3].set(odd)
    sparse = eqx.tree_at(lambda s: s.model.hidden.weight, sparse, replace_fn=change)
    rows = jnp.ones((6, 16), bool).at[1, :2].set(False)
    mask = {"none": ~rows & False, "one": (~rows).at[1, 1].set(False)}.get(keep, rows)
    mask = mask.at[4].set(False) if keep == "an empty row" else mask | (keep == "all")
    sparse = eqx.tree_at(lambda s: s.masks[0], sparse, mask)
    save_model(path, sparse, HEADER)
    found = load_model(path).model
    x = jax.random.normal(jax.random.key(5), (3, 1, 4, 4))
    bits = lambda tree: [np.asarray(a).tobytes() for a in jax.tree.leaves(tree)]
    assert bits(found.masks) == bits(sparse.masks)
    assert bits(found.to_dense()) == bits(sparse.to_dense()) == bits(found.model)
    assert bits(jax.vmap(found)(x)) == bits(jax.vmap(sparse)(x))
    assert bits(ntk(found, x)) == bits(ntk(sparse, x))


@pytest.mark.parametrize("optimizer", [optax.adamw(1e-2, weight_decay=0.1), optax.lamb(1e-2)])
def test_training_does_the_same_to_the_bit(path, optimizer):
    """What decays weights or takes their norm does not see those under the mask."""
    sparse = dense_under_a_mask()
    save_model(path, sparse, HEADER)
    x, y = jax.random.normal(jax.random.key(5), (8, 1, 4, 4)), jnp.arange(8) % 3
    trained = []
    for start in (sparse, load_model(path).model):
        state = train_init(start, TrainConfig(1e-2), optimizer)
        for _ in range(3):
            state, _ = eqx.filter_jit(train_step)(state, (x, y))
        trained.append(state)
    one, other = trained
    assert eqx.tree_equal(one.model.to_dense(), other.model.to_dense())
    assert eqx.tree_equal(one.opt_state, other.opt_state)
    encode = lambda state: encode_model(state.model, HEADER)
    assert encode(one) == encode(other)


def test_places_without_a_file(tmp_path):
    with pytest.raises(ExperimentError, match="nowhere: no such file"):
        load_model(tmp_path / "nowhere")
    with pytest.raises(ExperimentError, match="cannot be read"):
        load_model(tmp_path)


def test_every_truncation_is_noticed(path):
    whole = path.read_bytes()
    for length in range(0, len(whole), 37):
        path.write_bytes(whole[:length])
        with pytest.raises(ExperimentError):
            load_model(path)


def saved(path, shape=(1, 28, 28), classes=10, change=lambda model: model):
    sparse = sparsify(change(TwoLayers(shape, classes, key=jax.random.key(3))))
    arguments = {"input_shape": list(shape), "num_classes": classes}
    save_model(path, sparse, {**HEADER, "arguments": arguments, "dataset": "fashion-mnist-mini"})
    return str(path)


@pytest.mark.parametrize("command", ["evaluate", "train --start"])
@pytest.mark.parametrize(
    ("shape", "classes", "message"),
    [
        ((1, 4, 4), 10, r"takes images of shape \[1, 4, 4\], but fashion-mnist-mini has"),
        ((1, 28, 28), 3, "knows 3 classes, but fashion-mnist-mini has 10"),
    ],
)
def test_networks_that_do_not_suit_the_images(command, shape, classes, message, tmp_path, capsys):
    words = [*command.split(), saved(tmp_path / "net.eqx", shape, classes)]
    more = ["--out", str(tmp_path / "out")] if "train" in command else []
    assert main([*words, *more]) == 2
    assert re.search(f"net.eqx: its network {message}", capsys.readouterr().err)


def test_labels_that_number_other_classes_are_refused(tmp_path, capsys):
    """Of `:1,0` the label 0 is class 1, and the network's output 0 is class 0."""
    path = saved(tmp_path / "net.eqx")
    asked = lambda choice: main(["evaluate", path, "--dataset", f"fashion-mnist-mini:{choice}"])
    assert asked("0,1") == 0
    for choice in ("1,0", "0,2:50"):
        assert asked(choice) == 2
        assert "but fashion-mnist-mini:" + choice + " numbers" in capsys.readouterr().err


def test_a_network_that_diverged_cannot_be_trained(tmp_path, capsys):
    broken = lambda model: eqx.tree_at(lambda m: m.output.bias, model, jnp.full(10, jnp.nan))
    path = saved(tmp_path / "net.eqx", change=broken)
    assert main(["train", "--start", path, "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert "net.eqx: model.output.bias has NaN" in said and "cannot be trained" in said
