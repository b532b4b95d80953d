"""A quantized folder's codes put into the GGUF file that llama.cpp's converter makes of it in 16 or 32 bits.

The converter knows names, order of rows and metadata of each architecture, and unpacks the codes; llama.cpp's own
rounding of its file would lose what GPTQ chose. Here each row of the file is looked up among the rows of the folder by
its very bits, wherever the converter has put it, and rows that are found become the codes they were made of.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from epmq import __version__, files, trust
from epmq.errors import ConfigError, FormatError, OutputError
from epmq.formats.gguf import BLOCK, BLOCK_BYTES, BlockType, block_type, blocks, has_scales
from epmq.formats.kinds import open_reader
from epmq.formats.packed import PackedReader
from epmq.quantized import QuantizedTensor, unpack

WIDE = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
EMBEDDINGS = ("token_embd.weight", "output.weight")
NAMED = 4  # of the matrices that stay wide
CHUNK = 2**24  # weights that are worked on at once


@dataclass
class Summary:
    """What became of the file: its tensors by block type, those that stay wide with the reason, the bytes of matrices
    that are of no quantized linear, such linears of the folder that are not in it, bytes before and after, and how far
    rounding scales moved a weight, in steps of the tensor's widest grid."""

    packed: dict[str, BlockType] = field(default_factory=dict)
    wide: dict[str, str] = field(default_factory=dict)
    others: dict[str, int] = field(default_factory=dict)
    absent: list[str] = field(default_factory=list)
    bytes_before: int = 0
    bytes_after: int = 0
    moved: float = 0.0

    def lines(self) -> list[str]:
        """For people."""
        kinds = ", ".join(f"{count} as {kind}" for kind, count in Counter(self.packed.values()).items())
        told = [
            f"tensors: {kinds}; {self.bytes_before / 2**20:.1f} MiB -> {self.bytes_after / 2**20:.1f} MiB",
            f"rounding scales to float16 moves a weight by at most {self.moved:.2g} of its tensor's widest step",
        ]
        for reason in dict.fromkeys(self.wide.values()):
            names = [name for name, why in self.wide.items() if why == reason]
            told.append(f"not packed, {reason}: {_listed(names)}")
        if self.others:
            names = sorted(self.others, key=lambda name: -self.others[name])
            size = sum(self.others.values()) / 2**20
            told.append(f"other matrices stay as they are, {size:.1f} MiB: {_listed(names)}")
        if self.absent:
            told.append(f"{len(self.absent)} of the folder's quantized linears are not in it, as {self.absent[0]}")
        return told


def _listed(names: list[str]) -> str:
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")


def gguf_file(folder: Path, wide: Path, out: Path, embeddings: BlockType | None = None) -> Summary:
    """Write ``wide``, which llama.cpp's converter made of ``folder``, to ``out`` with the folder's codes in it.

    embeddings: the type, such as ``Q8_0``, that embeddings and head are rounded to by ggml's own rule where they have
    no codes. Raises ConfigError where the package gguf is missing, FormatError for files that cannot be read or do not
    belong together, OutputError for ``out``.
    """
    files.check_file(out)
    if out.exists():
        raise OutputError(f"{out}: there is a file of that name; choose another or remove it.")
    reader, file = open_reader(folder), _Wide(wide)
    if not reader.linears:
        raise FormatError(f"{folder}: nothing in it is quantized; llama.cpp's converter makes all of its file.")
    summary = Summary(bytes_before=wide.stat().st_size)
    rows, places = _placed(reader, file, summary)
    if not places:
        raise FormatError(f"{wide}: {_reason(folder, file, summary)}")
    if embeddings:
        _choose_embeddings(file, summary, embeddings)
    told = {*summary.packed, *summary.wide}
    summary.others = {tensor.name: int(tensor.n_bytes) for tensor in file.matrices() if tensor.name not in told}
    size = _size(file, summary)
    files.check_space(out, size)
    with files.naming_space(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    with files.written_whole(out, size) as working:
        _write(file, working, summary, rows, places)
        summary.bytes_after = working.stat().st_size
    return summary


class _Wide:
    """A GGUF file of the usual byte order that is whole, as the package gguf reads it.

    tensors: its ReaderTensors. metadata: by key its value and types. Raises FormatError for others, ConfigError without
    the package.
    """

    def __init__(self, path: Path):
        try:
            from gguf import GGUFReader
        except ImportError as error:
            raise ConfigError("GGUF files need the package gguf, which is absent: pip install 'epmq[gguf]'.") from error
        trust.require_file(path, FormatError)
        try:
            file = GGUFReader(path)
            self.metadata = {name: (field.contents(), field.types) for name, field in file.fields.items()}
            if any(len(types) > 2 for _, types in self.metadata.values()):
                raise ValueError("arrays of arrays, which the package flattens")
            self.architecture = str(self.metadata["general.architecture"][0])
            parts = int(self.metadata.get("split.count", (1, []))[0])
        except (ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
            raise FormatError(f"{path}: no GGUF file, or not all of one; convert the folder again.") from error
        if parts > 1 or file.byte_order != "I":
            raise FormatError(
                f"{path}: a part of a file, which llama-gguf-split --merge joins, or in another byte order."
            )
        self.tensors: list[Any] = file.tensors
        self.data_offset, self.alignment = int(file.data_offset), int(file.alignment)

    def matrices(self) -> list[Any]:
        """Its tensors with rows of numbers."""
        return [t for t in self.tensors if t.tensor_type.name in WIDE and len(t.shape) > 1 and t.n_elements > 0]


# -- which tensor is made of which rows --------------------------------------------------------------------------------


class _Rows:
    """Where each row of a folder's quantized linears is found again by what it is in a wide type.

    kinds: names of the wide types. empty: which rows are zeros, and tell nothing of where they are from. Rows are told
    apart by 64 bits of BLAKE2: among ten million, one is taken for another with a chance of some millionths.
    widest, rounding: of each linear the largest scale, and the most that float16 changes one.
    """

    def __init__(self, reader: PackedReader, kinds: Iterable[str]):
        self.reader, self.names = reader, list(reader.linears)
        self.first = numpy.cumsum([0, *(reader.linears[name].out_features for name in self.names)])
        found: dict[str, list[Any]] = {kind: [] for kind in kinds}
        empty = []
        self.widest, self.rounding = numpy.zeros(len(self.names)), numpy.zeros(len(self.names))
        for number, name in enumerate(self.names):
            for part in self.sections(name, torch.arange(reader.linears[name].out_features)):
                weight = part.dequantize()
                empty.append(~weight.any(1).numpy())
                scales = part.scales.float()
                self.widest[number] = max(self.widest[number], scales.abs().max())
                self.rounding[number] = max(self.rounding[number], (scales.half().float() - scales).abs().max())
                for kind, digests in found.items():
                    digests.append(_digests(weight.to(WIDE[kind]).view(torch.uint8).numpy()))
        self.empty = numpy.concatenate(empty)
        self._sorted: dict[str, tuple[Any, Any]] = {}
        for kind, digests in found.items():
            whole = numpy.concatenate(digests)
            order = numpy.argsort(whole, kind="stable")
            self._sorted[kind] = whole[order], order

    def sections(self, name: str, rows: Tensor) -> Iterator[QuantizedTensor]:
        """The rows of a linear, some at a time."""
        facts, parts = self.reader.linears[name], self.reader.parts(name)
        for some in rows.split(max(1, CHUNK // facts.in_features)):
            zeros = parts["zeros"][some] if "zeros" in parts else None
            codes = unpack(parts["packed"][some], facts.bits, facts.in_features)
            yield QuantizedTensor(
                codes, parts["scales"][some], zeros, facts.bits, facts.group_size, parts.get("columns")
            )

    def find(self, kind: str, digests: Any) -> Any:
        """int64 ``[R]``: numbers of rows that are in ``kind`` the same as a tensor's; -1 for none. Of several that are
        alike, as rows of zeros are, it is one of the linear that has most of the tensor's other rows."""
        ordered, order = self._sorted[kind]
        places = numpy.minimum(numpy.searchsorted(ordered, digests), len(ordered) - 1)
        places = numpy.where(ordered[places] == digests, places, -1)
        found = numpy.where(places >= 0, order[places], -1)
        firsts, times = numpy.unique(places[places >= 0], return_counts=True)
        ends = numpy.searchsorted(ordered, ordered[firsts], side="right")
        alone = ends == firsts + 1
        counts = numpy.bincount(self.owners(order[firsts[alone]]), times[alone], len(self.names))
        for first, end in zip(firsts[~alone], ends[~alone], strict=True):
            same = order[first:end]
            found[places == first] = same[numpy.argmax(counts[self.owners(same)])]
        return found

    def owners(self, found: Any) -> Any:
        """Of rows by number the linear each is of, as a number."""
        return numpy.searchsorted(self.first, found, side="right") - 1

    def block_type(self, owners: Any) -> BlockType | str:
        """The type that holds rows of these linears, by number, and has their scales; or a clause that says why not."""
        found = block_type(self.reader.linears[self.names[owner]] for owner in owners)
        if found not in BLOCK_BYTES:
            return found
        if all(has_scales(self.widest[owner], self.rounding[owner], found) for owner in owners):
            return found
        return "its scales are too large or too small for float16"

    def unused(self, used: dict[str, list[Any]]) -> list[str]:
        """Linears with a row, not of zeros, that is not among those used, by wide type, nor the same as one of them."""
        there = self.empty.copy()
        for kind, numbers in used.items():
            ordered, order = self._sorted[kind]
            taken = numpy.isin(order, numpy.concatenate(numbers))
            there[order[numpy.isin(ordered, ordered[taken])]] = True
        pairs = zip(self.names, self.first, self.first[1:], strict=False)
        return [name for name, first, end in pairs if not there[first:end].all()]


def _digests(rows: Any) -> Any:
    """uint64 ``[R]`` of uint8 ``[R, B]``."""
    return numpy.frombuffer(b"".join(hashlib.blake2b(row, digest_size=8).digest() for row in rows), numpy.uint64)


def _placed(reader: PackedReader, file: _Wide, summary: Summary) -> tuple[_Rows, dict[str, Any]]:
    """For each tensor that can be packed the numbers of its rows; ``summary`` is told of it and of the others."""
    widths = {facts.in_features for facts in reader.linears.values()}
    sought = [tensor for tensor in file.matrices() if int(tensor.shape[0]) in widths]
    rows = _Rows(reader, dict.fromkeys(tensor.tensor_type.name for tensor in sought))
    places: dict[str, Any] = {}
    used: dict[str, list[Any]] = {}
    for tensor in sought:
        kind, width = tensor.tensor_type.name, int(tensor.shape[0])
        whole = tensor.data.view(numpy.uint8).reshape(tensor.n_elements // width, -1)
        digests = _digests(whole)
        found = rows.find(kind, digests)
        there, telling = found >= 0, digests != _digests(numpy.zeros((1, whole.shape[1]), numpy.uint8))
        # Few rows are alike by chance where weights were rounded on their way.
        if 2 * (there & telling).sum() < max(1, telling.sum()):
            continue
        some = found[there]
        used.setdefault(kind, []).append(some)
        told = rows.block_type(numpy.unique(rows.owners(some)))
        if not there.all():
            summary.wide[tensor.name] = f"{(~there).sum()} of its {len(there)} rows are not the folder's"
        elif told in BLOCK_BYTES:
            summary.packed[tensor.name], places[tensor.name] = told, found
        else:
            summary.wide[tensor.name] = told
    summary.absent = rows.unused(used)
    return rows, places


def _reason(folder: Path, file: _Wide, summary: Summary) -> str:
    """Why nothing of the file can be packed."""
    for name, reason in summary.wide.items():
        return f"none of its matrices can be packed, {name} because {reason}."
    kinds = {tensor.tensor_type.name for tensor in file.tensors if len(tensor.shape) > 1} - {*WIDE, "F64", "I32"}
    if kinds:
        return (
            f"it has matrices that are {', '.join(sorted(kinds))} already; give the file that the converter makes with"
            " --outtype f16, bf16 or f32."
        )
    return (
        f"it has no row of a quantized linear of {folder}; convert this very folder with --outtype f16, bf16 or f32, or"
        " what epmq.restore_linear makes of it in float32."
    )


def _choose_embeddings(file: _Wide, summary: Summary, kind: BlockType) -> None:
    """Have embeddings and head rounded to ``kind`` where they have no codes that can be stored."""
    for tensor in file.matrices():
        if tensor.name not in EMBEDDINGS or tensor.name in summary.packed:
            continue
        if int(tensor.shape[0]) % BLOCK:
            summary.wide[tensor.name] = f"its rows of {tensor.shape[0]} are no multiple of {BLOCK}"
        else:
            summary.packed[tensor.name] = kind
            summary.wide.pop(tensor.name, None)


# -- the file ----------------------------------------------------------------------------------------------------------


def _byte_shape(tensor: Any, kind: BlockType) -> tuple[int, ...]:
    """uint8 shape of a tensor in blocks; ggml tells the sizes of a tensor from the last to the first."""
    columns, *others = (int(size) for size in tensor.shape)
    return (*reversed(others), columns // BLOCK * BLOCK_BYTES[kind])


def _size(file: _Wide, summary: Summary) -> int:
    """About how many bytes the new file takes."""
    size = file.data_offset
    for tensor in file.tensors:
        kind = summary.packed.get(tensor.name)
        size += int(numpy.prod(_byte_shape(tensor, kind)) if kind else tensor.n_bytes)
    return size


def _write(file: _Wide, path: Path, summary: Summary, rows: _Rows, places: dict[str, Any]) -> None:
    from gguf import GGMLQuantizationType, GGUFWriter

    writer = GGUFWriter(path, file.architecture)
    writer.data_alignment = file.alignment
    _copy_metadata(file, writer, summary)
    for tensor in file.tensors:
        kind, shape = summary.packed.get(tensor.name), tensor.data.shape
        if kind is None:
            writer.add_tensor_info(tensor.name, shape, tensor.data.dtype, tensor.n_bytes, tensor.tensor_type)
        else:
            shape = _byte_shape(tensor, kind)
            size = int(numpy.prod(shape))
            writer.add_tensor_info(tensor.name, shape, numpy.dtype(numpy.uint8), size, GGMLQuantizationType[kind])
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        assert writer.fout is not None
        out = writer.fout[0]
        for tensor in file.tensors:
            data: Any = tensor.data
            if tensor.name in places:
                data, moved = _packed(rows, places[tensor.name], summary.packed[tensor.name])
                summary.moved = max(summary.moved, moved)
            elif tensor.name in summary.packed:
                data = _rounded(tensor, summary.packed[tensor.name])
            # The package's own way, numpy.tofile, tells neither why a disk took no more nor that it took not all.
            writer.write_padding(out, out.tell())
            out.write(memoryview(numpy.ascontiguousarray(data)).cast("B"))  # type: ignore[arg-type]
        writer.write_padding(out, out.tell())
    finally:
        writer.close()


def _copy_metadata(file: _Wide, writer: Any, summary: Summary) -> None:
    from gguf import GGML_QUANT_VERSION, GGUFValueType, Keys, LlamaFileType

    most = Counter(summary.packed.values()).most_common(1)[0][0]
    own = {Keys.General.FILE_TYPE, Keys.General.QUANTIZATION_VERSION, Keys.General.QUANTIZED_BY}
    for name, (value, types) in file.metadata.items():
        if name in own or name.startswith("GGUF.") or name == Keys.General.ARCHITECTURE:
            continue  # the writer's
        is_array = types[0] == GGUFValueType.ARRAY
        if is_array and not value:
            continue  # which the package writes in no file
        writer.add_key_value(name, value, types[0], sub_type=types[-1] if is_array else None)
    writer.add_file_type(LlamaFileType[f"MOSTLY_{most}"])
    writer.add_quantization_version(GGML_QUANT_VERSION)
    writer.add_quantized_by(f"epmq {__version__}")


def _packed(rows: _Rows, found: Any, kind: BlockType) -> tuple[Any, float]:
    """uint8 ``[R, bytes]`` of rows by number, and how far the type moves a weight of them."""
    owners, farthest = rows.owners(found), 0.0
    width = rows.reader.linears[rows.names[owners[0]]].in_features
    whole = numpy.empty((len(found), width // BLOCK * BLOCK_BYTES[kind]), numpy.uint8)
    for owner in numpy.unique(owners):
        name, places = rows.names[owner], numpy.flatnonzero(owners == owner)
        done = 0
        for part in rows.sections(name, torch.from_numpy(found[places] - rows.first[owner])):
            data, moved = blocks(part, kind)
            farthest = max(farthest, moved)
            whole[places[done : done + len(data)]] = data.numpy()
            done += len(data)
    return whole, farthest


def _rounded(tensor: Any, kind: BlockType) -> Any:
    """uint8 ``[R, bytes]``: a wide tensor, rounded as ggml does."""
    from gguf import GGMLQuantizationType, quants

    width = int(tensor.shape[0])
    some = tensor.data.reshape(tensor.n_elements // width, -1)
    parts = numpy.array_split(some, max(1, tensor.n_elements // CHUNK))
    wide = (quants.dequantize(part, tensor.tensor_type) for part in parts)
    return numpy.concatenate([quants.quantize(part, GGMLQuantizationType[kind]) for part in wide])
