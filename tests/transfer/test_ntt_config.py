"""Settings that cannot work are refused; the others are the published ones."""

import math
from collections.abc import Mapping

import pytest
from helpers.arbitrary import VALUES, examples, explore, refused
from helpers.refusals import unchecked
from helpers.students import start
from hypothesis import strategies as st

import ntt_eqx as ntt

pytestmark = pytest.mark.usefixtures("gathers")


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
        ({"precision": "half"}, r"precision must be one of \('float32', .* got 'half'"),
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
        ({"density": "0.5"}, "density must be a number in"),
        ({"density": True}, "density must be a number in"),
        ({"density": None}, "density must be a number in"),
        ({"kernel_weight": "1"}, "kernel_weight must be finite and >= 0, got '1'"),
        ({"l2_weight": True}, "l2_weight must be finite"),
        ({"mask_every": 2.5}, "mask_every must be an integer of at least 1 or None, got 2.5"),
        ({"sketch_size": None}, "sketch_size must be an integer of at least 1, got None"),
        ({"kernel": None}, "kernel must be one of"),
        ({"num_steps": 0}, "num_steps must be an integer of at least 1 or None, got 0"),
    ],
)
def test_settings_that_cannot_work_are_errors(settings, message):
    with unchecked(), pytest.raises(ValueError, match="^NTTConfig: " + message):
        ntt.NTTConfig(**{"density": 0.1, **settings})


def test_a_density_that_empties_a_layer_names_it(getkey):
    with pytest.raises(ValueError, match=r"no weight in layer \.first\.weight"):
        start(getkey, ntt.NTTConfig(0.01))


def test_settings_are_the_published_ones():
    config = ntt.NTTConfig(density=0.03)
    assert (config.kernel_weight, config.l2_weight, config.mask_every) == (1e-3, 1e-4, 100)
    assert (config.scope, config.initial_mask, config.kernel) == ("layer", "magnitude", "active")


FIELDS = ["density", "num_steps", "scope", "initial_mask", "mask_every", "kernel", "kernel_weight",
          "l2_weight", "outputs", "sketch_size", "implementation"]  # fmt: skip


@examples(150, 5000)
def test_arbitrary_settings(examples):
    def holds(fields):
        make = lambda: ntt.NTTConfig(**{"density": 0.5, **fields})
        config = refused(make, ValueError, begins="NTTConfig")
        if config is not None:
            layers = isinstance(config.density, Mapping)
            shares = config.density.values() if layers else [config.density]
            assert shares and all(0.0 < share <= 1.0 for share in shares)

    fields = st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=3)
    explore(holds, examples, fields=fields)
