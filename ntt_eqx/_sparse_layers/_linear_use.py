"""How the kernel of a network reads the product of a layer that stores kept weights alone."""

from typing import Any, ClassVar

import equinox as eqx
import jax
from jaxtyping import Array

from .._ntk import register_linear_use
from .._ntk._linear import AbstractEntryUse, Places
from ..kernels import gathered_shape
from ._index import AbstractIndex
from ._products import product


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
        """See `AbstractEntryUse`."""
        kept: AbstractIndex = jax.tree.unflatten(self.structure, index)
        _, width = gathered_shape(kept.kept, self.features)
        return Places(*kept.chunks(width))

    def product(
        self, index: tuple[Array, ...], values: Array, x: Array, *, transposed: bool
    ) -> Array:
        """See `AbstractEntryUse`."""
        return product(values, x, jax.tree.unflatten(self.structure, index), transposed=transposed)


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
