"""Arbitrary input: a public entry succeeds, or says what is wrong in the library's own words."""

import builtins
import collections
import io
import re
import tracemalloc
import warnings

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from .refusals import unchecked
from .tiers import drawn

OUTCOMES = collections.Counter()


def refused(call, *errors, begins=r"[\w.]+"):
    """The result of `call`, or `None` after a documented error, in the library's own words."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = call()
            OUTCOMES["passed"] += 1
            return found
    except errors as error:
        OUTCOMES["refused"] += 1
        assert re.match(rf"(?s){begins}.*: .", str(error)), error
        return None


def examples(few, many):
    """Run a test on the same few drawn inputs by default, and on many others with `-m slow`."""
    how = lambda count, **more: settings(max_examples=count, deadline=None, database=None, **more)
    runs = [
        pytest.param(how(few, derandomize=True), id="few"),
        pytest.param(how(drawn(many)), id="many", marks=pytest.mark.slow),
    ]
    return pytest.mark.parametrize("examples", runs)


def explore(holds, examples, *, both=True, **strategies):
    """Call `holds` with drawn arguments; `both`: some must be taken, and some refused."""
    OUTCOMES.clear()
    with unchecked():
        examples(given(**strategies)(holds))()
    assert not both or min(OUTCOMES["passed"], OUTCOMES["refused"]) > 0, "one outcome alone"


# Arrays

KINDS = ["f4", "f2", "f8", "i4", "u1", "?", "c8", "U2"]
SHAPES = [(2, 3), (4, 3), (3, 3), (1, 3), (0, 3), (2, 4), (2, 0), (3,), (), (2, 3, 1)]


def arrays(shapes=SHAPES, kinds=KINDS):
    return st.tuples(st.sampled_from(kinds), st.sampled_from(shapes)).flatmap(
        lambda drawn: hnp.arrays(*drawn)
    )


def labels(*counts, low=-1, high=2):
    return hnp.arrays("i4", st.sampled_from(counts), elements=st.integers(low, high))


ANYTHING = st.one_of(
    arrays(), st.none(), st.integers(), st.floats(), st.text(max_size=3), st.lists(st.floats())
)

# Settings

VALUES = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-3, 3),
        st.integers(),
        st.just(10**400),
        st.floats(),
        st.sampled_from(["ntt", "snip", "layer", "global", "erk", "2:4", "block:4x4", "adam", ""]),
        st.text(max_size=4),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=6,
)

# Files


class Hostile:
    """Leaves a trace if it is unpickled."""

    def __reduce__(self):
        return exec, ("import builtins; builtins.was_executed = True",)


def npy(array, **options):
    buffer = io.BytesIO()
    np.save(buffer, array, **options)
    return buffer.getvalue()


OBJECTS = npy(np.array([Hostile()] * 2, object), allow_pickle=True)
CHANGES = st.one_of(
    st.lists(
        st.tuples(st.sampled_from("rict"), st.integers(0, 5000), st.binary(min_size=1, max_size=4)),
        min_size=1,
        max_size=4,
    ),
    st.binary(max_size=120),
    st.tuples(st.just("digits"), st.sampled_from([400, 5000])),
)


def changed(content, change):
    """`content` with bytes replaced, inserted, cut out or cut off; or other content altogether."""
    if isinstance(change, bytes):
        return change
    if change[0] == "digits":  # numbers that Python, or a float, cannot hold
        return re.sub(rb"\d+", b"9" * change[1], content, count=1)
    content = bytearray(content)
    for how, position, new in change:
        position %= len(content) + 1
        if how == "t":
            del content[position:]
        else:
            content[position : position + len(new) * (how != "i")] = new * (how != "c")
    return bytes(content)


def explore_file(content, read, errors, folder, examples):
    """Read a file and changed forms of it: nothing is executed, nothing is written outside."""
    path = folder / "inner" / "file"
    path.parent.mkdir()

    def holds(change):
        path.write_bytes(changed(content, change))
        refused(lambda: read(path), *errors, begins=rf"(npy:)?{re.escape(str(folder))}")
        assert_harmless(folder)

    path.write_bytes(content)
    if content is not OBJECTS:  # else only one error would be seen, again and again
        read(path)
    explore(holds, examples, both=False, change=CHANGES)


def assert_refused(content, read, error, message, folder):
    """What reads a file of this content says so and where it is, runs nothing, and takes little."""
    path = folder / "inner" / "file"
    path.parent.mkdir()
    path.write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(error, match=message) as caught:
            read(path)
        assert tracemalloc.get_traced_memory()[1] < 30 * 2**20
    finally:
        tracemalloc.stop()
    assert str(path.parent) in str(caught.value)
    assert_harmless(folder)


def assert_harmless(folder):
    assert not hasattr(builtins, "was_executed")
    assert [path.name for path in folder.iterdir()] == ["inner"]
    assert not list(folder.rglob("escaped*"))
