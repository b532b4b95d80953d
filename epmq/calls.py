"""A block of a model: its address, the arguments it is called with, and what a batch carries from block to block."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from epmq.errors import ModelError
from epmq.precision import AS_IT_IS, Precision

Versions = list[tuple[Tensor, int]]
ArgumentPlace = int | str


@dataclass(frozen=True)
class BlockAddress:
    """A block: the dotted name of the list that holds it, and its own name there."""

    list_name: str
    child: str

    @property
    def name(self) -> str:
        return f"{self.list_name}.{self.child}" if self.list_name else self.child


@dataclass(frozen=True)
class BlockCall:
    """The arguments of one call of a block; the hidden states are the first of them. precision: in which it runs."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    precision: Precision = AS_IT_IS

    @property
    def hidden(self) -> Tensor:
        hidden = self.args[0] if self.args else self.kwargs.get("hidden_states")
        if not isinstance(hidden, Tensor):
            raise ModelError("a block must take its hidden states as first argument or as hidden_states=.")
        return hidden

    def with_hidden(self, hidden: Tensor) -> BlockCall:
        """The same call on other hidden states."""
        if self.args:
            return replace(self, args=(hidden, *self.args[1:]))
        return replace(self, kwargs={**self.kwargs, "hidden_states": hidden})

    def places(self) -> dict[ArgumentPlace, Any]:
        """All arguments but the hidden states, by their place."""
        places: list[tuple[ArgumentPlace, Any]] = [*enumerate(self.args), *self.kwargs.items()]
        return {place: value for place, value in places if place != (0 if self.args else "hidden_states")}

    def sequences(self) -> dict[ArgumentPlace, Tensor]:
        """Hidden states of other sequences among the arguments (an encoder's, for cross-attention), by their place."""
        own = self.hidden
        return {
            place: value
            for place, value in self.places().items()
            if value is not own
            and isinstance(value, Tensor)
            and value.is_floating_point()
            and value.dim() == own.dim() == 3
            and len(value) == len(own)
        }

    def with_places(self, found: Mapping[ArgumentPlace, Any]) -> BlockCall:
        """The same call with other arguments at some places."""
        args = tuple(found.get(place, value) for place, value in enumerate(self.args))
        return replace(self, args=args, kwargs={name: found.get(name, value) for name, value in self.kwargs.items()})

    def run(self, block: nn.Module) -> Any:
        with self.precision.active():
            return block(*self.args, **self.kwargs)


@dataclass(frozen=True)
class Origin:
    """What of a block's arguments is made with the model's weights outside its blocks.

    first: the block comes after one of another list, or after none. shared: the places that hold one tensor for the
    first such block and this one; for the first itself, all places of tensors. onward: those that any later block
    before one of another list shares. anew: whether there is more, made for this block. inputs: the model's inputs
    that the hidden states are made of, through the blocks before too.
    """

    first: bool = False
    shared: frozenset[ArgumentPlace] = frozenset()
    onward: frozenset[ArgumentPlace] = frozenset()
    anew: bool = False
    inputs: frozenset[str] = frozenset()


@dataclass
class StreamState:
    """What a batch carries from block to block: per block list, the latest output (its first item is the hidden).

    The arguments of the block that the batch stands before are kept until it advances, where nothing can change them.
    """

    outputs: dict[str, Any] = field(default_factory=dict)
    _kept: tuple[BlockAddress, BlockCall, Versions] | None = field(default=None, init=False, repr=False)

    def advance(self, list_name: str, output: Any) -> None:
        """The batch has passed a block of that list."""
        self.outputs[list_name] = output
        self._kept = None

    def keep(self, address: BlockAddress, call: BlockCall) -> None:
        """Remember a block's arguments, unless they hold something that the block may change unnoticed."""
        held = versions_of((call.args, call.kwargs))
        self._kept = None if held is None else (address, call, held)

    def kept(self, address: BlockAddress) -> BlockCall | None:
        """What was kept for that block, if nothing has been written into it since."""
        if self._kept is None or self._kept[0] != address or not intact(self._kept[2]):
            return None
        return self._kept[1]


def versions_of(value: Any) -> Versions | None:
    """All tensors in nested tuples, lists and dicts of plain values, with how often each has been written into; None
    when there is an object of another kind."""
    if isinstance(value, Tensor):
        return [(value, value._version)]
    if value is None or isinstance(value, (bool, int, float, str)):
        return []
    if not isinstance(value, (tuple, list, dict)):
        return None
    found: Versions = []
    for item in value.values() if isinstance(value, dict) else value:
        inner = versions_of(item)
        if inner is None:
            return None
        found += inner
    return found


def intact(versions: Versions) -> bool:
    """Whether nothing has been written into these tensors since."""
    return all(tensor._version == version for tensor, version in versions)


def hidden_of(output: Any) -> Tensor:
    """The hidden states in a block's output: the output itself, or its first item."""
    hidden = output[0] if isinstance(output, (tuple, list)) else output
    if not isinstance(hidden, Tensor):
        raise ModelError(
            f"a block returned {type(output).__name__}; expected a tensor or a tuple that starts with one."
        )
    return hidden


def rebuilt(like: Any, items: Iterable[Any]) -> Any:
    """A tuple, named tuple or list of the kind of another."""
    return getattr(like, "_make", type(like))(items)


def identity_of(x: Tensor) -> tuple[Any, ...]:
    """Equal for two views that hold the same numbers because they are the same memory, unwritten between."""
    return (x.data_ptr(), x._version, tuple(x.shape), x.stride(), x.dtype)
