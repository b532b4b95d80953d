"""The state of a distillation in a file, from which a later start goes on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from epmq import trust
from epmq.shelf import write_value


def keep(
    path: Path,
    step: int,
    parameters: list[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    generator: torch.Generator,
    losses: list[float],
    pairs: dict[str, list[str]],
) -> None:
    moments = [dict(optimizer.state.get(parameter, {})) for parameter in parameters]
    state = {"parameters": list(parameters), "moments": moments, "generator": generator.get_state()}
    write_value(path, {**state, "step": step, "losses": losses, "pairs": pairs})


def fits(kept: Any, parameters: list[nn.Parameter], steps: int) -> bool:
    """Whether a value from a file can be the state of this distillation, as :func:`keep` wrote it."""
    if not isinstance(kept, dict) or not trust.is_whole(kept.get("step"), 1, steps):
        return False
    values, moments, losses = (kept.get(name, ()) for name in ("parameters", "moments", "losses"))
    pairs = kept.get("pairs")
    if not all(isinstance(part, list) for part in (values, moments, losses)) or not isinstance(pairs, dict):
        return False
    if not len(values) == len(moments) == len(parameters) or len(losses) != kept["step"]:
        return False
    if not all(isinstance(loss, float) for loss in losses):
        return False
    if not all(isinstance(names, list) and all(isinstance(name, str) for name in names) for names in pairs.values()):
        return False
    try:
        torch.Generator().set_state(kept["generator"])
    except (KeyError, TypeError, RuntimeError):
        return False
    every = zip(parameters, values, moments, strict=True)
    return all(_is_like(value, parameter) and _are_moments(its, parameter) for parameter, value, its in every)


def _are_moments(kept: Any, parameter: nn.Parameter) -> bool:
    """Whether a value can be AdamW's state of a parameter; it is empty for one that never had a gradient."""
    if not isinstance(kept, dict) or not kept:
        return kept == {}
    step = kept.get("step")
    counted = isinstance(step, Tensor) and step.dim() == 0 and step.is_floating_point()
    return counted and all(_is_like(kept.get(name), parameter) for name in ("exp_avg", "exp_avg_sq")) and len(kept) == 3


def _is_like(value: Any, parameter: nn.Parameter) -> bool:
    return isinstance(value, Tensor) and value.shape == parameter.shape and value.dtype == parameter.dtype


@torch.no_grad()
def take_up(
    kept: Mapping[str, Any],
    parameters: list[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    generator: torch.Generator,
) -> tuple[list[float], dict[str, list[str]], int]:
    for parameter, value in zip(parameters, kept["parameters"], strict=True):
        parameter.copy_(value)
    for parameter, moments in zip(parameters, kept["moments"], strict=True):
        if moments:
            # Adam's count of steps stays on the CPU.
            kept_there = {name: value.to(parameter.device) for name, value in moments.items() if name != "step"}
            optimizer.state[parameter] = {**moments, **kept_there}
    generator.set_state(kept["generator"])
    return kept["losses"], kept["pairs"], kept["step"]
