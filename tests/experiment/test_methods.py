"""Every method makes a mask of the density asked for; patterns, first masks and their checks."""

import contextlib
import dataclasses
import warnings

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ntt_eqx import LayerCollapseWarning, SparseModel, sparsify
from ntt_eqx.data import Split, make_dataset
from ntt_eqx.experiment._errors import ExperimentError, NetworkFailed
from ntt_eqx.experiment.cells import plan
from ntt_eqx.experiment.methods import METHODS, FirstMask
from ntt_eqx.experiment.phases import planned_steps, training_phase, transfer_phase
from ntt_eqx.experiment.presets import PRESETS
from ntt_eqx.experiment.pruning import (
    ablated,
    check_fits,
    collapse_shown,
    pruned_at_start,
    sparsity_of,
)
from ntt_eqx.experiment.settings import (
    CompareSettings,
    MaskSettings,
    ScoringSettings,
    TrainingSettings,
    TransferSettings,
    check,
    parse_pattern,
)

from .conftest import TwoLayers

SCORED = [name for name, method in METHODS.items() if method.score and not method.dynamic]


def cell_of(method, scope="layer", density=0.1, **fields):
    fields = {"scoring": ScoringSettings(examples=6, iterations=2), **fields}
    return one_cell("mnist", "tiny", method, scope, density, **fields)


def one_cell(dataset, model, method, scope="layer", density=0.1, **fields):
    (cell,) = plan(
        CompareSettings((dataset,), (model,), (method,), (scope,), (density,), (0,), **fields)
    )
    return cell


@pytest.fixture
def teacher():
    return TwoLayers((1, 4, 4), 4, key=jax.random.key(0))


def start(cell, teacher):
    x = jax.random.normal(jax.random.key(1), (6, 1, 4, 4))
    y = jnp.arange(6, dtype=jnp.int32) % 4
    return pruned_at_start(cell, teacher, (1, 4, 4), (x, y), jax.random.key(2))


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("method", SCORED)
def test_every_method_keeps_the_share_asked_for(method, scope, teacher):
    # Norms of different layers' inputs do not compare: over all layers Wanda empties one here.
    collapses = (method, scope) == ("wanda", "global")
    with pytest.warns(LayerCollapseWarning) if collapses else contextlib.nullcontext():
        kept = start(cell_of(method, scope, 0.25), teacher).mask
    sizes = [int(m.sum()) for m in jax.tree.leaves(kept)]
    assert sum(sizes) == 30 and (scope == "global" or sizes == [24, 6])


def test_every_score_can_choose_the_first_mask_of_ntt(teacher):
    import typing

    names = typing.get_args(FirstMask)
    assert set(names) == set(SCORED)
    assert {name for name in names if METHODS[name].labels} == {"snip", "grasp"}
    for name in ("magnitude", "px", "snip"):
        cell = cell_of("ntt", transfer=TransferSettings(initial_mask=name))
        found, wanted = start(cell, teacher), start(cell_of(name), teacher)
        same = jax.tree.map(lambda a, b: bool((a == b).all()), found.mask, wanted.mask)
        assert all(jax.tree.leaves(same)), name


def test_masks_follow_their_pattern(teacher):
    make = lambda density, **mask: start(
        cell_of("magnitude", density=density, mask=MaskSettings(**mask)), teacher
    )
    hidden = np.asarray(make(0.5, pattern="2:4").mask.hidden.weight)
    assert (hidden.reshape(6, 4, 4).sum(-1) == 2).all()
    whole = make(0.5, pattern="2:4").mask.output.weight  # six inputs are no multiple of four
    assert bool(whole.all())
    filters = np.asarray(make(0.5, pattern="filters").mask.hidden.weight)
    assert sorted(filters.mean(1)) == [0, 0, 0, 1, 1, 1]
    assert bool(make(0.5, pattern="filters").mask.output.weight.all())  # no class is cut off
    blocks = np.asarray(make(0.5, pattern="block:2x4").mask.hidden.weight)
    assert set(blocks.reshape(3, 2, 4, 4).mean((1, 3)).ravel()) == {0, 1}
    shares = make(0.3, allocation="erk").densities()
    assert shares[".hidden.weight"] < 0.3 < shares[".output.weight"]


def numbers():
    x = np.random.default_rng(0).normal(size=(32, 1, 4, 4)).astype(np.float32)
    split = Split(x, np.arange(32, dtype=np.int32) % 4)
    return make_dataset("numbers", split, split, 4)


@pytest.mark.parametrize(
    ("density", "mask"),
    [
        (0.5, MaskSettings(pattern="2:4")),
        (0.3, MaskSettings("erk")),
    ],
)
def test_the_masks_of_ntt_hold_through_its_refreshes(density, mask, teacher):
    settings = TransferSettings(2.0, 8, 0.1, mask_every=2, held_out=0.0)
    cell = one_cell("numbers", "tiny", "ntt", density=density, mask=mask, transfer=settings)
    phase = transfer_phase(cell, teacher, numbers(), "")
    state, _ = phase.run(phase.state, phase.batches, num_steps=phase.num_steps)
    kept, before = state.student.mask, phase.state.student.mask
    assert all(bool(sparsity_of(cell, teacher, (1, 4, 4)).holds(found)) for found in (kept, before))
    assert bool((kept.hidden.weight != before.hidden.weight).any())
    assert kept.output.weight.all() == (mask.pattern == "2:4")


def test_the_density_of_a_transfer_falls_in_the_share_asked_for(teacher):
    settings = TransferSettings(2.5, 8, 1e-3, mask_every=2, held_out=0.0, gradual=0.6)
    mask = MaskSettings("erk")
    cell = one_cell("numbers", "tiny", "ntt", density=0.3, mask=mask, transfer=settings)
    phase = transfer_phase(cell, teacher, numbers(), "")
    densities = []
    watch = lambda progress: densities.append(float(progress.state.student.density()))
    phase.run(phase.state, phase.batches, num_steps=phase.num_steps, on_step=watch)
    assert phase.num_steps == 10 and float(phase.state.student.density()) == 1
    cubic = [0.3 + 0.7 * (1 - min(t, 6) / 6) ** 3 for t in (2, 4, 6, 8, 10)]
    np.testing.assert_allclose(densities[1::2], cubic, atol=1 / 120)


def test_a_falling_density_that_nothing_can_follow_is_refused(teacher):
    settings = TransferSettings(gradual=0.5)
    cell = one_cell(
        "numbers", "tiny", "ntt", density=0.5, mask=MaskSettings(pattern="2:4"), transfer=settings
    )
    with pytest.raises(ExperimentError, match="gradual lowers the density, which"):
        check_fits(cell, teacher, (1, 4, 4))
    for beside in ({"initial_mask": "snip"}, {"mask_every": 0}):
        with pytest.raises(ExperimentError, match="gradual: the first mask keeps all weights"):
            check(dataclasses.replace(settings, **beside))


def test_masks_of_ntt_keep_channels_of_the_network(teacher):
    """At its start and after its refreshes."""
    settings = TransferSettings(1.0, 8, 1e-3, mask_every=2, held_out=0.0, initial_mask="random")
    mask = MaskSettings(pattern="channels")
    cell = one_cell("numbers", "tiny", "ntt", density=0.5, mask=mask, transfer=settings)
    phase = transfer_phase(cell, teacher, numbers(), "")
    state, _ = phase.run(phase.state, phase.batches, num_steps=phase.num_steps)
    for found in (state.student.mask, phase.state.student.mask):
        assert bool(sparsity_of(cell, teacher, (1, 4, 4)).holds(found))
        kept = found.hidden.weight.any(axis=1)
        assert kept.sum() == 3 and bool((found.output.weight == kept[None]).all())


def test_a_sketched_transfer_and_a_rate_that_falls(teacher):
    settings = TransferSettings(2.0, 8, 0.1, decay=0.25, sketch_size=3, held_out=0.0)
    cell = one_cell("numbers", "tiny", "ntt-sketch", transfer=settings)
    phase = transfer_phase(cell, teacher, numbers(), "")
    assert phase.state.method.loss.probe.size == 3 and phase.state.method.loss.kernel == "ambient"
    optimizer, one = phase.state.method.optimizer, {"w": jnp.ones(())}
    state, updates = optimizer.init(one), []
    with jax.numpy_dtype_promotion("standard"):
        for _ in range(phase.num_steps + 1):  # Adam's step along a constant gradient is the rate
            update, state = optimizer.update(one, state)
            updates.append(-float(update["w"]))
    half = (1 + 0.25) / 2
    found = [updates[0], updates[phase.num_steps // 2], updates[-1]]
    np.testing.assert_allclose(found, [0.1, 0.1 * half, 0.1 * 0.25], rtol=1e-4)


def test_ablations(teacher):
    plain = start(cell_of("magnitude", density=0.25), teacher)
    upside = start(
        cell_of("magnitude", density=0.75, mask=MaskSettings(ablation="invert")), teacher
    )
    assert bool((plain.mask.hidden.weight ^ upside.mask.hidden.weight).all())
    key = jax.random.key(4)
    shape = teacher.hidden.weight.shape[1:]
    changed = lambda kind, sparse: ablated(
        cell_of("snip", mask=MaskSettings(ablation=kind)), teacher, shape, sparse, key
    )
    shuffled = changed("shuffle", plain)
    assert shuffled.mask.hidden.weight.sum() == plain.mask.hidden.weight.sum()
    assert bool((shuffled.mask.hidden.weight != plain.mask.hidden.weight).any())
    moved = SparseModel(jax.tree.map(lambda leaf: 2 * leaf, plain.model), plain.mask)  # transferred
    random = changed("shares", moved)
    assert eqx.tree_equal(random.mask, shuffled.mask)
    assert eqx.tree_equal(random.model, sparsify(teacher).model)
    same = changed("initial", moved)
    assert eqx.tree_equal(same, SparseModel(sparsify(teacher).model, plain.mask))
    other = changed("reinitialise", plain)
    assert bool((other.mask.hidden.weight == plain.mask.hidden.weight).all())
    assert bool((other.model.hidden.weight != plain.model.hidden.weight).any())


@pytest.mark.parametrize(
    "text",
    [
        *("2:4", "1:1", "block:4x4", "filters", "inputs", "channels"),
        *("few-channels", "few-channels:1/6", "few-channels:0.1", None),
    ],
)
def test_patterns_by_name(text):
    assert (parse_pattern(text) is None) == (text is None)


@pytest.mark.parametrize(
    "text",
    ["4:2", "0:4", "2-4", "block:0x4", "block:4", "rows", "", "9" * 99]
    + ["few-channels:0", "few-channels:2", "few-channels:1/0", "few-channels:0.0"],
)
def test_unknown_patterns_are_explained(text):
    with pytest.raises(ExperimentError, match=r"mask\.pattern: "):
        parse_pattern(text)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"mask": MaskSettings(allocation="erk"), "scopes": ("global",), "methods": ("snip",)},
            "mask.allocation: .* only scope layer",
        ),
        (
            {"mask": MaskSettings(pattern="2:4"), "methods": ("snip",), "scopes": ("layer",)},
            "2:4 keeps 0.5 of each layer; use --densities 0.5",
        ),
        (
            {
                "mask": MaskSettings(pattern="2:4"),
                "methods": ("random@erk", "random@layer"),
                "densities": (0.5,),
            },
            "no other allocation",
        ),
        ({"mask": MaskSettings(ablation="invert")}, "ntt has no scores to invert"),
    ],
)
def test_masks_that_contradict_other_settings(changes, message):
    with pytest.raises(ExperimentError, match=message):
        check(dataclasses.replace(PRESETS["quick"], **changes))


def test_a_mask_that_does_not_fit_is_found_before_anything_is_computed(teacher):
    with pytest.raises(ExperimentError, match=r"snip layer 0.001 seed 0, tiny: density .* leaves"):
        check_fits(cell_of("snip", density=0.001), teacher, (1, 4, 4))
    check_fits(cell_of("snip", "global", density=0.01), teacher, (1, 4, 4))
    check_fits(cell_of("snip", density=0.5, mask=MaskSettings(pattern="2:4")), teacher, (1, 4, 4))


def test_a_collapsed_layer_is_one_plain_line(teacher):
    said = []
    sharp = TwoLayers((1, 4, 4), 4, key=jax.random.key(0))
    sharp = jax.tree.map(lambda w: 100 * w if w.shape == (6, 16) else w, sharp)
    with collapse_shown(said.append, "[1/2] magnitude"):
        start(cell_of("magnitude", "global", 0.1), sharp)
        start(cell_of("magnitude", "global", 0.1), sharp)
    (line,) = said
    assert line.startswith("[1/2] magnitude: layer collapse, no weight is left in .output.weight;")
    with pytest.raises(UserWarning, match="another"), collapse_shown(said.append, ""):
        warnings.warn("another", UserWarning, stacklevel=1)
    assert issubclass(LayerCollapseWarning, UserWarning) and len(said) == 1


def test_scores_that_are_not_finite_are_explained(teacher):
    broken = jax.tree.map(lambda w: w * jnp.nan, teacher)
    with pytest.raises(NetworkFailed, match="mnist, tiny, magnitude layer 0.1 seed 0: .*NaN"):
        start(cell_of("magnitude"), broken)


def test_results_of_the_first_format_keep_their_place():
    settings = dataclasses.replace(
        PRESETS["paper"], methods=("ntt", "snip", "random", "dense"), seeds=(0,), densities=(0.03,)
    )
    found = {cell.method: cell.fingerprint[:8] for cell in plan(settings)}
    assert found == FIRST_FORMAT


FIRST_FORMAT = {
    "ntt": "2291ea93",
    "snip": "1f5ed07f",
    "random": "f0341151",
    "dense": "b43bc618",
}


def test_published_rounds_are_filled_in():
    rounds = {
        method: one_cell("mnist", "lenet-5", method).scoring.iterations
        for method in ("synflow", "px", "ntk-sap", "snip", "grasp")
    }
    assert rounds == {"synflow": 100, "px": 100, "ntk-sap": 20, "snip": 1, "grasp": 1}


@pytest.mark.parametrize(
    ("method", "trainings"), [("gmp", 1), ("rigl", 1), ("set", 1), ("lottery-ticket", 6)]
)
@pytest.mark.filterwarnings("ignore:train. no path:ntt_eqx.LayerCollapseWarning")
def test_a_mask_that_changes_in_training_ends_at_the_share_asked_for(method, trainings, teacher):
    settings = TrainingSettings(4.0, 8, learning_rate=0.01, held_out=0.0)
    cell = cell_of(method, density=0.25, training=settings)
    begun = start(cell, teacher)
    sizes = lambda sparse: [int(m.sum()) for m in jax.tree.leaves(sparse.mask)]
    assert sizes(begun) == ([24, 6] if METHODS[method].score else [96, 24])
    phase = training_phase(cell, begun, numbers(), "")
    assert phase.num_steps == 16 * (trainings if trainings == 1 else 1 + trainings)
    assert planned_steps(cell, lambda name: numbers()) == {"train": phase.num_steps}
    state, _ = phase.run(phase.state, phase.batches, num_steps=phase.num_steps, log_every=None)
    assert sizes(state.trained) == [24, 6]
    if METHODS[method].score:
        pairs = zip(*(jax.tree.leaves(n.mask) for n in (begun, state.model)), strict=True)
        assert any((old != new).any() for old, new in pairs)


def test_what_cannot_change_in_training_is_refused(teacher):
    pattern = cell_of("gmp", density=0.5, mask=MaskSettings(pattern="2:4"))
    with pytest.raises(ExperimentError, match="GMP lowers the density"):
        check_fits(pattern, teacher, (1, 4, 4))
    for method in ("rigl", "set"):
        for pattern in ("filters", "channels", "fan-in:2"):
            groups = cell_of(method, density=0.5, mask=MaskSettings(pattern=pattern))
            with pytest.raises(ExperimentError, match="drops and grows single weights"):
                check_fits(groups, teacher, (1, 4, 4))
        for pattern in ("block:1x1", "fan-in"):
            single = cell_of(method, density=0.5, mask=MaskSettings(pattern=pattern))
            check_fits(single, teacher, (1, 4, 4))
    averaged = TrainingSettings(ema=0.9)
    with pytest.raises(ExperimentError, match="average of weights that are rewound"):
        check_fits(cell_of("lottery-ticket", training=averaged), teacher, (1, 4, 4))
    for method in ("gmp", "lottery-ticket"):
        settings = CompareSettings(methods=(method,), mask=MaskSettings(ablation="invert"))
        with pytest.raises(ExperimentError, match=f"{method} has no scores to invert"):
            check(settings)
