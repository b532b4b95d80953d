"""The few PTX instructions of our inline assembly, run on NumPy arrays: what the interpreter of Triton cannot run."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

Words = np.ndarray[Any, np.dtype[np.uint32]]


def run(text: str, word: Words) -> Words:
    """Register $0 after ``text`` with ``word`` in $1. Raises AssertionError for an instruction that is not known."""
    registers = {"$1": word}

    def value(name: str) -> Any:
        return registers[name] if name in registers else np.uint32(int(name, 0))

    for line in re.sub(r"[{}]|\.reg \.b32 \w+;", "", text).split(";"):
        if not line.strip():
            continue
        operation, operands = line.strip().split(" ", 1)
        target, *sources = (part.strip() for part in operands.split(","))
        if operation == "shr.u32":
            registers[target] = value(sources[0]) >> value(sources[1])
        elif operation == "lop3.b32":
            a, b, c = (value(name) for name in sources[:3])
            registers[target] = lop3(a, b, c, int(sources[3], 0))
        else:
            raise AssertionError(f"{operation}: not emulated")
    return registers["$0"]


def lop3(a: Words, b: Words, c: Words, table: int) -> Words:
    """Bit by bit, entry ``4 a + 2 b + c`` of an eight-bit truth table (PTX ISA, lop3)."""
    result = np.zeros_like(a)
    for entry in range(8):
        if table >> entry & 1:
            match = (a if entry & 4 else ~a) & (b if entry & 2 else ~b) & (c if entry & 1 else ~c)
            result |= match
    return result
