"""Finds the repeated blocks of any model and runs them one at a time, outside the model, on streams of hidden states.

The model's own forward decides what each block receives (masks, position embeddings, per-layer arguments): it is run
with every block replaced by a slot. A slot before the wanted block returns the hidden states kept from there; the
wanted one hands out its arguments and ends the run. No block's weights are needed for that.

Only the latest output of each list of blocks is kept, so no block may depend on earlier ones; that is tried out first.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from epmq.errors import EpmqError, ModelError, first_line
from epmq.orientation import features_of, is_linear
from epmq.origins import Origins, tensors_in
from epmq.precision import AS_IT_IS, Precision

Versions = list[tuple[Tensor, int]]
ArgumentPlace = int | str
OUTSIDE = "weights outside the blocks"
ROUND_INSTEAD = ", or round the model to nearest (method: rtn) without calibration data."


class _Captured(Exception):
    """Carries a block's arguments out of the model's forward."""

    def __init__(self, call: BlockCall):
        super().__init__()
        self.call = call


class _Reached(Exception):
    """Ends a block's forward once the wanted linear has been reached."""


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
    before one of another list shares. anew: whether there is more, made for this block.
    """

    first: bool = False
    shared: frozenset[ArgumentPlace] = frozenset()
    onward: frozenset[ArgumentPlace] = frozenset()
    anew: bool = False


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


def _with_own_hidden(output: Any) -> Any:
    """A block's output with a copy of its hidden states, because the model may write into them."""
    hidden = hidden_of(output).clone()
    return hidden if isinstance(output, Tensor) else rebuilt(output, [hidden, *output[1:]])


def rebuilt(like: Any, items: Iterable[Any]) -> Any:
    """A tuple, named tuple or list of the kind of another."""
    return getattr(like, "_make", type(like))(items)


def _with_own_tensors(value: Any) -> Any:
    """Nested tuples and lists with copies of their tensors."""
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


@dataclass(frozen=True)
class BlockAddress:
    """A block: the dotted name of the list that holds it, and its own name there."""

    list_name: str
    child: str

    @property
    def name(self) -> str:
        return f"{self.list_name}.{self.child}" if self.list_name else self.child


def unrunnable(model: nn.Module, inputs: Mapping[str, Any], error: BaseException) -> ModelError:
    """What to tell of a model whose forward raised ``error`` on its calibration inputs."""
    return ModelError(
        f"{type(model).__name__}: its forward does not run on {', '.join(inputs)} ({first_line(error)}); give batches"
        " of what it reads."
    )


def find_blocks(model: nn.Module) -> list[BlockAddress]:
    """Blocks of a model: members of its outermost lists of modules of one class that hold linears.

    Raises ModelError when there are none.
    """
    addresses: list[BlockAddress] = []
    taken: list[str] = []
    for name, module in model.named_modules():
        if any(not prefix or name.startswith(prefix + ".") for prefix in taken) or not _is_block_list(module):
            continue
        if len({id(child) for child in module}) < len(module):
            raise ModelError(
                f"{name or 'the model'}: one block stands several times in this list, which is not supported."
            )
        taken.append(name)
        addresses.extend(BlockAddress(name, child) for child, _ in module.named_children())
    if not addresses:
        raise ModelError(
            f"{type(model).__name__}: no repeated blocks found (a ModuleList or Sequential of modules of one class"
            " that hold linear layers and have a forward of their own)."
        )
    return addresses


def _is_block_list(module: nn.Module) -> bool:
    if not isinstance(module, (nn.ModuleList, nn.Sequential)) or len(module) == 0:
        return False
    if isinstance(module, nn.Sequential) and len(module) == 1:
        return False
    first = next(iter(module))
    # A list in a list has no forward: the model takes it apart.
    if len({type(child) for child in module}) != 1 or is_linear(first) or type(first).forward is nn.Module.forward:
        return False
    return all(any(is_linear(inner) for inner in child.modules()) for child in module)


class _Slot(nn.Module):
    """Stands where a block was; answers questions about attributes with the block's own."""

    def __init__(self, block: nn.Module, forward: Callable[..., Any]):
        super().__init__()
        object.__setattr__(self, "_block", block)
        object.__setattr__(self, "_forward", forward)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(object.__getattribute__(self, "_block"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._forward(args, kwargs)


def _with_zeros(block: nn.Module, like: Tensor) -> nn.Module:
    """A copy of a block whose tensors without memory are zeros, where ``like`` is and of its dtype."""

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
    copied: nn.Module = copy.deepcopy(block, memo)
    return copied


class _Following:
    """What is found out while the model's forward is followed from block to block.

    calls: the blocks in the order in which they were called. kinds: an output of the kind that each gives, one for all
    that are alike. trace: set when it is run for the second time.
    """

    def __init__(self) -> None:
        self.calls: list[BlockAddress] = []
        self.kinds: dict[BlockAddress, Any] = {}
        self.trace: _Trace | None = None
        self._forms: dict[Any, Any] = {}

    def answer(self, address: BlockAddress, call: BlockCall, block: nn.Module) -> Any:
        """Note the call; answer with an output of the kind that the block gives."""
        if self.trace is not None:
            return self.trace.answer(address, call, self.kinds[address])
        self.calls.append(address)
        call = call.with_hidden(call.hidden.clone())
        before = _contents((call.args, call.kwargs))
        output = call.run(_with_zeros(block, call.hidden))
        after = _contents((call.args, call.kwargs))
        if [id(item) for item in after] != [id(item) for item in before]:
            raise ModelError(
                f"block {address.name} leaves something for later blocks in a list or dict that it is given, such as"
                f" shared keys and values, and blocks are calibrated one by one; have it return that{ROUND_INSTEAD}"
            )
        self.kinds[address] = self._forms.setdefault(_form_of(output), output)
        return _with_own_hidden(output)


class _Trace:
    """What the arguments of each block are made of: outputs of other blocks, and weights outside the blocks."""

    def __init__(self, last: BlockAddress):
        self.origins = Origins()
        self._last = last
        self._latest: dict[str, BlockAddress] = {}
        self._first: BlockCall | None = None
        # Per stretch of blocks of one list, what is known of each.
        self._stretches: list[dict[BlockAddress, Origin]] = []

    def answer(self, address: BlockAddress, call: BlockCall, kind: Any) -> Any:
        """Note what the block is given; answer with an output that stands for the block."""
        self._require_latest(address, call)
        if not self._stretches or next(iter(self._stretches[-1])).list_name != address.list_name:
            self._first = call
            self._stretches.append({address: self._of_first(call)})
        else:
            self._stretches[-1][address] = self._of_later(call)
        if address == self._last:
            raise _Reached
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
            result |= {address: replace(origin, onward=onward) for address, origin in stretch.items()}
        return result

    def _require_latest(self, address: BlockAddress, call: BlockCall) -> None:
        past = self.origins.of((call.args, call.kwargs)) - {OUTSIDE, *self._latest.values()}
        if past:
            names = ", ".join(sorted(other.name for other in past if isinstance(other, BlockAddress)))
            raise ModelError(
                f"block {address.name} depends on what came out of {names} by a way around the blocks between (a"
                " residual or skip connection outside the blocks), and only the latest output is kept; move it into"
                f" the blocks{ROUND_INSTEAD}"
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
    return isinstance(value, Tensor) and isinstance(other, Tensor) and _identity(value) == _identity(other)


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
        trace = self._following.trace = _Trace(called[-1])
        for tensor in self.model.state_dict(keep_vars=True).values():
            trace.origins.mark(tensor, OUTSIDE)
        try:
            with self.precision.active(), trace.origins:
                self.model(**inputs)
        except _Reached:
            pass
        self._origins = trace.found()

    def _forward(self, inputs: Mapping[str, Any]) -> None:
        """Run the model; what it raises on inputs it cannot read becomes a ModelError."""
        try:
            with self.precision.active():
                self.model(**inputs)
        except (EpmqError, _Captured):
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

    def depends_on(self, address: BlockAddress, inputs: Mapping[str, Any], state: StreamState, key: str) -> bool:
        """Whether the hidden states that reach a block change with the model's input ``key``."""
        value = inputs[key]
        # What another example has is surely allowed; where all are alike, any other id that every vocabulary has.
        changed = value.roll(1, 0)
        if torch.equal(changed, value):
            changed = (
                value + 1 if value.is_floating_point() else torch.where(value > 0, value - 1, (value == 0) + value)
            )
        one, other = (self._capture(address, {**inputs, key: v}, state).hidden for v in (value, changed))
        return one.shape != other.shape or not torch.equal(one, other)

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
        """The output kept in the state, with a copy of its hidden states: the same until the model writes into it."""
        if list_name in self._handed:
            output, held = self._handed[list_name]
            if intact(held):
                return output
        output = self._state.outputs[list_name]
        if list_name in self._named and type(output) is tuple:
            # Files, and so states, know plain tuples only.
            output = self._named[list_name](output)
        output = _with_own_hidden(output)
        hidden = hidden_of(output)
        self._handed[list_name] = output, [(hidden, hidden._version)]
        return output

    def _holder(self, address: BlockAddress) -> nn.Module:
        return self.model.get_submodule(address.list_name)


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


@torch.no_grad()
def input_groups(block: nn.Module, call: BlockCall, selects: Callable[[str], bool]) -> list[InputGroup]:
    """Linears of a block grouped by the tensor they read, in forward order, from one run of the block.

    Linears for which ``selects(name)`` is false, or that the run never reaches, are left out.
    """
    seen: dict[tuple[Any, ...], list[str]] = {}
    others = {_identity(value): place for place, value in call.sequences().items()}
    # Inputs are held for the whole run, so that no address is handed out twice.
    held: list[Tensor] = []

    def record(name: str, x: Tensor) -> None:
        if x.numel() == 0:
            return  # all tensors without elements are at one address
        held.append(x)
        key = _identity(x)
        if not any(name in names for names in seen.values()):
            seen.setdefault(key, []).append(name)

    names = [name for name, module in block.named_modules() if is_linear(module) and selects(name)]
    with observe(block, names, record):
        call.run(block)
    return [InputGroup(tuple(group), others.get(key)) for key, group in seen.items()]


def _identity(x: Tensor) -> tuple[Any, ...]:
    # The version tells apart what one tensor held before and after it was written into.
    return (x.data_ptr(), x._version, tuple(x.shape), x.stride(), x.dtype)


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
def input_of(block: nn.Module, call: BlockCall, name: str) -> Tensor | None:
    """The input of submodule ``name`` when the block runs this call; what comes after it is not computed. None where
    the call does not reach it."""
    found: list[Tensor] = []

    def stop(_: str, x: Tensor) -> None:
        found.append(x)
        raise _Reached

    with observe(block, [name], stop):
        try:
            call.run(block)
        except _Reached:
            pass
    return found[0] if found else None
