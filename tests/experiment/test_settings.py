"""Settings from files are checked by name, type and range; cells hold what results depend on."""

import dataclasses
import json

import pytest

from ntt_eqx import Recipe
from ntt_eqx.experiment._errors import ExperimentError
from ntt_eqx.experiment.cells import plan, write_or_check_config
from ntt_eqx.experiment.presets import PRESETS
from ntt_eqx.experiment.settings import (
    CompareSettings,
    TrainingSettings,
    TransferSettings,
    check,
    from_json,
    load_config,
    to_json,
)

from .fabricated import held


def read(value):
    return from_json(CompareSettings, value, where="config.json")


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_valid_and_survive_json(preset):
    settings = check(PRESETS[preset])
    assert from_json(CompareSettings, to_json(settings), where="") == settings


def test_the_paper_preset_is_the_published_protocol():
    paper = PRESETS["paper"]
    assert (paper.transfer.epochs, paper.transfer.batch_size) == (20, 64)
    assert (paper.transfer.learning_rate, paper.transfer.mask_every) == (5e-4, 100)
    assert (paper.transfer.kernel_weight, paper.transfer.held_out) == (1e-3, 0.002)
    assert (paper.training.epochs, paper.training.learning_rate) == (50, 1e-3)
    assert (paper.training.l2, paper.training.held_out) == (1e-8, 0.1)
    assert len(paper.seeds) == 5


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], "config.json: expected an object with fields, got \\[\\]"),
        ({"sedds": [1]}, "unknown field 'sedds'. Did you mean 'seeds'.*Fields: datasets"),
        ({"seeds": 3}, "field 'seeds' must be a list, got 3"),
        ({"seeds": ["a"]}, r"field 'seeds'\[0\] must be of type int, got \"a\""),
        ({"seeds": [True]}, r"field 'seeds'\[0\] must be of type int, got true"),
        ({"methods": [3]}, r"field 'methods'\[0\] must be of type str, got 3"),
        (
            {"transfer": {"initial_mask": "snap"}},
            "'initial_mask' must be one of random, weighted-random",
        ),
        ({"transfer": {"epoch": 3}}, "field 'transfer': unknown field 'epoch'. Did you mean"),
        ({"transfer": {"epochs": "3"}}, "field 'transfer'.'epochs' must be of type float"),
        ({"training": {"rescale": 1}}, "field 'training'.'rescale' must be of type bool"),
        ({"transfer": 3}, "field 'transfer': expected an object"),
    ],
)
def test_wrong_fields_are_named(value, message):
    with pytest.raises(ExperimentError, match=message):
        read(value)


def test_a_config_file_changes_what_it_names(tmp_path):
    path = tmp_path / "c.json"
    path.write_text(json.dumps({"seeds": [4], "transfer": {"epochs": 1, "l2_weight": None}}))
    base = PRESETS["paper"]
    settings = load_config(path, base)
    assert settings.seeds == (4,) and settings.transfer.epochs == 1.0
    assert settings.training == base.training and settings.transfer.batch_size == 64


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": ("snap",)}, "unknown method 'snap'. Did you mean 'snip'"),
        ({"methods": ("a:b",)}, "method 'a:b' is code of your own"),
        ({"densities": ()}, "densities: give at least one"),
        ({"densities": (0.0,)}, "densities: 0.0 must be a number above 0 and at most 1"),
        ({"densities": (float("nan"),)}, "densities: nan"),
        ({"densities": (1.5,)}, "densities: 1.5"),
        ({"seeds": (1, 1)}, "seeds: .* names one of them twice"),
        ({"seeds": (-1,)}, "seeds: -1"),
        ({"transfer": TransferSettings(batch_size=7)}, "transfer.batch_size: 7 is odd.*use 8"),
        ({"transfer": TransferSettings(epochs=float("inf"))}, "transfer.epochs: inf"),
        ({"transfer": TransferSettings(learning_rate=0.0)}, "transfer.learning_rate: 0.0"),
    ],
)
def test_values_out_of_range_are_named(changes, message):
    with pytest.raises(ExperimentError, match=message):
        check(dataclasses.replace(PRESETS["quick"], **changes))


SETTINGS = CompareSettings(
    methods=("ntt", "random", "snip", "dense"),
    scopes=("layer", "global"),
    densities=(0.03, 0.1),
    seeds=(0, 1),
)


def test_a_plan_names_each_cell_once():
    cells = plan(SETTINGS)
    assert len(cells) == 2 * (3 * 2 * 2 + 1)
    assert len({cell.folder for cell in cells}) == len(cells)
    dense = [cell for cell in cells if cell.method == "dense"]
    assert [(c.scope, c.density) for c in dense] == [(None, 1.0)] * 2


def test_a_cell_ignores_settings_that_its_method_does_not_use():
    changed = dataclasses.replace(SETTINGS, transfer=TransferSettings(epochs=1.0))
    before = {c.name: c.fingerprint for c in plan(SETTINGS)}
    after = {c.name: c.fingerprint for c in plan(changed)}
    assert {name for name in before if before[name] != after[name]} == {
        name for name in before if name.startswith("ntt")
    }


def test_published_values_fill_what_is_left_out():
    make = lambda dataset, model, method: plan(CompareSettings((dataset,), (model,), (method,)))[0]
    assert make("mnist", "lenet-300-100", "ntt").transfer.l2_weight == 1e-4
    assert make("mnist", "lenet-5", "ntt").transfer.l2_weight == 1e-5
    assert make("mnist", "lenet-5", "ntt-sketch").transfer.sketch_size == 2
    assert make("mnist", "lenet-5", "snip").scoring.examples == 100
    assert make("cifar-10", "conv-4", "snip").scoring.examples == 128
    assert make("mnist", "lenet-5", "random").scoring is None


def test_settings_that_came_later_leave_older_results_in_their_place():
    ntt, sketched = plan(CompareSettings(methods=("ntt", "ntt-sketch")))
    assert "decay" not in ntt.to_json()["transfer"]
    assert "sketch_size" not in ntt.to_json()["transfer"]
    assert sketched.to_json()["transfer"]["sketch_size"] == 2
    falling = dataclasses.replace(CompareSettings(), transfer=TransferSettings(decay=0.1))
    assert plan(falling)[0].to_json()["transfer"]["decay"] == 0.1


def test_results_of_before_recipes_keep_their_place():
    """The hashes that version 0.2.0 and later gave to these networks."""
    asked: dict = {"methods": ("ntt", "random", "snip", "dense"), "scopes": ("layer",)}
    found = [c.fingerprint[:8] for c in plan(dataclasses.replace(PRESETS["quick"], **asked))]
    assert found == ["5dd753e3", "490bfe8c", "9f3d7111", "850675c5"]
    changed = dataclasses.replace(TrainingSettings(), optimizer="sgd", momentum=0.9)
    (cell,) = plan(CompareSettings(methods=("random",), training=changed))
    training = cell.to_json()["training"]
    assert (training["optimizer"], training["momentum"]) == ("sgd", 0.9)
    assert "schedule" not in training and "milestones" not in training


def test_training_settings_are_a_recipe():
    """One default and one type for each field, so that neither can leave the other behind."""
    defaults = lambda kind: {f.name: f.default for f in dataclasses.fields(kind)}
    ours = defaults(TrainingSettings)
    assert {name: ours[name] for name in defaults(Recipe)} == defaults(Recipe)
    assert TrainingSettings().recipe() == Recipe()
    wrong = dataclasses.replace(PRESETS["quick"], training=TrainingSettings(momentum=0.9))
    with pytest.raises(ExperimentError, match="^training.momentum=0.9 does nothing without"):
        check(wrong)


def test_a_directory_belongs_to_one_configuration(tmp_path):
    one, two = plan(SETTINGS)[:2]
    run = held(tmp_path)
    write_or_check_config(run, one.to_json())
    write_or_check_config(run, one.to_json())
    with pytest.raises(ExperimentError, match="another configuration .*method.* differ.*--out"):
        write_or_check_config(run, dataclasses.replace(one, method="random", seed=3).to_json())
    run.write_json("config.json", {**one.to_json(), "format": 99})
    with pytest.raises(ExperimentError, match="newer version"):
        write_or_check_config(run, one.to_json())
    run.write({"config.json": b"[]"})
    with pytest.raises(ExperimentError, match="not the configuration of an ntt-eqx run"):
        write_or_check_config(run, two.to_json())
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ExperimentError, match="config.json: damaged or changed"):
        write_or_check_config(run, two.to_json())
