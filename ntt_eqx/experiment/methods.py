"""The methods of choosing a sparse network: one record each, which every command reads."""

import dataclasses
import inspect
import math
import zlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import equinox as eqx
from jaxtyping import PRNGKeyArray

from .. import (
    DynamicSparsity,
    GradualDensity,
    MagnitudeRefresh,
    NTTConfig,
    RigLRefresh,
    RoundDensity,
    RoundRefresh,
    SETRefresh,
    SparseModel,
    Sparsity,
    ntt_loss,
    scores,
)
from ._errors import ExperimentError

Scope = Literal["published", "layer", "global", "erk"]
"""How the kept weights are shared out over the layers: by ranking within each layer (`layer`, the
same share in all), over all layers at once (`global`), or within Erdős–Rényi shares (`erk`)."""

SCOPES: Mapping[str, str] = {"layer": "per layer", "global": "global", "erk": "ERK"}
"""What legends call them."""

_RAY = (0.25, 0.5, 0.75, 1.0)


@dataclasses.dataclass(frozen=True)
class Method:
    """One way to choose a sparse network."""

    label: str  # what tables and figures call it
    colour: str  # of its lines
    marker: str  # of its points, by which grey prints tell it from others
    dashes: Any = "-"  # of its lines, likewise
    # how it was published to share weights out over layers; `None` where it decides that itself
    scope: Literal["layer", "global"] | None = "layer"
    # the kernel that it transfers, `active` or `ambient`; empty for a method that scores
    kernel: str = ""
    sketched: bool = False  # whether only random directions of it are compared
    # makes its score from a random key, the dense network and the density; `None` for dense
    # networks, for transfers, which start from the mask of another method, and with `find`
    score: Callable[[PRNGKeyArray, Any, float], Any] | None = None
    examples: bool = True  # whether the score looks at training images
    labels: bool = False  # whether it looks at their labels
    rounds: int = 1  # published number of rounds of scoring and pruning
    # finds the sparse network itself, from the dense one, training examples `(x, y)`, the share of
    # weights to keep and a random key
    find: Callable[[Any, Any, float, PRNGKeyArray], SparseModel] | None = None
    # changes the mask in training: from what its last mask keeps, the steps of one training, a seed
    dynamic: Callable[[Sparsity, int, int], DynamicSparsity] | None = None


def _ntt_gradient(key: PRNGKeyArray, teacher: Any, density: float) -> Any:
    config = NTTConfig(density=density, l2_weight=0.0)
    return scores.LossGradient(lambda student, x: ntt_loss(student, teacher, x, config)[0], _RAY)


def _plain(kind: Any) -> Callable[[PRNGKeyArray, Any, float], Any]:
    return lambda key, teacher, density: kind()


def _drawn(kind: Any) -> Callable[[PRNGKeyArray, Any, float], Any]:
    return lambda key, teacher, density: kind(key)


def _every(steps: int) -> int:
    """Steps between two refreshes: the 100 of RigL, where SET has an epoch; in short runs fewer."""
    return max(1, min(100, steps // 50))


def _gradual(sparsity: Sparsity, steps: int, seed: int) -> DynamicSparsity:
    """Zhu & Gupta (2017): from dense to sparse by a cubic within three quarters of the training."""
    end = max(1, 3 * steps // 4)
    falling = GradualDensity(sparsity.density, end)
    falling = Sparsity(falling, sparsity.scope, sparsity.allocation, sparsity.pattern)
    return DynamicSparsity(falling, MagnitudeRefresh(_every(steps), end))


def _rigl(sparsity: Sparsity, steps: int, seed: int) -> DynamicSparsity:
    """Evci et al. (2020): alpha = 0.3, until three quarters of the training."""
    return DynamicSparsity(sparsity, RigLRefresh(_every(steps), max(1, 3 * steps // 4), 0.3))


def _set(sparsity: Sparsity, steps: int, seed: int) -> DynamicSparsity:
    """Mocanu et al. (2018): zeta = 0.3; the last interval has no refresh."""
    every = _every(steps)
    return DynamicSparsity(sparsity, SETRefresh(every, steps - every + 1, 0.3, seed))


def _lottery(sparsity: Sparsity, steps: int, seed: int) -> DynamicSparsity:
    """Frankle et al. (2020): rounds that prune a fifth, rewound to a fiftieth of the training."""
    rounds = max(1, round(math.log(sparsity.density) / math.log(0.8)))
    refresh = RoundRefresh(steps, rounds, steps // 50)
    density = RoundDensity(sparsity.density, refresh)
    falling = Sparsity(density, sparsity.scope, sparsity.allocation, sparsity.pattern)
    return DynamicSparsity(falling, refresh, refresh.rewind)


# Scopes as published. NTT and its baseline logit-SNIP rank per layer (Liu & Zenke, 2020); SNIP (Lee
# et al., 2019), GraSP (Wang et al., 2020), SynFlow (Tanaka et al., 2020), NTK-SAP (Wang et al.,
# 2023), LAMP (Lee et al., 2021) and PX over all layers, and so does magnitude as a baseline at
# initialisation (Tanaka et al., 2020; Frankle et al., 2021). A random mask has the same share in
# every layer, or ERK shares in strong baselines (Evci et al., 2020; Liu et al., 2022):
# `random@erk`. So do RigL and SET: `rigl@erk` is the published one.
#
# Okabe and Ito's palette, which readers with any colour vision can tell apart, and three more from
# Tol's muted palette; markers and dashes repeat what the colours say.
METHODS: dict[str, Method] = {
    "dense": Method("dense", "#000000", "_", (0, (1, 1)), None),
    "ntt": Method("NTT (active)", "#0072B2", "o", kernel="active"),
    "ntt-ambient": Method("NTT (ambient)", "#56B4E9", "s", (0, (4, 1.5)), kernel="ambient"),
    "ntt-sketch": Method(
        "NTT (sketched)", "#44AA99", "*", (0, (2, 1, 2, 3)), kernel="ambient", sketched=True
    ),
    "random": Method(
        "random", "#8A8A8A", "X", (0, (1, 1.2)), score=_drawn(scores.Random), examples=False
    ),
    "weighted-random": Method(
        *("random by variance", "#4D4D4D", "8", (0, (1, 2, 3, 2))),
        score=_drawn(scores.WeightedRandom),
    ),
    "magnitude": Method(
        "magnitude",
        "#7A5230",
        "v",
        (0, (5, 1)),
        "global",
        score=_plain(scores.Magnitude),
        examples=False,
    ),
    "lamp": Method(
        *("LAMP", "#999933", "d", (0, (5, 1, 1, 1)), "global"),
        score=_plain(scores.LAMP),
        examples=False,
    ),
    "wanda": Method(*("Wanda", "#AA4466", "H", (0, (4, 2, 4, 1))), score=_plain(scores.Wanda)),
    "snip": Method(
        "SNIP", "#D55E00", "^", (0, (6, 1, 1, 1)), "global", score=_plain(scores.Snip), labels=True
    ),
    "logit-snip": Method(
        "logit-SNIP", "#E69F00", "D", (0, (3, 1, 1, 1, 1, 1)), score=_plain(scores.LogitSnip)
    ),
    "grasp": Method(
        "GraSP",
        "#009E73",
        "P",
        (0, (5, 1.5, 1.5, 1.5)),
        "global",
        score=_plain(scores.GraSP),
        labels=True,
    ),
    "synflow": Method(
        "SynFlow", "#CC79A7", "<", (0, (2, 1)), "global", score=_plain(scores.SynFlow), rounds=100
    ),
    "ntk-sap": Method(
        "NTK-SAP", "#882255", ">", (0, (7, 2)), "global", score=_drawn(scores.NTKSAP), rounds=20
    ),
    "px": Method(
        "PX",
        "#117733",
        "h",
        (0, (4, 1, 2, 1)),
        "global",
        score=_plain(scores.PathExclusion),
        rounds=100,
    ),
    "ntt-gradient": Method("NTT gradient", "#332288", "p", (0, (3, 2)), score=_ntt_gradient),
    "gmp": Method("GMP", "#1B9E77", "+", (0, (1, 2)), dynamic=_gradual),
    "lottery-ticket": Method(
        *("lottery ticket", "#A6761D", "|", (0, (8, 2)), "global"), dynamic=_lottery
    ),
    "rigl": Method(
        *("RigL", "#E7298A", "x", (0, (3, 1))),
        score=_drawn(scores.Random),
        examples=False,
        dynamic=_rigl,
    ),
    "set": Method(
        *("SET", "#666666", ".", (0, (2, 2))),
        score=_drawn(scores.Random),
        examples=False,
        dynamic=_set,
    ),
}

if TYPE_CHECKING:
    FirstMask = TransferName = str
else:
    FirstMask = Literal[
        tuple(name for name, method in METHODS.items() if method.score and not method.dynamic)
    ]
    TransferName = Literal[tuple(name for name, method in METHODS.items() if method.kernel)]


def method(name: str) -> Method:
    """The look of `name` in tables and figures.

    A method of a user's, or of a newer version, looks as its name decides, on every machine.
    """
    return METHODS.get(name) or Method(name, *_look(name))


def _look(name: str) -> tuple[str, str, Any]:
    """A colour, marker and dashes that no method of the package has together."""
    number = zlib.crc32(name.encode())
    number, colour = divmod(number, len(_OWN_COLOURS))
    number, marker = divmod(number, len(_OWN_MARKERS))
    return _OWN_COLOURS[colour], _OWN_MARKERS[marker], (0, (3 + number % 4, 1, 1, 1))


_OWN_COLOURS = ("#AA4499", "#661100", "#6699CC", "#DDCC77")  # of Tol's muted palette
_OWN_MARKERS = ("1", "2", "3", "4")


def own_method(text: str, thing: Any) -> Method:
    """The record of a method of a user's, from what the reference `text` names.

    `thing` is a score, or a class of scores that is made without arguments, or from a random key if
    it draws; or a function `(teacher, examples, density, key) -> SparseModel`.

    Raises `ExperimentError` for anything else.
    """
    kinds = (scores.AbstractLabelFreeScore, scores.AbstractSupervisedScore)
    kind = thing if isinstance(thing, type) else type(thing)
    look: Any = (text, *_look(text))
    if issubclass(kind, kinds):
        labels = issubclass(kind, scores.AbstractSupervisedScore)
        return Method(*look, score=_made(text, thing), labels=labels)
    try:
        inspect.signature(thing).bind("teacher", "examples", "density", "key")
    except (TypeError, ValueError):
        raise ExperimentError(
            f"{text}: is no method, which is a score (of ntt_eqx.scores, or like them) or a "
            "function (teacher, examples, density, key) that returns a SparseModel."
        ) from None
    return Method(*look, scope=None, find=thing, labels=True)


def _made(text: str, thing: Any) -> Callable[[PRNGKeyArray, Any, float], Any]:
    """The constructor of a score from a random key, the dense network and the density."""
    if not isinstance(thing, type):
        draws = isinstance(thing, scores.AbstractDrawingScore)
        return lambda key, teacher, density: _with_key(thing, key) if draws else thing
    make = _drawn(thing) if issubclass(thing, scores.AbstractDrawingScore) else _plain(thing)
    given = ("key",) if issubclass(thing, scores.AbstractDrawingScore) else ()
    try:
        inspect.signature(thing).bind(*given)
    except TypeError as error:
        raise ExperimentError(
            f"{text}: cannot be made from {'a key' if given else 'nothing'} alone ({error}); name "
            "one that is made already: mine = Score(...)."
        ) from None
    return make


def _with_key(score: Any, key: PRNGKeyArray) -> Any:
    return eqx.tree_at(lambda s: s.key, score, key)


def method_order(name: str) -> int:
    """The position of `name` in tables and legends."""
    return list(METHODS).index(name) if name in METHODS else len(METHODS)


def split_scope(text: str) -> tuple[str, str | None]:
    """The method and the scope that `METHOD@SCOPE` names; no scope in a plain name.

    Raises `ExperimentError` for a scope that there is not.
    """
    name, at, scope = text.rpartition("@")
    if not at or ":" in scope:  # a reference to code may have one in its path
        return text, None
    if scope not in SCOPES:
        raise ExperimentError(f"method {text!r}: @{scope} is none of @{', @'.join(SCOPES)}.")
    return name, scope


class Line(NamedTuple):
    """A line of a table or a figure: its results differ in seed and density alone."""

    method: str
    scope: str  # `layer`, `global`, `erk`; empty where there is none
    mask: str  # how weights are kept together or ablated; empty for plain masks
    settings: str = ""  # what tells it apart from another line of the same method, in words

    @classmethod
    def of(cls, result: Mapping[str, Any]) -> "Line":
        """The line to which a cell's result belongs."""
        scope, parts = result.get("scope") or "", (result.get("mask") or "").split(", ")
        if parts[0] == "erk":  # which files keep apart from the scope
            scope, parts = "erk", parts[1:]
        return cls(result["method"], scope, ", ".join(parts), result.get("settings") or "")

    def label(self, scoped: bool) -> str:
        """Its name in legends, with its scope if it is `scoped`."""
        scope = SCOPES.get(self.scope, self.scope) if scoped else ""
        parts = (method(self.method).label, scope, self.mask, self.settings)
        return ", ".join(part for part in parts if part)

    @property
    def order(self) -> tuple[Any, ...]:
        """Its position in tables and legends."""
        return method_order(self.method), self.method, self.scope != "layer", *self[1:]
