"""Checkpoints of which transformers makes other tensors as it loads them: read as it makes them, one at a time."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import save_adapter
from families import DECODER, ENCODER, VISION
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import epmq
from epmq.adapters import AdapterSource
from epmq.errors import SourceError
from epmq.experts import fused_shapes, parts_of, separate
from epmq.huggingface import skeleton_from_folder
from epmq.jobs import quantize_to_folder
from epmq.merge_jobs import merge_to_folder
from epmq.names import NamedForModel
from epmq.recipe import Recipe
from epmq.skeleton import meta_copy
from epmq.sources import DictSource, FileSource

transformers = pytest.importorskip("transformers")

from mixtures import MOE, UNGATED, ernie_vl, qwen_vl, turn_experts, varied  # noqa: E402

WEIGHTS = "model.safetensors"
NEAREST = epmq.QuantConfig(bits=4, group_size=16, method="rtn")
LINEAR_ATTENTION = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
}  # fmt: skip


def of(name: str, config: str, **settings: Any) -> Callable[[], nn.Module]:
    return lambda: getattr(transformers, name)(getattr(transformers, config)(**settings))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "cut in three": of("NomicBertForMaskedLM", "NomicBertConfig", **ENCODER),
    "cut in three and two": of("GteForMaskedLM", "GteConfig", **ENCODER),
    "cut with its bias": of("JinaEmbeddingsV3ForMaskedLM", "JinaEmbeddingsV3Config", **ENCODER),
    "cut in four": of("HrmTextForCausalLM", "HrmTextConfig", **DECODER),
    "cut unevenly, tables joined": of("Molmo2TextModel", "Molmo2TextConfig", **DECODER),
    "convolutions joined": of(
        "OlmoHybridForCausalLM", "OlmoHybridConfig", **{**DECODER, "num_hidden_layers": 4}, **LINEAR_ATTENTION
    ),
    "experts joined": of("NemotronHForCausalLM", "NemotronHConfig", **MOE, **{**UNGATED, "n_routed_experts": 12}),
    "experts turned": qwen_vl,
    "of images": of("Tipsv2VisionModel", "Tipsv2VisionConfig", **VISION),
}


def made(kind: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[kind]().eval()


def save(model: Any, folder: Path) -> None:
    """As the checkpoints that are published."""
    model.save_pretrained(folder)
    if "Qwen3VLMoe" in type(model).__name__:
        turn_experts(folder)


def named(folder: Path, fused: bool = False) -> tuple[NamedForModel, nn.Module]:
    """A folder's tensors as a job reads them, and the model that they are of. fused: its experts kept together."""
    source = FileSource(folder)
    skeleton = skeleton_from_folder(folder, set(source.keys()), fused=fused)
    return NamedForModel(source, skeleton, aliases=True), skeleton


def one_by_one(state: dict[str, Tensor], skeleton: nn.Module) -> dict[str, Tensor]:
    """A module's state with experts apart where the skeleton has them so."""
    for name in fused_shapes(skeleton):
        fused = state.pop(name)
        for part, where in parts_of(skeleton, name).items():
            state[part] = where.of(fused)
    return state


@pytest.mark.parametrize("kind", MODELS)
def test_tensors_are_those_that_transformers_makes(kind: str, tmp_path: Path) -> None:
    model: Any = made(kind)
    save(model, tmp_path)
    source, skeleton = named(tmp_path, fused=kind == "experts joined")
    theirs = one_by_one(type(model).from_pretrained(tmp_path, dtype=torch.float32).state_dict(), skeleton)
    assert source.made and not source.dropped
    assert set(source.keys()) == set(theirs)
    for key, tensor in theirs.items():
        ours = source.tensor(key)
        assert torch.equal(ours, tensor), key
        assert (source.shape(key), source.dtype(key)) == (tuple(tensor.shape), tensor.dtype)
        # Of a tensor that was cut no more is held than the piece.
        assert ours.untyped_storage().nbytes() == tensor.numel() * tensor.element_size(), key


@pytest.mark.parametrize("kind", ["cut in three", "convolutions joined"])
def test_folders_give_what_modules_in_memory_give(kind: str, tmp_path: Path) -> None:
    base: Any = made(kind)
    expert: Any = varied(base)
    save(base, tmp_path / "base")
    save(expert, tmp_path / "expert")
    ids = torch.randint(3, 60, (4, 12))
    calibration = {"a": [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}]}
    config = epmq.QuantConfig(bits=4, group_size=16, rho=0.5)
    ours = epmq.quantize(base, {"a": tmp_path / "expert"}, calibration, config, base=tmp_path / "base")
    expected = epmq.quantize(base, {"a": expert}, calibration, config, base=base)
    state = ours.model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.model.state_dict().items())
    assert any(isinstance(module, epmq.QuantLinear) for module in ours.model.modules())


@pytest.mark.parametrize("kind", ["cut in three", "experts turned"])
def test_jobs_read_them(kind: str, tmp_path: Path) -> None:
    base: Any = made(kind)
    experts = {task: varied(base) for task in ("a", "b")}
    for name, model in {"base": base, **experts}.items():
        save(model, tmp_path / name)
    recipe = Recipe(
        base=tmp_path / "base", experts={task: tmp_path / task for task in experts}, quantization=NEAREST,
        format="native",
    )  # fmt: skip
    quantize_to_folder(recipe, tmp_path / "out")
    wanted = epmq.quantize(epmq.merge(base, experts), None, {}, NEAREST)
    ours = epmq.load(tmp_path / "out").state_dict()
    assert all(torch.equal(ours[name], tensor) for name, tensor in wanted.model.state_dict().items())


def test_of_turned_experts_one_is_read_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = made("experts turned")
    save(model, tmp_path)
    source, _ = named(tmp_path)
    whole = FileSource.tensor

    def tensor(self: FileSource, key: str) -> Tensor:
        assert ".experts." not in key
        return whole(self, key)

    monkeypatch.setattr(FileSource, "tensor", tensor)
    place = "model.language_model.layers.1.mlp.experts"
    state = model.state_dict()
    assert torch.equal(source.tensor(f"{place}.3.up_proj.weight"), state[f"{place}.gate_up_proj"][3, 24:])
    assert torch.equal(source.tensor(f"{place}.2.down_proj.weight"), state[f"{place}.down_proj"][2])


def test_experts_that_are_shared_out_to_two_mixtures_are_refused_when_opened(tmp_path: Path) -> None:
    model: Any = ernie_vl()
    save(model, tmp_path)
    with pytest.raises(
        SourceError, match=r"transformers computes '\S+experts\.\w+', experts in one tensor, from '\S+'"
    ):
        named(tmp_path)
    # Where they stay together nothing keeps them from being read.
    source = FileSource(tmp_path)
    skeleton = skeleton_from_folder(tmp_path, set(source.keys()), fused=True)
    whole = NamedForModel(source, skeleton, aliases=True)
    assert all(torch.equal(whole.tensor(key), tensor) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize("kind", ["cut in three", "experts turned"])
def test_tensors_of_files_in_memory_are_read_as_those_in_the_files(kind: str, tmp_path: Path) -> None:
    model: Any = made(kind)
    save(model, tmp_path)
    in_files, skeleton = named(tmp_path)
    in_memory = NamedForModel(DictSource(load_file(tmp_path / WEIGHTS)), skeleton, aliases=True)
    assert in_memory.keys() == in_files.keys()
    assert all(torch.equal(in_memory.tensor(key), in_files.tensor(key)) for key in in_files.keys())


@pytest.mark.parametrize("extra", [{}, {"model.rotary_emb.inv_freq": torch.ones(2)}], ids=["alone", "with a table"])
def test_a_module_s_own_tensors_are_not_made_anew(extra: dict[str, Tensor]) -> None:
    model: Any = made("experts turned")
    skeleton = separate(meta_copy(model), lambda linear: "layers.0." in linear)
    source = NamedForModel(DictSource({**model.state_dict(), **extra}), skeleton, aliases=True)
    wanted = one_by_one(model.state_dict(), skeleton)
    assert set(source.keys()) == set(wanted)
    assert all(torch.equal(source.tensor(key), tensor) for key, tensor in wanted.items())


def test_experts_that_are_kept_together_load_again(tmp_path: Path) -> None:
    model: Any = made("experts turned")
    result = epmq.quantize(model, None, {}, NEAREST.model_copy(update={"exclude": [r"layers\.1\."]}))
    epmq.save(result, tmp_path / "out", format="native")
    ours = epmq.load(tmp_path / "out").state_dict()
    assert all(torch.equal(ours[name], tensor) for name, tensor in result.model.state_dict().items())


@pytest.mark.parametrize("extra", ["nomic_bert.layers.1.self_attn.k_proj.weight", "layers.1.self_attn.q_proj.weight"])
def test_a_tensor_beside_what_it_is_made_of_is_refused(extra: str, tmp_path: Path) -> None:
    save(made("cut in three"), tmp_path)
    tensors = {**load_file(tmp_path / WEIGHTS), extra: torch.ones(32, 32)}
    save_file(tensors, tmp_path / WEIGHTS, metadata={"format": "pt"})
    sentence = rf"makes '\S+{extra[-13:]}' of '\S+layers\.1\.attn\.Wqkv\.weight', but '{extra}' is there too; remove"
    with pytest.raises(SourceError, match=sentence):
        named(tmp_path)


def shortened(folder: Path, end: str, rows: int) -> str:
    """Leave some rows of the first tensor of a checkpoint whose name ends so."""
    tensors = load_file(folder / WEIGHTS)
    key = min(name for name in tensors if name.endswith(end))
    save_file({**tensors, key: tensors[key][:rows].clone()}, folder / WEIGHTS, metadata={"format": "pt"})
    return key


@pytest.mark.parametrize(("kind", "end", "rows", "sentence"), [
    ("cut in three", "Wqkv.weight", 1, r"transformers cannot make 3 tensors of '{key}', \[1, 32\], the first of them"),
    ("cut in three", "Wqkv.weight", 95, r"tensor '\S+\.v_proj\.weight' has shape \[31, 32\], the model expects"),
    ("cut unevenly, tables joined", "att_proj.weight", 63,
     r"transformers cannot make 'layers\.0\.self_attn\.q_proj\.weight' of '{key}' and what belongs to it \(.+\)"),
])  # fmt: skip
def test_tensors_that_cannot_be_cut_are_named(kind: str, end: str, rows: int, sentence: str, tmp_path: Path) -> None:
    model: Any = made(kind)
    save(model, tmp_path / "base")
    key = shortened(tmp_path / "base", end, rows)
    with pytest.raises(SourceError, match=sentence.format(key=key)):
        quantize_to_folder(Recipe(base=tmp_path / "base", quantization=NEAREST), tmp_path / "out")
    assert not (tmp_path / "out").exists()


# -- adapters ---------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")  # peft's own
def test_adapters_to_tensors_that_were_cut(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("peft")
    model: Any = made("cut in three")
    save(model, tmp_path / "base")
    expected = save_adapter(model, tmp_path / "a", target_modules=["q_proj", "down_proj"])
    source, skeleton = named(tmp_path / "base")
    adapted = AdapterSource(tmp_path / "a", source, skeleton)
    assert all(torch.equal(adapted.tensor(key), tensor) for key, tensor in expected.items())
    merge = {"method": "task_arithmetic", "scaling": 1.0}
    with caplog.at_level(logging.WARNING):
        merge_to_folder(Recipe(base=tmp_path / "base", experts={"a": tmp_path / "a"}, merge=merge), tmp_path / "merged")
    assert "and an expert has not all of them; they are merged and stored as it makes them." in caplog.text
    theirs = type(model).from_pretrained(tmp_path / "merged", dtype=torch.float32).state_dict()
    # Base and difference are summed in another order.
    for key, tensor in expected.items():
        torch.testing.assert_close(theirs[key], tensor)


@pytest.mark.filterwarnings("ignore")  # peft's own
def test_adapters_to_tensors_that_files_have_are_merged_under_the_names_there(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("peft")
    model: Any = made("experts turned")
    save(model, tmp_path / "base")
    save_adapter(model, tmp_path / "a", target_modules=["q_proj"])
    merge_to_folder(Recipe(base=tmp_path / "base", experts={"a": tmp_path / "a"}), tmp_path / "merged")
    assert "they are merged as in the files" in caplog.text
    base, merged = load_file(tmp_path / "base" / WEIGHTS), load_file(tmp_path / "merged" / WEIGHTS)
    assert base.keys() == merged.keys()
    assert {name.rpartition(".self_attn.")[2] for name in base if not torch.equal(base[name], merged[name])} == {
        "q_proj.weight"
    }


def test_experts_with_another_head_are_merged_with_what_transformers_makes(tmp_path: Path) -> None:
    base: Any = made("cut in three")
    expert: Any = transformers.NomicBertForSequenceClassification(transformers.NomicBertConfig(**ENCODER, num_labels=3))
    expert.nomic_bert.load_state_dict(varied(base.nomic_bert).state_dict(), strict=False)
    save(base, tmp_path / "base")
    save(expert, tmp_path / "a")
    merge = {"method": "task_arithmetic", "scaling": 0.5}
    merge_to_folder(Recipe(base=tmp_path / "base", experts={"a": tmp_path / "a"}, merge=merge), tmp_path / "merged")
    theirs = transformers.AutoModel.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    wanted = epmq.merge(base.base_model, {"a": expert.base_model}, "task_arithmetic", scaling=0.5)
    state = theirs.state_dict()
    assert state.keys() <= wanted.state_dict().keys() and any("k_proj" in name for name in state)
    assert all(torch.equal(wanted.state_dict()[name], tensor) for name, tensor in state.items())
