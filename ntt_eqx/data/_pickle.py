"""A reader for the pickles of CIFAR that cannot execute anything.

A pickle is a program for a stack machine, and Python's own machine imports and calls whatever that
program names. This one knows the inert instructions (numbers, strings, lists, tuples, dicts, the
memo) and three names, which stand for building a uint8 array; it imports nothing and calls nothing
that the file names. Everything else is an error.
"""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ._errors import DatasetError


def read_pickle(path: Path, data: bytes) -> dict[str, Any]:
    """Read a pickled dict of strings, lists of integers and uint8 arrays.

    **Arguments:**

    - `path`: where `data` comes from, for messages.
    - `data`: the whole pickle, as Python 2 or 3 write it up to protocol 3.

    **Returns:**

    The dict, its keys as `str`. Strings of Python 2 come as `str` with one character per byte.

    **Raises:**

    `DatasetError` that names the file when the pickle is truncated, damaged, or needs anything
    that the published files do not.
    """
    try:
        content = _run(data)
        if not isinstance(content, dict):
            raise _Refused("it does not hold a dict")
        return {_text(key): _finished(value) for key, value in content.items()}
    except _Refused as error:
        raise DatasetError(f"{path}: refused to unpickle: {error}.") from error
    except (ValueError, TypeError, IndexError, KeyError, OverflowError) as error:
        raise DatasetError(f"{path}: truncated or damaged pickle ({error}).") from error


class _Refused(Exception):
    """The pickle asks for something that no published file needs."""


class _Name:
    """One of the three names that a pickle may mention."""

    def __init__(self, name: str):
        self.name = name


class _Array:
    """An array that has been announced and may have been given its contents."""

    def __init__(self) -> None:
        self.value: np.ndarray | None = None


class _Uint8:
    """The dtype of unsigned bytes."""


_MARK = object()
_RECONSTRUCT, _NDARRAY, _DTYPE = _Name("_reconstruct"), _Name("ndarray"), _Name("dtype")
_GLOBALS = {
    "numpy.core.multiarray _reconstruct": _RECONSTRUCT,
    "numpy._core.multiarray _reconstruct": _RECONSTRUCT,
    "numpy ndarray": _NDARRAY,
    "numpy dtype": _DTYPE,
}
# fmt: off
# followed by one number of this format
_NUMBERED = {
    b"\x80": ("PROTO", "<B"),
    b"K": ("BININT1", "<B"), b"M": ("BININT2", "<H"), b"J": ("BININT", "<i"),
    b"G": ("BINFLOAT", ">d"),
    b"q": ("BINPUT", "<B"), b"r": ("LONG_BINPUT", "<I"),
    b"h": ("BINGET", "<B"), b"j": ("LONG_BINGET", "<I"),
}
# followed by a number of this format, and then by so many bytes
_SIZED = {
    b"U": ("SHORT_BINSTRING", "<B"), b"T": ("BINSTRING", "<i"), b"X": ("BINUNICODE", "<I"),
    b"C": ("SHORT_BINBYTES", "<B"), b"B": ("BINBYTES", "<I"), b"\x8a": ("LONG1", "<B"),
}
# followed by nothing
_BARE = {
    b"N": "NONE", b"\x88": "NEWTRUE", b"\x89": "NEWFALSE", b")": "EMPTY_TUPLE",
    b"(": "MARK", b"]": "EMPTY_LIST", b"}": "EMPTY_DICT", b"a": "APPEND", b"e": "APPENDS",
    b"s": "SETITEM", b"u": "SETITEMS", b"t": "TUPLE", b"\x85": "TUPLE1", b"\x86": "TUPLE2",
    b"\x87": "TUPLE3", b"R": "REDUCE", b"b": "BUILD", b".": "STOP",
}
# fmt: on
_LITERALS = {
    "BININT",
    "BININT1",
    "BININT2",
    "LONG1",
    "BINFLOAT",
    "SHORT_BINSTRING",
    "BINSTRING",
    "BINUNICODE",
    "SHORT_BINBYTES",
    "BINBYTES",
}  # fmt: skip
_DECODERS = {
    "SHORT_BINSTRING": lambda content: content.decode("latin-1"),
    "BINSTRING": lambda content: content.decode("latin-1"),
    "BINUNICODE": lambda content: content.decode("utf-8"),
    "LONG1": lambda content: int.from_bytes(content, "little", signed=True),
}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}


def _run(data: bytes) -> Any:
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    for name, arg in _instructions(data):
        if name in _LITERALS:
            stack.append(arg)
        elif name in ("BINPUT", "LONG_BINPUT"):
            memo[arg] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[arg])
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name == "MARK":
            stack.append(_MARK)
        elif name == "EMPTY_LIST":
            stack.append([])
        elif name == "EMPTY_DICT":
            stack.append({})
        elif name in ("APPEND", "APPENDS"):
            items = _pop_items(stack, name == "APPENDS", 1)
            _top(stack, list).extend(items)
        elif name in ("SETITEM", "SETITEMS"):
            items = _pop_items(stack, name == "SETITEMS", 2)
            keys = [_text(key) for key in items[::2]]
            _top(stack, dict).update(zip(keys, items[1::2], strict=True))
        elif name in ("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"):
            stack.append(tuple(_pop_items(stack, name == "TUPLE", int(name[5:] or 0))))
        elif name == "GLOBAL":
            if arg not in _GLOBALS:
                raise _Refused(f"it names {arg.replace(' ', '.')}")
            stack.append(_GLOBALS[arg])
        elif name == "REDUCE":
            arguments, function = stack.pop(), stack.pop()
            stack.append(_call(function, arguments))
        elif name == "BUILD":
            state = stack.pop()
            _set_state(stack[-1], state)
        elif name == "STOP":
            return stack.pop()
    raise ValueError("no end")


def _instructions(data: bytes) -> Iterator[tuple[str, Any]]:
    """The instructions, each with its argument, up to the first that is not known."""
    position = 0

    def take(size: int) -> bytes:
        nonlocal position
        if not 0 <= size <= len(data) - position:
            raise ValueError(f"the end is missing, after {len(data):,} bytes")
        position += size
        return data[position - size : position]

    while True:
        code = take(1)
        if code in _BARE:
            yield _BARE[code], None
        elif code in _NUMBERED:
            name, form = _NUMBERED[code]
            yield name, struct.unpack(form, take(struct.calcsize(form)))[0]
        elif code in _SIZED:
            name, form = _SIZED[code]
            content = take(struct.unpack(form, take(struct.calcsize(form)))[0])
            yield name, _DECODERS.get(name, bytes)(content)
        elif code == b"c":
            end = data.find(b"\n", data.find(b"\n", position) + 1)
            yield "GLOBAL", take(end - position + 1).decode("ascii").replace("\n", " ").strip()
        else:
            raise _Refused(f"it uses the instruction 0x{code.hex()}")


def _pop_items(stack: list[Any], to_mark: bool, count: int) -> list[Any]:
    if to_mark:
        count = 0
        while stack[-1 - count] is not _MARK:
            count += 1
    if count > len(stack):
        raise ValueError("stack underflow")
    items = stack[len(stack) - count :]
    del stack[len(stack) - count - to_mark :]
    return items


def _top(stack: list[Any], kind: type) -> Any:
    if not isinstance(stack[-1], kind):
        raise _Refused(f"it fills a {type(stack[-1]).__name__} as if it were a {kind.__name__}")
    return stack[-1]


def _call(function: Any, arguments: Any) -> Any:
    if function is _RECONSTRUCT and arguments[:1] == (_NDARRAY,):
        return _Array()
    if function is _DTYPE and _text(arguments[0]) in ("u1", "uint8"):
        return _Uint8()
    raise _Refused("it builds something other than an array of unsigned bytes")


def _set_state(target: Any, state: Any) -> None:
    """`ndarray.__setstate__((version, shape, dtype, is_fortran, bytes))`, for uint8 only."""
    if isinstance(target, _Uint8):
        return
    if not isinstance(target, _Array):
        raise _Refused(f"it sets the state of a {type(target).__name__}")
    _, shape, dtype, is_fortran, raw = state
    if not isinstance(dtype, _Uint8) or not isinstance(raw, str | bytes):
        raise _Refused("it builds something other than an array of unsigned bytes")
    content = raw.encode("latin-1") if isinstance(raw, str) else raw
    order = "F" if is_fortran else "C"
    target.value = np.frombuffer(content, np.uint8).reshape(tuple(map(int, shape)), order=order)


def _text(key: Any) -> str:
    if not isinstance(key, str | bytes):
        raise _Refused(f"it has a key or name of type {type(key).__name__}")
    return key if isinstance(key, str) else key.decode("latin-1")


def _finished(value: Any) -> Any:
    if isinstance(value, _Array):
        if value.value is None:
            raise ValueError("an array without contents")
        return value.value
    if value is _MARK or isinstance(value, _Name | _Uint8):
        raise _Refused("a value is neither a string, a number, a list nor an array")
    return value
