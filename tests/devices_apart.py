"""Quantization on another device than the CPU: no tensor is made in the wrong place, and the result comes home."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import ToyJob, make_toy_job
from elsewhere import DEVICE, Away, elsewhere
from test_devices import SETTINGS
from torch import nn

import epmq
from epmq import onednn
from epmq.devices import compute_device, home_of, moved
from epmq.errors import ConfigError
from epmq.evaluate import features
from epmq.linear import QuantLinear
from epmq.perplexity import perplexity


def small_job() -> ToyJob:
    """One block and one batch a task: on the test's device every operator costs as much as a whole layer."""
    job = make_toy_job(2, 8, 1)
    return replace(job, calibration={task: batches[:1] for task, batches in job.calibration.items()})


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_another_device_gives_the_same_model(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    # What only CPUs have would round otherwise.
    monkeypatch.setenv("EPMQ_BACKEND", "reference")
    monkeypatch.setattr(onednn, "preferred", lambda: False)
    job, config = small_job(), epmq.QuantConfig(**settings)
    here = epmq.quantize(job.merged, job.experts, job.calibration, config, job.base, device="cpu")
    with elsewhere() as device:
        there = epmq.quantize(job.merged, job.experts, job.calibration, config, job.base, device=device)
    assert here.report["device"] == "cpu" and there.report["device"] == str(DEVICE)
    found = there.model.state_dict()
    assert not [name for name, tensor in found.items() if isinstance(tensor, Away) or tensor.device.type != "cpu"]
    assert any(isinstance(module, QuantLinear) for module in there.model.modules())
    for name, tensor in here.model.state_dict().items():
        assert torch.equal(found[name], tensor), name


def test_a_model_is_computed_where_it_lives_and_stays_there() -> None:
    job = small_job()
    with elsewhere() as device:
        states = [moved(dict(model.state_dict()), device) for model in job.experts.values()]
        for module in job.merged.modules():
            for name, parameter in module.named_parameters(recurse=False):
                module._parameters[name] = nn.Parameter(parameter.detach().to(device), requires_grad=False)
        result = epmq.quantize(job.merged, dict(zip(job.experts, states, strict=True)), job.calibration)
    assert result.report["device"] == str(DEVICE)
    assert {tensor.device for tensor in result.model.state_dict().values()} == {DEVICE}


def test_models_are_scored_where_they_live() -> None:
    model, ids = make_toy_job(1, 16, 1).merged, [[1, 2, 3], [4, 0], [2, 2, 1, 3]]
    wanted = features(model, ids, "mean"), perplexity(model, ids[2], 3, 2).perplexity
    with elsewhere() as device:
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                module._parameters[name] = nn.Parameter(parameter.detach().to(device), requires_grad=False)
        found = features(model, ids, "mean"), perplexity(model, ids[2], 3, 2).perplexity
    assert torch.equal(found[0], wanted[0]) and found[0].device.type == "cpu"
    assert found[1] == wanted[1]


def test_tensors_of_two_devices_do_not_meet_in_these_tests() -> None:
    with elsewhere() as device:
        away = torch.ones(3, device=device)
        assert isinstance(away + 1.0, Away) and type(away.cpu()) is torch.Tensor
        for meet in (
            lambda: away + torch.ones(3),
            lambda: torch.cat([away, torch.zeros(2)]),
            lambda: away[torch.ones(1).long()],
        ):
            with pytest.raises(AssertionError, match="meets one on the CPU"):
                meet()
        with pytest.raises(AssertionError, match="cast on the CPU before it moves"):
            torch.ones(3).half().to(device, torch.float32)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32], ids=str)
def test_weights_are_moved_as_they_are_stored(stored: torch.dtype) -> None:
    job = small_job()
    experts = {task: expert.to(stored) for task, expert in job.experts.items()}
    config = epmq.QuantConfig(diagnostics=False)
    with elsewhere() as device:
        result = epmq.quantize(job.merged.to(stored), experts, job.calibration, config, device=device)
    assert result.report["layers"] and result.model.state_dict()["head.weight"].dtype == stored


def test_auto_is_the_models_own_device_then_a_gpu_then_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert compute_device("auto", DEVICE) == DEVICE
    for there in (True, False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        expected = torch.device("cuda" if there else "cpu")
        assert compute_device(None) == compute_device("auto", torch.device("cpu")) == expected
    assert compute_device("cpu", DEVICE) == torch.device("cpu")
    assert home_of(nn.ReLU()) == torch.device("cpu")


def test_devices_that_are_not_there_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="'gpu' is not a device here; use auto, cpu, cuda"):
        compute_device("gpu")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert compute_device("cuda:0") == torch.device("cuda:0")
    with pytest.raises(ConfigError, match="'cuda:1' is not there, CUDA offers 1"):
        compute_device("cuda:1")
    job = make_toy_job(1, 16, 1)
    with pytest.raises(ConfigError, match="use auto, cpu"):
        epmq.quantize(job.merged, job.experts, job.calibration, device="gpu")
