"""How an int4 product runs on tensors of :mod:`epmq.kernels.layout`: programs, grids and what several parts need."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from epmq.kernels import tune
from epmq.kernels.arrivals import counters
from epmq.kernels.int4_programs import dequantize_tiles, product_tiles, sum_parts
from epmq.kernels.launch import Launch, interpreted, on_device, readable, row_stride
from epmq.kernels.layout import TILE_COLUMNS, TILE_ROWS, padded
from epmq.kernels.tune import Config

SWIZZLED_FROM = 256  # tokens; fewer see each weight once, and their order does not matter
SUM_BLOCK = 1024
PLANS = 16384  # kept; each number of tokens has its own


@dataclass(frozen=True)
class Plan:
    """What of a product follows from sizes, dtypes and places.

    parts: that are summed, by the launch ``total``, or where that is None by the product; 0 where y is written at once.
    """

    product: Launch
    numbers: tuple[int, ...]
    parts: int = 0
    total: Launch | None = None


def run(
    x: Tensor,
    words: Tensor,
    scale_words: Tensor,
    bias: Tensor | None,
    out_features: int,
    group_size: int,
    config: Config,
    assembly: bool | None = None,
) -> Tensor:
    """One product in one configuration; assembly None is inline assembly wherever it can run."""
    tokens = x.shape[0]
    if tokens == 0 or out_features == 0:
        return x.new_empty(tokens, out_features)
    if config.two_stages:
        weight = dequantize_words(words, scale_words, out_features, x.shape[1], group_size, x.dtype)
        return F.linear(x, weight, None if bias is None else bias.to(x.dtype))
    x = readable(x, TILE_COLUMNS)
    kind, place = (None, 0) if bias is None else (bias.dtype, bias.data_ptr() % 16)
    places = (words.data_ptr() % 16, scale_words.data_ptr() % 16, place)
    how = plan(
        x.device,
        x.dtype,
        kind,
        tokens,
        row_stride(x),
        out_features,
        words.shape[1],
        group_size,
        config,
        assembly,
        places,
    )
    out = x.new_empty(tokens, out_features)
    if not how.parts:
        how.product(x, words, scale_words, bias, out, None, None, *how.numbers)
        return out
    sums = torch.empty(how.parts, tokens, out_features, dtype=torch.float32, device=x.device)
    if how.total is None:
        arrived = counters(x.device, how.product.grid[0])
        how.product(x, words, scale_words, bias, out, sums, arrived, *how.numbers)
    else:
        how.product(x, words, scale_words, None, out, sums, None, *how.numbers)
        how.total(sums, bias, out, tokens, out_features)
    return out


@functools.lru_cache(maxsize=PLANS)
def plan(
    device: torch.device,
    dtype: torch.dtype,
    bias: torch.dtype | None,
    tokens: int,
    stride: int,
    out_features: int,
    blocks: int,
    group_size: int,
    config: Config,
    assembly: bool | None,
    places: tuple[int, ...],
) -> Plan:
    """The plan of a product. places: of words, grid and bias within 16 bytes, for which programs are compiled."""
    simulated = interpreted()
    wide = simulated and dtype == torch.bfloat16
    per_part, parts = cut(blocks, config)
    # A bias of x's dtype is added by the product, any other by the sum, so that none compiles the product anew.
    other_bias = bias not in (None, dtype)
    split = parts > 1 or other_bias
    last = parts > 1 and config.one_launch and not other_bias
    # sm_90 can launch the sum before the product has ended, which hides most of what a launch costs. The product itself
    # gains nothing by that: on an H200 it took longer, whether or not it fetched weights meanwhile.
    early = split and not last and not simulated and tune.device_facts(device)[0] >= 90
    product = Launch(
        product_tiles, (-(-tokens // config.block_m) * -(-out_features // config.block_n), parts),
        BM=config.block_m, BN=config.block_n, GROUP=group_size, SPLIT=split, LAST=last,
        BIAS=bias is not None and (last or not split), JOINED=config.joined,
        SWIZZLE=8 if tokens >= SWIZZLED_FROM else 1, EARLY=early,
        ASM=not simulated if assembly is None else assembly, WIDE=wide,
        **config.options(),
    )  # fmt: skip
    numbers = (tokens, out_features, padded(out_features, TILE_ROWS), blocks, stride, per_part)
    if not split or last:
        return Plan(product, numbers, parts if last else 0)
    total = Launch(
        sum_parts, (-(-tokens * out_features // SUM_BLOCK),),
        SPLITS=parts, BIAS=bias is not None, EARLY=early, WIDE=wide,
        BLOCK=SUM_BLOCK, enable_fp_fusion=False, **({"launch_pdl": True} if early else {}),
    )  # fmt: skip
    return Plan(product, numbers, parts, total)


def cut(blocks: int, config: Config) -> tuple[int, int]:
    """(blocks of 128 columns in a part, parts): the parts asked for, less where that leaves some without a block."""
    per_part = -(-blocks // config.split_k)
    return per_part, -(-blocks // per_part)


def dequantize_words(
    words: Tensor, scale_words: Tensor, out_features: int, in_features: int, group_size: int, dtype: torch.dtype
) -> Tensor:
    """``[N, K]`` in dtype: the weight that tensors of a PackedWeight stand for, columns in stored order."""
    out = torch.empty(out_features, in_features, dtype=dtype, device=words.device)
    blocks = words.shape[1]
    with on_device(words):
        dequantize_tiles[(blocks, words.shape[0])](
            words, scale_words, out, out_features, scale_words.shape[1], in_features, blocks,
            GROUP=group_size, ASM=not interpreted(), WIDE=interpreted() and dtype == torch.bfloat16,
            enable_fp_fusion=False,
        )  # fmt: skip
    return out
