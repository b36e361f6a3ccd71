"""Arbitrary settings and words: a plan, or an error that says what is wrong with them."""

import contextlib
import io

from helpers.arbitrary import VALUES, examples, explore, refused
from hypothesis import strategies as st

from ntt_eqx.experiment._errors import ExperimentError
from ntt_eqx.experiment.cli import main
from ntt_eqx.experiment.settings import CompareSettings, check, from_json, parse_pattern

ROOMS = {"transfer": "epochs batch_size learning_rate mask_every l2_weight held_out initial_mask "
                     "gradual",
         "scoring": "examples iterations schedule", "mask": "allocation pattern ablation",
         "training": "epochs batch_size l2 rescale evaluate_every optimizer momentum milestones "
                     "schedule weight_decay decay ema crop flip labels"}  # fmt: skip


def inside(room):
    return st.dictionaries(st.sampled_from([*ROOMS[room].split(), "other"]), VALUES, max_size=3)


JSON = st.one_of(
    VALUES,
    st.fixed_dictionaries({}, optional={room: inside(room) for room in ROOMS}),
    st.dictionaries(
        st.sampled_from(["datasets", "models", "methods", "scopes", "densities", "seeds", "sedds"]),
        st.one_of(VALUES, st.lists(VALUES, max_size=3)),
        max_size=3,
    ),
)


@examples(200, 5000)
def test_arbitrary_json(examples):
    def holds(value):
        read = lambda: check(from_json(CompareSettings, value, where="config.json"))
        found = refused(read, ExperimentError)
        assert found is None or isinstance(found, CompareSettings)

    explore(holds, examples, value=JSON)


@examples(50, 2000)
def test_arbitrary_patterns(examples):
    def read(text):
        refused(lambda: parse_pattern(text), ExperimentError, begins="mask.pattern")

    usual = st.one_of(st.from_regex(r"\d*:\d*"), st.from_regex(r"block:\d*x\d*"))
    explore(read, examples, text=st.one_of(st.none(), st.text(), usual))


WORDS = ["--seeds", "--densities", "--methods", "--config", "--mask.pattern", "--transfer.epochs",
         "--scopes", "--datasets", "--nothing", "--training.rescale", "--preset"]  # fmt: skip


@examples(5, 100)
def test_arbitrary_command_lines(examples, tmp_path, monkeypatch):
    monkeypatch.delenv("NTT_EQX_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    out = tmp_path / "out"

    def holds(words):
        said = io.StringIO()
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            code = main(["compare", "--plan-only", "--out", str(out), *words])
        assert code in (0, 2) and "Traceback" not in said.getvalue()
        assert code == 0 or said.getvalue()
        assert not out.exists()

    words = st.one_of(st.sampled_from(WORDS), st.text(max_size=4), st.sampled_from("01"))
    explore(holds, examples, both=False, words=st.lists(words, max_size=4))
