"""PTX text as data: kernels with their parameters, registers and shared variables, and instructions with operands."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field

BYTES = {"8": 1, "16": 2, "32": 4, "64": 8, "pred": 1}
COMMENT = re.compile(r"/\*.*?\*/|//[^\n]*", re.S)
LABEL = re.compile(r"\s*([$%\w.]+):(?!:)")
KERNEL = re.compile(r"\.entry\s+([$\w]+)\s*\((.*?)\)([^{}]*)\{", re.S)
PARAMETER = re.compile(r"\.param\s+(.*?)([$\w]+)(?:\[(\d+)\])?\s*$", re.S)
VARIABLE = re.compile(r"\.shared\s+\.align\s+(\d+)\s+\.b(\d+)\s+([$\w]+)\[(\d*)\]")
GUARD = re.compile(r"@(!?)([%\w]+)\s+(.*)", re.S)
SHARED_START = 1024  # where the first shared variable lies: addresses that nobody gave out should be seen


class PtxError(Exception):
    """PTX that is not understood, or a program that does what the PTX ISA forbids; names the instruction."""


@dataclass(frozen=True)
class Register:
    name: str
    width: int  # bits; 1 is a predicate


@dataclass(frozen=True)
class Constant:
    """A number as 64 bits: two's complement, or an IEEE pattern."""

    bits: int


@dataclass(frozen=True)
class Special:
    name: str  # such as tid.x


@dataclass(frozen=True)
class Memory:
    """``[base + offset]``; base is a register, or the address of a shared variable or a parameter."""

    base: Operand
    offset: int


@dataclass(frozen=True)
class Vector:
    parts: tuple[Operand | None, ...]  # None where the text says _


Operand = Register | Constant | Special | Memory | Vector


@dataclass(frozen=True)
class Instruction:
    operation: str  # the first word of the opcode
    modifiers: tuple[str, ...]
    operands: tuple[Operand, ...]
    guard: Register | None
    negated: bool
    target: str  # label of a branch
    text: str

    def fault(self, sentence: str) -> PtxError:
        return PtxError(f"{sentence}: {self.text}")


@dataclass(frozen=True)
class Parameter:
    name: str
    bytes: int
    address: int  # in the space of parameters


@dataclass
class Kernel:
    name: str
    parameters: list[Parameter]
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)  # the instruction that follows
    shared: dict[str, int] = field(default_factory=dict)  # addresses of shared variables
    shared_bytes: int = 0  # static ones, from address 0 on


class Names:
    """Registers that are in scope, and the addresses of shared variables and parameters."""

    def __init__(self, addresses: dict[str, int]):
        self.scopes: list[dict[str, Register]] = [{}]
        self.families: dict[str, int] = {}
        self.addresses = addresses
        self.count = 0

    def declare(self, kind: str, names: str) -> None:
        width = 1 if kind == "pred" else int(re.sub(r"\D", "", kind))
        for name in map(str.strip, names.split(",")):
            if family := re.fullmatch(r"([%\w]+?)<(\d+)>", name):
                self.families[family[1]] = width
            else:
                self.count += 1
                self.scopes[-1][name] = Register(f"{name}.{self.count}", width)

    def register(self, name: str) -> Register | None:
        for scope in reversed(self.scopes):
            if name in scope:
                return scope[name]
        width = self.families.get(re.sub(r"\d+$", "", name))
        return None if width is None else Register(name, width)


def kernels(text: str) -> list[Kernel]:
    """Every ``.entry`` of a module."""
    text = COMMENT.sub(" ", text)
    outside = {found[3]: found for found in VARIABLE.finditer(text)}
    found = []
    for entry in KERNEL.finditer(text):
        body = text[entry.end() : closing(text, entry.end())]
        kernel = Kernel(entry[1], list(parameters(entry[2])))
        address = SHARED_START
        for name, variable in outside.items():
            if re.search(rf"(?<![\w$]){re.escape(name)}(?![\w$])", body):
                address = -(-address // max(128, int(variable[1]))) * max(128, int(variable[1]))
                kernel.shared[name] = address
                address += int(variable[2]) // 8 * int(variable[4] or 0)
        kernel.shared_bytes = address
        read_body(body, kernel)
        found.append(kernel)
    return found


def closing(text: str, start: int) -> int:
    """Where the brace that was opened before ``start`` is closed."""
    depth = 1
    for brace in re.finditer(r"[{}]", text[start:]):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return start + brace.start()
    raise PtxError("a brace is not closed")


def parameters(text: str) -> Iterator[Parameter]:
    """With addresses at multiples of 16, whatever their types ask for."""
    address = 0
    for part in text.split(","):
        if part.strip():
            found = PARAMETER.search(part)
            kind = re.search(r"\.[busf](\d+)", part)
            if found is None or kind is None:
                raise PtxError(f"parameter not understood: {part.strip()}")
            size = BYTES[kind[1]] * int(found[3] or 1)
            yield Parameter(found[2], size, address)
            address += -(-size // 16) * 16


def read_body(body: str, kernel: Kernel) -> None:
    names = Names(kernel.shared | {parameter.name: parameter.address for parameter in kernel.parameters})
    place = 0
    while place < len(body):
        if body[place].isspace() or body[place] == ";":
            place += 1
        elif body[place] == "{":
            names.scopes.append({})
            place += 1
        elif body[place] == "}":
            names.scopes.pop()
            place += 1
        elif label := LABEL.match(body, place):
            kernel.labels[label[1]] = len(kernel.instructions)
            place = label.end()
        elif body.startswith((".loc", ".file"), place):
            place = body.index("\n", place)
        else:
            stop = body.index(";", place)
            statement = body[place:stop].strip()
            place = stop + 1
            if statement.startswith(".reg"):
                _, kind, declared = statement.split(None, 2)
                names.declare(kind.lstrip("."), declared)
            elif not statement.startswith("."):
                kernel.instructions.append(instruction(statement, names))


def instruction(statement: str, names: Names) -> Instruction:
    text = " ".join(statement.split())
    guard, negated, rest = None, False, text
    if found := GUARD.match(text):
        guard, negated, rest = names.register(found[2]), found[1] == "!", found[3]
    opcode, _, tail = rest.partition(" ")
    operation, *modifiers = opcode.replace("::cta", "").split(".")
    if operation == "bra":
        return Instruction(operation, tuple(modifiers), (), guard, negated, tail.strip(), text)
    operands = tuple(operand(part, names, text) for part in split(tail))
    return Instruction(operation, tuple(modifiers), operands, guard, negated, "", text)


def split(text: str) -> Iterator[str]:
    """Parts between commas that are outside of braces and brackets; ``a|b`` gives both."""
    depth, start = 0, 0
    for place, sign in enumerate(text):
        depth += (sign in "{[") - (sign in "}]")
        if depth == 0 and sign in ",|":
            yield text[start:place].strip()
            start = place + 1
    if text[start:].strip():
        yield text[start:].strip()


def operand(text: str, names: Names, statement: str) -> Operand:
    if text[0] == "{":
        parts = (None if part == "_" else operand(part, names, statement) for part in split(text[1:-1]))
        return Vector(tuple(parts))
    if text[0] == "[":
        base, _, offset = (part.strip() for part in text[1:-1].partition("+"))
        return Memory(operand(base, names, statement), int(offset or "0", 0))
    if register := names.register(text):
        return register
    if text in names.addresses:
        return Constant(names.addresses[text])
    if text[0] == "%":
        return Special(text[1:])
    if found := re.fullmatch(r"0([fFdD])([0-9a-fA-F]+)", text):
        return Constant(int(found[2], 16))
    if re.fullmatch(r"-?\d*\.\d+(e[+-]?\d+)?", text):
        return Constant(struct.unpack("<I", struct.pack("<f", float(text)))[0])
    if re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)U?", text):
        return Constant(int(text.rstrip("U"), 0) & (1 << 64) - 1)
    raise PtxError(f"operand {text} not understood: {statement}")
