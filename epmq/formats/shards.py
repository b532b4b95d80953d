"""Streams tensors into safetensors shards with the index that the model hub's loaders know."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from epmq import files
from epmq.errors import FormatError
from epmq.sources import INDEX_NAME, SAFETENSORS_DTYPES, SINGLE_NAME

DEFAULT_SHARD_BYTES = 512 * 2**20
DTYPE_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
# Wide elements first, so that every tensor of a shard begins at a multiple of its element size.
WIDTHS = (8, 4, 2, 1)


class _Entry(NamedTuple):
    name: str
    dtype: torch.dtype
    shape: list[int]
    size: int


class ShardWriter:
    """Writes tensors of a model into a folder as they come; at most one tensor is held in memory.

    Bytes wait in one file per element width until a shard is full and its header can be written. The folder is usually
    a temporary one (:func:`epmq.files.new_folder`): shards get their final names in the end.
    """

    def __init__(self, folder: Path, shard_bytes: int = DEFAULT_SHARD_BYTES):
        self.folder = folder
        self.shard_bytes = shard_bytes
        self._waiting: dict[int, list[_Entry]] = {width: [] for width in WIDTHS}
        self._waiting_bytes = 0
        self._shard_of: dict[str, int] = {}
        self._shards = 0
        self.total_bytes = 0

    @property
    def names(self) -> list[str]:
        """Names of all tensors written so far."""
        return list(self._shard_of)

    def add(self, name: str, tensor: Tensor) -> None:
        """Store a tensor; raises FormatError when the name was used before or the dtype has no place in the format."""
        if name in self._shard_of:
            raise FormatError(f"tensor {name!r} is written twice.")
        if tensor.dtype not in DTYPE_NAMES:
            raise FormatError(f"tensor {name!r} has dtype {tensor.dtype}, which cannot be stored.")
        size, width = tensor.numel() * tensor.element_size(), tensor.element_size()
        if self._waiting_bytes and self._waiting_bytes + size > self.shard_bytes:
            self._flush()
        part = self.folder / _part(width)
        with files.naming_space(part, size, f"tensor {name!r}"), open(part, "ab") as handle:
            handle.write(stored_bytes(tensor))
        self._waiting[width].append(_Entry(name, tensor.dtype, list(tensor.shape), size))
        self._waiting_bytes += size
        self.total_bytes += size
        self._shard_of[name] = self._shards

    def finish(self) -> list[str]:
        """Write the last shard and the index; returns the shards' file names."""
        self._flush()
        names = [SINGLE_NAME]
        if self._shards > 1:
            names = [f"model-{i + 1:05d}-of-{self._shards:05d}.safetensors" for i in range(self._shards)]
        files.rename_within(self.folder, {_temporary(i): name for i, name in enumerate(names[: self._shards])})
        if self._shards > 1:
            weight_map = {name: names[i] for name, i in self._shard_of.items()}
            index = {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map}
            files.write_text(self.folder / INDEX_NAME, json.dumps(index, indent=1))
        return names[: self._shards]

    def _flush(self) -> None:
        if not any(self._waiting.values()):
            return
        path = self.folder / _temporary(self._shards)
        with files.naming_space(path, self._waiting_bytes), open(path, "wb") as shard:
            shard.write(_header([e for width in WIDTHS for e in self._waiting[width]], {"format": "pt"}))
            for width in WIDTHS:
                if self._waiting[width]:
                    with open(self.folder / _part(width), "rb") as part:
                        shutil.copyfileobj(part, shard)
                    (self.folder / _part(width)).unlink()
        self._waiting = {width: [] for width in WIDTHS}
        self._waiting_bytes = 0
        self._shards += 1


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write one safetensors file, whole or not at all; at most one tensor is copied at a time.

    Raises FormatError for a dtype that has no place in the format, OutputError when the file cannot be written.
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPE_NAMES:
            raise FormatError(f"tensor {name!r} has dtype {tensor.dtype}, which cannot be stored.")
    entries = [_Entry(name, t.dtype, list(t.shape), t.numel() * t.element_size()) for name, t in tensors.items()]
    entries.sort(key=lambda entry: -entry.dtype.itemsize)
    with files.written_whole(path, sum(entry.size for entry in entries)) as working, open(working, "wb") as handle:
        handle.write(_header(entries, metadata))
        for entry in entries:
            handle.write(stored_bytes(tensors[entry.name]))


def stored_bytes(tensor: Tensor) -> Any:
    """What a file holds of a tensor, without its header."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _header(entries: Iterable[_Entry], metadata: Mapping[str, str]) -> bytes:
    """Length and JSON header, filled with spaces so that the data begin at a multiple of 8 bytes."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    start = 0
    for entry in entries:
        header[entry.name] = {
            "dtype": DTYPE_NAMES[entry.dtype],
            "shape": entry.shape,
            "data_offsets": [start, start + entry.size],
        }
        start += entry.size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _temporary(index: int) -> str:
    return f"shard-{index:05d}.safetensors"


def _part(width: int) -> str:
    return f"waiting-{width}"
