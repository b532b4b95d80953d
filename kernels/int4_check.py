"""The check of int4 products before first use on a device: small integers whose product is exact in every step."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
from torch import Tensor

from epmq.errors import NumericalError
from epmq.kernels.int4_launch import SWIZZLED_FROM, cut, run
from epmq.kernels.layout import BITS, TILE_COLUMNS, pack_weight
from epmq.kernels.tune import Config
from epmq.quantized import QuantizedTensor, group_count


@dataclass(frozen=True)
class Case:
    """All that decides which compiled programs a product runs. ``parts`` are those that are really summed.

    out_features and in_features: 1, or 16 for its multiples, or 0 for others, as Triton tells them apart.
    """

    config: Config
    parts: int
    group_size: int
    dtype: torch.dtype
    bias: torch.dtype | None
    out_features: int
    in_features: int
    swizzled: bool


_checked: set[tuple[Any, ...]] = set()  # by device, calls and the cases that they are


def case_of(x: Tensor, bias: Tensor | None, out_features: int, group_size: int, config: Config) -> Case:
    """The case of a product of x ``[M, K]``."""

    def kind(size: int) -> int:
        return 1 if size == 1 else 16 if size % 16 == 0 else 0

    # The product pads K itself; the two stages have no parts, and know of N only where rows end.
    parts = 1 if config.two_stages else cut(-(-x.shape[1] // TILE_COLUMNS), config)[1]
    return Case(
        replace(config, split_k=1),
        parts,
        group_size,
        x.dtype,
        None if bias is None else bias.dtype,
        16 if config.two_stages else kind(out_features),
        kind(x.shape[1]) if config.two_stages else 16,
        not config.two_stages and x.shape[0] >= SWIZZLED_FROM,
    )


def ensure_checked(x: Tensor, bias: Tensor | None, out_features: int, group_size: int, config: Config) -> None:
    """Check what a product runs, once per device before the first one. Raises NumericalError for wrong results.

    While a CUDA graph is captured nothing can be checked: run the product once before.
    """
    device, tokens, in_features = x.device, *x.shape
    call = (
        device.index, config, group_size, x.dtype, None if bias is None else bias.dtype, out_features, in_features,
        tokens >= SWIZZLED_FROM,
    )  # fmt: skip
    if call in _checked:
        return
    case = case_of(x, bias, out_features, group_size, config)
    if (device.index, case) not in _checked:
        if x.is_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("int4_matmul: run it once on this device before a CUDA graph is captured, to check it.")
        check(device, case)
    _checked.update(((device.index, case), call))


def check(device: torch.device, case: Case) -> None:
    """Multiply small integers whose product is exact in every step and compare. Raises NumericalError."""
    cpu = torch.device("cpu")  # whatever the caller's defaults for device and dtype are
    generator = torch.Generator(cpu).manual_seed(0)

    def draw(least: int, stop: int, *shape: int) -> Tensor:
        return torch.randint(least, stop, shape, generator=generator, device=cpu, dtype=torch.int64)

    config, group = replace(case.config, split_k=case.parts), case.group_size or -1
    # Parts of at least two blocks each, and three groups.
    whole = TILE_COLUMNS * case.parts * max(2, -(-3 * case.group_size // (TILE_COLUMNS * case.parts)))
    columns = {1: 1, 16: whole, 0: whole - 5}[case.in_features]
    # With swizzling ten tiles of rows: one more than it takes together, and the one that is moved back.
    tiles = 9 if case.swizzled else 1
    rows = {1: 1, 16: tiles * max(config.block_n, 64) + 48, 0: tiles * max(config.block_n, 64) + 41}[case.out_features]
    tokens = config.block_m + 3 + (SWIZZLED_FROM if case.swizzled else 0)
    groups = group_count(columns, group)
    codes, zeros = (draw(0, 16, rows, n).to(torch.uint8) for n in (columns, groups))
    scales = torch.tensor([0.5, 1.0, 2.0], device=cpu, dtype=torch.float32)[draw(0, 3, rows, groups)]
    # Up to four tokens of every row are not zero, so that no sum leaves the integers (and halves) that 8 bits hold.
    x = torch.zeros(tokens, columns, device=cpu, dtype=torch.float32)
    x.scatter_(1, draw(0, columns, tokens, 4), draw(0, 2, tokens, 4).float() * 2.0 - 1.0)
    offset = None if case.bias is None else draw(-2, 3, rows).float()
    exact = QuantizedTensor(codes, scales, zeros, BITS, group)
    weight = pack_weight(exact, case.dtype)
    words, scale_words = weight.words.to(device), weight.scale_words.to(device)
    bias = None if offset is None else offset.to(device, case.bias)
    y = run(x.to(device, case.dtype), words, scale_words, bias, rows, case.group_size, config)
    wanted = x @ exact.dequantize().T + (0.0 if offset is None else offset)
    wrong = y.float().cpu() != wanted
    if bool(wrong.any()):
        raise NumericalError(
            f"int4_matmul: {int(wrong.sum())} of {wrong.numel()} products of small integers are wrong on {device} "
            f"in {case}; this GPU, driver or Triton {triton.__version__} computes wrongly, set EPMQ_BACKEND=reference."
        )
