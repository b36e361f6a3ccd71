"""A sparse network for the tests of the supervised phase."""

import pytest
from helpers.clusters import network

from ntt_eqx import make_mask, scores, sparsify


@pytest.fixture
def sparse(getkey):
    model = network(getkey())
    return sparsify(model).with_mask(make_mask(scores.Random(getkey())(model), 0.4))
