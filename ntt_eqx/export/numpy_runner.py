"""Run a network that `ntt_eqx.export.save_numpy` wrote, with NumPy and SciPy alone.

Copy this file to where the network shall run (`ntt_eqx.export.save_runner` does); it imports no
other file. In Python,

    network = numpy_runner.load("network.npz")
    outputs = network(inputs)  # [batch, ...], any number of samples

and from a shell, `python numpy_runner.py network.npz inputs.npy outputs.npy`.

A network file is a zip archive of plain arrays. One of them, `program`, is JSON: a list of steps,
each one of the operations below. Nothing in a file is executed or unpickled, and `load` refuses one
that is truncated or changed, steps that are unknown, and indices that lie outside of their arrays.
In shapes, a number below zero stands for a multiple of the number of samples.
"""

import hashlib
import io
import itertools
import json
import math
import sys
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import special
from scipy.sparse import csr_array

FORMAT = "ntt-eqx network 1"
DTYPES = ("bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64")
DTYPES += ("float32", "float64")
_BLOCK = 1 << 20  # entries of patches at a time, so that they stay in cache

Arrays = Mapping[str, np.ndarray]
Operation = Callable[..., Any]


class Network:
    """A network in memory: call it with samples `[batch, ...]`.

    Attributes:
        shape: of one sample.
        dtype: of the samples.
    """

    def __init__(self, program: dict[str, Any], arrays: Arrays):
        """Prepare every step; `ValueError` for one that is not well-formed."""
        self.shape = tuple(_sizes(program["shape"]))
        self.dtype = _dtype(program["dtype"])
        self._program = Program(program["program"], arrays, 1)
        if len(self._program.outputs) != 1:
            raise ValueError("the network must have one output.")

    def __call__(self, x: Any) -> np.ndarray:
        """The outputs `[batch, ...]` of a batch; `ValueError` if it has another shape or dtype."""
        x = np.asarray(x)
        if x.ndim != len(self.shape) + 1 or x.shape[1:] != self.shape or x.dtype != self.dtype:
            raise ValueError(
                f"the network takes {self.dtype} samples [batch, "
                f"{', '.join(map(str, self.shape))}], got {x.dtype} {list(x.shape)}."
            )
        with np.errstate(all="ignore"):
            (outputs,) = self._program([x], len(x))
        return np.ascontiguousarray(outputs)


class Program:
    """Steps in order; the inputs are the first slots."""

    def __init__(self, given: dict[str, Any], arrays: Arrays, inputs: int):
        """Prepare every step, and note after which step a value is not read again."""
        steps = given["steps"]
        last = {s: n for n, step in enumerate(steps) for s in step["in"] if isinstance(s, int)}
        self.outputs = [_operand(slot, arrays) for slot in given["outputs"]]
        kept, known = {slot for slot, _ in self.outputs if slot is not None}, set(range(inputs))
        self._steps = []
        for n, step in enumerate(steps):
            operands = [_operand(slot, arrays) for slot in step["in"]]
            reads = {slot for slot, _ in operands if slot is not None}
            if not reads <= known:
                raise ValueError(f"step {n} reads a value that no step before it makes.")
            known.update(step["out"])
            dead = [slot for slot in reads if last[slot] == n and slot not in kept]
            self._steps.append((_prepared(step, arrays), operands, list(step["out"]), dead))
        if not kept <= known:
            raise ValueError("an output is not made by any step.")

    def __call__(self, inputs: Sequence[Any], batch: int) -> list[Any]:
        """The outputs for these inputs, of so many samples."""
        values = dict(enumerate(inputs))
        read = lambda operand: operand[1] if operand[0] is None else values[operand[0]]
        for operation, operands, out, dead in self._steps:
            found = operation(batch, *map(read, operands))
            if len(out) == 1:
                values[out[0]] = found
            else:
                values.update(zip(out, found, strict=True))
            for slot in dead:
                values.pop(slot, None)
        return [read(operand) for operand in self.outputs]


def load(path: Any) -> Network:
    """Read a network; `ValueError` names a file that is not whole or not one."""
    content = Path(path).read_bytes()
    try:
        return decode(content)
    except Exception as error:  # whatever foreign bytes lead to
        raise ValueError(f"{path}: cannot be read as a network ({error}).") from error


def decode(content: bytes) -> Network:
    """`load` of a file with this content; another exception if it is not one."""
    arrays = _read(content)
    program = json.loads(arrays.pop("program").tobytes())
    if program["format"] != FORMAT:
        raise ValueError(f"its format is {program['format']!r}, not {FORMAT!r}")
    return Network(program, arrays)


def digest(arrays: Arrays) -> np.ndarray:
    """The SHA-256 of names, dtypes, shapes and values, `[32]` bytes."""
    summed = hashlib.sha256()
    for name in sorted(arrays):
        array = arrays[name]
        head = json.dumps([name, str(array.dtype), list(array.shape)])
        summed.update(head.encode() + b"\n" + np.ascontiguousarray(array).tobytes())
    return np.frombuffer(summed.digest(), np.uint8)


def _read(content: bytes) -> dict[str, np.ndarray]:
    arrays = {}
    with zipfile.ZipFile(io.BytesIO(content)) as file:
        members = file.infolist()
        if any(member.compress_type != zipfile.ZIP_STORED for member in members):
            raise ValueError("its arrays are compressed")  # and may be endless
        for member in members:
            name = member.filename.removesuffix(".npy")
            if name in arrays:
                raise ValueError(f"two arrays are called {name!r}")
            arrays[name] = _array(file.read(member))
    if not np.array_equal(arrays.pop("sha256"), digest(arrays)):
        raise ValueError("its content does not match its checksum")
    return arrays


def _array(content: bytes) -> np.ndarray:
    buffer = io.BytesIO(content)
    if np.lib.format.read_magic(buffer) != (1, 0):
        raise ValueError("an array has another format")
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(buffer)
    if fortran or str(dtype) not in DTYPES:
        raise ValueError(f"an array has the dtype {dtype}")
    return np.frombuffer(content, dtype, offset=buffer.tell()).reshape(shape)


def _operand(slot: Any, arrays: Arrays) -> tuple[int | None, Any]:
    """A slot, or the value of a constant."""
    if isinstance(slot, int):
        return slot, None
    if isinstance(slot, str):
        return None, arrays[slot]
    value, dtype = slot
    return None, np.asarray(value, _dtype(dtype))


def _prepared(step: dict[str, Any], arrays: Arrays) -> Operation:
    name, params = step["op"], step.get("params", {})
    if name in _PLAIN:
        plain = _PLAIN[name]
        return lambda batch, *inputs: plain(*inputs)
    if name not in _PREPARED:
        raise ValueError(f"unknown operation {name!r}.")
    return _PREPARED[name](params, arrays)


def _dtype(name: Any) -> np.dtype:
    if name not in DTYPES:
        raise ValueError(f"unknown dtype {name!r}.")
    return np.dtype(name)


def _sizes(sizes: Any) -> list[int]:
    if not isinstance(sizes, list) or any(type(size) is not int for size in sizes):
        raise ValueError(f"{sizes!r} is no list of integers.")
    return sizes


def _positive(sizes: Any) -> list[int]:
    if min(_sizes(sizes), default=1) < 1:
        raise ValueError(f"{sizes!r} must be above zero.")
    return sizes


def _resolve(sizes: Sequence[int], batch: int) -> tuple[int, ...]:
    return tuple(size if size >= 0 else -size * batch for size in sizes)


# Element by element


def _divide(a: Any, b: Any) -> Any:
    if np.asarray(a).dtype.kind == "f":
        return np.divide(a, b)
    # The remainder has the sign of `a`, so that the quotient is exact; all ones over 0, as in XLA.
    return np.where(b == 0, np.invert(np.zeros_like(b)), (a - np.fmod(a, b)) // b)


def _remainder(a: Any, b: Any) -> Any:
    rest = np.fmod(a, b)
    return rest if np.asarray(a).dtype.kind == "f" else np.where(b == 0, a, rest)


def _power(x: Any, y: Any) -> Any:
    return np.power(x, np.asarray(y).astype(x.dtype))


def _select(which: Any, *cases: Any) -> Any:
    if which.dtype == bool:
        return np.where(which, cases[1], cases[0])
    return np.choose(np.clip(which, 0, len(cases) - 1), cases)


def _reciprocal_root(x: Any) -> Any:
    return np.asarray(1, x.dtype) / np.sqrt(x)


_PLAIN: dict[str, Operation] = {
    "abs": np.abs, "acos": np.arccos, "acosh": np.arccosh, "add": np.add, "add_any": np.add,
    "and": np.bitwise_and, "asin": np.arcsin, "asinh": np.arcsinh, "atan": np.arctan,
    "atan2": np.arctan2, "atanh": np.arctanh, "cbrt": np.cbrt, "ceil": np.ceil,
    "copy": lambda x: x, "copy_p": lambda x: x, "cos": np.cos, "cosh": np.cosh, "div": _divide,
    "eq": np.equal, "erf": special.erf, "erf_inv": special.erfinv, "erfc": special.erfc,
    "exp": np.exp, "exp2": np.exp2, "expm1": np.expm1, "floor": np.floor, "ge": np.greater_equal,
    "gt": np.greater, "is_finite": np.isfinite, "le": np.less_equal, "lgamma": special.gammaln,
    "log": np.log, "log1p": np.log1p, "logistic": special.expit, "lt": np.less,
    "max": np.maximum, "min": np.minimum, "mul": np.multiply, "ne": np.not_equal,
    "neg": np.negative, "not": np.invert, "or": np.bitwise_or, "pow": _power, "rem": _remainder,
    "rsqrt": _reciprocal_root, "select_n": _select, "sign": np.sign, "sin": np.sin,
    "sinh": np.sinh, "sqrt": np.sqrt, "square": np.square, "stop_gradient": lambda x: x,
    "sub": np.subtract, "tan": np.tan, "tanh": np.tanh, "xor": np.bitwise_xor,
    "clamp": lambda low, x, high: np.minimum(np.maximum(x, low), high),
}  # fmt: skip


def _integer_pow(params: Any, arrays: Arrays) -> Operation:
    y = int(params["y"])
    return lambda batch, x: x**y


def _round(params: Any, arrays: Arrays) -> Operation:
    if params["to_even"]:
        return lambda batch, x: np.round(x)

    def away_from_zero(batch: int, x: Any) -> Any:
        whole = np.trunc(x)
        return np.where(np.abs(x - whole) < 0.5, whole, whole + np.copysign(1, x))

    return away_from_zero


def _convert(params: Any, arrays: Arrays) -> Operation:
    dtype = _dtype(params["dtype"])

    def operation(batch: int, x: Any) -> Any:
        x = np.asarray(x)
        if x.dtype.kind != "f" or dtype.kind not in "iu":
            return x.astype(dtype)
        # XLA takes the nearest integer of the range, and 0 for NaN; NumPy leaves both undefined.
        low, high = np.iinfo(dtype).min, np.iinfo(dtype).max
        found = np.where((x > low) & (x < high), x, np.zeros_like(x)).astype(dtype)
        found[x <= low], found[x >= high] = low, high
        return found

    return operation


# Moves of entries


def _reshape(params: Any, arrays: Arrays) -> Operation:
    shape = _sizes(params["shape"])
    return lambda batch, x: np.reshape(x, _resolve(shape, batch))


def _transpose(params: Any, arrays: Arrays) -> Operation:
    axes = _sizes(params["axes"])
    return lambda batch, x: np.transpose(x, axes)


def _broadcast(params: Any, arrays: Arrays) -> Operation:
    shape, axes = _sizes(params["shape"]), _sizes(params["axes"])

    def operation(batch: int, x: Any) -> Any:
        inner = [1] * len(shape)
        for axis, size in zip(axes, np.shape(x), strict=True):
            inner[axis] = size
        return np.broadcast_to(np.reshape(x, inner), _resolve(shape, batch))

    return operation


def _slice(params: Any, arrays: Arrays) -> Operation:
    start, stop, step = (_sizes(params[name]) for name in ("start", "stop", "step"))

    def operation(batch: int, x: Any) -> Any:
        bounds = zip(_resolve(start, batch), _resolve(stop, batch), step, strict=True)
        return x[tuple(slice(*bound) for bound in bounds)]

    return operation


def _dynamic_slice(params: Any, arrays: Arrays) -> Operation:
    given = _sizes(params["sizes"])

    def operation(batch: int, x: Any, *starts: Any) -> Any:
        sizes = _resolve(given, batch)
        inside = [
            min(max(int(s), 0), n - k) for s, n, k in zip(starts, x.shape, sizes, strict=True)
        ]
        return x[tuple(slice(s, s + k) for s, k in zip(inside, sizes, strict=True))]

    return operation


def _concatenate(params: Any, arrays: Arrays) -> Operation:
    axis = int(params["axis"])
    return lambda batch, *inputs: np.concatenate(inputs, axis)


def _stack(params: Any, arrays: Arrays) -> Operation:
    axis = int(params["axis"])
    return lambda batch, *inputs: np.stack(inputs, axis)


def _split(params: Any, arrays: Arrays) -> Operation:
    axis, sizes = int(params["axis"]), _sizes(params["sizes"])

    def operation(batch: int, x: Any) -> Any:
        parts = np.split(x, np.cumsum(_resolve(sizes, batch))[:-1], axis)
        return parts if len(parts) > 1 else parts[0]

    return operation


def _reverse(params: Any, arrays: Arrays) -> Operation:
    axes = tuple(_sizes(params["axes"]))
    return lambda batch, x: np.flip(x, axes)


def _iota(params: Any, arrays: Arrays) -> Operation:
    shape, axis, dtype = _sizes(params["shape"]), int(params["axis"]), _dtype(params["dtype"])

    def operation(batch: int) -> Any:
        sizes = _resolve(shape, batch)
        inner = [size if n == axis else 1 for n, size in enumerate(sizes)]
        return np.broadcast_to(np.arange(sizes[axis]).astype(dtype).reshape(inner), sizes)

    return operation


def _pad(params: Any, arrays: Arrays) -> Operation:
    given = [tuple(_sizes(edges)) for edges in params["padding"]]
    if any(len(edges) != 3 or edges[2] < 0 for edges in given):
        raise ValueError("a padding is not of three numbers.")
    return lambda batch, x, value: _padded(x, value, given)


def _padded(x: Any, value: Any, padding: Sequence[Sequence[int]]) -> Any:
    """With entries before, after and between those along each axis; below zero, fewer."""
    if not any(any(edges) for edges in padding):
        return x
    wide = [
        size + max(size - 1, 0) * mid for size, (_, _, mid) in zip(x.shape, padding, strict=True)
    ]
    sizes = [
        n + max(low, 0) + max(high, 0) for n, (low, high, _) in zip(wide, padding, strict=True)
    ]
    out = np.full(sizes, value, x.dtype)
    inside = zip(padding, wide, strict=True)
    out[tuple(slice(max(low, 0), max(low, 0) + n, mid + 1) for (low, _, mid), n in inside)] = x
    cut = zip(padding, sizes, strict=True)
    return out[tuple(slice(max(-low, 0), n - max(-high, 0)) for (low, high, _), n in cut)]


def _gather(params: Any, arrays: Arrays) -> Operation:
    """The slices of an array at given places, as XLA defines it."""
    offset, collapsed, mapped, batching, batched = (
        _sizes(params[name]) for name in ("offset", "collapsed", "mapped", "batching", "batched")
    )
    sizes, fill = _sizes(params["sizes"]), params["fill"]

    def operation(batch: int, x: Any, places: Any) -> Any:
        lengths, outer = _resolve(sizes, batch), places.shape[:-1]
        windows = [n for n in range(x.ndim) if n not in collapsed and n not in batching]
        inner, index, valid = [1] * len(windows), [], np.ones(outer, bool)
        for n, (size, length) in enumerate(zip(x.shape, lengths, strict=True)):
            start = np.zeros(outer, np.int64)
            if n in mapped:
                start = places[..., mapped.index(n)].astype(np.int64)
            elif n in batching:
                axis = batched[batching.index(n)]
                shape = [s if m == axis else 1 for m, s in enumerate(outer)]
                start = np.broadcast_to(np.arange(outer[axis]).reshape(shape), outer)
            valid &= (start >= 0) & (start <= size - length)
            start = np.clip(start, 0, size - length).reshape(*outer, *inner)
            if n in windows:
                shape = [length if m == windows.index(n) else 1 for m in range(len(windows))]
                start = start + np.arange(length).reshape(shape)
            index.append(start)
        found = x[tuple(index)]
        if fill is not None and not valid.all():
            found = np.where(valid.reshape(*outer, *inner), found, np.asarray(fill, x.dtype))
        ndim = found.ndim
        rest = iter(n for n in range(ndim) if n not in offset)
        place = [next(rest) for _ in outer] + list(offset)
        return np.transpose(found, np.argsort(place))

    return operation


# Sums and orders


def _reduction(function: Any) -> Callable[[Any, Arrays], Operation]:
    def prepare(params: Any, arrays: Arrays) -> Operation:
        axes = tuple(_sizes(params["axes"]))
        return lambda batch, x: function.reduce(x, axis=axes, dtype=x.dtype)

    return prepare


def _running(function: Any) -> Callable[[Any, Arrays], Operation]:
    def prepare(params: Any, arrays: Arrays) -> Operation:
        axis, reverse = int(params["axis"]), bool(params["reverse"])
        turn = (lambda x: np.flip(x, axis)) if reverse else (lambda x: x)
        return lambda batch, x: turn(function.accumulate(turn(x), axis=axis, dtype=x.dtype))

    return prepare


def _place_of(function: Any) -> Callable[[Any, Arrays], Operation]:
    def prepare(params: Any, arrays: Arrays) -> Operation:
        axis, dtype = int(params["axis"]), _dtype(params["dtype"])
        return lambda batch, x: np.asarray(function(x, axis)).astype(dtype)

    return prepare


def _sort(params: Any, arrays: Arrays) -> Operation:
    axis = int(params["axis"])

    def operation(batch: int, *inputs: Any) -> Any:
        if len(inputs) == 1:
            return np.sort(inputs[0], axis, kind="stable")
        order = np.argsort(inputs[0], axis, kind="stable")
        return [np.take_along_axis(x, order, axis) for x in inputs]

    return operation


def _top_k(params: Any, arrays: Arrays) -> Operation:
    k = int(params["k"])

    def operation(batch: int, x: Any) -> Any:
        # NaN first, and of equal ones that of the lowest index: the end of the ascending order of
        # the reversed entries. Integers have no negative of their least one.
        last = np.argsort(x[..., ::-1], -1, kind="stable")[..., ::-1][..., :k]
        order = x.shape[-1] - 1 - last
        return np.take_along_axis(x, order, -1), order.astype(np.int32)

    return operation


def _window(function: Any, start: float) -> Callable[[Any, Arrays], Operation]:
    """Pooling: the sum or the largest of the entries in each window."""

    def prepare(params: Any, arrays: Arrays) -> Operation:
        size, step, between = (_positive(params[name]) for name in ("size", "step", "dilation"))
        padding = [(*_sizes(edges), 0) for edges in params["padding"]]

        def operation(batch: int, x: Any) -> Any:
            x = _padded(x, start, padding)
            reach = [(k - 1) * d + 1 for k, d in zip(size, between, strict=True)]
            many = [max((n - r) // s + 1, 0) for n, r, s in zip(x.shape, reach, step, strict=True)]
            found = None
            for place in itertools.product(*map(range, size)):
                bounds = []
                for p, d, n, s in zip(place, between, many, step, strict=True):
                    bounds.append(slice(p * d, p * d + (n - 1) * s + 1 if n else p * d, s))
                part = x[tuple(bounds)]
                if found is None:
                    found = part.copy(order="K")
                else:
                    function(found, part, out=found)
            return found

        return operation

    return prepare


# Products


def _dot(params: Any, arrays: Arrays) -> Operation:
    """Any contraction of two dense arrays, by BLAS."""
    one, two = (_sizes(params[name]) for name in ("contract_one", "contract_two"))
    first, second = (_sizes(params[name]) for name in ("batch_one", "batch_two"))

    def operation(batch: int, a: Any, b: Any) -> Any:
        free_a = [n for n in range(a.ndim) if n not in (*one, *first)]
        free_b = [n for n in range(b.ndim) if n not in (*two, *second)]
        size = lambda x, axes: [x.shape[n] for n in axes]
        many, inner = size(a, first), math.prod(size(a, one))
        left = np.transpose(a, [*first, *free_a, *one])
        left = left.reshape(*many, math.prod(size(a, free_a)), inner)
        right = np.transpose(b, [*second, *two, *free_b])
        right = right.reshape(*many, inner, math.prod(size(b, free_b)))
        return (left @ right).reshape(*many, *size(a, free_a), *size(b, free_b))

    return operation


def _sparse_dot(params: Any, arrays: Arrays) -> Operation:
    """The product with a sparse matrix, whose columns meet some axes of the input."""
    matrix, free = _matrix(params["matrix"], arrays), _positive(params["free"])
    contract, last = _sizes(params["contract"]), bool(params["last"])
    if math.prod(free) != matrix.shape[0]:
        raise ValueError("a sparse matrix does not have the rows of its output.")

    def operation(batch: int, x: Any) -> Any:
        rest = [n for n in range(x.ndim) if n not in contract]
        sizes = [x.shape[n] for n in rest]
        columns = np.transpose(x, [*contract, *rest]).reshape(matrix.shape[1], math.prod(sizes))
        found = (matrix @ columns).reshape(*free, *sizes)
        if last:
            axes = range(found.ndim)
            found = np.transpose(found, [*axes[len(free) :], *axes[: len(free)]])
        return found

    return operation


def _matrix(given: Any, arrays: Arrays) -> Any:
    """The sparse matrix under a name; SciPy itself does not look whether its indices fit."""
    name, (rows, columns) = given["name"], _sizes(given["shape"])
    values, indices, ends = (arrays[f"{name}.{part}"] for part in ("values", "columns", "ends"))
    right = values.ndim == indices.ndim == ends.ndim == 1 and values.dtype.kind == "f"
    right = right and indices.dtype.kind in "iu" and ends.dtype.kind in "iu"
    right = right and 0 < rows < 2**31 and 0 < columns < 2**31 and len(ends) == rows
    right = right and len(values) == len(indices) == int(ends[-1]) < 2**31
    right = right and bool(np.all(np.diff(ends.astype(np.int64), prepend=0) >= 0))
    if not right or len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < columns:
        raise ValueError(f"the indices of {name!r} do not fit its shape.")
    starts = np.concatenate([[0], ends]).astype(np.int32)
    return csr_array((values, indices.astype(np.int32), starts), shape=(rows, columns))


class _Convolution:
    """Sizes of a convolution; images are `[C, ..., N]` inside, features first and samples last."""

    def __init__(self, params: Any):
        names = ("step", "dilation", "base")
        self.step, self.dilation, self.base = (_positive(params[name]) for name in names)
        self.padding = [tuple(_sizes(edges)) for edges in params["padding"]]
        self.groups = _positive([params["groups"]])[0]
        self.into, self.out = _sizes(params["into"]), _sizes(params["out"])

    def maps(self, kernel: Sequence[int], image: Sequence[int]) -> list[int]:
        """Sizes of the output."""
        found = []
        rows = zip(kernel, image, self.step, self.dilation, self.base, self.padding, strict=True)
        for size, n, step, dilation, base, (low, high) in rows:
            wide = (n - 1) * base + 1 + low + high if n else low + high
            found.append(max((wide - (size - 1) * dilation - 1) // step + 1, 0))
        return found

    def images(self, x: Any) -> Any:
        """`[C, ..., N]` of an input in the program's order of axes."""
        first, *rest = self.into
        return np.transpose(x, [*rest, first])

    def outputs(self, y: Any) -> Any:
        """The program's order of axes, of `[O, ..., N]`."""
        y = np.transpose(y, [y.ndim - 1, *range(y.ndim - 1)])
        return np.transpose(y, np.argsort(self.out))


def _convolve(params: Any, arrays: Arrays) -> Operation:
    """A dense convolution: patches, a block of positions at a time, and BLAS."""
    sizes, order = _Convolution(params), _sizes(params["kernel"])

    def operation(batch: int, x: Any, w: Any) -> Any:
        x, w = sizes.images(x), np.transpose(w, order)
        kernel, groups = w.shape[2:], sizes.groups
        maps, samples = sizes.maps(kernel, x.shape[1:-1]), x.shape[-1]
        around = zip(sizes.padding, sizes.base, strict=True)
        padding = [(0, 0, 0), *((*edges, base - 1) for edges, base in around), (0, 0, 0)]
        x = _padded(x, 0, padding)
        patches = _patches(x, kernel, maps, sizes)
        w = w.reshape(groups, len(w) // groups, math.prod(w.shape[1:]))
        out = np.empty((groups, w.shape[1], *maps, samples), x.dtype)
        features = groups * w.shape[1]
        if not out.size:
            return sizes.outputs(out.reshape(features, *maps, samples))
        row = max(1, w.shape[2] * groups * math.prod(maps[1:]) * samples)
        rows = max(1, _BLOCK // row)
        for start in range(0, maps[0], rows):
            stop = min(start + rows, maps[0])
            part = patches[(slice(None),) * (1 + len(kernel)) + (slice(start, stop),)]
            found = w @ part.reshape(groups, w.shape[2], -1)
            out[:, :, start:stop] = found.reshape(groups, w.shape[1], stop - start, *out.shape[3:])
        return sizes.outputs(out.reshape(features, *maps, samples))

    return operation


def _patches(x: Any, kernel: Sequence[int], maps: Sequence[int], sizes: _Convolution) -> Any:
    """A view `[C, *kernel, *maps, N]` of padded images."""
    channel, *inner, sample = x.strides
    taps = [s * d for s, d in zip(inner, sizes.dilation, strict=True)]
    moves = [s * d for s, d in zip(inner, sizes.step, strict=True)]
    reach = zip(kernel, maps, sizes.step, sizes.dilation, x.shape[1:-1], strict=True)
    if any(m and (m - 1) * s + (k - 1) * d >= n for k, m, s, d, n in reach):
        raise ValueError("a convolution reads outside of its images.")
    shape = (len(x), *kernel, *maps, x.shape[-1])
    strides = (channel, *taps, *moves, sample)
    return np.lib.stride_tricks.as_strided(x, shape, strides, writeable=False)


def _sparse_convolve(params: Any, arrays: Arrays) -> Operation:
    """A convolution with few weights: one sparse matrix, from images to maps of features."""
    sizes, weight = _Convolution(params), _matrix(params["matrix"], arrays)
    kernel, image = _positive(params["size"]), _positive(params["image"])
    channels, groups, maps = _positive([params["channels"]])[0], sizes.groups, None
    maps = sizes.maps(kernel, image)
    if weight.shape[1] * groups != channels * math.prod(kernel) or weight.shape[0] % groups:
        raise ValueError("a sparse convolution does not have the channels of its images.")
    matrix = _image_matrix(weight, kernel, image, channels, maps, sizes)

    def operation(batch: int, x: Any) -> Any:
        x = sizes.images(x)
        if x.shape[:-1] != (channels, *image):
            raise ValueError("a sparse convolution was given images of another size.")
        found = matrix @ x.reshape(matrix.shape[1], x.shape[-1])
        return sizes.outputs(found.reshape(weight.shape[0], *maps, x.shape[-1]))

    return operation


def _image_matrix(
    weight: Any,
    kernel: Sequence[int],
    image: Sequence[int],
    channels: int,
    maps: Sequence[int],
    sizes: _Convolution,
) -> Any:
    """`[O * positions, C * pixels]` with one entry for each kept weight and position."""
    entries = weight.tocoo()
    feature, column = entries.coords
    channel, *taps = np.unravel_index(column, (weight.shape[1] // math.prod(kernel), *kernel))
    group = feature // (weight.shape[0] // sizes.groups)
    channel = group * (channels // sizes.groups) + channel
    positions = np.indices(maps).reshape(len(maps), -1)
    valid, pixel = np.ones((len(feature), math.prod(maps)), bool), channel[:, None]
    steps = zip(sizes.step, sizes.dilation, sizes.base, sizes.padding, strict=True)
    rows = zip(taps, positions, image, steps, strict=True)
    for tap, position, n, (step, dilation, base, (low, _)) in rows:
        place = position[None, :] * step + tap[:, None] * dilation - low
        valid &= (place >= 0) & (place <= (n - 1) * base) & (place % base == 0)
        pixel = pixel * n + place // base
    row = feature[:, None] * math.prod(maps) + np.arange(math.prod(maps))
    values = np.broadcast_to(entries.data[:, None], valid.shape)[valid]
    shape = (weight.shape[0] * math.prod(maps), channels * math.prod(image))
    if max(*shape, len(values)) >= 2**31:
        raise ValueError("a sparse convolution is too large.")
    return csr_array((values, (row[valid], pixel[valid])), shape=shape)


# Loops


def _scan(params: Any, arrays: Arrays) -> Operation:
    """A loop whose iterations hand on a state."""
    consts, carry, length = (int(params[name]) for name in ("consts", "carry", "length"))
    reverse, inputs = bool(params["reverse"]), int(params["inputs"])
    body = Program(params["body"], arrays, inputs)
    rows = len(body.outputs) - carry

    def operation(batch: int, *given: Any) -> Any:
        fixed, state, xs = (
            given[:consts],
            list(given[consts : consts + carry]),
            given[consts + carry :],
        )
        found: list[list[Any]] = [[] for _ in range(rows)]
        for n in reversed(range(length)) if reverse else range(length):
            outputs = body([*fixed, *state, *(x[n] for x in xs)], batch)
            state = outputs[:carry]
            for column, value in zip(found, outputs[carry:], strict=True):
                column.append(value)
        stacked = [np.stack(column[::-1] if reverse else column) for column in found]
        return [*state, *stacked] if carry + rows > 1 else [*state, *stacked][0]

    return operation


_PREPARED: dict[str, Callable[[Any, Arrays], Operation]] = {
    "argmax": _place_of(np.argmax), "argmin": _place_of(np.argmin), "broadcast": _broadcast,
    "concatenate": _concatenate, "convert": _convert, "convolve": _convolve,
    "cumlogsumexp": _running(np.logaddexp), "cummax": _running(np.maximum),
    "cummin": _running(np.minimum), "cumprod": _running(np.multiply), "cumsum": _running(np.add),
    "dot": _dot, "dynamic_slice": _dynamic_slice, "gather": _gather, "integer_pow": _integer_pow,
    "iota": _iota, "pad": _pad, "reduce_and": _reduction(np.logical_and),
    "reduce_max": _reduction(np.maximum), "reduce_min": _reduction(np.minimum),
    "reduce_or": _reduction(np.logical_or), "reduce_prod": _reduction(np.multiply),
    "reduce_sum": _reduction(np.add), "reduce_window_max": _window(np.maximum, -np.inf),
    "reduce_window_min": _window(np.minimum, np.inf), "reduce_window_sum": _window(np.add, 0.0),
    "reshape": _reshape, "rev": _reverse, "round": _round, "scan": _scan, "slice": _slice,
    "sort": _sort, "sparse_convolve": _sparse_convolve, "sparse_dot": _sparse_dot,
    "split": _split, "stack": _stack, "top_k": _top_k, "transpose": _transpose,
}  # fmt: skip

OPERATIONS = frozenset(_PLAIN) | frozenset(_PREPARED)


def main(words: Sequence[str]) -> int:
    """Run a network on the array in a file, and write the outputs to another."""
    if len(words) != 3:
        print("usage: python numpy_runner.py network.npz inputs.npy outputs.npy", file=sys.stderr)
        return 2
    network = load(words[0])
    x = np.load(words[1], allow_pickle=False)
    np.save(words[2], network(x), allow_pickle=False)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
