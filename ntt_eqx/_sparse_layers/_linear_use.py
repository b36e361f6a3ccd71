"""How the kernel of a network reads the product of a layer that stores kept weights alone."""

from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array

from .._ntk import register_linear_use
from .._ntk._linear import AbstractEntryUse, Places
from ..kernels import gathered_shape
from ._index import AbstractIndex, Group


class KeptProduct(AbstractEntryUse):
    """The product of the kept entries of a matrix with the features of its input.

    Attributes:
        kind: the name that `explain` prints.
        operands: that of the input.
        groups: 1; the groups of a convolution are blocks of one matrix.
        features: I.
        inputs: J.
        positions: S.
        index: the operands behind values and input.
        structure: of the index whose arrays these are.
    """

    kind: ClassVar[str] = "kept entries"
    operands: tuple[int, ...]
    groups: int
    features: int
    inputs: int
    positions: int
    index: tuple[int, ...]
    structure: Any = eqx.field(static=True)

    def activations(self, *operands: Array) -> Array:
        """See `AbstractUse`."""
        (a,) = operands
        return a[None]

    def cotangents(self, d: Any) -> Any:
        """See `AbstractUse`."""
        return d[None]

    def places(self, *index: Array) -> Places:
        """See `AbstractEntryUse`; the slots of a row, cut into chunks."""
        kept: AbstractIndex = jax.tree.unflatten(self.structure, index)
        _, width = gathered_shape(kept.kept, self.features)
        parts = [_chunks(group, width, kept.kept) for group in kept.row_groups]
        rows, columns, entries = (jnp.concatenate(arrays) for arrays in zip(*parts, strict=True))
        order = jnp.argsort(rows)
        return Places(rows[order], columns[order], entries[order])


def _chunks(group: Group, width: int, unused: int) -> tuple[Array, Array, Array]:
    """The row of each chunk of a group, the columns of its entries and their numbers."""
    slots, rows = group.others.shape
    each = -(-slots // width)
    spare = ((0, 0), (0, each * width - slots))
    columns = jnp.pad(group.others.T, spare).reshape(-1, width)
    entries = jnp.pad(group.entries.T, spare, constant_values=unused).reshape(-1, width)
    return jnp.repeat(group.rows, each, total_repeat_length=rows * each), columns, entries


def _rule(eqn: Any, weight: int) -> KeptProduct | None:
    """The kernel's rule for the product; its transpose is no product with the layer's input."""
    if weight != 0 or eqn.params["transposed"]:
        return None
    features, positions = eqn.outvars[0].aval.shape
    return KeptProduct(
        operands=(1,),
        groups=1,
        features=features,
        inputs=eqn.invars[1].aval.shape[0],
        positions=positions,
        index=tuple(range(2, len(eqn.invars))),
        structure=eqn.params["structure"],
    )


register_linear_use("sparse_product", _rule)
