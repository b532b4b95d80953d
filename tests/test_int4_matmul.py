"""The int4 product in Triton: in the interpreter on a CPU, compiled where there is a GPU, always against float64."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from close import assert_close, product_bound
from ptx.machine import evaluate
from test_layout import random_weight
from torch import Tensor

from epmq.kernels import int4_matmul as kernels
from epmq.kernels import tune
from epmq.kernels.int4_launch import run
from epmq.kernels.int4_matmul import int4_matmul
from epmq.kernels.int4_programs import centred, nibble_assembly, sum_parts
from epmq.kernels.launch import interpreted, readable
from epmq.kernels.layout import PackedWeight, pack_weight
from epmq.kernels.tune import Config
from epmq.quantized import QuantizedTensor, pack

FP16, BF16 = torch.float16, torch.bfloat16
Words = np.ndarray[Any, np.dtype[np.uint32]]
MAGIC = {"fp16": 1024, "bf16": 128}


def problem(
    rows: int, columns: int, group: int, symmetric: bool, dtype: torch.dtype, tokens: int, device: torch.device
) -> tuple[Tensor, QuantizedTensor, PackedWeight, Tensor]:
    """x, the weight on its grid, its packed form, and a bias."""
    tensor = random_weight(rows, columns, group, symmetric, dtype)
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, columns, generator=generator).to(dtype).to(device)
    bias = torch.randn(rows, generator=generator).to(dtype).to(device)
    packed = pack_weight(tensor, dtype)
    moved = PackedWeight(
        packed.words.to(device), packed.scale_words.to(device), rows, columns, packed.group_size, dtype
    )
    return x, tensor, moved, bias


def check(y: Tensor, x: Tensor, tensor: QuantizedTensor, bias: Tensor | None, config: Config | None = None) -> None:
    """y within the roundings of its contract: weights in 16 bits or unrounded, fp32 sums, one rounding of y.

    config: the tile it was computed with; None: one of few tokens by fewer than 128 rows.
    """
    whole_row = tensor.scales.shape[1] == 1
    summed = config is not None and tensor.group_size >= 128 and config.block_m <= 32 and config.block_n >= 128
    rounded = not (whole_row or summed) or (config is not None and config.two_stages)
    weight = tensor.dequantize(x.dtype).double() if rounded else tensor.dequantize().double()
    wide = x.double().cpu()
    offset = torch.zeros(weight.shape[0]).double() if bias is None else bias.double().cpu()
    exact = wide @ weight.T + offset
    size = wide.abs() @ weight.abs().T + offset.abs()
    assert y.dtype == x.dtype and y.device == x.device
    assert_close(y.cpu(), exact, product_bound(size, x.shape[-1] + 18), "y")


# ---- nibbles ---------------------------------------------------------------------------------------------------------

EVERY_WORD: Words = np.arange(2**16, dtype=np.uint32)


@pytest.mark.parametrize("kind", ["fp16", "bf16"])
@pytest.mark.parametrize("nibble", range(4))
def test_the_assembly_makes_magic_plus_code_of_every_word(kind: str, nibble: int) -> None:
    """Both halves of a register, each with every word, beside every kind of neighbour."""
    other: Words = (EVERY_WORD[::-1] * np.uint32(40503) & np.uint32(0xFFFF)).astype(np.uint32)
    for low, high in ((EVERY_WORD, other), (other, EVERY_WORD)):
        result = evaluate(nibble_assembly(kind, nibble), low | high << np.uint32(16))
        for half, word in ((result & 0xFFFF, low), (result >> 16, high)):
            bits = torch.from_numpy(half.astype(np.uint16).view(np.int16))
            value = bits.view(FP16 if kind == "fp16" else BF16).float()
            code = torch.from_numpy((word >> (4 * nibble) & 15).astype(np.float32))
            step = 16 if kind == "fp16" and nibble % 2 == 1 else 1
            assert torch.equal(value, MAGIC[kind] + step * code)


@triton.jit  # type: ignore[untyped-decorator]
def centre_words(words, origins, out, NIBBLE: tl.constexpr, FP16: tl.constexpr, ASM: tl.constexpr, WIDE: tl.constexpr):  # type: ignore[no-untyped-def]
    """out [64, 32] = code - zero of one nibble."""
    rows = tl.arange(0, 64)
    places = tl.program_id(0) * 2048 + rows[:, None] * 32 + tl.arange(0, 32)[None, :]
    value = centred(tl.load(words + places), tl.load(origins + rows), NIBBLE, FP16, ASM, WIDE)
    tl.store(out + places, value.to(tl.float32))


def centred_by_kernel(dtype: torch.dtype, nibble: int, assembly: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """code - zero of every 16-bit word, and the zeros of the 64 rows of its tiles."""
    words = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(32, 32, 64).permute(0, 2, 1)
    words = words.contiguous().to(device)
    zeros = torch.arange(64) % 16
    magic = (zeros + (1024 if dtype == FP16 else 128)).to(dtype)
    origins = (magic.view(torch.int16).to(torch.int32) << 16).to(device)
    out = torch.empty(words.shape, device=device)
    wide = interpreted() and dtype == BF16
    centre_words[(32,)](words, origins, out, nibble, dtype == FP16, assembly, wide)
    code = words.cpu().to(torch.int32) >> (4 * nibble) & 15
    return out.cpu(), (code - zeros.view(1, 64, 1)).float()


@pytest.mark.parametrize("dtype", [FP16, BF16], ids=str)
@pytest.mark.parametrize("nibble", range(4))
def test_integer_nibbles_are_exact_for_every_word(dtype: torch.dtype, nibble: int, device: torch.device) -> None:
    found, wanted = centred_by_kernel(dtype, nibble, False, device)
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("dtype", [FP16, BF16], ids=str)
@pytest.mark.parametrize("nibble", range(4))
def test_assembly_equals_integers_for_every_word(dtype: torch.dtype, nibble: int, device: torch.device) -> None:
    if interpreted():
        pytest.skip("the interpreter cannot run inline assembly; tests/test_compiled.py runs it as PTX")
    found, wanted = centred_by_kernel(dtype, nibble, True, device)
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("kind", ["fp16", "bf16"])
def test_every_code_and_zero_is_centred_exactly(kind: str) -> None:
    """What the kernel does with the assembly's floats, for every code and zero, in the type's own arithmetic."""
    dtype = FP16 if kind == "fp16" else BF16
    code, zero = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    origin = (MAGIC[kind] + zero).to(dtype)
    assert torch.equal(((MAGIC[kind] + code).to(dtype) - origin).float(), code - zero)
    if kind == "fp16":
        value, shifted = (1024 + 16 * code).to(FP16), (960 - origin).to(FP16)
        assert torch.equal(shifted.float(), -64 - zero)
        assert torch.equal(value.double() / 16 + shifted.double(), (code - zero).double())


# ---- products --------------------------------------------------------------------------------------------------------

PROBLEMS = [
    # rows, columns, group, symmetric, tokens, tokens and rows of a tile, parts, joined
    (1, 1, -1, False, 1, 8, 64, 1, True),
    (63, 127, 32, True, 3, 8, 64, 2, True),
    (64, 256, 64, False, 8, 8, 64, 2, False),
    (65, 300, 128, False, 9, 8, 128, 3, True),
    (130, 130, -1, True, 20, 16, 128, 2, False),
    (129, 512, 256, False, 2, 8, 128, 4, True),
    (200, 384, 384, True, 17, 16, 64, 1, True),
    (127, 640, 32, False, 2, 8, 128, 3, False),
    (130, 384, 128, True, 12, 16, 128, 2, False),
    (150, 700, 384, False, 30, 32, 128, 2, True),
    (70, 129, 64, True, 33, 32, 128, 1, True),
    (300, 256, 128, False, 70, 64, 128, 1, False),
    (320, 256, 64, True, 130, 128, 256, 2, True),
    (650, 128, 128, False, 270, 64, 64, 1, True),  # eleven tiles of rows by five of tokens, in the order of many tokens
]


@pytest.mark.sampled
@pytest.mark.parametrize("dtype", [FP16, BF16], ids=str)
@pytest.mark.parametrize("case", PROBLEMS, ids=str)
def test_product_tiles(case: tuple[Any, ...], dtype: torch.dtype, device: torch.device) -> None:
    rows, columns, group, symmetric, tokens, block_m, block_n, parts, joined = case
    x, tensor, weight, bias = problem(rows, columns, group, symmetric, dtype, tokens, device)
    config = Config(block_m, block_n, parts, 8 if block_n == 256 else 4, 3, joined)
    for offset in (bias, bias.float(), None):
        y = run(x, weight.words, weight.scale_words, offset, rows, weight.group_size, config)
        check(y, x, tensor, offset, config)


@pytest.mark.parametrize("dtype", [FP16, BF16], ids=str)
@pytest.mark.parametrize("group", [32, 64, 128, 256, -1])
def test_dequantized_weight_is_rounded_once(group: int, dtype: torch.dtype, device: torch.device) -> None:
    _, tensor, weight, _ = problem(70, 300, group, False, dtype, 1, device)
    assert torch.equal(kernels.dequantize(weight).cpu(), tensor.dequantize(dtype))


@pytest.mark.parametrize("columns", [1, 256, 272])
def test_dequantized_rows_may_begin_anywhere(columns: int, device: torch.device) -> None:
    """Rows of 16 columns and more are written 16 bytes at a time, which the odd widths above are not."""
    _, tensor, weight, _ = problem(70, columns, -1, False, FP16, 1, device)
    assert torch.equal(kernels.dequantize(weight).cpu(), tensor.dequantize(FP16))


@pytest.mark.parametrize("shape", [(1, 1), (3, 512), (16, 515), (5, 2064)], ids=str)
@pytest.mark.parametrize("dtype", [FP16, torch.float32], ids=str)
def test_parts_are_summed_in_order(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
    tokens, rows = shape
    parts, bias = torch.randn(3, *shape, device=device), torch.randn(rows, device=device).to(dtype)
    out = torch.empty(shape, dtype=FP16, device=device)
    sum_parts[(-(-out.numel() // 1024),)](
        parts, bias, out, tokens, rows, SPLITS=3, BIAS=True, EARLY=False, WIDE=False, BLOCK=1024, enable_fp_fusion=False
    )
    assert torch.equal(out, (parts[0] + parts[1] + parts[2] + bias.float()).half())


@pytest.mark.parametrize("dtype", [FP16, BF16], ids=str)
@pytest.mark.parametrize("group", [64, -1])
def test_two_stages(group: int, dtype: torch.dtype, device: torch.device) -> None:
    x, tensor, weight, bias = problem(70, 300, group, False, dtype, 12, device)
    config = Config(0, 0, 1, 0, 0, False, two_stages=True)
    y = run(x, weight.words, weight.scale_words, None, 70, weight.group_size, config)
    check(y, x, tensor, None, config)
    with_bias = run(x, weight.words, weight.scale_words, bias, 70, weight.group_size, config)
    # The library may round the product before it adds the bias.
    twice = torch.finfo(dtype).eps * (y.float().abs() + with_bias.float().abs())
    assert bool(((with_bias.float() - y.float() - bias.float()).abs() <= twice).all())


@pytest.mark.parametrize("dtype", [FP16, BF16], ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (1,), (2, 3), (2, 0, 5), (40,)], ids=str)
def test_any_leading_shape(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    _, tensor, weight, bias = problem(40, 200, 64, False, dtype, 1, device)
    x = torch.randn(*shape, 200, device=device).to(dtype)
    y = int4_matmul(x, weight, bias)
    assert y.shape == (*shape, 40)
    check(y.reshape(-1, 40), x.reshape(-1, 200), tensor, bias)


def test_x_need_not_be_aligned_nor_contiguous(device: torch.device) -> None:
    _, _, weight, _ = problem(40, 256, 64, False, FP16, 1, device)
    base = torch.randn(12, 300, device=device).half()
    for x in (base[:, :256], base[:, 3:259], base[::2, 8:264], torch.randn(256, 5, device=device).half().T):
        assert torch.equal(int4_matmul(x, weight), int4_matmul(x.contiguous(), weight))
    flat = torch.randn(1 + 4 * 256, device=device).half()
    odd = flat[1:].view(4, 256)
    assert torch.equal(int4_matmul(odd, weight), int4_matmul(odd.clone(), weight))


def test_only_misfits_are_copied(device: torch.device) -> None:
    wide = torch.zeros(4, 512, device=device).half()
    for fits in (wide, wide[:, 128:256], wide[::2], wide[:1, 8:136]):
        assert readable(fits, 128).data_ptr() == fits.data_ptr()
    far = torch.zeros(2**23 + 128, dtype=FP16, device=device).as_strided((2, 128), (2**23, 1))
    narrow = torch.zeros(4, 136, device=device).half()[:, :128]
    for misfit in (wide[:, 1:129], wide[:, :100], wide.T[:, :4], narrow, far):
        copy = readable(misfit, 128)
        assert copy.shape[1] % 128 == 0 and copy.is_contiguous() and copy.data_ptr() != misfit.data_ptr()


def test_columns_may_be_permuted(device: torch.device) -> None:
    x, tensor, weight, _ = problem(40, 200, 64, False, FP16, 5, device)
    order = torch.randperm(200, device=device)
    permuted = PackedWeight(weight.words, weight.scale_words, 40, 200, weight.group_size, FP16, order)
    check(int4_matmul(x, permuted), x[:, order], tensor, None)


@pytest.mark.parametrize("group", [128, -1])
def test_a_row_has_the_same_bits_alone_and_in_any_batch(group: int, device: torch.device) -> None:
    x, _, weight, bias = problem(130, 640, group, False, FP16, 40, device)
    whole = int4_matmul(x, weight, bias, batch_invariant=True)
    # The interpreter's products are NumPy's, whose bits may depend on a row's place in its tile: there it is kept.
    moved = [(3, 5), (7, 16), (20, 40)] if device.type == "cuda" else []
    for first, last in [(0, 1), (0, 5), (0, 16), (0, 39), *moved]:
        assert torch.equal(int4_matmul(x[first:last], weight, bias, batch_invariant=True), whole[first:last])
    assert torch.equal(int4_matmul(x, weight, bias, batch_invariant=True), whole)


def test_two_calls_give_the_same_bits(device: torch.device) -> None:
    x, _, weight, bias = problem(70, 1024, 128, False, BF16, 3, device)
    config = Config(8, 64, 4, 4, 4, True)
    first, second = (run(x, weight.words, weight.scale_words, bias, 70, 128, config) for _ in range(2))
    assert torch.equal(first, second)


def test_calls_that_differ_in_little_each_start_what_was_compiled_for_them(device: torch.device) -> None:
    """One after the other, so that what is kept of one would be taken for the next: places, strides, sizes, biases."""
    x, tensor, weight, bias = problem(72, 256, 128, False, FP16, 16, device)
    words, grid, apart = weight.words, weight.scale_words, torch.zeros(16, 272, dtype=FP16, device=device)
    plain: dict[str, Any] = {"x": x, "words": words, "scale_words": grid, "bias": bias}
    changes: list[dict[str, Any]] = [
        {}, {"bias": moved(bias)}, {"bias": bias.float()}, {"bias": moved(bias.float())}, {"bias": None},
        {"x": apart[:, :256].copy_(x)}, {"x": x[:3]}, {"x": x[:1]}, {"x": x[:0]}, {"x": moved(x)},
        {"words": moved(words)}, {"scale_words": moved(grid)}, {"words": moved(words), "scale_words": moved(grid)},
    ]  # fmt: skip
    for parts, change in [*itertools.product((2, 1), changes)] * 2:
        config, call = Config(8, 64, parts, 4, 4, True), plain | change
        check(run(**call, out_features=72, group_size=128, config=config), call["x"], tensor, call["bias"], config)


def moved(tensor: Tensor) -> Tensor:
    """The same numbers, four bytes from a multiple of 16, where they always are one after the other."""
    skip = 4 // tensor.element_size()
    return tensor.new_empty(tensor.numel() + skip)[skip:].view(tensor.shape).copy_(tensor)


def test_non_finite_tokens_stay_alone(device: torch.device) -> None:
    x, tensor, weight, _ = problem(40, 200, 64, False, FP16, 9, device)
    x[4, 7] = float("nan")
    y = int4_matmul(x, weight)
    others = torch.arange(9, device=device) != 4
    assert bool(y[4].isnan().any())
    check(y[others], x[others], tensor, None)


def test_random_problems(random_seeds: range, device: torch.device) -> None:
    """Any shape, group, tile and number of parts."""
    for seed in random_seeds:
        draw = random.Random(seed)
        rows, columns, tokens = draw.randint(1, 200), draw.randint(1, 400), draw.randint(1, 20)
        group, dtype = draw.choice([32, 64, 128, 256, -1]), draw.choice([FP16, BF16])
        x, tensor, weight, bias = problem(rows, columns, group, draw.random() < 0.5, dtype, tokens, device)
        every = tune.shapes(90) + tune.shapes(80) + tune.trials(90, weight.group_size, "fp16")
        fits = [shape for shape in every if shape.block_n <= weight.scale_words.shape[1]]
        config = replace(draw.choice([shape for shape in fits if shape.block_m <= 32]), split_k=draw.randint(1, 4))
        offset = draw.choice([bias, None])
        y = run(x, weight.words, weight.scale_words, offset, rows, weight.group_size, config)
        check(y, x, tensor, offset, config)


# ---- operators -------------------------------------------------------------------------------------------------------


def test_gradients_reach_x_and_bias(device: torch.device) -> None:
    x, tensor, weight, bias = problem(40, 200, 64, False, FP16, 6, device)
    pull = torch.randn(6, 40, device=device).half()
    grad_x, grad_bias = torch.autograd.grad(
        int4_matmul(x.requires_grad_(), weight, bias.requires_grad_()), (x, bias), pull
    )
    dense, wide = tensor.dequantize(FP16).double(), pull.double().cpu()
    assert_close(grad_x.cpu(), wide @ dense, product_bound(wide.abs() @ dense.abs(), 42), "x")
    assert_close(grad_bias.cpu(), wide.sum(0), product_bound(wide.abs().sum(0), 6), "bias")


@pytest.mark.parametrize("dtype", [FP16, BF16], ids=str)
def test_operators_pass_opcheck(dtype: torch.dtype, device: torch.device) -> None:
    x, tensor, weight, bias = problem(20, 96, 32, False, dtype, 3, device)
    for given in (x, x.clone().requires_grad_()):
        torch.library.opcheck(kernels.product, (given, weight.words, weight.scale_words, bias, 20, 32, False))
    torch.library.opcheck(kernels.dequantized, (weight.words, weight.scale_words, 20, 96, 32, dtype))
    zeros = None if tensor.zeros is None else tensor.zeros.to(device)
    packed = pack(tensor.codes, 4).to(device)
    torch.library.opcheck(kernels.pack_tiles, (packed, tensor.scales.to(device), zeros, 32, 96, dtype))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compile_without_graph_breaks(device: torch.device) -> None:
    x, _, weight, bias = problem(20, 96, 32, False, FP16, 3, device)
    compiled = torch.compile(lambda x: int4_matmul(x, weight, bias), fullgraph=True, backend="aot_eager")
    x.requires_grad_()
    ours, wanted = compiled(x), int4_matmul(x, weight, bias)
    assert torch.equal(ours, wanted)
    assert torch.equal(*(torch.autograd.grad(y.float().square().sum(), x)[0] for y in (ours, wanted)))


def test_what_does_not_fit_is_refused(device: torch.device) -> None:
    x, _, weight, bias = problem(20, 96, 32, False, FP16, 3, device)
    for match, arguments in {
        "x: shape": (x[:, :95], weight, bias),
        "x: torch.bfloat16": (x.bfloat16(), weight, bias),
        "x: on meta": (x.to("meta"), weight, bias),
        "bias: shape": (x, weight, bias[:19]),
    }.items():
        with pytest.raises(ValueError, match=match):
            int4_matmul(*arguments)
