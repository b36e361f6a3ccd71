"""`ntt-eqx transfer`, `train`, `evaluate`, `data`, `runs` and `report`."""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

from ..data import DATASETS, list_datasets, prepare_dataset
from ._errors import Diverged, ExperimentError, check_choice
from ._files import locked
from .cells import Cell, make_cell
from .images import ImageShelf
from .model_file import load_model
from .options import Data, Evaluate, Report, Runs, Train, Transfer
from .phase import StopRequest
from .progress import Display, make_display
from .report import write_figures, write_tables
from .results import MODEL, TRANSFERRED, find_runs, results_of
from .run_cell import Surroundings, run_cell
from .settings import CompareSettings, check
from .sweep import check_cells, check_dataset, check_names
from .table import plain_cells


def transfer(options: Transfer) -> int:
    """Find one sparse network without labels; returns the exit status."""
    settings = CompareSettings(
        datasets=(options.dataset,),
        models=(options.model,),
        methods=(options.method,),
        scopes=(options.scope,),
        densities=(options.density,),
        seeds=(options.seed,),
        transfer=options.transfer,
        scoring=options.scoring,
    )
    cell = _only_cell(settings)
    return _run_one(dataclasses.replace(cell, training=None), options, None)


def train(options: Train) -> int:
    """Train one network; returns the exit status."""
    settings = CompareSettings(
        datasets=(options.dataset,),
        models=(options.model,),
        methods=(options.method,),
        scopes=(options.scope,),
        densities=(options.density,),
        seeds=(options.seed,),
        transfer=options.transfer,
        scoring=options.scoring,
        mask=options.mask,
        training=options.training,
    )
    cell = _only_cell(settings)
    start = None
    if options.start is not None:
        start = _model_path(options.start)
        header = load_model(start).header
        cell = dataclasses.replace(
            cell,
            model=header["model"],
            method=header.get("method", "dense"),
            scope=header.get("scope"),
            density=float(header.get("density", 1.0)),
            transfer=None,
            scoring=None,
            mask=None,
            start=hashlib.sha256(start.read_bytes()).hexdigest(),
        )
    return _run_one(cell, options, start)


def evaluate(options: Evaluate) -> int:
    """Test a network from a file; returns the exit status."""
    path = _model_path(options.network)
    loaded = load_model(path)
    name = options.dataset or loaded.header.get("dataset")
    if not isinstance(name, str):
        raise ExperimentError(f"{path}: does not name a dataset; give one with --dataset.")
    check_dataset(name)
    images = ImageShelf(options.data_dir).load(name)
    images.check_labelled()
    images.check_network(path, loaded.header)
    scores = images.test.evaluate(loaded.model)
    found = {
        "network": str(path),
        "dataset": name,
        "density": float(loaded.model.density()),
        "test_accuracy": scores["accuracy"],
        "test_loss": scores["loss"],
        "images": images.test.size,
    }
    if options.json:
        print(json.dumps(found))
    else:
        print(
            f"{path}: {loaded.header['model']} at density {found['density']:.4g}, "
            f"{images.test.size} test images of {name}: accuracy {100 * scores['accuracy']:.2f} %, "
            f"loss {scores['loss']:.4f}"
        )
    return 0


def data(options: Data) -> int:
    """List or prepare datasets; returns the exit status."""
    with make_display() as display:
        for name in options.names:
            check_choice("dataset", name, DATASETS)
            display.say(f"{name}: looking for its files, downloading them if need be")
            info = prepare_dataset(name, options.data_dir)
            display.say(f"{name}: whole, in {info.location}")
        if options.names:
            return 0
        body, notes = [], []
        for info in list_datasets(options.data_dir):
            shape = " x ".join(map(str, info.input_shape))
            where = str(info.location) if info.available else "not here"
            sizes = (f"{info.num_train:,}", f"{info.num_test:,}", str(info.num_classes))
            body.append([info.name, shape, *sizes, where])
            if not info.available and info.problem != "not found":
                notes.append(f"{info.name}: {info.problem}")
        header = ["Dataset", "Shape", "Train", "Test", "Classes", "Where"]
        display.table(header, body, [False, False, True, True, True, False])
        for note in notes:
            display.say(note)
        display.say(
            "Searched: --data-dir, $NTT_EQX_DATA, folders of system packages, the download cache. "
            "`ntt-eqx data NAME` fetches and checks one.\n"
            "NAME:0,1 keeps two classes, NAME:0,1:250 the first 250 images of each; "
            "NAME+OTHER is the label-free union, for --transfer.dataset."
        )
    return 0


def runs(options: Runs) -> int:
    """List the networks below a directory; returns the exit status."""
    found = find_runs(options.directory)
    with make_display() as display:
        if not found:
            display.say(f"{options.directory}: no runs.")
            return 0
        body = []
        for run in found:
            config = run.config
            accuracy = (run.result or {}).get("test_accuracy")
            body.append(
                [
                    run.state,
                    str(config.get("dataset", "?")),
                    str(config.get("model", "?")),
                    str(config.get("method", "?")),
                    str(config.get("scope") or "–"),
                    f"{config['density']:g}" if "density" in config else "?",
                    str(config.get("seed", "?")),
                    "–" if accuracy is None else f"{100 * accuracy:.2f}",
                    str(run.directory),
                ]
            )
        header = ["State", "Dataset", "Model", "Method", "Scope", "Density", "Seed", "Test (%)"]
        right = [False] * 5 + [True] * 3
        display.table([*header, "Directory"], body, [*right, False])
        for run in found:
            if run.note:
                display.say(run.note)
    return 0


def report(options: Report) -> int:
    """Build tables and figures again; returns the exit status."""
    if not options.directories:
        raise ExperimentError("report: give at least one directory.")
    found = {
        run.directory.resolve(): run for path in options.directories for run in find_runs(path)
    }
    done = [run for run in found.values() if run.state == "done"]
    if not done:
        places = ", ".join(map(str, options.directories))
        raise ExperimentError(f"report: no finished run in {places}.")
    out = options.out or options.directories[0] / "report"
    with make_display() as display:
        for run in found.values():
            if run.state != "done":
                display.say(f"left out: {run.directory} is {run.state}. {run.note}".rstrip())
        rows = write_tables(results_of(done), out)
        if options.figures:
            write_figures(done, out / "figures", display.say)
        display.table(*plain_cells(rows))
        display.say(f"written: {out}")
    return 0


def _only_cell(settings: CompareSettings) -> Cell:
    check(settings)
    check_names(settings)
    return make_cell(
        settings,
        settings.datasets[0],
        settings.models[0],
        settings.methods[0],
        settings.scopes[0],
        settings.densities[0],
        settings.seeds[0],
    )


def _run_one(cell: Cell, options: Any, start: Path | None) -> int:
    shelf = ImageShelf(options.data_dir)
    if start is None:
        check_cells([cell], shelf)
    with make_display() as display, StopRequest() as stop, locked(options.out):
        around = Surroundings(shelf, display, stop, options.checkpoint_every, start)
        done = (options.out / "result.json").exists()
        display.say(f"{cell.dataset}, {cell.model}, {cell.name}; results in {options.out}")
        try:
            result = run_cell(cell, options.out, around, cell.name)
        except Diverged as error:
            display.say(str(error))
            return 1
        if done:
            display.say("done already; nothing was changed")
        _tell(result, options.out, display)
    return 0


def _tell(result: dict[str, Any], out: Path, display: Display) -> None:
    if result["test_accuracy"] is not None:
        display.say(
            f"test accuracy {100 * result['test_accuracy']:.2f} %, "
            f"train accuracy {100 * result['train_accuracy']:.2f} %"
        )
        write_tables([result], out)
    elif result["kernel_distance"] is not None:
        display.say(
            f"kernel distance {result['kernel_distance']:.4g}, "
            f"target distance {result['target_distance']:.4g}"
        )
    display.say(f"density {result['kept_density']:.4g}; network: {out / MODEL}")
    found = find_runs(out)
    write_figures(found, out / "figures", display.say)


def _model_path(path: Path) -> Path:
    if not path.is_dir():
        return path
    for name in (MODEL, TRANSFERRED):
        if (path / name).is_file():
            return path / name
    raise ExperimentError(f"{path}: no model file in this directory; expected {MODEL}.")
