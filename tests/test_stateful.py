"""State is no parameter, and models with a state go through everything that models go through."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
from helpers.tiers import slow

import ntt_eqx as ntt
from ntt_eqx._parameters import parameters
from ntt_eqx._stateful import in_training_mode, state_of

CLASSES = 3


class Net(eqx.Module):
    """A convolution, batch norm and two dense layers, the first under spectral norm."""

    conv: eqx.nn.Conv2d
    norm: eqx.nn.BatchNorm
    hidden: eqx.nn.SpectralNorm
    dropout: eqx.nn.Dropout
    head: eqx.nn.Linear

    def __init__(self, key, mode="batch", momentum=0.9):
        keys = jr.split(key, 4)
        self.conv = eqx.nn.Conv2d(2, 4, 3, key=keys[0])
        self.norm = eqx.nn.BatchNorm(4, "batch", momentum=momentum, mode=mode)
        dense = eqx.nn.Linear(4, 6, key=keys[1])
        self.hidden = eqx.nn.SpectralNorm(dense, "weight", key=keys[2])
        self.dropout = eqx.nn.Dropout(0.5)
        self.head = eqx.nn.Linear(6, CLASSES, key=keys[3])

    def __call__(self, x, state, *, key=None):
        h, state = self.norm(self.conv(x), state)
        h, state = self.hidden(jnp.mean(jax.nn.relu(h), axis=(1, 2)), state)
        return self.head(self.dropout(jax.nn.relu(h), key=key)), state


class Held(eqx.Module):
    """A model that holds its state itself, as a module of one sample."""

    net: Net
    state: eqx.nn.State

    def __call__(self, x):
        state = jax.tree.map(lambda leaf: leaf, self.state)
        with jax.numpy_dtype_promotion("standard"):
            return eqx.nn.inference_mode(self.net)(x, state)[0]


def build(key, **options):
    return ntt.StatefulModel(*eqx.nn.make_with_state(Net)(key, **options))


@pytest.fixture
def x(getkey):
    return 2 + 3 * jr.normal(getkey(), (6, 2, 5, 5))


@pytest.fixture
def examples(x):
    return x, jnp.arange(6) % CLASSES


def arrays(state):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(state)]


def same(one, two):
    return all(np.array_equal(a, b) for a, b in zip(arrays(one), arrays(two), strict=True))


def test_state_is_no_parameter_wherever_a_model_holds_it(getkey):
    with_indices = Net(getkey())  # before make_with_state its indices hold the initial values
    net, state = eqx.nn.make_with_state(Net)(getkey())
    for model in (with_indices, Held(net, state), ntt.StatefulModel(net, state)):
        shapes = sorted(leaf.shape for leaf in jax.tree.leaves(parameters(model)))
        weights = [(4, 2, 3, 3), (4, 1, 1), (4,), (4,), (6, 4), (6,), (CLASSES, 6), (CLASSES,)]
        assert shapes == sorted(weights)
        chosen = ntt.describe_prunable(model, where=lambda path, owner, leaf: True)
        assert len(chosen.pruned) == len(weights) and not chosen.left_out and not chosen.kept


@pytest.mark.parametrize("kernel", ["active", slow("ambient")])
@pytest.mark.parametrize("implementation", [None, "jacobian", slow("ntk_vector_products")])
def test_the_kernel_sums_over_parameters_alone(kernel, implementation, getkey, x, x64):
    with jax.enable_x64(True):
        net, state = eqx.nn.make_with_state(Net)(getkey())
        wide = lambda a: a.astype(jnp.float64) if eqx.is_inexact_array(a) else a
        net, state, x = jax.tree.map(wide, (net, state, x))
        model = ntt.warm_up(ntt.StatefulModel(net, state), x)
        sparse = ntt.prune(model, ntt.scores.Magnitude(), 0.5)
        theta = ntt.ntk(sparse, x[:3], x[3:], kernel=kernel, implementation=implementation)
        dense, masks = sparse.to_dense(), jax.tree.leaves(sparse.masks, is_leaf=lambda m: m is None)
        trained, rest = eqx.partition(dense.model, eqx.is_inexact_array)

        def call(trained, sample):  # by hand: the state is a constant
            fixed = jax.tree.map(jax.lax.stop_gradient, dense.state)
            with jax.numpy_dtype_promotion("standard"):
                return eqx.nn.inference_mode(eqx.combine(trained, rest))(sample, fixed)[0]

        jacobian = lambda x: jax.tree.leaves(jax.vmap(jax.jacrev(call), (None, 0))(trained, x))
        marks = jax.tree.leaves(sparse.mask.model, is_leaf=lambda m: m is None)
        marks = [
            m
            for m, a in zip(marks, jax.tree.leaves(net, is_leaf=lambda a: a is None), strict=True)
            if eqx.is_inexact_array(a)
        ]
        assert len(masks) > len(marks)
        expected = 0.0
        for a, b, m in zip(jacobian(x[:3]), jacobian(x[3:]), marks, strict=True):
            a = a if m is None or kernel == "ambient" else a * m.astype(a.dtype)[None, None]
            flat = lambda j: j.reshape(*j.shape[:2], -1)
            expected = expected + jnp.einsum("nkp,mlp->nmkl", flat(a), flat(b))
        np.testing.assert_allclose(theta, expected, rtol=1e-12, atol=1e-12)


def test_a_module_that_holds_its_state_has_the_kernel_of_its_parameters(getkey, x):
    model = ntt.warm_up(build(getkey()), x)
    held = Held(model.model, model.state)
    np.testing.assert_allclose(ntt.ntk(held, x), ntt.ntk(model, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("optimizer", [optax.adamw(0.05), optax.sgd(0.5, 0.9)])
def test_no_optimiser_moves_a_state(optimizer, getkey, examples):
    model = ntt.warm_up(build(getkey()), examples[0])
    held = Held(model.model, model.state)  # its statistics are fixed, for nothing advances them
    trained, rows = ntt.train(held, [examples] * 40, optimizer, num_steps=40)
    assert same(trained.state, held.state) and np.isfinite(rows[-1]["train"]["loss"])


@pytest.mark.parametrize("mode", ["batch", "ema"])
def test_warm_statistics_are_those_of_the_batch(mode, getkey, x):
    model = build(getkey(), mode=mode)
    warm = ntt.warm_up(model, x)
    trained, after = ntt.forward(in_training_mode(model, None), x)
    plain = warm.model.norm
    mean, var = warm.state.get(plain.ema_state_index if mode == "ema" else plain.batch_state_index)
    h = jax.vmap(model.model.conv)(x)
    np.testing.assert_allclose(mean, jnp.mean(h, axis=(0, 2, 3)), rtol=1e-5)
    np.testing.assert_allclose(var, jnp.var(h, axis=(0, 2, 3)), rtol=1e-5)
    # with them the network in inference mode is the network in training mode on this batch
    spectral = lambda m: m.state.get(model.model.hidden.uv_index)
    assert not same(spectral(after), spectral(model))
    np.testing.assert_allclose(jax.vmap(warm)(x), trained, rtol=1e-4, atol=1e-5)


def test_several_batches_are_averaged_and_momentum_comes_back(getkey, x):
    model = build(getkey())
    warm = ntt.warm_up(model, [x[:3], x[3:]])
    stats = lambda m: m.state.get(m.model.norm.batch_state_index)
    parts = [stats(ntt.warm_up(model, part)) for part in (x[:3], x[3:])]
    for found, *each in zip(stats(warm), *parts, strict=True):
        np.testing.assert_allclose(found, sum(each) / 2, rtol=1e-6)
    assert warm.model.norm.momentum == 0.9 and not warm.model.norm.inference
    assert eqx.tree_equal(warm.model, model.model)
    _, after = ntt.forward(in_training_mode(warm, None), x)
    batch = stats(ntt.warm_up(model, x))
    for now, before, new in zip(stats(after), stats(warm), batch, strict=True):
        np.testing.assert_allclose(now, 0.9 * before + 0.1 * new, rtol=1e-5)


def test_a_sparse_model_is_warmed_up_under_its_mask(getkey, x):
    sparse = ntt.prune(build(getkey()), ntt.scores.Magnitude(), 0.3)
    warm = ntt.warm_up(sparse, x)
    dense = ntt.warm_up(sparse.to_dense(), x)
    assert same(state_of(warm), dense.state)
    assert eqx.tree_equal(warm.model.model, sparse.model.model)  # pruned weights stay under it


COLD = {
    "ntk": lambda m, x, y: ntt.ntk(m, x),
    "Snip": lambda m, x, y: ntt.prune(m, ntt.scores.Snip(), 0.5, (x, y)),
    "LogitSnip": lambda m, x, y: ntt.prune(m, ntt.scores.LogitSnip(), 0.5, x),
    "Wanda": lambda m, x, y: ntt.prune(m, ntt.scores.Wanda(), 0.5, x),
    "ntt_init": lambda m, x, y: ntt.ntt_init(m, ntt.NTTConfig(0.5, num_steps=1), optax.sgd(0.1)),
}


@pytest.mark.parametrize("mode", ["batch", "ema"])
@pytest.mark.parametrize("name", COLD)
def test_statistics_that_saw_no_batch_are_refused(name, mode, getkey, examples):
    with pytest.raises(ValueError, match=f"^{name}: the running statistics of norm.*warm_up"):
        COLD[name](build(getkey(), mode=mode), *examples)


def test_scores_that_look_at_no_statistics_take_a_new_network(getkey, x):
    weights_alone = (ntt.scores.Magnitude(), ntt.scores.SynFlow(), ntt.scores.Random(getkey()))
    for score in (*weights_alone, ntt.scores.NTKSAP(jr.key(0))):
        assert ntt.prune(build(getkey()), score, 0.5, x).density() < 0.52


@pytest.mark.parametrize("score", [ntt.scores.Snip(), ntt.scores.GraSP()])
def test_scores_have_none_for_the_state(score, getkey, examples):
    model = ntt.warm_up(build(getkey()), examples[0])
    scores = score(model, examples)
    assert jax.tree.leaves(scores.state) == []
    assert len(jax.tree.leaves(scores)) == 3


class TestTransfer:
    def start(self, getkey, x, **settings):
        config = ntt.NTTConfig(density=0.4, num_steps=4, mask_every=2, **settings)
        return ntt.ntt_init(build(getkey()), config, optax.adam(1e-2), x=x)

    def test_the_students_statistics_follow_its_weights_and_the_teachers_stay(self, getkey, x):
        state = self.start(getkey, x)
        assert same(state_of(state.teacher), state_of(state.student))  # both are those of `x`
        after, rows = ntt.transfer(state, [x] * 4, num_steps=4)
        assert same(state_of(after.teacher), state_of(state.teacher))
        assert not same(state_of(after.student), state_of(state.student))
        assert np.isfinite(rows[-1]["train"]["loss"])

    def test_the_loss_is_that_of_the_advanced_student(self, getkey, x):
        state = self.start(getkey, x)
        _, metrics = eqx.filter_jit(ntt.ntt_step)(state, x)
        dense = state.student.to_dense()
        _, after = ntt.forward(in_training_mode(dense, None), x)
        student = eqx.tree_at(lambda s: s.model.state, state.student, after.state)
        loss, _ = ntt.ntt_loss(student, state.teacher, x, state.method)
        np.testing.assert_allclose(metrics.loss, loss, rtol=1e-4)

    def test_a_run_that_was_cut_gives_the_same_bits(self, getkey, x, tmp_path):
        state = self.start(getkey, x)
        whole, _ = ntt.transfer(state, [x, -x, x, -x], num_steps=4)
        half, _ = ntt.transfer(state, [x, -x], num_steps=2)
        eqx.tree_serialise_leaves(tmp_path / "state", half)
        half = eqx.tree_deserialise_leaves(tmp_path / "state", state)
        rest, _ = ntt.transfer(half, [x, -x], num_steps=4)
        assert same(whole, rest)


class TestTraining:
    def train(self, model, examples, steps=30, **settings):
        optimizer = optax.sgd(0.05, momentum=0.9)
        return ntt.train(model, [examples] * steps, optimizer, num_steps=steps, **settings)

    @pytest.mark.parametrize("mode", ["batch", "ema"])
    @pytest.mark.parametrize("pruned", [False, True])
    def test_training_is_the_loop_that_equinox_shows(self, mode, pruned, getkey, examples):
        x, y = examples
        model = ntt.warm_up(build(getkey(), mode=mode), x)
        start = ntt.prune(model, ntt.scores.Magnitude(), 0.5) if pruned else model
        found, _ = self.train(start, examples, steps=3, l2_weight=0.0)

        sparse = ntt.sparsify(start)
        params, static = eqx.partition(sparse.to_dense().model, eqx.is_inexact_array)
        static = eqx.tree_at(lambda m: m.dropout.inference, static, True)
        mask = jax.tree.map(lambda m, p: m, sparse.mask.model, sparse.mask.model)
        state, optimizer = model.state, optax.sgd(0.05, momentum=0.9)
        opt_state = optimizer.init(params)

        def loss(params, state):
            net = eqx.combine(params, static)
            with jax.numpy_dtype_promotion("standard"):
                logits, state = jax.vmap(net, (0, None), (0, None), axis_name="batch")(x, state)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
            return jnp.mean(losses), state

        for _ in range(3):
            gradient, state = jax.grad(loss, has_aux=True)(params, state)
            updates, opt_state = optimizer.update(gradient, opt_state, params)
            params = optax.apply_updates(params, updates)
            zeros = lambda m, p: p if m is None else jnp.where(m, p, 0)
            params = jax.tree.map(zeros, mask, params, is_leaf=lambda m: m is None)
        plain = ntt.sparsify(found).to_dense()
        for a, b in zip(arrays(plain.state), arrays(state), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
        for a, b in zip(arrays(parameters(plain)), arrays(params), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)

    def test_it_learns_with_dropout_and_is_judged_in_inference_mode(self, getkey, examples):
        model = ntt.warm_up(build(getkey()), examples[0])
        found, rows = self.train(model, examples, 60, key=getkey(), test_set=examples)
        logits = jax.vmap(found)(examples[0])
        accuracy = float(jnp.mean(jnp.argmax(logits, axis=1) == examples[1]))
        assert rows[-1]["test"]["accuracy"] == pytest.approx(accuracy)
        assert rows[-1]["test"]["loss"] < 0.7 * rows[0]["test"]["loss"]
        assert not found.model.norm.inference and not found.model.dropout.inference

    def test_layers_that_the_user_put_into_inference_mode_stay_there(self, getkey, examples):
        frozen = eqx.nn.inference_mode(ntt.warm_up(build(getkey()), examples[0]))
        found, _ = self.train(frozen, examples, 3)
        assert same(found.state, frozen.state)

    def test_an_objective_must_advance_the_state(self, getkey, examples):
        model = ntt.warm_up(build(getkey()), examples[0])
        forgets = lambda model, batch, key: jnp.mean(jnp.square(jax.vmap(model)(batch[0])))
        with pytest.raises(ValueError, match="^objective: the model has a state.*ntt.forward"):
            self.train(model, examples, 1, objective=forgets)

        def advances(model, batch, key):
            outputs, model = ntt.forward(model, batch[0], key)
            return jnp.mean(jnp.square(outputs)), {}, model

        found, _ = self.train(model, examples, 1, objective=advances)
        assert not same(found.state, model.state)
        assert ntt.evaluate(model, examples, forgets) == ntt.evaluate(model, examples, advances)


def test_a_stateful_model_inside_of_another_model_is_refused_in_training(getkey, examples):
    model = ntt.warm_up(build(getkey()), examples[0])
    inside = eqx.nn.Sequential([eqx.nn.Lambda(lambda x: -x), eqx.nn.Lambda(model)])
    with pytest.raises(ValueError, match="Sequential holds a StatefulModel"):
        ntt.train(inside, [examples], optax.sgd(0.1), num_steps=1)


class Counting(eqx.Module):
    """A state that would differ from sample to sample, or that is not returned at all."""

    linear: eqx.nn.Linear
    index: eqx.nn.StateIndex
    returns: bool

    def __init__(self, key, returns=True):
        self.linear, self.returns = eqx.nn.Linear(2, 2, key=key), returns
        self.index = eqx.nn.StateIndex(jnp.zeros(()))

    def __call__(self, x, state):
        out = self.linear(x)
        return (out, state.set(self.index, jnp.sum(x))) if self.returns else out


def test_what_is_no_model_with_a_state_is_named(getkey):
    net, state = eqx.nn.make_with_state(Counting)(getkey())
    with pytest.raises(ValueError, match="^StatefulModel: needs a model and its eqx.nn.State"):
        ntt.StatefulModel(net, None)
    with pytest.raises(ValueError, match="^forward: the state of Counting differs"):
        ntt.forward(ntt.StatefulModel(net, state), jnp.ones((3, 2)))
    bare, state = eqx.nn.make_with_state(Counting)(getkey(), returns=False)
    with pytest.raises(ValueError, match="Counting must return .outputs, state."):
        ntt.StatefulModel(bare, state)(jnp.ones(2))
    with pytest.raises(ValueError, match="ntt.StatefulModel"):
        ntt.ntk(net, jnp.ones((3, 2)))
    two = eqx.nn.Sequential([eqx.nn.BatchNorm(2, n, mode="batch") for n in ("one", "two")])
    state = eqx.nn.State(two)
    with pytest.raises(ValueError, match="over the axes .'one', 'two'."):
        ntt.forward(ntt.StatefulModel(eqx.nn.delete_init_state(two), state), jnp.ones((3, 2)))
    with pytest.raises(ValueError, match="^warm_up: there is no batch"):
        ntt.warm_up(ntt.StatefulModel(net, state), [])


def test_other_models_pass_through(getkey, x):
    model = eqx.nn.Linear(2, 2, key=getkey())
    assert ntt.warm_up(model, x) is model
    outputs, after = ntt.forward(model, jnp.ones((3, 2)))
    assert after is model and outputs.shape == (3, 2)


@pytest.mark.parametrize("name", ["resnet-20-bn", "vgg-11-bn"])
def test_the_networks_with_batch_norm(name, getkey):
    def make(key):
        return ntt.models.make_model(name, (1, 16, 16), 10, key=key)

    model = eqx.filter_eval_shape(make, getkey())
    assert isinstance(model, ntt.StatefulModel)
    count = sum(leaf.size for leaf in jax.tree.leaves(model.model) if hasattr(leaf, "size"))
    group = eqx.filter_eval_shape(
        ntt.models.MODELS[name.removesuffix("-bn")], (1, 16, 16), 10, key=getkey()
    )
    assert count == sum(leaf.size for leaf in jax.tree.leaves(group) if hasattr(leaf, "size"))
    with pytest.raises(ValueError, match="has batch normalisation and is called as model.x, state"):
        eqx.filter_eval_shape(model.model, jnp.ones((1, 16, 16)))
    with pytest.raises(ValueError, match="has group normalisation and no state"):
        eqx.filter_eval_shape(group, jnp.ones((1, 16, 16)), model.state)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [ntt.models.ResNet20, ntt.models.VGG11])
def test_kernel_and_gradient_of_the_networks_with_batch_norm(kind, getkey, x64):
    with jax.enable_x64(True):
        build = eqx.nn.make_with_state(kind)
        model = ntt.StatefulModel(*build((1, 16, 16), 3, width=8, norm="batch", key=getkey()))
        wide = lambda a: a.astype(jnp.float64) if eqx.is_inexact_array(a) else a
        model, x = jax.tree.map(wide, (model, jr.normal(getkey(), (4, 1, 16, 16))))
        sparse = ntt.prune(ntt.warm_up(model, x), ntt.scores.Magnitude(), 0.2)
        fast = ntt.ntk(sparse, x[:2], x[2:])
        exact = ntt.ntk(sparse, x[:2], x[2:], implementation="jacobian")
        np.testing.assert_allclose(fast, exact, rtol=1e-10, atol=1e-10 * np.abs(exact).max())

        def gradient(implementation):
            def loss(weight):
                moved = eqx.tree_at(lambda s: s.model.model.output.weight, sparse, weight)
                theta = ntt.ntk(moved, x[:2], x[2:], implementation=implementation)
                return jnp.mean(theta**2)

            return jax.grad(loss)(sparse.model.model.output.weight)

        exact = gradient("jacobian")
        fast = gradient(None)
        np.testing.assert_allclose(fast, exact, rtol=1e-9, atol=1e-9 * np.abs(exact).max())
