"""The gates of the GPTQ sweep and the second moments: one kernel each, compiled as its launcher does."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from machine_code import ARCHS, Gate, Unbuilt, build, common_faults, count

from epmq.kernels import gptq_block, gram, gram_programs

MOST_PER_COLUMN = 270


def gates(everything: bool) -> Iterator[Unbuilt]:
    """Both kernels on every architecture; there is nothing more to ask for with ``everything``."""
    for arch in ARCHS:
        for rows in (32, 64, 128):
            yield partial(gptq_gate, arch, rows)
    for arch in ARCHS:
        for dtype in ("bf16", "fp16"):
            yield partial(gram_gate, arch, dtype, False, False)
        if arch >= 90:
            yield partial(gram_gate, arch, "bf16", False, False, 2 * gram.TILE)
        yield partial(gram_gate, arch, "fp32", True, False)
        yield partial(gram_gate, arch, "bf16", True, True)


def gptq_gate(arch: int, rows: int = gptq_block.LINE) -> Gate:
    """The block kernel; instructions per column as executed over a whole block, inner loops included."""
    pointers = dict.fromkeys(("running", "weight", "factor", "scales", "inverse_scales", "zeros"), "*fp32")
    types = {**pointers, "codes": "*u8", "group_of": "*i32", "top": "fp32"}
    options = {**gptq_block.SETTINGS, "num_warps": gptq_block.warps_of_a_program(rows)}
    constants = {name: options.pop(name) for name in ("PART", "DEPTH", "STAGES")}
    constants |= {"ROWS": rows, "COMPILED": True}
    unaligned = ("group_of", "first_sub", "subs", "lines", "factor_quads", "top")
    program = build(gptq_block.gptq_block_kernel, arch, types, constants, unaligned, options)
    block, part, width = gptq_block.BLOCK, constants["PART"], gptq_block.SUB.value
    # A part has the product's loop and that over its sub-blocks, a sub-block that over the part's earlier columns.
    earlier, product, inner, outer = (last - first + 1 for first, last in program.loops)
    executed = (
        (outer - product - inner) * (block // part)
        + product * (sum(range(0, block, part)) // constants["DEPTH"])
        + (inner - earlier) * (block // width)
        + earlier * (block // part * sum(range(0, part, width)) // gptq_block.UNROLL.value)
    )
    counts = count(program, program.loops[-1], round(executed / block, 1))
    faults = common_faults(program, arch)
    if program.count("HMMA", "HGMMA"):
        faults.append("tensor instructions")
    copies = [name for name in program.part(program.loops[1]) if name.startswith("LDGSTS")]
    if not copies or not all(name.endswith("128") for name in copies):
        faults.append("operands of the product are not copied asynchronously, 16 bytes at a time")
    if program.count("BAR", within=program.loops[0]):
        faults.append("a barrier between columns")
    if counts.each > MOST_PER_COLUMN:
        faults.append(f"more than {MOST_PER_COLUMN} instructions per column")
    shape = "" if rows == gptq_block.LINE else f" {rows} rows"
    return Gate(f"gptq sm_{arch}{shape}", counts, faults, MOST_PER_COLUMN)


def gram_gate(arch: int, dtype: str, exact: bool, weighted: bool, across: int = gram.TILE) -> Gate:
    """One gram kernel; instructions per turn of its loop, which must hold as many products as its tile needs."""
    settings = dict(gram.WIDE if exact else gram.NARROW)
    depth = settings.pop("DEPTH")
    types = {"x": f"*{dtype}", "target": f"*{dtype}"}
    types |= dict.fromkeys(("row_weights", "hessian", "cross", "sum_x", "sum_target"), "*fp32") | {"turns": "*i32"}
    constants: dict[str, Any] = {"EXACT": exact, "WEIGHTED": weighted, "ORDERED": True, "INTERPRETED": False}
    constants |= {"TILE": gram.TILE, "ACROSS": across, "BAND": gram.BAND, "DEPTH": depth}
    unaligned = ("rows", "h_tiles", "tiles", "rows_per_part", "whole", "cut", "rows_per_piece")
    program = build(gram_programs.gram_kernel, arch, types, constants, unaligned, settings)
    wanted = "FFMA" if exact else "HGMMA" if arch >= 90 else "HMMA"
    loop = program.loop_with(wanted)
    threads = 32 * settings["num_warps"]
    products = gram.TILE * across * depth
    # Products of one instruction of a warp: FFMA 32, HMMA.16816 2048; HGMMA 64 x ACROSS x 16 is issued by four warps.
    expected = {
        "FFMA": products // threads,
        "HMMA": products // 2048 // (threads // 32),
        "HGMMA": products // (64 * across * 16) // (threads // 128),
    }[wanted]
    found = program.count(wanted, within=loop) if loop else 0
    faults = common_faults(program, arch)
    if found != expected:
        faults.append(f"{found} {wanted} in the loop, expected {expected}")
    if wanted == "HGMMA" and program.count("LDSM", "LDS", "STS", within=loop):
        faults.append("operands pass through registers")
    if not program.count("LDGSTS"):
        faults.append("no asynchronous copies")
    counts = count(program, loop, len(program.part(loop)))
    shape = "" if across == gram.TILE else f" {gram.TILE}x{across}"
    return Gate(f"gram sm_{arch} {dtype}{' weighted' if weighted else ''}{shape}", counts, faults)
