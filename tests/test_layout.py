"""The kernels' packed layout: where each code lies, what padding is worth, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from epmq.errors import ConfigError, FormatError
from epmq.kernels import layout
from epmq.kernels.layout import kernel_group, pack_rows, pack_weight, packed_shapes, unpack_weight
from epmq.quantized import QuantizedTensor, group_count, pack

DTYPES = [torch.float16, torch.bfloat16]
SHAPES = [(1, 1), (64, 128), (63, 127), (65, 129), (130, 300), (200, 1000), (5, 513)]
GROUPS = [32, 64, 128, 256, -1]


def random_weight(rows: int, columns: int, group: int, symmetric: bool, dtype: torch.dtype) -> QuantizedTensor:
    generator = torch.Generator().manual_seed(rows * columns)
    groups = group_count(columns, group)
    codes = torch.randint(0, 16, (rows, columns), dtype=torch.uint8, generator=generator)
    scales = (0.01 + torch.rand(rows, groups, generator=generator)).to(dtype)
    zeros = torch.randint(0, 16, (rows, groups), dtype=torch.uint8, generator=generator)
    return QuantizedTensor(codes, scales, None if symmetric else zeros, 4, group)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_round_trip(shape: tuple[int, int], group: int, symmetric: bool, dtype: torch.dtype) -> None:
    tensor = random_weight(*shape, group, symmetric, dtype)
    weight = pack_weight(tensor, dtype)
    back = unpack_weight(weight)
    assert torch.equal(back.codes, tensor.codes)
    # A group as wide as the row comes back as the whole row's: the same grid.
    assert torch.equal(back.scales, tensor.scales)
    wanted = torch.full_like(back.codes[:, :1], 8).expand(back.scales.shape) if symmetric else tensor.zeros
    assert back.zeros is not None and wanted is not None and torch.equal(back.zeros, wanted)
    assert torch.equal(back.dequantize(), tensor.dequantize())
    assert (weight.words.shape, weight.scale_words.shape) == packed_shapes(*shape, group)
    assert (weight.words.dtype, weight.scale_words.dtype) == (torch.int16, torch.int32)


def test_a_code_lies_where_the_kernels_look_for_it() -> None:
    tensor = random_weight(130, 300, 64, False, torch.float16)
    words = pack_weight(tensor, torch.float16).words.flatten().to(torch.int32)
    blocks = 3
    for row in (0, 1, 63, 64, 129):
        for column in (0, 31, 32, 64, 96, 127, 128, 255, 299):
            block, inside = divmod(column, 128)
            nibble, j = divmod(inside, 32)
            word = int(words[((row // 64) * blocks + block) * 2048 + (row % 64) * 32 + j])
            assert (word >> (4 * nibble)) & 15 == int(tensor.codes[row, column]), (row, column)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group", [32, 64, 128, 256, -1])
def test_a_grid_word_holds_scale_and_origin(group: int, dtype: torch.dtype) -> None:
    """Word ``[step, row, i]`` belongs to the i-th group of the step; 70 rows and 700 columns leave padding."""
    tensor = random_weight(70, 700, group, False, dtype)
    words = pack_weight(tensor, dtype).scale_words
    together = 128 // group if group in (32, 64) else 1
    magic = 1024 if dtype == torch.float16 else 128
    assert tensor.zeros is not None and words.shape[1:] == (128, together)
    for step in range(words.shape[0]):
        for i in range(together):
            halves = words[step, :, i].contiguous().view(dtype).view(128, 2)
            place = step * together + i
            filled = place < tensor.scales.shape[1]
            scale = tensor.scales[:, place] if filled else torch.zeros(70, dtype=dtype)
            zero = tensor.zeros[:, place].float() if filled else torch.zeros(70)
            assert torch.equal(halves[:70, 0], scale)
            assert torch.equal(halves[:70, 1].float(), magic + zero)
            assert float(halves[70:, 0].abs().max()) == 0


@pytest.mark.parametrize("group", [32, 128, -1])
def test_padding_is_worth_zero(group: int) -> None:
    tensor = random_weight(3, 70, group, False, torch.float16)
    weight = pack_weight(tensor, torch.float16)
    whole = layout.PackedWeight(
        weight.words, weight.scale_words, 64, 128, weight.group_size, torch.float16
    )  # the padded size as if it were the true one
    values = unpack_weight(whole).dequantize()
    assert torch.equal(values[:3, :70], tensor.dequantize())
    assert float(values[3:].abs().max()) == 0 and float(values[:, 70:].abs().max()) == 0


def test_rows_packed_in_parts_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = random_weight(200, 130, 64, False, torch.float16)
    whole = pack_weight(tensor, torch.float16)
    monkeypatch.setattr(layout, "ROWS_AT_ONCE", 64)
    parts = pack_weight(tensor, torch.float16)
    assert torch.equal(whole.words, parts.words)


def test_no_rows() -> None:
    tensor = random_weight(0, 130, 64, True, torch.float16)
    assert unpack_weight(pack_weight(tensor, torch.float16)).codes.shape == (0, 130)


@pytest.mark.parametrize(
    ("group", "columns", "wanted"),
    [(32, 512, 32), (128, 512, 128), (384, 512, 384), (-1, 5, 0), (48, 512, None), (48, 48, 0), (16, 512, None)],
)
def test_groups_that_the_kernels_know(group: int, columns: int, wanted: int | None) -> None:
    assert kernel_group(group, columns) == wanted


def rows_of(tensor: QuantizedTensor) -> tuple[Tensor, Tensor, Tensor | None]:
    return pack(tensor.codes, tensor.bits), tensor.scales, tensor.zeros


def test_what_the_kernels_do_not_know_is_refused() -> None:
    tensor = random_weight(4, 100, 48, True, torch.float16)
    with pytest.raises(ConfigError, match="group_size=48"):
        pack_weight(tensor, torch.float16)
    with pytest.raises(ConfigError, match="bits=8"):
        pack_weight(QuantizedTensor(tensor.codes, tensor.scales, None, 8, 48), torch.float16)
    with pytest.raises(ConfigError, match="float32"):
        pack_rows(*rows_of(random_weight(4, 128, 32, True, torch.float16)), 4, 32, 128, torch.float32)


def test_a_scale_beyond_fp16_is_refused() -> None:
    tensor = random_weight(4, 128, 32, True, torch.float32)
    tensor.scales[1, 2] = 1e6
    with pytest.raises(FormatError, match="scales: 1e\\+06"):
        pack_weight(tensor, torch.float16)
    assert float(unpack_weight(pack_weight(tensor, torch.bfloat16)).scales[1, 2]) == pytest.approx(1e6, rel=2**-8)
