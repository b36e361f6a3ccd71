"""A vision transformer."""

import math
from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, PRNGKeyArray

from .._checks import check_key
from ._init import glorot_init, linear
from ._shapes import check_image_shape, check_sample


class ViT(eqx.Module):
    """Patches, four pre-norm transformer blocks, the mean over patches, K units.

    Dosovitskiy et al. (2021), without a class token. Glorot-normal weights, biases and positions
    from `N(0, 0.01^2)`. Every dense layer is applied to all tokens by
    `jax.vmap`, so that its kernel is computed from factors like that of any other layer.
    """

    embed: eqx.nn.Linear
    positions: Float[Array, "tokens dim"]
    blocks: "tuple[TransformerBlock, ...]"
    norm: eqx.nn.LayerNorm
    output: eqx.nn.Linear
    patch_size: int = eqx.field(static=True)
    input_shape: tuple[int, int, int] = eqx.field(static=True)

    def __init__(
        self,
        input_shape: Sequence[int] = (3, 32, 32),
        num_classes: int = 10,
        *,
        patch_size: int = 4,
        dim: int = 64,
        depth: int = 4,
        num_heads: int = 4,
        mlp_ratio: int = 2,
        key: PRNGKeyArray,
    ):
        """Build the network.

        **Arguments:**

        - `input_shape`: `(channels, height, width)` of one image.
        - `num_classes`: the number of logits `K`.
        - `patch_size`: the side of a patch; height and width must be multiples of it.
        - `dim`: features of a token, a multiple of `num_heads`.
        - `depth`: the number of transformer blocks.
        - `num_heads`: attention heads of a block.
        - `mlp_ratio`: hidden units of a block's perceptron, in units of `dim`.
        - `key`: the random key of the initialisation.
        """
        check_key("ViT", key)
        self.input_shape = check_image_shape("ViT", input_shape, smallest=patch_size)
        channels, height, width = self.input_shape
        if height % patch_size or width % patch_size or dim % num_heads:
            raise ValueError(
                f"ViT: patches of {patch_size} must divide input_shape {self.input_shape} and "
                f"{num_heads} heads must divide dim {dim}."
            )
        self.patch_size = patch_size
        key1, key2 = jr.split(key)
        blocks = tuple(TransformerBlock(dim, num_heads, mlp_ratio) for _ in range(depth))
        self.embed, self.blocks, self.output = glorot_init(
            (linear(channels * patch_size**2, dim), blocks, linear(dim, num_classes)), key=key1
        )
        tokens = height * width // patch_size**2
        self.positions = 0.01 * jr.normal(key2, (tokens, dim))
        self.norm = eqx.nn.LayerNorm(dim)

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, " classes"]:
        """Logits of one image of shape `input_shape`."""
        check_sample(self, x, self.input_shape)
        (channels, height, width), side = self.input_shape, self.patch_size
        x = x.reshape(channels, height // side, side, width // side, side)
        patches = x.transpose(1, 3, 0, 2, 4).reshape(-1, channels * side**2)
        tokens = jax.vmap(self.embed)(patches) + self.positions
        for block in self.blocks:
            tokens = block(tokens)
        return self.output(jnp.mean(jax.vmap(self.norm)(tokens), axis=0))


class TransformerBlock(eqx.Module):
    """Self-attention and a two-layer perceptron, each behind a LayerNorm and beside a shortcut."""

    norm1: eqx.nn.LayerNorm
    queries_keys_values: eqx.nn.Linear
    project: eqx.nn.Linear
    norm2: eqx.nn.LayerNorm
    expand: eqx.nn.Linear
    contract: eqx.nn.Linear
    num_heads: int = eqx.field(static=True)

    def __init__(self, dim: int, num_heads: int, mlp_ratio: int = 2):
        """Lay out the block for tokens of `dim` features; `ViT` draws its weights."""
        self.norm1 = eqx.nn.LayerNorm(dim)
        self.queries_keys_values = linear(dim, 3 * dim)
        self.project = linear(dim, dim)
        self.norm2 = eqx.nn.LayerNorm(dim)
        self.expand = linear(dim, mlp_ratio * dim)
        self.contract = linear(mlp_ratio * dim, dim)
        self.num_heads = num_heads

    def __call__(self, tokens: Float[Array, "tokens dim"]) -> Float[Array, "tokens dim"]:
        """New tokens of the same shape."""
        tokens = tokens + self.attend(jax.vmap(self.norm1)(tokens))
        h = jax.nn.gelu(jax.vmap(self.expand)(jax.vmap(self.norm2)(tokens)))
        return tokens + jax.vmap(self.contract)(h)

    def attend(self, tokens: Float[Array, "tokens dim"]) -> Float[Array, "tokens dim"]:
        """Multi-head self-attention: `softmax(q k^T / sqrt(size)) v` in each head."""
        length, dim = tokens.shape
        size = dim // self.num_heads
        qkv = jax.vmap(self.queries_keys_values)(tokens)
        q, k, v = qkv.reshape(length, 3, self.num_heads, size).transpose(1, 2, 0, 3)
        attention = jax.nn.softmax(q @ k.swapaxes(1, 2) / math.sqrt(size), axis=-1)
        mixed = (attention @ v).swapaxes(0, 1).reshape(length, dim)
        return jax.vmap(self.project)(mixed)
