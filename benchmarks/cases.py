"""The cases that the benchmarks time: model, input shape and number of outputs."""

import dataclasses

import jax
from jaxtyping import Array, PyTree

import ntt_eqx as ntt


@dataclasses.dataclass(frozen=True)
class Case:
    """A model by its name in `ntt_eqx.models.MODELS`, with the shape of its samples."""

    model: str
    input_shape: tuple[int, int, int]
    num_classes: int = 10

    def teacher(self, key: Array) -> PyTree:
        """The dense model."""
        return ntt.models.make_model(self.model, self.input_shape, self.num_classes, key=key)

    def samples(self, key: Array, count: int) -> Array:
        """Standard normal inputs `[count, C, H, W]`."""
        return jax.random.normal(key, (count, *self.input_shape))


CASES = {
    "lenet300100": Case("lenet-300-100", (1, 28, 28)),
    "lenet5": Case("lenet-5", (1, 28, 28)),
    "conv4": Case("conv-4", (3, 32, 32)),
    "resnet": Case("resnet-20", (3, 32, 32)),
}
