"""Calibration data as streams: one per task, each a list of batches."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from epmq.errors import CalibrationError
from epmq.world import World, shares

POSITION_WEIGHTS = "position_weights"
HELD_OUT_EVERY = 5


@dataclass
class Batch:
    """One batch of a task: the model's keyword arguments and what counts of them.

    position_weights: fp32 ``[B, S]`` or None; 0 leaves a position out of every statistic. held: bool ``[B]``, the
    examples kept back when settings are chosen. number: its place in the task.
    """

    inputs: dict[str, Any]
    position_weights: Tensor | None
    held: Tensor
    number: int = 0

    @property
    def elements(self) -> int:
        """Size of its largest input tensor: what running it costs, beside other batches of the same kind."""
        return max(value.numel() for value in self.inputs.values() if isinstance(value, Tensor))


def make_streams(calibration: Mapping[str, Iterable[Mapping[str, Any]]]) -> dict[str, list[Batch]]:
    """Batches per task from ``{task: iterable of keyword-argument dicts for the model's forward}``.

    Positions where a 2-d ``attention_mask`` is 0 are left out of the statistics. A dict may carry
    ``position_weights`` (``[B, S]``, >= 0), which replaces the mask there and is not passed to the model.
    Raises CalibrationError for an empty task or a batch that is not a dict of keyword arguments.
    """
    streams = {}
    for task, batches in calibration.items():
        examples = 0
        stream = []
        for number, inputs in enumerate(batches):
            if not isinstance(inputs, Mapping):
                raise CalibrationError(
                    f"task {task!r}: batch {number} is a {type(inputs).__name__}; give a dict of the forward's"
                    " keyword arguments."
                )
            batch = _make_batch(task, number, dict(inputs), examples)
            examples += len(batch.held)
            stream.append(batch)
        if not stream:
            raise CalibrationError(f"task {task!r}: its calibration set is empty.")
        streams[task] = stream
    if not streams:
        raise CalibrationError("the calibration data names no task.")
    return streams


def _make_batch(task: str, number: int, inputs: dict[str, Any], seen: int) -> Batch:
    weights = inputs.pop(POSITION_WEIGHTS, None)
    tensors = [value for value in inputs.values() if isinstance(value, Tensor) and value.dim() > 0]
    if not tensors:
        raise CalibrationError(f"task {task!r}: batch {number} holds no tensor.")
    for name, value in inputs.items():
        if isinstance(value, Tensor) and value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise CalibrationError(f"task {task!r}: batch {number} holds NaN or Inf in {name!r}.")
    count = tensors[0].shape[0]
    if weights is not None:
        _check_position_weights(weights, inputs.get("input_ids"), count, f"task {task!r}: batch {number}")
    else:
        mask = inputs.get("attention_mask")
        weights = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None
    if weights is not None:
        weights = weights.float()
        if bool((weights < 0).any()) or not bool(torch.isfinite(weights).all()):
            raise CalibrationError(f"task {task!r}: batch {number} has negative or non-finite position weights.")
        # All ones is the common case of a batch without padding: nothing to weigh.
        weights = None if bool((weights == 1).all()) else weights
    held = (torch.arange(seen, seen + count) % HELD_OUT_EVERY) == HELD_OUT_EVERY - 1
    return Batch(inputs, weights, held, number)


def shared(streams: Mapping[str, list[Batch]], world: World) -> dict[str, list[Batch]]:
    """The batches of every task that this process runs."""
    if world.size == 1:
        return dict(streams)
    owners = shares({task: [batch.elements for batch in batches] for task, batches in streams.items()}, world.size)
    return {task: [b for b in streams[task] if owners[task][b.number] == world.rank] for task in streams}


def _check_position_weights(weights: Any, ids: Any, count: int, where: str) -> None:
    """Raise CalibrationError unless there is one weight per example and position (of the token ids, if any)."""
    shape = tuple(weights.shape) if isinstance(weights, Tensor) else ()
    expected = tuple(ids.shape) if isinstance(ids, Tensor) and ids.dim() == 2 else (count, *shape[1:2])
    if len(shape) != 2 or shape != expected:
        raise CalibrationError(
            f"{where}: {POSITION_WEIGHTS} must be a tensor with one weight per example and position, got"
            f" {list(shape) if isinstance(weights, Tensor) else type(weights).__name__} for {count} examples"
            f"{f' of {expected[1]} tokens' if expected[1:] else ''}."
        )


def rows_of(x: Tensor, batch: Batch) -> tuple[Tensor, Tensor | None, bool]:
    """Rows ``[M, K]`` of a linear's input, their weights ``[M]`` or None, and whether the positions' weights fitted.

    An input without one row per position (a pooled vector, windows) takes part with all its rows.
    """
    rows = x.reshape(-1, x.shape[-1])
    if batch.position_weights is None:
        return rows, None, True
    if x.shape[:-1].numel() != batch.position_weights.numel():
        return rows, None, False
    return rows, batch.position_weights.reshape(-1), True


def split_held(rows: Tensor, weights: Tensor | None, x: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Row weights ``[M]`` of the fitted part and of the held-out part of a batch."""
    everything = torch.ones(rows.shape[0]) if weights is None else weights
    if x.shape[0] == len(batch.held):
        held = batch.held.repeat_interleave(rows.shape[0] // x.shape[0])
    else:
        held = (torch.arange(rows.shape[0]) % HELD_OUT_EVERY) == HELD_OUT_EVERY - 1
    return everything * ~held, everything * held
