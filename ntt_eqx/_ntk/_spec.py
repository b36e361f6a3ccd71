"""Everything static that a kernel depends on, in one hashable value."""

import dataclasses
from typing import Any

from .._checks import is_count
from .._types import Implementation, KernelKind, Outputs
from ..kernels import PRECISIONS, Device, Precision, target_device
from ._costs import Costs, costs_on
from ._linear import RegisteredRule, rules_in_use
from ._pairs import default_budget

_CHOICES = {
    "kernel": ("active", "ambient"),
    "outputs": ("full", "diagonal", "trace"),
    "precision": PRECISIONS,
    "implementation": ("factors", "jacobian", "ntk_vector_products"),
}


@dataclasses.dataclass(frozen=True)
class KernelSpec:
    """What decides how a kernel is computed, besides its arrays: the static argument of `jit`.

    Equal specs share a compiled program. Device, costs and rules are read from their surroundings
    once, in `kernel_spec`; nothing later asks for them again.

    Attributes:
        kernel: whether the sum is over kept weights or over all.
        outputs: which pairs of outputs to compute.
        precision: the precision of matrix products.
        implementation: the engine (`"factors"`) or an oracle.
        by_layer: whether each term of the sum is returned, instead of the sum.
        budget: bytes for intermediates, beside inputs and result.
        device: the device that computes the kernel.
        costs: measured costs of that device.
        rules: the linear uses of primitives.
    """

    kernel: KernelKind
    outputs: Outputs
    precision: Precision
    implementation: Implementation
    by_layer: bool
    budget: int
    device: Device
    costs: Costs
    rules: tuple[RegisteredRule, ...]


def kernel_spec(
    kernel: KernelKind = "active",
    outputs: Outputs = "full",
    precision: Precision = "float32",
    implementation: Implementation | None = None,
    max_bytes: int | None = None,
    by_layer: bool = False,
) -> KernelSpec:
    """The spec of a kernel on the device in use, with the arguments of `ntk`."""
    device = target_device()
    return KernelSpec(
        kernel=kernel,
        outputs=outputs,
        precision=precision,
        implementation=implementation or "factors",
        by_layer=by_layer,
        budget=default_budget(device) if max_bytes is None else max_bytes,
        device=device,
        costs=costs_on(device),
        rules=rules_in_use(),
    )


def check_options(
    caller: str,
    max_bytes: Any = None,
    directions: Any = None,
    by_layer: Any = False,
    **names: Any,
) -> None:
    """Raise `ValueError` for an unknown name or for options that exclude each other."""
    for name, value in names.items():
        allowed = _CHOICES[name]
        if value not in allowed and not (name == "implementation" and value is None):
            raise ValueError(f"{caller}: {name} must be one of {allowed}, got {value!r}.")
    oracle = names.get("implementation") not in (None, "factors")
    if directions is not None and (names.get("outputs") != "full" or oracle):
        raise ValueError(
            f"{caller}: directions go with outputs='full' and implementation='factors'."
        )
    if not isinstance(by_layer, bool):
        raise ValueError(f"{caller}: by_layer must be True or False, got {by_layer!r}.")
    if by_layer and oracle:
        raise ValueError(f"{caller}: by_layer goes with implementation='factors'.")
    if max_bytes is not None and not is_count(max_bytes):
        raise ValueError(f"{caller}: max_bytes must be positive, got {max_bytes}.")
