"""Files are whole or absent."""

import json
import os

import pytest

from ntt_eqx._files import create_whole, write_whole
from ntt_eqx.experiment import _files
from ntt_eqx.experiment._errors import ExperimentError, MissingExtra, check_choice, require
from ntt_eqx.experiment.metrics import MetricsFile, Written, read_metrics

from .fabricated import held, write_run


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_whole(path, b"1")

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space"):
        write_whole(path, b"2")
    with pytest.raises(OSError, match="No space"):
        create_whole(tmp_path / "b.json", b"2")
    assert path.read_bytes() == b"1"
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_file_is_created_once_and_never_seen_empty(tmp_path, monkeypatch):
    seen, link = [], os.link

    def linked(one, two):
        assert not two.exists()
        link(one, two)
        seen.append(two.read_text())

    monkeypatch.setattr(os, "link", linked)
    assert create_whole(tmp_path / "a", b"first") and seen == ["first"]
    monkeypatch.setattr(os, "link", link)
    assert not create_whole(tmp_path / "a", b"second")
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("a", "first")]


def test_a_link_whose_answer_was_lost_is_one(tmp_path, monkeypatch):
    """NFS says of a link that it made that the file exists, where it hears the question twice."""
    link = os.link

    def twice(one, two):
        link(one, two)
        link(one, two)

    monkeypatch.setattr(os, "link", twice)
    assert create_whole(tmp_path / "a", b"mine")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_numbers_that_are_not_finite_become_null():
    content = _files.encode_json({"x": [float("nan"), 1.0], "y": float("inf")})
    assert json.loads(content) == {"x": [None, 1.0], "y": None}


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
    metrics = MetricsFile(held(tmp_path))
    metrics.rewind(Written())
    known = []
    for step in range(3):
        metrics.append({"step": step, "loss": float("nan")})
        known.append(metrics.written)
    with open(path, "ab") as file:
        file.write(b'{"step": 3, "lo')  # killed while writing
    assert read_metrics(tmp_path) == [{"step": i, "loss": None} for i in range(3)]
    again = MetricsFile(held(tmp_path))
    again.rewind(known[1])
    again.append({"step": 7})
    assert [row["step"] for row in read_metrics(tmp_path)] == [0, 1, 7]
    with pytest.raises(ExperimentError, match="does not begin with the 3 rows that were written"):
        MetricsFile(held(tmp_path)).rewind(known[2])
    path.write_bytes(path.read_bytes().replace(b"1", b"2"))
    with pytest.raises(ExperimentError, match="does not begin with the 2 rows that were written"):
        MetricsFile(held(tmp_path)).rewind(known[1])


def test_sealed_metrics_are_read_whole_or_not_at_all(tmp_path):
    path = tmp_path / "metrics.jsonl"
    metrics = MetricsFile(held(tmp_path))
    metrics.rewind(Written())
    for step in range(3):
        metrics.append({"step": step})
    metrics.seal()
    whole = path.read_bytes()
    for end in range(len(whole)):
        path.write_bytes(whole[:end])
        with pytest.raises(ExperimentError, match="metrics.jsonl: damaged or changed"):
            read_metrics(tmp_path)
    path.write_bytes(whole.replace(b"1", b"3"))
    with pytest.raises(ExperimentError, match="metrics.jsonl: damaged or changed"):
        read_metrics(tmp_path)


def test_a_broken_row_of_metrics_is_named(tmp_path):
    write_run(tmp_path, metrics_jsonl='{"step": 1}\n[2]\n')
    with pytest.raises(ExperimentError, match="line 2 is not a JSON object"):
        read_metrics(tmp_path)
