"""Experts whose own configuration or tokenizer is not the base's, as which they are run: told, never silent."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import WORDS, Job, in_process, make_job, write_tokenizer

import epmq
from epmq.deviations import config_of, note_on
from epmq.jobs import model_of, open_sources
from epmq.recipe import read_recipe
from epmq.report import read_report

transformers = pytest.importorskip("transformers")


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return make_job(tmp_path / "job", blocks=1)


def give_config(job: Job, task: str, **changes: Any) -> None:
    """An expert's own config.json: the base's with changes."""
    content = json.loads((job.folder / "base" / "config.json").read_text())
    (job.folder / "experts" / task / "config.json").write_text(json.dumps(content | changes))


def notes(job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> list[str]:
    done = in_process(capsys, "quantize", job.write(), "--out", tmp_path / "out")
    assert done.code == 0
    return read_report(tmp_path / "out").notes


def test_what_computes_otherwise_is_told(job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    give_config(job, "reviews", num_attention_heads=8, hidden_act="relu")
    give_config(job, "intents", hidden_dropout_prob=0.5, num_labels=7, architectures=["BertForSequenceClassification"])
    assert notes(job, tmp_path, capsys) == [
        "expert 'reviews': its configuration has hidden_act 'relu' for 'gelu', num_attention_heads 8 for 4; it is run"
        " with the base's, and may give other outputs than it was trained to."
    ]


def test_a_merge_tells_it_too(
    job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    give_config(job, "reviews", layer_norm_eps=1e-3)
    done = in_process(capsys, "merge", job.write(), "--out", tmp_path / "out")
    assert done.code == 0
    assert "expert 'reviews': its configuration has layer_norm_eps 0.001 for 1e-12;" in caplog.text


def test_another_vocabulary_is_told(job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for task, words in (("reviews", WORDS[::-1]), ("intents", [*WORDS, "[MORE]"])):
        write_tokenizer(job.folder / "experts" / task, words)
    assert notes(job, tmp_path, capsys) == [
        "reviews: its expert's tokenizer has another vocabulary than the base's, which reads its texts."
    ]


def test_modules_are_compared_too() -> None:
    settings = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    settings |= {"num_key_value_heads": 2, "intermediate_size": 48}
    merged = transformers.LlamaModel(transformers.LlamaConfig(**settings)).eval()
    far = copy.deepcopy(merged)
    far.config = transformers.LlamaConfig(**settings, rope_theta=500000.0, use_cache=False)
    batches = [{"input_ids": torch.randint(0, 40, (2, 8))}]
    result = epmq.quantize(merged, {"far": far}, {"far": batches}, epmq.QuantConfig(group_size=16))
    (note,) = result.report["notes"]
    assert note.startswith("expert 'far': its configuration has ") and "rope_theta" in note and "500000.0" in note


def test_only_keys_of_both_count_and_few_are_named() -> None:
    base = {
        "a": 1,
        "b": 2,
        "c": 3,
        "d": 4,
        "rope_parameters": {"e": 5},
        "_attn": 1,
        "text_config": {"g": 1, "drop_rate": 0.1},
    }
    other = {"a": 2, "b": 3, "c": 4, "d": 4, "rope_parameters": {"e": 5, "factor": 8.0}, "_attn": 2, "of_another": 1}
    other["text_config"] = {"g": 1, "drop_rate": 0.0, "is_decoder": False}
    (note,) = note_on("x", other, base)
    assert note.startswith("x: its configuration has a 2 for 1, b 3 for 2, c 4 for 3 and 1 more;")
    (note,) = note_on("x", {"rope_parameters": other["rope_parameters"]}, base)
    assert note.startswith("x: its configuration has rope_parameters.factor 8.0 for None;")
    assert note_on("x", base, base) == note_on("x", None, base) == note_on("x", base, None) == []
    assert config_of(torch.nn.Linear(2, 2)) is None


@pytest.mark.parametrize(
    "changes",
    [
        {"use_cache": False, "pad_token_id": 7, "tokenizer_class": "LlamaTokenizer", "unsloth_version": "1"},
        {"max_position_embeddings": 4096, "attention_dropout": 0.1, "initializer_range": 0.5, "dtype": "bfloat16"},
        {"rope_scaling": {"type": "linear", "rope_type": "linear", "factor": 2.0}},
    ],
    ids=str,
)
def test_what_changes_nothing_is_not_told(changes: dict[str, Any]) -> None:
    settings = {"rope_scaling": {"rope_type": "linear", "factor": 2.0}, "attention_dropout": 0.0}
    base, other = (transformers.LlamaConfig(**given).to_dict() for given in (settings, settings | changes))
    assert note_on("x", other, base) == []


def test_a_configuration_that_nothing_reads_is_no_reason_to_refuse(job: Job, tmp_path: Path) -> None:
    for task, text in (("reviews", '{"model_type": "of-tomorrow"}'), ("intents", "{}")):
        (job.folder / "experts" / task / "config.json").write_text(text)
        assert config_of(job.folder / "experts" / task) is None
    recipe = read_recipe(job.write())
    assert open_sources(recipe, model_of(recipe)).notes == []
