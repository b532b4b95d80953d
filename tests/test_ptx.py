"""The machine that runs PTX: its arithmetic against Python's, its tensor cores against products, its complaints."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ptx import arithmetic, fragments
from ptx.machine import Program, Watch, evaluate
from ptx.source import PtxError, kernels
from ptx.traffic import Traffic
from torch import Tensor

WORDS = st.integers(0, 2**32 - 1)
FLOAT32 = st.floats(width=32, allow_nan=False, allow_infinity=False)


def word(value: int | np.uint32) -> Any:
    return np.array([value], np.uint32)


def of_float(value: float) -> Any:
    return np.array([value], np.float32).view(np.uint32)


def run(body: str, *tensors: Tensor, threads: int = 32, blocks: int = 1, watch: Watch | None = None) -> None:
    """A kernel: pointers in %rd1, %rd2, ..., the thread in %r0, four times it in %rd0, 1 KiB of shared ``space``."""
    loads = "".join(f"ld.param.u64 %rd{n}, [k_param_{n}];" for n in range(1, len(tensors) + 1))
    parameters = ",".join(f".param .u64 k_param_{n}" for n in range(1, len(tensors) + 1))
    text = f"""
    .shared .align 128 .b8 space[1024];
    .visible .entry k({parameters}) {{
      .reg .pred %p<40>; .reg .b16 %rs<40>; .reg .b32 %r<80>; .reg .b64 %rd<40>;
      mov.u32 %r0, %tid.x; mul.wide.u32 %rd0, %r0, 4; {loads}
      {body}
      ret;
    }}"""
    arguments = [t.data_ptr().to_bytes(8, "little") for t in tensors]
    regions = [(t.data_ptr(), t.numel() * t.element_size()) for t in tensors]
    Program(kernels(text)[0]).run((blocks,), threads, arguments, regions, 0, watch or Watch(hazards=True))


# ---- arithmetic ------------------------------------------------------------------------------------------------------


def nearest(exact: Fraction, kind: str) -> float:
    """The nearest float of a format, ties to even; formats have no largest exponent here."""
    mantissa, lowest = {"f32": (24, -149), "f16": (11, -24), "bf16": (8, -133)}[kind]
    if exact == 0:
        return 0.0
    exponent = math.floor(math.log2(abs(exact))) - mantissa  # log2 may be off by its rounding
    while abs(exact) >= Fraction(2) ** (exponent + mantissa):
        exponent += 1
    unit = Fraction(2) ** max(exponent, lowest)
    return float(round(exact / unit) * unit)


@settings(max_examples=300)
@given(FLOAT32, FLOAT32, FLOAT32)
def test_fused_multiply_add_rounds_once(a: float, b: float, c: float) -> None:
    exact = Fraction(a) * Fraction(b) + Fraction(c)
    if abs(exact) >= 2**127:
        return
    found = evaluate("fma.rn.f32 $0, $1, $2, $3", *map(of_float, (a, b, c))).view(np.float32)[0]
    assert found == nearest(exact, "f32")


@pytest.mark.filterwarnings("ignore:invalid value")
@settings(max_examples=300)
@given(st.sampled_from(["f16", "bf16"]), st.lists(st.integers(0, 2**16 - 1), min_size=3, max_size=3))
def test_sixteen_bit_fused_multiply_add_rounds_once(kind: str, bits: list[int]) -> None:
    patterns = [np.array([value], np.uint16) for value in bits]
    numbers = [float(arithmetic.number(pattern, kind)[0]) for pattern in patterns]
    if not all(map(math.isfinite, numbers)):
        return
    exact = Fraction(numbers[0]) * Fraction(numbers[1]) + Fraction(numbers[2])
    if abs(exact) >= (32768 if kind == "f16" else 2**127):
        return
    a, b, c = (arithmetic.number(pattern, kind) for pattern in patterns)
    found = arithmetic.number(arithmetic.fused(a, b, c, kind), kind)[0]
    assert found == nearest(exact, kind)


@pytest.mark.filterwarnings("ignore:invalid value", "ignore:overflow")
def test_conversions_are_those_of_torch() -> None:
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (20000,), generator=generator).to(torch.int32)
    single = bits.view(torch.float32)
    words = bits.numpy().view(np.uint32)
    for kind, dtype in (("f16", torch.float16), ("bf16", torch.bfloat16)):
        found = arithmetic.convert(words, "f32", kind, ("rn",))
        wanted = single.to(dtype)
        same = torch.from_numpy(found.view(np.int16)) == wanted.view(torch.int16)
        assert bool((same | single.isnan()).all())
        back = arithmetic.convert(found, kind, "f32", ())
        assert bool((torch.from_numpy(back.view(np.float32)) == wanted.float())[~single.isnan()].all())
    whole = single[single.abs() < 2**31]
    for kind, function in (("rzi", torch.trunc), ("rni", torch.round)):
        found = arithmetic.convert(whole.numpy().view(np.uint32), "f32", "s32", (kind,)).view(np.int32)
        assert bool((torch.from_numpy(found).double() == function(whole.double())).all())


@settings(max_examples=100)
@given(WORDS, WORDS, WORDS, st.integers(0, 255))
def test_bit_operations(a: int, b: int, c: int, table: int) -> None:
    three = [word(value) for value in (a, b, c)]
    found = int(evaluate(f"lop3.b32 $0, $1, $2, $3, {table:#x}", *three)[0])
    assert found == sum((table >> (4 * (a >> n & 1) + 2 * (b >> n & 1) + (c >> n & 1)) & 1) << n for n in range(32))
    both, selectors = a | b << 32, [c >> shift & 15 for shift in (0, 4, 8, 12)]
    bytes_ = [both >> 8 * (s & 7) & 255 for s in selectors]
    bytes_ = [(255 if byte & 128 else 0) if s & 8 else byte for byte, s in zip(bytes_, selectors, strict=True)]
    assert int(evaluate("prmt.b32 $0, $1, $2, $3", *three)[0]) == sum(byte << 8 * n for n, byte in enumerate(bytes_))
    start, count = table % 32, c % 33
    part = a >> start & (1 << min(count, 32 - start)) - 1
    assert int(evaluate(f"bfe.u32 $0, $1, {start}, {count}", *three)[0]) == part
    for operation, wanted in (("shl.b32", a << start), ("shr.u32", a >> start), ("shr.s32", signed(a) >> start)):
        assert int(evaluate(f"{operation} $0, $1, {start}", *three)[0]) == wanted & 2**32 - 1
    assert int(evaluate("shl.b32 $0, $1, 32", *three)[0]) == int(evaluate("bfe.u32 $0, $1, 32, 4", *three)[0]) == 0
    field = (1 << count) - 1 << start
    assert (
        int(evaluate(f"bfi.b32 $0, $1, $2, {start}, {count}", *three)[0])
        == (b & ~field | a << start & field) & 2**32 - 1
    )
    assert signed(int(evaluate("shr.s32 $0, $1, 40", *three)[0])) == (-1 if a >> 31 else 0)


def signed(value: int) -> int:
    return value - (value >> 31 << 32)


@settings(max_examples=100)
@given(WORDS, WORDS, WORDS)
def test_integers(a: int, b: int, c: int) -> None:
    three = [word(value) for value in (a, b, c)]
    for text, wanted in (
        ("add.s32 $0, $1, $2", a + b),
        ("sub.s32 $0, $1, $2", a - b),
        ("mad.lo.s32 $0, $1, $2, $3", a * b + c),
        ("mul.hi.u32 $0, $1, $2", a * b >> 32),
        ("mul.hi.s32 $0, $1, $2", signed(a) * signed(b) >> 32),
        ("min.s32 $0, $1, $2", min(signed(a), signed(b))),
        ("max.u32 $0, $1, $2", max(a, b)),
        ("neg.s32 $0, $1", -a),
    ):
        assert int(evaluate(text, *three)[0]) == wanted & 2**32 - 1, text
    if b and (a, b) != (2**31, 2**32 - 1):
        whole = int(math.copysign(abs(signed(a)) // abs(signed(b)), signed(a) * signed(b)))
        assert signed(int(evaluate("div.s32 $0, $1, $2", *three)[0])) == whole
        assert signed(int(evaluate("rem.s32 $0, $1, $2", *three)[0])) == signed(a) - whole * signed(b)
        assert int(evaluate("div.u32 $0, $1, $2", *three)[0]) == a // b


# ---- tensor cores ----------------------------------------------------------------------------------------------------

FRAGMENTS = """
  shl.b32 %r1, %r0, 4;
  mul.wide.u32 %rd4, %r0, 16; mul.wide.u32 %rd5, %r0, 8;
  add.u64 %rd4, %rd1, %rd4; add.u64 %rd5, %rd2, %rd5;
  ld.global.v4.b32 {%r10, %r11, %r12, %r13}, [%rd4];
  ld.global.v2.b32 {%r14, %r15}, [%rd5];
  mov.b32 %r20, 0; mov.b32 %r21, 0; mov.b32 %r22, 0; mov.b32 %r23, 0;
  mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32
    {%r20,%r21,%r22,%r23}, {%r10,%r11,%r12,%r13}, {%r14,%r15}, {%r20,%r21,%r22,%r23};
  mul.wide.u32 %rd6, %r0, 16; add.u64 %rd6, %rd3, %rd6;
  st.global.v4.b32 [%rd6], {%r20, %r21, %r22, %r23};
"""


def test_mma_has_the_layouts_of_the_isa() -> None:
    """Element by element, as the figures of the ISA give row and column of every register (mma.m16n8k16)."""
    a, b = torch.randn(16, 16).half(), torch.randn(16, 8).half()
    left, right = torch.empty(32, 8).half(), torch.empty(32, 4).half()
    for lane in range(32):
        group, member = lane // 4, lane % 4
        for i in range(8):
            row = group if i < 2 or 4 <= i < 6 else group + 8
            left[lane, i] = a[row, member * 2 + i % 2 + (8 if i >= 4 else 0)]
        for i in range(4):
            right[lane, i] = b[member * 2 + i % 2 + (8 if i >= 2 else 0), group]
    sums = torch.empty(32, 4)
    run(FRAGMENTS, left, right, sums)
    found = torch.empty(16, 8)
    for lane in range(32):
        for i in range(4):
            found[lane // 4 + (8 if i >= 2 else 0), lane % 4 * 2 + i % 2] = sums[lane, i]
    assert torch.allclose(found, a.float() @ b.float(), atol=16 * 2**-22)


@pytest.mark.parametrize(
    ("before", "product", "after"),
    [
        (1.0, 2.0**-30, 1.0),
        (1.0, -(2.0**-30), 1 - 2.0**-24),
        (-1.0, 1.75 * 2.0**-23, -1 + 2.0**-22),
        (1.0, 1.75 * 2.0**-23, 1 + 2.0**-23),
        (-1.0, -1.75 * 2.0**-23, -1 - 2.0**-23),
        (3.0e38, 6.0e37, math.inf),
        (0.0, 2.0**-20, 2.0**-20),
    ],
)
def test_sums_of_tensor_cores_are_cut_off(before: float, product: float, after: float) -> None:
    with np.errstate(over="ignore"):
        sums = fragments.cut_off(np.array([np.float64(np.float32(before)) + product]))
    assert sums.dtype == np.float32 and float(sums[0]) == after


def test_matrices_are_loaded_and_stored_by_rows_and_turned() -> None:
    matrix = torch.arange(64, dtype=torch.int16).view(8, 8)
    for turn_out in ("", ".trans"):
        for turn_in in ("", ".trans"):
            found = torch.zeros(8, 8, dtype=torch.int16)
            run(
                f"""
                add.u64 %rd4, %rd1, %rd0; ld.global.b32 %r1, [%rd4];
                mov.u32 %r2, space; shl.b32 %r3, %r0, 4; add.u32 %r4, %r2, %r3;
                setp.lt.u32 %p1, %r0, 8;
                shl.b32 %r5, %r0, 2; add.u32 %r5, %r5, %r2; st.shared.b32 [%r5], %r1;
                bar.sync 0;
                @%p1 bra $GO; mov.u32 %r4, %r2;
                $GO:
                ldmatrix.sync.aligned.m8n8.x1{turn_in}.shared.b16 {{%r6}}, [%r4];
                bar.sync 0;
                stmatrix.sync.aligned.m8n8.x1{turn_out}.shared.b16 [%r4], {{%r6}};
                bar.sync 0;
                ld.shared.b32 %r7, [%r5]; add.u64 %rd5, %rd2, %rd0; st.global.b32 [%rd5], %r7;
                """,
                matrix,
                found,
            )
            assert torch.equal(found, matrix if turn_in == turn_out else matrix.T)


@pytest.mark.parametrize("swizzle", [0, 32, 64, 128])
@pytest.mark.parametrize("turned", [False, True])
def test_descriptors_place_every_element_once(swizzle: int, turned: bool) -> None:
    """An operand of 64 rows fills 2 KiB, each element in 2 bytes of its own, and 16-byte pieces stay whole."""
    width = swizzle or 16
    code = {0: 0, 128: 1, 64: 2, 32: 3}[swizzle]
    if turned:
        leading, stride = (64 // (width // 2) and 16 * width, 8 * width) if swizzle else (1024, 128)
    else:
        leading, stride = (1024, 128) if not swizzle else (16, 8 * width)
    instruction = kernels(".entry k() { .reg .b32 %r<3>; mov.b32 %r1, %r2; }")[0].instructions[0]
    descriptor = 4096 // 16 | leading // 16 << 16 | stride // 16 << 32 | code << 62
    addresses = fragments.element_addresses(descriptor, 64, turned, instruction)
    assert np.unique(addresses).size == 64 * 16 and addresses.min() >= 4096
    pieces = addresses.reshape(8, 8, 16) if turned else addresses.reshape(64, 2, 8)
    run_of_eight = pieces.transpose(0, 2, 1) if turned else pieces
    assert bool((np.diff(run_of_eight, axis=-1) == 2).all())
    if swizzle == 128 and not turned:
        # Eight rows at the same column lie in eight different groups of banks.
        assert np.unique(addresses[:8, 0] % 128 // 16).size == 8


# ---- complaints ------------------------------------------------------------------------------------------------------

EXCHANGE = """
  mov.u32 %r2, space; shl.b32 %r3, %r0, 2; add.u32 %r4, %r2, %r3;
  st.shared.b32 [%r4], %r0;
  {barrier}
  xor.b32 %r5, %r3, {other}; add.u32 %r5, %r5, %r2;
  ld.shared.b32 %r6, [%r5]; add.u64 %rd2, %rd1, %rd0; st.global.b32 [%rd2], %r6;
"""


def test_a_missing_barrier_is_a_race() -> None:
    found = torch.zeros(64, dtype=torch.int32)
    run(EXCHANGE.format(barrier="bar.sync 0;", other=128), found, threads=64)
    assert found.tolist() == [n ^ 32 for n in range(64)]
    with pytest.raises(PtxError, match=r"without a barrier.*ld\.shared"):
        run(EXCHANGE.format(barrier="", other=128), found, threads=64)
    # Within a warp its own barrier is enough; across warps it is not.
    run(EXCHANGE.format(barrier="bar.warp.sync -1;", other=4), found, threads=64)
    assert found.tolist() == [n ^ 1 for n in range(64)]
    with pytest.raises(PtxError, match="without a barrier"):
        run(EXCHANGE.format(barrier="bar.warp.sync -1;", other=128), found, threads=64)
    with pytest.raises(PtxError, match="without a barrier"):
        run(EXCHANGE.format(barrier="", other=4), found, threads=64)


def test_writing_what_others_still_read_is_a_race() -> None:
    body = """
      mov.u32 %r2, space; shl.b32 %r3, %r0, 2; add.u32 %r4, %r2, %r3; st.shared.b32 [%r4], %r0; bar.sync 0;
      xor.b32 %r5, %r4, 128; ld.shared.b32 %r6, [%r5]; {barrier} st.shared.b32 [%r4], %r6;
    """
    run(body.format(barrier="bar.sync 0;"), threads=64)
    with pytest.raises(PtxError, match="writes shared memory that another thread reads"):
        run(body.format(barrier=""), threads=64)
    # Who reads once more together with others is still one of several; so is a warp that does.
    both = "setp.eq.u32 %p1, %r0, 0; setp.lt.u32 %p2, %r0, 2; mov.u32 %r2, space; st.shared.b32 [%r2+64], %r0;"
    with pytest.raises(PtxError, match="different values to one place"):
        run(both)
    reads = "ld.shared.b32 %r3, [%r2];"
    start = "setp.eq.u32 %p1, %r0, 0; setp.lt.u32 %p2, %r0, 2; mov.u32 %r2, space;"
    with pytest.raises(PtxError, match="writes shared memory that another thread reads"):
        run(f"{start} @%p1 {reads} @%p2 {reads} @%p1 st.shared.b32 [%r2], %r0;")
    start = "setp.ge.u32 %p1, %r0, 32; setp.eq.u32 %p2, %r0, 32; mov.u32 %r2, space;"
    with pytest.raises(PtxError, match="writes shared memory that another thread reads"):
        run(f"{start} @%p1 {reads} {reads} bar.warp.sync -1; @%p2 st.shared.b32 [%r2], %r0;", threads=64)


def test_two_writes_without_a_barrier_are_a_race() -> None:
    one = "mov.u32 %r2, space; setp.eq.u32 %p1, %r0, 31; setp.eq.u32 %p2, %r0, 5; @%p1 st.shared.b32 [%r2], %r0;"
    with pytest.raises(PtxError, match="writes shared memory that thread 31 writes"):
        run(f"{one} @%p2 st.shared.b16 [%r2], 0;")
    # One instruction, in two turns of a loop.
    loop = """
      mov.u32 %r1, 0; mov.u32 %r2, space;
      $LOOP: add.u32 %r3, %r0, %r1; and.b32 %r3, %r3, 31; shl.b32 %r3, %r3, 2; add.u32 %r3, %r3, %r2;
      st.shared.b32 [%r3], %r0; {barrier}
      add.u32 %r1, %r1, 1; setp.lt.u32 %p1, %r1, 2; @%p1 bra $LOOP;
    """
    run(loop.format(barrier="bar.sync 0;"))
    with pytest.raises(PtxError, match="without a barrier"):
        run(loop.format(barrier=""))
    # The same value twice is what compilers write of what they hold twice.
    run("mov.u32 %r2, space; st.shared.b32 [%r2], 7;")


def test_a_release_speaks_for_others_after_a_barrier() -> None:
    found, turn = torch.zeros(64, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    body = """
      add.u64 %rd3, %rd1, %rd0; st.global.b32 [%rd3], %r0; {barrier}
      setp.eq.u32 %p1, %r0, 0; @%p1 red.release.gpu.global.add.u32 [%rd2], 1;
    """
    run(body.format(barrier="bar.sync 0;"), found, turn, threads=64)
    assert turn.item() == 1
    with pytest.raises(PtxError, match="since its last barrier"):
        run(body.format(barrier=""), found, turn, threads=64)


COPY = """
  mov.u32 %r2, space; shl.b32 %r3, %r0, 2; add.u32 %r4, %r2, %r3; add.u64 %rd3, %rd1, %rd0;
  cp.async.ca.shared.global [%r4], [%rd3], 4;
  cp.async.commit_group;
  {wait}
  ld.shared.b32 %r6, [%r4]; add.u64 %rd4, %rd2, %rd0; st.global.b32 [%rd4], %r6;
"""


def test_a_copy_arrives_when_it_is_waited_for() -> None:
    source, found = torch.arange(32, dtype=torch.int32), torch.zeros(32, dtype=torch.int32)
    run(COPY.format(wait="cp.async.wait_group 0;"), source, found)
    assert torch.equal(found, source)
    run(COPY.format(wait="cp.async.wait_group 1;"), source, found)
    assert found.tolist() == [-1] * 32  # shared memory that nobody has written
    with pytest.raises(PtxError, match="without a barrier"):
        other = COPY.format(wait="cp.async.wait_group 0; xor.b32 %r4, %r4, 4;")
        run(other, source, found)


def test_accesses_outside_and_unaligned_are_refused() -> None:
    found = torch.zeros(31, dtype=torch.int32)
    with pytest.raises(PtxError, match=r"thread 31 of block .* global address"):
        run("add.u64 %rd2, %rd1, %rd0; st.global.b32 [%rd2], %r0;", found)
    with pytest.raises(PtxError, match="unaligned"):
        run("ld.global.b32 %r1, [%rd1+2];", found)
    for place in ("1024", "-4"):
        with pytest.raises(PtxError, match="shared address"):
            run(f"mov.u32 %r2, space; ld.shared.b32 %r1, [%r2+{place}];", found)
    start = f"mov.u32 %r2, space; add.u64 %rd1, %rd1, {-found.data_ptr() % 16};"
    run(f"{start} setp.eq.u32 %p1, %r0, 0; @%p1 cp.async.cg.shared.global [%r2], [%rd1], 16;", found)
    with pytest.raises(PtxError, match="global address"):
        run(f"{start} setp.eq.u32 %p1, %r0, 0; @%p1 cp.async.cg.shared.global [%r2], [%rd1+4], 16;", found)
    with pytest.raises(PtxError, match="shared address"):
        run("mov.u32 %r2, space; ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r3}, [%r2+4];")


def test_what_a_warp_must_do_together() -> None:
    with pytest.raises(PtxError, match="only a part of 32 lanes"):
        run("setp.lt.u32 %p1, %r0, 7; @%p1 shfl.sync.idx.b32 %r1, %r0, 0, 31, -1;")
    split = "setp.lt.u32 %p1, %r0, {}; @%p1 bra $A; bar.sync 0; bra $B; $A: bar.sync 0; bar.sync 0; $B: mov.u32 %r1, 0;"
    with pytest.raises(PtxError, match="only a part of 32 lanes"):
        run(split.format(7))
    run(split.format(32), threads=64)  # whole warps; those that are done are not waited for
    with pytest.raises(PtxError, match="only barrier 0"):
        run("bar.sync 1;")
    with pytest.raises(PtxError, match="read before it is written"):
        run("add.u32 %r1, %r7, 1;")
    for text in (
        "brev.b32 %r1, %r0",
        "cvt.rz.f16.f32 %rs1, %r0",
        "add.sat.f32 %r1, %r0, %r0",
        "fma.rn.relu.f16 %rs1, 0, 0, 0",
    ):
        with pytest.raises(PtxError, match="not known"):
            run(f"{text};")
    # Lanes that have not written a register hold no friendly zero.
    found = torch.zeros(32, dtype=torch.int32)
    run("setp.lt.u32 %p1, %r0, 7; @%p1 mov.u32 %r1, 5; add.u64 %rd2, %rd1, %rd0; st.global.b32 [%rd2], %r1;", found)
    assert found.tolist() == [5] * 7 + [-1] * 25


def test_lanes_part_and_meet_again() -> None:
    found = torch.zeros(64, dtype=torch.int32)
    body = """
      mov.u32 %r1, 0; mov.u32 %r2, 0; mov.u32 %r9, %ctaid.x; mad.lo.u32 %r9, %r9, 32, %r0; mul.wide.u32 %rd3, %r9, 4;
      $LOOP: setp.ge.u32 %p1, %r2, %r9; @%p1 bra $OUT;
      add.u32 %r1, %r1, %r2; add.u32 %r2, %r2, 1; bra $LOOP;
      $OUT: add.u64 %rd2, %rd1, %rd3; st.global.b32 [%rd2], %r1;
    """
    run(body, found, blocks=2)
    assert found.tolist() == [n * (n - 1) // 2 for n in range(64)]


def test_blocks_wait_for_their_turn() -> None:
    """The last block first: what each adds shows who came before it."""
    found, turn = torch.zeros(32, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    body = """
      mov.u32 %r1, %ctaid.x; mov.u32 %r2, 2; sub.u32 %r2, %r2, %r1;
      $WAIT: atom.acquire.gpu.global.add.u32 %r3, [%rd2], 0; setp.ne.u32 %p1, %r3, %r2; @%p1 bra $WAIT;
      add.u64 %rd3, %rd1, %rd0; ld.global.b32 %r4, [%rd3]; mad.lo.u32 %r4, %r4, 10, %r1; add.u32 %r4, %r4, 1;
      st.global.b32 [%rd3], %r4; bar.sync 0;
      setp.eq.u32 %p2, %r0, 0; @%p2 red.release.gpu.global.add.u32 [%rd2], 1;
    """
    run(body, found, turn, blocks=3)
    assert found.tolist() == [321] * 32 and turn.item() == 3
    with pytest.raises(PtxError, match="wait for what no other one does"):
        run(body, found, turn, blocks=3)


# ---- traffic ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stride", "passes", "sectors"),
    [(0, 1, 1), (4, 1, 4), (8, 2, 8), (12, 1, 12), (16, 4, 16), (20, 1, 20), (28, 1, 28)],
)
def test_conflicts_and_sectors_of_a_stride(stride: int, passes: int, sectors: int) -> None:
    """32 lanes read 4 bytes each, so far apart: in 32 banks of 4 bytes, and in sectors of 32."""
    traffic, memory = Traffic(), torch.zeros(512)
    source = memory[-memory.data_ptr() % 128 // 4 :]
    run(
        f"""mov.u32 %r2, space; mul.lo.u32 %r3, %r0, {stride}; mul.wide.u32 %rd3, %r0, {stride};
        add.u32 %r4, %r2, %r3; ld.shared.b32 %r5, [%r4]; add.u64 %rd2, %rd1, %rd3; ld.global.b32 %r6, [%rd2];""",
        source,
        watch=Watch(traffic=traffic),
    )
    costs = {cost.space: cost for cost in traffic.costs.values()}
    assert (costs["shared"].taken, costs["shared"].least) == (passes, 1)
    assert (costs["global"].taken, costs["global"].least) == (sectors, 1 if stride == 0 else 4)
