"""What the suite measures. An item yields its row as soon as our own numbers stand in it, and again as it grows: what
a rival does afterwards cannot lose them. A row whose check fails is kept, and says so under ``failed``."""

from __future__ import annotations

import functools
import math
import os
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from unittest import mock

import torch
from gpu import rivals
from gpu.timing import clocks, launch_microseconds, milliseconds
from torch import Tensor

from epmq import QuantLinear, ops, reference
from epmq.kernels import gptq_block
from epmq.kernels import gram as moments
from epmq.kernels.gram import Plan
from epmq.kernels.int4_matmul import int4_matmul
from epmq.kernels.int4_matmul import run as run_tiles
from epmq.kernels.layout import PackedWeight, pack_weight
from epmq.kernels.timing import Call, copies_needed, microseconds, replayed
from epmq.kernels.timing import milliseconds as product_milliseconds
from epmq.kernels.tune import AHEAD, Config, candidates, choose, device_facts, device_key
from epmq.quantized import QuantizedTensor, column_groups
from epmq.solve import Factor, factorize

Row = dict[str, Any]
PARTS = ("int4", "launch", "gram", "gptq", "block", "tiles")
# Every program that is chosen by their number, and every number that a goal is set for.
TOKENS = (1, 4, 16, 32, 64, 128, 256, 512, 1024, 2048, 8192)
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
LAUNCHED = ("llama-3-8b o", "clip-vit-l fc2")
TILED = ("llama-3-8b o", "llama-3-8b gate+up", "llama-3-70b o", "clip-vit-l fc1")
TILED_TOKENS = (8, 16, 64, 256, 1024, 2048)
SWEEPS = ((4096, 4096), (14336, 4096), (4096, 14336))
GRAMS = ((32768, 4096, 0), (32768, 14336, 0), (32768, 4096, 4096), (32768, 14336, 4096))
GROUP, BITS = 128, 4
NUMBER_SECONDS = 0.2  # that most numbers are allowed to take; there are hundreds
CUDA_FORM_ROWS = 2048  # of a launch of csrc/cuda/statistics.cu


@dataclass
class Setting:
    """Where and how large: ``tiny`` shrinks every shape, for a run that need not have a GPU; only ``timed`` times."""

    device: torch.device
    tiny: bool
    limits: dict[str, float]
    absent: dict[str, str]
    timed: bool = False

    def shape(self, *sizes: int, least: int = 32) -> tuple[int, ...]:
        return tuple(max(least, size // 512 // 16 * 16) if self.tiny else size for size in sizes)

    def share(self, amount: float, taken_us: float, limit: str) -> float | None:
        """Which share of this card's rate (in units of 1e12 a second) a call reaches."""
        return amount / taken_us / 1e6 / self.limits[limit] if limit in self.limits else None

    def attempt(self, name: str, measure: Callable[[], float]) -> float | None:
        """The number that ``measure`` gives; None, with the reason kept, of a rival that is absent or fails."""
        try:
            return measure()
        except rivals.Absent as reason:
            self.absent.setdefault(name, str(reason))
        except Exception as failure:  # whatever a rival throws is a fact about the rival
            traceback.print_exc()
            self.absent[name] = f"failed: {type(failure).__name__}: {str(failure).splitlines()[:1]}"
            if self.device.type == "cuda":
                torch.cuda.synchronize()  # raises where nothing can run after it
        return None


def items(setting: Setting) -> dict[str, Callable[[], Iterator[Row]]]:
    """Every item by name, in the order they are run; a name begins with its part."""
    made: dict[str, Callable[[], Iterator[Row]]] = {}
    for layer, (rows, columns) in LAYERS.items():
        for tokens in TOKENS:
            made[f"int4 {layer} {rows}x{columns} M={tokens}"] = partial(int4, setting, layer, rows, columns, tokens)
    for layer in LAUNCHED:
        made[f"launch {layer}"] = partial(launch, setting, layer, *LAYERS[layer])
    for count, columns, targets in GRAMS:
        name = f"gram {count} tokens K={columns}" + (f" P={targets}" if targets else "")
        made[name] = partial(gram, setting, count, columns, targets)
    for rows, columns in SWEEPS:
        made[f"gptq {rows}x{columns}"] = partial(gptq, setting, rows, columns)
    for forward in ("bfloat16", "float32"):
        made[f"block llama-3-8b, eight experts, {forward}"] = partial(block, setting, forward)
    for layer in TILED:
        for tokens in TILED_TOKENS:
            made[f"tiles {layer} M={tokens}"] = partial(tiles, setting, layer, *LAYERS[layer], tokens)
    return made


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def expect(row: Row, holds: bool, otherwise: str) -> None:
    """Write into a row that a check of it failed."""
    if not holds:
        row["failed"] = f"{row['failed']}; {otherwise}" if "failed" in row else otherwise


# ---- the int4 product ------------------------------------------------------------------------------------------------


def int4(setting: Setting, layer: str, rows: int, columns: int, tokens: int) -> Iterator[Row]:
    """Fused int4 product against dense and other int4 products: fp16, and bf16 where a rival knows only that."""
    rows, columns = setting.shape(rows, columns, least=128)
    weights, packed, wide = layer_weights(rows, columns, setting.device)
    x = torch.randn(tokens, columns, device=setting.device, dtype=torch.float16)
    calls: list[Call] = [partial(int4_matmul, x, weight, None) for weight in packed]
    y = int4_matmul(x, packed[0], None)
    error = relative(y, x.float() @ wide.T)
    row: Row = {"layer": layer, "N": rows, "K": columns, "M": tokens, "error": error}
    expect(row, error < 2e-3, f"relative error {error:.2g}")
    if not setting.timed:
        yield row
        return
    row["epmq µs"], row["taken by"] = microseconds(calls, NUMBER_SECONDS)
    row["clocks"] = clocks()
    chosen = choose(device_key(setting.device, rows, columns, tokens, GROUP, torch.float16))
    if not chosen.two_stages:
        early = replace(chosen, ahead=AHEAD)
        begun: list[Call] = [partial(run_tiles, x, w.words, w.scale_words, None, rows, GROUP, early) for w in packed]
        expect(row, relative(begun[0](), y) < 1e-6, "begun early it gives another product")
        row["begun early µs"] = setting.attempt("int4 begun early", lambda: microseconds(begun, NUMBER_SECONDS)[0])
    size = rows * columns / 2 + 4 * rows * columns / GROUP + 2 * tokens * (rows + columns)
    row["of copy rate"] = setting.share(size, row["epmq µs"], "copy_tb_s")
    row["of bf16 peak"] = setting.share(2.0 * tokens * rows * columns, row["epmq µs"], "bfloat16_tflop_s")
    yield row
    expect(row, torch.equal(replayed(partial(int4_matmul, x, packed[0], None)), y), "a graph gives other bits")
    yield row
    for name, make in rivals.PRODUCTS.items():
        if rivals.measured(name, rows, columns, tokens):
            row[f"{name} µs"] = rival_time(setting, name, make, x, weights, wide)
            rivals.failures[name] += row[f"{name} µs"] is None
            yield row


def tiles(setting: Setting, layer: str, rows: int, columns: int, tokens: int) -> Iterator[Row]:
    """Every way to cut the int4 product that ``epmq tune`` would try, beside the one that is chosen untried."""
    rows, columns = setting.shape(rows, columns, least=128)
    key = device_key(setting.device, rows, columns, tokens, GROUP, torch.float16)
    chosen, *others = candidates(key)
    row: Row = {"layer": layer, "N": rows, "K": columns, "M": key.tokens, "others": len(others)}
    if not setting.timed:
        weight = random_weight(rows, columns, setting.device, 0)
        packed, x = pack_weight(weight, torch.float16), torch.randn(min(tokens, 64), columns).half().to(setting.device)
        for config in (chosen, *others):
            found = run_tiles(x, packed.words, packed.scale_words, None, rows, GROUP, config)
            error = relative(found, x.float() @ weight.dequantize(torch.float32).T)
            expect(row, error < 2e-3, f"{told(config)}: relative error {error:.2g}")
        yield row
        return
    times: dict[Config, float] = {}
    for config in (choose(key), chosen, *others):
        if config not in times:
            timed = partial(product_milliseconds, key, config, seconds=0.05)
            found_ms = setting.attempt(f"int4 in {told(config)}", timed)
            times[config] = math.inf if found_ms is None else 1e3 * found_ms
    row |= {"chosen": told(choose(key)), "chosen µs": times[choose(key)]}
    for how, early in (("fastest", False), ("fastest begun early", True)):
        best = min((config for config in times if (config.ahead > 0) == early), key=lambda c: times[c], default=None)
        if best is not None:
            row |= {how: told(best), f"{how} µs": times[best]}
    yield row


def told(config: Config) -> str:
    if config.two_stages:
        return "dequantized, cuBLAS"
    tile = f"{config.block_m}x{config.block_n}, {config.warps} warps, {config.stages} stages"
    parts = f"{config.split_k} parts{', joined' if config.joined else ''}"
    return f"{tile}, {parts}" + (f", {config.ahead} steps ahead" if config.ahead else "")


@functools.lru_cache(maxsize=1)
def layer_weights(
    rows: int, columns: int, device: torch.device
) -> tuple[list[QuantizedTensor], list[PackedWeight], Tensor]:
    """As many weights as exceed the cache, their packed forms, and the first one in fp32."""
    weights = [random_weight(rows, columns, device, seed) for seed in range(copies_needed(rows * columns // 2, device))]
    return weights, [pack_weight(weight, torch.float16) for weight in weights], weights[0].dequantize(torch.float32)


def rival_time(
    setting: Setting, name: str, make: rivals.Multiply, x: Tensor, weights: list[QuantizedTensor], wide: Tensor
) -> float | None:
    """Time of a rival whose product is right; None, with the reason kept, of one that is absent or wrong."""
    x = x.bfloat16() if name == "tinygemm" else x
    few = weights[: copies_needed(wide.numel() * 2, setting.device)] if name == "cublas" else weights

    def measure() -> float:
        calls = [make(x, weight) for weight in few]
        error = relative(calls[0](), x.float() @ wide.T)
        if error > 2e-2:
            raise ArithmeticError(f"wrong result at {len(x)} tokens, relative error {error:.2g}")
        taken: float = microseconds(calls, NUMBER_SECONDS)[0]
        return taken

    return setting.attempt(name, measure)


def random_weight(rows: int, columns: int, device: torch.device, seed: int) -> QuantizedTensor:
    generator = torch.Generator(device).manual_seed(seed)
    codes = torch.randint(0, 16, (rows, columns), dtype=torch.uint8, device=device, generator=generator)
    groups = -(-columns // GROUP)
    scales = 0.005 + 0.01 * torch.rand(rows, groups, device=device, generator=generator)
    zeros = torch.randint(4, 12, (rows, groups), dtype=torch.uint8, device=device, generator=generator)
    return QuantizedTensor(codes, scales.half(), zeros, BITS, GROUP)


def launch(setting: Setting, layer: str, rows: int, columns: int) -> Iterator[Row]:
    """One token through a QuantLinear: what a call costs from Python, in a graph and compiled, beside nn.Linear."""
    rows, columns = setting.shape(rows, columns, least=128)
    tensor = random_weight(rows, columns, setting.device, 0)
    module, x = QuantLinear.from_quantized(tensor, None), torch.randn(1, columns, device=setting.device).half()

    @torch.inference_mode()
    def from_python(layer: Callable[[Tensor], Tensor]) -> float:
        return launch_microseconds(partial(layer, x))

    with torch.inference_mode():
        error = relative(module(x), x.float() @ tensor.dequantize(torch.float32).T)
    row: Row = {"layer": layer, "N": rows, "K": columns, "M": 1, "error": error}
    expect(row, error < 2e-3, f"relative error {error:.2g}")
    if not setting.timed:
        yield row
        return
    row["from Python µs"] = from_python(module)
    yield row
    with torch.inference_mode():
        row["in a graph µs"] = microseconds([partial(module, x)])[0]
    dense = torch.nn.Linear(columns, rows, bias=False, device=setting.device, dtype=torch.float16)
    row["nn.Linear from Python µs"] = from_python(dense)
    yield row
    row["compiled, from Python µs"] = setting.attempt(
        "torch.compile of QuantLinear", lambda: from_python(torch.compile(module))
    )
    yield row


# ---- second moments --------------------------------------------------------------------------------------------------


def drift(rows: int) -> float:
    """How far a sum over so many rows on tensor cores may be off, relative to itself, without being wrong.

    They do not round to nearest. A step of 16 rows takes in 16 products; products and running sum are cut off behind
    the last place of the largest of them (sm_90: two binary places further on; sm_80: one, in two steps of 8), and so
    is their sum. With u the last place of the running sum, at most 2⁻²³ of it, a step loses at most 16 u/4 + u = 5 u on
    sm_90 and 2 (8 u/2 + u) = 10 u on sm_80, half of that on the mean; hundreds of steps are near their mean: 5 · 2⁻²³
    of the running sum for 16 rows. Over all steps the running sum is on the mean 1/2 of the last one where products
    have one sign, and 1/√3 of it, root mean square, where they have either. Adding the parts rounds to nearest.
    """
    return rows / 16 * 5 * 2.0**-23 / math.sqrt(3) + 2.0**-23


def gram(setting: Setting, count: int, columns: int, targets: int) -> Iterator[Row]:
    """H, or H and C, of bf16 rows: every registered form against calls of torch.addmm with fp32 results.

    Small integers have moments that no rounding changes: these must be exact. Those of normal numbers may drift.
    """
    count, columns = setting.shape(count, columns)
    targets = setting.shape(targets)[0] if targets else 0
    device = setting.device
    sums = [torch.zeros(columns, columns, device=device), torch.zeros(columns, device=device)]
    crossed: list[Tensor | None] = [None, None]
    if targets:
        crossed = [torch.zeros(targets, columns, device=device), torch.zeros(targets, device=device)]
    some = torch.arange(0, columns, max(1, columns // 16), device=device)

    def errors(function: Callable[..., None], x: Tensor, target: Tensor | None) -> list[float]:
        """Relative errors of some columns of H, and of C."""
        for tensor in (*sums, *crossed):
            if tensor is not None:
                tensor.zero_()
        function(x, *sums, target, *crossed)
        wide = x[:, some].double()
        found = [relative(sums[0][some][:, some].tril(), (wide.T @ wide).tril())]
        if target is not None and crossed[0] is not None:
            found.append(relative(crossed[0][:, some], target.double().T @ wide))
        return found

    def taken(call: Call) -> float:
        each: float = microseconds([call], NUMBER_SECONDS)[0]
        return each / 1e3

    def drawn(whole: bool, width: int) -> Tensor:
        if whole:
            return torch.randint(-2, 3, (count, width), device=device).bfloat16()
        return torch.randn(count, width, device=device, dtype=torch.bfloat16)

    forms = {form.backend: form for form in ops.implementations("accumulate") if form.backend in ("cuda", "triton")}
    if "cuda" not in forms:
        setting.absent["CUDA form of accumulate"] = "the extension is not built with EPMQ_CUDA=1"
    if device.type != "cuda":
        forms.pop("cuda", None)
    rows_of = {
        "cuda": CUDA_FORM_ROWS,
        "triton": moments.plan(*device_facts(device), count, columns, targets, torch.bfloat16).rows,
    }
    row: Row = {"tokens": count, "K": columns, "P": targets}
    whole = drawn(True, columns), drawn(True, targets) if targets else None
    for name, form in forms.items():
        exact = errors(form.function, *whole)
        expect(row, not any(exact), f"{name}: moments of small integers have a relative error of {max(exact):.2g}")
    del whole
    x, target = drawn(False, columns), drawn(False, targets) if targets else None
    for name, form in sorted(forms.items(), reverse=True):
        error, limit = max(errors(form.function, x, target)), drift(min(count, rows_of[name]))
        row[f"{name} error"] = error
        expect(row, error < limit, f"{name}: relative error {error:.2g}, at most {limit:.2g} is drift")
        if setting.timed:
            call = partial(form.function, x, *sums, target, *crossed)
            row[f"{name} ms"] = taken(call)
            work = 2.0 * count * columns * (columns / 2 + targets)
            row[f"{name} of bf16 peak"] = setting.share(work, 1e3 * row[f"{name} ms"], "bfloat16_tflop_s")
            row["clocks"] = clocks()
            yield row
            if name == "triton":
                # What the choice of a plan reckons with.
                longest = moments.most_rows(device_facts(device)[0], torch.bfloat16)
                plans = {f"tiles of {across}, uncut": Plan(across, longest) for across in (128, 256)}
                plans |= {f"bands of {band}": Plan(256, longest, band=band) for band in (2, 8, 32)}
                for how, chosen in plans.items():
                    timed = partial(call, chosen=chosen)
                    row[f"triton, {how} ms"] = setting.attempt(f"gram in {how}", partial(taken, timed))
        yield row
    if setting.timed:

        def two_products() -> None:
            torch.addmm(sums[0], x.T, x, out_dtype=torch.float32)
            if target is not None and crossed[0] is not None:
                torch.addmm(crossed[0], target.T, x, out_dtype=torch.float32)

        row["torch.addmm ms"] = setting.attempt("torch.addmm", partial(taken, two_products))
        yield row


# ---- GPTQ ------------------------------------------------------------------------------------------------------------


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


# ---- a whole block ---------------------------------------------------------------------------------------------------


def block(setting: Setting, forward: str) -> Iterator[Row]:
    """Calibration, solve and rounding of one block with eight experts: seconds, and the most GPU memory at one time.

    Twice: the first time kernels are compiled, libraries loaded and memory taken, once for all blocks of a model. And
    once more to tell what the seconds go to.
    """
    from gpu.llama import random_job

    import epmq

    job = random_job(setting.tiny, setting.device)
    config = epmq.QuantConfig(diagnostics=False, group_size=GROUP, forward_dtype=forward)

    def timed() -> tuple[epmq.QuantResult, float]:
        started = time.perf_counter()
        result = epmq.quantize(job.merged, job.experts, job.calibration, config, device=setting.device)
        return result, time.perf_counter() - started

    row: Row = {"forward": forward, "experts": len(job.experts), "tokens per expert": job.tokens, "width": job.width}
    result, seconds = timed()
    if setting.timed:
        row["first time s"] = seconds
        yield row
        torch.cuda.reset_peak_memory_stats()
        result, row["seconds"] = timed()
        row["peak GPU GiB"] = torch.cuda.max_memory_allocated() / 2**30
        row |= {f"{name} s": spent for name, spent in block_seconds(result.report).items()}
    expect(row, len(result.report["layers"]) == 7, "not every linear of the block was quantized")
    errors = [methods["epmq"] for methods in result.report["average_error"].values()]
    expect(row, all(0.0 <= error < 1.0 for error in errors), f"output errors {errors}")
    yield row
    if setting.timed:
        row |= {f"{kind} s": spent for kind, spent in seconds_by_kind(setting.device, timed).items()}
        yield row


def seconds_by_kind(device: torch.device, run: Callable[[], Any]) -> dict[str, float]:
    """Seconds of a run by kind of work, and all of them.

    The GPU is waited for before and after each piece, so that none pays for another: they are more in all than those of
    a run left alone, where the processor is ahead.
    """
    from epmq import engine
    from epmq.calls import BlockCall
    from epmq.statistics import Folded, TaskStatistics
    from epmq.visit import Visit
    from epmq.walk import Walk

    kinds: dict[str, list[tuple[Any, str]]] = {
        "statistics": [(TaskStatistics, "__init__"), (TaskStatistics, "add"), (TaskStatistics, "over")],
        "fold": [(Folded, "fold")],
        "solve and sweep": [(engine, "quantize_group")],
        "loading": [(Walk, "load"), (Visit, "read")],
        "forward": [(BlockCall, "run")],
    }
    spent = dict.fromkeys(kinds, 0.0)

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    def clocked(kind: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            started = now()
            try:
                return function(*args, **kwargs)
            finally:  # a forward pass may end where what was asked for is there
                spent[kind] += now() - started

        return call

    with ExitStack() as stack:
        for kind, places in kinds.items():
            for owner, name in places:
                stack.enter_context(mock.patch.object(owner, name, clocked(kind, getattr(owner, name))))
        started = now()
        run()
        spent["all, piece by piece"] = now() - started
    return spent


def block_seconds(report: dict[str, Any]) -> dict[str, float]:
    """Seconds of the block's groups by the linear that names them."""
    return {layer["linear"].rsplit(".", 1)[1]: layer["seconds"] for layer in report["layers"]}
