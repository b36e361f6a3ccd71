"""The masked NTK products: what the package `ntt_eqx_kernels` offers, under the name to use."""

import pathlib
import sys

# An install has that package beside this one, a checkout has it in its folder `kernels/`. A
# checkout takes its own, even if its root alone is on the path or another version is installed.
_FOLDER = pathlib.Path(__file__).parents[2] / "kernels"
if (_FOLDER / "ntt_eqx_kernels").is_dir() and str(_FOLDER) not in sys.path:
    sys.path.insert(0, str(_FOLDER))

from ntt_eqx_kernels import (  # noqa: E402
    BLOCK_BYTES as BLOCK_BYTES,
    PRECISIONS as PRECISIONS,
    Choice as Choice,
    Device as Device,
    GatheredMetric as GatheredMetric,
    GatheredRows as GatheredRows,
    MaskBits as MaskBits,
    Precision as Precision,
    RankedBits as RankedBits,
    at as at,
    at_precision as at_precision,
    block_size as block_size,
    current_each as current_each,
    first_above as first_above,
    gather_each as gather_each,
    gather_rows as gather_rows,
    gathered_shape as gathered_shape,
    gathered_tangents as gathered_tangents,
    known_memory as known_memory,
    map_blocks as map_blocks,
    map_rows as map_rows,
    masked_ntk as masked_ntk,
    masked_ntk_choice as masked_ntk_choice,
    masked_ntk_diagonal_reference as masked_ntk_diagonal_reference,
    masked_ntk_reference as masked_ntk_reference,
    masked_tangent_ntk as masked_tangent_ntk,
    match_each as match_each,
    memory_of as memory_of,
    record_choices as record_choices,
    running as running,
    scan_blocks as scan_blocks,
    sum_at as sum_at,
    target_device as target_device,
    use_implementation as use_implementation,
)
