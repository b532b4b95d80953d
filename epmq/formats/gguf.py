"""GGUF's block types that hold codes on our grids: 32 codes of a row with a scale of their own, as ggml defines them.

    Q4_0  fp16 d, 16 bytes     w = d * (q - 8)     4.5 bits a weight
    Q4_1  fp16 d, fp16 m, 16 bytes     w = d * q + m       5 bits
    Q8_0  fp16 d, 32 bytes     w = d * q           8.5 bits, q signed

In the 16 bytes, byte ``i`` has code ``i`` in its low half and code ``i + 16`` in its high one.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor

from epmq.formats.packed import LinearFacts
from epmq.quantized import QuantizedTensor, column_groups

BLOCK = 32
BlockType = Literal["Q4_0", "Q4_1", "Q8_0"]
# Of a weight and, where it is rounded too, of the minimum: what a scale's rounding is taken times.
MOST_STEPS: dict[BlockType, int] = {"Q4_0": 8, "Q4_1": 15 + 15, "Q8_0": 128}
BLOCK_BYTES: dict[BlockType, int] = {"Q4_0": 18, "Q4_1": 20, "Q8_0": 34}


def block_type(linears: Iterable[LinearFacts]) -> BlockType | str:
    """The smallest type that holds rows of all these linears; where there is none, a clause that says why."""
    low, high, bits = 0, 0, 0
    for facts in linears:
        if facts.permuted:
            return "its groups are of columns that are not neighbours"
        if facts.in_features % BLOCK:
            return f"its rows of {facts.in_features} are no multiple of {BLOCK}"
        if facts.group_size != -1 and facts.group_size < facts.in_features and facts.group_size % BLOCK:
            return f"its groups of {facts.group_size} are no multiple of {BLOCK}"
        most = 2**facts.bits - 1
        low = min(low, -(2 ** (facts.bits - 1)) if facts.sym else -most)
        high = max(high, 2 ** (facts.bits - 1) - 1 if facts.sym else most)
        bits = max(bits, facts.bits)
    if low >= -8 and high <= 7:
        return "Q4_0"
    if bits <= 4:
        return "Q4_1"
    return "Q8_0" if low >= -128 and high <= 127 else "8 bits fit no type with zero points; set sym: true"


def has_scales(widest: float, rounding: float, kind: BlockType) -> bool:
    """Whether float16 has a linear's scales well enough: no weight moves by more than a sixteenth of its widest step.

    widest: the largest scale. rounding: the most that any of them changes.
    """
    return rounding * MOST_STEPS[kind] <= widest / 16


def blocks(tensor: QuantizedTensor, kind: BlockType) -> tuple[Tensor, float]:
    """uint8 ``[N, K / 32 * bytes]``: a weight in blocks of ``kind``, which :func:`block_type` found for it; and how far
    that moves a weight at most, scales and minima being rounded to float16, in steps of the widest grid among them."""
    rows, columns = tensor.shape
    group_of = column_groups(columns, tensor.group_size)[::BLOCK].long()
    scales = tensor.scales.float()[:, group_of]
    zeros = torch.full_like(scales, 2 ** (tensor.bits - 1)) if tensor.zeros is None else tensor.zeros[:, group_of]
    codes, steps = tensor.codes.view(rows, -1, BLOCK), scales.half()
    least = (-scales * zeros).half() if kind == "Q4_1" else torch.zeros_like(steps)
    # How far a code is moved is a linear function of it.
    ends = torch.stack([codes.amin(-1), codes.amax(-1)]).float()
    stored = ends if kind == "Q4_1" else ends - zeros
    moved = (stored * steps.float() + least.float() - (ends - zeros) * scales).abs()
    widest = float(scales.abs().max())
    fields = [steps, least] if kind == "Q4_1" else [steps]
    if kind != "Q4_1":
        # In bytes, where a negative number is its two's complement.
        codes = codes - zeros.to(torch.uint8).unsqueeze(-1) + (8 if kind == "Q4_0" else 0)
    halves = codes if kind == "Q8_0" else codes[..., : BLOCK // 2] | codes[..., BLOCK // 2 :] << 4
    data = torch.cat([*(part.unsqueeze(-1).view(torch.uint8) for part in fields), halves], -1)
    return data.view(rows, -1), float(moved.max()) / widest if widest > 0 else 0.0
