"""The streams of all tasks from block to block: through the deployed model and, where needed, inside their experts."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import nn

from epmq.calls import BlockAddress, BlockCall, StreamState, hidden_of
from epmq.config import QuantConfig
from epmq.devices import free_bytes
from epmq.estimate import work_bytes
from epmq.experts import keep_rows
from epmq.precision import Precision
from epmq.runner import BlockRunner
from epmq.skeleton import fill
from epmq.sources import WeightSource
from epmq.states import States
from epmq.streams import Batch, rows_of, sequence_of, shared
from epmq.surroundings import Surroundings


class Walk:
    """Owns the model, the batches of this process, and the states in which they come to the next block.

    counts: a task's batches in all processes. inside: whether each batch runs inside its expert as well. sequence: the
    input whose positions the blocks of the list in hand work on.
    """

    def __init__(
        self,
        skeleton: nn.Module,
        merged: WeightSource,
        experts: Mapping[str, WeightSource],
        streams: Mapping[str, list[Batch]],
        config: QuantConfig,
        around: Surroundings,
        device: torch.device,
    ):
        self.merged, self.experts, self.config, self.device = merged, experts, config, device
        self.world, self._around = around.world, around
        self.counts = {task: len(batches) for task, batches in streams.items()}
        self._first = next(iter(streams.values()))[0].inputs if streams else {}
        self.streams = shared(streams, self.world)
        self.inside = config.needs_expert_features and bool(experts)
        self.states = States(around.shelf, self.streams, self.inside)
        self.sequence: str | None = None
        self._list: str | None = None
        self.runner = BlockRunner(skeleton, Precision.of(config.forward_dtype, device))

    @property
    def addresses(self) -> list[BlockAddress]:
        """The blocks in the order of the way."""
        return self.runner.addresses

    def begin(self) -> list[BlockAddress]:
        """Find the order in which the model calls its blocks; returns those that it does not call."""
        self.set_outside(self.merged)
        return self.runner.follow(self._first) if self.streams else []

    def stand_behind(self, address: BlockAddress, sequence: str | None) -> None:
        """Go on behind a block that an earlier start has finished."""
        self._list, self.sequence = address.list_name, sequence

    def enter(self, address: BlockAddress) -> None:
        """Come to a block; at the first of a list, find out what its blocks work on."""
        if address.list_name == self._list:
            return
        self._list = address.list_name
        self.sequence = self._sequence(address)
        if self.inside:
            self._start_inside(address)

    def set_outside(self, source: WeightSource) -> None:
        """Give the model the weights outside its blocks of ``source``."""
        fill(self.runner.model, "", source, torch.float32, self.device)

    def any_batch(self) -> tuple[str, Batch]:
        """The first batch of this process."""
        return next((task, batches[0]) for task, batches in self.streams.items() if batches)

    def load(self, address: BlockAddress, source: WeightSource) -> nn.Module:
        """A copy of a block with the weights of ``source``."""
        block = copy.deepcopy(self.runner.block(address))
        fill(block, address.name + ".", source, torch.float32, self.device)
        return keep_rows(block.float())  # buffers that no source holds are of the model's dtype

    def reuse_bytes(self, block: nn.Module) -> int:
        """Memory for outputs of a block's finished linears, now that its experts have seen all batches."""
        least = self._around.reuse_bytes
        if self.device.type != "cuda" or not self._around.takes_spare:
            return least
        batches = [batch.inputs for batches in self.streams.values() for batch in batches]
        return max(least, (free_bytes(self.device) - work_bytes(block, batches)) // 2)

    def call(self, address: BlockAddress, task: str, batch: Batch) -> BlockCall:
        """What the deployed model hands to a block."""
        state = self.states.deployed(task, batch.number)
        call = self.runner.capture(address, batch.inputs, state)
        self.states.remember(task, batch.number, address, state)
        return call

    def hidden_errors(self, address: BlockAddress) -> dict[str, float]:
        """How far the batches behind a block are from where they are inside their experts, per task."""
        sums = torch.zeros(len(self.streams), 2, dtype=torch.float64)
        for place, (task, batches) in enumerate(self.streams.items()):
            for batch in batches:
                hidden = self.states.inside(task, batch.number).hidden.float()
                inside, weights, _ = rows_of(hidden, batch.weights_of(self.sequence))
                outputs_now = self.states.deployed(task, batch.number).outputs
                ours = hidden_of(outputs_now[address.list_name]).float().reshape(inside.shape)
                r = inside.new_ones(len(inside)) if weights is None else weights
                sums[place, 0] += float((r.unsqueeze(1) * (ours - inside).square()).sum())
                sums[place, 1] += float((r.unsqueeze(1) * inside.square()).sum())
        self.world.add_up([sums])
        return {
            task: float(error / energy.clamp_min(1e-30))
            for task, (error, energy) in zip(self.streams, sums, strict=True)
        }

    def _sequence(self, address: BlockAddress) -> str | None:
        """The input whose positions the blocks of a list work on, as the main process finds it."""
        found = None
        if self.streams and self.world.main:
            task, batch = self.any_batch()
            found = sequence_of(self.runner, address, batch.inputs, self.states.deployed(task, batch.number))
        sequence: str | None = self.world.from_main(found)
        return sequence

    def _start_inside(self, address: BlockAddress) -> None:
        """What every expert feeds to the first block of a list, made with the expert's own outer weights."""
        origin = self.runner.origin(address)
        for task, batches in self.streams.items():
            self.set_outside(self.experts[task])
            for batch in batches:
                before = StreamState(self.states.outputs_inside(task, batch.number))
                call = self.runner.capture(address, batch.inputs, before)
                self.states.start_inside(task, batch.number, call, origin)
        self.set_outside(self.merged)
