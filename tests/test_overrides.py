"""Settings of their own for some linears: which they are, what stays shared, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ToyJob
from torch import nn

import epmq
from epmq import QuantConfig, QuantLinear, QuantResult
from epmq.errors import ConfigError
from epmq.recipe import Recipe


def run(job: ToyJob, **settings: Any) -> QuantResult:
    config = QuantConfig(**{"group_size": 16, **settings})
    experts = job.experts if config.needs_experts else None
    return epmq.quantize(job.merged, experts, job.calibration, config)


def facts(model: nn.Module) -> dict[str, tuple[int, int] | None]:
    """(bits, group_size) of each linear of the first block, None where it is not rounded."""
    names = ("query", "key", "out", "up", "down")
    found = {name: model.get_submodule(f"blocks.0.{name}") for name in names}
    return {name: (m.bits, m.group_size) if isinstance(m, QuantLinear) else None for name, m in found.items()}


@pytest.mark.parametrize("method", ["epmq", "regmean", "gptq", "rtn"])
def test_the_first_pattern_that_matches_counts(method: str, toy_job: ToyJob) -> None:
    overrides = {
        "key$": {"bits": 8, "group_size": -1}, "key|out": {"group_size": 8}, r"0\.down": {"bits": None},
        r"\.down": {"bits": 2},
    }  # fmt: skip
    result = run(toy_job, method=method, overrides=overrides)
    assert facts(result.model) == {"query": (4, 16), "key": (8, -1), "out": (4, 8), "up": (4, 16), "down": None}
    down = result.model.get_submodule("blocks.1.down")
    assert isinstance(down, QuantLinear)
    assert down.bits == 2
    assert not result.report["notes"]
    assert result.report["settings"]["overrides"] == overrides


@pytest.mark.parametrize("method", ["epmq", "rtn"])
def test_the_report_compares_linears_that_are_not_rounded_as_well(method: str, toy_job: ToyJob) -> None:
    """Plain GPTQ leaves the merged weights there; without them its mean would be one over other linears."""
    report = run(toy_job, method=method, overrides={r"blocks\.0": {"bits": None}}).report
    for row in report["layers"]:
        for errors in row["tasks"].values():
            assert list(errors) == ["merged", "gptq", method]
            assert (errors["gptq"] == errors["merged"]) == row["linear"].startswith("blocks.0")
    assert all(list(means) == ["merged", "gptq", method] for means in report["average_error"].values())


def test_linears_that_read_one_input_keep_sharing_it(toy_job: ToyJob) -> None:
    """query and key are one group: settings for one of them leave the other's codes and errors as they were."""
    plain, other = run(toy_job), run(toy_job, overrides={"key": {"bits": 8}})
    same = run(toy_job, overrides={"key": {"bits": 4}})
    ours, wanted = other.model.state_dict(), plain.model.state_dict()
    for part in ("packed", "scales", "zeros", "bias"):
        assert torch.equal(ours[f"blocks.0.query.{part}"], wanted[f"blocks.0.query.{part}"])
    assert {row["linear"] for row in other.report["layers"]} == {row["linear"] for row in plain.report["layers"]}
    errors = [
        {row["linear"]: row["tasks"]["task0"]["epmq"] for row in result.report["layers"]} for result in (plain, other)
    ]
    assert errors[0]["blocks.0.query"] == errors[1]["blocks.0.query"]
    assert errors[1]["blocks.0.key"] < errors[0]["blocks.0.key"]
    for name, tensor in same.model.state_dict().items():
        assert torch.equal(tensor, wanted[name]), name


def test_bits_null_solves_without_rounding(toy_job: ToyJob) -> None:
    target = run(toy_job, bits=None).model.get_submodule("blocks.0.query").weight
    ours = run(toy_job, overrides={"query": {"bits": None}}).model.get_submodule("blocks.0.query").weight
    merged = toy_job.merged.get_submodule("blocks.0.query").weight
    assert torch.equal(ours, target)  # type: ignore[arg-type]
    assert not torch.equal(ours, merged)  # type: ignore[arg-type]
    for method in ("gptq", "rtn"):
        left = run(toy_job, method=method, overrides={"query": {"bits": None}})
        assert torch.equal(left.model.get_submodule("blocks.0.query").weight, merged)  # type: ignore[arg-type]


def test_only_some_may_be_rounded(toy_job: ToyJob) -> None:
    for settings in ({}, {"method": "rtn"}, {"distill": {"steps": 2, "copies": 0}}):
        result = run(toy_job, bits=None, overrides={"up": {"bits": 3}}, **settings)
        assert facts(result.model) == {"query": None, "key": None, "out": None, "up": (3, 16), "down": None}


def test_a_mixed_model_is_reloaded(toy_job: ToyJob, tmp_path: Path) -> None:
    result = run(toy_job, overrides={"up": {"bits": 3, "group_size": 8}, "down": {"bits": None}})
    epmq.save(result, tmp_path / "out")
    loaded = epmq.load(tmp_path / "out", type(toy_job.merged)())
    batch = toy_job.calibration["task0"][0]
    with torch.no_grad():
        assert torch.equal(loaded(**batch), result.model(**batch))


def test_a_pattern_that_counts_nowhere_is_told(toy_job: ToyJob) -> None:
    result = run(toy_job, overrides={"up": {"bits": 8}, "blocks.0.up": {"bits": 3}, "wq": {"bits": 3}})
    assert result.report["notes"] == [
        "overrides: 'blocks.0.up' is the first match of no quantized linear.",
        "overrides: 'wq' is the first match of no quantized linear.",
    ]


def test_a_choice_that_counts_nowhere_is_told(toy_job: ToyJob) -> None:
    wanted = [
        f"{key}: {pattern!r} matches no linear of a block; only those of blocks are quantized."
        for key, pattern in (("exclude", "head"), ("include", "wq"))
    ]
    for settings in ({}, {"distill": {"steps": 2, "copies": 0}}):
        result = run(toy_job, include=["up", "wq"], exclude=["head", "blocks.1.up"], **settings)
        assert [note for note in result.report["notes"] if "matches" in note] == wanted


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"up": {"bits": 5}}, r"overrides\.up\.bits: use one of 2, 3, 4, 8, or null for no rounding, got 5"),
        ({"up": {"group_size": 0}}, r"overrides\.up\.group_size: use a positive number of columns.*got 0"),
        ({"up": {"group": 64}}, r"unknown key 'overrides\.up\.group'; did you mean 'group_size'\?"),
        ({"up": {}}, r"overrides\.up: give bits or group_size"),
        ({"(": {"bits": 8}}, r"overrides: '\(' is not a regular expression"),
        ({"up": 8}, r"overrides\.up: .*got 8"),
    ],
    ids=str,
)
def test_overrides_that_make_no_sense_are_refused(overrides: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        QuantConfig(overrides=overrides)
    with pytest.raises(ConfigError, match=message.replace(r"overrides\.", r"quantization\.overrides\.")):
        Recipe.parse({"base": "base", "quantization": {"overrides": overrides}}, "recipe.yaml")
