"""A loaded model on the device, and in the dtype, that it is to run in."""

from __future__ import annotations

import logging

import torch
from torch import nn

from epmq.devices import compute_device, home_of
from epmq.errors import ConfigError
from epmq.linear import QuantLinear
from epmq.sources import main_dtype, open_source
from epmq.swap import pack_for_gpu

log = logging.getLogger("epmq")

FLOATS = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def place(
    model: nn.Module, device: str | torch.device | None = None, dtype: str | torch.dtype | None = None
) -> nn.Module:
    """Move a model; None leaves it on its device or in its dtype. Scales of quantized layers keep theirs.

    On an NVIDIA GPU quantized layers keep their codes in the layout of its kernel alone
    (:func:`epmq.swap.pack_for_gpu`); those it does not take run as reference, slowly, which is logged. Raises
    ConfigError for a device that is not there and for a dtype that models do not run in.
    """
    if isinstance(dtype, str):
        if dtype not in FLOATS:
            raise ConfigError(f"dtype: {dtype!r} is none of {', '.join(FLOATS)}.")
        dtype = FLOATS[dtype]
    if dtype is not None:
        _cast(model, dtype)
    if device is not None:
        model.to(compute_device(device))
    if home_of(model).type == "cuda":
        quantized = [name for name, module in model.named_modules() if isinstance(module, QuantLinear)]
        packed = pack_for_gpu(model, main_dtype(open_source(dict(model.named_parameters()))))
        if left := sorted(set(quantized) - set(packed)):
            log.warning(
                "%d of %d quantized layers, such as %s, do not fit the GPU's int4 kernel (4 bits, groups of 32, 64 or"
                " multiples of 128, 16-bit inputs) and run as reference, slowly; a float32 model wants bfloat16.",
                len(left),
                len(quantized),
                left[0],
            )
    return model


def _cast(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast all but the frequencies of rotary embeddings, which transformers keeps as they are made whatever dtype it
    loads in: multiplied by a far position, frequencies of 16 bits are whole turns off."""
    frequencies = [
        (module, name, buffer)
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
        if name.endswith("inv_freq")
    ]
    model.to(dtype)
    for module, name, buffer in frequencies:
        module._buffers[name] = buffer
