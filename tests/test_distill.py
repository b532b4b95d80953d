"""Distillation and the label-free variants of texts it draws on."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import ToyJob, ToyModel, make_toy_job, state_of, toy_batches
from torch import nn

from epmq.augment import augmented, can_augment, token_pool
from epmq.config import DistillSettings
from epmq.distill import distill, pooled, similar_tasks, take
from epmq.streams import Batch, make_streams

QUICK = DistillSettings(steps=30, copies=1, learning_rate=1e-3)


def silent(what: str, done: int, total: int) -> None:
    """No progress."""


def features(model: nn.Module, batches: list[Batch]) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([pooled(model, batch) for batch in batches])


def run(job: ToyJob, settings: DistillSettings) -> nn.Module:
    model = copy.deepcopy(job.merged)
    streams = make_streams(job.calibration)
    distill(model, [model.get_submodule("blocks.1")], job.experts.__getitem__, streams, settings, silent)
    return model


def test_distill_brings_features_nearer_to_every_expert() -> None:
    job = make_toy_job(spread=1.0)
    tuned = run(job, DistillSettings(steps=80, copies=0, learning_rate=1e-3, cross_weight=0.0))
    for task, batches in make_streams(job.calibration).items():
        wanted = features(job.experts[task], batches)
        before = (features(job.merged, batches) - wanted).square().sum()
        assert (features(tuned, batches) - wanted).square().sum() < before


def test_distill_touches_only_the_blocks_it_is_given(toy_job: ToyJob) -> None:
    before = state_of(toy_job.merged)
    after = run(toy_job, QUICK).state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(name.startswith("blocks.1.") for name in changed)


def test_distill_repeats_under_its_seed_and_not_under_another(toy_job: ToyJob) -> None:
    first, second = run(toy_job, QUICK).state_dict(), run(toy_job, QUICK).state_dict()
    other = run(toy_job, QUICK.model_copy(update={"seed": 1})).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_pooled_takes_the_mean_over_unmasked_positions_only() -> None:
    model = ToyModel()
    inputs = toy_batches(torch.Generator().manual_seed(0), 1)[0]
    batch = make_streams({"a": [inputs]})["a"][0]
    with torch.no_grad():
        hidden = model(**inputs)
        for row in range(3):
            length = int(inputs["attention_mask"][row].sum())
            torch.testing.assert_close(pooled(model, batch)[row], hidden[row, :length].mean(0))


def test_similar_tasks_pairs_tasks_with_like_inputs() -> None:
    torch.manual_seed(0)
    model = ToyModel()

    def stream(low: int, high: int) -> list[Batch]:
        return make_streams({"t": [{"input_ids": torch.randint(low, high, (16, 10))} for _ in range(4)]})["t"]

    streams = {"a": stream(0, 8), "b": stream(20, 28), "c": stream(0, 8)}
    pairs = similar_tasks(model, streams, DistillSettings())
    assert "c" in pairs["a"] and "a" in pairs["c"]
    assert "a" not in pairs["b"] and "c" not in pairs["b"]
    assert similar_tasks(model, streams, DistillSettings(cross_weight=0.0)) == {"a": [], "b": [], "c": []}


def test_take_cuts_rows_and_padding() -> None:
    inputs = {
        "input_ids": torch.arange(24).view(3, 8),
        "attention_mask": (torch.arange(8) < torch.tensor([[2], [5], [8]])).long(),
        "scale": torch.tensor(2.0),
    }
    batch = make_streams({"a": [inputs]})["a"][0]
    taken = take(batch, torch.tensor([1, 0]))
    assert taken.inputs["input_ids"].tolist() == [[8, 9, 10, 11, 12], [0, 1, 2, 3, 4]]
    assert taken.inputs["attention_mask"].tolist() == [[1] * 5, [1, 1, 0, 0, 0]]
    assert taken.inputs["scale"] == 2.0
    assert taken.position_weights is not None and taken.position_weights.shape == (2, 5)


@pytest.mark.parametrize("seed", range(5))
def test_augmented_keeps_ends_and_length_limit(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([[3], [7], [12], [12]])
    ids = torch.randint(5, 40, (4, 12), generator=generator)
    ids[:, 0] = 1
    ids.scatter_(1, lengths - 1, 2)
    inputs = {"input_ids": ids, "attention_mask": (torch.arange(12) < lengths).long()}
    batch = make_streams({"a": [inputs]})["a"][0]
    pool = token_pool([batch])
    assert not set(pool.tolist()) & {1, 2}
    varied = augmented(batch, pool, pool, generator)
    mask = varied.inputs["attention_mask"]
    assert mask.shape[1] <= 12
    for row, length in enumerate(mask.sum(1).tolist()):
        text = varied.inputs["input_ids"][row, :length].tolist()
        assert text[0] == 1 and text[-1] == 2
        assert set(text[1:-1]) <= set(pool.tolist())


def test_only_token_batches_can_be_augmented() -> None:
    assert can_augment(make_streams({"a": [{"input_ids": torch.ones(2, 3, dtype=torch.long)}]})["a"][0])
    assert not can_augment(make_streams({"a": [{"images": torch.ones(2, 8, 8)}]})["a"][0])
