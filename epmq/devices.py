"""Which device computes, and moving what a model's forward is given to it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from epmq.errors import ConfigError
from epmq.staging import sent


def compute_device(wanted: str | torch.device | None, home: torch.device | None = None) -> torch.device:
    """The device to compute on: ``cpu``, ``cuda``, ``cuda:1`` and the like, or ``auto`` (None), which is where the
    model lives (``home``) if that is not the CPU, else the first GPU that CUDA offers, else the CPU.

    Raises ConfigError for a name torch does not know, or a CUDA device that is not there.
    """
    if wanted is None or wanted == "auto":
        if home is not None and home.type not in ("cpu", "meta"):
            return home
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(wanted)
        if device.type not in ("cpu", "cuda"):
            torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError):
        raise ConfigError(f"device: {wanted!r} is not a device here; use auto, cpu, cuda or cuda:0.") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device: {wanted!r} is not there, CUDA offers {torch.cuda.device_count()}; use auto or cpu.")
    return device


def free_bytes(device: torch.device) -> int:
    """What a GPU can still give this process: what nobody holds, and what torch keeps there for later; no more than
    the share of it that torch may take."""
    free, total = torch.cuda.mem_get_info(device)
    allocated = torch.cuda.memory_allocated(device)
    # It wants to know which one "cuda" is.
    index = torch.cuda.current_device() if device.index is None else device.index
    allowed = int(total * torch.cuda.get_per_process_memory_fraction(index))
    return min(free + torch.cuda.memory_reserved(device), allowed) - allocated


def home_of(model: nn.Module) -> torch.device:
    """Where a module's first tensor lives; the CPU for one without tensors."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")


def cast_there(tensor: Tensor, device: torch.device | None, floats: torch.dtype | None) -> Tensor:
    """The tensor on ``device`` (None: where it is), floats in a dtype (None: their own).

    In one step torch casts on the CPU, into fresh memory of twice the size, before it moves that.
    """
    there = tensor if device is None else sent(tensor, device)
    return there.to(dtype=floats if tensor.is_floating_point() else None)


def moved(value: Any, device: torch.device, floats: torch.dtype | None = None) -> Any:
    """The value with every tensor in it, also in dicts, lists and tuples, on ``device``; those of floats in a dtype."""
    if isinstance(value, Tensor):
        return cast_there(value, device, floats)
    if isinstance(value, dict):
        return {key: moved(item, device, floats) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(moved(item, device, floats) for item in value)
    return value


def place_buffers(model: nn.Module, device: torch.device) -> None:
    """Move the buffers that hold memory, those a checkpoint does not store, in place."""
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if not buffer.is_meta:
                module._buffers[name] = buffer.to(device)
