"""The report of a run: what was done, per layer and task, on which machine, with which versions."""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path
from typing import Any

import torch

from epmq import files
from epmq.config import QuantConfig
from epmq.memory import peak_memory_bytes

REPORT_NAME = "report.json"
# What two runs of the same job do not share, so that all other files of their folders are the same bytes.
RUN_NAME = "run.json"
OF_THE_RUN = ("seconds", "peak_memory_bytes", "machine", "processes")


def machine() -> dict[str, Any]:
    """Processor, threads and versions, as they stand beside every measured number."""
    return {
        "processor": processor_name(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": platform.system(),
    }


def processor_name() -> str:
    """The processor's own name where the system tells it."""
    path = Path("/proc/cpuinfo")
    if path.is_file():
        for line in path.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def build_report(found: dict[str, Any], config: QuantConfig, seconds: float, sizes: dict[str, int]) -> dict[str, Any]:
    """Join an engine's findings with settings, time, memory and size; averages over layers are added per task."""
    return {
        "settings": config.model_dump(mode="json"),
        "seconds": round(seconds, 3),
        "peak_memory_bytes": peak_memory_bytes(),
        "bytes": sizes,
        "machine": machine(),
        "escalated": escalated_layers(found),
        "average_error": average_errors(found["layers"]),
        **found,
    }


def escalated_layers(found: dict[str, Any]) -> list[str]:
    """Linears whose damping was raised, in any stage."""
    earlier = found.get("stages", {}).get("closed_form", {}).get("layers", [])
    return list(dict.fromkeys(row["linear"] for row in earlier + found["layers"] if row["escalated"]))


def average_errors(layers: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Mean over layers of the relative output error: {task: {method: error}}."""
    sums: dict[str, dict[str, list[float]]] = {}
    for row in layers:
        for task, errors in row["tasks"].items():
            for method, error in errors.items():
                sums.setdefault(task, {}).setdefault(method, []).append(error)
    return {task: {m: sum(v) / len(v) for m, v in methods.items()} for task, methods in sums.items()}


def write_report(folder: Path, report: dict[str, Any]) -> None:
    """Leave the report in a folder: ``report.json``, and in ``run.json`` what differs from run to run."""
    told, run = _divided(report)
    files.write_text(folder / REPORT_NAME, json.dumps(told, indent=1))
    files.write_text(folder / RUN_NAME, json.dumps(run, indent=1))


def read_report(folder: Path) -> dict[str, Any]:
    """The report of a folder as it was before it was divided into files; a folder without ``run.json`` is read too."""
    told: dict[str, Any] = json.loads((folder / REPORT_NAME).read_text())
    run = json.loads((folder / RUN_NAME).read_text()) if (folder / RUN_NAME).is_file() else {}
    _give_back(told, run)
    return told


def _divided(value: Any) -> tuple[Any, Any]:
    """A nested value without the facts of the run, and those facts in the same nesting."""
    if isinstance(value, dict):
        parts = {key: _divided(item) for key, item in value.items() if key not in OF_THE_RUN}
        told = {key: part[0] for key, part in parts.items()}
        run = {key: value[key] for key in OF_THE_RUN if key in value}
        return told, {**run, **{key: part[1] for key, part in parts.items() if part[1]}}
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        pairs = [_divided(item) for item in value]
        return [told for told, _ in pairs], [run for _, run in pairs] if any(run for _, run in pairs) else {}
    return value, {}


def _give_back(told: Any, run: Any) -> None:
    if isinstance(run, list):
        for item, facts in zip(told, run, strict=True):
            _give_back(item, facts)
    elif isinstance(run, dict):
        for key, value in run.items():
            if key in told:
                _give_back(told[key], value)
            else:
                told[key] = value
