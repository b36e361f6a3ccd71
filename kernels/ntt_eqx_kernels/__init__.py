"""The masked NTK products: one folder an operation, one file an implementation."""

from ._bits import (
    MaskBits as MaskBits,
    RankedBits as RankedBits,
    at as at,
    first_above as first_above,
    running as running,
    sum_at as sum_at,
)
from ._blocks import (
    BLOCK_BYTES as BLOCK_BYTES,
    block_size as block_size,
    known_memory as known_memory,
    map_blocks as map_blocks,
    map_rows as map_rows,
    memory_of as memory_of,
    scan_blocks as scan_blocks,
)
from ._dispatch import (
    Choice as Choice,
    Device as Device,
    record_choices as record_choices,
    target_device as target_device,
    use_implementation as use_implementation,
)
from ._gather import (
    GatheredMetric as GatheredMetric,
    GatheredRows as GatheredRows,
    current_each as current_each,
    gather_each as gather_each,
    gather_rows as gather_rows,
    gathered_shape as gathered_shape,
    gathered_tangents as gathered_tangents,
    match_each as match_each,
)
from ._precision import (
    PRECISIONS as PRECISIONS,
    Precision as Precision,
    at_precision as at_precision,
)
from .masked_ntk import (
    masked_ntk as masked_ntk,
    masked_ntk_choice as masked_ntk_choice,
    masked_ntk_diagonal_reference as masked_ntk_diagonal_reference,
    masked_ntk_reference as masked_ntk_reference,
)
from .masked_tangent_ntk import masked_tangent_ntk as masked_tangent_ntk
