"""Checkpoints of a running phase: atomic, verified, and bounded in number (Orbax)."""

import hashlib
import json
import logging
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from ._errors import ExperimentError, require

KEPT = 2


class Checkpoint(NamedTuple):
    """Everything that a phase needs to go on exactly where it was."""

    step: int  # steps done
    state: PyTree  # model, mask, optimiser state and random keys; its JAX arrays are what is stored
    # what is not an array: phase, iterator state, rows written, seconds used
    record: dict[str, Any]


class CheckpointStore:
    """The checkpoints of one phase of one cell.

    A checkpoint is written to a temporary directory and renamed, so that it is whole or absent;
    the newest two are kept. A digest of all arrays and of the record travels with them, and a
    checkpoint that does not match it is passed over for the one before.
    """

    def __init__(self, directory: Path):
        ocp = require("orbax.checkpoint")
        logging.getLogger("absl").setLevel(logging.ERROR)
        self.directory = directory.absolute()
        self._args = ocp.args
        options = ocp.CheckpointManagerOptions(max_to_keep=KEPT, enable_async_checkpointing=False)
        self._manager = ocp.CheckpointManager(self.directory, options=options)

    def save(self, checkpoint: Checkpoint) -> None:
        """Write a checkpoint, unless there is one for this step; older ones stay if it fails."""
        if checkpoint.step in self.steps():
            return
        arrays = _named_arrays(checkpoint.state)
        record = {**checkpoint.record, "digest": _digest(arrays, checkpoint.record)}
        state, record = self._args.StandardSave(arrays), self._args.JsonSave(record)
        args = self._args.Composite(state=state, record=record)
        try:
            self._manager.save(checkpoint.step, args=args)
        except Exception as error:  # Orbax raises many kinds for a full disk
            raise ExperimentError(
                f"{self.directory}: the checkpoint of step {checkpoint.step} cannot be written "
                f"({_reason(error)}); older ones are kept."
            ) from error

    def latest(self, like: PyTree) -> Checkpoint | None:
        """The newest whole checkpoint; `ExperimentError` when there are some and none is whole.

        Its arrays lie on the devices that those of `like` are on, whichever wrote them; with
        several processes on all devices.
        """
        several = jax.process_count() > 1
        everywhere = NamedSharding(Mesh(jax.devices(), ("devices",)), PartitionSpec())
        where = lambda x: everywhere if several and x.is_fully_addressable else x.sharding
        here = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where(x))
        wanted = jax.tree.map(here, _named_arrays(like))
        state, reason = self._args.StandardRestore(wanted), None
        for step in reversed(self.steps()):
            args = self._args.Composite(state=state, record=self._args.JsonRestore())
            try:
                found = self._manager.restore(step, args=args)
                record = dict(found.record)
                if record.pop("digest") != _digest(found.state, record):
                    raise ValueError("its contents do not match their digest")
            except Exception as error:  # Orbax raises many kinds for broken files
                reason = _reason(error)
                continue
            return Checkpoint(step, _with_arrays(like, found.state), record)
        if reason is not None:
            raise ExperimentError(
                f"{self.directory}: no checkpoint there can be read ({reason}); remove this "
                "directory to start this part again."
            )
        return None

    def steps(self) -> list[int]:
        """Steps of the checkpoints that are kept, oldest first."""
        return sorted(self._manager.all_steps())

    def close(self) -> None:
        """Release what the store holds."""
        self._manager.close()


def _named_arrays(state: PyTree) -> dict[str, jax.Array]:
    leaves = [leaf for leaf in jax.tree.leaves(state) if isinstance(leaf, jax.Array)]
    # A typed random key is stored by its words.
    plain = (jax.random.key_data(leaf) if _is_key(leaf) else leaf for leaf in leaves)
    return {f"{i:05d}": leaf for i, leaf in enumerate(plain)}


def _with_arrays(like: PyTree, arrays: dict[str, jax.Array]) -> PyTree:
    fresh = iter([arrays[name] for name in sorted(arrays)])

    def put(leaf: Any) -> Any:
        if not isinstance(leaf, jax.Array):
            return leaf
        if _is_key(leaf):
            return jax.random.wrap_key_data(next(fresh), impl=jax.random.key_impl(leaf))
        return jnp.asarray(next(fresh))

    return jax.tree.map(put, like)


def _is_key(leaf: jax.Array) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _digest(arrays: dict[str, jax.Array], record: dict[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(record, sort_keys=True).encode())
    for name in sorted(arrays):
        array = np.asarray(arrays[name])
        digest.update(f"{name}{array.dtype}{array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def _reason(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:200]
