"""Tiny models of real transformers classes: a base, three experts around it, their merge, padded calibration inputs."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import epmq
from epmq.pipeline import ModuleSink

TASKS = ("a", "b", "c")
VOCABULARY = 60
LENGTH = 10
COMMON = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 48, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
ENCODER = {**COMMON, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
DECODER = {**COMMON, "num_key_value_heads": 2, "head_dim": 8, "attention_dropout": 0.0}
# Nine patches and a class token: as many positions as the texts have, so that no mask fits by its shape alone.
IMAGES = {"image_size": 12, "patch_size": 4}
VISION = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, **IMAGES}
T5 = {
    "vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4,
    "dropout_rate": 0.0, "decoder_start_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
GPT2 = {
    "vocab_size": VOCABULARY, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4,
    "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
PHI = {**COMMON, "resid_pdrop": 0.0, "embd_pdrop": 0.0}


@dataclass(frozen=True)
class Kind:
    """A model class with its configuration, the inputs it takes, and how many linears its blocks have in all.

    tied: names of parameters that are one. inputs: any of text, image, decoder (ids) and labels. left: pad there.
    """

    model: str
    config: str
    settings: dict[str, Any]
    linears: int
    inputs: tuple[str, ...] = ("text",)
    left: bool = False
    tied: tuple[str, ...] = ()


def clip_settings() -> dict[str, Any]:
    text = {**COMMON, "num_key_value_heads": 4}
    return {"text_config": text, "vision_config": VISION, "projection_dim": 16}


KINDS: dict[str, Kind] = {
    "bert": Kind("BertModel", "BertConfig", ENCODER, 12),
    "bert-classifier": Kind("BertForSequenceClassification", "BertConfig", {**ENCODER, "num_labels": 3}, 12),
    "roberta-lm": Kind(
        "RobertaForMaskedLM", "RobertaConfig", {**ENCODER, "pad_token_id": 0}, 12,
        tied=("roberta.embeddings.word_embeddings.weight", "lm_head.decoder.weight"),
    ),
    "vit": Kind("ViTModel", "ViTConfig", VISION, 12, ("image",)),
    "clip": Kind("CLIPModel", "CLIPConfig", clip_settings(), 24, ("text", "image")),
    "clip-vision": Kind("CLIPVisionModel", "CLIPVisionConfig", VISION, 12, ("image",)),
    "t5": Kind(
        "T5ForConditionalGeneration", "T5Config", T5, 32, ("text", "decoder"),
        tied=("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"),
    ),
    "flan-t5": Kind(
        "T5ForConditionalGeneration", "T5Config",
        {**T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}, 36, ("text", "labels"),
        tied=("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"),
    ),
    "llama": Kind("LlamaForCausalLM", "LlamaConfig", DECODER, 14, left=True),
    "qwen2": Kind(
        "Qwen2ForCausalLM", "Qwen2Config", {**DECODER, "tie_word_embeddings": True}, 14, left=True,
        tied=("model.embed_tokens.weight", "lm_head.weight"),
    ),
    "qwen3": Kind("Qwen3ForCausalLM", "Qwen3Config", DECODER, 14, left=True),
    "mistral": Kind("MistralForCausalLM", "MistralConfig", {**DECODER, "sliding_window": 4}, 14),
    "gemma": Kind(
        "GemmaForCausalLM", "GemmaConfig", DECODER, 14, left=True,
        tied=("model.embed_tokens.weight", "lm_head.weight"),
    ),
    "gemma2": Kind(
        "Gemma2ForCausalLM", "Gemma2Config", {**DECODER, "sliding_window": 4, "query_pre_attn_scalar": 8}, 14,
        tied=("model.embed_tokens.weight", "lm_head.weight"),
    ),
    "gemma3": Kind(
        "Gemma3ForCausalLM", "Gemma3TextConfig",
        {**DECODER, "sliding_window": 4, "query_pre_attn_scalar": 8,
         "layer_types": ["sliding_attention", "full_attention"]}, 14,
        tied=("model.embed_tokens.weight", "lm_head.weight"),
    ),
    "gpt2": Kind(
        "GPT2LMHeadModel", "GPT2Config", GPT2, 8, tied=("transformer.wte.weight", "lm_head.weight"),
    ),
    "phi": Kind("PhiForCausalLM", "PhiConfig", PHI, 12),
    "phi3": Kind("Phi3ForCausalLM", "Phi3Config", DECODER, 8, left=True),
}  # fmt: skip


@dataclass
class Job:
    """What ``epmq.quantize`` takes, and masks of the positions that count: per task and batch, by kind of sequence."""

    kind: Kind
    base: nn.Module
    experts: dict[str, nn.Module]
    merged: nn.Module
    calibration: dict[str, list[dict[str, Tensor]]]
    generator: torch.Generator = field(default_factory=torch.Generator)

    def mask_at(self, linear: str, batch: dict[str, Tensor]) -> Tensor | None:
        """Which positions of a linear's input are no padding (None: there is none), told by the linear's name."""
        if "decoder" in self.kind.inputs or "labels" in self.kind.inputs:
            of_encoder = linear.startswith("encoder.") or linear.endswith(("EncDecAttention.k", "EncDecAttention.v"))
            if not of_encoder:
                return batch["labels"] != -100 if "labels" in batch else batch["decoder_attention_mask"].bool()
        if "text" not in self.kind.inputs or "vision" in linear:
            return None
        return batch["attention_mask"].bool()

    def garbled(self) -> dict[str, list[dict[str, Tensor]]]:
        """The calibration with other token ids at the padded positions."""
        return {task: [self._garbled(batch) for batch in batches] for task, batches in self.calibration.items()}

    def _garbled(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        changed = dict(batch)
        for ids, mask in (("input_ids", "attention_mask"), ("decoder_input_ids", "decoder_attention_mask")):
            if ids in batch:
                other = torch.randint(3, VOCABULARY, batch[ids].shape, generator=self.generator)
                changed[ids] = torch.where(batch[mask] > 0, batch[ids], other)
        return changed


def make_job(kind: Kind, seed: int = 0) -> Job:
    """Experts are the base plus a tenth of noise in every tensor; the merge is task arithmetic with 0.4."""
    import transformers

    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    config = getattr(transformers, kind.config)(**kind.settings)
    base = getattr(transformers, kind.model)(config).eval()
    with torch.no_grad():
        for parameter in base.parameters():
            if parameter.dim() > 1:  # the usual 0.02 would leave attention flat and the blocks almost linear
                parameter.copy_(torch.randn(parameter.shape) / min(parameter.shape) ** 0.5)
            else:
                parameter.add_(0.05 * torch.randn(parameter.shape))
    experts = {task: _varied(base) for task in TASKS}
    merged = epmq.merge(base, experts, method="task_arithmetic", scaling=0.4)
    calibration = {task: [make_batch(kind, generator) for _ in range(2)] for task in TASKS}
    return Job(kind, base, experts, merged, calibration, generator)


def _varied(model: nn.Module) -> nn.Module:
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            spread = 0.1 * float(parameter.std().nan_to_num(0.5)) if parameter.numel() > 1 else 0.0
            parameter.add_(max(spread, 0.01) * torch.randn(parameter.shape))
    return twin


def make_batch(kind: Kind, generator: torch.Generator, examples: int = 6) -> dict[str, Tensor]:
    """Inputs of all kinds the model takes; texts of 4 to 10 tokens."""
    batch: dict[str, Tensor] = {}

    def ids() -> Tensor:
        return torch.randint(3, VOCABULARY, (examples, LENGTH), generator=generator)

    def mask(left: bool) -> Tensor:
        lengths = torch.randint(4, LENGTH, (examples, 1), generator=generator)
        kept = (torch.arange(LENGTH) < lengths).long()
        return kept.flip(1) if left else kept

    if "text" in kind.inputs:
        attention = mask(kind.left)
        batch |= {"input_ids": ids() * attention, "attention_mask": attention}
    if "image" in kind.inputs:
        batch["pixel_values"] = torch.randn(examples, 3, 12, 12, generator=generator)
    if "decoder" in kind.inputs:
        attention = mask(False)
        batch |= {"decoder_input_ids": ids() * attention, "decoder_attention_mask": attention}
    if "labels" in kind.inputs:
        batch["labels"] = torch.where(mask(False) > 0, ids(), -100)
    return batch


def tensors_of(sink: ModuleSink) -> dict[str, list[Tensor]]:
    """All that a run handed out, by name: codes, scales and zeros of a quantized weight, and its bias."""
    found = {name: [tensor] for name, tensor in sink.tensors.items()}
    for name, layer in sink.linears.items():
        value = layer.quantized()
        parts = (value.codes, value.scales, value.zeros, layer.bias)
        found[name] = [part for part in parts if part is not None]
    return found
