import pytest

from moe_jax.planning import hlo

TEXT = """HloModule m, is_scheduled=true

%inner (a.1: f32[]) -> f32[] {
  %a.1 = f32[] parameter(0)
  ROOT %n = f32[] negate(%a.1)
}

%cond (p: (s32[], f32[])) -> pred[] {
  %p = (s32[], f32[]) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %limit = s32[]{:T(128)} constant(5)
  ROOT %lt = pred[] compare(%i, %limit), direction=LT
}

%body (q: (s32[], f32[])) -> (s32[], f32[]) {
  %q = (s32[], f32[]) parameter(0)
  %x = f32[] get-tuple-element(%q), index=1
  %c = f32[] call(%x), to_apply=%inner
  %d = f32[] fusion(%c), kind=kLoop, calls=%inner
  ROOT %t = (s32[], f32[]) tuple(%x, %d)
}

ENTRY %main (z: f32[]) -> f32[] {
  %z = f32[] parameter(0)
  %w = (s32[], f32[]) while(%z), condition=%cond, body=%body
  %once = f32[] conditional(%z, %z), branch_computations={%inner, %unused}
  ROOT %r = f32[] get-tuple-element(%w), index=1
}
"""


def test_loops_calls_and_branches_multiply():
    program = hlo.parse(TEXT)
    assert program.entry == "main"
    assert program.times["body"] == 5
    # Twice in each of five trips, and once as a branch.
    assert program.times["inner"] == 11


def test_a_known_trip_count_wins_over_the_condition():
    known = 'body=%body, backend_config={"known_trip_count":{"n":"7"},"x":1}'
    assert hlo.parse(TEXT.replace("body=%body", known)).times["body"] == 7


def test_a_loop_without_a_constant_counts_once():
    assert hlo.parse(TEXT.replace("constant(5)", "parameter(1)")).times["body"] == 1


UNROLLED = """HloModule m

%body (p: (f32[4], u32[])) -> (f32[4], u32[]) {
  %p = (f32[4], u32[]) parameter(0)
  %two = u32[] constant(2)
  %x = f32[4]{0} get-tuple-element(%p), index=0
  %i = u32[] get-tuple-element(%p), index=1
  %next = u32[] add(%i, %two)
  ROOT %t = (f32[4], u32[]) tuple(%x, %next)
}

%condition (p: (f32[4], u32[])) -> pred[] {
  %p = (f32[4], u32[]) parameter(0)
  %i = u32[] get-tuple-element(%p), index=1
  %bound = u32[] constant(8)
  ROOT %more = pred[] compare(%i, %bound), direction=LT
}

ENTRY %main (p: (f32[4], u32[])) -> (f32[4], u32[]) {
  %p = (f32[4], u32[]) parameter(0)
  ROOT %loop = (f32[4], u32[]) while(%p), condition=%condition, body=%body
}
"""


def test_a_loop_that_counts_by_two_runs_half_as_often():
    # 0, 2, 4 and 6 are below 8.
    assert hlo.parse(UNROLLED).times["body"] == 4


@pytest.mark.parametrize(
    ("type_", "expected"),
    [
        ("f32[]", 4),
        ("bf16[2,3]{1,0:T(8,128)(2,1)S(1)}", 12),
        ("pred[8]", 8),
        ("s4[8]", 4),
        ("f8e4m3fn[16]", 16),
        ("c64[2]", 16),
        ("(f32[2]{0}, s32[4]{0})", 24),
        ("token[]", 0),
    ],
)
def test_sizes(type_, expected):
    assert hlo.size(type_) == expected


def test_elements_of_tuples_nest():
    type_ = "((f32[2]{0:T(128)}, f32[3]), /*index=1*/f32[4,5]{1,0}, u32[])"
    assert hlo.elements(type_) == ["(f32[2]{0:T(128)}, f32[3])", "f32[4,5]{1,0}", "u32[]"]
    assert hlo.elements("bf16[8,128]{1,0}") == ["bf16[8,128]{1,0}"]
    assert hlo.arrays("(f32[2]{0}, token[])") == ["f32[2]"]
