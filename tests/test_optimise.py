"""Any optax transformation makes a step: what it is handed, what it keeps, what its rate is."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ntt_eqx._diagnosis import check_first_update
from ntt_eqx._optimise import init_optimizer, learning_rate, optimise

TARGET = jnp.asarray([1.0, -2.0, 3.0])


def loss(params):
    return jnp.sum(jnp.square(params["w"] - TARGET))


def weight_average(decay):
    """An average of the weights beside them, as users write one."""

    def update(updates, state, params=None):
        after = optax.apply_updates(params, updates)
        return updates, optax.incremental_update(after, state, 1 - decay)

    return optax.GradientTransformation(lambda params: params, update)


schedule = optax.cosine_decay_schedule(0.3, 100)
OPTIMISERS = {
    "sgd": optax.sgd(0.1),
    "schedule": optax.adam(schedule),
    "injected": optax.inject_hyperparams(optax.adam)(0.1),
    "injected schedule": optax.inject_hyperparams(optax.adam)(schedule),
    "chain": optax.chain(optax.clip_by_global_norm(1.0), optax.ema(0.9), optax.sgd(0.3)),
    "weights averaged": optax.chain(optax.adam(0.1), weight_average(0.9)),
    "plateau": optax.chain(optax.adam(0.1), optax.contrib.reduce_on_plateau(patience=20)),
    "partition": optax.partition(
        {"all": optax.inject_hyperparams(optax.sgd)(0.1), "none": optax.sgd(0.5)},
        lambda params: jax.tree.map(lambda _: "all", params),
    ),
    "polyak": optax.polyak_sgd(1.0),
    "line search": optax.lbfgs(),
}


@pytest.mark.parametrize("name", OPTIMISERS)
def test_any_transformation_finds_the_minimum_and_compiles_once(name):
    optimizer, traces = OPTIMISERS[name], []
    params = {"w": jnp.zeros(3), "fixed": None}

    @jax.jit
    def step(params, opt_state):
        traces.append(1)
        value, gradient = jax.value_and_grad(loss)(params)
        return optimise(optimizer, gradient, opt_state, params, value=value, value_fn=loss)

    opt_state = init_optimizer("train_init", optimizer, params)
    for _ in range(150):
        params, opt_state = step(params, opt_state)
    np.testing.assert_allclose(params["w"], TARGET, atol=0.1)
    assert params["fixed"] is None
    assert len(traces) == 1


def test_dtypes_of_weights_and_of_the_state_stay():
    optimizer = optax.chain(optax.adam(0.1), optax.contrib.reduce_on_plateau(patience=2))
    params = {"w": jnp.zeros(3, jnp.bfloat16)}
    opt_state = init_optimizer("train_init", optimizer, params)
    gradient = {"w": jnp.ones(3, jnp.bfloat16)}
    after, state = optimise(optimizer, gradient, opt_state, params, value=jnp.float32(1.0))
    kinds = lambda tree: [(leaf.dtype, leaf.shape) for leaf in jax.tree.leaves(tree)]
    assert kinds(after) == kinds(params) and kinds(state) == kinds(opt_state)


def test_a_plateau_sees_the_loss():
    """Half the rate after two values that are no better, and not before."""
    optimizer = optax.contrib.reduce_on_plateau(factor=0.5, patience=2)
    params = {"w": jnp.zeros(3)}
    state = optimizer.init(params)
    scales = []
    for value in (3.0, 2.0, 2.0, 2.0):
        _, state = optimise(optimizer, params, state, params, value=jnp.float32(value))
        scales.append(float(state.scale))
    assert scales == [1.0, 1.0, 1.0, 0.5]


@pytest.mark.parametrize(
    ("name", "rate"),
    [("injected", 0.1), ("injected schedule", 0.3), ("partition", 0.1), ("sgd", None)],
)
def test_the_learning_rate_is_read_where_one_is_kept(name, rate):
    state = init_optimizer("ntt_init", OPTIMISERS[name], {"w": jnp.zeros(3)})
    found = learning_rate(state)
    assert found is rate or found.dtype == jnp.float32
    assert found is rate or float(found) == pytest.approx(rate, rel=1e-6)


def test_two_learning_rates_are_none():
    sgd = optax.inject_hyperparams(optax.sgd)
    both = optax.partition({"a": sgd(0.1), "b": sgd(0.2)}, {"v": "a", "w": "b"})
    assert learning_rate(both.init({"v": jnp.zeros(2), "w": jnp.zeros(3)})) is None


def test_a_first_step_that_spoils_the_weights_is_named():
    model = eqx.nn.Linear(2, 2, key=jax.random.key(0))
    none = lambda: None
    check_first_update("train", {"model": model}, none)
    broken = eqx.tree_at(lambda m: m.bias, model, jnp.asarray([0.0, jnp.inf]))
    with pytest.raises(ValueError, match=r"^train: .*first step made \['model'\]\.bias NaN"):
        check_first_update("train", {"model": broken}, none)


def test_complex_parameters_go_down():
    """Without the conjugate, imaginary parts go up."""
    goal = jnp.asarray([1.0 + 2.0j, -0.5j], jnp.complex64)
    optimizer, params = optax.adam(0.1), jnp.zeros(2, jnp.complex64)
    state = init_optimizer("test", optimizer, params)

    @jax.jit
    def step(params, state):
        loss = lambda w: jnp.sum(jnp.abs(w - goal) ** 2)
        value, gradient = jax.value_and_grad(loss)(params)
        return optimise(optimizer, gradient, state, params, value=value)

    for _ in range(200):
        params, state = step(params, state)
    assert jnp.allclose(params, goal, atol=1e-2)
