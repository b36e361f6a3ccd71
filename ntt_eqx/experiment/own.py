"""What a comparison can name: the package's methods, models and data sets, and your own."""

import dataclasses
import functools
import hashlib
import inspect
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import equinox as eqx
import numpy as np

from .._stateful import StatefulModel
from ..data import DATASETS, Dataset
from ..models import MODELS, make_model
from ._errors import ExperimentError, check_choice
from .methods import METHODS, Method, own_method
from .object_digest import object_digest
from .references import ImportedObject, find, is_reference

_PACKAGE = Path(__file__).parents[1]
_HOW = "Your own is package.module:Object or ./file.py:Object"


@dataclasses.dataclass(frozen=True)
class Own:
    """Something of a user's that this process was asked to use."""

    thing: Any  # a `Method`, a constructor of models, or a `Dataset`
    digest: str  # SHA-256 of what decides its results


# Filled by what a command or a call names, never by what a file says: reading a file runs no code.
_entered: dict[tuple[str, str], Own] = {}


def enter(kind: str, text: str) -> str:
    """Make the code that `text` refers to known, and return the name of it in files and tables.

    `kind` is `method`, `model` or `dataset`; a name that is no reference is returned as it is.

    Raises `ExperimentError` for what cannot be found, or is nothing of this kind.
    """
    return _enter(kind, find(text), text) if is_reference(text) else text


def enter_object(kind: str, thing: Any, name: str | None = None) -> str:
    """Make an object of a user's known by `name`, and return it; left out, by the object's own.

    Raises `ExperimentError` for a name that the package has, or that is a reference, and for what
    is nothing of this kind.
    """
    if name is None:
        name = thing.name if isinstance(thing, Dataset) else getattr(thing, "__name__", None)
        name = str(name or type(thing).__name__)
    if name in _PACKAGED[kind] or is_reference(name):
        raise ExperimentError(
            f"{kind} {name!r}: {'a file' if is_reference(name) else 'the package'} has one of this "
            f'name; give yours another: {kind}s={{"mine": ...}}.'
        )
    return _enter(kind, ImportedObject(name, thing, object_digest(thing)), name)


def _enter(kind: str, found: ImportedObject, text: str) -> str:
    thing, digest = _KINDS[kind](text, found.thing), found.digest
    if isinstance(thing, Dataset):
        digest = _content(thing)  # whatever code has read it
    _entered[kind, found.name] = Own(thing, digest)
    return found.name


def digest_of(kind: str, name: str) -> str | None:
    """The digest of something of a user's, `None` for what comes with the package."""
    own = _entered.get((kind, name))
    if own is None and kind == "dataset" and name.startswith("npy:"):
        return _digest_of_folder(Path(name[4:]).expanduser())
    return None if own is None else own.digest


def _digest_of_folder(folder: Path) -> str | None:
    """SHA-256 of the arrays of a folder; `None` where a file cannot be read, as loading will say.

    Other arrays under the same name would be taken for the ones of the results that are there.
    """
    try:
        files = sorted(folder.glob("t*_[xy].npy"))
        stats = [path.stat() for path in files]
        return _digest_of_files(
            tuple((p, s.st_size, s.st_mtime_ns) for p, s in zip(files, stats, strict=True))
        )
    except OSError:
        return None


@functools.lru_cache
def _digest_of_files(files: tuple[tuple[Path, int, int], ...]) -> str:
    digest = hashlib.sha256()
    for path, size, _ in files:
        digest.update(f"{path.name} {size}".encode())
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def find_method(name: str) -> Method:
    """The record of a method; `ExperimentError` for an unknown one, with those there are."""
    own = _entered.get(("method", name))
    return METHODS[_known("method", name, METHODS)] if own is None else own.thing


def check_model(name: str) -> None:
    """Raise `ExperimentError` unless there is a model of this name."""
    if ("model", name) not in _entered:
        _known("model", name, MODELS)


def build_model(name: str, input_shape: Any, num_classes: int, *, key: Any) -> Any:
    """A model by its name, one's own or one of `ntt_eqx.models`; `make_model` says more."""
    own = _entered.get(("model", name))
    if own is None:
        return make_model(name, input_shape, num_classes, key=key)
    return own.thing(tuple(input_shape), num_classes, key=key)


def draws_in_training(name: str, model: Any) -> bool:
    """Whether a model needs a random key in training, as dropout does.

    A model of a user's is given one if its call takes one: that changes nothing where none is used.
    """
    if ("model", name) not in _entered:
        return name.endswith("-dropout")
    # what is paired with a state takes a key only to hand it on
    called = model.model if isinstance(model, StatefulModel) else model
    return "key" in inspect.signature(called).parameters


def own_dataset(name: str) -> Dataset | None:
    """The images of a user's that have this name, `None` where there are none."""
    own = _entered.get(("dataset", name))
    return None if own is None else own.thing


def unknown_code(kind: str, name: str) -> str:
    """The message for a reference in a file that this command has not named itself."""
    return (
        f"{kind} {name!r} is code of your own, which no file may run; give it as --{kind} "
        "package.module:Object or ./file.py:Object."
    )


def _known(kind: str, name: str, names: Any) -> str:
    if name not in names and is_reference(name):
        raise ExperimentError(unknown_code(kind, name))
    try:
        return check_choice(kind, name, names)
    except ExperimentError as error:
        raise ExperimentError(f"{error} {_HOW}.") from None


def _as_model(text: str, thing: Any) -> Callable[..., Any]:
    """`thing` as a constructor `(input_shape, num_classes, *, key)`, given what it names."""
    if not callable(thing) or isinstance(thing, eqx.Module):
        raise ExperimentError(
            f"{text}: is {_a(thing)}, not a callable that builds a model: Net(key=...)."
        )
    try:
        named = inspect.signature(thing).parameters.values()
    except (TypeError, ValueError) as error:
        raise ExperimentError(f"{text}: its parameters cannot be told ({error}).") from None
    takes_all = any(p.kind is p.VAR_KEYWORD for p in named)
    names = {p.name for p in named if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    known = {"input_shape", "num_classes", "key"}
    needed = {p.name for p in named if p.default is p.empty and p.kind is not p.VAR_KEYWORD}
    if "key" not in names and not takes_all:
        raise ExperimentError(f"{text}: takes no `key`, so that every seed would be the same.")
    if needed - known:
        raise ExperimentError(
            f"{text}: needs {', '.join(sorted(needed - known))}; a model is built from key, "
            "input_shape and num_classes, of those that it names."
        )

    def build(input_shape: Any, num_classes: int, *, key: Any) -> Any:
        given = {"input_shape": input_shape, "num_classes": num_classes, "key": key}
        model = thing(**{n: v for n, v in given.items() if takes_all or n in names})
        if not isinstance(model, eqx.Module) or not callable(model):
            raise ExperimentError(f"{text}: built {_a(model)}, not an eqx.Module: x -> logits.")
        return model

    return build


def _as_dataset(text: str, thing: Any) -> Dataset:
    try:
        inspect.signature(thing).bind()
    except (TypeError, ValueError):  # nothing that can be called, or not without arguments
        images = thing
    else:
        images = thing()
    if not isinstance(images, Dataset):
        gives = "" if images is thing else f", which returns {_a(images)}"
        raise ExperimentError(
            f"{text}: is {_a(thing)}{gives}, not an ntt_eqx.data.Dataset or a function without "
            "arguments that returns one (ntt_eqx.data.make_dataset makes them)."
        )
    return images


def _content(images: Dataset) -> str:
    """SHA-256 of all that a result depends on in a set of images."""
    digest = hashlib.sha256(f"{images.num_classes} {images.labelled}".encode())
    splits = (array for split in (images.train, images.test) for array in (split.x, split.y))
    for array in map(np.ascontiguousarray, (images.mean, images.std, *splits)):
        digest.update(f"{array.dtype.str}{array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def _a(thing: Any) -> str:
    return f"the class {thing.__name__}" if isinstance(thing, type) else f"a {type(thing).__name__}"


_PACKAGED: dict[str, Any] = {"method": METHODS, "model": MODELS, "dataset": DATASETS}
_KINDS: dict[str, Callable[[str, Any], Any]] = {
    "method": own_method,
    "model": _as_model,
    "dataset": _as_dataset,
}


def place_of(error: Exception) -> str:
    """The last line of a user's code that an error went through, to stand behind its message."""
    places = traceback.extract_tb(error.__traceback__)
    own = [at for at in places if not Path(at.filename).is_relative_to(_PACKAGE)]
    own = [at for at in own if "site-packages" not in Path(at.filename).parts]
    return f" ({own[-1].filename}, line {own[-1].lineno})" if own else ""
