"""Calibration data as streams: one per task, each a list of batches."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from epmq.calls import BlockAddress, StreamState
from epmq.data import IGNORED_LABEL
from epmq.devices import moved
from epmq.errors import CalibrationError, ModelError
from epmq.experts import weights_of_rows
from epmq.runner import BlockRunner
from epmq.world import World, shares

POSITION_WEIGHTS = "position_weights"
HELD_OUT_EVERY = 5
# Inputs that a block's positions may be those of; the first that its hidden states depend on is meant.
DECODER_SEQUENCES = ("decoder_input_ids", "decoder_inputs_embeds", "labels")
TEXT_SEQUENCES = ("input_ids", "inputs_embeds")
SEQUENCES = (*DECODER_SEQUENCES, *TEXT_SEQUENCES, "pixel_values")
NO_SEQUENCE = ""
# Ends the name of an input whose positions the hidden states have in front of the examples, as [S, B, K].
TIME_FIRST = ".T"


@dataclass
class Batch:
    """One batch of a task: the model's keyword arguments and what counts of them, all on one device.

    position_weights: fp32 ``[B, S]`` (``[B·C, S]`` for C texts an example) or None; 0 leaves a position out of every
    statistic. held: bool ``[B]``, the examples kept back when settings are chosen. decoder_weights: as
    position_weights, for the positions of a decoder. number: its place in the task.
    """

    inputs: dict[str, Any]
    position_weights: Tensor | None
    held: Tensor
    decoder_weights: Tensor | None = None
    number: int = 0

    @property
    def elements(self) -> int:
        """Size of its largest input tensor: what running it costs, beside other batches of the same kind."""
        return max(value.numel() for value in self.inputs.values() if isinstance(value, Tensor))

    def weights_of(self, sequence: str | None) -> Tensor | None:
        """Weights of the positions of the input ``sequence`` (None: of the batch's main one), as its name says in the
        order of the hidden states: ``[B, S]``, or ``[S, B]`` (:func:`sequence_of`)."""
        if sequence is not None and sequence.endswith(TIME_FIRST):
            weights = self.weights_of(sequence.removesuffix(TIME_FIRST))
            return None if weights is None else weights.T
        if sequence == NO_SEQUENCE:
            return None
        if sequence in DECODER_SEQUENCES:
            return self.decoder_weights
        if sequence not in (None, *TEXT_SEQUENCES) and any(key in self.inputs for key in TEXT_SEQUENCES):
            return None  # the mask is the text's
        return self.position_weights

    def output_weights(self, has_decoder: bool) -> Tensor | None:
        """Weights of the positions of the model's output. has_decoder: it is a decoder's, beside an encoder; labels are
        then what it reads, where nothing else is given for it."""
        keys = DECODER_SEQUENCES if has_decoder else DECODER_SEQUENCES[:2]
        return self.weights_of(next((key for key in keys if key in self.inputs), None))


def make_streams(
    calibration: Mapping[str, Iterable[Mapping[str, Any]]], device: torch.device | None = None
) -> dict[str, list[Batch]]:
    """Batches per task from ``{task: iterable of keyword-argument dicts for the model's forward}``, on ``device``.

    Positions where an ``attention_mask`` ``[B, S]``, or ``[B, C, S]`` for C texts an example, is 0 are left out of the
    statistics, and those of a decoder where ``decoder_attention_mask`` is 0 or, without one, ``labels`` are -100. A
    dict may carry ``position_weights`` (``[B, S]``, >= 0), which replaces ``attention_mask`` there and is not passed to
    the model. Inputs of floats become fp32.
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
            tracked = {name: _tracked(value) for name, value in inputs.items()}
            batch = _make_batch(task, number, tracked, examples, device or torch.device("cpu"))
            examples += len(batch.held)
            stream.append(batch)
        if not stream:
            raise CalibrationError(f"task {task!r}: its calibration set is empty.")
        if examples == 0:
            raise CalibrationError(f"task {task!r} has no calibration rows: its batches hold no example.")
        streams[task] = stream
    if not streams:
        raise CalibrationError("the calibration data names no task.")
    return streams


def counted(stream: Sequence[Batch]) -> dict[str, int]:
    """Examples of a task and, where its batches tell which count, the positions that do."""
    found = {"examples": sum(len(batch.held) for batch in stream)}
    used = [(batch.position_weights > 0).sum() for batch in stream if batch.position_weights is not None]
    # One wait for a device, not one a batch.
    return found | ({"positions": int(torch.stack(used).sum())} if len(used) == len(stream) else {})


def _tracked(value: Any) -> Any:
    """An input that tells whether it has been written into, which tensors of inference mode do not."""
    return value.clone() if isinstance(value, Tensor) and value.is_inference() else value


def _make_batch(task: str, number: int, inputs: dict[str, Any], seen: int, device: torch.device) -> Batch:
    weights = inputs.pop(POSITION_WEIGHTS, None)
    tensors = [value for value in inputs.values() if isinstance(value, Tensor) and value.dim() > 0]
    if not tensors:
        raise CalibrationError(f"task {task!r}: batch {number} holds no tensor.")
    if inputs.get("past_key_values") is not None:
        raise CalibrationError(
            f"task {task!r}: batch {number} holds past_key_values, which every forward pass would add to; leave it out."
        )
    for name, value in inputs.items():
        if isinstance(value, Tensor) and value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise CalibrationError(f"task {task!r}: batch {number} holds NaN or Inf in {name!r}.")
    # Other inputs may be one for all examples, as position_ids [1, S].
    usual = [inputs[key] for key in SEQUENCES if isinstance(inputs.get(key), Tensor) and inputs[key].dim() > 0]
    count = (usual or tensors)[0].shape[0]
    if weights is not None:
        _check_position_weights(weights, inputs.get("input_ids"), count, f"task {task!r}: batch {number}")
    else:
        weights = inputs.get("attention_mask")
    labels = inputs.get("labels")
    unlabelled = labels != IGNORED_LABEL if isinstance(labels, Tensor) else None
    where = f"task {task!r}: batch {number}"
    held = (torch.arange(seen, seen + count) % HELD_OUT_EVERY) == HELD_OUT_EVERY - 1
    decoder = _usable_weights(inputs.get("decoder_attention_mask", unlabelled), None, where)
    weights = moved(_usable_weights(weights, inputs.get("input_ids"), where), device)
    # Weights are fp32 in every forward pass, whatever they are stored in.
    return Batch(moved(inputs, device, torch.float32), weights, held.to(device), moved(decoder, device), number)


def _usable_weights(weights: Any, ids: Any, where: str) -> Tensor | None:
    """fp32 ``[B, S]``, or None where there is nothing to weigh; several texts an example, ``[B, C, S]`` as their ids,
    are as many examples to the blocks."""
    if not isinstance(weights, Tensor):
        return None
    if weights.dim() > 2 and isinstance(ids, Tensor) and weights.shape == ids.shape:
        weights = weights.flatten(0, -2)
    if weights.dim() != 2:
        return None
    weights = weights.float()
    if bool((weights < 0).any()) or not bool(torch.isfinite(weights).all()):
        raise CalibrationError(f"{where} has negative or non-finite position weights.")
    # All ones is the common case of a batch without padding.
    return None if bool((weights == 1).all()) else weights


def sequence_of(
    runner: BlockRunner, address: BlockAddress, inputs: Mapping[str, Any], state: StreamState
) -> str | None:
    """The input whose positions a list's blocks, of which ``address`` is the first, work on: the first usual one that
    their hidden states are made of, else any other. ``input_ids.T`` is ``input_ids`` where the hidden states are
    ``[S, B, K]``. None where no usual one is given, NO_SEQUENCE where they are made of no input at all."""
    if not any(isinstance(inputs.get(key), Tensor) for key in SEQUENCES):
        return None
    made_of = runner.origin(address).inputs
    for key in SEQUENCES:
        if key in made_of:
            return key + (TIME_FIRST if _is_time_first(runner, address, inputs, state, key) else "")
    return min(made_of, default=NO_SEQUENCE)


def _is_time_first(
    runner: BlockRunner, address: BlockAddress, inputs: Mapping[str, Any], state: StreamState, key: str
) -> bool:
    """Whether the hidden states that reach a block are ``[S, B, K]``: the first example is changed to see where."""
    value = inputs[key]
    hidden = runner.capture(address, inputs, StreamState(state.outputs)).hidden
    if value.dim() == 0 or hidden.dim() != 3 or hidden.shape[1] != len(value):
        return False
    # What another example has is surely allowed, and the most different one shows best.
    example = value[int((value != value[0]).flatten(1).sum(1).argmax())]
    if torch.equal(example, value[0]):
        example = example + 1 if example.is_floating_point() else torch.where(example > 0, example - 1, 1)
    changed = torch.cat([example.unsqueeze(0), value[1:]])
    try:
        other = runner.capture(address, {**inputs, key: changed}, StreamState(state.outputs)).hidden
    except (ModelError, RuntimeError):
        return False  # a model that checks one input by another, as the places of images in a text
    if other.shape != hidden.shape or torch.equal(other, hidden):
        return hidden.shape[0] != len(value)
    moved = (other != hidden).any(-1)
    return bool(moved[1:].any()) and not bool(moved[:, 1:].any())


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


def rows_of(x: Tensor, position_weights: Tensor | None) -> tuple[Tensor, Tensor | None, bool]:
    """Rows ``[M, K]`` of a linear's input, their weights ``[M]`` or None, and whether the positions' weights fitted.

    position_weights: ``[B, S]``, or ``[S, B]`` where the hidden states are so. An input that has them the other way
    round takes them so; one without one row per position (a pooled vector, windows) takes part with all its rows.
    """
    rows = x.reshape(-1, x.shape[-1])
    if position_weights is None:
        return rows, None, True
    if _in_order(x.shape[:-1], position_weights):
        return rows, position_weights.reshape(-1), True
    if x.shape[:-1] == position_weights.T.shape:
        return rows, position_weights.T.reshape(-1), True
    return rows, None, False


def rows_read(
    block: nn.Module, linear: str, x: Tensor, position_weights: Tensor | None
) -> tuple[Tensor, Tensor | None, bool]:
    """:func:`rows_of` for what a linear of a block has just read: inside a mixture, whose router picks rows, with the
    weights of the positions that were picked."""
    rows, weights, matched = rows_of(x, position_weights)
    if not matched and position_weights is not None:
        weights = weights_of_rows(block, linear, position_weights)
    return rows, weights, matched or weights is not None


def _in_order(places: torch.Size, weights: Tensor) -> bool:
    """Whether rows at these places are one per weight, in the weights' order: in one dimension, in their two, or with
    one of the two taken apart."""
    if places.numel() != weights.numel():
        return False
    return max(places, default=1) == places.numel() or places[0] == len(weights) or places[-1] == weights.shape[1]


def split_held(
    rows: Tensor, weights: Tensor | None, x: Tensor, batch: Batch, sequence: str | None = None
) -> tuple[Tensor, Tensor]:
    """Row weights ``[M]`` of the fitted part and of the held-out part of a batch."""
    everything = torch.ones(len(rows), dtype=torch.float32, device=rows.device) if weights is None else weights
    time_first = sequence is not None and sequence.endswith(TIME_FIRST)
    count = len(batch.held)
    if time_first and x.dim() > 2 and x.shape[-2] == count:
        held = batch.held.repeat(len(rows) // count)
    elif x.shape[0] == count:
        held = batch.held.repeat_interleave(len(rows) // count)
    else:
        held = (torch.arange(len(rows), device=rows.device) % HELD_OUT_EVERY) == HELD_OUT_EVERY - 1
    return everything * ~held, everything * held


def take(batch: Batch, rows: Tensor) -> Batch:
    """Some examples of a batch, with trailing columns that are all padding cut off."""
    count = len(batch.held)
    inputs = {
        key: value[rows] if isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == count else value
        for key, value in batch.inputs.items()
    }
    weights = batch.position_weights
    if weights is not None:
        weights = weights.unflatten(0, (count, -1))[rows].flatten(0, 1)
    mask = inputs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 2:
        width = mask.shape[1]
        used = max([1, *(mask.sum(0).nonzero().flatten() + 1).tolist()])
        for key, value in inputs.items():
            of_text = key not in DECODER_SEQUENCES and key != "decoder_attention_mask"
            if of_text and stands_by_position(key, value) and value.shape[1] == width:
                inputs[key] = value[:, :used]
        weights = None if weights is None else weights[:, :used]
    decoder = None if batch.decoder_weights is None else batch.decoder_weights[rows]
    return Batch(inputs, weights, batch.held[rows], decoder)


def stands_by_position(key: str, value: Any) -> bool:
    """Whether an input may have positions of a text as its second dimension. Images have channels there."""
    if not isinstance(value, Tensor) or value.dim() < 2:
        return False
    return value.dim() == 2 or key in TEXT_SEQUENCES or not value.is_floating_point()
