"""Experts of a mixture one by one: transformers keeps them all in two tensors, which no linear is."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Container, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from epmq.fused import INPUTS, OUTPUT, Layout, Part, Shape, is_fused, layout_of


class ExpertMLP(nn.Module):
    """down(act(gate(x)) * up(x)), or without a gate down(act(up(x))).

    act_fn: the activation, or an :class:`OwnGate`, which takes gate and up.
    """

    def __init__(self, width: int, inner: int, layout: Layout, act_fn: nn.Module, dtype: torch.dtype):
        super().__init__()
        options: dict[str, Any] = {"bias": layout.biased, "device": "meta", "dtype": dtype}
        self.gate_proj = nn.Linear(width, inner, **options) if layout.gated else None
        self.up_proj = nn.Linear(width, inner, **options)
        self.down_proj = nn.Linear(inner, width, **options)
        self.act_fn = act_fn

    def forward(self, x: Tensor) -> Tensor:
        if self.gate_proj is None:
            inner = self.act_fn(self.up_proj(x))
        elif isinstance(self.act_fn, OwnGate):
            inner = self.act_fn(self.gate_proj(x), self.up_proj(x))
        else:
            inner = self.act_fn(self.gate_proj(x)) * self.up_proj(x)
        found: Tensor = self.down_proj(inner)
        return found


class OwnGate(nn.Module):
    """What a class of its own makes of gate and up, such as GPT-OSS, which cuts both off. fused: without weights."""

    def __init__(self, fused: nn.Module, interleaved: bool):
        super().__init__()
        self.interleaved = interleaved
        self.of: Any = fused

    def forward(self, gate: Tensor, up: Tensor) -> Tensor:
        both = torch.stack((gate, up), -1).flatten(-2) if self.interleaved else torch.cat((gate, up), -1)
        found: Tensor = self.of._apply_gate(both)
        return found


class SeparateExperts(nn.Module):
    """In place of a module of fused experts (:class:`epmq.fused.Layout`): children, called by their numbers, of three
    linears or two each. Weights are on the meta device.

    rows: of the last call the number of tokens and those that each child was given, where ``keeps_rows`` is set.
    """

    def __init__(self, fused: nn.Module):
        super().__init__()
        self.keeps_rows, self.rows = False, (0, tuple[Tensor, ...]())
        self.layout = layout = layout_of(fused)
        output: Any = fused.get_parameter(OUTPUT)
        bare = _with_parameters(fused, {})
        act_fn: Any = OwnGate(bare, layout.interleaved) if has_own_gate(fused) else fused.act_fn
        self._bare = (bare,)  # no module of this one's
        self.count, *sides = output.shape
        self.width, self.inner = reversed(sides) if layout.transposed else sides
        for number in range(self.count):
            self.add_module(str(number), ExpertMLP(self.width, self.inner, layout, act_fn, output.dtype))
        self.requires_grad_(False)

    def fused_shapes(self) -> dict[str, Shape]:
        """Names and shapes of the tensors that transformers has in their place."""
        return self.layout.shapes(self.count, self.width, self.inner)

    def are_plain(self) -> bool:
        """Whether no expert has a linear of another kind, such as one that was quantized."""
        each, found = len(INPUTS[self.layout.reads]) + 1, len(list(_linears(self)))
        return found == int(self.count) * each

    def fused(self) -> nn.Module:
        """What transformers has in their place, with these weights."""
        parameters = {}
        for leaf, shape in self.fused_shapes().items():
            parts = self.layout.parts(leaf, shape)
            like = self.get_parameter(next(iter(parts)))
            whole = torch.empty(shape, dtype=like.dtype, device=like.device)
            for name, part in parts.items():
                part.put(whole, self.get_parameter(name).detach())
            parameters[leaf] = nn.Parameter(whole, requires_grad=like.requires_grad)
        return _with_parameters(self._bare[0], parameters).train(self.training)

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
        experts = _separate(module)
        if experts is not None and any(wanted(f"{name}.{linear}") for linear in _linears(experts)):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, experts.train(module.training))
    return model


def join(model: nn.Module, kept: Container[str] = ()) -> nn.Module:
    """Put what transformers has back in place of separate experts that are all plain, and none of whose linears is
    among ``kept``; in place."""
    for name in list(separated(model)):
        experts: Any = model.get_submodule(name)
        if experts.are_plain() and not any(f"{name}.{linear}" in kept for linear in _linears(experts)):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, experts.fused())
    return model


def separated(model: nn.Module) -> Iterator[str]:
    """Names of the modules that :func:`separate` has put into a model."""
    return (name for name, module in model.named_modules() if isinstance(module, SeparateExperts))


def shares(model: nn.Module) -> dict[str, float]:
    """By mixture, which share of the positions each expert reads on average: by the ``top_k`` of what is beside them,
    all where nothing tells."""
    found = {}
    for name in separated(model):
        experts: Any = model.get_submodule(name)
        beside = model.get_submodule(name.rpartition(".")[0]).modules()
        told = [number for module in beside if isinstance(number := getattr(module, "top_k", None), int)]
        found[name] = min(1.0, max(told, default=experts.count) / experts.count)
    return found


def fused_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors in which transformers keeps the experts that are separate in a model."""
    shapes: dict[str, Shape] = {}
    for name in separated(model):
        experts: Any = model.get_submodule(name)
        shapes |= {f"{name}.{leaf}": shape for leaf, shape in experts.fused_shapes().items()}
    return shapes


def parts_of(model: nn.Module, name: str) -> dict[str, Part]:
    """The parts of one of :func:`fused_shapes`, by the model's names for them."""
    parent, _, leaf = name.rpartition(".")
    experts: Any = model.get_submodule(parent)
    parts = experts.layout.parts(leaf, experts.fused_shapes()[leaf])
    return {f"{parent}.{part}": where for part, where in parts.items()}


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


def has_own_gate(fused: nn.Module) -> bool:
    """Whether the class makes something else of gate and up than act(gate) * up; transformers gives others that."""
    found: Any = getattr(type(fused), "_apply_gate", None)
    return found is not None and found.__name__ != "_default_apply_gate" and bool(fused.has_gate)


def _with_parameters(module: nn.Module, parameters: dict[str, nn.Parameter]) -> nn.Module:
    """The module with others in place of its own."""
    twin = copy.copy(module)
    twin._parameters = {**parameters}
    return twin


def _linears(experts: nn.Module) -> Iterator[str]:
    return (name for name, module in experts.named_modules() if isinstance(module, nn.Linear))


def _separate(module: nn.Module) -> SeparateExperts | None:
    """What computes the same as a module, where that is one of fused experts and this is possible."""
    output = module._parameters.get(OUTPUT)
    if not is_fused(module) or output is None or output.dim() != 3:
        return None
    if not hasattr(module, "act_fn") and not has_own_gate(module):
        return None
    experts = SeparateExperts(module)
    shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    return experts if shapes == experts.fused_shapes() and _computes_the_same(module, experts.layout) else None


@torch.no_grad()
def _computes_the_same(module: nn.Module, layout: Layout) -> bool:
    """Whether a small module of this one's class and settings gives what separate experts give.

    Some classes cut what goes into the activation, so the numbers are large.
    """
    count, width, inner, tokens = 3, 4, 5, 32
    make = torch.Generator().manual_seed(0)
    plain: dict[str, Any] = {"generator": make, "dtype": torch.float32, "device": "cpu"}
    weights = {name: torch.randn(shape, **plain) for name, shape in layout.shapes(count, width, inner).items()}
    parameters = {name: nn.Parameter(tensor, requires_grad=False) for name, tensor in weights.items()}
    probe: Any = _with_parameters(module, parameters)
    probe._forward_hooks, probe._forward_pre_hooks = OrderedDict(), OrderedDict()
    probe.config = SimpleNamespace(_experts_implementation="eager")
    for name, value in (
        ("num_experts", count), ("hidden_dim", width), ("intermediate_dim", inner), ("hidden_size", width),
        ("intermediate_size", inner),
    ):  # fmt: skip
        if hasattr(module, name):
            setattr(probe, name, value)
    ours: Any = SeparateExperts(probe).to_empty(device="cpu")
    state = {
        name: part.of(tensor)
        for leaf, tensor in weights.items()
        for name, part in layout.parts(leaf, tuple(tensor.shape)).items()
    }
    ours.load_state_dict(state)
    x = 20 * torch.randn(tokens, width, **plain)
    chosen = torch.stack([torch.randperm(count, generator=make, device="cpu")[:2] for _ in range(tokens)])
    shares = torch.rand(tokens, 2, **plain)
    try:
        wanted, found = ours(x, chosen, shares), probe(x, chosen, shares)
    except Exception:  # whatever a class does that is called otherwise, or needs more: it is another one
        return False
    same = isinstance(found, Tensor) and found.shape == wanted.shape
    return same and bool((found - wanted).norm() <= 1e-4 * wanted.norm())
