"""`compare` in Python: the command's networks, one's own objects, one row each."""

import functools
import json
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import equinox as eqx
import jax
import numpy as np
import pytest

import ntt_eqx as ntt
from ntt_eqx.experiment import ExperimentError, compare, report
from ntt_eqx.experiment.cli import main
from ntt_eqx.experiment.metrics import read_metrics
from ntt_eqx.experiment.object_digest import object_digest
from ntt_eqx.experiment.presets import PRESETS
from ntt_eqx.experiment.settings import TrainingSettings

from .conftest import DATASET, TwoLayers

SHARE = 1.0


@pytest.fixture(autouse=True)
def no_figures(monkeypatch):
    monkeypatch.setattr(report, "draw_figures", lambda runs, say: {})


QUICK = {
    "datasets": DATASET,
    "models": "tiny",
    "densities": 0.1,
    "training": {"epochs": 1.0, "batch_size": 8},
    "progress": False,
}


def cut(teacher, examples, density, key):
    return ntt.prune(teacher, ntt.scores.Random(key), SHARE * density)


def few():
    images = ntt.data.load_dataset(DATASET)
    return ntt.data.make_dataset("few", images.train, images.test, 2)


def test_own_objects_make_one_row_each(tmp_path, monkeypatch):
    call = functools.partial(
        compare,
        {"mine": cut, "large@global": ntt.scores.Magnitude()},
        models=TwoLayers,
        datasets=few(),
        densities=[0.1, 0.2],
        seeds=np.arange(2),
        training=TrainingSettings(epochs=1.0, batch_size=8),
        out=tmp_path,
        progress=False,
    )
    found = call()
    assert list(found.groupby(["method", "scope"], sort=False).size().items()) == [
        (("mine", ""), 4),
        (("large", "global"), 4),
    ]
    assert set(found.dataset) == {"few"} and set(found.model) == {"TwoLayers"}
    assert np.allclose(found.kept_density, found.density, atol=0.01)
    assert found.test_accuracy.between(0, 1).all() and (found.train_steps > 0).all()
    assert (found.live_units <= found.units).all() and (found.units == 6 + 2).all()
    assert (found.effective_density <= found.kept_density).all()
    assert {path.name for path in tmp_path.iterdir()} >= {"report.html", "table.md", "config.json"}
    assert call().equals(found)

    monkeypatch.setitem(globals(), "SHARE", 0.5)  # the function's source is the same
    other = call(densities=0.2, seeds=0)
    assert np.allclose(other.kept_density, [0.1, 0.2], atol=0.01)
    same = found.folder.isin(other.folder)
    assert set(found.method[same]) == {"large"}


def test_the_time_that_a_mask_takes_counts(tmp_path):
    def late(teacher, examples, density, key):
        time.sleep(0.5)
        return cut(teacher, examples, density, key)

    found = compare({"late": late}, out=tmp_path, **QUICK)
    spent = found[["mask_seconds", "transfer_seconds", "train_seconds"]]
    assert (found.mask_seconds >= 0.5).all() and (found.transfer_seconds == 0).all()
    assert np.allclose(spent.sum(axis=1), found.seconds, atol=0.01)


def test_the_command_makes_the_same_networks(tmp_path, capsys):
    found = compare(["random@erk", "dense"], seeds=3, out=tmp_path, **QUICK)
    assert set(found.scope) == {"erk", ""} and set(found.state) == {"done"}
    words = ["--datasets", DATASET, "--models", "tiny", "--densities", "0.1", "--seeds", "3"]
    words += ["--training.epochs", "1", "--training.batch-size", "8", "--plan-only"]
    assert (
        main(["compare", "--out", str(tmp_path), "--methods", "random@erk", "dense", *words]) == 0
    )
    assert "2 networks, 2 of them done already" in capsys.readouterr().out
    recipe = ntt.Recipe(epochs=1.0, batch_size=8)
    preset = TrainingSettings(**{**vars(PRESETS["quick"].training), **vars(recipe)})
    again = [
        compare("dense", out=tmp_path, seeds=3, **{**QUICK, "training": given})
        for given in (recipe, preset)
    ]
    assert again[0].equals(again[1])


def test_observers_get_the_rows_of_each_network(tmp_path):
    lines = ntt.JSONLines(tmp_path / "rows.jsonl")
    found = compare(["random", "dense"], out=tmp_path / "out", observers=[lines], **QUICK)
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    for folder in map(Path, found.folder):
        mine = [row for row in rows if row["run"] == folder.name]
        assert mine[0]["settings"]["training"]["epochs"] == 1.0
        kept = read_metrics(folder)
        assert [row["step"] for row in mine[1:]] == [row["step"] for row in kept]
        assert mine[-1]["train/test/loss"] == kept[-1]["test"]["loss"]


def test_a_loss_that_diverges_is_a_row(tmp_path):
    training = {**QUICK["training"], "learning_rate": 1e30, "optimizer": "sgd"}
    found = compare("dense", out=tmp_path, **{**QUICK, "training": training})
    assert list(found.state) == ["failed"] and found.test_accuracy.isna().all()
    assert "the loss became" in found.note[0]


def no_key(teacher, examples, density, key):
    return {}["weights"]


def all_kept(teacher, examples, density, key):
    return ntt.sparsify(teacher)


def no_mask(teacher, examples, density, key):
    return teacher


def test_a_method_that_fails_does_not_end_the_others(tmp_path):
    methods = {"a": no_key, "b": all_kept, "c": no_mask, "d": cut}
    found = compare(methods, out=tmp_path, **QUICK).set_index("method")
    assert list(found.state) == ["failed", "failed", "failed", "done"]
    assert list(found.test_accuracy.isna()) == [True, True, True, False]
    line = no_key.__code__.co_firstlineno + 1
    assert found.note["a"].endswith(f"KeyError: 'weights' ({__file__}, line {line})")
    assert all(f"{DATASET}, tiny, " in note for note in found.note[:3])
    assert "more than the share 0.1" in found.note["b"] and "no SparseModel" in found.note["c"]
    assert not found.note["d"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"preset": "quik"}, "unknown preset 'quik'. Did you mean 'quick'"),
        ({"methods": "ranom"}, "unknown method 'ranom'. Did you mean 'random'"),
        ({"methods": {"random": cut}}, "method 'random': the package has one of this name"),
        ({"methods": {"a:b": cut}}, "method 'a:b': a file has one of this name"),
        ({"methods": {"mine@nowhere": cut}}, "@nowhere is none of"),
        ({"methods": {"mine": "random"}}, "method 'mine' is a name already, 'random'"),
        ({"methods": [cut, cut]}, "methods: .*names one of them twice"),
        ({"methods": 3}, "int: is no method"),
        ({"models": TwoLayers(key=jax.random.key(0))}, "not a callable that builds a model"),
        ({"datasets": 3}, "not an ntt_eqx.data.Dataset"),
        ({"densities": 0.0}, "densities: 0.0 must be a number above 0"),
        ({"seeds": [0.5]}, "field 'seeds'.* must be of type int"),
        ({"scopes": "erc"}, "field 'scopes'.* must be one of"),
        ({"training": {"epoch": 1}}, "compare: training: unknown field 'epoch'.*'epochs'"),
    ],
)
def test_refusals(changes, message, tmp_path):
    with pytest.raises(ExperimentError, match=message):
        compare(**{"methods": "random", "out": tmp_path / "out", **QUICK, **changes})
    assert not (tmp_path / "out").exists()


# What decides the results of an object

HEAD = "import functools, json, re\nimport equinox as eqx\nimport jax\nimport numpy as np\n"
CASES = {
    "source": ("def f(x): return x + 1", "def f(x): return x + 2"),
    "a default": ("def f(x, n=1): return n", "def f(x, n=2): return n"),
    "a global": ("N = 1\ndef f(x): return N", "N = 2\ndef f(x): return N"),
    "a function of its own": (
        "def g(): return 1\ndef f(x): return g()",
        "def g(): return 2\ndef f(x): return g()",
    ),
    "a closure": (
        "def g(n): return lambda x: n\nf = g(1)",
        "def g(n): return lambda x: n\nf = g(2)",
    ),
    "what is within": (
        "N = [1]\ndef f(x): return [N for _ in x]",
        "N = [2]\ndef f(x): return [N for _ in x]",
    ),
    "an array": ("A = np.ones(3)\ndef f(x): return A", "A = np.zeros(3)\ndef f(x): return A"),
    "under jit": ("@jax.jit\ndef f(x): return x + 1", "@jax.jit\ndef f(x): return x + 2"),
    "a partial": ("f = functools.partial(int, base=2)", "f = functools.partial(int, base=3)"),
    "what is installed": ("f = json.loads", "f = json.dumps"),
    "a set": ("N = {1, 2}\ndef f(x): return N", "N = {1, 3}\ndef f(x): return N"),
    "a method": (
        "class f(eqx.Module):\n    def __call__(self, x): return x",
        "class f(eqx.Module):\n    def __call__(self, x): return -x",
    ),
    "a field": (
        "class C(eqx.Module):\n    n: int\n    def __call__(self, x): return x\nf = C(1)",
        "class C(eqx.Module):\n    n: int\n    def __call__(self, x): return x\nf = C(2)",
    ),
    "a parent": (
        "class P:\n    def g(self): return 1\nclass f(P): pass",
        "class P:\n    def g(self): return 2\nclass f(P): pass",
    ),
    "a constant of a class": ("class f:\n    N = 1", "class f:\n    N = 2"),
    "a list of a class": ("class f:\n    N = [1]", "class f:\n    N = [2]"),
    "what a class keeps": (
        "class f:\n    @functools.cached_property\n    def g(self): return 1",
        "class f:\n    @functools.cached_property\n    def g(self): return 2",
    ),
    "a number of NumPy": (
        "N = np.float32(1)\ndef f(x): return N",
        "N = np.float32(2)\ndef f(x): return N",
    ),
    "a range": ("N = range(1)\ndef f(x): return N", "N = range(2)\ndef f(x): return N"),
    "what pickle has a table for": (
        "N = re.compile('a')\ndef f(x): return N",
        "N = re.compile('b')\ndef f(x): return N",
    ),
    "an installed class's member": (
        "N = jax.lax.Precision.HIGH\ndef f(x): return N",
        "N = jax.lax.Precision.HIGHEST\ndef f(x): return N",
    ),
    "hidden entries": (
        "N = np.ma.array([1, 2], mask=[0, 1])\ndef f(x): return N",
        "N = np.ma.array([1, 2], mask=[1, 0])\ndef f(x): return N",
    ),
    "an object without a dict": (
        "class C:\n    __slots__ = ('n',)\nf = C()\nf.n = 1",
        "class C:\n    __slots__ = ('n',)\nf = C()\nf.n = 2",
    ),
    "a tuple's method": (
        "class C(tuple):\n    def __call__(self, x): return 1\nf = C()",
        "class C(tuple):\n    def __call__(self, x): return 2\nf = C()",
    ),
    "a number's method": (
        "class C(int):\n    def __call__(self, x): return 1\nf = C()",
        "class C(int):\n    def __call__(self, x): return 2\nf = C()",
    ),
    "one lambda of a line": (
        "f = [lambda x: x, lambda x: -x][0]",
        "f = [lambda x: x, lambda x: -x][1]",
    ),
}


def in_process(sources, folder):
    """The digests of `f` in each of these programs, from one process that runs them as files."""
    names = []
    for number, source in enumerate(sources):
        (folder / f"program{number}.py").write_text(HEAD + textwrap.dedent(source) + "\n")
        names.append(f"program{number}")
    code = (
        "import importlib, sys\n"
        "from ntt_eqx.experiment.object_digest import object_digest\n"
        "for name in sys.argv[1:]: print(object_digest(importlib.import_module(name).f))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *names], cwd=folder, text=True, capture_output=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_an_object_counts_with_all_that_it_uses(tmp_path):
    pairs = list(CASES.values())
    again = [f"# a comment\n{one}  # and another\nUNUSED = 3" for one, _ in pairs]
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    digests = in_process([source for pair in pairs for source in pair], first)
    same = in_process(again, second)
    for name, one, other, commented in zip(CASES, digests[::2], digests[1::2], same, strict=True):
        assert one != other, name
        assert one == commented, name


def test_an_object_without_a_file_counts_as_well():
    names = {"eqx": eqx}
    exec("class C(eqx.Module):\n    n: int\none, two = C(1), C(2)", names)
    assert object_digest(names["one"]) != object_digest(names["two"])
    assert object_digest(names["one"]) == object_digest(names["C"](1))


def test_code_without_a_file_counts():
    def digest(body):
        names = {"__name__": "prompt"}  # a module without a file, as `python -c` has
        exec(f"def f(x): return {body}\nclass C:\n    def g(self): return {body}", names)
        return object_digest(names["f"]), object_digest(names["C"])

    assert digest("x in {'a', 'b'}") == digest("x in {'a', 'b'}")
    for one, other in zip(digest("x + 1"), digest("x + 2"), strict=True):
        assert one != other
