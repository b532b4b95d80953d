"""The head of a checkpoint put on another body: what an expert was fine-tuned with, on a merged and quantized model."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from epmq.devices import home_of
from epmq.errors import ModelError
from epmq.evaluate import Pooling
from epmq.hub import find_model
from epmq.huggingface import skeleton_from_folder
from epmq.names import NamedForModel
from epmq.skeleton import fill
from epmq.sources import FileSource, main_dtype, open_source


def with_head(model: nn.Module, checkpoint: str | Path) -> nn.Module:
    """A whole model for one task: the class, head and settings of an expert's checkpoint, with ``model`` as its body.

    model: a transformers model, quantized or not, whose own head, if it has one, is passed by; it is shared, so that
    all experts' heads may be on one body. checkpoint: the folder or hub id of a BertForSequenceClassification or
    another class with a head on the same body. The head is unquantized, where the body is and in its dtype.

    Raises ModelError for a checkpoint without a head or with another body, SourceError for files that cannot be read.
    """
    if not isinstance(checkpoint, (str, Path)):
        raise ModelError(
            f"checkpoint: expected an expert's folder or hub id, got a {type(checkpoint).__name__}; save it"
            " (save_pretrained) and give the folder."
        )
    return CheckpointHead(find_model(checkpoint)).on(model)


class CheckpointHead:
    """What a checkpoint of transformers has around its body; on texts a head as :class:`epmq.evaluate.Head`.

    Raises ModelError for a checkpoint without a head, SourceError for files that cannot be read.
    """

    def __init__(self, folder: str | Path):
        source = FileSource(folder)
        model: Any = skeleton_from_folder(folder, set(source.keys()))
        self.file, self._prefix = str(folder), model.base_model_prefix
        body = getattr(model, self._prefix, None)
        if body is None:
            raise ModelError(f"{folder}: {type(model).__name__} has no head; give a checkpoint that has one.")
        self._kind = type(body)
        named = NamedForModel(source, model, aliases=True)
        self._pooler: nn.Module | None = getattr(body, "pooler", None)
        if self._pooler is not None:
            fill(self._pooler, f"{self._prefix}.pooler.", named, None)
        delattr(model, self._prefix)
        fill(model, "", named, None)
        self._model: nn.Module = model

    @property
    def classes(self) -> int:
        """How many it tells apart. Raises ModelError for a head that is none of a classifier."""
        if not hasattr(self._model, "num_labels"):
            raise ModelError(f"{self.file}: {type(self._model).__name__} is no classifier of texts; give one.")
        count: int = self._model.num_labels  # type: ignore[assignment]
        return count

    def on(self, model: nn.Module) -> nn.Module:
        """The checkpoint's model with the body of ``model``, and its own pooler where that has none.

        Raises ModelError for a body of another class.
        """
        body: Any = getattr(model, "base_model", model)
        if type(body) is not self._kind:
            raise ModelError(f"{self.file}: its head is one for {self._kind.__name__}, not for {type(body).__name__}.")
        place, dtype = home_of(body), main_dtype(open_source(dict(body.named_parameters())))
        whole = copy.deepcopy(self._model).to(place, dtype)
        if self._pooler is not None and body.pooler is None:
            body = copy.copy(body)
            # Of its own, so that the model goes on without.
            body._modules = {**body._modules, "pooler": copy.deepcopy(self._pooler).to(place, dtype)}
        setattr(whole, self._prefix, body)
        return whole.eval()

    def logits(self, model: nn.Module, inputs: dict[str, Tensor], pooling: Pooling, pad: int) -> Tensor:
        """fp32 ``[texts, classes]``, by the checkpoint's own rule. Raises ModelError where it has none for texts."""
        whole: Any = self.on(model)
        whole.config.pad_token_id = pad
        found: Any = getattr(whole(**inputs), "logits", None)
        if found is None or found.shape != (len(inputs["input_ids"]), self.classes):
            raise ModelError(f"{self.file}: its head gives no logits [texts, classes]; give a classifier of texts.")
        logits: Tensor = found.float()
        return logits
