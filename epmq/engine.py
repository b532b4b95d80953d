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
    StreamState,
    hidden_of,
    input_groups,
    input_of,
    is_norm,
    narrows,
    running_order,
)
from epmq.config import QuantConfig
from epmq.diagnose import joined, layer_rows
from epmq.errors import CalibrationError, ConfigError, NumericalError
from epmq.group import GroupOutcome, anchor_strength, quantize_group
from epmq.inside import Seen, outputs, run_inside
from epmq.memory import give_back_free_memory
from epmq.norms import NormStatistics, correct
from epmq.orientation import is_linear
from epmq.progress import Sink, Stage
from epmq.reuse import DEFAULT_LIMIT_BYTES, OutputStore
from epmq.shelf import Shelf
from epmq.skeleton import fill
from epmq.sources import WeightSource, all_finite, require_same_layout
from epmq.stacks import Deployed, deploy, hand_out, parted, read_stack, stacked, stored_scale_dtype
from epmq.states import States
from epmq.statistics import SAMPLE_ROWS, Expert, Folded, Sample, TaskStatistics
from epmq.streams import Batch, make_streams, rows_of, sequence_of, shared, split_held
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
        device: torch.device | None = None,
        around: Surroundings | None = None,
    ):
        around = around or Surroundings()
        self.device = device or torch.device("cpu")
        self.world, self.stage, self.around = around.world, around.stage, around
        self.config, self.sink, self.progress = config, self.stage or sink, progress
        self.merged, self.base, self.experts = merged, base, dict(experts)
        everything = make_streams(calibration, self.device) if calibration or config.method != "rtn" else {}
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
        self.sequence: str | None = None
        self.matched: set[str | None] = set()

    @torch.no_grad()
    def run(self) -> dict[str, Any]:
        """Quantize block after block; returns the report's ``layers``, ``blocks`` and ``notes``."""
        fill(self.runner.model, "", self.merged, torch.float32, self.device)
        if self.streams:
            for address in self.runner.follow(self._first):
                self.notes.append(f"{address.name}: not called on the calibration inputs; left unquantized.")
        total = len(self.runner.addresses)
        start = self._take_up(total)
        current_list = self.runner.addresses[start - 1].list_name if start else None
        for number, address in enumerate(self.runner.addresses[start:], start):
            self.progress(address.name, number, total)
            if address.list_name != current_list:
                current_list = address.list_name
                self.sequence = self._sequence(address)
                if self.uses_features:
                    self._start_expert_streams(address)
            known = len(self.layers)
            self._block(address)
            self._commit(number, self.layers[known:], number + 1 == total)
        self.progress("done", total, total)
        if not self.layers and self.streams:
            raise ConfigError("include and exclude leave no linear of any block to quantize; change them.")
        self.notes += [
            f"overrides: {pattern!r} is the first match of no quantized linear."
            for pattern in self.config.overrides
            if pattern not in self.matched
        ]
        return {"layers": self.layers, "blocks": self.block_rows, "notes": sorted(set(self.notes))}

    def _take_up(self, total: int) -> int:
        """What earlier starts of this run found; returns the number of blocks that are finished."""
        if self.stage is None:
            return 0
        for rows in self.stage.take_up(self.states, total):
            self.layers += rows["layers"]
            self.block_rows.append(rows["block"])
            self.notes += rows["notes"]
            self.matched.update(rows["matched"])
            self.sequence = rows["sequence"]
        return self.stage.finished

    def _commit(self, number: int, layers: list[dict[str, Any]], last: bool) -> None:
        self.notes = sorted({note for notes in self.world.gather(sorted(set(self.notes))) for note in notes})
        if self.stage is not None:
            rows: dict[str, Any] = {"layers": layers, "block": self.block_rows[-1], "notes": self.notes}
            # What later blocks and the end of the run need of this one.
            rows |= {"matched": sorted(p for p in self.matched if p is not None), "sequence": self.sequence}
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

    def _any_batch(self) -> tuple[str, Batch]:
        """The first batch of this process."""
        return next((task, batches[0]) for task, batches in self.streams.items() if batches)

    def _sequence(self, address: BlockAddress) -> str | None:
        """The input whose positions the blocks of a list work on, as the main process finds it."""
        found = None
        if self.streams and self.world.main:
            task, batch = self._any_batch()
            found = sequence_of(self.runner, address, batch.inputs, self.states.deployed(task, batch.number))
        sequence: str | None = self.world.from_main(found)
        return sequence

    def _start_expert_streams(self, address: BlockAddress) -> None:
        """What every expert feeds to the first block of a list, made with the expert's own outer weights."""
        for task, batches in self.streams.items():
            fill(self.runner.model, "", self.experts[task], torch.float32, self.device)
            for batch in batches:
                before = StreamState(self.states.outputs_inside(task, batch.number))
                self.states.start_inside(task, batch.number, self.runner.capture(address, batch.inputs, before))
        fill(self.runner.model, "", self.merged, torch.float32, self.device)

    def _capture(self, address: BlockAddress, task: str, batch: Batch) -> BlockCall:
        state = self.states.deployed(task, batch.number)
        call = self.runner.capture(address, batch.inputs, state)
        self.states.remember(task, batch.number, address, state)
        return call

    def _load(self, address: BlockAddress, source: WeightSource) -> nn.Module:
        block = copy.deepcopy(self.runner.block(address))
        fill(block, address.name + ".", source, torch.float32, self.device)
        return block

    def _block(self, address: BlockAddress) -> None:
        started = time.perf_counter()
        block = self._load(address, self.merged)
        outcomes: Deployed = {}
        if self.streams:
            steps = self._steps(address, block)
            changing = [name for step in steps for name in ([step] if isinstance(step, str) else step.linears)]
            store = OutputStore(block, changing, self.around.reuse_bytes)
            if self.uses_features:
                self._inside_experts(address, block, steps)
            for step in steps:
                if isinstance(step, InputGroup):
                    outcomes.update(self._group(address, block, store, step))
                    store.settle(step.linears)
                    give_back_free_memory()
                else:
                    self._norm(address, block, store, step)
                    store.settle([step])
            self.states.forget_seen()
            if self.uses_features or address != self.runner.addresses[-1]:
                self._advance(address, block, store)
        else:
            for name, module in block.named_modules():
                if is_linear(module) and self.config.selects(f"{address.name}.{name}"):
                    outcomes.update(self._nearest(address, name, module))
        for name, module in block.named_modules():
            if is_linear(module) and name not in outcomes and self.config.selects(f"{address.name}.{name}"):
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
            told = self.world.from_main(None)
            return [step if isinstance(step, str) else InputGroup(tuple(step[0]), step[1]) for step in told]
        task, batch = self._any_batch()

        def call() -> BlockCall:
            # Captured anew for each run: a block may fill a cache it is given.
            return self._capture(address, task, batch)

        groups = input_groups(block, call(), lambda name: self.config.selects(f"{address.name}.{name}"))
        steps: list[InputGroup | str] = list(groups)
        if self.config.norm_refit and self.uses_features:
            first = {group.first: group for group in groups}
            norms = [name for name, module in block.named_modules() if is_norm(module)]
            steps = [first.get(name, name) for name in running_order(block, call(), norms + list(first))]
        self.world.from_main([s if isinstance(s, str) else [list(s.linears), s.sequence] for s in steps])
        return steps

    def _inside_experts(self, address: BlockAddress, block: nn.Module, steps: list[InputGroup | str]) -> None:
        """One run of each expert's block: what its groups read (or give) and its norms give, per batch."""
        read: list[str] = []
        given: list[str] = []
        for step in steps:
            if isinstance(step, str):
                given.append(step)
            elif narrows(block, step):
                given += step.linears
            else:
                read.append(step.first)
        for task, batches in self.streams.items():
            if not batches:
                continue
            expert_block = self._load(address, self.experts[task])
            for batch in batches:
                inside = self.states.inside(task, batch.number)
                call = self.runner.capture(address, batch.inputs, StreamState(inside.outputs))
                output, seen = run_inside(expert_block, inside.within(call), read, given)
                self.states.go_inside(task, batch.number, inside, address.list_name, output)
                self.states.keep_seen(task, batch.number, seen)

    def _group(self, address: BlockAddress, block: nn.Module, store: OutputStore, group: InputGroup) -> Deployed:
        started = time.perf_counter()
        config = self.config
        where = f"{address.name}.{group.first}"
        linears = [block.get_submodule(name) for name in group.linears]
        merged = stacked(linears)
        anchor = self._anchor(address, group, linears, merged)
        rows, columns = merged.weight.shape
        pieces = parted(group, linears, lambda name: config.override_of(f"{address.name}.{name}"))
        # Rows are independent once the sums over all processes' inputs are known: each process takes some of them, but
        # where linears differ in their settings all of them.
        own = self.world.rows(rows) if len(pieces) == 1 else slice(0, rows)
        own_anchor, own_merged = anchor.of_rows(own), merged.of_rows(own)
        count = len(own_anchor.bias)
        problem, plain = self._empty(count, columns), self._empty(0, columns)
        samples: dict[str, Sample] = {}
        automatic = config.method == "epmq" and config.anchor == "auto"
        split = (problem, problem)
        if automatic:
            split = (self._empty(count, columns), self._empty(count, columns))
        for place, task in enumerate(self.streams):
            expert = merged
            if self.experts:
                expert = read_stack(self.experts[task], address, group, linears, self.device)
            fitted, held = self._task_statistics(task, address, block, store, group, expert, automatic)
            own_expert = expert.of_rows(own)
            if held is not None:
                for part, into in zip((fitted, held), split, strict=True):
                    part = part.of_rows(own)
                    into.fold(part, own_expert, own_anchor, config.alpha, config.task_weights, config.gamma)
                fitted.join(held)
            if config.needs_experts:
                part = fitted.of_rows(own)
                problem.fold(part, own_expert, own_anchor, config.alpha, config.task_weights, config.gamma)
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
        stored = stored_scale_dtype(config, self.merged, where)
        result: Deployed = {}
        for piece in pieces:
            settings = config.of(piece.pattern)
            its_problem = problem.of_rows(piece.rows)
            its_inputs = its_problem if inputs is problem else inputs
            its_anchor, its_merged = own_anchor.of_rows(piece.rows), own_merged.of_rows(piece.rows)
            outcome = quantize_group(its_problem, its_inputs, its_anchor, strength, settings, refit, stored, where)
            outcome = outcome.whole(own, rows, self.world)
            if not (all_finite(outcome.weight) and all_finite(outcome.bias)):
                raise NumericalError(f"{where}: the quantized weights are not finite.")
            gptq = self._plain_gptq(its_inputs, its_merged, settings, stored, where)
            result.update(deploy(piece.group, piece.linears, outcome))
            compared = {"merged": merged.of_rows(piece.rows)}
            if gptq is not None:
                compared["gptq"] = Expert(gptq.whole(own, rows, self.world).weight, compared["merged"].bias)
            compared[config.method] = Expert(outcome.weight, outcome.bias)
            seen = {task: Sample(sample.x, sample.y[:, piece.rows]) for task, sample in samples.items()}
            seconds = (time.perf_counter() - started) * len(outcome.weight) / rows
            told = layer_rows(address, piece.group, piece.linears, outcome, compared, seen, seconds)
            self.layers += joined(self.world.gather(told), self.streams)
            self.matched.add(piece.pattern)
        return result

    def _task_statistics(
        self,
        task: str,
        address: BlockAddress,
        block: nn.Module,
        store: OutputStore,
        group: InputGroup,
        expert: Expert,
        automatic: bool,
    ) -> tuple[TaskStatistics, TaskStatistics | None]:
        """Statistics of all processes' batches of a task, fitted and, for ``automatic``, held out."""
        outputs_of, columns = expert.weight.shape
        of_outputs = narrows(block, group)
        targets = None
        if self.uses_features and self.config.alpha > 0:
            targets = outputs_of if of_outputs else columns
        fitted = TaskStatistics(columns, targets, of_outputs, device=self.device, exact=True)
        held = TaskStatistics(columns, targets, of_outputs, device=self.device, exact=True) if automatic else None
        sample = max(1, SAMPLE_ROWS // self._batches[task])
        for batch in self.streams[task]:
            call = self._capture(address, task, batch)
            with store.active((task, batch.number)):
                x = input_of(block, call, group.first)
            rows, weights, matched = rows_of(x, batch.weights_of(self.sequence if group.sequence is None else None))
            if not matched:
                self.notes.append(f"{address.name}.{group.first}: reads no row per position; all its rows count alike.")
            target = None
            if targets is not None:
                names = group.linears if of_outputs else (group.first,)
                parts = [self.states.seen(task, batch.number, name) for name in names]
                inside = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
                target = inside.reshape(-1, inside.shape[-1])
                target = target - expert.bias if of_outputs else target
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

    def _anchor(self, address: BlockAddress, group: InputGroup, linears: list[Any], merged: Expert) -> Expert:
        rho = self.config.rho
        if rho == 1.0 or not self.config.needs_experts:
            return merged
        assert self.base is not None
        base = read_stack(self.base, address, group, linears, self.device)
        return Expert(torch.lerp(base.weight, merged.weight, rho), merged.bias)

    def _plain_gptq(
        self, inputs: Folded, merged: Expert, config: QuantConfig, stored: torch.dtype, where: str
    ) -> GroupOutcome | None:
        if not config.diagnostics or config.bits is None or config.method == "gptq":
            return None
        plain = config.model_copy(update={"method": "gptq", "damp": None, "gamma": 1.0})
        return quantize_group(inputs, inputs, merged, 0.0, plain, False, stored, where)

    def _nearest(self, address: BlockAddress, name: str, linear: nn.Module) -> Deployed:
        where = f"{address.name}.{name}"
        merged = stacked([linear])
        empty = self._empty(0, merged.weight.shape[1])
        pattern = self.config.override_of(where)
        self.matched.add(pattern)
        stored = stored_scale_dtype(self.config, self.merged, where)
        outcome = quantize_group(empty, empty, merged, 0.0, self.config.of(pattern), False, stored, where)
        return deploy(InputGroup((name,)), [linear], outcome)

    def _norm(self, address: BlockAddress, block: nn.Module, store: OutputStore, name: str) -> None:
        norm = block.get_submodule(name)
        weight: Tensor = norm.weight  # type: ignore[assignment]
        moments = NormStatistics(weight.shape[0], self.device)
        for task, batches in self.streams.items():
            own = NormStatistics(weight.shape[0], self.device)
            for batch in batches:
                call = self._capture(address, task, batch)
                seen: Seen = {}
                with store.active((task, batch.number)), outputs(block, [name], seen):
                    call.run(block)
                z, weights, _ = rows_of(seen[name], batch.weights_of(self.sequence))
                y, _, _ = rows_of(self.states.seen(task, batch.number, name), None)
                own.add(z, y, z.new_ones(len(z)) if weights is None else weights)
            own.over(self.world)
            moments.fold(own)
        correct(norm, *moments.correction(getattr(norm, "bias", None) is not None))

    def _advance(self, address: BlockAddress, block: nn.Module, store: OutputStore) -> None:
        """Run the finished block: its outputs are what the next one is calibrated on."""
        for task, batches in self.streams.items():
            for batch in batches:
                call = self._capture(address, task, batch)
                with store.active((task, batch.number)):
                    output = call.run(block)
                if not all_finite(hidden_of(output)):
                    raise NumericalError(f"{address.name}: its output is NaN or Inf on inputs of task {task!r}.")
                self.states.advance(task, batch.number, address.list_name, output)

    def _hidden_errors(self, address: BlockAddress) -> dict[str, float]:
        sums = torch.zeros(len(self.streams), 2, dtype=torch.float64)
        for place, (task, batches) in enumerate(self.streams.items()):
            for batch in batches:
                hidden = self.states.inside(task, batch.number).hidden
                inside, weights, _ = rows_of(hidden, batch.weights_of(self.sequence))
                outputs_now = self.states.deployed(task, batch.number).outputs
                ours = hidden_of(outputs_now[address.list_name]).reshape(inside.shape)
                r = inside.new_ones(len(inside)) if weights is None else weights
                sums[place, 0] += float((r.unsqueeze(1) * (ours - inside).square()).sum())
                sums[place, 1] += float((r.unsqueeze(1) * inside.square()).sum())
        self.world.add_up([sums])
        return {
            task: float(error / energy.clamp_min(1e-30))
            for task, (error, energy) in zip(self.streams, sums, strict=True)
        }

    def _empty(self, rows: int, columns: int) -> Folded:
        return Folded.empty(rows, columns, device=self.device)
