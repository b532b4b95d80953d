"""Which model classes transformers loads from compressed-tensors files: packed, dequantized, or not at all."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families import KINDS
from tiny import (
    dequantized,
    first_output,
    of_the_same_class,
    tensors_of,
)

import epmq
from epmq import replace_linear
from epmq.errors import FormatError
from epmq.formats.compressed_tensors import KEPT_PACKED, CompressedTensorsWriter
from epmq.formats.packed import planned_linear

LANGUAGE = {name: kind for name, kind in KINDS.items() if kind.model.endswith("ForCausalLM")}
STATES: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2}
OTHERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "falcon": ("FalconForCausalLM", "FalconConfig", {**STATES, "num_attention_heads": 4}),
    "mamba": ("MambaForCausalLM", "MambaConfig", {**STATES, "state_size": 8}),
    "mamba2": (
        "Mamba2ForCausalLM", "Mamba2Config",
        {**STATES, "state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 2, "chunk_size": 8},
    ),
    "rwkv": ("RwkvForCausalLM", "RwkvConfig", {**STATES, "context_length": 64}),
    "recurrentgemma": (
        "RecurrentGemmaForCausalLM", "RecurrentGemmaConfig",
        {**STATES, "num_hidden_layers": 3, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 1,
         "head_dim": 8, "lru_width": 32, "attention_window_size": 16},
    ),
    # A rule for older files would rename its shared experts once more: they are stored as those files have them.
    "laguna": (
        "LagunaForCausalLM", "LagunaConfig",
        {**STATES, "intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16,
         "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
         "shared_expert_intermediate_size": 16},
    ),
    "gptj": (
        "GPTJForCausalLM", "GPTJConfig", {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4},
    ),
}  # fmt: skip


def language_model(name: str) -> Any:
    torch.manual_seed(0)
    if name in LANGUAGE:
        kind = LANGUAGE[name]
        model = getattr(transformers, kind.model)(getattr(transformers, kind.config)(**kind.settings))
    else:
        cls, config, settings = OTHERS[name]
        model = getattr(transformers, cls)(getattr(transformers, config)(**settings))
    return model.eval()


@pytest.mark.parametrize("name", [*LANGUAGE, *OTHERS])
def test_symmetric_language_models_load_in_transformers(name: str, tmp_path: Path) -> None:
    model = language_model(name)
    replace_linear(model, 4, 16, True, exclude=["lm_head", "head", "dt_proj"])
    epmq.save(copy.deepcopy(model), tmp_path / "out")
    theirs = of_the_same_class(tmp_path / "out", headless=False)
    wanted = first_output(dequantized(model))
    assert wanted.norm() > 0
    assert (first_output(theirs) - wanted).norm() <= 0.01 * wanted.norm()
    settings = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert ("dequantize" in settings) == (name in OTHERS)
    assert ("transformers 5 dequantizes it while loading" in card) == (name in OTHERS)
    assert ("transformers 5 keeps it packed" in card) == (name in LANGUAGE)


def test_every_class_that_is_kept_packed_is_tried() -> None:
    assert {kind.model for kind in LANGUAGE.values()} == KEPT_PACKED


# -- classes that transformers cannot load packed --------------------------------------------------------------------


@pytest.mark.parametrize("family", ["Dinov2", "Dinov2WithRegisters"])
def test_a_class_whose_weights_may_be_cut_is_told_not_to_load(family: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=12, patch_size=4
    )
    model: Any = getattr(transformers, f"{family}Model")(config).eval()
    replace_linear(model, 4, 16, True)
    epmq.save(model, tmp_path / "out")
    assert "transformers 5.23 refuses it" in (tmp_path / "out" / "README.md").read_text()
    with pytest.raises(ValueError, match=r"mlp\.weights_in"):
        type(model).from_pretrained(tmp_path / "out")
    batch = {"pixel_values": torch.randn(2, 3, 12, 12)}
    with torch.no_grad():
        found, wanted = (one(**batch).last_hidden_state for one in (epmq.load(tmp_path / "out"), model))
    assert torch.equal(found, wanted)


def test_a_class_of_which_transformers_loads_other_modules_is_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.Llama4TextConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, intermediate_size_mlp=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_local_experts=2,
    )  # fmt: skip
    model = transformers.Llama4ForCausalLM(config).eval()
    replace_linear(model, 4, 16, True)
    with pytest.raises(
        FormatError, match=r"layers\.0\.feed_forward\.experts: .* a Llama4TextExperts .* use format native"
    ):
        epmq.save(model, tmp_path / "out")
    epmq.save(model, tmp_path / "out", format="native")
    assert torch.equal(first_output(epmq.load(tmp_path / "out")), first_output(model))


def test_tensors_are_stored_under_the_names_of_published_files(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.DINOv3ViTConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=8
    )
    model = transformers.DINOv3ViTModel(config).eval()
    scale = model.model.layer[0].layer_scale1.lambda1
    scale.data.uniform_()
    replace_linear(model, 4, 16, True)
    epmq.save(model, tmp_path / "out")
    stored = tensors_of(tmp_path / "out")
    assert "layer.0.layer_scale1.lambda1" in stored and "layer.0.attention.q_proj.weight_packed" in stored
    theirs: Any = of_the_same_class(tmp_path / "out", headless=False)
    assert torch.equal(theirs.model.layer[0].layer_scale1.lambda1, scale)
    batch = {"pixel_values": torch.randn(2, 3, 16, 16)}
    with torch.no_grad():
        found, wanted = (one(**batch).last_hidden_state for one in (epmq.load(tmp_path / "out"), model))
    assert torch.equal(found, wanted)


def test_a_bias_may_be_stored_apart_from_its_codes(tmp_path: Path) -> None:
    """VideoMAE's files have q_bias beside query.weight."""
    torch.manual_seed(0)
    config = transformers.VideoMAEConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=8,
        num_frames=4,
    )  # fmt: skip
    model = transformers.VideoMAEModel(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    replace_linear(model, 4, 16, True)
    epmq.save(model, tmp_path / "out")
    names = tensors_of(tmp_path / "out")
    assert "encoder.layer.1.attention.attention.q_bias" in names
    assert "encoder.layer.1.attention.attention.query.weight_packed" in names
    wanted, found = model.state_dict(), epmq.load(tmp_path / "out").state_dict()
    assert wanted.keys() == found.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
    theirs = of_the_same_class(tmp_path / "out", headless=False).state_dict()
    dense = dequantized(model).state_dict()
    assert all(torch.equal(theirs[name], dense[name]) for name in dense)


def test_a_linear_that_transformers_would_read_under_no_name_is_refused(tmp_path: Path) -> None:
    with torch.device("meta"):
        model = transformers.MaskFormerModel(transformers.MaskFormerConfig())
    name = "pixel_level_module.encoder.model.encoder.layers.0.blocks.0.attention.self.query"
    writer = CompressedTensorsWriter(tmp_path, model, torch.float32)
    linear: Any = model.get_submodule(name)
    with pytest.raises(FormatError, match=rf"{re.escape(name)}\.weight_packed: transformers reads no tensor .* native"):
        writer.plan({name: planned_linear(tuple(linear.weight.shape), 4, 32, True, torch.float32)})
    assert list(tmp_path.iterdir()) == []
