"""Effects of pruning: the tangent kernel beside the dense network's, and FLOPs."""

import dataclasses
from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Shaped

from .._checks import check_finite, check_weights
from .._ntk import explain, ntk
from .._ntk._given import given_batch, given_leaves
from .._sparse import SparseModel, count_kept
from .._sparse_layers import masked_layers
from .._types import PyTree
from ._regression import kernel_matrix


@dataclasses.dataclass(frozen=True)
class KernelComparison:
    """The tangent kernel of a sparse network beside that of a dense one, on the same inputs.

    Attributes:
        kernel_distance: mean squared difference of the kernels' entries, all outputs against all.
        kernel_alignment: centred alignment (CKA; Cortes et al., JMLR 2012) of the kernels between
            inputs, summed over the outputs; 1 for kernels that are the same up to scale.
        trace_ratio: the sparse one's trace divided by the dense one's.
        effective_rank: how many directions the sparse one's spectrum fills, the exponential of its
            entropy (Roy & Vetterli, EUSIPCO 2007).
        dense_effective_rank: likewise of the dense one's.
        spectrum: eigenvalues of the sparse one's kernel `[n K]`, falling, float64.
        dense_spectrum: likewise of the dense one's.
    """

    kernel_distance: float
    kernel_alignment: float
    trace_ratio: float
    effective_rank: float
    dense_effective_rank: float
    spectrum: np.ndarray
    dense_spectrum: np.ndarray

    @property
    def numbers(self) -> dict[str, float]:
        """All but the spectra, by name."""
        fields = (field.name for field in dataclasses.fields(self))
        return {name: getattr(self, name) for name in fields if "spectrum" not in name}


@dataclasses.dataclass(frozen=True)
class LayerCost:
    """The operations of a layer for one sample.

    Attributes:
        name: path of its weight.
        weights: number of its weights.
        kept: number that are kept.
        flops: multiply-adds of the dense layer.
        kept_flops: multiply-adds of the kept weights.
    """

    name: str
    weights: int
    kept: int
    flops: int
    kept_flops: int


def compare_kernels(
    sparse: SparseModel, dense: PyTree, x: Shaped[Array | np.ndarray, "n ..."]
) -> KernelComparison:
    """Compare the active kernel of a sparse network with the kernel of a dense one.

    **Arguments:**

    - `sparse`: the sparse network.
    - `dense`: any Equinox model with as many outputs, such as the teacher.
    - `x`: inputs `[n, ...]`; the kernels are `[n K, n K]` matrices of float64, on the host.

    **Returns:**

    A `KernelComparison`.

    **Raises:**

    `ValueError` for inputs that `ntk` does not take, networks with different numbers of outputs,
    and NaN or infinity in the inputs, the weights or a kernel.
    """
    caller = "compare_kernels"
    check_finite(caller, "x", x := given_batch(caller, "x", x))
    found = []
    for name, network in (("sparse", sparse), ("dense", dense)):
        check_weights(caller, given_leaves(caller, name, network), name)
        theta = ntk(eqx.nn.inference_mode(network), x)
        check_finite(caller, f"the kernel of the {name} network", theta)
        found.append(theta)
    if found[0].shape != found[1].shape:
        outputs = [theta.shape[2] for theta in found]
        raise ValueError(
            f"{caller}: both networks must have as many outputs, got {outputs[0]} of the sparse "
            f"and {outputs[1]} of the dense one."
        )
    one, two = (np.asarray(kernel_matrix(theta), np.float64) for theta in found)
    spectrum, dense_spectrum = _spectrum(one), _spectrum(two)
    over_outputs = lambda k: np.einsum("nkmk->nm", k.reshape(2 * (len(x), len(k) // len(x))))
    return KernelComparison(
        kernel_distance=float(np.mean(np.square(one - two))),
        kernel_alignment=_alignment(over_outputs(one), over_outputs(two)),
        trace_ratio=float(spectrum.sum() / dense_spectrum.sum()),
        effective_rank=effective_rank(spectrum),
        dense_effective_rank=effective_rank(dense_spectrum),
        spectrum=spectrum,
        dense_spectrum=dense_spectrum,
    )


def layer_costs(sparse: SparseModel, input_shape: Sequence[int]) -> list[LayerCost]:
    """Multiply-adds of every linear layer with prunable weights, for one sample.

    A weight of a convolution is used at every position of its output, so that the early layers,
    which have few weights, may hold most of the FLOPs. Masks that keep filters whole save them on
    any machine; scattered ones where sparse products are fast. A transposed convolution counts the
    zeros between its inputs, too.

    **Arguments:**

    - `sparse`: the network.
    - `input_shape`: the shape of one sample.

    **Returns:**

    A `LayerCost` for each of these layers, in the order of the model's leaves. Weights that are
    used otherwise than in one linear layer are left out.
    """
    x, costs = jnp.zeros((1, *input_shape)), []
    sparse = masked_layers(sparse)  # layers of kept weights alone count as what they stand for
    # not from densities: float32 has no number for each count from 2^24 on
    counts = jax.device_get(jax.tree.map(count_kept, sparse.mask))
    counts = {jtu.keystr(path): int(kept) for path, kept in jtu.tree_leaves_with_path(counts)}
    for part in explain(eqx.nn.inference_mode(sparse.model), x).parameters:
        name = part.name.split(" + ")[0]  # a bias is named after its weight
        if name not in counts or not part.layer_flops:
            continue
        kept, weights, flops = counts[name], part.kept, part.layer_flops // 2
        costs.append(LayerCost(name.strip("."), weights, kept, flops, flops * kept // weights))
    return costs


def _alignment(one: np.ndarray, two: np.ndarray) -> float:
    """The centred alignment of two kernels `[n, n]`: `<HK₁H, HK₂H> / (‖HK₁H‖ ‖HK₂H‖)`."""
    one, two = (k - k.mean(0) - k.mean(1)[:, None] + k.mean() for k in (one, two))
    norms = float(np.linalg.norm(one) * np.linalg.norm(two))
    return float(np.sum(one * two)) / norms if norms > 0 else 0.0


def effective_rank(spectrum: np.ndarray) -> float:
    """The exponential of the entropy of a spectrum's shares; 0 for a kernel of zeros."""
    shares = spectrum[spectrum > 0] / max(float(spectrum.sum()), 1e-300)
    return float(np.exp(-np.sum(shares * np.log(shares)))) if shares.size else 0.0


def _spectrum(matrix: np.ndarray) -> np.ndarray:
    return np.maximum(np.linalg.eigvalsh((matrix + matrix.T) / 2)[::-1], 0.0)
