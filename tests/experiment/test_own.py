"""A method, a model and data of one's own in `compare`: found, checked, told from older ones."""

import json
import re
import types

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
import pytest
from helpers.pages import ROOT, blocks

import ntt_eqx as ntt
from ntt_eqx.experiment._errors import ExperimentError
from ntt_eqx.experiment.cli import main
from ntt_eqx.experiment.methods import METHODS, method
from ntt_eqx.experiment.own import (
    build_model,
    draws_in_training,
    enter,
    enter_object,
    find_method,
)
from ntt_eqx.experiment.references import find, is_reference, source_digest

SOURCE = """
import equinox as eqx
import jax
import ntt_eqx as ntt
import beside_{name}

class Score(ntt.scores.AbstractLabelFreeScore):
    def __call__(self, model, x=None):
        sparse = ntt.sparsify(model)
        weights, _ = ntt.scores.split_weights(sparse.model, sparse.mask)
        return jax.tree.map(lambda w: abs(w) + w.max(), weights)

class Drawing(ntt.scores.AbstractLabelFreeScore, ntt.scores.AbstractDrawingScore):
    key: jax.Array
    def __call__(self, model, x=None):
        return ntt.scores.Random(self.key)(model)

class Needy(ntt.scores.AbstractLabelFreeScore):
    power: float
    def __call__(self, model, x=None):
        return ntt.scores.Magnitude()(model)

made = Needy(2.0)
drawing = Drawing(jax.random.key(0))

def cut(teacher, examples, density, key):
    assert examples.x.shape[1:] == (1, 28, 28) and examples.y.ndim == 1
    return ntt.prune(teacher, ntt.scores.Random(key), beside_{name}.SHARE * density)

def dense(teacher, examples, density, key):
    return ntt.sparsify(teacher)

def nothing(teacher, examples, density, key):
    return teacher

class Net(eqx.Module):
    layer: eqx.nn.Linear
    def __init__(self, num_classes, *, key):
        self.layer = eqx.nn.Linear(784, num_classes, key=key)
    def __call__(self, x):
        return self.layer(x.reshape(-1))

def keyless(num_classes): ...
def needy(width, *, key): ...
def few():
    images = ntt.data.load_dataset("fashion-mnist-mini:0,1:30")
    return ntt.data.make_dataset("few", images.train, images.test, 2)
def none(): ...
"""


@pytest.fixture
def code(tmp_path):
    """A file of one's own, `mine.py`, and one beside it, whose name no other test uses."""
    return write(tmp_path, tmp_path.name)


def write(folder, name, share="1.0"):
    folder.mkdir(exist_ok=True)
    (folder / f"beside_{name}.py").write_text(f"SHARE = {share}\n")
    (folder / "mine.py").write_text(SOURCE.replace("{name}", name))
    return folder / "mine.py"


@pytest.mark.parametrize(
    ("text", "yes"),
    [
        *((t, True) for t in ("a:B", "a.b:C", "./a.py:b", "/x y/a.py:b.c", r"C:\a.py:b")),
        *((t, False) for t in ("mnist:0,1", "npy:folder", "npy:a.py:b", "mnist", "a:0", "a+b", "")),
    ],
)
def test_what_is_a_reference(text, yes):
    assert is_reference(text) == yes


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nowhere_at_all:X", "there is no module 'nowhere_at_all'"),
        ("json.nowhere:X", "there is no module 'json.nowhere'"),
        ("json:lods", "json has no 'lods'. Did you mean 'load"),
        ("./nowhere.py:X", "there is no file .*nowhere.py"),
        ("{}:Scor", "mine.py has no 'Scor'. Did you mean 'Score'"),
        ("broken.py:X", r"broken.py cannot be imported \(ZeroDivisionError: division by zero"),
        ("wrong.py:X", r"wrong.py cannot be imported \(SyntaxError"),
        ("sys:path", "sys: has no source file"),
    ],
)
def test_what_cannot_be_found_is_named(text, message, code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.py").write_text("1 / 0\n")
    (tmp_path / "wrong.py").write_text("def f(:\n")
    with pytest.raises(ExperimentError, match=message) as caught:
        find(text.format(code))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "name", "message"),
    [
        ("method", "few", r"mine.py:few: is no method, which is a score .* or a function"),
        ("method", "Needy", "cannot be made from nothing alone .*'power'.* mine = Score"),
        ("model", "made", "is a Needy, not a callable that builds a model"),
        ("model", "keyless", "takes no `key`"),
        ("model", "needy", "needs width; a model is built from key"),
        ("dataset", "none", "is a function, which returns a NoneType, not an ntt_eqx.data.Dataset"),
        ("dataset", "made", "is a Needy, .*not an ntt_eqx.data.Dataset"),
    ],
)
def test_what_is_of_another_kind_is_named(kind, name, message, code):
    with pytest.raises(ExperimentError, match=message):
        enter(kind, f"{code}:{name}")


def test_scores_are_made_with_the_key_of_the_cell(code):
    key, record = jax.random.key(7), lambda name: find_method(enter("method", f"{code}:{name}"))
    for name in ("Drawing", "drawing"):
        assert bool((record(name).score(key, None, 0.1).key == key).all())
    assert record("made").score(key, None, 0.1).power == 2.0
    assert not record("Score").labels and record("cut").labels


def test_the_digest_covers_what_is_imported_from_beside(tmp_path):
    def digest(folder, share):
        module = types.ModuleType("mine")
        module.__file__ = str(write(tmp_path / folder, "it", share))
        return source_digest(module)

    same = digest("a", "1.0")
    assert digest("b", "0.5") != same == digest("c", "1.0")
    (tmp_path / "a" / "unrelated.py").write_text("X = 3\n")
    assert digest("a", "1.0") == same


def test_code_that_changed_since_it_was_imported_is_refused(code):
    assert find(f"{code}:cut") == find(f"{code}:cut")
    next(code.parent.glob("beside_*")).write_text("SHARE = 0.25\n")
    with pytest.raises(ExperimentError, match="mine.py:cut: changed since this process imported"):
        find(f"{code}:cut")


def test_a_file_beside_that_another_module_hides_is_named(code, tmp_path):
    find(f"{code}:cut")
    other = write(tmp_path / "other", tmp_path.name, "0.5")
    with pytest.raises(ExperimentError, match=f"its `import beside_{tmp_path.name}` is .*rename"):
        find(f"{other}:cut")


def test_the_digest_of_a_package_covers_its_own_modules(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    for package in ("one_of_mine", "other_of_mine"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text("")
    inner = tmp_path / "one_of_mine"
    (inner / "method.py").write_text("from .deep import X\nimport other_of_mine\nimport json\n")
    (inner / "deep.py").write_text("X = 1\n")
    before = find("one_of_mine.method:X").digest
    (tmp_path / "other_of_mine" / "__init__.py").write_text("Y = 1\n")
    assert find("one_of_mine.method:X").digest == before
    (inner / "deep.py").write_text("X = 2\n")
    with pytest.raises(ExperimentError, match="changed since"):
        find("one_of_mine.method:X")


def test_dropout_of_ones_own_is_given_a_key():
    class Net(eqx.Module):
        linear: eqx.nn.Linear
        dropout: eqx.nn.Dropout

        def __init__(self, input_shape, num_classes, *, key):
            self.linear = eqx.nn.Linear(input_shape[-1], num_classes, key=key)
            self.dropout = eqx.nn.Dropout(0.5)

        def __call__(self, x, *, key=None):
            return self.dropout(self.linear(x), key=key)

    class Plain(eqx.Module):
        def __call__(self, x):
            return x

    name = enter_object("model", Net, "with-own-dropout")
    model = build_model(name, (4,), 2, key=jax.random.key(0))
    assert draws_in_training(name, model)
    assert not draws_in_training(name, Plain())
    assert draws_in_training("lenet-5-dropout", model) and not draws_in_training("lenet-5", model)


@pytest.mark.parametrize("takes_key", [False, True])
def test_a_state_takes_the_key_that_its_model_does(takes_key):
    class Net(eqx.Module):
        norm: eqx.nn.BatchNorm
        output: eqx.nn.Linear

        def __init__(self, input_shape, num_classes, *, key):
            self.norm = eqx.nn.BatchNorm(input_shape[0], "batch", mode="batch")
            self.output = eqx.nn.Linear(input_shape[0], num_classes, key=key)

        def __call__(self, x, state):
            x, state = self.norm(x, state)
            return self.output(x), state

    class Keyed(Net):
        def __call__(self, x, state, *, key=None):
            return super().__call__(x, state)

    def build(input_shape, num_classes, **key):
        made = eqx.nn.make_with_state(Keyed if takes_key else Net)
        return ntt.StatefulModel(*made(input_shape, num_classes, **key))

    name = enter_object("model", build, f"of-a-state-{takes_key}")
    model = build_model(name, (4,), 2, key=jax.random.key(0))
    assert draws_in_training(name, model) == takes_key
    key = jax.random.key(1) if draws_in_training(name, model) else None
    batch = jax.random.normal(jax.random.key(2), (8, 4)), jnp.arange(8) % 2
    ntt.train(model, batch, optax.sgd(0.1), num_steps=2, key=key)


def words(code, *methods):
    return [
        *("--datasets", f"{code}:few", "--models", f"{code}:Net", "--densities", "0.1"),
        *("--methods", *methods, "--training.epochs", "1", "--training.batch-size", "8"),
    ]


def test_own_method_model_and_data_in_a_comparison(code, tmp_path, capsys):
    out = tmp_path / "out"
    methods = (f"{code}:cut", f"{code}:Score", "random")
    assert main(["compare", "--out", str(out), *words(code, *methods)]) == 0
    results = {r["method"]: r for r in json.loads((out / "results.json").read_text())}
    assert set(results) == {"mine.py:cut", "mine.py:Score", "random"}
    for found in results.values():
        assert (found["dataset"], found["model"]) == ("mine.py:few", "mine.py:Net")
        assert abs(found["kept_density"] - 0.1) < 0.01
    assert "| mine.py:cut " in (out / "table.md").read_text()
    asked = json.loads((out / "config.json").read_text())["settings"]
    assert asked["methods"] == list(methods)  # as it was given, to be given again

    config, again = tmp_path / "again.json", ["compare", "--out", str(out), "--config"]
    config.write_text(json.dumps(asked))
    capsys.readouterr()
    assert main([*again, str(config), "--plan-only"]) == 0
    assert "3 of them done already" in capsys.readouterr().out

    other = write(tmp_path / "other", "other_" + tmp_path.name)  # the same names, another content
    assert main(["compare", "--plan-only", "--out", str(out), *words(other, f"{other}:cut")]) == 0
    assert "1 networks; " in capsys.readouterr().out
    mixed = [*words(code, f"{other}:cut", "random")]
    assert main(["compare", "--plan-only", "--out", str(out), *mixed]) == 0
    assert "2 networks, 1 of them done already" in capsys.readouterr().out

    network = str(next((out / "cells").glob("*cut*")))
    options = ["--dataset", f"{code}:few", "--model"]
    assert main(["evaluate", network, *options, f"{code}:Net"]) == 0
    assert main(["evaluate", network, *options, f"{other}:Net"]) == 2
    assert "of another version of that code" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "message"),
    [("dense", "keeps 1568 of 1568 weights, more than the share 0.1"), ("nothing", "no SparseMod")],
)
def test_a_method_that_returns_something_else_is_refused(name, message, code, tmp_path, capsys):
    assert main(["compare", "--out", str(tmp_path / "o"), *words(code, f"{code}:{name}")]) == 1
    assert message in capsys.readouterr().out


def test_no_file_runs_code(code, tmp_path, capsys):
    """A model file that names code is refused until the command names it, too."""
    out, marker = tmp_path / "out", tmp_path / "was_run"
    assert main(["compare", "--out", str(out), *words(code, "random")]) == 0
    source = code.read_text() + f"\nopen({str(marker)!r}, 'w').close()\n"
    folder = tmp_path / "hostile"
    folder.mkdir()
    (folder / "mine.py").write_text(source)
    network = next((out / "cells").glob("*random*"))
    capsys.readouterr()
    from ntt_eqx.experiment import own

    own._entered.clear()  # as in a process that has named nothing
    for command in ("evaluate", "inspect", "export"):
        assert main([command, str(network)]) == 2
        assert "model 'mine.py:Net' is code of your own, which no file" in capsys.readouterr().err
    for words_so_far in (["evaluate"], ["train", "--out", str(tmp_path / "again"), "--start"]):
        assert main([*words_so_far, str(network), "--model", f"{code}:Net"]) == 2
        assert "dataset 'mine.py:few' is code of your own" in capsys.readouterr().err
    assert not marker.exists()


def test_the_command_of_the_guide(tmp_path, monkeypatch):
    """With the code of its page as `mine.py`, as it says."""
    page = ROOT / "docs" / "guides" / "your-own-in-compare.md"
    *parts, _trial = (code for code, _ in blocks(page))
    (tmp_path / "mine.py").write_text("\n".join(parts))
    monkeypatch.chdir(tmp_path)
    command = re.search(r"^ntt-eqx (compare .*)$", page.read_text(), re.MULTILINE)[1].split()
    assert main([*command, "--training.epochs", "1", "--training.batch-size", "8"]) == 0
    results = json.loads((tmp_path / "runs" / "compare" / "results.json").read_text())
    assert {r["method"] for r in results} == {"mine.py:most_moved", "random", "dense"}


def test_own_methods_have_looks_of_their_own():
    found = [method(f"mine.py:{name}") for name in ("Score", "cut", "A", "B")]
    assert [look.label for look in found] == [f"mine.py:{n}" for n in ("Score", "cut", "A", "B")]
    looks = {(look.colour, look.marker, look.dashes) for look in found}
    assert len(looks) == 4 and not {l.marker for l in found} & {m.marker for m in METHODS.values()}
