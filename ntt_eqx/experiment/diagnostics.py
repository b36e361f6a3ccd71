"""What pruning does to a network: its tangent kernel against the dense one's, and its FLOPs."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from .. import SparseModel, explain, kernel_matrix, ntk


class KernelComparison(NamedTuple):
    """The tangent kernel of a sparse network beside that of a dense one, on the same inputs."""

    # `kernel_distance`, the mean squared difference of the kernels' entries, all outputs against
    # all; `kernel_alignment`, the centred alignment (CKA; Cortes et al., JMLR 2012) of the kernels
    # between inputs, summed over the outputs, 1 for kernels that are the same up to scale;
    # `trace_ratio`, the sparse one's trace divided by the dense one's; `effective_rank` and
    # `dense_effective_rank`, the exponential of the spectrum's entropy (Roy & Vetterli, 2007)
    numbers: dict[str, float]
    spectrum: np.ndarray  # eigenvalues of the sparse network's kernel, falling
    dense_spectrum: np.ndarray  # likewise of the dense one's


@dataclasses.dataclass(frozen=True)
class LayerCost:
    """What a layer costs for one sample."""

    name: str  # path of its weight
    weights: int  # number of its weights
    kept: int  # number that are kept
    flops: int  # multiply-adds of the dense layer
    kept_flops: int  # multiply-adds of the kept weights


def compare_kernels(
    sparse: SparseModel, dense: PyTree, x: Float[Array, "n ..."]
) -> KernelComparison:
    """Compare the active kernel of `sparse` with the kernel of `dense` on the inputs `x`."""
    found = [ntk(network, x) for network in eqx.nn.inference_mode((sparse, dense))]
    one, two = (np.asarray(kernel_matrix(theta), np.float64) for theta in found)
    spectrum, dense_spectrum = _spectrum(one), _spectrum(two)
    over_outputs = lambda k: np.einsum("nkmk->nm", k.reshape(2 * (len(x), len(k) // len(x))))
    numbers = {
        "kernel_distance": np.mean(np.square(one - two)),
        "kernel_alignment": alignment(over_outputs(one), over_outputs(two)),
        "trace_ratio": spectrum.sum() / dense_spectrum.sum(),
        "effective_rank": effective_rank(spectrum),
        "dense_effective_rank": effective_rank(dense_spectrum),
    }
    numbers = {name: float(value) for name, value in numbers.items()}
    return KernelComparison(numbers, spectrum, dense_spectrum)


def alignment(one: np.ndarray, two: np.ndarray) -> float:
    """Centred kernel alignment of two kernels `[n, n]`: `<HK₁H, HK₂H> / (‖HK₁H‖ ‖HK₂H‖)`."""
    one, two = (k - k.mean(0) - k.mean(1)[:, None] + k.mean() for k in (one, two))
    norms = float(np.linalg.norm(one) * np.linalg.norm(two))
    return float(np.sum(one * two)) / norms if norms > 0 else 0.0


def effective_rank(spectrum: np.ndarray) -> float:
    """How many directions a spectrum fills: the exponential of its entropy."""
    shares = spectrum[spectrum > 0] / max(float(spectrum.sum()), 1e-300)
    return float(np.exp(-np.sum(shares * np.log(shares)))) if shares.size else 0.0


def layer_costs(sparse: SparseModel, input_shape: Sequence[int]) -> list[LayerCost]:
    """Multiply-adds of every linear layer with prunable weights, for one sample.

    A weight of a convolution is used at every position of its output, so that the early layers,
    which have few weights, may hold most of the FLOPs. Masks that keep filters whole save them on
    any machine; scattered ones where sparse products are fast.
    """
    x = jnp.zeros((1, *input_shape))
    shares, costs = jax.device_get(sparse.densities()), []
    for part in explain(eqx.nn.inference_mode(sparse.model), x).parameters:
        name = part.name.split(" + ")[0]  # a bias is named after its weight
        if name not in shares or not part.layer_flops:
            continue  # not prunable, or used otherwise than as the weight of one linear layer
        weights, flops = part.kept, part.layer_flops // 2
        kept = round(float(shares[name]) * weights)
        costs.append(LayerCost(name.strip("."), weights, kept, flops, flops * kept // weights))
    return costs


def _spectrum(matrix: np.ndarray) -> np.ndarray:
    return np.maximum(np.linalg.eigvalsh((matrix + matrix.T) / 2)[::-1], 0.0)
