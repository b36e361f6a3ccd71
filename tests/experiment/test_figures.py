"""Captions of figures, where their axes begin, and no figure where it would say nothing."""

import json

import numpy as np
import pytest

from ntt_eqx.experiment.figures import (
    accuracy_figure,
    densities_figure,
    distances_figure,
    kernel_figure,
    masks_figure,
    sparsity_figure,
)
from ntt_eqx.experiment.results import find_runs

from .fabricated import fabricate, write_run


def runs(tmp_path, **options):
    fabricate(
        tmp_path, **{"methods": ("ntt", "ntt-ambient", "dense"), "densities": (0.03,), **options}
    )
    return find_runs(tmp_path)


def test_errors_stand_at_the_share_of_weights_that_is_kept(tmp_path):
    """A density counts channels, of which few have fewer weights than their share."""
    for density, kept in ((0.1, 0.013), (0.3, 0.12)):
        fabricate(
            tmp_path / str(density), methods=("snip",), densities=(density,), kept_density=kept
        )
    (axes,) = sparsity_figure(find_runs(tmp_path)).axes
    (bars,) = axes.containers
    assert list(bars.lines[0].get_xdata()) == pytest.approx([1.3, 12.0])


def caption(figure):
    return figure.get_suptitle().replace("\n", " ")


def test_captions_say_what_is_shown(tmp_path):
    found = accuracy_figure(runs(tmp_path)).get_suptitle().split("\n")
    assert found[0] == "fashion-mnist, lenet-300-100, 3 % of weights kept"
    assert found[1:] == ["mean of 3 seeds, band: ± standard deviation"]


def test_one_seed_has_no_band(tmp_path):
    figure = accuracy_figure(runs(tmp_path, seeds=(4,)))
    assert caption(figure).endswith("3 % of weights kept 1 seed")
    assert not figure.axes[0].collections


def test_accuracy_begins_at_the_first_look_and_shows_all_of_it(tmp_path):
    (axes,) = accuracy_figure(runs(tmp_path)).axes
    low, high = axes.get_ylim()
    for line in axes.lines:
        assert line.get_xdata()[0] == 1000
        assert low < min(line.get_ydata()) and max(line.get_ydata()) < high


def test_both_ntts_differ_without_colour(tmp_path):
    (axes,) = accuracy_figure(runs(tmp_path)).axes
    looks = {line.get_label(): (line.get_linestyle(), line.get_marker()) for line in axes.lines}
    one, two = looks["NTT (active)"], looks["NTT (ambient)"]
    assert one[0] != two[0] and one[1] != two[1]


def test_two_evaluations_are_no_curve(tmp_path):
    found = runs(tmp_path, methods=("random",), seeds=(0,))
    path = found[0].directory / "metrics.jsonl"
    rows = path.read_text().splitlines()
    write_run(path.parent, metrics_jsonl="\n".join((rows[0], rows[1], rows[-1])) + "\n")
    assert accuracy_figure(found) is None
    write_run(path.parent, metrics_jsonl="\n".join((*rows[:3], rows[-1])) + "\n")
    assert accuracy_figure(found) is not None


def test_refreshes_are_marked(tmp_path):
    found = runs(tmp_path, methods=("ntt",), seeds=(0,))
    plain = distances_figure(found)
    assert "mask refresh" not in [text.get_text() for text in plain.legends[0].get_texts()]
    path = found[0].directory / "config.json"
    config = json.loads(path.read_text())
    write_run(path.parent, config_json={**config, "transfer": {"mask_every": 1000}})
    figure = distances_figure(find_runs(tmp_path))
    marks = [line for line in figure.axes[0].lines if line.get_label() == "mask refresh"]
    assert [list(line.get_xdata()) for line in marks] == [[1000, 2000, 3000]]
    assert [axes.get_xlabel() for axes in figure.axes] == ["", "Transfer steps"]
    write_run(
        path.parent, config_json={**config, "transfer": {"mask_every": 50}}
    )  # too many to tell
    figure, label = distances_figure(find_runs(tmp_path)), "mask refreshes, every 50 steps"
    (marks,) = [line for line in figure.axes[0].lines if line.get_label() == label]
    first, last = marks.get_xdata()
    assert first == 50 and last % 50 == 0 and last > 2000


def test_the_kernel_over_training(tmp_path):
    found = runs(tmp_path, methods=("ntt", "random"), seeds=(0, 1))
    assert kernel_figure(found) is None
    for run in found[:3]:  # of the last nothing was recorded
        path = run.directory / "metrics.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        for row in rows:
            if row["phase"] == "train":
                seen = {"alignment": 0.1, "effective_rank": 9.0, "eigenvalue_1": 1e3 + row["step"]}
                row["kernel"] = seen
        text = "".join(json.dumps(row) + "\n" for row in rows)
        write_run(path.parent, metrics_jsonl=text)
    figure = kernel_figure(found)
    labels = [axes.get_ylabel() for axes in figure.axes]
    assert labels == ["Alignment with labels", "Effective rank", "Largest eigenvalue"]
    largest = figure.axes[2]
    assert largest.get_yscale() == "log" and largest.get_xlabel() == "Training steps"
    for line in largest.lines:
        np.testing.assert_array_equal(line.get_ydata(), 1e3 + line.get_xdata())


def test_densities_only_where_layers_differ(tmp_path):
    assert densities_figure(runs(tmp_path / "layer")) is None
    figure = densities_figure(runs(tmp_path / "both", scopes=("layer", "global")))
    assert len(figure.axes) == 1
    assert len(figure.axes[0].get_yticklabels()) == 3


def test_logarithmic_axes_have_minor_ticks(tmp_path):
    found = runs(tmp_path, densities=(0.01, 0.1))
    axes = sparsity_figure(found).axes[0]
    assert len(axes.xaxis.get_minorticklocs()) > 5
    assert sparsity_figure(found[:1]) is None


@pytest.mark.parametrize("shape", [(12,), (3, 4), (1, 2, 2, 3)])
def test_inputs_that_are_no_images_have_no_pictures_of_masks(tmp_path, shape):
    found = runs(tmp_path, seeds=(0,))
    assert masks_figure({"random": np.ones((8, 12), bool)}, shape, found) is None


def test_each_mask_has_its_own_scale(tmp_path):
    found = runs(tmp_path, methods=("ntt", "random"), seeds=(0,))
    masks = {"NTT (active)": np.zeros((20, 16), bool), "random": np.zeros((20, 16), bool)}
    masks["NTT (active)"][:10, :3] = True
    masks["random"][0, ::2] = True
    figure = masks_figure(masks, (1, 4, 4), found)
    above = [axes for axes in figure.axes if axes.get_xlabel()]
    assert [axes.get_xlabel() for axes in above] == ["0 to 50 %", "0 to 5 %"]
    assert [axes.images[0].get_clim()[1] for axes in above] == pytest.approx([50, 5])
    assert "seed\u00a00" in caption(figure)
