"""The native checkpoint: safetensors shards with an index, and ``epmq.json``, which says what each tensor is.

A quantized linear ``m`` is stored as ``m.packed`` (int32, :mod:`epmq.quantized`), ``m.scales`` and, when asymmetric,
``m.zeros`` (uint8); every other tensor under its own name. Where groups are not of neighbouring columns, ``m.columns``
(int32) says which input column each code belongs to. The writer streams: tensors go to a shard as they come.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from epmq import files, trust
from epmq.errors import FormatError
from epmq.formats.packed import (
    PARTS,
    SCALE_DTYPES,
    LinearFacts,
    PackedReader,
    is_bits,
    is_group_size,
    open_shards,
)
from epmq.formats.shards import DEFAULT_SHARD_BYTES, ShardWriter
from epmq.quantized import QuantizedTensor, group_count, pack, packed_words

FORMAT = "epmq-native"
VERSION = 1
MANIFEST_NAME = "epmq.json"


class NativeWriter:
    """The writer of this format. It holds every quantized linear; ``about`` is any JSON the reader should get back."""

    def __init__(self, folder: Path, shard_bytes: int = DEFAULT_SHARD_BYTES, about: Mapping[str, Any] | None = None):
        self.folder = folder
        self.about = dict(about or {})
        self.shards = ShardWriter(folder, shard_bytes)
        self._linears: dict[str, dict[str, Any]] = {}

    def plan(self, linears: Mapping[str, QuantizedTensor]) -> None:
        """Nothing is refused."""

    def linear(self, name: str, tensor: QuantizedTensor, bias: Tensor | None) -> None:
        """Store linear ``name`` as codes, scales, zeros, column order and bias."""
        parts = {
            "packed": pack(tensor.codes, tensor.bits),
            "scales": tensor.scales,
            "zeros": tensor.zeros,
            "columns": tensor.columns,
            "bias": bias,
        }
        for part, value in parts.items():
            if value is not None:
                self.shards.add(f"{name}.{part}", value)
        rows, columns = tensor.shape
        facts = LinearFacts(columns, rows, tensor.bits, tensor.group_size, tensor.symmetric, bias is not None)
        self._linears[name] = {key: value for key, value in vars(facts).items() if key != "permuted"}
        if tensor.columns is not None:
            self._linears[name]["permuted"] = True

    def tensor(self, name: str, tensor: Tensor) -> None:
        """Store a tensor as it is."""
        self.shards.add(name, tensor)

    def finish(self) -> None:
        """Write the last shard, the index and the manifest."""
        names = self.shards.finish()
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "linears": self._linears,
            "sha256": {name: _digest(self.folder / name) for name in names},
            **self.about,
        }
        files.write_text(self.folder / MANIFEST_NAME, json.dumps(manifest, indent=1))

    def limits(self) -> list[str]:
        return ["Only epmq reads this folder: `epmq.load`, on any machine it runs on."]


class NativeReader(PackedReader):
    """A native checkpoint folder, checked: manifest, checksums of all shards, names and shapes.

    Raises FormatError naming the file when the folder is foreign, truncated or altered.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        path = self.folder / MANIFEST_NAME
        if not self.folder.is_dir():
            raise FormatError(f"{folder}: there is no such folder.")
        if not trust.exists(path):
            raise FormatError(f"{folder}: not an epmq checkpoint, {MANIFEST_NAME} is missing.")
        kind = "a manifest this version can read"
        self.manifest: dict[str, Any] = trust.read_json(path, FormatError, kind)
        try:
            if self.manifest["format"] != FORMAT:
                raise FormatError(f"{path}: format {self.manifest['format']!r} is not {FORMAT!r}.")
            if self.manifest["version"] != VERSION:
                raise FormatError(
                    f"{path}: version {self.manifest['version']} is not {VERSION}; use the epmq that wrote it."
                )
            self.linears = {name: LinearFacts(**facts) for name, facts in self.manifest["linears"].items()}
            checksums: dict[str, str] = dict(self.manifest["sha256"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise FormatError(f"{path}: not {kind} ({error!r}).") from error
        for name, digest in checksums.items():
            if _digest(trust.shard_in(self.folder, name, path, FormatError)) != digest:
                raise FormatError(f"{self.folder / name}: truncated or altered, its checksum is not the manifest's.")
        self.source = open_shards(self.folder)
        for file in self.source.files:
            if file.name not in checksums:
                raise FormatError(f"{path}: there is no checksum of {file.name}, which the index names.")
        self._check_linears(path)
        self.model_class = self.manifest.get("class")
        stored = {f"{name}.{part}" for name, facts in self.linears.items() for part in _stored_parts(facts)}
        self.plain = [key for key in self.source.keys() if key not in stored]

    def _check_linears(self, path: Path) -> None:
        for name, facts in self.linears.items():
            sizes = (facts.in_features, facts.out_features, facts.group_size)
            if not is_bits(facts.bits) or not all(isinstance(size, int) for size in sizes):
                raise FormatError(f"{path}: linear {name!r} has {facts.bits!r} bits and sizes {sizes}.")
            if not all(trust.is_whole(size, 1) for size in sizes[:2]) or not is_group_size(facts.group_size):
                raise FormatError(f"{path}: linear {name!r} has impossible sizes {sizes}.")
            switches = (facts.sym, facts.bias, facts.permuted)
            if not all(isinstance(switch, bool) for switch in switches):
                raise FormatError(f"{path}: linear {name!r} has sym, bias and permuted {switches}, not true or false.")
            groups = group_count(facts.in_features, facts.group_size)
            packed = (facts.out_features, packed_words(facts.in_features, facts.bits))
            self.check_tensor(f"{name}.packed", packed, (torch.int32,))
            self.check_tensor(f"{name}.scales", (facts.out_features, groups), SCALE_DTYPES)
            if not facts.sym:
                self.check_tensor(f"{name}.zeros", (facts.out_features, groups), (torch.uint8,))
            if facts.permuted:
                self.check_tensor(f"{name}.columns", (facts.in_features,), (torch.int32,))
                if not torch.equal(
                    self.source.tensor(f"{name}.columns").sort().values, torch.arange(facts.in_features)
                ):
                    raise FormatError(f"{self.folder}: tensor '{name}.columns' is no order of the columns.")

    def parts(self, name: str) -> dict[str, Tensor]:
        facts = self.linears[name]
        return {part: self.source.tensor(f"{name}.{part}") for part in _stored_parts(facts)}


def _stored_parts(facts: LinearFacts) -> list[str]:
    absent = {"zeros": facts.sym, "columns": not facts.permuted}
    return [part for part in PARTS if not absent.get(part, False)]


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as handle:
        while chunk := handle.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()
