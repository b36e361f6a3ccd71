"""`ntt-eqx evolution`: teacher, NTT student and random network followed in function space.

The opening figure of Liu & Zenke (ICML 2020): the outputs on fixed inputs are a point in function
space, and training draws a line. As long as training is lazy, the line depends on the first outputs
and the tangent kernel alone, so a student that shares both with its teacher stays by its line.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp

from ... import KernelComparison, SparseModel, compare_kernels, sparsify
from ...data import Dataset
from .._errors import NetworkFailed
from .._files import encode_json
from ..cells import Cell, write_or_check_config
from ..claims import claimed
from ..figures import evolution_figure, render_figure, spectrum_figure
from ..images import StandardisedSplit, check_labelled, shelf_of
from ..loop import RunContext, StopRequest, run_phase
from ..manifest import RunFolder, check_folder, read_file
from ..methods import TransferName, method
from ..metrics import METRICS, MetricsFile
from ..model_file import decode_model, encode_model
from ..progress import Display
from ..pruning import pruned_at_start
from ..references import is_reference
from ..report import Page, save_page
from ..results import TRANSFERRED
from ..running import check_cells, run_cell, started
from ..settings import EvolutionSettings, TransferSettings, check, to_json
from ..together import by_first
from ..trajectories import Trajectories, side_by_side
from ._options import NetworkOptions

_ARRAYS, _REPORT = "evolution.npz", "evolution.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evolution(NetworkOptions):
    """Train dense teacher, NTT student and random network side by side and compare their outputs.

    Follows the outputs on fixed test images while all three train on the same labels, draws their
    paths, and gives their distance to the teacher's path as a number. Tangent kernels are compared
    before training.
    """

    dataset: str = "fashion-mnist-mini:0,1:250"
    method: TransferName = "ntt"
    # For an output evolution the student must match its teacher closely, also on images that are
    # not trained on: about 10,000 steps on all images of the set, without their labels.
    transfer: TransferSettings = TransferSettings(epochs=110.0, learning_rate=1e-3)
    evolution: EvolutionSettings = EvolutionSettings()  # the training side by side
    devices: Literal["one", "all"] = "one"
    out: Path = Path("runs/evolution")

    def make(self) -> int:
        """Follow the outputs while the networks train; returns the exit status."""
        check(self.evolution, "evolution.")
        transfer = self.transfer
        if transfer.dataset is None:  # all images of the set, of which a part is trained on
            transfer = dataclasses.replace(transfer, dataset=_whole_set(self.dataset))
        cell = dataclasses.replace(self.cell(transfer=transfer), training=None)
        rival = dataclasses.replace(self.cell(methods=("random",)), training=None)
        shelf, out = shelf_of(self.data_dir), self.out
        by_first(lambda: check_folder(out, "evolution"))
        check_cells([cell, rival], shelf)
        images = shelf(self.dataset)
        check_labelled(images)
        asked = {"transfer": cell.to_json(), "evolution": to_json(self.evolution)}
        with Display() as display, StopRequest() as stop, claimed(out, "evolution") as run:
            run.check_unchanged(("config.json", METRICS, _ARRAYS, _REPORT, "report.html"))
            write_or_check_config(run, {"command": "evolution", **asked})
            display.say(f"{cell.dataset}, {cell.model}, {cell.name}; results in {out}")
            assert cell.transfer is not None
            display.say(f"the transfer is to all images of {cell.transfer.dataset or cell.dataset}")
            context = RunContext(shelf, display, stop, self.checkpoint_every)
            rows = MetricsFile(run)
            try:
                with claimed(out / "transfer", "network") as student:
                    run_cell(cell, student, context, cell.name)
                networks = _networks(cell, rival, images, run)
                with display.busy("preparing the training"):
                    phase = side_by_side(networks, images, self.evolution, cell.seed)
                outcome = run_phase(phase, run, rows, context)
            except NetworkFailed as error:
                display.say(str(error))
                return 1
            found = Trajectories.of(outcome.state, networks, self.evolution)
            rows.seal()
            x = jnp.asarray(
                StandardisedSplit(images, images.test).first(self.evolution.kernel_inputs).x
            )
            teacher = networks.pop("dense").model
            kernels = {name: compare_kernels(one, teacher, x) for name, one in networks.items()}
            report = _report(found, kernels, cell.method)
            run.write({_ARRAYS: found.encode(), _REPORT: encode_json(report)})
            what = f"{cell.dataset}, {cell.model}, {100 * cell.density:g} % kept, seed {cell.seed}"
            with display.busy("drawing figures"):
                figures = render_figure(evolution_figure(found, what), "evolution")
                figures |= render_figure(spectrum_figure(kernels, what), "spectrum")
            table, note = _table(report, cell.method)
            facts = {"Seeds": str(cell.seed)}
            save_page(run, Page(f"Output evolution: {what}", table, note, facts, asked), figures)
            display.say(
                "distance to the dense network's outputs (root mean square), and kernel at start:"
            )
            display.table(table)
            display.say(note)
            display.say(f"written: {out / _REPORT}, {out / 'figures'}, {out / 'report.html'}")
        return 0


def _whole_set(name: str) -> str:
    """The set of which `name` may be some classes and images."""
    return name if name.startswith("npy:") or is_reference(name) else name.partition(":")[0]


def _networks(cell: Cell, rival: Cell, images: Dataset, run: RunFolder) -> dict[str, SparseModel]:
    """Dense teacher, NTT student and random network, all from one dense initialisation."""
    teacher = started(cell, images)
    folder = run.path / "transfer"
    student = decode_model(folder / TRANSFERRED, read_file(folder, TRANSFERRED))
    rest = pruned_at_start(rival, teacher, images.input_shape, None, rival.key(1))
    header = {**student.header, "method": "random"}
    run.write({f"random/{TRANSFERRED}": encode_model(rest, header)})
    return {"dense": sparsify(teacher), cell.method: student.model, "random": rest}


def _report(
    found: Trajectories, kernels: Mapping[str, KernelComparison], student: str
) -> dict[str, Any]:
    distances = {}
    for name in kernels:
        values = found.distances(name)
        ends = {"start": values[0], "mean": values.mean(), "end": values[-1]}
        distances[name] = {k: float(v) for k, v in ends.items()} | {"all": values.tolist()}
    return {
        "steps": found.steps.tolist(),
        "dense_path": found.length(),
        "distances": distances,
        "ratio": distances[student]["mean"] / distances["random"]["mean"],
        "kernels": {name: kernel.numbers for name, kernel in kernels.items()},
    }


def _table(report: dict[str, Any], student: str) -> tuple[Any, str]:
    columns = {"start": "Start", "mean": "Mean", "end": "End", "kernel_distance": "Kernel distance"}
    columns |= {"kernel_alignment": "CKA", "effective_rank": "Effective rank"}
    body = []
    for name in (student, "random"):
        values = {**report["distances"][name], **report["kernels"][name]}
        body.append([method(name).label, *(f"{values[column]:.4g}" for column in columns)])
    rank = report["kernels"]["random"]["dense_effective_rank"]
    note = (
        f"dense: path {report['dense_path']:.4g}, effective rank {rank:.4g}; mean distance to "
        f"dense of {student}, divided by that of random: {report['ratio']:.3g}"
    )
    return (["Network", *columns.values()], body, [False, *([True] * 6)]), note
