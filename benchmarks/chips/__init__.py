"""Chips that programs can be compiled for without having one: their figures and their compilers."""

import dataclasses
import math
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, use_abstract_mesh

from ntt_eqx import distribute


@dataclasses.dataclass(frozen=True)
class Chip:
    """A chip's compiler, and the figures of the roofline that times are stated by.

    Attributes:
        platform: as JAX's lowering calls it.
        topology: the name of a topology of some of them, with the lengths of its sides to be filled
            in.
        sides: how many sides that has; the last of a GPU's is the devices of a machine.
        tflops: of its matrix units, a second, by the precision of a product.
        vector_tflops: of its other units, in float32: where XLA computes full float32 products.
        gbytes: bytes from and to memory a second, in 1e9.
        launch_us: the least time of one launch, in microseconds.
    """

    name: str
    platform: str
    topology: str
    sides: int
    tflops: float
    vector_tflops: float
    gbytes: float
    launch_us: float


# Data sheets: dense bfloat16 on the matrix units. A launch of a GPU that waits for the one before
# takes about 2 microseconds; a TPU's operations follow each other in one program.
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("h100", "cuda", "1x1x{}", 1, 989, 67, 3352, 2.0),
        Chip("tpu-v4", "tpu", "v4:{}x{}x{}", 3, 275, 4.3, 1228, 0.2),
        Chip("tpu-v5e", "tpu", "v5e:{}x{}", 2, 197, 6.1, 819, 0.2),
        Chip("tpu-v5p", "tpu", "v5p:{}x{}x{}", 3, 459, 7.2, 2765, 0.2),
        Chip("tpu-v6e", "tpu", "v6e:{}x{}", 2, 918, 14.3, 1640, 0.2),
    )
}

NO_OPTIONS: Mapping[str, str] = types.MappingProxyType({})


class Target:
    """A chip, or several, with the compiler loaded: compiles functions of abstract arguments."""

    def __init__(self, chip: Chip, devices: int = 1, options: Mapping[str, str] = NO_OPTIONS):
        """Load the compiler of `chip`; raises `RuntimeError` where its package is missing.

        `options` are the compiler's own, by name.
        """
        jax.devices()  # topologies of other platforms need a client to exist
        # The smallest topology of TPUs that can be described has four of them.
        name = chip.topology.format(*_sides(max(devices, 4 if chip.platform == "tpu" else 1), chip))
        described = {}
        if chip.platform == "cuda":
            text = (Path(__file__).parent / "h100.txtpb").read_text()
            name, described = chip.name, dict(topology=name, target_config=text)
        try:
            topology = topologies.get_topology_desc(
                platform=chip.platform, topology_name=name, **described
            )
        except Exception as error:
            raise RuntimeError(
                f"the compiler for {chip.name} is not installed, or has no topology {name!r}; on "
                f"Python >= 3.12: pip install 'ntt-eqx[compile]' ({type(error).__name__}: {error})"
            ) from error
        columns = next(c for c in range(math.isqrt(devices), 0, -1) if devices % c == 0)
        found = np.array(topology.devices[:devices]).reshape(devices // columns, columns)
        self.chip, self.kind = chip, topology.devices[0].device_kind
        self.options: dict[str, str | bool] = dict(options)
        self.mesh = Mesh(found, ("rows", "columns"), axis_types=(AxisType.Auto,) * 2)

    def abstract(self, tree: Any) -> Any:
        """`tree` with every array replaced by its shape and dtype, placed on every device."""
        sharding = NamedSharding(self.mesh, PartitionSpec())
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree
        )

    def compile(self, function: Callable[..., Any], *inputs: Any) -> Any:
        """`function` compiled for the chip; `inputs` are trees of arrays or of their shapes.

        For several, as it is inside `ntt_eqx.distribute`.
        """
        # All choices follow the device of this mesh.
        with use_abstract_mesh(self.mesh.abstract_mesh), distribute(self.mesh):
            lowered = jax.jit(function).trace(*map(self.abstract, inputs))
            lowered = lowered.lower(lowering_platforms=(self.chip.platform,))
        return lowered.compile(compiler_options=self.options)


def _sides(devices: int, chip: Chip) -> list[int]:
    """Sides of a topology, as equal as can be."""
    sides = [1] * chip.sides
    rest, factor = devices, 2
    while rest > 1:
        while rest % factor:
            factor += 1
        sides[sides.index(min(sides))] *= factor
        rest //= factor
    return sorted(sides, reverse=chip.sides == 3)
