"""Published numbers stand beside results that follow their protocol, and beside no others."""

import dataclasses

import pytest

from ntt_eqx.experiment.cells import plan
from ntt_eqx.experiment.presets import PRESETS
from ntt_eqx.experiment.published import PUBLISHED, protocol_of, published_beside
from ntt_eqx.experiment.report import write_tables
from ntt_eqx.experiment.settings import ScoringSettings
from ntt_eqx.models import MODELS

from .fabricated import held


def result(cell, accuracy, **changes):
    return {
        **{n: getattr(cell, n) for n in ("dataset", "model", "method", "scope", "density", "seed")},
        "mask": cell.mask.label if cell.mask else "",
        "settings_id": "0",
        "test_accuracy": accuracy,
        "train_accuracy": 1.0,
        "protocol": protocol_of(cell),
        **changes,
    }


def table(text):
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]


@pytest.mark.parametrize("name", PUBLISHED)
def test_numbers_are_of_networks_of_their_preset(name):
    preset = PRESETS[name]
    assert {protocol_of(cell) for cell in plan(preset)} == {name}
    for number in PUBLISHED[name]:
        assert number.model in preset.models and number.model in MODELS
        assert number.density in (*preset.densities, 1.0) and 50 < number.accuracy < 100
    places = [(n.dataset, n.model, n.method, n.density) for n in PUBLISHED[name]]
    assert len(places) == len(set(places))


def test_another_recipe_mask_or_start_is_another_protocol():
    random = next(c for c in plan(PRESETS["ultra-sparse"]) if c.method == "random")
    shorter = dataclasses.replace(random.training, epochs=1.0)
    others = ({"training": shorter}, {"mask": None}, {"start": "0" * 64}, {"model": "lenet-5"})
    for change in others:
        assert protocol_of(dataclasses.replace(random, **change)) is None
    plain = dataclasses.replace(random.mask, allocation="uniform")
    assert protocol_of(dataclasses.replace(random, seed=7, mask=plain)) == "ultra-sparse"


def test_another_score_or_transfer_is_another_protocol():
    preset = PRESETS["ultra-sparse"]
    for change in (
        {"scoring": ScoringSettings(examples=7)},
        {"transfer": dataclasses.replace(preset.transfer, epochs=1.0)},
    ):
        changed = plan(dataclasses.replace(preset, **change))
        uses = [c for c in changed if getattr(c, *change) is not None]
        assert uses and {protocol_of(cell) for cell in uses} == {None}
        assert {protocol_of(c) for c in changed if c not in uses} == {"ultra-sparse"}
    ablated = dataclasses.replace(preset.mask, ablation="shuffle")
    scored = dataclasses.replace(preset, mask=ablated, methods=("snip", "synflow"))
    assert {protocol_of(cell) for cell in plan(scored)} == {None}


def test_ours_stands_beside_the_published_number_of_the_same_network(tmp_path):
    cells = [c for c in plan(PRESETS["resnet-20"]) if c.density in (0.1, 0.05, 1.0)]
    of = lambda method, density: [c for c in cells if (c.method, c.density) == (method, density)]
    results = [result(c, 0.85 + 0.01 * c.seed) for c in of("random", 0.1)]
    results += [result(of("snip", 0.05)[0], 0.8)]
    header, _, *lines = table(published_beside(results))
    assert header == "Dataset,Model,Method,Density,Published (%),Ours (%),Source".split(",")
    assert ["cifar-10", "resnet-20-bn", "random, global", "0.1", "86.25", "86.00 ± 0.58"] in [
        line[:6] for line in lines
    ]
    assert ["random", "0.05", "83.56", "–"] in [line[2:6] for line in lines]
    run = held(tmp_path)
    write_tables(results, run)
    first, _, second = (tmp_path / "table.md").read_text().split("\n\n")
    assert table(second) == [header, *table(published_beside(results))[1:]] and "SNIP" in first
    elsewhere = [dict(r, protocol=None) for r in results]
    assert published_beside(elsewhere) == ""


def test_each_scope_has_its_line():
    cell = next(c for c in plan(PRESETS["vgg-19"]) if (c.method, c.density) == ("grasp", 0.02))
    results = [result(cell, 0.9), result(dataclasses.replace(cell, scope="layer"), 0.8)]
    lines = [line[2:6] for line in table(published_beside(results))]
    assert ["GraSP, per layer", "0.02", "92.19", "80.00"] in lines
    assert ["GraSP, global", "0.02", "92.19", "90.00"] in lines
    assert ["one-cycle magnitude", "0.02", "93.44", "–"] in lines
