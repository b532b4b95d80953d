"""Rivals that may be there: each gives a call, or the reason why it does not."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from epmq.quantized import QuantizedTensor

Call = Callable[[], Any]
Multiply = Callable[[Tensor, QuantizedTensor], Call]


class Absent(Exception):
    """Why a rival does not run here."""


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise Absent(f"cannot be imported: {error}") from None


def cublas(x: Tensor, weight: QuantizedTensor) -> Call:
    """A dense product in x's dtype."""
    dense = weight.dequantize(x.dtype)
    return lambda: torch.nn.functional.linear(x, dense)


def tinygemm(x: Tensor, weight: QuantizedTensor) -> Call:
    """torch's own int4 product (torch.ops.aten._weight_int4pack_mm), bf16 only: w = (code - 8) * scale + zero."""
    if x.dtype != torch.bfloat16:
        raise Absent("multiplies bf16 only")
    codes = weight.codes
    packed = torch.ops.aten._convert_weight_to_int4pack((codes[:, ::2] << 4 | codes[:, 1::2]).contiguous(), 8)
    scales = weight.scales.float()
    zeros = torch.full_like(scales, 8.0) if weight.zeros is None else weight.zeros.float()
    grid = torch.stack([scales, (8.0 - zeros) * scales], -1).transpose(0, 1).contiguous().to(x.dtype)
    return lambda: torch.ops.aten._weight_int4pack_mm(x, packed, weight.group_size, grid)


def gemlite(x: Tensor, weight: QuantizedTensor) -> Call:
    """gemlite's own dispatch over its Triton kernels."""
    core = _module("gemlite.core")
    dtype = core.DType.FP16 if x.dtype == torch.float16 else core.DType.BF16
    rows, columns = weight.shape
    layer = core.GemLiteLinear(
        4, group_size=weight.group_size, in_features=columns, out_features=rows, input_dtype=dtype, output_dtype=dtype
    )
    zeros = torch.full_like(weight.scales, 8.0) if weight.zeros is None else weight.zeros.to(x.dtype)
    layer.pack(weight.codes, weight.scales.to(x.dtype), zeros, None)
    return lambda: layer(x)


def humming(x: Tensor, weight: QuantizedTensor) -> Call:
    """Compiles per shape through a command of its own, which is run beside this suite."""
    _module("humming")
    raise Absent("is there, but is timed by its own benchmarks/bench_humming.py")


def marlin(x: Tensor, weight: QuantizedTensor) -> Call:
    """vLLM's Marlin; its operator's signature changes between versions."""
    _module("vllm._custom_ops")
    raise Absent("vLLM is there, but this version's Marlin signature is not known here")


# Made for few tokens: from so many on they take seconds.
MOST_TOKENS = {"tinygemm": 512}
PRODUCTS: dict[str, Multiply] = {
    "cublas": cublas,
    "tinygemm": tinygemm,
    "gemlite": gemlite,
    "humming": humming,
    "marlin": marlin,
}


def llm_compressor() -> Callable[[Tensor, Tensor], Tensor]:
    """Its quantize_weight as it comes, symmetric groups of 128: (weight, Hessian) -> dequantized weight."""
    _module("llmcompressor.modifiers.gptq.gptq_quantize")
    from peers.gptq_time import llmcompressor

    run: Callable[[Tensor, Tensor], Tensor] = llmcompressor()
    return run
