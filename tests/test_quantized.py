"""Packed codes, bit for bit against one big integer per row, and their way back."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from epmq import quantized
from epmq.quantized import (
    SUPPORTED_BITS,
    QuantizedTensor,
    column_groups,
    group_count,
    pack,
    packed_words,
    unpack,
)

BITS = st.sampled_from(SUPPORTED_BITS)


def random_codes(rows: int, columns: int, bits: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2**bits, (rows, columns), generator=generator, dtype=torch.uint8)


def as_integer(codes: list[int], bits: int) -> int:
    """Element i at bits i·b and up."""
    return sum(code << (i * bits) for i, code in enumerate(codes))


def words_of(number: int, count: int) -> list[int]:
    """The number's 32-bit words, low first, as signed integers."""
    stream = number.to_bytes(4 * count, "little")
    return [int.from_bytes(stream[4 * i : 4 * i + 4], "little", signed=True) for i in range(count)]


@pytest.mark.parametrize("bits", SUPPORTED_BITS)
def test_words_may_lie_anywhere_in_memory(bits: int) -> None:
    codes = random_codes(5, 70, bits, 0)
    packed = pack(codes, bits)
    for words in (packed.T.contiguous().T, torch.stack([packed, packed], -1)[..., 1], packed.expand(5, -1)):
        assert torch.equal(unpack(words, bits, 70), codes)
    column = random_codes(5, 32 // bits, bits, 1)
    packed = pack(column, bits)[:, :1]
    for words in (packed, torch.cat([packed, packed], 1)[:, 1:], packed.T.contiguous().T):
        assert torch.equal(unpack(words, bits, words.shape[1] * 32 // bits), column[:, : words.shape[1] * 32 // bits])
    assert unpack(packed[:0], bits, 5).shape == (0, 5)


@settings(max_examples=150, deadline=None)
@given(bits=BITS, rows=st.integers(1, 4), columns=st.integers(1, 140), seed=st.integers(0, 2**31))
def test_packing_is_one_bit_stream_per_row(bits: int, rows: int, columns: int, seed: int) -> None:
    codes = random_codes(rows, columns, bits, seed)
    packed = pack(codes, bits)
    assert packed.dtype == torch.int32
    count = -(-columns * bits // 32)
    assert packed_words(columns, bits) == count
    assert packed.tolist() == [words_of(as_integer(row, bits), count) for row in codes.tolist()]


@settings(max_examples=150, deadline=None)
@given(bits=BITS, rows=st.integers(0, 4), columns=st.integers(1, 140), seed=st.integers(0, 2**31))
def test_unpacking_gives_the_codes_back(bits: int, rows: int, columns: int, seed: int) -> None:
    codes = random_codes(rows, columns, bits, seed)
    back = unpack(pack(codes, bits), bits, columns)
    assert back.dtype == torch.uint8
    assert torch.equal(back, codes)


@settings(max_examples=100, deadline=None)
@given(bits=BITS, thirds=st.lists(st.tuples(*[st.integers(-(2**31), 2**31 - 1)] * 3), min_size=1, max_size=4))
def test_any_words_unpack_and_pack_to_themselves(bits: int, thirds: list[tuple[int, int, int]]) -> None:
    # Three words hold a whole number of elements at every width, 3 bits included.
    packed = torch.tensor([[word for words in thirds for word in words]], dtype=torch.int32)
    columns = packed.shape[1] * 32 // bits
    assert torch.equal(pack(unpack(packed, bits, columns), bits), packed)


def counting(function: Callable[..., Tensor], rows: list[int]) -> Callable[..., Tensor]:
    """The same function, which leaves word of how many rows it was given."""

    def call(x: Tensor, *others: int) -> Tensor:
        rows.append(len(x))
        return function(x, *others)

    return call


@pytest.mark.parametrize("bits", SUPPORTED_BITS)
def test_rows_are_packed_in_parts(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    codes = random_codes(7, 50, bits, 0)
    packed = pack(codes, bits)
    monkeypatch.setattr(quantized, "WORKING_BYTES", 2 * 50 * quantized.PER_SPLIT_CODE)
    largest: list[int] = []
    for name in ("_pack", "_unpack"):
        monkeypatch.setattr(quantized, name, counting(getattr(quantized, name), largest))
    assert torch.equal(pack(codes, bits), packed)
    assert torch.equal(unpack(packed, bits, 50), codes)
    assert max(largest) == (2 if bits == 3 else 7) and sum(largest) == 14


def test_a_group_beyond_the_row_takes_no_more_than_the_row() -> None:
    codes, scales = random_codes(3, 5, 4, 0), torch.ones(3, 1)
    wanted = QuantizedTensor(codes, scales, None, 4, -1).dequantize()
    assert torch.equal(QuantizedTensor(codes, scales, None, 4, 2**31 - 1).dequantize(), wanted)


def test_dequantize_computes_in_fp32_whatever_the_default_dtype() -> None:
    tensor = QuantizedTensor(random_codes(3, 40, 8, 0), torch.rand(3, 3), random_codes(3, 3, 8, 1), 8, 16)
    wanted = tensor.dequantize()
    torch.set_default_dtype(torch.bfloat16)
    try:
        ours = tensor.dequantize()
    finally:
        torch.set_default_dtype(torch.float32)
    assert ours.dtype == torch.float32
    assert torch.equal(ours, wanted)


@pytest.mark.parametrize("bits", SUPPORTED_BITS)
def test_extreme_codes_survive_the_sign_bit(bits: int) -> None:
    codes = torch.full((2, 97), 2**bits - 1, dtype=torch.uint8)
    codes[1, ::2] = 0
    assert torch.equal(unpack(pack(codes, bits), bits, 97), codes)


@settings(max_examples=60, deadline=None)
@given(
    bits=BITS, columns=st.integers(1, 100), group_size=st.sampled_from([-1, 1, 7, 32, 200]), sym=st.booleans(),
    scale_dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]), seed=st.integers(0, 2**31),
)  # fmt: skip
def test_dequantize_is_code_minus_zero_times_scale(
    bits: int, columns: int, group_size: int, sym: bool, scale_dtype: torch.dtype, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = random_codes(3, columns, bits, seed)
    groups = group_count(columns, group_size)
    scales = (torch.rand(3, groups, generator=generator) + 0.1).to(scale_dtype)
    zeros = None if sym else random_codes(3, groups, bits, seed + 1)
    tensor = QuantizedTensor(codes, scales, zeros, bits, group_size)
    ours = tensor.dequantize()
    size = columns if group_size == -1 else group_size
    for row in range(3):
        for column in range(columns):
            zero = 2 ** (bits - 1) if zeros is None else int(zeros[row, column // size])
            # Both factors are exact in fp32, so the product has one rounding: equality.
            wanted = torch.tensor(float(codes[row, column]) - zero) * scales[row, column // size].float()
            assert float(ours[row, column]) == float(wanted)
    assert (tensor.shape, tensor.symmetric) == ((3, columns), sym)


@pytest.mark.parametrize(
    ("columns", "group_size", "count", "last"), [(100, 32, 4, 3), (96, 32, 3, 2), (100, -1, 1, 0), (5, 128, 1, 0)]
)
def test_groups_along_the_columns(columns: int, group_size: int, count: int, last: int) -> None:
    groups = column_groups(columns, group_size)
    assert group_count(columns, group_size) == count
    assert groups.dtype == torch.int32
    assert groups[-1] == last
    size = columns if group_size == -1 else group_size
    assert groups.tolist() == [column // size for column in range(columns)]
