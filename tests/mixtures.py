"""Tiny mixtures of real transformers classes, and their checkpoints."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
import transformers
from families import DECODER, VOCABULARY
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import epmq

MOE = {**DECODER, "moe_intermediate_size": 16, "num_experts_per_tok": 2}
UNGATED = {
    "hybrid_override_pattern": "M*E-E", "mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 8, "n_groups": 1,
    "n_routed_experts": 4, "moe_shared_expert_intermediate_size": 16, "chunk_size": 8, "n_group": 1, "topk_group": 1,
}  # fmt: skip
LATENT = {
    "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8, "n_group": 1,
    "topk_group": 1, "first_k_dense_replace": 1, "n_shared_experts": 1, "n_routed_experts": 4,
}  # fmt: skip
SETTINGS: dict[str, dict[str, Any]] = {
    "Mixtral": {**MOE, "num_local_experts": 4},
    "Qwen2Moe": {**MOE, "num_experts": 4},
    "Qwen3Moe": {**MOE, "num_experts": 4},
    "Olmoe": {**MOE, "num_experts": 4},
    "DeepseekV2": {**MOE, **LATENT},
    "MiniMaxM2": {**MOE, "num_local_experts": 4},
    "NemotronH": {**MOE, **UNGATED},
    "GptOss": {**MOE, "num_local_experts": 4, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    "AriaText": {**MOE, "moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1, "intermediate_size": 16},
    "DeepseekV4": {**MOE, "n_routed_experts": 4, "n_shared_experts": 1},
    "HYV4": {**MOE, "n_routed_experts": 4},
}
VISION: dict[str, Any] = {
    "depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16, "patch_size": 4,
}  # fmt: skip


BATCH = {"input_ids": torch.arange(3, 3 + 8 * 16).remainder(VOCABULARY - 3).add(3).view(8, 16)}
TASKS = ("a", "b")


def make(family: str, **more: Any) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**SETTINGS.get(family, MOE), **more})
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.2)
    return model


def varied(model: nn.Module) -> nn.Module:
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(0.03 * torch.randn_like(parameter))
    return twin


def qwen_vl() -> nn.Module:
    """Whose experts files hold turned; no side of them is another's."""
    torch.manual_seed(0)
    vision = {**VISION, "out_hidden_size": 32, "deepstack_visual_indexes": [0], "num_position_embeddings": 16}
    rope = {"rope_type": "default", "mrope_section": [2, 1, 1]}
    text = {**MOE, "num_experts": 4, "moe_intermediate_size": 24, "rope_parameters": rope}
    config = transformers.Qwen3VLMoeConfig(text_config=text, vision_config=vision)
    model: nn.Module = transformers.Qwen3VLMoeForConditionalGeneration(config).eval()
    return model


def ernie_vl() -> nn.Module:
    """Whose experts transformers shares out to two mixtures as it loads them."""
    torch.manual_seed(0)
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    text = {**MOE, "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": [16, 16], "rope_parameters": rope}
    config = transformers.Ernie4_5_VLMoeConfig(text_config=text, vision_config=VISION)
    model: nn.Module = transformers.Ernie4_5_VLMoeForConditionalGeneration(config).eval()
    return model


def turn_experts(folder: Path) -> None:
    """As the checkpoints of Qwen3-VL-MoE that are published; save_pretrained leaves experts unturned."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    turned = {name: tensor.mT.contiguous() for name, tensor in tensors.items() if ".experts." in name}
    assert turned
    save_file(tensors | turned, file, metadata={"format": "pt"})


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**BATCH).logits
    return found


def quantized(model: nn.Module, **settings: Any) -> epmq.QuantResult:
    experts = {task: varied(model) for task in TASKS}
    config = epmq.QuantConfig(**{"bits": 4, "group_size": 16, "sym": True, **settings})
    return epmq.quantize(model, experts, {task: [BATCH] for task in TASKS}, config)


def fuse(tensors: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """As a checkpoint that keeps experts as the model has them."""
    kept = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    return kept | {name: tensor.clone() for name, tensor in model.state_dict().items() if ".experts." in name}
