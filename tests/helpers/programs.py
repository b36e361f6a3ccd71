"""Random programs: pieces wired at random to small Equinox models, and what to compare on them.

A `Program` is data, so that a failing one prints as text that can be pasted back:

    Program(
        sample=Sample((3, 4)),
        steps=(
            Step("learned", (), shape=(4,)),
            Step("dense", (1,), features=3, bias=True, form="left", whole=False),
            ...

Value 0 of a program is its sample, value n the result of step n; a step reads values by number.
"""

import dataclasses
import functools
import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

import ntt_eqx as ntt

from .comparison import every_array, random_mask, relative_error, weighted_sum
from .interpreter import interpreted
from .pieces import MANY_ROWS, PIECES, ROWS, dense_matrix, fit, real_dtype, reals


@dataclasses.dataclass(frozen=True)
class Sample:
    """What the model takes: real numbers, booleans, integers below 6, or those of a dtype."""

    shape: tuple[int, ...]
    kind: str = "real"

    def batch(self, n, rng, dtype=None):
        if self.kind == "real":
            return jnp.asarray(rng.normal(size=(n, *self.shape)), dtype)
        if self.kind == "int":
            return jnp.asarray(rng.integers(0, 6, (n, *self.shape)))
        if self.kind != "bool":
            limits = np.iinfo(self.kind)
            low, high = max(limits.min, -300), min(limits.max, 300)
            return jnp.asarray(rng.integers(low, high + 1, (n, *self.shape)), self.kind)
        return jnp.asarray(rng.random((n, *self.shape)) < 0.5)


@dataclasses.dataclass(frozen=True)
class Step:
    """A piece, the numbers of the values it reads, and its settings."""

    piece: str
    reads: tuple[int, ...]
    settings: tuple[tuple[str, Any], ...] = ()
    of: int | None = None  # the step whose weights it uses, where they are not its own

    def __repr__(self):
        rest = "".join(f", {name}={value!r}" for name, value in self.settings)
        rest += "" if self.of is None else f", of={self.of}"
        return f'step("{self.piece}", {self.reads}{rest})'


def step(piece, reads, of=None, **settings):
    return Step(piece, reads, tuple(settings.items()), of)


@dataclasses.dataclass(frozen=True)
class Program:
    """Steps, and the values whose sum is the output: `(number, whether by a matrix)`."""

    sample: Sample
    steps: tuple[Step, ...]
    outputs: tuple[tuple[int, bool], ...]
    num_outputs: int
    dtype: str | None = None  # of real numbers; JAX's own by default

    def __repr__(self):
        lines = [f"            {step!r},  # {n}" for n, step in enumerate(self.steps, 1)]
        return "\n".join(
            [
                "Program(",
                f"        sample={self.sample!r},",
                "        steps=(",
                *lines,
                "        ),",
                f"        outputs={self.outputs!r},",
                f"        num_outputs={self.num_outputs},",
                f"        dtype={self.dtype!r},",
                "    )",
            ]
        )

    @property
    def pieces(self):
        return {step.piece for step in self.steps}


class Wired(eqx.Module):
    """The model of a program: one tree of weights a step, and the matrices at its output."""

    weights: list
    heads: list
    program: Program = eqx.field(static=True)

    def __call__(self, x):
        with reals(self.program.dtype):
            return self.value(x)

    def value(self, x):
        x = x.astype(int) if x.dtype == bool else x
        values = [x]
        for step, own in zip(self.program.steps, self.weights, strict=True):
            values.append(evaluate(step, self.weights, own, values, self.program))
        total = 0.0
        for (number, _), head in zip(self.program.outputs, self.heads, strict=True):
            v = values[number].reshape(-1)
            total += fit(v, (self.program.num_outputs,)) if head is None else head @ v
        return total


def evaluate(step, weights, own, values, program):
    """The value of one step."""
    settings = dict(step.settings)
    if step.of is not None:  # the matrix of an earlier dense layer, as that layer uses it
        other = dict(program.steps[step.of - 1].settings)
        p = weights[step.of - 1]
        inputs = p["w"].size // other["features"]
        own = {"w": dense_matrix(p, other["form"], p["w"].shape[-1] if other["form"] != "right"
                                 and other["form"] != "stretched" else inputs)}  # fmt: skip
    return PIECES[step.piece].apply(own, *(values[n] for n in step.reads), **settings)


def shapes_of(program):
    """The shapes of all values, and the model with shapes for arrays."""
    with reals(program.dtype):
        return _shapes_of(program)


def _shapes_of(program):
    kind = program.sample.kind
    dtype = real_dtype() if kind == "real" else int if kind in ("int", "bool") else kind
    values: list[Any] = [jax.ShapeDtypeStruct(program.sample.shape, dtype)]
    weights: list[Any] = []
    for step in program.steps:
        own, value = shapes_of_step(step, weights, values, program)
        weights.append(own)
        values.append(value)
    heads = [
        _struct((program.num_outputs, values[n].size), "w") if matrix else None
        for n, matrix in program.outputs
    ]
    return values, Wired(weights, heads, program)


def shapes_of_step(step, weights, values, program):
    piece = PIECES[step.piece]
    read = [values[n] for n in step.reads]
    own: Any = {}
    if step.of is None:
        own = piece.weights(*(v.shape for v in read), **dict(step.settings))
    if isinstance(own, dict):
        own = {name: _struct(shape, name) for name, shape in own.items()}
    else:
        own = jax.tree.map(_real, own)

    def one(weights, own, *read):
        mine = list(values)
        for n, v in zip(step.reads, read, strict=True):
            mine[n] = v
        return evaluate(step, weights, own, mine, program)

    return own, eqx.filter_eval_shape(one, weights, own, *read)


def _real(leaf):
    """An array that Equinox made, in the program's dtype."""
    if isinstance(leaf, jax.ShapeDtypeStruct) and jnp.issubdtype(leaf.dtype, jnp.floating):
        return jax.ShapeDtypeStruct(leaf.shape, real_dtype())
    return leaf


def _struct(shape, name):
    wide = real_dtype()
    dtype = wide if name != "complex" else jnp.promote_types(wide, jnp.complex64)
    return jax.ShapeDtypeStruct(shape, dtype)


def build(program, seed=0):
    """The model of a program, its weights from NumPy, which compiles nothing."""
    rng = np.random.default_rng(seed)

    def draw(leaf):
        if not isinstance(leaf, jax.ShapeDtypeStruct):
            return leaf
        scale = 1.2 / math.sqrt(max(leaf.shape[-1], 1) if len(leaf.shape) > 1 else 1)
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            return jnp.zeros(leaf.shape, leaf.dtype)
        values = rng.normal(0, scale, leaf.shape)
        if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
            values = values + 1j * rng.normal(0, scale, leaf.shape)
        return jnp.asarray(values, leaf.dtype)

    return jax.tree.map(draw, shapes_of(program)[1])


# Drawing them

SAMPLES = (
    Sample((4,)),
    Sample((3, 4)),
    Sample((2, 4, 4)),
    Sample((2, 6)),
    Sample((3,), "int"),
    Sample((5,), "bool"),
    Sample((1,)),
    Sample((1, 4)),
    Sample((3,), "uint8"),
    Sample((1,), "int8"),
    Sample((2,), "int16"),
    Sample((2,), "uint64"),
)
NUMBERED = tuple(sample for sample in SAMPLES if sample.kind not in ("real", "bool"))
NARROW = ("float16", "bfloat16")
COMPLEX = tuple(name for name, piece in PIECES.items()
                if "complex" in piece.takes or name == "spectrum")  # fmt: skip
LARGEST = 40  # entries of a value


def kind_of(value):
    if jnp.issubdtype(value.dtype, jnp.complexfloating):
        return "complex"
    return "real" if jnp.issubdtype(value.dtype, jnp.floating) else "int"


@st.composite
def programs(draw, without=(), most=6, dtype=None, large=False, samples=SAMPLES):
    """Programs of a few steps.

    `without` names pieces to leave out, `dtype` is that of real numbers, `large` draws tables with
    more rows than two bytes have numbers, too.
    """
    sample = draw(st.sampled_from(samples))
    steps: list[Step] = []
    program = Program(sample, (), (), 1, dtype)
    without = (*without, *COMPLEX) if dtype else without
    values, weights = shapes_of(program)
    weights = []
    unread = {0}
    for _ in range(draw(st.integers(2, most))):
        kinds = [kind_of(v) for v in values]
        able = [
            name
            for name, piece in PIECES.items()
            if name not in without
            and set(piece.takes) <= set(kinds)
            and (name != "again" or any(step.piece == "dense" for step in steps))
        ]
        # Layers more often than the rest, so that most programs have several.
        able += [n for n in ("dense", "dense", "convolution", "learned", "function") if n in able]
        able += ["embedding"] * (2 if "embedding" in able else 0)
        name = draw(st.sampled_from(sorted(able)))
        piece = PIECES[name]
        reads = []
        for kind in piece.takes:
            found = [n for n, k in enumerate(kinds) if k == kind][::-1]  # the newest first
            fresh = [n for n in found if n in unread]
            reads.append(draw(st.sampled_from(fresh + found)))
        drawn = piece.settings | ({"rows": MANY_ROWS + ROWS} if large and "rows" in piece.settings
                                  else {})  # fmt: skip
        settings = tuple((k, draw(st.sampled_from(v))) for k, v in drawn.items())
        of = None
        if name == "again":
            of = draw(st.sampled_from([n for n, s in enumerate(steps, 1) if s.piece == "dense"]))
        found = Step(name, tuple(reads), settings, of)
        try:
            program = dataclasses.replace(program, steps=(*steps, found))
            with reals(dtype):
                own, value = shapes_of_step(found, weights, values, program)
        except (ValueError, OverflowError, TypeError):  # windows or dtypes that do not fit
            continue
        if not 0 < value.size <= LARGEST:
            continue
        steps.append(found)
        weights.append(own)
        unread -= set(reads)
        unread.add(len(values))
        values.append(value)
    # What is complex becomes real, what is an integer a real number; all ends are read.
    for n in sorted(unread):
        if kind_of(values[n]) != "real" and n > 0:
            how = draw(st.sampled_from(("power", "both")))
            last = step("real", (n,), how=how) if kind_of(values[n]) == "complex" else None
            steps.append(last or step("count", (n,), how="float"))
            unread = (unread - {n}) | {len(steps)}
    ends = sorted(unread - {0} or {len(steps)})
    if not steps:
        steps, ends = [step("learned", (), shape=(4,))], [1]
    outputs = tuple((n, draw(st.booleans())) for n in ends)
    if not any(jax.tree.leaves(own) for own in weights):  # a model has parameters
        outputs = ((ends[0], True), *outputs[1:])
    return Program(sample, tuple(steps), outputs, draw(st.integers(1, 3)), dtype)


@dataclasses.dataclass(frozen=True)
class Case:
    """A program, its batches and masks, and which kernel of it is wanted."""

    program: Program
    n: int = 3
    m: int | None = 2
    density: float = 0.5
    gathered: bool = False
    metric: bool = False
    kernel: str = "active"
    outputs: str = "full"
    max_bytes: int | None = None
    swapped: bool = False  # samples and metric as NumPy arrays in the other byte order
    seed: int = 0

    def __repr__(self):
        rest = dataclasses.asdict(self)
        rest.pop("program")
        lines = "".join(f"    {name}={value!r},\n" for name, value in rest.items())
        return f"Case(\n    {self.program!r},\n{lines})"


@st.composite
def cases(draw, **options):
    return Case(
        draw(programs(**options)),
        n=draw(st.integers(1, 3)),
        m=draw(st.sampled_from((2, None, 1, 3, 5))),
        density=draw(st.sampled_from((0.5, 0.1, 0.9, 1.0, 0.0))),
        gathered=draw(st.booleans()),
        metric=draw(st.booleans()),
        kernel=draw(st.sampled_from(("active", "active", "ambient"))),
        outputs=draw(st.sampled_from(("full", "diagonal", "trace", "directions"))),
        max_bytes=draw(st.sampled_from((None, None, 1, 4001))),
        swapped=draw(st.sampled_from((False, False, True))),
        seed=draw(st.integers(0, 99)),
    )


# Comparing


def swapped(array):
    """An array as NumPy's, in the byte order that this machine has not."""
    array = np.asarray(array)
    return array if array.dtype.kind == "V" else array.astype(array.dtype.newbyteorder())


def tolerance(program):
    """What rounding may do to a kernel: as much as a product of a few numbers of its dtype."""
    return 1e-9 if program.dtype is None else 32 * float(jnp.finfo(program.dtype).eps)


def check(case, products=False, evaluator=interpreted):
    """The largest errors of the kernel and of its gradient, beside the oracles.

    `products`: take the gradient by `"ntk_vector_products"`, too, and not its kernel alone.
    """
    program, rng = case.program, np.random.default_rng(case.seed)
    sparse = ntt.sparsify(build(program, case.seed), every_array)
    mask = random_mask(sparse.mask, case.density, case.seed)
    x1 = program.sample.batch(case.n, rng, program.dtype)
    x2 = None if case.m is None else program.sample.batch(case.m, rng, program.dtype)
    params, static = eqx.partition(sparse, eqx.is_inexact_array)
    metric = None
    if case.metric:  # learning rates, some of them zero
        rate = lambda w: jnp.asarray(rng.uniform(0, 2, w.shape) * (rng.random(w.shape) < 0.8))
        metric = jax.tree.map(rate, eqx.filter(sparse.model, eqx.is_inexact_array))
    directions = None
    if case.outputs == "directions":
        directions = tuple(jnp.asarray(rng.normal(size=(r, program.num_outputs))) for r in (2, 1))
    outputs = "full" if directions else case.outputs

    turned = jax.tree.map(swapped, (x1, x2, metric)) if case.swapped else None

    def ours(params, mask, x1, x2, metric):
        model = eqx.combine(params, static).with_mask(mask)
        x1, x2, metric = turned or (x1, x2, metric)
        theta = ntt.ntk(
            model, x1, x2, kernel=case.kernel, metric=metric, outputs=outputs,
            directions=directions, max_bytes=case.max_bytes,
        )  # fmt: skip
        return weighted_sum(theta), theta

    def oracle(params, mask, x1, x2, metric, implementation):
        model = eqx.combine(params, static).with_mask(mask)
        theta = ntt.ntk(
            model, x1, x2, kernel=case.kernel, metric=metric, outputs=outputs,
            implementation=implementation,
        )  # fmt: skip
        if directions:
            one, two = (side.astype(theta.dtype) for side in directions)
            theta = jnp.einsum("rk,nmkl,sl->nmrs", one, theta, two)
        return weighted_sum(theta), theta

    both = functools.partial(jax.value_and_grad, has_aux=True)

    @evaluator
    def run(params, varying, x1, x2, metric):
        given = (params, varying, x1, x2, metric)
        chosen = mask if case.gathered else varying  # a constant mask's few entries are gathered
        found = [both(ours)(params, chosen, x1, x2, metric)]
        found.append(both(functools.partial(oracle, implementation="jacobian"))(*given))
        if "ruled" not in program.pieces:  # the other oracle needs a forward mode
            call = functools.partial(oracle, implementation="ntk_vector_products")
            found.append(both(call)(*given) if products else (call(*given), found[1][1]))
        return found

    ((_, theta), slope), *expected = run(params, mask, x1, x2, metric)
    return tuple(
        max(relative_error(mine, right) for right in found)
        for mine, found in (
            (theta, [values[1] for values, _ in expected]),
            (slope, [gradient for _, gradient in expected]),
        )
    )
