"""``make gates``: compile the Triton kernels for sm_80 and sm_90 without a GPU and hold their instructions to limits.

Each kernel is compiled with the installed Triton, disassembled and counted (:mod:`machine_code`). A limit that is
broken (:mod:`gates_int4`, :mod:`gates_gptq`) or a count 5 % above the committed one (results/gates.json, by Triton
version) is an error. ``--all`` adds every group, dtype and tile of the int4 product to those of the shipped choice;
``--table`` writes the table of docs/kernels.md, ``--update`` the counts that are compared with.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import operator
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import gates_gptq
import gates_int4
import triton
from machine_code import Counts, Gate

ROOT = Path(__file__).resolve().parents[1]
COUNTS = ROOT / "benchmarks" / "results" / "gates.json"
DOCS = ROOT / "docs" / "kernels.md"
START, END = "<!-- gates -->", "<!-- end of gates -->"
GROWTH = 1.05
VERSION = ".".join(triton.__version__.split(".")[:2])

Committed = dict[str, dict[str, dict[str, Any]]]  # by version of Triton, kernel and count
COLUMNS = {
    "each": "instructions", "registers": "registers", "shared": "shared KiB", "spills": "spills",
    "conversions": "I2F", "permutes": "PRMT", "stores": "STS", "wide_copies": "16-byte copies", "tensor": "tensor",
    "waits": "waits", "limit": "limit",
}  # fmt: skip


def row(gate: Gate) -> dict[str, Any]:
    """What is kept of a kernel: its counts, and the limit as the table shows it."""
    return {**asdict(gate.counts), "limit": None if gate.limit is None else f"{gate.limit:g}"}


def grown(counts: Counts, before: dict[str, Any]) -> Iterator[str]:
    """Sentences for each count that is over 5 % above the one before; without one before nothing is looked at."""
    for name, now in asdict(counts).items():
        if name in before and isinstance(now, int | float) and now > GROWTH * before[name]:
            yield f"{name} {now}, {before[name]} before"


def table(gates: list[Gate], committed: Committed) -> list[str]:
    """Markdown of the counts; where two versions of Triton differ, both, the older first."""
    lines = ["| kernel | " + " | ".join(COLUMNS.values()) + " |", "|" + "---|" * (len(COLUMNS) + 1)]
    for gate in gates:
        found = [committed[version][gate.name] for version in sorted(committed) if gate.name in committed[version]]
        cells = [" / ".join(dict.fromkeys(shown(name, counts.get(name)) for counts in found)) for name in COLUMNS]
        lines.append(f"| {gate.name} | " + " | ".join(cells) + " |")
    return lines


def shown(name: str, value: Any) -> str:
    if value is None:
        return "–"
    if name == "shared":
        return f"{value / 1024:.0f}"
    return f"{value:.2f}" if isinstance(value, float) and value < 100 else str(value)


def write_counts(committed: Committed) -> None:
    """A kernel a line, so that a change of one is a change of a line."""
    versions = []
    for version, kernels in sorted(committed.items()):
        rows = [f"  {json.dumps(name)}: {json.dumps(counts)}" for name, counts in sorted(kernels.items())]
        versions.append(f' "{version}": {{\n' + ",\n".join(rows) + "\n }")
    COUNTS.write_text("{\n" + ",\n".join(versions) + "\n}\n")


def write_table(lines: list[str]) -> None:
    """Put the table between its markers."""
    text = DOCS.read_text()
    if START not in text or END not in text:
        sys.exit(f"{DOCS}: the markers {START} and {END} are missing.")
    before, rest = text.split(START)
    DOCS.write_text(before + START + "\n" + "\n".join(lines) + "\n" + END + rest.split(END)[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="every tile, group and dtype, not only the shipped choice")
    parser.add_argument("--table", action="store_true", help="write the table of docs/kernels.md")
    parser.add_argument("--update", action="store_true", help="take these counts for those to be compared with")
    options = parser.parse_args()
    committed: Committed = json.loads(COUNTS.read_text()) if COUNTS.exists() else {}
    before = committed.get(VERSION, {})
    print(f"Triton {triton.__version__}")
    faults = []
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        found = [*pool.map(operator.call, [*gates_int4.gates(options.all), *gates_gptq.gates(options.all)])]
    for gate in found:
        for what in (*gate.faults, *grown(gate.counts, before.get(gate.name, {}))):
            faults.append(f"{gate.name}: {what}")
    now = {gate.name: row(gate) for gate in found}
    print("\n".join(table([gate for gate in found if options.all or gate.shown], {VERSION: now})))
    if missing := sum(gate.name not in before for gate in found):
        print(f"{missing} of {len(found)} kernels have no committed counts for Triton {VERSION}: growth is not known.")
    together = {**committed, VERSION: now if options.all else {**before, **now}}
    if options.table:
        write_table(table([gate for gate in found if gate.shown], together))
    if options.update:
        write_counts(together)
    if faults:
        sys.exit("\n".join(faults))
    print(f"{len(found)} kernels within their limits.")


if __name__ == "__main__":
    main()
