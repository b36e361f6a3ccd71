"""From a cell's configuration to its result: find the sparse network, train it, store it."""

import contextlib
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu

from .. import SparseModel, check_collapse, effective_sparsity, sparsify, warm_up
from .._examples import as_inference
from .._stateful import has_state
from ..data import Dataset
from ._errors import ExperimentError, NetworkFailed
from .cells import CONFIG, Cell, write_or_check_config
from .images import Shelf, StandardisedSplit, check_labelled, check_network, parts
from .loop import RunContext, run_phase
from .manifest import CHECKPOINTS, RunFolder
from .metrics import METRICS, MetricsFile, Written
from .model_file import decode_model, encode_model, load_model
from .own import build_model, find_method, place_of
from .part import part_in_training, part_in_transfer, whole_of
from .phases import planned_steps, training_phase, transfer_phase
from .pruning import ablated, check_fits, collapse_shown, pruned_at_start
from .published import protocol_of
from .results import FAILURE, MODEL, RESULT, TRANSFERRED, read_result
from .settings import to_json
from .together import by_first, is_first, wait

_SPARSE = f"{CHECKPOINTS}sparse.eqx"  # the network before its training

_WARM_UP = 1000  # images from which a new network's batch norms take their statistics


def check_cells(cells: Sequence[Cell], shelf: Shelf) -> None:
    """Check every mask and every dataset that `cells` need before anything is computed.

    Raises `ExperimentError` for a model that cannot take the images, a mask that does not fit its
    network, a batch that is larger than its images, images without labels, or more directions of a
    sketch than outputs.
    """
    teachers: dict[tuple[str, str], Any] = {}
    for cell in cells:
        images = shelf(cell.dataset)
        if cell.training is not None:
            check_labelled(images)
        place = (cell.dataset, cell.model)
        if place not in teachers:
            teachers[place] = _checked_model(cell, images)
        check_fits(cell, teachers[place], images.input_shape)
        planned_steps(cell, shelf)
        if cell.transfer is None:
            continue
        if cell.transfer.dataset is not None:
            _check_shapes(images, shelf(cell.transfer.dataset))
        size = cell.transfer.sketch_size
        if size is not None and size > images.num_classes:
            raise ExperimentError(
                f"transfer.sketch_size: {size} directions of {images.num_classes} outputs; use at "
                f"most {images.num_classes}."
            )


def check_start(cell: Cell, path: Path, shelf: Shelf) -> None:
    """Check that the network in the file `path` can be trained as `cell` says."""
    images = shelf(cell.dataset)
    check_labelled(images)
    check_network(path, load_model(path).header, images)
    planned_steps(cell, shelf)


def _checked_model(cell: Cell, images: Dataset) -> Any:
    """The dense network, for which its call on one image was traced."""
    image = jax.ShapeDtypeStruct(images.input_shape, jnp.float32)
    try:
        model = dense_initialisation(cell, images)
        found = jax.eval_shape(as_inference(model), image)
        shape = getattr(found, "shape", ())
        if len(shape) != 1 or shape[0] < images.num_classes:
            what = list(shape) if shape else type(found).__name__
            raise ValueError(f"it returns {what}, not a logit for each of {images.num_classes}")
    except Exception as error:
        line = str(error).strip().split("\n")[0]
        raise ExperimentError(
            f"models: {cell.model} cannot take the images of {images.name}, of shape "
            f"{list(images.input_shape)}: {line}{place_of(error)}"
        ) from error
    return model


def run_cell(cell: Cell, run: RunFolder, context: RunContext, title: str) -> dict[str, Any]:
    """Do what is left to do of `cell` in the folder `run`, and return its result.

    A finished cell is only read. One that was interrupted goes on from its newest checkpoint, with
    the same bits as if it had never stopped.

    Raises `NetworkFailed` when a loss is not finite or the mask cannot be made; the reason is kept
    in `failure.json`; `Interrupted` when a stop was asked for; `ExperimentError` when the folder
    belongs to something else, or a file in it is not what the run wrote.
    """
    run.check_unchanged((CONFIG, METRICS, TRANSFERRED, MODEL, RESULT, FAILURE))
    write_or_check_config(run, cell.to_json())
    result = finished(cell, run.path)
    if result is None:
        context.stop.check()
        try:
            with collapse_shown(context.display.say, title), _watched(cell, context):
                result = _make(cell, run, context, title)
        except NetworkFailed as error:
            said = {"stage": error.stage, "step": error.step, "message": str(error)}
            run.write_json(FAILURE, said)
            raise
        run.write_json(RESULT, result)  # the last file: the cell is done
    run.remove([FAILURE, *run.names(CHECKPOINTS, there=False)])
    wait()
    return result


@contextlib.contextmanager
def _watched(cell: Cell, context: RunContext) -> Iterator[None]:
    """While the body runs, the observers take its rows for those of `cell`."""
    with contextlib.ExitStack() as stack:
        for observer in context.observers if is_first() else ():
            stack.enter_context(observer.watch(cell.folder, cell.to_json()))
        yield


def finished(cell: Cell, directory: Path) -> dict[str, Any] | None:
    """The result of `cell` in `directory`, `None` while it has none.

    Raises `ExperimentError` for one that is damaged, or another cell's.
    """
    result = by_first(lambda: read_result(directory))
    if result is not None and result["fingerprint"] != cell.fingerprint:
        raise ExperimentError(
            f"{directory / RESULT}: belongs to another configuration; remove {directory} to make "
            "this network again."
        )
    return result


def dense_initialisation(cell: Cell, images: Dataset) -> Any:
    """The dense network of a seed: the teacher, and where every method of this seed starts."""
    return build_model(cell.model, images.input_shape, images.num_classes, key=cell.key(0))


def started(cell: Cell, images: Dataset) -> Any:
    """The dense initialisation, ready for a look in inference mode."""
    return with_statistics(dense_initialisation(cell, images), images, cell.seed)


def with_statistics(dense: Any, images: Dataset, seed: int) -> Any:
    """A new network with the running statistics of some training images, if it has such."""
    if not has_state(dense):
        return dense
    return warm_up(dense, StandardisedSplit(images, images.train).examples(_WARM_UP, seed=seed).x)


def _make(cell: Cell, run: RunFolder, context: RunContext, title: str) -> dict[str, Any]:
    display = context.display
    with display.busy(f"{title}, reading images"):
        images = context.shelf(cell.dataset)
    metrics = MetricsFile(run)
    names = ("dataset", "model", "method", "scope", "density", "seed")
    header = {
        **{name: getattr(cell, name) for name in names},
        "arguments": {"input_shape": list(images.input_shape), "num_classes": images.num_classes},
        "mean": images.mean,
        "std": images.std,
        "mask": None if cell.mask is None else to_json(cell.mask),
        "settings_id": cell.settings_id,
        **({"code": dict(cell.code)} if cell.code else {}),
    }
    if run.has(_SPARSE):  # so that a resumed training does nothing before it again
        student, found = decode_model(run.path / _SPARSE, run.read(_SPARSE))
        metrics.rewind(Written(*found["written"]), keep=True)
    else:
        teacher, found = started(cell, images), {"seconds": 0.0, "row": {}}
        if cell.transfer is not None:
            source = context.shelf(cell.transfer.dataset or cell.dataset)
            with display.busy(f"{title}, preparing the transfer"):
                part = part_in_transfer(cell, teacher, source)
                phase = transfer_phase(cell, teacher, source, title, part)
            outcome = run_phase(phase, run, metrics, context)
            student = whole_of(part, outcome.state.student, sparsify(teacher))
            found = {"seconds": outcome.seconds, "row": outcome.row}
            run.write({TRANSFERRED: encode_model(student, header)})
        elif cell.start is not None:
            student = _from_file(context, images)
        else:
            with display.busy(f"{title}, choosing the mask"):
                begun, examples = time.monotonic(), _examples(cell, images)
                student = pruned_at_start(cell, teacher, images.input_shape, examples, cell.key(1))
                jax.block_until_ready(student.mask)
                found["mask_seconds"] = time.monotonic() - begun
        if cell.start is None:
            student = ablated(cell, teacher, images.input_shape, student, cell.key(3))
        # what the file gives back, so that a resumed training starts from the same arrays
        student = SparseModel(student.to_dense(), student.mask)
        known = {**header, **found, "written": metrics.written}
        run.write({_SPARSE: encode_model(student, known)})
    seconds = {"mask": found.get("mask_seconds", 0.0), "transfer": found["seconds"], "train": 0.0}
    rows, accuracies = {"transfer": found["row"], "train": {}}, {}
    if cell.training is not None:
        with display.busy(f"{title}, preparing the training"):
            steps = planned_steps(cell, context.shelf)["train"]
            part = part_in_training(cell, student, images, steps)
            phase = training_phase(cell, student, images, title, part)
        outcome = run_phase(phase, run, metrics, context)
        student = whole_of(part, outcome.state.trained, student)
        if find_method(cell.method).dynamic is not None:
            check_collapse(
                student, StandardisedSplit(images, images.test).first(1).x, caller="train"
            )
        seconds["train"], rows["train"] = outcome.seconds, outcome.row
        trained = cell.training
        used, held_out = parts(images, trained.held_out, cell.seed, trained.labels)
        looked_at = {
            "test": StandardisedSplit(images, images.test),
            "train": used,
            "held_out": held_out,
        }
        with display.busy(f"{title}, testing"):
            for name, part in looked_at.items():
                scores = part.evaluate(student) if part.size else {}
                accuracies |= {f"{name}_{what}": value for what, value in scores.items()}
    if run.has(METRICS):
        metrics.seal()
    run.write({MODEL: encode_model(student, header)})
    distances = rows["transfer"].get("validation") or rows["transfer"].get("train") or {}
    kept = jax.device_get(student.densities())
    scores = ("test_accuracy", "train_accuracy", "held_out_accuracy", "test_loss", "train_loss")
    return {
        **{name: getattr(cell, name) for name in names},
        "mask": cell.mask.label if cell.mask is not None else "",
        **{name: accuracies.get(name) for name in scores},
        "test_images": len(images.test) if accuracies else None,
        "seconds": round(sum(seconds.values()), 3),
        **{f"{phase}_seconds": round(value, 3) for phase, value in seconds.items()},
        **{f"{phase}_steps": row.get("step", 0) for phase, row in rows.items()},
        "kernel_distance": distances.get("kernel_distance"),
        "target_distance": distances.get("target_distance"),
        "kept_density": float(student.density()),
        **_live(student, images),
        "densities": {name.strip("."): float(share) for name, share in kept.items()},
        "protocol": protocol_of(cell),
        "settings_id": cell.settings_id,
        "fingerprint": cell.fingerprint,
    }


def _live(student: SparseModel, images: Dataset) -> dict[str, Any]:
    """How much of a network lies on a path from its inputs to its outputs."""
    found = effective_sparsity(student, StandardisedSplit(images, images.train).first(1).x)
    return {
        "effective_density": found.density,
        "units": sum(layer.units for layer in found.layers),
        "live_units": sum(layer.live_units for layer in found.layers),
    }


def _examples(cell: Cell, images: Dataset) -> Any | None:
    """The examples that the cell's score sees, `None` when it needs none.

    They are of the images that are trained on; where few of these have labels, a score that needs
    none draws from all others, too.
    """
    if cell.scoring is None or cell.scoring.examples is None:
        return None
    held_out, labels = 0.0, None
    if cell.training is not None:
        record = find_method(cell.method)
        held_out = cell.training.held_out
        labels = cell.training.labels if record.labels or record.find is not None else None
    used, _ = parts(images, held_out, cell.seed, labels)
    return used.examples(cell.scoring.examples, seed=cell.seed)


def _from_file(context: RunContext, images: Dataset) -> SparseModel:
    assert context.start is not None
    loaded = load_model(context.start)
    check_network(context.start, loaded.header, images)
    for path, leaf in jtu.tree_leaves_with_path(eqx.filter(loaded.model, eqx.is_inexact_array)):
        if not bool(jnp.isfinite(leaf).all()):
            raise ExperimentError(
                f"{context.start}: {jtu.keystr(path).strip('.')} has NaN or infinity in it. It "
                "cannot be trained."
            )
    return loaded.model


def _check_shapes(images: Dataset, source: Dataset) -> None:
    if tuple(images.input_shape) != tuple(source.input_shape):
        raise ExperimentError(
            f"transfer.dataset: {source.name} has images of shape {list(source.input_shape)}, but "
            f"{images.name} has {list(images.input_shape)}; both must suit the same network."
        )
