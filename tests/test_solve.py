"""The closed form: eq. (1) to (3) from data, RegMean, bias refit, damping, the choice of lambda."""

from __future__ import annotations

import logging
import math

import pytest
import torch
from conftest import ToyJob
from textbook import Layer, Task, assert_near, make_layer, objective, target_weight
from torch import Tensor

from epmq import QuantConfig, extension, quantize, solve
from epmq.errors import NumericalError
from epmq.group import COARSE_NOTE, GroupOutcome, quantize_group
from epmq.solve import ANCHOR_GRID, choose_anchor, factorize, mean_diagonal, solve_right
from epmq.statistics import Expert, Folded, TaskStatistics

DOUBLE = torch.float64


def anchor_of(layer: Layer, rho: float = 1.0) -> Expert:
    return Expert(layer.anchor(rho), layer.bias)


def folded(
    layer: Layer,
    alpha: float = 0.0,
    rho: float = 1.0,
    gamma: float = 1.0,
    part: slice = slice(None),
    batches: int = 2,
    of_outputs: bool = False,
) -> Folded:
    """The layer's problem as the engine folds it: task by task, in batches, around the anchor."""
    rows, columns = layer.merged.shape
    into = Folded.empty(rows, columns, DOUBLE)
    targets = None if alpha == 0 else rows if of_outputs else columns
    for task in layer.tasks:
        statistics = TaskStatistics(columns, targets, of_outputs, DOUBLE)
        for x, inside in zip(task.x[part].chunk(batches), task.inside[part].chunk(batches), strict=True):
            target = inside @ task.weight.T if of_outputs else inside
            statistics.add(x, target if alpha > 0 else None, None)
        into.fold(statistics, Expert(task.weight, task.bias), anchor_of(layer, rho), alpha, "tokens", gamma)
    return into


def solved(layer: Layer, strength: float, alpha: float, rho: float) -> Tensor:
    problem = folded(layer, alpha, rho)
    return layer.anchor(rho) + solve_right(
        problem.pull.clone(), factorize(problem.hessian.clone(), strength, 0.0, "layer")
    )


def outcome_of(layer: Layer, config: QuantConfig, refit: bool, rho: float = 1.0) -> GroupOutcome:
    problem = folded(layer, config.alpha, rho, config.gamma)
    inputs = folded(layer, config.alpha, rho) if config.gamma != 1.0 else problem
    strength = 0.0 if config.method != "epmq" else float(config.anchor)
    return quantize_group(problem, inputs, anchor_of(layer, rho), strength, config, refit, torch.float32, "layer")


@pytest.mark.parametrize("rho", [1.0, 1.4])
@pytest.mark.parametrize("alpha", [0.0, 0.6, 1.0])
@pytest.mark.parametrize(("rows", "columns"), [(5, 9), (16, 33)])
def test_target_is_the_closed_form_of_the_data(rows: int, columns: int, alpha: float, rho: float) -> None:
    layer = make_layer(rows, columns)
    strength = 0.1 * mean_diagonal(layer.hessian())
    condition = float(torch.linalg.cond(layer.hessian()))
    assert_near(solved(layer, 0.1, alpha, rho), target_weight(layer, strength, rho, alpha), columns, condition)


@pytest.mark.parametrize("rho", [1.0, 1.4])
@pytest.mark.parametrize("alpha", [0.6, 1.0])
def test_targets_may_be_given_as_the_experts_outputs(alpha: float, rho: float) -> None:
    layer = make_layer(5, 9)
    features, outputs = folded(layer, alpha, rho), folded(layer, alpha, rho, of_outputs=True)
    assert_near(outputs.pull, features.pull, 9)
    assert_near(outputs.sum_pull, features.sum_pull, 9)
    assert torch.equal(outputs.hessian, features.hessian)


@pytest.mark.parametrize("rho", [1.0, 0.7])
@pytest.mark.parametrize("alpha", [0.0, 0.6, 1.0])
def test_objective_from_data_is_the_trace_form(alpha: float, rho: float) -> None:
    layer = make_layer(7, 20)
    hessian = layer.hessian()
    strength = 0.2 * mean_diagonal(hessian)
    damped = hessian + strength * torch.eye(20).double()
    best = solved(layer, 0.2, alpha, rho)

    def trace(q: Tensor) -> float:
        return float(((q - best) @ damped @ (q - best).T).trace())

    first, second = best + torch.randn(7, 20).double(), torch.randn(7, 20).double()
    direct = objective(layer, first, strength, rho, alpha) - objective(layer, second, strength, rho, alpha)
    # Both sides are sums of a few thousand products; their difference loses what the constant of eq. (3) takes.
    size = objective(layer, first, strength, rho, alpha) + objective(layer, second, strength, rho, alpha)
    assert abs(direct - (trace(first) - trace(second))) <= 1e4 * torch.finfo(DOUBLE).eps * size
    assert objective(layer, best, strength, rho, alpha) < objective(layer, first, strength, rho, alpha)


def test_uneven_tasks_weigh_the_same_per_token() -> None:
    layer = make_layer(4, 8)
    doubled = Layer(list(layer.tasks), layer.merged, layer.base, layer.bias)
    first = doubled.tasks[0]
    doubled.tasks[0] = Task(first.x.repeat(2, 1), first.inside.repeat(2, 1), first.weight, first.bias)
    assert_near(solved(doubled, 0.1, 1.0, 1.0), solved(layer, 0.1, 1.0, 1.0), 8 * 50)


def test_hessian_norm_weighs_tasks_by_their_energy() -> None:
    layer = make_layer(4, 8)
    anchor = anchor_of(layer)
    plain, loud = (Folded.empty(4, 8, DOUBLE) for _ in range(2))
    for task in layer.tasks:
        for into, factor in ((plain, 1.0), (loud, 10.0)):
            statistics = TaskStatistics(8, None, dtype=DOUBLE)
            statistics.add(factor * task.x, None, None)
            into.fold(statistics, Expert(task.weight, layer.bias), anchor, 0.0, "hessian_norm")
    # Ten times louder inputs of a task change nothing: every task's Hessian has norm 1.
    assert_near(loud.hessian, plain.hessian, 100)
    assert_near(loud.pull, plain.pull, 100)
    norms = [float(torch.linalg.matrix_norm(task.x.T @ task.x)) for task in layer.tasks]
    wanted: Tensor = sum((t.x.T @ t.x / n for t, n in zip(layer.tasks, norms, strict=True)), torch.zeros(8, 8).double())
    assert_near(plain.hessian, wanted, 100)


@pytest.mark.parametrize("gamma", [1.0, 0.9, 0.0])
def test_without_anchor_it_is_regmean(gamma: float) -> None:
    layer = make_layer(6, 12)
    grams = []
    for task in layer.tasks:
        gram = task.x.T @ task.x / len(task.x)
        grams.append(gamma * gram + (1 - gamma) * torch.diag(gram.diagonal()))
    zero = torch.zeros(()).double()
    numerator: Tensor = sum((t.weight @ g for t, g in zip(layer.tasks, grams, strict=True)), zero)
    wanted = numerator @ torch.linalg.inv(sum(grams, zero))
    for task in layer.tasks:
        task.bias = layer.bias
    config = QuantConfig(method="regmean", bits=None, gamma=gamma, alpha=0.0, damp=0.0)
    ours = outcome_of(layer, config, False)
    assert_near(ours.weight, wanted, 12, float(torch.linalg.cond(sum(grams, zero))))
    assert torch.equal(ours.bias, layer.bias)


@pytest.mark.parametrize("alpha", [0.0, 1.0])
@pytest.mark.parametrize("rho", [1.0, 1.3])
def test_bias_refit_is_least_squares_with_intercept(alpha: float, rho: float) -> None:
    layer = make_layer(5, 10)
    config = QuantConfig(bits=None, alpha=alpha, anchor=0.1)
    ours = outcome_of(layer, config, True, rho)
    centred = folded(layer, alpha, rho).centred().hessian
    strength = 0.1 * mean_diagonal(centred)
    # Rows of the design: every token with a one for the intercept, weighted; then sqrt(λ)·I pulling W to A, b free.
    design, wanted = [], []
    for task in layer.tasks:
        root = 1 / math.sqrt(len(task.x))
        design.append(root * torch.cat([task.x, torch.ones(len(task.x), 1).double()], 1))
        wanted.append(root * task.target(alpha))
    design.append(math.sqrt(strength) * torch.eye(10, 11).double())
    wanted.append(math.sqrt(strength) * layer.anchor(rho).T)
    stacked = torch.cat(design)
    solution = torch.linalg.lstsq(stacked, torch.cat(wanted)).solution
    condition = float(torch.linalg.cond(stacked)) ** 2
    assert_near(ours.weight, solution[:10].T.contiguous(), 11, condition)
    assert_near(ours.bias, solution[10], 11, condition)


def test_refitted_bias_takes_the_mean_of_the_rounding_error_out() -> None:
    layer = make_layer(5, 40)
    ours = outcome_of(layer, QuantConfig(bits=2, group_size=32, alpha=1.0, act_order=False), True)
    residual = torch.zeros(5).double()
    size = 0.0
    for task in layer.tasks:
        output, target = task.x @ ours.weight.double().T + ours.bias, task.target(1.0)
        residual += (output - target).mean(0)
        size = max(size, float(target.abs().max()))
    assert float(residual.abs().max()) <= 1000 * torch.finfo(DOUBLE).eps * size


def test_wide_targets_are_solved_to_sixteen_bits() -> None:
    columns = 2100  # wide enough for every form, and no whole number of blocks
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(300, columns, generator=generator)
    factor = factorize(x.T @ x / 300, 0.1, 0.0, "layer")
    pull = torch.randn(37, columns, generator=generator)
    step = solve_right(pull.clone(), factor).double()
    unit, pivots = factor.unit_upper.double(), factor.pivots.double()
    residual = step @ unit * pivots @ unit.T - pull.double()
    # Both triangular solves are those of factors that are off by the error of the products.
    off = 2 * (3 * 2.0**-16 + columns * torch.finfo(torch.float32).eps)
    assert bool((residual.abs() <= off * (step.abs() @ unit.abs() * pivots @ unit.abs().T)).all())


def test_the_report_tells_of_coarse_products(monkeypatch: pytest.MonkeyPatch, toy_job: ToyJob) -> None:
    for least in ("LEAST_ROUNDED", "LEAST_SUBTRACTED"):
        monkeypatch.setattr(extension, least, 1)
    monkeypatch.setattr(solve, "SOLVE_BLOCK", 16)

    def notes() -> list[str]:
        found: list[str] = quantize(toy_job.merged, toy_job.experts, toy_job.calibration, QuantConfig()).report["notes"]
        return found

    assert (COARSE_NOTE in notes()) == extension.rounds_products()
    monkeypatch.setenv("EPMQ_BACKEND", "reference")
    assert COARSE_NOTE not in notes()


@pytest.mark.parametrize("damp", [0.0, 0.01])
def test_damping_escalates_tenfold_and_is_logged(damp: float, caplog: pytest.LogCaptureFixture) -> None:
    # Eigenvalues 2.05, -0.05, 1, 1: positive definite from damping 0.05 on.
    hessian = torch.eye(4).double()
    hessian[0, 1] = hessian[1, 0] = 1.05
    with caplog.at_level(logging.WARNING, logger="epmq"):
        factor = factorize(hessian.clone(), 0.0, damp, "blocks.3.query")
    assert factor.damp == pytest.approx(0.1)
    assert len(caplog.records) == (3 if damp == 0.0 else 1)
    assert all("blocks.3.query" in record.getMessage() for record in caplog.records)
    assert_near(factor.unit_upper * factor.pivots @ factor.unit_upper.T, hessian + 0.1 * torch.eye(4).double(), 4)


def test_damping_past_its_limit_names_the_layer() -> None:
    hessian = torch.eye(4)
    hessian[0, 1] = hessian[1, 0] = 3.0
    with pytest.raises(NumericalError, match=r"blocks\.3\.query.*not positive definite"):
        factorize(hessian, 0.0, 0.01, "blocks.3.query")


def test_damping_of_exactly_the_limit_is_still_tried() -> None:
    hessian = torch.eye(4)
    hessian[0, 1] = hessian[1, 0] = 1.5
    assert factorize(hessian, 0.0, 0.0, "layer").damp == pytest.approx(1.0)


@pytest.mark.parametrize("settings", [{"method": "gptq", "damp": 0.0}, {"anchor": 0.0, "damp": 0.0}])
def test_escalated_layers_are_in_the_report(settings: dict[str, object], toy_job: ToyJob) -> None:
    # Four tokens for 32 columns: rank 4, so that rounding makes some pivot negative.
    few = {task: [{"input_ids": torch.arange(4).reshape(1, 4)}] for task in toy_job.experts}
    report = quantize(toy_job.merged, toy_job.experts, few, QuantConfig(**settings)).report  # type: ignore[arg-type]
    raised = [row["linear"] for row in report["layers"] if row["damp"] > 0.0]
    assert raised
    assert report["escalated"] == raised


def test_no_layer_is_called_escalated_when_none_was(toy_job: ToyJob) -> None:
    for settings in ({"method": "gptq"}, {"method": "gptq", "damp": 0.5}, {"anchor": 0.1}, {"anchor": 0.0}):
        config = QuantConfig(**settings)  # type: ignore[arg-type]
        assert quantize(toy_job.merged, toy_job.experts, toy_job.calibration, config).report["escalated"] == []


@pytest.mark.parametrize("refit", [False, True])
@pytest.mark.parametrize("alpha", [0.0, 1.0])
@pytest.mark.parametrize("strength", [0.0, 0.1])
@pytest.mark.parametrize("bits", [None, 3])
def test_columns_never_excited_keep_the_anchor(bits: int | None, strength: float, alpha: float, refit: bool) -> None:
    layer = make_layer(6, 24)
    dead = [0, 7, 23]
    for task in layer.tasks:
        task.x[:, dead] = 0.0
    config = QuantConfig(bits=bits, group_size=8, anchor=strength, alpha=alpha, damp=0.0)
    ours = outcome_of(layer, config, refit, rho=1.2)
    anchor = layer.anchor(1.2)
    if ours.quantized is None:
        assert torch.equal(ours.weight[:, dead], anchor[:, dead])
        return
    assert bits is not None
    zeros = ours.quantized.zeros
    assert zeros is not None
    groups = [0, 0, 2]
    scales = ours.quantized.scales.double()[:, groups]
    nearest = (torch.round(anchor[:, dead] / scales) + zeros[:, groups]).clamp(0, 2**bits - 1)
    assert torch.equal(ours.quantized.codes[:, dead].double(), nearest)


def test_a_column_that_never_varies_keeps_the_anchor_when_biases_are_refitted() -> None:
    layer = make_layer(6, 24)
    for task in layer.tasks:
        task.x[:, 5] = task.inside[:, 5] = 3.0
    ours = outcome_of(layer, QuantConfig(bits=None, alpha=1.0, anchor=0.1), True)
    assert torch.equal(ours.weight[:, 5], layer.merged[:, 5])


def test_a_layer_without_any_input_is_rounded_to_nearest() -> None:
    layer = make_layer(6, 24)
    for task in layer.tasks:
        task.x.zero_()
        task.inside.zero_()
    config = QuantConfig(bits=4, group_size=8)
    ours, nearest = (outcome_of(layer, c, False) for c in (config, QuantConfig(method="rtn", bits=4, group_size=8)))
    assert torch.equal(ours.weight, nearest.weight)


@pytest.mark.parametrize("refit", [False, True])
@pytest.mark.parametrize(("seed", "tokens"), [(0, 30), (1, 30), (2, 200), (3, 12)])
def test_chosen_lambda_has_the_least_held_out_error(seed: int, tokens: int, refit: bool) -> None:
    layer = make_layer(8, 24, tokens=tokens, seed=seed)
    even, odd = slice(0, None, 2), slice(1, None, 2)
    fit, held = folded(layer, 1.0, part=even), folded(layer, 1.0, part=odd)
    if refit:
        fit, held = fit.centred(), held.centred()
    errors = []
    for relative in ANCHOR_GRID:
        strength = relative * mean_diagonal(fit.hessian)
        step = fit.pull @ torch.linalg.inv(fit.hessian + strength * torch.eye(24).double())
        error = 0.0
        # Held-out rows themselves: outputs of A + step against the expert's, centred over all tasks where refitted.
        residuals = [(t.x[odd] @ (layer.merged + step).T + layer.bias - t.target(1.0)[odd]) for t in layer.tasks]
        mean = torch.stack([r.mean(0) for r in residuals]).mean(0) if refit else 0.0
        error = sum(float((r - mean).square().mean(0).sum()) for r in residuals)
        errors.append(error)
    assert choose_anchor(fit, held) == ANCHOR_GRID[errors.index(min(errors))]


def test_lambda_grid_has_inner_optima() -> None:
    # The test above would pass on a chooser that always takes an end of the grid, were there no such problem.
    chosen = set()
    for seed in range(4):
        layer = make_layer(8, 24, tokens=30, seed=seed)
        chosen.add(
            choose_anchor(folded(layer, 1.0, part=slice(0, None, 2)), folded(layer, 1.0, part=slice(1, None, 2)))
        )
    assert chosen - {ANCHOR_GRID[0], ANCHOR_GRID[-1]}
