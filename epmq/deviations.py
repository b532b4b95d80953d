"""Where an expert's configuration would have its weights compute something else than the base's, as which it is run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from epmq import trust
from epmq.hub import find_model
from epmq.huggingface import config_from_folder

# What changes nothing of what weights compute outside of training, or shows in the tensors: by name, by its end.
WITHOUT_EFFECT = {
    "architectures", "auto_map", "chunk_size_feed_forward", "dtype", "finetuning_task", "gradient_checkpointing",
    "id2label", "label2id", "max_length", "max_position_embeddings", "model_max_length", "num_labels",
    "output_attentions", "output_hidden_states", "output_router_logits", "pretraining_tp", "problem_type",
    "quantization_config", "return_dict", "router_jitter_noise", "task_specific_params", "tie_word_embeddings",
    "torch_dtype", "torchscript", "transformers_version", "use_cache",
}  # fmt: skip
ENDS_WITHOUT_EFFECT = (
    "_coef", "_drop", "_pdrop", "_std", "_token_id", "dropout", "dropout_prob", "dropout_rate", "initializer_factor",
    "initializer_range", "layerdrop",
)  # fmt: skip
NAMED = 3  # keys that a note tells of


def config_of(model: Any) -> dict[str, Any] | None:
    """The configuration of a transformers model, of a module or a checkpoint's path or hub id; None without one.

    Raises ModelError for a config.json that transformers cannot read.
    """
    config: Any = None
    if isinstance(model, (str, Path)):
        folder = find_model(model)
        config = config_from_folder(folder) if trust.is_file(folder / "config.json") else None
    elif isinstance(model, nn.Module):
        config = getattr(model, "config", None)
    return dict(config.to_dict()) if hasattr(config, "to_dict") else None


def note_on(label: str, config: Mapping[str, Any] | None, base: Mapping[str, Any] | None) -> list[str]:
    """A sentence about what a configuration says otherwise than the base's, or none."""
    if config is None or base is None:
        return []
    # A key that is in one alone is none of the model's class.
    common = config.keys() & base.keys()
    found = [
        f"{key} {own!r} for {general!r}"
        for key in sorted(common)
        for key, own, general in _in(key, config[key], base[key])
    ]
    if not found:
        return []
    more = f" and {len(found) - NAMED} more" if len(found) > NAMED else ""
    return [
        f"{label}: its configuration has {', '.join(found[:NAMED])}{more}; it is run with the base's, and may give"
        " other outputs than it was trained to."
    ]


def _in(key: str, own: Any, general: Any) -> Iterator[tuple[str, Any, Any]]:
    """Key, value and the base's of all that differs below a key."""
    last = key.rpartition(".")[2]
    if last.startswith("_") or last in WITHOUT_EFFECT or last.endswith(ENDS_WITHOUT_EFFECT) or own == general:
        return
    if isinstance(own, Mapping) and isinstance(general, Mapping):
        for inner in sorted({*own, *general}, key=str):
            yield from _in(f"{key}.{inner}", own.get(inner), general.get(inner))
    else:
        yield key, own, general
