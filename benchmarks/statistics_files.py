"""What it costs to share statistics in place of data: accuracy on eight real experts, beside the sequential method.

DATA is as for minilm8.py. Every expert's statistics are collected by a process of its own that is given the base, that
expert and its texts only; another process merges and rounds from these folders. See ``--help``.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

from epmq.evaluate import markdown_table, row
from epmq.files import write_text
from epmq.report import machine

EXAMPLES, MAX_LENGTH, BATCH = 256, 64, 32
MERGE = {"method": "task_arithmetic", "scaling": 0.3}


def epmq(*arguments: str | Path, processes: int = 1) -> None:
    """One verb in a process of its own."""
    command = [sys.executable, "-m"]
    if processes > 1:
        command += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m"]
    subprocess.run([*command, "epmq", *map(str, arguments)], check=True, stdout=subprocess.DEVNULL)


def write_recipe(path: Path, data: Path, tasks: list[str], quantization: dict[str, Any], with_data: bool) -> Path:
    """A recipe of some tasks; without calibration data when statistics stand for them."""
    recipe: dict[str, Any] = {
        "base": str(data / "base"),
        "experts": {task: str(data / "experts" / task / "model.safetensors") for task in tasks},
        "merge": MERGE,
        "quantization": quantization,
        "evaluation": {
            "tasks": {
                task: {
                    "data": str(data / "data" / task / "test.jsonl"),
                    "head": str(data / "experts" / task / "head.safetensors"),
                }
                for task in tasks
            },
            "max_length": MAX_LENGTH,
        },
    }
    if with_data:
        files = {task: str(data / "data" / task / "train.jsonl") for task in tasks}
        recipe["calibration"] = {
            "tasks": files,
            "examples": EXAMPLES,
            "max_length": MAX_LENGTH,
            "batch_size": BATCH,
        }
    path.write_text(yaml.safe_dump(recipe))
    return path


def score(recipe: Path, folder: Path) -> dict[str, float]:
    """Accuracy per task."""
    result = folder.with_suffix(".json")
    epmq("eval", folder, "--recipe", recipe, "--json", result)
    tasks: dict[str, float] = json.loads(result.read_text())["tasks"]
    return tasks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the unfolded folder of minilm8.py")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--processes", type=int, nargs="*", default=[], help="also the sequential method in so many")
    parser.add_argument("--anchor", type=float, nargs="*", default=[0.1], help="of the rows from statistics")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    args = parser.parse_args()
    data = args.data.resolve()
    tasks = sorted(path.name for path in (data / "experts").iterdir())
    settings: dict[str, Any] = {"bits": args.bits, "group_size": 128 if args.bits > 2 else 64}
    folder = Path(tempfile.mkdtemp(prefix="epmq-statistics-"))
    rows = []
    try:
        given: list[str | Path] = []
        for task in tasks:
            recipe = write_recipe(folder / f"{task}.yaml", data, [task], settings, True)
            epmq("collect", recipe, "--task", task, "--out", folder / f"statistics-{task}")
            given += ["--statistics", folder / f"statistics-{task}"]
        size = sum(path.stat().st_size for path in folder.rglob("statistics-*/*")) / len(tasks)
        print(f"{size / 2**20:.0f} MiB of statistics per expert", flush=True)
        ways: list[tuple[str, dict[str, Any], list[str | Path], int]] = []
        ways += [(f"statistics, anchor {a:g}", {**settings, "anchor": a}, given, 1) for a in args.anchor]
        ways += [("statistics, regmean", {**settings, "method": "regmean", "gamma": 0.9}, given, 1)]
        ways += [("sequential", settings, [], 1)]
        ways += [(f"sequential, {n} processes", settings, [], n) for n in args.processes]
        for number, (name, quantization, statistics, processes) in enumerate(ways):
            recipe = write_recipe(folder / f"{number}.yaml", data, tasks, quantization, not statistics)
            epmq("quantize", recipe, *statistics, "--out", folder / f"out-{number}", processes=processes)
            rows.append(row("task_arithmetic", name, args.bits, score(recipe, folder / f"out-{number}")))
            print(f"{name}: {rows[-1]['average']:.2f}", flush=True)
    finally:
        shutil.rmtree(folder)
    print(markdown_table(rows))
    if args.json is not None:
        write_text(args.json, json.dumps({"machine": machine(), "statistics_bytes": size, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
