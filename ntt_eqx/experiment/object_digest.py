"""What the results of an object depend on, as one number: its code, and the values that it uses."""

import ast
import contextlib
import copyreg
import dataclasses
import functools
import hashlib
import inspect
import textwrap
from collections.abc import Iterator, Mapping
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from .references import is_installed, source_digest

_CONSTANTS = (type(None), bool, int, float, complex, str, bytes, type(...))
_ARRAYS = (np.ndarray, np.memmap)  # all that others, as masked ones, hold is not in their entries
_UNWRAPPED = ("__func__", "fget", "method", "__wrapped__")  # what decorators keep a function in


def object_digest(thing: Any) -> str:
    """SHA-256 of the source of an object, and of all of the user's that this uses.

    A function counts with its defaults, its closure and the globals that it names; a class with
    its methods; an instance with its fields; an array with its entries; a module of the user's
    with its files. Comments and layout do not count. What is installed counts by its name, and an
    object of an installed class by what pickle would store of it: `np.float32(0.1)`, `range(3)` or
    `jax.lax.Precision.HIGHEST` by their values; by its class alone where pickle refuses it.
    """
    digest, seen = hashlib.sha256(), set()
    todo = [thing]
    kept = []  # so that no new object gets the `id` of one that was seen
    while todo:
        one = todo.pop()
        if type(one) not in _CONSTANTS:
            if id(one) in seen:
                continue
            seen.add(id(one))
            kept.append(one)
        text, parts = _look(one)
        digest.update(f"{len(text)} {text}".encode())
        todo += parts
    return digest.hexdigest()


def _look(thing: Any) -> tuple[str, list[Any]]:
    """What one object says by itself, and the objects that it uses."""
    if isinstance(thing, ModuleType):
        installed = is_installed(thing.__name__)
        return thing.__name__ if installed else source_digest(thing), []
    if isinstance(thing, FunctionType):
        return _function(thing)
    if isinstance(thing, type):
        return _class(thing)
    if (found := _builtin(thing)) is not None:
        text, parts = found
        own = [] if is_installed(type(thing).__module__) else [type(thing), _attributes(thing)]
        return text, [*parts, *own]
    for name in _UNWRAPPED:
        if not isinstance(thing, eqx.Module) and (inner := getattr(thing, name, None)) is not None:
            return name, [inner]
    said = f"instance {getattr(thing, '__name__', '')}"
    if not is_installed(type(thing).__module__) and hasattr(thing, "__dict__"):
        return said, [type(thing), _attributes(thing)]
    if dataclasses.is_dataclass(thing):
        fields = {f.name: getattr(thing, f.name, None) for f in dataclasses.fields(thing)}
        return said, [type(thing), fields]
    return said, [type(thing), _stored(thing)]


def _builtin(thing: Any) -> tuple[str, list[Any]] | None:
    """The content of what Python or an array library builds in; `None` for all else."""
    if isinstance(thing, _CONSTANTS):
        return repr(thing), []
    if isinstance(thing, jax.Array) or type(thing) in _ARRAYS and not thing.dtype.hasobject:
        return _array(thing), []
    if isinstance(thing, Mapping):
        entries = [thing[k] for k in sorted(thing, key=repr)]
        return f"{len(thing)} {sorted(map(repr, thing))}", entries
    if isinstance(thing, tuple | list):
        return f"{len(thing)}", list(thing)
    if isinstance(thing, set | frozenset):
        return f"{len(thing)}", sorted(thing, key=repr)
    if isinstance(thing, functools.partial):
        return "partial", [thing.func, thing.args, thing.keywords]
    if isinstance(thing, MethodType):
        return "method", [thing.__func__, thing.__self__]
    if isinstance(thing, CodeType):
        return "code", [thing.co_code, thing.co_names, thing.co_varnames, thing.co_consts]
    return None


def _attributes(thing: Any) -> dict[str, Any]:
    return dict(getattr(thing, "__dict__", {}))


def _stored(thing: Any) -> Any:
    """Return what pickle would store of an object; nothing where pickle refuses."""
    by_table = copyreg.dispatch_table.get(type(thing))
    try:
        found = by_table(thing) if by_table is not None else thing.__reduce_ex__(2)
    except Exception:  # whatever the code of others raises
        return None
    if isinstance(found, str):  # the name of a global
        return found
    # what stands behind the state are iterators, over entries and over items
    return [*found[:3], *([*part] for part in found[3:5] if part is not None)]


def _function(function: FunctionType) -> tuple[str, list[Any]]:
    parts = [list(_cells(function)), function.__defaults__, function.__kwdefaults__]
    if is_installed(function.__module__ or ""):  # of `exec` it has none
        return f"{function.__module__}.{function.__qualname__}", parts
    names = sorted(set(_names(function.__code__)))
    used = {name: function.__globals__[name] for name in names if name in function.__globals__}
    # The lines of a lambda may hold others, and `python -c` and the prompt keep no source.
    source = "" if function.__name__ == "<lambda>" else _source(function)
    return source, [*parts, used, *([] if source else [function.__code__])]


def _class(kind: type) -> tuple[str, list[Any]]:
    if is_installed(kind.__module__):
        return f"{kind.__module__}.{kind.__qualname__}", []
    members = {name: value for name, value in vars(kind).items() if _counts(name, value)}
    return kind.__qualname__, [members, list(kind.__bases__)]


def _counts(name: str, member: Any) -> bool:
    """Whether somebody wrote a member of a class, and not Python or a decorator of the class."""
    if name in ("__module__", "__doc__", "__firstlineno__", "_abc_impl"):
        return False
    hidden = name.startswith("__") and name.endswith("__")
    return not hidden or isinstance(member, (*_CONSTANTS, FunctionType)) or _unwraps(member)


def _unwraps(member: Any) -> bool:
    return any(getattr(member, name, None) is not None for name in _UNWRAPPED)


def _source(function: FunctionType) -> str:
    """The source without comments and layout; of a generated function nothing."""
    try:
        text = textwrap.dedent(inspect.getsource(function))
    except (OSError, TypeError):
        return ""
    try:
        return ast.unparse(ast.parse(text))
    except SyntaxError:  # a lambda within an expression of several lines
        return text


def _names(code: CodeType) -> Iterator[str]:
    """The names of globals and attributes in a function, and in those within it."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _array(array: Any) -> str:
    if isinstance(array, jax.Array) and jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        array = jax.random.key_data(array)
    entries = np.ascontiguousarray(array)
    content = hashlib.sha256(entries.tobytes()).hexdigest()
    return f"{entries.dtype.str}{entries.shape}{content}"


def _cells(function: FunctionType) -> Iterator[Any]:
    for cell in function.__closure__ or ():
        with contextlib.suppress(ValueError):  # a name that is assigned later
            yield cell.cell_contents
