"""The options of every command as typed dataclasses; their docstrings are the command's help."""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro

from .settings import (
    CompareSettings,
    EvolutionSettings,
    MaskSettings,
    Method,
    Scope,
    ScoringSettings,
    TrainingSettings,
    TransferSettings,
)

Positional = tyro.conf.Positional
_FLAT = tyro.conf.arg(name="")
Preset = Literal["quick", "paper"]


@dataclasses.dataclass(frozen=True)
class Compare:
    """Make and train sparse networks by several methods, and compare them.

    Every method at every scope, density and seed is a unit of its own: finished ones are skipped
    and an interrupted one is continued when the same command is given again with the same --out.
    Ends with a table and figures. The defaults shown are those of the chosen preset.

    Attributes:
        settings: what is compared.
        preset: where defaults come from: `quick` ends within minutes, `paper` is the published
            protocol. Single options and --config change it.
        config: JSON file with fields like those of config.json's `settings`; options override it.
        out: directory of the comparison.
        data_dir: folder with datasets; more places are searched, see `ntt-eqx data`.
        checkpoint_every: seconds between two checkpoints.
        plan_only: show what would be done, and stop.
    """

    settings: Annotated[CompareSettings, _FLAT]
    preset: Preset = "quick"
    config: Path | None = None
    out: Path = Path("runs/compare")
    data_dir: Path | None = None
    checkpoint_every: float = 60.0
    plan_only: bool = False


@dataclasses.dataclass(frozen=True)
class Transfer:
    """Find a sparse network by Neural Tangent Transfer, without labels.

    Writes the network to OUT/model.eqx; `ntt-eqx train --start OUT` trains it.

    Attributes:
        dataset: images to use.
        model: the dense network's architecture.
        method: `ntt` matches the active kernel, `ntt-ambient` the ambient one.
        scope: keep this share of weights in each layer, or in all layers together.
        density: share of weights to keep.
        seed: decides the dense network and the order of the images.
        transfer: the label-free phase.
        scoring: the score of the first mask.
        out: directory of the run.
        data_dir: folder with datasets.
        checkpoint_every: seconds between two checkpoints.
    """

    transfer: TransferSettings
    scoring: ScoringSettings
    dataset: str = "fashion-mnist-mini"
    model: str = "lenet-300-100"
    method: Literal["ntt", "ntt-ambient"] = "ntt"
    scope: Scope = "layer"
    density: float = 0.03
    seed: int = 0
    out: Path = Path("runs/transfer")
    data_dir: Path | None = None
    checkpoint_every: float = 60.0


@dataclasses.dataclass(frozen=True)
class Train:
    """Train one network on labels: one from a file, or a fresh one pruned by a method.

    Attributes:
        start: model file, or directory of a run that holds one; left out, --model, --method,
            --scope and --density say what to train.
        dataset: images and labels to use.
        model: the dense network's architecture.
        method: how the mask is chosen.
        scope: rank weights within each layer, or over all layers at once.
        density: share of weights to keep.
        seed: decides the initialisation and the order of the images.
        transfer: the label-free phase, for `ntt` and `ntt-ambient`.
        scoring: the scores of the other methods.
        mask: which weights a mask may keep.
        training: the supervised phase.
        out: directory of the run.
        data_dir: folder with datasets.
        checkpoint_every: seconds between two checkpoints.
    """

    transfer: TransferSettings
    scoring: ScoringSettings
    mask: MaskSettings
    training: TrainingSettings
    start: Path | None = None
    dataset: str = "fashion-mnist-mini"
    model: str = "lenet-300-100"
    method: Method = "random"
    scope: Scope = "layer"
    density: float = 0.03
    seed: int = 0
    out: Path = Path("runs/train")
    data_dir: Path | None = None
    checkpoint_every: float = 60.0


@dataclasses.dataclass(frozen=True)
class Evolution:
    """Train dense teacher, NTT student and random network side by side and compare their outputs.

    Follows the outputs on fixed test images while all three train on the same labels, draws their
    paths, and gives their distance to the teacher's path as a number. Tangent kernels are compared
    before training.

    Attributes:
        transfer: the label-free phase that makes the student.
        evolution: the training side by side.
        dataset: images and labels; NAME:0,1:250 takes 250 images of two classes.
        model: the dense network's architecture.
        method: `ntt` matches the active kernel, `ntt-ambient` the ambient one.
        scope: keep this share of weights in each layer, or in all layers together.
        density: share of weights to keep.
        seed: decides the dense network and the order of the images.
        out: directory of the run.
        data_dir: folder with datasets.
        checkpoint_every: seconds between two checkpoints.
    """

    transfer: TransferSettings
    evolution: EvolutionSettings
    dataset: str = "fashion-mnist-mini:0,1:250"
    model: str = "lenet-300-100"
    method: Literal["ntt", "ntt-ambient"] = "ntt"
    scope: Scope = "layer"
    density: float = 0.03
    seed: int = 0
    out: Path = Path("runs/evolution")
    data_dir: Path | None = None
    checkpoint_every: float = 60.0


@dataclasses.dataclass(frozen=True)
class Inspect:
    """Show what pruning did to a network from a file: layers, FLOPs, tangent kernel.

    The kernel is compared with that of the dense network that the file's seed stands for, at its
    initialisation.

    Attributes:
        network: model file, or directory of a run; its network before training where there is one.
        dataset: images for the kernel; left out, those that the file names.
        inputs: number of test images for the kernel.
        data_dir: folder with datasets.
        json: print one JSON object instead of text.
    """

    network: Positional[Path]
    dataset: str | None = None
    inputs: int = 32
    data_dir: Path | None = None
    json: bool = False


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """Test a network from a file.

    Attributes:
        network: model file, or directory of a run that holds one.
        dataset: images to test on; left out, those that the file names.
        data_dir: folder with datasets.
        json: print one JSON object instead of text.
    """

    network: Positional[Path]
    dataset: str | None = None
    data_dir: Path | None = None
    json: bool = False


@dataclasses.dataclass(frozen=True)
class Data:
    """List the datasets and where they are; with names, fetch and check them.

    Attributes:
        names: datasets to prepare: found, or downloaded with a checked SHA-256, and read once.
        data_dir: folder with datasets.
    """

    names: Positional[tuple[str, ...]] = ()
    data_dir: Path | None = None


@dataclasses.dataclass(frozen=True)
class Runs:
    """List the networks in a directory: done, unfinished, failed or broken.

    Attributes:
        directory: where to look, with everything below.
    """

    directory: Positional[Path] = Path("runs")


@dataclasses.dataclass(frozen=True)
class Report:
    """Build tables (Markdown, CSV, LaTeX) and figures again from what is on disk.

    Attributes:
        directories: comparisons or single runs, with everything below.
        out: where to write; left out, `report` in the first directory.
        figures: whether to draw figures.
    """

    directories: Positional[tuple[Path, ...]]
    out: Path | None = None
    figures: bool = True
