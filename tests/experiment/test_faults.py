"""Full disks, folders that cannot be written, second processes, and kills at any moment.

Of all operations on files that a small comparison makes, by one worker and by two, a seeded sample
goes wrong in one way each: the run is killed there, or the system answers with an error, then or
from then on. The command must end with one sentence or go on, and when it is given again leave the
files of a run that nothing disturbed, to the bit. `-m slow` tries a larger sample, and
`NTT_EQX_FAULTS=all pytest -m slow -n 0 tests/experiment/test_faults.py` every one, which takes an
hour for one worker and most of a day for two; a number takes so many of each.
"""

import collections
import contextlib
import itertools
import json
import os
import random
import re
import resource
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from helpers.tiers import drawn

from ntt_eqx.experiment.claims import claimed
from ntt_eqx.experiment.cli import main
from ntt_eqx.experiment.manifest import problems, read_manifest

from .conftest import DATASET, own_process, tiny
from .disks import Disk, Turns, faults_of, work, work_together

KILLS = max(10, drawn(10))  # fewer would not fall into every phase


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
    """The same files, and the same bits in each but for the times in results and their digests."""
    names = lambda folder: {path.relative_to(folder) for path in folder.rglob("*")}
    assert names(out) == names(whole)
    for name in names(whole):
        one, two = whole / name, out / name
        if name.name in ("result.json", "results.json"):
            assert stable(two) == stable(one)
        elif name.name == "manifest.json":
            assert problems(two.parent) == []
            assert read_manifest(two.parent).files.keys() == read_manifest(one.parent).files.keys()
        elif name.name == "report.html":
            assert without_runs_own(two.read_text()) == without_runs_own(one.read_text())
        elif one.is_file():
            assert one.read_bytes() == two.read_bytes(), name


def without_runs_own(page):
    """A report without the command, which names its folder, and the times."""
    return re.sub(r"<dt>(Command|Time)</dt><dd>.*?</dd>", "", page)


def stable(path):
    """What is in a file of results, but for the times."""
    found = json.loads(path.read_text())
    results = found if isinstance(found, list) else [found]
    return [{k: v for k, v in r.items() if not k.endswith("seconds")} for r in results]


@contextlib.contextmanager
def no_file_longer_than(size):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.slow
@pytest.mark.parametrize("size", [1_000, 12_000, 24_500])
def test_a_full_disk_loses_nothing(whole, tmp_path, size, capfd):
    out = tmp_path / "out"
    with no_file_longer_than(size):
        code = main(command(out, "--checkpoint-every", "0"))
    said = capfd.readouterr().err
    assert code == 2 and said.startswith("ntt-eqx: ") and "Traceback" not in said
    assert not list(out.glob("cells/*/result.json"))
    for path in out.rglob("*.json"):
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


SMALL = [
    *("--datasets", DATASET, "--models", "tiny", "--densities", "0.2", "--checkpoint-every", "0"),
    *("--transfer.epochs", "0.4", "--transfer.batch-size", "8", "--transfer.log-every", "2"),
    *("--transfer.held-out", "0.05", "--transfer.mask-every", "2"),
    *("--training.epochs", "0.4", "--training.batch-size", "8", "--training.evaluate-every", "2"),
]
ALONE, TOGETHER = ["ntt"], ["random", "magnitude"]  # methods: of one worker, of two
SCHEDULES = 3  # of two workers


def small(out, methods):
    return ["compare", "--out", str(out), *SMALL, "--methods", *methods]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Small comparisons that nothing disturbed, and the operations of their first worker."""
    from ntt_eqx.models import MODELS

    from .conftest import TwoLayers

    MODELS["tiny"] = TwoLayers
    found, folder = {}, tmp_path_factory.mktemp("undisturbed")
    disk = Disk(folder / "alone")
    assert work(disk, small(disk.root, ALONE)) == 0
    found["alone"] = disk.root, disk.seen
    assert work(Disk(folder / "both"), small(folder / "both", TOGETHER)) == 0
    for seed in range(SCHEDULES):
        disk = Disk(folder / str(seed), turns=Turns(seed, 2))
        assert work_together(disk, small(disk.root, TOGETHER)) == [0, 0]
        assert_same(disk.root, folder / "both")
        found[seed] = folder / "both", disk.seen
    return found


def chosen_faults(operations, count, seed=0):
    """Positions with their faults: each kind once, then others at random."""
    cases = [
        (position, fault, (name, fault))
        for position, (name, _, creates) in enumerate(operations)
        for fault in faults_of(name, creates)
    ]
    random.Random(seed).shuffle(cases)
    wanted = os.environ.get("NTT_EQX_FAULTS", "")
    if wanted == "all":
        return [case[:2] for case in cases]
    count = int(wanted or count)
    kinds = {}
    for case in cases:
        kinds.setdefault(case[2], case)
    rest = [case for case in cases if case not in kinds.values()]
    return [case[:2] for case in [*kinds.values(), *rest][:count]]


def assert_explained(code, said, where):
    """A command that ends early says why, in one line."""
    assert code in (0, 2, None), where
    assert "Traceback" not in said.out + said.err, where
    lines = said.err.splitlines()
    assert len(lines) == (code == 2) and all(line.startswith("ntt-eqx: ") for line in lines), where


def try_faults(undisturbed, count, folder, capfd, report):
    whole, operations = undisturbed["alone"]
    for number, (position, fault) in enumerate(chosen_faults(operations, count)):
        where = f"{fault} at operation {position}, {operations[position][:2]}"
        disk = Disk(folder / f"alone-{number}", position, fault)
        code = work(disk, small(disk.root, ALONE))
        assert disk.struck, where
        assert_explained(code, capfd.readouterr(), where)
        report[fault, {0: "went on", 2: "explained", None: "killed"}[code]] += 1
        assert work(Disk(disk.root), small(disk.root, ALONE)) == 0, (where, capfd.readouterr().err)
        assert_same(disk.root, whole)
        capfd.readouterr()
        shutil.rmtree(disk.root)


def try_faults_together(undisturbed, count, folder, capfd, report):
    for seed in range(SCHEDULES):
        whole, operations = undisturbed[seed]
        for number, (position, fault) in enumerate(chosen_faults(operations, count, seed)):
            where = f"{fault} at operation {position}, {operations[position][:2]}, seed {seed}"
            disk = Disk(folder / f"{seed}-{number}", position, fault, Turns(seed, 2))
            first, second = work_together(disk, small(disk.root, TOGETHER))
            said = capfd.readouterr()
            assert disk.struck and second == 0, (where, second, said.err)
            assert_explained(first, said, where)
            report[fault, {0: "went on", 2: "explained", None: "killed"}[first]] += 1
            assert work(Disk(disk.root), small(disk.root, TOGETHER)) == 0, where
            assert_same(disk.root, whole)
            capfd.readouterr()
            shutil.rmtree(disk.root)


@pytest.mark.parametrize(
    "together",
    [pytest.param(False, id="alone", marks=pytest.mark.slow), pytest.param(True, id="together")],
)
@pytest.mark.parametrize(
    "count", [pytest.param(6, id="few"), pytest.param(drawn(24), id="many", marks=pytest.mark.slow)]
)
def test_whatever_goes_wrong_with_a_file(together, count, undisturbed, tmp_path, capfd):
    report = collections.Counter()
    if together:
        try_faults_together(undisturbed, max(2, count // 12), tmp_path, capfd, report)
    else:
        try_faults(undisturbed, count, tmp_path, capfd, report)
    told = ", ".join(f"{fault} {end} {n}" for (fault, end), n in sorted(report.items()))
    print(f"{report.total()} faults: {told}; then every file as undisturbed")


def test_a_folder_that_cannot_be_removed_is_tried_again(undisturbed, tmp_path, capfd):
    whole, operations = undisturbed["alone"]
    last = max(n for n, (name, *_) in enumerate(operations) if name == "rmdir")
    disk = Disk(tmp_path / "out", last, "EIO")
    assert work(disk, small(disk.root, ALONE)) == 2 and disk.struck
    assert_explained(2, capfd.readouterr(), operations[last])
    assert work(Disk(disk.root), small(disk.root, ALONE)) == 0
    assert_same(disk.root, whole)


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is read-only for root")
def test_a_read_only_folder_is_named(tmp_path, capsys):
    tmp_path.chmod(0o500)
    assert main(command(tmp_path / "out")) == 2
    assert "cannot be written (Permission denied)" in capsys.readouterr().err
    tmp_path.chmod(0o700)


def test_a_second_process_is_told_who_holds_the_directory(tmp_path, capsys):
    with claimed(tmp_path, "network"):
        assert main(["train", "--out", str(tmp_path)]) == 2
        assert f"another process (pid {os.getpid()} on " in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]


def phase_of(out):
    """What a comparison was at, by what it left on the disk."""
    begun = [path.parent for path in out.glob("cells/*/config.json")]
    for cell in begun:
        if not (cell / "result.json").exists():
            for phase in ("train", "transfer"):
                if any(cell.glob(f"checkpoints/{phase}-*")):
                    return phase
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
        for path in out.glob("cells/*/manifest.json"):
            assert problems(path.parent) == []
    again = subprocess.run(words, **quiet)
    assert again.returncode == 0, again.stderr
    assert_same(out, whole)
    said = ", ".join(f"{count} in {phase}" for phase, count in sorted(kills.items()))
    print(f"{kills.total()} kills ({said}), {whole_runs + 1} comparisons finished, nothing lost")
    record_property("kills", dict(kills))
    assert {"transfer", "train"} <= kills.keys()
