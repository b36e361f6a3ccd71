"""Which implementation of an operation runs, and why not the others.

Every operation has a pure-JAX implementation, `"reference"`, and Pallas kernels. A request names
one implementation, or several in order of preference, or none; each implementation says, from
shapes, dtypes and the device alone and before anything is traced, whether it can take the case.
"""

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeAlias

import jax

Request: TypeAlias = str | tuple[str, ...] | None
"""One implementation by name, several in order of preference, or `None` for the best available."""

ENVIRONMENT_VARIABLE = "NTT_EQX_IMPLEMENTATION"


@dataclasses.dataclass(frozen=True)
class Default:
    """An implementation that a device takes by itself.

    Attributes:
        name: of the implementation.
        flops: multiplications and additions of the smallest call that it is taken for, as of a
            whole mask.
    """

    name: str
    flops: float = 0.0


# What `None` means, for every device: the first that takes the case. A Pallas kernel enters a row
# only where it was measured faster than the pure-JAX version on that device. The key is the
# device's platform, or a prefix of its kind, which wins over the platform.
DEFAULTS: Mapping[str, tuple[Default, ...]] = {
    "cpu": (Default("reference"),),
    "gpu": (Default("reference"),),
    "tpu": (Default("reference"),),
    # Products of 3.5e10 to 6e11 operations are 1.7 to 2.9 times faster by the kernels; in a step of
    # LeNet-5, with products of 4e9, they cost a twentieth. 2e10 is between them (docs/speed.md).
    "NVIDIA H100": (Default("pallas_gpu", 2e10), Default("reference")),
    # One of 5.5e11 is 2.8 to 3.2 times faster; smaller ones were not measured there.
    "NVIDIA H200": (Default("pallas_gpu", 5e11), Default("reference")),
}


@dataclasses.dataclass(frozen=True)
class Device:
    """What decides between implementations.

    Attributes:
        platform: `"cpu"`, `"gpu"` or `"tpu"`.
        kind: what the device calls itself, such as `"NVIDIA H100 80GB HBM3"`.
    """

    platform: str
    kind: str


@dataclasses.dataclass(frozen=True)
class Choice:
    """An implementation that was chosen for one call of an operation.

    Attributes:
        operation: the name of the operation, such as `"masked_ntk"`.
        implementation: the name of the implementation that runs.
        refusals: `(name, reason)` of every implementation that was asked before it.
    """

    operation: str
    implementation: str
    refusals: tuple[tuple[str, str], ...] = ()


def _from_environment() -> Request:
    names = os.environ.get(ENVIRONMENT_VARIABLE)
    return tuple(name.strip() for name in names.split(",")) if names else None


class _Record(list[Choice]):
    """The choices of one block; different from every other's, and hashable as what it is."""

    __hash__: Any = object.__hash__
    __eq__ = object.__eq__


# Both belong to the key of every compiled function, so that none answers inside a block what it was
# compiled for outside of it.
_FORCED = jax.make_user_context(default_value=_from_environment())
_RECORDS = jax.make_user_context(default_value=())


def choose(
    operation: str,
    refusals: Mapping[str, Callable[[Device], str | None]],
    implementation: Request,
    flops: float = 0.0,
) -> Choice:
    """Choose the implementation that runs one call of `operation`.

    **Arguments:**

    - `operation`: its name, for messages.
    - `refusals`: for every implementation that exists, a function from the device to the reason
      why it cannot take this call, or to `None` if it can.
    - `implementation`: the request. Where it is `None`, the innermost `use_implementation` decides,
      then the environment variable `NTT_EQX_IMPLEMENTATION` (names separated by commas) as it was
      at the import, then the table `DEFAULTS` of the device.
    - `flops`: multiplications and additions of the call, as of a whole mask, for that table.

    **Raises:**

    `ValueError` for a name that does not exist, `NotImplementedError` with all reasons when none
    of the implementations asked for takes the case.
    """
    device = target_device()
    refused = []
    for name, least in _names(operation, implementation, device):
        if flops < least:
            refused.append((name, f"pays from {least:.0e} operations on, and here are {flops:.0e}"))
            continue
        if name not in refusals:
            raise ValueError(
                f"{operation}: there is no implementation {name!r}; choose from {sorted(refusals)}."
            )
        reason = refusals[name](device)
        if reason is None:
            choice = Choice(operation, name, tuple(refused))
            for record in _RECORDS.value:
                record.append(choice)
            return choice
        refused.append((name, reason))
    reasons = "; ".join(f"{name} {reason}" for name, reason in refused)
    raise NotImplementedError(f"{operation}: no implementation takes this call: {reasons}.")


@contextlib.contextmanager
def use_implementation(implementation: Request) -> Iterator[None]:
    """Let calls without `implementation=` inside the block use this one.

    A function that was compiled outside the block is compiled again inside it.

    **Arguments:**

    - `implementation`: a name, several in order of preference, or `None` for the best available.

    **Returns:**

    A context manager.
    """
    request = implementation if implementation is None else _as_names(implementation)
    with _FORCED(request):
        yield


@contextlib.contextmanager
def record_choices() -> Iterator[list[Choice]]:
    """Collect the `Choice` of every operation that runs inside the block.

    Choices are made when a function is traced, so that functions are compiled anew inside each such
    block: for looking, not for production.

    **Returns:**

    A context manager that gives the list, which grows as operations are traced.
    """
    record = _Record()
    with _RECORDS((*_RECORDS.value, record)):
        yield record


def target_device() -> Device:
    """The device that a call traced now is meant for.

    That is the abstract device of the mesh in use (`jax.sharding.use_abstract_mesh`), if it has
    one, else `jax.default_device`, else the first device of the default backend.

    **Returns:**

    The `Device`; everything that is chosen by device asks for it here.
    """
    abstract = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    if abstract is not None:
        platform = getattr(abstract, "platform", None) or _platform_of(abstract.device_kind)
        return Device(_common_name(platform), abstract.device_kind)
    config: Any = jax.config  # its options are no attributes for a type checker
    default: Any = config.jax_default_device
    if isinstance(default, str):
        default = jax.devices(default)[0]
    device = jax.local_devices()[0] if default is None else default
    return Device(_common_name(device.platform), device.device_kind)


def _names(operation: str, implementation: Request, device: Device) -> list[tuple[str, float]]:
    """Which to ask, in this order, each for calls of so many operations or more."""
    request = implementation if implementation is not None else _FORCED.value
    if request is None:
        kinds = [kind for kind in DEFAULTS if device.kind.startswith(kind)]
        key = max(kinds, key=len) if kinds else device.platform
        row = DEFAULTS.get(key, (Default("reference"),))
        return [(default.name, default.flops) for default in row]
    names = _as_names(request)
    if not names:
        raise ValueError(f"{operation}: implementation=() names no implementation.")
    return [(name, 0.0) for name in names]


def _as_names(request: str | Iterable[str]) -> tuple[str, ...]:
    return (request,) if isinstance(request, str) else tuple(request)


def _common_name(platform: str) -> str:
    return "gpu" if platform in ("cuda", "rocm") else platform


def _platform_of(kind: str) -> str:
    return "tpu" if kind.upper().startswith("TPU") else "gpu"
