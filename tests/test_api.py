"""The public API: cheap to import, complete, and documented to the last argument."""

import dataclasses
import inspect
import re
import subprocess
import sys
import types

import pytest

import ntt_eqx

ROOMS = [
    ntt_eqx,
    ntt_eqx.scores,
    ntt_eqx.data,
    ntt_eqx.models,
    ntt_eqx.kernels,
    ntt_eqx.export,
    ntt_eqx.experiment,
]
# What only the extra `cli` brings, and what is too slow to import for everybody.
OPTIONAL = ["tyro", "rich", "matplotlib", "pooch", "orbax", "grain", "IPython", "mkdocs"]
OPTIONAL += ["pandas", "jinja2", "safetensors", "jax2onnx", "onnx", "onnxruntime", "lineax"]


def public(room):
    return {
        name: value
        for name, value in vars(room).items()
        if not name.startswith("_") and not isinstance(value, types.ModuleType)
    }


FUNCTIONS = [
    pytest.param(value, id=f"{room.__name__}.{name}")
    for room in ROOMS
    for name, value in public(room).items()
    if inspect.isroutine(value)
]
CLASSES = [
    pytest.param(value, id=f"{room.__name__}.{name}")
    for room in ROOMS
    for name, value in public(room).items()
    if inspect.isclass(value)
]


def python(code):
    return subprocess.run([sys.executable, "-c", code], text=True, capture_output=True)


def test_the_import_leaves_optional_packages_alone():
    """Neither imported nor needed: a finder refuses them while the package is imported."""
    done = python(
        f"""
import sys

optional = {OPTIONAL!r}

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in optional:
            raise ImportError(f"{{name}} is refused")

sys.meta_path.insert(0, Refuse())
import ntt_eqx
print(sorted({{name.split(".")[0] for name in sys.modules}} & set(optional)))
print([name for name in sys.modules if name.startswith("ntt_eqx.experiment")])
"""
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:2] == ["[]", "[]"]


def test_the_import_is_that_of_equinox_and_of_nothing_else():
    """Optax, SciPy's linear algebra and Pallas are imported when a call first needs them."""
    done = python(
        """
import sys
import equinox
before = set(sys.modules)
import ntt_eqx
rooms = {name.split(".")[0] for name in set(sys.modules) - before}
print(sorted(rooms - {"ntt_eqx", "ntt_eqx_kernels"} - set(sys.stdlib_module_names)))
"""
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[]\n"


def test_the_import_asks_for_no_device_and_changes_no_setting():
    done = python(
        """
import jax
before = dict(jax.config.values)
import ntt_eqx
assert dict(jax.config.values) == before
import jax._src.xla_bridge as bridge
assert not bridge.backends_are_initialized()
"""
    )
    assert done.returncode == 0, done.stderr


def test_the_rooms_are_the_public_ones():
    rooms = {
        name
        for name, value in vars(ntt_eqx).items()
        if isinstance(value, types.ModuleType)
        and not name.startswith("_")
        and value.__name__.startswith("ntt_eqx.")  # the tests' type checker adds one of its own
    }
    assert rooms - {"experiment", "export"} == {"data", "kernels", "models", "scores"}


def test_names_that_users_type():
    names = {
        "DivergenceError", "LayerCollapseWarning", "NTTConfig", "NTTMetrics", "NTTState",
        "SparseModel", "TrainConfig", "TrainMetrics", "TrainState", "apply_mask", "check_collapse",
        "evaluate", "make_mask", "ntk", "ntt_init", "ntt_loss", "ntt_step", "prunable_weights",
        "rescale_by_density", "sparsify", "train", "train_init", "train_step", "train_steps",
        "transfer",
    }  # fmt: skip
    assert names <= public(ntt_eqx).keys()
    for name in ("LogitSnip", "Magnitude", "Random", "Snip"):
        assert name in public(ntt_eqx.scores)


def first_line_is_a_sentence(text):
    first = (text or "").strip().split("\n\n")[0]
    return first.endswith(".") and not "a" <= first[0] <= "z"


def missing(text, names):
    """The names that `text` does not set in backticks."""
    return [name for name in names if f"`{name}`" not in text]


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_function_tells_all_of_its_arguments_and_what_it_returns(function):
    text = inspect.getdoc(function) or ""
    signature = inspect.signature(function)
    assert first_line_is_a_sentence(text)
    assert missing(text, signature.parameters) == []
    assert not signature.parameters or "**Arguments:**" in text
    assert signature.return_annotation is None or "**Returns:**" in text
    for parameter in signature.parameters.values():
        assert parameter.annotation is not parameter.empty, f"{parameter.name} has no type"
    assert signature.return_annotation is not signature.empty


@pytest.mark.parametrize("cls", CLASSES)
def test_a_class_tells_its_fields_and_its_methods(cls):
    assert first_line_is_a_sentence(cls.__doc__)
    # a field of an abstract class may be told there
    text = "".join(base.__doc__ or "" for base in cls.__mro__ if _ours(base))
    if "__init__" in vars(cls) and not _generated(cls.__init__):
        names = [n for n in inspect.signature(cls.__init__).parameters if n != "self"]
        described = text + (cls.__init__.__doc__ or "")
        assert [n for n in names if not _described(described, n)] == []
    else:
        assert [n for n in _fields(cls) if not _described(text, n)] == []
    for name, method in vars(cls).items():
        if not name.startswith("_") and inspect.isfunction(method):
            assert first_line_is_a_sentence(method.__doc__), name


def _ours(cls):
    return cls.__module__.startswith("ntt_eqx")


def _generated(init):
    """Written by a dataclass, not by hand."""
    return not init.__doc__ or init.__code__.co_filename.startswith("<")


def _fields(cls):
    if dataclasses.is_dataclass(cls):
        return [f.name for f in dataclasses.fields(cls) if f.init and not f.name.startswith("_")]
    return getattr(cls, "_fields", ())


def _described(text, name):
    return f"`{name}`" in text or re.search(rf"(?m)^\s*{name}: ", text) is not None
