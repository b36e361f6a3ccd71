"""The command `ntt-eqx`: from the words of a command line to what they ask for."""

import dataclasses
import signal
import sys
import typing
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from ._errors import ExperimentError, Interrupted, MissingExtra, check_choice, require

_ABOUT = "Neural Tangent Transfer: sparse networks found before training, without labels."


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `ntt-eqx` with `arguments` (those of the process by default).

    Returns the exit status: 0 when all went well, 1 when a network failed, 2 for a wrong option or
    a broken file, 130 when the run was interrupted.
    """
    words = sys.argv[1:] if arguments is None else list(arguments)
    try:
        return parse(words).run()
    except SystemExit as stop:  # help was shown, or a wrong option was explained
        return stop.code if isinstance(stop.code, int) else 2
    except Interrupted:
        again = " ".join(["ntt-eqx", *words])
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
        from ..data import DatasetError

        if not isinstance(error, DatasetError | ExperimentError):
            raise
        return _complain(error)


def parse(words: Sequence[str]) -> Any:
    """The options of the command that `words` name; their `run` does it.

    For `compare`, --preset and --config are looked at first: they set the defaults that the help
    shows and that single options change.

    Raises `ExperimentError` for an unknown command or option, with those that are near.
    """
    tyro = require("tyro")
    from .commands import COMMANDS, Compare
    from .settings import PRESETS, load_config

    command = next((word for word in words if not word.startswith("-")), None)
    if command is not None:
        check_choice("command", command, COMMANDS)
        _check_options(command, COMMANDS[command], words)
    preset = _option(words, "--preset") or "quick"
    if preset not in PRESETS:  # tyro will explain that it is wrong
        preset = "quick"
    settings = PRESETS[preset]
    config = _option(words, "--config")
    if command == "compare" and config is not None:
        settings = load_config(Path(config), settings)
    defaults = {"compare": {"default": Compare(settings=settings, preset=typing.cast(Any, preset))}}
    kinds = [
        typing.Annotated[kind, tyro.conf.subcommand(name=name, **defaults.get(name, {}))]
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
    flags = ["--help", *_flags(kind)]
    for word in words:
        name = word.split("=")[0].replace("_", "-")
        if not name.startswith("--") or name in flags:
            continue
        last = lambda flag: flag.strip("-").split(".")[-1]
        near = [flag for flag in flags if last(flag) == last(name)]
        near = near or get_close_matches(name, flags, n=1)
        near = near or [
            f for f in flags if last(f) in get_close_matches(last(name), map(last, flags))
        ]
        hint = f" Did you mean {' or '.join(near[::-1])}?" if near else ""
        raise ExperimentError(
            f"{command} has no option {name}.{hint} `ntt-eqx {command} --help` lists all."
        )


def _flags(kind: type, prefix: str = "--") -> Iterator[str]:
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        name = field.name.replace("_", "-")
        if dataclasses.is_dataclass(hints[field.name]):
            flat = field.name == "settings"  # those of compare stand without a name before them
            inner = typing.cast(type, hints[field.name])
            yield from _flags(inner, prefix if flat else f"{prefix}{name}.")
        else:
            yield f"{prefix}no-{name}" if field.default is True else prefix + name


def _option(words: Sequence[str], name: str) -> str | None:
    for i, word in enumerate(words):
        if word == name and i + 1 < len(words):
            return words[i + 1]
        if word.startswith(f"{name}="):
            return word.split("=", 1)[1]
    return None


def _complain(error: Any) -> int:
    print(f"ntt-eqx: {error}", file=sys.stderr)
    return 2
