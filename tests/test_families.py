"""Every family of docs/families.md through the one calibrator: what it rounds, towards what, from which positions."""

from __future__ import annotations

import copy
import functools
import re
from pathlib import Path
from typing import Any

import pytest
import textbook
import torch
from checkpoints import ROOT
from families import KINDS, TASKS, Job, make_job
from torch import Tensor, nn

import epmq
from epmq import QuantConfig, QuantLinear
from epmq.inputs import is_norm
from epmq.merge_jobs import merge_to_folder
from epmq.norms import correct
from epmq.orientation import is_linear, weight_of
from epmq.quantized import column_groups
from epmq.recipe import Recipe
from epmq.runner import BlockRunner
from epmq.scoring import load_any
from epmq.sources import FileSource
from epmq.streams import make_streams, take
from epmq.swap import replace_linear, restore_linear
from epmq.sweep import quantize_to_nearest

transformers = pytest.importorskip("transformers")

CONFIG = QuantConfig(bits=4, group_size=16, anchor=0.1, alpha=1.0)
TOP = 15
PADDED = [name for name, kind in KINDS.items() if "text" in kind.inputs]


@functools.cache
def job_of(family: str) -> Job:
    return make_job(KINDS[family])


@functools.cache
def quantized(family: str) -> epmq.QuantResult:
    job = job_of(family)
    return epmq.quantize(job.merged, job.experts, job.calibration, CONFIG)


def first_output(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Logits, the last hidden states where the model has no head, or CLIP's features of both towers."""
    with torch.no_grad():
        output = model(**batch)
    if "image_embeds" in output:
        found = torch.cat([output["image_embeds"], output["text_embeds"]])
    else:
        found = output["logits"] if "logits" in output else output["last_hidden_state"]
    assert isinstance(found, Tensor)
    return found


def outputs(model: nn.Module, batch: dict[str, Tensor]) -> list[Tensor]:
    """All tensors a model gives, tuples and caches aside."""
    with torch.no_grad():
        return [value for value in model(**batch).values() if isinstance(value, Tensor)]


# -- what is rounded -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", KINDS)
def test_all_linears_of_the_blocks_and_nothing_else_are_rounded(family: str) -> None:
    job, model = job_of(family), quantized(family).model
    rounded = {name for name, module in model.named_modules() if isinstance(module, QuantLinear)}
    assert len(rounded) == job.kind.linears
    assert not [name for name, module in model.named_modules() if type(module).__name__ == "Conv1D"]
    left = {name for name, module in job.merged.named_modules() if is_linear(module)} - rounded
    assert not [name for name in left if any(part.isdigit() for part in name.split("."))]
    ours, merged = model.state_dict(), job.merged.state_dict()
    inside = tuple(f"{name}." for name in rounded)
    for name in merged:
        if not name.startswith(inside):
            assert torch.equal(ours[name], merged[name]), name
    for first, second in zip(job.kind.tied, job.kind.tied[1:], strict=False):
        assert model.get_parameter(first) is model.get_parameter(second)
    assert not quantized(family).report["notes"]


# -- towards what --------------------------------------------------------------------------------------------------


def inputs_of_linears(model: nn.Module, names: set[str], batches: list[dict[str, Tensor]]) -> dict[str, list[Tensor]]:
    """What each named linear reads, per batch, in fp64."""
    seen: dict[str, list[Tensor]] = {name: [] for name in names}

    def hook_for(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen[name].append(args[0].double())

        return hook

    handles = [model.get_submodule(name).register_forward_pre_hook(hook_for(name)) for name in names]
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    for handle in handles:
        handle.remove()
    return seen


def layers_of(family: str, use_masks: bool = True) -> dict[str, textbook.Layer]:
    """Each rounded linear as the method's formulas see it: rows without padding, of the experts and of the finished
    model, whose inputs at a linear are those it was calibrated on, since all before it was final by then."""
    job, model = job_of(family), copy.deepcopy(quantized(family).model)
    names = set(restore_linear(model))
    tasks: dict[str, list[textbook.Task]] = {name: [] for name in names}
    for task in TASKS:
        expert, batches = job.experts[task], job.calibration[task]
        ours, theirs = inputs_of_linears(model, names, batches), inputs_of_linears(expert, names, batches)
        for name in names:
            kept: list[list[Tensor]] = [[], []]
            for number, batch in enumerate(batches):
                mask = job.mask_at(name, batch) if use_masks else None
                for into, seen in zip(kept, (ours, theirs), strict=True):
                    x = seen[name][number]
                    into.append(x.flatten(0, -2) if mask is None else x[mask])
            module = expert.get_submodule(name)
            tasks[name].append(
                textbook.Task(torch.cat(kept[0]), torch.cat(kept[1]), weight_of(module).double(), bias_of(module))
            )
    layers = {}
    for name, found in tasks.items():
        module = job.merged.get_submodule(name)
        merged = weight_of(module).double()
        layers[name] = textbook.Layer(found, merged, merged, bias_of(module))
    return layers


def bias_of(module: nn.Module) -> Tensor:
    bias: Any = module.bias
    return torch.zeros(len(weight_of(module))).double() if bias is None else bias.detach().double()


def centred(layer: textbook.Layer) -> textbook.Layer:
    """The layer with every task's rows and targets moved by the tasks' common mean: what a refitted bias leaves."""
    mean = torch.stack([task.x.mean(0) for task in layer.tasks]).mean(0)
    target = torch.stack([task.target(1.0).mean(0) for task in layer.tasks]).mean(0)
    moved = [
        textbook.Task(task.x - mean, task.inside, task.weight, task.bias - target + layer.bias) for task in layer.tasks
    ]
    return textbook.Layer(moved, layer.merged, layer.base, layer.bias)


class Sweep:
    """The textbook's problem for one linear, and what it asks of each code after the engine's codes before it."""

    def __init__(self, layer: textbook.Layer, quant: QuantLinear):
        self.layer = centred(layer) if quant.bias is not None else layer
        self.tensor = quant.quantized()
        hessian = self.layer.hessian()
        self.strength = float(CONFIG.anchor) * float(hessian.diagonal().mean())
        self.target = textbook.target_weight(self.layer, self.strength, 1.0, 1.0)
        damped = hessian + self.strength * torch.eye(len(hessian)).double()
        order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
        # H' = R Rᵀ with R upper triangular, from the Cholesky factor of the flipped matrix.
        root = torch.linalg.cholesky(damped[order][:, order].flip(0, 1)).flip(0, 1)
        unit = root / root.diagonal()
        groups = column_groups(self.target.shape[1], self.tensor.group_size).long()
        assert self.tensor.zeros is not None
        scales, zeros = self.tensor.scales.double()[:, groups], self.tensor.zeros.double()[:, groups]
        deviation = (self.target - self.tensor.dequantize(torch.float64))[:, order]
        asked = torch.empty_like(self.target)
        asked[:, order] = self.target[:, order] + deviation @ (unit - torch.eye(len(unit)).double())
        # [N, K], in steps of the grid
        self.distance: Tensor = asked / scales + zeros - self.tensor.codes.double()
        # The step from the anchor is what passes through fp32 sums over rows and an fp32 solve; the anchor is exact.
        terms = sum(len(task.x) for task in self.layer.tasks) + len(damped)
        moved = (self.target - self.layer.merged).abs().amax()
        self.slack: Tensor = 8 * terms * 2.0**-24 * float(torch.linalg.cond(damped)) * moved / scales

    def beyond(self) -> Tensor:
        """Codes that are not the nearest ones, ends of the grid aside: bool ``[N, K]``."""
        codes, distance = self.tensor.codes, self.distance
        at_end: Tensor = ((codes == 0) & (distance < 0)) | ((codes == TOP) & (distance > 0))
        return (distance.abs() > 0.5 + self.slack) & ~at_end

    def objective(self, weight: Tensor) -> float:
        return textbook.objective(self.layer, weight.double(), self.strength, 1.0, 1.0)


def sweeps(family: str, use_masks: bool = True) -> dict[str, Sweep]:
    model = quantized(family).model
    found = {}
    for name, layer in layers_of(family, use_masks).items():
        quant = model.get_submodule(name)
        assert isinstance(quant, QuantLinear)
        found[name] = Sweep(layer, quant)
    return found


@pytest.mark.parametrize("family", KINDS)
def test_every_code_is_the_nearest_to_what_the_textbook_asks_for(family: str) -> None:
    for name, sweep in sweeps(family).items():
        beyond = sweep.beyond()
        assert not bool(beyond.any()), (
            f"{name}: {int(beyond.sum())} codes, worst {float(sweep.distance.abs().max()):.3f}"
        )
        # So its own objective is what half a step at each column costs at most, and below that of rounding the merge.
        nearest = quantize_to_nearest(sweep.layer.merged.float(), CONFIG, torch.float32)
        assert sweep.objective(sweep.tensor.dequantize()) < sweep.objective(nearest.dequantize()), name


@pytest.mark.parametrize("family", PADDED)
def test_the_textbook_asks_for_other_codes_when_padding_counts(family: str) -> None:
    """What the test above would have seen had a mask been left out."""
    job = job_of(family)
    for name, sweep in sweeps(family, use_masks=False).items():
        if job.mask_at(name, job.calibration["a"][0]) is not None:
            assert bool(sweep.beyond().any()), name


# -- saved, reloaded, run --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", KINDS)
def test_a_reloaded_model_gives_the_same_bits(family: str, tmp_path: Path) -> None:
    job, result = job_of(family), quantized(family)
    epmq.save(result, tmp_path / "quantized", format="native" if family == "gpt2" else None)
    loaded = epmq.load(tmp_path / "quantized")
    assert type(loaded) is type(job.base)
    for first, second in zip(job.kind.tied, job.kind.tied[1:], strict=False):
        assert loaded.get_parameter(first) is loaded.get_parameter(second)
    for batch in job.calibration["a"]:
        ours, wanted = outputs(loaded, batch), outputs(result.model, batch)
        assert len(ours) == len(wanted) > 0
        assert all(torch.equal(one, other) for one, other in zip(ours, wanted, strict=True))


@pytest.mark.parametrize("family", KINDS)
def test_its_outputs_are_nearer_to_the_experts_than_those_of_rounding(family: str) -> None:
    """Nothing proves this, unlike the codes: the targets are each layer's own. A tenth of noise makes it plain."""
    job = job_of(family)
    rounded = epmq.quantize(job.merged, None, {}, QuantConfig(method="rtn", group_size=16)).model
    errors = []
    for model in (quantized(family).model, rounded):
        error = energy = 0.0
        for task, batches in job.calibration.items():
            for batch in batches:
                ours, wanted = first_output(model, batch), first_output(job.experts[task], batch)
                mask = job.mask_at("head", batch)
                if mask is not None and ours.shape[:2] == mask.shape:
                    ours, wanted = ours[mask], wanted[mask]
                error += float((ours - wanted).square().sum())
                energy += float(wanted.square().sum())
        errors.append(error / energy)
    assert errors[0] < errors[1]


@pytest.mark.parametrize("family", PADDED)
def test_what_stands_at_padded_positions_changes_no_byte(family: str) -> None:
    job = job_of(family)
    garbled = job.garbled()
    changed = [key for key in ("input_ids", "decoder_input_ids") if key in garbled["a"][0]]
    assert all(not torch.equal(garbled["a"][0][key], job.calibration["a"][0][key]) for key in changed)
    again = epmq.quantize(job.merged, job.experts, garbled, CONFIG).model.state_dict()
    for name, tensor in quantized(family).model.state_dict().items():
        assert torch.equal(again[name], tensor), name


@pytest.mark.parametrize("family", KINDS)
def test_a_checkpoint_is_read_under_the_models_names(family: str, tmp_path: Path) -> None:
    """As transformers saves it, which calls some tensors otherwise; merged files are called as the base's."""
    model: Any = job_of(family).base
    model.save_pretrained(tmp_path / "saved")
    merged = epmq.merge(model, {"a": tmp_path / "saved"}, scaling=1.0)
    merge_to_folder(Recipe(base=tmp_path / "saved", experts={"a": tmp_path / "saved"}), tmp_path / "merged")
    loaded, again = load_any(tmp_path / "saved"), load_any(tmp_path / "merged")
    state = model.state_dict()
    for found in (loaded, merged, again):
        assert found.state_dict().keys() == state.keys()
        assert all(torch.equal(tensor, state[name]) for name, tensor in found.state_dict().items())
    saved, written = (FileSource(tmp_path / name) for name in ("saved", "merged"))
    assert sorted(written.keys()) == sorted(saved.keys())
    for first, second in zip(job_of(family).kind.tied, job_of(family).kind.tied[1:], strict=False):
        assert loaded.get_parameter(first) is loaded.get_parameter(second)


# -- the parts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", KINDS)
def test_a_norms_correction_is_folded_into_its_weight(family: str) -> None:
    """Whatever the weight means to the norm: Gemma's store the scale less one."""
    norms = [module for module in copy.deepcopy(job_of(family).merged).modules() if is_norm(module)]
    assert norms
    for norm in norms:
        weight, bias = norm.get_parameter("weight"), getattr(norm, "bias", None)
        x, scale, shift = torch.randn(5, len(weight)), 1 + torch.rand(len(weight)), torch.randn(len(weight))
        with torch.no_grad():
            before = norm(x)
            correct(norm, scale, shift)
            wanted = before * scale + (0 if bias is None else shift)
            # The products and sums of a handful of fp32 numbers of size 10 at most.
            assert float((norm(x) - wanted).abs().max()) < 16 * 2.0**-24 * 10


def test_conv1d_is_swapped_like_any_linear() -> None:
    model = copy.deepcopy(job_of("gpt2").merged)
    batch = job_of("gpt2").calibration["a"][0]
    before = first_output(model, batch)
    attention = model.get_submodule("transformer.h.0.attn.c_attn")
    weight = weight_of(attention).clone()
    assert weight.shape == (96, 32)
    names = replace_linear(model, bits=8, group_size=16)
    assert len(names) == 8
    after = model.get_submodule("transformer.h.0.attn.c_attn")
    assert isinstance(after, QuantLinear)
    assert bool(((after.weight - weight).abs() <= after.scales.repeat_interleave(16, 1) * 0.501).all())
    assert first_output(model, batch).shape == before.shape


@pytest.mark.parametrize("bits", [4, None])
def test_conv1d_that_is_not_rounded_stays_as_it_is_stored(bits: int | None) -> None:
    job = job_of("gpt2")
    config = QuantConfig(bits=bits, group_size=16, exclude=("c_proj",), overrides={"c_fc": {"bits": None}})
    result = epmq.quantize(job.merged, job.experts, job.calibration, config)
    for name, (rows, columns) in {"attn.c_proj": (32, 32), "mlp.c_proj": (128, 32), "mlp.c_fc": (32, 128)}.items():
        module = result.model.get_submodule(f"transformer.h.0.{name}")
        merged = job.merged.get_parameter(f"transformer.h.0.{name}.weight")
        assert type(module).__name__ == "Conv1D"
        assert module.get_parameter("weight").shape == merged.shape == (rows, columns)
        assert torch.equal(module.get_parameter("weight"), merged) == name.endswith("c_proj")
    error = next(row["tasks"]["a"] for row in result.report["layers"] if row["linear"] == "transformer.h.0.mlp.c_fc")
    assert error["epmq"] < error["merged"]


@pytest.mark.parametrize("family", ["t5", "flan-t5", "clip", "clip-vision", "gpt2"])
def test_distillation_takes_every_kind_of_output(family: str) -> None:
    job = job_of(family)
    config = QuantConfig(group_size=16, distill={"steps": 2, "examples": 3, "copies": 1}, diagnostics=False)
    result = epmq.quantize(job.merged, job.experts, job.calibration, config)
    assert sum(isinstance(module, QuantLinear) for module in result.model.modules()) == job.kind.linears
    assert result.report["stages"]["distill"]["last_loss"] > 0.0


def test_some_examples_of_a_batch_keep_what_their_decoder_reads() -> None:
    """The text's padding says nothing about the decoder's, though both are as long."""
    batch = make_streams({"a": job_of("t5").calibration["a"][:1]})["a"][0]
    rows = torch.tensor([1, 4])
    part = take(batch, rows)
    longest = int(batch.inputs["attention_mask"][rows].sum(1).max())
    assert part.inputs["input_ids"].shape == (2, longest) != (2, 10)
    for name in ("decoder_input_ids", "decoder_attention_mask"):
        assert torch.equal(part.inputs[name], batch.inputs[name][rows])
    assert part.decoder_weights is not None
    assert batch.decoder_weights is not None
    assert torch.equal(part.decoder_weights, batch.decoder_weights[rows])


# -- the table ---------------------------------------------------------------------------------------------------------


def test_the_table_of_families_is_this_files() -> None:
    text = (ROOT / "docs" / "families.md").read_text()
    rows = re.findall(r"^\| `([a-z0-9-]+)` \| (\w+) \|", text, re.MULTILINE)
    assert rows[: len(KINDS)] == [(family, kind.model) for family, kind in KINDS.items()]
    told = re.findall(r"^\| `(test_\w+)` \|", text, re.MULTILINE)
    assert told == [name for name, thing in globals().items() if name in told and callable(thing)]
    assert len(told) == 8


def test_which_input_a_block_works_on_is_traced() -> None:
    job = job_of("t5")
    runner = BlockRunner(copy.deepcopy(job.merged))
    runner.follow(job.calibration["a"][0])
    found = {address.list_name: runner.origin(address).inputs for address in runner.addresses}
    assert found == {"encoder.block": {"input_ids"}, "decoder.block": {"decoder_input_ids"}}
