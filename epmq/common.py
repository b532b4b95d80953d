"""The model that a base and its experts have in common: the base's own, or its body where heads differ."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from epmq import trust
from epmq.adapters import ADAPTER_WEIGHTS, BASE_COPY, PREFIX
from epmq.deviations import config_of, note_on
from epmq.errors import ModelError
from epmq.huggingface import skeleton_from_folder
from epmq.names import names_in_model
from epmq.sources import ADAPTER_CONFIG, FileSource


@dataclass(frozen=True)
class CommonModel:
    """skeleton: the model without weights. class_name: what config.json is to call it, where that is not the base's
    own. notes: why that is so, and where experts are run otherwise than they say."""

    skeleton: nn.Module
    class_name: str | None = None
    notes: list[str] = field(default_factory=list)


def common_model(base: Path, others: Mapping[str, Path], fused: bool = False) -> CommonModel:
    """The base's model, or its body where one of the others (checkpoints and adapters by label) has another head.

    So do classifiers over a pretraining checkpoint (BertForSequenceClassification over BertForMaskedLM), classifiers of
    other classes than the base's, and adapters that bring a head. A pooler that some checkpoint lacks is left out too.
    fused: as for :func:`epmq.huggingface.skeleton_from_folder`. Raises ModelError as that does, SourceError for files
    that cannot be read.
    """
    stored = set(FileSource(base).keys())
    skeleton = skeleton_from_folder(base, stored, fused=fused)
    files = {label: _Tensors(path) for label, path in others.items()}
    own, notes = config_of(skeleton), []
    for label, file in files.items():
        notes += [] if file.is_adapter else note_on(label, config_of(file.path), own)
    used = stored
    if any(file.lacks_pooler() for file in files.values()):
        used = {key for key in stored if "pooler." not in key}
    for label, file in files.items():
        if (tensor := file.other_head(skeleton, base)) is not None:
            body = skeleton_from_folder(base, used, bare=True, fused=fused)
            name = type(body).__name__
            note = (
                f"{label} has another head than the base ({tensor}): of {type(skeleton).__name__} only {name} is used."
            )
            return CommonModel(body, name, [note, *notes])
    whole = skeleton if used == stored else skeleton_from_folder(base, used, fused=fused)
    return CommonModel(whole, notes=notes)


class _Tensors:
    """Names and shapes in a checkpoint, or of what an adapter's file brings whole."""

    def __init__(self, path: Path):
        self.path = path
        self.is_adapter = trust.exists(path / ADAPTER_CONFIG)
        file = path / ADAPTER_WEIGHTS if self.is_adapter else path
        # Who opens it for its tensors tells what is wrong with an adapter.
        self.source = FileSource(file) if not self.is_adapter or trust.is_file(file) else None
        keys = self.source.keys() if self.source else []
        self.stored = {key: key for key in keys}
        if self.is_adapter:
            # Copies of the base's weights, which embeddings and outputs that are adapted bring along, are of the base.
            brought = [key for key in keys if ".lora_" not in key and not key.endswith(BASE_COPY)]
            self.stored = {key.removeprefix(PREFIX): key for key in brought}

    def lacks_pooler(self) -> bool:
        return not self.is_adapter and not any("pooler." in key for key in self.stored)

    def other_head(self, model: Any, base: Path) -> str | None:
        """A tensor by which the head is another than the model's: beside the model's body, and not in both alike."""
        prefix = f"{model.base_model_prefix}."
        if prefix == "." or not hasattr(model, model.base_model_prefix):
            return None
        names = names_in_model(self.stored, model)
        known = names.of | names.computed
        places = {name: key for key, name in known.items()}
        state: dict[str, Tensor] = model.state_dict(keep_vars=True)
        heads = {name: tensor for name, tensor in state.items() if not name.startswith(prefix)}
        for name, tensor in heads.items():
            if name in places and self._shape(places[name]) != tensor.shape:
                return name
        present = {id(state[name]) for name in places}
        # An adapter leaves the base its head.
        missing = [] if self.is_adapter else [name for name, tensor in heads.items() if id(tensor) not in present]
        beside = [key for key in sorted(self.stored) if key not in known and not key.startswith(prefix)]
        extra = [key for key in beside if self._is_float(key)]
        of_another_class = self.is_adapter or _class_of(self.path) not in (None, _class_of(base))
        if not of_another_class and not (missing and extra):
            return None
        return next(iter(extra + missing), None)

    def _is_float(self, key: str) -> bool:
        assert self.source is not None
        return self.source.dtype(self.stored[key]).is_floating_point

    def _shape(self, key: str) -> tuple[int, ...]:
        assert self.source is not None
        return self.source.shape(self.stored[key])


def _class_of(folder: Path) -> Any:
    """The class that a folder's config.json names, None where it names none."""
    path = folder / "config.json"
    content = trust.read_json(path, ModelError) if trust.is_file(path) else None
    named = content.get("architectures") if isinstance(content, dict) else None
    return named[0] if isinstance(named, list) and named else None
