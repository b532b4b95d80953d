"""Label-free variants of calibration texts: an expert tells what it makes of them, so they stretch a small sample."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from epmq.streams import Batch

MIX_RATE = 0.5
SHUFFLE_RATE = 0.2
MOST_CHANGED = 0.3


def can_augment(batch: Batch) -> bool:
    """Whether a batch is token ids ``[B, S]`` and at most an ``attention_mask`` of that shape, and its positions weigh
    what the mask says: other inputs per position, or weights of one's own, cannot be made up for a varied text. Nor may
    there be images or sounds beside it, which often have their places in the text."""
    ids = batch.inputs.get("input_ids")
    if not isinstance(ids, Tensor) or ids.dim() != 2:
        return False
    for name, value in batch.inputs.items():
        of_positions = isinstance(value, Tensor) and value.dim() > 1 and value.shape[1] == ids.shape[1]
        placed = isinstance(value, Tensor) and value.dim() > 1 and value.is_floating_point()
        if (of_positions or placed) and name not in ("input_ids", "attention_mask"):
            return False
    mask = batch.inputs.get("attention_mask")
    if mask is None:
        return batch.position_weights is None and ids.shape[1] > 2
    if mask.shape != ids.shape or bool((mask.sum(1) < 2).any()):
        return False
    return batch.position_weights is None or bool((batch.position_weights == mask).all())


def token_pool(batches: list[Batch]) -> Tensor:
    """int64 ``[n]``: all inner tokens of a task's texts, to draw replacements from."""
    return torch.cat([torch.tensor(text[1:-1], dtype=torch.int64) for batch in batches for text in _texts(batch)])


def augmented(
    batch: Batch, own: Tensor, everyone: Tensor, generator: torch.Generator, padding: int | None = None
) -> Batch:
    """A variant of each text of a batch: half of it joined with half of another text of the batch, tokens dropped,
    tokens replaced by some of the task's own or of any task's calibration tokens, inner tokens shuffled.

    The first and last token of a text stay in place. Position weights are the new mask's. own, everyone: pools of
    :func:`token_pool`. padding: the id behind shorter texts where the batch masks no position that tells it; models
    find a text's last token by it.
    """
    texts = _texts(batch)
    inner = [text[1:-1] for text in texts]
    longest = batch.inputs["input_ids"].shape[1]
    changed = []
    for text, body in zip(texts, inner, strict=True):
        other = inner[int(_draw(generator) * len(inner))]
        body = _vary(list(body), other, own, everyone, generator)
        changed.append([text[0], *body[: longest - 2], *text[-1:]][:longest])
    width = longest if "attention_mask" not in batch.inputs else max(len(text) for text in changed)
    ids = torch.full((len(changed), width), _padding(batch, padding), dtype=batch.inputs["input_ids"].dtype)
    mask = torch.zeros(len(changed), width, dtype=torch.int64)
    for row, text in enumerate(changed):
        if "attention_mask" not in batch.inputs:
            # Without a mask every place is a token: what was dropped is filled with the text's own tokens.
            text = [*text[:-1], *(texts[row][1:-1] * 2)[: width - len(text)], *text[-1:]]
        ids[row, : len(text)] = torch.tensor(text, dtype=ids.dtype)
        mask[row, : len(text)] = 1
    device = batch.inputs["input_ids"].device
    inputs: dict[str, Any] = {**batch.inputs, "input_ids": ids.to(device)}
    if "attention_mask" not in batch.inputs:
        return Batch(inputs, None, batch.held, batch.decoder_weights)
    mask = mask.to(device)
    return Batch({**inputs, "attention_mask": mask}, mask.float(), batch.held, batch.decoder_weights)


def _padding(batch: Batch, padding: int | None) -> int:
    mask = batch.inputs.get("attention_mask")
    masked = [] if mask is None else batch.inputs["input_ids"][mask == 0].tolist()
    return int(masked[0]) if masked else padding or 0


def _vary(body: list[int], other: list[int], own: Tensor, everyone: Tensor, generator: torch.Generator) -> list[int]:
    if _draw(generator) < MIX_RATE and len(other) > 0:
        first, second = _half(body, generator), _half(other, generator)
        body = first + second if _draw(generator) < 0.5 else second + first
    rate = _draw(generator) * MOST_CHANGED
    kept = [token for token in body if _draw(generator) >= rate]
    body = kept or body
    rate = _draw(generator) * MOST_CHANGED
    for place in range(len(body)):
        if _draw(generator) < rate:
            pool = own if _draw(generator) < 0.5 else everyone
            body[place] = int(pool[int(_draw(generator) * len(pool))])
    if _draw(generator) < SHUFFLE_RATE:
        order = torch.randperm(len(body), generator=generator).tolist()
        body = [body[i] for i in order]
    return body


def _half(body: list[int], generator: torch.Generator) -> list[int]:
    size = max(1, len(body) // 2)
    start = int(_draw(generator) * (len(body) - size + 1))
    return body[start : start + size]


def _texts(batch: Batch) -> list[list[int]]:
    ids = batch.inputs["input_ids"]
    mask = batch.inputs.get("attention_mask")
    if mask is None:
        texts: list[list[int]] = ids.tolist()
        return texts
    return [
        [token for token, used in zip(*row, strict=True) if used]
        for row in zip(ids.tolist(), mask.tolist(), strict=True)
    ]


def _draw(generator: torch.Generator) -> float:
    return float(torch.rand((), generator=generator, dtype=torch.float32))
