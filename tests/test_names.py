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
from epmq.initial import initial_values
from epmq.jobs import model_of, open_sources, quantize_to_folder
from epmq.merge_jobs import merge_to_folder
from epmq.names import NamedForModel
from epmq.recipe import Recipe, read_recipe
from epmq.scoring import load_any
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
def test_experts_that_transformers_joins_are_merged_as_the_files_have_them(
    make: Callable[[], Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = make().eval()
    model.save_pretrained(tmp_path / "saved")
    merge_to_folder(Recipe(base=tmp_path / "saved", experts={"a": tmp_path / "saved"}), tmp_path / "merged")
    assert_same(load_file(tmp_path / "merged" / WEIGHTS), load_file(tmp_path / "saved" / WEIGHTS))
    if not transformers.__version__.startswith("4."):  # which keeps them apart
        assert "transformers makes other tensors of these as it loads them" in caplog.text


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


MARIAN = {
    "vocab_size": 60, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 16,
    "pad_token_id": 0, "eos_token_id": 2, "forced_eos_token_id": 2, "decoder_start_token_id": 0,
}  # fmt: skip
POSITIONS = {f"model.{side}.embed_positions.weight" for side in ("encoder", "decoder")}


def marian(dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    return transformers.MarianMTModel(transformers.MarianConfig(**MARIAN)).eval().to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_positions_that_the_class_computes_are_not_needed_in_files(dtype: torch.dtype, tmp_path: Path) -> None:
    model = marian(dtype)
    for place in ("base", "a"):
        model.save_pretrained(tmp_path / place)
    assert POSITIONS.isdisjoint(load_file(tmp_path / "base" / WEIGHTS))
    theirs = transformers.MarianMTModel.from_pretrained(tmp_path / "base", torch_dtype=dtype)
    assert_same(load_any(tmp_path / "base").state_dict(), theirs.state_dict())
    recipe = Recipe(base=tmp_path / "base", experts={"a": tmp_path / "a"})
    merge_to_folder(recipe, tmp_path / "merged")
    assert_same(load_any(tmp_path / "merged").state_dict(), theirs.state_dict())
    config = epmq.QuantConfig(bits=4, group_size=16, method="rtn")
    quantize_to_folder(recipe.model_copy(update={"quantization": config}), tmp_path / "out")
    ours = epmq.load(tmp_path / "out").state_dict()
    assert all(torch.equal(ours[name], theirs.state_dict()[name]) for name in POSITIONS)


def test_positions_are_computed_for_the_body_too(tmp_path: Path) -> None:
    if not transformers.MarianModel._keys_to_ignore_on_load_missing:
        pytest.skip("transformers 4 does not say so of the body")
    marian().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["MarianModel"]}))
    theirs = transformers.MarianModel.from_pretrained(tmp_path, torch_dtype=torch.float32).state_dict()
    ours = load_any(tmp_path).state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs if "embed_positions" in name)


class Tables(nn.Module):
    """What a class fills in its own way: some always alike, some at random or not at all."""

    base_model_prefix = "model"
    _keys_to_ignore_on_load_missing = ("_",)

    def __init__(self) -> None:
        super().__init__()
        self.is_ones = nn.Parameter(torch.zeros(3), requires_grad=False)
        for name, dtype in (("is_bits", torch.bool), ("is_bytes", torch.uint8)):
            self.register_buffer(name, torch.zeros(3, dtype=dtype))
        for name, dtype in (("not_bits", torch.bool), ("not_bytes", torch.uint8), ("random_", torch.float32)):
            self.register_buffer(name, torch.zeros(3, dtype=dtype))

    def _init_weights(self, module: nn.Module) -> None:
        for name in ("is_ones", "is_bits", "is_bytes"):
            module.get_parameter(name).fill_(1) if name == "is_ones" else module.get_buffer(name).fill_(1)
        module.get_buffer("random_").normal_()


def test_only_what_a_class_always_fills_alike_is_its_own() -> None:
    model = Tables()
    made = initial_values(model, model.state_dict(), torch.float16)
    assert {name: tensor.dtype for name, tensor in made.items()} == {
        "is_ones": torch.float16, "is_bits": torch.bool, "is_bytes": torch.uint8,
    }  # fmt: skip
    assert all(bool((tensor == 1).all()) for tensor in made.values())


def without_a_layer(tensors: Model) -> Model:
    return {name: tensor for name, tensor in tensors.items() if "encoder.layers.0.fc1" not in name}


@pytest.mark.parametrize("listed", [False, True], ids=["needed", "listed as made by the class"])
def test_what_a_class_fills_at_random_is_needed_in_files(
    listed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    marian().save_pretrained(tmp_path)
    change_file(tmp_path / WEIGHTS, without_a_layer)
    if listed:
        monkeypatch.setattr(transformers.MarianMTModel, "_keys_to_ignore_on_load_missing", [r"fc1\.weight", "position"])
    with pytest.raises(SourceError, match=r"tensor 'model\.encoder\.layers\.0\.fc1\.weight', which the model needs"):
        load_any(tmp_path)


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
    seen = open_sources(recipe, model_of(recipe)).merged
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


def with_classifier(tensors: Model) -> Model:
    """A BertModel's tensors as a classifier stores them."""
    return {
        **{f"bert.{name}": tensor for name, tensor in tensors.items()},
        "classifier.weight": torch.ones(3, 32),
        "classifier.bias": torch.ones(3),
    }


def test_heads_on_experts_of_a_bare_base_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = make_job(tmp_path)
    merged, quantized = results(job, capsys, "m1", "q1")
    for task in TASKS:
        change_file(places(job)[task], with_classifier)
    merged_again, quantized_again = results(job, capsys, "m2", "q2")
    assert_same(merged_again, merged)
    assert_same(quantized_again, quantized)
    notes = json.loads((tmp_path / "q2" / "report.json").read_text())["notes"]
    for task in TASKS:
        assert f"classifier.weight: in expert {task!r} but not in the model; left out." in notes


@pytest.mark.parametrize("name", ["bert.encoder.layer.7.output.dense.weight", "bert.encoder.layer.0.gate.weight"])
def test_what_an_expert_with_a_head_has_more_inside_the_model_is_refused(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = make_job(tmp_path)
    change_file(places(job)["reviews"], lambda tensors: {**with_classifier(tensors), name: torch.ones(3)})
    done = in_process(capsys, "quantize", job.write(), "--out", tmp_path / "out")
    assert done.code == 2
    assert f"has an extra tensor {name!r}" in done.err


def test_what_only_the_base_has_is_told_with_a_way_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = make_job(tmp_path)
    change_file(places(job)["reviews"], lambda tensors: {k: v for k, v in tensors.items() if "layer.1." not in k})
    done = in_process(capsys, "quantize", job.write(), "--out", tmp_path / "out")
    assert done.code == 2
    assert "give a base without, or an expert with it" in done.err


def bert_and_classifiers() -> tuple[nn.Module, dict[str, Any]]:
    torch.manual_seed(0)
    base = transformers.BertModel(transformers.BertConfig(**ENCODER)).eval()
    experts: dict[str, Any] = {}
    for task in TASKS:
        experts[task] = transformers.BertForSequenceClassification(base.config).eval()
        state = {key: tensor + 0.02 * torch.randn(tensor.shape) for key, tensor in base.state_dict().items()}
        experts[task].bert.load_state_dict(state)
    return base, experts


def wrapped(kind: str, module: nn.Module) -> Any:
    return torch.compile(module) if kind == "compile" else nn.DataParallel(module)


@pytest.mark.parametrize("kind", ["classifier", "state", "compile", "DataParallel"])
def test_modules_with_heads_and_in_wrappers_are_read(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    base, classifiers = bert_and_classifiers()
    plain = {task: expert.bert for task, expert in classifiers.items()}
    given: dict[str, Any] = {
        "classifier": classifiers,
        "state": {task: expert.state_dict() for task, expert in classifiers.items()},
        "compile": {task: wrapped(kind, expert) for task, expert in plain.items()},
        "DataParallel": {task: wrapped(kind, expert) for task, expert in plain.items()},
    }[kind]
    their_base = wrapped(kind, base) if kind in ("compile", "DataParallel") else base
    merged = epmq.merge(base, plain)
    again: nn.Module = epmq.merge(their_base, given)
    assert_same(again.state_dict(), merged.state_dict())
    calibration = {task: [{"input_ids": torch.randint(3, 60, (4, 8))}] for task in TASKS}
    config = epmq.QuantConfig(group_size=16, rho=0.5)
    wanted = epmq.quantize(merged, plain, calibration, config, base)
    model = wrapped(kind, again) if kind in ("compile", "DataParallel") else again
    found = epmq.quantize(model, given, calibration, config, their_base)
    assert_same(found.model.state_dict(), wanted.model.state_dict())
    told = "classifier.weight: in expert 'reviews' but not in the model; left out."
    assert (told in found.report["notes"]) == (told in caplog.text) == (kind in ("classifier", "state"))


@pytest.mark.filterwarnings("ignore")
def test_a_module_of_peft_is_named() -> None:
    peft = pytest.importorskip("peft")
    base, _ = bert_and_classifiers()
    adapted = peft.get_peft_model(transformers.BertModel(base.config), peft.LoraConfig(target_modules=["query"]))
    calibration = {"a": [{"input_ids": torch.randint(3, 60, (4, 8))}]}
    for refused in (
        lambda: epmq.merge(base, {"a": adapted}),
        lambda: epmq.quantize(base, {"a": adapted}, calibration),
        lambda: epmq.quantize(adapted, {"a": base}, calibration),
    ):
        with pytest.raises(SourceError, match=r"a PeftModel keeps .* give what its merge_and_unload\(\) returns"):
            refused()


@pytest.mark.parametrize("where", ["module", "path"])
def test_tied_experts_in_files_beside_a_base_of_any_kind(where: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**DECODER, tie_word_embeddings=True)).eval()
    model.save_pretrained(tmp_path / "base")
    calibration = {"a": [{"input_ids": torch.randint(3, 60, (4, 8))}]}
    base: Any = model if where == "module" else tmp_path / "base"
    found = epmq.quantize(model, {"a": tmp_path / "base"}, calibration, epmq.QuantConfig(group_size=8), base)
    assert len(found.report["layers"]) == 14


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
