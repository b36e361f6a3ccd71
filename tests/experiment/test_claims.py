"""A folder has one worker at a time, and a dead one's is taken over."""

import errno
import json
import os
import subprocess
import sys
import threading

import pytest

from ntt_eqx.experiment import claims
from ntt_eqx.experiment._errors import ExperimentError
from ntt_eqx.experiment.claims import Claim, Lost, Taken, claimed
from ntt_eqx.experiment.manifest import create

from .fabricated import held
from .user_folders import snapshot


def test_a_second_worker_is_kept_out(tmp_path):
    with claimed(tmp_path / "run", "network"):
        with pytest.raises(Taken, match=rf"pid {os.getpid()} on .*--out"):
            with claimed(tmp_path / "run", "network"):
                pass
    with claimed(tmp_path / "run", "network"):
        pass
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["manifest.json"]


def test_only_one_of_many_comes_first(tmp_path):
    barrier, taken = threading.Barrier(16), []

    def race():
        claim = Claim(tmp_path)
        barrier.wait()
        taken.append(claim.take())

    threads = [threading.Thread(target=race) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(taken) == 1


def test_the_claim_of_a_dead_process_is_taken_over(tmp_path):
    held(tmp_path).write_json("config.json", {})
    code = "import sys, pathlib; from ntt_eqx.experiment.claims import Claim; "
    code += "assert Claim(pathlib.Path(sys.argv[1])).take()"
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    assert (tmp_path / ".claim").exists()
    half = [f".{name}.{'0' * 32}.tmp" for name in ("config.json", "manifest.json", ".claim")]
    for name in (*half, f".claim-clock-{'0' * 32}"):  # what it was writing
        (tmp_path / name).write_text("{")
    (tmp_path / f".claim-{'1' * 32}").write_text((tmp_path / ".claim").read_text())
    foreign = {f".notes.{'0' * 32}.tmp", ".config.json.half.tmp", ".x.tmp", ".claim-clock-mine"}
    for name in foreign:
        (tmp_path / name).write_text("a user's")
    with claimed(tmp_path, "network") as run:
        run.check()
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "manifest.json", *foreign}


def test_a_silent_claim_of_elsewhere_is_taken_over_and_its_worker_told(tmp_path):
    create(tmp_path, "network")
    asleep = Claim(tmp_path)
    asleep._owner["host"] = "elsewhere"
    assert asleep.take()
    with pytest.raises(Taken, match="on elsewhere"):
        with claimed(tmp_path, "network"):
            pass
    long_ago = (tmp_path / ".claim").stat().st_mtime - claims.STALE - 1
    os.utime(tmp_path / ".claim", (long_ago, long_ago))
    with claimed(tmp_path, "network") as claim:
        with pytest.raises(Lost):
            asleep.check()
        asleep.beat()
        asleep.release()
        claim.check()
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]


def test_a_worker_that_lives_is_heard_of(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "BEAT", 0.01)
    with claimed(tmp_path, "network"):
        path = tmp_path / ".claim"
        os.utime(path, (1.0, 1.0))
        heard = threading.Event()
        while not heard.wait(0.01):
            if path.stat().st_mtime > 1.0:
                heard.set()


def test_a_claim_that_another_took_over_first_is_given_back(tmp_path, monkeypatch):
    """Two see a dead worker's claim; the slower one moves the claim of the quicker one aside."""
    path = tmp_path / ".claim"
    path.write_text(json.dumps({"host": "elsewhere", "pid": 1}))
    os.utime(path, (1.0, 1.0))
    quick, slow = Claim(tmp_path), Claim(tmp_path)
    judge = Claim._is_stale

    def judged_before_the_other(claim, *owner):
        found = judge(claim, *owner)
        if claim is slow:
            assert quick.take()
        return found

    monkeypatch.setattr(Claim, "_is_stale", judged_before_the_other)
    assert not slow.take()
    quick.check()
    assert [p.name for p in tmp_path.iterdir()] == [".claim"]


def test_a_file_system_without_hard_links_is_refused(tmp_path, monkeypatch):
    def refuse(*names):
        raise OSError(errno.EPERM, "Operation not permitted", names[0], None, names[1])

    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(ExperimentError, match=r"\(Operation not permitted\); .*with hard links"):
        with claimed(tmp_path, "network"):
            pass
    assert not list(tmp_path.iterdir())


def test_nothing_is_written_once_the_claim_is_lost(tmp_path):
    with claimed(tmp_path, "network") as run:
        run.write({"model.eqx": b"1", "checkpoints/sparse.eqx": b"1"})
        run.write({"metrics.jsonl": b""}, growing=True)
        (tmp_path / ".claim").unlink()
        other = Claim(tmp_path)
        assert other.take()
        before = snapshot(tmp_path)
        for write in (
            lambda: run.write({"model.eqx": b"2"}),
            lambda: run.write({"checkpoints/sparse.eqx": b"2"}),
            lambda: run.write_json("failure.json", {}),
            lambda: run.append("metrics.jsonl", b"{}"),
            lambda: run.seal("metrics.jsonl", ""),
            lambda: run.remove(["model.eqx"]),
        ):
            with pytest.raises(Lost):
                write()
        assert snapshot(tmp_path) == before
    other.check()


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ExperimentError, match="file/run: cannot be written"):
        with claimed(tmp_path / "file" / "run", "network"):
            pass
