"""Which format a folder is in, and the writer of the one that is asked for."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import torch
from torch import nn

from epmq import trust
from epmq.config import Format
from epmq.errors import ConfigError, FormatError
from epmq.formats import compressed_tensors, gptq
from epmq.formats.compressed_tensors import CompressedTensorsReader, CompressedTensorsWriter
from epmq.formats.gptq import GPTQReader, GPTQWriter, gptq_settings
from epmq.formats.native import MANIFEST_NAME, NativeReader, NativeWriter
from epmq.formats.packed import CONFIG_NAME, PackedReader, Writer, read_config


def open_writer(format: Format, folder: Path, model: nn.Module, dtype: torch.dtype, shard_bytes: int) -> Writer:
    """A writer into ``folder``. model: an instance, for its class and linears. dtype: of what is not quantized."""
    if format == "native":
        return NativeWriter(folder, shard_bytes, {"class": type(model).__name__})
    if format == gptq.METHOD:
        return GPTQWriter(folder, model, shard_bytes)
    if format == compressed_tensors.METHOD:
        return CompressedTensorsWriter(folder, model, dtype, shard_bytes)
    raise ConfigError(f"format {format!r}: use one of {', '.join(get_args(Format))}.")


def format_of(folder: str | Path) -> Format | None:
    """The format of a quantized folder; None when it holds no quantized model that epmq knows."""
    folder = Path(folder)
    if trust.exists(folder / MANIFEST_NAME):
        return "native"
    if _method(folder) == compressed_tensors.METHOD:
        return "compressed-tensors"
    return "gptq" if gptq_settings(folder) is not None else None


def quantized_by(folder: str | Path) -> str | None:
    """What a folder's files say it was quantized by, also where epmq cannot read it; None for a plain checkpoint."""
    manifest = Path(folder) / MANIFEST_NAME
    try:
        if trust.exists(manifest):
            return "native" if read_config(manifest).get("linears") else None
        return format_of(folder) or _method(Path(folder)) or None
    except FormatError:
        return None


def open_reader(folder: str | Path) -> PackedReader:
    """A reader of the format that ``folder`` is in; raises FormatError when it is in none."""
    folder = Path(folder)
    if not folder.is_dir():
        told = "it is a file, and a folder is wanted" if trust.exists(folder) else "there is no such folder"
        raise FormatError(f"{folder}: {told}.")
    found = format_of(folder)
    if found is None:
        method = _method(folder)
        told = f", which says {method!r}" if method else ""
        raise FormatError(
            f"{folder}: no quantized checkpoint epmq knows; there is no {MANIFEST_NAME}, and no quantization_config of"
            f" compressed-tensors or gptq in {CONFIG_NAME}{told}."
        )
    readers: dict[str, type[PackedReader]] = {
        "native": NativeReader, "gptq": GPTQReader, "compressed-tensors": CompressedTensorsReader
    }  # fmt: skip
    return readers[found](folder)  # type: ignore[call-arg]


def _method(folder: Path) -> str:
    if not trust.exists(folder / CONFIG_NAME):
        return ""
    settings = read_config(folder / CONFIG_NAME).get("quantization_config")
    return str(settings.get("quant_method", "")) if isinstance(settings, dict) else ""
