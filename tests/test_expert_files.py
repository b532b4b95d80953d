"""Mixtures in files: experts written one by one or joined again, what is refused, and what folders give."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import WORDS, write_tokenizer
from safetensors.torch import load_file, save_file
from torch import nn

import epmq
from epmq.errors import FormatError, SourceError
from epmq.experts import separated
from epmq.jobs import calibration_of, quantize_to_folder
from epmq.recipe import Recipe
from epmq.scoring import load_any
from epmq.statistics_jobs import collect_to_folder, quantize_statistics_to_folder

transformers = pytest.importorskip("transformers")
if transformers.__version__.startswith("4."):
    pytest.skip("transformers 4 keeps experts apart itself", allow_module_level=True)

from mixtures import BATCH, TASKS, fuse, logits, make, quantized, qwen_vl, turn_experts, varied  # noqa: E402


def loaded_by_transformers(folder: Path) -> Any:
    model, told = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not told["missing_keys"] and not told["unexpected_keys"]
    return model


@pytest.mark.parametrize("family", ["Mixtral", "Qwen3Moe", "DeepseekV2", "NemotronH", "DeepseekV4"])
def test_transformers_puts_symmetric_experts_together_again(family: str, tmp_path: Path) -> None:
    result = quantized(make(family))
    epmq.save(result, tmp_path / "out")
    assert torch.equal(logits(epmq.load(tmp_path / "out")), logits(result.model))
    model = loaded_by_transformers(tmp_path / "out")
    torch.testing.assert_close(logits(model), logits(result.model), rtol=1e-4, atol=1e-4)
    own = type(model)(model.config)
    assert torch.equal(logits(epmq.load(tmp_path / "out", model=own)), logits(result.model))


def test_asymmetric_experts_are_told_not_to_load_in_transformers(tmp_path: Path) -> None:
    result = quantized(make("Qwen3Moe"), sym=False)
    epmq.save(result, tmp_path / "out")
    assert "it joins experts of symmetric grids only" in (tmp_path / "out" / "README.md").read_text()
    with pytest.raises(RuntimeError, match="conversion"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(epmq.load(tmp_path / "out")), logits(result.model))


@pytest.mark.parametrize(
    ("family", "settings", "format", "message"),
    [
        ("GraniteMoe", {}, "compressed-tensors", "transformers reads no single experts of GraniteMoeForCausalLM"),
        ("Qwen3Moe", {"overrides": {"down_proj": {"bits": 8}}}, "compressed-tensors", "experts, .* of one scheme only"),
        ("Qwen3Moe", {"exclude": [r"experts\.0\."]}, "compressed-tensors", "experts, .* of one scheme only"),
        ("GptOss", {}, "compressed-tensors", "transformers reads no single experts of GptOssForCausalLM"),
        ("Qwen3Moe", {}, "gptq", "experts: loaders of gptq may keep experts in other modules"),
        ("Qwen3Moe", {"exclude": ["experts"]}, "gptq", "experts: loaders of gptq may keep experts in other modules"),
    ],
)
def test_files_that_loaders_would_misread_are_refused(
    family: str, settings: dict[str, Any], format: Any, message: str, tmp_path: Path
) -> None:
    more = {"num_local_experts": 4} if family == "GraniteMoe" else {}
    result = quantized(make(family, **more), **settings)
    with pytest.raises(FormatError, match=message):
        epmq.save(result, tmp_path / "out", format=format)
    epmq.save(result, tmp_path / "native", format="native")
    assert torch.equal(logits(epmq.load(tmp_path / "native")), logits(result.model))


@pytest.mark.parametrize("family", ["Mixtral", "NemotronH", "GptOss"])
def test_excluded_experts_stay_as_transformers_has_them(family: str, tmp_path: Path) -> None:
    result = quantized(make(family), exclude=["experts"])
    assert not list(separated(result.model))
    epmq.save(result, tmp_path / "out")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    torch.testing.assert_close(logits(model), logits(result.model), rtol=1e-4, atol=1e-4)
    assert torch.equal(logits(epmq.load(tmp_path / "out")), logits(result.model))


@pytest.mark.parametrize("family", ["Mixtral", "Qwen3Moe"])
def test_experts_of_one_block_may_be_excluded(family: str, tmp_path: Path) -> None:
    model = make(family)
    result = quantized(model, exclude=[r"layers\.0\."])
    assert list(separated(result.model)) == ["model.layers.1.mlp.experts"]
    epmq.save(result, tmp_path / "out")
    assert torch.equal(logits(epmq.load(tmp_path / "out")), logits(result.model))
    assert torch.equal(logits(epmq.load(tmp_path / "out", model=make(family))), logits(result.model))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    torch.testing.assert_close(logits(theirs), logits(result.model), rtol=1e-4, atol=1e-4)
    # Of these files' experts, transformers makes the tensor that is kept.
    expert: Any = varied(model)
    expert.save_pretrained(tmp_path / "expert")
    config = epmq.QuantConfig(bits=4, group_size=16, exclude=[r"layers\.1\."])
    of_files = epmq.quantize(model, {"a": tmp_path / "expert"}, {"a": [BATCH]}, config)
    in_memory = epmq.quantize(model, {"a": expert}, {"a": [BATCH]}, config)
    assert torch.equal(logits(of_files.model), logits(in_memory.model))


@pytest.mark.parametrize("family", ["Mixtral", "Qwen3Moe", "GptOss", "AriaText"])
@pytest.mark.parametrize("settings", [{"exclude": ["experts"]}, {"overrides": {"experts": {"bits": None}}}], ids=str)
def test_experts_that_are_not_packed_are_as_transformers_has_them(
    settings: dict[str, Any], family: str, tmp_path: Path
) -> None:
    base = make(family)
    base.save_pretrained(tmp_path / "base")
    config = epmq.QuantConfig(bits=4, group_size=16, sym=True, method="rtn", **settings)
    result = epmq.quantize(base, None, {}, config)
    assert not list(separated(result.model)) and "matches no linear" not in "".join(result.report["notes"])
    epmq.save(result, tmp_path / "of memory")
    quantize_to_folder(Recipe(base=tmp_path / "base", quantization=config), tmp_path / "of folders")
    for folder in ("of memory", "of folders"):
        assert torch.equal(logits(epmq.load(tmp_path / folder)), logits(result.model))
        model = loaded_by_transformers(tmp_path / folder)
        torch.testing.assert_close(logits(model), logits(result.model), rtol=1e-4, atol=1e-4)
    kept = f"{next(name for name in base.state_dict() if name.endswith('experts.down_proj'))}"
    assert torch.equal(result.model.state_dict()[kept], base.state_dict()[kept])


@pytest.fixture
def job(tmp_path: Path) -> Recipe:
    """A base, its experts and texts in folders; the closed form without rounding."""
    base = make("GptOss")
    base.save_pretrained(tmp_path / "base")
    for task in TASKS:
        varied(base).save_pretrained(tmp_path / task)  # type: ignore[operator]
    write_tokenizer(tmp_path / "base")
    lines = [json.dumps({"text": " ".join(WORDS[n : n + 5])}) + "\n" for n in range(5, len(WORDS) - 5)]
    (tmp_path / "texts.jsonl").write_text("".join(lines))
    return Recipe.model_validate(
        {
            "base": tmp_path / "base",
            "experts": {task: tmp_path / task for task in TASKS},
            "calibration": {"tasks": dict.fromkeys(TASKS, tmp_path / "texts.jsonl"), "max_length": 8},
            "quantization": {"bits": None},
        }
    )


def test_experts_with_weights_of_their_own_are_joined_as_they_are_written(job: Recipe, tmp_path: Path) -> None:
    """The closed form without rounding, from folders."""
    quantize_to_folder(job, tmp_path / "out")
    base, *experts = (transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("base", *TASKS))
    given = dict(zip(TASKS, experts, strict=True))
    wanted = epmq.quantize(epmq.merge(base, given), given, calibration_of(job), job.quantization)
    assert torch.equal(logits(loaded_by_transformers(tmp_path / "out")), logits(wanted.model))


def test_statistics_of_experts_that_are_not_quantized_are_left_alone(job: Recipe, tmp_path: Path) -> None:
    for task in TASKS:
        collect_to_folder(job, task, tmp_path / f"of {task}")
    less = epmq.QuantConfig(bits=4, group_size=16, sym=True, exclude=["experts"])
    folders = [tmp_path / f"of {task}" for task in TASKS]
    quantize_statistics_to_folder(job.model_copy(update={"quantization": less}), folders, tmp_path / "out")
    ours = epmq.load(tmp_path / "out")
    assert sum(isinstance(module, epmq.QuantLinear) for module in ours.modules()) == 2 * 4
    theirs = logits(loaded_by_transformers(tmp_path / "out"))
    torch.testing.assert_close(theirs, logits(ours), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["Mixtral", "NemotronH", "GptOss", "GraniteMoe"])
def test_restored_experts_are_saved_as_transformers_has_them(family: str, tmp_path: Path) -> None:
    more = {"num_local_experts": 4} if family == "GraniteMoe" else {}
    result = quantized(make(family, **more))
    wanted, before = logits(result.model), len(list(separated(result.model)))
    names = epmq.restore_linear(result.model)
    assert before and not list(separated(result.model)) and any(".experts." in name for name in names)
    result.model.save_pretrained(tmp_path / "out")  # type: ignore[operator]
    model = loaded_by_transformers(tmp_path / "out")
    torch.testing.assert_close(logits(model), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("stored", ["apart", "fused"])
@pytest.mark.parametrize("family", ["Mixtral", "Qwen3Moe", "NemotronH", "GptOss", "AriaText", "DeepseekV4"])
def test_folders_give_what_modules_in_memory_give(family: str, stored: str, tmp_path: Path) -> None:
    base = make(family)
    models: dict[str, nn.Module] = {"base": base, **{task: varied(base) for task in TASKS}}
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)  # type: ignore[operator]
        if stored == "fused":
            file = tmp_path / name / "model.safetensors"
            save_file(fuse(load_file(file), model), file, metadata={"format": "pt"})
    torch.testing.assert_close(logits(load_any(tmp_path / "base")), logits(base), rtol=1e-4, atol=1e-4)
    config = epmq.QuantConfig(bits=4, group_size=16, sym=True, method="rtn")
    experts = {task: tmp_path / task for task in TASKS}
    recipe = Recipe(base=tmp_path / "base", experts=experts, quantization=config, format="native")
    quantize_to_folder(recipe, tmp_path / "out")
    merged = epmq.merge(base, {task: models[task] for task in TASKS})
    wanted = epmq.quantize(merged, None, {}, config)
    assert torch.equal(logits(epmq.load(tmp_path / "out")), logits(wanted.model))


def test_fused_experts_may_have_other_names_in_files(tmp_path: Path) -> None:
    base = make("GraniteMoe", num_local_experts=4)
    base.save_pretrained(tmp_path / "base")
    assert any("input_linear" in name for name in load_file(tmp_path / "base" / "model.safetensors"))
    config = epmq.QuantConfig(bits=4, group_size=16, method="rtn")
    quantize_to_folder(Recipe(base=tmp_path / "base", quantization=config, format="native"), tmp_path / "out")
    wanted = epmq.quantize(base, None, {}, config)
    assert torch.equal(logits(epmq.load(tmp_path / "out")), logits(wanted.model))


def test_experts_that_files_hold_turned_are_refused_by_the_format_that_transformers_reads(tmp_path: Path) -> None:
    model: Any = qwen_vl()
    nearest = epmq.QuantConfig(bits=8, group_size=16, method="rtn")
    result = epmq.quantize(model, None, {}, nearest)
    assert len(list(separated(result.model))) == 2
    assert (logits(result.model) - logits(model)).norm() < 0.05 * logits(model).norm()
    model.save_pretrained(tmp_path / "base")
    turn_experts(tmp_path / "base")
    recipe = Recipe(base=tmp_path / "base", quantization=nearest)
    with pytest.raises(FormatError, match="transformers reads no single experts of Qwen3VLMoe"):
        quantize_to_folder(recipe, tmp_path / "out")
    quantize_to_folder(recipe.model_copy(update={"format": "native"}), tmp_path / "out")
    assert torch.equal(logits(epmq.load(tmp_path / "out")), logits(result.model))


@pytest.mark.parametrize(
    ("leaf", "change", "message"),
    [
        ("gate_up_proj", lambda t: t.mT.contiguous(), r"gate_up_proj' has shape \[4, 96, 32\], expected \[4, 32, 96\]"),
        ("gate_up_proj", lambda t: t[0].clone(), r"gate_up_proj' has shape \[32, 96\], expected \[4, 32, 96\]"),
        ("down_proj", lambda t: t[:3].clone(), r"down_proj' has shape \[3, 48, 32\], expected \[4, 48, 32\]"),
        ("down_proj_bias", lambda t: None, "experts.down_proj_bias' is missing, though others of those experts are"),
    ],
)
@pytest.mark.parametrize("place", ["base", "a"])
def test_fused_tensors_that_do_not_fit_are_named(
    leaf: str, change: Any, message: str, place: str, tmp_path: Path
) -> None:
    base: Any = make("GptOss")
    for name in ("base", "a"):
        base.save_pretrained(tmp_path / name)
    file = tmp_path / place / "model.safetensors"
    tensors = load_file(file)
    key = f"model.layers.1.mlp.experts.{leaf}"
    changed = change(tensors.pop(key))
    save_file(tensors if changed is None else tensors | {key: changed}, file, metadata={"format": "pt"})
    config = epmq.QuantConfig(bits=4, group_size=16, method="rtn")
    recipe = Recipe(base=tmp_path / "base", experts={"a": tmp_path / "a"}, quantization=config, format="native")
    with pytest.raises(SourceError, match=f"{tmp_path / place}.*{message}"):
        quantize_to_folder(recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()
