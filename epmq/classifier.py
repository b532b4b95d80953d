"""The head of a classifier's checkpoint, put on another body: what an expert was fine-tuned with, on a merged model."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from epmq.devices import home_of
from epmq.errors import ModelError
from epmq.evaluate import Pooling
from epmq.huggingface import skeleton_from_folder
from epmq.names import NamedForModel
from epmq.skeleton import fill
from epmq.sources import FileSource, main_dtype, open_source


class ClassifierHead:
    """What a ...ForSequenceClassification checkpoint of transformers has around its body; a head as
    :class:`epmq.evaluate.Head`.

    folder: the checkpoint. pad: what texts are padded with. Its own pooler is used where the other body has none.
    Raises ModelError for a checkpoint of another kind, SourceError for files that cannot be read.
    """

    def __init__(self, folder: str | Path, pad: int):
        source = FileSource(folder)
        model: Any = skeleton_from_folder(folder, set(source.keys()))
        self.file, self._prefix = str(folder), model.base_model_prefix
        body = getattr(model, self._prefix, None)
        if body is None or not hasattr(model, "num_labels"):
            raise ModelError(
                f"{folder}: {type(model).__name__} is no classifier of texts; give the folder of one, or a file with"
                " weight and bias."
            )
        self.classes: int = model.num_labels
        self._kind, pooler = type(body), getattr(body, "pooler", None)
        named = NamedForModel(source, model, aliases=True)
        self._pooler: nn.Module | None = pooler
        if pooler is not None:
            fill(pooler, f"{self._prefix}.pooler.", named, None)
        setattr(model, self._prefix, None)
        fill(model, "", named, None)
        model.config.pad_token_id = pad
        self._model = model

    def logits(self, model: nn.Module, inputs: dict[str, Tensor], pooling: Pooling) -> Tensor:
        """fp32 ``[texts, classes]``. Raises ModelError for a body of another class."""
        body: Any = getattr(model, "base_model", model)
        if type(body) is not self._kind:
            raise ModelError(
                f"{self.file}: its head is one for {self._kind.__name__}, and {type(body).__name__} is scored."
            )
        dtype = main_dtype(open_source(dict(body.named_parameters())))
        self._model.to(home_of(body), dtype)
        if self._pooler is not None and body.pooler is None:
            # A copy, whose owner goes on without.
            body = copy.copy(body)
            body._modules = {**body._modules, "pooler": self._pooler.to(home_of(body), dtype)}
        setattr(self._model, self._prefix, body)
        try:
            found: Tensor = self._model(**inputs).logits
        finally:
            setattr(self._model, self._prefix, None)
        if found.shape != (len(inputs["input_ids"]), self.classes):
            raise ModelError(f"{self.file}: its model gives no logits [texts, classes]; give a classifier of texts.")
        return found.float()
