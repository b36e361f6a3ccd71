"""Say how the kernel of a model is computed, parameter by parameter, and what that costs."""

import dataclasses
import math
from typing import Any, Literal

import jax
import numpy as np
from jaxtyping import Array, PyTree, Shaped

from ..kernels import GatheredMetric
from ._contract import Outputs
from ._engine import Engine, KernelKind
from ._factors import choose_form
from ._layers import Layer
from ._metric import LayerMetric
from ._support import support_of

Path = Literal["factors", "gathered factors", "tangents", "gathered tangents", "jacobian"]


@dataclasses.dataclass(frozen=True)
class ParameterCost:
    """How one parameter enters the kernel.

    Attributes:
        name: its path in the model; a bias that is folded into its layer is named after it.
        shape: its shape.
        kept: how many of its entries count (all, or those under the mask).
        path: `"factors"` (activations and cotangents of a dense layer), `"tangents"` (per-sample
            derivatives of a layer at many positions), either of them `gathered` at the mask's
            kept entries, or `"jacobian"`: the explicit per-sample Jacobian of this parameter, the
            slow path for large ones.
        flops: floating-point operations of this parameter's part of the contraction; factors
            themselves, which all parameters share, are not counted.
        layer_flops: what the layer itself costs to evaluate once for one sample; 0 for others.
        bytes: what is stored for it between the passes and the contraction, for both batches.
    """

    name: str
    shape: tuple[int, ...]
    kept: int
    path: Path
    flops: int
    layer_flops: int
    bytes: int


@dataclasses.dataclass(frozen=True)
class Explanation:
    """The costs of a kernel between two batches; `print` it for a table.

    Attributes:
        n: samples of the first batch.
        m: samples of the second.
        num_outputs: outputs K of a sample.
        parameters: one entry for each parameter, layers first.
    """

    n: int
    m: int
    num_outputs: int
    parameters: tuple[ParameterCost, ...]

    @property
    def slow(self) -> tuple[ParameterCost, ...]:
        """Matrices and larger that take the explicit Jacobian: what to look at first."""
        return tuple(
            p
            for p in self.parameters
            if p.path == "jacobian" and sum(size > 1 for size in p.shape) > 1
        )

    def __str__(self) -> str:
        """A table with one line a parameter."""
        head = ("parameter", "shape", "kept", "path", "MFLOP", "MB")
        rows = [
            (
                p.name,
                "x".join(map(str, p.shape)) or "scalar",
                f"{p.kept:,}",
                p.path,
                f"{p.flops / 1e6:,.1f}",
                f"{p.bytes / 1e6:,.2f}",
            )
            for p in self.parameters
        ]
        total = (
            "all", "", f"{sum(p.kept for p in self.parameters):,}", "",
            f"{sum(p.flops for p in self.parameters) / 1e6:,.1f}",
            f"{sum(p.bytes for p in self.parameters) / 1e6:,.2f}",
        )  # fmt: skip
        table = [head, *rows, total]
        widths = [max(len(row[c]) for row in table) for c in range(len(head))]
        left = (0, 1, 3)
        lines = [
            "  ".join(
                cell.ljust(w) if c in left else cell.rjust(w)
                for c, (cell, w) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in table
        ]
        lines.insert(1, "-" * len(lines[0]))
        lines.insert(-1, "-" * len(lines[1]))
        lines.insert(0, f"kernel between {self.n} and {self.m} samples, {self.num_outputs} outputs")
        if self.slow:
            names = ", ".join(p.name for p in self.slow)
            lines.append(f"slow path (explicit Jacobian of a matrix): {names}")
        return "\n".join(lines)


def explain(
    model: PyTree,
    x1: Shaped[Array, "n ..."],
    x2: Shaped[Array, "m ..."] | None = None,
    *,
    kernel: KernelKind = "active",
    outputs: Outputs = "full",
) -> Explanation:
    """How `ntk` with these arguments treats each parameter, and the cost; computes no kernel.

    **Arguments:**

    - `model`, `x1`, `x2`, `kernel`, `outputs`: those of `ntk`.

    **Returns:**

    An `Explanation`; `print(explain(model, x))` shows its table, `.slow` the parameters that take
    the slow path.
    """
    engine = Engine(model, x1, kernel, None, support_of(model, kernel), outputs)
    n, m = len(x1), len(x1 if x2 is None else x2)
    k, size = engine.program.num_outputs, engine.program.output_aval.dtype.itemsize
    pairs = k * k if outputs == "full" else k
    found = []
    for layer, metric in zip(engine.layers, engine.metrics, strict=True):
        form = choose_form(layer, metric, k, outputs == "full")
        found.append((layer.weight, _layer_cost(engine, layer, metric, form, n, m, k, pairs, size)))
    for p in engine.rest:
        aval = engine.program.params[p]
        count = math.prod(aval.shape)
        flops = 2 * n * m * pairs * count
        cost = ParameterCost(
            engine.program.paths[p],
            aval.shape,
            count,
            "jacobian",
            flops,
            0,
            (n + m) * k * count * size,
        )
        found.append((p, cost))
    ordered = tuple(cost for _, cost in sorted(found, key=lambda pair: pair[0]))
    return Explanation(n, m, k, ordered)


def _layer_cost(
    engine: Engine,
    layer: Layer,
    metric: LayerMetric,
    form: str,
    n: int,
    m: int,
    k: int,
    pairs: int,
    size: int,
) -> ParameterCost:
    rows, width, s = layer.groups * layer.features, layer.inputs, layer.positions
    name, aval = engine.program.paths[layer.weight], engine.program.params[layer.weight]
    total = kept = rows * width
    gathered = isinstance(metric, GatheredMetric)
    if metric is not None:
        values = metric.values if gathered else metric.values[..., :width]
        kept = int(np.count_nonzero(jax.device_get(values)))
    work = kept if gathered else total
    if layer.bias is not None:
        name += " + " + engine.program.paths[layer.bias]
    stored = (n + m) * s * (k * rows + layer.groups * width)
    if form == "tangents":
        # T of both sides, and their product
        entries = metric.values.size if gathered else total
        entries += 0 if layer.bias is None else rows
        flops = 2 * (n + m) * k * entries * s + 2 * n * m * pairs * entries
        stored = (n + m) * k * entries
    elif s > 1:
        flops = 2 * (n + m) * k * total * s + 2 * n * m * pairs * total
    elif metric is None:
        flops = 2 * n * m * (width + pairs * rows)
    else:
        flops = 2 * n * m * (work + pairs * rows)
    path: Any = ("gathered " if gathered else "") + ("tangents" if s > 1 else "factors")
    once = 2 * total * s
    return ParameterCost(name, aval.shape, kept, path, flops, once, stored * size)
