"""A model of one Llama-3-8B-shaped block in plain torch, with random experts and calibration tokens."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

EXPERTS, BATCHES, EXAMPLES, LENGTH, VOCABULARY = 8, 4, 4, 2048, 1024  # 32,768 tokens for each expert


class Block(nn.Module):
    """Grouped-query attention and a gated MLP between RMS norms; positions are left out, which changes no shape."""

    def __init__(self, width: int, inner: int, heads: int, groups: int):
        super().__init__()
        self.heads, self.groups, size = heads, groups, width // heads
        self.attention_norm, self.mlp_norm = nn.RMSNorm(width), nn.RMSNorm(width)
        self.q = nn.Linear(width, width, bias=False)
        self.k, self.v = (nn.Linear(width, groups * size, bias=False) for _ in range(2))
        self.o = nn.Linear(width, width, bias=False)
        self.gate, self.up = (nn.Linear(width, inner, bias=False) for _ in range(2))
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        x = self.attention_norm(hidden)
        q, k, v = (
            projected.unflatten(-1, (count, -1)).transpose(1, 2)
            for projected, count in ((self.q(x), self.heads), (self.k(x), self.groups), (self.v(x), self.groups))
        )
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        hidden = hidden + self.o(mixed.transpose(1, 2).flatten(2))
        x = self.mlp_norm(hidden)
        out: Tensor = hidden + self.down(nn.functional.silu(self.gate(x)) * self.up(x))
        return out


class Model(nn.Module):
    def __init__(self, width: int, inner: int, heads: int, groups: int):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.layers = nn.ModuleList([Block(width, inner, heads, groups)])

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden: Tensor = self.embedding(input_ids)
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden


@dataclass
class Job:
    """Everything :func:`epmq.quantize` is given. tokens: per expert."""

    merged: nn.Module
    experts: dict[str, dict[str, Tensor]]
    calibration: dict[str, list[dict[str, Any]]]
    width: int
    tokens: int


@functools.lru_cache(maxsize=1)
def random_job(tiny: bool, device: torch.device) -> Job:
    """bf16 weights on the CPU; an expert is the base and a little noise, the merge their mean. Drawn on ``device``,
    where 1.8e9 normal numbers take no time."""
    width, inner, heads, groups = (32, 64, 4, 2) if tiny else (4096, 14336, 32, 8)
    experts, batches, examples, length = (2, 1, 2, 16) if tiny else (EXPERTS, BATCHES, EXAMPLES, LENGTH)
    with device:
        merged = Model(width, inner, heads, groups).bfloat16()
    generator = torch.Generator(device).manual_seed(0)
    totals = {name: torch.zeros_like(tensor, dtype=torch.float32) for name, tensor in merged.state_dict().items()}
    states: dict[str, dict[str, Tensor]] = {}
    for number in range(experts):
        states[f"task{number}"] = {}
        for name, tensor in merged.state_dict().items():
            noise = torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype, device=device)
            moved = tensor + 0.1 * tensor.std() * noise if tensor.dim() > 1 else tensor
            totals[name] += moved
            states[f"task{number}"][name] = moved.cpu()
    merged.load_state_dict({name: total / experts for name, total in totals.items()})
    drawn = torch.Generator().manual_seed(0)
    calibration = {
        task: [{"input_ids": torch.randint(0, VOCABULARY, (examples, length), generator=drawn)} for _ in range(batches)]
        for task in states
    }
    return Job(merged.cpu(), states, calibration, width, batches * examples * length)
