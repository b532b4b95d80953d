"""Calibration whose forward passes run in 16 bits: near what fp32 gives, and solved in fp32 all the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import relative_error
from families import KINDS, Job, make_job
from torch import Tensor

import epmq
from epmq import QuantConfig, engine
from epmq.group import quantize_group
from epmq.inside import Seen
from epmq.precision import AS_IT_IS, Precision
from epmq.states import States
from epmq.statistics import TaskStatistics

HALVES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
# Half a unit in the last place, for a value's rounding; finfo's eps is a whole one.
ROUNDING = {name: torch.finfo(dtype).eps / 2 for name, dtype in HALVES.items()}


def run(job: Job, forward_dtype: str, **settings: Any) -> epmq.QuantResult:
    config = QuantConfig(group_size=16, diagnostics=False, forward_dtype=forward_dtype, **settings)
    return epmq.quantize(job.merged, job.experts, job.calibration, config)


def test_float32_leaves_all_as_it_is() -> None:
    precision = Precision.of("float32", torch.device("cpu"))
    assert precision == AS_IT_IS and QuantConfig().forward_dtype == "float32"
    x = torch.ones(2)
    with torch.autocast("cpu", torch.float16), precision.active():
        assert torch.get_autocast_dtype("cpu") == torch.float16 and torch.is_autocast_enabled("cpu")
    with precision.active():
        assert not torch.is_autocast_enabled("cpu")
    assert precision.read(x) is x
    assert precision.copied(x).data_ptr() != x.data_ptr()


@pytest.mark.parametrize("name", HALVES)
def test_statistics_are_those_of_the_rounded_rows(name: str) -> None:
    x, target = (torch.randn(300, 24).to(HALVES[name]) for _ in range(2))
    weights = (torch.arange(300) % 3).clamp(max=1).float()
    ours = TaskStatistics(24, 24, exact=True)
    ours.add(x, target, weights)
    rows, away = x.double(), (target.float() - x.float()).to(HALVES[name]).double()
    # As many sums of products in fp32 as there are rows, each at most a rounding of all that was added up.
    bound = 300 * 2.0**-24
    for moment, left in ((torch.tril(ours._totals[0]), rows), (ours._totals[2], away)):
        wanted, size = ((a.T * weights) @ b for a, b in ((left, rows), (left.abs(), rows.abs())))
        wanted = torch.tril(wanted) if left is rows else wanted
        assert bool(((moment - wanted).abs() <= bound * size).all())


@pytest.mark.parametrize("name", HALVES)
def test_what_is_gathered_is_what_the_linears_read(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    added: dict[str, list[tuple[Tensor, Tensor | None]]] = {"float32": [], name: []}
    kept: dict[str, set[torch.dtype]] = {"float32": set(), name: set()}
    solving: list[bool] = []
    add, keep_seen = TaskStatistics.add, States.keep_seen
    running = "float32"

    def spying_add(self: Any, x: Tensor, target: Tensor | None, *args: Any) -> None:
        added[running].append((x, target))
        add(self, x, target, *args)

    def spying_keep_seen(self: States, task: str, number: int, seen: Seen) -> None:
        kept[running] |= {tensor.dtype for tensor in seen.values()}
        keep_seen(self, task, number, seen)

    def spying_quantize_group(*args: Any) -> Any:
        solving.append(torch.is_autocast_enabled("cpu"))
        return quantize_group(*args)

    monkeypatch.setattr(TaskStatistics, "add", spying_add)
    monkeypatch.setattr(States, "keep_seen", spying_keep_seen)
    monkeypatch.setattr(engine, "quantize_group", spying_quantize_group)
    job = make_job(KINDS["bert"])
    for running in added:
        run(job, running, bits=None)
    assert solving and not any(solving)
    assert kept == {"float32": {torch.float32}, name: {HALVES[name]}}
    assert {x.dtype for x, _ in added[name]} == {HALVES[name]}
    # What comes to the first group has passed no linear yet; that of its expert neither.
    for (ours, theirs), (wide, inside) in zip(added[name][:6], added["float32"][:6], strict=True):
        assert torch.equal(ours, wide.to(HALVES[name]))
        assert theirs is not None and inside is not None and torch.equal(theirs, inside.to(HALVES[name]))
    for (ours, _), (wide, _) in zip(added[name], added["float32"], strict=True):
        # At most two blocks of four linears and two products on the way, each of which rounds what it reads and gives:
        # 24 roundings, whose signs have nothing to do with each other, once more for a result that depends on them.
        assert relative_error(ours.float(), wide) < (2 * 24**0.5 * ROUNDING[name]) ** 2


@pytest.mark.parametrize("name", HALVES)
@pytest.mark.parametrize("family", ["bert", "llama", "qwen3", "gpt2", "t5", "vit", "clip"])
def test_every_kind_of_model_comes_out_near_what_float32_makes_of_it(family: str, name: str) -> None:
    job = make_job(KINDS[family])
    batch = job.calibration["a"][0]
    outputs = []
    for forward_dtype in ("float32", name):
        model: Any = run(job, forward_dtype, bits=None, norm_refit=True).model
        with torch.no_grad():
            output = model(**batch)
        found = output.text_embeds if family == "clip" else output[0]
        mask = job.mask_at("head", batch)
        outputs.append(found[mask] if mask is not None and found.shape[:2] == mask.shape else found)
    # As above, for a decoder behind an encoder twice over.
    assert 0 < relative_error(outputs[1], outputs[0]) < (2 * 48**0.5 * ROUNDING[name]) ** 2


@pytest.mark.parametrize("method", ["gptq", "regmean"])
def test_methods_without_features_of_the_experts_run_so_too(method: str) -> None:
    job = make_job(KINDS["llama"])
    wide, ours = (run(job, name, method=method) for name in ("float32", "bfloat16"))
    layers = [[m for m in r.model.modules() if isinstance(m, epmq.QuantLinear)] for r in (wide, ours)]
    assert any(not torch.equal(one.packed, other.packed) for one, other in zip(*layers, strict=True))
    for rows in zip(wide.report["layers"], ours.report["layers"], strict=True):
        for task in job.experts:
            errors = [row["tasks"][task][method] for row in rows]
            # Weights are rounded at 2^-4 and inputs at 2^-8: a sixteenth of the error, two of its square.
            assert errors[1] == pytest.approx(errors[0], rel=2 * 2.0**-4)
