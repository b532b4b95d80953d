"""The whole way: walks the blocks of a model, gathers statistics, solves, rounds, and hands out finished tensors."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from epmq.blocks import (
    BlockAddress,
    BlockCall,
    BlockRunner,
    InputGroup,
    hidden_of,
    input_groups,
    input_of,
    is_norm,
    running_order,
)
from epmq.config import QuantConfig
from epmq.diagnose import joined, layer_rows
from epmq.errors import CalibrationError, ConfigError, NumericalError
from epmq.group import GroupOutcome, anchor_strength, quantize_group
from epmq.inside import Seen, outputs, run_inside
from epmq.memory import give_back_free_memory
from epmq.norms import NormStatistics, correct
from epmq.progress import Sink, Stage
from epmq.reuse import DEFAULT_LIMIT_BYTES, OutputStore
from epmq.shelf import Shelf
from epmq.skeleton import fill
from epmq.sources import WeightSource, all_finite, require_same_layout
from epmq.stacks import Deployed, deploy, hand_out, read_stack, scale_dtype, stacked
from epmq.states import States
from epmq.statistics import SAMPLE_ROWS, Expert, Folded, Sample, TaskStatistics
from epmq.streams import Batch, make_streams, rows_of, shared, split_held
from epmq.world import World

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Surroundings:
    """Where an engine works. world: the processes that share the work. shelf: where hidden states are kept.
    reuse_bytes: memory for outputs of finished linears. stage: its part of a journal, or None when a run that is cut
    off need not go on."""

    world: World = field(default_factory=World)
    shelf: Shelf = field(default_factory=Shelf)
    reuse_bytes: int = DEFAULT_LIMIT_BYTES
    stage: Stage | None = None


class Engine:
    """One quantization of one model. ``run`` may be called once."""

    def __init__(
        self,
        skeleton: nn.Module,
        merged: WeightSource,
        base: WeightSource | None,
        experts: Mapping[str, WeightSource],
        calibration: Mapping[str, Iterable[Mapping[str, Any]]],
        config: QuantConfig,
        sink: Sink,
        progress: Progress = lambda what, done, total: None,
        around: Surroundings | None = None,
    ):
        around = around or Surroundings()
        self.world, self.stage, self.around = around.world, around.stage, around
        self.config, self.sink, self.progress = config, self.stage or sink, progress
        self.merged, self.base, self.experts = merged, base, dict(experts)
        everything = make_streams(calibration) if calibration or config.method != "rtn" else {}
        self.streams = shared(everything, self.world)
        self.states = States(around.shelf, self.streams)
        self._batches = {task: len(batches) for task, batches in everything.items()}
        self._first = next(iter(everything.values()))[0].inputs if everything else {}
        self._check_tasks()
        if config.rho != 1.0 and base is None:
            raise ConfigError("rho: an anchor away from the merged weights needs the base model; give base.")
        require_same_layout(merged, self.experts)
        if base is not None:
            require_same_layout(merged, {"base": base})
        self.runner = BlockRunner(skeleton)
        self.uses_features = config.needs_expert_features and bool(self.experts)
        self.layers: list[dict[str, Any]] = []
        self.block_rows: list[dict[str, Any]] = []
        self.notes: list[str] = []
        self.store = OutputStore(self.around.reuse_bytes)

    @torch.no_grad()
    def run(self) -> dict[str, Any]:
        """Quantize block after block; returns the report's ``layers``, ``blocks`` and ``notes``."""
        fill(self.runner.model, "", self.merged, torch.float32)
        if self.streams:
            for address in self.runner.follow(self._first):
                self.notes.append(f"{address.name}: not called on the calibration inputs; left unquantized.")
        total = len(self.runner.addresses)
        start = self._take_up(total)
        current_list = self.runner.addresses[start - 1].list_name if start else None
        for number, address in enumerate(self.runner.addresses[start:], start):
            self.progress(address.name, number, total)
            if self.uses_features and address.list_name != current_list:
                self._start_expert_streams(address)
            current_list = address.list_name
            known = len(self.layers)
            self._block(address)
            self._commit(number, self.layers[known:], number + 1 == total)
            give_back_free_memory()
        self.progress("done", total, total)
        if not self.layers and self.streams:
            raise ConfigError("include and exclude leave no linear of any block to quantize; change them.")
        return {"layers": self.layers, "blocks": self.block_rows, "notes": sorted(set(self.notes))}

    def _take_up(self, total: int) -> int:
        """What earlier starts of this run found; returns the number of blocks that are finished."""
        if self.stage is None:
            return 0
        for rows in self.stage.take_up(self.states, total):
            self.layers += rows["layers"]
            self.block_rows.append(rows["block"])
            self.notes += rows["notes"]
        return self.stage.finished

    def _commit(self, number: int, layers: list[dict[str, Any]], last: bool) -> None:
        self.notes = sorted({note for notes in self.world.gather(sorted(set(self.notes))) for note in notes})
        if self.stage is not None:
            rows = {"layers": layers, "block": self.block_rows[-1], "notes": self.notes}
            note = self.stage.commit(number, rows, self.states, last)
            self.notes += [] if note is None else [note]

    def _check_tasks(self) -> None:
        if self.config.needs_experts and not self.experts:
            raise CalibrationError(f"method {self.config.method!r} needs experts; give {{task: expert}}.")
        if not self.experts or not self.streams:
            return
        for task in self.streams:
            if task not in self.experts:
                raise CalibrationError(f"task {task!r} has calibration data but no expert.")
        for task in self.experts:
            if task not in self.streams:
                raise CalibrationError(f"expert {task!r} has no calibration data under that task name.")

    def _start_expert_streams(self, address: BlockAddress) -> None:
        """Hidden states of every expert in front of a list of blocks, made with the expert's own outer weights."""
        for task, batches in self.streams.items():
            fill(self.runner.model, "", self.experts[task], torch.float32)
            for batch in batches:
                self.states.go_inside(task, batch.number, self._capture(address, task, batch).hidden)
        fill(self.runner.model, "", self.merged, torch.float32)

    def _capture(self, address: BlockAddress, task: str, batch: Batch) -> BlockCall:
        return self.runner.capture(address, batch.inputs, self.states.deployed(task, batch.number))

    def _load(self, address: BlockAddress, source: WeightSource) -> nn.Module:
        block = copy.deepcopy(self.runner.block(address))
        fill(block, address.name + ".", source, torch.float32)
        return block

    def _block(self, address: BlockAddress) -> None:
        started = time.perf_counter()
        self.store = OutputStore(self.around.reuse_bytes)
        block = self._load(address, self.merged)
        outcomes: Deployed = {}
        if self.streams:
            steps = self._steps(address, block)
            if self.uses_features:
                self._inside_experts(address, steps)
            for step in steps:
                if isinstance(step, InputGroup):
                    outcomes.update(self._group(address, block, step))
                    self.store.final += step.linears
                else:
                    self._norm(address, block, step)
            self.states.forget_seen()
            self._advance(address, block)
        else:
            for name, module in block.named_modules():
                if isinstance(module, nn.Linear) and self.config.selects(f"{address.name}.{name}"):
                    outcomes.update(self._nearest(address, name, module))
        for name, module in block.named_modules():
            if isinstance(module, nn.Linear) and name not in outcomes and self.config.selects(f"{address.name}.{name}"):
                self.notes.append(f"{address.name}.{name}: not reached on the calibration inputs; left unquantized.")
        hand_out(self.sink, self.merged, address, block, outcomes)
        self.block_rows.append(
            {
                "block": address.name,
                "seconds": round(time.perf_counter() - started, 3),
                "hidden_error": self._hidden_errors(address) if self.uses_features else {},
            }
        )

    def _steps(self, address: BlockAddress, block: nn.Module) -> list[InputGroup | str]:
        """Groups of linears and, when they are refitted, norms, in the order the block runs them."""
        if not self.world.main:
            return [step if isinstance(step, str) else InputGroup(tuple(step)) for step in self.world.from_main(None)]
        task, batch = next((task, batches[0]) for task, batches in self.streams.items() if batches)

        def call() -> BlockCall:
            # Captured anew for each run: a block may fill a cache it is given.
            return self._capture(address, task, batch)

        groups = input_groups(block, call(), lambda name: self.config.selects(f"{address.name}.{name}"))
        steps: list[InputGroup | str] = list(groups)
        if self.config.norm_refit and self.uses_features:
            first = {group.first: group for group in groups}
            norms = [name for name, module in block.named_modules() if is_norm(module)]
            steps = [first.get(name, name) for name in running_order(block, call(), norms + list(first))]
        self.world.from_main([step if isinstance(step, str) else list(step.linears) for step in steps])
        return steps

    def _inside_experts(self, address: BlockAddress, steps: list[InputGroup | str]) -> None:
        """One run of each expert's block: what its groups read and its norms give, per batch."""
        firsts = [step.first for step in steps if isinstance(step, InputGroup)]
        norms = [step for step in steps if isinstance(step, str)]
        for task, batches in self.streams.items():
            if not batches:
                continue
            expert_block = self._load(address, self.experts[task])
            for batch in batches:
                call = self._capture(address, task, batch).with_hidden(self.states.inside(task, batch.number))
                hidden, seen = run_inside(expert_block, call, firsts, norms)
                self.states.go_inside(task, batch.number, hidden)
                self.states.keep_seen(task, batch.number, seen)

    def _group(self, address: BlockAddress, block: nn.Module, group: InputGroup) -> Deployed:
        started = time.perf_counter()
        config = self.config
        where = f"{address.name}.{group.first}"
        linears = [block.get_submodule(name) for name in group.linears]
        merged = stacked(linears)
        anchor = self._anchor(address, group, merged)
        rows, columns = merged.weight.shape
        # Rows are independent once the sums over all processes' inputs are known: each process takes some of them.
        own = self.world.rows(rows)
        own_anchor, own_merged = anchor.part(own), merged.part(own)
        count = len(own_anchor.bias)
        problem, plain = Folded.empty(count, columns), Folded.empty(0, columns)
        samples: dict[str, Sample] = {}
        automatic = config.method == "epmq" and config.anchor == "auto"
        split = (problem, problem)
        if automatic:
            split = (Folded.empty(count, columns), Folded.empty(count, columns))
        for place, task in enumerate(self.streams):
            expert = read_stack(self.experts[task], address, group) if self.experts else merged
            fitted, held = self._task_statistics(task, address, block, group, automatic)
            own_expert = expert.part(own)
            if held is not None:
                for part, into in zip((fitted, held), split, strict=True):
                    into.fold(part, own_expert, own_anchor, config.alpha, config.task_weights, config.gamma)
                fitted.join(held)
            if config.needs_experts:
                problem.fold(fitted, own_expert, own_anchor, config.alpha, config.task_weights, config.gamma)
            else:
                problem.fold_inputs(fitted, config.task_weights)
            if not all_finite(problem.sum_pull):
                raise NumericalError(
                    f"{where}: the targets of task {task!r} are NaN or Inf; check its expert's weights."
                )
            if config.gamma != 1.0:
                plain.fold_inputs(fitted, config.task_weights)
            if place % self.world.size == self.world.rank:
                samples[task] = fitted.sampled(expert, config.alpha)
        refit = config.refits_bias and all(linear.bias is not None for linear in linears)
        if automatic:
            split = (split[0].whole(own, rows, self.world), split[1].whole(own, rows, self.world))
            if refit:
                split = (split[0].centred(), split[1].centred())
        strength = self.world.from_main(anchor_strength(config, *split) if self.world.main else None)
        inputs = plain if config.gamma != 1.0 else problem
        stored = scale_dtype(config.scale_dtype, self.merged, address, group)
        outcome = quantize_group(problem, inputs, own_anchor, strength, config, refit, stored, where)
        outcome = outcome.whole(own, rows, self.world)
        if not (all_finite(outcome.weight) and all_finite(outcome.bias)):
            raise NumericalError(f"{where}: the quantized weights are not finite.")
        gptq = self._plain_gptq(inputs, own_merged, stored, where)
        result = deploy(group, linears, outcome)
        seconds = time.perf_counter() - started
        compared = {"merged": merged}
        if gptq is not None:
            compared["gptq"] = Expert(gptq.whole(own, rows, self.world).weight, merged.bias)
        compared[config.method] = Expert(outcome.weight, outcome.bias)
        found = self.world.gather(layer_rows(address, group, linears, outcome, compared, samples, seconds))
        self.layers += joined(found, self.streams)
        return result

    def _task_statistics(
        self, task: str, address: BlockAddress, block: nn.Module, group: InputGroup, automatic: bool
    ) -> tuple[TaskStatistics, TaskStatistics | None]:
        """Statistics of all processes' batches of a task, fitted and, for ``automatic``, held out."""
        columns: int = getattr(block.get_submodule(group.first), "in_features")  # noqa: B009 (typed as Tensor | Module)
        with_target = self.uses_features and self.config.alpha > 0
        fitted = TaskStatistics(columns, with_target, exact=True)
        held = TaskStatistics(columns, with_target, exact=True) if automatic else None
        sample = max(1, SAMPLE_ROWS // self._batches[task])
        for batch in self.streams[task]:
            call = self._capture(address, task, batch)
            with self.store.active(block, (task, batch.number)):
                x = input_of(block, call, group.first)
            rows, weights, matched = rows_of(x, batch)
            if not matched:
                self.notes.append(f"{address.name}.{group.first}: reads no row per position; all its rows count alike.")
            target = None
            if with_target:
                inside = self.states.seen(task, batch.number, group.first)
                target = inside.reshape(-1, inside.shape[-1])
            if held is None:
                fitted.add(rows, target, weights, sample)
            else:
                fit_weights, held_weights = split_held(rows, weights, x, batch)
                fitted.add(rows, target, fit_weights, sample)
                held.add(rows, target, held_weights)
        for statistics in (fitted, held):
            if statistics is not None:
                statistics.over(self.world)
        fitted.check(task, f"{address.name}.{group.first}")
        if held is not None and held.weight <= 0:
            raise CalibrationError(
                f'task {task!r}: anchor: "auto" holds out every fifth example, and there is none; give more examples,'
                " or give a number as anchor."
            )
        return fitted, held

    def _anchor(self, address: BlockAddress, group: InputGroup, merged: Expert) -> Expert:
        rho = self.config.rho
        if rho == 1.0 or not self.config.needs_experts:
            return merged
        assert self.base is not None
        base = read_stack(self.base, address, group)
        return Expert(torch.lerp(base.weight, merged.weight, rho), merged.bias)

    def _plain_gptq(self, inputs: Folded, merged: Expert, stored: torch.dtype, where: str) -> GroupOutcome | None:
        config = self.config
        if not config.diagnostics or config.bits is None or config.method == "gptq":
            return None
        plain = config.model_copy(update={"method": "gptq", "damp": None, "gamma": 1.0})
        return quantize_group(inputs, inputs, merged, 0.0, plain, False, stored, where)

    def _nearest(self, address: BlockAddress, name: str, linear: nn.Linear) -> Deployed:
        group = InputGroup((name,))
        merged = stacked([linear])
        empty = Folded.empty(0, linear.in_features)
        stored = scale_dtype(self.config.scale_dtype, self.merged, address, group)
        outcome = quantize_group(empty, empty, merged, 0.0, self.config, False, stored, f"{address.name}.{name}")
        return deploy(group, [linear], outcome)

    def _norm(self, address: BlockAddress, block: nn.Module, name: str) -> None:
        norm = block.get_submodule(name)
        weight: Tensor = norm.weight  # type: ignore[assignment]
        moments = NormStatistics(weight.shape[0])
        for task, batches in self.streams.items():
            own = NormStatistics(weight.shape[0])
            for batch in batches:
                call = self._capture(address, task, batch)
                seen: Seen = {}
                with self.store.active(block, (task, batch.number)), outputs(block, [name], seen):
                    call.run(block)
                z, weights, _ = rows_of(seen[name], batch)
                y, _, _ = rows_of(self.states.seen(task, batch.number, name), batch)
                own.add(z, y, torch.ones(len(z)) if weights is None else weights)
            own.over(self.world)
            moments.fold(own)
        correct(norm, *moments.correction(getattr(norm, "bias", None) is not None))

    def _advance(self, address: BlockAddress, block: nn.Module) -> None:
        """Run the finished block: its outputs are what the next one is calibrated on."""
        for task, batches in self.streams.items():
            for batch in batches:
                call = self._capture(address, task, batch)
                with self.store.active(block, (task, batch.number)):
                    output = call.run(block)
                if not all_finite(hidden_of(output)):
                    raise NumericalError(f"{address.name}: its output is NaN or Inf on inputs of task {task!r}.")
                self.states.advance(task, batch.number, address.list_name, output)

    def _hidden_errors(self, address: BlockAddress) -> dict[str, float]:
        sums = torch.zeros(len(self.streams), 2, dtype=torch.float64)
        for place, (task, batches) in enumerate(self.streams.items()):
            for batch in batches:
                inside, weights, _ = rows_of(self.states.inside(task, batch.number), batch)
                outputs_now = self.states.deployed(task, batch.number).outputs
                ours = hidden_of(outputs_now[address.list_name]).reshape(inside.shape)
                r = torch.ones(len(inside)) if weights is None else weights
                sums[place, 0] += float((r.unsqueeze(1) * (ours - inside).square()).sum())
                sums[place, 1] += float((r.unsqueeze(1) * inside.square()).sum())
        self.world.add_up([sums])
        return {
            task: float(error / energy.clamp_min(1e-30))
            for task, (error, energy) in zip(self.streams, sums, strict=True)
        }
