"""One vector for each example of a batch: what distillation compares of two models."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from epmq.blocks import find_blocks
from epmq.errors import ModelError
from epmq.precision import AS_IT_IS, Precision
from epmq.streams import DECODER_SEQUENCES, TEXT_SEQUENCES, Batch, stands_by_position
from epmq.texts import is_encoder_decoder


class _HeadReached(Exception):
    """Carries what the output embeddings read out of the model's forward."""

    def __init__(self, hidden: Tensor):
        super().__init__()
        self.hidden = hidden


def pooled(model: nn.Module, batch: Batch, precision: Precision = AS_IT_IS) -> Tensor:
    """Features ``[B, D]`` of a batch, fp32: the model's first output, for a language model what its output embeddings
    read, for one that compares images and texts the features of both, for one that scores positions (answers to
    questions) what its last block gives; averaged over unmasked positions when it has them."""
    with nullcontext() if precision.dtype is None else precision.active():
        hidden = _last_hidden(model, batch).float()
        if hidden.dim() == 2 and _scores_positions(model, batch, hidden):
            hidden = _of_last_block(model, batch).float()
    count = len(batch.held)
    if len(hidden) != count and hidden.dim() == 3 and hidden.shape[1] == count:
        hidden = hidden.transpose(0, 1)  # time first
    if len(hidden) != count:
        raise ModelError(
            f"{type(model).__name__}: it gives {len(hidden)} features for a batch of {count} examples, and distillation"
            " compares those of each example; leave distill out."
        )
    if hidden.dim() < 3:
        return hidden.reshape(len(hidden), -1)
    weights = batch.output_weights(is_encoder_decoder(model))
    if weights is None or weights.shape != hidden.shape[:2]:
        return hidden.flatten(1, -2).mean(1)
    return (hidden * weights.unsqueeze(-1)).sum(1) / weights.sum(1, keepdim=True).clamp_min(1e-6)


def _last_hidden(model: nn.Module, batch: Batch) -> Tensor:
    find_head = getattr(model, "get_output_embeddings", None)
    head = find_head() if callable(find_head) else None
    if not isinstance(head, nn.Module):
        output = model(**batch.inputs)
        if isinstance(output, Mapping) and {"image_embeds", "text_embeds"} <= set(output):
            return torch.cat([output["image_embeds"], output["text_embeds"]], -1)
        return _first_features(model, output)
    handle = head.register_forward_pre_hook(_reach_head, with_kwargs=True)
    try:
        return _first_features(model, model(**batch.inputs))
    except _HeadReached as reached:
        return reached.hidden
    finally:
        handle.remove()


def _reach_head(head: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    # What a vocabulary of logits would take is not spent.
    raise _HeadReached(args[0] if args else next(iter(kwargs.values())))


def _first_features(model: nn.Module, output: Any) -> Tensor:
    """The first tensor of an output that can be features of examples; a loss in front of them is none."""
    if isinstance(output, Mapping):
        output = tuple(output.values())
    for value in output if isinstance(output, (tuple, list)) else (output,):
        if isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 0:
            return value
    raise ModelError(
        f"{type(model).__name__}: its output holds no tensor of features, which distillation compares; return one, or"
        " leave distill out."
    )


def _scores_positions(model: nn.Module, batch: Batch, output: Tensor) -> bool:
    """Whether an output ``[B, S]`` has one number per position, as shorter inputs show; else it is ``[B, D]``."""
    width = output.shape[1]
    texts = [
        value.shape[:2]
        for key, value in batch.inputs.items()
        if isinstance(value, Tensor)
        and key in (*DECODER_SEQUENCES, *TEXT_SEQUENCES)
        and value.dim() == (3 if key.endswith("embeds") else 2)
    ]
    if width < 2 or output.shape not in texts:
        return False
    shorter = {
        key: value[:, :-1].contiguous() if stands_by_position(key, value) and value.shape[1] == width else value
        for key, value in batch.inputs.items()
    }
    with torch.no_grad():
        return _last_hidden(model, Batch(shorter, None, batch.held)).shape[1] == width - 1


def _of_last_block(model: nn.Module, batch: Batch) -> Tensor:
    """The hidden states ``[B, S, K]`` that leave the block which the forward calls last."""
    seen: list[Tensor] = []

    def see(module: nn.Module, args: Any, output: Any) -> None:
        seen[:] = [_first_features(module, output)]

    handles = [model.get_submodule(address.name).register_forward_hook(see) for address in find_blocks(model)]
    try:
        model(**batch.inputs)
    finally:
        for handle in handles:
            handle.remove()
    return seen[0]
