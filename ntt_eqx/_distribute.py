"""Which devices share the work: a mesh, and how pairs of samples are tiled over it."""

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
from jaxtyping import Array, PyTree

Out = TypeVar("Out")


@dataclasses.dataclass(frozen=True)
class Layout:
    """A mesh, and which of its axes the samples of a kernel's two sides are spread over.

    Attributes:
        mesh: the devices; axes that are neither in `rows` nor in `columns` are left to XLA.
        rows: axes over which the first batch of a kernel is spread.
        columns: axes over which the second one is.
        exchange: whether devices exchange the factors of samples, or each makes those of its tile;
            `None` for what costs less.
    """

    mesh: Mesh
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    exchange: bool | None = None

    @property
    def here(self) -> Any:
        """The mesh as arrays see it that are made now.

        That is the one in use (`jax.set_mesh`), whose axes may be Explicit; without one, XLA places
        what is not tiled by hand.
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
        """An array with its axes spread over these of the mesh; inside `jit`, too."""
        spec = PartitionSpec(*axes)
        if isinstance(x, Tracer):
            return jax.lax.with_sharding_constraint(x, NamedSharding(self.here, spec))
        return jax.device_put(x, self.sharding(spec))

    def sharding(self, spec: PartitionSpec) -> NamedSharding:
        """Where an array of this spec lies on the devices."""
        here = self.here
        mesh = Mesh(self.mesh.devices, here.axis_names, axis_types=here.axis_types)
        return NamedSharding(mesh, spec)

    def spec_of_samples(self, shape: Sequence[int]) -> PartitionSpec:
        """Of an array `[samples, ...]`: spread over all devices if they divide its length."""
        divides = bool(shape) and shape[0] % self.devices == 0
        return PartitionSpec(self.axes) if divides else PartitionSpec()

    @property
    def processes(self) -> int:
        """Processes that the devices belong to."""
        return len({device.process_index for device in self.mesh.devices.flat})


# Part of the key of every compiled function: what was compiled outside of a block is compiled again
# inside it.
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

    - `mesh`: the devices to use; all of them without. Axes of any type will do.
    - `rows`, `columns`: the names of the axes that samples of either side are spread over. Without:
      the first axis and the second; axes beyond these are left to XLA, for weights that are sharded
      over them.
    - `exchange`: `True` for devices that exchange the factors of samples, `False` for such that
      make all of their tile's themselves; `None` for what is expected to cost less.

    **Returns:**

    A context manager that gives the mesh.

    **Raises:**

    `ValueError` for what is no mesh, and for axes that it does not have, or that are named twice.
    """
    layout = _layout(mesh, rows, columns, exchange)
    with _LAYOUT(layout if layout.mesh.size > 1 else None):
        yield layout.mesh


def layout_in_use() -> Layout | None:
    """That of the innermost `distribute` with more than one device.

    None inside a `jax.shard_map` over its axes, where each device already has its share.
    """
    layout: Layout | None = _LAYOUT.value
    manual = getattr(jax.sharding.get_abstract_mesh(), "manual_axes", ())
    return None if layout is None or set(layout.axes) & set(manual) else layout


def replicate(tree: PyTree) -> PyTree:
    """The arrays of a tree on every device of the layout in use; without one, as they are.

    Arrays that lie on these devices already, sharded or not, and tracers are left alone.
    """
    layout = layout_in_use()
    if layout is None:
        return tree
    return jax.tree.map(lambda leaf: _placed(layout, leaf), tree)


def spread(caller: str, batch: PyTree, *, whole: bool = False) -> PyTree:
    """A batch with its samples spread over all devices of the layout in use, if there is one.

    A batch whose size is no multiple of their number lies on every device as a whole; so does one
    that shall (`whole`), unless it is spread already.

    **Raises:**

    `ValueError` for an array of this process alone where the devices belong to several.
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
    """The floating arrays of a tree, NaN where the processes of the layout hold different `x`.

    Inside `jit`, where an array of one process alone counts as one that all of them hold.
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
        # Each device in its own place: a sum of what seems to be the same everywhere is left out.
        marks = jnp.zeros(layout.mesh.size, jnp.uint32).at[jax.lax.axis_index(axes)].set(mark)
        marks = jax.lax.psum(marks, axes)
        return jnp.where(jnp.all(marks == marks[0]), 1.0, jnp.nan)

    whole: Any = {"in_specs": PartitionSpec(), "out_specs": PartitionSpec(), "check_vma": False}
    factor = jax.shard_map(check, mesh=layout.here, **whole)(x)
    lose = lambda leaf: leaf * factor.astype(leaf.dtype) if eqx.is_inexact_array(leaf) else leaf
    return jax.tree.map(lose, tree)


def everywhere(x: Array, layout: Layout | None) -> Array:
    """The same array, inside `jit`, as a whole on every device of the layout."""
    return x if layout is None else layout.place(x)


def left_to_xla(function: Callable[..., Out], *arguments: Any, like: PyTree = None) -> Out:
    """`function(*arguments)`, with all axes of the mesh in use left to XLA.

    What is inside works with arrays wherever they lie. On a mesh of Explicit axes, where types say
    how arrays are sharded, it takes them as they are; what it gives back is sharded as the arrays
    of `like`, a prefix of its tree, are, and lies everywhere where that has none.
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


def _explicit_mesh(arrays: PyTree) -> Any | None:
    """The mesh of Explicit axes in use; with none in use, that which types of arrays name."""
    current = jax.sharding.get_abstract_mesh()
    meshes = [current]
    if not getattr(current, "axis_names", ()):
        where = lambda leaf: jax.typeof(leaf) if isinstance(leaf, Tracer) else leaf
        shardings = [getattr(where(leaf), "sharding", None) for leaf in jax.tree.leaves(arrays)]
        meshes = [s.mesh for s in shardings if isinstance(s, NamedSharding)]
    return next((m for m in meshes if AxisType.Explicit in getattr(m, "axis_types", ())), None)


def _placed(layout: Layout, leaf: Any, *axes: tuple[str, ...]) -> Any:
    """A leaf on the devices, unless it is no array, or lies there already."""
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
