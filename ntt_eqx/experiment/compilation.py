"""The cache of compiled programs, so that the command compiles each of them once."""

from pathlib import Path
from typing import Any

import jax

from ._errors import require

_LARGEST = 512 * 2**20  # bytes on disk; the programs that were used longest ago go first
_ENTRY, _LAST_USE = "-cache", "-atime"  # the ends of JAX's two files for each program


def keep_compiled() -> Path | None:
    """Let JAX keep compiled programs in the user's cache folder, shared by all workers.

    A folder that the user chose (`JAX_COMPILATION_CACHE_DIR`) is left as it is, and so is a cache
    that they switched off (`JAX_ENABLE_COMPILATION_CACHE=false`).

    Returns the folder, `None` where nothing was changed. A folder that cannot be written is no
    error: the programs are compiled then.
    """
    settings: Any = jax.config
    if settings.jax_compilation_cache_dir or not settings.jax_enable_compilation_cache:
        return None
    require("filelock")  # JAX locks the folder with it, where its size is bounded
    folder = Path(require("pooch").os_cache("ntt-eqx")) / "compiled"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _drop_halves(folder)
    except OSError:
        return None
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_compilation_cache_max_size", _LARGEST)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return folder


def _drop_halves(folder: Path) -> None:
    """Remove programs of which a killed worker wrote only one file; JAX fails on each of them."""
    for entry in folder.glob(f"*{_ENTRY}"):
        if not entry.with_name(entry.name.removesuffix(_ENTRY) + _LAST_USE).exists():
            entry.unlink(missing_ok=True)
