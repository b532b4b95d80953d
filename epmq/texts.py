"""What a transformers model can be given of texts: how long they may be, which tokens, what its decoder reads."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from epmq.data import IGNORED_LABEL, special_tokens
from epmq.errors import ConfigError, EpmqError, ModelError, first_line
from epmq.runner import unrunnable

# The inputs of a model's forward that no text gives.
OF_OTHER_KINDS = ("pixel_values", "input_features", "input_values")


def longest_input(model: Any) -> int | None:
    """Tokens that the model's positions allow, where its configuration says so."""
    limit = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if not isinstance(limit, int) or limit < 1:
        return None
    for name, module in model.named_modules():
        # Where padding has a position of its own (RoBERTa), counting begins behind it.
        if isinstance(module, nn.Embedding) and "position" in name and module.padding_idx is not None:
            return min(limit, module.num_embeddings) - module.padding_idx - 1
    return limit


def check_length(model: nn.Module, longest: int, file: str | Path, setting: str, given: int) -> None:
    """Raise ConfigError, naming the setting and its value, when the model cannot read a text of ``longest`` tokens."""
    limit = longest_input(model)
    if limit is not None and longest > limit:
        raise ConfigError(
            f"{setting}={given}: {file} has a text of {longest} tokens, and {type(model).__name__} reads at most"
            f" {limit}; use {limit}."
        )


def check_room(tokenizer: Any, setting: str, given: int) -> None:
    """Raise ConfigError when a text cut at so many tokens would keep none of its own: with no more than their special
    tokens allowed, tokenizers leave texts as long as they are."""
    special = special_tokens(tokenizer)
    if given <= special:
        raise ConfigError(
            f"{setting}={given}: the tokenizer puts {special} tokens of its own around every text, so that none of the"
            f" text would be left; use {special + 1} or more."
        )


def check_vocabulary(model: Any, largest: int, text: str | Path) -> None:
    """Raise ModelError when the greatest token id of ``text`` (a file's name, or what it is) has no embedding."""
    try:
        weight = model.get_input_embeddings().weight
    except (AttributeError, NotImplementedError):
        return  # It is for the model to say where it keeps them.
    if largest >= len(weight):
        raise ModelError(
            f"{text}: the tokenizer makes token {largest} of it, and {type(model).__name__}'s embedding has"
            f" {len(weight)} rows; tokenizer and weights do not belong together."
        )


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether a decoder reads beside the encoder, which needs inputs of its own."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def decoder_inputs(model: Any, labels: Tensor) -> dict[str, Tensor]:
    """What the decoder reads to predict ``labels`` (int64 ``[B, S]``, -100 at padding): by the model's own rule, or
    where it has none the start token and all labels but the last.

    Raises ModelError for a configuration that names no start token.
    """
    name, config = type(model).__name__, model.config
    try:
        if hasattr(model, "prepare_decoder_input_ids_from_labels"):
            ids: Tensor = model.prepare_decoder_input_ids_from_labels(labels)
        else:
            start = torch.full_like(labels[:, :1], config.decoder_start_token_id)
            ids = torch.cat([start, labels[:, :-1]], 1)
            ids = ids.masked_fill(ids == IGNORED_LABEL, config.pad_token_id)
    except (TypeError, ValueError, AttributeError) as error:
        raise ModelError(
            f"{name}: its decoder's inputs cannot be made ({first_line(error)}); config.json must name"
            " decoder_start_token_id and pad_token_id."
        ) from error
    return {"decoder_input_ids": ids, "decoder_attention_mask": (labels != IGNORED_LABEL).long()}


def check_reads_texts(model: nn.Module) -> None:
    """Raise ModelError for a model whose main input is none of texts."""
    main = getattr(model, "main_input_name", "input_ids")
    if main in OF_OTHER_KINDS:
        raise _needs(model, main)


def unreadable(model: nn.Module, inputs: Mapping[str, Any], error: Exception) -> EpmqError:
    """What to tell of a model whose forward raised ``error`` on texts."""
    known = inspect.signature(model.forward).parameters
    missing = next((name for name in OF_OTHER_KINDS if name in known and name not in inputs), None)
    if missing is not None:
        return _needs(model, missing)
    return error if isinstance(error, EpmqError) else unrunnable(model, inputs, error)


def _needs(model: nn.Module, missing: str) -> ModelError:
    return ModelError(
        f"{type(model).__name__}: texts alone are not what it reads, it needs {missing}; use it in Python, with batches"
        " that hold them."
    )
