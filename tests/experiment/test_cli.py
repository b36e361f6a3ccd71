"""The commands from end to end, on a network that trains in no time."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from ntt_eqx.experiment.cli import main

from .conftest import DATASET, own_process, run_in_pieces, tiny

METHODS = ("ntt", "ntt-ambient", "random", "magnitude", "snip", "logit-snip", "dense")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A comparison of all methods, and what its command printed."""
    from ntt_eqx.models import MODELS

    from .conftest import TwoLayers

    out = tmp_path_factory.mktemp("compare")
    MODELS["tiny"] = TwoLayers
    assert main(["compare", "--out", str(out), *compare_all()]) == 0
    return out


def compare_all():
    return tiny("--methods", *METHODS, "--densities", "0.1")


def stable(results):
    """Results without the times, which no two runs share."""
    return [{k: v for k, v in r.items() if not k.endswith("seconds")} for r in results]


def read(path):
    return json.loads(Path(path).read_text())


def config_of(cell):
    return (cell / "config.json").read_text()


@pytest.mark.slow
def test_all_devices_make_what_one_makes(finished, tmp_path):
    words = tiny("--methods", "ntt", "snip", "--densities", "0.1", "--devices", "all")
    assert main(["compare", "--out", str(tmp_path), *words]) == 0
    one = {result["method"]: result for result in read(finished / "results.json")}
    for result in read(tmp_path / "results.json"):
        for name in ("train_loss", "test_loss", "kept_density"):
            assert result[name] == pytest.approx(one[result["method"]][name], rel=1e-3)
        distance = one[result["method"]]["kernel_distance"]
        assert result["kernel_distance"] == (distance and pytest.approx(distance, rel=1e-3))


def test_compare_writes_results_tables_and_figures(finished):
    results = read(finished / "results.json")
    assert len(results) == len(METHODS)
    for result in results:
        assert set(result) > {"method", "scope", "density", "seed", "seconds"}
        assert 0 <= result["test_accuracy"] <= 1 and 0 <= result["train_accuracy"] <= 1
        assert abs(result["kept_density"] - result["density"]) < 0.01
    rows, note = (finished / "table.md").read_text().split("\n\n")
    assert rows.count("\n") == len(results) + 1 and note.startswith("±: standard error.")
    names = {path.name for path in (finished / "figures").iterdir()}
    stems = ("accuracy", "densities", "distances", "masks")
    assert names == {f"{stem}.{kind}" for stem in stems for kind in ("png", "svg")}
    page = (finished / "report.html").read_text()
    assert page.count("data:image/png;base64,") == len(stems) and "http" not in page
    assert (
        "<td>NTT (ambient)</td>" in page and "NTT (ambient)" in (finished / "table.md").read_text()
    )
    facts = dict(re.findall(r"<dt>(\w+)</dt><dd>(?:<code>)?(.*?)(?:</code>)?</dd>", page))
    assert facts["Command"].startswith(f"ntt-eqx compare --out {finished} --datasets")
    assert (facts["Seeds"], facts["Networks"]) == ("0", str(len(METHODS)))
    assert f"jax {jax.__version__}" in facts["Versions"] and "transfer" in facts["Time"]
    assert "prefers-color-scheme: dark" in page and "mask_every" in page
    cell = next((finished / "cells").glob("*-ntt-layer-0.1-*"))
    assert {path.name for path in cell.iterdir()} == {
        *("manifest.json", "config.json", "metrics.jsonl", "model.eqx", "transferred.eqx"),
        "result.json",
    }


def test_a_finished_comparison_is_only_read(finished, capsys):
    before = read(finished / "results.json")
    assert main(["compare", "--out", str(finished), *compare_all()]) == 0
    assert read(finished / "results.json") == before
    said = capsys.readouterr().out
    assert "7 networks, 7 of them done already" in said and "training:" not in said


def test_other_settings_get_other_cells(finished, tmp_path):
    import shutil

    out = tmp_path / "copy"
    shutil.copytree(finished, out)
    more = ("--densities", "0.1", "--training.epochs", "1", "--training.kernel-images", "5")
    assert main(["compare", "--out", str(out), *tiny("--methods", "random", *more)]) == 0
    (result,) = read(out / "results.json")
    assert result["train_steps"] == 9
    (cell,) = [path for path in (out / "cells").iterdir() if "kernel_images" in config_of(path)]
    rows = [json.loads(line) for line in (cell / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 3, 6, 9]
    assert all(0 < row["kernel"]["alignment"] < 1 for row in rows)
    assert (out / "figures" / "kernel.png").exists()
    assert main(["report", str(out), "--out", str(tmp_path / "report")]) == 0
    table = (tmp_path / "report" / "table.md").read_text()
    assert "Settings" in table and table.count("| random ") == 2


def test_an_interrupted_comparison_goes_on_where_it_was(finished, tmp_path, monkeypatch, capsys):
    methods = ("ntt", "snip", "dense")  # with a transfer, with a score, with neither
    out = tmp_path / "cut"
    words = tiny("--methods", *methods, "--densities", "0.1")
    run_in_pieces(["compare", "--out", str(out), *words], monkeypatch, every=20)
    assert "the same command goes on from here" in capsys.readouterr().err
    whole = [r for r in read(finished / "results.json") if r["method"] in methods]
    assert stable(read(out / "results.json")) == stable(whole)


@pytest.mark.slow
def test_a_killed_comparison_goes_on_where_it_was(finished, tmp_path):
    out = tmp_path / "cut"
    methods = tiny("--methods", "ntt", "snip", "--densities", "0.1", "--checkpoint-every", "0")
    command, quiet = own_process("compare", "--out", str(out), *methods)
    process = subprocess.Popen(command, **quiet)
    deadline = time.monotonic() + 300
    while not list(out.glob("cells/*-ntt-*/checkpoints/transfer-*")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert not (out / "results.json").exists()
    again = subprocess.run(command, **quiet)
    assert again.returncode == 0, again.stderr
    wanted = [r for r in read(finished / "results.json") if r["method"] in ("ntt", "snip")]
    assert stable(read(out / "results.json")) == stable(wanted)
    for path in out.glob("cells/*/model.eqx"):
        assert (finished / path.relative_to(out)).read_bytes() == path.read_bytes()


def test_transfer_then_train_then_evaluate(tmp_path, capsys):
    one, two = str(tmp_path / "transfer"), str(tmp_path / "train")
    options = [
        *("--dataset", DATASET, "--model", "tiny", "--density", "0.2", "--transfer.epochs", "2"),
        *("--transfer.batch-size", "8", "--transfer.held-out", "0.05"),
    ]
    assert main(["transfer", "--out", one, *options]) == 0
    result = read(tmp_path / "transfer/result.json")
    assert result["test_accuracy"] is None and result["kernel_distance"] > 0
    train = ["--training.epochs", "2", "--training.batch-size", "8"]
    assert main(["train", "--start", one, "--out", two, *train]) == 0
    assert read(tmp_path / "train/config.json")["dataset"] == DATASET  # as the network's file says
    capsys.readouterr()
    assert main(["evaluate", two, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    trained = read(tmp_path / "train/result.json")
    assert found["test_accuracy"] == trained["test_accuracy"]
    assert trained["method"] == "ntt" and abs(found["density"] - 0.2) < 0.01
    assert main(["train", "--out", two, *train, "--method", "dense"]) == 2
    assert "holds a run with another configuration" in capsys.readouterr().err
    assert main(["runs", str(tmp_path)]) == 0
    listed = capsys.readouterr().out
    assert listed.count("done") == 2


def test_data_says_what_there_is(capsys, monkeypatch):
    monkeypatch.delenv("NTT_EQX_DATA", raising=False)
    assert main(["data"]) == 0
    said = capsys.readouterr().out
    assert "fashion-mnist-mini" in said and "6,000" in said
    assert main(["data", "fashion-mnist-mini"]) == 0
    assert "fashion-mnist-mini: whole, in" in capsys.readouterr().out


def test_a_folder_of_arrays_of_ones_own(tmp_path):
    rng = np.random.default_rng(0)
    for part, count in (("train", 16), ("test", 8)):
        x = rng.normal(size=(count, 1, 4, 4)).astype(np.float32)
        np.save(tmp_path / f"{part}_x.npy", x)
        np.save(tmp_path / f"{part}_y.npy", rng.integers(0, 3, count))
    words = tiny("--methods", "random", "--densities", "0.5", "--datasets", f"npy:{tmp_path}")
    assert main(["compare", "--out", str(tmp_path / "out"), *words]) == 0
    (result,) = json.loads((tmp_path / "out" / "results.json").read_text())
    assert result["dataset"] == f"npy:{tmp_path}" and 0 <= result["test_accuracy"] <= 1
    # other arrays of this name are other data: nothing is skipped as done
    np.save(tmp_path / "test_y.npy", (np.load(tmp_path / "test_y.npy") + 1) % 3)
    assert main(["compare", "--out", str(tmp_path / "out"), *words]) == 0
    assert len(list((tmp_path / "out" / "cells").iterdir())) == 2


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("compare --datasets fashion", "unknown dataset 'fashion'. Did you mean.*Allowed: "),
        ("compare --datasets mnist:0,77", "choose at least two different classes out of 0 to 9"),
        ("compare --datasets npy:nowhere", "nowhere"),
        ("compare --models lenet", "unknown model 'lenet'. Did you mean.*Allowed: lenet-300-100"),
        ("compare --methods snap", "unknown method 'snap'. Did you mean 'snip'.*Your own is pack"),
        ("compare --sedds 1", "compare has no option --sedds. Did you mean --seeds\\?"),
        ("compare --densities 0", "densities: 0.0 must be a number above 0"),
        ("compare --config nowhere.json", "nowhere.json: no such file"),
        ("compare --transfer.batch-size 3", "--transfer.batch-size: 3 is odd"),
        ("evaluate nowhere.eqx", "nowhere.eqx: no such file"),
        ("train --start nowhere.eqx", "nowhere.eqx: no such file"),
        ("report nowhere", "nowhere: no such directory"),
        ("runs nowhere", "nowhere: no such directory"),
        ("data mnits", "unknown dataset 'mnits'. Did you mean 'mnist'"),
        (
            f"transfer --dataset {DATASET} --method ntt-sketch --transfer.sketch-size 3",
            "--transfer.sketch-size: 3 directions of 2 outputs; use at most 2.",
        ),
        ("compare --plan-only --out x --data-dir nowhere --datasets mnist", "nowhere does not exi"),
        ("compare --epochs 3", "no option --epochs. Did you mean --training.epochs or --transfer"),
        ("train --l-2=3", "no option --l-2. Did you mean --training.l2"),
        ("nothing", "unknown command 'nothing'. Allowed: compare, transfer"),
    ],
)
def test_wrong_words_are_explained(command, message, capsys, tmp_path, monkeypatch):
    import re

    monkeypatch.chdir(tmp_path)
    assert main(command.split()) == 2
    said = re.sub(r"[│╭╰─╮╯\s]+", " ", capsys.readouterr().err)
    assert re.search(message, said), said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["", *"compare transfer train evaluate data runs".split()])
def test_help_is_shown(command, capsys):
    assert main([*command.split(), "--help"]) == 0
    assert "usage: ntt-eqx" in capsys.readouterr().out


def test_presets_and_config_files_set_the_defaults(capsys, tmp_path):
    assert main(["compare", "--preset", "paper", "--help"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "(default: 0 1 2 3 4)" in said and "ntt random snip logit-snip dense)" in said
    path = tmp_path / "c.json"
    path.write_text(json.dumps({"datasets": ["fashion-mnist-mini"], "seeds": [7]}))
    assert main(["compare", "--config", str(path), "--plan-only", "--seeds", "8"]) == 0
    said = capsys.readouterr().out
    assert "seed:     8" in said and "7 networks" in said
    path.write_text('{"seed": 3}')
    assert main(["compare", "--config", str(path), "--plan-only"]) == 2
    assert "unknown field 'seed'. Did you mean 'seeds'" in capsys.readouterr().err


def test_a_diverging_network_leaves_the_others(tmp_path, capsys):
    out = tmp_path / "out"
    more = ("--methods", "ntt", "random", "--densities", "0.1", "--transfer.learning-rate", "1e30")
    assert main(["compare", "--out", str(out), *tiny(*more)]) == 1
    said = capsys.readouterr().out
    assert "the loss became" in said and "--transfer.learning-rate" in said
    (result,) = read(out / "results.json")
    assert result["method"] == "random"
    assert main(["runs", str(out)]) == 0
    assert "failed" in capsys.readouterr().out


def test_the_core_does_not_import_this_room():
    code = (
        "import sys, ntt_eqx; print([m for m in sys.modules if m.startswith(('ntt_eqx.experiment',"
        " 'tyro', 'rich', 'matplotlib', 'pooch', 'orbax'))])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_preset_that_is_another_option_is_refused(capsys):
    assert main(["compare", "--plan-only", "--preset", "--seeds"]) == 2
    assert "preset" in capsys.readouterr().err
