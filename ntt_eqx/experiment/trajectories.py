"""Networks trained side by side on the same batches, and their outputs on fixed inputs."""

import dataclasses
import functools
import io
from collections.abc import Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from .. import SparseModel, TrainConfig, TrainState, fit, train_init, train_step
from .._optimise import copied
from ..data import Dataset
from .images import StandardisedSplit, parts
from .loop import Phase
from .settings import EvolutionSettings


@dataclasses.dataclass(frozen=True)
class Trajectories:
    """Outputs on fixed inputs while networks train."""

    steps: np.ndarray  # when they were taken, `[T]`
    outputs: Mapping[str, np.ndarray]  # by network, `[T, inputs, classes]`; one of them is `dense`

    @staticmethod
    def of(
        state: Any, networks: Mapping[str, SparseModel], settings: EvolutionSettings
    ) -> "Trajectories":
        """The trajectories from the last state of `side_by_side`."""
        outputs = dict(zip(networks, np.asarray(state[1]), strict=True))
        return Trajectories(_steps(settings), outputs)

    def encode(self) -> bytes:
        """The content of an `.npz` file of plain arrays."""
        buffer = io.BytesIO()
        arrays: Any = {"steps": self.steps, **self.outputs}
        np.savez_compressed(buffer, **arrays)
        return buffer.getvalue()

    def distances(self, name: str) -> np.ndarray:
        """Root mean square of the difference from the dense network's outputs, `[T]`."""
        difference = self.outputs[name].astype(np.float64) - self.outputs["dense"]
        return np.sqrt(np.mean(np.square(difference), axis=(1, 2)))

    def length(self) -> float:
        """Root mean square of what training changes in the dense network's outputs."""
        dense = self.outputs["dense"].astype(np.float64)
        return float(np.sqrt(np.mean(np.square(dense[-1] - dense[0]))))


def side_by_side(
    networks: Mapping[str, SparseModel], images: Dataset, settings: EvolutionSettings, seed: int
) -> Phase:
    """Train all `networks` on the same labelled batches.

    The phase's state ends in an array `[networks, T, inputs, classes]`: see `Trajectories.of`.
    """
    part, _ = parts(images, 0.0, seed)
    inputs = jnp.asarray(StandardisedSplit(images, images.test).first(settings.inputs).x)
    optimizer = _optimizer(settings.optimizer, settings.learning_rate)
    states = [
        train_init(copied(network), TrainConfig(l2_weight=0.0), optimizer)
        for network in networks.values()
    ]
    places = {int(step): place for place, step in enumerate(_steps(settings))}
    start = lambda state: int(state[0][0].step)
    first = _outputs(states, inputs)
    record = jnp.zeros((len(states), len(places), *first.shape[1:]), first.dtype)

    def step(state: Any, batch: Any) -> tuple[Any, Mapping[str, Array]]:
        states, record = state
        states, losses = _train_all(states, jnp.asarray(batch.x), jnp.asarray(batch.y))
        done = start((states, record))
        if done in places:
            record = record.at[:, places[done]].set(_outputs(states, inputs))
        means = {f"loss_{name}": loss for name, loss in zip(networks, losses, strict=True)}
        return (states, record), {"loss": jnp.stack(losses).sum(), **means}

    return Phase(
        name="evolution",
        title="training side by side",
        num_steps=settings.steps,
        log_every=max(1, settings.steps // settings.snapshots),
        state=(states, record.at[:, 0].set(first)),
        batches=part.batches(min(settings.batch_size or part.size, part.size), seed=seed),
        run=lambda state, batches, **how: fit(step, state, batches, start=start(state), **how),
        shown=lambda row: {name: row["train"][f"loss_{name}"] for name in networks},
        advice=f"Try a smaller --evolution.learning-rate (now {settings.learning_rate:g}).",
    )


def principal_axes(found: Trajectories) -> tuple[dict[str, np.ndarray], tuple[float, float]]:
    """All trajectories in the plane that shows most of their variance (PCA).

    Returns by network its points `[T, 2]`, and the shares of the variance on the two axes.
    """
    flat = {name: o.reshape(len(o), -1).astype(np.float64) for name, o in found.outputs.items()}
    points = np.concatenate(list(flat.values()))
    mean = points.mean(0)
    _, values, axes = np.linalg.svd(points - mean, full_matrices=False)
    shares = np.square(values) / max(float(np.sum(np.square(values))), 1e-30)
    plane = {name: (o - mean) @ axes[:2].T for name, o in flat.items()}
    return plane, (float(shares[0]), float(shares[1]))


def _steps(settings: EvolutionSettings) -> np.ndarray:
    every = max(1, settings.steps // settings.snapshots)
    return np.unique([*range(0, settings.steps, every), settings.steps])


@eqx.filter_jit
def _train_all(states: list[TrainState], x: Array, y: Array) -> tuple[list[TrainState], list]:
    done = [train_step(state, (x, y)) for state in states]
    return [state for state, _ in done], [metrics.loss for _, metrics in done]


@eqx.filter_jit
def _outputs(states: list[TrainState], x: Array) -> Float[Array, "networks inputs classes"]:
    models = [eqx.nn.inference_mode(state.model.to_dense()) for state in states]
    return jnp.stack([jax.vmap(model)(x) for model in models])


@functools.lru_cache
def _optimizer(name: str, learning_rate: float) -> optax.GradientTransformation:
    return {"sgd": optax.sgd, "adam": optax.adam}[name](learning_rate)
