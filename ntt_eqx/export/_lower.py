"""A model as a program of plain arrays: the steps that `numpy_runner` carries out.

The model is traced on a batch whose size is a symbol, so that JAX's own rules say what each
primitive does with the axis of samples. Steps that no input reaches become constants; products and
convolutions with a constant of few entries become sparse.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from .._program import Const, Program, Step, bind, is_call, read, unfold, without_dead_steps
from .._types import PyTree
from .numpy_runner import DTYPES, FORMAT, OPERATIONS

_Lowering = tuple[str, dict[str, Any]]

_FEWEST = 256  # entries of a matrix from which that is worth a thought
_LARGEST = 2**24  # entries of a convolution's matrix of all positions


@dataclasses.dataclass
class _Writer:
    """What becomes of a program: its constants by name, and how sizes are written."""

    caller: str
    batch: Any  # the symbol
    sparse_below: float
    arrays: dict[str, np.ndarray]

    def refuse(self, step: Step, why: str = "") -> NotImplementedError:
        """The error for a step that the runner does not know."""
        said = f" with {why}" if why else ""
        return NotImplementedError(
            f"{self.caller}: no NumPy form of the operation {step.name!r}{said}."
        )

    def sizes(self, shape: Sequence[Any]) -> list[int]:
        """Sizes as numbers; below zero, multiples of the number of samples."""
        return [self._size(size) for size in shape]

    def _size(self, size: Any) -> int:
        if not jax.export.is_symbolic_dim(size):
            return int(size)
        many = size // self.batch
        if jax.export.is_symbolic_dim(many) or size != many * self.batch:
            raise NotImplementedError(
                f"{self.caller}: an array has the length {size}, which is no multiple of the batch."
            )
        return -int(many)

    def constant(self, value: Any) -> Any:
        """How an operand refers to a constant: numbers stand in the program itself."""
        array = np.asarray(value, value.dtype)  # a literal of JAX is a Python number with a dtype
        if str(array.dtype) not in DTYPES:
            raise NotImplementedError(f"{self.caller}: no NumPy form of the dtype {array.dtype}.")
        if array.ndim == 0:
            return [array.item(), str(array.dtype)]
        for name, known in self.arrays.items():
            if known.dtype == array.dtype and known.shape == array.shape:
                if known.tobytes() == array.tobytes():
                    return name
        name = f"array.{len(self.arrays)}"
        self.arrays[name] = np.ascontiguousarray(array)
        return name

    def matrix(self, dense: np.ndarray) -> dict[str, Any]:
        """A sparse matrix among the arrays, by rows, with indices of as few bytes as fit."""
        name, kept = f"matrix.{len(self.arrays)}", dense != 0
        columns = np.nonzero(kept)[1]
        small = np.uint16 if dense.shape[1] <= 2**16 else np.int32
        self.arrays[f"{name}.values"] = dense[kept]
        self.arrays[f"{name}.columns"] = columns.astype(small)
        self.arrays[f"{name}.ends"] = np.cumsum(kept.sum(axis=1)).astype(np.int32)
        return {"name": name, "shape": list(dense.shape)}

    def is_sparse(self, value: np.ndarray) -> bool:
        """Whether a constant operand of a product is to be stored by its entries alone."""
        floats = value.dtype in (np.float32, np.float64)
        if not floats or value.size < _FEWEST or self.sparse_below == 0:
            return False
        return bool(np.count_nonzero(value) <= self.sparse_below * value.size)


def lowered(
    caller: str, model: PyTree, x: Array, sparse_below: float
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The program of a plain model for batches like `x`, and its arrays.

    **Raises:**

    `NotImplementedError` with the name of an operation or dtype that has no form in NumPy.
    """
    (batch,) = jax.export.symbolic_shape("batch")
    spec = jax.ShapeDtypeStruct((batch, *x.shape[1:]), x.dtype)
    try:
        closed = jax.make_jaxpr(jax.vmap(model))(spec)
    except Exception as error:  # rules of batching that need a number
        reason = str(error).strip().split("\n")[0][:300]
        raise NotImplementedError(
            f"{caller}: {type(model).__name__} cannot be traced for any number of samples "
            f"({type(error).__name__}: {reason})."
        ) from error
    writer = _Writer(caller, batch, sparse_below, {})
    program = _folded(without_dead_steps(unfold(closed, _opens)))
    described = {
        "format": FORMAT,
        "shape": list(x.shape[1:]),
        "dtype": str(np.dtype(x.dtype)),
        "program": _written(writer, program),
    }
    return described, writer.arrays


def _folded(program: Program) -> Program:
    """The program without steps whose inputs are all known."""
    known: dict[int, Const] = {}
    look: Callable[[Any], Any] = lambda slot: (
        slot if isinstance(slot, Const) else known.get(slot, slot)
    )
    steps = []
    for step in program.steps:
        inputs = tuple(map(look, step.inputs))
        symbolic = any(not isinstance(n, int) for aval in step.avals for n in aval.shape)
        if symbolic or step.eqn.effects or not all(isinstance(slot, Const) for slot in inputs):
            steps.append(dataclasses.replace(step, inputs=inputs))
            continue
        values = bind(step.eqn, [jnp.asarray(read({}, slot)) for slot in inputs])
        known.update(zip(step.outputs, map(Const, values), strict=True))
    outputs = tuple(map(look, program.outputs))
    return without_dead_steps(Program(tuple(steps), program.num_inputs, outputs))


def _written(writer: _Writer, program: Program) -> dict[str, Any]:
    steps = []
    for step in program.steps:
        for aval in step.avals:
            if str(np.dtype(aval.dtype)) not in DTYPES:
                raise writer.refuse(step, f"the dtype {aval.dtype}")
        (name, params), operands = _step(writer, step)
        written = [_operand(writer, slot) for slot in operands]
        out = list(step.outputs)
        more = {"params": params} if params else {}
        steps.append({"op": name, "in": written, "out": out, **more})
    return {"steps": steps, "outputs": [_operand(writer, slot) for slot in program.outputs]}


def _operand(writer: _Writer, slot: Any) -> Any:
    return writer.constant(slot.value) if isinstance(slot, Const) else slot


def _step(writer: _Writer, step: Step) -> tuple[_Lowering, Sequence[Any]]:
    """The operation of a step, and the operands that it reads."""
    if step.name == "dot_general":
        return _dot(writer, step)
    if step.name == "conv_general_dilated":
        return _convolution(writer, step)
    if step.name in ("broadcast_in_dim", "iota", "reshape") and len(step.inputs) > 1:
        raise writer.refuse(step, "sizes that depend on values")
    if step.name in _LOWERINGS:
        return _LOWERINGS[step.name](writer, step), step.inputs
    if step.name in _AXES:
        return (step.name, {"axes": list(map(int, step.eqn.params["axes"]))}), step.inputs
    if step.name in _RUNNING:
        given = step.eqn.params
        return (step.name, {"axis": given["axis"], "reverse": given["reverse"]}), step.inputs
    if step.name in OPERATIONS and step.name not in _NEED_MORE:
        return (step.name, {}), step.inputs
    raise writer.refuse(step)


_AXES = ("reduce_and", "reduce_max", "reduce_min", "reduce_or", "reduce_prod", "reduce_sum")
_RUNNING = ("cumlogsumexp", "cummax", "cummin", "cumprod", "cumsum")
_NEED_MORE = ("convert", "convolve", "dot", "sparse_convolve", "sparse_dot", "broadcast")


def _dot(writer: _Writer, step: Step) -> tuple[_Lowering, Sequence[Any]]:
    (one, two), (first, second) = step.eqn.params["dimension_numbers"]
    axes = [list(map(int, a)) for a in (one, two, first, second)]
    dtype = step.avals[0].dtype
    if any(v.aval.dtype != dtype for v in step.eqn.invars):
        raise writer.refuse(step, "operands of several dtypes")
    for n, contract in ((0, axes[0]), (1, axes[1])):
        slot = step.inputs[n]
        if first or not isinstance(slot, Const) or not writer.is_sparse(np.asarray(slot.value)):
            continue
        value = np.asarray(slot.value)
        free = [axis for axis in range(value.ndim) if axis not in contract]
        sizes = [value.shape[axis] for axis in free]
        inner = int(np.prod([value.shape[axis] for axis in contract], dtype=int))
        matrix = writer.matrix(np.transpose(value, [*free, *contract]).reshape(-1, inner))
        params = {"matrix": matrix, "contract": axes[1 - n], "free": sizes, "last": n == 1}
        return ("sparse_dot", params), [step.inputs[1 - n]]
    names = ("contract_one", "contract_two", "batch_one", "batch_two")
    return ("dot", dict(zip(names, axes, strict=True))), step.inputs


def _convolution(writer: _Writer, step: Step) -> tuple[_Lowering, Sequence[Any]]:
    given = step.eqn.params
    if given["batch_group_count"] != 1:
        raise writer.refuse(step, "groups of samples")
    if any(v.aval.dtype != step.avals[0].dtype for v in step.eqn.invars):
        raise writer.refuse(step, "operands of several dtypes")
    spec, groups = given["dimension_numbers"], int(given["feature_group_count"])
    params: dict[str, Any] = {
        "step": writer.sizes(given["window_strides"]),
        "dilation": writer.sizes(given["rhs_dilation"]),
        "base": writer.sizes(given["lhs_dilation"]),
        "padding": [writer.sizes(edges) for edges in given["padding"]],
        "groups": groups,
        "into": writer.sizes(spec.lhs_spec),
        "out": writer.sizes(spec.out_spec),
    }
    x, slot = step.inputs
    shape = [step.eqn.invars[0].aval.shape[axis] for axis in spec.lhs_spec]
    _, channels, *image = writer.sizes(shape)
    if isinstance(slot, Const) and min(channels, *image, 1) > 0:
        weight = np.transpose(np.asarray(slot.value), spec.rhs_spec)
        maps = [step.avals[0].shape[axis] for axis in spec.out_spec[2:]]
        entries = np.count_nonzero(weight) * int(np.prod(maps, dtype=int))
        if writer.is_sparse(weight) and entries <= _LARGEST:
            more = {"size": list(weight.shape[2:]), "image": image, "channels": channels}
            matrix = writer.matrix(weight.reshape(len(weight), -1))
            return ("sparse_convolve", {**params, **more, "matrix": matrix}), [x]
    return ("convolve", {**params, "kernel": writer.sizes(spec.rhs_spec)}), step.inputs


def _reshaped(writer: _Writer, step: Step) -> _Lowering:
    if step.eqn.params.get("dimensions") is not None:
        raise writer.refuse(step, "an order of axes")
    return "reshape", {"shape": writer.sizes(step.avals[0].shape)}


def _resized(writer: _Writer, step: Step) -> _Lowering:
    return "reshape", {"shape": writer.sizes(step.avals[0].shape)}


def _broadcast(writer: _Writer, step: Step) -> _Lowering:
    axes = writer.sizes(step.eqn.params["broadcast_dimensions"])
    return "broadcast", {"shape": writer.sizes(step.avals[0].shape), "axes": axes}


def _slice(writer: _Writer, step: Step) -> _Lowering:
    given = step.eqn.params
    start, stop = writer.sizes(given["start_indices"]), writer.sizes(given["limit_indices"])
    return "slice", {
        "start": start,
        "stop": stop,
        "step": list(given["strides"] or [1] * len(start)),
    }


def _gather(writer: _Writer, step: Step) -> _Lowering:
    given = step.eqn.params
    numbers, fill = given["dimension_numbers"], None
    if given["mode"] == jax.lax.GatherScatterMode.FILL_OR_DROP:
        fill = given["fill_value"]
        if fill is None:
            dtype = np.dtype(step.avals[0].dtype)
            least = {"i": lambda: np.iinfo(dtype).min, "u": lambda: np.iinfo(dtype).max}
            fill = np.nan if dtype.kind == "f" else least.get(dtype.kind, lambda: True)()
        fill = np.asarray(fill).item()
    return "gather", {
        "offset": writer.sizes(numbers.offset_dims),
        "collapsed": writer.sizes(numbers.collapsed_slice_dims),
        "mapped": writer.sizes(numbers.start_index_map),
        "batching": writer.sizes(numbers.operand_batching_dims),
        "batched": writer.sizes(numbers.start_indices_batching_dims),
        "sizes": writer.sizes(given["slice_sizes"]),
        "fill": fill,
    }


def _window(writer: _Writer, step: Step) -> _Lowering:
    given = step.eqn.params
    if set(given["base_dilation"]) - {1}:
        raise writer.refuse(step, "entries between those of its input")
    if not np.issubdtype(step.avals[0].dtype, np.floating):
        raise writer.refuse(step, f"the dtype {step.avals[0].dtype}")
    return step.name, {
        "size": writer.sizes(given["window_dimensions"]),
        "step": writer.sizes(given["window_strides"]),
        "dilation": writer.sizes(given["window_dilation"]),
        "padding": [writer.sizes(edges) for edges in given["padding"]],
    }


def _place_of(writer: _Writer, step: Step) -> _Lowering:
    (axis,) = step.eqn.params["axes"]
    return step.name, {"axis": int(axis), "dtype": str(np.dtype(step.eqn.params["index_dtype"]))}


def _sort(writer: _Writer, step: Step) -> _Lowering:
    if step.eqn.params["num_keys"] != 1:
        raise writer.refuse(step, "several keys")
    return "sort", {"axis": int(step.eqn.params["dimension"])}


def _top_k(writer: _Writer, step: Step) -> _Lowering:
    given, ndim = step.eqn.params, len(step.avals[0].shape)
    if given.get("axis", ndim - 1) not in (-1, ndim - 1) or step.avals[1].dtype != np.int32:
        raise writer.refuse(step, "another axis or dtype of places")
    return "top_k", {"k": int(given["k"])}


def _scan(writer: _Writer, step: Step) -> _Lowering:
    loop = step.loop
    if loop is None:
        raise writer.refuse(step)
    return "scan", {
        "body": _written(writer, without_dead_steps(loop.body)),
        "inputs": loop.body.num_inputs,
        "consts": loop.consts,
        "carry": loop.carry,
        "length": int(loop.length),
        "reverse": bool(step.eqn.params["reverse"]),
    }


_LOWERINGS: dict[str, Callable[[_Writer, Step], _Lowering]] = {
    "argmax": _place_of,
    "argmin": _place_of,
    "broadcast_in_dim": _broadcast,
    "concatenate": lambda writer, step: (step.name, {"axis": int(step.eqn.params["dimension"])}),
    "convert_element_type": lambda writer, step: (
        "convert",
        {"dtype": str(np.dtype(step.eqn.params["new_dtype"]))},
    ),
    "dynamic_slice": lambda writer, step: (
        step.name,
        {"sizes": writer.sizes(step.eqn.params["slice_sizes"])},
    ),
    "expand_dims": _resized,
    "gather": _gather,
    "integer_pow": lambda writer, step: (step.name, {"y": int(step.eqn.params["y"])}),
    "iota": lambda writer, step: (
        step.name,
        {
            "shape": writer.sizes(step.avals[0].shape),
            "axis": int(step.eqn.params["dimension"]),
            "dtype": str(np.dtype(step.avals[0].dtype)),
        },
    ),
    "pad": lambda writer, step: (
        step.name,
        {"padding": [writer.sizes(edges) for edges in step.eqn.params["padding_config"]]},
    ),
    "reduce_window_max": _window,
    "reduce_window_min": _window,
    "reduce_window_sum": _window,
    "reshape": _reshaped,
    "rev": lambda writer, step: (step.name, {"axes": writer.sizes(step.eqn.params["dimensions"])}),
    "round": lambda writer, step: (
        step.name,
        {"to_even": step.eqn.params["rounding_method"] == jax.lax.RoundingMethod.TO_NEAREST_EVEN},
    ),
    "scan": _scan,
    "slice": _slice,
    "sort": _sort,
    "stack": lambda writer, step: (step.name, {"axis": int(step.eqn.params["axis"])}),
    "split": lambda writer, step: (
        step.name,
        {"axis": int(step.eqn.params["axis"]), "sizes": writer.sizes(step.eqn.params["sizes"])},
    ),
    "squeeze": _resized,
    "top_k": _top_k,
    "transpose": lambda writer, step: (
        step.name,
        {"axes": writer.sizes(step.eqn.params["permutation"])},
    ),
}


def _opens(eqn: Any) -> bool:
    """A function with a derivative of its own is opened, too: only its values are asked for."""
    return is_call(eqn) or eqn.primitive.name in ("custom_jvp_call", "custom_vjp_call")
