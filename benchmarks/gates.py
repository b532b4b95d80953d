"""``make gates``: compile the Triton kernels for sm_80 and sm_90 without a GPU and hold their instructions to limits.

Each tile that the package can launch is compiled with the installed Triton, disassembled and counted: per thread, in
the loop over the columns. A limit that is broken, or a count 5 % above the committed one (results/gates.json, by Triton
version), is an error. ``--all`` adds every group, dtype and tile to those that the shipped choice uses; ``--update``
writes the counts and the table of docs/kernels.md.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "0")

import triton
from naive_int4 import naive_product
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from epmq.kernels import tune
from epmq.kernels.int4_programs import dequantize_tiles, product_tiles, sum_parts
from epmq.kernels.tune import Config

ROOT = Path(__file__).resolve().parents[1]
COUNTS = ROOT / "benchmarks" / "results" / "gates.json"
DOCS = ROOT / "docs" / "kernels.md"
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
ARCHS = (80, 90)
GROUPS = (0, 32, 64, 128)
SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024}
GROWTH = 1.05
INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)([^;]*);")
# Instructions per weight of BM = 8, BN = 128, by group, with HMMA and with HGMMA as the tensor instruction.
DECODE_LIMITS = {128: (2.75, 3.1), 64: (2.9, 3.2), 32: (3.0, 3.3), 0: (2.2, 2.5)}
# Of larger tiles; groups of 32 may have as much more as in the decode limits, for three more grid words a step.
MORE_OF_32 = 0.25
TILE_LIMITS = {(90, 64, 128): 3.2, (90, 128, 256): 3.2, (80, 64, 128): 4.0}


@dataclass(frozen=True)
class Counts:
    """Of one compiled kernel: per thread, in the loop where not said otherwise."""

    per_weight: float  # all instructions of the loop
    registers: int
    shared: int  # bytes
    spills: int  # LDL and STL, in the whole kernel
    stack: int  # bytes
    converts: int  # I2F, I2FP, F2F
    permutes: int
    stores: int  # STS
    wide_copies: int  # LDGSTS of 16 bytes
    loads: int  # LDG: what does not go through asynchronous copies
    tensor: str
    waits: int  # for wgmma
    serialized: bool  # ptxas says that it runs wgmma one at a time


def compile_kernel(
    fn: Any, types: dict[str, str], constants: dict[str, Any], arch: int, warps: int, stages: int
) -> Any:
    """A CompiledKernel; pointers and the integers that the launcher guarantees are marked as multiples of 16."""
    names = fn.arg_names
    aligned = [n for n, kind in types.items() if kind.startswith("*") or n in ("N", "NP", "x_stride", "K")]
    source = ASTSource(
        fn,
        {name: types.get(name, "constexpr") for name in names},
        {(names.index(name),): value for name, value in constants.items()},
        {(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": False}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def product(arch: int, dtype: str, group: int, config: Config) -> Any:
    """The tile program of a configuration, as launched with several parts where it is small."""
    split = config.block_m <= 64
    types = {"x": f"*{dtype}", "words": "*i16", "scales": "*i32", "bias": f"*{dtype}"}
    types |= {"out": "*fp32" if split else f"*{dtype}"}
    types |= dict.fromkeys(("M", "N", "NP", "KB", "x_stride", "blocks_per_part"), "i32")
    constants = {"BM": config.block_m, "BN": config.block_n, "GROUP": group, "SPLIT": split, "BIAS": not split}
    constants |= {"JOINED": config.joined, "SWIZZLE": 1 if split else 8, "ASM": True, "WIDE": False}
    return compile_kernel(product_tiles, types, constants, arch, config.warps, config.stages)


def naive(arch: int, config: Config) -> Any:
    """The naive kernel with the same tile; its products need 16 tokens at least."""
    types = {"x": "*fp16", "words": "*i32", "scales": "*fp16", "origins": "*i8", "out": "*fp16"}
    types |= dict.fromkeys(("M", "N", "K", "x_stride"), "i32")
    constants = {"BM": max(16, config.block_m), "BN": config.block_n}
    return compile_kernel(naive_product, types, constants, arch, config.warps, config.stages)


def tool(path: str | Path, *arguments: str) -> str:
    """What one of the CUDA tools that Triton brings along prints."""
    done = subprocess.run([str(path), *arguments], capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{path} failed: {done.stderr.strip()}")
    return done.stdout + done.stderr


def loop_of(sass: list[tuple[int, str, str]]) -> list[str]:
    """Operation names of the shortest loop that holds a tensor instruction; empty when there is none."""
    best: list[str] = []
    for address, name, rest in sass:
        target = re.search(r"0x([0-9a-f]+)", rest) if name.startswith("BRA") else None
        if target is None or int(target[1], 16) >= address:
            continue
        body = [other for place, other, _ in sass if int(target[1], 16) <= place <= address]
        if any("MMA" in other for other in body) and (not best or len(body) < len(best)):
            best = body
    return best


def count(kernel: Any, arch: int, weights: float) -> Counts:
    """Disassemble and count; ``weights`` is how many of them one thread handles per turn of the loop."""
    with tempfile.TemporaryDirectory() as folder:
        cubin, ptx = Path(folder) / "k.cubin", Path(folder) / "k.ptx"
        cubin.write_bytes(kernel.asm["cubin"])
        ptx.write_text(kernel.asm["ptx"])
        sass = [
            (int(a, 16), op, rest)
            for a, op, rest in INSTRUCTION.findall(tool(TOOLS / "cuobjdump", "-sass", str(cubin)))
        ]
        usage = re.search(r"REG:(\d+) STACK:(\d+)", tool(TOOLS / "cuobjdump", "-res-usage", str(cubin)))
        name = "sm_90a" if arch == 90 else f"sm_{arch}"
        said = tool(
            get_ptxas(arch).path,
            "-v",
            "--fmad=false",
            f"-arch={name}",
            str(ptx),
            "-o",
            str(Path(folder) / "again.cubin"),
        )
    if usage is None:
        sys.exit("cuobjdump does not tell the registers.")
    body = loop_of(sass)
    first = Counter(op.split(".")[0] for op in body)
    everywhere = Counter(op.split(".")[0] for _, op, _ in sass)
    return Counts(
        per_weight=round(len(body) / weights, 3),
        registers=int(usage[1]),
        shared=int(kernel.metadata.shared),
        spills=everywhere["LDL"] + everywhere["STL"],
        stack=int(usage[2]),
        converts=first["I2F"] + first["I2FP"] + first["F2F"],
        permutes=first["PRMT"],
        stores=first["STS"],
        wide_copies=sum(op.startswith("LDGSTS") and op.endswith("128") for op in body),
        loads=first["LDG"],
        tensor="HGMMA" if first["HGMMA"] else "HMMA" if first["HMMA"] else "none",
        waits=sum("WARPGROUP.DEPBAR" in op for op in body),
        serialized="C7515" in said or "C7510" in said or "serializ" in said,
    )


def broken(found: Counts, arch: int, group: int, config: Config) -> Iterator[str]:
    """Sentences for each limit that a kernel of ours breaks."""
    if found.spills or found.stack:
        yield f"{found.spills} spill instructions, {found.stack} bytes of stack"
    if found.converts or found.permutes > 4 or found.stores or found.loads:
        yield (
            f"in the loop {found.converts} conversions, {found.permutes} permutes (4 allowed), {found.stores} shared "
            f"stores, {found.loads} synchronous loads"
        )
    wanted = config.block_n // (8 * config.warps)
    if found.wide_copies < wanted:
        yield f"{found.wide_copies} copies of 16 bytes, {wanted} are needed for the weights"
    if found.serialized or found.waits > (1 if config.joined else 4):
        yield f"wgmma is serialized ({found.waits} waits)"
    allowed = {"HMMA"} if arch < 90 else {"HGMMA"} if config.block_m >= 16 else {"HGMMA", "HMMA"}
    if found.tensor not in allowed:
        yield f"tensor instruction {found.tensor}"
    if found.shared > SHARED_BYTES[arch]:
        yield f"{found.shared} bytes of shared memory"
    limit = TILE_LIMITS.get((arch, config.block_m, config.block_n))
    if limit is not None and group == 32:
        limit += MORE_OF_32
    if (config.block_m, config.block_n) == (8, 128):
        limit = DECODE_LIMITS[group][found.tensor == "HGMMA"]
    if limit is not None and found.per_weight > limit:
        yield f"{found.per_weight:.2f} instructions per weight, limit {limit}"


def cases(everything: bool) -> Iterator[tuple[str, int, str, int, Config]]:
    """Name, architecture, dtype, group and tile of what is compiled."""
    for arch in ARCHS:
        for config in tune.shapes(arch):
            main = config.block_n == 128 or (config.block_m, config.block_n) == (128, 256)
            for dtype in ("fp16", "bf16"):
                for group in GROUPS:
                    if everything or (main and (group == 128 or config.block_m == 8)):
                        yield (
                            f"sm_{arch} {dtype} g{group} {config.block_m}x{config.block_n}",
                            arch,
                            dtype,
                            group,
                            config,
                        )


def other_kernels() -> Iterator[tuple[str, Counts]]:
    """The kernels without tensor instructions: only spills matter."""
    for arch in ARCHS:
        types = {"parts": "*fp32", "bias": "*fp16", "out": "*fp16", "count": "i32", "N": "i32"}
        constants = {"SPLITS": 8, "BIAS": True, "WIDE": False, "BLOCK": 1024}
        kernel = compile_kernel(sum_parts, types, constants, arch, 4, 3)
        yield f"sm_{arch} sum_parts", count(kernel, arch, 1)
        types = {"words": "*i16", "scales": "*i32", "out": "*bf16"} | dict.fromkeys(("N", "NP", "K", "KB"), "i32")
        kernel = compile_kernel(dequantize_tiles, types, {"GROUP": 128, "ASM": True, "WIDE": False}, arch, 4, 3)
        yield f"sm_{arch} dequantize_tiles", count(kernel, arch, 1)


def table(rows: dict[str, Counts]) -> list[str]:
    """Markdown of the counts."""
    lines = ["| kernel | instructions / weight | registers | shared KiB | spills | I2F | PRMT | STS | 16-byte copies | "
             "tensor | waits |", "|---|---|---|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for name, c in rows.items():
        lines.append(
            f"| {name} | {c.per_weight:.2f} | {c.registers} | {c.shared / 1024:.0f} | {c.spills} | {c.converts} | "
            f"{c.permutes} | {c.stores} | {c.wide_copies} | {c.tensor} | {c.waits} |"
        )
    return lines


def write_docs(lines: list[str]) -> None:
    """Put the table of this Triton between its markers in docs/kernels.md."""
    version = minor_version()
    start, end = f"<!-- gates {version} -->", f"<!-- end of gates {version} -->"
    text = DOCS.read_text()
    if start not in text or end not in text:
        sys.exit(f"{DOCS}: the markers {start} and {end} are missing.")
    before, rest = text.split(start)
    after = rest.split(end)[1]
    DOCS.write_text(before + start + "\n" + "\n".join(lines) + "\n" + end + after)


def minor_version() -> str:
    """3.9 of 3.9.0."""
    return ".".join(triton.__version__.split(".")[:2])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--all", action="store_true", help="every tile, group and dtype, not only the shipped choice")
    parser.add_argument("--update", action="store_true", help="write the counts and the table of docs/kernels.md")
    options = parser.parse_args()
    committed: dict[str, dict[str, dict[str, Any]]] = json.loads(COUNTS.read_text()) if COUNTS.exists() else {}
    before = committed.get(minor_version(), {})
    print(f"Triton {triton.__version__}")
    rows: dict[str, Counts] = {}
    shown: dict[str, Counts] = {}
    faults = []
    shipped = {name for name, *_ in cases(False)}
    for name, arch, dtype, group, config in cases(options.all):
        weights = config.block_n * 128 / (32 * config.warps)
        rows[name] = count(product(arch, dtype, group, config), arch, weights)
        faults += [f"{name}: {what}" for what in broken(rows[name], arch, group, config)]
        if name in shipped:
            shown[name] = rows[name]
        if name in shipped and dtype == "fp16" and group == 128 and config.block_m in (16, 64, 128):
            shown[f"naive: {name}"] = count(naive(arch, config), arch, weights)
    for name, counts in other_kernels():
        rows[name] = counts
        if counts.spills or counts.stack:
            faults.append(f"{name}: {counts.spills} spill instructions, {counts.stack} bytes of stack")
    for name, counts in rows.items():
        old = before.get(name)
        if old and counts.per_weight > GROWTH * old["per_weight"]:
            faults.append(f"{name}: {counts.per_weight} instructions per weight, {old['per_weight']} before")
    lines = table(shown)
    print("\n".join(lines))
    if not before:
        print(f"No counts of Triton {minor_version()} are committed: growth was not looked at.")
    if options.update:
        committed[minor_version()] = {**before, **{name: asdict(counts) for name, counts in rows.items()}}
        COUNTS.write_text(json.dumps(committed, indent=1, sort_keys=True) + "\n")
        write_docs(lines)
    if faults:
        sys.exit("\n".join(faults))
    print(f"{len(rows)} kernels within their limits.")


if __name__ == "__main__":
    main()
