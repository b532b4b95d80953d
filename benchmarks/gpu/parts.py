"""What the suite measures: each item is checked for correctness, then timed; a check that fails stops the item."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from gpu import rivals
from gpu.timing import milliseconds
from torch import Tensor

from epmq import ops, reference
from epmq.kernels.gram import Plan
from epmq.kernels.int4_matmul import int4_matmul
from epmq.kernels.layout import pack_weight
from epmq.kernels.timing import Call, copies_needed, microseconds
from epmq.quantized import QuantizedTensor, column_groups
from epmq.solve import Factor, factorize

Row = dict[str, Any]
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 512, 2048, 8192)
LAYERS = {
    "llama-3-8b qkv": (6144, 4096),
    "llama-3-8b o": (4096, 4096),
    "llama-3-8b gate+up": (28672, 4096),
    "llama-3-8b down": (4096, 14336),
    "llama-3-70b qkv": (10240, 8192),
    "llama-3-70b o": (8192, 8192),
    "llama-3-70b gate+up": (57344, 8192),
    "llama-3-70b down": (8192, 28672),
    "clip-vit-l qkv": (3072, 1024),
    "clip-vit-l fc1": (4096, 1024),
    "clip-vit-l fc2": (1024, 4096),
}
SWEEPS = ((4096, 4096), (14336, 4096), (4096, 14336))
GRAMS = ((32768, 4096, 0), (32768, 14336, 0), (32768, 4096, 4096), (32768, 14336, 4096))
GROUP, BITS = 128, 4


@dataclass
class Setting:
    """Where and how large: ``tiny`` shrinks every shape for a run that checks and does not time, GPU or not."""

    device: torch.device
    tiny: bool
    limits: dict[str, float]
    absent: dict[str, str]

    @property
    def timed(self) -> bool:
        return not self.tiny

    def shape(self, *sizes: int, least: int = 32) -> tuple[int, ...]:
        return tuple(max(least, size // 512 // 16 * 16) if self.tiny else size for size in sizes)

    def share(self, amount: float, taken_us: float, limit: str) -> float | None:
        """Which share of this card's rate (in units of 1e12 a second) a call reaches."""
        return amount / taken_us / 1e6 / self.limits[limit] if limit in self.limits else None


def items(setting: Setting) -> dict[str, Callable[[], list[Row]]]:
    """Every item by name, in the order they are run; a name begins with its part."""
    made: dict[str, Callable[[], list[Row]]] = {}
    for rows, columns in SWEEPS:
        made[f"gptq {rows}x{columns}"] = partial(gptq, setting, rows, columns)
    for count, columns, targets in GRAMS:
        name = f"gram {count} tokens K={columns}" + (f" P={targets}" if targets else "")
        made[name] = partial(gram, setting, count, columns, targets)
    for layer, (rows, columns) in LAYERS.items():
        made[f"int4 {layer} {rows}x{columns}"] = partial(int4, setting, layer, rows, columns)
    for forward in ("bfloat16", "float32"):
        made[f"block llama-3-8b, eight experts, {forward}"] = partial(block, setting, forward)
    return made


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def int4(setting: Setting, layer: str, rows: int, columns: int) -> list[Row]:
    """Fused int4 product against dense and other int4 products: fp16, and bf16 where a rival knows only that."""
    rows, columns = setting.shape(rows, columns, least=128)
    copies = copies_needed(rows * columns // 2, setting.device)
    weights = [random_weight(rows, columns, setting.device, seed) for seed in range(copies)]
    packed = [pack_weight(weight, torch.float16) for weight in weights]
    wide = weights[0].dequantize(torch.float32)
    found: list[Row] = []
    for tokens in TOKENS[:3] if setting.tiny else TOKENS:
        x = torch.randn(tokens, columns, device=setting.device, dtype=torch.float16)
        error = relative(int4_matmul(x, packed[0], None), x.float() @ wide.T)
        assert error < 2e-3, f"{layer}, {tokens} tokens: relative error {error:.2g}"
        row: Row = {"layer": layer, "N": rows, "K": columns, "M": tokens, "error": error}
        if setting.timed:
            calls: list[Call] = [partial(int4_matmul, x, weight, None) for weight in packed]
            row["epmq µs"], row["taken by"] = microseconds(calls)
            size = rows * columns / 2 + 4 * rows * columns / GROUP + 2 * tokens * (rows + columns)
            row["of copy rate"] = setting.share(size, row["epmq µs"], "copy_tb_s")
            row["of bf16 peak"] = setting.share(2.0 * tokens * rows * columns, row["epmq µs"], "bfloat16_tflop_s")
            for name, make in rivals.PRODUCTS.items():
                row[f"{name} µs"] = rival_time(setting, name, make, x, weights, wide)
        found.append(row)
    return found


def rival_time(
    setting: Setting, name: str, make: rivals.Multiply, x: Tensor, weights: list[QuantizedTensor], wide: Tensor
) -> float | None:
    """Time of a rival whose product is right; None, with the reason kept, of one that is absent or wrong."""
    x = x.bfloat16() if name == "tinygemm" else x
    few = weights[: copies_needed(wide.numel() * 2, setting.device)] if name == "cublas" else weights
    try:
        calls = [make(x, weight) for weight in few]
        error = relative(calls[0](), x.float() @ wide.T)
    except rivals.Absent as reason:
        setting.absent.setdefault(name, str(reason))
        return None
    except Exception as failure:  # whatever a rival throws is a fact about the rival
        setting.absent[f"{name} at {len(x)} tokens"] = f"failed: {str(failure).splitlines()[:1]}"
        return None
    if error > 2e-2:
        setting.absent[f"{name} at {len(x)} tokens"] = f"wrong result, relative error {error:.2g}"
        return None
    taken: float = microseconds(calls)[0]
    return taken


def random_weight(rows: int, columns: int, device: torch.device, seed: int) -> QuantizedTensor:
    generator = torch.Generator(device).manual_seed(seed)
    codes = torch.randint(0, 16, (rows, columns), dtype=torch.uint8, device=device, generator=generator)
    groups = -(-columns // GROUP)
    scales = 0.005 + 0.01 * torch.rand(rows, groups, device=device, generator=generator)
    zeros = torch.randint(4, 12, (rows, groups), dtype=torch.uint8, device=device, generator=generator)
    return QuantizedTensor(codes, scales.half(), zeros, BITS, GROUP)


def gptq(setting: Setting, rows: int, columns: int) -> list[Row]:
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

    def factor() -> Factor:
        return factorize(hessian.clone(), 0.0, 0.01, "benchmark")

    unit = factor().unit_upper
    form = next(form for form in ops.implementations("gptq_sweep") if form.backend == "triton")

    def sweep() -> Tensor:
        codes: Tensor = form.function(weight, unit, scales, zeros, group_of, BITS)
        return codes

    def loop() -> Tensor:
        return reference.gptq_sweep(weight, unit, scales, zeros, group_of, BITS)

    ours, theirs = sweep(), loop()
    different = float((ours != theirs).float().mean())
    errors = [output_loss(codes, weight, hessian, scales, zeros, group_of) for codes in (ours, theirs)]
    assert different < 2e-3, f"{different:.2%} of the codes differ from the reference"
    assert abs(errors[0] / errors[1] - 1) < 1e-3, f"output error {errors[0]:.6g}, reference {errors[1]:.6g}"
    row: Row = {"N": rows, "K": columns, "codes that differ": different, "error / reference": errors[0] / errors[1]}
    if not setting.timed:
        return [row]
    row["sweep ms"] = milliseconds(sweep)
    row["factor ms"] = milliseconds(factor)
    row["factor, blocked ms"] = milliseconds(lambda: next(iter(ops.implementations("cholesky"))).function(hessian))
    row["torch columns ms"] = milliseconds(loop, repeats=1)
    try:
        solver = rivals.llm_compressor()
        for name, disabled in (("llm-compressor ms", "0"), ("llm-compressor without its Triton ms", "1")):
            os.environ["LLMCOMPRESSOR_DISABLE_GPTQ_TRITON"] = disabled
            row[name] = milliseconds(lambda: solver(weight.clone(), hessian.clone()), repeats=2)
    except rivals.Absent as reason:
        setting.absent["llm-compressor"] = str(reason)
    except Exception as failure:
        setting.absent["llm-compressor"] = f"failed: {str(failure).splitlines()[:1]}"
    return [row]


def output_loss(
    codes: Tensor, weight: Tensor, hessian: Tensor, scales: Tensor, zeros: Tensor, group_of: Tensor
) -> float:
    """tr(D H Dᵀ) of what the codes stand for."""
    place = group_of.long()
    change = (codes.float() - zeros[:, place]) * scales[:, place] - weight
    return float(((change @ hessian).double() * change.double()).sum())


def gram(setting: Setting, count: int, columns: int, targets: int) -> list[Row]:
    """H, or H and C, of bf16 rows: every registered form against calls of torch.addmm with fp32 results."""
    count, columns = setting.shape(count, columns)
    targets = setting.shape(targets)[0] if targets else 0
    device = setting.device
    x = torch.randn(count, columns, device=device, dtype=torch.bfloat16)
    target = torch.randn(count, targets, device=device, dtype=torch.bfloat16) if targets else None
    sums = [torch.zeros(columns, columns, device=device), torch.zeros(columns, device=device)]
    crossed: list[Tensor | None] = [None, None]
    if targets:
        crossed = [torch.zeros(targets, columns, device=device), torch.zeros(targets, device=device)]
    row: Row = {"tokens": count, "K": columns, "P": targets}
    forms = {form.backend: form for form in ops.implementations("accumulate") if form.backend in ("cuda", "triton")}
    if "cuda" not in forms:
        setting.absent["CUDA form of accumulate"] = "the extension is not built with EPMQ_CUDA=1"
    for form in forms.values():
        if form.backend == "cuda" and device.type != "cuda":
            continue
        call = partial(form.function, x, *sums, target, *crossed)
        for tensor in (*sums, *crossed):
            if tensor is not None:
                tensor.zero_()
        call()
        some = torch.arange(0, columns, max(1, columns // 16), device=device)
        wide = x[:, some].double()
        wanted = (wide.T @ wide).tril()
        error = relative(sums[0][some][:, some].tril(), wanted)
        if target is not None and crossed[0] is not None:
            error = max(error, relative(crossed[0][:, some], target.double().T @ wide))
        assert error < 1e-5, f"{form.backend}: relative error {error:.2g}"
        row[f"{form.backend} error"] = error
        if setting.timed:
            row[f"{form.backend} ms"] = milliseconds(call)
            work = 2.0 * count * columns * (columns / 2 + targets)
            row[f"{form.backend} of bf16 peak"] = setting.share(
                work, 1e3 * row[f"{form.backend} ms"], "bfloat16_tflop_s"
            )
            if form.backend == "triton":
                # What the choice of a plan reckons with.
                for plan in (Plan(128, 8192), Plan(256, 8192)):
                    row[f"triton, tiles of {plan.across} ms"] = milliseconds(partial(call, chosen=plan))
    if setting.timed:

        def two_products() -> None:
            torch.addmm(sums[0], x.T, x, out_dtype=torch.float32)
            if target is not None and crossed[0] is not None:
                torch.addmm(crossed[0], target.T, x, out_dtype=torch.float32)

        row["torch.addmm ms"] = milliseconds(two_products)
    return [row]


def block(setting: Setting, forward: str) -> list[Row]:
    """Calibration, solve and rounding of one block with eight experts: seconds, and the most GPU memory at one time."""
    from gpu.llama import random_job

    import epmq

    job = random_job(setting.tiny)
    config = epmq.QuantConfig(diagnostics=False, group_size=GROUP, forward_dtype=forward)
    if setting.timed:
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    result = epmq.quantize(job.merged, job.experts, job.calibration, config, device=setting.device)
    seconds = time.perf_counter() - started
    assert len(result.report["layers"]) == 7, "not every linear of the block was quantized"
    errors = [error for methods in result.report["average_error"].values() for error in [methods["epmq"]]]
    assert all(0.0 <= error < 1.0 for error in errors), f"output errors {errors}"
    row: Row = {"forward": forward, "experts": len(job.experts), "tokens per expert": job.tokens, "width": job.width}
    if setting.timed:
        row["seconds"] = seconds
        row["peak GPU GiB"] = torch.cuda.max_memory_allocated() / 2**30
        row |= {f"{name} s": spent for name, spent in block_seconds(result.report).items()}
    return [row]


def block_seconds(report: dict[str, Any]) -> dict[str, float]:
    """Seconds of the block's groups by the linear that names them."""
    return {layer["linear"].rsplit(".", 1)[1]: layer["seconds"] for layer in report["layers"]}
