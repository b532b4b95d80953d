"""The table of eight real experts: merge, calibrate, round, score. See ``--help``; ``make minilm8`` runs it.

DATA holds base/, experts/TASK/ (each with model.safetensors and head.safetensors) and data/TASK/{train,validation,
test}.jsonl. Calibration takes 256 training texts of each task, labels unused. Rows are kept as they are measured in
FILE.partial, so an interrupted run goes on where it stopped; FILE itself is written, or replaced, by a whole run.
"""

from __future__ import annotations

import argparse
import datetime
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from epmq.compare import METHODS, Comparison
from epmq.config import QuantConfig, preset
from epmq.data import calibration_batches
from epmq.evaluate import TextTask, load_task, markdown_table, row, score
from epmq.files import write_text
from epmq.huggingface import skeleton_from_folder, tokenizer_from_folder
from epmq.merge import MergedSource
from epmq.merge_config import MergeConfig
from epmq.names import NamedForModel
from epmq.report import machine
from epmq.skeleton import fill
from epmq.sources import FileSource, WeightSource

MERGES: dict[str, dict[str, Any]] = {
    "task_arithmetic": {"method": "task_arithmetic", "scaling": 0.3},
    "ties": {"method": "ties", "dialect": "fusion_bench", "density": 20, "scaling": 0.3},
}
GROUP_SIZE = {4: 128, 3: 128, 2: 64}
EXAMPLES, MAX_LENGTH, BATCH = 256, 64, 32


class Benchmark:
    """The unfolded folder, opened once."""

    def __init__(self, data: Path, split: str, seed: int | None):
        self.data = data
        self.tasks = sorted(path.name for path in (data / "experts").iterdir())
        self.tokenizer = tokenizer_from_folder(data / "base")
        self.test: dict[str, TextTask] = {
            task: load_task(
                self.tokenizer,
                data / f"data/{task}/{split}.jsonl",
                data / f"experts/{task}/head.safetensors",
                MAX_LENGTH,
            )
            for task in self.tasks
        }
        self.calibration: dict[str, list[Any]] = {
            task: calibration_batches(
                self.tokenizer, data / f"data/{task}/train.jsonl", "text", EXAMPLES, MAX_LENGTH, BATCH, seed
            )
            for task in self.tasks
        }
        self.experts: dict[str, Any] = {task: data / f"experts/{task}" for task in self.tasks}

    def model(self, source: WeightSource) -> nn.Module:
        """The encoder with the weights of a source."""
        model = skeleton_from_folder(self.data / "base", set(source.keys()))
        fill(model, "", NamedForModel(source, model), torch.float32)
        return model

    def merged(self, merge: str) -> nn.Module:
        base = FileSource(self.data / "base")
        experts: dict[str, WeightSource] = {task: FileSource(path) for task, path in self.experts.items()}
        return self.model(MergedSource(base, experts, MergeConfig.read(MERGES[merge])))

    def score(self, model: nn.Module) -> dict[str, float]:
        return score(model, self.test, "mean")

    def score_experts(self) -> dict[str, float]:
        scores = {}
        for task in self.tasks:
            model = self.model(FileSource(self.experts[task]))
            scores.update(score(model, {task: self.test[task]}, "mean"))
        return scores


def wanted_rows(merges: list[str], methods: list[str], bits: list[int]) -> list[tuple[str | None, str, int | None]]:
    """Rows in table order: (merge, method, bits)."""
    rows: list[tuple[str | None, str, int | None]] = [(None, "expert", None), (None, "base", None)]
    for merge in merges:
        rows.append((merge, "merged", None))
        for method in methods:
            if method == "fp":
                rows.append((merge, "fp", None))
            else:
                rows += [(merge, method, b) for b in bits]
    return rows


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure what an interrupted run has not, and return all of it."""
    today = str(datetime.date.today())
    results: dict[str, Any] = {"rows": [], "settings": settings(args), "machine": machine(), "date": today}
    partial = args.json.with_name(f"{args.json.name}.partial") if args.json else None
    if partial and partial.is_file():
        earlier = json.loads(partial.read_text())
        if earlier["settings"] != results["settings"] or earlier["machine"] != results["machine"]:
            raise SystemExit(f"{partial}: begun with other settings or on another machine; remove it.")
        results["rows"] = earlier["rows"]
    done = {(entry["merge"], entry["method"], entry["bits"]) for entry in results["rows"]}
    todo = [key for key in wanted_rows(args.merge, args.method, args.bits) if key not in done]
    if args.seed is not None:
        # Nothing unquantized depends on the calibration sample but the stages in between, which no table shows.
        todo = [key for key in todo if key[2] is not None]
    todo.sort(key=urgency)
    bench = Benchmark(args.data, args.split, args.seed)
    comparison: tuple[str, Comparison] | None = None
    for merge, method, bits in todo:
        started = time.perf_counter()
        if method == "expert":
            scores = bench.score_experts()
        elif merge is None:
            scores = bench.score(bench.model(FileSource(args.data / "base")))
        else:
            if comparison is None or comparison[0] != merge:
                comparison = (merge, Comparison(bench.merged(merge), bench.experts, bench.calibration, GROUP_SIZE))
            model = comparison[1].merged if method == "merged" else comparison[1].model(method, bits)
            scores = bench.score(model)
        measured = row(merge, method, bits, scores)
        results["rows"].append(measured)
        results["rows"].sort(key=lambda e: order(e, wanted_rows(list(MERGES), list(METHODS), sorted(GROUP_SIZE)[::-1])))
        seconds = time.perf_counter() - started
        print(f"{merge} {method} {bits}: {measured['average']:.2f} {scores} ({seconds:.0f} s)", flush=True)
        if partial:
            write_text(partial, json.dumps(results, indent=1))
    if partial:
        write_text(args.json, json.dumps(results, indent=1))
        partial.unlink(missing_ok=True)
    return results


def urgency(key: tuple[str | None, str, int | None]) -> tuple[int, int]:
    """What is measured first, so that an interrupted run has answered the main questions."""
    merge, method, bits = key
    if merge is None or method == "merged":
        return (0, 0)
    telling = [("gptq", 4), ("regmean", 4), ("epmq", 4), ("epmq-paper", 4), ("fp", None), ("epmq", 3), ("epmq", 2)]
    telling += [("fp+gptq", 2), ("fp+gptq", 4)]
    place = telling.index((method, bits)) if (method, bits) in telling else len(telling)
    return (1 + list(MERGES).index(merge), place)


def order(entry: dict[str, Any], rows: list[tuple[str | None, str, int | None]]) -> int:
    """Place of a row in the table."""
    key = (entry["merge"], entry["method"], entry["bits"])
    return rows.index(key) if key in rows else len(rows)


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """What the numbers depend on."""
    return {
        "split": args.split,
        "examples": EXAMPLES,
        "max_length": MAX_LENGTH,
        "seed": args.seed,
        "merges": MERGES,
        "group_size": {str(bits): size for bits, size in GROUP_SIZE.items()},
        "paper": preset("paper").model_dump(mode="json"),
        "best": preset("best").model_dump(mode="json"),
        "gptq": QuantConfig(method="gptq").model_dump(mode="json"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the unfolded folder")
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--split", default="test", choices=["validation", "test"])
    parser.add_argument("--merge", nargs="*", default=list(MERGES), choices=list(MERGES))
    parser.add_argument("--method", nargs="*", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--bits", nargs="*", type=int, default=[4, 3, 2], choices=[4, 3, 2])
    parser.add_argument("--seed", type=int, help="draw the calibration texts with this seed, not the first ones")
    args = parser.parse_args()
    if not (args.data / "base").is_dir() or not (args.data / "experts").is_dir():
        raise SystemExit(f"{args.data}: holds no base/ and experts/; give the unfolded benchmark with --data FOLDER.")
    started = time.perf_counter()
    results = run(args)
    print(markdown_table(results["rows"]))
    print(f"{results['date']}, {time.perf_counter() - started:.0f} s, {results['machine']}")


if __name__ == "__main__":
    main()
