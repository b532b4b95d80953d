"""Merging and rounding without data in one place: each owner gathers its expert's statistics, another solves from them.

RegMean's setting (Jin et al., arXiv 2212.09849): a group's inputs are those inside the expert, not those the deployed
model will feed to it, and no error of earlier layers is seen by later ones.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from epmq import extension
from epmq.blocks import find_blocks, linears_of
from epmq.calls import BlockAddress, StreamState, hidden_of
from epmq.config import QuantConfig
from epmq.devices import place_buffers
from epmq.diagnose import joined, layer_rows, unlinear_share
from epmq.errors import ConfigError, FormatError, NumericalError
from epmq.experts import keep_rows
from epmq.formats.statistics import StatisticsReader, StatisticsWriter
from epmq.group import COARSE_NOTE, GroupOutcome, anchor_strength, quantize_group
from epmq.inputs import InputGroup, input_groups, observe, with_new
from epmq.memory import give_back_free_memory
from epmq.orientation import features_of, is_linear
from epmq.progress import Sink
from epmq.runner import BlockRunner
from epmq.skeleton import fill, without_cache
from epmq.sources import WeightSource, all_finite
from epmq.stacks import Deployed, deploy, hand_out, parted, read_stack, stacked, stored_scale_dtype
from epmq.statistics import Expert, Folded, Moments, TaskStatistics
from epmq.streams import Batch, rows_read, sequence_of
from epmq.world import World

Progress = Callable[[str, int, int], None]


@torch.no_grad()
def collect(
    skeleton: nn.Module,
    expert: WeightSource,
    task: str,
    batches: Sequence[Batch],
    writer: StatisticsWriter,
    progress: Progress,
    device: torch.device,
) -> None:
    """Gather the statistics of every group of linears while the expert's own model runs on its own data.

    skeleton: the model on the meta device; it is whole again afterwards. One block is held at a time, on ``device``,
    where the batches are.
    """
    place_buffers(skeleton, device)
    runner = BlockRunner(skeleton)
    with ExitStack() as at_end:
        at_end.enter_context(without_cache(skeleton))
        at_end.callback(runner.restore)
        fill(runner.model, "", expert, torch.float32, device)
        runner.follow(batches[0].inputs)
        states = [StreamState() for _ in batches]
        current_list, sequence = None, None
        for number, address in enumerate(runner.addresses):
            progress(address.name, number, len(runner.addresses))
            if address.list_name != current_list:
                current_list = address.list_name
                sequence = sequence_of(runner, address, batches[0].inputs, states[0])
            block = keep_rows(copy.deepcopy(runner.block(address)))
            fill(block, f"{address.name}.", expert, torch.float32, device)
            groups: list[InputGroup] = []
            for batch, state in zip(batches, states, strict=True):
                call = runner.capture(address, batch.inputs, state)
                groups = with_new(groups, input_groups(block, call, lambda name: True))
                if sum(len(group.linears) for group in groups) == len(linears_of({"": block})):
                    break
            linears = {group: [block.get_submodule(name) for name in group.linears] for group in groups}
            columns = {group: (features_of(linears[group][0]) or (0, 0))[0] for group in groups}
            found = {group.first: TaskStatistics(columns[group], None, device=device, exact=True) for group in groups}
            positions = {group.first: sequence if group.sequence is None else None for group in groups}
            for batch, state in zip(batches, states, strict=True):
                call = runner.capture(address, batch.inputs, state)
                with observe(block, list(found), _adding(found, batch, positions, block)):
                    output = call.run(block)
                if not all_finite(hidden_of(output)):
                    raise NumericalError(f"{address.name}: its output is NaN or Inf on inputs of task {task!r}.")
                state.advance(address.list_name, output)
            for group in groups:
                found[group.first].over(World())
                found[group.first].check(task, f"{address.name}.{group.first}")
                names = tuple(f"{address.name}.{name}" for name in group.linears)
                writer.group(names, found[group.first], read_stack(expert, address, group, linears[group], device))
            give_back_free_memory()


def _adding(
    found: Mapping[str, TaskStatistics], batch: Batch, positions: Mapping[str, str | None], block: nn.Module
) -> Callable[[str, Tensor], None]:
    """Adds what a module reads; one that runs again in a block is seen as it ran first."""
    seen: set[str] = set()

    def see(name: str, x: Tensor) -> None:
        if name not in seen:
            rows, weights, _ = rows_read(block, name, x, batch.weights_of(positions[name]))
            found[name].add(rows, None, weights)
            seen.add(name)

    return see


def check_settings(config: QuantConfig) -> None:
    """Raise ConfigError for settings that need data beside the statistics."""
    needs = {
        "distill": config.distill is not None,
        "anchor: auto": config.method == "epmq" and config.anchor == "auto",
        "norm_refit": config.norm_refit,
        "method: rtn": config.method == "rtn",
        "forward_dtype": config.forward_dtype != "float32",
    }
    for setting, given in needs.items():
        if given:
            change = "remove distill or preset: best" if setting == "distill" else "change it"
            raise ConfigError(f"{setting} has no use for statistics, or needs the data themselves; {change}.")


@torch.no_grad()
def quantize_collected(
    skeleton: nn.Module,
    merged: WeightSource,
    base: WeightSource | None,
    experts: Mapping[str, WeightSource],
    statistics: Mapping[str, StatisticsReader],
    config: QuantConfig,
    sink: Sink,
    progress: Progress,
    device: torch.device,
) -> dict[str, Any]:
    """Merge towards the experts and round, from statistics alone; as :func:`epmq.pipeline.run`.

    ``alpha`` does not matter: the inputs as deployed are not known, so the expert's own stand for them.
    """
    check_settings(config)
    groups = _common_groups(statistics)
    addresses = find_blocks(skeleton)
    _check_model(next(iter(statistics.values())), skeleton, addresses)
    layers: list[dict[str, Any]] = []
    blocks: list[dict[str, Any]] = []
    notes = extension.notes(device)
    parts = {address.name: skeleton.get_submodule(address.name) for address in addresses}
    notes += unlinear_share(parts)
    matched: set[str | None] = set()
    for number, address in enumerate(addresses):
        progress(address.name, number, len(addresses))
        started = time.perf_counter()
        block = copy.deepcopy(skeleton.get_submodule(address.name))
        fill(block, f"{address.name}.", merged, torch.float32, device)
        outcomes: Deployed = {}
        for linears in groups:
            if linears[0].startswith(f"{address.name}."):
                names = tuple(n.removeprefix(f"{address.name}.") for n in linears if config.selects(n))
                if names:
                    solved = _Group(address, InputGroup(names), linears[0], block, config, device)
                    outcomes.update(solved.run(merged, base, experts, statistics))
                    layers += solved.rows
                    matched.update(piece.pattern for piece in solved.pieces)
                    notes += [COARSE_NOTE] if solved.coarse else []
        for name, module in block.named_modules():
            full = f"{address.name}.{name}"
            if is_linear(module) and name not in outcomes and config.selects(full):
                notes.append(f"{full}: not in the statistics; left unquantized.")
        hand_out(sink, merged, address, block, outcomes)
        seconds = round(time.perf_counter() - started, 3)
        blocks.append({"block": address.name, "seconds": seconds, "hidden_error": {}})
        give_back_free_memory()
    if not layers:
        raise ConfigError("include, exclude and the statistics leave no linear of any block to quantize.")
    notes += config.unmatched(linears_of(parts), matched)
    return {"layers": layers, "blocks": blocks, "notes": sorted(set(notes))}


class _Group:
    """One group on its way from files to a quantized weight."""

    def __init__(
        self,
        address: BlockAddress,
        group: InputGroup,
        key: str,
        block: nn.Module,
        config: QuantConfig,
        device: torch.device,
    ):
        self.address, self.group, self.key, self.config, self.device = address, group, key, config, device
        self.block = block
        self.linears: list[Any] = [block.get_submodule(name) for name in group.linears]
        self.pieces = parted(group, self.linears, lambda name: config.override_of(f"{address.name}.{name}"))
        self.rows: list[dict[str, Any]] = []
        self.coarse = False

    def run(
        self,
        merged_source: WeightSource,
        base: WeightSource | None,
        experts: Mapping[str, WeightSource],
        statistics: Mapping[str, StatisticsReader],
    ) -> Deployed:
        started = time.perf_counter()
        config, merged = self.config, stacked(self.linears)
        anchor = merged
        if config.rho != 1.0 and config.needs_experts:
            assert base is not None
            started_from = self._stack(base, self.group)
            anchor = Expert(torch.lerp(started_from.weight, merged.weight, config.rho), merged.bias)
        rows, columns = merged.weight.shape
        problem = Folded.empty(rows, columns, device=self.device)
        plain = Folded.empty(0, columns, device=self.device)
        for task in statistics:
            found, expert = self._read(task, experts, statistics)
            if config.needs_experts:
                problem.fold(found, expert, anchor, 0.0, config.task_weights, config.gamma)
            else:
                problem.fold_inputs(found, config.task_weights)
            if config.gamma != 1.0:
                plain.fold_inputs(found, config.task_weights)
        inputs = plain if config.gamma != 1.0 else problem
        refit = config.refits_bias and all(linear.bias is not None for linear in self.linears)
        strength = anchor_strength(config, None, refit)
        where = f"{self.address.name}.{self.group.first}"
        stored = stored_scale_dtype(config, merged_source, where)
        outcomes: dict[str | None, GroupOutcome] = {}
        result: Deployed = {}
        for piece in self.pieces:
            its_problem = problem.of_rows(piece.rows)
            its_inputs = its_problem if inputs is problem else inputs
            its_anchor, settings = anchor.of_rows(piece.rows), config.of(piece.pattern)
            outcome = quantize_group(its_problem, its_inputs, its_anchor, strength, settings, refit, stored, where)
            outcome.check(where)
            result.update(deploy(piece.group, piece.linears, outcome))
            outcomes[piece.pattern] = outcome
            self.coarse |= outcome.coarse
        seconds = time.perf_counter() - started
        # Read once more, so that one task's statistics are held at a time.
        told = [
            self._lines(task, Moments(*self._read(task, experts, statistics)), merged, outcomes, seconds)
            for task in statistics
        ]
        self.rows = joined(told, statistics)
        return result

    def _lines(
        self, task: str, moments: Moments, merged: Expert, outcomes: Mapping[str | None, GroupOutcome], seconds: float
    ) -> list[dict[str, Any]]:
        """Lines of the report about one task."""
        lines = []
        for piece in self.pieces:
            outcome = outcomes[piece.pattern]
            compared = {"merged": merged.of_rows(piece.rows), self.config.method: Expert(outcome.weight, outcome.bias)}
            seen = {task: Moments(moments.task, moments.expert.of_rows(piece.rows))}
            share = seconds * len(outcome.weight) / len(merged.weight)
            lines += layer_rows(self.address, piece.group, piece.linears, outcome, compared, seen, share)
        return lines

    def _stack(self, source: WeightSource, group: InputGroup) -> Expert:
        linears = [self.block.get_submodule(name) for name in group.linears]
        return read_stack(source, self.address, group, linears, self.device)

    def _read(
        self, task: str, experts: Mapping[str, WeightSource], statistics: Mapping[str, StatisticsReader]
    ) -> tuple[TaskStatistics, Expert]:
        """A task's statistics, checked against its expert, and that expert's weights of the selected linears."""
        prefix = f"{self.address.name}."
        collected = InputGroup(tuple(n.removeprefix(prefix) for n in statistics[task].groups[self.key].linears))
        found = statistics[task].read(self.key, self._stack(experts[task], collected))
        return found, self._stack(experts[task], self.group)


def _common_groups(statistics: Mapping[str, StatisticsReader]) -> list[tuple[str, ...]]:
    """The groups of all owners, which must be the same ones."""
    first = next(iter(statistics.values()))
    wanted = {name: (facts.linears, facts.columns) for name, facts in first.groups.items()}
    for reader in statistics.values():
        found = {name: (facts.linears, facts.columns) for name, facts in reader.groups.items()}
        for name in sorted({*wanted, *found}):
            if wanted.get(name) != found.get(name):
                raise FormatError(
                    f"{reader.folder}: group {name!r} is not as in {first.folder}; they differ in the model."
                )
    return [linears for linears, _ in wanted.values()]


def _check_model(statistics: StatisticsReader, skeleton: nn.Module, addresses: Sequence[BlockAddress]) -> None:
    """Refuse groups of linears that this model does not have, or not of that width, or not in one block."""
    linears = {name: module for name, module in skeleton.named_modules() if is_linear(module)}
    taken: set[str] = set()
    for facts in statistics.groups.values():
        for name in facts.linears:
            if name not in linears:
                raise FormatError(f"the statistics are of another model: {name!r} is no linear of this one.")
            columns = (features_of(linears[name]) or (None,))[0]
            if columns != facts.columns:
                raise FormatError(
                    f"{statistics.folder}: linear {name!r} reads {facts.columns} columns, and {columns} in this model."
                )
            if name in taken:
                raise FormatError(f"{statistics.folder}: linear {name!r} is in two groups.")
            taken.add(name)
        blocks = {next((a.name for a in addresses if name.startswith(f"{a.name}.")), "") for name in facts.linears}
        if len(blocks) != 1:
            raise FormatError(f"{statistics.folder}: group {facts.linears[0]!r} holds linears of several blocks.")
