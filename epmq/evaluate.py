"""Accuracy of a model of texts with one classification head per task."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from epmq.data import padded_batches, read_jsonl, texts_of, tokenize
from epmq.devices import home_of, moved
from epmq.errors import CalibrationError, EpmqError, ModelError, NumericalError, SourceError
from epmq.sources import FileSource, all_finite, read_finite
from epmq.texts import is_encoder_decoder, unreadable

Pooling = Literal["mean", "first"]


class Head(Protocol):
    """What tells the class of a text from what a model makes of it. file: where it is from."""

    file: str

    @property
    def classes(self) -> int: ...

    def logits(self, model: nn.Module, inputs: dict[str, Tensor], pooling: Pooling, pad: int) -> Tensor:
        """fp32 ``[B, classes]`` of a batch that is filled with ``pad``, where the model is."""
        ...


class LinearHead:
    """A head on the feature f of a text: weight @ f + bias, of a safetensors file with ``weight`` ``[C, D]`` and
    ``bias`` ``[C]``. Raises SourceError for a file with others."""

    def __init__(self, file: str | Path):
        source = FileSource(file)
        if len(source.shape("weight")) != 2 or source.shape("bias") != source.shape("weight")[:1]:
            raise SourceError(f"{file}: expected weight [classes, features] and bias [classes].")
        self.file = str(file)
        self.weight, self.bias = read_finite(source, "weight").float(), read_finite(source, "bias").float()

    @property
    def classes(self) -> int:
        return len(self.weight)

    def logits(self, model: nn.Module, inputs: dict[str, Tensor], pooling: Pooling, pad: int) -> Tensor:
        """fp32 ``[B, C]``. Raises ModelError for a model without features, SourceError for one of another width."""
        found = pooled(model, inputs, pooling).cpu()
        if found.shape[1] != self.weight.shape[1]:
            raise SourceError(
                f"{self.file}: weight reads {self.weight.shape[1]} features, and {type(model).__name__} gives"
                f" {found.shape[1]}."
            )
        return found @ self.weight.T + self.bias


@dataclass(frozen=True)
class TextTask:
    """Tokenised test texts with labels, and the head that tells their classes."""

    ids: list[list[int]]
    labels: Tensor
    head: Head


def load_task(
    tokenizer: Any,
    data: str | Path,
    head: str | Path | Head,
    max_length: int,
    text_key: str = "text",
) -> TextTask:
    """A task from a jsonl of {text, label} and a head, or the file of a :class:`LinearHead`."""
    rows = read_jsonl(data)
    if not rows:
        raise CalibrationError(f"{data}: holds no example.")
    for number, row in enumerate(rows, 1):
        if type(row.get("label")) is not int:
            raise CalibrationError(f"{data}, object {number}: it has no whole number under the key 'label'.")
    ids = tokenize(tokenizer, texts_of(rows, text_key, data), max_length)
    for number, tokens in enumerate(ids, 1):
        if not tokens:
            raise CalibrationError(f"{data}, object {number}: its text is no token to the tokenizer; remove it.")
    if isinstance(head, (str, Path)):
        head = LinearHead(head)
    for number, row in enumerate(rows, 1):
        if not 0 <= row["label"] < head.classes:
            raise CalibrationError(
                f"{data}, object {number}: label {row['label']} is none of the head's {head.classes} classes."
            )
    return TextTask(ids, torch.tensor([row["label"] for row in rows]), head)


def pooled(model: nn.Module, inputs: dict[str, Tensor], pooling: Pooling) -> Tensor:
    """fp32 ``[B, D]``: mean of the last hidden states over unpadded tokens, or the first token's.

    model: an encoder, or a transformers model with a head on one, which is passed by. Raises ModelError for one whose
    first output is not one vector per token.
    """
    model = getattr(model, "base_model", model)
    if is_encoder_decoder(model):
        raise ModelError(
            f"{type(model).__name__}: it has a decoder beside its encoder; heads are scored on an encoder."
        )
    output = model(**inputs)
    hidden = (output if isinstance(output, Tensor) else output[0]).float()
    if hidden.shape[:-1] != inputs["input_ids"].shape:
        raise ModelError(f"{type(model).__name__}: its first output is not one vector per token; give an encoder.")
    if pooling == "first":
        return hidden[:, 0]
    mask = inputs["attention_mask"].unsqueeze(-1).float()
    return (hidden * mask).sum(1) / mask.sum(1)


@torch.no_grad()
def features(model: nn.Module, ids: list[list[int]], pooling: Pooling, batch_size: int = 64, pad: int = 0) -> Tensor:
    """fp32 ``[texts, D]``, on the CPU: what :func:`pooled` makes of tokenised texts."""
    return _of_texts(lambda inputs: pooled(model, inputs, pooling), home_of(model), ids, batch_size, pad)


def check_head(model: nn.Module, task: TextTask, pooling: Pooling, pad: int = 0) -> None:
    """Try a task's longest text. Raises ModelError for a model that texts alone, or a head, cannot be tried on, and
    SourceError, naming the file, for a head of another width."""
    try:
        _logits(model, TextTask([max(task.ids, key=len)], task.labels, task.head), pooling, 1, pad)
    except EpmqError:
        raise
    except Exception as error:
        raise unreadable(model, {"input_ids": None, "attention_mask": None}, error) from error


def accuracy(model: nn.Module, task: TextTask, pooling: Pooling, batch_size: int = 64, pad: int = 0) -> float:
    """Percentage of texts whose predicted class is the label. Raises NumericalError where outputs are NaN or Inf."""
    found = _logits(model, task, pooling, batch_size, pad)
    if not all_finite(found):
        raise NumericalError(
            f"{type(model).__name__}: what it makes of {task.head.file}'s texts is NaN or Inf; a wider dtype may hold"
            " it."
        )
    return 100.0 * int((found.argmax(1) == task.labels).sum()) / len(task.labels)


@torch.no_grad()
def _logits(model: nn.Module, task: TextTask, pooling: Pooling, batch_size: int, pad: int) -> Tensor:
    def compute(inputs: dict[str, Tensor]) -> Tensor:
        return task.head.logits(model, inputs, pooling, pad)

    return _of_texts(compute, home_of(model), task.ids, batch_size, pad)


def _of_texts(
    compute: Callable[[dict[str, Tensor]], Tensor],
    device: torch.device,
    ids: list[list[int]],
    batch_size: int,
    pad: int,
) -> Tensor:
    """One row per text, on the CPU, of what is computed of batches of similar length."""
    found: dict[int, Tensor] = {}
    for places, inputs in padded_batches(ids, batch_size, pad):
        found.update(zip(places, compute(moved(inputs, device)).cpu(), strict=True))
    return torch.stack([found[i] for i in range(len(ids))])


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
