"""Compiles Triton kernels for a GPU that is not there, disassembles them and counts their instructions."""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "0"  # before Triton is imported: an interpreted kernel cannot be compiled
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "0")  # every kernel says for itself; unset, 3.9 warns

import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

ARCHS = (80, 90)
SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024}  # the most that one block may have
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)(.*);")
LABEL = re.compile(r"^(\.L_x_\d+):")

Loop = tuple[int, int]  # first and last instruction


@dataclass(frozen=True)
class Program:
    """One compiled kernel: its operations in order with their suffixes, its loops innermost first, what it occupies."""

    operations: list[str]
    loops: list[Loop]
    registers: int
    stack: int  # bytes
    shared: int  # bytes
    serialized: bool  # ptxas says that it runs wgmma one at a time

    def count(self, *names: str, within: Loop | None = None) -> int:
        """How many instructions have one of these names, suffixes aside."""
        return sum(operation.split(".")[0] in names for operation in self.part(within))

    def part(self, within: Loop | None) -> list[str]:
        first, last = within or (0, len(self.operations) - 1)
        return self.operations[first : last + 1]

    def loop_with(self, *names: str) -> Loop | None:
        """The innermost loop that has such an instruction."""
        return next((loop for loop in self.loops if self.count(*names, within=loop)), None)


@dataclass(frozen=True)
class Counts:
    """What is held of a kernel, per thread; from ``conversions`` on in its loop, in the whole kernel if it has none."""

    instructions: int  # of the whole kernel
    each: float  # executed per weight, per column or per turn of the loop: its gate says which
    registers: int
    shared: int  # bytes
    stack: int  # bytes
    spills: int  # LDL and STL, in the whole kernel
    barriers: int  # in the whole kernel
    conversions: int  # I2F, I2FP, F2F
    permutes: int
    stores: int  # to shared memory
    loads: int  # from memory, not through asynchronous copies
    wide_copies: int  # asynchronous copies of 16 bytes
    waits: int  # for wgmma
    tensor: str


@dataclass(frozen=True)
class Gate:
    """A kernel that was looked at. limit: of ``counts.each``. shown: whether the table of docs/kernels.md has it."""

    name: str
    counts: Counts
    faults: list[str]
    limit: float | None = None
    shown: bool = True


Unbuilt = Callable[[], Gate]  # compiled when it is called, in whichever process


def build(
    kernel: Any,
    arch: int,
    types: dict[str, str],
    constants: dict[str, Any],
    unaligned: tuple[str, ...],
    options: dict[str, Any],
) -> Program:
    """Compile as a launcher would that gives int32 and multiples of 16 for all that is not said to be otherwise."""
    names = list(kernel.arg_names)
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    aligned = [place for place, name in enumerate(names) if name not in constants and name not in unaligned]
    attributes = {(place,): [["tt.divisibility", 16]] for place in aligned}
    source = ASTSource(kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.TemporaryDirectory() as folder:
        cubin, ptx = Path(folder) / "kernel.cubin", Path(folder) / "kernel.ptx"
        cubin.write_bytes(compiled.asm["cubin"])
        operations, loops = parse(tool(TOOLS / "nvdisasm", "-c", cubin))
        used = re.search(r"REG:(\d+) STACK:(\d+)", tool(TOOLS / "cuobjdump", "-res-usage", cubin))
        said = ""
        if any(name.startswith("HGMMA") for name in operations):
            # Triton keeps to itself what ptxas says.
            ptx.write_text(compiled.asm["ptx"])
            said = tool(get_ptxas(arch).path, "-v", "--fmad=false", "-arch=sm_90a", ptx, "-o", cubin)
    if used is None:
        sys.exit("cuobjdump does not tell the registers.")
    serialized = "C7515" in said or "C7510" in said or "serializ" in said
    return Program(operations, loops, int(used[1]), int(used[2]), int(compiled.metadata.shared), serialized)


def tool(*command: Any) -> str:
    """What one of the CUDA tools that Triton brings along prints."""
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{command[0]} failed: {done.stderr.strip()}")
    return done.stdout + done.stderr


def parse(text: str) -> tuple[list[str], list[Loop]]:
    """Operations of a disassembly, and its loops: from a label to the last branch back to it.

    What a predicate always forbids (``@!PT``) is a NOP: it does nothing, but is issued.
    """
    places: dict[str, int] = {}
    operations: list[str] = []
    backward: dict[int, int] = {}
    for line in text.splitlines():
        if label := LABEL.match(line):
            places[label[1]] = len(operations)
        elif found := INSTRUCTION.match(line):
            target = re.search(r"\.L_x_\d+", found[2])
            # A branch to itself is the padding after the last instruction.
            if found[1].startswith("BRA") and target and places.get(target[0], len(operations)) < len(operations):
                backward[places[target[0]]] = len(operations)
            operations.append("NOP" if "@!PT" in line else found[1])
    return operations, sorted(backward.items(), key=lambda loop: loop[1] - loop[0])


def count(program: Program, loop: Loop | None, each: float) -> Counts:
    part = program.part(loop)
    return Counts(
        instructions=len(program.operations),
        each=each,
        registers=program.registers,
        shared=program.shared,
        stack=program.stack,
        spills=program.count("LDL", "STL"),
        barriers=program.count("BAR"),
        conversions=program.count("I2F", "I2FP", "F2F", within=loop),
        permutes=program.count("PRMT", within=loop),
        stores=program.count("STS", within=loop),
        loads=program.count("LDG", within=loop),
        wide_copies=sum(name.startswith("LDGSTS") and name.endswith("128") for name in part),
        waits=sum("WARPGROUP.DEPBAR" in name for name in part),
        tensor=next((name for name in ("HGMMA", "HMMA") if program.count(name, within=loop)), "none"),
    )


def common_faults(program: Program, arch: int, loop: Loop | None = None, outside: int = 0) -> list[str]:
    """Sentences for the limits that every kernel has: shared memory that the chip has, and no spills, but for so many
    instructions ``outside`` of the loop."""
    spills, within = program.count("LDL", "STL"), program.count("LDL", "STL", within=loop) if loop else 0
    broken = within or spills > outside or (program.stack and not spills)
    said = f"{spills} spill instructions ({within} in the loop), {program.stack} bytes of stack"
    faults = [said] if broken else []
    return faults + ([f"{program.shared} bytes of shared memory"] if program.shared > SHARED_BYTES[arch] else [])
