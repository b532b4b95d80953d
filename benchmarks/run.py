"""``make bench``: every operation against its rivals on this machine, interleaved, in one run.

The operator tests run first; no speed-up is printed on a red test. Medians over interleaved rounds; bandwidth and
FLOP/s are set against what this machine reaches in the same run. Writes results/<date>.json and
results/summary-LEVEL.json, LEVEL being the instruction set in use.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from cache import beyond_cache, read_rate_buffer
from registry import Case, makers

from epmq import extension
from epmq.bench import interleaved
from epmq.report import machine, processor_name

HERE = Path(__file__).parent
# Beside the title of a table.
NOTES = {"dequant_matmul": f"; weights rotate through {beyond_cache() / 1e6:.0f} MB, so they come from memory"}
RESULTS = HERE / "results"


def limits(seconds: float) -> dict[str, float]:
    """Best read bandwidth (of memory, not of a cache) and fp32 product rate seen here, with the threads of the run."""
    big = read_rate_buffer()
    square = torch.randn(2048, 2048)
    best: dict[str, float] = {"read_gb_s": 0.0, "sgemm_gflop_s": 0.0}
    stop = time.perf_counter() + seconds
    while time.perf_counter() < stop:
        start = time.perf_counter()
        big.sum()
        middle = time.perf_counter()
        square @ square
        end = time.perf_counter()
        best["read_gb_s"] = max(best["read_gb_s"], big.numel() * 4 / (middle - start) / 1e9)
        best["sgemm_gflop_s"] = max(best["sgemm_gflop_s"], 2 * 2048**3 / (end - middle) / 1e9)
    return best


def measure(case: Case, seconds: float, best: dict[str, float]) -> list[dict[str, Any]]:
    """Time one case; one row per rival, printed and returned."""
    times = interleaved({"ours": case.ours, **case.rivals}, seconds)
    ours = times.pop("ours")
    speed = case.flops / ours / 1e6
    rate = f"{speed:6.1f} GFLOP/s ({100 * speed / best['sgemm_gflop_s']:.0f} % of sgemm)"
    if case.bytes_read:
        reading = case.bytes_read / ours / 1e6
        rate += f" {reading:5.1f} GB/s ({100 * reading / best['read_gb_s']:.0f} % of read)"
    rows = []
    for rival, taken in times.items():
        rows.append(
            {
                "op": case.op,
                "case": case.name,
                "ours_ms": round(ours, 4),
                "rival": rival,
                "rival_ms": round(taken, 4),
                "ratio": round(taken / ours, 3),
            }
        )
        print(f"  {case.name:32} {ours:9.3f} ms  {rival:20} {taken:9.3f} ms  {taken / ours:6.2f}x  {rate}", flush=True)
    for rival in case.absent:
        print(f"  {case.name:32} {rival}: absent from this torch", flush=True)
    return rows


def peer_rows() -> list[dict[str, Any]]:
    """Whole GPTQ against its rivals, each in its own environment; absent ones are named."""
    rows: list[dict[str, Any]] = []
    for peer in ("llmcompressor", "gptqmodel"):
        python = HERE.parent / ".venv-peers" / peer / "bin" / "python"
        if not python.exists():
            print(f"  {peer}: absent (make peers)")
            continue
        command = [str(python), str(HERE / "peers" / "gptq_time.py"), peer, "--json"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            print(f"  {peer}: failed: {done.stderr.strip().splitlines()[-1:]}")
            continue
        row = json.loads(done.stdout.strip().splitlines()[-1])
        print(f"  {row['case']:32} {row['ours_ms']:9.0f} ms  {peer:20} {row['rival_ms']:9.0f} ms  {row['ratio']:6.2f}x")
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=3.0, help="time per case")
    parser.add_argument("--op", help="only this operation")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--skip-tests", action="store_true", help="for trying things out; writes no results")
    options = parser.parse_args()
    if extension.module is None:
        sys.exit("The extension is not built: nothing to compare (make setup).")
    if not options.skip_tests:
        files = sorted((HERE.parent / "tests").glob("test_ops*.py"))
        tests = subprocess.run([sys.executable, "-m", "pytest", "-q", "-x", *map(str, files)])
        if tests.returncode != 0:
            sys.exit("The operator tests are red: no speed-up is printed.")
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    best = limits(options.seconds)
    print(f"limits: read {best['read_gb_s']:.1f} GB/s, sgemm {best['sgemm_gflop_s']:.0f} GFLOP/s")
    rows: list[dict[str, Any]] = []
    title = ""
    for make in makers():
        if options.op not in (None, make.op):
            continue
        case = make()
        if case.op != title:
            title = case.op
            print(f"\n{title}: median of interleaved runs, {options.threads} threads{NOTES.get(title, '')}")
        rows += measure(case, options.seconds, best)
    if options.op in (None, "gptq"):
        print("\ngptq: factor and sweep from H, one thread")
        rows += peer_rows()
    if options.skip_tests:
        return
    now = datetime.now(UTC)
    facts = {
        "date": now.isoformat(timespec="seconds"),
        "cpu": processor_name(),
        "threads": options.threads,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "build": extension.build_report(),
        "limits": best,
        "rows": rows,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{now:%Y-%m-%d-%H%M}.json").write_text(json.dumps(facts, indent=1) + "\n")
    short = {"date": facts["date"], "machine": machine(), "rows": rows}
    (RESULTS / f"summary-{extension.build_report()['cpu_level']}.json").write_text(json.dumps(short, indent=1) + "\n")


if __name__ == "__main__":
    main()
