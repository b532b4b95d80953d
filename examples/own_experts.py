"""Your own modules: two experts of one small network, merged, then quantized to 4 bits towards both.

    python examples/own_experts.py

Each expert sorts points that were turned by another angle. The merged network is mediocre at both; the quantized one is
calibrated on unlabelled points of either kind and aimed at what each expert would answer.
"""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn

import epmq

ANGLES = {"upright": 0.0, "turned": math.pi / 3}


class Block(nn.Module):
    """A residual block; epmq finds the list of them by itself."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = x + self.down(torch.relu(self.up(self.norm(x))))
        return output


class Network(nn.Module):
    """Points ``[n, 2]`` to logits ``[n, 4]``."""

    def __init__(self, width: int = 64, depth: int = 3):
        super().__init__()
        self.first = nn.Linear(2, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.head = nn.Linear(width, 4)

    def forward(self, points: Tensor) -> Tensor:
        x = self.first(points)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(x)
        return logits


def points(count: int, angle: float) -> tuple[Tensor, Tensor]:
    """Points of four spiral arms, turned by ``angle``, and the arm of each."""
    arm = torch.randint(4, (count,))
    radius = torch.rand(count)
    direction = arm * (math.pi / 2) + 3.0 * radius + 0.15 * torch.randn(count) + angle
    return torch.stack((radius * direction.cos(), radius * direction.sin()), 1) * 3.0, arm


def train(model: nn.Module, angles: list[float], steps: int, rate: float) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    for step in range(steps):
        x, y = points(256, angles[step % len(angles)])
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()


@torch.no_grad()
def accuracy(model: nn.Module, angle: float) -> float:
    x, y = points(4000, angle)
    return 100.0 * float((model(x).argmax(1) == y).float().mean())


def main() -> None:
    torch.manual_seed(0)
    base = Network()
    train(base, list(ANGLES.values()), 80, 2e-3)
    experts: dict[str, nn.Module] = {}
    for task in ANGLES:
        expert = copy.deepcopy(base)
        # Only the blocks learn: first layer and head stay the base's, as they are in the merged network.
        expert.first.requires_grad_(False)
        expert.head.requires_grad_(False)
        train(expert, [ANGLES[task]], 250, 1e-3)
        experts[task] = expert
    merged = epmq.merge(base, experts, method="task_arithmetic", scaling=0.5)

    calibration = {task: [{"points": points(128, angle)[0]} for _ in range(4)] for task, angle in ANGLES.items()}
    plain = epmq.quantize(merged, None, calibration, epmq.QuantConfig(method="gptq", bits=4, group_size=32))
    result = epmq.quantize(merged, experts, calibration, epmq.preset("best", bits=4, group_size=32))

    compared: dict[str, dict[str, nn.Module]] = {
        "experts": experts,
        "merged, 32 bits": dict.fromkeys(ANGLES, merged),
        "GPTQ, 4 bits": dict.fromkeys(ANGLES, plain.model),
        "E-PMQ, 4 bits": dict.fromkeys(ANGLES, result.model),
    }
    for name, models in compared.items():
        scores = ", ".join(f"{task} {accuracy(models[task], angle):.1f} %" for task, angle in ANGLES.items())
        print(f"{name:16} {scores}")
    sizes = result.report["bytes"]
    print(f"{sizes['merged']} bytes became {sizes['quantized']}")


if __name__ == "__main__":
    main()
