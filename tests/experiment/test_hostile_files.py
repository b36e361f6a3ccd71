"""Changed files, and files made to harm: nothing is executed, and nothing takes memory or time.

Every refusal is documented and names the file.
"""

import builtins
import json
import math
import os
import struct

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from helpers.arbitrary import OBJECTS, assert_refused, examples, explore_file
from helpers.refusals import unchecked

import ntt_eqx as ntt
from ntt_eqx.experiment import manifest
from ntt_eqx.experiment._errors import ExperimentError
from ntt_eqx.experiment.checkpoint import Checkpoint, CheckpointStore
from ntt_eqx.experiment.manifest import read_manifest
from ntt_eqx.experiment.metrics import read_metrics
from ntt_eqx.experiment.model_file import encode_model, load_model
from ntt_eqx.experiment.results import find_runs
from ntt_eqx.experiment.settings import CompareSettings, load_config
from ntt_eqx.models import MODELS

from .fabricated import held, write_run

CONFIG = {"dataset": "mnist", "model": "m", "method": "ntt", "density": 0.5, "seed": 0}
DIGITS = b'{"seeds": [' + b"9" * 5000 + b"]}"


def config(path):
    return load_config(path, CompareSettings())


def read_run(name):
    def read(path):
        folder = path.parent / "run"
        folder.mkdir(exist_ok=True)
        write_run(folder, config_json=RESULT, result_json=RESULT)
        held(folder).write({name: path.read_bytes()})
        for run in find_runs(folder):
            assert (run.state == "done") == (run.result is not None)
            assert run.state != "broken" or str(folder) in run.note

    return read


def metrics(path):
    """Rows with a digest that fits, whoever wrote them."""
    folder = path.parent / "run"
    write_run(folder, metrics_jsonl=path.read_bytes())
    return read_metrics(folder)


class Flat(eqx.Module):
    layer: eqx.nn.Linear

    def __init__(self, input_shape, num_classes, *, key):
        self.layer = eqx.nn.Linear(math.prod(input_shape), num_classes, key=key)

    def __call__(self, x):
        return self.layer(x.reshape(-1))


def network(path):
    model = ntt.sparsify(Flat((1, 1, 3), 2, key=jax.random.key(0)))
    path.write_bytes(encode_model(model, HEADER))


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
SETTINGS = {"seeds": [1, 2], "densities": [0.5], "transfer": {"epochs": 1.5, "l2_weight": None}}
FILES = {  # what writes the whole file, or its text; what reads it
    "network": (network, load_model),
    "metrics": ('{"step": 1}\n{"step": 2, "test": {"accuracy": 0.5}}\n', metrics),
    "configuration": (json.dumps(SETTINGS), config),
    "run's configuration": (json.dumps(RESULT), read_run("config.json")),
    "run's result": (json.dumps(RESULT), read_run("result.json")),
}


@examples(40, 2000)
@pytest.mark.parametrize("name", FILES)
def test_changed_files(name, examples, tmp_path, monkeypatch):
    monkeypatch.setitem(MODELS, "linear", Flat)
    write, read = FILES[name]
    whole, folder = tmp_path / "whole", tmp_path / "changed"
    folder.mkdir()
    whole.write_text(write) if isinstance(write, str) else write(whole)
    errors = () if name.startswith("run") else (ExperimentError,)
    explore_file(whole.read_bytes(), read, errors, folder, examples)


CASES = {
    # configurations
    "a number of 5,000 digits": (DIGITS, config, "not a JSON file"),
    "a number beyond floats": (b'{"densities": [1' + b"0" * 400 + b"]}", config, "too large"),
    "a class": (b'{"__class__": "os.system"}', config, "unknown field '__class__'"),
    "a constructor": (b'{"transfer": {"__reduce__": ["os.system"]}}', config, "'__reduce__'"),
    "an object in Python's words": (b"__import__('os').abort()", config, "not a JSON file"),
    "depth without end": (b'{"seeds":' * 100_000, config, "not a JSON file"),
    "a deep value": (b'{"seeds": ' + b"[" * 500 + b"]" * 500 + b"}", config, "of type int"),
    "rows of 5,000 digits": (DIGITS + b"\n", metrics, "line 1 is not a JSON object"),
    # networks
    "a header of 5,000 digits": (
        b"ntt-eqx model\n" + struct.pack("<Q", len(DIGITS)) + DIGITS, load_model, "is not JSON"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_refused_unexecuted_and_small(name, tmp_path):
    content, read, message = CASES[name]
    assert_refused(content, read, ExperimentError, message, tmp_path)


@pytest.mark.parametrize("kind", ["pipe", "device", "loop", "dangling"])
@pytest.mark.parametrize("reader", ["configuration", "network", "runs"])
def test_pipes_devices_and_loops_are_not_read(kind, reader, tmp_path):
    path = tmp_path / "config.json"
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to({"device": "/dev/zero", "loop": path, "dangling": tmp_path / "no"}[kind])
    if reader == "runs":
        assert [run.state for run in find_runs(tmp_path)] in (["broken"], [])
        return
    read = config if reader == "configuration" else load_model
    with pytest.raises(ExperimentError, match=f"{path}: (cannot be read|no such file)"):
        read(path)


def test_a_tree_of_links_that_leads_in_a_circle_ends(tmp_path):
    write_run(tmp_path / "cells", config_json=CONFIG)
    (tmp_path / "cells" / "again").symlink_to(tmp_path)
    assert len(find_runs(tmp_path)) == 1


@pytest.mark.parametrize("number", [b"9" * 5000, b"1" + b"0" * 400, b"NaN", b"-Infinity"])
def test_runs_with_numbers_that_no_float_holds_are_broken(number, tmp_path):
    text = json.dumps(CONFIG).encode()
    write_run(tmp_path, config_json=text.replace(b"0.5", number))
    (found,) = find_runs(tmp_path)
    assert found.state == "broken" and str(tmp_path) in found.note


OTHER_VALUES = [0, -1.5, True, None, "text", [], [1], {}]


@pytest.mark.parametrize("value", OTHER_VALUES, ids=repr)
@pytest.mark.parametrize("file", ["config_json", "result_json", "failure_json"])
def test_runs_with_another_json_value_for_a_file_are_broken(file, value, tmp_path):
    write_run(tmp_path, **{"config_json": CONFIG, file: value})
    (found,) = find_runs(tmp_path)
    assert found.state == ("failed" if file == "failure_json" else "broken")
    assert str(tmp_path) in found.note


@pytest.mark.parametrize("field", RESULT)
def test_runs_with_another_json_value_for_a_field_are_broken_or_done(field, tmp_path):
    for number, value in enumerate(OTHER_VALUES):
        write_run(tmp_path / f"{number}", config_json=CONFIG, result_json={**RESULT, field: value})
    assert {run.state for run in find_runs(tmp_path)} <= {"broken", "done"}


STATE = {"w": jnp.arange(3.0)}


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace(b'"rows": 3', b'"rows": 4'),
        lambda text: text.replace(b'"record"', b'"recerd"'),
        lambda text: text.replace(b"[3]", b"[99999999999]"),
        lambda text: b"[]",
        lambda text: b"ntt-eqx checkpoint 1\n" + struct.pack("<Q", 2) + b"[]",
        lambda text: b"ntt-eqx checkpoint 1\n" + struct.pack("<Q", 2**63) + b"{}",
        lambda text: b'{"__reduce__": ["os.system"]}',
        lambda text: DIGITS,
        lambda text: OBJECTS,
        lambda text: b"",
    ],
)
@pytest.mark.parametrize("sealed", [False, True], ids=["changed", "with a digest that fits"])
def test_a_checkpoint_that_was_changed_is_passed_over(change, sealed, tmp_path):
    run = held(tmp_path)
    store = CheckpointStore(run, "train")
    for step in (1, 2):
        store.save(Checkpoint(step, STATE, {"rows": 3, "seconds": 0.1}))
    path = tmp_path / "checkpoints" / "train-000000002"
    content = change(path.read_bytes())
    if sealed:
        run.write({"checkpoints/train-000000002": content})
    path.write_bytes(content)
    found = store.latest(STATE)
    known = {"rows": 4 if sealed and b'"rows": 4' in content else 3, "seconds": 0.1}
    assert found.record == known and found.step == (2 if known["rows"] == 4 else 1)
    assert not hasattr(builtins, "was_executed")


HOSTILE = {
    "outside": {"../config.json": []},
    "absolute": {"/etc/passwd": []},
    "checkpoints outside": {"checkpoints/../../x": []},
    "empty": {"": []},
    "a digest of a number": {"config.json": [3]},
    "a digest that is none": {"config.json": ["x"]},
    "digests of text": {"config.json": "0" * 64},
    "a zero byte": {"a\0b": []},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_manifest_names_files_below_it_alone(name, tmp_path):
    with unchecked():
        content = manifest._encode("network", HOSTILE[name])
    (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(ExperimentError, match="manifest.json: damaged"):
        read_manifest(tmp_path)


def test_every_flipped_bit_and_cut_of_a_manifest_is_noticed(tmp_path):
    write_run(tmp_path, config_json=CONFIG)
    path = tmp_path / "manifest.json"
    whole = path.read_bytes()
    for place in range(len(whole)):
        changed = whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :]
        for content in (changed, whole[:place]):
            path.write_bytes(content)
            with pytest.raises(ExperimentError, match="manifest.json: "):
                read_manifest(tmp_path)
