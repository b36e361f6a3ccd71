"""From a cell's configuration to its result: find the sparse network, train it, write it down."""

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu

from .. import SparseModel, check_collapse, sparsify
from ..models import make_model
from ._errors import Diverged, ExperimentError
from ._files import write_json
from .cells import Cell, claim
from .checkpoint import CheckpointStore
from .images import Images, ImageShelf
from .loop import Outcome, Phase, StopRequest, run_phase
from .metrics import MetricsFile
from .model_file import load_model, save_model
from .phases import examples_for, final_accuracies, training_phase, transfer_phase
from .progress import Display
from .pruning import ablated, check_fits, collapse_told, pruned_at_start
from .results import MODEL, TRANSFERRED, read_result


@dataclasses.dataclass(frozen=True)
class RunContext:
    """What a cell needs from outside and its result does not depend on."""

    shelf: ImageShelf  # finds image sets by name
    display: Display  # shows the progress
    stop: StopRequest  # says whether to stop
    checkpoint_every: float = 60.0  # seconds between two checkpoints
    start: Path | None = None  # the model file to train from, for a cell with a `start`


def check_cells(cells: Sequence[Cell], shelf: ImageShelf) -> None:
    """Check every mask and every dataset that `cells` need before anything is computed.

    Raises `ExperimentError` for a mask that does not fit its network, or images without labels.
    """
    teachers: dict[tuple[str, str], Any] = {}
    for cell in cells:
        images = shelf.load(cell.dataset)
        if cell.training is not None:
            images.check_labelled()
        place = (cell.dataset, cell.model)
        if place not in teachers:
            teachers[place] = dense_initialisation(cell, images)
        check_fits(cell, teachers[place])


def run_cell(cell: Cell, directory: Path, context: RunContext, title: str) -> dict[str, Any]:
    """Do what is left to do of `cell` in `directory`, and return its result.

    A finished cell is only read. One that was interrupted goes on from its newest checkpoint, with
    the same bits as if it had never stopped.

    Raises `Diverged` when a loss is not finite; the reason is kept in `failure.json`; `Interrupted`
    when a stop was asked for; `ExperimentError` when the directory belongs to something else.
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
    context.stop.check()
    failure = directory / "failure.json"
    try:
        result = _make(cell, directory, context, title)
    except Diverged as error:
        write_json(failure, {"stage": error.stage, "step": error.step, "message": str(error)})
        raise
    write_json(directory / "result.json", result)  # the last file: the cell is done
    failure.unlink(missing_ok=True)
    shutil.rmtree(directory / "checkpoints", ignore_errors=True)
    return result


def dense_initialisation(cell: Cell, images: Images) -> Any:
    """The dense network of a seed: the teacher, and where every method of this seed starts."""
    return make_model(cell.model, images.input_shape, images.num_classes, key=cell.key(0))


def _make(cell: Cell, directory: Path, context: RunContext, title: str) -> dict[str, Any]:
    images = context.shelf.load(cell.dataset)
    metrics = MetricsFile(directory / "metrics.jsonl")
    checkpoints = directory / "checkpoints"
    header = _header(cell, images)
    carried: dict[str, Any] = {}
    student = sparsify(dense_initialisation(cell, images))

    def run(phase: Phase) -> Outcome:
        return run_phase(
            phase,
            checkpoints / phase.name,
            metrics,
            context.display,
            context.stop,
            checkpoint_every=context.checkpoint_every,
            carried=carried,
        )

    # A checkpoint of the training holds the network, so that nothing before it is done again.
    if not _has_checkpoint(checkpoints / "train"):
        if cell.start is not None:
            student = _from_file(context, images)
        elif cell.transfer is not None:
            source = context.shelf.load(cell.transfer.dataset or cell.dataset)
            _check_fits(images, source)
            with collapse_told(context.display.say, title):
                phase = transfer_phase(cell, student.model, source, title)
            outcome = run(phase)
            student = outcome.state.student
            with collapse_told(context.display.say, title):
                check_collapse(student.mask)
            carried["transfer"] = {"seconds": outcome.seconds, "row": outcome.row}
            save_model(directory / TRANSFERRED, student, header)
        else:
            with collapse_told(context.display.say, title):
                examples = examples_for(cell, images)
                student = pruned_at_start(cell, student.model, examples, cell.key(1))
        student = ablated(cell, student, cell.key(3))
    if cell.training is not None:
        outcome = run(training_phase(cell, student, images, title))
        student = outcome.state.model
        carried = {**outcome.carried, "train": {"seconds": outcome.seconds, "row": outcome.row}}
    save_model(directory / MODEL, student, header)
    accuracies = final_accuracies(cell, student, images) if cell.training is not None else {}
    return _result(cell, student, carried, accuracies)


def _result(
    cell: Cell, student: SparseModel, carried: dict[str, Any], accuracies: dict[str, float]
) -> dict[str, Any]:
    seconds = {name: part["seconds"] for name, part in carried.items()}
    rows = {name: part["row"] for name, part in carried.items()}
    transfer = rows.get("transfer", {})
    distances = transfer.get("validation") or transfer.get("train") or {}
    kept = jax.device_get(student.densities())
    names = ("test_accuracy", "train_accuracy", "held_out_accuracy", "test_loss", "train_loss")
    return {
        **_place(cell),
        "mask": cell.mask.label if cell.mask is not None else "",
        **{name: accuracies.get(name) for name in names},
        "seconds": round(sum(seconds.values()), 3),
        "transfer_seconds": round(seconds.get("transfer", 0.0), 3),
        "train_seconds": round(seconds.get("train", 0.0), 3),
        "transfer_steps": transfer.get("step", 0),
        "train_steps": rows.get("train", {}).get("step", 0),
        "kernel_distance": distances.get("kernel_distance"),
        "target_distance": distances.get("target_distance"),
        "kept_density": float(student.density()),
        "densities": {name.strip("."): float(share) for name, share in kept.items()},
        "settings_id": cell.settings_id,
        "fingerprint": cell.fingerprint,
    }


def _place(cell: Cell) -> dict[str, Any]:
    names = ("dataset", "model", "method", "scope", "density", "seed")
    return {name: getattr(cell, name) for name in names}


def _header(cell: Cell, images: Images) -> dict[str, Any]:
    arguments = {"input_shape": list(images.input_shape), "num_classes": images.num_classes}
    return {**_place(cell), "arguments": arguments, "mean": images.mean, "std": images.std}


def _from_file(context: RunContext, images: Images) -> SparseModel:
    assert context.start is not None
    loaded = load_model(context.start)
    images.check_network(context.start, loaded.header)
    for path, leaf in jtu.tree_leaves_with_path(eqx.filter(loaded.model, eqx.is_inexact_array)):
        if not bool(jnp.isfinite(leaf).all()):
            raise ExperimentError(
                f"{context.start}: {jtu.keystr(path).strip('.')} has NaN or infinity in it. It "
                "cannot be trained."
            )
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
