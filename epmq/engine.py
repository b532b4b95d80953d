"""The whole way: walks the blocks of a model, gathers statistics, solves, rounds, and hands out finished tensors."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, Protocol

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
from epmq.diagnose import layer_rows
from epmq.errors import CalibrationError, ConfigError, NumericalError
from epmq.group import anchor_strength, quantize_group
from epmq.inside import Seen, outputs, run_inside
from epmq.memory import give_back_free_memory
from epmq.norms import NormStatistics, correct
from epmq.orientation import is_linear
from epmq.quantized import QuantizedTensor
from epmq.reuse import OutputStore
from epmq.skeleton import fill
from epmq.sources import WeightSource, all_finite, require_same_layout
from epmq.stacks import Deployed, deploy, parted, read_stack, stacked
from epmq.statistics import SAMPLE_ROWS, Expert, Folded, Sample, TaskStatistics
from epmq.streams import SEQUENCES, Batch, make_streams, rows_of, split_held

Progress = Callable[[str, int, int], None]


class Sink(Protocol):
    """Takes finished tensors of a block, each name once."""

    def linear(self, name: str, tensor: QuantizedTensor, bias: Tensor | None) -> None: ...

    def tensor(self, name: str, tensor: Tensor) -> None: ...


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
    ):
        self.device = device or torch.device("cpu")
        self.config, self.sink, self.progress = config, sink, progress
        self.merged, self.base, self.experts = merged, base, dict(experts)
        self.streams = make_streams(calibration, self.device) if calibration or config.method != "rtn" else {}
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
        self.store = OutputStore()
        self.sequence: str | None = None
        self.matched: set[str | None] = set()

    @torch.no_grad()
    def run(self) -> dict[str, Any]:
        """Quantize block after block; returns the report's ``layers``, ``blocks`` and ``notes``."""
        fill(self.runner.model, "", self.merged, torch.float32, self.device)
        if self.streams:
            for address in self.runner.follow(next(iter(self.streams.values()))[0].inputs):
                self.notes.append(f"{address.name}: not called on the calibration inputs; left unquantized.")
        total = len(self.runner.addresses)
        current_list: str | None = None
        for number, address in enumerate(self.runner.addresses):
            self.progress(address.name, number, total)
            if address.list_name != current_list:
                current_list = address.list_name
                self.sequence = self._sequence(address)
                if self.uses_features:
                    self._start_expert_streams(address)
            self._block(address)
            give_back_free_memory()
        self.progress("done", total, total)
        if not self.layers and self.streams:
            raise ConfigError("include and exclude leave no linear of any block to quantize; change them.")
        self.notes += [
            f"overrides: {pattern!r} is the first match of no quantized linear."
            for pattern in self.config.overrides
            if pattern not in self.matched
        ]
        return {"layers": self.layers, "blocks": self.block_rows, "notes": sorted(set(self.notes))}

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

    def _sequence(self, address: BlockAddress) -> str | None:
        """The input whose positions the blocks of a list work on; None where it is not one of the usual ones."""
        for batches in self.streams.values():
            given = [key for key in SEQUENCES if isinstance(batches[0].inputs.get(key), Tensor)]
            if len(given) < 2:
                return next(iter(given), None)
            reads = partial(self.runner.depends_on, address, batches[0].inputs, batches[0].deployed)
            return next(filter(reads, given), None)
        return None

    def _start_expert_streams(self, address: BlockAddress) -> None:
        """What every expert feeds to the first block of a list, made with the expert's own outer weights."""
        for task, batches in self.streams.items():
            fill(self.runner.model, "", self.experts[task], torch.float32, self.device)
            for batch in batches:
                # A state of its own: these arguments are made with the expert's outer weights.
                call = self.runner.capture(address, batch.inputs, StreamState(batch.expert.outputs))
                batch.expert_hidden, batch.expert_sequences = call.hidden, call.sequences()
        fill(self.runner.model, "", self.merged, torch.float32, self.device)

    def _load(self, address: BlockAddress, source: WeightSource) -> nn.Module:
        block = copy.deepcopy(self.runner.block(address))
        fill(block, address.name + ".", source, torch.float32, self.device)
        return block

    def _block(self, address: BlockAddress) -> None:
        started = time.perf_counter()
        self.store = OutputStore()
        block = self._load(address, self.merged)
        outcomes: Deployed = {}
        if self.streams:
            steps = self._steps(address, block)
            captures = self._inside_experts(address, block, steps) if self.uses_features else {}
            for step in steps:
                if isinstance(step, InputGroup):
                    outcomes.update(self._group(address, block, step, captures))
                    self.store.final += step.linears
                else:
                    self._norm(address, block, step, captures)
            self._advance(address, block)
        else:
            for name, module in block.named_modules():
                if is_linear(module) and self.config.selects(f"{address.name}.{name}"):
                    outcomes.update(self._nearest(address, name, module))
        for name, module in block.named_modules():
            if is_linear(module) and name not in outcomes and self.config.selects(f"{address.name}.{name}"):
                self.notes.append(f"{address.name}.{name}: not reached on the calibration inputs; left unquantized.")
        self._hand_out(address, block, outcomes)
        self.block_rows.append(
            {
                "block": address.name,
                "seconds": round(time.perf_counter() - started, 3),
                "hidden_error": self._hidden_errors(address) if self.uses_features else {},
            }
        )

    def _steps(self, address: BlockAddress, block: nn.Module) -> list[InputGroup | str]:
        """Groups of linears and, when they are refitted, norms, in the order the block runs them."""
        batch = next(iter(self.streams.values()))[0]

        def call() -> BlockCall:
            # Captured anew for each run: a block may fill a cache it is given.
            return self.runner.capture(address, batch.inputs, batch.deployed)

        groups = input_groups(block, call(), lambda name: self.config.selects(f"{address.name}.{name}"))
        if not self.config.norm_refit or not self.uses_features:
            return list(groups)
        first = {group.first: group for group in groups}
        norms = [name for name, module in block.named_modules() if is_norm(module)]
        return [first.get(name, name) for name in running_order(block, call(), norms + list(first))]

    def _inside_experts(
        self, address: BlockAddress, block: nn.Module, steps: list[InputGroup | str]
    ) -> dict[str, list[Seen]]:
        """One run of each expert's block: what its groups read (or give) and its norms give, per batch."""
        captures: dict[str, list[Seen]] = {}
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
            expert_block = self._load(address, self.experts[task])
            captures[task] = []
            for batch in batches:
                assert batch.expert_hidden is not None
                call = self.runner.capture(address, batch.inputs, batch.expert).with_hidden(batch.expert_hidden)
                output, seen = run_inside(expert_block, call.with_sequences(batch.expert_sequences), read, given)
                batch.expert.advance(address.list_name, output)
                batch.expert_hidden = hidden_of(output)
                captures[task].append(seen)
        return captures

    def _group(
        self, address: BlockAddress, block: nn.Module, group: InputGroup, captures: dict[str, list[Seen]]
    ) -> Deployed:
        started = time.perf_counter()
        config = self.config
        where = f"{address.name}.{group.first}"
        linears = [block.get_submodule(name) for name in group.linears]
        merged = stacked(linears)
        anchor = self._anchor(address, group, linears, merged)
        rows, columns = merged.weight.shape
        problem, plain = self._empty(rows, columns), self._empty(0, columns)
        samples: dict[str, Sample] = {}
        automatic = config.method == "epmq" and config.anchor == "auto"
        split = (problem, problem)
        if automatic:
            split = (self._empty(rows, columns), self._empty(rows, columns))
        for task, batches in self.streams.items():
            expert = merged
            if self.experts:
                expert = read_stack(self.experts[task], address, group, linears, self.device)
            fitted, held = self._task_statistics(task, batches, address, block, group, expert, captures, automatic)
            if held is not None:
                for part, into in zip((fitted, held), split, strict=True):
                    into.fold(part, expert, anchor, config.alpha, config.task_weights, config.gamma)
                fitted.join(held)
            if config.needs_experts:
                problem.fold(fitted, expert, anchor, config.alpha, config.task_weights, config.gamma)
            else:
                problem.fold_inputs(fitted, config.task_weights)
            if config.gamma != 1.0:
                plain.fold_inputs(fitted, config.task_weights)
            samples[task] = fitted.sampled(expert, config.alpha)
        refit = config.refits_bias and all(linear.bias is not None for linear in linears)
        if automatic and refit:
            split = (split[0].centred(), split[1].centred())
        strength = anchor_strength(config, *split)
        inputs = plain if config.gamma != 1.0 else problem
        stored = stored_scale_dtype(config, self.merged, f"{address.name}.{group.first}")
        result: Deployed = {}
        for piece in parted(group, linears, lambda name: config.override_of(f"{address.name}.{name}")):
            own = config.of(piece.pattern)
            its_problem = problem.of_rows(piece.rows)
            its_inputs = its_problem if inputs is problem else inputs
            its_merged, its_anchor = merged.of_rows(piece.rows), anchor.of_rows(piece.rows)
            outcome = quantize_group(its_problem, its_inputs, its_anchor, strength, own, refit, stored, where)
            if not (all_finite(outcome.weight) and all_finite(outcome.bias)):
                raise NumericalError(f"{where}: the quantized weights are not finite.")
            gptq = self._plain_gptq(its_inputs, its_merged, own, stored, where)
            result.update(deploy(piece.group, piece.linears, outcome))
            compared = {"merged": its_merged, "gptq": None if gptq is None else Expert(gptq, its_merged.bias)}
            compared[config.method] = Expert(outcome.weight, outcome.bias)
            seen = {task: Sample(sample.x, sample.y[:, piece.rows]) for task, sample in samples.items()}
            seconds = (time.perf_counter() - started) * len(outcome.weight) / rows
            self.layers += layer_rows(address, piece.group, piece.linears, outcome, compared, seen, seconds)
            self.matched.add(piece.pattern)
        return result

    def _task_statistics(
        self,
        task: str,
        batches: list[Batch],
        address: BlockAddress,
        block: nn.Module,
        group: InputGroup,
        expert: Expert,
        captures: dict[str, list[Seen]],
        automatic: bool,
    ) -> tuple[TaskStatistics, TaskStatistics | None]:
        outputs_of, columns = expert.weight.shape
        of_outputs = narrows(block, group)
        targets = None
        if self.uses_features and self.config.alpha > 0:
            targets = outputs_of if of_outputs else columns
        fitted = TaskStatistics(columns, targets, of_outputs, device=self.device)
        held = TaskStatistics(columns, targets, of_outputs, device=self.device) if automatic else None
        sample = max(1, SAMPLE_ROWS // len(batches))
        for number, batch in enumerate(batches):
            call = self.runner.capture(address, batch.inputs, batch.deployed)
            with self.store.active(block, (task, number)):
                x = input_of(block, call, group.first)
            rows, weights, matched = rows_of(x, batch.weights_of(self.sequence if group.sequence is None else None))
            if not matched:
                self.notes.append(f"{address.name}.{group.first}: reads no row per position; all its rows count alike.")
            target = None
            if targets is not None:
                seen = captures[task][number]
                inside = torch.cat([seen[name] for name in group.linears], -1) if of_outputs else seen[group.first]
                target = inside.reshape(-1, inside.shape[-1])
                target = target - expert.bias if of_outputs else target
            if held is None:
                fitted.add(rows, target, weights, sample)
            else:
                fit_weights, held_weights = split_held(rows, weights, x, batch)
                fitted.add(rows, target, fit_weights, sample)
                held.add(rows, target, held_weights)
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
    ) -> Tensor | None:
        if not config.diagnostics or config.bits is None or config.method == "gptq":
            return None
        plain = config.model_copy(update={"method": "gptq", "damp": None, "gamma": 1.0})
        return quantize_group(inputs, inputs, merged, 0.0, plain, False, stored, where).weight

    def _nearest(self, address: BlockAddress, name: str, linear: nn.Module) -> Deployed:
        group = InputGroup((name,))
        merged = stacked([linear])
        empty = self._empty(0, merged.weight.shape[1])
        stored = stored_scale_dtype(self.config, self.merged, f"{address.name}.{group.first}")
        pattern = self.config.override_of(f"{address.name}.{name}")
        self.matched.add(pattern)
        config = self.config.of(pattern)
        outcome = quantize_group(empty, empty, merged, 0.0, config, False, stored, f"{address.name}.{name}")
        return deploy(group, [linear], outcome)

    def _norm(self, address: BlockAddress, block: nn.Module, name: str, captures: dict[str, list[Seen]]) -> None:
        norm = block.get_submodule(name)
        weight: Tensor = norm.weight  # type: ignore[assignment]
        moments = NormStatistics(weight.shape[0], self.device)
        for task, batches in self.streams.items():
            own = NormStatistics(weight.shape[0], self.device)
            for number, batch in enumerate(batches):
                call = self.runner.capture(address, batch.inputs, batch.deployed)
                seen: Seen = {}
                with self.store.active(block, (task, number)), outputs(block, [name], seen):
                    call.run(block)
                z, weights, _ = rows_of(seen[name], batch.weights_of(self.sequence))
                y, _, _ = rows_of(captures[task][number][name], None)
                own.add(z, y, z.new_ones(len(z)) if weights is None else weights)
            moments.fold(own)
        correct(norm, *moments.correction(getattr(norm, "bias", None) is not None))

    def _advance(self, address: BlockAddress, block: nn.Module) -> None:
        """Run the finished block: its outputs are what the next one is calibrated on."""
        for task, batches in self.streams.items():
            for number, batch in enumerate(batches):
                call = self.runner.capture(address, batch.inputs, batch.deployed)
                with self.store.active(block, (task, number)):
                    output = call.run(block)
                if not all_finite(hidden_of(output)):
                    raise NumericalError(f"{address.name}: its output is NaN or Inf on inputs of task {task!r}.")
                batch.deployed.advance(address.list_name, output)

    def _hidden_errors(self, address: BlockAddress) -> dict[str, float]:
        errors = {}
        for task, batches in self.streams.items():
            error = energy = 0.0
            for batch in batches:
                assert batch.expert_hidden is not None
                inside, weights, _ = rows_of(batch.expert_hidden, batch.weights_of(self.sequence))
                ours = hidden_of(batch.deployed.outputs[address.list_name]).reshape(inside.shape)
                r = inside.new_ones(len(inside)) if weights is None else weights
                error += float((r.unsqueeze(1) * (ours - inside).square()).sum())
                energy += float((r.unsqueeze(1) * inside.square()).sum())
            errors[task] = error / max(energy, 1e-30)
        return errors

    def _empty(self, rows: int, columns: int) -> Folded:
        return Folded.empty(rows, columns, device=self.device)

    def _hand_out(
        self,
        address: BlockAddress,
        block: nn.Module,
        outcomes: Deployed,
    ) -> None:
        done: set[str] = set()
        for name, (quantized, bias) in outcomes.items():
            done.update((f"{name}.weight", f"{name}.bias"))
            key = f"{address.name}.{name}"
            stored = self.merged.dtype(f"{key}.weight")
            bias = None if bias is None else bias.to(stored)
            if quantized is not None:
                self.sink.linear(key, quantized, bias)
            else:
                self.sink.tensor(f"{key}.weight", block.get_parameter(f"{name}.weight").detach().to(stored))
                if bias is not None:
                    self.sink.tensor(f"{key}.bias", bias)
        for name, tensor in block.state_dict().items():
            if name not in done:
                key = f"{address.name}.{name}"
                self.sink.tensor(key, tensor.to(self.merged.dtype(key)))


def stored_scale_dtype(config: QuantConfig, merged: WeightSource, linear: str) -> torch.dtype:
    """The dtype of a linear's scales: the setting, or the weight's own (float32 for float64)."""
    if config.scale_dtype != "auto":
        dtype: torch.dtype = getattr(torch, config.scale_dtype)
        return dtype
    stored = merged.dtype(f"{linear}.weight")
    return torch.float32 if stored == torch.float64 else stored
