"""`Moments`: which arrays of an optimiser's state belong to the weights of which layer."""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np

from .._optimise import optimise
from .._parameters import parameters
from .._sparse import SparseModel
from .._types import GradientTransformation, PyTree
from ._in_steps import KeptEntries, on_entries, put_back

# An optimiser that consists of these operations treats every weight by itself.
_ELEMENTWISE = frozenset(
    "abs add and cbrt ceil clamp convert_element_type copy copy_p cos cosh div eq erf exp exp2 "
    "expm1 floor ge gt integer_pow is_finite le log log1p logistic lt max min mul ne neg "
    "nextafter not or pow real rem round rsqrt select_n sign sin sinh sqrt square stop_gradient "
    "sub tan tanh xor".split()
)
_CALLS = frozenset(("jit", "pjit", "closed_call", "custom_jvp_call", "custom_vjp_call", "remat2"))
_UNIQUE = 1_000_003  # an axis of no weight


@dataclasses.dataclass(frozen=True)
class Moments:
    """The places of an optimiser's state that have an array like the weight of a layer.

    Attributes:
        layers: for each leaf of the state the key string of the layer, or `None`.
        whole: the structure of the state of masked weights.
        kept: the structure of the state of kept weights.
    """

    layers: tuple[str | None, ...]
    whole: Any
    kept: Any

    def to_kept(self, opt_state: PyTree, entries: Mapping[str, KeptEntries]) -> PyTree:
        """The state of kept weights alone."""
        leaves = self.whole.flatten_up_to(opt_state)
        parts = zip(leaves, self.layers, strict=True)
        return self.kept.unflatten(
            leaf if name is None else entries[name].index.gather(leaf) for leaf, name in parts
        )

    def to_whole(
        self, opt_state: PyTree, entries: Mapping[str, KeptEntries], before: PyTree
    ) -> PyTree:
        """The state of all weights; those under the mask have what they had `before`."""
        leaves, old = self.kept.flatten_up_to(opt_state), self.whole.flatten_up_to(before)
        parts = zip(leaves, old, self.layers, strict=True)
        return self.whole.unflatten(
            leaf if name is None else put_back(leaf, entries[name], under)
            for leaf, under, name in parts
        )


def moments_of(
    optimizer: GradientTransformation,
    model: SparseModel,
    opt_state: PyTree,
    entries: dict[str, KeptEntries],
) -> Moments | None:
    """Where an optimiser keeps arrays for the weights of layers, if it treats each by itself.

    Its programs are traced: for all weights, for kept ones, and for as many of each layer as
    nothing else has. They must be the same program, with the same numbers in it, and made of
    elementwise operations. So no optimiser passes that looks at the axes or the size of a weight
    (Muon, Adafactor), adds weights up (a clipped norm), draws noise, or knows biases by their rank.

    **Returns:**

    `None` if that does not hold.
    """
    names = {f"{name}.weight.values": _UNIQUE + n for n, name in enumerate(entries)}
    layers = {_UNIQUE + n: name for n, name in enumerate(entries)}

    def unique(path: Any, leaf: Any) -> Any:
        axis = names.get(jtu.keystr(path))
        return leaf if axis is None else jax.ShapeDtypeStruct((axis,), leaf.dtype)

    room = jnp.ones((), bool)
    masked = eqx.filter_eval_shape(parameters, model)
    kept = eqx.filter_eval_shape(lambda m: parameters(on_entries(m, entries, room)), model)
    real, kept = kept, SparseModel(jtu.tree_map_with_path(unique, kept.model), kept.mask)
    try:
        kept_state = jax.eval_shape(optimizer.init, kept)
        of_all, of_kept = (masked, opt_state), (kept, kept_state)
        of_real = (real, jax.eval_shape(optimizer.init, real))
        first, *others = (_program(optimizer, *each) for each in (of_all, of_kept, of_real))
        same = all(other == first for other in others)
    except Exception:  # whatever an optimiser raises that does not know such parameters
        return None
    old, whole = jax.tree.flatten(opt_state)
    new, structure = jax.tree.flatten(kept_state)
    if not same or len(old) != len(new):
        return None
    found = tuple(layers.get(leaf.shape[0]) if leaf.ndim == 1 else None for leaf in new)
    shapes = [
        leaf.shape if name is None else entries[name].mask.shape
        for leaf, name in zip(new, found, strict=True)
    ]
    return Moments(found, whole, structure) if shapes == [leaf.shape for leaf in old] else None


def _program(optimizer: GradientTransformation, params: PyTree, opt_state: PyTree) -> list[Any]:
    """The operations of an update in their order, without shapes.

    **Raises:**

    `ValueError` if one of them is not elementwise.
    """
    value = jax.ShapeDtypeStruct((), jnp.float32)

    def update(params: PyTree, opt_state: PyTree, value: Any) -> Any:
        return optimise(optimizer, params, opt_state, params, value=value)

    traced = jax.make_jaxpr(update)(params, opt_state, value)
    lines: list[Any] = []
    fresh = itertools.count()
    ends = _read(traced, [next(fresh) for _ in traced.jaxpr.invars], lines, fresh)
    return [*lines, *ends]


def _read(
    closed: Any, operands: Sequence[Any], lines: list[Any], fresh: Iterator[int]
) -> list[Any]:
    """Write down the operations of a program, and return its results.

    Values are numbered in the order in which they are computed, not by the variables that hold
    them: calls with the same shapes share their variables, and others do not.
    """
    jaxpr = getattr(closed, "jaxpr", closed)
    constants = [_numbers(constant) for constant in getattr(closed, "consts", ())]
    numbers = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*constants, *operands), strict=True))

    def find(variable: Any) -> Any:
        value = getattr(variable, "val", None)  # of a literal
        return numbers[variable] if value is None else _numbers(value)

    for eqn in jaxpr.eqns:
        name, given = eqn.primitive.name, [find(v) for v in eqn.invars]
        inner = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
        if name in _CALLS and inner is not None:
            results = _read(inner, given, lines, fresh)
        else:
            lines.append((name, given, _settings(eqn)))
            results = [next(fresh) for _ in eqn.outvars]
        numbers.update(zip(eqn.outvars, results, strict=True))
    return [find(v) for v in jaxpr.outvars]


def _settings(eqn: Any) -> Any:
    """The parameters of an operation that have no shape in them."""
    name = eqn.primitive.name
    scalars = all(v.aval.ndim == 0 for v in eqn.invars)
    if name == "broadcast_in_dim" and scalars:
        return str(eqn.outvars[0].aval.dtype)
    if name in _ELEMENTWISE or (scalars and all(v.aval.ndim == 0 for v in eqn.outvars)):
        return {key: str(value) for key, value in eqn.params.items() if key != "sharding"}
    raise ValueError(f"{name} is not elementwise")


def _numbers(constant: Any) -> Any:
    if np.ndim(constant):
        raise ValueError("an array is no part of an elementwise program")
    return ("constant", str(np.asarray(constant).dtype), np.asarray(constant).item())
