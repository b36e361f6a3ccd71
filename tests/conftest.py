"""Strict numerics for every test, quick compiling, fresh keys, and a fixed choice of forms."""

import dataclasses
import os
import shutil
import sys
import tempfile
import time

import jax
import pytest

pytest.register_assert_rewrite("helpers")

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_num_cpu_devices", 8)  # all but one are there for tests/distribute
jax.config.update("jax_numpy_rank_promotion", "raise")

# Most programs here are tiny and run once or twice: what counts is how long they take to compile,
# so LLVM does the least it can, and what another test of the process compiled is taken from disk.
# A chip's compiler does what it would for a user.
#
# On a CPU the emitters of fusions take most of that time (a file of kernels: 17 s without them and
# 40 s with them). JAX 0.10 can go without, and does by default. Long tests (`-m slow`) and later
# versions have them, as users do. XLA reads the flag when the first backend starts, and a later
# version, which does not know it, would end the process.
if any("slow" in word for word in sys.argv):
    os.environ["NTT_EQX_EMITTERS"] = "1"  # for the workers of this run, too
if jax.__version_info__ < (0, 11) and "NTT_EQX_EMITTERS" not in os.environ:
    FLAGS = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}".strip()
COMPILED = tempfile.mkdtemp(prefix="ntt-eqx-compiled-")
if jax.default_backend() == "cpu":
    jax.config.update("jax_disable_most_optimizations", True)
    jax.config.update("jax_compilation_cache_dir", COMPILED)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


BEGUN = time.monotonic()


def pytest_runtest_setup(item):
    """Skip what is left after `NTT_EQX_SECONDS`: on a slow machine, too, CI has to end."""
    limit = float(os.environ.get("NTT_EQX_SECONDS", "inf"))
    if time.monotonic() - BEGUN > limit:
        pytest.skip(f"after {limit:.0f} s, the limit NTT_EQX_SECONDS")


def pytest_unconfigure():
    shutil.rmtree(COMPILED, ignore_errors=True)


@pytest.fixture(scope="session", autouse=True)
def leaves_the_users_cache_alone():
    """Commands that tests start in processes of their own keep no compiled programs."""
    # Not at import: pytest's workers would start with it.
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_ENABLE_COMPILATION_CACHE", "false")
        yield


@pytest.fixture(scope="module", autouse=True)
def forgets():
    """Forget what a module compiled: a process can hold only so many pieces of machine code."""
    yield
    jax.clear_caches()


@pytest.fixture
def getkey():
    """A function that returns a new PRNG key at every call; the same keys in every run."""
    state = {"key": jax.random.key(20)}

    def fresh():
        state["key"], key = jax.random.split(state["key"])
        return key

    return fresh


@pytest.fixture
def on_a_gpu(monkeypatch):
    """Everything is chosen as for a GPU that nothing is known of, and computed on the CPU."""
    from ntt_eqx_kernels import _dispatch  # not before the type checker's import hook

    device = _dispatch.Device("gpu", "of an unknown kind")
    for name, module in list(sys.modules.items()):
        if name.startswith("ntt_eqx") and hasattr(module, "target_device"):
            monkeypatch.setattr(module, "target_device", lambda: device)


@pytest.fixture(scope="module")
def gathers():
    """Gather the non-zeros of masks up to a density of 0.15, however small the layer.

    What pays on a device is a matter of measured costs; what is right is not.
    """
    from ntt_eqx._ntk import _costs  # not before the type checker's import hook

    eager = dataclasses.replace(
        _costs.COSTS["cpu"],
        gathered_density=0.15,
        gathered_entry=0,
        gathered_samples=0,
        gathered_per_input=0,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_costs, "COSTS", {"cpu": eager, "accelerator": eager})
        yield


@pytest.fixture
def x64():
    """Run the test with 64-bit types enabled."""
    with jax.enable_x64(True):
        yield
