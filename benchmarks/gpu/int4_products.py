"""The int4 product beside rivals, the ways to cut it, and what a call of QuantLinear costs."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
from gpu import rivals
from gpu.setting import BITS, GROUP, NUMBER_SECONDS, Row, Setting, expect, relative
from gpu.timing import clocks, launch_microseconds
from torch import Tensor

from epmq import QuantLinear
from epmq.kernels.int4_launch import run as run_tiles
from epmq.kernels.int4_matmul import int4_matmul
from epmq.kernels.layout import PackedWeight, pack_weight
from epmq.kernels.timing import Call, copies_needed, microseconds, replayed
from epmq.kernels.timing import milliseconds as product_milliseconds
from epmq.kernels.tune import Config, Key, choose, device_key, timed
from epmq.quantized import QuantizedTensor

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
    rows, columns = setting.shape(rows, columns, least=512)
    key = device_key(setting.device, rows, columns, tokens, GROUP, torch.float16)
    row: Row = {"layer": layer, "N": rows, "K": columns, "M": key.tokens}
    if not setting.timed:
        weight = random_weight(rows, columns, setting.device, 0)
        packed, x = pack_weight(weight, torch.float16), torch.randn(min(tokens, 64), columns).half().to(setting.device)
        wanted = x.float() @ weight.dequantize(torch.float32).T

        def checked(key: Key, config: Config) -> float:
            found = run_tiles(x, packed.words, packed.scale_words, None, rows, GROUP, config)
            error = relative(found, wanted)
            expect(row, error < 2e-3, f"{told(config)}: relative error {error:.2g}")
            return 0.0

        row["others"] = len(timed(key, checked)) - 1
        yield row
        return

    chosen = choose(key)
    micro: dict[str, float | None] = {}
    row |= {"chosen": told(chosen), "chosen µs": None, "fastest": None, "fastest µs": None, "all µs": micro}
    yield row

    def milliseconds(key: Key, config: Config) -> float:
        measure = partial(product_milliseconds, key, config, seconds=0.05)
        found = setting.attempt(f"int4 in {told(config)}", measure)
        micro[told(config)] = None if found is None else 1e3 * found
        if config.one_launch and found is not None:
            expect(row, one_launch_is_right(setting, key, config), f"{told(config)}: other bits than in two launches")
        return math.inf if found is None else found

    times = timed(key, milliseconds)
    if chosen not in times:
        times[chosen] = milliseconds(key, chosen)
    best = min(times, key=lambda config: times[config])
    row |= {"others": len(times) - 1, "fastest": told(best), "fastest µs": micro[told(best)]}
    row["chosen µs"] = micro[told(chosen)]
    yield row


def one_launch_is_right(setting: Setting, key: Key, config: Config) -> bool:
    """Whether parts summed in one launch have the bits of two, where the memory for parts held NaN before; thrice."""
    weight = packed_weight(key.out_features, key.in_features, setting.device)
    two = replace(config, one_launch=False)
    for _ in range(3):
        x = torch.randn(key.tokens, key.in_features, device=setting.device, dtype=torch.float16)
        found = []
        for way in (two, config):
            torch.full((config.split_k, key.tokens, key.out_features), math.nan, device=setting.device)
            found.append(run_tiles(x, weight.words, weight.scale_words, None, key.out_features, GROUP, way))
        if not torch.equal(*found):
            return False
    return True


def told(config: Config) -> str:
    if config.two_stages:
        return "dequantized, cuBLAS"
    tile = f"{config.block_m}x{config.block_n}, {config.warps} warps, {config.stages} stages"
    tile += f", {config.registers} registers" if config.registers else ""
    tile += f", {config.split_k} parts{' in one launch' if config.one_launch else ''}"
    return f"{tile}{', joined' if config.joined else ''}"


@functools.lru_cache(maxsize=1)
def packed_weight(rows: int, columns: int, device: torch.device) -> PackedWeight:
    packed: PackedWeight = pack_weight(random_weight(rows, columns, device, 0), torch.float16)
    return packed


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
