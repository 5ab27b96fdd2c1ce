"""Counting kernels and bytes, on programs small enough to count by hand. No GPU compiler is needed."""

import importlib.metadata

import jax
import jax.numpy as jnp
import pytest

from benchmarks import gpu
from benchmarks.gpu import Kernel, count, count_step, estimate, parse, summarise


def counted(text):
    """(name, bytes read, bytes written) of each kernel of a program."""
    program = parse(text)
    return [k[:3] for k in count(program, program.entry)]


def fused(inside, operands, result):
    """A program of one fusion, from the lines inside it and the shapes of its parameters."""
    head = [f"  %in{i} = {shape} parameter({i})" for i, shape in enumerate(operands)]
    names = ", ".join(f"%in{i}" for i in range(len(operands)))
    return "\n".join(
        ["HloModule m, is_scheduled=true", "", "%fused () -> x {", *head, *(f"  {line}" for line in inside), "}", ""]
        + ["ENTRY %main () -> x {", *head, f"  ROOT %f = {result} fusion({names}), kind=kLoop, calls=%fused", "}"]
    )


FUSIONS = {
    # 100 * 4 read, 100 * 4 written; a constant inside is free.
    "elementwise": (
        ["%c = f32[] constant(2)", "%b = f32[100]{0} broadcast(%c), dimensions={}"]
        + ["ROOT %r = f32[100]{0} multiply(%in0, %b)"],
        ["f32[100]{0}"],
        "f32[100]{0}",
        (400, 400),
    ),
    # Two results: 400 + 100 written, and the operand that both need is read once.
    "two results": (
        ["%a = f32[100]{0} add(%in0, %in0)", "%p = pred[100]{0} compare(%in0, %a), direction=LT"]
        + ["ROOT %r = (f32[100]{0}, pred[100]{0}) tuple(%a, %p)"],
        ["f32[100]{0}"],
        "(f32[100]{0}, pred[100]{0})",
        (400, 500),
    ),
    # One row of 28 words for each of 100 environments, 5 words of it used: 100 * 5 * 4, and 100 indices of 4 bytes.
    "gather": (
        ["%i = s32[100,1]{1,0} bitcast(%in1)", "%g = f32[100,28]{1,0} gather(%in0, %i), slice_sizes={1,28}"]
        + ["ROOT %r = f32[100,5]{1,0} slice(%g), slice={[0:100], [3:8]}"],
        ["f32[35041,28]{1,0}", "s32[100]{0}"],
        "f32[100,5]{1,0}",
        (2400, 2000),
    ),
    # Two slices of a row, 5 and 1 words, are read; between them nothing is.
    "slices": (
        ["%s = f32[100,5]{1,0} slice(%in0), slice={[0:100], [0:5]}"]
        + ["%t = f32[100,1]{1,0} slice(%in0), slice={[0:100], [9:10]}", "%z = f32[] constant(0)"]
        + ["%m = f32[100]{0} reduce(%s, %z), dimensions={1}, to_apply=%add", "%u = f32[100]{0} bitcast(%t)"]
        + ["ROOT %r = f32[100]{0} add(%m, %u)"],
        ["f32[100,28]{1,0}"],
        "f32[100]{0}",
        (2400, 400),
    ),
    # A bracket table is small; a value looked up for each environment reads it once, not a hundred times.
    "table": (
        ["%i = s32[100,1]{1,0} bitcast(%in1)", "ROOT %g = f32[100]{0} gather(%in0, %i), slice_sizes={1}"],
        ["f32[12]{0}", "s32[100]{0}"],
        "f32[100]{0}",
        (448, 400),
    ),
    # A scan's stacked output: 100 new values read and written, one index of 4 bytes.
    "update in place": (
        ["%u = f32[1,100]{1,0} bitcast(%in1)", "%c = s32[] constant(0)"]
        + ["ROOT %r = f32[128,100]{1,0} dynamic-update-slice(%in0, %u, %in2, %c)"],
        ["f32[128,100]{1,0}", "f32[100]{0}", "s32[]"],
        "f32[128,100]{1,0}",
        (404, 400),
    ),
    # The same into something that was computed on the way: all 128 rows are written, and read but for the index.
    "update elsewhere": (
        ["%u = f32[1,100]{1,0} bitcast(%in1)", "%n = f32[128,100]{1,0} negate(%in0)", "%c = s32[] constant(0)"]
        + ["ROOT %r = f32[128,100]{1,0} dynamic-update-slice(%n, %u, %in2, %c)"],
        ["f32[128,100]{1,0}", "f32[100]{0}", "s32[]"],
        "f32[128,100]{1,0}",
        (51200 + 404, 51200),
    ),
    # 8 rows of 10 words into 100: 8 * 10 * 4 read to be combined, as much of new values, 8 indices.
    "scatter": (
        ["%i = s32[8,1]{1,0} bitcast(%in1)"]
        + ["%s = f32[100,10]{1,0} scatter(%in0, %i, %in2), update_window_dims={1}, to_apply=%add"]
        + ["%b = f32[1000]{0} bitcast(%s)", "ROOT %r = (f32[1000]{0}) tuple(%b)"],
        ["f32[100,10]{1,0}", "s32[8]{0}", "f32[8,10]{1,0}"],
        "(f32[1000]{0})",
        (672, 320),
    ),
    # What no result needs is not read.
    "unused": (["ROOT %r = s8[100]{0} convert(%in1)"], ["f32[100]{0}", "bf16[100]{0}"], "s8[100]{0}", (200, 100)),
    # A sum over lots reads them all.
    "reduction": (
        ["%z = f32[] constant(0)", "ROOT %r = f32[100]{0} reduce(%in0, %z), dimensions={1}, to_apply=%add"],
        ["f32[100,10]{1,0}"],
        "f32[100]{0}",
        (4000, 400),
    ),
}


@pytest.mark.parametrize("name", FUSIONS)
def test_bytes_of_a_fusion(name):
    inside, operands, result, (read, written) = FUSIONS[name]
    assert counted(fused(inside, operands, result)) == [("f", read, written)]


BRANCHES = """
%double (p: (f32[100])) -> (f32[100]) {
  %p = (f32[100]{0}) parameter(0)
  %x = f32[100]{0} get-tuple-element(%p), index=0
  %d = f32[100]{0} add(%x, %x)
  ROOT %t = (f32[100]{0}) tuple(%d)
}

%keep (p: (f32[100])) -> (f32[100]) {
  ROOT %p = (f32[100]{0}) parameter(0)
}
"""


@pytest.mark.parametrize(
    ("attributes", "index", "size"),
    [
        ("branch_computations={%keep, %double}", "s32[]", 4),
        ("branch_computations={%double, %keep}", "s32[]", 4),
        ("true_computation=%double, false_computation=%keep", "pred[]", 1),
    ],
)
def test_a_conditional_is_a_kernel_and_its_costliest_branch(attributes, index, size):
    text = f"""HloModule m, is_scheduled=true
{BRANCHES}
ENTRY %main (i: {index}, x: f32[100]) -> f32[100] {{
  %i = {index} parameter(0)
  %x = f32[100]{{0}} parameter(1)
  %a = (f32[100]{{0}}) tuple(%x)
  %c = (f32[100]{{0}}) conditional(%i, %a, %a), {attributes}
  ROOT %y = f32[100]{{0}} get-tuple-element(%c), index=0
}}
"""
    assert counted(text) == [("c", size, 0), ("d", 400, 400)]


LOOP = """HloModule m, is_scheduled=true

%wrapped (x: f32[100]) -> f32[100] {
  %x = f32[100]{0} parameter(0)
  ROOT %n = f32[100]{0} negate(%x)
}

%body (p: (s32[], f32[100])) -> (s32[], f32[100]) {
  %p = (s32[], f32[100]{0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[100]{0} get-tuple-element(%p), index=1
  %one = s32[] constant(1)
  %j = s32[] add(%i, %one)
  %y = f32[100]{0} call(%x), to_apply=%wrapped
  ROOT %t = (s32[], /*index=1*/f32[100]{0}) tuple(%j, %y)
}

%condition (p: (s32[], f32[100])) -> pred[] {
  %p = (s32[], f32[100]{0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %many = s32[] constant(5)
  ROOT %less = pred[] compare(%i, %many), direction=LT
}

ENTRY %main (x: f32[100]) -> f32[100] {
  %x = f32[100]{0} parameter(0)
  %zero = s32[] constant(0)
  %start = (f32[100]{0}, f32[100]{0}, u32[]) copy-start(%x)
  %copied = f32[100]{0} copy-done(%start)
  %t = (s32[], f32[100]{0}) tuple(%zero, %copied)
  %w = (s32[], f32[100]{0}) while(%t), condition=%condition, body=%bodyTRIPS
  %z = f32[100]{0} get-tuple-element(%w), index=1
  %s = ((f32[100]{0}), f32[100]{0}, u32[]) async-start(%z), calls=%wrapped
  ROOT %r = f32[100]{0} async-done(%s)
}
"""


def test_a_loop_counts_as_often_as_it_runs():
    step = [("j", 8, 4), ("n", 400, 400)]
    known = LOOP.replace("TRIPS", ', backend_config={"known_trip_count":{"n":"5"},"known_init_step":{"init":"0"}}')
    assert counted(known) == [("start", 400, 400), *step * 5, ("n", 400, 400)]
    assert [k[:3] for k in count_step(parse(known))] == step
    assert counted(LOOP.replace("TRIPS", "")) == [
        ("start", 400, 400), *step, ("less", 8, 1), ("w", 1, 0), ("n", 400, 400)
    ]  # fmt: skip


def test_the_text_that_jax_prints_is_understood():
    def rollout(x, ys):
        return jax.lax.scan(lambda c, y: (jnp.sin(c) + y, c.sum()), x, ys)

    text = jax.jit(rollout).lower(jnp.zeros(1000), jnp.zeros((7, 1000))).compile().as_text()
    kernels = count_step(parse(text))
    assert "sin" in " ".join(k.source for k in kernels)
    # x and a row of ys in, x out: 12 kB is the least.
    assert 12e3 <= sum(k.read + k.written for k in kernels) < 40e3


def test_another_text_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        parse("module @jit_f {\n}\n")


def test_the_estimate_adds_launches_and_traffic():
    kernels = [Kernel("k", 2.06e6, 0)] * 2
    # 2 * 2.1 us + 4.12 MB / 2.06 TB/s = 4.2 + 2 us, for 620 environments: 100 a microsecond.
    assert estimate(kernels) == pytest.approx(6.2e-6)
    row = summarise(620, kernels, [])
    assert row == {"num_envs": 620, "kernels": 2, "bytes_per_env": 6645, "estimated_million_steps": 100.0}
    timed = summarise(620, kernels, [5e-6, 10e-6, 20e-6])
    assert timed["million_steps"] == 62.0 and timed["low"] < 62.0 < timed["high"]


def test_errors_say_what_to_install(monkeypatch, capsys):
    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    for arguments, hint in ([], f"jax-cuda13-plugin=={jax.__version__}"), (["--timed"], "jax[cuda13]"):
        with pytest.raises(SystemExit) as stopped:
            gpu.main(arguments)
        assert stopped.value.code == 2 and hint in capsys.readouterr().err
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.0.1")
    with pytest.raises(RuntimeError, match=r"version 0\.0\.1"):
        gpu.find_target()
