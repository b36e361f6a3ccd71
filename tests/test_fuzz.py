"""Arbitrary arrays, settings, words and files: every public entry succeeds or says what is wrong.

Each property below is run on as many drawn inputs as `EXAMPLES` says: the first number by default,
the second with `-m slow`. Runs without the tests' type checker, as users do.
"""

import collections
import contextlib
import gzip
import io
import json
import os
import pickle
import re
import struct
import tarfile
import warnings
from collections.abc import Mapping

import equinox as eqx
import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import optax
import pytest
from hypothesis import given, settings, strategies as st

import ntt_eqx as ntt
from ntt_eqx import scores
from ntt_eqx.data import DatasetError, Split, batches, hold_out, load_dataset
from ntt_eqx.data._cifar import decode_binary, decode_python
from ntt_eqx.data._idx import read_idx
from ntt_eqx.data._mat5 import read_mat5
from ntt_eqx.data._registry import check_dataset_name
from ntt_eqx.experiment._errors import ExperimentError
from ntt_eqx.experiment.cli import main
from ntt_eqx.experiment.metrics import read_metrics
from ntt_eqx.experiment.model_file import load_model, save_model
from ntt_eqx.experiment.results import find_runs
from ntt_eqx.experiment.settings import (
    CompareSettings,
    check,
    from_json,
    load_config,
    parse_pattern,
)
from ntt_eqx.experiment.trajectories import Trajectories, load_trajectories, save_trajectories
from ntt_eqx.models import MODELS

SGD = optax.sgd(0.1)
LINEAR = eqx.nn.Linear(3, 2, key=jax.random.key(0))
STATE = ntt.ntt_init(LINEAR, ntt.NTTConfig(0.5, num_steps=1), SGD)
PLACE = {}
OUTCOMES = collections.Counter()


@pytest.fixture(scope="module", autouse=True)
def alone(tmp_path_factory):
    """A folder for the files, no type checker, no data of this machine, and a small model."""
    PLACE["folder"] = tmp_path_factory.mktemp("fuzz")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jaxtyping.config, "jaxtyping_disable", True)
        patch.delenv("NTT_EQX_DATA", raising=False)
        patch.setenv("XDG_CACHE_HOME", str(PLACE["folder"] / "cache"))
        patch.setitem(MODELS, "linear", Flat)
        yield


class Flat(eqx.Module):
    layer: eqx.nn.Linear

    def __init__(self, input_shape, num_classes, *, key):
        self.layer = eqx.nn.Linear(int(np.prod(input_shape)), num_classes, key=key)

    def __call__(self, x):
        return self.layer(x.reshape(-1))


def refused(call, *errors, begins=r"[\w.]+"):
    """The result of `call`, or `None` after a documented error, in the library's own words."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = call()
            OUTCOMES["passed"] += 1
            return found
    except errors as error:
        OUTCOMES["refused"] += 1
        assert re.match(rf"(?s){begins}.*: .", str(error)), error
        return None


# Arrays

KINDS = ["f4", "f2", "f8", "i4", "u1", "?", "c8", "U2"]
SHAPES = [(2, 3), (4, 3), (3, 3), (1, 3), (0, 3), (2, 4), (2, 0), (3,), (), (2, 3, 1)]


def arrays(shapes=SHAPES, kinds=KINDS):
    return st.tuples(st.sampled_from(kinds), st.sampled_from(shapes)).flatmap(
        lambda drawn: hnp.arrays(*drawn)
    )


ANYTHING = st.one_of(
    arrays(), st.none(), st.integers(), st.floats(), st.text(max_size=3), st.lists(st.floats())
)
DENSITIES = st.one_of(st.floats(0.0, 1.0), st.floats(), st.integers(-1, 2), ANYTHING)
USUAL_SCORES = hnp.arrays(
    "f4", st.sampled_from([(3,), (2, 3), (1, 1)]), elements=st.floats(-9, 9, width=32)
)
SCORES = arrays(shapes=[(3,), (2, 3), (1, 1), (0,), ()])


def masks_of_scores(leaves, density, scope, allocation, pattern):
    tree = {str(i): leaf for i, leaf in enumerate(leaves)}
    options = dict(scope=scope, allocation=allocation, pattern=pattern)
    mask = refused(lambda: ntt.make_mask(tree, density, **options), ValueError)
    if mask is None:
        return
    kept = [(int(np.sum(m)), m.size) for m in jax.tree.leaves(mask)]
    assert all(m.dtype == bool for m in jax.tree.leaves(mask))
    if scope == "global" and pattern is None:
        assert sum(k for k, _ in kept) == round(float(density) * sum(n for _, n in kept))
    elif pattern is None and allocation != "erk":
        assert all(k == round(float(density) * n) for k, n in kept)


def masks_of_models(weight, bias):
    mask = eqx.tree_at(
        lambda m: (m.weight, m.bias), LINEAR, (weight, bias), is_leaf=lambda m: m is None
    )
    sparse = refused(lambda: ntt.SparseModel(LINEAR, mask), ValueError, begins="SparseModel")
    dense = refused(lambda: ntt.apply_mask(LINEAR, mask), ValueError, begins="SparseModel")
    assert (sparse is None) == (dense is None)
    if sparse is not None and weight is not None:
        assert np.all(np.asarray(dense.weight)[~np.asarray(weight)] == 0)


def kernels(x1, x2, kernel, outputs, max_bytes):
    options = dict(kernel=kernel, outputs=outputs, max_bytes=max_bytes)
    theta = refused(lambda: ntt.ntk(LINEAR, x1, x2, **options), ValueError, begins="ntk")
    if theta is not None:
        assert theta.shape[:2] == (len(x1), len(x1 if x2 is None else x2))
        assert theta.dtype == jnp.float32


def transfers(x, labelled):
    batch = (x, None) if labelled else x
    run = lambda: ntt.transfer(STATE, iter([batch]), num_steps=1)
    done = refused(run, ValueError, ntt.DivergenceError, begins="transfer")
    if done is not None:
        assert int(done[0].step) == 1 and np.isfinite(done[1][0]["train"]["loss"])


def trainings(x, y):
    run = lambda: ntt.train(LINEAR, iter([(x, y)]), SGD, num_steps=1)
    done = refused(run, ValueError, ntt.DivergenceError, begins="train")
    assert done is None or np.isfinite(done[1][0]["train"]["loss"])


def evaluations(x, y):
    run = lambda: ntt.evaluate(LINEAR, (x, y))
    found = refused(run, ValueError, begins="evaluate")
    assert found is None or 0.0 <= found["accuracy"] <= 1.0


def scored(x, y, name):
    given = x if name in ("LogitSnip", "PathExclusion") else (x, y)
    found = refused(lambda: getattr(scores, name)()(LINEAR, given), ValueError, begins=name)
    assert found is None or found.weight.shape == (2, 3)


def data_sets(x, y, size, seed, fraction, mean, std):
    split = refused(lambda: Split(x, y), DatasetError, begins="Split")
    if split is None:
        return
    parts = refused(lambda: hold_out(split, fraction, seed=seed), ValueError, begins="hold_out")
    assert parts is None or sum(map(len, parts)) == len(split)
    batch = refused(
        lambda: next(batches(split, size, seed=seed, mean=mean, std=std)),
        ValueError,
        begins="(batches|standardise)",
    )
    assert batch is None or batch.x.shape == (size, *x.shape[1:])


# Settings and words

VALUES = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-3, 3),
        st.integers(),
        st.just(10**400),
        st.floats(),
        st.sampled_from(["ntt", "snip", "layer", "global", "erk", "2:4", "block:4x4", "adam", ""]),
        st.text(max_size=4),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=6,
)
FIELDS = ["density", "num_steps", "scope", "initial_mask", "mask_every", "kernel", "kernel_weight",
          "l2_weight", "outputs", "sketch_size", "implementation"]  # fmt: skip
ROOMS = {"transfer": "epochs batch_size learning_rate mask_every l2_weight held_out initial_mask",
         "scoring": "examples iterations schedule", "mask": "allocation pattern ablation",
         "training": "epochs batch_size l2 rescale evaluate_every"}  # fmt: skip


def inside(room):
    return st.dictionaries(st.sampled_from([*ROOMS[room].split(), "other"]), VALUES, max_size=3)


JSON = st.one_of(
    VALUES,
    st.fixed_dictionaries({}, optional={room: inside(room) for room in ROOMS}),
    st.dictionaries(
        st.sampled_from(["datasets", "models", "methods", "scopes", "densities", "seeds", "sedds"]),
        st.one_of(VALUES, st.lists(VALUES, max_size=3)),
        max_size=3,
    ),
)


def transfer_settings(fields):
    config = refused(
        lambda: ntt.NTTConfig(**{"density": 0.5, **fields}), ValueError, begins="NTTConfig"
    )
    if config is not None:
        layers = isinstance(config.density, Mapping)
        shares = config.density.values() if layers else [config.density]
        assert shares and all(0.0 < share <= 1.0 for share in shares)


def comparison_settings(value):
    read = lambda: check(from_json(CompareSettings, value, where="config.json"))
    found = refused(read, ExperimentError)
    assert found is None or isinstance(found, CompareSettings)


def patterns(text):
    refused(lambda: parse_pattern(text), ExperimentError, begins="mask.pattern")


def dataset_names(text):
    refused(lambda: check_dataset_name(text), DatasetError)


WORDS = ["--seeds", "--densities", "--methods", "--config", "--mask.pattern", "--transfer.epochs",
         "--scopes", "--datasets", "--nothing", "--training.rescale", "--preset"]  # fmt: skip


def command_lines(words):
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        code = main(["compare", "--plan-only", "--out", str(PLACE["folder"] / "out"), *words])
    assert code in (0, 2) and "Traceback" not in said.getvalue()
    assert code == 0 or said.getvalue()
    assert not (PLACE["folder"] / "out").exists()


# Files


class Hostile:
    """Leaves a trace if it is unpickled."""

    def __reduce__(self):
        return os.mkdir, (str(PLACE["folder"] / "owned"),)


def idx(array):
    sizes = struct.pack(f">{array.ndim}I", *array.shape)
    return bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes()


def npy(array, **options):
    buffer = io.BytesIO()
    np.save(buffer, array, **options)
    return buffer.getvalue()


def written(save):
    path = PLACE["folder"] / "made"
    save(path)
    return path.read_bytes()


def mat5():
    body = struct.pack("<IIII", 6, 8, 6, 0) + struct.pack("<IIii", 5, 8, 1, 2)
    body += struct.pack("<HH4s", 1, 1, b"y") + struct.pack("<IIdd", 9, 16, 3.0, 4.0)
    header = b"MATLAB 5.0 MAT-file".ljust(124) + struct.pack("<H", 0x0100) + b"IM"
    return header + struct.pack("<II", 14, len(body)) + body


def archive():
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as file:
        for name in ("cifar-100-binary/train.bin", "../escaped", "cifar-100-binary/test.bin"):
            info = tarfile.TarInfo(name)
            info.size = 3074
            file.addfile(info, io.BytesIO(bytes(range(250)) * 12 + bytes(74)))
    return out.getvalue()


HEADER = {
    "model": "linear",
    "arguments": {"input_shape": [1, 1, 3], "num_classes": 2},
    "dataset": "mnist",
    "density": 0.5,
}
RESULT = {
    "dataset": "mnist",
    "model": "linear",
    "method": "ntt",
    "density": 0.5,
    "seed": 0,
    "fingerprint": "x",
    "densities": {"layer": 0.5},
    "test_accuracy": 0.5,
}
IMAGES = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
PATHS = Trajectories(np.arange(2), {"dense": np.ones((2, 3, 1), np.float32)})


def save_network(path):
    save_model(path, ntt.sparsify(Flat((1, 1, 3), 2, key=jax.random.key(0))), HEADER)


def read_npy(path):
    (path.parent / "train_x.npy").write_bytes(path.read_bytes())
    (path.parent / "test_x.npy").write_bytes(npy(np.eye(2, 3, dtype=np.float32)))
    return load_dataset(f"npy:{path.parent}")


def read_archive(path):
    folder = path.parent / "tar"
    folder.mkdir(exist_ok=True)
    (folder / "cifar-100-binary.tar.gz").write_bytes(path.read_bytes())
    return load_dataset("cifar-100", folder, verify=False, download=False)


def read_run(name):
    def read(path):
        folder = path.parent / "run"
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps(RESULT))
        (folder / "result.json").write_text(json.dumps(RESULT))
        (folder / name).write_bytes(path.read_bytes())
        for run in find_runs(folder):
            assert (run.state == "done") == (run.result is not None)
            assert run.state != "broken" or str(folder) in run.note

    return read


def config_of(path):
    return load_config(path, CompareSettings())


JSON_FILE = lambda value: lambda: json.dumps(value).encode()
CONFIG = {"seeds": [1, 2], "densities": [0.5], "transfer": {"epochs": 1.5, "l2_weight": None}}
FILES = {
    "idx": (lambda: idx(IMAGES), lambda path: read_idx(path, 3), DatasetError),
    "idx.gz": (lambda: gzip.compress(idx(IMAGES)), lambda path: read_idx(path, 3), DatasetError),
    "cifar pickle": (
        lambda: pickle.dumps({"fine_labels": [1], "data": np.zeros((1, 3072), np.uint8)}, 3),
        lambda path: decode_python(path, path.read_bytes(), labels="fine_labels"),
        DatasetError,
    ),
    "cifar binary": (
        lambda: bytes(3074),
        lambda path: decode_binary(path, path.read_bytes(), num_labels=2),
        DatasetError,
    ),
    "cifar archive": (archive, read_archive, DatasetError),
    "mat": (mat5, read_mat5, DatasetError),
    "npy": (lambda: npy(np.eye(2, 3, dtype=np.float32)), read_npy, DatasetError),
    "pickled npy": (
        lambda: npy(np.array([Hostile()] * 2, object), allow_pickle=True),
        read_npy,
        DatasetError,
    ),
    "model": (lambda: written(save_network), load_model, ExperimentError),
    "trajectories": (
        lambda: written(lambda path: save_trajectories(path, PATHS)),
        load_trajectories,
        ExperimentError,
    ),
    "metrics": (
        lambda: b'{"step": 1}\n{"step": 2, "test": {"accuracy": 0.5}}\n',
        read_metrics,
        ExperimentError,
    ),
    "configuration": (JSON_FILE(CONFIG), config_of, ExperimentError),
    "run's configuration": (JSON_FILE(RESULT), read_run("config.json"), ()),
    "run's result": (JSON_FILE(RESULT), read_run("result.json"), ()),
}
CHANGES = st.one_of(
    st.lists(
        st.tuples(st.sampled_from("rict"), st.integers(0, 5000), st.binary(min_size=1, max_size=4)),
        min_size=1,
        max_size=4,
    ),
    st.binary(max_size=120),
    st.tuples(st.just("digits"), st.sampled_from([400, 5000])),
)


def changed(content, change):
    """`content` with bytes replaced, inserted, cut out or cut off; or other content altogether."""
    if isinstance(change, bytes):
        return change
    if change[0] == "digits":  # numbers that Python, or a float, cannot hold
        return re.sub(rb"\d+", b"9" * change[1], content, count=1)
    content = bytearray(content)
    for how, position, new in change:
        position %= len(content) + 1
        if how == "t":
            del content[position:]
        else:
            content[position : position + len(new) * (how != "i")] = new * (how != "c")
    return bytes(content)


def files(name):
    def read(change):
        make, reader, error = FILES[name]
        path = PLACE["folder"] / f"{name.replace(' ', '-')}" / "file"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(changed(make(), change))
        errors = error if isinstance(error, tuple) else (error,)
        refused(lambda: reader(path), *errors, begins=re.escape(str(path.parent.parent)))
        assert not (PLACE["folder"] / "owned").exists()
        assert not (PLACE["folder"].parent / "escaped").exists()

    return read


EXAMPLES = {
    # property: (what is drawn, examples by default, examples with -m slow)
    masks_of_scores: (
        dict(
            leaves=st.one_of(
                st.lists(USUAL_SCORES, min_size=1, max_size=3),
                st.lists(st.one_of(SCORES, st.floats(), st.text()), max_size=3),
            ),
            density=st.one_of(st.sampled_from([0.1, 0.5, 1.0]), DENSITIES),
            scope=st.sampled_from(["layer", "layer", "global", "network"]),
            allocation=st.sampled_from([None, None, "erk", "other"]),
            pattern=st.sampled_from([None, None, ntt.NM(1, 2), ntt.Block((1, 3)), ntt.Channels(0)]),
        ),
        100,
        3000,
    ),
    masks_of_models: (
        dict(
            weight=st.one_of(hnp.arrays(bool, (2, 3)), arrays(), st.none()),
            bias=st.one_of(hnp.arrays(bool, 2), arrays(), st.none()),
        ),
        60,
        1000,
    ),
    kernels: (
        dict(
            x1=st.one_of(arrays([(2, 3)], ["f4"]), ANYTHING),
            x2=st.one_of(st.none(), arrays([(2, 3)], ["f4"]), ANYTHING),
            kernel=st.sampled_from(["active", "ambient", "both"]),
            outputs=st.sampled_from(["full", "trace", "sketch"]),
            max_bytes=st.sampled_from([None, 1, 0, -1, 2.5, "1G"]),
        ),
        40,
        1000,
    ),
    transfers: (
        dict(x=st.one_of(arrays([(2, 3), (4, 3)], ["f4"]), ANYTHING), labelled=st.booleans()),
        50,
        1000,
    ),
    trainings: (
        dict(
            x=st.one_of(arrays([(2, 3), (4, 3)], ["f4"]), ANYTHING),
            y=st.one_of(hnp.arrays("i4", st.sampled_from([2, 4]), elements=st.integers(-1, 2)),
                        ANYTHING),  # fmt: skip
        ),
        50,
        1000,
    ),
    evaluations: (
        dict(
            x=st.one_of(arrays([(2, 3)], ["f4", "u1"]), ANYTHING),
            y=st.one_of(hnp.arrays("i4", 2, elements=st.integers(-1, 2)), ANYTHING),
        ),
        50,
        1000,
    ),
    scored: (
        dict(
            x=st.one_of(arrays([(2, 3)], ["f4"]), ANYTHING),
            y=st.one_of(hnp.arrays("i4", 2, elements=st.integers(-1, 2)), ANYTHING),
            name=st.sampled_from(["LogitSnip", "PathExclusion", "Snip", "GraSP"]),
        ),
        40,
        1000,
    ),
    data_sets: (
        dict(
            x=st.one_of(arrays(), arrays([(4, 3)], ["f4", "u1"])),
            y=st.one_of(hnp.arrays("i4", 4), arrays()),
            size=st.integers(-1, 5),
            seed=st.integers(-1, 3),
            fraction=st.floats(),
            mean=st.one_of(st.floats(), st.lists(st.floats(), max_size=4)),
            std=st.one_of(st.floats(), st.lists(st.floats(), max_size=4)),
        ),
        60,
        1500,
    ),
    transfer_settings: (
        dict(fields=st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=3)),
        150,
        5000,
    ),
    comparison_settings: (dict(value=JSON), 200, 5000),
    patterns: (dict(text=st.one_of(st.none(), st.text(), st.from_regex(r"\d*:\d*"),
                                   st.from_regex(r"block:\d*x\d*"))), 50, 2000),  # fmt: skip
    dataset_names: (
        dict(text=st.one_of(st.text(), st.from_regex(r"(mnist|svhn)(:[0-9,]*)?(:\d*)?(\+mnist)?"))),
        100,
        3000,
    ),
    command_lines: (
        dict(
            words=st.lists(
                st.one_of(st.sampled_from(WORDS), st.text(max_size=4), st.sampled_from("01")),
                max_size=4,
            )
        ),
        5,
        100,
    ),
}  # fmt: skip
FILE_EXAMPLES = 40, 2000
ORDINARY = sum(few for _, few, _ in EXAMPLES.values()) + FILE_EXAMPLES[0] * len(FILES)
"""Drawn inputs in a default run."""

PROPERTIES = {
    **{call.__name__: (call, *how) for call, how in EXAMPLES.items()},
    **{f"file: {name}": (files(name), dict(change=CHANGES), *FILE_EXAMPLES) for name in FILES},
}


def explore(name, count, **options):
    call, drawn, *_ = PROPERTIES[name]
    OUTCOMES.clear()
    settings(max_examples=count, deadline=None, database=None, **options)(given(**drawn)(call))()
    if call in EXAMPLES and call is not command_lines:
        assert min(OUTCOMES["passed"], OUTCOMES["refused"]) > 0, "says nothing: one outcome alone"


@pytest.mark.parametrize("name", PROPERTIES)
def test_arbitrary_input(name):
    explore(name, PROPERTIES[name][2], derandomize=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", PROPERTIES)
def test_much_arbitrary_input(name):
    explore(name, PROPERTIES[name][3])


@pytest.mark.parametrize("name", FILES)
def test_the_files_are_whole_before_they_are_changed(name):
    """Else the fuzzer would only see one error again and again."""
    make, reader, _ = FILES[name]
    path = PLACE["folder"] / "whole" / name.replace(" ", "-") / "file"
    path.parent.mkdir(parents=True)
    path.write_bytes(make())
    if name in ("npy", "pickled npy", "cifar archive"):  # one array, object, and class too few
        with pytest.raises(DatasetError) if name == "pickled npy" else contextlib.nullcontext():
            reader(path)
    else:
        reader(path)


def test_the_number_of_examples():
    assert ORDINARY >= 1200
