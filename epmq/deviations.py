"""Where an expert's configuration would have its weights compute something else than the base's, as which it is run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import nn

from epmq import trust
from epmq.errors import ModelError
from epmq.hub import find_model
from epmq.huggingface import config_from_folder

# What changes nothing of what weights compute outside of training and generation, or shows in the tensors: by name, or
# by how it begins or ends.
WITHOUT_EFFECT = {
    "apply_spec_augment", "architectures", "auto_map", "begin_suppress_tokens", "chunk_size_feed_forward", "dtype",
    "encoder_stride", "finetuning_task", "forced_bos_token_id", "forced_decoder_ids", "forced_eos_token_id",
    "gradient_checkpointing", "id2label", "image_size", "label2id", "logit_scale_init_value", "max_length",
    "max_position_embeddings", "max_window_layers", "model_max_length", "n_positions", "num_labels",
    "output_attentions", "output_hidden_states", "output_router_logits", "prefix", "pretraining_tp", "problem_type",
    "quantization_config", "reorder_and_upcast_attn", "return_dict", "rope_parameters.type", "rope_scaling.type",
    "router_jitter_noise", "suppress_tokens", "task_specific_params", "tf_legacy_loss", "tie_word_embeddings",
    "tokenizer_class", "torch_dtype", "torchscript", "use_bfloat16", "use_cache", "vocab_size",
}  # fmt: skip
STARTS = ("_", "ctc_", "mask_feature_", "mask_time_", "summary_", "unsloth_")
ENDS = (
    "_coef", "_drop", "_pdrop", "_rate", "_std", "_token_id", "_version", "dropout", "dropout_prob",
    "initializer_factor", "initializer_range", "layerdrop", "loss_ignore_index",
)  # fmt: skip
# Names of one and the same.
SAME = {"swish": "silu"}
NAMED = 3  # keys that a note tells of


def config_of(model: Any) -> dict[str, Any] | None:
    """The configuration of a transformers model, of a module or a checkpoint's path or hub id; None where there is none
    that can be read."""
    config: Any = None
    if isinstance(model, (str, Path)):
        folder = find_model(model)
        if trust.is_file(folder / "config.json"):
            with suppress(ModelError):  # Nothing else reads it.
                config = config_from_folder(folder)
    elif isinstance(model, nn.Module):
        config = getattr(model, "config", None)
    told = getattr(config, "to_dict", None)
    return dict(told()) if callable(told) else None


def note_on(label: str, config: Mapping[str, Any] | None, base: Mapping[str, Any] | None) -> list[str]:
    """A sentence about what a configuration says otherwise than the base's, or none."""
    if config is None or base is None:
        return []
    found = [f"{key} {own!r} for {general!r}" for key, own, general in _deviating("", config, base)]
    if not found:
        return []
    more = f" and {len(found) - NAMED} more" if len(found) > NAMED else ""
    return [
        f"{label}: its configuration has {', '.join(found[:NAMED])}{more}; it is run with the base's, and may give"
        " other outputs than it was trained to."
    ]


def _deviating(
    where: str, own: Mapping[str, Any], general: Mapping[str, Any], whole: bool = False
) -> Iterator[tuple[str, Any, Any]]:
    """Key, value and the base's of all that differs. whole: a key that is in one alone counts too; in a model's section
    it is none of the class's own."""
    for name in sorted({*own, *general} if whole else own.keys() & general.keys(), key=str):
        key, first, second = f"{where}{name}", own.get(name), general.get(name)
        if SAME.get(str(first), first) == SAME.get(str(second), second) or WITHOUT_EFFECT & {name, key}:
            continue
        if name.startswith(STARTS) or name.endswith(ENDS):
            continue
        if isinstance(first, Mapping) and isinstance(second, Mapping):
            yield from _deviating(f"{key}.", first, second, not name.endswith("_config"))
        else:
            yield key, first, second
