"""Runs the blocks of a model one at a time, outside the model, on streams of hidden states.

The model's own forward decides what each block receives (masks, position embeddings, per-layer arguments): it is run
with every block replaced by a slot. A slot before the wanted block returns the hidden states kept from there; the
wanted one hands out its arguments and ends the run. No block's weights are needed for that.

Only the latest output of each list of blocks is kept, so no block may depend on earlier ones; that is tried out first.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from epmq.blocks import find_blocks
from epmq.calls import (
    ArgumentPlace,
    BlockAddress,
    BlockCall,
    Origin,
    StreamState,
    Versions,
    hidden_of,
    identity_of,
    intact,
    rebuilt,
)
from epmq.errors import EpmqError, ModelError, first_line
from epmq.orientation import is_linear
from epmq.origins import Origins, tensors_in
from epmq.precision import AS_IT_IS, Precision

OUTSIDE = "weights outside the blocks"
HOOKS = ("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called")
ROUND_INSTEAD = ", or round the model to nearest (method: rtn) without calibration data."


@dataclass(frozen=True)
class _Input:
    """Marks what is made of one of the model's inputs."""

    name: str


class _LastReached(Exception):
    """Ends a traced forward at the last block."""


class _Captured(Exception):
    """Carries a block's arguments out of the model's forward."""

    def __init__(self, call: BlockCall):
        super().__init__()
        self.call = call


def _with_own_tensors(value: Any) -> Any:
    """Nested tuples and lists with copies of their tensors, because the model or a later block may write into them."""
    if isinstance(value, Tensor):
        return value.clone()
    return rebuilt(value, map(_with_own_tensors, value)) if isinstance(value, (tuple, list)) else value


def _form_of(value: Any) -> Any:
    """What two values have in common when a model can tell them apart by their numbers alone."""
    if isinstance(value, Tensor):
        return tuple(value.shape), value.dtype
    inner = tuple(map(_form_of, value)) if isinstance(value, (tuple, list)) else ()
    return type(value), inner


def _contents(value: Any) -> list[Any]:
    """All that nested tuples, lists and mappings hold, in order."""
    if isinstance(value, Mapping):
        value = [item for pair in value.items() for item in pair]
    elif not isinstance(value, (tuple, list)):
        return []
    return [inner for item in value for inner in (item, *_contents(item))]


def unrunnable(model: nn.Module, inputs: Mapping[str, Any], error: BaseException) -> ModelError:
    """What to tell of a model whose forward raised ``error`` on its calibration inputs."""
    return ModelError(
        f"{type(model).__name__}: its forward does not run on {', '.join(inputs)} ({first_line(error)}); give batches"
        " of what it reads."
    )


class _Slot(nn.Module):
    """Stands where a block was; answers questions about attributes, and about its class, with the block's own.

    Hooks are the block's too: transformers adds those that collect hidden states once, at the first forward that asks.
    """

    def __init__(self, block: nn.Module, forward: Callable[..., Any]):
        super().__init__()
        object.__setattr__(self, "_block", block)
        object.__setattr__(self, "_forward", forward)
        for name in HOOKS:
            object.__setattr__(self, name, getattr(block, name))

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return type(object.__getattribute__(self, "_block"))

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(object.__getattribute__(self, "_block"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._forward(args, kwargs)


def _with_zeros(block: nn.Module, like: Tensor) -> nn.Module:
    """A copy of a block in the dtype of ``like``, whose tensors without memory are zeros where it is."""

    def zeros(tensor: Tensor) -> Tensor:
        dtype = like.dtype if tensor.is_floating_point() else tensor.dtype
        return torch.zeros(tensor.shape, dtype=dtype, device=like.device)

    memo: dict[int, Any] = {}
    for parameter in block.parameters():
        if parameter.is_meta:
            memo[id(parameter)] = nn.Parameter(zeros(parameter), requires_grad=False)
    for buffer in block.buffers():
        if buffer.is_meta:
            memo[id(buffer)] = zeros(buffer)
    copied: nn.Module = copy.deepcopy(block, memo).to(like.dtype)
    # They see what the slot gives.
    for name in HOOKS:
        getattr(copied, name).clear()
    return copied


class _Following:
    """What is found out while the model's forward is followed from block to block.

    calls: the blocks in the order in which they were called. kinds: an output of the kind that each gives, one for all
    that are alike. starts: the hidden states that reached the first block of each list. trace: set when it is run for
    the second time.
    """

    def __init__(self) -> None:
        self.calls: list[BlockAddress] = []
        self.kinds: dict[BlockAddress, Any] = {}
        self.starts: dict[str, Tensor] = {}
        self.trace: _Trace | None = None
        self._forms: dict[Any, Any] = {}

    def answer(self, address: BlockAddress, call: BlockCall, block: nn.Module) -> Any:
        """Note the call; answer with an output of the kind that the block gives."""
        if self.trace is not None:
            return self.trace.answer(address, call, self.kinds[address])
        self.calls.append(address)
        call = call.with_hidden(call.hidden.clone())
        self.starts.setdefault(address.list_name, call.hidden.clone())
        before = _contents((call.args, call.kwargs))
        output = call.run(_with_zeros(block, call.hidden))
        after = _contents((call.args, call.kwargs))
        if [id(item) for item in after] != [id(item) for item in before]:
            raise ModelError(
                f"block {address.name} leaves something for later blocks in a list or dict that it is given, such as"
                f" shared keys and values, and blocks are calibrated one by one; have it return that{ROUND_INSTEAD}"
            )
        hidden_of(output)  # raises
        self.kinds[address] = self._forms.setdefault(_form_of(output), output)
        return _with_own_tensors(output)


class _Trace:
    """What the arguments of each block are made of: outputs of other blocks, and weights outside the blocks."""

    def __init__(self, last: BlockAddress, starts: dict[str, Tensor]):
        self.origins = Origins()
        self._last = last
        self._starts = starts
        self._latest: dict[str, BlockAddress] = {}
        self._first: BlockCall | None = None
        # Per stretch of blocks of one list, what is known of each.
        self._stretches: list[dict[BlockAddress, Origin]] = []
        self._inputs: dict[BlockAddress, frozenset[str]] = {}

    def answer(self, address: BlockAddress, call: BlockCall, kind: Any) -> Any:
        """Note what the block is given; answer with an output that stands for the block."""
        self._require_latest(address, call)
        self._require_repeated(address, call.hidden)
        self._inputs[address] = self._made_of(call.hidden)
        if not self._stretches or next(iter(self._stretches[-1])).list_name != address.list_name:
            self._first = call
            self._stretches.append({address: self._of_first(call)})
        else:
            self._stretches[-1][address] = self._of_later(call)
        if address == self._last:
            raise _LastReached
        self._latest[address.list_name] = address
        output = _with_own_tensors(kind)
        for tensor in tensors_in(output):
            self.origins.mark(tensor, address)
        return output

    def found(self) -> dict[BlockAddress, Origin]:
        """What was found out, by block."""
        result: dict[BlockAddress, Origin] = {}
        for stretch in self._stretches:
            onward = frozenset[ArgumentPlace]().union(
                *(origin.shared for origin in stretch.values() if not origin.first)
            )
            for address, origin in stretch.items():
                result[address] = replace(origin, onward=onward, inputs=self._inputs[address])
        return result

    def _made_of(self, hidden: Tensor) -> frozenset[str]:
        """The model's inputs behind hidden states: those of the outputs of blocks are what these blocks worked on."""
        found: set[str] = set()
        for mark in self.origins.of(hidden):
            if isinstance(mark, _Input):
                found.add(mark.name)
            elif isinstance(mark, BlockAddress):
                found |= self._inputs[mark]
        return frozenset(found)

    def _require_latest(self, address: BlockAddress, call: BlockCall) -> None:
        marks = self.origins.of((call.args, call.kwargs))
        past = {mark for mark in marks if isinstance(mark, BlockAddress)}.difference(self._latest.values())
        if past:
            names = ", ".join(sorted(other.name for other in past))
            raise ModelError(
                f"block {address.name} depends on what came out of {names} by a way around the blocks between (a"
                " residual or skip connection outside the blocks), and only the latest output is kept; move it into"
                f" the blocks{ROUND_INSTEAD}"
            )

    def _require_repeated(self, address: BlockAddress, hidden: Tensor) -> None:
        """Raise ModelError where a list starts from other hidden states than in the first run: each later run of the
        model would start from others again."""
        start = self._starts.pop(address.list_name, None)
        if start is None or any(isinstance(mark, BlockAddress) for mark in self.origins.of(hidden)):
            return
        # A GPU may add up in another order each time.
        if start.shape != hidden.shape or bool((start - hidden).norm() > 0.01 * start.norm()):
            raise ModelError(
                f"block {address.name}: the model's forward, run again on the same inputs, gives it other hidden"
                " states, such as patches masked at random; give what is drawn there as an input, if the model takes it"
                f"{ROUND_INSTEAD}"
            )

    def _outside(self, call: BlockCall) -> dict[ArgumentPlace, Any]:
        return {place: value for place, value in call.places().items() if OUTSIDE in self.origins.of(value)}

    def _of_first(self, call: BlockCall) -> Origin:
        outside = self._outside(call)
        tensors = frozenset(place for place, value in outside.items() if isinstance(value, Tensor))
        return Origin(first=True, shared=tensors, anew=len(tensors) < len(outside))

    def _of_later(self, call: BlockCall) -> Origin:
        assert self._first is not None
        outside, before = self._outside(call), self._first.places()
        shared = frozenset(place for place, value in outside.items() if _is_same(value, before.get(place)))
        return Origin(shared=shared, anew=len(shared) < len(outside) or OUTSIDE in self.origins.of(call.hidden))


def _is_same(value: Any, other: Any) -> bool:
    return isinstance(value, Tensor) and isinstance(other, Tensor) and identity_of(value) == identity_of(other)


class BlockRunner:
    """Owns a model whose blocks are taken out of it; hands out each block's arguments for a batch.

    precision: in which the model runs, and its blocks on what is handed out.
    """

    def __init__(self, model: nn.Module, precision: Precision = AS_IT_IS):
        self.model, self.precision = model, precision
        self.addresses = find_blocks(model)
        self._blocks: dict[BlockAddress, nn.Module] = {}
        self._position = {address: i for i, address in enumerate(self.addresses)}
        self._wanted: int | None = None
        self._following: _Following | None = None
        self._named: dict[str, Any] = {}
        self._origins: dict[BlockAddress, Origin] = {}
        self._state = StreamState()
        self._handed: dict[str, tuple[Any, Versions]] = {}
        for address in self.addresses:
            children = self._holder(address)._modules
            block = children[address.child]
            assert block is not None
            self._blocks[address] = block
            children[address.child] = _Slot(block, self._forward_of(address))

    def block(self, address: BlockAddress) -> nn.Module:
        return self._blocks[address]

    @torch.no_grad()
    def follow(self, inputs: Mapping[str, Any]) -> list[BlockAddress]:
        """Order the blocks as the model's forward calls them on these inputs; returns those it does not call.

        The model's weights outside its blocks must be there. Raises ModelError when it calls none, or one of them more
        than once, or when a block depends on others by another way than the latest output of a list.
        """
        following = self._following = _Following()
        try:
            self._forward(inputs)
            called = self._in_order(following.calls)
            self._refuse_shared_parts(called)
            self._trace(inputs, called)
        finally:
            self._following = None
        left = [address for address in self.addresses if address not in called]
        self.addresses = called
        self._position = {address: i for i, address in enumerate(called)}
        for address, output in following.kinds.items():
            if hasattr(output, "_make"):
                self._named[address.list_name] = output._make
        return left

    def origin(self, address: BlockAddress) -> Origin:
        """What of a block's arguments is made with weights outside the blocks; :meth:`follow` finds it out."""
        return self._origins[address]

    def _in_order(self, calls: list[BlockAddress]) -> list[BlockAddress]:
        """The blocks that were called, each once."""
        if not calls:
            raise ModelError("the model's forward calls none of its blocks on the calibration inputs.")
        seen: set[int] = set()
        for address in calls:
            if id(self._blocks[address]) in seen:
                raise ModelError(
                    f"block {address.name} is called more than once by the model's forward; not supported."
                )
            seen.add(id(self._blocks[address]))
        return list(calls)

    def _refuse_shared_parts(self, addresses: list[BlockAddress]) -> None:
        """Raise ModelError when blocks share a linear's weight: each would give it a value of its own."""
        owners: dict[int, BlockAddress] = {}
        for address in addresses:
            for name, module in self._blocks[address].named_modules():
                if is_linear(module):
                    other = owners.setdefault(id(module.weight), address)
                    if other != address:
                        raise ModelError(
                            f"{address.name}.{name}: block {other.name} has the same weight, and blocks are calibrated"
                            f" one by one; give each a copy of its own{ROUND_INSTEAD}"
                        )

    def _trace(self, inputs: Mapping[str, Any], called: list[BlockAddress]) -> None:
        """Run the model once more to see what each block's arguments are made of."""
        assert self._following is not None
        trace = self._following.trace = _Trace(called[-1], self._following.starts)
        for tensor in self.model.state_dict(keep_vars=True).values():
            trace.origins.mark(tensor, OUTSIDE)
        # Copies, because two inputs may be one tensor, as labels that are the ids.
        inputs = {name: _with_own_tensors(value) for name, value in inputs.items()}
        for name, value in inputs.items():
            for tensor in tensors_in(value):
                trace.origins.mark(tensor, _Input(name))
        try:
            with trace.origins:
                self._forward(inputs)
        except _LastReached:
            pass
        self._origins = trace.found()

    def _forward(self, inputs: Mapping[str, Any]) -> None:
        """Run the model; what it raises on inputs it cannot read becomes a ModelError."""
        try:
            with self.precision.active():
                self.model(**inputs)
        except (EpmqError, _Captured, _LastReached):
            raise
        except (TypeError, ValueError, AttributeError, LookupError) as error:
            raise unrunnable(self.model, inputs, error) from error

    def restore(self) -> nn.Module:
        """Put the blocks back; the runner is of no use afterwards."""
        for address, block in self._blocks.items():
            self._holder(address)._modules[address.child] = block
        return self.model

    @torch.no_grad()
    def capture(self, address: BlockAddress, inputs: Mapping[str, Any], state: StreamState) -> BlockCall:
        """The arguments block ``address`` receives for this batch, given the outputs kept in ``state``."""
        call = state.kept(address)
        if call is None:
            call = self._capture(address, inputs, state)
            state.keep(address, call)
        return call

    def _capture(self, address: BlockAddress, inputs: Mapping[str, Any], state: StreamState) -> BlockCall:
        self._wanted, self._state, self._handed = self._position[address], state, {}
        try:
            self._forward(inputs)
        except _Captured as captured:
            # A copy, because a block may write into what it is given, which may be an input or a weight of the model.
            return captured.call.with_hidden(captured.call.hidden.clone())
        finally:
            self._wanted, self._handed = None, {}
        raise ModelError(f"block {address.name} is never called by the model's forward on the calibration inputs.")

    def _forward_of(self, address: BlockAddress) -> Callable[..., Any]:
        def forward(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            call = BlockCall(args, kwargs, self.precision)
            if self._following is not None:
                return self._following.answer(address, call, self._blocks[address])
            if self._position.get(address) == self._wanted:
                raise _Captured(call)
            return self._hand_out(address.list_name)

        return forward

    def _hand_out(self, list_name: str) -> Any:
        """A copy of the output kept in the state: the same until the model writes into it."""
        if list_name in self._handed:
            output, held = self._handed[list_name]
            if intact(held):
                return output
        output = self._state.outputs[list_name]
        if list_name in self._named and type(output) is tuple:
            # Files, and so states, know plain tuples only.
            output = self._named[list_name](output)
        output = _with_own_tensors(output)
        self._handed[list_name] = output, [(tensor, tensor._version) for tensor in tensors_in(output)]
        return output

    def _holder(self, address: BlockAddress) -> nn.Module:
        return self.model.get_submodule(address.list_name)
