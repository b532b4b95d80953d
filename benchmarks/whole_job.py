"""The whole job beside its rival: minilm8, 256 texts a task, 4 bits in groups of 128, from model and batches in memory.

    python benchmarks/whole_job.py --data UNFOLDED [--rounds 3] [--threads 2]

llm-compressor's GPTQ of the merged model, our GPTQ of it, and E-PMQ towards the eight experts, as the closed form alone
and as the preset best (which distils, in float32), see the same batches, in
float32 and in bfloat16: there the rival's model is loaded in it, and our forward passes run in it (forward_dtype).
Each run is a process of its own, so that its peak memory is its own; rounds are interleaved, medians are told. The
rival runs in its own environment (``make peers``) and is named when that is absent. Writes
results/whole_job-LEVEL.json, LEVEL being the instruction set of the extension.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

HERE = Path(__file__).parent
RIVAL = "llmcompressor"
HALF = "bfloat16"
CLOSED, BEST = "epmq, closed form", "epmq, preset best"
OURS = ("gptq", CLOSED, f"{CLOSED} with diagnostics", BEST, f"gptq {HALF}", f"{CLOSED} {HALF}")
# The rival's environment holds no package of ours but the checkout.
sys.path.insert(0, str(HERE.parent))


def peak_megabytes() -> float:
    """Peak resident memory of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def batches_of(folder: Path) -> dict[str, list[dict[str, torch.Tensor]]]:
    """The calibration batches that ``prepare`` left, by task."""
    tensors = load_file(folder / "batches.safetensors")
    batches: dict[str, dict[int, dict[str, torch.Tensor]]] = {}
    for key, tensor in tensors.items():
        task, number, name = key.split("/")
        batches.setdefault(task, {}).setdefault(int(number), {})[name] = tensor
    return {task: [of[number] for number in sorted(of)] for task, of in sorted(batches.items())}


def prepare(data: Path, folder: Path) -> None:
    """The merged model as an ordinary checkpoint, and the batches, for every side to read."""
    from minilm8 import Benchmark

    bench = Benchmark(data, "validation", None)
    model: Any = bench.merged("task_arithmetic")
    model.save_pretrained(folder / "merged")
    tensors = {
        f"{task}/{number}/{name}": tensor.contiguous()
        for task, batches in bench.calibration.items()
        for number, batch in enumerate(batches)
        for name, tensor in batch.items()
    }
    save_file(tensors, folder / "batches.safetensors")


def run_ours(what: str, data: Path, folder: Path) -> float:
    """Seconds of one quantization by this package."""
    from transformers import AutoModel

    from epmq import QuantConfig, quantize
    from epmq.config import DistillSettings

    model = AutoModel.from_pretrained(folder / "merged", add_pooling_layer=False).eval()
    calibration = batches_of(folder)
    experts = {task: data / f"experts/{task}" for task in calibration}
    config = QuantConfig(
        method="gptq" if what.startswith("gptq") else "epmq",
        diagnostics=what.endswith("diagnostics"),
        forward_dtype=HALF if what.endswith(HALF) else "float32",
        distill=DistillSettings() if what == BEST else None,
    )
    start = time.perf_counter()
    quantize(model, experts if config.needs_experts else None, calibration, config)
    return time.perf_counter() - start


def run_rival(folder: Path, dtype: torch.dtype) -> float:
    """Seconds of llm-compressor's GPTQ with the same grids, order of columns, damping and batches."""
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from transformers import AutoModel

    model = AutoModel.from_pretrained(folder / "merged", add_pooling_layer=False, dtype=dtype).eval()
    batches = [batch for of_task in batches_of(folder).values() for batch in of_task]
    weights = {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "group", "group_size": 128}
    modifier = GPTQModifier(
        config_groups={"group_0": {"targets": ["Linear"], "weights": weights}},
        actorder="static",
        dampening_frac=0.01,
    )
    loader: Any = torch.utils.data.DataLoader(batches, batch_size=None)  # type: ignore[arg-type]
    start = time.perf_counter()
    oneshot(
        model=model,
        dataset=loader,
        recipe=[modifier],
        num_calibration_samples=len(batches),
        sequential_targets=["BertLayer"],
        pipeline="sequential",
    )
    return time.perf_counter() - start


def child(what: str, data: Path, folder: Path, threads: int) -> None:
    """One run, told as a line of JSON."""
    torch.set_num_threads(threads)
    if what.startswith(RIVAL):
        seconds = run_rival(folder, torch.bfloat16 if what.endswith(HALF) else torch.float32)
    else:
        seconds = run_ours(what, data, folder)
    print(json.dumps({"seconds": seconds, "peak_mb": peak_megabytes()}))


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Interleaved rounds of every side; medians."""
    rival = options.peers / RIVAL / "bin/python"
    sides = {what: Path(sys.executable) for what in OURS}
    if rival.exists():
        sides = {RIVAL: rival, f"{RIVAL} {HALF}": rival, **sides}
    else:
        print(f"{RIVAL}: absent ({rival} is not there; make peers)")
    seen: dict[str, list[dict[str, float]]] = {what: [] for what in sides}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        prepare(options.data, folder)
        for _ in range(options.rounds):
            for what, python in sides.items():
                command = [str(python), __file__, "--data", str(options.data), "--child", what, "--folder", temporary]
                command += ["--threads", str(options.threads)]
                environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(options.threads)}
                done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder)
                if done.returncode != 0:
                    sys.exit(f"{what} failed:\n{done.stderr[-3000:]}")
                seen[what].append(json.loads(done.stdout.strip().splitlines()[-1]))
    return {
        what: {name: round(statistics.median(run[name] for run in runs), 2) for name in ("seconds", "peak_mb")}
        for what, runs in seen.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the unfolded benchmark")
    parser.add_argument("--peers", type=Path, default=HERE.parent / ".venv-peers")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.data = options.data.resolve()
    if options.child:
        child(options.child, options.data, options.folder, options.threads)
        return
    from epmq import extension
    from epmq.report import machine

    found = measure(options)
    print("| side | seconds | peak memory, MiB | times our GPTQ |\n|---|---|---|---|")
    for what, row in found.items():
        ratio = row["seconds"] / found["gptq"]["seconds"]
        print(f"| {what} | {row['seconds']:.1f} | {row['peak_mb']:.0f} | {ratio:.2f} |")
    facts = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "machine": machine(), "rows": found}
    level = extension.build_report().get("cpu_level", "torch")
    (HERE / f"results/whole_job-{level}.json").write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
