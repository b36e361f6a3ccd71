"""What the results of an object depend on, as one number: its code, and the values that it uses."""

import ast
import contextlib
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
_UNWRAPPED = ("__func__", "fget", "method", "__wrapped__")  # what decorators keep a function in


def object_digest(thing: Any) -> str:
    """SHA-256 of the source of an object, and of all of the user's that this uses.

    A function counts with its defaults, its closure and the globals that it names; a class with
    its methods; an instance with its fields; an array with its entries; a module of the user's
    with its files. Comments and layout do not count. What is installed counts by its name, and an
    object of an installed class by that class, unless it is an array, a container or a dataclass.
    """
    digest, seen = hashlib.sha256(), set()
    todo = [thing]
    kept = []  # so that no new object gets the `id` of one that was seen
    while todo:
        one = todo.pop()
        if not isinstance(one, _CONSTANTS):
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
    if isinstance(thing, _CONSTANTS):
        return repr(thing), []
    if isinstance(thing, ModuleType):
        installed = is_installed(thing.__name__)
        return thing.__name__ if installed else source_digest(thing), []
    if isinstance(thing, jax.Array | np.ndarray):
        return _array(thing), []
    if isinstance(thing, Mapping):
        return f"{len(thing)} {sorted(map(repr, thing))}", [
            thing[k] for k in sorted(thing, key=repr)
        ]
    if isinstance(thing, tuple | list):
        return f"{len(thing)}", list(thing)
    if isinstance(thing, set | frozenset):
        return f"{len(thing)}", sorted(thing, key=repr)
    if isinstance(thing, functools.partial):
        return "partial", [thing.func, thing.args, thing.keywords]
    if isinstance(thing, MethodType):
        return "method", [thing.__func__, thing.__self__]
    if isinstance(thing, FunctionType):
        return _function(thing)
    if isinstance(thing, type):
        return _class(thing)
    for name in _UNWRAPPED:
        if not isinstance(thing, eqx.Module) and (inner := getattr(thing, name, None)) is not None:
            return name, [inner]
    own = not is_installed(type(thing).__module__)
    fields = vars(thing) if own and hasattr(thing, "__dict__") else _fields(thing)
    return f"instance {getattr(thing, '__name__', '')}", [type(thing), dict(fields)]


def _fields(thing: Any) -> dict[str, Any]:
    if not dataclasses.is_dataclass(thing):
        return {}
    return {f.name: getattr(thing, f.name, None) for f in dataclasses.fields(thing)}


def _function(function: FunctionType) -> tuple[str, list[Any]]:
    parts = [list(_cells(function)), function.__defaults__, function.__kwdefaults__]
    if is_installed(function.__module__):
        return f"{function.__module__}.{function.__qualname__}", parts
    names = sorted(set(_names(function.__code__)))
    used = {name: function.__globals__[name] for name in names if name in function.__globals__}
    return _source(function), [*parts, used]


def _class(kind: type) -> tuple[str, list[Any]]:
    if is_installed(kind.__module__):
        return f"{kind.__module__}.{kind.__qualname__}", []
    members = {
        name: value
        for name, value in vars(kind).items()
        if isinstance(value, _CONSTANTS) or _is_written(value)
    }
    hidden = ("__module__", "__doc__", "__firstlineno__")
    members = {name: value for name, value in members.items() if name not in hidden}
    return kind.__qualname__, [members, list(kind.__bases__)]


def _is_written(member: Any) -> bool:
    """Whether a member of a class is a function that somebody wrote, decorated or not."""
    for name in _UNWRAPPED:
        member = getattr(member, name, None) or member
    return isinstance(member, FunctionType) and bool(_source(member))


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
