"""Weight sources: names, shapes and dtypes of a model's tensors, read one tensor at a time.

A source is a safetensors file, a folder of them (sharded or not), a module or a state dict in memory, or anything
else with the same four methods, such as :class:`epmq.merge.MergedSource`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from epmq import trust
from epmq.devices import cast_there
from epmq.errors import ChangedError, SourceError

SAFETENSORS_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip
HEADER_SIZE = 8  # bytes that tell the size of a safetensors header
INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


class WeightSource(Protocol):
    """What every room that reads weights knows about them."""

    @property
    def name(self) -> str:
        """How messages call this source: its path or a word."""
        ...

    def keys(self) -> list[str]:
        """Tensor names, in a fixed order."""
        ...

    def shape(self, key: str) -> tuple[int, ...]: ...

    def dtype(self, key: str) -> torch.dtype: ...

    def tensor(self, key: str) -> Tensor:
        """The tensor as stored. It may be the source's own: do not write to it."""
        ...


class FileSource:
    """A safetensors file, or a folder that holds ``model.safetensors`` or else shards with an index.

    Raises SourceError for a missing, truncated or contradictory file, naming it.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._file_of = self._find_files()
        self._shape: dict[str, tuple[int, ...]] = {}
        self._dtype: dict[str, torch.dtype] = {}
        self._start: dict[str, int] = {}  # bytes
        self._stamp = {file: _stamp(file) for file in self.files}
        for file in self.files:
            self._read_header(file)
        for key, file in self._file_of.items():
            if key not in self._shape:
                raise SourceError(f"{file}: the index promises tensor {key!r}, which the file does not hold.")

    @property
    def name(self) -> str:
        return str(self.path)

    @property
    def files(self) -> list[Path]:
        """The files that hold the tensors."""
        return sorted(set(self._file_of.values()))

    def keys(self) -> list[str]:
        return list(self._file_of)

    def __contains__(self, key: str) -> bool:
        return key in self._file_of

    def shape(self, key: str) -> tuple[int, ...]:
        self._must_have(key)
        return self._shape[key]

    def dtype(self, key: str) -> torch.dtype:
        self._must_have(key)
        return self._dtype[key]

    def tensor(self, key: str) -> Tensor:
        return self._read(key, 0, self.shape(key))

    def part(self, key: str, number: int, rows: slice) -> Tensor:
        """``tensor(key)[number, rows]`` of a tensor of two or three dimensions, of which no more is read. The rows lie
        together."""
        _, height, *width = self.shape(key)
        start, stop, _ = rows.indices(height)
        return self._read(key, (number * height + start) * math.prod(width), (stop - start, *width))

    def _read(self, key: str, first: int, shape: tuple[int, ...]) -> Tensor:
        """Entries in a row, from the ``first`` on. The library would read the header again for each tensor, whose time
        grows with their number, and count every page ever read as resident where a file is kept open."""
        file = self._file_of[key]
        self._must_be_the_same(file, key)
        tensor = torch.empty(shape, dtype=self._dtype[key], device="cpu")
        left: memoryview = tensor.view(-1).view(torch.uint8).numpy().data
        try:
            with file.open("rb", buffering=0) as handle:
                handle.seek(self._start[key] + first * tensor.element_size())
                while left.nbytes:  # a call reads 2 GiB at most
                    if not (count := handle.readinto(left)):
                        raise OSError("the file ends inside it")
                    left = left[count:]
        except OSError as error:
            raise SourceError(f"{file}: tensor {key!r} cannot be read ({error}).") from error
        self._must_be_the_same(file, key)
        return tensor

    def _must_be_the_same(self, file: Path, key: str) -> None:
        now = _stamp(file)
        if now is None:
            raise ChangedError(f"{file}: the file vanished before tensor {key!r} was read; put it back.")
        if now != self._stamp[file]:
            raise ChangedError(
                f"{file}: the file was changed before tensor {key!r} was read; begin anew with files at rest."
            )

    def _must_have(self, key: str) -> None:
        if key not in self._file_of:
            raise SourceError(f"{self.path}: there is no tensor {key!r}.")

    def _find_files(self) -> dict[str, Path]:
        if not trust.exists(self.path):
            raise SourceError(f"{self.path}: there is no such file or folder.")
        if not self.path.is_dir():
            return self._keys_of(self.path)
        # As transformers: an index beside a single file is left from an earlier save.
        single = self.path / SINGLE_NAME
        if trust.exists(single):
            return self._keys_of(single)
        index = self.path / INDEX_NAME
        if trust.exists(index):
            return self._read_index(index)
        if trust.is_file(self.path / ADAPTER_CONFIG):
            raise SourceError(f"{self.path}: is an adapter, not a whole checkpoint; it can only be used as an expert.")
        found = sorted(self.path.glob("*.safetensors"))
        if len(found) == 1:
            return self._keys_of(found[0])
        if pickled := sorted(path.name for pattern in PICKLES for path in self.path.glob(pattern)):
            raise SourceError(
                f"{self.path}: holds {pickled[0]} but no {SINGLE_NAME}, and pickles are not read; load it with"
                " transformers and save it again (save_pretrained), which writes safetensors."
            )
        raise SourceError(
            f"{self.path}: expected {SINGLE_NAME} or {INDEX_NAME} there, found {len(found)} other safetensors files."
        )

    def _read_index(self, index: Path) -> dict[str, Path]:
        kind = "a shard index with a weight_map"
        content = trust.read_json(index, SourceError, kind)
        weight_map = content.get("weight_map") if isinstance(content, dict) else None
        if not isinstance(weight_map, dict):
            raise SourceError(f"{index}: not {kind} of names and files.")
        for key, file in weight_map.items():
            if not isinstance(file, str):
                raise SourceError(f"{index}: tensor {key!r} is in {file!r}, which is no file name.")
        shards = {file: trust.shard_in(self.path, file, index, SourceError) for file in set(weight_map.values())}
        return {key: shards[file] for key, file in weight_map.items()}

    @staticmethod
    def _keys_of(file: Path) -> dict[str, Path]:
        trust.require_file(file, SourceError)
        try:
            with safe_open(file, framework="pt") as handle:
                return dict.fromkeys(handle.keys(), file)
        except (SafetensorError, OSError) as error:
            raise SourceError(f"{file}: not a complete safetensors file ({error}).") from error

    def _read_header(self, file: Path) -> None:
        try:
            with safe_open(file, framework="pt") as handle, file.open("rb") as raw:
                # The library has checked the header, but does not tell where tensors begin.
                size = int.from_bytes(raw.read(HEADER_SIZE), "little")
                header = json.loads(raw.read(size))
                for key in handle.keys():
                    if self._file_of.get(key) != file:
                        continue
                    self._start[key] = HEADER_SIZE + size + header[key]["data_offsets"][0]
                    view = handle.get_slice(key)
                    stored = view.get_dtype()
                    if stored not in SAFETENSORS_DTYPES:
                        raise SourceError(f"{file}: tensor {key!r} has dtype {stored}, which is not supported.")
                    shape = tuple(view.get_shape())
                    # The library holds the sizes against the file; a size of 0 would hide any other from that.
                    if math.prod(max(size, 1) for size in shape) > trust.INT64_MAX:
                        raise SourceError(f"{file}: tensor {key!r} has the impossible shape {list(shape)}.")
                    self._shape[key] = shape
                    self._dtype[key] = SAFETENSORS_DTYPES[stored]
        except (SafetensorError, OSError) as error:
            raise SourceError(f"{file}: not a complete safetensors file ({error}).") from error


class DictSource:
    """Tensors in memory under their names; ``tensor`` returns the stored tensor itself, so do not write to it."""

    def __init__(self, tensors: Mapping[str, Tensor], name: str = "state dict"):
        for key, tensor in tensors.items():
            if not isinstance(tensor, Tensor):
                raise SourceError(f"{name}: entry {key!r} is a {type(tensor).__name__}, expected a tensor.")
        self._tensors = {key: tensor.detach() for key, tensor in tensors.items()}
        self._name = name

    @property
    def name(self) -> str:
        return self._name

    def keys(self) -> list[str]:
        return list(self._tensors)

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self.tensor(key).shape)

    def dtype(self, key: str) -> torch.dtype:
        return self.tensor(key).dtype

    def tensor(self, key: str) -> Tensor:
        if key not in self._tensors:
            raise SourceError(f"{self._name}: there is no tensor {key!r}.")
        return self._tensors[key]


def open_source(what: Any, name: str | None = None) -> WeightSource:
    """A source from a path, a module, a state dict, or a source (returned as it is)."""
    if isinstance(what, (str, Path)):
        return FileSource(what)
    if isinstance(what, nn.Module):
        inner = unwrapped(what, name or "model")
        state = inner.state_dict()
        for key, tensor in state.items():
            if isinstance(tensor, Tensor) and tensor.is_meta:
                raise SourceError(
                    f"{name or type(inner).__name__}: tensor {key!r} is on the meta device, without values; load it"
                    " whole, not as a skeleton and not offloaded, or give the checkpoint's folder."
                )
        return DictSource(state, name or type(inner).__name__)
    if isinstance(what, Mapping):
        return DictSource(what, name or "state dict")
    if all(hasattr(what, method) for method in ("name", "keys", "shape", "dtype", "tensor")):
        source: WeightSource = what
        return source
    raise SourceError(f"{name or 'weights'}: expected a path, a module or a state dict, got {type(what).__name__}.")


def unwrapped(module: nn.Module, name: str) -> nn.Module:
    """The module that torch.compile, DataParallel or DistributedDataParallel was put around, else the module itself.

    Raises SourceError, calling it ``name``, for a module of peft, whose weights are not those that it computes with.
    """
    while True:
        if hasattr(module, "peft_config") and hasattr(module, "merge_and_unload"):
            raise SourceError(
                f"{name}: a {type(module).__name__} keeps its adapter beside the weights; give what its"
                " merge_and_unload() returns or, for an expert, the folder that its save_pretrained writes."
            )
        inner: Any = getattr(module, "_orig_mod", None)
        if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
            inner = module.module
        if not isinstance(inner, nn.Module):
            return module
        module = inner


def require_same_layout(reference: WeightSource, others: Mapping[str, WeightSource]) -> None:
    """Refuse experts whose tensor names or shapes differ from the base's.

    Raises SourceError naming the first tensor at fault and the source it comes from.
    """
    expected = set(reference.keys())
    for label, source in others.items():
        present, called = set(source.keys()), "base" if label == "base" else f"expert {label!r}"
        called = called if source.name == called else f"{called} ({source.name})"
        if missing := sorted(expected - present):
            raise SourceError(
                f"{called} lacks tensor {missing[0]!r}"
                f"{_and_more(missing)}, which {reference.name} has; give a base without, or an expert with it."
            )
        if extra := sorted(present - expected):
            raise SourceError(
                f"{called} has an extra tensor {extra[0]!r}{_and_more(extra)}, which {reference.name} lacks."
            )
        for key in reference.keys():
            if source.shape(key) != reference.shape(key):
                raise SourceError(
                    f"{called}: tensor {key!r} has shape {list(source.shape(key))},"
                    f" expected {list(reference.shape(key))} as in {reference.name}."
                )


def read_finite(source: WeightSource, key: str) -> Tensor:
    """The tensor, refused with SourceError when a float entry is NaN or Inf."""
    reader = FiniteReader(source)
    tensor = reader.read(key)
    reader.settle()
    return tensor


class FiniteReader:
    """Reads tensors of a source onto ``device`` (None: where they are) and refuses NaN and Inf in floats.

    On another device than the CPU what was found is waited for once, by :meth:`settle`: a wait for every tensor would
    keep the next from being read while this one is on its way.
    """

    def __init__(self, source: WeightSource, device: torch.device | None = None):
        self.source, self.device = source, device
        self._extremes: dict[str, tuple[Tensor, Tensor]] = {}

    def read(self, key: str) -> Tensor:
        """The tensor as stored. Raises SourceError, on the CPU, for one that is not finite."""
        tensor = cast_there(self.source.tensor(key), self.device, None)
        if tensor.is_floating_point() and tensor.numel():
            self._extremes[key] = torch.aminmax(tensor)
            if tensor.device.type == "cpu":
                self.settle()
        return tensor

    def settle(self) -> None:
        """Raise SourceError when one of the tensors that were read is not finite."""
        if not self._extremes:
            return
        keys, extremes = list(self._extremes), [torch.stack(pair) for pair in self._extremes.values()]
        self._extremes = {}
        for key, finite in zip(keys, torch.isfinite(torch.stack(extremes)).all(1).tolist(), strict=True):
            if not finite:
                raise SourceError(
                    f"{self.source.name}: tensor {key!r} holds NaN or Inf; repair or replace that checkpoint."
                )


def all_finite(tensor: Tensor) -> bool:
    """Whether no entry is NaN or Inf; one pass, without a mask of the tensor's size."""
    if tensor.numel() == 0:
        return True
    low, high = torch.aminmax(tensor)
    return bool(torch.isfinite(low) & torch.isfinite(high))


def total_bytes(source: WeightSource) -> int:
    """Size of all tensors of a source, in bytes."""
    return sum(math.prod(source.shape(key)) * source.dtype(key).itemsize for key in source.keys())


def iterate(source: WeightSource) -> Iterator[tuple[str, Tensor]]:
    """All tensors of a source in its order, one at a time, each checked for NaN and Inf."""
    for key in source.keys():
        yield key, read_finite(source, key)


def _stamp(file: Path) -> tuple[int, int, int] | None:
    """What tells a file from a later one of the same name; None where there is none."""
    try:
        status = file.stat()
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns


def _and_more(names: list[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""


def main_dtype(source: WeightSource) -> torch.dtype:
    """The floating-point dtype of most of a source's entries; float32 when it has none."""
    sizes: dict[torch.dtype, int] = {torch.float32: 0}
    for key in source.keys():
        if (dtype := source.dtype(key)).is_floating_point:
            sizes[dtype] = sizes.get(dtype, 0) + math.prod(source.shape(key))
    return max(sizes, key=lambda dtype: sizes[dtype])
