"""Scopes: each method's own by default, one by METHOD@SCOPE; how tables and figures name them."""

import dataclasses
import math

import jax
import pytest

from ntt_eqx import allocate
from ntt_eqx.experiment._errors import ExperimentError
from ntt_eqx.experiment.cells import plan
from ntt_eqx.experiment.comparison import accuracies, checked
from ntt_eqx.experiment.figures import sparsity_figure
from ntt_eqx.experiment.figures._style import arrange
from ntt_eqx.experiment.methods import METHODS, Line, split_scope
from ntt_eqx.experiment.presets import PRESETS
from ntt_eqx.experiment.pruning import pruned_at_start
from ntt_eqx.experiment.results import find_runs, standard_error
from ntt_eqx.experiment.settings import (
    CompareSettings,
    MaskSettings,
    check,
)
from ntt_eqx.experiment.table import markdown, shown, summarise

from .conftest import TwoLayers
from .fabricated import fabricate


def lines(**fields):
    cells = plan(dataclasses.replace(CompareSettings(), **fields))
    return [cell.line for cell in cells]


def test_each_method_has_its_published_scope():
    found = {line.method: line.scope for line in lines(methods=tuple(METHODS))}
    layer = {"ntt", "ntt-ambient", "ntt-sketch", "random", "logit-snip", "ntt-gradient"}
    layer |= {"gmp", "rigl", "set", "wanda", "weighted-random"}
    assert {name for name, scope in found.items() if scope == "layer"} == layer
    assert {name for name, scope in found.items() if scope == ""} == {"dense"}
    assert set(found.values()) == {"layer", "global", ""}


def test_the_default_comparison_is_of_published_baselines():
    found = lines()
    assert Line("random", "erk", "") in found and Line("snip", "global", "") in found
    assert Line("weighted-random", "erk", "") in found
    assert Line("ntt", "layer", "") in found and Line("dense", "", "") in found


def test_one_method_can_have_a_scope_of_its_own():
    asked = lines(methods=("random@erk", "random", "snip@layer", "snip"), scopes=("global",))
    assert [line[:2] for line in asked] == [
        *(("random", "erk"), ("random", "global"), ("snip", "layer"), ("snip", "global")),
    ]
    both = lines(methods=("random", "random@layer", "dense"), scopes=("layer", "erk"))
    assert [line.scope for line in both] == ["layer", "erk", ""]  # each network once


def test_erk_is_the_network_of_the_older_spelling():
    make = lambda **fields: [c.fingerprint for c in plan(CompareSettings(**fields))]
    old = make(methods=("random",), scopes=("layer",), mask=MaskSettings(allocation="erk"))
    assert make(methods=("random@erk",)) == make(methods=("random",), scopes=("erk",)) == old


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("random@rek", "@rek is none of @layer, @global, @erk"),
        ("dense@global", "dense has no scope to choose"),
        ("snap@erk", "unknown method 'snap'"),
        ("@erk", "unknown method ''"),
    ],
)
def test_scopes_that_there_are_not(method, message):
    with pytest.raises(ExperimentError, match=message):
        checked(dataclasses.replace(PRESETS["quick"], methods=(method,)))


def test_a_reference_may_have_a_sign_in_its_path():
    assert split_scope("./a@b/mine.py:Mine") == ("./a@b/mine.py:Mine", None)
    assert split_scope("./a@b/mine.py:Mine@erk") == ("./a@b/mine.py:Mine", "erk")


def test_patterns_that_fix_shares_take_no_erk():
    mask = MaskSettings(pattern="2:4")
    with pytest.raises(ExperimentError, match="no other allocation"):
        check(CompareSettings(methods=("random@erk",), densities=(0.5,), mask=mask))


def test_masks_have_the_shares_of_erk():
    settings = CompareSettings(("mnist",), ("tiny",), ("random@erk",), densities=(0.3,))
    teacher = TwoLayers((1, 4, 4), 4, key=jax.random.key(0))
    (cell,) = plan(settings)
    sparse = pruned_at_start(cell, teacher, (1, 4, 4), None, jax.random.key(1))
    shares = {name: float(share) for name, share in sparse.densities().items()}
    wanted = allocate(sparse.mask, 0.3, "erk")
    assert shares == pytest.approx({name: float(share) for name, share in wanted.items()}, abs=0.05)
    assert shares[".hidden.weight"] < 0.3 < shares[".output.weight"]
    assert cell.name == "random erk 0.3 seed 0"


def test_methods_at_scopes_of_their_own_share_a_panel():
    ours = [Line("ntt", "layer", ""), Line("snip", "global", ""), Line("dense", "", "")]
    two = [Line("random", "layer", ""), Line("random", "erk", "")]
    panels, looks = arrange([*ours, *two])
    assert panels == [None]
    labels = [look["label"] for look in looks.values()]
    assert labels == [
        *("NTT (active), per layer", "SNIP, global", "dense"),
        *("random, per layer", "random, ERK"),
    ]
    assert [line for line, look in looks.items() if look.get("fillstyle") == "none"] == [two[1]]
    panels, looks = arrange([Line(m, s, "") for m in ("ntt", "snip") for s in ("layer", "global")])
    assert panels == ["layer", "global"]
    assert {look["label"] for look in looks.values()} == {"NTT (active)", "SNIP"}


def test_one_seed_has_the_standard_error_of_the_test_images():
    place = {"dataset": "d", "model": "m", "density": 0.1, "settings_id": "0"}
    result = {**place, "method": "random", "scope": "layer", "mask": "erk", "seed": 0}
    result |= {"test_accuracy": 0.84, "train_accuracy": 0.9, "test_images": 1000}
    error = math.sqrt(0.84 * 0.16 / 1000)
    assert standard_error(result) == pytest.approx(error)
    assert accuracies(result) == "test accuracy 84.00 ± 1.16 %, train accuracy 90.00 %"
    table = summarise([result])
    (row,) = table.itertuples()
    assert (row.scope, row.mask, row.test_error) == ("erk", "", pytest.approx(100 * error))
    header, _, line = markdown(shown(table)).splitlines()
    assert "Test accuracy" in header and " 84.00 ± 1.16 |" in line and "| erk " in line
    older = {key: value for key, value in result.items() if key != "test_images"}
    assert " 84.00 |" in markdown(shown(summarise([older])))
    assert accuracies(older) == "test accuracy 84.00 %, train accuracy 90.00 %"


def results_of(accuracies, **fields):
    """Results of one network a seed, given the accuracy of each."""
    place = {"dataset": "d", "model": "m", "density": 0.1, "settings_id": "0", "scope": "layer"}
    numbers = {"train_accuracy": 0.9, "test_images": 1000}
    return [
        {**place, **numbers, **fields, "seed": seed, "test_accuracy": accuracy}
        for seed, accuracy in accuracies.items()
    ]


def test_leads_are_paired_by_seed():
    erk = results_of({0: 0.80, 1: 0.84, 2: 0.88}, method="random", mask="erk")
    plain = results_of({0: 0.7, 1: 0.7}, method="random")
    ours = results_of({2: 0.90, 1: 0.85, 5: 0.1}, method="ntt")  # seed 5 has no partner
    dense = results_of({0: 0.95}, method="dense", scope=None, density=1.0)
    table = summarise([*ours, *plain, *erk, *dense])
    rows = {(row.method, row.scope): row for row in table.itertuples()}
    lead = rows["ntt", "layer"]
    assert (lead.lead, lead.lead_error) == (pytest.approx(1.5), pytest.approx(0.5))
    assert rows["random", "layer"].lead == pytest.approx(-12.0)
    assert all(math.isnan(rows[name].lead) for name in (("random", "erk"), ("dense", "")))
    error = 4.0 / math.sqrt(3)
    assert rows["random", "erk"].test_error == pytest.approx(error)
    text = markdown(shown(table))
    assert "Over random, ERK" in text and " +1.50 ± 0.50 |" in text and " 84.00 ± 2.31 |" in text
    assert "Over" not in markdown(shown(summarise([*ours, *dense])))
    assert "Over random |" in markdown(shown(summarise([*ours, *plain])))


def test_leads_are_within_images_model_and_density():
    random = results_of({0: 0.5}, method="random") + results_of(
        {0: 0.6}, method="random", density=0.3
    )
    random += results_of({0: 0.7}, method="random", dataset="e", settings_id="1")
    ours = results_of({0: 0.51}, method="snip") + results_of({0: 0.62}, method="snip", density=0.3)
    ours += results_of({0: 0.73}, method="snip", dataset="e")
    ours += results_of({0: 0.73}, method="snip", model="n")
    table = summarise([*random, *ours])
    leads = {
        (row.dataset, row.model, row.density): row.lead
        for row in table.itertuples()
        if row.method == "snip"
    }
    assert math.isnan(leads.pop(("d", "n", 0.1)))
    wanted = {("d", "m", 0.1): 1.0, ("d", "m", 0.3): 2.0, ("e", "m", 0.1): 3.0}
    assert leads == pytest.approx(wanted)


def test_leads_are_over_random_masks_of_the_same_kind():
    plain = results_of({0: 0.5}, method="random", mask="erk")
    few = results_of({0: 0.6}, method="random", mask="erk, few-channels:1/6")
    snip = [
        *results_of({0: 0.61}, method="snip", mask="few-channels:1/6"),
        *results_of({0: 0.52}, method="snip", scope="global"),
        *results_of({0: 0.53}, method="snip", mask="shuffle"),  # of which no random one is there
    ]
    rows = summarise([*plain, *few, *snip]).itertuples()
    leads = {(row.method, row.mask): row.lead for row in rows}
    assert math.isnan(leads.pop(("random", "")))
    wanted = {("random", "few-channels:1/6"): 10.0, ("snip", "few-channels:1/6"): 1.0}
    assert leads == pytest.approx({**wanted, ("snip", ""): 2.0, ("snip", "shuffle"): 3.0})


def test_leads_are_over_networks_that_were_trained_alike():
    short = results_of({0: 0.5, 1: 0.6}, method="random", settings_id="a")
    long = results_of({0: 0.7, 1: 0.8}, method="random", settings_id="b")
    snip = results_of({0: 0.9}, method="snip", settings_id="c")
    table = summarise([*short, *long, *snip])
    assert table.lead.isna().all() and "Over" not in markdown(shown(table))

    told = lambda results, words: [{**result, "settings": words} for result in results]
    five, ten = "training.epochs 5", "training.epochs 10"
    transfers = [
        (0.55, f"transfer.epochs 1, {five}", 5.0),
        (0.58, f"transfer.epochs 2, {five}", 8.0),
        (0.71, f"transfer.epochs 1, {ten}", 1.0),
    ]
    rows = [*told(short, five), *told(long, ten)]
    for accuracy, words, _ in transfers:
        rows += told(results_of({0: accuracy}, method="ntt", settings_id=words), words)
    found = {row.settings: row.lead for row in summarise(rows).itertuples() if row.method == "ntt"}
    assert found == pytest.approx({words: lead for _, words, lead in transfers})


def test_tables_tell_kept_weights_where_a_density_does_not():
    """A density counts filters, and those of one layer have more weights than of another."""
    place = {"dataset": "d", "model": "m", "density": 0.25, "settings_id": "0", "seed": 0}
    result = {**place, "method": "snip", "scope": "global", "mask": "filters"}
    result |= {"test_accuracy": 0.84, "train_accuracy": 0.9}
    for kept, told in ((0.25, False), (0.253, False), (0.116, True)):
        text = markdown(shown(summarise([{**result, "kept_density": kept}])))
        assert ("Kept" in text) == told and ("0.116" in text) == told
    assert "Kept" not in markdown(shown(summarise([result])))


def test_errors_are_on_a_logarithmic_axis(tmp_path):
    fabricate(tmp_path, densities=(0.01, 0.1), methods=("ntt", "random", "dense"))
    runs = find_runs(tmp_path)
    (axes,) = sparsity_figure(runs).axes
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    assert axes.get_ylabel() == "Test error (%)"
    rows = {(r.method, r.density): r for r in summarise([run.result for run in runs]).itertuples()}
    drawn = {bars.get_label(): bars.lines[0].get_ydata() for bars in axes.containers}
    wanted = [100 - rows["ntt", density].test for density in (0.01, 0.1)]
    assert list(drawn["NTT (active)"]) == pytest.approx(wanted)


def test_no_error_at_all_is_drawn_above_zero(tmp_path):
    fabricate(tmp_path, densities=(0.01, 0.1), methods=("random",), test_accuracy=1.0)
    (axes,) = sparsity_figure(find_runs(tmp_path)).axes
    (bars,) = axes.containers
    assert all(0 < value < 0.01 for value in bars.lines[0].get_ydata())
