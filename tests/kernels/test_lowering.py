"""The kernels lower for CUDA (an abstract H100) and TPU, on a machine that has neither."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import pytest
from helpers.oracle import Sizes
from helpers.tiers import slow
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from ntt_eqx import kernels
from ntt_eqx_kernels import Device, _chips, _mosaic_gpu
from ntt_eqx_kernels._operation import Plan, run
from ntt_eqx_kernels.masked_ntk import dense_gpu, dense_tpu
from ntt_eqx_kernels.masked_ntk.implementations import IMPLEMENTATIONS

H100 = AbstractDevice("NVIDIA H100 80GB HBM3", 132, "cuda")
TPU = AbstractDevice("TPU v5 lite", 1, "tpu")
DEVICES = {"cuda": H100, "tpu": TPU}
CUSTOM_CALL = {"cuda": r"@mosaic_gpu_v2", "tpu": r"@tpu_custom_call"}

QUICK = {
    "ones": Sizes(n=1, m=1, k=1, l=1, i=1, j=1),
    "odd": Sizes(n=20, m=37, k=3, l=2, i=19, j=37),
}
TABLE = {
    "lenet_300": Sizes(n=32, m=32, k=10, l=10, i=300, j=784),
    "lenet_100": Sizes(n=32, m=32, k=10, l=10, i=100, j=300),
    "lenet_10": Sizes(n=32, m=32, k=10, l=10, i=10, j=100),
    "lenet5_dense": Sizes(n=128, m=128, k=10, l=10, i=500, j=800),
    "conv4_dense": Sizes(n=256, m=256, k=10, l=10, i=512, j=8192),
    "one_output": Sizes(n=130, m=7, k=1, l=1, i=129, j=257),
    "hundred_outputs": Sizes(n=17, m=9, k=100, l=100, i=65, j=129),
    "sides_differ": Sizes(n=3, m=65, k=17, l=33, i=70, j=3),
}


def lower(platform, sizes, dtype, precision, binary=True):
    """The StableHLO of a product, and of its gradient: a pair of texts."""
    chosen = IMPLEMENTATIONS[{"cuda": "pallas_gpu", "tpu": "pallas_tpu"}[platform]]
    n, m, k, l, i, j = sizes.n, sizes.m, sizes.k, sizes.l, sizes.i, sizes.j  # noqa: E741
    plan = Plan(chosen, precision, DEVICES[platform].device_kind, (n, m, k, l, i, j))
    args = [jax.ShapeDtypeStruct(shape, dtype) for shape in sizes.shapes]
    args.append(jax.ShapeDtypeStruct((i, j), bool if binary else jnp.float32))
    g = jax.ShapeDtypeStruct((n, m, k, l), jnp.float32)

    def gradient(*args):
        *factors, mask, g = args
        return jax.vjp(lambda *factors: run(plan, *factors, mask), *factors)[1](g)

    with use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=DEVICES[platform])):
        texts = []
        for function, inputs in ((functools.partial(run, plan), args), (gradient, [*args, g])):
            lowered = jax.jit(function).trace(*inputs).lower(lowering_platforms=(platform,))
            texts.append(lowered.as_text())
    return texts


# Kernels of a product and of its gradient. On a GPU u and Theta; both again, which XLA will find
# unused in part, the cotangents of d1, d2 and u, and the way back on both sides. On a TPU one for
# all, and two for each side.
LAUNCHES = {"cuda": (2, 7), "tpu": (1, 4)}


def check_lowering(platform, sizes, dtype, precision, binary=True):
    texts = lower(platform, sizes, dtype, precision, binary)
    launches = tuple(len(re.findall(CUSTOM_CALL[platform], text)) for text in texts)
    assert launches == LAUNCHES[platform]


@pytest.mark.parametrize("platform", DEVICES)
@pytest.mark.parametrize("precision", (slow("float32"), "bfloat16"))
@pytest.mark.parametrize("dtype", (jnp.float32, jnp.bfloat16), ids=("f32", "bf16"))
@pytest.mark.parametrize("name", QUICK)
def test_lowering(platform, name, dtype, precision):
    check_lowering(platform, QUICK[name], dtype, precision)


@pytest.mark.slow
@pytest.mark.parametrize("platform", DEVICES)
@pytest.mark.parametrize("precision", ("float32", "tf32", "bfloat16"))
@pytest.mark.parametrize("dtype", (jnp.float32, jnp.bfloat16), ids=("f32", "bf16"))
@pytest.mark.parametrize("name", TABLE)
def test_lowering_of_the_table(platform, name, dtype, precision):
    check_lowering(platform, TABLE[name], dtype, precision)


@pytest.mark.slow
@pytest.mark.parametrize("platform", DEVICES)
@pytest.mark.parametrize("name", ("lenet_100", "sides_differ"))
def test_lowering_of_a_metric(platform, name):
    check_lowering(platform, TABLE[name], jnp.float32, "float32", binary=False)


@pytest.mark.parametrize("platform", DEVICES)
def test_lowering_by_name_with_the_gradient(platform):
    # As a user calls it: the entry chooses by the device that the program is meant for.
    sizes = QUICK["odd"]
    name = {"cuda": "pallas_gpu", "tpu": "pallas_tpu"}[platform]
    call = functools.partial(kernels.masked_ntk, implementation=name)
    args = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in sizes.shapes]
    mask = jnp.ones((sizes.i, sizes.j), bool)
    gradient = jax.grad(lambda *args: jnp.sum(call(*args, mask) ** 2), argnums=(0, 1, 2, 3))
    with use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=DEVICES[platform])):
        if platform == "cuda" and _chips.lacks_mosaic_gpu(Device("gpu", H100.device_kind)):
            with pytest.raises(NotImplementedError, match="needs JAX 0.11"):
                jax.jit(gradient).trace(*args)
            return
        text = jax.jit(gradient).trace(*args).lower(lowering_platforms=(platform,)).as_text()
    launches = len(re.findall(CUSTOM_CALL[platform], text))
    assert launches == {"cuda": 7, "tpu": 5}[platform]


@pytest.mark.parametrize("platform", DEVICES)
def test_nothing_larger_than_u_is_in_memory(platform):
    # Pairs times input features, or times output features and outputs; Theta is K L a pair.
    sizes = Sizes(n=128, m=128, k=4, l=4, i=512, j=800)
    for text in lower(platform, sizes, jnp.float32, "float32"):
        shapes = re.findall(r"tensor<((?:\d+x)+)[a-z]", text)
        largest = max(math.prod(map(int, shape[:-1].split("x"))) for shape in shapes)
        assert largest <= sizes.n * sizes.m * sizes.i // (1 if platform == "cuda" else 2)


def test_configs_fit_the_memory_they_are_for():
    for sizes in (*QUICK.values(), *TABLE.values()):
        shape = (sizes.n, sizes.m, sizes.k, sizes.l, sizes.i, sizes.j)
        for precision in ("float32", "tf32", "bfloat16"):
            for binary in (True, False):
                pieces = {"float32": 3, "tf32": 2, "bfloat16": 1}[precision]
                small = (sizes.n, sizes.m, sizes.i)
                t = dense_gpu.config_for(small, jnp.float32, precision, binary=binary)
                needed = t.shared_bytes(4, 1 if binary else pieces)
                assert needed <= _mosaic_gpu.SHARED_BYTES - _mosaic_gpu.RESERVED_BYTES
        assert dense_tpu.config_for("", shape).vmem_bytes() <= dense_tpu.VMEM_BYTES


@pytest.mark.parametrize(
    "config",
    (dense_gpu.Config, dense_tpu.Config),
    ids=lambda config: config.__module__,
)
def test_configs_refuse_impossible_tiles(config):
    first = next(iter(config.__dataclass_fields__))
    for size in (0, -64):
        with pytest.raises(ValueError, match="positive multiple"):
            config(**{first: size})
    with pytest.raises(ValueError, match="VMEM|registers|register"):
        config(**{first: 4096})
