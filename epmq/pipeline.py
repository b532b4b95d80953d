"""The stages of one quantization: closed form and rounding block by block; or closed form, distillation, rounding."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from epmq import extension, self_saving
from epmq.blocks import find_blocks
from epmq.calls import BlockAddress
from epmq.config import QuantConfig
from epmq.devices import place_buffers
from epmq.distill import distill
from epmq.engine import Engine
from epmq.linear import QuantLinear
from epmq.orientation import is_linear
from epmq.precision import Precision
from epmq.progress import Journal, Sink, Stage
from epmq.quantized import QuantizedTensor
from epmq.skeleton import fill, without_cache
from epmq.sources import DictSource, WeightSource
from epmq.streams import make_streams
from epmq.surroundings import Surroundings
from epmq.swap import set_submodule

Progress = Callable[[str, int, int], None]
Calibration = Mapping[str, Sequence[Mapping[str, Any]]]


class ModuleSink:
    """Builds the quantized model in memory, on the device ``home``."""

    def __init__(self, home: torch.device | None = None) -> None:
        self.home = home or torch.device("cpu")
        self.linears: dict[str, QuantLinear] = {}
        self.tensors: dict[str, Tensor] = {}

    def linear(self, name: str, tensor: QuantizedTensor, bias: Tensor | None) -> None:
        # Packed where the codes are: a GPU is faster at it, and less has to move.
        self.linears[name] = QuantLinear.from_quantized(tensor, bias).to(self.home)

    def tensor(self, name: str, tensor: Tensor) -> None:
        # What was not touched is still the source's own tensor.
        self.tensors[name] = tensor.to(self.home, copy=True)

    def assemble(self, model: nn.Module, source: WeightSource) -> nn.Module:
        """Fill ``model`` (its weights may be meta), in place; what was not handed out is read from ``source``."""
        for name, layer in self.linears.items():
            layer.stand_for(model.get_submodule(name), source.dtype(f"{name}.weight"))
            set_submodule(model, name, nn.Identity())
        fill(model, "", _Overlay(self.tensors, source), None, self.home)
        place_buffers(model, self.home)
        for name, layer in self.linears.items():
            set_submodule(model, name, layer)
        # Whoever replaces tensors in the model shall not hold the old ones as well.
        self.linears.clear()
        self.tensors.clear()
        self_saving.refuse(model, QuantLinear)
        return model


class _Overlay:
    """A source that answers from finished tensors first."""

    def __init__(self, tensors: Mapping[str, Tensor], below: WeightSource):
        self.tensors, self.below = tensors, below

    @property
    def name(self) -> str:
        return self.below.name

    def keys(self) -> list[str]:
        return list({*self.tensors, *self.below.keys()})

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self.tensors[key].shape) if key in self.tensors else self.below.shape(key)

    def dtype(self, key: str) -> torch.dtype:
        return self.tensors[key].dtype if key in self.tensors else self.below.dtype(key)

    def tensor(self, key: str) -> Tensor:
        return self.tensors[key] if key in self.tensors else self.below.tensor(key).clone()


def run(
    skeleton: nn.Module,
    merged: WeightSource,
    base: WeightSource | None,
    experts: Mapping[str, WeightSource],
    calibration: Calibration,
    config: QuantConfig,
    sink: Sink,
    progress: Progress,
    device: torch.device | None = None,
    around: Surroundings | None = None,
    journal: Journal | None = None,
) -> dict[str, Any]:
    """Quantize ``merged`` and hand finished block tensors to ``sink``; returns what the report is made of.

    skeleton: the model on the meta device; it is whole again afterwards. device: where blocks are computed (None: the
    CPU); weights come to it from their sources block by block, finished tensors are handed out there. It also holds the
    calibration inputs and hidden states. Without distillation, memory grows with one block; with it, the whole model
    and one expert are held in fp32. journal: keeps what is finished; ``sink`` gets all tensors of a walk over the
    blocks at its end, from the CPU.
    """
    device, around = device or torch.device("cpu"), around or Surroundings()
    absent = extension.notes(device)
    place_buffers(skeleton, device)
    if device.type == "cuda":
        torch.cuda.init()  # which the next call does not do by itself
        torch.cuda.reset_peak_memory_stats(device)
    # Tensors made in inference mode do not tell whether they have been written into.
    with torch.inference_mode(False), without_cache(skeleton):
        found = _stages(skeleton, merged, base, experts, calibration, config, sink, progress, device, around, journal)
    found["notes"] += absent
    found["device"] = str(device)
    if device.type == "cuda":
        found["device"] = f"{device} ({torch.cuda.get_device_name(device)})"
        found["peak_device_memory_bytes"] = torch.cuda.max_memory_allocated(device)
    return found


def _stages(
    skeleton: nn.Module,
    merged: WeightSource,
    base: WeightSource | None,
    experts: Mapping[str, WeightSource],
    calibration: Calibration,
    config: QuantConfig,
    sink: Sink,
    progress: Progress,
    device: torch.device,
    around: Surroundings,
    journal: Journal | None,
) -> dict[str, Any]:
    order: list[BlockAddress] = []

    def one_pass(
        name: str,
        merged: WeightSource,
        base: WeightSource | None,
        experts: Mapping[str, WeightSource],
        config: QuantConfig,
        sink: Sink,
    ) -> dict[str, Any]:
        stage = None if journal is None else Stage(journal, name)
        at = replace(around, stage=stage)
        engine = Engine(skeleton, merged, base, experts, calibration, config, sink, progress, device, at)
        try:
            found = engine.run()
        finally:
            engine.restore()
        order[:] = engine.walk.addresses
        if stage is not None:
            stage.replay(sink)
        return found

    if config.distill is None:
        return one_pass("rounding", merged, base, experts, config, sink)
    first = config.model_copy(update={"bits": None, "overrides": {}, "distill": None, "diagnostics": False})
    closed = ModuleSink(device)
    found = one_pass("closed", merged, base, experts, first, closed)
    model = closed.assemble(copy.deepcopy(skeleton), merged).float()
    del closed
    # The last that the forward calls, wherever they stand in the model.
    tuned = order[len(order) - max(1, round(config.distill.last_blocks * len(order))) :]

    def open_expert(task: str) -> nn.Module:
        expert = copy.deepcopy(skeleton)
        fill(expert, "", experts[task], torch.float32, device)
        return expert.float()

    stage = distill(
        model,
        [model.get_submodule(address.name) for address in tuned],
        open_expert,
        make_streams(calibration, device),
        config.distill,
        progress,
        around.world,
        None if journal is None else journal.distillation,
        [module for name, module in model.named_modules() if is_linear(module) and not config.selects(name)],
        Precision.of(config.forward_dtype, device).with_gradients(),
    )
    target = _Stored(DictSource(model.state_dict(), "distilled model"), merged)
    stages = {"closed_form": {"layers": found["layers"], "blocks": found["blocks"]}, "distill": stage}
    if not config.rounds:
        blocks = tuple(f"{address.name}." for address in find_blocks(model))
        for key in target.keys():
            if key.startswith(blocks):
                sink.tensor(key, target.tensor(key))
        return {**found, "stages": stages}
    last = config.model_copy(update={"rho": 1.0, "distill": None})
    same = dict.fromkeys(experts, target)
    return {**one_pass("rounding", target, None, same, last, sink), "stages": stages}


class _Stored:
    """Tensors of one source in the dtypes of another."""

    def __init__(self, values: WeightSource, dtypes: WeightSource):
        self.values, self.dtypes = values, dtypes

    @property
    def name(self) -> str:
        return self.values.name

    def keys(self) -> list[str]:
        return self.values.keys()

    def shape(self, key: str) -> tuple[int, ...]:
        return self.values.shape(key)

    def dtype(self, key: str) -> torch.dtype:
        return self.dtypes.dtype(key)

    def tensor(self, key: str) -> Tensor:
        return self.values.tensor(key).to(self.dtype(key))
