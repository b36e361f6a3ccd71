"""Neural Tangent Transfer: the loss is its definition, a step is what the paper's code does."""

import dataclasses
import math

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import jaxtyping
import numpy as np
import optax
import pytest

import ntt_eqx as ntt

pytestmark = pytest.mark.usefixtures("gathers")

DENSITY = 0.3
GATHERED = 0.13  # few enough weights for the kernel to gather them: 4 and 2
# Made once: optimiser and settings are static, so tests that share them share a compiled step.
ADAM = optax.adam(1e-2)
CONFIG = ntt.NTTConfig(density=DENSITY, num_steps=12, mask_every=3, kernel_weight=0.1)


loss_of = eqx.filter_jit(ntt.ntt_loss)
step = eqx.filter_jit(ntt.ntt_step)


class Tiny(eqx.Module):
    """Two dense layers with a smooth non-linearity in between."""

    first: eqx.nn.Linear
    second: eqx.nn.Linear

    def __init__(self, key):
        first, second = jax.random.split(key)
        self.first = eqx.nn.Linear(6, 5, key=first)
        self.second = eqx.nn.Linear(5, 3, key=second)

    def __call__(self, x):
        return self.second(jnp.tanh(self.first(x)))


class Noisy(eqx.Module):
    """A convolution, and dropout that needs a key in training."""

    conv: eqx.nn.Conv2d
    dropout: eqx.nn.Dropout
    head: eqx.nn.Linear

    def __init__(self, key):
        first, second = jax.random.split(key)
        self.conv = eqx.nn.Conv2d(1, 3, 2, key=first)
        self.dropout = eqx.nn.Dropout(0.5)
        self.head = eqx.nn.Linear(12, 2, key=second)

    def __call__(self, x, *, key=None):
        h = jnp.tanh(self.conv(x)).reshape(-1)
        return self.head(self.dropout(h, key=key))


def batches(shape=(4, 6), seed=0):
    rng = np.random.default_rng(seed)
    while True:
        yield jnp.asarray(rng.standard_normal(shape), jnp.float32)


def start(getkey, config=CONFIG, optimizer=ADAM, **kwargs):
    return ntt.ntt_init(Tiny(getkey()), config, optimizer, **kwargs)


def moved(sparse, key, scale=0.1):
    """The same sparse model with noise on every float leaf, those under the mask too."""
    params, static = eqx.partition(sparse, eqx.is_inexact_array)
    leaves, treedef = jax.tree.flatten(params)
    keys = jax.random.split(key, len(leaves))
    leaves = [
        w + scale * jax.random.normal(k, w.shape, w.dtype)
        for w, k in zip(leaves, keys, strict=True)
    ]
    return eqx.combine(jax.tree.unflatten(treedef, leaves), static)


def random_mask(model, key, density=DENSITY):
    return ntt.make_mask(ntt.scores.Random(key)(model), density)


def magnitude_mask(sparse, density=DENSITY, scope="layer"):
    """By a sort, and with no code of the library."""
    leaves, treedef = jax.tree.flatten(sparse.mask)
    sizes = [
        np.abs(np.asarray(layer.weight)) for layer in (sparse.model.first, sparse.model.second)
    ]
    assert [s.shape for s in sizes] == [m.shape for m in leaves]

    def keep(values):
        order = np.argsort(-values, kind="stable")
        marks = np.zeros(values.shape, bool)
        marks[order[: round(density * values.size)]] = True
        return marks

    if scope == "layer":
        marks = [keep(s.reshape(-1)) for s in sizes]
    else:
        flat = keep(np.concatenate([s.reshape(-1) for s in sizes]))
        marks = np.split(flat, np.cumsum([s.size for s in sizes])[:-1])
    shaped = [m.reshape(s.shape) for m, s in zip(marks, sizes, strict=True)]
    return jax.tree.unflatten(treedef, shaped)


def same(a, b):
    """Bit for bit, array leaves only."""
    a, b = (jax.tree.leaves(eqx.filter(t, eqx.is_array)) for t in (a, b))
    return len(a) == len(b) and all(
        np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in zip(a, b, strict=True)
    )


# The loss


def definition(student, teacher, x, config):
    """The equation, term by term, on explicit Jacobians."""
    half = len(x) // 2
    theta = lambda model: ntt.ntk(
        model, x[:half], x[half:], kernel=config.kernel, implementation="jacobian"
    )
    dense = student.to_dense()
    target = np.mean((np.asarray(jax.vmap(dense)(x)) - np.asarray(jax.vmap(teacher)(x))) ** 2)
    kernel = np.mean((np.asarray(theta(student)) - np.asarray(theta(teacher))) ** 2)
    norm = np.sum(np.asarray(dense.first.weight) ** 2) + np.sum(
        np.asarray(dense.second.weight) ** 2
    )
    loss = target + config.kernel_weight * kernel + config.l2_weight / config.density * norm
    return {"loss": loss, "kernel_distance": kernel, "target_distance": target, "weight_norm": norm}


@pytest.mark.parametrize(
    "kernel, density", [("active", DENSITY), ("active", GATHERED), ("ambient", DENSITY)]
)
def test_loss_is_its_definition(getkey, x64, kernel, density):
    config = ntt.NTTConfig(density, kernel=kernel, kernel_weight=0.3, l2_weight=0.02)
    state = start(getkey, config)
    student = moved(state.student, getkey())
    x = jax.random.normal(getkey(), (6, 6))
    assert x.dtype == jnp.float64
    assert (jax.tree.leaves(state.support) != []) == (density == GATHERED)

    loss, metrics = loss_of(student, state.teacher, x, config, support=state.support)

    expected = definition(student, state.teacher, x, config)
    assert loss.dtype == jnp.float64
    np.testing.assert_allclose(loss, expected["loss"], rtol=1e-12)
    for name, value in expected.items():
        np.testing.assert_allclose(getattr(metrics, name), value, rtol=1e-6, err_msg=name)
    kept = round(density * 30) + round(density * 15)
    assert metrics.density == jnp.float32(kept / 45)


@pytest.mark.parametrize("density", [DENSITY, GATHERED])
@pytest.mark.parametrize("kernel", ["active", "ambient"])
def test_fewer_outputs_compare_the_diagonal_and_its_mean(getkey, x64, kernel, density):
    state = start(getkey, ntt.NTTConfig(density, kernel=kernel))
    student, x = moved(state.student, getkey()), jax.random.normal(getkey(), (6, 6))
    apart = lambda model: np.asarray(
        ntt.ntk(model, x[:3], x[3:], kernel=kernel, implementation="jacobian")
    )
    difference = apart(student) - apart(state.teacher)
    diagonal = np.einsum("nmkk->nmk", difference)
    expected = {"diagonal": diagonal, "trace": diagonal.mean(axis=-1), "full": difference}
    found = {}
    for outputs, compared in expected.items():
        for implementation in ("factors", "jacobian"):
            config = ntt.NTTConfig(
                density, kernel=kernel, outputs=outputs, implementation=implementation
            )
            loss, metrics = loss_of(student, state.teacher, x, config, support=state.support)
            found[outputs] = float(metrics.kernel_distance)
            assert found[outputs] == pytest.approx(np.mean(compared**2), rel=1e-6)
            rest = metrics.target_distance + 1e-4 / density * metrics.weight_norm
            assert loss == pytest.approx(float(rest) + 1e-3 * found[outputs], rel=1e-6)
    assert len(set(found.values())) == 3


def test_all_directions_of_a_sketch_are_the_full_kernel(getkey):
    state = start(getkey)
    student, x = moved(state.student, getkey()), next(batches())
    distance = {}
    for outputs in ("full", "sketch"):
        config = ntt.NTTConfig(DENSITY, outputs=outputs, sketch_size=3)
        metrics = loss_of(student, state.teacher, x, config)[1]
        distance[outputs] = metrics.kernel_distance
        assert metrics.target_distance > 0
    np.testing.assert_allclose(distance["sketch"], distance["full"], rtol=1e-4)


@pytest.mark.parametrize("size", [1, 2])
def test_a_sketch_is_right_on_average_with_other_directions_at_every_step(getkey, size):
    state = start(getkey)
    student, x = moved(state.student, getkey()), next(batches())
    config = ntt.NTTConfig(DENSITY, outputs="sketch", sketch_size=size)

    @eqx.filter_jit
    def sketched(steps):
        one = lambda step: ntt.ntt_loss(student, state.teacher, x, config, step=step)[1]
        return jax.vmap(one)(steps)

    steps = jnp.arange(2000, dtype=jnp.int32)
    metrics = sketched(steps)
    distance = np.asarray(metrics.kernel_distance, np.float64)
    full = loss_of(student, state.teacher, x, ntt.NTTConfig(DENSITY))[1]
    assert distance.std() > 0.1 * distance.mean() and len(np.unique(distance)) > 1900
    error = abs(distance.mean() - float(full.kernel_distance))
    assert error < 4 * distance.std() / np.sqrt(len(distance))
    np.testing.assert_allclose(metrics.target_distance, full.target_distance, rtol=1e-5)
    np.testing.assert_array_equal(sketched(steps).kernel_distance, metrics.kernel_distance)


def test_a_sketch_of_more_directions_varies_less(getkey):
    state = start(getkey)
    student, x = moved(state.student, getkey()), next(batches())
    spread = []
    for size in (1, 2):
        config = ntt.NTTConfig(DENSITY, outputs="sketch", sketch_size=size)
        one = lambda step, config=config: (
            ntt.ntt_loss(student, state.teacher, x, config, step=step)[1].kernel_distance
        )
        spread.append(float(jax.jit(jax.vmap(one))(jnp.arange(500, dtype=jnp.int32)).std()))
    assert spread[0] > 1.5 * spread[1]


def test_a_dense_student_is_its_teacher_through_any_sketch(getkey):
    config = ntt.NTTConfig(1.0, outputs="sketch", sketch_size=2)
    state = start(getkey, config)
    metrics = loss_of(state.student, state.teacher, next(batches()), config)[1]
    assert metrics.kernel_distance < 1e-12 and metrics.target_distance < 1e-12


def test_a_step_draws_the_directions_of_its_number(getkey):
    config = ntt.NTTConfig(DENSITY, outputs="sketch", sketch_size=1)
    state, x = start(getkey, config), next(batches())
    seen = []
    for number in range(3):
        at = eqx.tree_at(lambda s: s.step, state, jnp.asarray(number, jnp.int32))
        expected = loss_of(state.student, state.teacher, x, config, step=number)[1]
        after, metrics = step(at, x)
        seen.append(float(metrics.kernel_distance))
        np.testing.assert_allclose(seen[-1], expected.kernel_distance, rtol=1e-4)
        assert after.step == number + 1
    assert len(set(seen)) == 3


def test_more_directions_than_outputs_are_refused(getkey):
    config = ntt.NTTConfig(DENSITY, outputs="sketch", sketch_size=4)
    state = start(getkey, config)
    with pytest.raises(ValueError, match="1 <= R <= K, got R = 4, K = 3"):
        ntt.ntt_loss(state.student, state.teacher, next(batches()), config)


def test_the_two_kernels_differ_once_there_is_a_mask(getkey):
    x = jax.random.normal(getkey(), (4, 6))
    state = start(getkey)
    distance = {}
    for kernel in ("active", "ambient"):
        config = ntt.NTTConfig(DENSITY, kernel=kernel)
        distance[kernel] = loss_of(state.student, state.teacher, x, config)[1].kernel_distance
    assert distance["active"] != distance["ambient"]


@pytest.mark.parametrize("kernel", ["active", "ambient"])
def test_a_dense_student_at_the_start_is_its_teacher(getkey, kernel):
    config = ntt.NTTConfig(1.0, kernel=kernel, l2_weight=0.5)
    state = start(getkey, config)
    loss, metrics = loss_of(state.student, state.teacher, next(batches()), config)
    assert metrics.target_distance == 0
    assert metrics.kernel_distance < 1e-12  # the teacher's kernel is summed in another order
    np.testing.assert_allclose(loss, 0.5 * metrics.weight_norm, rtol=1e-6)


@pytest.mark.parametrize("kernel", ["active", "ambient"])
def test_gradient_is_that_of_finite_differences(getkey, x64, kernel):
    config = ntt.NTTConfig(DENSITY, kernel=kernel, kernel_weight=0.3, l2_weight=0.02)
    state = start(getkey, config)
    params, static = eqx.partition(moved(state.student, getkey()), eqx.is_inexact_array)
    x = jax.random.normal(getkey(), (4, 6))

    @jax.jit
    def loss(params):
        return ntt.ntt_loss(eqx.combine(params, static), state.teacher, x, config)[0]

    gradient = jax.jit(jax.grad(loss))(params)
    dot = lambda a, b: sum(jnp.vdot(u, v) for u, v in zip(*map(jax.tree.leaves, (a, b))))
    for _ in range(4):
        direction = jax.tree.map(lambda p: jax.random.normal(getkey(), p.shape, p.dtype), params)
        ahead, behind = (
            loss(jax.tree.map(lambda p, d: p + e * d, params, direction)) for e in (1e-5, -1e-5)
        )
        np.testing.assert_allclose(dot(gradient, direction), (ahead - behind) / 2e-5, rtol=1e-7)


@pytest.mark.parametrize("kernel", ["active", "ambient"])
def test_what_lies_under_the_mask_gets_no_gradient_and_does_no_harm(getkey, kernel):
    config = ntt.NTTConfig(DENSITY, kernel=kernel)
    state = start(getkey, config)
    hidden = lambda m, w, value: jnp.where(m, w, jnp.full_like(w, value))
    weights = lambda s: (s.model.first.weight, s.model.second.weight)
    masks = jax.tree.leaves(state.student.mask)
    x = next(batches())

    @eqx.filter_jit
    @eqx.filter_value_and_grad
    def gradient(student):
        return ntt.ntt_loss(student, state.teacher, x, config)[0]

    loss, slopes = gradient(state.student)
    for value in (jnp.nan, jnp.inf, 1e30):
        poisoned = eqx.tree_at(
            weights,
            state.student,
            [hidden(m, w, value) for m, w in zip(masks, weights(state.student), strict=True)],
        )
        again, slopes_again = gradient(poisoned)
        assert same(loss, again) and same(slopes, slopes_again)
        for m, w in zip(masks, weights(poisoned.with_mask(poisoned.mask)), strict=True):
            assert not bool(jnp.isfinite(jnp.where(m, jnp.zeros_like(w), w)).all()) or value == 1e30
    for m, g in zip(masks, weights(slopes), strict=True):
        assert np.all(np.asarray(g)[~np.asarray(m)] == 0.0)
        assert np.all(np.asarray(g)[np.asarray(m)] != 0.0)


def test_dropout_is_off_in_student_and_teacher(getkey):
    config = ntt.NTTConfig(0.5)
    model, x = Noisy(getkey()), next(batches((4, 1, 3, 3)))
    states = [ntt.ntt_init(m, config, ADAM) for m in (model, eqx.nn.inference_mode(model))]
    training, inference = (loss_of(s.student, s.teacher, x, config)[0] for s in states)
    assert same(training, inference)
    assert not states[0].student.model.dropout.inference  # and still on for training afterwards


def test_bfloat16_models_keep_their_dtype_and_lose_no_sums(getkey):
    model = jax.tree.map(
        lambda w: w.astype(jnp.bfloat16) if eqx.is_inexact_array(w) else w, Tiny(getkey())
    )
    state = ntt.ntt_init(model, ntt.NTTConfig(DENSITY), ADAM)
    x = next(batches()).astype(jnp.bfloat16)
    loss, _ = loss_of(state.student, state.teacher, x, state.config)
    assert loss.dtype == jnp.float32
    state, metrics = step(state, x)
    floats = jax.tree.leaves(eqx.filter(state.student, eqx.is_inexact_array))
    assert {w.dtype for w in floats} == {jnp.dtype(jnp.bfloat16)}
    assert jnp.isfinite(metrics.loss)


@pytest.mark.parametrize("size", [0, 1, 3])
def test_a_batch_that_has_no_halves_is_an_error(getkey, size):
    state = start(getkey)
    x = jnp.zeros((size, 6))
    for call in (
        lambda: ntt.ntt_loss(state.student, state.teacher, x, CONFIG),
        lambda: step(state, x),
        lambda: ntt.transfer(state, iter([x]), num_steps=1),
    ):
        with pytest.raises(ValueError, match=f"even number of samples, got {size}"):
            call()


# The start


def test_the_start_is_the_teacher_under_its_magnitude_mask(getkey):
    state = start(getkey)
    assert same(state.student.model, state.teacher)
    assert same(state.student.mask, magnitude_mask(state.student))
    assert state.step == 0 and state.step.dtype == jnp.int32


def test_the_start_shares_no_memory_with_the_teacher(getkey):
    state = start(getkey)
    pointers = lambda tree: {
        w.unsafe_buffer_pointer() for w in jax.tree.leaves(tree) if eqx.is_array(w)
    }
    assert not pointers(state.student) & pointers(state.teacher)


def test_logit_snip_mask(getkey):
    config = ntt.NTTConfig(DENSITY, initial_mask="logit_snip")
    teacher, x = Tiny(getkey()), next(batches())
    state = ntt.ntt_init(teacher, config, ADAM, x=x)
    expected = ntt.make_mask(ntt.scores.LogitSnip()(teacher, x), DENSITY)
    assert same(state.student.mask, expected)
    assert not same(state.student.mask, magnitude_mask(state.student))
    with pytest.raises(ValueError, match="needs samples: pass `x=`"):
        ntt.ntt_init(teacher, config, ADAM)


def test_global_scope_counts_all_layers_together(getkey):
    config = ntt.NTTConfig(DENSITY, scope="global", num_steps=6, mask_every=2)
    state = start(getkey, config)
    assert same(state.student.mask, magnitude_mask(state.student, scope="global"))
    for x, _ in zip(batches(), range(2), strict=False):
        state, metrics = step(state, x)
    assert same(state.student.mask, magnitude_mask(state.student, scope="global"))
    assert sum(int(m.sum()) for m in jax.tree.leaves(state.student.mask)) == round(DENSITY * 45)


def test_a_mask_from_elsewhere_and_a_choice_of_leaves(getkey):
    teacher = Tiny(getkey())
    mask = random_mask(teacher, getkey())
    assert same(ntt.ntt_init(teacher, CONFIG, ADAM, mask=mask).student.mask, mask)
    where = lambda path, owner, leaf: path == ".second.weight"
    state = ntt.ntt_init(teacher, CONFIG, ADAM, where=where)
    assert [m.shape for m in jax.tree.leaves(state.student.mask)] == [(3, 5)]


@pytest.mark.parametrize("mask_every", [3, None])
def test_a_start_inside_jit_is_the_same_without_knowing_where_the_weights_are(getkey, mask_every):
    config = ntt.NTTConfig(GATHERED, mask_every=mask_every)
    teacher = Tiny(getkey())
    traced = eqx.filter_jit(lambda t: ntt.ntt_init(t, config, ADAM))(teacher)
    plain = ntt.ntt_init(teacher, config, ADAM)
    assert same(traced.student, plain.student) and traced.step == 0
    assert jax.tree.leaves(traced.support) == [] != jax.tree.leaves(plain.support)
    x = next(batches())
    expected = step(plain, x)[1]
    np.testing.assert_allclose(step(traced, x)[1].loss, expected.loss, rtol=1e-5)


@pytest.mark.parametrize("own", [False, True])
def test_a_start_inside_jit_from_constants(getkey, own):
    config, teacher = ntt.NTTConfig(GATHERED), Tiny(getkey())
    mask = random_mask(teacher, getkey(), GATHERED) if own else None
    traced = eqx.filter_jit(lambda: ntt.ntt_init(teacher, config, ADAM, mask=mask))()
    plain = ntt.ntt_init(teacher, config, ADAM, mask=mask)
    assert same(traced.student, plain.student)
    assert (jax.tree.leaves(traced.support) != []) == own


@pytest.mark.parametrize(
    "settings, gathered",
    [
        ({}, True),
        ({"mask_every": None}, True),
        ({"scope": "global"}, False),  # a layer may hold any number after a refresh
        ({"scope": "global", "mask_every": None}, True),
        ({"kernel": "ambient"}, False),
        ({"density": 0.5}, False),
    ],
)
def test_weights_are_gathered_where_their_number_stays(getkey, settings, gathered):
    state = start(getkey, ntt.NTTConfig(**{"density": GATHERED, **settings}))
    found = jax.tree.leaves(state.support)
    assert bool(found) == gathered
    for indices, mask in zip(found, jax.tree.leaves(state.student.mask), strict=False):
        np.testing.assert_array_equal(indices, np.flatnonzero(mask))


@pytest.mark.parametrize("mask_every, gathered", [(3, False), (None, True)])
def test_another_number_of_weights_is_gathered_only_where_it_stays(getkey, mask_every, gathered):
    config, teacher = ntt.NTTConfig(GATHERED, mask_every=mask_every), Tiny(getkey())
    mask = random_mask(teacher, getkey(), 0.1)
    state = ntt.ntt_init(teacher, config, ADAM, mask=mask)
    assert bool(jax.tree.leaves(state.support)) == gathered


# A step


@pytest.mark.parametrize(
    "num_steps, mask_every, expected",
    [
        (12, 3, {3, 6}),  # 9 and 12 are within the last 3 steps
        (13, 3, {3, 6, 9}),
        (None, 4, {4, 8, 12}),
        (12, None, set()),
        (3, 5, set()),
    ],
)
def test_the_mask_is_refreshed_at_the_published_steps(getkey, num_steps, mask_every, expected):
    config = ntt.NTTConfig(DENSITY, num_steps=num_steps, mask_every=mask_every)
    state = start(getkey, config)
    before = random_mask(state.teacher, getkey())
    seen = set()
    for n, x in zip(range(1, 14), batches(), strict=False):
        state = eqx.tree_at(lambda s: s.student, state, state.student.with_mask(before))
        state, _ = step(state, x)
        if not same(state.student.mask, before):
            seen.add(n)
            assert same(state.student.mask, magnitude_mask(state.student))
        assert [int(m.sum()) for m in jax.tree.leaves(state.student.mask)] == [9, 4]
    assert seen == expected


@pytest.mark.parametrize("density", [DENSITY, GATHERED])
def test_one_compilation_serves_the_whole_run(getkey, density):
    config = dataclasses.replace(CONFIG, density=density)
    state = start(getkey, config, mask=random_mask(Tiny(getkey()), getkey(), density))
    counted = eqx.debug.assert_max_traces(ntt.ntt_step, max_traces=1)
    counted_step = eqx.filter_jit(counted)
    masks = [state.student.mask]
    for _, x in zip(range(12), batches(), strict=False):
        state, _ = counted_step(state, x)
        if not same(state.student.mask, masks[-1]):
            masks.append(state.student.mask)
    assert eqx.debug.get_num_traces(counted) == 1
    assert len(masks) > 1, "no refresh changed the mask, so the test says nothing"


@pytest.mark.parametrize("first", [0.05, 0.1, GATHERED, 0.5])
def test_the_kernel_sees_the_refreshed_mask_whatever_the_first_one_kept(getkey, first):
    config = ntt.NTTConfig(GATHERED, mask_every=1, kernel_weight=1.0)
    teacher = Tiny(getkey())
    mask = random_mask(teacher, getkey(), first)
    state = ntt.ntt_init(teacher, config, ADAM, mask=mask)
    data = batches()
    for _ in range(2):
        state, _ = step(state, next(data))
    assert [int(m.sum()) for m in jax.tree.leaves(state.student.mask)] == [4, 2]
    x = next(data)
    expected = loss_of(state.student, state.teacher, x, config)[1].kernel_distance
    seen = step(state, x)[1].kernel_distance
    np.testing.assert_allclose(seen, expected, rtol=1e-4)


def test_pruned_weights_stay_where_they_are_until_a_refresh(getkey):
    config = ntt.NTTConfig(DENSITY, mask_every=None)
    state = start(getkey, config)
    first = state.student
    for _, x in zip(range(3), batches(), strict=False):
        state, metrics = step(state, x)
    weights = lambda model: (model.first.weight, model.second.weight)
    both = zip(
        jax.tree.leaves(first.mask), weights(first.model), weights(state.student.model), strict=True
    )
    for mask, old, new in both:
        mask, old, new = map(np.asarray, (mask, old, new))
        assert np.array_equal(old[~mask], new[~mask]) and np.all(old[mask] != new[mask])
    for mask, w in zip(jax.tree.leaves(first.mask), weights(state.student.to_dense()), strict=True):
        assert np.all(np.asarray(w)[~np.asarray(mask)] == 0.0)


def test_metrics_are_those_before_the_update(getkey):
    state = start(getkey)
    x = next(batches())
    expected = loss_of(state.student, state.teacher, x, CONFIG)[1]
    _, metrics = step(state, x)
    for name in ("loss", "kernel_distance", "target_distance", "weight_norm", "density"):
        np.testing.assert_allclose(
            getattr(metrics, name), getattr(expected, name), rtol=1e-6, err_msg=name
        )
        assert getattr(metrics, name).dtype == jnp.float32


def test_learning_rate_is_told_where_the_optimiser_knows_it(getkey):
    _, metrics = step(start(getkey), next(batches()))
    assert jnp.isnan(metrics.learning_rate)
    told = optax.inject_hyperparams(optax.sgd)(learning_rate=0.25)
    _, metrics = step(start(getkey, optimizer=told), next(batches()))
    assert metrics.learning_rate == 0.25


# A run


def test_the_kernel_comes_closer_and_the_teacher_stays(getkey):
    config = ntt.NTTConfig(0.5, num_steps=100, mask_every=20, kernel_weight=1.0)
    wide = eqx.nn.MLP(6, 2, 40, 1, jax.nn.tanh, key=getkey())
    state = ntt.ntt_init(wide, config, optax.adam(1e-2))
    teacher = jax.tree.map(lambda l: jnp.copy(l) if eqx.is_array(l) else l, state.teacher)
    validation = next(batches((16, 6), seed=1))
    state, history = ntt.transfer(state, batches((16, 6)), validation=validation, log_every=50)
    first, last = history[0]["validation"], history[-1]["validation"]
    assert last["kernel_distance"] < 0.3 * first["kernel_distance"]
    assert last["loss"] < 0.5 * first["loss"]
    assert same(state.teacher, teacher)
    assert not same(state.student.model, teacher)


def test_history(getkey):
    logged = []
    pairs = ((x, jnp.zeros(4, jnp.int32)) for x in batches())
    state, history = ntt.transfer(
        start(getkey),
        pairs,
        validation=next(batches(seed=1)),
        log_every=4,
        on_log=lambda state, row: logged.append((int(state.step), row)),
    )
    assert [row["step"] for row in history] == [0, 1, 4, 8, 12]
    assert [(row["step"], row) for row in history] == logged
    fields = [
        "loss", "kernel_distance", "target_distance", "weight_norm", "density", "learning_rate"
    ]  # fmt: skip
    for row in history:
        parts = ["validation"] if row["step"] == 0 else ["train", "validation"]
        assert list(row) == ["step", *parts]
        for part in parts:
            assert list(row[part]) == fields
            assert all(isinstance(value, float) for value in row[part].values())
    assert int(state.step) == 12
    unseen = ntt.transfer(start(getkey), batches(), num_steps=2)[1]
    assert [list(row) for row in unseen] == [["step", "train"]] * 2


def test_a_run_takes_no_more_batches_than_it_has_steps(getkey):
    taken = batches()
    ntt.transfer(start(getkey), taken, num_steps=5)
    fresh = batches()
    for _ in range(5):
        next(fresh)
    assert same(next(taken), next(fresh))


def test_a_run_needs_an_end(getkey):
    state = start(getkey, ntt.NTTConfig(DENSITY))
    with pytest.raises(ValueError, match="give `num_steps` here or in NTTConfig"):
        ntt.transfer(state, batches())


@pytest.mark.parametrize("validation", [False, True])
def test_divergence_stops_the_run_and_names_the_step(getkey, validation):
    state = start(getkey, optimizer=optax.sgd(1e20))
    samples = next(batches(seed=1)) if validation else None
    with pytest.raises(ntt.DivergenceError, match=r"loss became (nan|inf) at step \d+") as caught:
        ntt.transfer(state, batches(), validation=samples, log_every=1)
    assert 1 <= caught.value.step <= 12
    assert caught.value.phase == "transfer"


def test_the_same_seed_gives_the_same_bits(getkey):
    state = start(getkey)
    one, rows = ntt.transfer(state, batches(), num_steps=6)
    two, rows_again = ntt.transfer(state, batches(), num_steps=6)
    assert same(one, two)
    assert [r["train"]["loss"] for r in rows] == [r["train"]["loss"] for r in rows_again]
    other, _ = ntt.transfer(state, batches(seed=1), num_steps=6)
    assert not same(one.student, other.student)


def test_a_run_resumed_from_a_file_gives_the_same_bits(getkey, tmp_path):
    state = start(getkey)
    whole, _ = ntt.transfer(state, batches(), num_steps=6)
    data = batches()
    half, _ = ntt.transfer(state, data, num_steps=3)
    eqx.tree_serialise_leaves(tmp_path / "state.eqx", half)

    like = jax.tree.map(lambda l: jnp.zeros_like(l) if eqx.is_array(l) else l, state)
    again = eqx.tree_deserialise_leaves(tmp_path / "state.eqx", like)
    assert same(again, half) and int(again.step) == 3
    resumed, history = ntt.transfer(again, data, num_steps=6)
    assert same(resumed, whole)
    assert [row["step"] for row in history] == [6]


def test_the_state_is_a_tree_of_arrays(getkey):
    state = start(getkey)
    named = jtu.tree_leaves_with_path(eqx.filter(state, eqx.is_array))
    paths = [jtu.keystr(path) for path, _ in named]
    assert ".student.masks[0]" in paths and ".step" in paths
    masks = [leaf for _, leaf in named if leaf.dtype == bool]
    assert [m.shape for m in masks] == [(5, 6), (3, 5)]


# Settings


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"density": 0.0}, r"density must be a number in \(0, 1\], got 0.0"),
        ({"density": 1.5}, r"density must be a number in \(0, 1\], got 1.5"),
        ({"density": math.nan}, r"density must be a number in \(0, 1\], got nan"),
        ({"scope": "network"}, r"scope must be one of \('layer', 'global'\), got 'network'"),
        ({"initial_mask": "snip"}, "initial_mask must be one of"),
        ({"kernel": "ntk"}, r"kernel must be one of \('active', 'ambient'\), got 'ntk'"),
        ({"kernel_weight": -1.0}, "kernel_weight must be finite and >= 0, got -1.0"),
        ({"kernel_weight": math.inf}, "kernel_weight must be finite and >= 0, got inf"),
        ({"l2_weight": math.nan}, "l2_weight must be finite and >= 0, got nan"),
        ({"outputs": "some"}, r"outputs must be one of .*'trace', 'sketch'\), got 'some'"),
        (
            {"implementation": "pallas"},
            r"implementation must be one of \('factors', .* got 'pallas'",
        ),
        (
            {"outputs": "sketch", "implementation": "jacobian"},
            "a sketch needs implementation='factors'",
        ),
        ({"sketch_size": 0}, "sketch_size must be an integer of at least 1, got 0"),
        ({"mask_every": 0}, "mask_every must be an integer of at least 1 or None, got 0"),
        ({"num_steps": 0}, "num_steps must be an integer of at least 1 or None, got 0"),
    ],
)
def test_settings_that_cannot_work_are_errors(settings, message, monkeypatch):
    # what users see, who run without the tests' type checker
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match="NTTConfig: " + message):
        ntt.NTTConfig(**{"density": 0.1, **settings})


def test_a_density_that_empties_a_layer_names_it(getkey):
    with pytest.raises(ValueError, match=r"no weight in layer \.first\.weight"):
        start(getkey, ntt.NTTConfig(0.01))


def test_settings_are_the_published_ones():
    config = ntt.NTTConfig(density=0.03)
    assert (config.kernel_weight, config.l2_weight, config.mask_every) == (1e-3, 1e-4, 100)
    assert (config.scope, config.initial_mask, config.kernel) == ("layer", "magnitude", "active")
