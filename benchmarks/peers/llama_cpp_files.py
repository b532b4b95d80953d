"""GGUF files by llama.cpp: its converter on our folders, its engine on what ``epmq gguf`` makes of that.

    llama_cpp_files.py LLAMA_CPP FOLDER

LLAMA_CPP holds convert_hf_to_gguf.py. For tiny random models of several classes, quantized to nearest, it prints which
types the tensors have, and how far llama.cpp's logits are from those of the file in 32 bits (relative, in norm): with
our codes, where only its rounding of activations is left, and with its own rounding of the same file to the same type.
The exit status is 1 where a linear was not found, or our file is further away than 8-bit activations can make it.
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path
from typing import Any

import llama_cpp
import numpy
import sentencepiece
import torch
import transformers
from torch import nn

from epmq import QuantConfig, quantize, save
from epmq.formats.kinds import open_reader
from epmq.gguf_jobs import Summary, gguf_file

ROOT = Path(__file__).resolve().parents[2]
WORDS = 400
SIZES: dict[str, Any] = {
    "vocab_size": WORDS, "hidden_size": 256, "intermediate_size": 384, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Mistral": {},
    "Gemma2": {"head_dim": 64, "query_pre_attn_scalar": 64},
    "Phi3": {},
    "Mixtral": {"num_local_experts": 4},
}
GRIDS = {"Q4_0": (4, True), "Q4_1": (4, False), "Q8_0": (8, True)}
TOKENS = list(range(5, 69))
GROUP = 128
# llama.cpp rounds activations to 8 bits, 32 with a scale of their own.
MOST_DISTANCE = 0.05


def tokenizer(folder: Path) -> Path:
    """A sentencepiece model of this repository's documents."""
    text = folder / "text.txt"
    text.write_text("\n".join(file.read_text() for file in sorted(ROOT.glob("docs/*.md"))))
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(folder / "tokenizer"), vocab_size=WORDS, model_type="bpe", byte_fallback=True,
        pad_id=0, bos_id=1, eos_id=2, unk_id=3, minloglevel=2,
    )  # fmt: skip
    return folder / "tokenizer.model"


def quantized(family: str, bits: int, sym: bool, folder: Path, words: Path) -> Path:
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SIZES, **MODELS[family])
    model: nn.Module = getattr(transformers, f"{family}ForCausalLM")(config).half()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.06)
    inputs = {"a": [{"input_ids": torch.tensor([TOKENS])}]}
    config = QuantConfig(method="rtn", bits=bits, sym=sym, group_size=GROUP)
    save(quantize(model, {"a": model}, inputs, config), folder)
    (folder / words.name).write_bytes(words.read_bytes())
    return folder


def logits(path: Path) -> Any:
    model = llama_cpp.Llama(str(path), n_ctx=256, n_threads=2, logits_all=True, verbose=False)
    model.eval(TOKENS)
    found = numpy.array(model.scores[: len(TOKENS)], dtype=numpy.float64)
    model.close()
    return found


def rounded_there(wide: Path, out: Path, kind: str) -> Path:
    """llama.cpp's own rounding; embeddings and head stay as they are, as in our file."""
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    settings.token_embedding_type = settings.output_tensor_type = llama_cpp.GGML_TYPE_F32
    settings.pure = True
    if llama_cpp.llama_model_quantize(str(wide).encode(), str(out).encode(), ctypes.byref(settings)):
        raise SystemExit(f"llama.cpp does not quantize {wide}.")
    return out


def compare(family: str, kind: str, llama: Path, folder: Path, words: Path) -> bool:
    place = folder / f"{family}-{kind}"
    place.mkdir()
    checkpoint = quantized(family, *GRIDS[kind], place / "quantized", words)
    wide = place / "wide.gguf"
    command = [sys.executable, llama / "convert_hf_to_gguf.py", checkpoint, "--outtype", "f32", "--outfile", wide]
    subprocess.run(command, check=True, capture_output=True)
    summary: Summary = gguf_file(checkpoint, wide, place / "ours.gguf")
    wanted = logits(wide)
    ours, theirs = (
        float(numpy.linalg.norm(logits(path) - wanted) / numpy.linalg.norm(wanted))
        for path in (place / "ours.gguf", rounded_there(wide, place / "theirs.gguf", kind))
    )
    whole = not summary.wide and not summary.absent and set(summary.packed.values()) == {kind}
    linears, tensors = len(open_reader(checkpoint).linears), len(summary.packed)
    print(f"| {family} | {kind} | {linears} | {tensors} | {ours:.2g} | {theirs:.2g} |", flush=True)
    return whole and ours < MOST_DISTANCE


def main() -> None:
    llama, folder = Path(sys.argv[1]), Path(sys.argv[2])
    folder.mkdir(parents=True)
    words = tokenizer(folder)
    print(f"llama-cpp-python {llama_cpp.__version__}, transformers {transformers.__version__}")
    print("| model | type | linears | tensors | distance with our codes | with llama.cpp's rounding |")
    print("|---|---|---|---|---|---|")
    right = [compare(family, kind, llama, folder, words) for family in MODELS for kind in GRIDS]
    sys.exit(int(not all(right)))


if __name__ == "__main__":
    main()
