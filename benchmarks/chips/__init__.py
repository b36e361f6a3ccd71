"""Chips that programs can be compiled for without having one: their figures and their compilers."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec, use_abstract_mesh


@dataclasses.dataclass(frozen=True)
class Chip:
    """A chip's compiler, and the figures of the roofline that times are stated by.

    Attributes:
        platform: as JAX's lowering calls it.
        topology: the name of the smallest topology that has the chip.
        options: what else its description takes.
        tflops: of its matrix units, a second, by the precision of a product.
        vector_tflops: of its other units, in float32: where XLA computes full float32 products.
        gbytes: bytes from and to memory a second, in 1e9.
        launch_us: the least time of one launch, in microseconds.
    """

    name: str
    platform: str
    topology: str
    options: tuple[tuple[str, str], ...]
    tflops: float
    vector_tflops: float
    gbytes: float
    launch_us: float


# Data sheets: dense bfloat16 on the matrix units. A launch of a GPU that waits for the one before
# takes about 2 microseconds; a TPU's operations follow each other in one program.
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("h100", "cuda", "h100", (("topology", "1x1x1"),), 989, 67, 3352, 2.0),
        Chip("tpu-v4", "tpu", "v4:2x2x1", (), 275, 4.3, 1228, 0.2),
        Chip("tpu-v5e", "tpu", "v5e:2x2", (), 197, 6.1, 819, 0.2),
        Chip("tpu-v5p", "tpu", "v5p:2x2x1", (), 459, 7.2, 2765, 0.2),
        Chip("tpu-v6e", "tpu", "v6e:2x2", (), 918, 14.3, 1640, 0.2),
    )
}


class Target:
    """A chip with its compiler loaded: compiles functions of abstract arguments for it."""

    def __init__(self, chip: Chip):
        """Load the compiler of `chip`; raises `RuntimeError` where its package is missing."""
        jax.devices()  # topologies of other platforms need a client to exist
        options = dict(chip.options)
        if chip.platform == "cuda":
            text = (Path(__file__).parent / "h100.txtpb").read_text()
            options["target_config"] = text
        try:
            topology = topologies.get_topology_desc(
                platform=chip.platform, topology_name=chip.topology, **options
            )
        except Exception as error:
            raise RuntimeError(
                f"the compiler for {chip.name} is not installed; on Python >= 3.12: "
                f"pip install 'ntt-eqx[compile]' ({type(error).__name__}: {error})"
            ) from error
        self.chip = chip
        self.mesh = Mesh(np.array(topology.devices[:1]), ("x",))
        self.kind = topology.devices[0].device_kind

    def abstract(self, tree: Any) -> Any:
        """`tree` with every array replaced by its shape and dtype, placed on the chip."""
        sharding = NamedSharding(self.mesh, PartitionSpec())
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree
        )

    def compile(self, function: Callable[..., Any], *inputs: Any) -> Any:
        """`function` compiled for the chip; `inputs` are trees of arrays or of their shapes."""
        with use_abstract_mesh(self.mesh.abstract_mesh):  # whose device all choices follow
            lowered = jax.jit(function).trace(*map(self.abstract, inputs))
            lowered = lowered.lower(lowering_platforms=(self.chip.platform,))
        return lowered.compile()
