"""`benchmarks/few_units.py`: the counts of ERK on a part of the hidden units."""

import jax
import numpy as np
import pytest
from helpers.scripts import BENCHMARKS

import ntt_eqx as ntt


@pytest.mark.parametrize("steps", [0, 101])  # the mask is chosen anew after 100
def test_a_mask_lies_on_its_part_of_the_units_with_the_counts_of_erk(steps, monkeypatch, getkey):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from few_units import OnFewUnits

    net = ntt.models.Perceptron((1, 4, 5), 3, units=(20, 30), key=getkey())
    x = np.random.default_rng(0).normal(size=(128, 1, 4, 5)).astype(np.float32)
    rule = OnFewUnits(0.5, steps, hidden=0.2)
    found = jax.tree.leaves(rule(net, (x, None), 0.2, getkey()).mask)
    erk = ntt.Sparsity(0.2, allocation="erk", pattern=ntt.Block((1, 1)))
    whole = jax.tree.leaves(ntt.prune(net, ntt.scores.Random(getkey()), erk).mask)
    assert [int(m.sum()) for m in found] == [int(m.sum()) for m in whole]
    assert found[-1].all()
    first, second = found[:2]
    assert int(first.any(1).sum()) <= 10 and int(second.any(1).sum()) <= 15
    assert not (second.any(0) & ~first.any(1)).any()  # no weight behind a unit without one
