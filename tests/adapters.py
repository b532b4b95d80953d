"""Tiny models on disk and LoRA adapters over them, made by transformers and peft."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

VOCABULARY = 48


def llama(tied: bool = False, dtype: torch.dtype = torch.float32, layers: int = 2, seed: int = 0) -> nn.Module:
    import transformers

    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=tied, bos_token_id=None,
        eos_token_id=None,
    )  # fmt: skip
    model: Any = transformers.LlamaForCausalLM(config)
    made: nn.Module = model.to(dtype).eval()
    return made


def gpt2(tied: bool = True) -> nn.Module:
    import transformers

    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=32, bos_token_id=0, eos_token_id=0,
        tie_word_embeddings=tied,
    )  # fmt: skip
    model: nn.Module = transformers.GPT2LMHeadModel(config).eval()
    return model


def bert_language_model() -> nn.Module:
    import transformers

    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=32,
    )  # fmt: skip
    model: nn.Module = transformers.BertForMaskedLM(config).eval()
    return model


def save_adapter(model: Any, folder: Path, seed: int = 0, merge: bool = True, **settings: Any) -> dict[str, Tensor]:
    """Put a LoRA adapter with random factors on a copy of ``model`` and save it; returns what peft merges it into."""
    import peft

    torch.manual_seed(seed)
    adapted: Any = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**settings))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.2)
            elif "modules_to_save" in name:
                parameter.add_(0.1 * torch.randn(parameter.shape).to(parameter.dtype))
    adapted.save_pretrained(folder)
    if not merge:
        return {}
    merged: Any = adapted.merge_and_unload()
    return {name: tensor.detach().clone() for name, tensor in merged.state_dict().items()}


def train_tokenizer(folder: Path, texts: list[str]) -> int:
    """A byte-pair tokenizer of these texts that adds no special tokens; returns the size of its vocabulary."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    words = Tokenizer(models.BPE(unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    words.train_from_iterator(texts, trainer)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    fast.save_pretrained(folder)
    return int(words.get_vocab_size())
