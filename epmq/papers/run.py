"""Runs a paper's rows one after the other, keeps what is measured, and sets it beside what is published."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from epmq import files, trust
from epmq.api import write_result
from epmq.compare import Comparison
from epmq.console import progress_bar
from epmq.errors import ConfigError
from epmq.evaluate import row as result_row
from epmq.huggingface import carry_files
from epmq.papers.causal import CausalBenchmark
from epmq.papers.clip import ClipBenchmark
from epmq.papers.glue import GlueBenchmark
from epmq.papers.hub import Rows, hub_rows
from epmq.papers.settings import UNQUANTIZED, Paper, Row
from epmq.report import ResultRow, machine
from epmq.skeleton import fill, meta_copy
from epmq.sources import WeightSource

RESULTS_NAME = "results.json"
Results = dict[str, Any]


class Benchmark(Protocol):
    """What a kind of paper is made of. score: percent of a task's test split, or None where others have to score.
    folder: of the base, with its tokenizer."""

    base: nn.Module
    merged: nn.Module
    experts: dict[str, WeightSource]
    folder: Path
    score: Callable[[nn.Module, str], float] | None

    def calibration(self) -> dict[str, list[dict[str, Tensor]]]: ...


KINDS: dict[str, Callable[[Paper, Rows], Any]] = {
    "clip": ClipBenchmark,
    "glue": GlueBenchmark,
    "causal": CausalBenchmark,
}


def run_paper(paper: Paper, out: str | Path, device: str = "cpu", rows: Rows = hub_rows) -> Results:
    """Measure the rows of a paper that ``out`` has no result of yet; returns all results, which are left there.

    device: where models are scored. rows: ``(data, split, seed)`` to rows, each a mapping of columns. Models without a
    score here are saved to folders in ``out``, with the base's tokenizer. Raises ConfigError when ``out`` holds results
    of other settings.
    """
    folder = Path(out)
    results = read_results(paper, folder)
    wanted = [row for row in paper.rows if result_of(results, row) is None and not _folder_of(folder, row).exists()]
    if not wanted:
        return results
    folder.mkdir(parents=True, exist_ok=True)
    try:
        _measure(paper, folder, wanted, results, device, rows)
    finally:
        # Nothing is left of a run that came to no result.
        with suppress(OSError):
            folder.rmdir()
    return results


def _measure(paper: Paper, folder: Path, wanted: list[Row], results: Results, device: str, rows: Rows) -> None:
    """Measure rows one after the other, each kept in ``folder`` when it is known."""
    benchmark: Benchmark = KINDS[paper.kind](paper, rows)
    quantizes = any(row.method not in UNQUANTIZED for row in wanted)
    calibration = benchmark.calibration() if quantizes else {}
    comparison = Comparison(benchmark.merged, benchmark.experts, calibration, paper.group_size, **paper.quantization)
    for row in wanted:
        if benchmark.score is None:
            if row.method != "expert":
                model = _model(benchmark, comparison, row, "")
                # First, so that no folder is without the settings that it was made with.
                files.write_text(folder / RESULTS_NAME, json.dumps(results, indent=1))
                with files.new_folder(_folder_of(folder, row)) as working:
                    carry_files(benchmark.folder, working)
                    write_result(model, working)
            continue
        scores = {}
        with progress_bar(_label(row.method, row.bits)) as progress:
            for number, task in enumerate(paper.data):
                progress(task, number, len(paper.data))
                model = _model(benchmark, comparison, row, task)
                scores[task] = benchmark.score(model.to(device), task)
                model.to("cpu")
        results["rows"].append(result_row(paper.merge.method, row.method, row.bits, scores))
        files.write_text(folder / RESULTS_NAME, json.dumps(results, indent=1))


def _model(benchmark: Benchmark, comparison: Comparison, row: Row, task: str) -> nn.Module:
    if row.method == "pretrained":
        return benchmark.base
    if row.method == "merged":
        return benchmark.merged
    if row.method == "expert":
        expert = meta_copy(benchmark.base)
        fill(expert, "", benchmark.experts[task], torch.float32)
        return expert
    return comparison.model(row.method, row.bits)


def read_results(paper: Paper, folder: Path) -> Results:
    """Results so far: ``{"settings", "machine", "rows"}``, none in a new folder."""
    settings = paper.model_dump(mode="json", exclude={"rows", "published", "title"})
    path = folder / RESULTS_NAME
    if not trust.exists(path):
        return {"settings": settings, "machine": machine(), "rows": []}
    kind = "the results of a paper"
    results: Results = trust.read_json(path, ConfigError, kind)
    try:
        same = results["settings"] == settings
        results["rows"] = list(results["rows"])
        for row in results["rows"]:
            ResultRow.model_validate(row, strict=True)
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: not {kind} ({error!r}); give another folder as --out.") from error
    if not same:
        raise ConfigError(f"{path}: made with other settings than this paper's; give another folder as --out.")
    return results


def result_of(results: Results, row: Row) -> dict[str, Any] | None:
    """The measured row, if there is one."""
    found: Mapping[tuple[str, int | None], dict[str, Any]] = {
        (entry["method"], entry["bits"]): entry for entry in results["rows"]
    }
    return found.get((row.method, row.bits))


def tables(paper: Paper, results: Results) -> str:
    """Two Markdown tables: averages beside the published ones, and accuracies by task. What is missing is said."""
    lines = [f"# {paper.title}", "", "| method | bits | measured | published | published by |", "|---|---|---|---|---|"]
    by_task = ["| method | bits | from | " + " | ".join(paper.data) + " |", "|" + "---|" * (len(paper.data) + 3)]
    ours = {(row.method, row.bits) for row in paper.rows}
    published = {(entry.method, entry.bits) for entry in paper.published}
    order = [(row.method, row.bits) for row in paper.rows] + [
        (entry.method, entry.bits) for entry in paper.published if (entry.method, entry.bits) not in ours
    ]
    for method, bits in dict.fromkeys(order):
        found = result_of(results, Row.model_construct(method=method, bits=bits)) if (method, bits) in ours else None
        measured = "–" if (method, bits) not in ours else "not measured"
        if found is not None:
            measured = f"**{found['average']:.2f}**"
            by_task.append(_task_line(paper, method, bits, "measured", found["tasks"]))
        entries = [entry for entry in paper.published if (entry.method, entry.bits) == (method, bits)]
        for entry in entries:
            lines.append(f"| {method} | {_bits(bits)} | {measured} | {_two(entry.average)} | {entry.source} |")
            if entry.tasks:
                by_task.append(_task_line(paper, method, bits, entry.source, entry.tasks))
            measured = "″"
        if (method, bits) not in published:
            lines.append(f"| {method} | {_bits(bits)} | {measured} | – | |")
    return "\n".join(lines + [""] + (by_task if len(by_task) > 2 else [])).rstrip()


def _task_line(paper: Paper, method: str, bits: int | None, source: str, tasks: Mapping[str, float]) -> str:
    scores = " | ".join(f"{tasks[task]:.1f}" if task in tasks else "–" for task in paper.data)
    return f"| {method} | {_bits(bits)} | {source} | {scores} |"


def _two(value: float) -> str:
    return f"{value:.2f}".removesuffix("0")


def _bits(bits: int | None) -> str:
    return "–" if bits is None else str(bits)


def _label(method: str, bits: int | None) -> str:
    return method if bits is None else f"{method}, {bits} bits"


def _folder_of(folder: Path, row: Row) -> Path:
    return folder / (row.method if row.bits is None else f"{row.method}-{row.bits}bit")
