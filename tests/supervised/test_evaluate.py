"""Every sample counts once, whatever the batches; standardising belongs to the data."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.clusters import examples

from ntt_eqx import SquaredError, evaluate
from ntt_eqx.data import Split, as_batch


@pytest.mark.parametrize("count", [1, 7, 20, 21])
def test_evaluation_counts_every_sample_once(count, sparse):
    x, y = examples(count, 5)
    logits = np.asarray(jax.vmap(eqx.nn.inference_mode(sparse.to_dense()))(jnp.asarray(x)), float)
    chance = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    expected = {
        "loss": -np.log(chance[np.arange(count), y]).mean(),
        "accuracy": (logits.argmax(1) == y).mean(),
    }
    assert evaluate(sparse, (x, y), batch_size=7) == pytest.approx(expected, rel=1e-5)
    found = evaluate(sparse, (jnp.asarray(x), jnp.asarray(y)))
    assert found == pytest.approx(expected, rel=1e-5)
    assert found["accuracy"] == expected["accuracy"]
    stream = ((x[i : i + 4], y[i : i + 4]) for i in range(0, count, 4))  # the last one is short
    assert evaluate(sparse, stream) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_split_of_pixels_standardised_by_its_channels(channels, getkey):
    """A mean and a deviation per channel ended in an error of broadcasting."""
    draw = np.random.default_rng(3)
    pixels = draw.integers(0, 256, size=(11, channels, 2, 3)).astype(np.uint8)
    split = Split(pixels, (np.arange(11) % 3).astype(np.int32))
    mean, std = draw.uniform(0.2, 0.8, (2, channels))
    model = eqx.nn.Sequential(
        [eqx.nn.Lambda(jnp.ravel), eqx.nn.Linear(6 * channels, 3, key=getkey())]
    )
    by_hand = (pixels / 255 - mean[:, None, None]) / std[:, None, None]
    expected = evaluate(model, (by_hand.astype(np.float32), split.y))
    found = evaluate(model, as_batch(split, mean=mean.tolist(), std=std.tolist()), batch_size=4)
    assert found == pytest.approx(expected, rel=1e-5)


def test_takes_what_has_x_and_y(sparse):
    x, y = examples(5)
    data = type("Split", (), {"x": x, "y": y})()
    assert evaluate(sparse, data) == evaluate(sparse, (x, y)) == evaluate(sparse, {"x": x, "y": y})


def test_a_model_is_judged_by_any_objective(sparse):
    x, y = examples(9)

    def squared(model, batch, key):
        """One value per sample, and a mean: both count by samples."""
        out = jax.vmap(model)(batch[0])
        return jnp.sum(out**2, axis=1), {"mean output": jnp.mean(out)}

    found = evaluate(sparse, (x, y), squared, batch_size=4)
    out = np.asarray(jax.vmap(eqx.nn.inference_mode(sparse))(jnp.asarray(x)))
    assert found["loss"] == pytest.approx((out**2).sum(1).mean(), rel=1e-5)
    assert found["mean output"] == pytest.approx(out.mean(), rel=1e-5)


X, Y = examples(4)


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        ((X, Y[:2]), {}, "evaluate: all arrays of a batch must have its samples on their first"),
        ((X[:0], Y[:0]), {}, "at least one sample"),
        (((X * 9).astype(np.uint8), Y), {}, "standardise it first"),
        ((X, Y), {"batch_size": 0}, "batch_size must be an integer of at least 1"),
        ((X, Y), {"objective": SquaredError()}, r"have the shape \(4, 3\).*got int32 of shape"),
        ((X, X[:, :1]), {"objective": SquaredError()}, r"got float32 of shape \(4, 1\)"),
        ((X, Y), {"objective": lambda *_: jnp.ones(3)}, r"loss must be.*float32 of shape \(3,\)"),
        ((X, Y), {"objective": lambda *_: (jnp.float32(0), 1)}, "a mapping of metrics"),
        ((X, Y), {"objective": lambda *_: jnp.int32(0)}, "loss must be a real scalar or one value"),
    ],
)
def test_bad_evaluations_are_refused(data, options, message, sparse):
    with pytest.raises(ValueError, match=message):
        evaluate(sparse, data, **options)
