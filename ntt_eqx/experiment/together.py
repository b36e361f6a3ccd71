"""Several processes that run one command: all compute, the first writes and prints.

They must take the same steps in the same order. Every decision that depends on a file, a clock or a
signal is therefore made by the first process, or by all together, and broadcast.
"""

import json
import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from ._errors import ExperimentError

_EVERY = 10  # steps between two agreements on whether to stop or to save
_PATIENCE = 10  # seconds that one which failed waits for the others before it leaves them
_acting = False  # whether the first process does what the others wait for


def join() -> None:
    """Find the other processes; `ExperimentError` says how, where JAX cannot."""
    given = {"num_processes": "JAX_NUM_PROCESSES", "process_id": "JAX_PROCESS_ID"}
    told = {name: os.environ[key] for name, key in given.items() if key in os.environ}
    try:
        numbers: Any = {name: int(value) for name, value in told.items()}
        jax.distributed.initialize(**numbers, shutdown_timeout_seconds=_PATIENCE)
    except (ValueError, RuntimeError) as error:
        raise ExperimentError(
            f"devices hosts: the other processes cannot be found ({error}) Under Slurm, Open MPI "
            "and on TPU pods JAX knows them; elsewhere set JAX_COORDINATOR_ADDRESS (HOST:PORT of "
            "the first), JAX_NUM_PROCESSES and JAX_PROCESS_ID (0, 1, ...) for each."
        ) from error


def is_first() -> bool:
    """Whether this process is the one that writes and prints."""
    return not _several() or jax.process_index() == 0


def by_first(function: Callable[[], Any]) -> Any:
    """The JSON value that `function` returns in the first process, the only one to call it.

    What it raises there ends the others with an `ExperimentError`. `function` may itself ask
    `by_first`, which then calls what it is given.
    """
    global _acting
    if _acting or not _several():
        return function()
    value, failure = None, None
    if is_first():
        _acting = True
        try:
            value = function()
        except Exception as error:
            failure = error
        finally:
            _acting = False
    value, message = _told_by_first([value, None if failure is None else str(failure)])
    if failure is not None:
        raise failure
    if message is not None:
        raise ExperimentError(message)
    return value


def meets(step: int) -> bool:
    """Whether the processes agree on anything after this step."""
    return not _several() or step % _EVERY == 0


def anybody(flag: bool) -> bool:
    """Whether `flag` is true in any process."""
    if not _several():
        return flag
    from jax.experimental import multihost_utils

    return bool(multihost_utils.process_allgather(np.array(flag)).any())


def wait() -> None:
    """Wait for all processes, so that what the first has written is there for the others."""
    by_first(lambda: None)


def _several() -> bool:
    # asked first, for a command that computes nothing shall take no device
    return jax.distributed.is_initialized() and jax.process_count() > 1


def _told_by_first(value: Any) -> Any:
    from jax.experimental import multihost_utils

    content = np.frombuffer(json.dumps(value).encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(content.size)))
    room = np.zeros(size, np.uint8)
    room[: min(size, content.size)] = content[:size]
    return json.loads(bytes(multihost_utils.broadcast_one_to_all(room)))
