"""Under `jax.shard_map`: the mesh axes that values vary over."""

from ntt_eqx_kernels.manual_axes import (
    like_varying as like_varying,
    varies as varies,
    varying_alike as varying_alike,
    zeros_of as zeros_of,
)
