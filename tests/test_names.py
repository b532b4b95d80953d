"""Checkpoints whose tensors are not called as in the model: read as transformers reads them, or refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import TASKS, Job, in_process, make_job, write_tokenizer
from families import DECODER, ENCODER, VISION
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import epmq
from epmq.adapters import AdapterSource
from epmq.errors import SourceError
from epmq.huggingface import skeleton_from_folder
from epmq.jobs import load_any, merge_to_folder, open_sources
from epmq.names import NamedForModel
from epmq.recipe import Recipe, read_recipe
from epmq.sources import FileSource

transformers = pytest.importorskip("transformers")

Model = dict[str, Tensor]
Change = Callable[[Model], Model]
WEIGHTS = "model.safetensors"


def change_file(path: Path, change: Change) -> None:
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


def places(job: Job) -> dict[str, Path]:
    return {"base": job.folder / "base" / WEIGHTS, **{task: job.expert(task) for task in TASKS}}


def results(job: Job, capsys: pytest.CaptureFixture[str], *out: str) -> list[Model]:
    """What ``merge`` and ``quantize`` make of a job, their standard error empty but for notes."""
    made = []
    for verb, name in zip(("merge", "quantize"), out, strict=True):
        done = in_process(capsys, verb, job.write(), "--out", job.folder / name)
        assert done.code == 0, done.err
        made.append(load_file(job.folder / name / WEIGHTS))
    return made


def assert_same(ours: Model, expected: Model) -> None:
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in expected.items())


# -- renames ----------------------------------------------------------------------------------------------------------


def old_norms(tensors: Model) -> Model:
    def old(name: str) -> str:
        return name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")

    return {old(name): tensor for name, tensor in tensors.items()}


def with_prefix(tensors: Model) -> Model:
    return {f"bert.{name}": tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize("where", [("base", *TASKS), ("base",), TASKS], ids="-".join)
@pytest.mark.parametrize("change", [old_norms, with_prefix])
def test_other_names_of_the_same_tensors_change_nothing(
    change: Change, where: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = make_job(tmp_path)
    merged, quantized = results(job, capsys, "m1", "q1")
    for name in where:
        change_file(places(job)[name], change)
    merged_again, quantized_again = results(job, capsys, "m2", "q2")
    # The merged model is called as its base; what transformers loads as one it loads as the other.
    assert_same(merged_again, change(merged) if "base" in where else merged)
    assert_same(quantized_again, quantized)
    assert_same(load_any(tmp_path / "m2").state_dict(), load_any(tmp_path / "m1").state_dict())


def vision_language_model() -> nn.Module:
    text = {**DECODER, "sliding_window": 4, "query_pre_attn_scalar": 8}
    config = transformers.Gemma3Config(text_config=text, vision_config=VISION, mm_tokens_per_image=1)
    model: nn.Module = transformers.Gemma3ForConditionalGeneration(config)
    return model


def neox() -> nn.Module:
    model: nn.Module = transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**ENCODER))
    return model


def vit_classifier() -> nn.Module:
    model: nn.Module = transformers.ViTForImageClassification(transformers.ViTConfig(**VISION))
    return model


@pytest.mark.parametrize("make", [vision_language_model, neox, vit_classifier])
def test_what_transformers_saves_is_read(make: Callable[[], Any], tmp_path: Path) -> None:
    model = make().eval()
    model.save_pretrained(tmp_path / "saved")
    assert_same(load_any(tmp_path / "saved").state_dict(), model.state_dict())
    merged: Any = epmq.merge(model, {"a": tmp_path / "saved"})
    assert_same(merged.state_dict(), model.state_dict())


def test_experts_in_memory_and_in_files_quantize_to_the_same_model(tmp_path: Path) -> None:
    base = transformers.ViTModel(transformers.ViTConfig(**VISION)).eval()
    expert = transformers.ViTModel(base.config).eval()
    expert.save_pretrained(tmp_path / "expert")
    base.save_pretrained(tmp_path / "base")
    calibration = {"a": [{"pixel_values": torch.randn(4, 3, 12, 12)}]}
    config = epmq.QuantConfig(group_size=16, rho=0.5)
    ours = epmq.quantize(base, {"a": tmp_path / "expert"}, calibration, config, base=tmp_path / "base")
    expected = epmq.quantize(base, {"a": expert}, calibration, config, base=base)
    assert_same(ours.model.state_dict(), expected.model.state_dict())


@pytest.mark.filterwarnings("ignore")  # peft's own
def test_an_adapter_over_files_of_other_names(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    from adapters import save_adapter

    model = transformers.ViTModel(transformers.ViTConfig(**VISION)).eval()
    model.save_pretrained(tmp_path / "base")
    projections = [
        name for name, module in model.named_modules() if "attention" in name and isinstance(module, nn.Linear)
    ]
    expected = save_adapter(model, tmp_path / "adapter", target_modules=projections)
    base = NamedForModel(FileSource(tmp_path / "base"), model)
    ours = AdapterSource(tmp_path / "adapter", base, model)
    assert_same({key: ours.tensor(key) for key in ours.keys()}, expected)
    # As the same adapter is called by a version that has the files' names in memory.
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    older = {}
    for key, tensor in stored.items():
        head, _, factor = key.removeprefix("base_model.model.").partition(".lora_")
        older[f"base_model.model.{base.stored_name(head + '.weight').removesuffix('.weight')}.lora_{factor}"] = tensor
    save_file(older, tmp_path / "adapter" / "adapter_model.safetensors")
    ours = AdapterSource(tmp_path / "adapter", base, model)
    assert_same({key: ours.tensor(key) for key in ours.keys()}, expected)


def mixtral() -> nn.Module:
    config = transformers.MixtralConfig(**DECODER, num_local_experts=4)
    model: nn.Module = transformers.MixtralForCausalLM(config)
    return model


def qwen_moe() -> nn.Module:
    config = transformers.Qwen3MoeConfig(**DECODER, num_experts=4, moe_intermediate_size=16)
    model: nn.Module = transformers.Qwen3MoeForCausalLM(config)
    return model


@pytest.mark.parametrize("make", [mixtral, qwen_moe])
def test_experts_that_transformers_joins_are_refused_by_name_and_merged_one_by_one(
    make: Callable[[], Any], tmp_path: Path
) -> None:
    model = make().eval()
    model.save_pretrained(tmp_path / "saved")
    stored = load_file(tmp_path / "saved" / WEIGHTS)
    if transformers.__version__.startswith("4."):  # which keeps them apart
        assert_same(load_any(tmp_path / "saved").state_dict(), model.state_dict())
        return
    with pytest.raises(
        SourceError, match=r"saved: transformers computes '.*experts\..*' from '.*experts\.0\..*weight'"
    ):
        load_any(tmp_path / "saved")
    merge_to_folder(Recipe(base=tmp_path / "saved", experts={"a": tmp_path / "saved"}), tmp_path / "merged")
    assert_same(load_file(tmp_path / "merged" / WEIGHTS), stored)


# -- what some files have and others lack -----------------------------------------------------------------------------


def with_positions(tensors: Model) -> Model:
    return {**tensors, "embeddings.position_ids": torch.arange(32)[None]}


@pytest.mark.parametrize("where", [("base",), TASKS, ("base", *TASKS)], ids="-".join)
def test_a_table_that_the_model_computes_is_left_out_with_a_note(
    where: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    job = make_job(tmp_path)
    merged, quantized = results(job, capsys, "m1", "q1")
    assert caplog.text == ""
    for name in where:
        change_file(places(job)[name], with_positions)
    assert in_process(capsys, "merge", job.write(), "--out", tmp_path / "m2").code == 0
    assert "embeddings.position_ids: in" in caplog.text
    assert_same(load_file(tmp_path / "m2" / WEIGHTS), merged)
    assert in_process(capsys, "quantize", job.write(), "--out", tmp_path / "q2").code == 0
    assert_same(load_file(tmp_path / "q2" / WEIGHTS), quantized)
    notes = json.loads((tmp_path / "q2" / "report.json").read_text())["notes"]
    assert any("embeddings.position_ids" in note for note in notes)


def tied_llama_job(folder: Path) -> Job:
    torch.manual_seed(0)
    job = make_job(folder)
    model: Any = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**{**DECODER, "vocab_size": 34, "tie_word_embeddings": True})
    )
    for path in places(job).values():
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.02 * torch.randn(parameter.shape))
        model.save_pretrained(path.parent)
    write_tokenizer(folder / "base")
    return job


def with_head(tensors: Model) -> Model:
    return {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}


@pytest.mark.parametrize("where", [("base",), (TASKS[0],), ("base", *TASKS)], ids="-".join)
@pytest.mark.parametrize("settings", [
    {"method": "task_arithmetic", "scaling": 0.4},
    # Its trim counts the entries of the whole model, tied ones once.
    {"method": "ties", "dialect": "fusion_bench", "density": 20, "scaling": 0.3},
], ids=lambda settings: settings["method"])  # fmt: skip
def test_merge_and_quantize_see_one_model_however_tied_tensors_are_stored(
    settings: dict[str, Any], where: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = tied_llama_job(tmp_path)
    job.recipe["merge"] = settings
    for name in where:
        change_file(places(job)[name], with_head)
    assert in_process(capsys, "merge", job.write(), "--out", tmp_path / "merged").code == 0
    recipe = read_recipe(job.write())
    seen = open_sources(recipe, skeleton_from_folder(recipe.base, set(FileSource(recipe.base).keys()))).merged
    assert_same(load_file(tmp_path / "merged" / WEIGHTS), {key: seen.tensor(key) for key in seen.keys()})


@pytest.mark.parametrize("verb", ["merge", "quantize"])
def test_a_head_that_only_an_expert_has_is_refused(
    verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = make_job(tmp_path)
    job.change_expert("reviews", **{"classifier.weight": torch.zeros(3, 32)})
    done = in_process(capsys, verb, job.write(), "--out", tmp_path / "out")
    assert done.code == 2
    assert "expert 'reviews'" in done.err
    assert "has an extra tensor 'classifier.weight', which BertModel has no place for" in done.err
    assert not (tmp_path / "out").exists()


def test_a_base_without_a_known_model_is_merged_under_its_own_names(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    job = make_job(tmp_path)
    merged, _ = results(job, capsys, "m1", "q1")
    config = tmp_path / "base" / "config.json"
    known = json.loads(config.read_text())
    config.write_text(json.dumps({**known, "model_type": "of-tomorrow", "architectures": []}))
    assert in_process(capsys, "merge", job.write(), "--out", tmp_path / "m2").code == 0
    assert "merged under the names in the files" in caplog.text
    assert_same(load_file(tmp_path / "m2" / WEIGHTS), merged)
    config.write_text(json.dumps({**known, "num_hidden_layers": 3}))
    caplog.clear()
    assert in_process(capsys, "merge", job.write(), "--out", tmp_path / "m4").code == 0
    assert "tensor 'encoder.layer.2.attention.output.LayerNorm.bias' of config.json's model is missing" in caplog.text
    assert_same(load_file(tmp_path / "m4" / WEIGHTS), merged)
    caplog.clear()
    config.unlink()
    assert in_process(capsys, "merge", job.write(), "--out", tmp_path / "m3").code == 0
    assert caplog.text == ""
