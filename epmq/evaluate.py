"""Accuracy of a text encoder with one classification head per task."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from epmq.data import padded_batches, read_jsonl, texts_of, tokenize
from epmq.devices import home_of, moved
from epmq.errors import CalibrationError, EpmqError, ModelError, NumericalError, SourceError
from epmq.sources import FileSource, all_finite, read_finite
from epmq.texts import is_encoder_decoder, unreadable

Pooling = Literal["mean", "first"]


@dataclass(frozen=True)
class TextTask:
    """Tokenised test texts with labels, and the head that reads a feature: argmax(weight @ f + bias).

    head: the file it is from.
    """

    ids: list[list[int]]
    labels: Tensor
    weight: Tensor
    bias: Tensor
    head: str


def load_task(
    tokenizer: Any,
    data: str | Path,
    head: str | Path,
    max_length: int,
    text_key: str = "text",
    limit: int | None = None,
) -> TextTask:
    """A task from a jsonl of {text, label} and a safetensors head with ``weight`` ``[C, D]`` and ``bias`` ``[C]``."""
    rows = read_jsonl(data, limit)
    if not rows:
        raise CalibrationError(f"{data}: holds no example.")
    for number, row in enumerate(rows, 1):
        if type(row.get("label")) is not int:
            raise CalibrationError(f"{data}, object {number}: it has no whole number under the key 'label'.")
    ids = tokenize(tokenizer, texts_of(rows, text_key, data), max_length)
    for number, tokens in enumerate(ids, 1):
        if not tokens:
            raise CalibrationError(f"{data}, object {number}: its text is no token to the tokenizer; remove it.")
    source = FileSource(head)
    if len(source.shape("weight")) != 2 or source.shape("bias") != source.shape("weight")[:1]:
        raise SourceError(f"{head}: expected weight [classes, features] and bias [classes].")
    classes = source.shape("weight")[0]
    for number, row in enumerate(rows, 1):
        if not 0 <= row["label"] < classes:
            raise CalibrationError(
                f"{data}, object {number}: label {row['label']} is none of the head's {classes} classes."
            )
    labels = torch.tensor([row["label"] for row in rows])
    return TextTask(ids, labels, read_finite(source, "weight").float(), read_finite(source, "bias").float(), str(head))


@torch.no_grad()
def features(model: nn.Module, ids: list[list[int]], pooling: Pooling, batch_size: int = 64, pad: int = 0) -> Tensor:
    """fp32 ``[texts, D]``: mean of the last hidden states over unpadded tokens, or the first token's.

    model: an encoder, or a transformers model with a head on one, which is passed by. Raises ModelError for one whose
    first output is not one vector per token.
    """
    model = getattr(model, "base_model", model)
    found: dict[int, Tensor] = {}
    device = home_of(model)
    for places, inputs in padded_batches(ids, batch_size, pad):
        inputs = moved(inputs, device)
        output = model(**inputs)
        hidden = (output if isinstance(output, Tensor) else output[0]).float()
        if hidden.shape[:-1] != inputs["input_ids"].shape:
            raise ModelError(f"{type(model).__name__}: its first output is not one vector per token; give an encoder.")
        if pooling == "mean":
            mask = inputs["attention_mask"].unsqueeze(-1).float()
            pooled = (hidden * mask).sum(1) / mask.sum(1)
        else:
            pooled = hidden[:, 0]
        found.update(zip(places, pooled.cpu(), strict=True))
    return torch.stack([found[i] for i in range(len(ids))])


def check_head(model: nn.Module, task: TextTask, pooling: Pooling) -> None:
    """Try a task's longest text. Raises ModelError for a model without features of texts, SourceError, naming the file,
    for a head of another width."""
    if is_encoder_decoder(model):
        raise ModelError(
            f"{type(model).__name__}: it has a decoder beside its encoder; heads are scored on an encoder."
        )
    try:
        width = features(model, [max(task.ids, key=len)], pooling).shape[1]
    except EpmqError:
        raise
    except Exception as error:
        raise unreadable(model, {"input_ids": None, "attention_mask": None}, error) from error
    if width != task.weight.shape[1]:
        raise SourceError(
            f"{task.head}: weight reads {task.weight.shape[1]} features, and {type(model).__name__} gives {width}."
        )


def accuracy(model: nn.Module, task: TextTask, pooling: Pooling, batch_size: int = 64, pad: int = 0) -> float:
    """Percentage of texts whose predicted class is the label. Raises NumericalError where features are NaN or Inf."""
    found = features(model, task.ids, pooling, batch_size, pad)
    if not all_finite(found):
        raise NumericalError(
            f"{type(model).__name__}: its features of {task.head}'s texts are NaN or Inf; a wider dtype may hold them."
        )
    logits = found @ task.weight.T + task.bias
    return 100.0 * float((logits.argmax(1) == task.labels).float().mean())


def score(model: nn.Module, tasks: Mapping[str, TextTask], pooling: Pooling, pad: int = 0) -> dict[str, float]:
    """Accuracy per task, in percent."""
    return {name: accuracy(model, task, pooling, pad=pad) for name, task in tasks.items()}


def row(merge: str | None, method: str, bits: int | str | None, tasks: Mapping[str, float]) -> dict[str, Any]:
    """One row of a results table."""
    average = sum(tasks.values()) / len(tasks)
    return {"merge": merge, "method": method, "bits": bits, "average": average, "tasks": dict(tasks)}


def markdown_table(rows: list[dict[str, Any]]) -> str:
    """Rows as a Markdown table, accuracies in percent."""
    tasks = list(rows[0]["tasks"])
    lines = ["| merge | method | bits | " + " | ".join(tasks) + " | average |", "|" + "---|" * (len(tasks) + 4)]
    for entry in rows:
        scores = " | ".join(f"{entry['tasks'][task]:.1f}" for task in tasks)
        bits = "–" if entry["bits"] is None else entry["bits"]
        merge = (entry["merge"] or "–").replace("_", " ")
        lines.append(f"| {merge} | {entry['method']} | {bits} | {scores} | **{entry['average']:.1f}** |")
    return "\n".join(lines)
