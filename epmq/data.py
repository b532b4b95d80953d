"""Calibration and test texts: jsonl files in, batches of token ids out."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from epmq import trust
from epmq.errors import CalibrationError

# Of a jsonl file, in signs.
LONGEST_LINE = 2**24
IGNORED_LABEL = -100


def read_jsonl(path: str | Path, limit: int | None = None) -> list[dict[str, Any]]:
    """The first ``limit`` objects of a jsonl file; blank lines and a byte order mark are passed over.

    Raises CalibrationError naming file and line for anything that is not a JSON object.
    """
    rows: list[dict[str, Any]] = []
    number = 0
    try:
        with io.TextIOWrapper(trust.open_file(path, CalibrationError), encoding="utf-8-sig") as handle:
            while limit is None or len(rows) < limit:
                number += 1
                line = handle.readline(LONGEST_LINE + 1)
                if not line:
                    break
                if len(line) > LONGEST_LINE:
                    raise ValueError(f"the line has more than {LONGEST_LINE} signs")
                if not line.strip():
                    continue
                row = trust.parse_json(line)
                if not isinstance(row, dict):
                    raise CalibrationError(f"{path}, line {number}: expected a JSON object, got {type(row).__name__}.")
                rows.append(row)
    except OSError as error:
        raise CalibrationError(f"{path}: the file cannot be read ({error.strerror}).") from error
    except (ValueError, RecursionError) as error:
        raise CalibrationError(f"{path}, line {number}: not JSON ({error}).") from error
    return rows


def texts_of(rows: list[dict[str, Any]], key: str, path: str | Path) -> list[str]:
    """The text of each row. Raises CalibrationError naming the row that has none."""
    texts = []
    for number, row in enumerate(rows, 1):
        if not isinstance(row.get(key), str):
            raise CalibrationError(f"{path}, object {number}: it has no text under the key {key!r}.")
        if any("\ud800" <= sign <= "\udfff" for sign in row[key]):
            raise CalibrationError(
                f"{path}, object {number}: its text holds half a surrogate pair; repair or remove it."
            )
        texts.append(row[key])
    return texts


def special_tokens(tokenizer: Any) -> int:
    """How many tokens a tokenizer adds to a text; 0 for one that does not tell."""
    count: int = getattr(tokenizer, "num_special_tokens_to_add", lambda: 0)()
    return count


def tokenize(tokenizer: Any, texts: list[str], max_length: int) -> list[list[int]]:
    """Token ids per text, special tokens added, cut at ``max_length``."""
    ids: list[list[int]] = tokenizer(texts, truncation=True, max_length=max_length)["input_ids"]
    return ids


def tokenize_targets(tokenizer: Any, texts: list[str], max_length: int) -> list[list[int]]:
    """As :func:`tokenize`, for what a decoder is to write."""
    ids: list[list[int]] = tokenizer(text_target=texts, truncation=True, max_length=max_length)["input_ids"]
    return ids


def padded_batches(ids: list[list[int]], batch_size: int, pad: int) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
    """Batches of similar length: the texts' places and ``{"input_ids", "attention_mask"}``, int64 ``[B, S]``."""
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    for start in range(0, len(order), batch_size):
        places = order[start : start + batch_size]
        rows = [ids[i] for i in places]
        yield places, {"input_ids": _padded(rows, pad), "attention_mask": _padded([[1] * len(row) for row in rows], 0)}


def _padded(rows: list[list[int]], value: int) -> Tensor:
    """int64 ``[B, S]``, short rows filled with ``value`` on the right."""
    filled = torch.full((len(rows), max(map(len, rows))), value, dtype=torch.int64)
    for place, row in enumerate(rows):
        filled[place, : len(row)] = torch.tensor(row, dtype=torch.int64)
    return filled


def calibration_batches(
    tokenizer: Any,
    path: str | Path,
    text_key: str,
    examples: int,
    max_length: int,
    batch_size: int,
    seed: int | None,
    target_key: str | None = None,
) -> list[dict[str, Tensor]]:
    """Batches of ``examples`` texts of a jsonl file: the first ones, or drawn with ``seed``.

    target_key: of the text that a decoder is to write, which becomes ``labels``, int64 ``[B, T]``, -100 at padding.
    Raises CalibrationError when the file holds no text, or only texts that tokenise to nothing.
    """
    rows = read_jsonl(path, examples if seed is None else None)
    if seed is not None and len(rows) > examples:
        drawn = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:examples]
        rows = [rows[i] for i in drawn.tolist()]
    ids = tokenize(tokenizer, texts_of(rows, text_key, path), max_length) if rows else []
    targets = ids
    if rows and target_key is not None:
        targets = tokenize_targets(tokenizer, texts_of(rows, target_key, path), max_length)
    pairs = [pair for pair in zip(ids, targets, strict=True) if all(pair)]
    if all(len(own) <= special_tokens(tokenizer) for own, _ in pairs):
        raise CalibrationError(f"{path}: holds no calibration text (after tokenisation nothing is left).")
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    batches = []
    for places, inputs in padded_batches([ids for ids, _ in pairs], batch_size, pad):
        if target_key is not None:
            inputs["labels"] = _padded([pairs[i][1] for i in places], IGNORED_LABEL)
        batches.append(inputs)
    return batches
