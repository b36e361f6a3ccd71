"""A model that compiles in no time, on two classes of the images that the package carries."""

import itertools
import os
import signal
import subprocess
import sys
from pathlib import Path

import equinox as eqx
import jax
import pytest

from ntt_eqx.experiment import running
from ntt_eqx.experiment.cli import main
from ntt_eqx.experiment.progress import Display
from ntt_eqx.models import MODELS

DATASET = "fashion-mnist-mini:0,1:40"


class TwoLayers(eqx.Module):
    hidden: eqx.nn.Linear
    output: eqx.nn.Linear

    def __init__(self, input_shape=(1, 28, 28), num_classes=10, *, key):
        one, two = jax.random.split(key)
        size = input_shape[0] * input_shape[1] * input_shape[2]
        self.hidden = eqx.nn.Linear(size, 6, key=one)
        self.output = eqx.nn.Linear(6, num_classes, key=two)

    def __call__(self, x):
        return self.output(jax.nn.relu(self.hidden(x.reshape(-1))))


@pytest.fixture(autouse=True)
def quick_starts(monkeypatch, tmp_path_factory):
    """What one command compiled, the next one that a test starts takes from disk."""
    folder = tmp_path_factory.getbasetemp() / "compiled"
    monkeypatch.setenv("JAX_ENABLE_COMPILATION_CACHE", "true")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(folder))
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")


@pytest.fixture(autouse=True)
def tiny_model(monkeypatch):
    monkeypatch.setitem(MODELS, "tiny", TwoLayers)


def tiny(*more):
    """Options of a comparison that takes seconds."""
    return [
        *("--datasets", DATASET, "--models", "tiny"),
        *("--transfer.epochs", "3", "--transfer.batch-size", "8", "--transfer.mask-every", "5"),
        *("--transfer.held-out", "0.05", "--transfer.log-every", "6"),
        *("--training.epochs", "2", "--training.batch-size", "8"),
        *("--training.evaluate-every", "3"),
        *more,
    ]


def watched_parts(monkeypatch, name):
    """The part by which each network goes from now on, of `part_in_transfer` or `_in_training`."""
    parts, find = [], getattr(running, name)

    def watched(*arguments):
        parts.append(find(*arguments))
        return parts[-1]

    monkeypatch.setattr(running, name, watched)
    return parts


def run_in_pieces(words, monkeypatch, *, every):
    """Give a command again and again, and Ctrl-C after so many steps, until it comes to its end."""
    advance, steps, codes = Display.advance, itertools.count(1), []

    def advancing(*arguments):
        if next(steps) % every == 0:
            os.kill(os.getpid(), signal.SIGINT)
        return advance(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Display, "advance", advancing)
        while not codes or codes[-1] != 0:
            codes.append(main(words))
            assert len(codes) < 30
    assert codes[0] == 128 + signal.SIGINT


def own_process(*words):
    """`ntt-eqx` with the tiny model in a process that computes as this one does, to the bit.

    What `subprocess` takes: the command, and its options.
    """
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from conftest import MODELS, TwoLayers; MODELS['tiny'] = TwoLayers\n"
        "from ntt_eqx.experiment.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    return [sys.executable, "-c", code, *words], {**quiet, "env": {**os.environ, **same_bits()}}


def same_bits():
    """The environment in which another process computes as this one does."""
    names = ("jax_disable_most_optimizations", "jax_num_cpu_devices")
    return {name.upper(): str(jax.config.values[name]) for name in names}
