"""Does a sparse network's linearised training follow the dense one's? A figure and its numbers.

    python benchmarks/linearised_path.py

LeNet-300-100 on two classes of Fashion-MNIST-mini: gradient flow on the mean squared error of the
linearised networks, in closed form, from the kernels of 128 training and 200 test images.
"""

import argparse
import json
from pathlib import Path

import jax
import matplotlib
import numpy as np
import optax

import ntt_eqx as ntt

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

PLACE = Path(__file__).parent / "results"
FIGURE = Path(__file__).parents[1] / "docs" / "figures" / "linearised-path.png"
TIMES = np.logspace(-3, 3, 49)


def transferred(teacher, data, density, steps):
    config = ntt.NTTConfig(density=density, num_steps=steps, mask_every=50)
    state = ntt.ntt_init(teacher, config, optax.adam(5e-4))
    batches = ntt.data.batches(data.train, 64, seed=0, mean=data.mean, std=data.std)
    state, _ = ntt.transfer(state, batches, num_steps=steps, log_every=None)
    return state.student


def path_of(model, train, test, targets):
    """Outputs for the test images at all times, `[T, N, K]`."""
    theta, f, _ = ntt.ntk_and_outputs(model, train)
    cross, g, _ = ntt.ntk_and_outputs(model, test, train)
    flow = ntt.mse_path(theta, targets - f)
    return np.stack([g + flow(2 * t / targets.size)(cross) for t in TIMES])


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--density", type=float, default=0.1)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=2)
    args = parser.parse_args()
    data = ntt.data.load_dataset("fashion-mnist-mini:0,1:250")
    read = lambda split: ntt.data.as_batch(split, mean=data.mean, std=data.std)
    train, test = read(data.train), read(data.test)
    x, y = train.x[:128], jax.nn.one_hot(train.y[:128], 2)
    new, labels = test.x[:200], test.y[:200]
    distances, accuracies = {}, {}
    for seed in range(args.seeds):
        teacher = ntt.models.LeNet300100(num_classes=2, key=jax.random.key(seed))
        random = ntt.scores.Random(jax.random.key(seed + 100))
        networks = {
            "dense": teacher,
            "NTT": transferred(teacher, data, args.density, args.steps),
            "magnitude": ntt.prune(teacher, ntt.scores.Magnitude(), args.density),
            "random": ntt.prune(teacher, random, args.density),
        }
        dense = path_of(teacher, x, new, y)
        for name, model in networks.items():
            path = dense if name == "dense" else path_of(model, x, new, y)
            size = np.linalg.norm(dense.reshape(len(TIMES), -1), axis=1)
            left = np.linalg.norm((path - dense).reshape(len(TIMES), -1), axis=1) / size
            distances.setdefault(name, []).append(left.tolist())
            right = path.argmax(axis=2) == labels[None]
            accuracies.setdefault(name, []).append(right.mean(axis=1).tolist())
    result = {"times": TIMES.tolist(), "density": args.density, "steps": args.steps}
    result |= {"distance": distances, "accuracy": accuracies}
    (PLACE / "linearised_path.json").write_text(json.dumps(result) + "\n")
    draw(result)
    for name in distances:
        ends = np.mean(distances[name], axis=0)
        print(
            f"{name:10s} distance {ends[[0, 24, 48]]} accuracy {np.mean(accuracies[name], 0)[-1]}"
        )


def draw(result):
    """Distance to the dense network's path, and accuracy along it."""
    figure, axes = plt.subplots(1, 2, figsize=(7, 2.8), layout="constrained")
    for name in result["distance"]:
        for axis, part in zip(axes, ("distance", "accuracy"), strict=True):
            if part == "distance" and name == "dense":
                continue
            values = 100 ** (part == "accuracy") * np.array(result[part][name])
            mean, spread = values.mean(axis=0), values.std(axis=0)
            color = {"dense": "0.3", "NTT": "C0", "magnitude": "C1", "random": "C2"}[name]
            axis.plot(result["times"], mean, color=color, label=name)
            axis.fill_between(
                result["times"], mean - spread, mean + spread, color=color, alpha=0.15, lw=0
            )
    axes[0].set(ylabel="distance from the dense path", ylim=(0, None))
    axes[1].set(ylabel="test accuracy / %")
    for axis in axes:
        axis.set(xscale="log", xlabel="time of gradient flow")
        axis.spines[["top", "right"]].set_visible(False)
    axes[1].legend(frameon=False)
    figure.savefig(FIGURE, dpi=160)


if __name__ == "__main__":
    main()
