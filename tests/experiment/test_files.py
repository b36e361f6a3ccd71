"""Files are whole or absent."""

import os

import pytest

from ntt_eqx.experiment import _files
from ntt_eqx.experiment._errors import ExperimentError, MissingExtra, check_choice, require
from ntt_eqx.experiment.metrics import MetricsFile, read_metrics


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    _files.write_json(path, {"a": 1})

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space"):
        _files.write_json(path, {"a": 2})
    assert _files.read_json(path) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_numbers_that_are_not_finite_become_null(tmp_path):
    _files.write_json(tmp_path / "a", {"x": [float("nan"), 1.0], "y": float("inf")})
    assert _files.read_json(tmp_path / "a") == {"x": [None, 1.0], "y": None}


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000])
def test_a_broken_json_file_is_named(tmp_path, content):
    path = tmp_path / "broken.json"
    path.write_bytes(content)
    with pytest.raises(ExperimentError, match=r"broken\.json: not a JSON file"):
        _files.read_json(path)


def test_choices_are_listed_and_guessed():
    assert check_choice("method", "snip", ["ntt", "snip"]) == "snip"
    with pytest.raises(ExperimentError, match="unknown method 'snap'. Did you mean 'snip'.*ntt, s"):
        check_choice("method", "snap", ["ntt", "snip"])


def test_a_missing_extra_says_how_to_install_it():
    with pytest.raises(MissingExtra, match=r"pip install 'ntt-eqx\[cli\]'"):
        require("no_such_package_at_all.part")


def test_metrics_go_back_to_what_a_checkpoint_knows(tmp_path):
    path = tmp_path / "metrics.jsonl"
    metrics = MetricsFile(path)
    for step in range(3):
        metrics.append({"step": step, "loss": float("nan")})
    with open(path, "ab") as file:
        file.write(b'{"step": 3, "lo')  # killed while writing
    assert read_metrics(path) == [{"step": i, "loss": None} for i in range(3)]
    again = MetricsFile(path)
    again.rewind(2)
    again.append({"step": 7})
    assert [row["step"] for row in read_metrics(path)] == [0, 1, 7]
    with pytest.raises(ExperimentError, match="has 3 rows, but 9 were written"):
        MetricsFile(path).rewind(9)


def test_a_broken_row_of_metrics_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n[2]\n')
    with pytest.raises(ExperimentError, match="line 2 is not a JSON object"):
        read_metrics(path)
