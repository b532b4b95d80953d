"""Texts in, batches out, accuracy of heads on pooled features."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from epmq.data import calibration_batches, padded_batches, read_jsonl
from epmq.errors import CalibrationError, NumericalError
from epmq.evaluate import accuracy, features, load_task, markdown_table, row


class LetterTokenizer:
    """One token per letter, as far as a tokenizer is asked for."""

    pad_token_id = 0

    def __call__(self, texts: list[str], truncation: bool, max_length: int) -> dict[str, Any]:
        return {"input_ids": [[ord(c) - 96 for c in text][:max_length] for text in texts]}


class LetterModel(nn.Module):
    """Hidden state of a token: its letter one-hot, garbage at padding."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor]:
        hidden = torch.nn.functional.one_hot(input_ids, 27).float()
        return (torch.where(attention_mask.bool().unsqueeze(-1), hidden, torch.tensor(1e9)),)


def write_lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("\n".join(json.dumps(entry) for entry in rows) + "\n")
    return path


def test_features_ignore_padding_and_keep_the_order_of_texts() -> None:
    ids = [[1, 1, 1], [2], [3, 4]]
    found = features(LetterModel(), ids, "mean", batch_size=2)
    assert found[0, 1] == 1.0 and found[1, 2] == 1.0
    assert found[2, 3] == found[2, 4] == 0.5
    assert features(LetterModel(), ids, "first", batch_size=2)[2, 3] == 1.0


def test_accuracy_is_the_percentage_of_right_classes(tmp_path: Path) -> None:
    data = write_lines(tmp_path / "t.jsonl", [{"text": t, "label": int(n)} for t, n in ("a0", "b1", "a0", "b0")])
    weight = torch.zeros(2, 27)
    weight[0, 1] = weight[1, 2] = 1.0
    save_file({"weight": weight, "bias": torch.zeros(2)}, tmp_path / "head.safetensors")
    task = load_task(LetterTokenizer(), data, tmp_path / "head.safetensors", 8)
    assert accuracy(LetterModel(), task, "mean") == 75.0


def test_what_is_no_number_has_no_class(tmp_path: Path) -> None:
    """NaN is the largest of all to argmax, and so every text of the first class, which may be the right one."""
    data = write_lines(tmp_path / "t.jsonl", [{"text": "a", "label": 0}])
    save_file({"weight": torch.ones(2, 27), "bias": torch.zeros(2)}, tmp_path / "head.safetensors")
    task = load_task(LetterTokenizer(), data, tmp_path / "head.safetensors", 8)
    model = LetterModel()
    model.register_forward_hook(lambda module, args, output: (output[0] * torch.inf * 0.0,))
    with pytest.raises(NumericalError, match=r"what it makes of .*head\.safetensors's texts is NaN or Inf"):
        accuracy(model, task, "mean")


def test_a_text_without_a_token_is_named(tmp_path: Path) -> None:
    data = write_lines(tmp_path / "t.jsonl", [{"text": "a", "label": 0}, {"text": "", "label": 0}])
    with pytest.raises(CalibrationError, match=r"t\.jsonl, object 2: its text is no token"):
        load_task(LetterTokenizer(), data, tmp_path / "head.safetensors", 8)


def test_padded_batches_cover_every_text_once() -> None:
    ids = [[1] * n for n in (5, 1, 3, 2, 4)]
    seen = [place for places, _ in padded_batches(ids, 2, 0) for place in places]
    assert sorted(seen) == [0, 1, 2, 3, 4]
    for places, inputs in padded_batches(ids, 2, 0):
        assert inputs["attention_mask"].sum(1).tolist() == [len(ids[place]) for place in places]


def test_calibration_takes_the_first_texts_or_draws_by_seed(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "c.jsonl", [{"text": chr(97 + i)} for i in range(20)])

    def letters(seed: int | None) -> set[int]:
        batches = calibration_batches(LetterTokenizer(), path, "text", 5, 8, 2, seed)
        return {int(i) for batch in batches for i in batch["input_ids"].flatten()}

    assert letters(None) == {1, 2, 3, 4, 5}
    assert letters(1) == letters(1) != letters(2)
    assert len(letters(1)) == 5


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ('{"text": "a"}\n{oops\n', "line 2"),
        ("[1]\n", "JSON object"),
        ('{"txt": "a"}\n', "'text'"),
        ("\n\n", "no calibration text"),
        ('{"text": ""}\n', "no calibration text"),
    ],
)
def test_bad_calibration_files_are_named(tmp_path: Path, content: str, told: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(content)
    with pytest.raises(CalibrationError, match=told) as caught:
        calibration_batches(LetterTokenizer(), path, "text", 5, 8, 2, None)
    assert "bad.jsonl" in str(caught.value)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"nothing\.jsonl"):
        read_jsonl(tmp_path / "nothing.jsonl")


def test_labels_must_be_whole_numbers(tmp_path: Path) -> None:
    data = write_lines(tmp_path / "t.jsonl", [{"text": "a", "label": "x"}])
    with pytest.raises(CalibrationError, match="'label'"):
        load_task(LetterTokenizer(), data, tmp_path / "head.safetensors", 8)


def test_table_has_a_line_per_row_and_the_average() -> None:
    rows = [row(None, "expert", None, {"a": 90.0, "b": 80.0}), row("ties", "epmq", 4, {"a": 70.0, "b": 60.0})]
    lines = markdown_table(rows).splitlines()
    assert len(lines) == 4
    assert lines[2] == "| – | expert | – | 90.0 | 80.0 | **85.0** |"
    assert lines[3] == "| ties | epmq | 4 | 70.0 | 60.0 | **65.0** |"
