"""A folder has one worker at a time, and a dead one's is taken over."""

import json
import os
import subprocess
import sys
import threading

import pytest

from ntt_eqx.experiment import claims
from ntt_eqx.experiment._errors import ExperimentError
from ntt_eqx.experiment.claims import Claim, Lost, Taken, claimed


def test_a_second_worker_is_kept_out(tmp_path):
    with claimed(tmp_path / "run"):
        with pytest.raises(Taken, match=rf"pid {os.getpid()} on .*--out"):
            with claimed(tmp_path / "run"):
                pass
    with claimed(tmp_path / "run"):
        pass
    assert not list((tmp_path / "run").iterdir())


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
    code = "import sys, pathlib; from ntt_eqx.experiment.claims import Claim; "
    code += "assert Claim(pathlib.Path(sys.argv[1])).take()"
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    assert (tmp_path / ".claim").exists()
    (tmp_path / ".config.json.half.tmp").write_text("{")  # what it was writing
    (tmp_path / "config.json").write_text("{}")
    with claimed(tmp_path) as claim:
        claim.check()
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_a_silent_claim_of_elsewhere_is_taken_over_and_its_worker_told(tmp_path):
    asleep = Claim(tmp_path)
    asleep._owner["host"] = "elsewhere"
    assert asleep.take()
    with pytest.raises(Taken, match="on elsewhere"):
        with claimed(tmp_path):
            pass
    long_ago = (tmp_path / ".claim").stat().st_mtime - claims.STALE - 1
    os.utime(tmp_path / ".claim", (long_ago, long_ago))
    with claimed(tmp_path) as claim:
        with pytest.raises(Lost):
            asleep.check()
        asleep.beat()
        asleep.release()
        claim.check()
    assert not list(tmp_path.iterdir())


def test_a_worker_that_lives_is_heard_of(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "BEAT", 0.01)
    with claimed(tmp_path):
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

    def judged_before_the_other(claim, owner):
        found = judge(claim, owner)
        if claim is slow:
            assert quick.take()
        return found

    monkeypatch.setattr(Claim, "_is_stale", judged_before_the_other)
    assert not slow.take()
    quick.check()
    assert [p.name for p in tmp_path.iterdir()] == [".claim"]


def test_a_file_system_that_lets_two_be_first_is_refused(tmp_path, monkeypatch):
    create = os.open
    monkeypatch.setattr(os, "open", lambda path, flags, *a: create(path, flags & ~os.O_EXCL, *a))
    with pytest.raises(ExperimentError, match="cannot tell which of two workers came first"):
        with claimed(tmp_path):
            pass


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ExperimentError, match="file/run: cannot be written"):
        with claimed(tmp_path / "file" / "run"):
            pass
