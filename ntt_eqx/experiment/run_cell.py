"""From a cell's configuration to its result: find the sparse network, train it, write it down."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import jax

from .._checks import check_weights
from .._masks import check_collapse
from .._sparse import SparseModel, sparsify
from ..models import make_model
from ._errors import Diverged, ExperimentError
from ._files import write_json
from .cells import Cell, claim
from .checkpoint import CheckpointStore
from .images import Images, ImageShelf
from .methods import ablated, collapse_told, kept_weights, pruned_at_start
from .metrics import MetricsFile
from .model_file import load_model, save_model
from .phase import Outcome, StopRequest, run_phase
from .phases import examples_for, final_accuracies, training_phase, transfer_phase
from .progress import Display
from .results import MODEL, TRANSFERRED, read_result, write_result


@dataclasses.dataclass(frozen=True)
class Surroundings:
    """What a cell needs from outside and its result does not depend on.

    Attributes:
        shelf: finds image sets by name.
        display: shows the progress.
        stop: says whether to stop.
        checkpoint_every: seconds between two checkpoints.
        start: the model file to train from, for a cell with a `start`.
    """

    shelf: ImageShelf
    display: Display
    stop: StopRequest
    checkpoint_every: float = 60.0
    start: Path | None = None


def run_cell(cell: Cell, directory: Path, around: Surroundings, title: str) -> dict[str, Any]:
    """Do what is left to do of `cell` in `directory`, and return its result.

    A finished cell is only read. One that was interrupted goes on from its newest checkpoint, with
    the same bits as if it had never stopped.

    **Arguments:**

    - `cell`: what to make.
    - `directory`: its own directory.
    - `around`: data, display and the like.
    - `title`: what people see.

    **Raises:**

    `Diverged`: when a loss is not finite; the reason is kept in `failure.json`.
    `Interrupted`: when a stop was asked for.
    `ExperimentError`: when the directory belongs to something else.
    """
    directory.mkdir(parents=True, exist_ok=True)
    claim(cell, directory)
    result = read_result(directory)
    if result is not None:
        if result["fingerprint"] != cell.fingerprint:
            raise ExperimentError(
                f"{directory / 'result.json'}: belongs to another configuration; remove "
                f"{directory} to make this network again."
            )
        return result
    around.stop.check()
    failure = directory / "failure.json"
    try:
        result = _make(cell, directory, around, title)
    except Diverged as error:
        write_json(failure, {"stage": error.stage, "step": error.step, "message": str(error)})
        raise
    write_result(directory, result)
    failure.unlink(missing_ok=True)
    shutil.rmtree(directory / "checkpoints", ignore_errors=True)
    return result


def dense_initialisation(cell: Cell, images: Images) -> Any:
    """The dense network of a seed: the teacher, and where every method of this seed starts."""
    key = jax.random.fold_in(jax.random.key(cell.seed), 0)
    return make_model(cell.model, images.input_shape, images.num_classes, key=key)


def _make(cell: Cell, directory: Path, around: Surroundings, title: str) -> dict[str, Any]:
    images = around.shelf.load(cell.dataset)
    metrics = MetricsFile(directory / "metrics.jsonl")
    checkpoints = directory / "checkpoints"
    carried: dict[str, Any] = {}
    student = sparsify(dense_initialisation(cell, images))

    def run(phase: Any) -> Outcome:
        return run_phase(
            phase,
            checkpoints / phase.name,
            metrics,
            around.display,
            around.stop,
            checkpoint_every=around.checkpoint_every,
            carried=carried,
        )

    # A checkpoint of the training holds the network, so that nothing before it is done again.
    if not _has_checkpoint(checkpoints / "train"):
        if cell.start is not None:
            student = _from_file(cell, around, images)
        elif cell.transfer is not None:
            source = around.shelf.load(cell.transfer.dataset or cell.dataset)
            _check_fits(images, source)
            with collapse_told(around.display.say, title):
                phase = transfer_phase(cell, student.model, source, title)
            outcome = run(phase)
            student = outcome.state.student
            with collapse_told(around.display.say, title):
                check_collapse(student.mask)
            carried["transfer"] = _summary(outcome)
            save_model(directory / TRANSFERRED, student, _header(cell, images))
        else:
            key = jax.random.fold_in(jax.random.key(cell.seed), 1)
            with collapse_told(around.display.say, title):
                student = pruned_at_start(cell, student.model, examples_for(cell, images), key)
        student = ablated(cell, student, jax.random.fold_in(jax.random.key(cell.seed), 3))
    if cell.training is not None:
        outcome = run(training_phase(cell, student, images, title))
        student = outcome.state.model
        carried = {**outcome.carried, "train": _summary(outcome)}
    save_model(directory / MODEL, student, _header(cell, images))
    scores = final_accuracies(cell, student, images) if cell.training is not None else {}
    return _result(cell, student, carried, scores)


def _result(
    cell: Cell, student: SparseModel, carried: dict[str, Any], scores: dict[str, float]
) -> dict[str, Any]:
    seconds = {name: part["seconds"] for name, part in carried.items()}
    transfer = carried.get("transfer", {}).get("row", {})
    distances = transfer.get("validation") or transfer.get("train") or {}
    return {
        "dataset": cell.dataset,
        "model": cell.model,
        "method": cell.method,
        "scope": cell.scope,
        "density": cell.density,
        "seed": cell.seed,
        "mask": cell.mask.label if cell.mask is not None else "",
        "test_accuracy": scores.get("test_accuracy"),
        "train_accuracy": scores.get("train_accuracy"),
        "held_out_accuracy": scores.get("held_out_accuracy"),
        "test_loss": scores.get("test_loss"),
        "train_loss": scores.get("train_loss"),
        "seconds": round(sum(seconds.values()), 3),
        "transfer_seconds": round(seconds.get("transfer", 0.0), 3),
        "train_seconds": round(seconds.get("train", 0.0), 3),
        "transfer_steps": carried.get("transfer", {}).get("row", {}).get("step", 0),
        "train_steps": carried.get("train", {}).get("row", {}).get("step", 0),
        "kernel_distance": distances.get("kernel_distance"),
        "target_distance": distances.get("target_distance"),
        "kept_density": float(student.density()),
        "densities": kept_weights(student),
        "settings_id": cell.settings_id,
        "fingerprint": cell.fingerprint,
    }


def _summary(outcome: Outcome) -> dict[str, Any]:
    return {"seconds": outcome.seconds, "row": outcome.row}


def _header(cell: Cell, images: Images) -> dict[str, Any]:
    return {
        "model": cell.model,
        "arguments": {
            "input_shape": list(images.input_shape),
            "num_classes": images.num_classes,
        },
        "dataset": cell.dataset,
        "mean": images.mean,
        "std": images.std,
        "method": cell.method,
        "scope": cell.scope,
        "density": cell.density,
        "seed": cell.seed,
    }


def _from_file(cell: Cell, around: Surroundings, images: Images) -> SparseModel:
    assert around.start is not None
    loaded = load_model(around.start)
    images.check_network(around.start, loaded.header)
    try:
        check_weights(str(around.start), loaded.model)
    except ValueError as error:
        raise ExperimentError(f"{error} It cannot be trained.") from None
    return loaded.model


def _check_fits(images: Images, source: Images) -> None:
    if tuple(images.input_shape) != tuple(source.input_shape):
        raise ExperimentError(
            f"transfer.dataset: {source.name} has images of shape {list(source.input_shape)}, but "
            f"{images.name} has {list(images.input_shape)}; both must suit the same network."
        )


def _has_checkpoint(directory: Path) -> bool:
    if not directory.is_dir():
        return False
    store = CheckpointStore(directory)
    try:
        return bool(store.steps())
    finally:
        store.close()
