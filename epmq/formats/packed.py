"""What all checkpoint formats share: the facts about a quantized linear, and packed tensors put into a model.

Readers translate their format to native names (:mod:`epmq.formats.native`): ``m.packed``, ``m.scales``, ``m.zeros``,
``m.columns``; writers take finished tensors as the engine hands them out.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from epmq import files, self_saving, trust
from epmq.errors import FormatError, SourceError
from epmq.experts import separate
from epmq.formats.shards import ShardWriter
from epmq.fused import INPUTS
from epmq.linear import QuantLinear
from epmq.names import names_in_model
from epmq.orientation import features_of
from epmq.quantized import SUPPORTED_BITS, QuantizedTensor, column_groups, group_count
from epmq.sources import FileSource
from epmq.swap import set_submodule

CONFIG_NAME = "config.json"
SCALE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
REFUSED = "transformers 5.23 refuses it"  # so begins the sentence about a file that does not load there
PARTS = ("packed", "scales", "zeros", "columns")


@dataclass(frozen=True)
class LinearFacts:
    """What a reader must know of a quantized linear before it reads a tensor. permuted: groups are of other columns
    than neighbouring ones, see :class:`epmq.quantized.QuantizedTensor`."""

    in_features: int
    out_features: int
    bits: int
    group_size: int
    sym: bool
    bias: bool
    permuted: bool = False


class Writer(Protocol):
    """Streams a quantized model into a folder (usually a temporary one, see :func:`epmq.files.new_folder`)."""

    shards: ShardWriter

    def plan(self, linears: Mapping[str, QuantizedTensor]) -> None:
        """Told all linears once, before the first (meta tensors will do): FormatError where they cannot be held."""
        ...

    def linear(self, name: str, tensor: QuantizedTensor, bias: Tensor | None) -> None:
        """Store linear ``name``; raises FormatError where the format cannot hold it."""
        ...

    def tensor(self, name: str, tensor: Tensor) -> None:
        """Store a tensor as it is."""
        ...

    def finish(self) -> None:
        """Write the last shard, the index, and what tells a loader the format; config.json must be there by now."""
        ...

    def limits(self) -> list[str]:
        """Which loaders run the finished file and which do not, one sentence each."""
        ...


class PackedReader:
    """A quantized checkpoint under native names: ``linears``, and ``plain``, the names of all other tensors.

    Made by a subclass, which checks names, shapes and dtypes and raises FormatError naming file or tensor.
    """

    folder: Path
    source: FileSource
    linears: dict[str, LinearFacts]
    plain: list[str]
    model_class: str | None = None

    def parts(self, name: str) -> dict[str, Tensor]:
        """packed, scales and, where there are some, zeros and columns of a linear."""
        raise NotImplementedError

    def names(self) -> list[str]:
        """Names of the modules' tensors, the quantized weights' included."""
        return self.plain + [f"{name}.weight" for name in self.linears]

    def separate(self, model: nn.Module) -> nn.Module:
        """Take a model's mixtures apart (:func:`epmq.experts.separate`), but those whose experts are kept in one."""
        names = [name.rpartition(".") for name in names_in_model(self.plain, model).of.values()]
        together = tuple(f"{module}." for module, _, leaf in names if leaf in INPUTS)
        return separate(model, lambda linear: not linear.startswith(together))

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """All tensors under native names, one at a time."""
        return self._tensors({name: name for name in (*self.plain, *self.linears)})

    def _tensors(self, named: Mapping[str, str]) -> Iterator[tuple[str, Tensor]]:
        try:
            for key in self.plain:
                yield named[key], self.source.tensor(key)
            for name in self.linears:
                for part, tensor in self.parts(name).items():
                    yield f"{named[name]}.{part}", tensor
        except SourceError as error:
            raise FormatError(str(error)) from error

    def into(self, model: nn.Module) -> nn.Module:
        """Give ``model`` (of the original architecture, its weights may be meta) QuantLinears and all tensors.

        Names in the file may be those that transformers renames as it loads. Raises FormatError for what does not fit.
        """
        named = self._names_in(model)
        for name, facts in self.linears.items():
            self._place(model, name, named[name], facts)
        self._check_shapes(model, named)
        aliases: dict[int, list[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            aliases.setdefault(id(parameter), []).append(name)
        state = dict(self._tensors(named))
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
        self_saving.refuse(model, QuantLinear)
        return model

    def _names_in(self, model: nn.Module) -> dict[str, str]:
        """What linears and plain tensors are called in the model; those that it does not know keep their names."""
        modules = {name for name, _ in model.named_modules(remove_duplicate=False)}
        if modules.issuperset(self.linears) and set(model.state_dict()).issuperset(self.plain):
            # A rename may be of a name that the model has as well.
            return {name: name for name in (*self.plain, *self.linears)}
        weights = {f"{name}.weight": name for name in self.linears}
        found = names_in_model([*weights, *self.plain], model).of
        named = {key: found.get(key, key) for key in self.plain}
        named |= {name: found.get(key, key).removesuffix(".weight") for key, name in weights.items()}
        first: dict[str, str] = {}
        for name, inner in named.items():
            if first.setdefault(inner, name) != name:
                raise FormatError(
                    f"{self.folder}: {first[inner]!r} and {name!r} are both {inner!r} in the model; remove one of them."
                )
        return named

    def _place(self, model: nn.Module, name: str, inner: str, facts: LinearFacts) -> None:
        try:
            replaced = model.get_submodule(inner)
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
        # A file may call the bias as no other part of the linear (VideoMAE's); one that is in none is missed later.
        bias = facts.bias or getattr(replaced, "bias", None) is not None
        layer = QuantLinear(
            facts.in_features, facts.out_features, bias, facts.bits, facts.group_size, facts.sym, "meta",
            permuted=facts.permuted,
        )  # fmt: skip
        layer.stands_for = replaced.stands_for if isinstance(replaced, QuantLinear) else type(replaced).__name__
        set_submodule(model, inner, layer.train(replaced.training))

    def _check_shapes(self, model: nn.Module, named: Mapping[str, str]) -> None:
        state = model.state_dict()
        for name in self.plain:
            expected = state.get(named[name])
            if expected is None:
                continue
            if self.source.shape(name) != tuple(expected.shape):
                raise FormatError(
                    f"{self.folder}: tensor {name!r} has shape {list(self.source.shape(name))}, the model expects"
                    f" {list(expected.shape)}."
                )
            if self.source.dtype(name).is_floating_point != expected.is_floating_point():
                raise FormatError(
                    f"{self.folder}: tensor {name!r} has dtype {self.source.dtype(name)}, the model expects"
                    f" {expected.dtype}."
                )

    def check_tensor(self, key: str, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]) -> None:
        """Raise FormatError unless the file holds ``key`` in that shape and one of those dtypes."""
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

    def take_plain(self, suffixes: tuple[str, ...]) -> list[str]:
        """Names that are no part of a quantized linear; a linear that is there unquantized as well is refused."""
        quantized = {f"{name}.{suffix}" for name in self.linears for suffix in suffixes}
        plain = [key for key in self.source.keys() if key not in quantized]
        for name in self.linears:
            if f"{name}.weight" in self.source:
                raise FormatError(f"{self.folder}: linear {name!r} is there twice, quantized and as {name}.weight.")
        # Older files carry this table, which models compute.
        return [key for key in plain if not key.endswith("rotary_emb.inv_freq")]

    def column_order(self, key: str, group_size: int) -> Tensor | None:
        """int32 ``[K]`` that sorts columns by the groups which the tensor ``key`` gives them; None: they are sorted."""
        groups = self.source.tensor(key)
        natural = column_groups(len(groups), group_size)
        order = torch.argsort(groups, stable=True)
        if not torch.equal(groups[order].long(), natural.long()):
            raise FormatError(
                f"{self.folder}: tensor {key!r} does not put {group_size} columns into each of its groups."
            )
        return None if torch.equal(groups.long(), natural.long()) else order.to(torch.int32)


def is_causal_lm(model: nn.Module) -> bool:
    """Whether a transformers model is a causal language model, by the names of its kind."""
    return type(model).__name__.endswith(("ForCausalLM", "LMHeadModel"))


def plain_linears(model: nn.Module) -> dict[str, nn.Module]:
    """By name, all nn.Linears that other loaders find in a model of this class, those that are QuantLinears now too."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) or (isinstance(module, QuantLinear) and module.stands_for != "Conv1D")
    }


def planned_linear(
    shape: tuple[int, int], bits: int, group_size: int, sym: bool, scale_dtype: torch.dtype, permuted: bool = False
) -> QuantizedTensor:
    """What a linear ``[N, K]`` is going to be, on the meta device: for :meth:`Writer.plan`."""
    groups = (shape[0], group_count(shape[1], group_size))
    return QuantizedTensor(
        torch.empty(shape, dtype=torch.uint8, device="meta"),
        torch.empty(groups, dtype=scale_dtype, device="meta"),
        None if sym else torch.empty(groups, dtype=torch.uint8, device="meta"),
        bits,
        group_size,
        torch.empty(shape[1], dtype=torch.int32, device="meta") if permuted else None,
    )


def write_model(writer: Writer, model: nn.Module) -> None:
    """Store all of a model in memory: QuantLinears as codes, the rest as they are, tied tensors once."""
    seen: set[int] = set()
    quantized = {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}
    planned = {
        name: planned_linear(
            (m.out_features, m.in_features), m.bits, m.group_size, m.sym, m.scales.dtype, m.columns is not None
        )
        for name, m in quantized.items()
    }
    writer.plan(planned)
    for name, layer in quantized.items():
        writer.linear(name, layer.quantized(), layer.bias)
    inner = {f"{name}.{part}" for name in quantized for part in (*PARTS, "bias")}
    for key, tensor in model.state_dict(keep_vars=True).items():
        # One parameter under several names, as readers tie it again; what only begins at the same address is another.
        if key in inner or (isinstance(tensor, nn.Parameter) and id(tensor) in seen):
            continue
        seen.add(id(tensor))
        writer.tensor(key, tensor.detach())


def open_shards(folder: Path) -> FileSource:
    """A folder's safetensors; raises FormatError for what is missing, truncated, outside the folder, or there twice."""
    try:
        source = FileSource(folder)
    except SourceError as error:
        raise FormatError(str(error)) from error
    owner: dict[str, Path] = {}
    for file in source.files:
        for key in FileSource(file).keys():
            if key in owner:
                raise FormatError(f"{folder}: tensor {key!r} is in {owner[key].name} and in {file.name}.")
            owner[key] = file
    return source


def read_config(path: Path) -> dict[str, Any]:
    """A JSON object; raises FormatError when the file holds anything else."""
    content = trust.read_json(path, FormatError)
    if not isinstance(content, dict):
        raise FormatError(f"{path}: expected a JSON object.")
    return content


def is_bits(value: Any) -> bool:
    """Whether a value from JSON is a number of bits that is read; True and 4.0 are none."""
    return type(value) is int and value in SUPPORTED_BITS


def is_group_size(value: Any) -> bool:
    """Whether a value from JSON is a number of columns, or -1 for the whole row."""
    return trust.is_whole(value, 1) or trust.is_whole(value, -1, -1)


def require_config(folder: Path, format: str) -> None:
    """Raise FormatError unless config.json is there to hold what this format says of itself."""
    if not (folder / CONFIG_NAME).is_file():
        raise FormatError(f"format {format} is for transformers models, which have a {CONFIG_NAME}; use format native.")


def extend_config(folder: Path, model_class: str, dtype: torch.dtype, quantization: dict[str, Any]) -> None:
    """Write class, dtype and ``quantization_config`` into config.json; an empty one is left out."""
    config = read_config(folder / CONFIG_NAME)
    config.pop("quantization_config", None)
    config.pop("torch_dtype", None)
    config.update(architectures=[model_class], dtype=str(dtype).removeprefix("torch."))
    if quantization:
        config["quantization_config"] = quantization
    files.write_text(folder / CONFIG_NAME, json.dumps(config, indent=2) + "\n")
