"""The report of a run: what was done, per layer and task, on which machine, with which versions. Built, left, read."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from epmq import files, trust
from epmq.config import QuantConfig
from epmq.errors import FormatError
from epmq.memory import peak_memory_bytes
from epmq.settings import explain

REPORT_NAME = "report.json"
RESULTS_NAME = "results.json"
# What two runs of the same job do not share, so that report.json is the same bytes.
RUN_NAME = "run.json"
OF_THE_RUN = ("seconds", "peak_memory_bytes", "peak_device_memory_bytes", "machine", "device", "processes")
AGAINST_EXPERT, OF_ROUNDING = "mean output error against the expert", "rounding the distilled model"
# A page computes with them.
Whole = Annotated[int, Field(ge=0, le=trust.INT64_MAX)]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Model = TypeVar("Model", bound=BaseModel)


class _Read(BaseModel):
    """Part of a report file; keys it does not know are left alone."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class LayerRow(_Read):
    """One linear: λ, damping, seconds, and per task the relative squared output error by the name of what made it."""

    linear: str
    shape: list[Whole]
    anchor: float = Field(alias="lambda")
    damp: float
    escalated: bool
    seconds: Seconds
    tasks: dict[str, dict[str, float]]


class BlockRow(_Read):
    """One block: seconds, and per task the relative squared error of the hidden states behind it."""

    block: str
    seconds: Seconds
    hidden_error: dict[str, float]


class ClosedForm(_Read):
    """What the first stage of a distilled run found; errors are against the experts."""

    layers: list[LayerRow]
    blocks: list[BlockRow]


class Distilled(_Read):
    """Losses at both ends, and the pairs of tasks that were shown to each other's experts."""

    steps: Whole
    first_loss: float
    last_loss: float
    pairs: list[list[str]]


class Stages(_Read):
    """The stages in front of the last pass of a distilled run."""

    closed_form: ClosedForm | None = None
    distill: Distilled | None = None


class RunReport(_Read):
    """A report as :func:`read_report` gives it; see docs/method.md, "The report"."""

    settings: dict[str, Any]
    seconds: Seconds
    peak_memory_bytes: Whole
    sizes: dict[str, Whole] = Field(alias="bytes")
    machine: dict[str, Any]
    escalated: list[str]
    average_error: dict[str, dict[str, float]]
    layers: list[LayerRow]
    blocks: list[BlockRow]
    notes: list[str]
    calibration: dict[str, dict[str, Whole]] = Field(default_factory=dict)
    stages: Stages = Stages()
    fingerprint: str | None = None


class ResultRow(_Read):
    """One row of a table of accuracies, in percent."""

    merge: str | None
    method: str
    bits: Whole | None
    average: float
    tasks: dict[str, float]


class Results(_Read):
    """What ``epmq demo`` and the table scripts leave in results.json."""

    rows: list[ResultRow]


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


def told_errors(report: Mapping[str, Any]) -> list[tuple[str, dict[str, dict[str, float]]]]:
    """The mean errors by stage, each with what they are errors of, first those against the experts."""
    closed = report.get("stages", {}).get("closed_form")
    if closed is None or not report["average_error"]:
        return [(AGAINST_EXPERT, report["average_error"])]
    names = {"epmq": "closed form"}
    first = (AGAINST_EXPERT, _renamed(average_errors(closed["layers"]), names))
    # Where nothing is rounded the closed form's layers are the last.
    if closed["layers"] == report["layers"]:
        return [first]
    return [first, (OF_ROUNDING, _renamed(report["average_error"], {"merged": "distilled"}))]


def _renamed(errors: Mapping[str, Mapping[str, float]], names: Mapping[str, str]) -> dict[str, dict[str, float]]:
    return {task: {names.get(name, name): error for name, error in row.items()} for task, row in errors.items()}


def write_report(folder: Path, report: dict[str, Any]) -> None:
    """Leave the report in a folder: ``report.json``, and in ``run.json`` what differs from run to run."""
    told, run = _divided(report)
    files.write_text(folder / REPORT_NAME, json.dumps(told, indent=1))
    files.write_text(folder / RUN_NAME, json.dumps(run, indent=1))


def whole_report(folder: str | Path) -> Any:
    """The report of a folder as it was before it was divided into files; one that was never divided is read too.

    Raises FormatError naming the file that is missing or malformed.
    """
    path = Path(folder) / REPORT_NAME
    told = _json(path)
    run = _json(path.with_name(RUN_NAME)) if path.with_name(RUN_NAME).is_file() else {}
    try:
        _give_back(told, run)
    except (TypeError, ValueError, AttributeError) as error:
        raise FormatError(f"{path.with_name(RUN_NAME)}: not of the report beside it ({error}).") from None
    return told


def read_report(folder: str | Path) -> RunReport:
    """The report of a folder. Raises FormatError naming the file, and the key where one is missing or wrong."""
    path, content = Path(folder) / REPORT_NAME, whole_report(folder)
    if isinstance(content, dict) and "settings" in content and "seconds" not in content:
        raise FormatError(f"{path.with_name(RUN_NAME)}: there is no such file, which holds the seconds of {path.name}.")
    return _checked(content, path, RunReport)


def read_results(folder: str | Path) -> Results | None:
    """The table of accuracies beside a report, or None. Raises FormatError as :func:`read_report` does."""
    path = Path(folder) / RESULTS_NAME
    return _checked(_json(path), path, Results) if trust.exists(path) else None


def _json(path: Path) -> Any:
    if not trust.exists(path):
        raise FormatError(f"{path}: there is no such file; give a folder that epmq quantize or demo made.")
    return trust.read_json(path, FormatError, "JSON")


def _checked(content: Any, path: Path, model: type[Model]) -> Model:
    try:
        return model.model_validate(content)
    except ValidationError as error:
        raise FormatError(f"{explain(error, model, str(path))[:-1]}; it is not a report of this version.") from None


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
