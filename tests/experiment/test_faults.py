"""Full disks, folders that cannot be written, second processes, and kills at any moment."""

import collections
import contextlib
import itertools
import json
import os
import random
import resource
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from ntt_eqx.experiment.claims import claimed
from ntt_eqx.experiment.cli import main

from .conftest import own_process, tiny

KILLS = 25


def command(out, *more):
    methods = tiny("--methods", "ntt", "random", "--densities", "0.1", *more)
    return ["compare", "--out", str(out), *methods]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A comparison that nothing disturbed."""
    from ntt_eqx.models import MODELS

    from .conftest import TwoLayers

    MODELS["tiny"] = TwoLayers
    out = tmp_path_factory.mktemp("whole")
    assert main(command(out)) == 0
    return out


def assert_same(out, whole):
    """The same results but for the times, the same rows, and the same bits in every network."""
    stable = lambda path: [
        {k: v for k, v in result.items() if not k.endswith("seconds")}
        for result in json.loads((path / "results.json").read_text())
    ]
    assert stable(out) == stable(whole)
    for name in ("model.eqx", "transferred.eqx", "metrics.jsonl"):
        for path in whole.glob(f"cells/*/{name}"):
            assert path.read_bytes() == (out / path.relative_to(whole)).read_bytes()
    assert not list(out.rglob("*.tmp"))


@contextlib.contextmanager
def no_file_longer_than(size):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Orbax's own tasks
@pytest.mark.parametrize("size", [1_000, 12_000, 24_500])
def test_a_full_disk_loses_nothing(whole, tmp_path, size, capfd):
    out = tmp_path / "out"
    with no_file_longer_than(size):
        code = main(command(out, "--checkpoint-every", "0"))
    said = capfd.readouterr().err
    assert code == 2 and said.startswith("ntt-eqx: ") and "Traceback" not in said
    assert not list(out.glob("cells/*/result.json"))
    for path in out.rglob("*.json"):
        if "checkpoints" not in path.parts:
            json.loads(path.read_text())
    assert main(command(out)) == 0
    assert_same(out, whole)


def test_a_place_that_cannot_be_written_is_named_before_anything_is_computed(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file" / "out", Path("/proc/ntt-eqx")):
        assert main(command(out)) == 2
        said = capsys.readouterr().err
        assert f"{out}: cannot be written" in said and "--out" in said
    for out in (tmp_path / "file", tmp_path / "file" / "out"):
        assert main(command(out, "--plan-only")) == 2
        said = capsys.readouterr().err
        assert f"{out}: cannot be written" in said and "--out" in said


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is read-only for root")
def test_a_read_only_folder_is_named(tmp_path, capsys):
    tmp_path.chmod(0o500)
    assert main(command(tmp_path / "out")) == 2
    assert "cannot be written (Permission denied)" in capsys.readouterr().err
    tmp_path.chmod(0o700)


def test_a_second_process_is_told_who_holds_the_directory(tmp_path, capsys):
    with claimed(tmp_path):
        assert main(["train", "--out", str(tmp_path)]) == 2
        assert f"another process (pid {os.getpid()} on " in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def phase_of(out):
    """What a comparison was at, by what it left on the disk."""
    begun = [path.parent for path in out.glob("cells/*/config.json")]
    for cell in begun:
        if not (cell / "result.json").exists():
            if (cell / "checkpoints" / "train").exists():
                return "train"
            if (cell / "checkpoints" / "transfer").exists():
                return "transfer"
            return "the start of a cell"
    return "between cells" if begun else "the start"


def holders(out):
    """The process that works on each cell."""
    found = {}
    for path in out.glob("cells/*/.claim"):
        with contextlib.suppress(OSError, ValueError):
            found[path.parent.name] = json.loads(path.read_text())["pid"]
    return found


@pytest.mark.slow
def test_workers_share_a_comparison_and_take_over_from_the_dead(whole, tmp_path):
    out = tmp_path / "out"
    words, quiet = own_process(*command(out, "--checkpoint-every", "0"))
    start = lambda: subprocess.Popen(words, **quiet)
    one, two = start(), start()
    seen, killed = collections.defaultdict(set), None
    while one.poll() is None or two.poll() is None:
        for cell, pid in holders(out).items():
            seen[cell].add(pid)
            if killed is None and pid == one.pid:
                one.kill()
                killed = cell
        time.sleep(0.005)
    _, said = one.communicate()[1], two.communicate()[1]
    assert (one.returncode, two.returncode) == (-9, 0), said
    assert seen[killed] >= {one.pid} and (out / "cells" / killed / "result.json").exists()
    assert_same(out, whole)
    assert not list(out.glob("cells/*/.claim*"))


@pytest.mark.slow
def test_kills_at_any_moment_lose_nothing(whole, tmp_path, record_property):
    out = tmp_path / "out"
    words, quiet = own_process(*command(out, "--checkpoint-every", "0"))
    rng, kills, whole_runs, longest = random.Random(0), collections.Counter(), 0, 1.0
    # Most kills wait for a phase, which on a slow machine few moments would fall into; "end" is no
    # phase and leaves a process alone, so that the next one begins anew.
    aims = itertools.cycle(("transfer", "any", "transfer", "train", "any", "end"))
    while kills.total() < KILLS:
        process, aim = subprocess.Popen(words, **quiet), next(aims)
        # imports are not worth a kill: a claim names the process once it is at work
        at_work = lambda pid=process.pid: pid in holders(out).values()
        while process.poll() is None and not (at_work() and aim in ("any", phase_of(out))):
            time.sleep(0.01)
        begun = time.monotonic()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(rng.uniform(0.0, longest if aim == "any" else 0.2))
        done = [(path, path.read_bytes()) for path in out.glob("cells/*/result.json")]
        if process.poll() is None:
            process.kill()
            process.wait()
            kills[phase_of(out)] += 1
            longest *= 1.3 if aim == "any" else 1.0
        else:
            assert process.returncode == 0, process.stderr.read()
            assert_same(out, whole)
            whole_runs += 1
            longest = max(1.0, time.monotonic() - begun) if aim == "any" else longest
            shutil.rmtree(out)
            done = []
        process.communicate()
        for path, content in done:
            assert path.read_bytes() == content
        for path in out.glob("cells/*/*.json"):
            json.loads(path.read_text())
    again = subprocess.run(words, **quiet)
    assert again.returncode == 0, again.stderr
    assert_same(out, whole)
    said = ", ".join(f"{count} in {phase}" for phase, count in sorted(kills.items()))
    print(f"{kills.total()} kills ({said}), {whole_runs + 1} comparisons finished, nothing lost")
    record_property("kills", dict(kills))
    assert {"transfer", "train"} <= kills.keys()
