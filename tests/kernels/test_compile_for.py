"""What `benchmarks/compile_for.py` counts, and what the chips' compilers make of the defaults."""

import json

import pytest
from helpers.scripts import BENCHMARKS, ended

# Of a step at batch 64, 3 %, on an H100: launches, and megabytes of temporaries. Products are not
# split: where that pays is found out by timing, and without a chip it is a guess.
# XLA's schedule gives LeNet-5 207 MiB since the loss of a step waits for its refresh, 156 without.
# A step hands on where the mask's entries are, in copies: 8 launches of LeNet-300-100's.
LIMITS = {"lenet300100": (123, 40), "lenet5": (240, 220)}
UNSPLIT = ("--option", "xla_gpu_experimental_force_split_k=1")

TEXT = """
%body (p: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %p = (s32[], f32[8,4]{1,0}) parameter(0)
  %x = f32[8,4]{1,0} get-tuple-element(%p), index=1
  %y = f32[8,4]{1,0} fusion(%x), kind=kLoop, calls=%double
  ROOT %t = (s32[], f32[8,4]{1,0}) tuple(%x, %y)
}

%condition (q: (s32[], f32[8,4])) -> pred[] {
  %q = (s32[], f32[8,4]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%q), index=0
  %n = s32[] constant(5)
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

%double (z: f32[8,4]) -> f32[8,4] {
  %z = f32[8,4]{1,0} parameter(0)
  ROOT %w = f32[8,4]{1,0} add(%z, %z)
}

ENTRY %main (a: f32[8,4], b: f32[4,16]) -> f32[8,16] {
  %a = f32[8,4]{1,0} parameter(0)
  %b = f32[4,16]{1,0} parameter(1)
  %zero = s32[] constant(0)
  %start = (s32[], f32[8,4]{1,0}) tuple(%zero, %a)
  %loop = (s32[], f32[8,4]{1,0}) while(%start), condition=%condition, body=%body, TRIPS
  %r = f32[8,4]{1,0} get-tuple-element(%loop), index=1
  ROOT %c = f32[8,16]{1,0} dot(%r, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}
"""


@pytest.mark.parametrize(
    ("trips", "expected"),
    [('backend_config={"known_trip_count":{"n":"7"}}', 7), ("metadata={}", 5)],
    ids=("told", "from the condition"),
)
def test_launches_flops_and_bytes_of_a_program(trips, expected, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from chips import CHIPS
    from chips.program import Program

    counts = Program(TEXT.replace("TRIPS", trips), CHIPS["h100"]).counts()
    assert counts.launches == 1 + expected + 1  # the loop, its turns, the product
    assert counts.flops == 2 * 8 * 4 * 16
    assert counts.bytes == expected * 2 * 8 * 4 * 4 + 4 * (8 * 4 + 4 * 16 + 8 * 16)
    assert counts.seconds == pytest.approx((expected + 2) * 2e-6)


def compile_for(chip, folder, *arguments):
    """The rows of `compile_for.py`, which needs a process of its own for its environment."""
    out = folder / f"{chip}.json"
    done = ended("compile_for", chip, *arguments, "--out", out)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return json.loads(out.read_text())["rows"]


@pytest.mark.chip
def test_a_step_on_an_h100_keeps_to_its_limits(tmp_path):
    for row in compile_for("h100", tmp_path, *LIMITS, *UNSPLIT):
        launches, megabytes = LIMITS[row["case"]]
        assert 0 < row["launches"] <= launches
        assert row["loops"] == []
        assert row["refresh_launches"] <= 1500  # no loop over a layer's columns
        assert 0 < row["temporary_bytes"] <= megabytes * 2**20


@pytest.mark.chip
def test_a_step_over_eight_h100s_sums_one_gradient(tmp_path):
    (row,) = compile_for("h100", tmp_path, "lenet300100", "--devices", "8")
    parameters = 4 * (784 * 300 + 300 + 300 * 100 + 100 + 100 * 10 + 10)
    count, size = row["sent"]["all-reduce"]
    assert count == 1 and size >= parameters
    assert sum(size for _, size in row["sent"].values()) < 5 * parameters


# Of the default tiles of a product and of its gradient.
MASKS = ("--mask", "whole", "gathered", "--density", "0.03")


@pytest.mark.chip
def test_default_gpu_kernels_keep_to_their_registers(tmp_path):
    options = ("--implementation", "pallas_gpu", "--precision", "float32", "bfloat16")
    rows = compile_for("h100", tmp_path, "masked_ntk:lenet_300", "--batch", "64", *MASKS, *options)
    names = [kernel["name"] for row in rows for kernel in row["kernels"]]
    # u, Theta, the gradients of the sums over outputs (one for all), and the way back.
    assert set(names) == {
        f"masked_ntk_{name}"
        for name in ("u", "pulled", "gathered_u", "gathered_pulled", "theta", "weighted")
    }
    for row in rows:
        for kernel in row["kernels"]:
            assert not kernel["serialised"], kernel
            assert kernel["spilled_bytes"] == 0, kernel


@pytest.mark.chip
def test_a_large_gathered_product_takes_as_long_as_was_aimed_at(tmp_path):
    options = ("--batch", "256", "--mask", "gathered", "--implementation", "pallas_gpu")
    rows = compile_for("h100", tmp_path, "masked_ntk:conv4_8192", *options)
    times = {row["direction"]: row["roofline_s"] for row in rows}  # by count, not by a clock
    assert times["forward"] < 0.6e-3 and times["gradient"] < 3e-3


@pytest.mark.chip
@pytest.mark.parametrize("chip", ("tpu-v5e", "tpu-v5p"))
def test_tpu_kernels_compile_forward_and_backward(chip, tmp_path):
    options = ("--batch", "32", "--implementation", "pallas_tpu")
    rows = compile_for(chip, tmp_path, "masked_ntk:lenet_300", *MASKS, *options)
    assert [(row["mask"], row["direction"]) for row in rows] == [
        (mask, direction) for mask in ("whole", "gathered") for direction in ("forward", "gradient")
    ]
