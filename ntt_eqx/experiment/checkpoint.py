"""Checkpoints of a running phase: complete or absent, verified, bounded in number."""

import json
import math
import struct
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from .._types import PyTree
from ._errors import ExperimentError
from .manifest import CHECKPOINTS, RunFolder
from .together import by_first

KEPT = 2
_MAGIC = b"ntt-eqx checkpoint 1\n"


class Checkpoint(NamedTuple):
    """Everything that a phase needs to go on exactly where it was."""

    step: int  # steps done
    state: PyTree  # model, mask, optimiser state and random keys; its JAX arrays are what is stored
    # what is not an array: phase, iterator state, rows written, seconds used
    record: dict[str, Any]


class CheckpointStore:
    """The checkpoints of one phase of one run, one file each; the newest two are kept.

    A file is the line `ntt-eqx checkpoint 1`, the length of the header (8 bytes, little-endian),
    the header (JSON: the record, and dtype and shape of each array), and the arrays' bytes. The
    run's manifest has its digest; a checkpoint that does not match it is passed over for the one
    before.
    """

    def __init__(self, run: RunFolder, phase: str):
        self._run, self._prefix = run, f"{CHECKPOINTS}{phase}-"
        self.directory = run.path / CHECKPOINTS

    def save(self, checkpoint: Checkpoint) -> None:
        """Write a checkpoint; older ones stay if it fails."""
        arrays = [np.asarray(leaf) for leaf in _arrays(checkpoint.state)]
        try:
            self._run.write({self._name(checkpoint.step): _encode(arrays, checkpoint.record)})
        except OSError as error:
            raise ExperimentError(
                f"{self.directory}: the checkpoint of step {checkpoint.step} cannot be written "
                f"({error.strerror}); older ones are kept."
            ) from error
        steps = [step for step in self.steps() if step <= checkpoint.step]
        self._run.remove(map(self._name, steps[:-KEPT]))

    def latest(self, like: PyTree) -> Checkpoint | None:
        """The newest whole checkpoint; `ExperimentError` when there are some and none is whole.

        Its arrays lie on the devices that those of `like` are on, whichever wrote them; with
        several processes on all devices.
        """
        step, reason = by_first(lambda: self._newest_whole(like))
        if step is not None:
            arrays, record = _decode(self._run.read(self._name(step)), like)
            return Checkpoint(step, _with_arrays(like, arrays), record)
        if reason is not None:
            raise ExperimentError(
                f"{self.directory}: no checkpoint there can be read ({reason}); remove this "
                "directory to start this part again."
            )
        return None

    def steps(self) -> list[int]:
        """Steps of the checkpoints that are kept, oldest first."""
        numbers = [name.removeprefix(self._prefix) for name in self._run.names(self._prefix)]
        return sorted(int(number) for number in numbers if number.isdecimal())

    def _name(self, step: int) -> str:
        return f"{self._prefix}{step:09}"

    def _newest_whole(self, like: PyTree) -> tuple[int | None, str | None]:
        reason = None
        for step in reversed(self.steps()):
            try:
                _decode(self._run.read(self._name(step)), like)
            except (ValueError, KeyError, TypeError) as error:
                reason = str(error)
                continue
            return step, None
        return None, reason


def _encode(arrays: list[np.ndarray], record: dict[str, Any]) -> bytes:
    kinds = [[str(array.dtype), list(array.shape)] for array in arrays]
    text = json.dumps({"record": record, "arrays": kinds}).encode()
    return b"".join((_MAGIC, struct.pack("<Q", len(text)), text, *(a.tobytes() for a in arrays)))


def _decode(content: bytes, like: PyTree) -> tuple[list[np.ndarray], dict[str, Any]]:
    """Arrays and record; `ValueError` where they are not those of a state like this."""
    start = len(_MAGIC) + 8
    if not content.startswith(_MAGIC) or len(content) < start:
        raise ValueError("not a checkpoint of this version")
    end = start + struct.unpack("<Q", content[len(_MAGIC) : start])[0]
    header = json.loads(content[start:end])
    wanted = [[str(leaf.dtype), list(leaf.shape)] for leaf in _arrays(like)]
    if header["arrays"] != wanted:
        raise ValueError("its arrays are not those of this network")
    arrays = []
    for kind, shape in wanted:
        dtype = jnp.dtype(kind)
        size = math.prod(shape)
        arrays.append(np.frombuffer(content, dtype, size, end).reshape(shape).copy())
        end += size * dtype.itemsize
    return arrays, header["record"]


def _arrays(state: PyTree) -> list[jax.Array]:
    leaves = [leaf for leaf in jax.tree.leaves(state) if isinstance(leaf, jax.Array)]
    # A typed random key is stored by its words.
    return [jax.random.key_data(leaf) if _is_key(leaf) else leaf for leaf in leaves]


def _with_arrays(like: PyTree, arrays: list[np.ndarray]) -> PyTree:
    several = jax.process_count() > 1
    everywhere = NamedSharding(Mesh(jax.devices(), ("devices",)), PartitionSpec())
    fresh = iter(zip(_arrays(like), arrays, strict=True))

    def put(leaf: Any) -> Any:
        if not isinstance(leaf, jax.Array):
            return leaf
        plain, array = next(fresh)
        where = everywhere if several and plain.is_fully_addressable else plain.sharding
        put = jax.make_array_from_callback(array.shape, where, lambda index: array[index])
        return (
            jax.random.wrap_key_data(put, impl=jax.random.key_impl(leaf)) if _is_key(leaf) else put
        )

    return jax.tree.map(put, like)


def _is_key(leaf: jax.Array) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
