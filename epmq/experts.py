"""Experts of a mixture one by one: transformers keeps them all in two tensors, which no linear is."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

# How a class of transformers must keep its experts, by its own words: as nn.Linear has it, no biases.
LAYOUT = {"has_bias": False, "has_post_expert_norm": False, "is_transposed": False, "is_concatenated": True}
# What an expert reads with, by the tensor that has it of all of them: W = [gate; up], or up alone without a gate.
INPUTS = {"gate_up_proj": ("gate_proj", "up_proj"), "up_proj": ("up_proj",)}
OUTPUT = "down_proj"


class ExpertMLP(nn.Module):
    """down(act(gate(x)) * up(x)), or without a gate down(act(up(x)))."""

    def __init__(self, width: int, inner: int, gated: bool, act_fn: nn.Module, dtype: torch.dtype):
        super().__init__()
        options: dict[str, Any] = {"bias": False, "device": "meta", "dtype": dtype}
        self.gate_proj = nn.Linear(width, inner, **options) if gated else None
        self.up_proj = nn.Linear(width, inner, **options)
        self.down_proj = nn.Linear(inner, width, **options)
        self.act_fn = act_fn

    def forward(self, x: Tensor) -> Tensor:
        if self.gate_proj is None:
            inner = self.act_fn(self.up_proj(x))
        else:
            inner = self.act_fn(self.gate_proj(x)) * self.up_proj(x)
        found: Tensor = self.down_proj(inner)
        return found


class SeparateExperts(nn.Module):
    """In place of a module with ``gate_up_proj`` ``[E, 2I, H]`` or ``up_proj`` ``[E, I, H]`` and ``down_proj``
    ``[E, H, I]``: E children, called by their numbers, of three linears or two each. Weights are on the meta device.

    rows: of the last call the number of tokens and those that each child was given, where ``keeps_rows`` is set.
    """

    def __init__(self, fused: nn.Module):
        super().__init__()
        self.keeps_rows, self.rows = False, (0, tuple[Tensor, ...]())
        self.reads = input_leaf(fused)
        output: Any = fused.get_parameter(OUTPUT)
        act_fn: Any = fused.act_fn
        self.count, width, inner = output.shape
        gated = "gate_proj" in INPUTS[self.reads]
        for number in range(self.count):
            self.add_module(str(number), ExpertMLP(width, inner, gated, act_fn, output.dtype))
        self.requires_grad_(False)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """As of transformers: hidden_states ``[T, H]``, the experts of each and their weights ``[T, k]``."""
        tokens, each = top_k_index.shape
        chosen = top_k_index.flatten()
        order = torch.argsort(chosen, stable=True)
        # A number behind the last means none of them.
        sizes = torch.bincount(chosen, minlength=self.count)[: self.count].tolist()
        order = order[: sum(sizes)]
        given = order // each
        if self.keeps_rows:
            self.rows = (tokens, given.split(sizes))
        parts = hidden_states[given].split(sizes)
        found = [self.get_submodule(str(n))(x) for n, x in enumerate(parts) if len(x)]
        outputs = hidden_states.new_zeros(tokens * each, hidden_states.shape[-1])
        if found:
            outputs[order] = (torch.cat(found) * top_k_weights.flatten()[order, None]).to(outputs.dtype)
        return outputs.view(tokens, each, hidden_states.shape[-1]).sum(1)


def separate(model: nn.Module, wanted: Callable[[str], bool] = lambda linear: True) -> nn.Module:
    """Put :class:`SeparateExperts` in place of each module of fused experts that they compute the same as; in place.

    For models without weights: what the fused tensors hold is not taken over (:class:`epmq.names.NamedForModel` does).
    wanted: whether a linear of this name is needed; modules of which none is stay.
    """
    for name, module in list(model.named_modules()):
        if _can_separate(module) and any(
            wanted(f"{name}.{part.removesuffix('.weight')}")
            for leaf in (input_leaf(module), OUTPUT)
            for part in parts_of(leaf, tuple(module.get_parameter(leaf).shape))
        ):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, SeparateExperts(module).train(module.training))
    return model


def separated(model: nn.Module) -> Iterator[str]:
    """Names of the modules that :func:`separate` has put into a model."""
    return (name for name, module in model.named_modules() if isinstance(module, SeparateExperts))


def fused_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors in which transformers keeps the experts that are separate in a model."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name in separated(model):
        experts: Any = model.get_submodule(name)
        width, inner = experts.get_parameter("0.down_proj.weight").shape
        shapes |= {
            f"{name}.{experts.reads}": (experts.count, len(INPUTS[experts.reads]) * inner, width),
            f"{name}.{OUTPUT}": (experts.count, width, inner),
        }
    return shapes


def shapes_as_fused(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a model's tensors as transformers keeps them."""
    apart, state = tuple(f"{name}." for name in separated(model)), model.state_dict()
    whole = {name: tuple(tensor.shape) for name, tensor in state.items() if not name.startswith(apart)}
    return whole | fused_shapes(model)


def keep_rows(block: nn.Module) -> nn.Module:
    """Let a block's mixtures note which rows go where, for :func:`weights_of_rows`."""
    for module in block.modules():
        if isinstance(module, SeparateExperts):
            module.keeps_rows = True
    return block


def weights_of_rows(block: nn.Module, linear: str, weights: Tensor) -> Tensor | None:
    """The weights ``[M]`` of what a linear of a mixture read last, from those of all positions ``[B, S]``; None for one
    that is not in a mixture, or in one that read other positions."""
    for name in separated(block):
        if linear.startswith(f"{name}."):
            experts: Any = block.get_submodule(name)
            tokens, rows = experts.rows
            number = int(linear.removeprefix(f"{name}.").partition(".")[0])
            return weights.reshape(-1)[rows[number]] if tokens == weights.numel() else None
    return None


def parts_of(leaf: str, shape: tuple[int, ...]) -> dict[str, tuple[int, slice]]:
    """Each expert's weights in a fused tensor, by their names below the module of all: its number and its rows."""
    parts = INPUTS.get(leaf, (OUTPUT,))
    size = shape[1] // len(parts)
    rows = {part: slice(place * size, (place + 1) * size) for place, part in enumerate(parts)}
    return {f"{number}.{part}.weight": (number, where) for number in range(shape[0]) for part, where in rows.items()}


def input_leaf(fused: nn.Module) -> str:
    """Which of INPUTS a module of fused experts has."""
    return "gate_up_proj" if getattr(fused, "has_gate", None) else "up_proj"


def _can_separate(module: nn.Module) -> bool:
    if any(getattr(module, name, None) is not wanted for name, wanted in LAYOUT.items()):
        return False
    shapes, reads = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}, input_leaf(module)
    if set(shapes) != {reads, OUTPUT} or not hasattr(module, "act_fn") or len(shapes[OUTPUT]) != 3:
        return False
    count, width, inner = shapes[OUTPUT]
    return shapes[reads] == (count, len(INPUTS[reads]) * inner, width) and _computes_the_same(module)


@torch.no_grad()
def _computes_the_same(module: nn.Module) -> bool:
    """Whether a small module of this one's class and settings gives what separate experts give.

    Some classes cut what goes into the activation, so the numbers are large.
    """
    count, width, inner, tokens, reads = 3, 4, 5, 32, input_leaf(module)
    make = torch.Generator().manual_seed(0)
    weights = {
        reads: torch.randn(count, len(INPUTS[reads]) * inner, width, generator=make),
        OUTPUT: torch.randn(count, width, inner, generator=make),
    }
    probe: Any = copy.copy(module)
    probe._parameters = {name: nn.Parameter(tensor, requires_grad=False) for name, tensor in weights.items()}
    probe.config = SimpleNamespace(_experts_implementation="eager")
    for name, value in (("num_experts", count), ("hidden_dim", width), ("intermediate_dim", inner)):
        if hasattr(module, name):
            setattr(probe, name, value)
    ours: Any = SeparateExperts(probe).to_empty(device="cpu")
    state = {
        name: weights[leaf][number, rows]
        for leaf in (reads, OUTPUT)
        for name, (number, rows) in parts_of(leaf, tuple(weights[leaf].shape)).items()
    }
    ours.load_state_dict(state)
    x = 20 * torch.randn(tokens, width, generator=make)
    chosen = torch.stack([torch.randperm(count, generator=make)[:2] for _ in range(tokens)])
    shares = torch.rand(tokens, 2, generator=make)
    try:
        wanted, found = ours(x, chosen, shares), probe(x, chosen, shares)
    except Exception:  # whatever a class does that is called otherwise, or needs more: it is another one
        return False
    same = isinstance(found, Tensor) and found.shape == wanted.shape
    return same and bool((found - wanted).norm() <= 1e-4 * wanted.norm())
