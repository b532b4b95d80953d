"""Speed-up of several processes over one, each on one thread: merge-and-quantize of a generated model or a recipe.

Exits with status 1 when two processes are less than 1.7 times as fast as one. The two are run by turns, so that what
else the machine does falls on both; the quickest of each counts. See ``--help``.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from memory import generate

from epmq.formats.kinds import open_reader
from epmq.quantized import unpack
from epmq.report import machine

WANTED = 1.7
TEXTS = 2048


def quantize(recipe: Path, out: Path, processes: int) -> dict[str, float]:
    """Seconds of the whole command and of its blocks."""
    command = [sys.executable, "-m"]
    if processes > 1:
        command += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m"]
    started = time.perf_counter()
    subprocess.run(
        [*command, "epmq", "quantize", str(recipe), "--out", str(out)],
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
    )
    whole = time.perf_counter() - started
    run = json.loads((out / "run.json").read_text())
    return {"command": whole, "blocks": sum(row["seconds"] for row in run["blocks"])}


def equal_codes(first: Path, second: Path) -> float:
    """Share of codes on which two folders agree."""
    ours, theirs = open_reader(first), open_reader(second)
    same = total = 0
    for name, facts in ours.linears.items():
        pair = [unpack(reader.parts(name)["packed"], facts.bits, facts.in_features) for reader in (ours, theirs)]
        same += int((pair[0] == pair[1]).sum())
        total += pair[0].numel()
    return same / total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, help="measure this job in place of a generated one")
    parser.add_argument("--processes", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--blocks", type=int, default=4, help="of the generated model")
    parser.add_argument("--texts", type=int, default=TEXTS, help="of the generated calibration data")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="epmq-processes-"))
    try:
        if args.recipe is None:
            generate(folder, args.blocks, 2, args.texts)
        recipe = args.recipe or folder / "recipe.yaml"
        best: dict[int, dict[str, float]] = {}
        for _ in range(args.repeat):
            for processes in args.processes:
                out = folder / f"out-{processes}"
                shutil.rmtree(out, ignore_errors=True)
                found = quantize(recipe, out, processes)
                best[processes] = min(best.get(processes, found), found, key=lambda row: row["blocks"])
        first = args.processes[0]
        print("| processes | blocks, s | command, s | speed-up of the blocks | equal codes |\n|---|---|---|---|---|")
        rows = []
        for processes, row in best.items():
            speed = best[first]["blocks"] / row["blocks"]
            equal = equal_codes(folder / f"out-{first}", folder / f"out-{processes}")
            rows.append({"processes": processes, **row, "speed_up": speed, "equal_codes": equal})
            print(f"| {processes} | {row['blocks']:.1f} | {row['command']:.1f} | {speed:.2f} | {equal:.4%} |")
    finally:
        shutil.rmtree(folder)
    if args.json is not None:
        args.json.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1))
    sys.exit(int(any(row["processes"] == 2 and row["speed_up"] < WANTED for row in rows)))


if __name__ == "__main__":
    main()
