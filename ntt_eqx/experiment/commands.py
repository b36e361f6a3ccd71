"""From the words of a command line to what they ask for."""

import signal
import sys
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ._errors import Interrupted, MissingExtra, require
from .settings import PRESETS, EvolutionSettings, TransferSettings, load_config

tyro = require("tyro")

from . import single  # noqa: E402
from .compare import compare  # noqa: E402
from .evolution import evolution  # noqa: E402
from .export_network import Export, export_network  # noqa: E402
from .inspect_network import inspect_network  # noqa: E402
from .options import (  # noqa: E402
    Compare,
    Data,
    Evaluate,
    Evolution,
    Inspect,
    Report,
    Runs,
    Train,
    Transfer,
)

_COMMANDS: dict[str, tuple[type, Callable[[Any], int]]] = {
    "compare": (Compare, compare),
    "transfer": (Transfer, single.transfer),
    "train": (Train, single.train),
    "evaluate": (Evaluate, single.evaluate),
    "inspect": (Inspect, inspect_network),
    "export": (Export, export_network),
    "evolution": (Evolution, evolution),
    "data": (Data, single.data),
    "runs": (Runs, single.runs),
    "report": (Report, single.report),
}
# For an output evolution the student must match its teacher closely, also on images that are not
# trained on: about 10,000 steps on all images of the set, without their labels.
_LONG = TransferSettings(epochs=110.0, learning_rate=1e-3, dataset="fashion-mnist-mini")
_ABOUT = "Neural Tangent Transfer: sparse networks found before training, without labels."


def run(arguments: list[str]) -> int:
    """Parse `arguments` and run the command that they name; see `cli.main`."""
    try:
        options = parse(arguments)
    except ValueError as error:
        return _complain(error)
    except SystemExit as stop:  # help was shown, or a wrong option was explained
        return stop.code if isinstance(stop.code, int) else 2
    work = next(work for kind, work in _COMMANDS.values() if isinstance(options, kind))
    try:
        return work(options)
    except Interrupted:
        again = " ".join(["ntt-eqx", *arguments])
        print(
            f"Stopped. What is done is saved; the same command goes on from here:\n  {again}",
            file=sys.stderr,
        )
        return 128 + signal.SIGINT
    except KeyboardInterrupt:
        print("Stopped at once; the last checkpoint is kept.", file=sys.stderr)
        return 128 + signal.SIGINT
    except MissingExtra as error:
        return _complain(error)
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        return _complain(f"{place}{error.strerror or error}")
    except ValueError as error:  # documented errors of every room, DatasetError among them
        if not _documented(error):
            raise
        return _complain(error)


def parse(arguments: Sequence[str]) -> Any:
    """The options of the command that `arguments` name.

    For `compare`, --preset and --config are looked at first: they set the defaults that the help
    shows and that single options change.
    """
    arguments = list(arguments)
    command = next((word for word in arguments if not word.startswith("-")), None)
    defaults: dict[str, Any] = {}
    if command == "compare":
        preset = _option(arguments, "--preset") or "quick"
        if preset not in PRESETS:  # tyro will explain that it is wrong
            preset = "quick"
        settings = PRESETS[preset]
        config = _option(arguments, "--config")
        if config is not None:
            settings = load_config(Path(config), settings)
        defaults["compare"] = Compare(settings=settings, preset=typing.cast(Any, preset))
    quick = PRESETS["quick"]
    defaults.setdefault("compare", Compare(settings=quick))
    defaults["transfer"] = Transfer(quick.transfer, quick.scoring)
    defaults["evolution"] = Evolution(_LONG, EvolutionSettings())
    defaults["train"] = Train(quick.transfer, quick.scoring, quick.mask, quick.training)
    kinds = [_subcommand(name, kind, defaults.get(name)) for name, (kind, _) in _COMMANDS.items()]
    union = typing.Union[tuple(kinds)]  # noqa: UP007
    return tyro.cli(union, args=arguments, prog="ntt-eqx", description=_ABOUT, config=(_NO_SUFFIX,))


_NO_SUFFIX = tyro.conf.FlagCreatePairsOff


def _subcommand(name: str, kind: type, default: Any) -> Any:
    options = {} if default is None else {"default": default}
    return typing.Annotated[kind, tyro.conf.subcommand(name=name, **options)]


def _option(arguments: Sequence[str], name: str) -> str | None:
    for i, word in enumerate(arguments):
        if word == name and i + 1 < len(arguments):
            return arguments[i + 1]
        if word.startswith(f"{name}="):
            return word.split("=", 1)[1]
    return None


def _documented(error: ValueError) -> bool:
    from ..data import DatasetError
    from ._errors import ExperimentError

    return isinstance(error, DatasetError | ExperimentError)


def _complain(error: Any) -> int:
    print(f"ntt-eqx: {error}", file=sys.stderr)
    return 2
