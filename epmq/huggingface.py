"""transformers models: built without weights from a folder's configuration, tokenizers, files carried along."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from epmq import files, trust
from epmq.errors import EpmqError, ModelError, first_line
from epmq.experts import separate

TOKENIZER_FILES = (
    "tokenizer.json", "vocab.txt", "vocab.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model",
    "spm.model",
)  # fmt: skip
TOKENIZER_CONFIG = "tokenizer_config.json"
# Configurations, and whatever the tokenizers of transformers read.
CARRIED = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "vocab.txt", "vocab.json", "merges.txt", "tokenizer.model", "spiece.model", "added_tokens.json",
    "sentencepiece.bpe.model", "sentencepiece.model", "spm.model", "spm_char.model", "source.spm", "target.spm",
    "target_vocab.json", "vocab-src.json", "vocab-tgt.json", "bpe.codes", "dict.txt", "prophetnet.tokenizer",
    "normalizer.json", "byte_maps.json", "emoji.json", "entity_vocab.json", "word_shape.json",
    "word_pronunciation.json", "tekken.json", "chat_template.jinja", "chat_template.json",
    "additional_chat_templates/*.jinja", "preprocessor_config.json", "video_preprocessor_config.json",
    "processor_config.json",
    # What sentence-transformers does after the model, without the weights that it may have for it.
    "modules.json", "config_sentence_transformers.json", "sentence_*_config.json", "[0-9]*_*/config.json",
)  # fmt: skip

# What numbers of config.json may be at most, by a part of their name: transformers makes lists and tables of them.
MOST = ((re.compile("position|ctx|length"), 2**24), (re.compile(r"(^|_)n(um)?_|layer|depth"), 2**20))
# A checkpoint may hold experts in one tensor that the model has one by one, and lack what is tied or starts anew.
SPARE_PARAMETERS, PARAMETERS_PER_TENSOR = 10_000, 1_000


def skeleton_from_folder(folder: str | Path, stored: set[str], bare: bool = False, fused: bool = False) -> nn.Module:
    """The model of ``folder/config.json`` with parameters on the meta device and its buffers made, in the dtype that is
    named there, as transformers makes them.

    stored: tensor names of the checkpoint. A pooler that the checkpoint has no weights for is left out, as sentence
    encoders are published. bare: without the head. fused: experts as transformers keeps them, not one by one
    (:mod:`epmq.experts`). Raises ModelError when transformers is absent or does not know the model.
    """
    transformers, config = _transformers(), config_from_folder(folder)
    if hasattr(config, "quantization_config"):
        # It tells of the files; the skeleton is an ordinary model.
        del config.quantization_config
    # A kernel of the hub may be named here, which transformers would fetch and run.
    config._attn_implementation = config._experts_implementation = None
    with (
        _refusing(f"{folder}: transformers cannot build the model of config.json"),
        _parameters_on_meta(stored),
        _default_dtype(getattr(config, "dtype", None)),
    ):
        named: Any = getattr(transformers, (config.architectures or [""])[0], None)
        # Not every name that a file could give is a model.
        known = isinstance(named, type) and issubclass(named, transformers.PreTrainedModel) and not bare
        model: nn.Module = (
            named(config) if known else transformers.AutoModel.from_config(config, trust_remote_code=False)
        )
    pooler: Any = getattr(model, "pooler", None)
    if pooler is not None and pooler.state_dict() and not any("pooler." in name for name in stored):
        model.pooler = None  # type: ignore[assignment]
    return model.eval() if fused else separate(model.eval())


def config_from_folder(folder: str | Path) -> Any:
    """The transformers configuration of ``folder/config.json``. Raises ModelError for one that cannot be read."""
    _check_config(Path(folder) / "config.json")
    with _refusing(f"{folder}: transformers cannot read config.json"):
        return _transformers().AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)


def knows_other_tokens(folder: str | Path, base: str | Path, vocabulary: Callable[[], Mapping[str, int]]) -> bool:
    """Whether a folder has a tokenizer that can be loaded and has other ids for tokens of the base's ``vocabulary``,
    which is asked for where its files are others."""
    named = [name for name in TOKENIZER_FILES if trust.is_file(Path(folder) / name)]
    pairs = [(Path(folder) / name, Path(base) / name) for name in named]
    if all(trust.is_file(other) and own.read_bytes() == other.read_bytes() for own, other in pairs):
        return False
    try:
        its = tokenizer_from_folder(folder).get_vocab()
    except ModelError:
        return False  # nothing reads it
    return any(its.get(token) != number for token, number in vocabulary().items())


def tokenizer_from_folder(folder: str | Path) -> Any:
    """The tokenizer of a folder. Raises ModelError naming the folder where its files are missing or cannot be read."""
    if not Path(folder).is_dir():
        raise ModelError(f"{folder}: there is no such folder.")
    for path in _named(folder):
        trust.require_file(path, ModelError)
    if not _has_one_of(folder, (*TOKENIZER_FILES, TOKENIZER_CONFIG)):
        raise ModelError(f"{folder}: holds no tokenizer files ({', '.join((*TOKENIZER_FILES, TOKENIZER_CONFIG))}).")
    with _refusing(f"{folder}: no tokenizer can be loaded from it"):
        tokenizer = _transformers().AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
    # Without its vocabulary transformers makes a tokenizer of special tokens alone. One of bytes reads none.
    reads = [name for name in tokenizer.vocab_files_names.values() if name != TOKENIZER_CONFIG]
    if reads and not _has_one_of(folder, (*TOKENIZER_FILES, *reads)):
        raise ModelError(
            f"{folder}: holds no vocabulary for {type(tokenizer).__name__}, which reads {', '.join(reads)};"
            " add these files."
        )
    return tokenizer


def stop_tokens(folder: str | Path) -> int | list[int] | None:
    """The ids that end a text, where ``generation_config.json`` names some."""
    path = Path(folder) / "generation_config.json"
    if not trust.exists(path):
        return None
    trust.require_file(path, ModelError)
    with _refusing(f"{path}: transformers cannot read it"):
        settings = _transformers().GenerationConfig.from_pretrained(str(folder), local_files_only=True)
    ids: int | list[int] | None = settings.eos_token_id
    for token in ids if isinstance(ids, list) else [ids]:
        if token is not None and not trust.is_whole(token, -1):
            raise ModelError(f"{path}: eos_token_id is {ids!r}, expected the number of a token or a list of them.")
    return ids


def carry_files(
    source: str | Path, target: Path, dtype: torch.dtype | None = None, class_name: str | None = None
) -> None:
    """Copy configuration, tokenizer and processor files; the configuration says ``dtype`` and ``class_name`` when they
    are given."""
    for path in carried(source):
        copy = target / path.relative_to(source)
        with files.naming_space(copy):
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, copy)
    config = target / "config.json"
    if config.is_file():
        content = trust.read_json(config, ModelError)
        if not isinstance(content, dict):
            raise ModelError(f"{config}: expected a JSON object.")
        said: dict[str, Any] = {}
        if dtype is not None:
            # transformers 5 writes the first, 4 the second; both read both.
            said["dtype" if "dtype" in content else "torch_dtype"] = str(dtype).removeprefix("torch.")
        if class_name is not None:
            said["architectures"] = [class_name]
        if not said.items() <= content.items():
            config.write_text(json.dumps(content | said, indent=2) + "\n", encoding="utf-8")


def carried(folder: str | Path) -> list[Path]:
    """The files of a folder that :func:`carry_files` copies."""
    return [path for path in _named(folder) if trust.is_file(path)]


def _has_one_of(folder: str | Path, names: Iterable[str]) -> bool:
    return any(trust.is_file(Path(folder) / name) for name in names)


def _named(folder: str | Path) -> list[Path]:
    """Whatever lies in a folder under one of the names of CARRIED."""
    return [path for name in CARRIED for path in sorted(Path(folder).glob(name)) if trust.exists(path)]


def _check_config(path: Path) -> None:
    """Raise ModelError for a config.json whose numbers would fill the memory before a model is built."""
    content = trust.read_json(path, ModelError)
    if not isinstance(content, dict):
        raise ModelError(f"{path}: expected a JSON object.")
    sections: list[Any] = [content]
    while sections:
        section = sections.pop()
        if not isinstance(section, dict):
            sections += [inner for inner in section if isinstance(inner, (dict, list))]
            continue
        sections += [inner for inner in section.values() if isinstance(inner, (dict, list))]
        for key, value in section.items():
            most = next((limit for words, limit in MOST if words.search(key)), trust.INT64_MAX)
            # Infinity is no size: some models bound times by it.
            if isinstance(value, (int, float)) and value != math.inf and abs(value) > most:
                raise ModelError(f"{path}: {key} is larger than {most:,}, which is more than any model has.")


@contextmanager
def _refusing(what: str) -> Iterator[None]:
    """ModelError, ``what`` and the first line of the reason, for whatever transformers raises on a file."""
    try:
        yield
    except (EpmqError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # A panic of the tokenizers' Rust is no Exception.
        raise ModelError(f"{what} ({first_line(error)}).") from error


@contextmanager
def _parameters_on_meta(stored: set[str]) -> Iterator[None]:
    """While active, new parameters take no memory, while buffers, which configurations compute, are made for real.

    Raises ModelError when they are far more than the stored tensors.
    """
    original = nn.Module.register_parameter
    room = SPARE_PARAMETERS + PARAMETERS_PER_TENSOR * len(stored)

    def register(self: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        nonlocal room
        room -= 1
        if room < 0:
            raise ModelError(
                f"config.json describes a model of far more parameters than the {len(stored)} tensors of the"
                " checkpoint; they do not belong together."
            )
        original(self, name, parameter)
        # One that is there already is kept as it is, so that ties hold.
        if parameter is not None and not parameter.is_meta:
            self._parameters[name] = nn.Parameter(parameter.detach().to("meta"), requires_grad=False)

    nn.Module.register_parameter = register  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = original  # type: ignore[method-assign]


@contextmanager
def _default_dtype(dtype: Any) -> Iterator[None]:
    """While active, tensors are made in ``dtype`` where models run in it."""
    original = torch.get_default_dtype()
    torch.set_default_dtype(dtype if dtype in (torch.float32, torch.float16, torch.bfloat16) else original)
    try:
        yield
    finally:
        torch.set_default_dtype(original)


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ModelError("this needs transformers: pip install 'epmq[hf]'.") from error
    return transformers
