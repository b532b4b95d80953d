"""The int4 product's gates: which of its tiles are compiled, and the limits of each."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

from machine_code import ARCHS, Counts, Gate, Program, Unbuilt, build, common_faults, count
from naive_int4 import naive_product

from epmq.kernels import tune
from epmq.kernels.int4_programs import dequantize_tiles, product_tiles, sum_parts
from epmq.kernels.tune import Config

GROUPS = (0, 32, 64, 128)  # 0: one scale a row
# Instructions per weight of 8 tokens by 128 rows, by group, with HMMA and with HGMMA as the tensor instruction.
DECODE_LIMITS = {128: (2.75, 3.1), 64: (2.9, 3.2), 32: (3.0, 3.3), 0: (2.2, 2.5)}
# Spill instructions outside of the loop: with Triton 3.9 two or three numbers of the large tile's last part wait for it
# on the stack, once a program.
SPILLED_OUTSIDE = {(90, 128, 128): 8}
# Of large tiles, by architecture, tokens and rows.
TILE_LIMITS = {(90, 64, 128): 3.2, (90, 128, 128): 3.9, (80, 64, 128): 4.0}


def gates(everything: bool) -> Iterator[Unbuilt]:
    """The tiles of the shipped choice (groups of 128, and all groups at 8 tokens) and those that are only tried (three
    programs a multiprocessor, parts summed in one launch); with ``everything`` every tile, dtype and group, and beside
    some the naive layout, which has no limits."""
    for arch in ARCHS:
        for config in tune.shapes(arch):
            for dtype in ("fp16", "bf16"):
                for group in GROUPS:
                    if config not in tune.shapes(arch, group):
                        continue
                    shown = is_main(arch, dtype, group, config)
                    if everything or shown:
                        yield partial(product_gate, arch, dtype, group, config, shown)
                    if everything and group == 128:
                        one = replace(config, one_launch=True)
                        yield partial(
                            product_gate, arch, dtype, group, one, shown and dtype == "fp16", " in one launch"
                        )
            if everything and config.block_m in (16, 64, 128) and is_main(arch, "fp16", 128, config):
                yield partial(naive_gate, arch, config)
        for dtype, group in itertools.product(("fp16", "bf16"), GROUPS):
            for config in tune.trials(arch, group, dtype):
                shown = is_main(arch, dtype, group, config)
                if everything or shown:
                    yield partial(product_gate, arch, dtype, group, config, shown, " in threes")
        yield partial(other_gate, arch, "sum_parts")
        yield partial(other_gate, arch, "dequantize_tiles")


def is_main(arch: int, dtype: str, group: int, config: Config) -> bool:
    wide = config.block_n == 128
    dearest = dtype == "bf16" and group == 32 and (arch, config.block_m, config.block_n) in TILE_LIMITS
    return wide and (group == 128 or config.block_m == 8 or dearest)


def product_gate(arch: int, dtype: str, group: int, config: Config, shown: bool, more: str = "") -> Gate:
    """The tile program of a configuration, as launched with several parts where it is small."""
    split = config.block_m <= 64 or config.one_launch
    types = {"x": f"*{dtype}", "words": "*i16", "scales": "*i32", "bias": f"*{dtype}"}
    types |= {"out": f"*{dtype}", "sums": "*fp32", "arrived": "*i32"}
    constants = {"BM": config.block_m, "BN": config.block_n, "GROUP": group, "SPLIT": split, "LAST": config.one_launch}
    constants |= {"sums": None} if not split else {}
    constants |= {"arrived": None} if not config.one_launch else {}
    constants |= {
        "BIAS": config.one_launch or not split,
        "JOINED": config.joined,
        "SWIZZLE": 1 if split else 8,
        "EARLY": split and not config.one_launch and arch >= 90,
        "ASM": True,
        "WIDE": False,
    }
    program = build(product_tiles, arch, types, constants, ("M", "KB", "blocks_per_part"), config.options())
    counts = count_weights(program, config)
    name = f"int4 sm_{arch} {dtype} g{group} {config.block_m}x{config.block_n}{more}"
    shape = (config.block_m, config.block_n)
    limit = DECODE_LIMITS[group][counts.tensor == "HGMMA"] if shape == (8, 128) else TILE_LIMITS.get((arch, *shape))
    faults = common_faults(program, arch, program.loop_with("HMMA", "HGMMA"), SPILLED_OUTSIDE.get((arch, *shape), 0))
    faults += broken(counts, program.serialized, arch, config)
    if limit is not None and counts.each > limit:
        faults.append(f"{counts.each:.2f} instructions per weight, limit {limit}")
    return Gate(name, counts, faults, limit, shown)


def broken(counts: Counts, serialized: bool, arch: int, config: Config) -> list[str]:
    """Sentences for each limit of the loop that a tile breaks."""
    faults = []
    if counts.conversions or counts.permutes > 4 or counts.stores or counts.loads:
        faults.append(
            f"in the loop {counts.conversions} conversions, {counts.permutes} permutes (4 allowed), {counts.stores} "
            f"shared stores, {counts.loads} synchronous loads"
        )
    wanted = config.block_n // (8 * config.warps)
    if counts.wide_copies < wanted:
        faults.append(f"{counts.wide_copies} copies of 16 bytes, {wanted} are needed for the weights")
    if serialized or counts.waits > (1 if config.joined else 4):
        faults.append(f"wgmma is serialized ({counts.waits} waits)")
    allowed = {"HMMA"} if arch < 90 else {"HGMMA"} if config.block_m >= 16 else {"HGMMA", "HMMA"}
    return faults if counts.tensor in allowed else [*faults, f"tensor instruction {counts.tensor}"]


def naive_gate(arch: int, config: Config) -> Gate:
    """The naive kernel with the same tile; its products need 16 tokens at least."""
    types = {"x": "*fp16", "words": "*i32", "scales": "*fp16", "origins": "*i8", "out": "*fp16"}
    constants = {"BM": max(16, config.block_m), "BN": config.block_n}
    program = build(naive_product, arch, types, constants, ("M",), config.options())
    return Gate(f"naive int4 sm_{arch} fp16 g128 {config.block_m}x{config.block_n}", count_weights(program, config), [])


def count_weights(program: Program, config: Config) -> Counts:
    """Counts of the loop over columns, which takes 128 of them a turn."""
    loop = program.loop_with("HMMA", "HGMMA")
    weights = config.block_n * 128 / (32 * config.warps)
    return count(program, loop, round(len(program.part(loop)) / weights, 3))


def other_gate(arch: int, name: str) -> Gate:
    """A kernel that only moves memory: besides the common limits, all that it writes goes 16 bytes at a time."""
    parts = {"parts": "*fp32", "bias": "*fp16", "out": "*fp16"}
    tiles = {"words": "*i16", "scales": "*i32", "out": "*bf16"}
    early = {"SPLITS": 8, "BIAS": True, "EARLY": arch >= 90, "WIDE": False, "BLOCK": 1024}
    kernel, types, constants, unaligned = {
        "sum_parts": (sum_parts, parts, early, ("M",)),
        "dequantize_tiles": (dequantize_tiles, tiles, {"GROUP": 128, "ASM": True, "WIDE": False}, ("N", "KB")),
    }[name]
    options = {"num_warps": 4, "num_stages": 3, "enable_fp_fusion": False}
    program = build(kernel, arch, types, constants, unaligned, options)
    counts = count(program, None, len(program.operations))
    faults = common_faults(program, arch)
    narrow = [code for code in program.operations if code.startswith("STG") and not code.endswith("128")]
    if narrow or counts.stores:
        faults.append(f"{len(narrow)} stores of less than 16 bytes, {counts.stores} to shared memory")
    return Gate(f"int4 sm_{arch} {name}", counts, faults)
