"""Tiny random transformers models with QuantLinears inside, for tests of formats and benchmarks/peers/loaders.py."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from epmq import QuantLinear, replace_linear, restore_linear
from epmq.sources import FileSource

SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
}  # fmt: skip
VISION: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 16,
    "patch_size": 8,
}  # fmt: skip
KEPT = ("lm_head", "classifier", "projection")
IDS = torch.arange(24).reshape(2, 12) + 1


def tiny(kind: str) -> nn.Module:
    """A random model of a real class; widths are multiples of 32."""
    torch.manual_seed(0)
    model: nn.Module
    if kind == "llama":
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, num_key_value_heads=2))
    elif kind == "bert":
        model = transformers.BertForSequenceClassification(transformers.BertConfig(**SIZES))
    elif kind == "t5":
        t5 = transformers.T5Config(vocab_size=64, d_model=64, d_ff=96, d_kv=16, num_layers=2, num_heads=4)
        model = transformers.T5ForConditionalGeneration(t5)
    else:
        clip = transformers.CLIPConfig(text_config=SIZES, vision_config=VISION, projection_dim=32)
        model = transformers.CLIPModel(clip)
    model.eval()
    return model


def quantized(kind: str, bits: int, sym: bool, group_size: int, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The tiny model with all linears but its heads rounded to nearest."""
    model = tiny(kind).to(dtype)
    replace_linear(model, bits, group_size, sym, exclude=KEPT)
    return model


def quantized_names(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, QuantLinear)]


def answers(model: nn.Module) -> Tensor:
    """Logits on fixed inputs."""
    inputs: dict[str, Tensor] = {"input_ids": IDS}
    if isinstance(model, transformers.T5ForConditionalGeneration):
        inputs["decoder_input_ids"] = IDS
    if isinstance(model, transformers.CLIPModel):
        inputs["pixel_values"] = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        out = model.eval()(**inputs)
    logits: Tensor = out.logits_per_text if isinstance(model, transformers.CLIPModel) else out.logits
    return logits


def dequantized(model: nn.Module) -> nn.Module:
    """The same model, in place, with ordinary linears."""
    restore_linear(model)
    return model


def edit_json(path: Path, change: Any) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def edit_config(folder: Path, change: Any) -> None:
    edit_json(folder / "config.json", lambda config: change(config["quantization_config"]))


def edit_tensors(folder: Path, changes: dict[str, Tensor | None]) -> None:
    """Replace, add or (None) remove tensors of an unsharded folder."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    for name, tensor in changes.items():
        tensors.pop(name, None)
        if tensor is not None:
            tensors[name] = tensor.contiguous()
    save_file(tensors, path, metadata={"format": "pt"})


def copy_of(folder: Path, target: Path) -> Path:
    return Path(shutil.copytree(folder, target))


def tensors_of(folder: Path) -> dict[str, Tensor]:
    source = FileSource(folder)
    return {key: source.tensor(key) for key in source.keys()}


def of_the_same_class(folder: Path, headless: bool) -> Any:
    """What transformers makes of a folder: the class that was saved, or the model without its head."""
    config = json.loads((folder / "config.json").read_text())
    kind: Any = transformers.AutoModel if headless else getattr(transformers, config["architectures"][0])
    model, info = kind.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    if not headless:
        assert not info["unexpected_keys"]
    return model.eval()


def first_output(model: Any) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(input_ids=IDS)[0]
    return out
