"""The methods of choosing a sparse network: one record each, which every command reads."""

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

from jaxtyping import PRNGKeyArray

from .. import NTTConfig, ntt_loss, scores

_RAY = (0.25, 0.5, 0.75, 1.0)


@dataclasses.dataclass(frozen=True)
class Method:
    """One way to choose a sparse network."""

    label: str  # what tables and figures call it
    colour: str  # of its lines
    marker: str  # of its points, by which grey prints tell it from others
    dashes: Any = "-"  # of its lines, likewise
    # the kernel that it transfers, `active` or `ambient`; empty for a method that scores
    kernel: str = ""
    sketched: bool = False  # whether only random directions of it are compared
    # makes its score from a random key, the dense network and the density; `None` for dense
    # networks and for transfers, which start from the mask of another method
    score: Callable[[PRNGKeyArray, Any, float], Any] | None = None
    examples: bool = True  # whether the score looks at training images
    labels: bool = False  # whether it looks at their labels
    rounds: int = 1  # published number of rounds of scoring and pruning


def _ntt_gradient(key: PRNGKeyArray, teacher: Any, density: float) -> Any:
    config = NTTConfig(density=density, l2_weight=0.0)
    return scores.LossGradient(lambda student, x: ntt_loss(student, teacher, x, config)[0], _RAY)


def _plain(kind: Any) -> Callable[[PRNGKeyArray, Any, float], Any]:
    return lambda key, teacher, density: kind()


def _drawn(kind: Any) -> Callable[[PRNGKeyArray, Any, float], Any]:
    return lambda key, teacher, density: kind(key)


# Okabe and Ito's palette, which readers with any colour vision can tell apart, and three more from
# Tol's muted palette; markers and dashes repeat what the colours say.
METHODS: dict[str, Method] = {
    "dense": Method("dense", "#000000", "_", (0, (1, 1))),
    "ntt": Method("NTT (active)", "#0072B2", "o", kernel="active"),
    "ntt-ambient": Method("NTT (ambient)", "#56B4E9", "s", (0, (4, 1.5)), kernel="ambient"),
    "ntt-sketch": Method(
        "NTT (sketched)", "#44AA99", "*", (0, (2, 1, 2, 3)), kernel="ambient", sketched=True
    ),
    "random": Method(
        "random", "#8A8A8A", "X", (0, (1, 1.2)), score=_drawn(scores.Random), examples=False
    ),
    "magnitude": Method(
        "magnitude", "#7A5230", "v", (0, (5, 1)), score=_plain(scores.Magnitude), examples=False
    ),
    "snip": Method(
        "SNIP", "#D55E00", "^", (0, (6, 1, 1, 1)), score=_plain(scores.Snip), labels=True
    ),
    "logit-snip": Method(
        "logit-SNIP", "#E69F00", "D", (0, (3, 1, 1, 1, 1, 1)), score=_plain(scores.LogitSnip)
    ),
    "grasp": Method(
        "GraSP", "#009E73", "P", (0, (5, 1.5, 1.5, 1.5)), score=_plain(scores.GraSP), labels=True
    ),
    "synflow": Method(
        "SynFlow", "#CC79A7", "<", (0, (2, 1)), score=_plain(scores.SynFlow), rounds=100
    ),
    "ntk-sap": Method(
        "NTK-SAP", "#882255", ">", (0, (7, 2)), score=_drawn(scores.NTKSAP), rounds=20
    ),
    "px": Method(
        "PX", "#117733", "h", (0, (4, 1, 2, 1)), score=_plain(scores.PathExclusion), rounds=100
    ),
    "ntt-gradient": Method("NTT gradient", "#332288", "p", (0, (3, 2)), score=_ntt_gradient),
}

if TYPE_CHECKING:
    MethodName = FirstMask = TransferName = str
else:
    MethodName = Literal[tuple(METHODS)]
    FirstMask = Literal[tuple(name for name, method in METHODS.items() if method.score)]
    TransferName = Literal[tuple(name for name, method in METHODS.items() if method.kernel)]


def method(name: str) -> Method:
    """The record of `name`; an unknown one, from a newer version's files, is grey."""
    return METHODS.get(name) or Method(name, "#555555", "*")


def method_order(name: str) -> int:
    """The position of `name` in tables and legends."""
    return list(METHODS).index(name) if name in METHODS else len(METHODS)


def line_order(line: tuple[str, str | None, str]) -> tuple[Any, ...]:
    """The position of a method, with its scope and kind of mask, in legends."""
    name, scope, mask = line
    return method_order(name), scope != "layer", mask
