"""QuantizedTensor: integer codes with scales and zeros, and their packed form.

Packed form: codes are unsigned ``bits``-wide fields in a little-endian bit stream along the input dimension, one
row of int32 words per output row (element ``i`` occupies bits ``i * bits .. (i + 1) * bits``, low bits first; the
tail of the last word is zero). This is the layout of compressed-tensors' ``weight_packed``, dense for every width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

WORD_BITS = 32
SUPPORTED_BITS = (2, 3, 4, 8)
# What packing may take beside its result, and takes of it per code where fields lie across words and where not.
WORKING_BYTES, PER_SPLIT_CODE, PER_CODE = 2**24, 80, 20


def packed_words(in_features: int, bits: int) -> int:
    """Number of int32 words that hold ``in_features`` codes of ``bits`` bits."""
    return -(-in_features * bits // WORD_BITS)


def group_count(in_features: int, group_size: int) -> int:
    """Number of groups along the input dimension; ``group_size`` -1 is one group for the whole row."""
    return 1 if group_size == -1 else -(-in_features // group_size)


def column_groups(in_features: int, group_size: int, device: torch.device | str = "cpu") -> Tensor:
    """int32 ``[K]``: the group of each column; the last group may be short."""
    if group_size == -1:
        return torch.zeros(in_features, dtype=torch.int32, device=device)
    return torch.div(torch.arange(in_features, device=device), group_size, rounding_mode="floor").to(torch.int32)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack uint8 codes ``[N, K]`` into int32 ``[N, ceil(K * bits / 32)]``."""
    rows, columns = codes.shape
    packed = torch.empty(rows, packed_words(columns, bits), dtype=torch.int32, device=codes.device)
    for part in _row_slices(rows, columns, bits):
        packed[part] = _pack(codes[part], bits)
    return packed


def _pack(codes: Tensor, bits: int) -> Tensor:
    rows, columns = codes.shape
    words = packed_words(columns, bits)
    if WORD_BITS % bits == 0:
        per_word = WORD_BITS // bits
        padded = torch.zeros(rows, words * per_word, dtype=torch.int64, device=codes.device)
        padded[:, :columns] = codes
        shifts = torch.arange(per_word, device=codes.device) * bits
        packed = (padded.view(rows, words, per_word) << shifts).sum(-1)
    else:
        stream = torch.zeros(rows, words * WORD_BITS, dtype=torch.int64, device=codes.device)
        planes = (codes.to(torch.int64).unsqueeze(-1) >> torch.arange(bits, device=codes.device)) & 1
        stream[:, : columns * bits] = planes.reshape(rows, columns * bits)
        packed = (stream.view(rows, words, WORD_BITS) << torch.arange(WORD_BITS, device=codes.device)).sum(-1)
    return torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32)


def unpack(packed: Tensor, bits: int, in_features: int) -> Tensor:
    """Inverse of :func:`pack`: uint8 codes ``[N, K]``."""
    rows = packed.shape[0]
    codes = torch.empty(rows, in_features, dtype=torch.uint8, device=packed.device)
    for part in _row_slices(rows, in_features, bits):
        codes[part] = _unpack(packed[part], bits, in_features)
    return codes


def _unpack(packed: Tensor, bits: int, in_features: int) -> Tensor:
    rows = packed.shape[0]
    if WORD_BITS % bits == 0:
        # Four fields at once: one of each byte of the words.
        mask = int.from_bytes(4 * bytes([2**bits - 1]), "little", signed=True)
        words = packed.contiguous().view(-1)  # of one dimension, as a column may have any stride
        planes = [((words >> place) & mask).view(torch.uint8) for place in range(0, 8, bits)]
        codes: Tensor = torch.stack(planes, -1).view(rows, packed.shape[1] * (WORD_BITS // bits))
        return codes[:, :in_features]
    shifts = torch.arange(WORD_BITS, dtype=torch.int32, device=packed.device)
    stream = ((packed.unsqueeze(-1) >> shifts) & 1).flatten(1)[:, : in_features * bits]
    places = torch.arange(bits, dtype=torch.int32, device=packed.device)
    return (stream.view(rows, in_features, bits) << places).sum(-1)


def _row_slices(rows: int, columns: int, bits: int) -> Iterator[slice]:
    """Rows in parts that ``WORKING_BYTES`` are enough for."""
    per_code = PER_CODE if WORD_BITS % bits == 0 else PER_SPLIT_CODE
    count = max(1, WORKING_BYTES // (per_code * max(1, columns)))
    for start in range(0, rows, count):
        yield slice(start, start + count)


@dataclass(frozen=True)
class QuantizedTensor:
    """A weight ``[N, K]`` on a grid: ``W = (codes - zeros) * scales``, groups along ``K``.

    codes: uint8 ``[N, K]`` in ``[0, 2^bits - 1]``. scales: ``[N, G]`` fp32, fp16 or bf16. zeros: uint8 ``[N, G]``,
    or None for a symmetric grid, whose zero point is ``2^(bits-1)``. columns: None, or int32 ``[K]``: code ``i`` of a
    row belongs to input column ``columns[i]``, and groups are of neighbouring codes (activation order without static
    groups, as other packages write it).
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    bits: int
    group_size: int
    columns: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return (self.codes.shape[0], self.codes.shape[1])

    @property
    def symmetric(self) -> bool:
        return self.zeros is None

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight ``[N, K]`` in ``dtype``, computed in fp32."""
        weight = dequantize(self.codes, self.scales, self.zeros, self.bits, self.group_size).to(dtype)
        return weight if self.columns is None else weight[:, torch.argsort(self.columns)]


def dequantize(codes: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, group_size: int) -> Tensor:
    """fp32 ``[N, K]`` from codes ``[N, K]``, scales ``[N, G]`` and zeros ``[N, G]`` (None: symmetric)."""
    rows, columns = codes.shape
    count = scales.shape[1]
    size = columns if group_size == -1 else min(group_size, columns)
    weight = torch.empty(rows, count * size, dtype=torch.float32, device=codes.device)
    weight[:, :columns] = codes
    # What fills up a short last group is never read, but must not be slow to compute with.
    weight[:, columns:] = 0.0
    grouped = weight.view(rows, count, size)
    grouped -= 2 ** (bits - 1) if zeros is None else zeros.float().unsqueeze(-1)
    grouped *= scales.float().unsqueeze(-1)
    return weight[:, :columns].contiguous()
