"""Training on few labelled images: which they are, who sees them, and who sees all others, too."""

import jax
import numpy as np
import pytest

from ntt_eqx import sparsify
from ntt_eqx.data import Split, make_dataset
from ntt_eqx.experiment._errors import ExperimentError
from ntt_eqx.experiment.cells import plan
from ntt_eqx.experiment.images import parts
from ntt_eqx.experiment.phases import planned_steps, training_phase
from ntt_eqx.experiment.running import _examples
from ntt_eqx.experiment.settings import (
    CompareSettings,
    ScoringSettings,
    TrainingSettings,
    TransferSettings,
    check,
)

from .conftest import TwoLayers

TRAINING = TrainingSettings(2.0, 5, held_out=0.25, labels=10)
IDENTITY = np.arange(80, dtype=np.float32)  # each image holds its own number


def numbered():
    """80 images of four classes, of which the last has 6 and the first 50."""
    x = np.broadcast_to(IDENTITY[:, None, None, None], (80, 1, 2, 2)).copy()
    y = np.repeat([0, 1, 2, 3], [50, 12, 12, 6]).astype(np.int32)
    return make_dataset("numbered", Split(x, y), Split(x[::8], y[::8]), 4)


def numbers_of(part):
    return set(np.asarray(part.split.x)[:, 0, 0, 0].tolist())


def cell_of(method, **fields):
    fields = {"training": TRAINING, "scoring": ScoringSettings(examples=20), **fields}
    (cell,) = plan(CompareSettings(("numbered",), ("tiny",), (method,), ("layer",), **fields))
    return cell


@pytest.mark.parametrize("count", [1, 4, 7, 20, 33, 60])
def test_as_many_of_each_class_as_there_can_be(count):
    used, held_out = parts(numbered(), 0.25, 0, count)
    found = np.bincount(used.split.y, minlength=4)
    there = np.bincount(parts(numbered(), 0.25, 0)[0].split.y, minlength=4)
    assert used.size == found.sum() == count and held_out.size == 20
    for label in range(4):  # a class has one less than another only where it has no more
        assert found[label] >= min(found.max() - 1, there[label])
    assert not numbers_of(used) & numbers_of(held_out)


def test_a_seed_has_its_own_images():
    chosen = [numbers_of(parts(numbered(), 0.25, seed, 10)[0]) for seed in (0, 0, 1)]
    assert chosen[0] == chosen[1] != chosen[2]


def test_training_sees_no_other_image():
    cell, few = cell_of("random"), numbers_of(parts(numbered(), 0.25, 0, 10)[0])
    teacher = TwoLayers((1, 2, 2), 4, key=jax.random.key(0))
    phase = training_phase(cell, sparsify(teacher), numbered(), "")
    assert phase.num_steps == 4 and planned_steps(cell, lambda name: numbered()) == {"train": 4}
    data, seen = numbered(), set()
    for _ in range(4):
        x = np.asarray(next(phase.batches).x) * data.std + data.mean
        seen |= set(np.round(x[:, 0, 0, 0]).astype(float).tolist())
    assert seen == few


@pytest.mark.parametrize(("method", "all_images"), [("snip", False), ("ntk-sap", True)])
def test_scores_see_the_labels_that_training_sees(method, all_images):
    data = numbered()
    x, y = _examples(cell_of(method), data)
    found = set(np.round(np.asarray(x) * data.std + data.mean)[:, 0, 0, 0].astype(float).tolist())
    few = numbers_of(parts(data, 0.25, 0, 10)[0])
    assert (found <= few) == (not all_images) and len(y) == (20 if all_images else 10)
    assert found <= numbers_of(parts(data, 0.25, 0)[0])


def test_a_transfer_cannot_begin_with_labels_that_training_lacks():
    settings = CompareSettings(
        methods=("ntt",), training=TRAINING, transfer=TransferSettings(initial_mask="snip")
    )
    with pytest.raises(ExperimentError, match="snip looks at the labels of all images"):
        check(settings)
    with pytest.raises(ExperimentError, match="61 labelled images of numbered, which has 60"):
        parts(numbered(), 0.25, 0, 61)
