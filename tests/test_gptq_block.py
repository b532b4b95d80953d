"""The Triton form of gptq_sweep against the reference and float64, in the interpreter or on a GPU."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from conftest import make_toy_job
from forms import check_sweep, placed, seeded, sweep_problem
from torch import Tensor

import epmq
from epmq import ops, reference

pytest.importorskip("triton", reason="Triton is not installed")
gptq_block = pytest.importorskip("epmq.kernels.gptq_block")
from epmq.kernels.launch import interpreted  # noqa: E402


@dataclass(frozen=True)
class Form:
    """The kernel with its own block sizes, as an entry of the table."""

    function: Any
    backend: str = "triton"


def form(block: int = gptq_block.BLOCK, super_block: int = gptq_block.SUPER_BLOCK) -> Form:
    return Form(partial(gptq_block.gptq_sweep, block=block, super_block=super_block))


def by_reference(problem: Sequence[Tensor], bits: int) -> Tensor:
    weight, upper, scales, zeros, groups = problem
    return reference.gptq_sweep(weight, upper, scales, zeros, groups, bits)


def output_error(codes: Tensor, problem: tuple[Tensor, ...]) -> float:
    """‖(Q - W) M‖² in float64: the loss the sweep descends, up to the factor's diagonal."""
    weight, upper, scales, zeros, groups = (tensor.double() for tensor in problem)
    place = groups.long()
    deviation = weight - (codes.double() - zeros[:, place]) * scales[:, place]
    return float((deviation @ upper).square().sum())


# rows, columns, group size, block, super-block: groups that end inside blocks and span them, ragged tails everywhere.
SHAPES = [
    (5, 40, 16, 16, 32),
    (33, 70, 32, 32, 64),
    (1, 17, -1, 16, 16),
    (7, 5, 2, 128, 512),
    (3, 1, -1, 128, 512),
    (40, 96, 7, 32, 32),
    (2, 64, 48, 64, 64),
    (9, 150, 16, 16, 64),
    (4, 170, 40, 32, 32),
    (150, 90, 48, 512, 2048),
    (300, 144, 24, 512, 512),
]
CASES = [(shape, bits) for place, shape in enumerate(SHAPES) for bits in (4, (2, 3, 8)[place % 3])]


@pytest.mark.sampled
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("shape, bits", CASES, ids=str)
def test_codes_are_the_references(
    device: torch.device, shape: tuple[int, int, int, int, int], bits: int, symmetric: bool
) -> None:
    rows, columns, group, block, super_block = shape
    problem = sweep_problem(rows, columns, group, bits, symmetric)
    codes = check_sweep(form(block, super_block), problem, bits)
    wanted = by_reference(problem, bits)
    ours, theirs = output_error(codes, problem), output_error(wanted, problem)
    assert ours <= 1.001 * theirs, f"{int((codes != wanted).sum())} codes differ, output error {ours / theirs:.5f} x"


def test_one_program_serves_all_sizes_and_widths(device: torch.device) -> None:
    """A program takes seconds to compile: none is made for a number of rows, of columns, of bits, or an alignment."""
    if interpreted():
        pytest.skip("the interpreter compiles nothing; tests/test_compiled.py runs this for sm_80 and sm_90")
    counts = set()
    for rows, columns, bits, block in ((1, 16, 2, 16), (5, 40, 3, 32), (32, 128, 4, 128), (16, 144, 8, 128)):
        check_sweep(form(block, 128), sweep_problem(rows, columns, 16, bits, False), bits)
        counts.add(sum(len(caches[0]) for caches in gptq_block.gptq_block_kernel.device_caches.values()))
    assert len(counts) == 1 and counts <= {1, 2, 3}  # one each for 32, 64 and 128 rows of a program


def test_whole_blocks_of_128_columns(device: torch.device) -> None:
    problem = sweep_problem(12, 144, 128, 4, False)
    codes = check_sweep(form(), problem, 4)
    assert (codes != by_reference(problem, 4)).float().mean() < 1e-3


def test_act_order_leaves_groups_to_their_columns(device: torch.device) -> None:
    weight, upper, scales, zeros, groups = sweep_problem(9, 60, 16, 4, False)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(3))
    check_sweep(form(32, 32), (weight, upper, scales, zeros, groups[order]), 4)


def test_stacked_rows_are_each_rows_own_result(device: torch.device) -> None:
    """Inside one block no row knows of another: stacking linears that share H changes no bit."""
    weight, upper, scales, zeros, groups = placed(form(), *sweep_problem(70, 48, 16, 4, True))
    whole = form(64, 64).function(weight, upper, scales, zeros, groups, 4)
    for part in (slice(0, 1), slice(1, 33), slice(33, 70)):
        alone = form(64, 64).function(weight[part], upper, scales[part], zeros[part], groups, 4)
        assert torch.equal(alone, whole[part])


def test_rounding_is_the_references_bit_for_bit(device: torch.device) -> None:
    """Ties, neighbours of ties, huge and non-finite values, without any propagation."""
    halves = torch.arange(-80, 81) / 2.0
    values = [halves, halves.nextafter(torch.tensor(99.0)), halves.nextafter(torch.tensor(-99.0))]
    values += [torch.tensor([2.0**22 + 0.5, -(2.0**22) - 0.5, 2.0**31, -3e38, 3e38, -0.0, 1e-45])]
    values += [torch.tensor([float("inf"), float("-inf"), float("nan")])]
    weight = torch.cat(values).unsqueeze(1)
    rows = len(weight)
    scales, zeros = torch.full((rows, 1), 0.7), (torch.arange(rows) % 16).float().unsqueeze(1)
    for scale in (torch.ones(rows, 1), scales):
        problem = (weight, torch.eye(1), scale, zeros, torch.zeros(1, dtype=torch.int32))
        codes = form().function(*placed(form(), *problem), 4).cpu()
        assert torch.equal(codes, by_reference(problem, 4))


def test_a_row_with_nan_spoils_no_other(device: torch.device) -> None:
    weight, upper, scales, zeros, groups = sweep_problem(6, 40, 16, 4, True)
    clean = form(16, 32).function(*placed(form(), weight, upper, scales, zeros, groups), 4)
    weight[2, 20] = float("nan")
    dirty = form(16, 32).function(*placed(form(), weight, upper, scales, zeros, groups), 4)
    others = torch.arange(6) != 2
    assert torch.equal(dirty[others], clean[others]) and torch.equal(dirty[2, :20], clean[2, :20])
    assert torch.equal(dirty.cpu(), reference.gptq_sweep(weight, upper, scales, zeros, groups, 4))


def test_nothing_to_do_gives_nothing(device: torch.device) -> None:
    weight, upper, scales, zeros, groups = placed(form(), *sweep_problem(3, 20, 8, 4, True))
    assert form().function(weight[:0], upper, scales[:0], zeros[:0], groups, 4).shape == (0, 20)
    assert form().function(weight[:, :0], upper[:0, :0], scales, zeros, groups[:0], 4).shape == (3, 0)


def test_strided_factor_and_weight(device: torch.device) -> None:
    """Also rows of an odd length and from an odd column on, which cannot be read two entries at a time."""
    for columns in (40, 48):
        weight, upper, scales, zeros, groups = sweep_problem(6, columns, 16, 4, True)
        odd = torch.cat([upper, seeded(columns, 9)], 1)[:, :columns]
        shifted = torch.cat([seeded(columns, 1), upper, seeded(columns, 1)], 1)[:, 1:-1]
        for factor in (upper.T.contiguous().T, odd, shifted):
            check_sweep(form(16, 32), (weight.T.contiguous().T, factor, scales, zeros, groups), 4)


def test_the_table_takes_the_kernel_on_a_gpu_or_when_asked(
    monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    on_cpu = sweep_problem(3, 20, 8, 4, True)
    problem = [tensor.to(device) for tensor in on_cpu]
    if device.type == "cpu":
        assert ops.choose("gptq_sweep", *problem, 4).backend != "triton"
        monkeypatch.setenv("EPMQ_BACKEND", "triton")
    assert ops.choose("gptq_sweep", *problem, 4).backend == "triton"
    assert torch.equal(ops.choose("gptq_sweep", *problem, 4).function(*problem, 4).cpu(), by_reference(on_cpu, 4))
    wide = [tensor.double() for tensor in problem[:4]]
    assert ops.choose("gptq_sweep", *wide, problem[4], 4).backend == "reference"


def test_a_whole_quantization_through_the_kernels(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both kernels at work in the engine: the same errors as the reference's, to what a code at a tie can change."""
    job = make_toy_job(2, 8, 1)
    few = {task: batches[:1] for task, batches in job.calibration.items()}
    errors = {}
    for backend in ("reference", "triton"):
        monkeypatch.setenv("EPMQ_BACKEND", backend)
        config = epmq.QuantConfig(group_size=4, diagnostics=False, include=("query", "key", "down"))
        errors[backend] = epmq.quantize(job.merged, job.experts, few, config, device=device).report["average_error"]
    for task, by_method in errors["reference"].items():
        assert errors["triton"][task]["epmq"] == pytest.approx(by_method["epmq"], rel=0.01)


def test_random_problems(random_seeds: range, device: torch.device) -> None:
    """Any size, group, width and order of columns."""
    for seed in random_seeds:
        draw = random.Random(seed)
        rows, columns, bits = draw.randint(1, 9), draw.randint(1, 40), draw.choice([2, 3, 4, 8])
        group = -1 if draw.random() < 0.2 else draw.randint(1, columns)
        weight, upper, scales, zeros, groups = sweep_problem(rows, columns, group, bits, draw.random() < 0.5)
        order = draw.sample(range(columns), columns)
        print(f"problem {seed}: {rows} x {columns}, groups of {group}, {bits} bits")
        check_sweep(form(16, 32), (weight, upper, scales, zeros, groups[order]), bits)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here")
@pytest.mark.parametrize("rows, columns", [(256, 2048), (4096, 1024), (6144, 2560), (9000, 640)])
def test_layers_of_real_size_on_a_gpu(rows: int, columns: int) -> None:
    problem = sweep_problem(rows, columns, 128, 4, False)
    given = placed(form(), *problem)
    codes = check_sweep(form(), problem, 4)
    wanted = by_reference(given, 4).cpu()
    assert (codes != wanted).float().mean() < 1e-3
    assert output_error(codes, problem) <= 1.001 * output_error(wanted, problem)
