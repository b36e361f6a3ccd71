"""The command `ntt-eqx`: parse a command line and run its command."""

import argparse
import dataclasses
import re
import shlex
import signal
import sys
import typing
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from .. import __version__
from ._errors import ExperimentError, Interrupted, MissingExtra, check_choice, require
from .environment import as_command
from .terminal import every_character_shown, plain

_ABOUT = "Neural Tangent Transfer: sparse networks found before training, without labels."


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `ntt-eqx` with `arguments` (those of the process by default).

    Returns the exit status: 0 when all went well, 1 when a network failed, 2 for a wrong option or
    a broken file, 130 when the run was interrupted.
    """
    words = sys.argv[1:] if arguments is None else list(arguments)
    with every_character_shown():
        return _run(words)


def _run(words: list[str]) -> int:
    try:
        if "--version" in words:
            print(f"ntt-eqx {__version__}")
            return 0
        with as_command(shlex.join(["ntt-eqx", *words])):
            return parse(words).run()
    except SystemExit as stop:  # help was shown, or a wrong option was explained
        return stop.code if isinstance(stop.code, int) else 2
    except (Interrupted, KeyboardInterrupt) as error:
        said = "Stopped at once; the last checkpoint is kept."
        if isinstance(error, Interrupted):
            again = shlex.join(["ntt-eqx", *words])
            said = f"Stopped. What is done is saved; the same command goes on from here:\n  {again}"
        print(said, file=sys.stderr)
        return 128 + signal.SIGINT
    except MissingExtra as error:
        said = str(error)
    except OSError as error:
        said = (f"{error.filename}: " if error.filename else "") + str(error.strerror or error)
    except ValueError as error:  # documented errors of every room, DatasetError among them
        from ..data import DatasetError

        if not isinstance(error, DatasetError | ExperimentError):
            raise
        said = str(error)
    print(f"ntt-eqx: {plain(_with_options(said))}", file=sys.stderr)
    return 2


_PARTS = "transfer|training|scoring|mask|evolution"


def _with_options(message: str) -> str:
    """A message that names settings, with the options that set them in their place."""
    option = lambda found: f"--{found[1]}.{found[2].replace('_', '-')}"
    message = message.replace("`data_dir`", "--data-dir")
    return re.sub(rf"(?<![\w.\-/])({_PARTS})\.([a-z_][a-z0-9_]*)", option, message)


def parse(words: Sequence[str]) -> Any:
    """The options of the command that `words` name; their `run` does it.

    For `compare`, --preset and --config are looked at first: they set the defaults that the help
    shows and that single options change.

    Raises `ExperimentError` for an unknown command or option, with those that are near.
    """
    tyro = require("tyro")
    from .commands import COMMANDS, Compare
    from .presets import PRESETS
    from .settings import load_config

    command = next((word for word in words if not word.startswith("-")), None)
    if command is not None:
        check_choice("command", command, COMMANDS)
        _check_options(command, COMMANDS[command], words)
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("--preset", "--config"):
        early.add_argument(name, nargs="?")
    given, _ = early.parse_known_args(words)
    preset = given.preset if given.preset in PRESETS else "quick"  # tyro will explain a wrong one
    settings = PRESETS[preset]
    if command == "compare" and given.config is not None:
        settings = load_config(Path(given.config), settings)
    default = Compare(settings=settings, preset=typing.cast(Any, preset))
    options = {"compare": {"default": default}}
    kinds = [
        typing.Annotated[kind, tyro.conf.subcommand(name=name, **options.get(name, {}))]
        for name, kind in COMMANDS.items()
    ]
    return tyro.cli(
        typing.Union[tuple(kinds)],  # noqa: UP007
        args=words,
        prog="ntt-eqx",
        description=_ABOUT,
        config=(tyro.conf.FlagCreatePairsOff,),
    )


def _check_options(command: str, kind: type, words: Sequence[str]) -> None:
    """One line for an option that there is not, instead of a page of usage."""
    flags = ["--help", "--version", *_flags(kind)]
    last = lambda flag: flag.strip("-").split(".")[-1]
    for word in words:
        name = word.split("=")[0].replace("_", "-")
        if not name.startswith("--") or name in flags:
            continue
        likely = get_close_matches(last(name), map(last, flags))
        near = [flag for flag in flags if last(flag) == last(name)]
        near = (
            near or get_close_matches(name, flags, n=1) or [f for f in flags if last(f) in likely]
        )
        hint = f" Did you mean {' or '.join(near[::-1])}?" if near else ""
        raise ExperimentError(
            f"{command} has no option {name}.{hint} `ntt-eqx {command} --help` lists all."
        )


def _flags(kind: Any, prefix: str = "--") -> Iterator[str]:
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        name = field.name.replace("_", "-")
        if dataclasses.is_dataclass(hints[field.name]):
            # those of compare, called `settings`, stand without a name before them
            inner = prefix if name == "settings" else f"{prefix}{name}."
            yield from _flags(hints[field.name], inner)
        else:
            yield f"{prefix}no-{name}" if field.default is True else prefix + name
