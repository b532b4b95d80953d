"""GPTQ checkpoints of causal language models, as GPTQModel, AutoGPTQ, transformers and vLLM read them.

A quantized linear ``m`` is stored as ``m.qweight`` (int32 ``[K * bits / 32, N]``, our packed form transposed),
``m.qzeros`` (int32 ``[G, N * bits / 32]``, packed along the rows of the weight), ``m.scales`` ``[G, N]`` and
``m.g_idx`` (int32 ``[K]``, the group of each input column). Version 1 (``checkpoint_format: gptq``) stores zero points
less one, version 2 (``gptq_v2``) as they are.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from epmq import trust
from epmq.errors import FormatError, SourceError
from epmq.experts import SeparateExperts
from epmq.formats.packed import (
    CONFIG_NAME,
    SCALE_DTYPES,
    LinearFacts,
    PackedReader,
    extend_config,
    is_bits,
    is_causal_lm,
    is_group_size,
    open_shards,
    plain_linears,
    read_config,
    require_config,
)
from epmq.formats.shards import DEFAULT_SHARD_BYTES, ShardWriter
from epmq.fused import is_fused
from epmq.quantized import (
    SUPPORTED_BITS,
    WORD_BITS,
    QuantizedTensor,
    column_groups,
    group_count,
    pack,
    packed_words,
    unpack,
)

METHOD = "gptq"
QUANTIZE_CONFIG_NAME = "quantize_config.json"
# What version 1 takes from every zero point.
OFFSETS = {"gptq": 1, "gptq_v2": 0}
PARTS = ("qweight", "qzeros", "scales", "g_idx")
# What torch's fused 4-bit CPU kernel takes.
FUSED_GROUPS = (32, 64, 128, 256)
STORED_SCALES = (torch.float16, torch.bfloat16)


class GPTQWriter:
    """The writer of this format: version 1 for symmetric grids, version 2 for asymmetric ones.

    model: a causal language model (its weights may be meta). Every linear but the output head must be quantized, all
    with the same bits, group size and symmetry: loaders expect that.
    """

    def __init__(self, folder: Path, model: nn.Module, shard_bytes: int = DEFAULT_SHARD_BYTES):
        if not is_causal_lm(model):
            raise FormatError(
                f"{METHOD} files are for causal language models, which {type(model).__name__} is not;"
                " use format compressed-tensors."
            )
        self.folder, self.model = folder, model
        self.shards = ShardWriter(folder, shard_bytes)
        head = getattr(model, "get_output_embeddings", lambda: None)()
        linears = plain_linears(model)
        self._head = next((name for name, module in linears.items() if module is head), None)
        self._expected = dict.fromkeys(name for name in linears if name != self._head)
        self._done: set[str] = set()
        self._settings: tuple[int, int, bool, torch.dtype] | None = None

    def plan(self, linears: Mapping[str, QuantizedTensor]) -> None:
        """Raise FormatError for a linear that cannot be stored or would stay unquantized, and where there is none."""
        for name, module in self.model.named_modules():
            if not isinstance(module, SeparateExperts) and not is_fused(module):
                continue
            raise FormatError(
                f"{name}: loaders of {METHOD} may keep experts in other modules; use format compressed-tensors with"
                " sym: true, or native."
            )
        for name, tensor in linears.items():
            self._check(name, tensor)
        self._check_complete(linears)
        if not linears:
            raise FormatError(
                f"{METHOD} files hold quantized linears, and none is; use format native or compressed-tensors."
            )

    def linear(self, name: str, tensor: QuantizedTensor, bias: Tensor | None) -> None:
        """Store linear ``name``."""
        self._check(name, tensor)
        self._done.add(name)
        rows, columns = tensor.shape
        bits, group_size = tensor.bits, tensor.group_size
        zeros = torch.full((rows, group_count(columns, group_size)), 2 ** (bits - 1), dtype=torch.uint8)
        if tensor.zeros is not None:
            zeros = tensor.zeros
        # Version 1 is written for symmetric grids alone: its zero point is at least 2, so that nothing wraps.
        stored = zeros - OFFSETS[self._version()]
        self.shards.add(f"{name}.qweight", pack(tensor.codes, bits).T)
        self.shards.add(f"{name}.qzeros", pack(stored.T, bits))
        self.shards.add(f"{name}.scales", tensor.scales.T)
        self.shards.add(f"{name}.g_idx", column_groups(columns, group_size))
        if bias is not None:
            self.shards.add(f"{name}.bias", bias)

    def tensor(self, name: str, tensor: Tensor) -> None:
        """Store a tensor as it is."""
        self.shards.add(name, tensor)

    def finish(self) -> None:
        """Write the last shard, the index and config.json's ``quantization_config``."""
        require_config(self.folder, METHOD)
        self._check_complete(self._done)
        assert self._settings is not None
        bits, group_size, sym, dtype = self._settings
        configuration = {
            "quant_method": METHOD,
            "checkpoint_format": self._version(),
            "bits": bits,
            "group_size": group_size,
            "sym": sym,
            "desc_act": False,
            "lm_head": False,
            "pack_dtype": "int32",
        }
        self.shards.finish()
        extend_config(self.folder, type(self.model).__name__, dtype, configuration)

    def limits(self) -> list[str]:
        assert self._settings is not None
        bits, group_size, sym, _ = self._settings
        told = ["GPTQModel runs it (version 7.6 tried), and transformers with optimum and GPTQModel installed."]
        if bits == 4 and group_size not in FUSED_GROUPS:
            told.append(
                "On a CPU the 4-bit kernel that both choose by themselves takes groups of 32, 64, 128 and 256 only;"
                " load it in GPTQModel with `BACKEND.TORCH`."
            )
        if not sym:
            told.append(
                "It is a version 2 file (`gptq_v2`): loaders that know version 1 alone read weights one step off."
            )
        if bits in (4, 8) and sym:
            told.append("vLLM's Marlin kernels take this kind; not tried here.")
        else:
            told.append("vLLM's Marlin kernels do not take this kind: they need 4 or 8 symmetric bits.")
        return [*told, "`epmq.load` runs it packed."]

    def _version(self) -> str:
        assert self._settings is not None
        return "gptq" if self._settings[2] else "gptq_v2"

    def _check(self, name: str, tensor: QuantizedTensor) -> None:
        rows, columns = tensor.shape
        if name == self._head:
            raise FormatError(f"linear {name!r} is the output head, which {METHOD} files keep as it is; exclude it.")
        if name not in self._expected:
            raise FormatError(f"{name!r} is not an nn.Linear, which is all that {METHOD} takes; use format native.")
        if rows % WORD_BITS or columns % WORD_BITS:
            raise FormatError(
                f"linear {name!r} is {columns} -> {rows}: {METHOD} needs multiples of {WORD_BITS};"
                " use format compressed-tensors."
            )
        if tensor.group_size != -1 and columns % tensor.group_size:
            raise FormatError(
                f"linear {name!r}: group_size {tensor.group_size} does not divide its {columns} columns, as {METHOD}"
                " needs; choose another or format compressed-tensors."
            )
        if tensor.columns is not None:
            raise FormatError(f"linear {name!r}: its columns are permuted; use format native.")
        if tensor.scales.dtype not in STORED_SCALES:
            raise FormatError(
                f"linear {name!r}: {METHOD} stores scales in float16 or bfloat16; set scale_dtype to float16."
            )
        settings = (tensor.bits, tensor.group_size, tensor.symmetric, tensor.scales.dtype)
        self._settings = self._settings or settings
        if settings != self._settings:
            raise FormatError(
                f"linear {name!r}: {METHOD} files have one bits, group_size, sym and scale dtype for all linears;"
                " use format compressed-tensors for a mixture."
            )

    def _check_complete(self, quantized: Collection[str]) -> None:
        left = [name for name in self._expected if name not in quantized]
        if left:
            raise FormatError(
                f"linear {left[0]!r} stays unquantized, and loaders of {METHOD} expect every linear but the output head"
                " to be; use format compressed-tensors."
            )


class GPTQReader(PackedReader):
    """A GPTQ folder, checked: versions 1 and 2, any order of columns with groups of one size.

    Raises FormatError naming file, key or tensor for what is foreign, truncated, or of another kind.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.path, self.settings = gptq_settings(folder) or (folder, {})
        self.offset = self._offset()
        bits: Any = self.settings.get("bits")
        group_size: Any = self.settings.get("group_size")
        if not is_bits(bits):
            raise FormatError(f"{self.path}: bits is {bits!r}; epmq reads {', '.join(map(str, SUPPORTED_BITS))}.")
        if not is_group_size(group_size):
            raise FormatError(f"{self.path}: group_size is {group_size!r}, expected a number of columns or -1.")
        if not isinstance(sym := self.settings.get("sym", True), bool):
            raise FormatError(f"{self.path}: sym is {sym!r}, expected true or false.")
        self.bits, self.group_size, self.sym = bits, group_size, sym
        self.source = open_shards(folder)
        names = [key.removesuffix(".qweight") for key in self.source.keys() if key.endswith(".qweight")]
        if not names:
            raise FormatError(f"{folder}: {self.path.name} says {METHOD}, but there is no qweight tensor.")
        self.linears = {}
        for name in names:
            self.linears[name] = self._facts(name)
        self.plain = self.take_plain(PARTS)

    def parts(self, name: str) -> dict[str, Tensor]:
        facts = self.linears[name]
        packed = self.source.tensor(f"{name}.qweight").T.contiguous()
        parts = {"packed": packed, "scales": self.source.tensor(f"{name}.scales").T.contiguous()}
        zeros = self._zeros(name, facts)
        if not facts.sym:
            parts["zeros"] = zeros
        if facts.permuted:
            order = self.column_order(f"{name}.g_idx", facts.group_size)
            assert order is not None
            codes = unpack(packed, facts.bits, facts.in_features)
            parts.update(packed=pack(codes[:, order.long()], facts.bits), columns=order)
        return parts

    def _offset(self) -> int:
        keys = [key for key in ("checkpoint_format", "format") if self.settings.get(key) is not None]
        found = {str(self.settings[key]) for key in keys} or {"gptq"}
        version = next(iter(found))
        if len(found) > 1 or version not in OFFSETS:
            raise FormatError(
                f"{self.path}: {' and '.join(keys)} is {' and '.join(sorted(found))}; epmq reads"
                f" {' and '.join(OFFSETS)}."
            )
        return OFFSETS[version]

    def _facts(self, name: str) -> LinearFacts:
        try:
            words, rows = self.source.shape(f"{name}.qweight")
            groups, _ = self.source.shape(f"{name}.scales")
        except (SourceError, ValueError) as error:
            raise FormatError(f"{self.folder}: linear {name!r} has no qweight and scales of two dimensions.") from error
        columns = words * WORD_BITS // self.bits
        indexed = f"{name}.g_idx" in self.source
        if indexed:
            # Its length is the input's: single linears may have other bits than the model.
            columns = math.prod(self.source.shape(f"{name}.g_idx"))
            self.check_tensor(f"{name}.g_idx", (columns,), (torch.int32, torch.int64))
        bits = words * WORD_BITS // max(columns, 1)
        if bits not in SUPPORTED_BITS:
            raise FormatError(
                f"{self.folder}: tensor '{name}.qweight' holds {bits} bits for each of {columns} columns."
            )
        self.check_tensor(f"{name}.qweight", (columns * bits // WORD_BITS, rows), (torch.int32,))
        group_size = -1 if groups == 1 else self.group_size
        if group_count(columns, group_size) != groups:
            raise FormatError(
                f"{self.folder}: tensor '{name}.scales' has {groups} groups; {columns} columns in groups of"
                f" {group_size} have {group_count(columns, group_size)}."
            )
        self.check_tensor(f"{name}.scales", (groups, rows), SCALE_DTYPES)
        self.check_tensor(f"{name}.qzeros", (groups, packed_words(rows, bits)), (torch.int32,))
        permuted = indexed and self.column_order(f"{name}.g_idx", group_size) is not None
        facts = LinearFacts(columns, rows, bits, group_size, self.sym, f"{name}.bias" in self.source, permuted)
        self._zeros(name, facts)
        return facts

    def _zeros(self, name: str, facts: LinearFacts) -> Tensor:
        """uint8 ``[N, G]``, checked against what the configuration says of them."""
        stored = unpack(self.source.tensor(f"{name}.qzeros"), facts.bits, facts.out_features)
        middle = 2 ** (facts.bits - 1)
        zeros = stored + self.offset
        if facts.sym and not bool((zeros == middle).all()):
            other = "gptq" if self.offset == 0 else "gptq_v2"
            hint = "set sym to false there if they are right"
            if bool((stored + 1 - self.offset == middle).all()):
                hint = f"they fit checkpoint_format {other!r}"
            raise FormatError(f"{self.path}: says sym, but the zero points of {name!r} are not {middle}; {hint}.")
        if self.offset and bool((stored == 2**facts.bits - 1).any()):
            raise FormatError(
                f"{self.folder}: tensor '{name}.qzeros' has a zero point of 0, which version 1 cannot tell from an"
                " overflow into the next one; convert the file to gptq_v2 with the package that wrote it."
            )
        return zeros.T.contiguous()


def gptq_settings(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The file that says how a GPTQ folder is quantized, and what it says; None when there is none."""
    path = folder / CONFIG_NAME
    if trust.exists(path):
        settings = read_config(path).get("quantization_config")
        if isinstance(settings, dict) and settings.get("quant_method", METHOD) == METHOD and "bits" in settings:
            return path, settings
    path = folder / QUANTIZE_CONFIG_NAME
    if trust.exists(path):
        settings = read_config(path)
        if settings.get("quant_method", METHOD) == METHOD:
            return path, settings
    return None
