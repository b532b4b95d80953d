"""lm-eval's tasks on a model folder: its own loop and its own numbers, around our loaded model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from epmq.errors import ConfigError, ModelError
from epmq.language import open_language_model


def run_tasks(
    folder: str | Path,
    tasks: list[str],
    include: str | Path | None = None,
    limit: int | None = None,
    batch_size: int = 1,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
) -> dict[str, Any]:
    """Results per task: {task: {metric: value}}, as lm-eval names and computes them.

    include: folder with task definitions of one's own. limit: examples per task, for trying things out. Raises
    ModelError when lm-eval is not installed, ConfigError for tasks it does not know.
    """
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ModelError(
            "tasks of lm-eval need lm-eval, which is not installed: pip install 'epmq[lm-eval]'."
        ) from error
    manager = TaskManager(include_path=None if include is None else str(include))
    if unknown := [task for task in tasks if not manager.match_tasks([task])]:
        raise ConfigError(f"lm-eval knows no task {unknown[0]!r}; lm-eval ls tasks lists them.")
    model, tokenizer = open_language_model(folder, device, dtype)
    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size)
    found = lm_eval.simple_evaluate(model=wrapped, tasks=tasks, task_manager=manager, limit=limit)
    results: dict[str, Any] = found["results"]
    return {"model": Path(folder).name, "limit": limit, "tasks": results}


def lines(result: dict[str, Any]) -> list[str]:
    """A table of the numbers."""
    told = ["| task | metric | value | standard error |", "|---|---|---|---|"]
    for task, metrics in result["tasks"].items():
        for name, value in metrics.items():
            metric, _, kind = name.partition(",")
            if not isinstance(value, (int, float)) or not kind or metric.endswith("_stderr"):
                continue
            error = metrics.get(f"{metric}_stderr,{kind}")
            shown = f"{error:.4f}" if isinstance(error, float) else "–"
            label = metric if kind == "none" else f"{metric} ({kind})"
            told.append(f"| {task} | {label} | {value:.4f} | {shown} |")
    return told
