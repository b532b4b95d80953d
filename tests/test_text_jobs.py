"""Which models the texts of a recipe can calibrate and score; what the others, and texts that do not fit, are told."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from checkpoints import TASKS, WIDTH, Done, Job, in_process, make_job, text, write_tokenizer
from safetensors.torch import load_file, save_file
from torch import nn

import epmq
from epmq import QuantLinear
from epmq.huggingface import tokenizer_from_folder
from epmq.jobs import calibration_of
from epmq.recipe import read_recipe
from epmq.scoring import load_any as model_of_folder
from epmq.skeleton import meta_copy
from epmq.texts import decoder_inputs
from epmq.trial import try_out

SIZES: dict[str, Any] = {
    "vocab_size": 34, "hidden_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 32, "pad_token_id": 0,
}  # fmt: skip
T5: dict[str, Any] = {
    "vocab_size": 34, "d_model": WIDTH, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4,
    "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 3,
}  # fmt: skip
BART: dict[str, Any] = {
    "vocab_size": 34, "d_model": WIDTH, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 32,
    "decoder_start_token_id": 3, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "forced_eos_token_id": None,
}  # fmt: skip
IMAGES: dict[str, Any] = {
    "hidden_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48, "image_size": 8,
    "patch_size": 4,
}  # fmt: skip


def model_of(kind: str) -> nn.Module:
    made: nn.Module
    if kind == "t5":
        made = transformers.T5ForConditionalGeneration(transformers.T5Config(**T5))
    elif kind == "t5-headless":
        made = transformers.T5Model(transformers.T5Config(**T5))
    elif kind == "t5-without-start":
        made = transformers.T5Model(transformers.T5Config(**{**T5, "decoder_start_token_id": None}))
    elif kind == "bart":
        made = transformers.BartForConditionalGeneration(transformers.BartConfig(**BART))
    elif kind == "clip":
        two = transformers.CLIPConfig(text_config=SIZES, vision_config=IMAGES, projection_dim=16)
        made = transformers.CLIPModel(two)
    elif kind == "vit":
        made = transformers.ViTModel(transformers.ViTConfig(**IMAGES))
    elif kind == "roberta":
        made = transformers.RobertaModel(transformers.RobertaConfig(**{**SIZES, "pad_token_id": 1}))
    elif kind == "gpt2":
        config = transformers.GPT2Config(vocab_size=34, n_positions=32, n_embd=WIDTH, n_layer=1, n_head=4)
        made = transformers.GPT2LMHeadModel(config)
    else:
        made = getattr(transformers, kind)(transformers.BertConfig(**SIZES))
    return made.eval()


def job_of(folder: Path, kind: str) -> Job:
    """The usual job around another model: base and experts are of that kind."""
    job = make_job(folder)
    torch.manual_seed(0)
    model: Any = model_of(kind)
    for place in (folder / "base").iterdir():
        place.unlink()
    model.save_pretrained(folder / "base")
    write_tokenizer(folder / "base")
    for task in TASKS:
        state = {name: t + 0.1 * torch.randn(t.shape) * t.std().nan_to_num(0.1) for name, t in named(model)}
        save_file(state, job.expert(task), metadata={"format": "pt"})
    return job


def named(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Every floating tensor once, by its first name."""
    first = {id(tensor): (name, tensor) for name, tensor in reversed(model.state_dict(keep_vars=True).items())}
    return [(name, tensor.detach().clone()) for name, tensor in first.values() if tensor.is_floating_point()]


def long_text(job: Job, task: str, words: int = 60) -> None:
    (job.folder / f"{task}.jsonl").write_text(json.dumps({"text": "w1 " * words, "label": 0}) + "\n")


def refused(done: Done, *parts: str) -> None:
    assert (done.code, done.out) == (2, ""), done
    assert done.err.startswith("epmq: ") and done.err.count("\n") == 1, done.err
    for part in parts:
        assert part in done.err, done.err


# -- encoder-decoders -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["t5", "t5-headless", "bart"])
def test_an_encoder_decoder_is_calibrated_whole(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = job_of(tmp_path / "job", kind)
    done = in_process(capsys, "quantize", job.write(), "--out", tmp_path / "out")
    assert (done.code, done.err) == (0, "")
    model = epmq.load(tmp_path / "out")
    rounded = [name for name, module in model.named_modules() if isinstance(module, QuantLinear)]
    assert any("encoder." in name for name in rounded) and any("decoder." in name for name in rounded)
    notes = json.loads((tmp_path / "out" / "report.json").read_text())["notes"]
    assert notes == ["calibration.target_key is not given: the decoder was calibrated on the texts themselves."]
    done = in_process(capsys, "collect", job.write(), "--task", TASKS[0], "--out", tmp_path / "statistics")
    assert (done.code, done.err) == (0, "")


def test_a_trial_needs_no_weights() -> None:
    """Nor buffers of the checkpoint, of which BART's head has one."""
    ids = torch.tensor([[2, 5, 3], [2, 3, 0]])
    labels = torch.where(ids > 0, ids, -100)
    skeleton = meta_copy(model_of("bart"))
    given = {"input_ids": ids, "attention_mask": (ids > 0).long(), **decoder_inputs(skeleton, labels)}
    try_out(skeleton, given)
    assert all(tensor.is_meta for tensor in skeleton.state_dict().values())
    assert given["decoder_input_ids"].tolist() == [[3, 2, 5], [3, 2, 3]]


def test_the_decoder_reads_what_the_model_makes_of_its_labels(tmp_path: Path) -> None:
    job = job_of(tmp_path / "job", "t5")
    model: Any = model_of("t5")
    seen: dict[str, Any] = {}
    model.decoder.register_forward_pre_hook(lambda _, args, kwargs: seen.update(kwargs), with_kwargs=True)
    for batch in calibration_of(read_recipe(job.write()))[TASKS[0]]:
        ids, mask = batch["input_ids"], batch["attention_mask"]
        model(input_ids=ids, attention_mask=mask, labels=torch.where(mask > 0, ids, -100))
        assert torch.equal(batch["decoder_input_ids"], seen["input_ids"])
        assert torch.equal(batch["decoder_attention_mask"], mask)


def test_the_decoder_reads_targets_where_there_are_some(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = job_of(tmp_path / "job", "t5")
    for task in TASKS:
        rows = [{"text": text(), "target": f"w{number} w2"} for number in range(8)]
        (job.folder / f"{task}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    job.recipe["calibration"]["target_key"] = "target"
    recipe = read_recipe(job.write())
    found = torch.cat([batch["decoder_input_ids"] for batch in calibration_of(recipe)[TASKS[0]]])
    # The start token, [CLS], the two words; [SEP] is what the last of them is to predict.
    assert sorted(found.tolist()) == [[0, 2, 4 + number, 6] for number in range(8)]
    done = in_process(capsys, "quantize", job.write(), "--out", tmp_path / "out")
    assert (done.code, done.err) == (0, "")
    assert json.loads((tmp_path / "out" / "report.json").read_text())["notes"] == []
    job.recipe["calibration"]["target_key"] = "answer"
    done = in_process(capsys, "quantize", job.write(), "--out", tmp_path / "other")
    refused(done, f"{TASKS[1]}.jsonl, object 1: it has no text under the key 'answer'.")


def test_targets_are_for_decoders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = make_job(tmp_path / "job")
    job.recipe["calibration"]["target_key"] = "target"
    done = in_process(capsys, "quantize", job.write(), "--out", tmp_path / "out")
    refused(done, "calibration.target_key: BertModel has no decoder beside its encoder")


def test_a_decoder_that_starts_with_nothing_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = job_of(tmp_path / "job", "t5-without-start")
    done = in_process(capsys, "quantize", job.write(), "--out", tmp_path / "out", "--dry-run")
    refused(done, "T5Model", "decoder_start_token_id")


# -- what texts alone cannot calibrate --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["clip", "vit"])
@pytest.mark.parametrize(
    "arguments",
    [
        ["quantize", "{recipe}", "--out", "{out}"],
        ["quantize", "{recipe}", "--out", "{out}", "--dry-run"],
        ["collect", "{recipe}", "--task", TASKS[0], "--out", "{out}"],
        ["eval", "{base}", "--recipe", "{recipe}"],
    ],
    ids=["quantize", "dry-run", "collect", "eval"],
)
def test_models_that_read_images_are_refused(
    kind: str, arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = job_of(tmp_path / "job", kind)
    places = {"recipe": job.write(), "out": tmp_path / "out", "base": job.folder / "base"}
    done = in_process(capsys, *(argument.format(**places) for argument in arguments))
    refused(
        done, "CLIPModel" if kind == "clip" else "ViTModel", "texts alone are not what it reads, it needs pixel_values"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["job"]


def test_what_a_forward_raises_in_calibration_names_class_and_inputs(tmp_path: Path) -> None:
    model = model_of("t5")
    batch = {"input_ids": torch.tensor([[1, 2]]), "attention_mask": torch.ones(1, 2, dtype=torch.int64)}
    told = "T5ForConditionalGeneration: its forward does not run on input_ids, attention_mask (You must specify"
    with pytest.raises(epmq.errors.ModelError, match=re.escape(told)):
        epmq.quantize(model, {"a": model}, {"a": [batch]}, epmq.QuantConfig(group_size=16))


# -- texts that do not fit --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "limit"), [("BertModel", 32), ("roberta", 30), ("gpt2", 32)])
def test_texts_longer_than_the_positions_are_refused(
    kind: str, limit: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = job_of(tmp_path / "job", kind)
    job.recipe["format"] = "native"
    long_text(job, TASKS[1])
    job.recipe["calibration"]["max_length"] = job.recipe["evaluation"]["max_length"] = limit + 1
    told = f"max_length={limit + 1}: {job.folder / TASKS[1]}.jsonl has a text of {limit + 1} tokens, and "
    told += f"{type(model_of(kind)).__name__} reads at most {limit}; use {limit}.\n"
    for arguments in (["quantize"], ["quantize", "--dry-run"], ["collect", "--task", TASKS[1]]):
        done = in_process(capsys, arguments[0], job.write(), "--out", tmp_path / "out", *arguments[1:])
        refused(done, f"epmq: calibration.{told}")
    done = in_process(capsys, "eval", job.folder / "base", "--recipe", job.write())
    refused(done, f"epmq: evaluation.{told}")
    assert [path.name for path in tmp_path.iterdir()] == ["job"]
    # As long as it may be, it is read.
    job.recipe["calibration"]["max_length"] = job.recipe["evaluation"]["max_length"] = limit
    assert in_process(capsys, "quantize", job.write(), "--out", tmp_path / "out").code == 0
    assert in_process(capsys, "eval", job.folder / "base", "--recipe", job.write()).code == 0


def test_tokens_beyond_the_embedding_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = make_job(tmp_path / "job")
    write_tokenizer(job.folder / "base", [*(f"w{i}" for i in range(30)), "new"])
    for task in TASKS:
        (job.folder / f"{task}.jsonl").write_text(json.dumps({"text": "w1 new", "label": 0}) + "\n")
    told = f"{job.folder / TASKS[1]}.jsonl: the tokenizer makes token 34 of it, and BertModel's embedding has 34 rows"
    for arguments in (["quantize"], ["quantize", "--dry-run"], ["collect", "--task", TASKS[1]]):
        done = in_process(capsys, arguments[0], job.write(), "--out", tmp_path / "out", *arguments[1:])
        refused(done, told)
    refused(in_process(capsys, "eval", job.folder / "base", "--recipe", job.write()), told)
    assert [path.name for path in tmp_path.iterdir()] == ["job"]


def test_fewer_texts_than_asked_for_are_noted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = make_job(tmp_path / "job")
    (job.folder / f"{TASKS[0]}.jsonl").write_text('{"text": "w1 w2 w3 w4"}\n{"text": "w1 w5"}\n')
    done = in_process(capsys, "quantize", job.write(), "--out", tmp_path / "out")
    assert (done.code, done.err) == (0, "")
    note = f"{TASKS[0]}: 2 texts of the 8 that calibration.examples asks for."
    assert json.loads((tmp_path / "out" / "report.json").read_text())["notes"] == [note]
    assert note in done.out


# -- scoring ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["BertForMaskedLM", "BertForSequenceClassification", "gpt2"])
def test_a_model_with_a_head_of_its_own_is_scored_by_its_hidden_states(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = job_of(tmp_path / "job", kind)
    done = in_process(capsys, "eval", job.folder / "base", "--recipe", job.write(), "--json", tmp_path / "row.json")
    assert (done.code, done.err) == (0, "")
    found = json.loads((tmp_path / "row.json").read_text())["tasks"]
    rows = [json.loads(line) for line in (job.folder / f"{TASKS[0]}.jsonl").read_text().splitlines()]
    head = load_file(job.folder / f"{TASKS[0]}-head.safetensors")
    encoder: Any = model_of_folder(job.folder / "base").base_model
    tokenizer = tokenizer_from_folder(job.folder / "base")
    right = 0
    for row in rows:
        ids = torch.tensor([tokenizer(row["text"], truncation=True, max_length=16)["input_ids"]])
        with torch.no_grad():
            hidden = encoder(input_ids=ids).last_hidden_state[0].mean(0)
        right += int((head["weight"] @ hidden + head["bias"]).argmax()) == row["label"]
    assert found[TASKS[0]] == pytest.approx(100.0 * right / len(rows))


def test_a_head_of_another_width_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = make_job(tmp_path / "job")
    head = job.folder / f"{TASKS[1]}-head.safetensors"
    save_file({"weight": torch.zeros(3, 7), "bias": torch.zeros(3)}, head)
    done = in_process(capsys, "eval", job.folder / "base", "--recipe", job.write())
    refused(done, f"{head}: weight reads 7 features, and BertModel gives 32.")


def test_an_encoder_decoder_is_not_scored_by_heads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = job_of(tmp_path / "job", "t5")
    done = in_process(capsys, "eval", job.folder / "base", "--recipe", job.write())
    refused(done, "T5ForConditionalGeneration: it has a decoder beside its encoder")


def test_evaluation_needs_a_task(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = make_job(tmp_path / "job")
    job.recipe["evaluation"]["tasks"] = {}
    done = in_process(capsys, "eval", job.folder / "base", "--recipe", job.write())
    refused(done, "recipe.yaml: evaluation.tasks: name a task, or leave evaluation: out.\n")
