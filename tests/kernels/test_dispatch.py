"""Which implementation runs, and that the reasons for the others can be read."""

import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import jaxtyping
import pytest
from beartype.roar import BeartypeException
from helpers import oracle
from helpers.oracle import Sizes
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh
from jaxtyping import TypeCheckError

from ntt_eqx import kernels
from ntt_eqx_kernels import Device, _chips, _dispatch

BAD_ARGUMENT = (ValueError, TypeCheckError, BeartypeException)
H100 = AbstractDevice("NVIDIA H100 80GB HBM3", 132, "cuda")
H200 = AbstractDevice("NVIDIA H200", 132, "cuda")
A100 = AbstractDevice("NVIDIA A100-SXM4-80GB", 108, "cuda")
TPU = AbstractDevice("TPU v5 lite", 1, "tpu")
INTERPRETED = ("pallas_gpu_interpret", "pallas_tpu_interpret")
OPERATIONS = {"masked_ntk": Sizes(), "masked_tangent_ntk": Sizes(s=3)}


def on(device):
    return use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=device))


def chosen(*, dtype=jnp.float32, masked=True, sizes=None, **options):
    sizes = sizes or Sizes()
    factors = [jax.ShapeDtypeStruct(shape, dtype) for shape in sizes.shapes]
    mask = jax.ShapeDtypeStruct((sizes.i, sizes.j), bool) if masked else None
    return kernels.masked_ntk_choice(*factors, mask, **options)


LARGE = Sizes(n=256, m=256, k=10, l=10, i=300, j=784)
LARGEST = dataclasses.replace(LARGE, i=512, j=8192)


@pytest.mark.parametrize("device", (None, A100, H200, TPU), ids=str)
@pytest.mark.parametrize("sizes", (Sizes(), LARGE), ids=("small", "large"))
def test_reference_is_the_default_where_no_kernel_was_measured_faster(device, sizes):
    with contextlib.nullcontext() if device is None else on(device):
        assert chosen(sizes=sizes).implementation == "reference"


@pytest.mark.parametrize("device, large", ((H100, LARGE), (H200, LARGEST)), ids=str)
def test_kernels_are_the_default_of_a_hopper_gpu_for_large_products(device, large):
    with on(device):
        small = chosen()
        assert small.implementation == "reference"
        assert small.refusals[0][0] == "pallas_gpu" and "pays from" in small.refusals[0][1]
        supported = _chips.lacks_mosaic_gpu(Device("gpu", device.device_kind)) is None
        assert chosen(sizes=large).implementation == ("pallas_gpu" if supported else "reference")
        assert chosen(sizes=large, masked=False).implementation == "reference"
        assert chosen(sizes=large, implementation="reference").implementation == "reference"


def test_default_table_names_implementations():
    from ntt_eqx_kernels.masked_ntk.implementations import IMPLEMENTATIONS

    for row in _dispatch.DEFAULTS.values():
        assert row[-1] == _dispatch.Default("reference")
        assert {default.name for default in row} <= set(IMPLEMENTATIONS)


def test_device_decides():
    with on(TPU):
        assert chosen(implementation="pallas_tpu").implementation == "pallas_tpu"
        with pytest.raises(NotImplementedError, match="needs a Hopper GPU.*TPU v5 lite"):
            chosen(implementation="pallas_gpu")
    with on(A100), pytest.raises(NotImplementedError, match="needs a Hopper GPU.*A100"):
        chosen(implementation="pallas_gpu")
    with on(H100):
        if _chips.lacks_mosaic_gpu(Device("gpu", H100.device_kind)) is None:
            assert chosen(implementation="pallas_gpu").implementation == "pallas_gpu"
        else:
            with pytest.raises(NotImplementedError, match="needs JAX 0.11"):
                chosen(implementation="pallas_gpu")
    for name in ("pallas_gpu", "pallas_tpu"):
        with pytest.raises(NotImplementedError, match=f"masked_ntk.*{name} needs a .*cpu"):
            chosen(implementation=name)


@pytest.mark.parametrize("name", INTERPRETED)
def test_case_decides(name):
    assert chosen(implementation=name).implementation == name
    with pytest.raises(NotImplementedError, match="not float16"):
        chosen(dtype=jnp.float16, implementation=name)
    with pytest.raises(NotImplementedError, match="nothing to fuse without a mask"):
        chosen(masked=False, implementation=name)


def test_refusals_are_kept_in_order():
    choice = chosen(implementation=("pallas_gpu", "pallas_tpu", "reference"))
    assert choice.implementation == "reference"
    assert [name for name, _ in choice.refusals] == ["pallas_gpu", "pallas_tpu"]
    assert all("needs a" in reason for _, reason in choice.refusals)
    with pytest.raises(NotImplementedError, match="pallas_gpu needs.*; pallas_tpu needs"):
        chosen(implementation=("pallas_gpu", "pallas_tpu"))


def test_who_decides():
    gpu, tpu = INTERPRETED
    with kernels.use_implementation(("pallas_gpu", tpu)):
        assert chosen().implementation == tpu
        with kernels.use_implementation(gpu):
            assert chosen().implementation == gpu
            with kernels.use_implementation("reference"):
                assert chosen().implementation == "reference"
            assert chosen(implementation=tpu).implementation == tpu
        assert chosen().implementation == tpu
    assert chosen().implementation == "reference"


def test_the_environment_decides_at_the_import(monkeypatch):
    monkeypatch.setenv(_dispatch.ENVIRONMENT_VARIABLE, "pallas_gpu, pallas_tpu_interpret")
    assert _dispatch._from_environment() == ("pallas_gpu", "pallas_tpu_interpret")
    assert chosen().implementation == "reference"  # this process has begun
    monkeypatch.delenv(_dispatch.ENVIRONMENT_VARIABLE)
    assert _dispatch._from_environment() is None


def test_a_compiled_function_answers_inside_a_block_what_is_asked_there():
    args, mask = oracle.factors(Sizes()), oracle.random_mask(Sizes())
    call = jax.jit(lambda *args: kernels.masked_ntk(*args))
    before = call(*args, mask)
    with kernels.record_choices() as first:
        call(*args, mask)
    with kernels.record_choices() as second:
        call(*args, mask)
    assert [c.implementation for c in first] == [c.implementation for c in second] == ["reference"]
    with kernels.use_implementation("pallas_gpu"):
        with pytest.raises(NotImplementedError, match="pallas_gpu needs"):
            call(*args, mask)
    with kernels.use_implementation("pallas_tpu_interpret"), kernels.record_choices() as third:
        assert jnp.allclose(call(*args, mask), before, atol=1e-5)
    assert [c.implementation for c in third] == ["pallas_tpu_interpret"]


def test_choices_that_ran_are_recorded():
    args, mask = oracle.factors(Sizes()), oracle.random_mask(Sizes())
    wanted = ("pallas_gpu", "pallas_tpu_interpret")
    with kernels.record_choices() as outer:
        kernels.masked_ntk(*args, mask)
        with kernels.record_choices() as inner:
            kernels.masked_ntk(*args, mask, implementation=wanted)
    assert [choice.implementation for choice in inner] == ["pallas_tpu_interpret"]
    assert [choice.implementation for choice in outer] == ["reference", "pallas_tpu_interpret"]
    assert inner[0].refusals[0][0] == "pallas_gpu"


@pytest.mark.parametrize("request_", ("pallas", (), ("reference", "cuda")[1:]), ids=str)
def test_names_that_do_not_exist(request_):
    with pytest.raises(ValueError, match="masked_ntk: .*implementation"):
        chosen(implementation=request_)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_arguments_that_do_not_fit(operation):
    sizes = OPERATIONS[operation]
    call = getattr(kernels, operation)
    args, mask = list(oracle.factors(sizes)), oracle.random_mask(sizes)
    for index in range(4):
        for wrong in (
            args[index][..., None],
            args[index][:-1] if index in (1, 3) else args[index][:, :-1],
            args[index].astype(jnp.bfloat16),
        ):
            with pytest.raises(BAD_ARGUMENT):
                call(*args[:index], wrong, *args[index + 1 :], mask)
    for wrong in (mask[:-1], mask.T, mask.astype(jnp.int32)):
        with pytest.raises(BAD_ARGUMENT):
            call(*args, wrong)
    with pytest.raises(BAD_ARGUMENT):
        call(*(x.astype(jnp.int32) for x in args), mask)
    with pytest.raises(BAD_ARGUMENT):
        call(*args, mask, precision="float16")


def test_messages_say_what_was_given():
    factors = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in Sizes().shapes]
    mask = jax.ShapeDtypeStruct((7, 5), bool)
    with pytest.raises(ValueError, match=r"mask has shape \(7, 5\) where \(5, 7\) fits"):
        kernels.masked_ntk_choice(*factors, mask)
    factors[3] = jax.ShapeDtypeStruct((3, 2, 5), jnp.bfloat16)
    with pytest.raises(ValueError, match="d2 is bfloat16 but a1 is float32"):
        kernels.masked_ntk_choice(*factors)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_messages_without_a_type_checker(operation, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    sizes, call = OPERATIONS[operation], getattr(kernels, operation)
    array = jax.ShapeDtypeStruct
    factors = [array(shape, jnp.float32) for shape in sizes.shapes]
    mask = array((sizes.i, sizes.j), jnp.int32)
    with pytest.raises(ValueError, match=f"{operation}: mask must be boolean or .*, got int32"):
        call(*factors, mask)
    with pytest.raises(ValueError, match=f"{operation}: the factors must be .*, got int32"):
        call(*(array(x.shape, jnp.int32) for x in factors))
    for index, name in enumerate(("a1", "d1", "a2", "d2")):
        other = list(factors)
        other[index] = array((*factors[index].shape, 1), jnp.float32)
        axes = len(factors[index].shape)
        with pytest.raises(ValueError, match=f"{operation}: {name} must have {axes} axes, got"):
            call(*other)
    message = r"precision must be one of \['bfloat16', 'float32', 'tf32'\] or None, got 'float16'"
    with pytest.raises(ValueError, match=f"{operation}: {message}"):
        call(*factors, precision="float16")


def test_a_default_device_given_by_its_platform():
    with jax.default_device("cpu"):
        assert _dispatch.target_device() == _dispatch.Device("cpu", "cpu")
    assert _dispatch._platform_of("TPU v6 lite") == "tpu"
    assert _dispatch._platform_of("NVIDIA H100 80GB HBM3") == "gpu"


def test_refusals_come_before_tracing():
    args, mask = oracle.factors(Sizes()), oracle.random_mask(Sizes())
    traced = []

    @jax.jit
    def call(*args):
        theta = kernels.masked_ntk(*args, implementation="pallas_tpu")
        traced.append(theta)
        return theta

    with pytest.raises(NotImplementedError, match="needs a TPU"):
        call(*args, mask)
    assert not traced
