"""Launches read off the text of a compiled program, against a count by hand."""

from celo2_harness.lab.bench.launches import count_launches

PROGRAM = """
%small (a: f32[2]) -> f32[2] {
  %a = f32[2]{0} parameter(0)
  ROOT %b = f32[2]{0} fusion(%a), kind=kLoop, calls=%f
}

%large (a.1: f32[2]) -> f32[2] {
  %a.1 = f32[2]{0} parameter(0)
  %b.1 = f32[2]{0} copy(%a.1)
  ROOT %c.1 = (f32[2]{0}, bf16[8]{0}) custom-call(%b.1), custom_call_target="kernel"
}

ENTRY %main (x: f32[2], p: pred[]) -> f32[2] {
  %x = f32[2]{0} parameter(0)
  %p = pred[] parameter(1)
  %y = f32[2]{0} fusion(%x), kind=kLoop, calls=%f
  %z = f32[2]{0} bitcast(%y)
  ROOT %w = f32[2]{0} conditional(%p, %z, %z), branch_computations={%small, %large}
}
"""


def test_launches_branches_and_bytes():
    launches = count_launches(PROGRAM)
    # The fusion reads and writes 8 bytes; of the branches the larger counts: a copy, and a call that writes two arrays.
    assert launches.kernels == 3 and launches.branches == 1
    assert launches.bytes == 16 + 16 + 8 + 8 + 16
    assert launches.kinds == {"fusion": 1, "copy": 1, "kernel": 1}
