"""A kernel in tiles over eight devices is the kernel of one device."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.devices import close, mesh_of, model_and_samples
from helpers.refusals import unchecked
from helpers.tiers import slow
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import ntt_eqx as ntt

pytestmark = pytest.mark.usefixtures("x64", "gathers")

OPTIONS = {
    "full": {},
    "diagonal": {"outputs": "diagonal"},
    "trace": {"outputs": "trace"},
    "ambient": {"kernel": "ambient"},
}


@pytest.mark.parametrize(
    "name, density, option, exchange",
    [
        slow("mlp", 0.1, "full", True),
        ("mlp", 0.1, "trace", False),
        ("mlp", None, "full", None),
        slow("cnn", 0.1, "full", True),
        ("cnn", 0.1, "ambient", False),
        ("cnn", None, "diagonal", True),
    ],
)
def test_uneven_batches(name, density, option, exchange):
    model, x1, x2 = model_and_samples(name, 13, 7, density=density)
    one = ntt.ntk(model, x1, x2, **OPTIONS[option])
    with ntt.distribute(exchange=exchange):
        many = ntt.ntk(model, x1, x2, **OPTIONS[option])
    assert one.shape == many.shape
    close(many, one)


@pytest.mark.parametrize("name, exchange", [("mlp", True), ("mlp", False), slow("cnn", True)])
def test_gradient(name, exchange):
    model, x1, x2 = model_and_samples(name, 9, 16, density=0.1)
    directions = ntt.sketch_directions(jax.random.key(2), 2, 4 if name == "mlp" else 3)
    directions = jax.tree.map(lambda d: d.astype(jnp.float64), directions)

    def loss(params, rest, x1):
        model = eqx.combine(params, rest)
        whole, sketch = ntt.ntk(model, x1, x2), ntt.ntk(model, x1, x2, directions=directions)
        return jnp.sum(jnp.sin(whole)) + jnp.sum(jnp.square(sketch))

    params, rest = eqx.partition(model, eqx.is_inexact_array)
    slopes = eqx.filter_jit(jax.grad(loss, (0, 2)))
    one = slopes(params, rest, jnp.asarray(x1))
    with ntt.distribute(exchange=exchange):
        many = slopes(params, rest, jnp.asarray(x1))
    jax.tree.map(close, many, one)


def test_result_stays_sharded():
    model, x1, x2 = model_and_samples("mlp", 16, 8)
    with ntt.distribute() as mesh:
        theta, f1, f2 = ntt.ntk_and_outputs(model, x1, x2)
    assert mesh.shape == {"rows": 4, "columns": 2}
    assert theta.sharding.spec[:2] == ("rows", "columns")
    assert {shard.data.shape for shard in theta.addressable_shards} == {(4, 4, 4, 4)}
    close(f1, jax.vmap(model)(x1))
    close(f2, jax.vmap(model)(x2))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("shape", [(8,), (2, 2, 2)])
def test_own_mesh(shape, kind):
    model, x1, x2 = model_and_samples("mlp", 10, 6, density=0.1)
    one = ntt.ntk(model, x1, x2)
    with ntt.distribute(mesh_of(shape, ("a", "b", "c")[: len(shape)], kind)):
        close(ntt.ntk(model, x1, x2), one)


def test_small_budget_is_kept_by_blocks_in_each_tile():
    model, x1, x2 = model_and_samples("mlp", 40, 40, density=0.1)
    one = ntt.ntk(model, x1, x2)
    with ntt.distribute():
        close(ntt.ntk(model, x1, x2, max_bytes=2000), one)
        close(ntt.ntk(model, x1, max_bytes=10**6), ntt.ntk(model, x1, x1))


def test_sharded_weights_and_samples():
    """Weights that lie sharded over an axis that tiles do not use stay there."""
    model, x1, x2 = model_and_samples("mlp", 8, 8)
    one = ntt.ntk(model, x1, x2)
    mesh = mesh_of((2, 2, 2), ("rows", "columns", "model"))
    put = lambda x: jax.device_put(
        x, NamedSharding(mesh, P("model") if x.shape[0] % 2 == 0 else P())
    )
    with ntt.distribute(mesh):
        sharded = jax.tree.map(lambda x: put(x) if eqx.is_array(x) else x, model)
        spread = jax.device_put(x1, NamedSharding(mesh, P(("rows", "columns"))))
        close(ntt.ntk(sharded, spread, x2), one)


def test_one_device_changes_nothing():
    model, x1, x2 = model_and_samples("cnn", 5, 3, density=0.1)
    one = ntt.ntk(model, x1, x2)
    with ntt.distribute(mesh_of((1,), ("a",))):
        same = ntt.ntk(model, x1, x2)
    assert np.array_equal(one, same) and same.sharding == one.sharding


@pytest.mark.parametrize(
    "options", [{"rows": ["x"]}, {"rows": ["a"], "columns": ["a"]}, {"rows": [], "columns": []}]
)
def test_axes_that_are_none(options):
    with pytest.raises(ValueError, match="distribute: rows="):
        with ntt.distribute(mesh_of((8,), ("a",)), **options):
            pass


@pytest.mark.parametrize(
    "mesh, options, message",
    [
        (jax.devices, {}, r"mesh must be a jax.sharding.Mesh, got list; .* jax.make_mesh\("),
        (lambda: jax.devices()[0], {}, "mesh must be a jax.sharding.Mesh, got .*Device"),
        (lambda: None, {"rows": "rows"}, "rows must be a tuple of names.*got 'rows'"),
        (lambda: None, {"columns": 3}, "columns must be a tuple of names.*got 3"),
        (lambda: None, {"rows": [0]}, r"rows must be a tuple of names.*got \[0\]"),
        (lambda: None, {"exchange": "yes"}, "exchange must be True, False or None, got 'yes'"),
    ],
)
def test_what_is_no_mesh(mesh, options, message):
    with unchecked(), pytest.raises(ValueError, match=f"^distribute: {message}"):
        with ntt.distribute(mesh(), **options):
            pass


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("name, density", [("mlp", 0.1), slow("cnn", None)])
def test_inside_a_shard_map_of_ones_own(name, density, check_vma):
    """What is zero on every device does not become a sum over devices."""
    model, x1, x2 = model_and_samples(name, 16, 6, density=density)
    params, rest = eqx.partition(model, eqx.is_inexact_array)
    kernel = lambda params, x1, x2: ntt.ntk(eqx.combine(params, rest), x1, x2)
    mesh = mesh_of((8,), ("a",))
    shared = jax.shard_map(
        kernel,
        mesh=mesh,
        in_specs=(P(), P("a"), P()),
        out_specs=P("a"),
        check_vma=check_vma,
    )

    def loss(params, kernel):
        theta = kernel(params, x1, x2)
        return jnp.sum(jnp.sin(theta)), theta

    run = lambda kernel: jax.jit(jax.grad(lambda p: loss(p, kernel), has_aux=True))(params)
    (one, theta), (many, found) = run(kernel), run(shared)
    close(found, theta)
    jax.tree.map(close, many, one)


@pytest.mark.parametrize("spec", [P(), P("a")])
def test_on_a_mesh_of_explicit_axes(spec):
    """JAX's default meshes, where types say how arrays are sharded."""
    model, x1, x2 = model_and_samples("mlp", 16, 6, density=0.1)
    one = ntt.ntk(model, x1, x2)
    mesh = mesh_of((8,), ("a",), AxisType.Explicit)
    with jax.set_mesh(mesh):
        x1 = jax.device_put(x1, NamedSharding(mesh, spec))
        close(ntt.ntk(model, x1, x2), one)
        close(jax.jit(lambda x1: ntt.ntk(model, x1, x2))(x1), one)
        with ntt.distribute(mesh):
            close(ntt.ntk(model, x1, x2), one)


class Chosen(eqx.Module):
    """A rule of a derivative (that of `relu`), and integers that the model holds."""

    layer: eqx.nn.Linear
    order: jax.Array

    def __call__(self, x):
        return jax.nn.relu(self.layer(x[self.order])) * jnp.where(self.order[:3] > 1, 1.0, 2.0)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("layer", ["parameters", "integers, too"])
def test_inside_a_mesh_in_use(kind, layer):
    """A program is traced under that mesh and runs where it is used by hand."""
    model = eqx.nn.MLP(5, 3, 8, 1, key=jax.random.key(0))
    if layer == "integers, too":
        model = Chosen(eqx.nn.Linear(5, 3, key=jax.random.key(0)), jnp.array([0, 2, 1, 4, 3]))
    x = jax.random.normal(jax.random.key(1), (9, 5))
    one = ntt.ntk(model, x, x[:4])
    mesh = mesh_of((4, 2), ("a", "b"), kind)
    with jax.set_mesh(mesh), ntt.distribute(mesh):
        close(ntt.ntk(model, x, x[:4]), one)
        close(eqx.filter_jit(lambda model, x: ntt.ntk(model, x, x[:4]))(model, x), one)
