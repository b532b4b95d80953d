"""The method's formulas the long way: data in the open, explicit inverses, one column at a time. Nothing of epmq."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Task:
    """One task's rows at a layer: x, inside ``[M, K]``, and its expert ``[N, K]``, ``[N]``."""

    x: Tensor
    inside: Tensor
    weight: Tensor
    bias: Tensor

    def target(self, alpha: float) -> Tensor:
        """``[M, N]``: the expert's output on (1 - alpha) x + alpha inside."""
        return ((1 - alpha) * self.x + alpha * self.inside) @ self.weight.T + self.bias


@dataclass
class Layer:
    """A merged weight with its base and the tasks it serves, in fp64."""

    tasks: list[Task]
    merged: Tensor
    base: Tensor
    bias: Tensor

    def anchor(self, rho: float) -> Tensor:
        return rho * self.merged + (1 - rho) * self.base

    def hessian(self) -> Tensor:
        """Σ x xᵀ / n over tasks."""
        total: Tensor = sum((task.x.T @ task.x / len(task.x) for task in self.tasks), torch.zeros(()).double())
        return total


def make_layer(rows: int, columns: int, tasks: int = 3, tokens: int = 0, seed: int = 0) -> Layer:
    """Correlated inputs of uneven size, experts around a base, their average as merged weight."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    base, base_bias = normal(rows, columns), normal(rows)
    made = []
    for number in range(tasks):
        count = (tokens or 3 * columns) + 7 * number
        mixing = normal(columns, columns) / columns**0.5 + 0.5 * torch.eye(columns).double()
        x = (normal(count, columns) + 0.3 * normal(columns)) @ mixing
        weight, bias = base + 0.3 * normal(rows, columns), base_bias + 0.3 * normal(rows)
        made.append(Task(x, x + 0.1 * normal(count, columns), weight, bias))
    merged = torch.stack([task.weight for task in made]).mean(0)
    return Layer(made, merged, base, torch.stack([task.bias for task in made]).mean(0))


def objective(layer: Layer, q: Tensor, strength: float, rho: float, alpha: float) -> float:
    """Eq. (1) with w_t = 1/n_t: Σ w ‖Q x + b - y‖² + λ ‖Q - A‖²."""
    total = strength * float((q - layer.anchor(rho)).square().sum())
    for task in layer.tasks:
        total += float((task.x @ q.T + layer.bias - task.target(alpha)).square().sum()) / len(task.x)
    return total


def target_weight(layer: Layer, strength: float, rho: float, alpha: float) -> Tensor:
    """Eq. (2): (C + λ A) (H + λ I)⁻¹ with the inverse written out."""
    hessian = layer.hessian()
    cross = strength * layer.anchor(rho)
    for task in layer.tasks:
        cross = cross + (task.target(alpha) - layer.bias).T @ task.x / len(task.x)
    return cross @ torch.linalg.inv(hessian + strength * torch.eye(len(hessian)).double())


def min_max_grid(part: Tensor, bits: int, sym: bool, stored: torch.dtype) -> tuple[Tensor, Tensor]:
    """Scale and zero ``[N]`` of one group's columns."""
    top = 2**bits - 1
    low, high = part.amin(1).clamp_max(0), part.amax(1).clamp_min(0)
    if sym:
        scale = (2 * torch.maximum(-low, high) / top).to(stored).to(part.dtype)
        return scale, torch.full_like(scale, 2 ** (bits - 1))
    scale = ((high - low) / top).to(stored).to(part.dtype)
    return scale, torch.round(-low / scale).clamp(0, top)


def spans(columns: int, group_size: int) -> Iterator[tuple[int, int]]:
    """First and past-last column of each group."""
    size = columns if group_size == -1 else group_size
    for start in range(0, columns, size):
        yield start, min(start + size, columns)


def gptq(
    weight: Tensor,
    hessian: Tensor,
    bits: int,
    group_size: int,
    sym: bool,
    act_order: bool = False,
    static_groups: bool = True,
    stored: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor]:
    """GPTQ as published: inverse, its upper Cholesky factor, errors pushed right; codes, scales, zeros."""
    rows, columns = weight.shape
    groups = list(spans(columns, group_size))
    group_of = [g for g, (start, stop) in enumerate(groups) for _ in range(start, stop)]
    scales, zeros = weight.new_empty(rows, len(groups)), weight.new_empty(rows, len(groups))
    if static_groups:
        for g, (start, stop) in enumerate(groups):
            scales[:, g], zeros[:, g] = min_max_grid(weight[:, start:stop], bits, sym, stored)
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True) if act_order else torch.arange(columns)
    work = weight[:, order].clone()
    upper = torch.linalg.cholesky(torch.linalg.inv(hessian[order][:, order]), upper=True)
    codes = torch.empty(rows, columns, dtype=torch.uint8)
    for j, column in enumerate(order.tolist()):
        g = group_of[column]
        if not static_groups and j == groups[g][0]:
            scales[:, g], zeros[:, g] = min_max_grid(work[:, slice(*groups[g])], bits, sym, stored)
        code = (torch.round(work[:, j] / scales[:, g]) + zeros[:, g]).clamp(0, 2**bits - 1)
        error = (work[:, j] - (code - zeros[:, g]) * scales[:, g]) / upper[j, j]
        work[:, j + 1 :] -= error.unsqueeze(1) * upper[j, j + 1 :]
        codes[:, column] = code.to(torch.uint8)
    return codes, scales, zeros


def assert_near(ours: Tensor, wanted: Tensor, terms: int, condition: float = 1.0) -> None:
    """Largest difference within ``8 · terms · eps · condition`` of the largest wanted entry, eps of ours' dtype."""
    assert ours.shape == wanted.shape
    bound = 8 * terms * torch.finfo(ours.dtype).eps * condition * float(wanted.abs().max())
    worst = float((ours.double() - wanted.double()).abs().max())
    assert worst <= bound, f"worst difference {worst:.3g}, bound {bound:.3g}"
