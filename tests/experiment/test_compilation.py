"""The command keeps compiled programs, and leaves alone what the user decided."""

import subprocess
import sys

import jax
import pytest

from ntt_eqx.experiment.compilation import keep_compiled

SETTINGS = (
    "jax_enable_compilation_cache",
    "jax_compilation_cache_dir",
    "jax_compilation_cache_max_size",
    "jax_persistent_cache_min_compile_time_secs",
    "jax_persistent_cache_min_entry_size_bytes",
)


@pytest.fixture
def settings(monkeypatch, tmp_path):
    """JAX's settings of a new process, which are put back; the user's cache is in `tmp_path`."""
    before = {name: getattr(jax.config, name) for name in SETTINGS}
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    jax.config.update("jax_compilation_cache_dir", None)
    yield jax.config
    for name, value in before.items():
        jax.config.update(name, value)


def test_the_folder_is_bounded_and_the_users_own(settings, tmp_path):
    folder = keep_compiled()
    assert folder is not None and folder.is_dir() and tmp_path in folder.parents
    assert settings.jax_compilation_cache_dir == str(folder)
    assert 0 < settings.jax_compilation_cache_max_size <= 2**30


def test_what_the_user_decided_stays(settings, tmp_path):
    settings.update("jax_compilation_cache_dir", str(tmp_path / "own"))
    assert keep_compiled() is None
    assert settings.jax_compilation_cache_dir == str(tmp_path / "own")
    settings.update("jax_compilation_cache_dir", None)
    settings.update("jax_enable_compilation_cache", False)
    assert keep_compiled() is None and settings.jax_compilation_cache_dir is None


def test_a_folder_that_cannot_be_made_is_no_error(settings, tmp_path):
    (tmp_path / "ntt-eqx").write_text("a file")
    assert keep_compiled() is None and settings.jax_compilation_cache_dir is None


def test_halves_that_a_killed_worker_left_are_removed(settings):
    folder = keep_compiled()
    assert folder is not None
    settings.update("jax_compilation_cache_dir", None)
    for name in ("whole-cache", "whole-atime", "half-cache"):
        (folder / name).write_bytes(b"")
    keep_compiled()
    assert sorted(path.name for path in folder.iterdir()) == ["whole-atime", "whole-cache"]


PROGRAM = """
import jax, sys
from ntt_eqx.experiment.compilation import keep_compiled
compiled = []
jax.monitoring.register_event_listener(lambda name, **_: compiled.append(name))
keep_compiled()
jax.jit(lambda x: x * 3 + 1)(2.0)
print(sum(name == "/jax/compilation_cache/cache_hits" for name in compiled))
"""


def test_a_second_process_compiles_nothing_again(tmp_path):
    env = {
        "XDG_CACHE_HOME": str(tmp_path),
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": ":".join(sys.path),
    }
    run = lambda: subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", PROGRAM],
        env=env,
        check=True,
        capture_output=True,
        text=True,
    )
    first, second = run(), run()
    assert int(first.stdout) == 0 and int(second.stdout) > 0
    assert "Error" not in second.stderr
