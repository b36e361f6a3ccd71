"""The device mesh, and how the pairs of samples of a kernel are tiled over it."""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from ._types import PyTree

Out = TypeVar("Out")


@dataclasses.dataclass(frozen=True)
class Layout:
    """A mesh, and the axes over which the two batches of a kernel are sharded.

    Attributes:
        mesh: the devices; axes that are neither in `rows` nor in `columns` are left to XLA.
        rows: axes over which the first batch of a kernel is spread.
        columns: axes over which the second one is.
        exchange: whether devices send each other factors, or each computes all of its tile's;
            `None` takes the cheaper.
    """

    mesh: Mesh
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    exchange: bool | None = None

    @property
    def here(self) -> Any:
        """The mesh for arrays that are created now.

        This is the current mesh (`jax.set_mesh`), whose axes may be Explicit; without one, a mesh
        of Auto axes, under which XLA places everything outside `shard_map`.
        """
        current = jax.sharding.get_abstract_mesh()
        if set(self.axes) <= set(getattr(current, "axis_names", ())):
            return current
        auto = (AxisType.Auto,) * self.mesh.devices.ndim
        return Mesh(self.mesh.devices, self.mesh.axis_names, axis_types=auto)

    @property
    def axes(self) -> tuple[str, ...]:
        """All axes that samples are spread over."""
        return self.rows + self.columns

    @property
    def tiles(self) -> tuple[int, int]:
        """Tiles along the rows and along the columns of a kernel."""
        count = lambda axes: math.prod(self.mesh.shape[axis] for axis in axes)
        return count(self.rows), count(self.columns)

    @property
    def devices(self) -> int:
        """Devices that samples are spread over."""
        return math.prod(self.tiles)

    def place(self, x: Any, *axes: tuple[str, ...]) -> Array:
        """Shard the axes of an array over these axes of the mesh; works inside `jit`."""
        spec = PartitionSpec(*axes)
        if isinstance(x, Tracer):
            return jax.lax.with_sharding_constraint(x, NamedSharding(self.here, spec))
        return jax.device_put(x, self.sharding(spec))

    def sharding(self, spec: PartitionSpec) -> NamedSharding:
        """The sharding of an array with this spec."""
        here = self.here
        mesh = Mesh(self.mesh.devices, here.axis_names, axis_types=here.axis_types)
        return NamedSharding(mesh, spec)

    def spec_of_samples(self, shape: Sequence[int]) -> PartitionSpec:
        """The spec of an array `[samples, ...]`: sharded if the devices divide its length."""
        divides = bool(shape) and shape[0] % self.devices == 0
        return PartitionSpec(self.axes) if divides else PartitionSpec()

    @property
    def processes(self) -> int:
        """Processes that the devices belong to."""
        return len({device.process_index for device in self.mesh.devices.flat})


# A user context is part of the key of every compiled function, so a function that was compiled
# outside of a `distribute` block is compiled again inside it.
_LAYOUT = jax.make_user_context(default_value=None)


@contextlib.contextmanager
def distribute(
    mesh: Mesh | None = None,
    *,
    rows: Sequence[str] | None = None,
    columns: Sequence[str] | None = None,
    exchange: bool | None = None,
) -> Iterator[Mesh]:
    """Share the work inside the block among all devices of all processes.

        with ntt.distribute():
            state = ntt.ntt_init(teacher, config, optax.adam(5e-4))
            state, history = ntt.transfer(state, batches)
            theta = ntt.ntk(model, x1, x2)

    The pairs of samples of a kernel are tiled over the mesh, `x1` along its rows and `x2` along its
    columns, whatever their numbers; a kernel stays sharded like that. Batches of `train`,
    `evaluate` and the scores are spread over all devices. Weights lie on every device, and their
    gradients are summed once a step; weights that come with a `NamedSharding` of the mesh keep it.
    With one device nothing changes, not even a bit. Results do not depend on the number of devices
    beyond rounding.

    Where there are several processes (`jax.distributed.initialize` was called in each), all of them
    run the same program: what is handed over must be the same in each, or be a global array, such
    as those of `ntt.data.batches`, of which each process then loads its rows alone.

    **Arguments:**

    - `mesh`: the devices to use, all by default; its axes may have any type.
    - `rows`, `columns`: names of the mesh axes over which `x1` and `x2` are sharded; by default the
      first and the second axis. XLA manages all other axes, for weights that are sharded over them.
    - `exchange`: `True` lets devices send each other factors, `False` lets each compute all factors
      of its tile; `None` takes what is expected to cost less.

    **Returns:**

    A context manager that gives the mesh.

    **Raises:**

    `ValueError` if `mesh` is not a mesh, or if an axis is not in it or is named twice.
    """
    layout = _layout(mesh, rows, columns, exchange)
    with _LAYOUT(layout if layout.mesh.size > 1 else None):
        yield layout.mesh


def layout_in_use() -> Layout | None:
    """The layout of the innermost `distribute`; `None` for a single device.

    `None` as well inside a `jax.shard_map` over its axes, where each device already has its share.
    """
    layout: Layout | None = _LAYOUT.value
    manual = getattr(jax.sharding.get_abstract_mesh(), "manual_axes", ())
    return None if layout is None or set(layout.axes) & set(manual) else layout


def replicate(tree: PyTree) -> PyTree:
    """Copy the arrays of a tree to every device of the current layout, if there is one.

    Tracers, and arrays that are already on these devices, sharded or not, stay as they are.
    """
    layout = layout_in_use()
    if layout is None:
        return tree
    return jax.tree.map(lambda leaf: _placed(layout, leaf), tree)


def spread(caller: str, batch: PyTree, *, whole: bool = False) -> PyTree:
    """Shard a batch over all devices of the current layout, if there is one.

    The batch is replicated instead if the number of devices does not divide its size, or with
    `whole=True`, unless it is sharded already.

    **Raises:**

    `ValueError` for an array of this process alone if the devices belong to several processes.
    """
    layout = layout_in_use()
    if layout is None:
        return batch

    def one(leaf: Any) -> Any:
        spec = PartitionSpec() if whole else layout.spec_of_samples(np.shape(leaf))
        if isinstance(leaf, Tracer):
            return layout.place(leaf, *spec)
        if layout.processes > 1 and getattr(leaf, "is_fully_addressable", True):
            raise ValueError(
                f"{caller}: the batch is an array of this process alone, but the devices in use "
                f"belong to {layout.processes} processes. Hand over a global array: make batches "
                "by ntt.data.batches inside ntt.distribute(), or put the rows of each process "
                "together by jax.make_array_from_process_local_data."
            )
        return _placed(layout, leaf, *spec)

    return jax.tree.map(one, batch)


def lost_unless_shared(tree: PyTree, x: Array) -> PyTree:
    """Return the tree; its floating arrays are NaN if the processes received different `x`.

    A checksum inside `jit`, which cannot tell a local array from a replicated one.
    """
    layout = layout_in_use()
    if layout is None or layout.processes == 1 or not isinstance(x, Tracer):
        return tree
    axes = layout.mesh.axis_names

    def check(x: Array) -> Array:
        x = jnp.stack([x.real, x.imag]) if jnp.iscomplexobj(x) else x
        x = x.astype(jnp.uint8) if x.dtype == bool else jnp.ravel(x)
        words = jax.lax.bitcast_convert_type(x, f"uint{8 * min(x.dtype.itemsize, 4)}").ravel()
        odd = 2 * jnp.arange(words.size, dtype=jnp.uint32) + 1
        mark = jnp.sum(words.astype(jnp.uint32) * odd)
        # One entry for each device: XLA would drop a sum over what it takes for a replicated value.
        marks = jnp.zeros(layout.mesh.size, jnp.uint32).at[jax.lax.axis_index(axes)].set(mark)
        marks = jax.lax.psum(marks, axes)
        return jnp.where(jnp.all(marks == marks[0]), 1.0, jnp.nan)

    whole: Any = {"in_specs": PartitionSpec(), "out_specs": PartitionSpec(), "check_vma": False}
    factor = jax.shard_map(check, mesh=layout.here, **whole)(x)
    lose = lambda leaf: leaf * factor.astype(leaf.dtype) if eqx.is_inexact_array(leaf) else leaf
    return jax.tree.map(lose, tree)


def everywhere(x: Array, layout: Layout | None) -> Array:
    """Replicate an array over the layout, inside `jit`."""
    return x if layout is None else layout.place(x)


def left_to_xla(function: Callable[..., Out], *arguments: Any, like: PyTree = None) -> Out:
    """Call `function(*arguments)` with all axes of the current mesh as Auto axes.

    On a mesh of Explicit axes, where types carry the sharding, the function accepts arguments of
    any sharding. Its results are sharded like the arrays of `like`, a prefix of the result's tree,
    and replicated where `like` has `None`.
    """
    arrays, rest = eqx.partition(arguments, eqx.is_array)
    mesh = _explicit_mesh(arrays)
    if mesh is None:
        return function(*arguments)
    spec = lambda leaf: jax.typeof(leaf).sharding.spec if eqx.is_array(leaf) else PartitionSpec()
    place = jax.tree.map(
        lambda leaf: NamedSharding(mesh, spec(leaf)), like, is_leaf=lambda leaf: leaf is None
    )
    others: list[Any] = []

    @functools.partial(jax.sharding.auto_axes, out_sharding=place)
    def call(arrays: Any) -> Any:
        found, other = eqx.partition(function(*eqx.combine(arrays, rest)), eqx.is_array)
        others.append(other)
        return found

    return eqx.combine(call(arrays), others[-1])


def is_sharded(x: Array) -> bool:
    """Whether an array may be sharded over several devices, as far as can be known here.

    The type of an array on Explicit axes tells, and a concrete array does. A traced array on Auto
    axes may be sharded where the current layout leaves axes to XLA.
    """
    if isinstance(x, Tracer):
        spec = getattr(jax.typeof(x).sharding, "spec", ())
        layout = layout_in_use()
        left = layout is not None and set(layout.mesh.axis_names) > set(layout.axes)
        return left or any(axis is not None for axis in spec)
    sharding = getattr(x, "sharding", None)
    return sharding is not None and not sharding.is_fully_replicated


def _explicit_mesh(arrays: PyTree) -> Any | None:
    """The current mesh if it has Explicit axes; without a mesh, the one that the arrays name."""
    current = jax.sharding.get_abstract_mesh()
    meshes = [current]
    if not getattr(current, "axis_names", ()):
        where = lambda leaf: jax.typeof(leaf) if isinstance(leaf, Tracer) else leaf
        shardings = [getattr(where(leaf), "sharding", None) for leaf in jax.tree.leaves(arrays)]
        meshes = [s.mesh for s in shardings if isinstance(s, NamedSharding)]
    return next((m for m in meshes if AxisType.Explicit in getattr(m, "axis_types", ())), None)


def _placed(layout: Layout, leaf: Any, *axes: tuple[str, ...]) -> Any:
    """Place a leaf on the devices, unless it is not an array or is there already."""
    if isinstance(leaf, Tracer) or not isinstance(leaf, jax.Array | np.ndarray | np.generic):
        return leaf
    if isinstance(leaf, jax.Array):
        if leaf.sharding.device_set == set(layout.mesh.devices.flat):
            return leaf
        is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        if leaf.is_fully_addressable and not is_key:
            leaf = np.asarray(leaf)  # other processes hold the same numbers
    return layout.place(leaf, *axes)


def _layout(
    mesh: Mesh | None,
    rows: Sequence[str] | None,
    columns: Sequence[str] | None,
    exchange: bool | None,
) -> Layout:
    if mesh is not None and not isinstance(mesh, Mesh):
        raise ValueError(
            f"distribute: mesh must be a jax.sharding.Mesh, got {type(mesh).__name__}; of a list "
            'of devices jax.make_mesh((len(devices),), ("samples",), devices=devices) makes one.'
        )
    for name, axes in (("rows", rows), ("columns", columns)):
        named = isinstance(axes, Sequence) and all(isinstance(axis, str) for axis in axes)
        if axes is not None and (isinstance(axes, str) or not named):
            raise ValueError(
                f"distribute: {name} must be a tuple of names of axes of the mesh, got {axes!r}."
            )
    if not (exchange is None or isinstance(exchange, bool)):
        raise ValueError(f"distribute: exchange must be True, False or None, got {exchange!r}.")
    if mesh is None:
        sides = _near_square(len(jax.devices()))
        mesh = jax.make_mesh(sides, ("rows", "columns"), axis_types=(AxisType.Auto,) * 2)
    if rows is None and columns is None:
        rows, columns = mesh.axis_names[:1], mesh.axis_names[1:2]
    layout = Layout(mesh, tuple(rows or ()), tuple(columns or ()), exchange)
    unknown = [axis for axis in layout.axes if axis not in mesh.axis_names]
    if unknown or len(set(layout.axes)) != len(layout.axes) or not layout.axes:
        raise ValueError(
            f"distribute: rows={layout.rows} and columns={layout.columns} must name axes of the "
            f"mesh, {tuple(mesh.axis_names)}, each once."
        )
    return layout


def _near_square(devices: int) -> tuple[int, int]:
    columns = max(c for c in range(1, math.isqrt(devices) + 1) if devices % c == 0)
    return devices // columns, columns
