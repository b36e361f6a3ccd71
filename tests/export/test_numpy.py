"""`.npz` files that NumPy and SciPy run: against JAX, without JAX, and hostile."""

import io
import json
import subprocess
import sys
import zipfile

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import zoo, zoo_today

import ntt_eqx as ntt
from ntt_eqx.export import ExportError, load_numpy, numpy_runner, save_numpy, save_runner

REFUSED = {"fno, complex": "'fft'", "fno, pairs": "'fft'", "recurrent": None}
QUICK = ("images", "lines", "recurrent", "raw", "custom", "tokens")
CASES = {**zoo.ZOO, **zoo_today.ZOO}
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in CASES if name not in QUICK]


def same_in_numpy(tmp_path, model, x, **options):
    """The largest difference of the file's outputs, on samples that the export did not see."""
    save_numpy(tmp_path / "a.npz", model, x[:2], compact=False, **options)
    network = load_numpy(tmp_path / "a.npz")
    plain = eqx.nn.inference_mode(model.to_dense() if isinstance(model, ntt.SparseModel) else model)
    expected = np.asarray(jax.jit(jax.vmap(plain))(x))
    found = network(np.asarray(x))
    assert found.shape == expected.shape and found.dtype == expected.dtype
    return float(np.abs(found - expected).max()), network


@pytest.mark.parametrize("name", [*QUICK, *SLOW])
@pytest.mark.parametrize("sparse_below", [0.0, 1.0])
def test_models_of_every_kind_in_float64(tmp_path, name, sparse_below, monkeypatch):
    case = CASES[name]
    if name in REFUSED and REFUSED[name]:
        with pytest.raises(NotImplementedError, match=f"save_numpy: .*{REFUSED[name]}"):
            save_numpy(tmp_path / "a.npz", case.build(jax.random.key(0)), case.samples(3))
        assert not list(tmp_path.iterdir())
        return
    monkeypatch.setattr("ntt_eqx.export._lower._FEWEST", 1)
    with jax.enable_x64(True):
        model, x = case.build(jax.random.key(0)), case.samples(3)
        difference, _ = same_in_numpy(tmp_path, model, x, sparse_below=sparse_below)
    assert difference < 1e-11


def operations(path):
    with np.load(path) as file:
        program = json.loads(file["program"].tobytes())
        return [step["op"] for step in program["program"]["steps"]], set(file.files)


def test_lenets_at_three_percent(tmp_path, network, images):
    path = tmp_path / "a.npz"
    found = save_numpy(path, network, images)
    assert 0 <= found.difference <= 1e-5 and found.bytes == path.stat().st_size
    assert found.compacted.compact_parameters < found.compacted.parameters
    run = load_numpy(path)
    more = jnp.concatenate([images, -images[:7]])  # another number of samples
    np.testing.assert_allclose(run(np.asarray(more)), jax.vmap(network)(more), atol=1e-5)
    assert run(np.asarray(images[:0])).shape == (0, 10)
    steps, names = operations(path)
    kept = sum(mask.sum() for mask in jax.tree.leaves(network.mask))
    assert {"sparse_dot"} <= set(steps) and any(name.endswith(".columns") for name in names)
    assert found.bytes < 6 * kept + 4 * 600 + 12_000


class Convolutions(eqx.Module):
    """Strides, dilations, paddings below and above zero, groups, a transposed one."""

    layers: list

    def __init__(self, key):
        key = iter(jax.random.split(key, 5))
        conv, up = eqx.nn.Conv2d, eqx.nn.ConvTranspose2d
        self.layers = [
            conv(3, 6, (3, 2), stride=(2, 1), padding=((2, 1), (0, 3)), key=next(key)),
            conv(6, 4, 2, groups=2, dilation=(1, 2), key=next(key)),
            up(4, 6, (2, 3), stride=2, padding=1, dilation=(2, 1), key=next(key)),
            up(6, 4, 3, stride=3, groups=2, output_padding=1, padding=3, key=next(key)),
            conv(4, 5, 1, key=next(key)),
        ]

    def __call__(self, x):
        for layer in self.layers:
            x = jnp.tanh(layer(x))
        return x


@pytest.mark.parametrize("density", [0.0, 0.1, 1.0])
def test_convolutions_dense_and_sparse(tmp_path, density, monkeypatch):
    """Kept weights at drawn places, empty layers too, in float64, in blocks of a few rows."""
    monkeypatch.setattr("ntt_eqx.export._lower._FEWEST", 1)
    monkeypatch.setattr("ntt_eqx.export.numpy_runner._BLOCK", 400)
    with jax.enable_x64(True):
        model = Convolutions(jax.random.key(3))
        rng = np.random.default_rng(0)
        mask = jax.tree.map(
            lambda m: jnp.asarray(rng.random(m.shape) < density), ntt.sparsify(model).mask
        )
        sparse = ntt.SparseModel(model, mask)
        x = jax.random.normal(jax.random.key(1), (4, 3, 7, 6))
        for below in (0.0, 1.0):
            difference, _ = same_in_numpy(tmp_path, sparse, x, sparse_below=below)
            assert difference < 1e-12
            name = "sparse_convolve" if below else "convolve"
            assert operations(tmp_path / "a.npz")[0].count(name) == 5


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint32", "int32"])
def test_numbers_beyond_a_range_of_integers_become_its_ends(tmp_path, dtype):
    """As in XLA, also where the samples of the export have none."""

    class Rounded(eqx.Module):
        weight: jax.Array

        def __call__(self, x):
            return self.weight * x.astype(dtype).astype(jnp.float32)

    model = Rounded(jnp.ones(2))
    save_numpy(tmp_path / "a.npz", model, np.ones((1, 2), np.float32))
    ends = [-np.inf, -3e9, -300, -1.5, -0.5, 0, 1.5, 255.5, 4e4, 2147483520, 5e9, np.inf, np.nan]
    x = np.stack([ends, ends[::-1]], axis=1).astype(np.float32)
    np.testing.assert_array_equal(load_numpy(tmp_path / "a.npz")(x), jax.vmap(model)(x))


EDGES = {
    "a literal beside a float": lambda x: jax.lax.clamp(-1.0, x, 2.0),
    "powers by integers": lambda x: jax.lax.pow(x, jnp.arange(x.size, dtype=jnp.int32) - 2),
    "halves away from zero": jax.lax.round,
    "the largest": lambda x: jax.lax.top_k(x, 5)[0],
    "places of the largest": lambda x: jax.lax.top_k(x, 5)[1],
    "the largest bytes": lambda x: jax.lax.top_k(x.astype(jnp.uint8), 5)[0],
    "the largest signed bytes": lambda x: jax.lax.top_k(x.astype(jnp.int8), 12)[1],
    "quotients": lambda x: jax.lax.div(x.astype(jnp.int8), jnp.roll(x, 1).astype(jnp.int8)),
    "remainders": lambda x: jax.lax.rem(x.astype(jnp.int8), jnp.roll(x, 1).astype(jnp.int8)),
    "quotients of bytes": lambda x: x.astype(jnp.uint8) // jnp.uint8(7),
}


@pytest.mark.parametrize("case", EDGES)
def test_operations_at_the_ends_of_their_ranges(tmp_path, case):
    """As in XLA, in values and dtype, also where the samples of the export have none of these."""

    class Edge(eqx.Module):
        weight: jax.Array

        def __call__(self, x):
            return self.weight * EDGES[case](x).astype(jnp.float32)

    model = Edge(jnp.ones(()))
    save_numpy(tmp_path / "a.npz", model, np.linspace(1, 3, 12, dtype=np.float32)[None])
    ends = [-np.inf, -128, -2.5, -0.5, 0, 0.49999997, 1, 1, 2.5, 127, 255, np.nan]
    x = np.stack([ends, ends[::-1]]).astype(np.float32)
    found = load_numpy(tmp_path / "a.npz")(x)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, jax.vmap(model)(x))


def test_without_jax_and_without_this_package(tmp_path, small, file):
    """The runner's file alone, in a process in which no import of either can succeed."""
    sparse, x = small
    file.rename(tmp_path / "net.npz")
    save_runner(tmp_path / "run.py")
    np.save(tmp_path / "x.npy", np.asarray(x))
    code = (
        "import sys, runpy; sys.modules.update(jax=None, equinox=None, ntt_eqx=None)\n"
        "sys.argv = ['run.py', 'net.npz', 'x.npy', 'y.npy']\n"
        "runpy.run_path('run.py', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    np.testing.assert_allclose(np.load(tmp_path / "y.npy"), jax.vmap(sparse)(x), atol=1e-6)
    assert numpy_runner.main(["net.npz"]) == 2


def test_what_cannot_be_exported_is_named(tmp_path, small):
    sparse, x = small

    class Special(eqx.Module):
        w: jax.Array

        def __call__(self, x):
            return jax.pure_callback(np.sin, x, self.w * x, vmap_method="expand_dims")

    with pytest.raises(NotImplementedError, match="^save_numpy: no NumPy form .* 'pure_callback'"):
        save_numpy(tmp_path / "a.npz", Special(jnp.ones(4)), x)
    half = jax.tree.map(lambda a: a.astype(jnp.bfloat16) if eqx.is_array(a) else a, sparse.model)
    with pytest.raises(NotImplementedError, match="dtype bfloat16"):
        save_numpy(tmp_path / "a.npz", half, x.astype(jnp.bfloat16))
    with pytest.raises(ValueError, match="^save_numpy: the model fails on one sample"):
        save_numpy(tmp_path / "a.npz", sparse, jnp.ones((2, 5)))
    with pytest.raises(ExportError, match="^save_numpy: the outputs of the file differ"):
        save_numpy(tmp_path / "a.npz", sparse, x, tolerance=-1.0)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def file(tmp_path, small, monkeypatch):
    monkeypatch.setattr("ntt_eqx.export._lower._FEWEST", 1)
    sparse, x = small
    save_numpy(tmp_path / "a.npz", sparse, x, compact=False, sparse_below=1.0)
    return tmp_path / "a.npz"


def test_calls_that_do_not_fit(file):
    network = load_numpy(file)
    for x in (np.ones((2, 5), np.float32), np.ones(4, np.float32), np.ones((2, 4))):
        with pytest.raises(ValueError, match=r"takes float32 samples \[batch, 4\], got"):
            network(x)


def remade(path, change):
    """The file with other arrays and a checksum that fits them, as its author could make it."""
    with np.load(path) as given:
        arrays = {name: given[name] for name in given.files if name != "sha256"}
    program = json.loads(arrays.pop("program").tobytes())
    change(program, arrays)
    arrays["program"] = np.frombuffer(json.dumps(program).encode(), np.uint8)
    arrays["sha256"] = numpy_runner.digest(arrays)
    np.savez(path, **arrays)


def matrix(arrays, part):
    return next(name for name in arrays if name.endswith(part))


def steps(program):
    return program["program"]["steps"]


def set_entry(part, place, value):
    def change(program, arrays):
        name = matrix(arrays, part)
        arrays[name] = arrays[name].copy()
        arrays[name][place] = value

    return change


HOSTILE = {
    "column outside": (set_entry(".columns", 0, 4), "do not fit its shape"),
    "end outside": (set_entry(".ends", -1, 10**6), "do not fit its shape"),
    "ends that fall": (set_entry(".ends", 0, 10**6), "do not fit its shape"),
    "another format": (lambda p, a: p.update(format="x"), "its format is 'x'"),
    "unknown step": (lambda p, a: steps(p)[0].update(op="system"), "unknown operation 'system'"),
    "no such array": (lambda p, a: steps(p)[0].update({"in": ["none"]}), "'none'"),
    "a value from later": (lambda p, a: steps(p)[0].update({"in": [9]}), "no step before it"),
    "no output": (lambda p, a: p["program"].update(outputs=[99]), "not made by any step"),
    "two outputs": (lambda p, a: p["program"].update(outputs=[0, 0]), "one output"),
    "no parameters": (lambda p, a: steps(p)[0].pop("params"), "cannot be read as a network"),
    "no program": (lambda p, a: p.clear(), "'format'"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_program_that_is_not_well_formed_is_refused(file, case):
    change, message = HOSTILE[case]
    remade(file, change)
    with pytest.raises(ValueError, match="a.npz: cannot be read as a network") as caught:
        load_numpy(file)
    assert message in str(caught.value)


def compressed(content):
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(buffer, "w", 8) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    return buffer.getvalue()


def pickled(content):
    buffer = io.BytesIO()
    np.savez(buffer, program=np.array([print], object), allow_pickle=True)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "change", [lambda c: b"", lambda c: b"hello", lambda c: c[: len(c) // 2], compressed, pickled]
)
def test_foreign_bytes_are_refused(file, change):
    file.write_bytes(change(file.read_bytes()))
    with pytest.raises(ValueError, match="a.npz: cannot be read as a network"):
        load_numpy(file)


def test_every_changed_bit_is_noticed_or_changes_nothing(file):
    """Dates and such in the archive's own records may change; no array may."""
    whole = file.read_bytes()
    x = np.random.default_rng(0).normal(size=(2, 4)).astype(np.float32)
    expected, refused = load_numpy(file)(x), 0
    places = range(0, len(whole), 11)
    for place in places:
        changed = bytes([whole[place] ^ 1 << place % 8])
        file.write_bytes(whole[:place] + changed + whole[place + 1 :])
        try:
            found = load_numpy(file)(x)
        except ValueError as error:
            refused += "a.npz: cannot be read as a network" in str(error)
        else:
            refused -= len(places) * (found.tobytes() != expected.tobytes())
    assert refused > 0.8 * len(places)
    for length in range(0, len(whole), 97):
        file.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="cannot be read as a network"):
            load_numpy(file)
