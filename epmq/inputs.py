"""What the parts of a block read while it runs: linears with one input in common, the order in which parts run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from epmq.calls import BlockCall, identity_of
from epmq.orientation import features_of, is_linear


@dataclass(frozen=True)
class InputGroup:
    """Linears of a block that read the same tensor, named relative to the block, in the order they run.

    sequence: the place among the block's arguments of the hidden states they read, when those are not the block's own
    but another sequence's (:meth:`BlockCall.sequences`); None otherwise.
    """

    linears: tuple[str, ...]
    sequence: int | str | None = None

    @property
    def first(self) -> str:
        return self.linears[0]


Step = TypeVar("Step", bound=InputGroup | str)


class _Reached(Exception):
    """Ends a block's forward once the wanted linears have been reached."""


@torch.no_grad()
def input_groups(block: nn.Module, call: BlockCall, selects: Callable[[str], bool]) -> list[InputGroup]:
    """Linears of a block grouped by the tensor they read, in forward order, from one run of the block.

    Linears for which ``selects(name)`` is false, or that the run never reaches, are left out.
    """
    seen: dict[tuple[Any, ...], list[str]] = {}
    others = {identity_of(value): place for place, value in call.sequences().items()}
    # Inputs are held for the whole run, so that no address is handed out twice.
    held: list[Tensor] = []

    def record(name: str, x: Tensor) -> None:
        if x.numel() == 0:
            return  # all tensors without elements are at one address
        held.append(x)
        key = identity_of(x)
        if not any(name in names for names in seen.values()):
            seen.setdefault(key, []).append(name)

    names = [name for name, module in block.named_modules() if is_linear(module) and selects(name)]
    with observe(block, names, record):
        call.run(block)
    return [InputGroup(tuple(group), others.get(key)) for key, group in seen.items()]


def names_of(step: InputGroup | str) -> tuple[str, ...]:
    """The parts of a block that a group, or a single part, is about."""
    return (step,) if isinstance(step, str) else step.linears


def with_new(known: list[Step], found: list[Step]) -> list[Step]:
    """Groups and parts known so far and those that another call reaches as well (an expert of a mixture is not reached
    by each), every one behind the one that it came behind."""
    steps = list(known)
    taken = {name for step in known for name in names_of(step)}
    place = 0
    for step in found:
        if step in steps:
            place = steps.index(step) + 1
        elif not taken.intersection(names_of(step)):
            steps.insert(place, step)
            place += 1
    return steps


def narrows(block: nn.Module, group: InputGroup) -> bool:
    """Whether a group gives fewer features than it reads: then an expert's outputs are the smaller thing to keep."""
    sizes = [features_of(block.get_submodule(name)) or (0, 0) for name in group.linears]
    return sum(rows for _, rows in sizes) < sizes[0][0]


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a norm layer with one scale per channel."""
    weight = getattr(module, "weight", None)
    return "norm" in type(module).__name__.lower() and isinstance(weight, Tensor) and weight.dim() == 1


@torch.no_grad()
def running_order(block: nn.Module, call: BlockCall, names: list[str]) -> list[str]:
    """Those of the named submodules that one run of the block reaches, in the order of their first call."""
    order: list[str] = []
    with observe(block, names, lambda name, _: order.append(name) if name not in order else None):
        call.run(block)
    return order


@contextmanager
def observe(block: nn.Module, names: list[str], see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """While active, ``see(name, input)`` is called before each named submodule runs."""

    def hook_for(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            see(name, args[0] if args else next(iter(kwargs.values())))

        return hook

    handles = [block.get_submodule(n).register_forward_pre_hook(hook_for(n), with_kwargs=True) for n in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def inputs_of(
    block: nn.Module, call: BlockCall, name: str, others: Sequence[str] = (), room: int = 0
) -> dict[str, Tensor | None]:
    """What submodule ``name`` reads when the block runs this call, and ``others`` that run after it in this order, each
    as it first runs; None for one that the call does not reach.

    What comes after all of them is not computed, nor what comes after as many of the others as make up ``room`` bytes:
    of those behind nothing is told.
    """
    found: dict[str, Tensor] = {}

    def see(seen: str, x: Tensor) -> None:
        found.setdefault(seen, x)
        if name not in found:
            return
        beside = sum(value.nbytes for value in found.values()) - found[name].nbytes
        if len(found) > len(others) or beside > room:
            raise _Reached

    with observe(block, [name, *others], see):
        try:
            call.run(block)
        except _Reached:
            told = [name, *others]
            return {other: found.get(other) for other in told[: max(map(told.index, found)) + 1]}
    return {other: found.get(other) for other in (name, *others)}
