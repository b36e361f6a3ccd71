"""The loss between two drawn networks, and its gradient, by explicit Jacobians."""

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from helpers.comparison import relative_error
from helpers.drawn_networks import draw
from helpers.students import ADAM, loss_in, moved
from helpers.tiers import drawn, slow

import ntt_eqx as ntt

DENSITY = 0.4
KERNELS = ("active", "ambient")


def theta(sparse, kernel, x1, x2):
    """The kernel `[N, M, K, K]` from Jacobians in plain JAX, with no code of the engine."""
    params, static = eqx.partition(sparse.to_dense(), eqx.is_inexact_array)

    def jacobian(x):
        found = jax.jacrev(lambda p: eqx.combine(p, static)(x))(params)
        if kernel == "active":
            found = jax.tree.map(
                lambda mask, j: j if mask is None else jnp.where(mask, j, 0),
                sparse.mask,
                found,
                is_leaf=lambda mask: mask is None,
            )
        leaves = [j.reshape(len(j), -1) for j in jax.tree.leaves(found)]
        return jnp.concatenate(leaves, axis=1)

    return jnp.einsum("nkp,mlp->nmkl", jax.vmap(jacobian)(x1), jax.vmap(jacobian)(x2))


def definition(student, teacher, x, config):
    """The loss of ARCHITECTURE.md; a dense teacher keeps all of its weights."""
    half = len(x) // 2
    f = lambda sparse: jax.vmap(sparse.to_dense())(x)
    thetas = [theta(sparse, config.kernel, x[:half], x[half:]) for sparse in (student, teacher)]
    kept = jax.tree.map(
        lambda m, w: None if m is None else jnp.where(m, w, 0),
        student.mask,
        eqx.filter(student.model, eqx.is_inexact_array),
        is_leaf=lambda mask: mask is None,
    )
    norm = sum(jnp.sum(w**2) for w in jax.tree.leaves(kept))
    loss = jnp.mean((f(student) - f(teacher)) ** 2)
    loss += config.kernel_weight * jnp.mean((thetas[0] - thetas[1]) ** 2)
    return loss + config.l2_weight / config.density * norm


def another(seed, shape):
    """A drawn network on inputs of a shape; the seeds behind this one are tried in turn."""
    for other in range(1000 * (seed + 1), 1000 * (seed + 2)):
        model, x = draw(other)
        if x.shape[1:] == shape:
            return model.model
    raise AssertionError(f"no network on {shape}")


def part_of(teacher, x, key):
    """Half of the channels of a network as a network, or `None` where none of them could go."""
    dense = ntt.sparsify(teacher)
    try:
        few = ntt.few_channels(teacher, x, 1 / 2, key=key)
    except ValueError as error:
        assert "no channels that could go" in str(error)
        return None
    widest = ntt.Sparsity(0.01, "global", pattern=few).widest(dense.mask)
    return ntt.compact(dense.with_mask(widest), x).take(dense).model


def check(seed, kernel, kind, key):
    """Whether there is such a student; if so the loss of a step and its gradient are compared."""
    sparse, x = draw(seed)
    x, teacher = jnp.concatenate([x, x[:1] + 1]), sparse.model
    student = part_of(teacher, x, key) if kind == "part" else another(seed, x.shape[1:])
    if student is None:
        return False
    config = ntt.NTTConfig(DENSITY, kernel=kernel, kernel_weight=0.3, l2_weight=0.02)
    state = ntt.ntt_init(teacher, config, ADAM, student=student)
    arrays, rest = eqx.partition(moved(state.student, key), eqx.is_inexact_array)
    both = lambda loss: eqx.filter_jit(
        eqx.filter_value_and_grad(lambda a: loss(eqx.combine(a, rest)))
    )(arrays)
    found, slope = both(lambda student: loss_in(state, student, x)[0])
    whole = ntt.sparsify(teacher)
    expected, right = both(lambda student: definition(student, whole, x, config))
    assert relative_error(found, expected) < 1e-10, (seed, kernel, kind)
    assert relative_error(slope, right) < 1e-8, (seed, kernel, kind)
    return True


@pytest.mark.parametrize("kind", ["part", slow("another")])
def test_a_student_that_was_drawn(kind, getkey, x64):
    assert check(0, "active", kind, getkey())


@pytest.mark.slow
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("kind", ["part", "another"])
def test_many_students_that_were_drawn(kind, kernel, getkey, x64):
    checked = [check(seed, kernel, kind, getkey()) for seed in range(2, 2 + drawn(5))]
    assert sum(checked) > len(checked) / 4
