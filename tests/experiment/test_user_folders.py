"""A folder that holds anything but a run is left as it is, whatever is asked for in it."""

import json

import pytest

from ntt_eqx.experiment.cli import main

from .conftest import DATASET, tiny
from .fabricated import fabricate, held, write_run
from .user_folders import snapshot

TRAIN = ["--dataset", DATASET, "--model", "tiny", "--density", "0.2", "--training.epochs", "1"]
COMMANDS = {
    "train": ["train", *TRAIN, "--out"],
    "transfer": ["transfer", "--dataset", DATASET, "--model", "tiny", "--out"],
    "evolution": ["evolution", "--dataset", DATASET, "--model", "tiny", "--out"],
    "compare": ["compare", *tiny("--methods", "random"), "--out"],
    "a plan": ["compare", *tiny("--methods", "random"), "--plan-only", "--out"],
    "launch": ["compare", *tiny("--methods", "random"), "--launch", "local", "--out"],
    "report": ["report", "{runs}", "--out"],
}
FOLDERS = {
    "checkpoints": {"checkpoints/model-1.pt": "weights", "checkpoints/train/7/x": "y"},
    "metrics": {"metrics.jsonl": '{"phase": "train", "step": 1, "test": {"accuracy": 1}}\n'},
    "a network": {"model.eqx": "mine", "checkpoints/sparse.eqx": "mine"},
    "tables": {"table.md": "| a |", "report.html": "<p>", "results.json": "[]"},
    "another program's configuration": {"config.json": '{"name": "app"}'},
    "a configuration like one of ours": {"config.json": '{"command": "serve", "format": 1}'},
    "temporary files": {".x.tmp": "a", ".config.json.abc.tmp": "b", f".a.{'0' * 32}.tmp": "c"},
    "a claim": {".claim": "{}", f".claim-clock-{'0' * 32}": ""},
    "a web page's manifest": {"manifest.json": '{"name": "app", "icons": []}', "index.html": ""},
    "a manifest of a list": {"manifest.json": "[]"},
    "an empty manifest": {"manifest.json": ""},
    "a damaged manifest": {"manifest.json": '{"program": "ntt-eqx", "format": 1, "kind": "netw'},
    "a newer manifest": {"manifest.json": '{"program": "ntt-eqx", "format": 9}'},
    "half a manifest of another": {f".manifest.json.{'0' * 32}.tmp": "{}"},
    "a run of version 0.2": {
        "config.json": json.dumps({"format": 1, "method": "dense", "density": 1.0}),
        "result.json": "{}",
        "checkpoints/train/3/_METADATA": "",
    },
    "a folder in it": {"cells/notes.txt": "mine"},
    "a report of one's own": {"report/report.html": "mine"},
    "jobs": {"jobs/1_result.pkl": "mine"},
}


def fill(folder, files):
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


@pytest.mark.parametrize("name", FOLDERS)
def test_nothing_of_a_users_folder_is_touched(name, tmp_path, capsys):
    folder = tmp_path / "theirs"
    fill(folder, FOLDERS[name])
    fabricate(tmp_path / "runs", methods=["random"], densities=[0.1], seeds=[0])
    before = snapshot(folder)
    for command, words in COMMANDS.items():
        words = [word.format(runs=tmp_path / "runs") for word in words]
        assert main([*words, str(folder)]) == 2, command
        said = capsys.readouterr().err
        assert said.startswith(f"ntt-eqx: {folder}") and "--out" in said, command
        assert snapshot(folder) == before, command


def test_nothing_of_a_users_folder_is_trusted(tmp_path, capsys):
    fill(tmp_path, {name: text for files in FOLDERS.values() for name, text in files.items()})
    before = snapshot(tmp_path)
    for words in (["runs"], ["report"], ["evaluate"], ["inspect"], ["export"]):
        main([*words, str(tmp_path)])
        assert snapshot(tmp_path) == before
    assert "Traceback" not in capsys.readouterr().err


KINDS = {"network": "train", "compare": "compare", "evolution": "evolution"}


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_of_another_command_is_left_alone(kind, tmp_path, capsys):
    write = held(tmp_path, kind).write
    write({"config.json": b"{}", "model.eqx": b"x"})
    before = snapshot(tmp_path)
    for command in set(KINDS.values()) - {KINDS[kind]}:
        assert main([*COMMANDS[command], str(tmp_path)]) == 2
        assert f"directory of an `ntt-eqx {'' if kind == 'network' else kind}" in (
            capsys.readouterr().err
        )
        assert snapshot(tmp_path) == before


@pytest.mark.parametrize("name", ["model.eqx", "metrics.jsonl", "result.json", "table.md"])
def test_a_users_file_in_a_run_folder_is_kept(name, tmp_path, capsys):
    """Before anything is computed, for a name that the run will want; at its end, for others."""
    held(tmp_path)
    (tmp_path / name).write_text("mine")
    assert main([*COMMANDS["train"], str(tmp_path)]) == 2
    assert f"{tmp_path / name}: not this run's file" in capsys.readouterr().err
    assert (tmp_path / name).read_text() == "mine"
    assert not (tmp_path / "config.json").exists()


def test_other_files_in_a_run_folder_stay(tmp_path, capsys):
    theirs = {"checkpoints/notes.txt": "a", "figures/own.png": "b", ".x.tmp": "c", "notes": "d"}
    held(tmp_path)
    fill(tmp_path, theirs)
    assert main([*COMMANDS["train"], str(tmp_path)]) == 0
    assert {name: (tmp_path / name).read_text() for name in theirs} == theirs
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["notes.txt"]
    names = {"config.json", "model.eqx", "metrics.jsonl", "result.json", "report.html"}
    assert names < {path.name for path in tmp_path.iterdir()}
    assert main([*COMMANDS["train"], str(tmp_path)]) == 0
    (tmp_path / "table.md").write_text("edited")
    assert main([*COMMANDS["train"], str(tmp_path)]) == 2
    assert f"{tmp_path / 'table.md'}: damaged or changed" in capsys.readouterr().err
    assert (tmp_path / "table.md").read_text() == "edited"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    from ntt_eqx.models import MODELS

    from .conftest import TwoLayers

    MODELS["tiny"] = TwoLayers
    out = tmp_path_factory.mktemp("trained")
    assert main([*COMMANDS["train"], str(out)]) == 0
    return out


def test_every_file_of_a_run_is_watched(trained, capsys):
    """A flipped bit and a cut are found in each, wherever they are."""
    files = [path for path in trained.rglob("*") if path.is_file()]
    assert len(files) >= 11
    assert main(["runs", str(trained)]) == 0 and "done" in capsys.readouterr().out
    for path in files:
        whole = path.read_bytes()
        changed = bytearray(whole)
        changed[len(whole) // 2] ^= 4
        for content in (bytes(changed), whole[: len(whole) // 2], whole[:-1], b""):
            path.write_bytes(content)
            assert main(["runs", str(trained)]) == 0
            said = capsys.readouterr().out
            assert "broken" in said and str(path) in said, path
        path.write_bytes(whole)
    assert main(["runs", str(trained)]) == 0 and "done" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["evaluate", "inspect", "export", "train --start"])
def test_a_network_that_was_changed_is_not_used(command, trained, tmp_path, capsys):
    path = trained / "model.eqx"
    whole = path.read_bytes()
    more = (
        ["--out", str(tmp_path / "out")] if command != "evaluate" and command != "inspect" else []
    )
    for old, new in ((b'"num_classes": 2', b'"num_classes": 3'), (b'"std": 0.', b'"std": 0.0')):
        assert old in whole
        path.write_bytes(whole.replace(old, new))
        for place in (trained, path):
            assert main([*command.split(), str(place), *more]) == 2
            assert f"{path}: damaged" in capsys.readouterr().err
    path.write_bytes(whole)
    assert not (tmp_path / "out").exists()


def test_a_result_that_was_changed_is_in_no_table(trained, tmp_path, capsys):
    path = trained / "result.json"
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b'"test_accuracy": 0.', b'"test_accuracy": 8.'))
    assert main(["report", str(trained), "--out", str(tmp_path / "out")]) == 2
    assert main([*COMMANDS["train"], str(trained)]) == 2
    assert f"{path}: damaged or changed" in capsys.readouterr().err
    path.write_bytes(whole)


def test_an_export_replaces_nothing_unasked(trained, tmp_path, capsys):
    out = tmp_path / "net.safetensors"
    out.write_text("mine")
    assert main(["export", str(trained), "--out", str(out)]) == 2
    assert f"out: {out} exists" in capsys.readouterr().err and out.read_text() == "mine"
    assert main(["export", str(trained), "--out", str(out), "--overwrite"]) == 0
    assert out.read_bytes() != b"mine"


def test_a_run_begins_where_the_folder_was_made_and_its_worker_killed(tmp_path):
    """Just before the manifest got its name there is a temporary file, whole or half."""
    held(tmp_path / "one")
    whole = (tmp_path / "one" / "manifest.json").read_bytes()
    for length in (0, 20, len(whole)):
        folder = tmp_path / str(length)
        folder.mkdir()
        (folder / f".manifest.json.{'a' * 32}.tmp").write_bytes(whole[:length])
        write_run(folder, config_json={})
        assert (folder / "config.json").exists()
