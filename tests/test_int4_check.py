"""The check of an int4 product before a configuration's first use."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_int4_matmul import BF16, FP16, check, problem

from epmq.errors import NumericalError
from epmq.kernels import int4_check
from epmq.kernels.int4_check import Case
from epmq.kernels.int4_launch import run
from epmq.kernels.int4_programs import dequantize_tiles, product_tiles, sum_parts
from epmq.kernels.launch import interpreted
from epmq.kernels.tune import Config

SMALL = Config(8, 64, 1, 4, 4, True)


@pytest.mark.parametrize("dtype", [FP16, BF16], ids=str)
@pytest.mark.parametrize("group", [0, 32, 128, 256])
@pytest.mark.parametrize(
    ("parts", "bias", "rows"), [(1, None, 16), (1, "same", 0), (3, "same", 16), (2, "fp32", 1)], ids=str
)
def test_a_right_kernel_passes_its_check(
    parts: int, bias: str | None, rows: int, group: int, dtype: torch.dtype, device: torch.device
) -> None:
    offset = {None: None, "same": dtype, "fp32": torch.float32}[bias]
    int4_check.check(device, Case(SMALL, parts, group, dtype, offset, rows, 16, False))


@pytest.mark.parametrize("columns", [16, 0, 1])
def test_the_two_stages_pass_their_check(columns: int, device: torch.device) -> None:
    stages = Config(0, 0, 1, 0, 0, False, two_stages=True)
    int4_check.check(device, Case(stages, 1, 0 if columns == 1 else 384, FP16, FP16, 16, columns, False))


def test_the_order_of_many_tokens_passes_its_check(device: torch.device) -> None:
    int4_check.check(device, Case(Config(64, 64, 1, 4, 3, True), 1, 64, FP16, None, 16, 16, True))


def test_a_wrong_kernel_is_refused(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    right = int4_check.run
    monkeypatch.setattr(int4_check, "run", lambda x, *a, **k: right(x.roll(1, 1), *a, **k))
    with pytest.raises(NumericalError, match=r"products of small integers are wrong"):
        int4_check.check(device, Case(SMALL, 2, 64, FP16, None, 16, 16, False))


def test_the_check_knows_no_defaults(device: torch.device) -> None:
    """A program may have set torch's default dtype and device to anything."""
    try:
        torch.set_default_dtype(BF16)
        torch.set_default_device("meta")
        int4_check.check(device, Case(SMALL, 2, 64, FP16, torch.float32, 16, 16, False))
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)


CALLS = [
    # tokens, rows, columns, group, bias, tokens and rows of a tile, parts
    (3, 64, 384, 128, None, 8, 64, 1),
    (3, 64, 384, 128, FP16, 8, 64, 1),
    (3, 64, 384, 128, torch.float32, 8, 64, 1),
    (1, 48, 640, 64, FP16, 8, 64, 4),
    (16, 65, 640, 64, torch.float32, 8, 64, 4),
    (5, 1, 256, 0, FP16, 8, 64, 2),
    (300, 64, 256, 0, None, 64, 64, 1),
    (2, 80, 300, 64, None, 0, 0, 1),
    (2, 81, 272, 64, FP16, 0, 0, 1),
]


@pytest.mark.parametrize("call", CALLS, ids=str)
def test_the_check_runs_the_very_programs_that_are_used(call: tuple[Any, ...], device: torch.device) -> None:
    if interpreted():
        pytest.skip("the interpreter compiles nothing; tests/test_compiled.py runs this for sm_80 and sm_90")
    tokens, rows, columns, group, kind, block_m, block_n, parts = call
    config = Config(block_m, block_n, parts, 4, 3, True, two_stages=block_m == 0)
    x, _, weight, bias = problem(rows, columns, group or -1, False, FP16, tokens, device)
    offset = None if kind is None else bias.to(kind)
    int4_check.check(device, int4_check.case_of(x, offset, rows, weight.group_size, config))
    before = compiled_programs()
    run(x, weight.words, weight.scale_words, offset, rows, weight.group_size, config)
    assert compiled_programs() == before > 0


def test_the_dtype_of_a_bias_compiles_no_other_product(device: torch.device) -> None:
    if interpreted():
        pytest.skip("the interpreter compiles nothing; tests/test_compiled.py runs this for sm_80 and sm_90")
    x, tensor, weight, bias = problem(64, 640, 64, False, FP16, 3, device)
    before = compiled_programs(product_tiles)
    for parts in (1, 4):
        config = Config(16, 64, parts, 4, 2, True)  # a depth that no other test compiles
        for offset in (None, bias, bias.float(), bias.bfloat16(), bias.double()):
            y = run(x, weight.words, weight.scale_words, offset, 64, 64, config)
            check(y, x, tensor, offset, config)
    # No bias, one of x's dtype, and what leaves the bias to the sum.
    assert compiled_programs(product_tiles) - before == 3


def compiled_programs(*some: Any) -> int:
    """How many programs this process has compiled of these kernels, or of all of the product's."""
    chosen = some or (product_tiles, sum_parts, dequantize_tiles)
    return sum(len(caches[0]) for kernel in chosen for caches in kernel.device_caches.values())


def test_each_case_is_checked_once(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    cases: list[Case] = []
    monkeypatch.setattr(int4_check, "check", lambda device, case: cases.append(case))
    monkeypatch.setattr(int4_check, "_checked", set())

    def use(tokens: int, rows: int, columns: int, parts: int, bias: torch.dtype | None = None) -> int:
        x = torch.zeros(tokens, columns, device=device).half()
        offset = None if bias is None else torch.zeros(rows, dtype=bias, device=device)
        int4_check.ensure_checked(x, offset, rows, 64, Config(8, 64, parts, 4, 4, True))
        return len(cases)

    assert use(1, 64, 128, 1) == use(1, 64, 128, 1) == use(2, 128, 200, 1) == use(1, 64, 128, 2) == 1
    assert use(1, 64, 256, 2) == 2  # two parts
    assert use(1, 65, 256, 2) == 3  # rows that cannot be written 16 bytes at a time
    assert use(1, 64, 256, 2, FP16) == 4
    assert use(256, 64, 128, 1) == 5  # tiles in another order
