"""Mixtures of experts, which transformers keeps in a few tensors: taken apart and quantized one by one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import epmq
from epmq.collected import collect
from epmq.estimate import estimate, work_bytes
from epmq.experts import SeparateExperts, separate, separated
from epmq.formats.statistics import StatisticsWriter
from epmq.inside import run_inside
from epmq.names import NamedForModel
from epmq.quantized import unpack
from epmq.skeleton import fill, meta_copy
from epmq.sources import DictSource
from epmq.streams import make_streams

transformers = pytest.importorskip("transformers")
if transformers.__version__.startswith("4."):
    pytest.skip("transformers 4 keeps experts apart itself", allow_module_level=True)

from mixtures import BATCH, SETTINGS, TASKS, ernie_vl, fuse, logits, make, quantized, varied  # noqa: E402


def whole(model: nn.Module) -> nn.Module:
    """The same model with separate experts, weights and all."""
    twin = separate(meta_copy(model))
    fill(twin, "", NamedForModel(DictSource(model.state_dict()), twin, aliases=True), None)
    return twin


@pytest.mark.parametrize("family", SETTINGS)
def test_separate_experts_compute_what_fused_ones_do(family: str) -> None:
    model = make(family)
    twin = whole(model)
    assert list(separated(twin))
    assert not any(name.endswith(("experts.gate_up_proj", "experts.up_proj")) for name in twin.state_dict())
    # Sums of a few hundred products in fp32, in another order, through two layers.
    torch.testing.assert_close(logits(twin), logits(model), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["cut", "biases that are not told", "another activation"])
def test_experts_that_compute_otherwise_are_left_as_they_are(kind: str) -> None:
    if kind == "biases that are not told":
        model = make("GptOss")
        for layer in model.model.layers:
            layer.mlp.experts.has_bias = False
    elif kind == "another activation":
        model = make("Mixtral")
        for layer in model.model.layers:
            layer.mlp.experts.act_fn = nn.CosineSimilarity()  # of gate and up, as Inkling 2 has it
    else:
        model = make("Mixtral")

        class Cut(type(model.model.layers[0].mlp.experts)):  # type: ignore[misc]
            def forward(self, *args: Any) -> Tensor:
                found: Tensor = super().forward(*args)
                return found.clamp(max=100.0)

        for layer in model.model.layers:
            layer.mlp.experts.__class__ = Cut
    assert not list(separated(separate(meta_copy(model))))


def test_an_expert_without_tokens_is_not_called() -> None:
    experts = SeparateExperts(make("Mixtral").model.layers[0].mlp.experts).to_empty(device="cpu")
    experts.get_submodule("2").forward = None  # type: ignore[assignment]
    x, chosen = torch.zeros(5, 32), torch.tensor([[0, 1]] * 5)
    assert experts(x, chosen, torch.ones(5, 2)).shape == x.shape
    assert experts(x[:0], chosen[:0], torch.ones(0, 2)).shape == (0, 32)


@pytest.mark.parametrize("family", ["Qwen3Moe", "GptOss"])
def test_experts_get_the_codes_that_they_get_as_linears_of_a_model(family: str) -> None:
    model = make(family)
    torch.manual_seed(1)
    ours = quantized(model)
    torch.manual_seed(1)
    experts = {task: whole(varied(model)) for task in TASKS}
    config = epmq.QuantConfig(bits=4, group_size=16, sym=True)
    twin = epmq.quantize(whole(model), experts, {task: [BATCH] for task in TASKS}, config)
    state = ours.model.state_dict()
    assert state.keys() == twin.model.state_dict().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in twin.model.state_dict().items())
    parts = [m for name, m in ours.model.named_modules() if ".experts." in name and isinstance(m, epmq.QuantLinear)]
    assert len(parts) == 2 * 4 * 3
    assert not any("in no linear layer" in note for note in ours.report["notes"])
    assert "model.layers.0.mlp.experts.gate_up_proj" in model.state_dict()  # the caller's own stays as it was


def test_what_experts_read_inside_the_fine_tuned_models_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[str] = []

    def watched(block: nn.Module, call: Any, read: list[str], given: list[str]) -> Any:
        kept.extend(read + given)
        return run_inside(block, call, read, given)

    monkeypatch.setattr("epmq.visit.run_inside", watched)
    result = quantized(make("Qwen3Moe"))
    assert set(kept) == {"self_attn.q_proj", "self_attn.o_proj"}
    assert any("(alpha 0)" in note for note in result.report["notes"])


@pytest.mark.parametrize("told", [True, False])
def test_estimates_count_what_reaches_each_expert(told: bool) -> None:
    """With as many experts chosen, more of them take more weights and solving but no more rows."""
    batches = [{"input_ids": torch.zeros(8, 16 * times, dtype=torch.int64)} for times in (1, 2)]
    found, rows = [], []
    for count in (4, 16):
        model = separate(meta_copy(make("Qwen3Moe", num_experts=count)))
        for module in model.modules():
            if not told and hasattr(module, "top_k"):
                del module.top_k
        found.append(estimate(model, {"a": batches}, epmq.QuantConfig(), 1, 1, torch.device("cpu"), 0))
        block = model.get_submodule("model.layers.0")
        rows.append(work_bytes(block, batches[1:]) - work_bytes(block, batches[:1]))
    assert found[0].states == found[1].states and found[0].fixed < found[1].fixed
    assert (rows[0] == rows[1]) == told
    # What attention, whose linears all read as many columns, and two experts read and give, twice; hidden states.
    positions, linears = 8 * 16, (32 + 16 + 16 + 32) + 32 + 2 * ((2 * 16 + 32) + (32 + 16))
    assert not told or rows[0] == 4 * positions * (2 * linears + 2 * 32)


def test_the_preset_with_distillation_knows_them_too() -> None:
    settings = {"distill": {"steps": 2, "examples": 4, "copies": 0}}
    result = quantized(make("Mixtral"), **settings)
    assert sum(isinstance(module, epmq.QuantLinear) for module in result.model.modules()) == 2 * (4 + 4 * 3)


@pytest.mark.parametrize("family", ["Mixtral", "GptOss"])
def test_experts_are_taken_apart_whatever_the_default_dtype_is(family: str) -> None:
    model = make(family)
    torch.set_default_dtype(torch.bfloat16)
    try:
        twin = separate(meta_copy(model))
    finally:
        torch.set_default_dtype(torch.float32)
    assert len(list(separated(twin))) == 2


def test_experts_that_no_text_reaches_are_rounded_to_nearest() -> None:
    model = make("Mixtral")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate.weight[3] = 0.0
            layer.mlp.gate.weight[:3] += 5.0
    batch = {"input_ids": BATCH["input_ids"][:1, :1]}
    config = epmq.QuantConfig(bits=4, group_size=16, sym=True, method="gptq")
    result = epmq.quantize(model, None, {"a": [batch]}, config)
    parts = {name: m for name, m in result.model.named_modules() if name.count(".experts.") and "proj" in name}
    assert len(parts) == 2 * 4 * 3 and all(isinstance(module, epmq.QuantLinear) for module in parts.values())
    unreached = [note.split(":")[0] for note in result.report["notes"] if "inputs; rounded to nearest." in note]
    assert unreached
    nearest = epmq.quantize(model, None, {}, config.model_copy(update={"method": "rtn"}))
    for name in unreached:
        assert torch.equal(parts[name].packed, nearest.model.get_submodule(name).packed)  # type: ignore[arg-type]


def test_names_of_a_module_s_own_experts_are_not_those_of_files() -> None:
    model = ernie_vl()
    result = epmq.quantize(model, None, {}, epmq.QuantConfig(bits=8, group_size=16, method="rtn"))
    name = next(separated(result.model))
    up = model.get_parameter(f"{name}.gate_up_proj")[3, 16:]
    layer: Any = result.model.get_submodule(f"{name}.3.up_proj")
    assert (layer.weight - up).norm() < 0.01 * up.norm()


@pytest.mark.parametrize("given", ["modules", "files", "fused files"])
def test_heads_on_experts_of_a_bare_mixture_are_left_out(given: str, tmp_path: Path) -> None:
    model = make("Mixtral").model
    config = transformers.MixtralConfig(**SETTINGS["Mixtral"], num_labels=2)
    torch.manual_seed(1)
    experts: dict[str, Any] = {}
    for task in TASKS:
        experts[task] = transformers.MixtralForSequenceClassification(config).eval()
        experts[task].model.load_state_dict(varied(model).state_dict())
    wanted = epmq.quantize(
        model, {task: expert.model for task, expert in experts.items()}, {"a": [BATCH], "b": [BATCH]}
    )
    if given != "modules":
        for task, expert in experts.items():
            expert.save_pretrained(tmp_path / task)
            file = tmp_path / task / "model.safetensors"
            if given == "fused files":
                save_file(fuse(load_file(file), expert), file, metadata={"format": "pt"})
        experts = {task: tmp_path / task for task in TASKS}
    result = epmq.quantize(model, experts, {"a": [BATCH], "b": [BATCH]})
    assert any(note.startswith("score.weight: in expert 'a'") for note in result.report["notes"])
    assert all(torch.equal(t, wanted.model.state_dict()[name]) for name, t in result.model.state_dict().items())


def test_experts_may_be_files_beside_modules(tmp_path: Path) -> None:
    model = make("Mixtral")
    torch.manual_seed(1)
    experts: dict[str, Any] = {task: varied(model) for task in TASKS}
    for task, expert in experts.items():
        expert.save_pretrained(tmp_path / task)
    calibration = {task: [BATCH] for task in TASKS}
    config = epmq.QuantConfig(bits=4, group_size=16)
    ours, theirs = (
        epmq.quantize(model, given, calibration, config, base=model)
        for given in (experts, {task: tmp_path / task for task in TASKS})
    )
    assert torch.equal(logits(ours.model), logits(theirs.model))


def padded(length: int) -> dict[str, Tensor]:
    """BATCH with as many positions at its end masked."""
    ids = torch.cat([BATCH["input_ids"], torch.full((8, length), 7)], 1)
    mask = torch.cat([torch.ones(8, 16, dtype=torch.int64), torch.zeros(8, length, dtype=torch.int64)], 1)
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("method", ["gptq", "epmq"])
def test_masked_positions_count_for_no_expert(method: Any) -> None:
    model = make("Mixtral")
    torch.manual_seed(1)
    experts = {task: varied(model) for task in TASKS}
    config = epmq.QuantConfig(bits=4, group_size=16, method=method)
    results = [
        epmq.quantize(model, experts, {task: [batch] for task in TASKS}, config, base=model)
        for batch in (padded(0), padded(9))
    ]
    assert not any("row per position" in note for result in results for note in result.report["notes"])
    plain, masked = (result.model.state_dict() for result in results)
    packed = [name for name in plain if name.endswith("experts.0.gate_proj.packed")]
    assert len(packed) == 2
    for name in packed:
        # Sums in another order may turn a code that lies at a tie.
        assert (unpack(plain[name], 4, 32) != unpack(masked[name], 4, 32)).float().mean() < 0.01


def test_statistics_of_experts_leave_masked_positions_out_too(tmp_path: Path) -> None:
    model = make("Mixtral")
    sums = []
    for name, batch in (("plain", padded(0)), ("masked", padded(9))):
        skeleton = separate(meta_copy(model))
        source = NamedForModel(DictSource(model.state_dict()), skeleton, aliases=True)
        (tmp_path / name).mkdir()
        writer = StatisticsWriter(tmp_path / name)
        streams = make_streams({"a": [batch]})["a"]
        collect(skeleton, source, "a", streams, writer, lambda *_: None, torch.device("cpu"))
        writer.finish("a", {"examples": 8})
        sums.append(load_file(next((tmp_path / name).glob("*.safetensors"))))
    assert sums[0].keys() == sums[1].keys() and any("experts.3" in name for name in sums[0])
    for name, tensor in sums[0].items():
        torch.testing.assert_close(sums[1][name], tensor, rtol=1e-3, atol=1e-3)
