"""What users bring: objectives and batches of their own, each in a few lines."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.clusters import examples
from helpers.torch_stand_in import Tensor

import ntt_eqx as ntt

ADAM = optax.adam(1e-2)


def test_regression(getkey):
    x = np.linspace(-1, 1, 64, dtype=np.float32)[:, None]
    data = (x, np.sin(3 * x))

    model = eqx.nn.MLP(1, 1, 32, 2, key=getkey())
    model, rows = ntt.train(model, [data], ADAM, num_steps=300, objective=ntt.SquaredError())
    error = ntt.evaluate(model, data, ntt.SquaredError())["loss"]

    assert error < 0.01 and rows[-1]["train"]["objective"] < 0.02


def test_a_loss_and_metrics_of_ones_own(getkey):
    x = np.linspace(-1, 1, 64, dtype=np.float32)[:, None]
    data = {"input": x, "target": np.abs(x)}

    def huber(model, batch, key):
        error = jax.vmap(model)(batch["input"]) - batch["target"]
        return jnp.mean(optax.huber_loss(error)), {"largest": jnp.max(jnp.abs(error))}

    model = ntt.sparsify(eqx.nn.MLP(1, 1, 32, 2, key=getkey()))
    model, rows = ntt.train(model, [data], ADAM, num_steps=200, objective=huber)
    found = ntt.evaluate(model, data, huber)

    assert set(rows[-1]["train"]) == {"loss", "objective", "largest"}
    assert found["loss"] < 1e-3 and found["largest"] < 0.2


class Reader(eqx.Module):
    """Tokens to tokens: an embedding, a recurrent cell, logits at every position."""

    embed: eqx.nn.Embedding
    cell: eqx.nn.GRUCell
    head: eqx.nn.Linear

    def __init__(self, key):
        one, two, three = jax.random.split(key, 3)
        self.embed = eqx.nn.Embedding(5, 8, key=one)
        self.cell = eqx.nn.GRUCell(8, 24, key=two)
        self.head = eqx.nn.Linear(24, 5, key=three)

    def __call__(self, tokens):
        step = lambda h, e: (self.cell(e, h),) * 2
        _, hidden = jax.lax.scan(step, jnp.zeros(24), jax.vmap(self.embed)(tokens))
        return jax.vmap(self.head)(hidden)


def test_sequence_to_sequence(getkey):
    """The sequence delayed by one, padded with -1 where there is nothing to tell."""
    tokens = np.random.default_rng(0).integers(0, 5, (32, 6)).astype(np.int32)
    target = np.concatenate([np.full((32, 1), -1, np.int32), tokens[:, :-1]], axis=1)

    def next_tokens(model, batch, key):
        tokens, target = batch
        logits = jax.vmap(model)(tokens)
        known = target >= 0
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(target, 0))
        right = jnp.argmax(logits, -1) == target
        return jnp.mean(losses, where=known), {"accuracy": jnp.mean(right, where=known)}

    sparse = ntt.sparsify(Reader(getkey()))
    sparse = sparse.with_mask(ntt.make_mask(ntt.scores.Magnitude()(sparse), 0.7))
    data = tokens, target
    sparse, _ = ntt.train(sparse, [data], optax.adam(3e-2), num_steps=150, objective=next_tokens)

    assert ntt.evaluate(sparse, data, next_tokens)["accuracy"] > 0.9


def test_a_teacher_inside_an_objective_is_not_trained(getkey, sparse):
    class Distil(eqx.Module):
        teacher: eqx.Module

        def __call__(self, model, batch, key):
            soft = jax.nn.softmax(jax.vmap(self.teacher)(batch))
            return optax.softmax_cross_entropy(jax.vmap(model)(batch), soft)

    teacher = eqx.nn.MLP(6, 3, 8, 1, key=getkey())
    x = examples(32)[0]
    options = dict(num_steps=60, objective=Distil(teacher), log_every=20)
    before = jax.device_get(eqx.filter(teacher, eqx.is_array))
    _, rows = ntt.train(sparse, [x], ADAM, **options)

    assert rows[-1]["train"]["loss"] < rows[0]["train"]["loss"]
    assert eqx.tree_equal(before, jax.device_get(eqx.filter(teacher, eqx.is_array)))


def test_an_objective_gets_another_key_at_each_step(sparse, getkey):
    def noisy(model, batch, key):
        logits = jax.vmap(lambda x: model(x, key=key))(batch[0])
        return 0 * jnp.mean(logits) + jax.random.uniform(key)

    step = eqx.filter_jit(ntt.train_step)
    state = ntt.train_init(sparse, ntt.TrainConfig(objective=noisy), ADAM, key=getkey())
    losses = []
    for _ in range(3):
        state, metrics = step(state, examples(4))
        losses.append(float(metrics.objective))
    assert len(set(losses)) == 3


class OnlyDLPack:
    """A tensor of a device or a dtype that numpy has not."""

    def __init__(self, values):
        self._values = jnp.asarray(values)
        self.shape = self._values.shape

    def __array__(self, dtype=None, copy=None):
        raise TypeError("cannot convert to numpy")

    def __dlpack__(self, **options):
        return self._values.__dlpack__(**options)

    def __dlpack_device__(self):
        return self._values.__dlpack_device__()

    def __getitem__(self, index):
        return OnlyDLPack(self._values[index])


@dataclasses.dataclass
class Plain:
    x: np.ndarray
    y: np.ndarray


class Held(eqx.Module):
    x: jax.Array
    y: jax.Array


FORMS = {
    "tuple": lambda x, y: (x, y),
    "list": lambda x, y: [x, y],
    "dict": lambda x, y: {"x": x, "y": y},
    "dataclass": Plain,
    "module": Held,
    "tensors": lambda x, y: [Tensor(x), Tensor(y.astype(np.int64))],
    "dlpack": lambda x, y: {"x": OnlyDLPack(x), "y": OnlyDLPack(y)},
    "bytes as labels": lambda x, y: (x, y.astype(np.uint8)),
}


@pytest.mark.parametrize("form", FORMS)
def test_batches_of_any_form(form, sparse):
    made = FORMS[form]
    stream = [made(*examples(16, seed)) for seed in range(4)]
    trained, rows = ntt.train(sparse, stream, ADAM, num_steps=4, test_set=made(*examples(20, 9)))
    expected, same = ntt.train(sparse, [examples(16, seed) for seed in range(4)], ADAM, num_steps=4,
                               test_set=examples(20, 9))  # fmt: skip
    assert eqx.tree_equal(trained, expected) and rows == same


def test_floats_as_labels_of_ones_own_loss(sparse):
    x, y = examples(16)
    batch = Plain(x, y.astype(np.float32))
    own = lambda model, batch, key: jnp.mean((jax.vmap(model)(batch.x)[:, 0] - batch.y) ** 2)
    _, rows = ntt.train(sparse, [batch], ADAM, num_steps=50, objective=own, log_every=25)
    assert rows[-1]["train"]["loss"] < rows[0]["train"]["loss"]
