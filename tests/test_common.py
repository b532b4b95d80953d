"""Experts with other heads than the base: their bodies are merged and quantized, and scored under their own heads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import TASKS, WORDS, Job, in_process, make_job, write_tokenizer
from families import ENCODER
from safetensors.torch import load_file
from torch import Tensor, nn

import epmq
from epmq.errors import ModelError
from epmq.recipe import read_recipe
from epmq.scoring import evaluate_folder, load_any

transformers = pytest.importorskip("transformers")

ROWS = {"vocab_size": len(WORDS) + 4}
LLAMA = {
    **ROWS, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 32, "bos_token_id": None, "pad_token_id": None,
}  # fmt: skip
GPT2 = {**ROWS, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32, "bos_token_id": None, "eos_token_id": None}
BERT = {**ENCODER, **ROWS, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
# Family: configuration, its settings, classes of base and experts.
KINDS: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "bert-pretraining": ("BertConfig", BERT, "BertForPreTraining", "BertForSequenceClassification"),
    # Its base has no pooler, and experts have one each.
    "bert-masked": ("BertConfig", BERT, "BertForMaskedLM", "BertForSequenceClassification"),
    # Its base has a pooler, and experts have none.
    "bert-tokens": ("BertConfig", BERT, "BertForPreTraining", "BertForTokenClassification"),
    "bert-bare": ("BertConfig", BERT, "BertForMaskedLM", "BertModel"),
    "roberta": ("RobertaConfig", BERT, "RobertaForMaskedLM", "RobertaForSequenceClassification"),
    "distilbert": (
        "DistilBertConfig",
        {**ROWS, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "max_position_embeddings": 32},
        "DistilBertForMaskedLM",
        "DistilBertForSequenceClassification",
    ),
    "gpt2": ("GPT2Config", GPT2, "GPT2LMHeadModel", "GPT2ForSequenceClassification"),
    "llama": ("LlamaConfig", LLAMA, "LlamaForCausalLM", "LlamaForSequenceClassification"),
    "llama-tied": (
        "LlamaConfig",
        {**LLAMA, "tie_word_embeddings": True},
        "LlamaForCausalLM",
        "LlamaForSequenceClassification",
    ),
}  # fmt: skip


def noisy(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.add_(0.1 * torch.randn_like(tensor) * tensor.std().nan_to_num(0.1))
    return model.eval()


def headed_job(folder: Path, kind: str) -> tuple[Job, Job]:
    """A job whose experts have other heads than the base and than each other, and the same job of bodies alone."""
    config_class, sizes, base_class, expert_class = KINDS[kind]
    torch.manual_seed(0)
    job, plain = make_job(folder / "headed"), make_job(folder / "plain")
    base: Any = noisy(getattr(transformers, base_class)(getattr(transformers, config_class)(**sizes)))
    body_class = type(base.base_model)
    without_pooler = config_class in ("BertConfig", "RobertaConfig") and kind != "bert-pretraining"

    def save(model: Any, place: str) -> None:
        model.save_pretrained(job.folder / place)
        arguments = {"add_pooling_layer": False} if without_pooler else {}
        body = body_class.from_pretrained(job.folder / place, **arguments)
        body.save_pretrained(plain.folder / place)

    save(base, "base")
    for place in (job.folder, plain.folder):
        write_tokenizer(place / "base")
    for count, task in enumerate(TASKS, 2):
        config = getattr(transformers, config_class)(**sizes, num_labels=count)
        expert: Any = getattr(transformers, expert_class)(config)
        expert.base_model.load_state_dict(base.base_model.state_dict(), strict=False)
        save(noisy(expert), f"experts/{task}")
    for task in TASKS:
        # Labels that two classes have.
        rows = [json.loads(line) for line in (job.folder / f"{task}.jsonl").read_text().splitlines()]
        lines = [json.dumps({**row, "label": row["label"] % 2}) for row in rows]
        (job.folder / f"{task}.jsonl").write_text("\n".join(lines))
        job.recipe["evaluation"]["tasks"][task]["head"] = f"experts/{task}"
    for one in (job, plain):
        one.recipe["format"] = "native" if kind == "gpt2" else "compressed-tensors"
    return job, plain


def made(job: Job, verb: str, capsys: pytest.CaptureFixture[str]) -> dict[str, Tensor]:
    done = in_process(capsys, verb, job.write(), "--out", job.folder / verb)
    assert done.code == 0, done.err
    return load_file(job.folder / verb / "model.safetensors")


@pytest.mark.parametrize("kind", KINDS)
def test_other_heads_leave_the_bodies_to_be_merged_and_quantized(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job, plain = headed_job(tmp_path, kind)
    ours, expected = made(job, "quantize", capsys), made(plain, "quantize", capsys)
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in expected.items())
    config = json.loads((job.folder / "quantize" / "config.json").read_text())
    assert config["architectures"] == json.loads((plain.folder / "base" / "config.json").read_text())["architectures"]
    notes = json.loads((job.folder / "quantize" / "report.json").read_text())["notes"]
    assert f"of {KINDS[kind][2]} only {config['architectures'][0]} is used." in " ".join(notes)

    ours, expected = made(job, "merge", capsys), made(plain, "merge", capsys)
    prefix = getattr(transformers, KINDS[kind][2]).base_model_prefix + "."
    assert {name.removeprefix(prefix) for name in ours} == set(expected)
    assert all(torch.equal(tensor, expected[name.removeprefix(prefix)]) for name, tensor in ours.items())
    model, told = transformers.AutoModel.from_pretrained(job.folder / "merge", output_loading_info=True)
    assert type(model).__name__ == config["architectures"][0] and not told["unexpected_keys"]
    assert all("pooler" in key for key in told["missing_keys"])


def right_answers(job: Job, task: str, model: Any) -> float:
    """Percentage of a task's texts, one at a time, of which a classifier of transformers tells the class."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(job.folder / "base")
    rows = [json.loads(line) for line in (job.folder / f"{task}.jsonl").read_text().splitlines()]
    with torch.no_grad():
        found = [int(model(**tokenizer(row["text"], return_tensors="pt")).logits.argmax()) for row in rows]
    right: list[bool] = [answer == row["label"] for answer, row in zip(found, rows, strict=True)]
    return 100.0 * sum(right) / len(rows)


@pytest.mark.parametrize("kind", ["bert-pretraining", "bert-masked", "roberta", "llama"])
def test_a_head_may_be_that_of_a_checkpoint(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job, _ = headed_job(tmp_path, kind)
    made(job, "quantize", capsys)
    kinds = getattr(transformers, KINDS[kind][3])
    recipe = read_recipe(job.write())
    for folder in ("experts/reviews", "quantize"):
        found = evaluate_folder(recipe, job.folder / folder)["tasks"]
        for task in TASKS:
            classifier = kinds.from_pretrained(job.folder / "experts" / task)
            classifier.config.pad_token_id = 0
            body = load_any(job.folder / folder)
            body = getattr(body, "base_model", body)
            if kind == "bert-masked" and folder == "quantize":
                body.pooler = classifier.base_model.pooler
            setattr(classifier, classifier.base_model_prefix, body)
            assert found[task] == pytest.approx(right_answers(job, task, classifier))


def test_without_a_pad_token_no_token_of_a_text_is_taken_for_one(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    job, _ = headed_job(tmp_path, "llama")
    words = models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="w1")
    tokenizer = Tokenizer(words)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(job.folder / "base")
    for task in TASKS:
        classifier = transformers.LlamaForSequenceClassification.from_pretrained(job.folder / "experts" / task)
        lines = []
        for length in range(2, 12):
            ids = torch.tensor([[*torch.randint(5, 20, (length,)).tolist(), 0]])
            label = int(classifier(ids).logits.argmax())
            lines.append(json.dumps({"text": " ".join(WORDS[n] for n in ids[0]), "label": label}))
        (job.folder / f"{task}.jsonl").write_text("\n".join(lines))
        found = evaluate_folder(read_recipe(job.write()), job.folder / "experts" / task)["tasks"]
        assert found[task] == 100.0


def test_a_head_for_another_body_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job, _ = headed_job(tmp_path / "bert", "bert-masked")
    other, _ = headed_job(tmp_path / "llama", "llama")
    job.recipe["evaluation"]["tasks"]["reviews"]["head"] = str(other.folder / "experts/reviews")
    done = in_process(capsys, "eval", job.folder / "experts/reviews", "--recipe", job.write())
    assert done.code == 2 and "its head is one for LlamaModel, not for BertModel." in done.err
    job.recipe["evaluation"]["tasks"]["reviews"]["head"] = "base"
    done = in_process(capsys, "eval", job.folder / "experts/reviews", "--recipe", job.write())
    assert done.code == 2 and "BertForMaskedLM is no classifier of texts" in done.err


def test_adapters_with_heads_leave_the_base_without_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    peft = pytest.importorskip("peft")
    job, _ = headed_job(tmp_path, "bert-pretraining")
    made(job, "merge", capsys)
    whole = {}
    for count, task in enumerate(TASKS, 2):
        place = job.folder / "experts" / task
        shutil.rmtree(place)
        settings = peft.LoraConfig(r=2, target_modules=["query", "value"], task_type="SEQ_CLS", init_lora_weights=False)
        classifier: Any = transformers.BertForSequenceClassification.from_pretrained(
            job.folder / "base", num_labels=count
        )
        adapted = peft.get_peft_model(classifier, settings)
        adapted.save_pretrained(place)
        whole[task] = {n: t.clone() for n, t in adapted.merge_and_unload().base_model.state_dict().items()}
    del job.recipe["evaluation"]
    shutil.rmtree(job.folder / "merge")
    merged = made(job, "merge", capsys)
    base = transformers.BertModel.from_pretrained(job.folder / "base").state_dict()
    assert set(merged) == {f"bert.{name}" for name in base}
    for name, tensor in base.items():
        expected = tensor + 0.4 * sum((whole[task][name] - tensor for task in TASKS), torch.zeros_like(tensor))
        torch.testing.assert_close(merged[f"bert.{name}"], expected)
    config = json.loads((job.folder / "merge" / "config.json").read_text())
    assert config["architectures"] == ["BertModel"]


def test_an_adapter_of_the_base_s_own_head_leaves_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    peft = pytest.importorskip("peft")
    job, _ = headed_job(tmp_path, "llama")
    base = transformers.LlamaForCausalLM.from_pretrained(job.folder / "base")
    wanted = base.lm_head.weight.detach().clone()
    for task in TASKS:
        place = job.folder / "experts" / task
        shutil.rmtree(place)
        settings = peft.LoraConfig(r=2, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
        adapted = peft.get_peft_model(transformers.LlamaForCausalLM.from_pretrained(job.folder / "base"), settings)
        adapted.save_pretrained(place, save_embedding_layers=True)
        assert any("lm_head.base_layer" in name for name in load_file(place / "adapter_model.safetensors"))
        wanted += 0.4 * (adapted.merge_and_unload().lm_head.weight - base.lm_head.weight).detach()
    del job.recipe["evaluation"]
    torch.testing.assert_close(made(job, "merge", capsys)["lm_head.weight"], wanted)


def test_an_expert_of_the_base_s_class_without_its_head_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job, _ = headed_job(tmp_path, "llama")
    for task in TASKS:
        shutil.rmtree(job.folder / "experts" / task)
        shutil.copytree(job.folder / "base", job.folder / "experts" / task)
    del job.recipe["evaluation"]
    job.change_expert("intents", **{"lm_head.weight": None})
    done = in_process(capsys, "quantize", job.write(), "--out", tmp_path / "out")
    assert done.code == 2 and "lacks tensor 'lm_head.weight'" in done.err


def test_one_quantized_body_under_all_heads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job, _ = headed_job(tmp_path, "bert-masked")
    made(job, "quantize", capsys)
    body = epmq.load(job.folder / "quantize")
    models: dict[str, Any] = {task: epmq.with_head(body, job.folder / "experts" / task) for task in TASKS}
    ids = torch.randint(4, 30, (3, 8))
    hidden = body(ids).last_hidden_state
    for count, task in enumerate(TASKS, 2):
        assert models[task].config.num_labels == count
        expert = transformers.BertForSequenceClassification.from_pretrained(job.folder / "experts" / task)
        expected = expert.classifier(expert.bert.pooler(hidden))
        torch.testing.assert_close(models[task](ids).logits, expected)
        assert models[task].bert.encoder is body.encoder
    assert body.pooler is None
    with pytest.raises(ModelError, match="BertModel has no head"):
        epmq.with_head(body, job.folder / "quantize")
    with pytest.raises(ModelError, match="checkpoint: expected an expert's folder or hub id, got a BertModel"):
        epmq.with_head(body, body)
