"""Streams: what is left out, what is weighed, what is held back."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from conftest import ToyJob
from torch import Tensor, nn

from epmq import QuantConfig, quantize
from epmq.errors import CalibrationError
from epmq.statistics import TaskStatistics
from epmq.streams import HELD_OUT_EVERY, make_streams, rows_of, split_held

transformers = pytest.importorskip("transformers")

Calibration = dict[str, list[dict[str, Tensor]]]


def bert_job() -> tuple[nn.Module, dict[str, nn.Module], Calibration]:
    """A model whose attention obeys the mask, two experts, batches padded on the right."""
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48
    )
    merged = transformers.BertModel(config, add_pooling_layer=False).eval()
    experts, calibration = {}, {}
    for task in ("a", "b"):
        experts[task] = copy.deepcopy(merged)
        with torch.no_grad():
            for parameter in experts[task].parameters():
                parameter.add_(0.01 * torch.randn(parameter.shape))
        mask = (torch.arange(10) < torch.randint(3, 10, (6, 1))).long()
        calibration[task] = [
            {"input_ids": torch.randint(0, 40, (6, 10)), "attention_mask": mask},
            {"input_ids": torch.randint(0, 40, (6, 10)), "attention_mask": torch.ones(6, 10).long()},
        ]
    return merged, experts, calibration


def state_and_errors(result: Any) -> tuple[dict[str, Tensor], Any]:
    layers = [{k: row[k] for k in ("linear", "lambda", "damp", "tasks")} for row in result.report["layers"]]
    return result.model.state_dict(), (layers, [row["hidden_error"] for row in result.report["blocks"]])


def assert_same(first: Any, second: Any) -> None:
    (ours, told), (wanted, told_before) = state_and_errors(first), state_and_errors(second)
    for name, tensor in wanted.items():
        assert torch.equal(ours[name], tensor), name
    assert told == told_before


SETTINGS: list[dict[str, Any]] = [
    {},
    {"method": "gptq"},
    {"alpha": 0.0, "bias_refit": False},
    {"norm_refit": True, "task_weights": "hessian_norm"},
    {"anchor": "auto"},
    {"anchor": "auto", "forward_dtype": "bfloat16"},
    {"distill": {"steps": 4, "copies": 1}},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_what_stands_at_padded_positions_changes_no_bit(settings: dict[str, Any]) -> None:
    merged, experts, calibration = bert_job()
    config = QuantConfig(group_size=16, **settings)
    garbage: Calibration = {}
    for task, batches in calibration.items():
        garbage[task] = []
        for batch in batches:
            random = torch.randint(0, 40, batch["input_ids"].shape)
            ids = torch.where(batch["attention_mask"] > 0, batch["input_ids"], random)
            garbage[task].append({"input_ids": ids, "attention_mask": batch["attention_mask"]})
    assert any(
        not torch.equal(g["input_ids"], b["input_ids"])
        for t in calibration
        for g, b in zip(garbage[t], calibration[t], strict=True)
    )
    first, second = (quantize(merged, experts, data, config) for data in (calibration, garbage))
    assert_same(second, first)


class TimeFirst(nn.Module):
    """Hidden states ``[S, B, K]``; the positions do not see each other."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(40, 16)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16)) for _ in range(2))

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        hidden = self.embedding(input_ids).transpose(0, 1).contiguous()
        for block in self.blocks:
            hidden = hidden + block(hidden)
        out: Tensor = hidden.transpose(0, 1)
        return out


@pytest.mark.parametrize("settings", [{}, {"anchor": "auto"}, {"alpha": 0.0}], ids=str)
@pytest.mark.parametrize("length", [6, 10])
def test_hidden_states_with_time_first_are_weighed_by_the_same_mask(length: int, settings: dict[str, Any]) -> None:
    merged = TimeFirst()
    experts: dict[str, nn.Module] = {"a": copy.deepcopy(merged)}
    with torch.no_grad():
        for parameter in experts["a"].parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    mask = (torch.arange(length) < torch.tensor([[length], [1], [3], [5], [2], [4]])).long()
    ids = torch.randint(0, 40, (6, length))
    other = torch.where(mask > 0, ids, torch.randint(0, 40, (6, length)))
    config = QuantConfig(group_size=16, **settings)
    first, second = (
        quantize(merged, experts, {"a": [{"input_ids": given, "attention_mask": mask}]}, config)
        for given in (ids, other)
    )
    assert_same(second, first)
    assert first.report["notes"] == []


def test_rows_are_weighed_in_the_order_in_which_they_stand() -> None:
    weights = torch.arange(12.0).view(3, 4)
    for shape, wanted in (
        ((3, 4), weights), ((12,), weights), ((1, 12), weights), ((3, 2, 2), weights), ((4, 3), weights.T),
        ((6, 2), None), ((2, 6), None), ((3,), None),
    ):  # fmt: skip
        _, found, matched = rows_of(torch.randn(*shape, 8), weights)
        assert matched == (wanted is not None)
        assert wanted is None or (found is not None and torch.equal(found, wanted.flatten()))
    # Where both fit the order of the hidden states counts, which the caller knows.
    square = torch.arange(9.0).view(3, 3)
    batch = make_streams({"a": [{"input_ids": torch.zeros(3, 3), "attention_mask": square}]})["a"][0]
    for sequence, wanted in (("input_ids", square), ("input_ids.T", square.T)):
        _, found, _ = rows_of(torch.randn(3, 3, 8), batch.weights_of(sequence))
        assert found is not None and torch.equal(found, wanted.flatten())


def test_held_examples_are_held_where_time_comes_first() -> None:
    (batch,) = make_streams({"a": [{"input_ids": torch.zeros(5, 5, dtype=torch.int64)}]})["a"]
    x = torch.randn(5, 5, 8)
    for sequence, wanted in (("input_ids", [0.0] * 20 + [1.0] * 5), ("input_ids.T", [0.0, 0.0, 0.0, 0.0, 1.0] * 5)):
        _, held = split_held(x.view(25, 8), None, x, batch, sequence)
        assert held.tolist() == wanted


def test_a_mask_that_hides_nothing_is_no_mask(toy_job: ToyJob) -> None:
    plain = {t: [{"input_ids": b["input_ids"]} for b in batches] for t, batches in toy_job.calibration.items()}
    ones = {
        t: [{**b, "attention_mask": torch.ones_like(b["input_ids"])} for b in batches] for t, batches in plain.items()
    }
    config = QuantConfig(group_size=16)
    assert_same(*(quantize(toy_job.merged, toy_job.experts, data, config) for data in (plain, ones)))


def weighed(job: ToyJob, weights: Any) -> Any:
    data = {
        task: [{"input_ids": b["input_ids"], "position_weights": weights(b)} for b in batches]
        for task, batches in job.calibration.items()
    }
    return quantize(job.merged, job.experts, data, QuantConfig(group_size=16))


def test_position_weights_stand_in_for_the_mask(toy_job: ToyJob) -> None:
    # The toy's attention does not look at the mask, so that the statistics are all it changes.
    masked = quantize(toy_job.merged, toy_job.experts, toy_job.calibration, QuantConfig(group_size=16))
    assert_same(weighed(toy_job, lambda b: b["attention_mask"].float()), masked)
    # A common factor cancels in weighted means; a power of two does so without rounding.
    assert_same(weighed(toy_job, lambda b: 4.0 * b["attention_mask"]), masked)


def test_position_weights_replace_the_mask_where_both_are_given(toy_job: ToyJob) -> None:
    both = {
        task: [{**b, "position_weights": torch.ones(8, 12)} for b in batches]
        for task, batches in toy_job.calibration.items()
    }
    ours = quantize(toy_job.merged, toy_job.experts, both, QuantConfig(group_size=16))
    assert_same(ours, weighed(toy_job, lambda b: torch.ones(8, 12)))


def test_position_weights_matter(toy_job: ToyJob) -> None:
    first = torch.zeros(8, 12)
    first[:, 0] = 1.0
    ours, wanted = weighed(toy_job, lambda b: first), weighed(toy_job, lambda b: torch.ones(8, 12))
    assert not torch.equal(ours.model.blocks[1].down.packed, wanted.model.blocks[1].down.packed)


def test_rows_weigh_in_the_moments_as_often_as_they_say() -> None:
    x, target = torch.randn(7, 4).double(), torch.randn(7, 4).double()
    weights = torch.tensor([0.0, 1.0, 2.0, 0.0, 3.0, 1.0, 1.0])
    ours, repeated = (TaskStatistics(4, 4, dtype=torch.float64) for _ in range(2))
    spoiled = x.clone()
    spoiled[weights == 0] = float("nan")
    ours.add(spoiled, target, weights, sample=100)
    times = weights.long()
    repeated.add(x.repeat_interleave(times, 0), target.repeat_interleave(times, 0), None)
    assert ours.weight == repeated.weight == 8.0
    for name in ("hessian", "cross", "sum_x", "sum_target"):
        first, second = getattr(ours, name), getattr(repeated, name)
        if name == "hessian":
            first, second = first.tril(), second.tril()
        assert torch.allclose(first, second, rtol=1e-12)
    assert len(ours.sample_x[0]) == 5


def test_inputs_of_the_caller_stay_whole(toy_job: ToyJob) -> None:
    batch = {"input_ids": torch.zeros(2, 3, dtype=torch.int64), "position_weights": torch.ones(2, 3)}
    make_streams({"a": [batch]})
    assert set(batch) == {"input_ids", "position_weights"}


def test_calibration_may_be_generators(toy_job: ToyJob) -> None:
    lists = quantize(toy_job.merged, toy_job.experts, toy_job.calibration, QuantConfig(group_size=16))
    generators = {task: (batch for batch in batches) for task, batches in toy_job.calibration.items()}
    assert_same(quantize(toy_job.merged, toy_job.experts, generators, QuantConfig(group_size=16)), lists)


# -- held-out examples ---------------------------------------------------------------------------------------------


def test_every_fifth_example_is_held_out_across_batches() -> None:
    batches = [{"input_ids": torch.zeros(n, 3, dtype=torch.int64)} for n in (3, 4, 6)]
    stream = make_streams({"a": batches})["a"]
    held = torch.cat([batch.held for batch in stream])
    assert held.tolist() == [i % HELD_OUT_EVERY == HELD_OUT_EVERY - 1 for i in range(13)]


def test_an_input_that_all_examples_share_does_not_tell_their_number() -> None:
    inputs = {"position_ids": torch.arange(3).unsqueeze(0), "input_ids": torch.zeros(5, 3, dtype=torch.int64)}
    assert make_streams({"a": [inputs]})["a"][0].held.tolist() == [False] * 4 + [True]


def test_held_examples_are_held_with_all_their_positions() -> None:
    (batch,) = make_streams({"a": [{"input_ids": torch.zeros(5, 3, dtype=torch.int64)}]})["a"]
    x = torch.randn(5, 3, 8)
    rows, weights, matched = rows_of(x, batch.position_weights)
    fit, held = split_held(rows, weights, x, batch)
    assert matched
    assert (rows.shape, weights) == ((15, 8), None)
    assert held.tolist() == [0.0] * 12 + [1.0] * 3
    assert torch.equal(fit + held, torch.ones(15))


def test_masked_positions_are_neither_fitted_nor_held() -> None:
    mask = torch.tensor([[1, 1, 0]] * 5)
    (batch,) = make_streams({"a": [{"input_ids": torch.zeros(5, 3).long(), "attention_mask": mask}]})["a"]
    x = torch.randn(5, 3, 8)
    rows, weights, _ = rows_of(x, batch.position_weights)
    fit, held = split_held(rows, weights, x, batch)
    assert torch.equal(fit + held, mask.flatten().float())
    assert float(held.sum()) == 2.0


def test_an_input_without_one_row_per_position_takes_part_whole() -> None:
    mask = torch.tensor([[1, 1, 0]] * 5)
    (batch,) = make_streams({"a": [{"input_ids": torch.zeros(5, 3).long(), "attention_mask": mask}]})["a"]
    pooled = torch.randn(5, 8)
    rows, weights, matched = rows_of(pooled, batch.position_weights)
    assert (len(rows), weights, matched) == (5, None, False)
    fit, held = split_held(rows, weights, pooled, batch)
    assert held.tolist() == [0, 0, 0, 0, 1]
    windows = torch.randn(10, 4, 8)
    rows, weights, _ = rows_of(windows, batch.position_weights)
    fit, held = split_held(rows, weights, windows, batch)
    assert (float(held.sum()), float(fit.sum())) == (8.0, 32.0)


# -- refusals --------------------------------------------------------------------------------------------------------

IDS = torch.zeros(2, 3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        ({}, "names no task"),
        ({"a": []}, "task 'a': its calibration set is empty"),
        ({"a": [IDS]}, "task 'a': batch 0 is a Tensor"),
        ({"a": [{"input_ids": IDS}, {}]}, "task 'a': batch 1 holds no tensor"),
        ({"a": [{"input_ids": torch.tensor(3)}]}, "holds no tensor"),
        ({"a": [{"input_ids": IDS, "past_key_values": ()}]}, "batch 0 holds past_key_values"),
        ({"a": [{"x": torch.tensor([[1.0, float("nan")]])}]}, "NaN or Inf in 'x'"),
        ({"a": [{"x": torch.tensor([[1.0, float("inf")]])}]}, "NaN or Inf in 'x'"),
        ({"a": [{"input_ids": IDS, "position_weights": -torch.ones(2, 3)}]}, "negative or non-finite"),
        ({"a": [{"input_ids": IDS, "position_weights": torch.full((2, 3), float("nan"))}]}, "negative or non-finite"),
        (
            {"a": [{"input_ids": IDS, "position_weights": torch.ones(2, 4)}]},
            r"position_weights.*got \[2, 4\] for 2 examples of 3 tokens",
        ),
        ({"a": [{"input_ids": IDS, "position_weights": [1.0, 2.0]}]}, "position_weights.*got list"),
        ({"a": [{"x": torch.ones(2, 3), "position_weights": torch.ones(3, 3)}]}, r"got \[3, 3\] for 2 examples"),
        ({"a": [{"x": torch.ones(2, 3), "position_weights": torch.ones(2)}]}, r"got \[2\] for 2 examples"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_unusable_calibration_is_refused(calibration: Any, message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        make_streams(calibration)


def test_a_task_whose_positions_are_all_masked_is_named(toy_job: ToyJob) -> None:
    for batch in toy_job.calibration["task1"]:
        batch["attention_mask"].zero_()
    with pytest.raises(CalibrationError, match=r"task 'task1' has no calibration rows at blocks\.0\.query"):
        quantize(toy_job.merged, toy_job.experts, toy_job.calibration, QuantConfig(group_size=16))


def test_a_task_without_positions_is_named_before_norms_are_refitted(toy_job: ToyJob) -> None:
    for batch in toy_job.calibration["task1"]:
        batch["attention_mask"].zero_()
    with pytest.raises(
        CalibrationError, match=r"task 'task1' has no calibration rows at blocks\.0\.norm: all positions"
    ):
        quantize(toy_job.merged, toy_job.experts, toy_job.calibration, QuantConfig(group_size=16, norm_refit=True))


# -- several texts an example, floats of other widths ---------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"distill": {"steps": 4, "copies": 1}}], ids=str)
def test_padding_counts_nowhere_where_an_example_has_several_texts(settings: dict[str, Any]) -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    }  # fmt: skip
    merged = transformers.BertForMultipleChoice(transformers.BertConfig(**sizes)).eval()
    expert = copy.deepcopy(merged)
    with torch.no_grad():
        for parameter in expert.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape))
    mask = (torch.arange(9) < torch.randint(3, 10, (4, 3, 1))).long()
    ids = torch.randint(1, 40, (4, 3, 9))
    (batch,) = make_streams({"a": [{"input_ids": ids, "attention_mask": mask}]})["a"]
    assert batch.position_weights is not None
    assert torch.equal(batch.position_weights, mask.view(12, 9).float())
    config = QuantConfig(group_size=8, **settings)
    plain, garbled = (
        quantize(merged, {"a": expert}, {"a": [{"input_ids": tokens, "attention_mask": mask}]}, config)
        for tokens in (ids, torch.where(mask > 0, ids, torch.randint(1, 40, ids.shape)))
    )
    assert_same(plain, garbled)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("settings", [{}, {"distill": {"steps": 2}}, {"forward_dtype": "bfloat16"}], ids=str)
def test_inputs_of_other_floats_are_taken_as_fp32(settings: dict[str, Any], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(2)]
    merged = nn.Sequential(nn.Linear(16, 16), nn.Sequential(*blocks)).to(dtype)
    expert = copy.deepcopy(merged)
    with torch.no_grad():
        for parameter in expert.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape).to(dtype))
    inputs = torch.randn(10, 3, 16).to(dtype)
    config = QuantConfig(group_size=8, **settings)
    found, wanted = (quantize(merged, {"a": expert}, {"a": [{"input": x}]}, config) for x in (inputs, inputs.float()))
    assert_same(found, wanted)
