"""GGUF files by llama.cpp: its converter on our folders, its engine on what ``epmq gguf`` makes of that.

    llama_cpp_files.py LLAMA_CPP FOLDER [--json FILE]

LLAMA_CPP holds convert_hf_to_gguf.py, and FOLDER is a new one. For tiny random models of several classes, quantized to
nearest, it prints how many linears they have, how many tensors hold their codes, and how far llama.cpp's logits are
from those of the file in 32 bits (relative, in norm): with our codes, where only its rounding of activations is left,
and with its own rounding of the same file to the same type. The exit status is 1 where a linear was not found, or where
its own rounding to 4 bits is less than twice as far as our file, or to 8 bits less than half as far.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import json
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
from epmq.files import write_text
from epmq.formats.kinds import open_reader
from epmq.gguf_jobs import gguf_file

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
    """llama.cpp's own rounding; embeddings and head are kept wide, as in our file."""
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    settings.token_embedding_type = settings.output_tensor_type = llama_cpp.GGML_TYPE_F32
    settings.pure = True
    if llama_cpp.llama_model_quantize(str(wide).encode(), str(out).encode(), ctypes.byref(settings)):
        raise SystemExit(f"llama.cpp does not quantize {wide}.")
    return out


def converted(llama: Path, checkpoint: Path, wide: Path, kind: str) -> Path:
    """What the converter makes of a folder."""
    command = [sys.executable, llama / "convert_hf_to_gguf.py", checkpoint, "--outtype", kind, "--outfile", wide]
    subprocess.run(command, check=True, capture_output=True)
    return wide


def compare(family: str, kind: str, llama: Path, folder: Path, words: Path) -> dict[str, Any]:
    place = folder / f"{family}-{kind}"
    place.mkdir()
    checkpoint = quantized(family, *GRIDS[kind], place / "quantized", words)
    wide = converted(llama, checkpoint, place / "wide.gguf", "f32")
    summary = gguf_file(checkpoint, wide, place / "ours.gguf")
    wanted = logits(wide)
    ours, theirs = (
        float(numpy.linalg.norm(logits(path) - wanted) / numpy.linalg.norm(wanted))
        for path in (place / "ours.gguf", rounded_there(wide, place / "theirs.gguf", kind))
    )
    whole = not summary.wide and not summary.absent and set(summary.packed.values()) == {kind}
    found = {
        "model": family, "type": kind, "linears": len(open_reader(checkpoint).linears), "tensors": len(summary.packed),
        "ours": ours, "theirs": theirs, "right": whole and ours < theirs * (2 if kind == "Q8_0" else 0.5),
    }  # fmt: skip
    print(" ".join(f"{value:.2g}" if isinstance(value, float) else str(value) for value in found.values()), flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("llama", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    chosen = parser.parse_args()
    chosen.folder.mkdir(parents=True)
    words = tokenizer(chosen.folder)
    rows = [compare(family, kind, chosen.llama, chosen.folder, words) for family in MODELS for kind in GRIDS]
    if chosen.json is not None:
        write_text(chosen.json, json.dumps({**about(), "rows": rows}, indent=1))
    sys.exit(int(not all(row["right"] for row in rows)))


def about() -> dict[str, str]:
    return {
        "llama-cpp-python": llama_cpp.__version__,
        "transformers": transformers.__version__,
        "date": str(datetime.date.today()),
    }


if __name__ == "__main__":
    main()
