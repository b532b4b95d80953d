"""The packed layout of 4-bit weights that the Triton kernels read: one for every batch size, dtype and GPU.

Codes: int16 words in tiles of 64 rows by 128 columns. Word j (0..31) of a row of a tile holds in nibble i (0..3) the
code of column ``128·kb + 32·i + j``; tile (n // 64, kb) is contiguous. An int16 tile so has the shape and the width of
a 16-bit float operand of the tensor cores, and every nibble plane of it is a slice of 32 neighbouring columns.

Grid: one int32 word per row and group, groups first. Its low half is the scale as fp16 or bf16, its high half
``magic + zero`` in the same type (magic is 1024 or 128), the number that turns ``magic + code`` into ``code - zero``.
Where a tile of 128 columns has several groups, their words of a row are neighbours, so that one load takes them.

Rows are padded to 64 and columns to 128; padding dequantizes to exactly 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from epmq.errors import ConfigError, FormatError
from epmq.quantized import QuantizedTensor, group_count, pack, packed_words, unpack

BITS = 4
TILE_ROWS, TILE_COLUMNS, TILE_WORDS = 64, 128, 32
WHOLE_ROW = 0  # the kernels' group size of one scale per row
MAGIC = {torch.float16: 1024.0, torch.bfloat16: 128.0}
ROWS_AT_ONCE = 4096  # bounds the memory of packing


@dataclass(frozen=True)
class PackedWeight:
    """A weight ``[N, K]`` in the kernels' layout.

    words: int16 ``[ceil(N/64), ceil(K/128), 64, 32]``. scale_words: int32 ``[groups, 64·ceil(N/64), 1]``, for groups of
    32 and 64 ``[ceil(K/128), 64·ceil(N/64), 128 / group_size]``. group_size: 32, 64, a multiple of 128, or 0 for one
    scale per row. dtype: fp16 or bf16, that of the scales and of the inputs it multiplies. permutation: int64 ``[K]``
    or None; column k of the weight belongs to column ``permutation[k]`` of the input. Codes of this package are stored
    in the original order and need none.
    """

    words: Tensor
    scale_words: Tensor
    out_features: int
    in_features: int
    group_size: int
    dtype: torch.dtype
    permutation: Tensor | None = None


def padded(size: int, multiple: int) -> int:
    """``size`` rounded up to a multiple."""
    return -(-size // multiple) * multiple


def kernel_group(group_size: int, in_features: int) -> int | None:
    """The kernels' name of a group size: 0 when one group spans the row; None for a size they do not know."""
    if group_size == -1 or group_size >= in_features:
        return WHOLE_ROW
    return group_size if group_size in (32, 64) or group_size % TILE_COLUMNS == 0 else None


def packed_shapes(out_features: int, in_features: int, group_size: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of words and scale_words."""
    rows, columns = padded(out_features, TILE_ROWS), padded(in_features, TILE_COLUMNS)
    group = kernel_group(group_size, in_features)
    tiles = columns // TILE_COLUMNS
    if group and group < TILE_COLUMNS:
        grid = (tiles, rows, TILE_COLUMNS // group)
    else:
        grid = (group_count(in_features, group or -1), rows, 1)
    return (rows // TILE_ROWS, tiles, TILE_ROWS, TILE_WORDS), grid


def pack_weight(tensor: QuantizedTensor, dtype: torch.dtype, permutation: Tensor | None = None) -> PackedWeight:
    """The layout of a quantized tensor; see :func:`pack_rows`."""
    packed = pack(tensor.codes, BITS) if tensor.bits == BITS else tensor.codes
    return pack_rows(
        packed, tensor.scales, tensor.zeros, tensor.bits, tensor.group_size, tensor.shape[1], dtype, permutation
    )


def pack_rows(
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bits: int,
    group_size: int,
    in_features: int,
    dtype: torch.dtype,
    permutation: Tensor | None = None,
) -> PackedWeight:
    """The layout of a checkpoint's codes: packed int32 ``[N, ceil(K/8)]``, scales ``[N, G]``, zeros uint8 or None.

    Scales are rounded to dtype. Raises ConfigError for widths, groups and dtypes that the kernels do not know, and
    FormatError for a scale that is too large for dtype.
    """
    group = kernel_group(group_size, in_features)
    if bits != BITS or group is None:
        raise ConfigError(
            f"bits={bits}, group_size={group_size}: the int4 kernels know 4 bits and groups of 32, 64, multiples of "
            "128 and -1; use the reference for others."
        )
    if dtype not in MAGIC:
        raise ConfigError(f"dtype={dtype}: the int4 kernels multiply torch.float16 and torch.bfloat16.")
    rows = packed.shape[0]
    origins = torch.full_like(scales, 2 ** (BITS - 1), dtype=torch.uint8) if zeros is None else zeros
    words_shape, grid_shape = packed_shapes(rows, in_features, group_size)
    grid = grid_words(scales, zeros, grid_shape, dtype)
    words = torch.empty(words_shape, dtype=torch.int16, device=packed.device)
    for start in range(0, rows, ROWS_AT_ONCE):
        part = slice(start, min(start + ROWS_AT_ONCE, rows))
        tiles = tile_words(unpack(packed[part], BITS, in_features), origins[part, -1:])
        words[start // TILE_ROWS : start // TILE_ROWS + tiles.shape[0]] = tiles
    return PackedWeight(words, grid, rows, in_features, group, dtype, permutation)


def tile_words(codes: Tensor, fill: Tensor) -> Tensor:
    """int16 ``[ceil(N/64), ceil(K/128), 64, 32]`` from codes ``[N, K]``; columns past K get ``fill`` ``[N, 1]``."""
    rows, columns = codes.shape
    wide = codes.new_zeros(padded(rows, TILE_ROWS), padded(columns, TILE_COLUMNS))
    wide[:rows] = fill
    wide[:rows, :columns] = codes
    tiles = wide.view(-1, TILE_ROWS, wide.shape[1] // TILE_COLUMNS, BITS, TILE_WORDS).transpose(1, 2).to(torch.int32)
    words = tiles[..., 0, :] | tiles[..., 1, :] << 4 | tiles[..., 2, :] << 8 | tiles[..., 3, :] << 12
    return words.to(torch.int16)


def grid_words(scales: Tensor, zeros: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """int32 of that shape from scales and zeros ``[N, G]``; what is padding has scale and zero 0."""
    rows, count = scales.shape
    steps, padded_rows, together = shape
    narrow = scales.to(dtype)
    if bool((narrow.isinf() & scales.isfinite()).any()):
        raise FormatError(
            f"scales: {float(scales.abs().max()):.3g} is too large for {dtype}; run the layer in bfloat16."
        )
    grid = torch.zeros(2, padded_rows, steps * together, dtype=dtype, device=scales.device)
    origins = torch.full_like(narrow, 2 ** (BITS - 1)) if zeros is None else zeros.to(dtype)
    grid[0, :rows, :count] = narrow
    grid[1, :rows, :count] = origins
    grid[1] += MAGIC[dtype]
    low, high = grid.view(torch.int16).to(torch.int32)
    words: Tensor = (low & 0xFFFF) | high << 16
    return words.view(padded_rows, steps, together).transpose(0, 1).contiguous()


def codes_of_words(words: Tensor, out_features: int, in_features: int) -> Tensor:
    """Inverse of :func:`tile_words`: uint8 codes ``[N, K]`` without the padding."""
    tiles = words.to(torch.int32)
    planes = torch.stack([tiles >> shift & 0xF for shift in (0, 4, 8, 12)], 3)
    codes = planes.transpose(1, 2).reshape(tiles.shape[0] * TILE_ROWS, tiles.shape[1] * TILE_COLUMNS).to(torch.uint8)
    return codes[:out_features, :in_features].contiguous()


def rows_of_words(words: Tensor, out_features: int, in_features: int) -> Tensor:
    """The checkpoint's codes that :func:`pack_rows` was given: packed int32 ``[N, ceil(K/8)]``."""
    packed = torch.empty(out_features, packed_words(in_features, BITS), dtype=torch.int32, device=words.device)
    for start in range(0, out_features, ROWS_AT_ONCE):
        end = min(start + ROWS_AT_ONCE, out_features)
        part = words[start // TILE_ROWS : padded(end, TILE_ROWS) // TILE_ROWS]
        packed[start:end] = pack(codes_of_words(part, end - start, in_features), BITS)
    return packed


def unpack_weight(weight: PackedWeight) -> QuantizedTensor:
    """What was packed, with scales in the kernels' dtype; symmetric grids come back with their zeros of 8."""
    codes = codes_of_words(weight.words, weight.out_features, weight.in_features)
    group_size = weight.group_size or -1
    count = group_count(weight.in_features, group_size)
    words = weight.scale_words.transpose(0, 1).flatten(1)[: weight.out_features, :count]
    scales, origins = ((words >> shift).to(torch.int16).view(weight.dtype).contiguous() for shift in (0, 16))
    zeros = (origins.float() - MAGIC[weight.dtype]).to(torch.uint8)
    return QuantizedTensor(codes, scales, zeros, BITS, group_size)
