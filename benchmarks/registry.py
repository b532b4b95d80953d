"""What is timed: for each operation its cases, our call, and the rivals that can be imported here."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from cache import rotating
from torch import Tensor

from epmq import QuantConfig, onednn, ops
from epmq.group import GroupOutcome, quantize_group
from epmq.quantized import column_groups, pack
from epmq.statistics import Expert, Folded

Call = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """One shape of one operation. Traffic and arithmetic are those of our form."""

    op: str
    name: str
    ours: Call
    rivals: dict[str, Call]
    bytes_read: int = 0
    flops: int = 0
    absent: tuple[str, ...] = field(default=())


def accumulate_case(rows: int, columns: int, targets: int, dtype: torch.dtype = torch.float32) -> Case:
    """H and C of one batch, against two products of a library (after conversion to fp32, which they need)."""
    x, target = torch.randn(rows, columns).to(dtype), torch.randn(rows, targets).to(dtype)
    sums = [torch.zeros(columns, columns), torch.zeros(columns), torch.zeros(targets, columns), torch.zeros(targets)]
    hessian, sum_x, cross, sum_target = sums
    other_hessian, other_cross = torch.zeros(columns, columns), torch.zeros(targets, columns)

    def two_addmm() -> None:
        wide, wide_target = x.float(), target.float()
        other_hessian.addmm_(wide.T, wide)
        other_cross.addmm_(wide_target.T, wide)

    def two_onednn() -> None:
        turned = x.float().T
        other_hessian.add_(onednn.linear(turned, turned))
        other_cross.add_(onednn.linear(target.float().T, turned))

    rivals: dict[str, Call] = {"two torch.addmm": two_addmm}
    if onednn.preferred():
        rivals["two oneDNN products"] = two_onednn
    return Case(
        "accumulate",
        f"M={rows} K={columns} P={targets} {str(dtype).removeprefix('torch.')}",
        lambda: ops.accumulate(x, hessian, sum_x, target, cross, sum_target),
        rivals,
        flops=rows * columns * (columns + 2 * targets),
    )


def sweep_case(rows: int, columns: int) -> Case:
    """The sweep alone, given the factor; whole GPTQ against its rivals is peers/gptq_time.py."""
    weight, group = torch.randn(rows, columns), column_groups(columns, 128)
    groups = -(-columns // 128)
    scales, zeros = torch.full((rows, groups), 0.4), torch.full((rows, groups), 8.0)
    upper = torch.eye(columns) + 0.3 * torch.randn(columns, columns).triu(1) / columns**0.5
    form = ops.implementations("gptq_sweep")[-1].function
    return Case(
        "gptq_sweep",
        f"N={rows} K={columns} g128",
        lambda: ops.gptq_sweep(weight, upper, scales, zeros, group, 4),
        {"PyTorch reference": lambda: form(weight, upper, scales, zeros, group, 4)},
        flops=rows * columns * columns,
    )


def product_case(rows: int, depth: int, columns: int) -> Case:
    """What one block of columns of the target's solve takes out of the others."""
    a, b = torch.randn(rows, depth), torch.randn(depth, columns)
    out, other = torch.zeros(rows, columns), torch.zeros(rows, columns)
    rivals: dict[str, Call] = {"torch.addmm": lambda: other.addmm_(a, b, alpha=-1.0)}
    if onednn.preferred():
        rivals["oneDNN product"] = lambda: other.sub_(onednn.linear(a, b.T))
    return Case(
        "subtract_product",
        f"N={rows} k={depth} n={columns}",
        lambda: ops.subtract_product(out, a, b),
        rivals,
        flops=2 * rows * depth * columns,
    )


def gram_case(rows: int, depth: int) -> Case:
    """What one panel of the Cholesky factor takes out of the columns to its right."""
    a = torch.randn(rows, depth)
    out, other = torch.zeros(rows, rows), torch.zeros(rows, rows)
    form = ops.implementations("subtract_gram")[-1].function
    return Case(
        "subtract_gram",
        f"N={rows} k={depth}",
        lambda: ops.subtract_gram(out, a),
        {"PyTorch reference": lambda: form(other, a)},
        flops=rows * rows * depth,
    )


def group_case(rows: int, columns: int) -> Case:
    """Plain GPTQ of a weight from its statistics, and what the rest of E-PMQ costs beside it."""
    x = torch.randn(2 * columns, columns) @ (torch.eye(columns) + torch.randn(columns, columns) / columns**0.5)
    problem = Folded.empty(rows, columns)
    problem.hessian.addmm_(x.T, x, alpha=1 / len(x))
    problem.pull.addmm_(torch.randn(rows, columns), problem.hessian, alpha=0.1)
    problem.weight = 1.0
    anchor = Expert(torch.randn(rows, columns), torch.zeros(rows))

    def run(strength: float = 0.0, **settings: object) -> GroupOutcome:
        config = QuantConfig.model_validate({"method": "gptq", "clip": "none", **settings})
        return quantize_group(problem, problem, anchor, strength, config, False, torch.float16, "benchmark")

    return Case(
        "gptq_settings",
        f"N={rows} K={columns} 4-bit g128, plain",
        run,
        {
            "clip: mse": lambda: run(clip="mse"),
            "clip: hessian": lambda: run(clip="hessian"),
            "E-PMQ target too": lambda: run(0.1, method="epmq"),
        },
        flops=rows * columns * columns + columns**3 // 3,
    )


@functools.lru_cache(maxsize=1)
def matmul_weights(rows: int, columns: int) -> dict[str, Callable[[], Sequence[Tensor]]]:
    """One weight in every form that is timed; each call of a form takes another copy, so that it comes from memory."""
    weight = torch.randn(rows, columns)
    codes = torch.randint(0, 16, (rows, columns), dtype=torch.uint8)
    scales = 0.01 + 0.1 * torch.rand(rows, columns // 128)
    forms = {
        "int4": rotating(pack(codes, 4), scales),
        "dense fp32": rotating(weight),
        "dense bf16": rotating(weight.to(torch.bfloat16)),
    }
    if hasattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu"):
        repacked = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 2)
        grid = torch.stack((scales, torch.zeros_like(scales)), -1).transpose(0, 1).contiguous().to(torch.bfloat16)
        forms["aten int4pack"] = rotating(repacked, grid)
    return forms


def matmul_case(tokens: int, rows: int, columns: int, dtype: torch.dtype) -> Case:
    """int4 g128 against dense products of the same size, and torch's own int4 product in bf16."""
    forms = matmul_weights(rows, columns)
    x = torch.randn(tokens, columns).to(dtype)
    rivals: dict[str, Call] = {}
    absent: tuple[str, ...] = ()
    if dtype == torch.float32:
        rivals["dense fp32 F.linear"] = lambda: F.linear(x, *forms["dense fp32"]())
        if onednn.preferred():
            rivals["dense fp32 oneDNN"] = lambda: onednn.linear(x, *forms["dense fp32"]())
    else:
        rivals["dense bf16 F.linear"] = lambda: F.linear(x, *forms["dense bf16"]())
        if "aten int4pack" in forms:

            def int4pack() -> Tensor:
                repacked, grid = forms["aten int4pack"]()
                product: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(x, repacked, 128, grid)
                return product

            rivals["aten int4pack bf16"] = int4pack
        else:
            absent = ("aten int4pack bf16",)

    def ours() -> Tensor:
        packed, scales = forms["int4"]()
        return ops.dequant_matmul(x, packed, scales, None, None, 4, 128)

    return Case(
        "dequant_matmul",
        f"M={tokens} N={rows} K={columns} {str(dtype).removeprefix('torch.')}",
        ours,
        rivals,
        bytes_read=rows * columns // 2 + rows * columns // 128 * 4,
        flops=2 * tokens * rows * columns,
        absent=absent,
    )


ACCUMULATE = [(2048, 384, 384), (2048, 1536, 384), (2048, 384, 1536), (1024, 4096, 4096)]
SWEEP = [(384, 384), (384, 1536), (2048, 2048), (4096, 4096)]
PRODUCT = [(4096, 256, 2048)]
GRAM = [(3840, 256)]
GROUP = [(1536, 384), (4096, 4096)]
MATMUL = [(m, n, 4096) for n in (4096, 11008) for m in (1, 4, 16, 64)] + [(256, 4096, 4096)]


@dataclass(frozen=True)
class Maker:
    """A case yet to be made: some weigh hundreds of megabytes."""

    op: str
    shape: tuple[int, ...]
    dtype: str = "float32"

    def __call__(self) -> Case:
        dtype: torch.dtype = getattr(torch, self.dtype)
        if self.op == "accumulate":
            rows, columns, targets = self.shape
            return accumulate_case(rows, columns, targets, dtype)
        if self.op == "gptq_sweep":
            rows, columns = self.shape
            return sweep_case(rows, columns)
        if self.op == "subtract_product":
            rows, depth, columns = self.shape
            return product_case(rows, depth, columns)
        if self.op == "subtract_gram":
            rows, depth = self.shape
            return gram_case(rows, depth)
        if self.op == "gptq_settings":
            rows, columns = self.shape
            return group_case(rows, columns)
        tokens, rows, columns = self.shape
        return matmul_case(tokens, rows, columns, dtype)


def makers() -> list[Maker]:
    """Every case, in the order of the tables."""
    made = [Maker("accumulate", shape, dtype) for shape in ACCUMULATE for dtype in ("float32", "bfloat16")]
    made += [Maker("gptq_sweep", shape) for shape in SWEEP]
    made += [Maker("subtract_product", shape) for shape in PRODUCT]
    made += [Maker("subtract_gram", shape) for shape in GRAM]
    made += [Maker("gptq_settings", shape) for shape in GROUP]
    return made + [Maker("dequant_matmul", shape, dtype) for shape in MATMUL for dtype in ("float32", "bfloat16")]
