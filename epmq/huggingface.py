"""transformers models: built without weights from a folder's configuration, tokenizers, files carried along."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from epmq.errors import ModelError, SourceError
from epmq.sources import WeightSource

TOKENIZER_FILES = ("tokenizer.json", "vocab.txt", "vocab.json", "tokenizer.model", "spiece.model")
CARRIED = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "vocab.txt", "vocab.json", "merges.txt", "tokenizer.model", "spiece.model", "added_tokens.json",
    "sentencepiece.bpe.model", "chat_template.jinja", "chat_template.json", "preprocessor_config.json",
    "video_preprocessor_config.json", "processor_config.json",
)  # fmt: skip


def skeleton_from_folder(folder: str | Path, stored: set[str]) -> nn.Module:
    """The model of ``folder/config.json`` with parameters on the meta device and its buffers made.

    stored: tensor names of the checkpoint. A pooler that the checkpoint has no weights for is left out, as sentence
    encoders are published. Raises ModelError when transformers is absent or does not know the model.
    """
    transformers = _transformers()
    try:
        config = transformers.AutoConfig.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{folder}: transformers cannot read config.json ({str(error).splitlines()[0]}).") from error
    if hasattr(config, "quantization_config"):
        # It tells of the files; the skeleton is an ordinary model.
        del config.quantization_config
    architecture = (config.architectures or [""])[0]
    model_class = getattr(transformers, architecture, transformers.AutoModel)
    with _parameters_on_meta():
        model: nn.Module = (
            model_class(config) if model_class is not transformers.AutoModel else model_class.from_config(config)
        )
    if getattr(model, "pooler", None) is not None and not any("pooler." in name for name in stored):
        model.pooler = None  # type: ignore[assignment]
    return model.eval()


def tokenizer_from_folder(folder: str | Path) -> Any:
    """The tokenizer of a folder."""
    if not any((Path(folder) / name).is_file() for name in TOKENIZER_FILES):
        raise ModelError(f"{folder}: holds no tokenizer files ({', '.join(TOKENIZER_FILES)}).")
    try:
        return _transformers().AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{folder}: no tokenizer can be loaded from it ({str(error).splitlines()[0]}).") from error


def carry_files(source: str | Path, target: Path, dtype: str | None = None) -> None:
    """Copy configuration, tokenizer and processor files; ``dtype`` becomes the configuration's when one is given."""
    for name in CARRIED:
        if (Path(source) / name).is_file():
            shutil.copyfile(Path(source) / name, target / name)
    config = target / "config.json"
    if dtype is not None and config.is_file():
        content = json.loads(config.read_text(encoding="utf-8"))
        # transformers 5 writes the first, 4 the second; both read both.
        key = "dtype" if "dtype" in content else "torch_dtype"
        config.write_text(json.dumps({**content, key: dtype}, indent=2) + "\n", encoding="utf-8")


class NamedForModel:
    """A checkpoint seen under a model's own tensor names, with or without the base model's prefix.

    Tied tensors go by the first of their names in the model, whichever of them the checkpoint has; where it has
    several, ``tensor`` raises SourceError unless they are equal.
    """

    def __init__(self, source: WeightSource, model: nn.Module):
        self._source = source
        present = set(source.keys())
        prefix = getattr(model, "base_model_prefix", "")
        self._key_of: dict[str, str] = {}
        self._copies: dict[str, list[str]] = {}
        first_name: dict[int, str] = {}
        for name, tensor in model.state_dict(keep_vars=True).items():
            for candidate in (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}.")):
                if candidate in present:
                    first = first_name.setdefault(id(tensor), name)
                    if self._key_of.setdefault(first, candidate) != candidate:
                        self._copies.setdefault(first, []).append(candidate)
                    break
            else:
                first_name.setdefault(id(tensor), name)
        used = {*self._key_of.values(), *(key for keys in self._copies.values() for key in keys)}
        self.dropped = sorted(present - used)

    @property
    def name(self) -> str:
        return self._source.name

    def keys(self) -> list[str]:
        return list(self._key_of)

    def shape(self, key: str) -> tuple[int, ...]:
        return self._source.shape(self._key_of.get(key, key))

    def dtype(self, key: str) -> torch.dtype:
        return self._source.dtype(self._key_of.get(key, key))

    def tensor(self, key: str) -> Tensor:
        stored = self._key_of.get(key, key)
        tensor = self._source.tensor(stored)
        for copy in self._copies.get(key, []):
            if not torch.equal(self._source.tensor(copy), tensor):
                raise SourceError(
                    f"{self.name}: tensors {stored!r} and {copy!r} are tied in the model but differ here; make them"
                    " equal, or untie them in the base's config.json (tie_word_embeddings)."
                )
        return tensor


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """While active, new parameters take no memory, while buffers, which configurations compute, are made for real."""
    original = nn.Module.register_parameter

    def register(self: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        original(self, name, parameter)
        # One that is there already is kept as it is, so that ties hold.
        if parameter is not None and not parameter.is_meta:
            self._parameters[name] = nn.Parameter(parameter.detach().to("meta"), requires_grad=False)

    nn.Module.register_parameter = register  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = original  # type: ignore[method-assign]


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ModelError("this needs transformers: pip install 'epmq[hf]'.") from error
    return transformers
