"""Code of your own by its name: `package.module:Object`, or `./file.py:Object`."""

import ast
import hashlib
import importlib
import importlib.util
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from ._errors import ExperimentError, did_you_mean

_OBJECT = r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*"
_INSTALLED = ("site-packages", "dist-packages")
_REFERENCE = re.compile(rf"(?P<place>.+\.py|{_OBJECT}):(?P<object>{_OBJECT})")


class ImportedObject(NamedTuple):
    """An object, and what its results depend on."""

    name: str  # what files and tables call it: the file's name, or the module, and the object
    thing: Any
    digest: str  # SHA-256 of the source of its module, and of what that imports beside itself


def is_reference(text: str) -> bool:
    """Whether `text` has the form of a reference; a folder, as in `npy:FOLDER`, has not."""
    return not text.startswith("npy:") and _REFERENCE.fullmatch(text) is not None


def find(text: str) -> ImportedObject:
    """Import the object that a reference names. This runs the code of its module.

    Modules are looked for where Python looks, then in the working directory.

    Raises `ExperimentError` for a file, module or object that there is not, for a module that
    cannot be imported, and for one whose source has changed since this process imported it.
    """
    matched = _REFERENCE.fullmatch(text)
    assert matched is not None
    place, path = matched["place"], matched["object"]
    module, digest = _module(text, place)
    thing: Any = module
    for name in path.split("."):
        if not hasattr(thing, name):
            near = did_you_mean(name, [n for n in vars(thing) if not n.startswith("_")])
            raise ExperimentError(f"{text}: {place} has no {path!r}.{near}")
        thing = getattr(thing, name)
    is_file = place.endswith(".py")
    return ImportedObject(f"{Path(place).name if is_file else place}:{path}", thing, digest)


def source_digest(module: ModuleType) -> str:
    """SHA-256 of a module's source and of what it imports from its own package or folder.

    Installed packages do not count. Raises `ExperimentError` for a module without a source.
    """
    file = getattr(module, "__file__", None)
    if file is None or not Path(file).is_file():
        raise ExperimentError(
            f"{module.__name__}: has no source file, by which its results could be told from those "
            "of another version; put it in a file."
        )
    path, name = Path(file).absolute(), module.__name__
    is_package = path.name == "__init__.py"
    within = is_package or "." in name  # a package, in which its own modules count
    root = path.parents[name.count(".") + is_package]
    top = name.split(".")[0] if within else ""
    digest = hashlib.sha256()
    for source in _closure({path, *(_files(root, name) if within else ())}, root, top):
        place = source.relative_to(root)
        _check_imported(module, source, place)
        digest.update(place.as_posix().encode() + b"\0")
        digest.update(hashlib.sha256(source.read_bytes()).digest())
    return digest.hexdigest()


def is_installed(module: str) -> bool:
    """Whether a module came with Python, by an installation or with this package."""
    top = module.partition(".")[0]
    if top in sys.stdlib_module_names or top in ("ntt_eqx", "ntt_eqx_kernels"):
        return True
    file = getattr(sys.modules.get(module), "__file__", None)
    return file is not None and not set(_INSTALLED).isdisjoint(Path(file).parts)


def _check_imported(module: ModuleType, source: Path, place: Path) -> None:
    """Raise `ExperimentError` where Python took another module of the same name for a file."""
    parts = place.with_suffix("").parts
    name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
    file = getattr(sys.modules.get(name), "__file__", None)
    if file is not None and Path(file).absolute() != source:
        raise ExperimentError(
            f"{module.__file__}: its `import {name}` is {file} here, not {source}; rename one."
        )


_imported: dict[str, tuple[ModuleType, str]] = {}


def _module(text: str, place: str) -> tuple[ModuleType, str]:
    key = str(Path(place).resolve()) if place.endswith(".py") else place
    try:
        module = _imported[key][0] if key in _imported else _import(text, place)
    except ExperimentError:
        raise
    except Exception as error:  # the code is not ours: it may raise anything
        raise ExperimentError(
            f"{text}: {place} cannot be imported ({type(error).__name__}: {_first_line(error)})."
        ) from error
    digest = source_digest(module)
    if _imported.setdefault(key, (module, digest))[1] != digest:
        # The old code under the new digest would be a wrong result in a good place.
        raise ExperimentError(f"{text}: changed since this process imported it; start again.")
    return module, digest


def _import(text: str, place: str) -> ModuleType:
    is_file = place.endswith(".py")
    folder = str(Path(place).resolve().parent) if is_file else str(Path.cwd())
    if folder not in sys.path:
        sys.path.append(folder)
    if not is_file:
        try:
            return importlib.import_module(place)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{place}.".startswith(f"{error.name}."):
                raise
            raise ExperimentError(f"{text}: there is no module {error.name!r}.") from None
    path = Path(place).resolve()
    if not path.is_file():
        raise ExperimentError(f"{text}: there is no file {path}.")
    # A name of its own, so that two files called alike do not replace each other.
    name = f"{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _closure(first: set[Path], root: Path, top: str) -> list[Path]:
    """The files `first`, those below `root` that they import, and those that these import."""
    found, todo = set(), [*first]
    while todo:
        source = todo.pop()
        if source not in found:
            found.add(source)
            todo += _imports(source, root, top)
    return sorted(found)


def _imports(source: Path, root: Path, top: str) -> Iterator[Path]:
    """The files below `root` that one file imports; of a package `top`, its own alone."""
    if source.suffix != ".py" or (not top and root.name in _INSTALLED):
        return
    for node in ast.walk(ast.parse(source.read_bytes())):
        if isinstance(node, ast.Import):
            names = [(root, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = source.parents[node.level - 1] if node.level else root
            module = node.module or ""
            names = [(start, ".".join(filter(None, (module, a.name)))) for a in node.names]
        else:
            continue
        for start, name in names:
            if start == root and top and name.split(".")[0] != top:
                continue
            yield from _files(start, name)


def _files(start: Path, name: str) -> Iterator[Path]:
    """The files of a dotted name below a folder, packages' `__init__.py` included."""
    place = start
    for part in name.split("."):
        place = place / part
        for file in (place / "__init__.py", place.with_name(f"{part}.py")):
            if file.is_file():
                yield file


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
