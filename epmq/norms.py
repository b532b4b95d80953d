"""Refit of norm layers: one scale and shift per channel that bring a norm's outputs near the experts'."""

from __future__ import annotations

import inspect

import torch
from torch import Tensor, nn

from epmq.world import World

RIDGE = 0.1
CHANNELS_SECOND = (
    nn.GroupNorm, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.InstanceNorm1d, nn.InstanceNorm2d,
    nn.InstanceNorm3d,
)  # fmt: skip


class NormStatistics:
    """Per-channel moments of a norm's deployed outputs z and the experts' outputs y, weighted by task.

    fp64 sums of each batch's fp32 ones, so that the result does not depend on which process took which batch.
    """

    def __init__(self, channels: int, device: torch.device | None = None):
        self.weight = 0.0
        self.z, self.y, self.zz, self.zy = torch.zeros(4, channels, dtype=torch.float64, device=device)

    def add(self, z: Tensor, y: Tensor, row_weights: Tensor) -> None:
        """Add rows ``[M, K]`` with weights ``[M]``."""
        r = row_weights.unsqueeze(1)
        self.weight += float(row_weights.sum())
        self.z += (z * r).sum(0)
        self.y += (y * r).sum(0)
        self.zz += (z * z * r).sum(0)
        self.zy += (z * y * r).sum(0)

    def over(self, world: World) -> None:
        """Make these the moments of all processes' rows."""
        weight = torch.tensor([self.weight], dtype=torch.float64)
        world.add_up([self.z, self.y, self.zz, self.zy, weight])
        self.weight = float(weight)

    def fold(self, task: NormStatistics) -> None:
        """Add a task's moments, every task with the same total weight."""
        self.weight += 1.0
        for name in ("z", "y", "zz", "zy"):
            getattr(self, name).add_(getattr(task, name), alpha=1.0 / task.weight)

    def correction(self, with_shift: bool) -> tuple[Tensor, Tensor]:
        """Scale a and shift c, fp32 ``[K]``, minimising Σ (a z + c - y)² + ridge · Σ z² (a - 1)² per channel."""
        s = self.weight
        if with_shift:
            covariance = self.zy - self.z * self.y / s
            variance = self.zz - self.z * self.z / s
        else:
            covariance, variance = self.zy, self.zz
        ridge = RIDGE * variance + torch.finfo(torch.float32).tiny
        scale = (covariance + ridge) / (variance + ridge)
        shift = (self.y - scale * self.z) / s if with_shift else torch.zeros_like(scale)
        return scale.float(), shift.float()


def reads_one_input(norm: nn.Module) -> bool:
    """Whether a norm is called with what it is to normalise and nothing else; one with a gate is not."""
    needed = [p for p in inspect.signature(norm.forward).parameters.values() if p.default is p.empty]
    return len([p for p in needed if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]) == 1


def _offset(norm: nn.Module) -> float:
    """What a norm adds to its weight before it multiplies: 1 for Gemma's, which stores the scale less one, else 0."""
    zeros = {name: torch.zeros_like(parameter) for name, parameter in norm.named_parameters()}
    weight = zeros["weight"]
    probe = torch.linspace(-1.0, 1.0, len(weight), dtype=weight.dtype, device=weight.device).unsqueeze(0)
    return float(bool(torch.func.functional_call(norm, zeros, (probe,)).any()))


@torch.no_grad()
def correct(norm: nn.Module, scale: Tensor, shift: Tensor) -> None:
    """Fold an affine correction of a norm's outputs into its weight and bias, which become new parameters."""
    weight: Tensor = norm.weight  # type: ignore[assignment]
    bias: Tensor | None = getattr(norm, "bias", None)
    offset = _offset(norm)
    norm.weight = nn.Parameter((weight + offset) * scale - offset, requires_grad=False)
    if bias is not None:
        norm.bias = nn.Parameter(bias * scale + shift, requires_grad=False)
