"""The Python interface: quantize modules in memory, save and load the result."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from epmq import files
from epmq.config import QuantConfig
from epmq.console import progress_bar
from epmq.devices import compute_device, home_of
from epmq.errors import FormatError
from epmq.formats.native import NativeReader, NativeWriter, write_model
from epmq.formats.shards import DEFAULT_SHARD_BYTES
from epmq.pipeline import ModuleSink, run
from epmq.report import build_report, write_report
from epmq.skeleton import meta_copy
from epmq.sources import open_source, total_bytes


@dataclass
class QuantResult:
    """model: the quantized model, its linears QuantLinear. report: see docs/method.md, "The report"."""

    model: nn.Module
    report: dict[str, Any]


def quantize(
    model: nn.Module,
    experts: Mapping[str, Any] | None,
    calibration: Mapping[str, Iterable[Mapping[str, Any]]],
    config: QuantConfig | None = None,
    base: Any = None,
    device: str | torch.device | None = None,
) -> QuantResult:
    """Quantize a merged module towards its experts.

    model: the merged module (see :func:`epmq.merge`). experts: {task: module, state dict or checkpoint path}; may be
    None for methods ``gptq`` and ``rtn``. calibration: {task: iterable of keyword-argument dicts for the model's
    forward}, unlabelled; positions masked by ``attention_mask`` are left out. base: what the experts were tuned from,
    needed when ``config.rho`` is not 1. device: where blocks are computed, ``cpu``, ``cuda``, ``cuda:1`` or ``auto``
    (None: the model's own GPU, else the first one, else the CPU); weights come there block by block, the result is
    where ``model`` is. The inputs are left as they were.

    Raises CalibrationError, SourceError, ModelError, NumericalError or ConfigError, each naming what is at fault.
    """
    config = config or QuantConfig()
    started = time.perf_counter()
    merged = open_source(model, "merged model")
    expert_sources = {task: open_source(expert, f"expert {task!r}") for task, expert in (experts or {}).items()}
    base_source = None if base is None else open_source(base, "base")
    home = home_of(model)
    where = compute_device(device, home)
    skeleton = meta_copy(model)
    sink = ModuleSink(home)
    streams = {task: list(batches) for task, batches in calibration.items()}
    with progress_bar("quantizing") as progress:
        found = run(skeleton, merged, base_source, expert_sources, streams, config, sink, progress, where)
    result = sink.assemble(skeleton, merged).train(model.training)
    sizes = {"merged": total_bytes(merged), "quantized": state_bytes(result)}
    return QuantResult(result, build_report(found, config, time.perf_counter() - started, sizes))


def state_bytes(model: nn.Module) -> int:
    """Bytes of a model's state, tied tensors once."""
    seen = {tensor.data_ptr(): tensor.numel() * tensor.element_size() for tensor in model.state_dict().values()}
    return sum(seen.values())


def save(result: QuantResult | nn.Module, folder: str | Path, shard_bytes: int = DEFAULT_SHARD_BYTES) -> None:
    """Write a quantized model and its report to a new folder, whole or not at all.

    A transformers model's configuration is written beside, so that :func:`load` can build it again.
    """
    with files.new_folder(folder) as working:
        write_result(result, working, shard_bytes)


def write_result(result: QuantResult | nn.Module, folder: Path, shard_bytes: int = DEFAULT_SHARD_BYTES) -> None:
    """What :func:`save` writes, into a folder that is already a temporary one."""
    model = result.model if isinstance(result, QuantResult) else result
    folder.mkdir(exist_ok=True)
    writer = NativeWriter(folder, shard_bytes)
    write_model(writer, model)
    config: Any = getattr(model, "config", None)
    if hasattr(config, "save_pretrained"):
        config = copy.deepcopy(config)
        config.architectures = [type(model).__name__]
        config.save_pretrained(folder)
    writer.finish({"class": type(model).__name__})
    if isinstance(result, QuantResult):
        write_report(folder, result.report)


def load(folder: str | Path, model: nn.Module | None = None) -> nn.Module:
    """The quantized model of a folder, bit-identical to the one saved; its weights stay packed.

    model: an instance of the original class (its weights are replaced; it may live on the meta device). May be left out
    for transformers models, which are rebuilt from ``config.json``. Raises FormatError naming the file at fault.
    """
    reader = NativeReader(folder)
    if model is None:
        if not (Path(folder) / "config.json").is_file():
            raise FormatError(
                f"{folder}: holds no config.json of a transformers model; give an instance of"
                f" {reader.manifest.get('class', 'the original class')} as model=."
            )
        from epmq.huggingface import skeleton_from_folder

        model = skeleton_from_folder(folder, set(reader.source.keys()))
    return reader.into(model).eval()
