"""One group of linears: plain GPTQ, rounding to nearest and the anchor come out of the same code."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from conftest import ToyJob, make_toy_job
from test_solve import folded
from textbook import Layer, Task, make_layer, objective
from torch import Tensor, nn

from epmq import QuantConfig, QuantLinear, quantize
from epmq.group import GroupOutcome, quantize_group
from epmq.statistics import Expert, Folded, TaskStatistics
from epmq.world import World

GRIDS = [(bits, sym, size) for bits in (2, 3, 4, 8) for sym in (False, True) for size in (32, 64, 128, -1)]


def run(layer: Layer, config: QuantConfig, rho: float = 1.0, refit: bool = False) -> GroupOutcome:
    problem = folded(layer, config.alpha, rho)
    strength = float(config.anchor) if config.method == "epmq" else 0.0
    anchor = Expert(layer.anchor(rho), layer.bias)
    return quantize_group(problem, problem, anchor, strength, config, refit, torch.float32, "layer")


def codes(outcome: GroupOutcome) -> Tensor:
    assert outcome.quantized is not None
    return outcome.quantized.codes


def one_task(layer: Layer) -> Layer:
    """The layer's first task alone, its expert the merged weights themselves, inputs alike in both."""
    task = layer.tasks[0]
    return Layer([Task(task.x, task.x, layer.merged, layer.bias)], layer.merged, layer.base, layer.bias)


@pytest.mark.parametrize(("bits", "sym", "group_size"), GRIDS)
def test_one_expert_equal_to_the_merge_is_plain_gptq(bits: int, sym: bool, group_size: int) -> None:
    layer = one_task(make_layer(6, 100))
    grid: dict[str, Any] = {"bits": bits, "sym": sym, "group_size": group_size}
    plain = run(layer, QuantConfig(method="gptq", damp=0.1, **grid))
    for alpha in (0.0, 1.0):
        ours = run(layer, QuantConfig(anchor=0.1, damp=0.0, alpha=alpha, **grid))
        assert torch.equal(codes(ours), codes(plain))
        assert torch.equal(ours.weight, plain.weight)


@pytest.mark.parametrize("rho", [1.0, 1.5, 0.5])
@pytest.mark.parametrize(("bits", "sym", "group_size"), GRIDS)
def test_an_infinite_anchor_is_rounded_to_nearest(bits: int, sym: bool, group_size: int, rho: float) -> None:
    layer = make_layer(6, 100)
    grid: dict[str, Any] = {"bits": bits, "sym": sym, "group_size": group_size, "clip": "none"}
    ours = run(layer, QuantConfig(anchor=1e9, **grid), rho)
    nearest = run(layer, QuantConfig(method="rtn", **grid), rho)
    assert ours.quantized is not None
    assert nearest.quantized is not None
    # The target is within 1e-9 of the anchor. A symmetric grid puts the largest entry of a group half-way between two
    # points, where that much decides.
    size = 100 if group_size == -1 else group_size
    steps = layer.anchor(rho) / nearest.quantized.scales.double().repeat_interleave(size, 1)[:, :100]
    tie = (steps - steps.floor() - 0.5).abs() < 1e-6
    assert torch.equal(codes(ours)[~tie], codes(nearest)[~tie])
    assert bool(((codes(ours).int() - codes(nearest).int()).abs() <= 1).all())
    scale = 2 * torch.finfo(torch.float32).eps
    assert torch.allclose(ours.quantized.scales, nearest.quantized.scales, rtol=scale, atol=0)


@pytest.mark.parametrize(("bits", "sym", "group_size"), GRIDS)
def test_its_objective_is_below_that_of_rounding_the_target(bits: int, sym: bool, group_size: int) -> None:
    layer = make_layer(8, 100)
    grid: dict[str, Any] = {"bits": bits, "sym": sym, "group_size": group_size}
    config = QuantConfig(anchor=0.1, **grid)
    target = run(layer, QuantConfig(bits=None, anchor=0.1)).weight
    strength = 0.1 * float(layer.hessian().diagonal().mean())
    at_target = Layer(layer.tasks, target, target, layer.bias)
    nearest = run(at_target, QuantConfig(method="rtn", **grid)).weight
    ours = run(layer, config).weight
    floor, low, high = (objective(layer, w.double(), strength, 1.0, 1.0) for w in (target, ours, nearest))
    assert floor < low < high


def test_stacked_rows_are_quantized_as_if_alone() -> None:
    layer = make_layer(12, 64)

    def part(rows: slice) -> Layer:
        tasks = [Task(t.x, t.inside, t.weight[rows], t.bias[rows]) for t in layer.tasks]
        return Layer(tasks, layer.merged[rows], layer.base[rows], layer.bias[rows])

    config = QuantConfig(bits=3, group_size=32)
    whole = run(layer, config, refit=True)
    top, bottom = (run(part(rows), config, refit=True) for rows in (slice(0, 5), slice(5, 12)))
    assert torch.equal(codes(whole), torch.cat([codes(top), codes(bottom)]))
    assert torch.allclose(whole.bias, torch.cat([top.bias, bottom.bias]), rtol=1e-12)


def test_outcome_tells_lambda_and_damping() -> None:
    layer = make_layer(3, 16)
    epmq = run(layer, QuantConfig(group_size=8, anchor=0.2))
    assert (epmq.anchor, epmq.damp, epmq.escalated) == (0.2, 0.0, False)
    gptq = run(layer, QuantConfig(group_size=8, method="gptq"))
    assert (gptq.anchor, gptq.damp, gptq.escalated) == (0.0, 0.01, False)


@pytest.mark.parametrize("method", ["gptq", "regmean"])
def test_what_gamma_does_not_shrink_is_damped(method: str) -> None:
    """Fewer rows than columns, so that inputs alone cannot be factored: gamma shrinks the problem that RegMean solves,
    never the inputs that are rounded on."""
    layer = make_layer(3, 64, tasks=1, tokens=20)
    config = QuantConfig(method=method, group_size=8, gamma=0.9, alpha=0.0, bias_refit=False)
    shrunken, inputs = folded(layer, 0.0, gamma=0.9), folded(layer, 0.0)
    anchor = Expert(layer.merged, layer.bias)
    problem = shrunken if method == "regmean" else inputs
    outcome = quantize_group(problem, inputs, anchor, 0.0, config, False, torch.float32, "layer")
    assert (outcome.damp, outcome.escalated) == (0.01, False)
    if method == "gptq":
        assert torch.equal(codes(outcome), codes(run(layer, QuantConfig(method="gptq", group_size=8))))


# -- the same through the Python interface -------------------------------------------------------------------------


def quantized_linears(model: nn.Module) -> dict[str, QuantLinear]:
    found = {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}
    assert found
    return found


def assert_same_codes(ours: nn.Module, wanted: nn.Module, only: str = "") -> None:
    first, second = quantized_linears(ours), quantized_linears(wanted)
    assert first.keys() == second.keys()
    for name in first:
        if name.startswith(only):
            assert torch.equal(first[name].packed, second[name].packed), name
            assert torch.equal(first[name].scales, second[name].scales), name


def single(job: ToyJob) -> tuple[dict[str, nn.Module], dict[str, Any]]:
    task = next(iter(job.experts))
    return {task: job.merged}, {task: job.calibration[task]}


@pytest.mark.parametrize("bits", [2, 4])
def test_quantize_towards_the_merge_itself_is_plain_gptq(bits: int, toy_job: ToyJob) -> None:
    experts, calibration = single(toy_job)
    grid = {"bits": bits, "group_size": 16}
    plain = quantize(toy_job.merged, None, calibration, QuantConfig(method="gptq", damp=0.1, **grid))
    config = QuantConfig(alpha=0.0, anchor=0.1, bias_refit=False, **grid)
    ours = quantize(toy_job.merged, experts, calibration, config)
    assert_same_codes(ours.model, plain.model)


def test_with_expert_features_the_first_group_is_plain_gptq(toy_job: ToyJob) -> None:
    # Nothing is quantized in front of it, so the expert's stream is the deployed one; after it they part.
    experts, calibration = single(toy_job)
    both = [
        quantize(toy_job.merged, experts, calibration, QuantConfig(alpha=alpha, bias_refit=False, group_size=16)).model
        for alpha in (0.0, 1.0)
    ]
    for name in ("blocks.0.query", "blocks.0.key"):
        assert_same_codes(both[0], both[1], only=name)
    down = [model.get_submodule("blocks.1.down").packed for model in both]
    assert not torch.equal(down[0], down[1])  # type: ignore[arg-type]


@pytest.mark.parametrize("rho", [1.0, 1.3])
def test_quantize_with_an_infinite_anchor_rounds_the_anchor(rho: float) -> None:
    job = make_toy_job(tasks=2)
    anchor = copy.deepcopy(job.merged)
    with torch.no_grad():
        for name, parameter in anchor.named_parameters():
            if name.startswith("blocks.") and parameter.dim() == 2:
                parameter.copy_(torch.lerp(job.base.get_parameter(name), parameter, rho))
    config = QuantConfig(anchor=1e9, rho=rho, group_size=16, bias_refit=False)
    ours = quantize(job.merged, job.experts, job.calibration, config, base=job.base)
    nearest = quantize(anchor, None, {}, QuantConfig(method="rtn", group_size=16))
    assert_same_codes(ours.model, nearest.model)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("rows, columns", [(384, 384), (384, 1536), (1152, 384)])
@pytest.mark.parametrize("of_outputs", [False, True], ids=["features", "outputs"])
def test_a_share_of_the_rows_has_the_bits_of_the_whole(rows: int, columns: int, size: int, of_outputs: bool) -> None:
    """A code that flips in one process's share moves those after it, and with them all that comes later."""
    task = TaskStatistics(columns, rows if of_outputs else columns, of_outputs)
    x = torch.randn(2 * columns, columns)
    task.add(x, torch.randn(2 * columns, rows if of_outputs else columns), None)
    expert, anchor = (Expert(torch.randn(rows, columns), torch.randn(rows)) for _ in range(2))
    config = QuantConfig()

    def folded_and_rounded(own: slice) -> list[Tensor]:
        problem = Folded.empty(len(range(rows)[own]), columns)
        problem.fold(task.of_rows(own), expert.of_rows(own), anchor.of_rows(own), 0.5, "tokens")
        outcome = quantize_group(problem, problem, anchor.of_rows(own), 0.1, config, True, torch.float16, "test")
        assert outcome.quantized is not None
        return [problem.pull, problem.sum_pull, outcome.quantized.codes, outcome.quantized.scales, outcome.bias]

    whole = folded_and_rounded(slice(0, rows))
    shares = []
    for rank in range(size):
        world = World()
        world.rank, world.size = rank, size
        shares.append(folded_and_rounded(world.rows(rows)))
    for name, one, parts in zip(
        ("pull", "sum_pull", "codes", "scales", "bias"), whole, zip(*shares, strict=True), strict=True
    ):
        assert torch.equal(one, torch.cat(parts)), name
