"""The mathematics of TIES merging (Yadav et al. 2023) in the three dialects in use: tensors in, tensors out.

The dialects differ in what is trimmed, how a sign is elected and what the agreeing entries are divided by. Each follows
the released behaviour of its package: mergekit 0.1.5 (`ties`), peft 0.21.2 (`peft.utils.merge_utils.ties`) and
fusion_bench 0.2.33 (`TiesMergingAlgorithm`). One choice is ours: where equal magnitudes meet the limit of a
per-tensor trim, the packages take whichever their unstable sort brings first; here the lowest index is kept.

Letters: T experts; a stack is [T, *shape], one delta (expert minus base) per row, float32 or float64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

# Entries looked at together while they are counted or merged: bounds the memory beside a tensor to some tens of MB.
CHUNK = 1 << 22
LINE = 1024  # entries, a multiple of any processor's vectors
DIGIT_BITS = 16
DIGIT_MASK = (1 << DIGIT_BITS) - 1
# mergekit leaves a delta unscaled when its L1 norm, before or after the trim, is below this.
RESCALE_MIN_NORM = 1e-7


def keep_largest(delta: Tensor, count: int) -> Tensor:
    """A copy of `delta` (any shape) in which all but the `count` largest magnitudes are zero.

    Exactly `count` entries are kept; of entries equal in magnitude at the limit, those of lowest flat index.
    """
    flat = delta.reshape(-1)
    if count >= flat.numel():
        return delta.clone()
    if count <= 0:
        return torch.zeros_like(delta)
    magnitude = flat.abs()
    limit = magnitude.kthvalue(flat.numel() - count + 1).values
    if limit == 0:  # as with frozen embeddings: which of the zeros are kept is all the same
        return delta.clone()
    keep = magnitude > limit
    at_limit = torch.nonzero(magnitude == limit).reshape(-1)
    keep[at_limit[: count - int(keep.sum())]] = True
    return (flat * keep).reshape(delta.shape)


def trim_mergekit(delta: Tensor, density: float, rescale: bool) -> Tensor:
    """mergekit's trim of one delta: max(1, int(density·n)) entries kept, its L1 norm restored if `rescale`."""
    if density >= 1:
        return delta.clone()
    if density <= 0:
        return torch.zeros_like(delta)
    trimmed = keep_largest(delta, max(1, int(density * delta.numel())))
    if rescale:
        before, after = delta.abs().sum(), trimmed.abs().sum()
        if before >= RESCALE_MIN_NORM and after >= RESCALE_MIN_NORM:
            trimmed *= before / after
    return trimmed


def trim_peft(delta: Tensor, density: float) -> Tensor:
    """peft's trim of one delta: int(density·n) entries kept, which may be none."""
    return keep_largest(delta, int(density * delta.numel()))


def merge_mergekit(trimmed: Tensor, weights: list[float], normalize: bool) -> Tensor:
    """mergekit's election and merge: stack [T, *shape] and T weights to a delta [*shape].

    Weights enter the election; a sum of zero elects plus. `normalize` divides by the sum of the agreeing weights,
    or by 1 where that sum is zero.
    """
    column = trimmed.new_tensor(weights)[:, None]

    def of_part(part: Tensor) -> Tensor:
        weighted = part * column
        agree = weighted.sign() == _plus_where(weighted.sum(dim=0) >= 0)
        mixed = (weighted * agree).sum(dim=0)
        if normalize:
            divisor = (column * agree).sum(dim=0)
            divisor[divisor == 0] = 1
            mixed /= divisor
        return mixed

    return _by_parts(of_part, trimmed)


def merge_peft(trimmed: Tensor, weights: list[float], election: Literal["total", "frequency"]) -> Tensor:
    """peft's election and merge: stack [T, *shape] and T weights to a delta [*shape].

    The election knows no weights; a sum of zero elects plus. The weighted agreeing entries are divided by their number.
    """
    column = trimmed.new_tensor(weights)[:, None]

    def of_part(part: Tensor) -> Tensor:
        sign = part.sign()
        mass = part.sum(dim=0) if election == "total" else sign.sum(dim=0)
        agree = sign == _plus_where(mass >= 0)
        return (part * column * agree).sum(dim=0) / agree.sum(dim=0).clamp(min=1)

    return _by_parts(of_part, trimmed)


def kept_rank(entries: int, density: float) -> int:
    """Rank (1 is the smallest) of the magnitude from which fusion_bench keeps: entries - int(entries·K).

    So int(entries·K) + 1 entries are kept, and all that equal the last. A density above 1 is percent. A share
    of 1, which MergeConfig refuses, would give rank 0.
    """
    return entries - int(entries * (density / 100 if density > 1 else density))


def trim_fusion_bench(delta: Tensor, limit: Tensor) -> Tensor:
    """fusion_bench's trim of one delta: every entry whose magnitude is at least `limit` (0-dim) is kept."""
    return delta * (delta.abs() >= limit)


def elected_sign(trimmed: Tensor) -> Tensor:
    """Sign of the sum over the experts, -1, 0 or 1: stack [T, *shape] to [*shape]."""
    return trimmed.sum(dim=0).sign()


def merge_fusion_bench(trimmed: Tensor, majority: int, merge_func: Literal["sum", "mean", "max"]) -> Tensor:
    """fusion_bench's election and merge: stack [T, *shape] to a delta [*shape].

    `majority` (-1, 0 or 1) is the sign of the sum of :func:`elected_sign` over the whole model; it stands in where the
    sum of an entry is zero. Where the majority is zero as well, the negative entries are merged (`max` gives 0 there).
    """

    def of_part(part: Tensor) -> Tensor:
        sign = elected_sign(part)
        sign[sign == 0] = majority
        agreeing = part * torch.where(sign > 0, part > 0, part < 0)
        if merge_func == "max":
            return agreeing.abs().amax(dim=0) * sign
        total = agreeing.sum(dim=0)
        return total / (agreeing != 0).sum(dim=0).clamp(min=1) if merge_func == "mean" else total

    return _by_parts(of_part, trimmed)


class StreamedMagnitude:
    """The rank-th smallest magnitude of a stream of tensors, exact, without ever holding the stream.

    Magnitudes of floats order as the integers of their bit patterns do. Each pass over the stream counts one 16-bit
    digit of those integers, from the top, among the entries that share the digits already found: two passes for
    float32, four for float64, and 65536 counters at any size. Zeros, denormals and ties need no special care; the
    order of the stream has no influence. Usage::

        search = StreamedMagnitude(rank, torch.float32)
        while not search.done:
            for tensor in stream():
                search.count(tensor)
            search.next_digit()
        limit = search.value

    `rank` counts from 1; the tensors may have any shape and float dtype, and are cast to `dtype` (float32 or float64).
    """

    def __init__(self, rank: int, dtype: torch.dtype):
        self._dtype = dtype
        self._integer = torch.int64 if dtype == torch.float64 else torch.int32
        self._shift = 8 * dtype.itemsize - DIGIT_BITS
        self._left = rank
        self._found: int | None = None
        self._counts = torch.zeros(1 << DIGIT_BITS, dtype=torch.int64)

    @property
    def done(self) -> bool:
        return self._shift < 0

    @property
    def value(self) -> Tensor:
        """The magnitude, a 0-dim tensor of the dtype asked for; only once `done`."""
        if not self.done or self._found is None:
            raise RuntimeError("the search is not done: pass over the stream again.")
        return torch.tensor(self._found, dtype=self._integer).view(self._dtype)

    def count(self, values: Tensor) -> None:
        for chunk in torch.split(values.reshape(-1), CHUNK):
            bits = chunk.to(self._dtype).abs().view(self._integer)
            digits = bits >> self._shift
            if self._found is not None:
                digits = digits[digits >> DIGIT_BITS == self._found] & DIGIT_MASK
            self._counts += torch.bincount(digits, minlength=1 << DIGIT_BITS).cpu()

    def next_digit(self) -> None:
        """Close a pass: fix the digit in which the rank falls; ValueError if the stream was shorter than that."""
        up_to = self._counts.cumsum(0)
        digit = int(torch.searchsorted(up_to, self._left))
        if digit > DIGIT_MASK or self._left < 1:
            raise ValueError(f"rank {self._left} is outside the {int(up_to[-1])} entries of the stream.")
        self._left -= int(up_to[digit]) - int(self._counts[digit])
        self._found = digit | ((self._found or 0) << DIGIT_BITS)
        self._shift -= DIGIT_BITS
        self._counts.zero_()


def _plus_where(positive: Tensor) -> Tensor:
    return positive.to(torch.int8) * 2 - 1


def _by_parts(of_part: Callable[[Tensor], Tensor], stack: Tensor) -> Tensor:
    """What a function makes of a stack [T, *shape], entry by entry: a few of them [T, n] at a time, which bounds the
    memory that its steps take."""
    flat = stack.reshape(len(stack), -1)
    merged = stack.new_empty(flat.shape[1])
    # Whole vectors, so that every entry is summed as it would be in one piece: torch adds those left over otherwise.
    step = max(1, CHUNK // len(stack) // LINE) * LINE
    for start in range(0, flat.shape[1], step):
        merged[start : start + step] = of_part(flat[:, start : start + step])
    return merged.reshape(stack.shape[1:])
