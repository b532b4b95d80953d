"""A tiny Llama with a tokenizer trained on a page of text, as folders on disk."""

from __future__ import annotations

from pathlib import Path

import torch

import epmq
from epmq.huggingface import carry_files

TEXT = (
    "Merging gives one model where there were many. Quantizing gives a small one where there was a large one. "
    "The anchor keeps the weights near the merged ones; the experts say where the outputs should be. "
) * 6
POSITIONS = 64


def make_llama(folder: Path, seed: int = 0) -> Path:
    """A randomly initialised Llama of two blocks, tied embeddings, and a byte-level BPE tokenizer of 300 tokens."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=letters, show_progress=False
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 0)])
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=len(fast), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=POSITIONS, bos_token_id=0, eos_token_id=1,
        tie_word_embeddings=True,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    model.save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


def quantized_folder(plain: Path, folder: Path) -> Path:
    """The folder's model with its linears rounded to nearest, packed, beside its tokenizer."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(plain, local_files_only=True)
    epmq.replace_linear(model, group_size=16)
    epmq.save(model, folder, format="native")
    carry_files(plain, folder)
    return folder
