"""Networks of one name that were made under different settings are told apart, in words."""

import dataclasses
from pathlib import Path

import jax
import pytest

from ntt_eqx.experiment.apart import told_apart
from ntt_eqx.experiment.cells import plan
from ntt_eqx.experiment.results import Run
from ntt_eqx.experiment.settings import CompareSettings, TrainingSettings, TransferSettings
from ntt_eqx.experiment.table import markdown, shown, summarise


def runs_of(**fields):
    """Finished runs of a comparison with these settings."""
    settings = dataclasses.replace(CompareSettings(), densities=(0.1,), seeds=(0, 1), **fields)
    return [
        Run(
            Path(cell.folder),
            "done",
            cell.to_json(),
            {
                **{name: getattr(cell, name) for name in ("dataset", "model", "method", "scope")},
                **{name: getattr(cell, name) for name in ("density", "seed", "settings_id")},
                "mask": cell.mask.label if cell.mask else "",
                "test_accuracy": 0.8 + 0.01 * cell.seed,
            },
        )
        for cell in plan(settings)
    ]


def words_of(runs):
    return {(run.config["method"], run.result.get("settings")) for run in told_apart(runs)}


def test_only_what_differs_is_said_and_only_where_it_does():
    usual = {"methods": ("ntt", "snip", "random", "dense")}
    one = runs_of(**usual)
    assert words_of(one) == {(name, None) for name in usual["methods"]}
    other = runs_of(**usual, transfer=TransferSettings(epochs=7.0, gradual=0.5))
    short = TransferSettings().epochs
    assert words_of(one + other) == {
        ("ntt", f"transfer.epochs {short:g}, transfer.gradual 0"),
        ("ntt", "transfer.epochs 7, transfer.gradual 0.5"),
        *((name, None) for name in ("snip", "random", "dense")),
    }


def test_settings_that_files_leave_out_have_their_default():
    usual = TrainingSettings()
    labels = dataclasses.replace(usual, labels=50, nesterov=True)
    runs = runs_of(methods=("random",), training=usual)
    runs += runs_of(methods=("random",), training=labels)
    assert words_of(runs) == {
        ("random", "training.labels none, training.nesterov off"),
        ("random", "training.labels 50, training.nesterov on"),
    }


def test_tables_and_legends_have_the_words():
    longer = dataclasses.replace(TrainingSettings(), epochs=99.0)
    runs = told_apart(runs_of(methods=("random",)) + runs_of(methods=("random",), training=longer))
    text = markdown(shown(summarise([run.result for run in runs])))
    assert " training.epochs 99 " in text and text.count(" random ") == 2


def test_watching_a_training_makes_no_other_network():
    usual = TrainingSettings()
    watched = dataclasses.replace(usual, kernel_images=16, evaluate_every=7)
    (one, *_), (other, *_) = (runs_of(methods=("random",), training=t) for t in (usual, watched))
    assert one.config != other.config
    assert one.result["settings_id"] == other.result["settings_id"]
    assert words_of([one, other]) == {("random", None)}


@pytest.mark.parametrize("part", ["transfer", "scoring", "training", "mask", "code"])
def test_files_of_other_versions_are_told_apart_as_far_as_they_say(part):
    runs = runs_of(methods=("ntt",))
    odd = [
        dataclasses.replace(
            run,
            config={**run.config, part: {"new": [1, None]}},
            result={**run.result, "settings_id": "odd"},
        )
        for run in runs
    ]
    words = {run.result["settings"] for run in told_apart(runs + odd)}
    assert len(words) == 2 and any("new 1 none" in text for text in words)


def test_networks_of_64_bit_types_are_others_and_are_not_compared_with_the_usual_ones():
    """Their seeds stand for other initial weights."""
    usual = runs_of(methods=("random", "snip"))
    with jax.enable_x64(True):
        wide = runs_of(methods=("snip",))
    assert not {run.directory for run in usual} & {run.directory for run in wide}
    assert words_of(usual) == {("random", None), ("snip", None)}
    runs = told_apart(usual + wide)
    table = summarise([run.result for run in runs]).set_index(["method", "settings"])
    assert table.lead.notna().to_dict() == {
        ("snip", "x64 off"): True,
        ("snip", "x64 on"): False,
        ("random", "x64 off"): False,
    }
