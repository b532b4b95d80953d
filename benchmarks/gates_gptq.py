"""Static gates of the GPTQ and gram kernels: compiled for sm_80 and sm_90 without a GPU, disassembled and counted.

``python benchmarks/gates_gptq.py`` prints the table and exits with status 1 when a limit is passed. Limits: no spills,
no stack; GPTQ without shared memory, barriers or tensor instructions and with at most 270 instructions per column; gram
with the tensor instruction of its architecture and, on sm_90, both operands straight from shared memory; no kernel may
have over 5 % more instructions than gates_gptq.json says for this version of Triton (``--update`` writes it).
"""

from __future__ import annotations

import argparse
import json
import os

os.environ["TRITON_INTERPRET"] = "0"  # before Triton is imported: an interpreted kernel cannot be compiled

import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import epmq.kernels.gptq_block as gptq_block
import epmq.kernels.gram as gram
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)(.*);")
LABEL = re.compile(r"^(\.L_x_\d+):")
BASELINE = Path(__file__).with_suffix(".json")
MOST_PER_COLUMN, MOST_GROWTH = 270, 1.05
MOST_SHARED = {80: 163 * 1024, 90: 227 * 1024}


@dataclass(frozen=True)
class Build:
    """One compiled kernel: its instructions in order, loops as (first, last) instruction, innermost first."""

    instructions: list[str]
    loops: list[tuple[int, int]]
    registers: int
    stack: int
    shared: int

    def count(self, *prefixes: str, within: tuple[int, int] | None = None) -> int:
        first, last = within or (0, len(self.instructions) - 1)
        return sum(name.startswith(prefixes) for name in self.instructions[first : last + 1])


def build(
    kernel: Any, arch: int, types: dict[str, str], constants: dict[str, Any], unaligned: tuple[str, ...], options: Any
) -> Build:
    """Compile a kernel as its launcher does: every argument but ``unaligned`` a multiple of 16."""
    names = list(kernel.arg_names)
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    aligned = [i for i, name in enumerate(names) if name not in constants and name not in unaligned]
    attributes = {(i,): [["tt.divisibility", 16]] for i in aligned}
    source = ASTSource(kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        text, usage = (
            subprocess.run([TOOLS / tool, option, cubin], capture_output=True, text=True, check=True).stdout
            for tool, option in (("nvdisasm", "-c"), ("cuobjdump", "-res-usage"))
        )
    used = {key: int(value) for key, value in re.findall(r"(REG|STACK):(\d+)", usage)}
    instructions, loops = parse(text)
    return Build(instructions, loops, used["REG"], used["STACK"], compiled.metadata.shared)


def parse(text: str) -> tuple[list[str], list[tuple[int, int]]]:
    """Opcodes of a disassembly, and its loops: from a label to the last branch back to it."""
    places: dict[str, int] = {}
    instructions: list[str] = []
    backward: dict[int, int] = {}
    for line in text.splitlines():
        if label := LABEL.match(line):
            places[label[1]] = len(instructions)
        elif (found := INSTRUCTION.match(line)) and "@!PT" not in line:  # those are never executed
            target = re.search(r"\.L_x_\d+", found[2])
            # A branch to itself is the padding after the last instruction.
            if found[1].startswith("BRA") and target and places.get(target[0], len(instructions)) < len(instructions):
                backward[places[target[0]]] = len(instructions)
            instructions.append(found[1])
    return instructions, sorted(backward.items(), key=lambda loop: loop[1] - loop[0])


def gptq_row(arch: int) -> dict[str, Any]:
    """The block kernel; instructions per column as executed over a block of 128, inner loop included."""
    kernel = gptq_block.gptq_block_kernel
    pointers = dict.fromkeys(("running", "weight", "factor", "scales", "inverse_scales", "zeros"), "*fp32")
    types = {**pointers, "codes": "*u8", "group_of": "*i32"}
    constants = {"TOP": 15.0, "ROWS": gptq_block.ROWS_PER_PROGRAM}
    made = build(kernel, arch, types, constants, (), {"num_warps": 1, "enable_fp_fusion": False})
    inner, outer = made.loops[0], made.loops[-1]
    width, unroll = gptq_block.SUB.value, gptq_block.UNROLL.value
    passes = sum(range(0, gptq_block.BLOCK, width)) // unroll
    once = (outer[1] - outer[0]) - (inner[1] - inner[0])
    executed = once * (gptq_block.BLOCK // width) + (inner[1] - inner[0] + 1) * passes
    per_column = round(executed / gptq_block.BLOCK, 1)
    problems = common_problems(made, arch)
    problems += ["tensor instructions"] if made.count("HMMA", "HGMMA") else []
    problems += ["shared memory or a barrier"] if made.shared or made.count("BAR", "LDS", "STS") else []
    problems += [f"more than {MOST_PER_COLUMN} instructions per column"] if per_column > MOST_PER_COLUMN else []
    return row("gptq block of 128, 32 rows", arch, made, per_column, problems)


def gram_row(arch: int, dtype: str, exact: bool, weighted: bool) -> dict[str, Any]:
    """One gram kernel; the tensor instructions of its loop, or its multiply-adds."""
    settings = dict(gram.WIDE if exact else gram.NARROW)
    types = {"x": f"*{dtype}", "target": f"*{dtype}"}
    types |= dict.fromkeys(("row_weights", "hessian", "cross"), "*fp32")
    constants = {"EXACT": exact, "WEIGHTED": weighted, "INTERPRETED": False, "TILE": gram.TILE}
    constants["DEPTH"] = depth = settings.pop("DEPTH")
    made = build(gram.gram_kernel, arch, types, constants, ("rows", "h_tiles"), settings)
    wanted = "FFMA" if exact else "HGMMA" if arch >= 90 else "HMMA"
    loop = next((loop for loop in made.loops if made.count(wanted, within=loop)), (0, -1))
    found = made.count(wanted, within=loop)
    threads = 32 * settings["num_warps"]
    products = gram.TILE * gram.TILE * depth
    # Products of one instruction of a warp: FFMA 32, HMMA.16816 2048; HGMMA 64 x 128 x 16 is issued by four warps.
    expected = {"FFMA": products // threads, "HMMA": products // 2048 // (threads // 32)}.get(wanted)
    expected = expected or products // (64 * 128 * 16) // (threads // 128)
    problems = common_problems(made, arch)
    if found != expected:
        problems.append(f"{found} {wanted} in the loop, expected {expected}")
    if wanted == "HGMMA" and made.count("LDSM", "LDS", "STS", within=loop):
        problems.append("operands pass through registers")
    if not made.count("LDGSTS"):
        problems.append("no asynchronous copies")
    kind = f"gram {dtype}{' weighted' if weighted else ''}"
    return row(kind, arch, made, found, problems)


def common_problems(made: Build, arch: int) -> list[str]:
    problems = ["spills"] if made.stack or made.count("LDL", "STL") else []
    return problems + (["too much shared memory"] if made.shared > MOST_SHARED[arch] else [])


def row(kernel: str, arch: int, made: Build, counted: float, problems: list[str]) -> dict[str, Any]:
    return {
        "kernel": kernel,
        "arch": f"sm_{arch}",
        "triton": triton.__version__,
        "instructions": len(made.instructions),
        "counted": counted,
        "registers": made.registers,
        "spills": made.count("LDL", "STL"),
        "shared": made.shared,
        "barriers": made.count("BAR"),
        "problems": "; ".join(problems),
    }


def rows() -> list[dict[str, Any]]:
    """Every kernel on every architecture. ``counted``: instructions per column for GPTQ, products per loop for gram."""
    made = [gptq_row(arch) for arch in (80, 90)]
    for arch in (80, 90):
        made += [gram_row(arch, dtype, False, False) for dtype in ("bf16", "fp16")]
        made += [gram_row(arch, "fp32", True, False), gram_row(arch, "bf16", True, True)]
    return made


def against(baseline: dict[str, int], entry: dict[str, Any]) -> None:
    """Add to the entry's problems when it has grown; a version of Triton without a baseline has only the limits."""
    known = baseline.get(name_of(entry))
    if known is not None and entry["instructions"] > MOST_GROWTH * known:
        entry["problems"] = "; ".join(filter(None, [entry["problems"], f"{known} instructions before"]))


def name_of(entry: dict[str, Any]) -> str:
    return f"{entry['kernel']}, {entry['arch']}, Triton {entry['triton']}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--update", action="store_true", help="take today's counts as the baseline of this Triton")
    update = parser.parse_args().update
    found, baseline = rows(), json.loads(BASELINE.read_text())
    if update:
        baseline |= {name_of(entry): entry["instructions"] for entry in found}
        BASELINE.write_text(json.dumps(dict(sorted(baseline.items())), indent=1) + "\n")
    for entry in found:
        against(baseline, entry)
    print("| " + " | ".join(found[0]) + " |\n|" + "---|" * len(found[0]))
    for entry in found:
        print("| " + " | ".join(str(value) for value in entry.values()) + " |")
    sys.exit(int(any(entry["problems"] for entry in found)))


if __name__ == "__main__":
    main()
