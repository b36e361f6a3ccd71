"""`ntt-eqx evolution`: teacher, NTT student and random network followed in function space.

The opening figure of Liu & Zenke (ICML 2020): the outputs on fixed inputs are a point in function
space, and training draws a line. As long as training is lazy, the line hangs on the first outputs
and the tangent kernel alone, so a student that shares both with its teacher stays by its line.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from .._sparse import SparseModel, sparsify
from ._errors import Diverged, ExperimentError
from ._files import locked, read_json, write_json
from .cells import Cell, make_cell
from .diagnostics import KernelComparison, compare_kernels, summary
from .figures import evolution_figure, save_figure, spectrum_figure
from .images import Images, ImageShelf
from .methods import pruned_at_start
from .metrics import MetricsFile
from .model_file import load_model, save_model
from .options import Evolution
from .phase import StopRequest, run_phase
from .progress import Display, make_display
from .results import TRANSFERRED
from .run_cell import Surroundings, dense_initialisation, run_cell
from .settings import CompareSettings, check, check_evolution, to_json
from .sweep import check_cells, check_names
from .trajectories import Trajectories, collect, save_trajectories, side_by_side


def evolution(options: Evolution) -> int:
    """Follow the outputs of three networks while they train; returns the exit status."""
    cell, rival = _cells(options)
    shelf = ImageShelf(options.data_dir)
    check_cells([cell, rival], shelf)
    images = shelf.load(options.dataset)
    images.check_labelled()
    with make_display() as display, StopRequest() as stop, locked(options.out):
        _claim(options, cell)
        display.say(f"{cell.dataset}, {cell.model}, {cell.name}; results in {options.out}")
        around = Surroundings(shelf, display, stop, options.checkpoint_every)
        try:
            run_cell(cell, options.out / "transfer", around, cell.name)
            networks = _networks(cell, rival, images, options)
            found = _follow(networks, images, options, around)
        except Diverged as error:
            display.say(str(error))
            return 1
        save_trajectories(options.out / "evolution.npz", found)
        x = jnp.asarray(images.test.first(options.evolution.kernel_inputs).x)
        dense = networks["dense"].model
        kernels = {
            name: compare_kernels(network, dense, x)
            for name, network in networks.items()
            if name != "dense"
        }
        report = _report(found, kernels, cell.method)
        write_json(options.out / "evolution.json", report)
        figures = options.out / "figures"
        save_figure(evolution_figure(found), figures / "evolution")
        save_figure(spectrum_figure(kernels), figures / "spectrum")
        _tell(report, cell.method, options, display)
    return 0


def _cells(options: Evolution) -> tuple[Cell, Cell]:
    settings = CompareSettings(
        datasets=(options.dataset,),
        models=(options.model,),
        methods=(options.method, "random"),
        scopes=(options.scope,),
        densities=(options.density,),
        seeds=(options.seed,),
        transfer=options.transfer,
    )
    check(settings)
    check_evolution(options.evolution)
    check_names(settings)
    shared = (options.scope, options.density, options.seed)
    one, two = (
        make_cell(settings, options.dataset, options.model, method, *shared)
        for method in settings.methods
    )
    return dataclasses.replace(one, training=None), dataclasses.replace(two, training=None)


def _claim(options: Evolution, cell: Cell) -> None:
    """Write down what was asked for, or check that the directory holds the same."""
    path = options.out / "config.json"
    asked = {
        "command": "evolution",
        "transfer": cell.to_json(),
        "evolution": to_json(options.evolution),
    }
    if path.exists() and read_json(path) != asked:
        raise ExperimentError(
            f"{options.out}: holds a run with another configuration; choose another folder with "
            "--out."
        )
    write_json(path, asked)


def _networks(
    cell: Cell, rival: Cell, images: Images, options: Evolution
) -> dict[str, SparseModel]:
    """Dense teacher, NTT student and random network, all from one dense initialisation."""
    teacher = dense_initialisation(cell, images)
    key = jax.random.fold_in(jax.random.key(options.seed), 1)
    student = load_model(options.out / "transfer" / TRANSFERRED)
    rest = pruned_at_start(rival, teacher, None, key)
    header = {**student.header, "method": "random"}
    save_model(options.out / "random" / TRANSFERRED, rest, header)
    return {"dense": sparsify(teacher), cell.method: student.model, "random": rest}


def _follow(
    networks: Mapping[str, SparseModel], images: Images, options: Evolution, around: Surroundings
) -> Trajectories:
    outcome = run_phase(
        side_by_side(networks, images, options.evolution, options.seed),
        options.out / "checkpoints",
        MetricsFile(options.out / "metrics.jsonl"),
        around.display,
        around.stop,
        checkpoint_every=options.checkpoint_every,
    )
    return collect(outcome.state, networks, options.evolution)


def _report(
    found: Trajectories, kernels: Mapping[str, KernelComparison], method: str
) -> dict[str, Any]:
    distances = {name: found.distances(name) for name in kernels}
    return {
        "steps": found.steps.tolist(),
        "dense_path": found.length(),
        "distances": {
            name: {
                "start": float(values[0]),
                "mean": float(values.mean()),
                "end": float(values[-1]),
                "all": values.tolist(),
            }
            for name, values in distances.items()
        },
        "ratio": float(distances[method].mean() / distances["random"].mean()),
        "kernels": {name: summary(kernel) for name, kernel in kernels.items()},
    }


def _tell(report: dict[str, Any], method: str, options: Evolution, display: Display) -> None:
    body = []
    for name in (method, "random"):
        distance, kernel = report["distances"][name], report["kernels"][name]
        values = [distance["start"], distance["mean"], distance["end"]]
        values += [kernel["kernel_distance"], kernel["kernel_alignment"], kernel["effective_rank"]]
        body.append([name, *(f"{value:.4g}" for value in values)])
    header = ["Network", "Start", "Mean", "End", "Kernel distance", "CKA", "Effective rank"]
    display.say("distance to the dense network's outputs (root mean square), and kernel at start:")
    display.table(header, body, [False, *([True] * 6)])
    rank = report["kernels"]["random"]["dense_effective_rank"]
    display.say(
        f"dense: path {report['dense_path']:.4g}, effective rank {rank:.4g}; mean distance of "
        f"{method} to random {report['ratio']:.3g}"
    )
    display.say(f"written: {options.out / 'evolution.json'}, {options.out / 'figures'}")
