"""The presets of `compare`: whole comparisons by name."""

import dataclasses
import types
from collections.abc import Mapping

from .settings import CompareSettings, MaskSettings, TrainingSettings, TransferSettings

_STEPPED = TrainingSettings(
    epochs=160.0,
    batch_size=128,
    optimizer="sgd",
    learning_rate=0.1,
    momentum=0.9,
    schedule="steps",
    milestones=(0.5, 0.75),
    step_factor=0.1,
    weight_decay=5e-4,
    l2=0.0,
    crop=4,
    flip=True,
    held_out=0.0,
)
"""SGD in steps with crops and flips, the usual recipe of CIFAR-10."""

_CLASSIFIERS = ("random", "magnitude", "snip", "grasp", "synflow", "ntk-sap", "dense")

_GRADUAL = CompareSettings(
    datasets=("mnist", "fashion-mnist"),
    methods=(
        *("ntt-sketch@erk", "random@erk", "weighted-random@erk", "ntk-sap", "synflow", "dense"),
    ),
    densities=(0.01,),
    seeds=(0, 1, 2, 3, 4),
    transfer=TransferSettings(
        epochs=3.27,
        held_out=0.02,
        learning_rate=1e-3,
        decay=0.05,
        sketch_size=8,
        gradual=0.5,
        kernel_weight=1e-2,
    ),
    training=TrainingSettings(epochs=20.0),
)

PRESETS: Mapping[str, CompareSettings] = types.MappingProxyType(
    {
        "quick": CompareSettings(
            transfer=TransferSettings(epochs=20.0, held_out=0.02),
            training=TrainingSettings(epochs=25.0),
        ),
        "fast": CompareSettings(
            methods=("ntt-sketch", "random@erk", "snip", "synflow", "magnitude", "dense"),
            transfer=TransferSettings(epochs=20.0, held_out=0.02, learning_rate=1e-3, decay=0.05),
            training=TrainingSettings(epochs=25.0),
        ),
        # A transfer of 3,000 steps, in half of which the density falls (docs/results/search.md)
        "gradual": _GRADUAL,
        # The same on a sixth of the units, by which every method may keep weights
        "few-channels": dataclasses.replace(
            _GRADUAL, mask=MaskSettings(pattern="few-channels:1/6")
        ),
        "paper": CompareSettings(
            datasets=("fashion-mnist",),
            methods=("ntt", "random", "snip", "logit-snip", "dense"),
            scopes=("layer",),
            seeds=(0, 1, 2, 3, 4),
        ),
        # Liu & Zenke (ICML 2020): as `paper`, on their convolutional network
        "conv-4": CompareSettings(
            datasets=("cifar-10",),
            models=("conv-4",),
            methods=("ntt", "random", "snip", "logit-snip", "dense"),
            scopes=("layer",),
            densities=(0.01, 0.03, 0.05, 0.1, 0.3),
            seeds=(0, 1, 2, 3, 4),
        ),
        # GraSP (Wang et al., ICLR 2020): whole networks are ranked
        "vgg-19": CompareSettings(
            datasets=("cifar-10",),
            models=("vgg-19-bn",),
            methods=_CLASSIFIERS,
            scopes=("global",),
            densities=(0.1, 0.05, 0.02),
            seeds=(0, 1, 2),
            training=_STEPPED,
        ),
        # NTK-SAP (Wang et al., ICLR 2023), in the recipe of Frankle et al. (2021)
        "resnet-20": CompareSettings(
            datasets=("cifar-10",),
            models=("resnet-20-bn",),
            methods=_CLASSIFIERS,
            scopes=("global",),
            densities=(0.2, 0.1, 0.05, 0.02),
            seeds=(0, 1, 2),
            training=dataclasses.replace(_STEPPED, weight_decay=1e-4),
        ),
        # Zhang et al. (NeurIPS 2025), Table 4. Blocks of 1 x 1 are single weights, and patterns
        # leave the last layer dense.
        "ultra-sparse": CompareSettings(
            datasets=("mnist", "fashion-mnist"),
            models=("mlp-1568",),
            methods=(
                *("ntt-sketch@erk", "random@erk", "snip", "synflow", "ntk-sap", "gmp"),
                *("rigl@erk", "set@erk", "dense"),
            ),
            densities=(0.01,),
            seeds=(0, 1, 2),
            mask=MaskSettings(pattern="block:1x1"),
            transfer=TransferSettings(epochs=3.27, learning_rate=1e-3, decay=0.05),
            training=TrainingSettings(
                epochs=100.0,
                batch_size=32,
                optimizer="sgd",
                learning_rate=0.025,
                momentum=0.9,
                schedule="linear",
                final_share=0.01,
                weight_decay=5e-4,
                l2=0.0,
                held_out=0.0,
            ),
        ),
    }
)
"""`quick`: a comparison within three minutes. `fast`: the same with a sketched transfer, for larger
networks and data. `gradual`: a short transfer whose density falls. `few-channels`: the same, with
all masks between a random sixth of the units. `paper`: the published protocol.
`conv-4`, `vgg-19`, `resnet-20` and `ultra-sparse`: protocols on which pruning is compared;
`published.py` has the numbers."""
