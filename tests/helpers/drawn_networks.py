"""Networks that nobody drew by hand, with masks that leave rows and columns empty."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import ntt_eqx as ntt

ACTIVATIONS = (jax.nn.relu, jnp.tanh, jax.nn.gelu, jax.nn.sigmoid)
IMAGE = (2, 6, 6)


class Chain(eqx.Module):
    """Layers one after the other."""

    layers: list

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


class Residual(eqx.Module):
    """A branch beside a shortcut."""

    branch: eqx.Module

    def __call__(self, x):
        return x + self.branch(x)


class Joined(eqx.Module):
    """Two branches, one behind the other along the first axis."""

    one: eqx.Module
    two: eqx.Module

    def __call__(self, x):
        return jnp.concatenate([self.one(x), self.two(x)])


class Gated(eqx.Module):
    """One branch times the other."""

    one: eqx.Module
    two: eqx.Module

    def __call__(self, x):
        return self.one(x) * jax.nn.sigmoid(self.two(x))


class Wider(eqx.Module):
    """Channels of zeros after those that there are."""

    by: int = eqx.field(static=True)

    def __call__(self, x):
        return jnp.pad(x, [(0, self.by)] + [(0, 0)] * (x.ndim - 1))


def image_piece(rng, channels):
    kind = rng.choice(["conv", "depthwise", "grouped", "residual", "join", "gate", "norm", "pool",
                       "prelu", "wider", "act"])  # fmt: skip
    options = {"padding": int(rng.integers(2)), "use_bias": bool(rng.integers(2))}
    conv = lambda i, o, **more: shaped(eqx.nn.Conv2d, i, o, 3, **options, **more)
    same = lambda i, o: shaped(eqx.nn.Conv2d, i, o, 3, padding="SAME")
    wide = int(rng.integers(2, 7))
    if kind == "conv":
        return conv(channels, wide), wide
    if kind == "depthwise":
        return conv(channels, channels, groups=channels), channels
    if kind == "grouped":
        return (conv(channels, 4, groups=2), 4) if channels % 2 == 0 else (same(channels, 4), 4)
    if kind == "residual":
        return Residual(same(channels, channels)), channels
    if kind == "join":
        return Joined(same(channels, wide), same(channels, 3)), wide + 3
    if kind == "gate":
        return Gated(same(channels, wide), same(channels, wide)), wide
    if kind == "norm":
        groups = int(rng.choice([1, channels]))
        return shaped(eqx.nn.GroupNorm, groups, channels), channels
    if kind == "pool":
        pool = eqx.nn.MaxPool2d if rng.integers(2) else eqx.nn.AvgPool2d
        return pool(2, 1), channels
    if kind == "prelu":
        return shaped(eqx.nn.PReLU, 0.3), channels
    if kind == "wider":
        return Wider(2), channels + 2
    return activation(rng), channels


def flat_piece(rng, width):
    kind = rng.choice(["linear", "residual", "join", "gate", "norm", "wider", "act"])
    linear = lambda i, o: shaped(eqx.nn.Linear, i, o, use_bias=bool(rng.integers(4)))
    wide = int(rng.integers(2, 9))
    if kind == "linear":
        return linear(width, wide), wide
    if kind == "residual":
        branch = [linear(width, wide), activation(rng), linear(wide, width)]
        return Residual(Chain(branch)), width
    if kind == "join":
        return Joined(linear(width, wide), linear(width, 3)), wide + 3
    if kind == "gate":
        return Gated(linear(width, wide), linear(width, wide)), wide
    if kind == "norm":
        return shaped(eqx.nn.LayerNorm, width), width
    if kind == "wider":
        return Wider(1 + int(rng.integers(2))), None
    return activation(rng), width


def draw(seed):
    """A sparse network in float64 and inputs `[5, ...]`."""
    rng = np.random.default_rng(seed)
    layers, shape = [], (int(rng.integers(2, 9)),)
    if rng.integers(2):
        shape, channels = IMAGE, IMAGE[0]
        for _ in range(int(rng.integers(1, 5))):
            piece, channels = image_piece(rng, channels)
            layers += [piece, activation(rng)]
            if output(layers, shape)[1] <= 3:
                break
        layers.append(eqx.nn.Lambda(jnp.ravel if rng.integers(2) else over_positions))
    for _ in range(int(rng.integers(1, 5))):
        layers.append(flat_piece(rng, width_of(layers, shape))[0])
    layers += [activation(rng), shaped(eqx.nn.Linear, width_of(layers, shape), 3)]
    model = Chain(layers)
    fill = lambda leaf: (
        jnp.asarray(rng.normal(size=leaf.shape)) if isinstance(leaf, jax.ShapeDtypeStruct) else leaf
    )
    model = jax.tree.map(fill, model)
    sparse = ntt.sparsify(model)
    density = float(rng.choice([0.15, 0.4, 0.8]))
    sparse = sparse.with_mask(jax.tree.map(lambda m: drawn_mask(rng, m, density), sparse.mask))
    return sparse, jnp.asarray(rng.normal(size=(5, *shape)))


def drawn_mask(rng, mask, density):
    kept = rng.random(mask.shape) < density
    kept[rng.random(mask.shape[0]) < 0.25] = False
    kept[:, rng.random(mask.shape[1]) < 0.25] = False
    return jnp.asarray(kept)


def width_of(layers, shape):
    return output(layers, shape)[0]


def output(layers, shape):
    sample = jax.ShapeDtypeStruct(shape, jnp.float64)
    return eqx.filter_eval_shape(lambda m, x: m(x), Chain(layers), sample).shape


def over_positions(x):
    return jnp.mean(x, axis=(1, 2))


def activation(rng):
    return eqx.nn.Lambda(ACTIVATIONS[int(rng.integers(len(ACTIVATIONS)))])


def shaped(layer, *arguments, **options):
    """A layer that has shapes only."""
    if layer in (eqx.nn.Conv2d, eqx.nn.Linear):
        options["key"] = jax.random.key(0)
    return eqx.filter_eval_shape(layer, *arguments, **options)
