"""Linear uses of a weight: its activations, its cotangents, and the place of each entry.

A linear use of a weight W computes `y[g,i,s] = sum_j W[g,i,j] a[g,j,s]`: groups g, output features
i, input features j, positions s. A dense layer has one group and one position; `vmap` along a
sequence gives it many positions. The input features of a convolution are its patches, and those of
an embedding are a one-hot vector.

A weight that stores some entries of W alone is a linear use, too (`AbstractEntryUse`); in place of
the order of all entries it says where those are that it has.
"""

import abc
import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from .._primitives import patches
from ..kernels import target_device


class AbstractUse(eqx.Module):
    """One equation of a jaxpr that is linear in a weight, whatever of the weight is stored.

    Attributes:
        kind: the name that `explain` prints.
        operands: indices of the equation's operands that the layer's input depends on.
        groups: G.
        features: I, output features of a group.
        inputs: J, input features of a group.
        positions: S.
    """

    kind: eqx.AbstractClassVar[str]
    operands: eqx.AbstractVar[tuple[int, ...]]
    groups: eqx.AbstractVar[int]
    features: eqx.AbstractVar[int]
    inputs: eqx.AbstractVar[int]
    positions: eqx.AbstractVar[int]

    @abc.abstractmethod
    def activations(self, *operands: Array) -> Array:
        """`[G, J, S]` from the values of `operands`, in their order."""

    @abc.abstractmethod
    def cotangents(self, d: Any) -> Any:
        """`[G, I, S]` from an array of the output's shape; jax or NumPy, no arithmetic."""


class AbstractLinearUse(AbstractUse):
    """An `AbstractUse` of a whole weight, in the form of this module."""

    @abc.abstractmethod
    def weight(self, w: Any) -> Any:
        """`[G, I, J]` from an array of the weight operand's shape; jax or NumPy, no arithmetic."""


class Places(eqx.Module):
    """Where the stored entries of a weight `[I, J]` are, in chunks of one row each.

    Attributes:
        rows: the row of each chunk, ascending.
        columns: the columns of its entries; any column where one is not in use.
        entries: their numbers in the stored array; its length where one is not in use.
    """

    rows: Int[Array, " chunks"]
    columns: Int[Array, "chunks width"]
    entries: Int[Array, "chunks width"]


class AbstractEntryUse(AbstractUse):
    """A linear use of one group whose weight operand `[E]` has some entries of W alone.

    Attributes:
        kind: the name that `explain` prints.
        operands: indices of the equation's operands that the layer's input depends on.
        groups: 1.
        features: I.
        inputs: J.
        positions: S.
        index: indices of the operands that say where the entries are; they must be constants of
            the program.
    """

    index: eqx.AbstractVar[tuple[int, ...]]

    @abc.abstractmethod
    def places(self, *index: Array) -> Places:
        """Where the entries are, from the values of the operands `index`."""

    @abc.abstractmethod
    def product(
        self, index: tuple[Array, ...], values: Array, x: Array, *, transposed: bool
    ) -> Array:
        """The matrix with these values `[E]` times `x[J, B]`, or its transpose times `x[I, B]`."""


Rule: TypeAlias = Callable[[Any, int], AbstractUse | None]
"""`(equation, index of the weight operand) -> linear use`, or `None` if the equation is not linear
in that operand or does not have this form."""


@dataclasses.dataclass(frozen=True, eq=False)
class RegisteredRule:
    """A rule that can be part of a jit key: hashable, and equal only to itself."""

    primitive: str
    rule: Rule


def register_linear_use(primitive: str, rule: Rule) -> None:
    """Register how a primitive uses a weight, so that its kernel comes from small factors.

    Without a rule, a parameter that the primitive uses takes its explicit Jacobian, which is exact
    and slower. The rule is used from the next call on; functions that were compiled before are
    compiled again. It replaces an earlier rule for the same primitive.

    **Arguments:**

    - `primitive`: the primitive's name, such as `"dot_general"`.
    - `rule`: `(equation, operand number of the weight) -> AbstractLinearUse | None`.

    **Raises:**

    `ValueError` for a name that is not text, or a rule that cannot be called.
    """
    if not isinstance(primitive, str):
        raise ValueError(
            "register_linear_use: primitive must be a name such as 'dot_general', got "
            f"{type(primitive).__name__}; of a primitive `p` it is `p.name`."
        )
    if not callable(rule):
        raise ValueError(
            "register_linear_use: rule must be a function (equation, operand number of the "
            f"weight) -> AbstractLinearUse | None, got {type(rule).__name__}."
        )
    others = tuple(known for known in _RULES.get_global() if known.primitive != primitive)
    _RULES.set_global((*others, RegisteredRule(primitive, rule)))


def rules_in_use() -> tuple[RegisteredRule, ...]:
    """The registered rules, for a `KernelSpec`."""
    return _RULES.value


def linear_use(eqn: Any, weight: int, rules: Iterable[RegisteredRule]) -> AbstractUse | None:
    """The linear use of operand `weight`, or `None` if there is no rule or it is not real.

    An equation with an empty array gives `None`, because reshapes cannot infer axes from size 0;
    the layer's bias then takes its explicit Jacobian.
    """
    if _is_empty(eqn):
        return None
    name = eqn.primitive.name
    rule = next((known.rule for known in rules if known.primitive == name), None)
    dtypes = (eqn.invars[weight].aval.dtype, eqn.outvars[0].aval.dtype)
    if rule is None or not all(jnp.issubdtype(dtype, jnp.floating) for dtype in dtypes):
        return None
    return rule(eqn, weight)


def _is_empty(eqn: Any) -> bool:
    return not all(math.prod(v.aval.shape) for v in (*eqn.invars, *eqn.outvars))


class Dense(AbstractLinearUse):
    """A `dot_general`; its batch axes are groups, its free axes positions and features."""

    kind: ClassVar[str] = "dense"
    operands: tuple[int, ...]
    groups: int
    features: int
    inputs: int
    positions: int
    weight_axes: tuple[int, ...]
    operand_axes: tuple[int, ...]

    def weight(self, w: Any) -> Any:
        """See `AbstractLinearUse`."""
        return w.transpose(*self.weight_axes).reshape(self.groups, self.features, self.inputs)

    def activations(self, *operands: Array) -> Array:
        """See `AbstractLinearUse`."""
        (a,) = operands
        a = a.transpose(*self.operand_axes)
        return a.reshape(self.groups, self.inputs, self.positions)

    def cotangents(self, d: Any) -> Any:
        """See `AbstractLinearUse`; the left operand's free axes come before the right's."""
        if self.operands == (1,):
            return d.reshape(self.groups, self.features, self.positions)
        return d.reshape(self.groups, self.positions, self.features).swapaxes(1, 2)


def _dense(eqn: Any, weight: int) -> Dense | None:
    contract, batch = eqn.params["dimension_numbers"]
    shapes = [v.aval.shape for v in eqn.invars]
    other = 1 - weight
    free = [
        [ax for ax in range(len(shapes[n])) if ax not in (*contract[n], *batch[n])] for n in (0, 1)
    ]
    size = lambda n, axes: math.prod(shapes[n][ax] for ax in axes)
    return Dense(
        operands=(other,),
        groups=size(weight, batch[weight]),
        features=size(weight, free[weight]),
        inputs=size(weight, contract[weight]),
        positions=size(other, free[other]),
        weight_axes=(*batch[weight], *free[weight], *contract[weight]),
        operand_axes=(*batch[other], *contract[other], *free[other]),
    )


class Convolution(AbstractLinearUse):
    """A `conv_general_dilated`; its patches are the input features."""

    kind: ClassVar[str] = "convolution"
    operands: tuple[int, ...]
    groups: int
    features: int
    inputs: int
    positions: int
    eqn: Any = eqx.field(static=True)
    platform: str = eqx.field(static=True)

    def weight(self, w: Any) -> Any:
        """See `AbstractLinearUse`."""
        w = w.transpose(self._numbers.rhs_spec)  # (O, C / G, *spatial)
        return w.reshape(self.groups, self.features, self.inputs)

    def activations(self, *operands: Array) -> Array:
        """See `AbstractLinearUse`."""
        seen = patches(self.eqn, operands[0], self.platform)  # [B, *out, taps, C]
        taps, channels = seen.shape[-2:]
        seen = seen.reshape(self.positions, taps, self.groups, channels // self.groups)
        return seen.transpose(2, 3, 1, 0).reshape(self.groups, self.inputs, self.positions)

    def cotangents(self, d: Any) -> Any:
        """See `AbstractLinearUse`."""
        d = d.transpose(self._numbers.out_spec)  # (B, O, *out)
        d = d.reshape(d.shape[0], self.groups, self.features, -1)
        return d.transpose(1, 2, 0, 3).reshape(self.groups, self.features, self.positions)

    @property
    def _numbers(self) -> Any:
        return self.eqn.params["dimension_numbers"]


def _convolution(eqn: Any, weight: int) -> Convolution | None:
    p = eqn.params
    if weight != 1 or p["batch_group_count"] != 1:
        return None
    shape = eqn.invars[1].aval.shape
    features, *inputs = (shape[axis] for axis in p["dimension_numbers"].rhs_spec)
    groups = p["feature_group_count"]
    return Convolution(
        operands=(0,),
        groups=groups,
        features=features // groups,
        inputs=math.prod(inputs),
        positions=math.prod(eqn.outvars[0].aval.shape) // features,
        eqn=eqn,
        platform=target_device().platform,
    )


class LookUp(AbstractLinearUse):
    """A look-up of rows in a table: a dense layer with one-hot input.

    Attributes:
        table: sizes of the axes that are looked up; one operand has the places along each.
        column: which column of an operand has the places.
        clips: whether a place outside of the table means the nearest row, instead of none.
        offsets: axes of the output that hold a row.
        dtype: the dtype of the output.
    """

    kind: ClassVar[str] = "embedding"
    operands: tuple[int, ...]
    groups: int
    features: int
    inputs: int
    positions: int
    table: tuple[int, ...]
    column: int
    clips: bool
    offsets: tuple[int, ...]
    dtype: Any = eqx.field(static=True)

    def weight(self, w: Any) -> Any:
        """See `AbstractLinearUse`."""
        return w.reshape(1, self.inputs, self.features).swapaxes(1, 2)

    def activations(self, *operands: Array) -> Array:
        """See `AbstractLinearUse`."""
        row = 0  # number of the row in the flattened table
        for operand, size in zip(operands, self.table, strict=True):
            places = jnp.reshape(operand, (self.positions, -1))[:, self.column]
            places = _row_numbers(places, size)
            row = row * size + (jnp.clip(places, 0, size - 1) if self.clips else places)
        return jax.nn.one_hot(row, self.inputs, dtype=self.dtype).T[None]

    def cotangents(self, d: Any) -> Any:
        """See `AbstractLinearUse`."""
        order = [axis for axis in range(d.ndim) if axis not in self.offsets]
        return d.transpose(*self.offsets, *order).reshape(1, self.features, self.positions)


def _look_up(eqn: Any, weight: int) -> LookUp | None:
    p, (table, *places) = eqn.params, [v.aval.shape for v in eqn.invars]
    if weight != 0:
        return None
    sizes, out = tuple(p["slice_sizes"]), eqn.outvars[0].aval
    # The leading axes up to the last one that is not taken whole are looked up.
    count = max([1, *(axis + 1 for axis in range(len(table)) if sizes[axis] != table[axis])])
    if sizes[:count] != (1,) * count:
        return None
    column, clips, offsets, positions = 0, True, tuple(range(len(out.shape))), 1
    if eqn.primitive.name == "gather":
        numbers, offsets = p["dimension_numbers"], tuple(p["dimension_numbers"].offset_dims)
        clips = p["mode"] == jax.lax.GatherScatterMode.CLIP
        starts = tuple(numbers.start_index_map)
        # A slice has full length along all other axes, so clipping sets their starts to 0.
        if starts != (0,) and not (clips and 0 in starts) or numbers.operand_batching_dims:
            return None
        if count > 1:  # several columns of one operand: no rule yet
            return None
        column, positions = starts.index(0), math.prod(places[0][:-1])
    return LookUp(
        operands=tuple(range(1, count + 1)),
        groups=1,
        features=math.prod(table[count:]),
        inputs=math.prod(table[:count]),
        positions=positions,
        table=tuple(table[:count]),
        column=column,
        clips=clips,
        offsets=offsets,
        dtype=out.dtype,
    )


def _row_numbers(places: Array, rows: int) -> Array:
    """Indices of any integer dtype as int32; those out of range stay outside of `[0, rows)`."""
    # The dtype of the indices may be too small for the number of rows (uint8 and 300 rows) or
    # larger than int32, so clip in it before the cast.
    limits = jnp.iinfo(places.dtype)
    low, high = max(limits.min, -1), min(limits.max, rows)  # what both dtypes hold
    return jnp.clip(places, low, high).astype(jnp.int32)


# The registered rules. They decide how a program is compiled, so they must be part of the key of
# every compiled function. A JAX user context is: a rule that is registered late counts at once.
_RULES = jax.make_user_context(
    default_value=(
        RegisteredRule("dot_general", _dense),
        RegisteredRule("conv_general_dilated", _convolution),
        RegisteredRule("gather", _look_up),
        RegisteredRule("dynamic_slice", _look_up),
    )
)
