"""Every mistake that `ntk` can see is reported in its own words, before anything is traced."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.arbitrary import ANYTHING, arrays, examples, explore, refused
from helpers.refusals import (
    ASKS_FOR_ONE,
    HOLDS_THEM,
    Batched,
    NeedsKey,
    NeedsState,
    ReturnsState,
    Wrapped,
    linear,
    refusals,
)
from hypothesis import strategies as st

import ntt_eqx as ntt

X = np.ones((2, 3), np.float32)


class Returns(eqx.Module):
    """A model that returns what it was told to."""

    weight: jax.Array
    what: str = eqx.field(static=True)

    def __call__(self, x):
        y = self.weight * x
        return {
            "pair": (y, y),
            "integers": jnp.argmax(y)[None],
            "dictionary": {"logits": y},
            "nothing": None,
        }[self.what]


test_refusals = refusals(
    {
        "features": (lambda: ntt.ntk(linear(), jnp.asarray(X[:, :2])), ASKS_FOR_ONE),
        "features, oracle": (
            lambda: ntt.ntk(linear(), jnp.asarray(X[:, :2]), implementation="jacobian"),
            ASKS_FOR_ONE,
        ),
        "no axis": (lambda: ntt.ntk(linear(), jnp.ones(())), "x1: .*got a scalar float32"),
        "a list": (lambda: ntt.ntk(linear(), [[1.0, 2.0, 3.0]]), "x1: .*got list"),
        "second a list": (lambda: ntt.ntk(linear(), jnp.asarray(X), [1]), "x2: .*got list"),
        "batches": (lambda: ntt.ntk(Batched(), jnp.asarray(X)), ASKS_FOR_ONE),
        "key": (lambda: ntt.ntk(NeedsKey(), jnp.asarray(X)), HOLDS_THEM),
        "state": (lambda: ntt.ntk(NeedsState(), jnp.asarray(X)), HOLDS_THEM),
        "state, oracle": (
            lambda: ntt.ntk(ReturnsState(), jnp.asarray(X), implementation="ntk_vector_products"),
            "paired with its state by",
        ),
        "budget of text": (
            lambda: ntt.ntk(linear(), jnp.asarray(X), max_bytes="1G"),
            "max_bytes must be positive, got 1G",
        ),
    }
)


def test_an_error_inside_a_model_is_kept_as_the_cause():
    class Failing(Wrapped):
        def __call__(self, x):
            raise RuntimeError("the reason")

    with pytest.raises(
        ValueError, match=r"fails on one sample.*RuntimeError: the reason"
    ) as caught:
        ntt.ntk(Failing(), jnp.asarray(X))
    assert isinstance(caught.value.__cause__, RuntimeError)


BAD_ARGUMENTS = {
    "features": (dict(x2=np.ones((2, 4), np.float32)), r"x1 holds samples float32\[3\] but x2 "),
    "dtypes": (dict(x2=np.ones((2, 3), np.int32)), r"x2 holds int32\[3\]; both must suit"),
    "ranks": (dict(x2=np.ones((2, 3, 1), np.float32)), r"x2 holds float32\[3, 1\]"),
    "no samples": (dict(x1=X[:0]), "a batch must hold at least one sample"),
    "no samples in x2": (dict(x2=X[:0]), "a batch must hold at least one sample"),
    "no budget": (dict(max_bytes=0), "max_bytes must be positive, got 0"),
    "negative budget": (dict(max_bytes=-5), "max_bytes must be positive, got -5"),
    "directions and outputs": (
        dict(directions=(jnp.ones((1, 2)), jnp.ones((1, 2))), outputs="trace"),
        "directions go with outputs='full'",
    ),
    "directions and oracle": (
        dict(directions=(jnp.ones((1, 2)), jnp.ones((1, 2))), implementation="jacobian"),
        "directions go with outputs='full' and implementation='factors'",
    ),
}


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
def test_arguments(name):
    options, message = BAD_ARGUMENTS[name]
    options = {k: jnp.asarray(v) if isinstance(v, np.ndarray) else v for k, v in options.items()}
    options = dict(x1=jnp.asarray(X)) | options
    with pytest.raises(ValueError, match=message):
        ntt.ntk(linear(), options.pop("x1"), **options)


@pytest.mark.parametrize("name", ["kernel", "outputs", "precision", "implementation"])
def test_unknown_names(name):
    """A wrong name is refused by the type check under test, and by `ntk` itself without it."""
    from ntt_eqx._ntk._ntk import _check

    given = dict(kernel="active", outputs="full", precision="float32", implementation=None)
    kernel, *rest = (given | {name: "fancy"}).values()
    unchecked = getattr(_check, "__wrapped__", _check)
    with pytest.raises(ValueError, match=rf"ntk: {name} must be one of .*, got 'fancy'"):
        unchecked(X, None, kernel, rest[0], None, *rest[1:], None)


@pytest.mark.parametrize("what", ["pair", "integers", "dictionary", "nothing"])
def test_models_that_do_not_return_one_array(what):
    model = Returns(jnp.ones(3), what)
    with pytest.raises(ValueError, match="must map one sample to one floating-point array"):
        ntt.ntk(model, jnp.asarray(X))


@pytest.mark.parametrize("implementation", [None, "jacobian"])
def test_models_without_parameters(implementation):
    with pytest.raises(ValueError, match="ntk: the model has no floating-point parameters"):
        ntt.ntk(eqx.nn.Lambda(jnp.tanh), jnp.asarray(X), implementation=implementation)


@pytest.mark.parametrize(
    ("shape", "place"), [((2, 1), "weight"), ((3, 2), "weight"), ((), "bias"), ((3,), "bias")]
)
def test_metric_of_another_shape(shape, place):
    model = linear()
    metric = eqx.tree_at(lambda m: getattr(m, place), model, jnp.ones(shape))
    with pytest.raises(ValueError, match=rf"ntk: metric\.{place} has shape"):
        ntt.ntk(model, jnp.asarray(X), metric=metric)


def test_metric_of_another_structure():
    with pytest.raises(ValueError, match="ntk: the metric does not have the structure of Linear"):
        ntt.ntk(linear(), jnp.asarray(X), metric=[jnp.ones((2, 3)), jnp.ones(2)])


def test_directions_for_another_number_of_outputs():
    with pytest.raises(ValueError, match=r"ntk: directions .* 2 outputs"):
        ntt.ntk(linear(), jnp.asarray(X), directions=(jnp.ones((1, 3)), jnp.ones((1, 3))))


@examples(40, 1000)
def test_arbitrary_batches(examples):
    model = linear()

    def holds(x1, x2, kernel, outputs, max_bytes):
        options = dict(kernel=kernel, outputs=outputs, max_bytes=max_bytes)
        theta = refused(lambda: ntt.ntk(model, x1, x2, **options), ValueError, begins="ntk")
        if theta is not None:
            assert theta.shape[:2] == (len(x1), len(x1 if x2 is None else x2))
            assert theta.dtype == jnp.float32

    explore(
        holds,
        examples,
        x1=st.one_of(arrays([(2, 3)], ["f4"]), ANYTHING),
        x2=st.one_of(st.none(), arrays([(2, 3)], ["f4"]), ANYTHING),
        kernel=st.sampled_from(["active", "ambient", "both"]),
        outputs=st.sampled_from(["full", "trace", "sketch"]),
        max_bytes=st.sampled_from([None, 1, 0, -1, 2.5, "1G"]),
    )
