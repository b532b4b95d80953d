"""``make tables``: writes the tables of README.md and docs/ from the JSON files in results/; ``--check`` only compares.

A table stands between ``<!-- table NAME -->`` and ``<!-- end -->``; what is measured decides its lines.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from epmq.evaluate import markdown_table

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).parent / "results"
PAGES = ["README.md", "docs/formats.md", "docs/minilm8.md", "docs/running.md"]
REGION = re.compile(r"(<!-- table (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
MERGES = {"task_arithmetic": "Task Arithmetic 0.3", "ties": "TIES 0.3 / 20 %"}
SEEDS = (1, 2)


def read(name: str) -> Any:
    """A file of results, parsed."""
    return json.loads((RESULTS / name).read_text())


def cell(rows: list[dict[str, Any]], merge: str | None, method: str, bits: int | None) -> str:
    """A row's average accuracy, or a dash where it was not measured."""
    key = (merge, method, bits)
    found = [row["average"] for row in rows if (row["merge"], row["method"], row["bits"]) == key]
    return f"{found[0]:.1f}" if found else "–"


def averages() -> str:
    """Average accuracies of minilm8: a line per merge and bits, a column per method."""
    rows = read("minilm8.json")["rows"]
    methods = ["rtn", "gptq", "regmean", "fp+gptq", "epmq-paper", "epmq"]
    lines = ["| merge | merged, 32 bits | bits | " + " | ".join(methods) + " |", "|" + "---|" * (3 + len(methods))]
    for merge, told in MERGES.items():
        for bits in (4, 3, 2):
            cells = [cell(rows, merge, method, bits) for method in methods]
            cells[-1] = f"**{cells[-1]}**"
            merged = cell(rows, merge, "merged", None)
            lines.append(f"| {told} | {merged} | {bits} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def by_task() -> str:
    """The telling rows of minilm8 at 4 bits, task by task."""
    rows = read("minilm8.json")["rows"]
    shown = [row for row in rows if row["merge"] in (None, "task_arithmetic") and row["bits"] in (None, 4)]
    return markdown_table(shown)


def every_row() -> str:
    """All of minilm8."""
    return markdown_table(read("minilm8.json")["rows"])


def samples() -> str:
    """4 bits on other samples of the calibration texts, as far as they have been measured."""
    files = {"the first 256": "minilm8.json"}
    files |= {f"seed {n}": f"minilm8-seed{n}.json" for n in SEEDS if (RESULTS / f"minilm8-seed{n}.json").is_file()}
    methods = ["regmean", "epmq-paper", "epmq"]
    lines = ["| calibration texts | " + " | ".join(methods) + " |", "|" + "---|" * (1 + len(methods))]
    for told, file in files.items():
        rows = read(file)["rows"]
        lines.append(f"| {told} | " + " | ".join(cell(rows, "task_arithmetic", method, 4) for method in methods) + " |")
    return "\n".join(lines)


def operations() -> str:
    """Every case of every operation against each rival, from the last whole run of make bench."""
    lines = ["| operation | case | ours, ms | rival | rival, ms | ratio |", "|---|---|---|---|---|---|"]
    lines += [
        f"| {row['op']} | {row['case']} | {row['ours_ms']:.3g} | {row['rival']} | {row['rival_ms']:.3g}"
        f" | {row['ratio']:.2f} |"
        for row in read("summary.json")
    ]
    return "\n".join(lines)


def whole_job() -> str:
    """Seconds and memory of a whole quantization beside the rival's."""
    rows = read("whole_job.json")["rows"]
    lines = ["| | seconds | peak memory, MiB | × our GPTQ |", "|---|---|---|---|"]
    for what, row in rows.items():
        ratio = row["seconds"] / rows["gptq"]["seconds"]
        lines.append(f"| {what} | {row['seconds']:.1f} | {row['peak_mb']:.0f} | {ratio:.2f} |")
    return "\n".join(lines)


def memory() -> str:
    """Peak memory of merge-and-quantize by depth and number of experts."""
    if not (RESULTS / "memory.json").is_file():
        return "Not measured yet for this version."
    names = ["blocks", "experts", "weights", "imports", "peak"]
    lines = ["| blocks | experts | weights on disk, MiB | imports, MiB | peak, MiB |", "|---|---|---|---|---|"]
    lines += ["| " + " | ".join(f"{row[name]:.0f}" for name in names) + " |" for row in read("memory.json")]
    return "\n".join(lines)


def processes() -> str:
    """Seconds and equal codes by number of processes."""
    if not (RESULTS / "processes.json").is_file():
        return "Not measured yet for this version."
    lines = ["| processes | blocks, s | command, s | speed-up of the blocks | equal codes |", "|---|---|---|---|---|"]
    lines += [
        f"| {row['processes']} | {row['blocks']:.1f} | {row['command']:.1f} | {row['speed_up']:.2f} |"
        f" {row['equal_codes']:.3%} |"
        for row in read("processes.json")["rows"]
    ]
    return "\n".join(lines)


def statistics() -> str:
    """What statistics in place of data, and several processes, cost in accuracy; beside rows of minilm8."""
    if not (RESULTS / "statistics.json").is_file():
        return "Not measured yet for this version."
    found = read("statistics.json")
    rows = read("minilm8.json")["rows"]
    lines = ["| made from | average accuracy |", "|---|---|"]
    lines.append(f"| nothing but the weights (merged, unquantized) | {cell(rows, 'task_arithmetic', 'merged', None)} |")
    lines += [f"| {row['method']} | {row['average']:.2f} |" for row in found["rows"]]
    lines.append(f"| data: RegMean++, then GPTQ | {cell(rows, 'task_arithmetic', 'regmean', 4)} |")
    lines.append(f"| data: preset `best` | {cell(rows, 'task_arithmetic', 'epmq', 4)} |")
    return "\n".join(lines)


def loaded() -> str:
    """Folders of minilm8 as transformers and epmq load them."""
    if not (RESULTS / "minilm8-loaded.json").is_file():
        return "Not measured yet for this version."
    lines = ["| folder: who loads it | average accuracy |", "|---|---|"]
    lines += [f"| {row['method']} | {row['average']:.2f} |" for row in read("minilm8-loaded.json")["rows"]]
    return "\n".join(lines)


TABLES: dict[str, Callable[[], str]] = {
    "averages": averages,
    "by-task": by_task,
    "every-row": every_row,
    "samples": samples,
    "operations": operations,
    "whole-job": whole_job,
    "memory": memory,
    "processes": processes,
    "statistics": statistics,
    "loaded": loaded,
}


def filled(text: str) -> str:
    """A page with its tables as the results have them."""
    return REGION.sub(lambda found: f"{found[1]}{TABLES[found[2]]()}\n{found[3]}", text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail where a page differs")
    options = parser.parse_args()
    stale = []
    for page in [ROOT / name for name in PAGES if (ROOT / name).is_file()]:
        text = page.read_text()
        if filled(text) != text:
            stale.append(page.name)
            if not options.check:
                page.write_text(filled(text))
    if options.check and stale:
        sys.exit(f"{', '.join(stale)}: the tables are not those of benchmarks/results; run make tables.")


if __name__ == "__main__":
    main()
