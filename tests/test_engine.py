"""The whole way on small models: what comes out, what is told about it, what is left alone."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from conftest import ToyJob, ToyModel, make_toy_job, relative_error, state_of
from safetensors.torch import save_file
from torch import Tensor, nn

from epmq import QuantConfig, QuantLinear, QuantResult, quantize, restore_linear
from epmq.errors import CalibrationError, ConfigError, ModelError
from epmq.norms import RIDGE, NormStatistics
from epmq.runner import BlockRunner
from epmq.skeleton import without_cache
from epmq.solve import ANCHOR_GRID

LINEARS = [f"blocks.{b}.{name}" for b in (0, 1) for name in ("query", "key", "out", "up", "down")]


def run(job: ToyJob, base: Any = None, **settings: Any) -> QuantResult:
    config = QuantConfig(**{"group_size": 16, **settings})
    return quantize(job.merged, job.experts, job.calibration, config, base=base)


def logits_error(job: ToyJob, model: nn.Module) -> float:
    """Mean over tasks of the relative error of the model's logits against the expert's, on unpadded positions."""
    errors = []
    with torch.no_grad():
        for task, batches in job.calibration.items():
            keep = [batch["attention_mask"] > 0 for batch in batches]
            ours, wanted = (
                torch.cat([m(**b)[k] for b, k in zip(batches, keep, strict=True)]) for m in (model, job.experts[task])
            )
            errors.append(relative_error(ours, wanted))
    return sum(errors) / len(errors)


# -- the result ------------------------------------------------------------------------------------------------------


def test_block_linears_are_quantized_and_the_rest_is_the_merge(toy_job: ToyJob) -> None:
    result = run(toy_job)
    kinds = {name: type(module) for name, module in result.model.named_modules() if name in [*LINEARS, "head"]}
    assert kinds == {**dict.fromkeys(LINEARS, QuantLinear), "head": nn.Linear}
    ours, merged = result.model.state_dict(), toy_job.merged.state_dict()
    for name in merged:
        if not name.startswith(tuple(LINEARS)):
            assert torch.equal(ours[name], merged[name]), name


def test_order_of_methods_on_the_toy_job() -> None:
    for bits in (2, 4):
        job = make_toy_job(depth=3)
        error = {m: logits_error(job, run(job, method=m, bits=bits).model) for m in ("epmq", "gptq", "rtn")}
        assert error["epmq"] < 0.9 * error["gptq"]
        assert error["gptq"] < error["rtn"]
    assert logits_error(job, run(job, bits=None).model) < logits_error(job, job.merged)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_output_error_against_the_experts_is_below_gptqs(bits: int, toy_job: ToyJob) -> None:
    for alpha in (0.0, 1.0):
        for errors in run(toy_job, bits=bits, alpha=alpha).report["average_error"].values():
            assert errors["epmq"] < errors["gptq"]
            assert errors["merged"] > 0.0


def test_alpha_is_what_the_target_is_made_of(toy_job: ToyJob) -> None:
    codes = [run(toy_job, alpha=alpha).model.get_submodule("blocks.1.up").packed for alpha in (0.0, 0.5, 1.0)]
    assert not torch.equal(codes[0], codes[1])  # type: ignore[arg-type]
    assert not torch.equal(codes[1], codes[2])  # type: ignore[arg-type]
    assert run(toy_job, alpha=0.0).report["blocks"][0]["hidden_error"] == {}


def test_unquantized_and_without_anchor_a_single_expert_is_met(toy_job: ToyJob) -> None:
    task = "task0"
    config = QuantConfig(bits=None, alpha=0.0, anchor=0.0, damp=1e-6)
    result = quantize(toy_job.merged, {task: toy_job.experts[task]}, {task: toy_job.calibration[task]}, config)
    errors = [row["tasks"][task] for row in result.report["layers"][:2]]
    # Least squares on the expert's own outputs for these inputs: what damping leaves, at fp32 of normal equations.
    assert all(row["epmq"] < 1e-6 < 1e-3 < row["merged"] for row in errors)


@pytest.mark.parametrize("method", ["regmean", "gptq", "rtn", "epmq"])
@pytest.mark.parametrize("sym", [False, True])
def test_every_method_gives_a_working_model(method: str, sym: bool, toy_job: ToyJob) -> None:
    result = run(toy_job, method=method, sym=sym, bits=8)
    assert logits_error(toy_job, result.model) < 1.5 * logits_error(toy_job, toy_job.merged)


@pytest.mark.parametrize(
    "settings",
    [
        {"clip": "mse", "bits": 2},
        {"clip": "hessian", "bits": 2},
        {"scale_refit": True, "bits": 3},
        {"static_groups": False, "act_order": False},
        {"act_order": False},
        {"task_weights": "hessian_norm"},
        {"gamma": 0.9},
        {"rho": 1.2},
        {"group_size": -1},
        {"group_size": 24},
        {"diagnostics": False},
    ],
    ids=str,
)
def test_every_setting_runs_and_stays_ahead_of_rounding(settings: dict[str, Any], toy_job: ToyJob) -> None:
    grid = {k: v for k, v in settings.items() if k in ("bits", "group_size")}
    ours = run(toy_job, base=toy_job.base, **settings)
    nearest = run(toy_job, method="rtn", **grid)
    assert logits_error(toy_job, ours.model) < logits_error(toy_job, nearest.model)
    assert ("gptq" in ours.report["average_error"]["task0"]) == settings.get("diagnostics", True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtypes_of_the_merge_are_kept(dtype: torch.dtype, toy_job: ToyJob) -> None:
    toy_job.merged.to(dtype)
    toy_job.experts["task1"].half()
    result = run(toy_job)
    state = result.model.state_dict()
    for name, tensor in state.items():
        wanted = {"packed": torch.int32, "zeros": torch.uint8}.get(name.rpartition(".")[2], dtype)
        assert tensor.dtype == wanted, name
    wide = run(toy_job, scale_dtype="float32").model.state_dict()
    assert wide["blocks.0.query.scales"].dtype == torch.float32
    assert wide["blocks.0.query.bias"].dtype == dtype
    with torch.no_grad():
        assert bool(torch.isfinite(result.model.float()(**toy_job.calibration["task0"][0])).all())


@pytest.mark.parametrize("bits", [4, None])
def test_biases_keep_a_dtype_of_their_own(bits: int | None, toy_job: ToyJob) -> None:
    for model in (toy_job.merged, *toy_job.experts.values()):
        for linear in (module for module in model.modules() if isinstance(module, nn.Linear)):
            linear.weight.data = linear.weight.data.bfloat16()
    state = run(toy_job, bits=bits).model.state_dict()
    assert {state[f"{name}.bias"].dtype for name in LINEARS} == {torch.float32}
    assert bits or {state[f"{name}.weight"].dtype for name in LINEARS} == {torch.bfloat16}


@pytest.mark.parametrize("settings", [{"anchor": "auto"}, {"norm_refit": True}, {"distill": {"steps": 3}}], ids=str)
def test_the_default_dtype_changes_nothing(settings: dict[str, Any], toy_job: ToyJob) -> None:
    wanted = run(toy_job, **settings).model.state_dict()
    torch.set_default_dtype(torch.bfloat16)
    try:
        ours = run(toy_job, **settings).model.state_dict()
    finally:
        torch.set_default_dtype(torch.float32)
    for name, tensor in wanted.items():
        assert torch.equal(ours[name], tensor), name


def test_include_and_exclude_choose_linears(toy_job: ToyJob) -> None:
    result = run(toy_job, include=("query", "up", "down"), exclude=(r"blocks\.1\.", "head"))
    quantized = [name for name, module in result.model.named_modules() if isinstance(module, QuantLinear)]
    assert quantized == ["blocks.0.query", "blocks.0.up", "blocks.0.down"]
    assert [row["linear"] for row in result.report["layers"]] == quantized
    for name in ("blocks.0.key.weight", "blocks.1.up.weight"):
        assert torch.equal(result.model.state_dict()[name], toy_job.merged.state_dict()[name])


def test_rounding_to_nearest_needs_no_calibration(toy_job: ToyJob) -> None:
    config = QuantConfig(method="rtn", group_size=16)
    ours, wanted = quantize(toy_job.merged, None, {}, config), run(toy_job, method="rtn")
    for name, tensor in wanted.model.state_dict().items():
        assert torch.equal(ours.model.state_dict()[name], tensor), name
    assert ours.report["layers"] == []


def test_training_mode_follows_the_merge(toy_job: ToyJob) -> None:
    for training in (True, False):
        toy_job.merged.train(training)
        assert all(module.training == training for module in run(toy_job).model.modules())


def test_tied_tensors_stay_tied(toy_job: ToyJob) -> None:
    for model in (toy_job.merged, *toy_job.experts.values()):
        model.head = nn.Linear(32, 40)
        model.head.weight = model.embedding.weight  # type: ignore[union-attr,assignment]
    result = run(toy_job)
    assert result.model.head.weight is result.model.embedding.weight  # type: ignore[union-attr]


# -- what is left alone ----------------------------------------------------------------------------------------------

ALTERING: list[dict[str, Any]] = [
    {},
    {"norm_refit": True},
    {"bits": None, "norm_refit": True},
    {"method": "gptq"},
    {"method": "rtn"},
    {"distill": {"steps": 3, "last_blocks": 1.0, "learning_rate": 0.1}},
]


@pytest.mark.parametrize("settings", ALTERING, ids=str)
def test_inputs_are_left_as_they_were(settings: dict[str, Any], toy_job: ToyJob) -> None:
    models = {"merged": toy_job.merged, "base": toy_job.base, **toy_job.experts}
    before = {name: state_of(model) for name, model in models.items()}
    modules = {name: [id(module) for module in model.modules()] for name, model in models.items()}
    data = copy.deepcopy(toy_job.calibration)
    result = run(toy_job, base=toy_job.base, **settings)
    for name, model in models.items():
        assert [id(module) for module in model.modules()] == modules[name]
        for key, tensor in model.state_dict().items():
            assert torch.equal(tensor, before[name][key]), (name, key)
        assert all(parameter.requires_grad for parameter in model.parameters())
    for task, batches in data.items():
        for batch, original in zip(toy_job.calibration[task], batches, strict=True):
            assert batch.keys() == original.keys()
            assert all(torch.equal(batch[key], original[key]) for key in batch)
    own = {tensor.untyped_storage().data_ptr() for model in models.values() for tensor in model.state_dict().values()}
    for key, tensor in result.model.state_dict().items():
        assert tensor.untyped_storage().data_ptr() not in own, key


def test_blocks_are_put_back_after_a_failure(toy_job: ToyJob) -> None:
    runner = BlockRunner(toy_job.merged)
    runner.restore()
    toy_job.calibration["task0"] = [{"input_ids": torch.full((1, 2), 99)}]  # past the vocabulary of 40
    with pytest.raises(ModelError, match="ToyModel: its forward does not run on input_ids"):
        run(toy_job)
    toy_job.merged(torch.zeros(1, 3, dtype=torch.int64))


@pytest.mark.parametrize("form", ["state dict", "file", "folder", "half"])
def test_experts_may_come_in_any_form(form: str, toy_job: ToyJob, tmp_path: Path) -> None:
    wanted = run(toy_job)
    experts: dict[str, Any] = {}
    for task, expert in toy_job.experts.items():
        state = expert.state_dict()
        if form == "half":
            experts[task] = {name: tensor.half() for name, tensor in state.items()}
            continue
        experts[task] = state
        if form != "state dict":
            folder = tmp_path / task
            folder.mkdir()
            save_file(state, folder / "model.safetensors")
            experts[task] = folder if form == "folder" else str(folder / "model.safetensors")
    ours = quantize(toy_job.merged, experts, toy_job.calibration, QuantConfig(group_size=16))
    if form == "half":
        assert logits_error(toy_job, ours.model) == pytest.approx(logits_error(toy_job, wanted.model), rel=0.1)
        return
    for name, tensor in wanted.model.state_dict().items():
        assert torch.equal(ours.model.state_dict()[name], tensor), name


# -- how examples are cut into batches -------------------------------------------------------------------------------


def recut(batches: list[dict[str, Tensor]], sizes: list[int]) -> list[dict[str, Tensor]]:
    whole = {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}
    parts = {key: tensor.split(sizes) for key, tensor in whole.items()}
    return [{key: parts[key][i] for key in parts} for i in range(len(sizes))]


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("settings", [{}, {"norm_refit": True}, {"anchor": "auto"}, {"alpha": 0.0}], ids=str)
def test_how_examples_are_cut_into_batches_changes_nothing(
    settings: dict[str, Any], masked: bool, toy_job: ToyJob
) -> None:
    results = []
    for sizes in ([24], [1, 15, 8]):
        job = copy.deepcopy(toy_job)
        for task, batches in job.calibration.items():
            if not masked:
                batches = [{"input_ids": batch["input_ids"]} for batch in batches]
            else:
                batches[0]["attention_mask"].fill_(1)  # a batch without padding among others
            job.calibration[task] = recut(batches, sizes)
        results.append(run(job, bits=None, **settings))
    for name, tensor in results[0].model.state_dict().items():
        # Sums in another order, through two blocks of solves; a change of weights would show at 1e-2.
        assert relative_error(results[1].model.state_dict()[name], tensor) < 1e-6, name


# -- lambda chosen on held-out examples ------------------------------------------------------------------------------


@pytest.mark.parametrize("refit", [False, True])
def test_an_automatic_anchor_is_that_anchor(refit: bool, toy_job: ToyJob) -> None:
    first = ("blocks.0.query", "blocks.0.key")
    settings = {"include": first, "bits": None, "bias_refit": refit}
    automatic = run(toy_job, anchor="auto", **settings)
    chosen = {row["lambda"] for row in automatic.report["layers"]}
    assert len(chosen) == 1
    assert chosen <= set(ANCHOR_GRID)
    fixed = run(toy_job, anchor=chosen.pop(), **settings)
    for name in first:
        ours, wanted = (r.model.get_parameter(f"{name}.weight") for r in (automatic, fixed))
        assert relative_error(ours, wanted) < 1e-8


def test_an_automatic_anchor_is_chosen_for_each_group(toy_job: ToyJob) -> None:
    rows = {row["linear"]: row["lambda"] for row in run(toy_job, anchor="auto").report["layers"]}
    assert rows["blocks.0.query"] == rows["blocks.0.key"]
    assert len(set(rows.values())) > 1


def test_an_automatic_anchor_with_shrinkage_runs(toy_job: ToyJob) -> None:
    assert logits_error(toy_job, run(toy_job, anchor="auto", gamma=0.9).model) < logits_error(toy_job, toy_job.merged)


def test_an_automatic_anchor_needs_examples_to_hold_out(toy_job: ToyJob) -> None:
    for task, batches in toy_job.calibration.items():
        toy_job.calibration[task] = [{key: tensor[:4] for key, tensor in batches[0].items()}]
    with pytest.raises(CalibrationError, match=r'anchor: "auto" holds out every fifth example.*give a number'):
        run(toy_job, anchor="auto")


# -- norms -----------------------------------------------------------------------------------------------------------


def test_norm_correction_is_the_ridge_regression_of_each_channel() -> None:
    z, weights = torch.randn(50, 3).double() + 0.5, torch.rand(50).double()
    y = 1.3 * z + 0.2 + 0.1 * torch.randn(50, 3).double()
    for with_shift in (True, False):
        moments = NormStatistics(3)
        for half in (slice(0, 20), slice(20, 50)):
            moments.add(z[half].float(), y[half].float(), weights[half].float())
        scale, shift = moments.correction(with_shift)
        for channel in range(3):
            zc, yc = z[:, channel], y[:, channel]
            total = weights.sum()
            mean_z, mean_y = ((weights * v).sum() / total if with_shift else 0.0 for v in (zc, yc))
            variance = (weights * (zc - mean_z) ** 2).sum()
            a = ((weights * (zc - mean_z) * (yc - mean_y)).sum() + RIDGE * variance) / ((1 + RIDGE) * variance)
            assert float(scale[channel]) == pytest.approx(float(a), rel=1e-4)
            wanted = float(mean_y - a * mean_z) if with_shift else 0.0
            assert float(shift[channel]) == pytest.approx(wanted, abs=1e-4)


def test_norm_refit_changes_norms_and_helps(toy_job: ToyJob) -> None:
    plain, refit = run(toy_job, bits=3), run(toy_job, bits=3, norm_refit=True)
    assert torch.equal(plain.model.blocks[1].norm.weight, toy_job.merged.blocks[1].norm.weight)  # type: ignore
    assert not torch.equal(refit.model.blocks[1].norm.weight, plain.model.blocks[1].norm.weight)  # type: ignore
    assert logits_error(toy_job, refit.model) < 1.1 * logits_error(toy_job, plain.model)


# -- distillation ----------------------------------------------------------------------------------------------------

DISTILL = {"steps": 30, "learning_rate": 3e-3, "copies": 1, "last_blocks": 0.5}


def test_distillation_is_deterministic_under_its_seed(toy_job: ToyJob) -> None:
    torch.manual_seed(1)
    first = run(toy_job, distill=DISTILL)
    torch.manual_seed(2)
    again = run(toy_job, distill=DISTILL)
    other = run(toy_job, distill={**DISTILL, "seed": 5})
    for name, tensor in first.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], tensor), name
    assert again.report["stages"]["distill"] == first.report["stages"]["distill"]
    assert not torch.equal(other.model.blocks[1].down.packed, first.model.blocks[1].down.packed)  # type: ignore


def test_distillation_brings_the_loss_down_and_is_reported(toy_job: ToyJob) -> None:
    closed, tuned = run(toy_job, bits=None), run(toy_job, bits=None, distill=DISTILL)
    stage = tuned.report["stages"]["distill"]
    assert stage["steps"] == 30
    assert stage["last_loss"] < 0.9 * stage["first_loss"]
    assert len(tuned.report["stages"]["closed_form"]["layers"]) == len(LINEARS)
    for block, changed in ((0, False), (1, True)):
        ours, before = (r.model.get_parameter(f"blocks.{block}.down.weight") for r in (tuned, closed))
        assert torch.equal(ours, before) != changed
    assert torch.equal(tuned.model.head.weight, toy_job.merged.head.weight)  # type: ignore[union-attr,arg-type]


def test_distilled_models_are_rounded(toy_job: ToyJob) -> None:
    tuned, result = run(toy_job, bits=None, distill=DISTILL), run(toy_job, bits=8, distill=DISTILL)
    assert isinstance(result.model.get_submodule("blocks.1.down"), QuantLinear)
    closed = run(toy_job, bits=None)
    batch = toy_job.calibration["task0"][0]
    with torch.no_grad():
        wanted, ours, other = (model(**batch) for model in (tuned.model, result.model, closed.model))
    assert relative_error(ours, wanted) < 0.1 * relative_error(other, wanted)


# -- the report ------------------------------------------------------------------------------------------------------


def test_report_tells_what_was_done(toy_job: ToyJob) -> None:
    result = run(toy_job, anchor=0.2, bits=3)
    report = json.loads(json.dumps(result.report))
    assert [row["linear"] for row in report["layers"]] == LINEARS
    for row in report["layers"]:
        assert row["lambda"] == 0.2
        assert row["damp"] == 0.0
        assert row["escalated"] is False
        assert row["shape"] == list(toy_job.merged.get_submodule(row["linear"]).weight.shape)  # type: ignore
        assert row["seconds"] >= 0.0
        assert row["tasks"].keys() == toy_job.experts.keys()
        for errors in row["tasks"].values():
            assert errors.keys() == {"merged", "gptq", "epmq"}
            assert all(0.0 <= error < 10.0 for error in errors.values())
    assert [row["block"] for row in report["blocks"]] == ["blocks.0", "blocks.1"]
    for row in report["blocks"]:
        assert row["hidden_error"].keys() == toy_job.experts.keys()
        assert row["seconds"] > 0.0
    assert report["settings"]["bits"] == 3
    assert QuantConfig.parse(report["settings"], "report.json") == QuantConfig(group_size=16, anchor=0.2, bits=3)
    assert report["seconds"] > sum(row["seconds"] for row in report["blocks"]) * 0.5
    assert report["peak_memory_bytes"] > 50 * 2**20
    assert report["machine"]["torch"] == torch.__version__
    assert report["bytes"]["merged"] == sum(4 * p.numel() for p in toy_job.merged.parameters())
    held = sum(t.numel() * t.element_size() for t in result.model.state_dict().values())
    assert report["bytes"]["quantized"] == held < report["bytes"]["merged"]
    assert report["escalated"] == report["notes"] == []


def test_reported_errors_are_those_of_the_layers(toy_job: ToyJob) -> None:
    # The first group sees the embedding, which nothing changes; all rows of the task fit in the sample of 256.
    result = run(toy_job, alpha=0.0, bias_refit=False)
    row = result.report["layers"][0]
    assert row["linear"] == "blocks.0.query"
    gptq = run(toy_job, method="gptq").model
    for task, batches in toy_job.calibration.items():
        expert = toy_job.experts[task]
        for label, model in (("merged", toy_job.merged), ("epmq", result.model), ("gptq", gptq)):
            linear = model.get_submodule("blocks.0.query")
            ours, wanted = [], []
            for batch in batches:
                keep = batch["attention_mask"] > 0
                with torch.no_grad():
                    x = toy_job.merged.blocks[0].norm(toy_job.merged.embedding(batch["input_ids"]))[keep]  # type: ignore
                    ours.append(linear(x))
                    wanted.append(expert.get_submodule("blocks.0.query")(x))
            error = relative_error(torch.cat(ours), torch.cat(wanted))
            assert row["tasks"][task][label] == pytest.approx(error, rel=1e-3)


def test_progress_is_told_block_by_block(toy_job: ToyJob, monkeypatch: pytest.MonkeyPatch) -> None:
    from epmq.pipeline import ModuleSink
    from epmq.pipeline import run as run_pipeline
    from epmq.skeleton import meta_copy
    from epmq.sources import open_source

    told: list[tuple[str, int, int]] = []
    experts = {task: open_source(expert) for task, expert in toy_job.experts.items()}
    run_pipeline(
        meta_copy(toy_job.merged), open_source(toy_job.merged), None, experts, toy_job.calibration,
        QuantConfig(group_size=16), ModuleSink(), lambda *step: told.append(step),
    )  # fmt: skip
    assert told == [("blocks.0", 0, 2), ("blocks.1", 1, 2), ("done", 2, 2)]


# -- refusals --------------------------------------------------------------------------------------------------------


def test_an_anchor_past_the_merge_needs_the_base(toy_job: ToyJob) -> None:
    with pytest.raises(ConfigError, match=r"rho.*give base"):
        run(toy_job, rho=1.5)


def test_experts_are_needed_for_their_outputs(toy_job: ToyJob) -> None:
    with pytest.raises(CalibrationError, match="method 'epmq' needs experts"):
        quantize(toy_job.merged, None, toy_job.calibration, QuantConfig())


def test_quantizing_in_inference_mode_is_no_different(toy_job: ToyJob) -> None:
    def run() -> dict[str, Tensor]:
        calibration = {t: [{k: v.clone() for k, v in b.items()} for b in bs] for t, bs in toy_job.calibration.items()}
        result = quantize(toy_job.merged, toy_job.experts, calibration, QuantConfig(), toy_job.base)
        return result.model.state_dict()

    wanted = run()
    with torch.inference_mode():
        found = run()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


def test_restored_linears_have_the_merges_dtype_whatever_the_scales_have(toy_job: ToyJob) -> None:
    merged = toy_job.merged.bfloat16()
    config = QuantConfig(scale_dtype="float32", group_size=8)
    model = quantize(merged, toy_job.experts, toy_job.calibration, config).model
    assert model.get_submodule("blocks.0.up").scales.dtype == torch.float32
    restore_linear(model)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    model(torch.zeros(1, 4).long())


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = super().forward(x) * 0.1
        return y


def test_a_linear_that_does_more_is_left_as_merged() -> None:
    job = make_toy_job(1, 16, 2)
    for model in (job.merged, *job.experts.values()):
        for block in model.blocks:  # type: ignore[union-attr]
            block.up.__class__ = Scaled
    result = quantize(job.merged, job.experts, job.calibration, QuantConfig(group_size=16))
    for place in (0, 1):
        up = result.model.get_submodule(f"blocks.{place}.up")
        assert isinstance(up, Scaled)
        assert torch.equal(up.weight, job.merged.get_parameter(f"blocks.{place}.up.weight"))
        assert f"blocks.{place}.up: a Scaled is more than a linear layer; left unquantized." in result.report["notes"]


class Caching(ToyModel):
    """Would keep keys for later tokens if its configuration said so, as transformers models do."""

    asked: ClassVar[list[bool]] = []

    def __init__(self, width: int):
        super().__init__(width)
        self.config = SimpleNamespace(use_cache=True)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        self.asked.append(self.config.use_cache)
        return super().forward(input_ids, attention_mask)


@pytest.mark.parametrize("settings", [{}, {"distill": {"steps": 1, "copies": 1, "examples": 2}}])
def test_no_keys_are_kept_for_later_tokens(settings: dict[str, Any]) -> None:
    job, merged = make_toy_job(1, 16, 2), Caching(16)
    merged.load_state_dict(job.merged.state_dict())
    Caching.asked.clear()
    result = quantize(merged, job.experts, job.calibration, QuantConfig(group_size=16, **settings))
    assert set(Caching.asked) == {False}
    assert merged.config.use_cache and result.model.config.use_cache  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="on the way"), without_cache(merged):
        assert not merged.config.use_cache
        raise ValueError("on the way")
    assert merged.config.use_cache
