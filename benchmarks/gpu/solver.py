"""GPTQ with H given, and the products of a target, against other ways to the same."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial

import torch
from gpu import rivals
from gpu.setting import BITS, GROUP, Row, Setting, expect, relative
from gpu.timing import clocks, milliseconds
from torch import Tensor

from epmq import ops, pieces, reference
from epmq.kernels import gptq_block
from epmq.quantized import column_groups
from epmq.solve import Factor, factorize


def gptq(setting: Setting, rows: int, columns: int) -> Iterator[Row]:
    """One layer, H given: our factor and sweep against a loop over columns in PyTorch and llm-compressor."""
    rows, columns = setting.shape(rows, columns)
    device, groups = setting.device, -(-columns // GROUP)
    weight = torch.randn(rows, columns, device=device)
    x = torch.randn(2 * columns, columns, device=device)
    x += 0.5 * x.roll(1, 1)
    hessian = x.T @ x / len(x)
    del x
    padded = torch.nn.functional.pad(weight, (0, groups * GROUP - columns)).view(rows, groups, GROUP)
    scales = padded.abs().amax(-1) / ((2**BITS - 1) / 2)
    zeros = torch.full_like(scales, 2.0 ** (BITS - 1))
    group_of = column_groups(columns, GROUP, device)
    blocked = next(form for form in ops.implementations("cholesky") if form.backend == "blocked")
    form = next(form for form in ops.implementations("gptq_sweep") if form.backend == "triton")

    def factor() -> Factor:
        return factorize(hessian.clone(), 0.0, 0.01, "benchmark")

    unit = factor().unit_upper

    def sweep() -> Tensor:
        codes: Tensor = form.function(weight, unit, scales, zeros, group_of, BITS)
        return codes

    def loop() -> Tensor:
        return reference.gptq_sweep(weight, unit, scales, zeros, group_of, BITS)

    row: Row = {"N": rows, "K": columns}
    ours = sweep()
    if setting.timed:
        row["sweep ms"] = milliseconds(sweep)
        row["factor ms"] = milliseconds(factor)
        row["factor, blocked ms"] = milliseconds(lambda: blocked.function(hessian))
        row["clocks"] = clocks()
        yield row
        # What the sizes in kernels/gptq_block.py reckon with.
        for block, reach in ((256, 2048), (512, 512), (512, 4096), (1024, 4096)):
            timed = partial(gptq_block.gptq_sweep, weight, unit, scales, zeros, group_of, BITS, block, reach)
            how = f"sweep, blocks of {block} up to {reach}"
            row[f"{how} ms"] = setting.attempt(how, partial(milliseconds, timed))
        yield row
    theirs = loop()
    different = row["codes that differ"] = float((ours != theirs).float().mean())
    errors = [output_loss(codes, weight, hessian, scales, zeros, group_of) for codes in (ours, theirs)]
    row["error / reference"] = errors[0] / errors[1]
    # A value next to a tie takes either code, and the columns after it then see another deviation and come to ties of
    # their own: how many differ grows with the columns and says little. The output error says what it costs.
    expect(row, different < 1e-2, f"{different:.2%} of the codes differ from the reference")
    expect(row, abs(errors[0] / errors[1] - 1) < 1e-3, f"output error {errors[0]:.6g}, reference {errors[1]:.6g}")
    lower, info = blocked.function(hessian)
    # A Cholesky factor's backward error and that of this product: K roundings each.
    residual = row["blocked residual"] = relative(lower @ lower.T, hessian)
    expect(row, int(info) == 0 and residual < 2 * columns * 2.0**-24, f"blocked factor: residual {residual:.2g}")
    yield row
    if not setting.timed:
        return
    row["torch columns ms"] = milliseconds(loop, repeats=1)
    yield row
    for name, disabled in (("llm-compressor", "0"), ("llm-compressor without its Triton", "1")):
        os.environ["LLMCOMPRESSOR_DISABLE_GPTQ_TRITON"] = disabled
        row[f"{name} ms"] = setting.attempt(name, lambda: solver_time(weight, hessian))
        yield row


def solver_time(weight: Tensor, hessian: Tensor) -> float:
    solver = rivals.llm_compressor()
    return milliseconds(lambda: solver(weight.clone(), hessian.clone()), repeats=2)


def output_loss(
    codes: Tensor, weight: Tensor, hessian: Tensor, scales: Tensor, zeros: Tensor, group_of: Tensor
) -> float:
    """tr(D H Dᵀ) of what the codes stand for."""
    place = group_of.long()
    change = (codes.float() - zeros[:, place]) * scales[:, place] - weight
    return float(((change @ hessian).double() * change.double()).sum())


def product(setting: Setting, rows: int, columns: int) -> Iterator[Row]:
    """Weights times a Hessian by pieces in bf16 against fp32, with weights of a bf16 checkpoint and with others."""
    rows, columns = setting.shape(rows, columns)
    some = torch.arange(0, rows, max(1, rows // 64), device=setting.device)
    x = torch.randn(2 * columns, columns, device=setting.device)
    hessian = x.T @ (x + 0.5 * x.roll(1, 1))
    row: Row = {"N": rows, "K": columns}
    for kind in ("fp32", "bf16"):
        weight = torch.randn(rows, columns, device=setting.device)
        weight = weight.bfloat16().float() if kind == "bf16" else weight
        exact = weight[some].double() @ hessian.double()
        magnitude = weight[some].double().abs() @ hessian.double().abs()
        for name, function in (("pieces", pieces.product), ("fp32", reference.product)):
            off = (function(weight, hessian)[some].double() - exact).abs()
            row[f"{kind} weight, error of {name}"] = float(off.norm() / exact.norm())
            # 16 bits of the weight, and sums of so many products that are cut off, each at most a unit.
            expect(row, bool((off <= (2.0**-17 + columns * 2.0**-23) * magnitude).all()), f"{name} is off")
            if setting.timed:
                row[f"{kind} weight, {name} ms"] = milliseconds(partial(function, weight, hessian))
        yield row
