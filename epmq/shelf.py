"""Values made of tensors under names, kept in memory up to a budget and in files of a folder beyond it."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from epmq import files, trust
from epmq.devices import moved
from epmq.errors import FormatError
from epmq.formats.shards import DTYPE_NAMES, stored_bytes, write_tensors

# What torch's own allocator gives; a product may be summed in another order where its operands lie otherwise.
ALIGNMENT = 64


class Shelf:
    """Keeps nested tuples, lists and dicts of tensors and plain values.

    budget: bytes of tensors that may stay in memory, None for no limit. folder: where the rest goes; it must be given
    with a budget. device: whose memory that is; what comes back from a file comes there. First come, first in memory:
    what is put again keeps its right to the room it had.
    """

    def __init__(self, budget: int | None = None, folder: Path | None = None, device: torch.device | None = None):
        assert budget is None or folder is not None
        self.budget, self.folder, self.device = budget, folder, device or torch.device("cpu")
        self._values: dict[str, Any] = {}
        self._sizes: dict[str, int] = {}
        self._files: dict[str, Path] = {}
        self.in_memory = 0

    def put(self, key: str, value: Any) -> None:
        """Keep a value under a name, in place of what was there. Raises FormatError for what a file cannot hold."""
        self.drop(key)
        size = bytes_of(value)
        if self.reserve(key, size):
            self._values[key] = settled(value)
            return
        assert self.folder is not None
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{key}.safetensors"
        write_value(path, value)
        self._files[key] = path

    def reserve(self, key: str, size: int) -> bool:
        """Set room aside under a name, until it is dropped, for what is kept elsewhere; False where there is none."""
        self.drop(key)
        if self.budget is not None and self.in_memory + size > self.budget:
            return False
        self._sizes[key] = size
        self.in_memory += size
        return True

    def take(self, key: str, path: Path, fits: Callable[[Any], bool] = lambda value: True) -> None:
        """Keep what :meth:`export` left in a file; FormatError for a damaged one, and a value that does not fit."""
        value = read_value(path)
        if not fits(value):
            raise altered(path, "it holds something else")
        self.put(key, moved(value, self.device))

    def get(self, key: str) -> Any:
        """The value; KeyError when there is none. Tensors in memory are the kept ones: do not write to them."""
        if key in self._values:
            return self._values[key]
        return moved(read_value(self._files[key], own=True), self.device)

    def holds(self, key: str) -> bool:
        """Whether the value is in memory."""
        return key in self._values

    def part(self, key: str, name: str) -> Any:
        """One item of a value that is a dict; of a file only that item is read."""
        if key in self._values:
            return self._values[key][name]
        return moved(read_value(self._files[key], name, own=True), self.device)

    def export(self, key: str, path: Path) -> None:
        """Leave the value in a file that later changes of the shelf do not touch; replaces it if it is there."""
        if key in self._values:
            write_value(path, self._values[key])
        else:
            files.link(self._files[key], path)

    def drop(self, key: str) -> None:
        """Forget a value, if there is one."""
        self._values.pop(key, None)
        self.in_memory -= self._sizes.pop(key, 0)
        path = self._files.pop(key, None)
        if path is not None:
            os.unlink(path)


def bytes_of(value: Any) -> int:
    """Bytes of all tensors in a value."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, dict):
        return sum(bytes_of(item) for item in value.values())
    return sum(bytes_of(item) for item in value) if isinstance(value, (list, tuple)) else 0


def settled(value: Any) -> Any:
    """The value with every tensor contiguous and aligned, as it would come back from a file."""
    if isinstance(value, Tensor):
        value = value.detach()
        return value if value.is_contiguous() and value.data_ptr() % ALIGNMENT == 0 else value.contiguous().clone()
    if isinstance(value, dict):
        return {key: settled(item) for key, item in value.items()}
    return type(value)([settled(item) for item in value]) if type(value) in (list, tuple) else value


def write_value(path: Path, value: Any) -> None:
    """Write a value as a safetensors file whose metadata say how the tensors hang together, with checksums of both."""
    tensors: dict[str, Tensor] = {}

    def shape_of(item: Any) -> Any:
        if isinstance(item, Tensor):
            if item.dtype not in DTYPE_NAMES:
                raise FormatError(f"a tensor of dtype {item.dtype} cannot be kept in a file.")
            name = str(len(tensors))
            tensors[name] = item
            return {"tensor": name, "crc32": checksum(item)}
        if isinstance(item, dict) and all(isinstance(key, str) for key in item):
            return {"dict": {key: shape_of(inner) for key, inner in item.items()}}
        if type(item) in (list, tuple):
            return {type(item).__name__: [shape_of(inner) for inner in item]}
        if item is None or isinstance(item, (bool, int, float, str)):
            return {"plain": item}
        raise FormatError(f"a {type(item).__name__} cannot be kept in a file.")

    structure = json.dumps(shape_of(value))
    write_tensors(path, tensors, {"structure": structure, "crc32": str(zlib.crc32(structure.encode()))})


def read_value(path: Path, name: str | None = None, own: bool = False) -> Any:
    """What :func:`write_value` wrote, or one item of it when it is a dict. Raises FormatError naming the file.

    own: the file is of this process, which need not look for damage.
    """
    if not trust.exists(path):
        raise FormatError(f"{path}: this file is missing.")
    trust.require_file(path, FormatError)
    used: set[str] = set()
    try:
        with safe_open(path, framework="pt") as handle:
            metadata = handle.metadata()
            if not own and metadata["crc32"] != str(zlib.crc32(metadata["structure"].encode())):
                raise ValueError("the checksum of its structure is another")

            def build(item: dict[str, Any]) -> Any:
                if "tensor" in item:
                    # One place for each, or a small file could fill the memory.
                    if item["tensor"] in used:
                        raise ValueError(f"tensor {item['tensor']!r} stands in two places")
                    used.add(item["tensor"])
                    tensor: Tensor = handle.get_tensor(item["tensor"]).clone()
                    if not own and item["crc32"] != checksum(tensor):
                        raise ValueError(f"the checksum of tensor {item['tensor']!r} is another")
                    return tensor
                if "dict" in item:
                    return {key: build(inner) for key, inner in item["dict"].items()}
                if "plain" in item:
                    if isinstance(item["plain"], (dict, list)):
                        raise TypeError("a plain value is none")
                    return item["plain"]
                kind = tuple if "tuple" in item else list
                return kind(build(inner) for inner in item[kind.__name__])

            structure = trust.parse_json(metadata["structure"])
            return build(structure if name is None else structure["dict"][name])
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise altered(path, str(error)) from error


def checksum(tensor: Tensor) -> int:
    """CRC-32 of dtype, shape and content: it shows damage, and costs less than writing does."""
    return zlib.crc32(stored_bytes(tensor), zlib.crc32(f"{tensor.dtype} {list(tensor.shape)}".encode()))


def altered(path: Path, what: str) -> FormatError:
    """The refusal of a file that an earlier run left."""
    return FormatError(f"{path}: truncated or altered ({what}); remove that file to have its content computed again.")
