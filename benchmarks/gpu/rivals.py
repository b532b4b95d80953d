"""Rivals that may be there: each gives a call, or the reason why it does not."""

from __future__ import annotations

import functools
import importlib
import json
import os
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
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


@functools.cache
def _gemlite() -> Any:
    """Its core, with the table of programs that it ships for this GPU, by name; a Hopper that it has none for is given
    the H100's. What no table has it searches for at the first call of a shape, among 12 to 20 programs."""
    core = _module("gemlite.core")
    if not core.GEMLITE_TRITON_CONFIG_CACHE and torch.cuda.get_device_capability() == (9, 0):
        table = Path(core.__file__).with_name("configs") / "h100.json"
        core.GemLiteLinear.load_config(str(table), print_error=False)
    if not core.GEMLITE_TRITON_CONFIG_CACHE:
        raise Absent("ships no table of programs for this GPU, and its search takes too long")
    return core


def gemlite(x: Tensor, weight: QuantizedTensor) -> Call:
    """gemlite's own dispatch over its Triton kernels."""
    core = _gemlite()
    dtype = core.DType.FP16 if x.dtype == torch.float16 else core.DType.BF16
    rows, columns = weight.shape
    layer = core.GemLiteLinear(
        4, group_size=weight.group_size, in_features=columns, out_features=rows, input_dtype=dtype, output_dtype=dtype
    )
    zeros = torch.full_like(weight.scales, 8.0) if weight.zeros is None else weight.zeros
    layer.pack(weight.codes, weight.scales.to(x.dtype), zeros.to(x.dtype), None)
    return lambda: layer(x)


def humming(x: Tensor, weight: QuantizedTensor) -> Call:
    """Humming's product with fp32 sums, in the program that it chooses for each number of tokens.

    It compiles programs for every number up to 8192, some thirty of 2 to 5 seconds, unless it is told which. It is told
    those of all numbers that are measured, so that they are compiled at once, side by side, at the layer's first call.
    """
    # Which of two compilers it takes hangs on what it can import; nvcc is there where our extension was built.
    os.environ.setdefault("HUMMING_COMPILER", "nvcc")
    toolkit = _module("torch.utils.cpp_extension").CUDA_HOME
    if toolkit is not None:
        os.environ.setdefault("CUDA_HOME", toolkit)
    layers, programs = _module("humming.layer"), _module("humming.tune")
    rows, columns = weight.shape
    form = {"dtype": "uint4", "group_size": weight.group_size, "has_zero_point": True}
    layer = layers.HummingLayer(rows, columns, form, torch_dtype=x.dtype).to(x.device)
    zeros = torch.full_like(weight.scales, 8.0) if weight.zeros is None else weight.zeros
    layer.load_from_tensors(
        {
            "weight": _nibbles(weight.codes),
            "weight_scale": weight.scales.to(x.dtype),
            "zero_point": _nibbles(zeros.to(torch.uint8).T).T.contiguous(),
        }
    )
    layer.transform()
    counts = SOME["humming"].get(weight.shape, (len(x),))
    chosen = json.dumps(
        [
            (before, count, programs.get_heuristics_config(layer.humming_config, shape_m=count))
            for before, count in pairwise((0, *counts))
        ]
    )
    return lambda: layer(x, tuning_config=chosen)


def _nibbles(codes: Tensor) -> Tensor:
    """Eight codes of a row in each int32, the first in its low bits."""
    return (codes[:, ::2] | codes[:, 1::2] << 4).contiguous().view(torch.int32)


def marlin(x: Tensor, weight: QuantizedTensor) -> Call:
    """vLLM's Marlin; its operator's signature changes between versions."""
    _module("vllm._custom_ops")
    raise Absent("vLLM is there, but this version's Marlin signature is not known here")


# Made for few tokens: from so many on they take seconds.
MOST_TOKENS = {"tinygemm": 512}
# What compiles for each row is measured at these numbers of tokens of these layers, N x K. gemlite's table has entries
# for its two, but none for 4 and 64 tokens, where it by now takes other kernels than when the table was made; without
# an entry it searches, some ten seconds for each number.
IN_TABLE = (1, 16, 32, 128, 256, 512, 1024, 2048, 8192)
SOME: dict[str, dict[tuple[int, int], tuple[int, ...]]] = {
    "gemlite": {(4096, 4096): IN_TABLE, (28672, 4096): IN_TABLE},
    "humming": dict.fromkeys(((4096, 4096), (8192, 8192)), (1, 4, 16, 32, 64, 128, 256, 512, 1024, 2048, 8192)),
}
MOST_FAILURES = 2  # in one process, of what compiles: a failure can take as long as what it fails at
failures: Counter[str] = Counter()


def measured(name: str, rows: int, columns: int, tokens: int) -> bool:
    """Whether a rival is measured at this product."""
    if name in SOME:
        return tokens in SOME[name].get((rows, columns), ()) and failures[name] < MOST_FAILURES
    return name not in MOST_TOKENS or tokens < MOST_TOKENS[name]


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
