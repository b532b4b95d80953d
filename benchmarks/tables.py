"""``make tables``: writes the tables of README.md and docs/ from the JSON files in results/; ``--check`` only compares.

A table stands between ``<!-- table NAME -->`` and ``<!-- end -->``; what is measured decides its lines.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from epmq.evaluate import markdown_table

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).parent / "results"
PAGES = ["README.md", "docs/benchmarks.md", "docs/formats.md", "docs/minilm8.md", "docs/running.md"]
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


def table(names: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table in Markdown."""
    lines = [f"| {' | '.join(cells)} |" for cells in (names, *rows)]
    return "\n".join([lines[0], "|" + "---|" * (lines[0].count(" | ") + 1), *lines[1:]])


def averages() -> str:
    """Average accuracies of minilm8: a line per merge and bits, a column per method."""
    rows = read("minilm8.json")["rows"]
    methods = ["rtn", "gptq", "regmean", "fp+gptq", "epmq-paper", "epmq"]
    lines = []
    for merge, told in MERGES.items():
        for bits in (4, 3, 2):
            cells = [cell(rows, merge, method, bits) for method in methods]
            lines.append([told, cell(rows, merge, "merged", None), str(bits), *cells[:-1], f"**{cells[-1]}**"])
    return table(["merge", "merged, 32 bits", "bits", *methods], lines)


def every_row() -> str:
    """All of minilm8."""
    return markdown_table(read("minilm8.json")["rows"])


def samples() -> str:
    """4 bits on other samples of the calibration texts."""
    files = {"the first 256": "minilm8.json"} | {f"seed {n}": f"minilm8-seed{n}.json" for n in SEEDS}
    methods = ["regmean", "epmq-paper", "epmq"]
    return table(
        ["calibration texts", *methods],
        (
            [told, *(cell(read(file)["rows"], "task_arithmetic", method, 4) for method in methods)]
            for told, file in files.items()
        ),
    )


def caption(facts: dict[str, Any]) -> str:
    """The line above a table: where and when it was measured."""
    machine = facts["machine"]
    return f"{machine['processor']}, {machine['threads']} threads, torch {machine['torch']}, {facts['date'][:10]}\n\n"


def operations(level: str) -> str:
    """Every case of every operation against each rival, from the last whole run of make bench with that level."""
    facts = read(f"summary-{level}.json")
    return caption(facts) + table(
        ["operation", "case", "ours, ms", "rival", "rival, ms", "ratio"],
        (
            [row["op"], row["case"], f"{row['ours_ms']:.3g}", row["rival"], f"{row['rival_ms']:.3g}",
             f"{row['ratio']:.2f}"]
            for row in facts["rows"]
        ),
    )  # fmt: skip


def whole_job(level: str) -> str:
    """Seconds and memory of a whole quantization beside the rival's."""
    facts = read(f"whole_job-{level}.json")
    rows = facts["rows"]
    return caption(facts) + table(
        ["side", "seconds", "peak memory, MiB", "× our GPTQ"],
        (
            [what, f"{row['seconds']:.1f}", f"{row['peak_mb']:.0f}", f"{row['seconds'] / rows['gptq']['seconds']:.2f}"]
            for what, row in rows.items()
        ),
    )


def memory() -> str:
    """Peak memory of merge-and-quantize by depth and number of experts."""
    names = ["blocks", "experts", "weights", "imports", "peak"]
    told = ["blocks", "experts", "weights on disk, MiB", "imports, MiB", "peak, MiB"]
    return table(told, ([f"{row[name]:.0f}" for name in names] for row in read("memory.json")))


def processes() -> str:
    """Seconds and equal codes by number of processes."""
    return table(
        ["processes", "blocks, s", "command, s", "speed-up of the blocks", "equal codes"],
        (
            [str(row["processes"]), f"{row['blocks']:.1f}", f"{row['command']:.1f}", f"{row['speed_up']:.2f}",
             f"{row['equal_codes']:.3%}"]
            for row in read("processes.json")["rows"]
        ),
    )  # fmt: skip


def statistics() -> str:
    """What statistics in place of data, and several processes, cost in accuracy; beside rows of minilm8."""
    rows = read("minilm8.json")["rows"]
    return table(
        ["made from", "average accuracy"],
        [
            ["nothing but the weights (merged, unquantized)", cell(rows, "task_arithmetic", "merged", None)],
            *([row["method"], f"{row['average']:.2f}"] for row in read("statistics.json")["rows"]),
            ["data: RegMean++, then GPTQ", cell(rows, "task_arithmetic", "regmean", 4)],
            ["data: preset `best`", cell(rows, "task_arithmetic", "epmq", 4)],
        ],
    )


def loaded() -> str:
    """Folders of minilm8 as transformers and epmq load them."""
    rows = read("minilm8-loaded.json")["rows"]
    return table(["folder: who loads it", "average accuracy"], ([r["method"], f"{r['average']:.2f}"] for r in rows))


def gguf() -> str:
    """Tiny models in llama.cpp: their logits beside those of the file in 32 bits."""
    found = read("gguf.json")
    rows = ([r["model"], r["type"], f"{r['ours']:.2g}", f"{r['theirs']:.2g}"] for r in found["rows"])
    return f"{engine(found)}\n\n{table(['model', 'type', 'our codes', 'rounded by llama.cpp'], rows)}"


def gguf_minilm8() -> str:
    """minilm8 in llama.cpp."""
    found = read("gguf-minilm8.json")
    rows = ([r["method"], f"{r['average']:.2f}"] for r in found["rows"])
    return f"{engine(found)}\n\n{table(['folder: who runs it', 'average accuracy'], rows)}"


def engine(found: dict[str, Any]) -> str:
    """Versions of llama.cpp's results."""
    return f"llama-cpp-python {found['llama-cpp-python']}, transformers {found['transformers']}, {found['date']}"


TABLES: dict[str, Callable[[], str]] = {
    "averages": averages,
    "every-row": every_row,
    "samples": samples,
    "operations-amx": partial(operations, "amx"),
    "operations-avx512bf16": partial(operations, "avx512bf16"),
    "whole-job-amx": partial(whole_job, "amx"),
    "whole-job-avx512bf16": partial(whole_job, "avx512bf16"),
    "memory": memory,
    "processes": processes,
    "statistics": statistics,
    "loaded": loaded,
    "gguf": gguf,
    "gguf-minilm8": gguf_minilm8,
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
