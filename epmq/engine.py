"""The whole way: quantizes a model block after block, group after group, and hands out finished tensors."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from epmq.blocks import linears_of
from epmq.calls import BlockAddress
from epmq.config import QuantConfig
from epmq.diagnose import joined, layer_rows, unlinear_share
from epmq.errors import CalibrationError, ConfigError
from epmq.gather import gather, gather_norm
from epmq.group import COARSE_NOTE, GroupOutcome, anchor_strength, quantize_group
from epmq.inputs import InputGroup
from epmq.memory import give_back_free_memory
from epmq.norms import correct
from epmq.orientation import is_linear
from epmq.progress import Sink
from epmq.settings import nearest
from epmq.sources import WeightSource, require_same_layout
from epmq.stacks import Deployed, deploy, hand_out, parted, stacked, stored_scale_dtype
from epmq.statistics import Expert, Folded, Sample
from epmq.streams import Batch, counted, make_streams
from epmq.surroundings import Surroundings
from epmq.visit import Visit
from epmq.walk import Walk

Progress = Callable[[str, int, int], None]


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
        around, device = around or Surroundings(), device or torch.device("cpu")
        self.world, self.stage = around.world, around.stage
        self.config, self.sink, self.progress = config, self.stage or sink, progress
        self.merged, self.base = merged, base
        streams = make_streams(calibration, device) if calibration or config.method != "rtn" else {}
        _check_tasks(config, streams, experts)
        if config.rho != 1.0 and base is None:
            raise ConfigError("rho: an anchor away from the merged weights needs the base model; give base.")
        require_same_layout(merged, dict(experts))
        if base is not None:
            require_same_layout(merged, {"base": base})
        self.counts = {task: counted(stream) for task, stream in streams.items()}
        self.walk = Walk(skeleton, merged, dict(experts), streams, config, around, device)
        self.layers: list[dict[str, Any]] = []
        self.block_rows: list[dict[str, Any]] = []
        self.notes: list[str] = []
        self.matched: set[str | None] = set()

    @torch.no_grad()
    def run(self) -> dict[str, Any]:
        """Quantize block after block; returns the report's ``layers``, ``blocks``, ``notes`` and ``calibration``."""
        blocks = {address.name: self.walk.runner.block(address) for address in self.walk.addresses}
        linears = linears_of(blocks)
        for address in self.walk.begin():
            self.notes.append(f"{address.name}: not called on the calibration inputs; left unquantized.")
        total = len(self.walk.addresses)
        self.notes += unlinear_share(blocks)
        start = self._take_up(total)
        for number, address in enumerate(self.walk.addresses[start:], start):
            self.progress(address.name, number, total)
            self.walk.enter(address)
            known = len(self.layers)
            self._block(address)
            self._commit(number, self.layers[known:], number + 1 == total)
        self.progress("done", total, total)
        if not self.layers and self.walk.streams:
            raise ConfigError("include and exclude leave no linear of any block to quantize; change them.")
        self.notes += self.config.unmatched(linears, self.matched)
        return {
            "layers": self.layers,
            "blocks": self.block_rows,
            "notes": sorted(set(self.notes)),
            "calibration": self.counts,
        }

    def restore(self) -> nn.Module:
        """Put the skeleton together again; the engine is of no use afterwards."""
        return self.walk.runner.restore()

    def _take_up(self, total: int) -> int:
        """What earlier starts of this run found; returns the number of blocks that are finished."""
        if self.stage is None:
            return 0
        for number, rows in enumerate(self.stage.take_up(self.walk.states, total)):
            self.layers += rows["layers"]
            self.block_rows.append(rows["block"])
            self.notes += rows["notes"]
            self.matched.update(rows["matched"])
            self.walk.stand_behind(self.walk.addresses[number], rows["sequence"])
        return self.stage.finished

    def _commit(self, number: int, layers: list[dict[str, Any]], last: bool) -> None:
        self.notes = sorted({note for notes in self.world.gather(sorted(set(self.notes))) for note in notes})
        if self.stage is not None:
            rows: dict[str, Any] = {"layers": layers, "block": self.block_rows[-1], "notes": self.notes}
            # What later blocks and the end of the run need of this one.
            rows |= {"matched": sorted(p for p in self.matched if p is not None), "sequence": self.walk.sequence}
            note = self.stage.commit(number, rows, self.walk.states, last)
            self.notes += [] if note is None else [note]

    def _block(self, address: BlockAddress) -> None:
        started = time.perf_counter()
        visit = Visit(self.walk, address)
        outcomes: Deployed = {}
        for step in visit.steps:
            if isinstance(step, InputGroup):
                outcomes.update(self._group(visit, step))
                visit.settle(step.linears)
                give_back_free_memory()
            else:
                norm, moments = visit.block.get_submodule(step), gather_norm(visit, step)
                if moments is not None:
                    correct(norm, *moments.correction(getattr(norm, "bias", None) is not None))
                visit.settle([step])
        if self.walk.streams:
            visit.leave()
        else:
            for name in visit.selected():
                outcomes.update(self._nearest(visit, name))
        self.notes += visit.notes
        for name in visit.selected():
            if name not in outcomes:
                # Loaders join the experts of a mixture, and so want all of them alike.
                where = visit.name_of(name)
                rounds = self.config.of(self.config.override_of(where)).bits is not None
                rounded = self._nearest(visit, name) if rounds and visit.is_expert(name) else {}
                outcomes.update(rounded)
                what = "rounded to nearest" if rounded else "left unquantized"
                self.notes.append(f"{where}: not reached on the calibration inputs; {what}.")
        for name, module in visit.block.named_modules():
            where = visit.name_of(name)
            if isinstance(module, nn.Linear) and not is_linear(module) and self.config.selects(where):
                self.notes.append(f"{where}: a {type(module).__name__} is more than a linear layer; left unquantized.")
        hand_out(self.sink, self.merged, address, visit.block, outcomes)
        self.block_rows.append(
            {
                "block": address.name,
                "seconds": round(time.perf_counter() - started, 3),
                "hidden_error": self.walk.hidden_errors(address) if self.walk.inside else {},
            }
        )

    def _group(self, visit: Visit, group: InputGroup) -> Deployed:
        started = time.perf_counter()
        config, where = self.config, visit.name_of(group.first)
        linears = visit.linears(group)
        merged = stacked(linears)
        anchor = self._anchor(visit, group, merged)
        rows = len(merged.weight)
        pieces = parted(group, linears, lambda name: config.override_of(visit.name_of(name)))
        # Rows are independent once the sums over all processes' inputs are known: each process takes some of them, but
        # where linears differ in their settings all of them.
        own = self.world.rows(rows) if len(pieces) == 1 else slice(0, rows)
        found = gather(visit, group, anchor, own)
        if found is None:
            return {}
        refit = config.refits_bias and all(linear.bias is not None for linear in linears)
        strength = self.world.from_main(anchor_strength(config, found.split, refit) if self.world.main else None)
        stored = stored_scale_dtype(config, self.merged, where)
        own_anchor, own_merged = anchor.of_rows(own), merged.of_rows(own)
        result: Deployed = {}
        for piece in pieces:
            settings = config.of(piece.pattern)
            problem, inputs = found.of_rows(piece.rows)
            its_anchor, its_merged = own_anchor.of_rows(piece.rows), own_merged.of_rows(piece.rows)
            outcome = quantize_group(problem, inputs, its_anchor, strength, settings, refit, stored, where)
            outcome = outcome.whole(own, rows, self.world)
            outcome.check(where)
            gptq = self._plain_gptq(inputs, its_merged, settings, stored, where)
            result.update(deploy(piece.group, piece.linears, outcome))
            compared = {"merged": merged.of_rows(piece.rows)}
            if gptq is not None:
                compared["gptq"] = Expert(gptq.whole(own, rows, self.world).weight, compared["merged"].bias)
            elif config.diagnostics and config.rounds and config.method != "gptq":
                # What plain GPTQ leaves of a linear that is not rounded, so that means are over the same linears.
                compared["gptq"] = compared["merged"]
            compared[config.method] = Expert(outcome.weight, outcome.bias)
            seen = {task: Sample(sample.x, sample.y[:, piece.rows]) for task, sample in found.samples.items()}
            seconds = (time.perf_counter() - started) * len(outcome.weight) / rows
            told = layer_rows(visit.address, piece.group, piece.linears, outcome, compared, seen, seconds)
            self.layers += joined(self.world.gather(told), self.walk.streams)
            self.matched.add(piece.pattern)
            self.notes += [COARSE_NOTE] if outcome.coarse else []
        return result

    def _anchor(self, visit: Visit, group: InputGroup, merged: Expert) -> Expert:
        rho = self.config.rho
        if rho == 1.0 or not self.config.needs_experts:
            return merged
        assert self.base is not None
        return Expert(torch.lerp(visit.read(self.base, group).weight, merged.weight, rho), merged.bias)

    def _plain_gptq(
        self, inputs: Folded, merged: Expert, config: QuantConfig, stored: torch.dtype, where: str
    ) -> GroupOutcome | None:
        if not config.diagnostics or config.bits is None or config.method == "gptq":
            return None
        plain = config.model_copy(update={"method": "gptq", "damp": None})
        return quantize_group(inputs, inputs, merged, 0.0, plain, False, stored, where)

    def _nearest(self, visit: Visit, name: str) -> Deployed:
        group, where = InputGroup((name,)), visit.name_of(name)
        linears = visit.linears(group)
        merged = stacked(linears)
        empty = Folded.empty(0, merged.weight.shape[1], device=self.walk.device)
        pattern = self.config.override_of(where)
        self.matched.add(pattern)
        stored = stored_scale_dtype(self.config, self.merged, where)
        settings = self.config.of(pattern).model_copy(update={"method": "rtn"})
        outcome = quantize_group(empty, empty, merged, 0.0, settings, False, stored, where)
        return deploy(group, linears, outcome)


def _check_tasks(config: QuantConfig, streams: Mapping[str, list[Batch]], experts: Mapping[str, WeightSource]) -> None:
    if config.needs_experts and not experts:
        raise CalibrationError(f"method {config.method!r} needs experts; give {{task: expert}}.")
    if not experts or not streams:
        return
    for task in streams:
        if task not in experts:
            hint = nearest(task, list(experts))
            raise CalibrationError(f"task {task!r} has calibration data but no expert of that name; {hint}")
    for task in experts:
        if task not in streams:
            raise CalibrationError(f"expert {task!r} has no calibration data under that task name.")
