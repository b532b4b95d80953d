"""The recipe's key ``format``, files carried along, the model card, and one format saved as another."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from checkpoints import Job, in_process, make_job, write_tokenizer
from conftest import ToyModel
from tiny import IDS, SIZES, answers, quantized, quantized_names, tiny

import epmq
from epmq import QuantConfig, QuantLinear, replace_linear, restore_linear
from epmq.errors import ConfigError, FormatError, ModelError
from epmq.formats.kinds import format_of
from epmq.huggingface import carry_files, tokenizer_from_folder


def make_language_job(folder: Path) -> Job:
    """A base and an expert of a tiny Llama in float16, with files that must travel."""
    torch.manual_seed(0)
    sizes = {**SIZES, "vocab_size": 34}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_key_value_heads=2)).half()
    model.save_pretrained(folder / "base")
    write_tokenizer(folder / "base")
    (folder / "base" / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "base" / "preprocessor_config.json").write_text("{}")
    with torch.no_grad():
        for parameter in model.model.layers.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    model.save_pretrained(folder / "experts" / "chat")
    lines = [json.dumps({"text": f"w{i} w{i + 1} w{i + 2} w{i + 3}"}) for i in range(20)]
    (folder / "chat.jsonl").write_text("\n".join(lines))
    recipe = {
        "base": "base",
        "experts": {"chat": "experts/chat"},
        "merge": {"scaling": 0.5},
        "calibration": {"tasks": {"chat": "chat.jsonl"}, "examples": 16, "batch_size": 8},
        "quantization": {"bits": 4, "group_size": 32},
    }
    return Job(folder, recipe)


def test_a_recipe_without_format_gives_a_folder_that_transformers_loads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = make_job(tmp_path)
    done = in_process(capsys, "quantize", job.write(), "--out", tmp_path / "out")
    assert (done.code, done.err) == (0, "")
    assert format_of(tmp_path / "out") == "compressed-tensors"
    theirs, info = transformers.AutoModel.from_pretrained(
        tmp_path / "out", output_loading_info=True, add_pooling_layer=False
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    ours = epmq.load(tmp_path / "out")
    assert len(quantized_names(ours)) == 12
    for name in quantized_names(ours):
        layer = ours.get_submodule(name)
        assert isinstance(layer, QuantLinear)
        assert torch.equal(theirs.get_parameter(f"{name}.weight"), layer.weight), name


@pytest.mark.parametrize("format", ["compressed-tensors", "gptq", "native"])
def test_every_format_of_a_recipe_holds_the_same_model(
    format: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = make_language_job(tmp_path)
    job.recipe.update(format=format, shard_bytes=20_000)
    done = in_process(capsys, "quantize", job.write(), "--out", tmp_path / "out")
    assert (done.code, done.err) == (0, "")
    job.recipe.update(format="native")
    assert in_process(capsys, "quantize", job.write(), "--out", tmp_path / "native").code == 0
    assert format_of(tmp_path / "out") == format
    ours, wanted = epmq.load(tmp_path / "out"), epmq.load(tmp_path / "native")
    assert len(quantized_names(ours)) == 14
    for name, tensor in wanted.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor), name
    present = {path.name for path in (tmp_path / "out").iterdir()}
    assert {
        "README.md", "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors.index.json",
        "preprocessor_config.json", "report.json", "tokenizer.json",
    } <= present  # fmt: skip
    assert ("epmq.json" in present) == (format == "native")


@pytest.mark.parametrize("verb", ["merge", "quantize"])
def test_what_lies_beside_the_base_travels_folders_included(
    verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = make_job(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "base")
    tokenizer.chat_template = {"default": "one {{ messages }}", "tool_use": "two {{ messages }}"}
    tokenizer.save_pretrained(tmp_path / "base")
    carried = [
        "modules.json", "config_sentence_transformers.json", "sentence_bert_config.json", "1_Pooling/config.json",
        "tekken.json", "sentencepiece.bpe.model", "spm.model", "source.spm", "target.spm", "target_vocab.json",
        "bpe.codes", "normalizer.json", "additional_chat_templates/tool_use.jinja",
    ]  # fmt: skip
    (tmp_path / "base" / "1_Pooling").mkdir()
    for name in [*carried[:-1], "2_Dense.txt", "notes.json"]:
        (tmp_path / "base" / name).write_text('{"of": "the base"}')
    assert in_process(capsys, verb, job.write(), "--out", tmp_path / "out").code == 0
    for name in carried:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "base" / name).read_bytes()
    assert not list((tmp_path / "out").glob("2_Dense*"))
    assert not (tmp_path / "out" / "notes.json").exists()
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert again.chat_template == tokenizer.chat_template


def test_a_folder_with_a_sentencepiece_model_alone_is_one_of_a_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "sentencepiece.bpe.model").write_bytes(b"")
    with pytest.raises(ModelError, match="no tokenizer can be loaded from it"):
        tokenizer_from_folder(tmp_path)


def test_a_tokenizer_of_merges_with_a_vocabulary_of_counts_travels_whole(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "tokenizer_config.json").write_text('{"tokenizer_class": "PhobertTokenizer"}')
    (tmp_path / "base" / "vocab.txt").write_text("hel@@ 3\nlo 2\n")
    (tmp_path / "base" / "bpe.codes").write_text("#version: 0.2\nh e 3\nhe l 2\nl o</w> 2\n")
    (tmp_path / "out").mkdir()
    carry_files(tmp_path / "base", tmp_path / "out")
    assert tokenizer_from_folder(tmp_path / "out")("hello").input_ids == [0, 4, 5, 2]


def test_a_tokenizer_of_bytes_has_no_vocabulary_and_any_other_needs_one(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "ByT5Tokenizer"}')
    assert tokenizer_from_folder(tmp_path)("a").input_ids == [ord("a") + 3, 1]
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "DebertaV2Tokenizer"}')
    with pytest.raises(
        ModelError, match=r"no vocabulary for DebertaV2Tokenizer, which reads spm.model, tokenizer.json"
    ):
        tokenizer_from_folder(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PhobertTokenizer"}')
    with pytest.raises(ModelError, match="no tokenizer can be loaded from it"):
        tokenizer_from_folder(tmp_path)


def test_the_card_tells_what_went_in(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = make_language_job(tmp_path)
    job.recipe["format"] = "gptq"
    assert in_process(capsys, "quantize", job.write(), "--out", tmp_path / "out").code == 0
    card = (tmp_path / "out" / "README.md").read_text()
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert card.startswith(
        "---\nlibrary_name: transformers\ntags:\n- epmq\n- gptq\n- merge\n---\n\n# Quantized LlamaForCausalLM"
    )
    assert "It is a version 2 file" in card
    assert "base: base\nexperts:\n  chat: chat\nmerge:\n  method: task_arithmetic\n" in card
    assert "  scaling: 0.5\n" in card
    assert "\nbits: 4\ngroup_size: 32\n" in card
    assert f"| {report['average_error']['chat']['epmq']:.4f} |" in card
    assert str(tmp_path) not in card


@pytest.mark.parametrize(
    ("format", "changes", "message"),
    [
        ("gptq", {"exclude": ["k_proj"]}, "'model.layers.0.self_attn.k_proj' stays unquantized"),
        ("gptq", {"scale_dtype": "float32"}, "set scale_dtype to float16"),
        ("compressed-tensors", {"group_size": 36}, "choose another group_size, exclude it or use format native"),
        ("compressed-tensors", {"scale_dtype": "float32"}, "scales to the model's float16"),
        ("awq", {}, "format: Input should be 'compressed-tensors', 'gptq' or 'native', got 'awq'"),
    ],
)
def test_what_a_format_cannot_hold_is_refused_before_any_work(
    format: str,
    changes: dict[str, object],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    job = make_language_job(tmp_path)
    job.recipe["format"] = format
    job.recipe["quantization"].update(changes)
    monkeypatch.setattr("epmq.jobs.run", None)
    done = in_process(capsys, "quantize", job.write(), "--out", tmp_path / "out")
    assert done.code == 2
    assert message in done.err
    assert "Traceback" not in done.err
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]


def test_a_recipe_without_rounding_gives_an_ordinary_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = make_job(tmp_path)
    job.recipe["quantization"] = {"bits": None}
    assert in_process(capsys, "quantize", job.write(), "--out", tmp_path / "out").code == 0
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    card = (tmp_path / "out" / "README.md").read_text()
    assert "nothing is quantized" in card and "\n# Calibrated BertModel\n" in card
    job.recipe["quantization"]["overrides"] = {"layer.0": {"bits": 4}}
    assert in_process(capsys, "quantize", job.write(), "--out", tmp_path / "some").code == 0
    assert "\n# Quantized BertModel\n" in (tmp_path / "some" / "README.md").read_text()
    del job.recipe["quantization"]["overrides"]
    _, info = transformers.AutoModel.from_pretrained(
        tmp_path / "out", output_loading_info=True, add_pooling_layer=False
    )
    assert not info["missing_keys"]
    assert in_process(capsys, "eval", tmp_path / "out", "--recipe", job.write()).code == 0
    job.recipe["format"] = "native"
    assert in_process(capsys, "quantize", job.write(), "--out", tmp_path / "native").code == 0
    del job.recipe["calibration"]["tasks"]["intents"]
    for name in ("out", "native"):  # a base like any other
        job.recipe["experts"] = {"reviews": str(tmp_path / name)}
        assert in_process(capsys, "merge", job.write(), "--out", tmp_path / f"of-{name}").code == 0


def test_one_format_saved_as_another(tmp_path: Path) -> None:
    epmq.save(quantized("llama", 4, True, 32, torch.float16), tmp_path / "first", format="native")
    model = epmq.load(tmp_path / "first")
    wanted = answers(model)
    for number, format in enumerate(("gptq", "compressed-tensors", "native", "gptq")):
        folder = tmp_path / f"{number}"
        epmq.save(model, folder, format=format)  # type: ignore[arg-type]
        assert format_of(folder) == format
        model = epmq.load(folder)
        assert not hasattr(model.config, "quantization_config")
        assert torch.equal(answers(model), wanted), format


def test_modules_that_are_not_from_transformers_are_saved_natively(tmp_path: Path) -> None:
    model = ToyModel()
    replace_linear(model, group_size=16)
    epmq.save(model, tmp_path / "out")
    assert format_of(tmp_path / "out") == "native"
    assert "Only epmq reads this folder" in (tmp_path / "out" / "README.md").read_text()
    with pytest.raises(ConfigError, match="format 'awq': use one of compressed-tensors, gptq, native"):
        epmq.save(model, tmp_path / "other", format="awq")  # type: ignore[arg-type]
    assert not (tmp_path / "other").exists()


# -- a model does not write itself -----------------------------------------------------------------------------------


def quantized_by(how: str, folder: Path) -> Any:
    model: Any = quantized("bert", 4, True, 32)
    if how == "load":
        epmq.save(model, folder)
        return epmq.load(folder)
    if how == "quantize":
        model = tiny("bert")
        return epmq.quantize(model, None, {"a": [{"input_ids": IDS}]}, QuantConfig(method="rtn", group_size=32)).model
    return model


@pytest.mark.parametrize("how", ["replace_linear", "quantize", "load"])
def test_a_quantized_model_does_not_write_itself_wrong(how: str, tmp_path: Path) -> None:
    model = quantized_by(how, tmp_path / "epmq")
    wanted = answers(model)
    for part in (model, model.bert, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with pytest.raises(FormatError, match=r"use epmq.save\(model, folder\)"):
            part.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    epmq.save(model, tmp_path / "ours")
    assert torch.equal(answers(epmq.load(tmp_path / "ours")), wanted)


def test_restored_linears_can_be_written_again(tmp_path: Path) -> None:
    model: Any = quantized("bert", 4, True, 32)
    restore_linear(model)
    model.save_pretrained(tmp_path / "out")
    theirs = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    assert torch.equal(answers(theirs), answers(model))


def test_a_restored_conv1d_is_written_the_way_round_that_it_was(tmp_path: Path) -> None:
    model: Any = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64))
    model.eval()
    replace_linear(model, group_size=32)
    wanted = answers(model)
    restore_linear(model)
    model.save_pretrained(tmp_path / "out")
    theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "out").eval()
    assert torch.equal(answers(theirs), answers(model))
    assert (answers(theirs) - wanted).norm() <= 1e-5 * wanted.norm()


def test_buffers_are_made_in_the_models_dtype(tmp_path: Path) -> None:
    """Those that no file holds, as transformers makes them: in fp32 they would not fit a model of 16 bits."""
    torch.manual_seed(0)
    kind: Any = transformers.XGLMForCausalLM
    config = transformers.XGLMConfig(vocab_size=64, d_model=32, ffn_dim=48, num_layers=2, attention_heads=4)
    kind(config).save_pretrained(tmp_path / "full")
    model = kind.from_pretrained(tmp_path / "full", dtype=torch.bfloat16).eval()
    replace_linear(model, 8, 16, True, exclude="lm_head")
    epmq.save(model, tmp_path / "out")
    with torch.no_grad():
        ours, wanted = (one(IDS).logits for one in (epmq.load(tmp_path / "out"), model))
    assert torch.get_default_dtype() == torch.float32
    assert torch.equal(ours, wanted)


def test_a_pooler_without_weights_stays(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4], "image_size": 16, "window_size": 2}
    model: Any = transformers.SwinModel(transformers.SwinConfig(**sizes, patch_size=4)).eval()
    replace_linear(model, 8, 16, True)
    epmq.save(model, tmp_path / "out")
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(epmq.load(tmp_path / "out")(images).pooler_output, model(images).pooler_output)
