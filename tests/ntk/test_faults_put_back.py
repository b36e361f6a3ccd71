"""Faults that the engine had are put back one at a time: drawn examples find each of them.

Each test prints how many examples it took; without the fault, as many examples find nothing.
"""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.comparison import relative_error
from helpers.interpreter import interpreted
from helpers.pieces import PIECES
from helpers.programs import NUMBERED, cases, check
from hypothesis import HealthCheck, Phase, given, seed, settings, strategies as st

import ntt_eqx as ntt
from ntt_eqx import _program
from ntt_eqx._ntk import (
    _execute,
    _given,
    _linear,
    _parts,
    index_concrete,
    kernel_spec,
    outputs_and_ntk,
    stored,
)
from ntt_eqx_kernels import _gather

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("gathers", "x64")]

MOST = 150  # examples


class Found(Exception):
    """A wrong number."""


def examples_until_found(strategy, is_right, most=MOST):
    """How many drawn examples it takes to find a wrong one; `None` if none of so many is."""
    count = 0

    @seed(1)
    @settings(
        max_examples=most,
        phases=[Phase.generate],
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(case=strategy)
    def run(case):
        nonlocal count
        count += 1
        if count % 40 == 0:
            jax.clear_caches()
        if not is_right(case):
            raise Found

    try:
        run()
    except Found:
        return count
    return None


def program_is_right(case):
    return max(check(case)) < 1e-9


def test_what_the_head_gives_takes_the_place_of_what_the_tail_gave(monkeypatch):
    """Where a program is cut, layers of parameters alone hear nothing of what reads them last."""
    right = _execute._pull

    def pull(plan, operands, part, values, bars, seed):
        found, back, written = right(plan, operands, part, values, bars, seed)
        if part.name == "tail" and len(plan.parts) > 2:
            lost = set(back).intersection(plan.parts[0].writes)
            back = {s: jnp.zeros_like(v) if s in lost else v for s, v in back.items()}
        return found, back, written

    monkeypatch.setattr(_execute, "_pull", pull)
    found = examples_until_found(cases(), program_is_right)
    print(f"tail's cotangents lost: found by example {found}")
    assert found is not None


def test_parameter_only_layers_are_forgotten(monkeypatch):
    """Nothing flows back into steps of parameters alone."""
    monkeypatch.setattr(
        _execute,
        "_pull_once",
        lambda plan, operands, part, values, bars, pull=_execute._pull_once: jax.tree.map(
            jnp.zeros_like, pull(plan, operands, part, values, bars)
        ),
    )
    found = examples_until_found(cases(), program_is_right)
    print(f"parameter-only layers forgotten: found by example {found}")
    assert found is not None


def test_complex_values_do_not_count(monkeypatch):
    """Only real numbers carry derivatives from one part to another."""

    def real_only(step):
        return [
            slot
            for slot, aval in zip(step.outputs, step.avals, strict=True)
            if jnp.issubdtype(aval.dtype, jnp.floating)
        ]

    monkeypatch.setattr(_parts, "_inexact", real_only)
    found = examples_until_found(cases(), program_is_right)
    print(f"complex values forgotten: found by example {found}")
    assert found is not None


def without_error(case):
    """As `program_is_right`; an exception is a fault, too."""
    try:
        return program_is_right(case)
    except Exception:
        return False


NUMBERS = dict(most=4, samples=NUMBERED, without=tuple(sorted(set(PIECES) - {
    "embedding", "stack", "hollow", "dense", "learned", "count", "function", "join"})))  # fmt: skip


def test_row_numbers_in_the_dtype_of_the_index(monkeypatch):
    """A byte counts the rows of a table of 300."""
    monkeypatch.setattr(_linear, "_row_numbers", lambda places, rows: places)
    found = examples_until_found(cases(**NUMBERS), without_error)
    print(f"narrow row numbers: found by example {found}")
    assert found is not None


def test_bytes_in_another_order_are_read_as_they_lie(monkeypatch):
    """The door is open: XLA reads the bytes of samples and metrics as native ones."""

    def as_it_lies(caller, name, value):
        if isinstance(value, jax.Array):
            return value
        return jnp.asarray(value.view(value.dtype.newbyteorder()))

    monkeypatch.setattr(_given, "as_array", as_it_lies)
    found = examples_until_found(cases(), without_error)
    print(f"foreign byte order: found by example {found}")
    assert found is not None


def test_a_loop_of_no_iterations_is_looked_into(monkeypatch):
    monkeypatch.setattr(_program, "_repeats_nothing", lambda eqn: False)
    found = examples_until_found(cases(**NUMBERS), without_error)
    print(f"loops of length 0: found by example {found}")
    assert found is not None


def test_layers_along_axes_of_length_0(monkeypatch):
    monkeypatch.setattr(_linear, "_is_empty", lambda eqn: False)
    found = examples_until_found(cases(**NUMBERS), without_error)
    print(f"axes of length 0: found by example {found}")
    assert found is not None


def mask_of(model, kept, number):
    """A mask that keeps that many weights of every layer."""

    def one(m):
        flat = np.zeros(m.size, bool)
        flat[np.random.default_rng(number).permutation(m.size)[:kept]] = True
        return jnp.asarray(flat.reshape(m.shape))

    return jax.tree.map(one, model.mask)


MODEL = ntt.sparsify(eqx.nn.MLP(8, 4, 12, 1, jnp.tanh, key=jax.random.key(0)))


def test_a_support_is_believed(monkeypatch):
    """The support of one mask under another, of as many weights or fewer."""

    def is_right(case):
        kept, fewer, first, second = case
        model = jax.tree.map(
            lambda a: a.astype(jnp.float64) if eqx.is_inexact_array(a) else a, MODEL
        )
        pruned = model.with_mask(mask_of(model, max(1, kept - fewer), second))
        x = jax.random.normal(jax.random.key(first), (4, 8), jnp.float64)
        arrays, static = eqx.partition(pruned, eqx.is_array)
        of = lambda call: lambda a, *rest: call(eqx.combine(a, static), *rest)
        index = index_concrete(mask_of(model, kept, first), kernel_spec().costs)
        found = interpreted(of(lambda m, x, s: outputs_and_ntk(kernel_spec(), m, x, index=s)[1]))
        right = interpreted(of(lambda m, x: ntt.ntk(m, x[:2], x[2:], implementation="jacobian")))
        return relative_error(found(arrays, x, stored(index)), right(arrays, x)) < 1e-9

    drawn = st.tuples(st.integers(1, 6), st.integers(0, 2), st.integers(0, 9), st.integers(0, 9))
    assert examples_until_found(drawn, is_right, most=15) is None
    monkeypatch.setattr(_gather, "match_each", lambda supports, masks: jnp.array(True))
    found = examples_until_found(drawn, is_right)
    print(f"stale support: found by example {found}")
    assert found is not None


def test_a_refresh_forgets_the_structure(monkeypatch):
    """Masks given with counts of their own, or in a pattern, over a refresh."""
    teacher = eqx.nn.MLP(8, 4, 12, 1, jnp.tanh, key=jax.random.key(0))

    def is_right(case):
        kind, density = case
        if kind == "pattern":
            sparsity = ntt.Sparsity(0.5, pattern=ntt.NM(2, 4))
        else:
            sparsity = ntt.Sparsity(density, allocation=kind)
        scores = ntt.scores.Magnitude()(ntt.sparsify(teacher))
        mask = sparsity.mask(scores)
        config = ntt.NTTConfig(density, mask_every=1)
        if kind == "pattern":
            config = ntt.NTTConfig(0.5, mask_every=1, pattern=ntt.NM(2, 4))
        state = ntt.ntt_init(teacher, config, optax.sgd(0.0), mask=mask)
        again = state.method.sparsity.quiet_mask(scores, 1)
        counts = lambda m: [int(leaf.sum()) for leaf in jax.tree.leaves(m)]
        in_fours = lambda m: [
            leaf.reshape(-1, 4).sum(-1).max().item() for leaf in jax.tree.leaves(m)
        ]
        kept = counts(again) == counts(mask)
        return kept and (kind != "pattern" or in_fours(again) == in_fours(mask))

    drawn = st.tuples(
        st.sampled_from(("uniform", "erk", "pattern")), st.sampled_from((0.2, 0.3, 0.5))
    )
    assert examples_until_found(drawn, is_right, most=15) is None
    plain = lambda self, mask: dataclasses.replace(self, allocation=None, pattern=None)
    monkeypatch.setattr(ntt.Sparsity, "of_mask", plain)
    found = examples_until_found(drawn, is_right)
    print(f"structure lost: found by example {found}")
    assert found is not None
