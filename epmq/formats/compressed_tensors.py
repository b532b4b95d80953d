"""compressed-tensors' ``pack-quantized`` checkpoints, as llm-compressor writes and transformers and vLLM read them.

A quantized linear ``m`` is stored as ``m.weight_packed`` (int32, our packed form as it is), ``m.weight_scale``
``[N, G]``, ``m.weight_shape`` (int64) and, when asymmetric, ``m.weight_zero_point`` (int32, packed along the rows);
what they mean stands in config.json. Read as well: ``m.weight_g_idx``, which releases before 0.19 wrote.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from epmq import patterns
from epmq.errors import FormatError
from epmq.experts import separated
from epmq.formats.packed import (
    CONFIG_NAME,
    REFUSED,
    SCALE_DTYPES,
    LinearFacts,
    PackedReader,
    extend_config,
    is_bits,
    is_group_size,
    open_shards,
    plain_linears,
    read_config,
    require_config,
)
from epmq.formats.shards import DEFAULT_SHARD_BYTES, ShardWriter
from epmq.quantized import QuantizedTensor, column_groups, group_count, pack, packed_words, unpack
from epmq.renames import cuts_weights, name_to_store, stored_experts

METHOD, FORMAT = "compressed-tensors", "pack-quantized"
# The release whose layout this is: since 0.18 the stream of 3-bit codes is dense.
LAYOUT_VERSION = "0.20.0"
# Below, scales would take more room than the codes.
LEAST_GROUP = 8
# What transformers is tested to load without unpacking: their initialisation reads no weight of a linear. Other engines
# take the plainest file.
KEPT_PACKED = frozenset(
    f"{family}ForCausalLM"
    for family in ("Gemma", "Gemma2", "Gemma3", "Llama", "Mistral", "Phi", "Phi3", "Qwen2", "Qwen3")
)
READ_WHEN_MADE = "T5, Whisper, SigLIP, I-JEPA, ModernBERT, Falcon, Mamba, RWKV, RecurrentGemma"
PARTS = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx")


class Scheme(NamedTuple):
    """How one linear is quantized, in this format's terms."""

    bits: int
    group_size: int
    sym: bool


class CompressedTensorsWriter:
    """The writer of this format, for a transformers model whose config.json is in the folder when it finishes.

    model: an instance (its weights may be meta), which tells class and linears. dtype: of its other tensors.
    Groups must have equal sizes here: where the last one is short, all are split to the greatest common divisor of
    group and row, with repeated scales and the same weights. ``plan`` does the same across linears where transformers
    must dequantize the file while loading, for which it knows one scheme per file.
    """

    def __init__(self, folder: Path, model: nn.Module, dtype: torch.dtype, shard_bytes: int = DEFAULT_SHARD_BYTES):
        self.folder, self.model, self.dtype = folder, model, dtype
        self.shards = ShardWriter(folder, shard_bytes)
        self._linears = plain_linears(model)
        self._experts = [n for n in self._linears if n.startswith(tuple(f"{m}." for m in separated(model)))]
        self._stored = stored_experts(model)
        self._name_to_store = name_to_store(model)
        self._planned: dict[str, Scheme] = {}
        self._schemes: dict[str, Scheme] = {}

    def plan(self, linears: Mapping[str, QuantizedTensor]) -> None:
        """Raise FormatError for the first linear that cannot be stored; settle one group size where one is needed."""
        if linears:
            self._refuse_swapped()
        self._planned = {name: self._scheme(name, tensor) for name, tensor in linears.items()}
        self._unify(linears)
        self._check_experts()
        self._check_names()

    def _unify(self, linears: Mapping[str, QuantizedTensor]) -> None:
        """Settle one group size where transformers must dequantize the file and the schemes differ in no more."""
        schemes = set(self._planned.values())
        if len(schemes) < 2 or not self._wants_dequantize(schemes) or len({(s.bits, s.sym) for s in schemes}) > 1:
            return
        sizes = {
            name: linears[name].shape[1] if scheme.group_size == -1 else scheme.group_size
            for name, scheme in self._planned.items()
        }
        common = math.gcd(*sizes.values())
        smallest = min(sizes, key=lambda name: sizes[name])
        self._planned = {
            name: scheme._replace(group_size=self._enough(common, smallest, linears[smallest]))
            for name, scheme in self._planned.items()
        }

    def linear(self, name: str, tensor: QuantizedTensor, bias: Tensor | None) -> None:
        """Store linear ``name``."""
        scheme = self._planned.get(name) or self._scheme(name, tensor)
        self._schemes[name] = scheme
        rows, columns = tensor.shape
        scales, zeros = tensor.scales, tensor.zeros
        if scheme.group_size not in (-1, tensor.group_size):
            group_of = column_groups(columns, tensor.group_size)[:: scheme.group_size].long()
            scales, zeros = scales[:, group_of], None if zeros is None else zeros[:, group_of]
        self.tensor(f"{name}.weight_packed", pack(tensor.codes, tensor.bits))
        self.tensor(f"{name}.weight_scale", scales)
        if zeros is not None:
            self.tensor(f"{name}.weight_zero_point", pack(zeros.T, tensor.bits).T)
        self.tensor(f"{name}.weight_shape", torch.tensor([rows, columns]))
        if bias is not None:
            self.tensor(f"{name}.bias", bias)

    def tensor(self, name: str, tensor: Tensor) -> None:
        """Store a tensor as it is."""
        self.shards.add(self._key(name), tensor)

    def _key(self, name: str) -> str:
        """What a tensor is called in the file."""
        module, _, leaf = name.rpartition(".")
        if module in self._stored:
            return f"{self._stored[module]}.{leaf}"
        stored = self._name_to_store(name)
        if stored is None:
            raise FormatError(
                f"{name}: transformers reads no tensor of a file as this one of {type(self.model).__name__}, and would"
                " leave random weights there; use format native."
            )
        return stored

    def finish(self) -> None:
        """Write the last shard, the index and ``quantization_config`` (none when nothing is quantized)."""
        require_config(self.folder, METHOD)
        self.shards.finish()
        extend_config(self.folder, type(self.model).__name__, self.dtype, self._configuration())

    def limits(self) -> list[str]:
        schemes = set(self._schemes.values())
        bits, sym = {scheme.bits for scheme in schemes}, all(scheme.sym for scheme in schemes)
        if not schemes:
            return ["An ordinary checkpoint: nothing is quantized."]
        if cuts_weights(self.model):
            told = [f"{REFUSED}: it may have to cut weights of this class, and cuts no packed ones."]
        elif not sym and self._experts:
            told = [f"{REFUSED}: it joins experts of symmetric grids only (`sym: true`)."]
        elif not sym and len(schemes) > 1:
            told = [f"{REFUSED}: a mixture loads there only when all of it is symmetric (`sym: true`)."]
        elif not self._wants_dequantize(schemes):
            told = ["transformers 5 keeps it packed until the first forward, which dequantizes the whole model."]
        elif len(schemes) == 1:
            told = ["transformers 5 dequantizes it while loading, as config.json asks (`dequantize`)."]
        else:
            told = [
                "transformers 5.23 loads a mixture, but not for families whose initialisation reads the weights"
                f" ({READ_WHEN_MADE})."
            ]
        told.append("vLLM's packed kernels take 4 and 8 bits; not tried here.")
        if not sym:
            told.append("Zero points need compressed-tensors 0.15 or newer.")
        if 3 in bits:
            told.append("3 bits need compressed-tensors 0.18 or newer; before, their layout was another.")
        if "T5" in type(self.model).__name__:
            told.append("transformers 5.17 with compressed-tensors 0.19 cannot load T5 models from this format.")
        told.append(self._for_llama_cpp(schemes))
        return [*told, "`epmq.load` runs it packed."]

    @staticmethod
    def _for_llama_cpp(schemes: set[Scheme]) -> str:
        """What its converter, and the blocks of its files, make of this one (docs/formats.md)."""
        if all(scheme.group_size % 32 and scheme.group_size != -1 for scheme in schemes):
            return "llama.cpp has no blocks for it: groups there are multiples of 32."
        if all(scheme.bits == 8 and not scheme.sym for scheme in schemes):
            return "llama.cpp has no blocks for 8 bits with zero points."
        if len(schemes) > 1 or any(scheme.bits == 3 or scheme.group_size == -1 for scheme in schemes):
            return "llama.cpp's converter does not read it: unpack it first, as epmq's docs/formats.md says."
        return "llama.cpp's converter reads it where it knows the class, and `epmq gguf` keeps the codes there."

    def _targets(self, names: Sequence[str]) -> list[str]:
        """Linears as loaders may call them: by their names in the model, and by those in the file."""
        leaves = ("weight_packed" if name in self._schemes else "weight" for name in names)
        stored = (self._key(f"{name}.{leaf}").rpartition(".")[0] for name, leaf in zip(names, leaves, strict=True))
        return _targets(list(dict.fromkeys([*names, *stored])), self.model)

    def _check_experts(self) -> None:
        """Raise FormatError for experts that transformers could not put together again, or would, wrongly."""
        planned = {self._planned.get(name) for name in self._experts}
        for name in self._experts:
            if name not in self._stored:
                raise FormatError(
                    f"{name}: transformers reads no single experts of {type(self.model).__name__}, and would leave"
                    " random weights there; use format native, or exclude the experts."
                )
        if len(planned) > 1 or (None in planned and self._planned):
            raise FormatError(
                f"{METHOD}: transformers joins experts, such as {self._experts[0]}, of one scheme only; give all of"
                " them the same bits and a group_size that divides their columns, or use format native."
            )

    def _check_names(self) -> None:
        """Raise FormatError for the first tensor that transformers would not find under any name."""
        plain = [name for name in self.model.state_dict() if name.rpartition(".")[0] not in self._planned]
        for name in (*plain, *(f"{linear}.weight_packed" for linear in self._planned)):
            self._key(name)

    def _refuse_swapped(self) -> None:
        """Raise FormatError where transformers puts other modules into the model before it loads this format: their
        weights would be random ones."""
        try:
            from transformers.quantizers.base import MODULES_TO_PATCH_FOR_QUANTIZATION
        except ImportError:
            return
        swapped: dict[str, Any] = MODULES_TO_PATCH_FOR_QUANTIZATION
        for name, module in self.model.named_modules():
            kind = type(module).__name__
            if kind in swapped and METHOD in swapped[kind]["quantization_methods"]:
                raise FormatError(
                    f"{name}: transformers puts other modules in place of a {kind} before it loads {METHOD}, and would"
                    " leave random weights there; use format native."
                )

    def _scheme(self, name: str, tensor: QuantizedTensor) -> Scheme:
        columns = tensor.shape[1]
        group = -1 if tensor.group_size >= columns else tensor.group_size
        if group != -1 and columns % group:
            group = self._enough(math.gcd(columns, group), name, tensor)
        if tensor.columns is not None:
            raise FormatError(f"linear {name!r}: {METHOD} has no permuted columns; use format native.")
        if name not in self._linears:
            raise FormatError(f"{name!r} is not an nn.Linear, which is all that {METHOD} takes; use format native.")
        if torch.promote_types(tensor.scales.dtype, self.dtype) != self.dtype:
            raise FormatError(
                f"linear {name!r}: loaders of {METHOD} would round its {_word(tensor.scales.dtype)} scales to the"
                f" model's {_word(self.dtype)}; set scale_dtype to {_word(self.dtype)} or use format native."
            )
        return Scheme(tensor.bits, group, tensor.symmetric)

    @staticmethod
    def _enough(group: int, name: str, tensor: QuantizedTensor) -> int:
        if group < LEAST_GROUP:
            raise FormatError(
                f"linear {name!r}: {METHOD} needs groups of one size, and none of {LEAST_GROUP} or more columns fits"
                f" {tensor.group_size} and {tensor.shape[1]} both; choose another group_size, exclude it or use format"
                " native."
            )
        return group

    def _wants_dequantize(self, schemes: set[Scheme]) -> bool:
        """Packed zero points do not load otherwise (5.23), nor do models whose initialisation reads the weights of
        linears; which these are, only trying tells."""
        return not all(scheme.sym for scheme in schemes) or type(self.model).__name__ not in KEPT_PACKED

    def _configuration(self) -> dict[str, Any]:
        names_of: dict[Scheme, list[str]] = {}
        for name, scheme in self._schemes.items():
            names_of.setdefault(scheme, []).append(name)
        if not names_of:
            return {}
        groups = {
            f"group_{number}": _group(scheme, self._targets(names) if len(names_of) > 1 else ["Linear"])
            for number, (scheme, names) in enumerate(names_of.items())
        }
        configuration: dict[str, Any] = {
            "quant_method": METHOD,
            "format": FORMAT,
            # Any other word makes transformers load random weights without an error.
            "quantization_status": "compressed",
            "version": LAYOUT_VERSION,
            "config_groups": groups,
            "ignore": self._targets([name for name in self._linears if name not in self._schemes]),
            "kv_cache_scheme": None,
            "global_compression_ratio": None,
            "sparsity_config": {},
            "transform_config": {},
        }
        if len(names_of) == 1 and self._wants_dequantize(set(names_of)):
            # Of several schemes transformers would take the first for all, and load wrong weights in silence.
            configuration["dequantize"] = True
        return configuration


def _targets(names: Sequence[str], model: nn.Module) -> list[str]:
    """These linears for loaders, which may make the base model alone, or a head for it: its prefix may be there or not.
    Linears that differ in their first number, which is that of the block, are one target."""
    prefix = str(getattr(model, "base_model_prefix", ""))
    start = f"{prefix}." if prefix else ""
    has_head = prefix != "" and hasattr(model, prefix)
    optional = f"({re.escape(start)})?" if prefix else ""
    targets: list[str] = []
    numbers_of: dict[tuple[str, str], list[str]] = {}
    for name in names:
        before, *rest = re.split(r"(?<=\.)(\d+)(?=\.|$)", name.removeprefix(start), maxsplit=1)
        if has_head and not name.startswith(start):
            targets.append(name)
        elif rest:
            numbers_of.setdefault((before, rest[1]), []).append(rest[0])
        else:
            targets.append(f"re:{optional}{re.escape(before)}$")
    for (before, after), numbers in numbers_of.items():
        targets.append(f"re:{optional}{re.escape(before)}({'|'.join(numbers)}){re.escape(after)}$")
    return targets


def _group(scheme: Scheme, targets: list[str]) -> dict[str, Any]:
    channel = scheme.group_size == -1
    weights = {
        "num_bits": scheme.bits,
        "type": "int",
        "symmetric": scheme.sym,
        "strategy": "channel" if channel else "group",
        "group_size": None if channel else scheme.group_size,
        "dynamic": False,
        "actorder": None,
    }
    return {
        "targets": targets,
        "format": FORMAT,
        "weights": weights,
        "input_activations": None,
        "output_activations": None,
    }


class CompressedTensorsReader(PackedReader):
    """A ``pack-quantized`` folder, checked; weights only, 2, 3, 4 or 8 bits, by group or row.

    Raises FormatError naming file, key or tensor for what is foreign, truncated, or of another kind.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.path = folder / CONFIG_NAME
        self.source = open_shards(folder)
        self.settings: dict[str, Any] = read_config(self.path)["quantization_config"]
        self._refuse_other_kinds()
        self.linears = {}
        names = [key.removesuffix(".weight_packed") for key in self.source.keys() if key.endswith(".weight_packed")]
        for name in names:
            self.linears[name] = self._facts(name)
        if not names:
            raise FormatError(f"{folder}: {self.path.name} says {METHOD}, but there is no weight_packed tensor.")
        self.plain = self.take_plain(PARTS)

    def parts(self, name: str) -> dict[str, Tensor]:
        facts = self.linears[name]
        parts = {
            "packed": self.source.tensor(f"{name}.weight_packed"),
            "scales": self.source.tensor(f"{name}.weight_scale"),
        }
        if not facts.sym:
            zeros = unpack(self.source.tensor(f"{name}.weight_zero_point").T, facts.bits, facts.out_features)
            parts["zeros"] = zeros.T.contiguous()
        if facts.permuted:
            order = self.column_order(f"{name}.weight_g_idx", facts.group_size)
            assert order is not None
            codes = unpack(parts["packed"], facts.bits, facts.in_features)
            parts.update(packed=pack(codes[:, order.long()], facts.bits), columns=order)
        return parts

    def _refuse_other_kinds(self) -> None:
        if (status := self.settings.get("quantization_status")) != "compressed":
            raise FormatError(f"{self.path}: quantization_status is {status!r}; epmq reads 'compressed' files.")
        sparsity = self.settings.get("sparsity_config") or {}
        if not isinstance(sparsity, dict) or sparsity.get("format", "dense") != "dense":
            raise FormatError(f"{self.path}: sparsity_config is {sparsity!r}, which epmq does not read.")
        for key in ("transform_config", "kv_cache_scheme"):
            if self.settings.get(key):
                raise FormatError(f"{self.path}: {key} is set, which epmq does not read.")
        if not isinstance(self.settings.get("config_groups"), dict):
            raise FormatError(f"{self.path}: quantization_config has no config_groups.")

    def _facts(self, name: str) -> LinearFacts:
        scheme = self._scheme_of(name)
        self.check_tensor(f"{name}.weight_shape", (2,), (torch.int64, torch.int32))
        rows, columns = self.source.tensor(f"{name}.weight_shape").tolist()
        if min(rows, columns) < 1:
            raise FormatError(f"{self.folder}: tensor '{name}.weight_shape' says {rows} x {columns}.")
        groups = group_count(columns, scheme.group_size)
        try:
            self.check_tensor(f"{name}.weight_packed", (rows, packed_words(columns, scheme.bits)), (torch.int32,))
        except FormatError as error:
            old = " (3-bit files of compressed-tensors before 0.18 have another layout)" if scheme.bits == 3 else ""
            raise FormatError(f"{str(error).removesuffix('.')}{old}.") from None
        self.check_tensor(f"{name}.weight_scale", (rows, groups), SCALE_DTYPES)
        if not scheme.sym:
            zeros = (packed_words(rows, scheme.bits), groups)
            self.check_tensor(f"{name}.weight_zero_point", zeros, (torch.int32,))
        permuted = f"{name}.weight_g_idx" in self.source
        if permuted:
            self.check_tensor(f"{name}.weight_g_idx", (columns,), (torch.int32, torch.int64))
            permuted = self.column_order(f"{name}.weight_g_idx", scheme.group_size) is not None
        bias = f"{name}.bias" in self.source
        return LinearFacts(columns, rows, scheme.bits, scheme.group_size, scheme.sym, bias, permuted)

    def _scheme_of(self, name: str) -> Scheme:
        """The scheme of the group that names this linear: by its name, by an expression, or by its class."""

        def kind(target: str) -> int | None:
            if target == name:
                return 0
            if target.startswith("re:"):
                pattern = target.removeprefix("re:")
                patterns.check(pattern)
                return 1 if patterns.match(pattern, name) else None
            return 2 if target == "Linear" else None

        found: list[tuple[int, str]] = []
        for group, settings in self.settings["config_groups"].items():
            try:
                found += [(kind(target), group) for target in settings["targets"] if kind(target) is not None]  # type: ignore[misc]
            except (TypeError, KeyError, AttributeError, ValueError) as error:
                raise FormatError(f"{self.path}: config_groups.{group} has no usable targets ({error!r}).") from error
        if not found:
            raise FormatError(f"{self.path}: no config group covers the quantized linear {name!r}.")
        return self._scheme_in(min(found, key=lambda pair: pair[0])[1])

    def _scheme_in(self, group: str) -> Scheme:
        where = f"{self.path}: config_groups.{group}"
        settings = self.settings["config_groups"][group]
        kind = settings.get("format") or self.settings.get("format")
        if kind != FORMAT:
            raise FormatError(f"{where}: format {kind!r} is not {FORMAT!r}, the only one epmq reads.")
        for other in ("input_activations", "output_activations"):
            if settings.get(other) is not None:
                raise FormatError(f"{where}: {other} are quantized as well, which epmq does not do.")
        weights = settings.get("weights")
        if not isinstance(weights, dict):
            raise FormatError(f"{where}: weights is missing.")
        bits: Any = weights.get("num_bits")
        size: Any = weights.get("group_size")
        strategy = weights.get("strategy")
        if not is_bits(bits) or weights.get("type", "int") != "int":
            raise FormatError(f"{where}: weights of {bits!r} bits, type {weights.get('type')!r}, are not read by epmq.")
        if strategy == "channel" or (strategy == "group" and size == -1):
            size = -1
        elif strategy != "group" or not is_group_size(size):
            raise FormatError(f"{where}: strategy {strategy!r} with group_size {size!r} is not read by epmq.")
        if not isinstance(sym := weights.get("symmetric", True), bool):
            raise FormatError(f"{where}: symmetric is {sym!r}, expected true or false.")
        return Scheme(bits, size, sym)


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
