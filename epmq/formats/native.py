"""The native checkpoint: safetensors shards with an index, and ``epmq.json``, which says what each tensor is.

A quantized linear ``m`` is stored as ``m.packed`` (int32, :mod:`epmq.quantized`), ``m.scales`` and, when asymmetric,
``m.zeros`` (uint8); every other tensor under its own name. The writer streams: tensors go to a shard as they come.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from epmq import files
from epmq.errors import FormatError, SourceError
from epmq.formats.shards import DEFAULT_SHARD_BYTES, ShardWriter
from epmq.linear import QuantLinear, set_submodule
from epmq.orientation import features_of
from epmq.quantized import SUPPORTED_BITS, QuantizedTensor, group_count, pack, packed_words
from epmq.sources import FileSource

FORMAT = "epmq-native"
VERSION = 1
MANIFEST_NAME = "epmq.json"
SCALE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class LinearFacts:
    """What the manifest says about one quantized linear."""

    in_features: int
    out_features: int
    bits: int
    group_size: int
    sym: bool
    bias: bool


class NativeWriter:
    """Streams a quantized model into a folder (usually a temporary one, see :func:`epmq.files.new_folder`)."""

    def __init__(self, folder: Path, shard_bytes: int = DEFAULT_SHARD_BYTES):
        self.folder = folder
        self.shards = ShardWriter(folder, shard_bytes)
        self._linears: dict[str, dict[str, Any]] = {}

    def linear(self, name: str, tensor: QuantizedTensor, bias: Tensor | None) -> None:
        """Store linear ``name`` as codes, scales, zeros and bias."""
        self.shards.add(f"{name}.packed", pack(tensor.codes, tensor.bits))
        self.shards.add(f"{name}.scales", tensor.scales)
        if tensor.zeros is not None:
            self.shards.add(f"{name}.zeros", tensor.zeros)
        if bias is not None:
            self.shards.add(f"{name}.bias", bias)
        rows, columns = tensor.shape
        facts = LinearFacts(columns, rows, tensor.bits, tensor.group_size, tensor.symmetric, bias is not None)
        self._linears[name] = vars(facts)

    def tensor(self, name: str, tensor: Tensor) -> None:
        """Store a tensor as it is."""
        self.shards.add(name, tensor)

    def finish(self, about: dict[str, Any]) -> None:
        """Write the last shard, the index and the manifest; ``about`` is any JSON the reader should get back."""
        names = self.shards.finish()
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "linears": self._linears,
            "sha256": {name: _digest(self.folder / name) for name in names},
            **about,
        }
        files.write_text(self.folder / MANIFEST_NAME, json.dumps(manifest, indent=1))


class NativeReader:
    """A native checkpoint folder, checked: manifest, checksums of all shards, names and shapes.

    Raises FormatError naming the file when the folder is foreign, truncated or altered.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        path = self.folder / MANIFEST_NAME
        if not self.folder.is_dir():
            raise FormatError(f"{folder}: there is no such folder.")
        if not path.is_file():
            raise FormatError(f"{folder}: not an epmq checkpoint, {MANIFEST_NAME} is missing.")
        try:
            self.manifest: dict[str, Any] = json.loads(path.read_text())
            if self.manifest["format"] != FORMAT:
                raise FormatError(f"{path}: format {self.manifest['format']!r} is not {FORMAT!r}.")
            if self.manifest["version"] != VERSION:
                raise FormatError(
                    f"{path}: version {self.manifest['version']} is not {VERSION}; use the epmq that wrote it."
                )
            self.linears = {name: LinearFacts(**facts) for name, facts in self.manifest["linears"].items()}
            checksums: dict[str, str] = dict(self.manifest["sha256"])
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise FormatError(f"{path}: not a manifest this version can read ({error!r}).") from error
        for name, digest in checksums.items():
            if Path(name).name != name:
                raise FormatError(f"{path}: shard name {name!r} leaves the folder.")
            if not (self.folder / name).is_file():
                raise FormatError(f"{self.folder / name}: this shard is missing.")
            if _digest(self.folder / name) != digest:
                raise FormatError(f"{self.folder / name}: truncated or altered, its checksum is not the manifest's.")
        try:
            self.source = FileSource(self.folder)
        except SourceError as error:
            raise FormatError(str(error)) from error
        for file in self.source.files:
            if file.name not in checksums:
                raise FormatError(f"{path}: there is no checksum of {file.name}, which the index names.")
        self._check_linears(path)

    def _check_linears(self, path: Path) -> None:
        for name, facts in self.linears.items():
            sizes = (facts.in_features, facts.out_features, facts.group_size)
            if facts.bits not in SUPPORTED_BITS or not all(isinstance(size, int) for size in sizes):
                raise FormatError(f"{path}: linear {name!r} has {facts.bits!r} bits and sizes {sizes}.")
            if min(sizes[:2]) < 1 or (facts.group_size < 1 and facts.group_size != -1):
                raise FormatError(f"{path}: linear {name!r} has impossible sizes {sizes}.")
            groups = group_count(facts.in_features, facts.group_size)
            packed = (facts.out_features, packed_words(facts.in_features, facts.bits))
            self._check_tensor(f"{name}.packed", packed, (torch.int32,))
            self._check_tensor(f"{name}.scales", (facts.out_features, groups), SCALE_DTYPES)
            if not facts.sym:
                self._check_tensor(f"{name}.zeros", (facts.out_features, groups), (torch.uint8,))

    def _check_tensor(self, key: str, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]) -> None:
        try:
            found, dtype = self.source.shape(key), self.source.dtype(key)
        except SourceError as error:
            raise FormatError(str(error)) from error
        if found != shape:
            raise FormatError(f"{self.folder}: tensor {key!r} has shape {list(found)}, expected {list(shape)}.")
        if dtype not in dtypes:
            wanted = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
            raise FormatError(
                f"{self.folder}: tensor {key!r} has dtype {str(dtype).removeprefix('torch.')}, expected {wanted}."
            )

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """All tensors, one at a time."""
        for key in self.source.keys():
            yield key, self.source.tensor(key)

    def into(self, model: nn.Module) -> nn.Module:
        """Give ``model`` (of the original architecture, its weights may be meta) QuantLinears and all tensors."""
        for name, facts in self.linears.items():
            try:
                replaced = model.get_submodule(name)
            except AttributeError:
                raise FormatError(
                    f"{self.folder}: the model has no submodule {name!r}; load into the same class."
                ) from None
            size = features_of(replaced) or (None, None)
            if size != (facts.in_features, facts.out_features):
                raise FormatError(
                    f"{self.folder}: linear {name!r} is {facts.in_features} -> {facts.out_features} here but"
                    f" {size[0]} -> {size[1]} in the model."
                )
            layer = QuantLinear(
                facts.in_features, facts.out_features, facts.bias, facts.bits, facts.group_size, facts.sym, "meta"
            )
            set_submodule(model, name, layer.train(replaced.training))
        self._check_shapes(model)
        aliases: dict[int, list[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            aliases.setdefault(id(parameter), []).append(name)
        state = dict(self.tensors())
        missing, unexpected = model.load_state_dict(state, strict=False, assign=True)
        left = set(missing)
        for names in aliases.values():
            # Assigning loads a tied parameter under one of its names only.
            loaded = [name for name in names if name in state]
            if loaded:
                parameter = model.get_parameter(loaded[0])
                for name in left & set(names):
                    parent, _, leaf = name.rpartition(".")
                    model.get_submodule(parent).register_parameter(leaf, parameter)
                left -= set(names)
        if left:
            raise FormatError(f"{self.folder}: tensor {min(left)!r}, which the model needs, is not in the checkpoint.")
        if unexpected:
            raise FormatError(f"{self.folder}: tensor {unexpected[0]!r} has no place in the model.")
        return model

    def _check_shapes(self, model: nn.Module) -> None:
        present = set(self.source.keys())
        for name, tensor in model.state_dict().items():
            if name in present and self.source.shape(name) != tuple(tensor.shape):
                raise FormatError(
                    f"{self.folder}: tensor {name!r} has shape {list(self.source.shape(name))}, the model expects"
                    f" {list(tensor.shape)}."
                )


def write_model(writer: NativeWriter, model: nn.Module) -> None:
    """Store all of a model in memory: QuantLinears as codes, the rest as they are, tied tensors once."""
    seen: set[int] = set()
    quantized = {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}
    for name, layer in quantized.items():
        writer.linear(name, layer.quantized(), layer.bias)
    inner = {f"{name}.{part}" for name in quantized for part in ("packed", "scales", "zeros", "bias")}
    for key, tensor in model.state_dict().items():
        if key in inner or (tensor.numel() and tensor.data_ptr() in seen):
            continue
        seen.add(tensor.data_ptr())
        writer.tensor(key, tensor)


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as handle:
        while chunk := handle.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()
