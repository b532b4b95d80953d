"""One block in hand: the streams run through it again and again while its parts get their final weights one by one."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from epmq.ahead import InputsAhead, side_by_side
from epmq.calls import BlockAddress, BlockCall, StreamState, hidden_of
from epmq.errors import NumericalError
from epmq.experts import separated
from epmq.inputs import (
    InputGroup,
    input_groups,
    inputs_of,
    is_norm,
    names_of,
    narrows,
    observe,
    running_order,
    with_new,
)
from epmq.inside import Seen, outputs, run_inside
from epmq.orientation import is_linear
from epmq.reuse import OutputStore
from epmq.sources import WeightSource, all_finite
from epmq.stacks import read_stack
from epmq.statistics import Expert
from epmq.streams import Batch
from epmq.walk import Walk


class Visit:
    """A block, with the merged weights until it is given others, and what the experts' own blocks made of the batches.

    steps: groups of linears and, when they are refitted, norms, in the order the block runs them; none without streams.
    notes: what the report should tell of the block.
    """

    def __init__(self, walk: Walk, address: BlockAddress):
        self.walk, self.address = walk, address
        self.block = walk.load(address, walk.merged)
        self.steps = self._steps() if walk.streams else []
        self.notes: list[str] = []
        self._seen_at: list[str] = []
        self._mixtures = tuple(f"{name}." for name in separated(self.block))
        if walk.inside:
            self._run_inside()
        changing = [name for step in self.steps for name in names_of(step)]
        room = walk.reuse_bytes(self.block)
        ahead = room // 2 if self._mixtures else 0
        self._store = OutputStore(self.block, changing, room - ahead)
        batches = sum(map(len, walk.streams.values()))
        copied = walk.runner.precision.copied
        self._ahead = InputsAhead(self.block, self.steps, ahead, max(1, batches), copied)

    def name_of(self, part: str) -> str:
        """A part's name in the whole model."""
        return f"{self.address.name}.{part}"

    def selected(self) -> list[str]:
        """The linears that are to be quantized."""
        return [name for name, module in self.block.named_modules() if is_linear(module) and self._selects(name)]

    def linears(self, group: InputGroup) -> list[Any]:
        """The modules of a group."""
        return [self.block.get_submodule(name) for name in group.linears]

    def read(self, source: WeightSource, group: InputGroup) -> Expert:
        """The weights of a group in another model."""
        return read_stack(source, self.address, group, self.linears(group), self.walk.device)

    def input_of(self, task: str, batch: Batch, name: str) -> Tensor | None:
        """What a part of the block reads as deployed; None where the batch does not reach it."""
        key = (task, batch.number)
        if self._ahead.has(key, name):
            x = self._ahead.take(key, name)
        else:
            call, others = self._call(task, batch), self._ahead.companions(name)
            with self._store.active(key):
                seen = inputs_of(self.block, call, name, others, self._ahead.room(name))
            self._ahead.keep(key, name, seen)
            x = seen.get(name)
        return None if x is None or x.numel() == 0 else self.walk.runner.precision.read(x)

    def is_expert(self, name: str) -> bool:
        """Whether a linear is an expert's of a mixture: what it reads inside the fine-tuned model is not kept, because
        other rows reach it there."""
        return name.startswith(self._mixtures)

    def is_routed(self, task: str, batch: Batch, x: Tensor) -> bool:
        """Whether the rows ``x`` that a part of the block reads are picked out of the batch by what they hold: inside
        the expert others are."""
        places = x.shape[:-1]
        if max(places, default=1) < places.numel():
            return False
        return places.numel() != self._call(task, batch).hidden.shape[:-1].numel() and self._picks_rows

    @cached_property
    def _picks_rows(self) -> bool:
        """Whether some group reads more rows, or fewer, inside the experts than as deployed."""
        for task, batches in self.walk.streams.items():
            for batch in batches:
                counts: dict[str, int] = {}
                with observe(self.block, self._seen_at, partial(_count_rows, counts)):
                    self._call(task, batch).run(self.block)
                if any(len(self.rows_inside(task, batch, (name,))) != counts.get(name, 0) for name in self._seen_at):
                    return True
        return False

    def output_of(self, task: str, batch: Batch, name: str) -> Tensor | None:
        """What a part of the block gives as deployed; None where the batch does not reach it."""
        call = self._call(task, batch)
        seen: Seen = {}
        with self._store.active((task, batch.number)), outputs(self.block, [name], seen, call.precision):
            call.run(self.block)
        return seen.get(name)

    def rows_inside(self, task: str, batch: Batch, names: Iterable[str]) -> Tensor:
        """Rows ``[M, P]`` that were seen at parts of the expert's block, side by side; none where it was not run."""
        parts = [self.walk.states.seen(task, batch.number, name) for name in names]
        seen = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
        return seen.reshape(-1, seen.shape[-1])

    def settle(self, names: Iterable[str]) -> None:
        """The weights of these parts are final."""
        self._store.settle(names)

    def leave(self) -> None:
        """Run the finished block, where anyone asks: its outputs are what the next one is calibrated on."""
        states = self.walk.states
        states.forget_seen()
        if not self.walk.inside and self.address == self.walk.addresses[-1]:
            return
        for task, batches in self.walk.streams.items():
            for batch in batches:
                call = self._call(task, batch)
                with self._store.active((task, batch.number)):
                    output = call.run(self.block)
                if not all_finite(hidden_of(output)):
                    raise NumericalError(f"{self.address.name}: its output is NaN or Inf on inputs of task {task!r}.")
                states.advance(task, batch.number, self.address.list_name, output)

    def _call(self, task: str, batch: Batch) -> BlockCall:
        return self.walk.call(self.address, task, batch)

    def _selects(self, name: str) -> bool:
        return self.walk.config.selects(self.name_of(name))

    def _steps(self) -> list[InputGroup | str]:
        """The steps as the main process finds them."""
        world = self.walk.world
        if not world.main:
            told = world.from_main(None)
            return [step if isinstance(step, str) else InputGroup(tuple(step[0]), step[1]) for step in told]
        steps: list[InputGroup | str] = []
        wanted = set(self.selected())
        batches = [(task, batch) for task, batches in self.walk.streams.items() for batch in batches]
        for number, (task, batch) in enumerate(batches):
            if number and not wanted:
                break
            steps = with_new(steps, self._steps_on(task, batch))
            wanted -= {name for step in steps for name in names_of(step)}
        steps = side_by_side(self.block, steps)
        world.from_main([s if isinstance(s, str) else [list(s.linears), s.sequence] for s in steps])
        return steps

    def _steps_on(self, task: str, batch: Batch) -> list[InputGroup | str]:
        """The steps that one batch reaches."""
        # The call is captured anew for each run: a block may fill a cache it is given.
        groups = input_groups(self.block, self._call(task, batch), self._selects)
        if not (self.walk.config.norm_refit and self.walk.inside):
            return list(groups)
        first = {group.first: group for group in groups}
        norms = [name for name, module in self.block.named_modules() if is_norm(module)]
        order = running_order(self.block, self._call(task, batch), norms + list(first))
        return [first.get(name, name) for name in order]

    def _run_inside(self) -> None:
        """One run of each expert's block: what its groups read (or give) and its norms give, per batch."""
        walk = self.walk
        read: list[str] = []
        given: list[str] = []
        for step in self.steps:
            if isinstance(step, str):
                given.append(step)
            elif self.is_expert(step.first):
                continue
            elif narrows(self.block, step):
                given += step.linears
            else:
                read.append(step.first)
        self._seen_at = [*read, *given]
        origin = walk.runner.origin(self.address)
        for task, batches in walk.streams.items():
            if not batches:
                continue
            if origin.anew:
                walk.set_outside(walk.experts[task])
            expert_block = walk.load(self.address, walk.experts[task])
            for batch in batches:
                inside = walk.states.inside(task, batch.number)
                call = walk.runner.capture(self.address, batch.inputs, StreamState(inside.outputs))
                if not origin.anew:
                    call = inside.within(call, origin)
                output, seen = run_inside(expert_block, call, read, given)
                for name in self._seen_at:
                    seen.setdefault(name, inside.hidden.new_empty(0, 1))
                walk.states.go_inside(task, batch.number, inside, self.address.list_name, output, origin)
                walk.states.keep_seen(task, batch.number, seen)
        if origin.anew:
            walk.set_outside(walk.merged)


def _count_rows(counts: dict[str, int], name: str, x: Tensor) -> None:
    """Count what a part of the block reads when it first runs."""
    counts.setdefault(name, x.shape[:-1].numel())
