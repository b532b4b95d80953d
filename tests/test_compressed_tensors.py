"""compressed-tensors files: loaded by transformers, held to an independent reader, read back."""

from __future__ import annotations

import copy
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from close import assert_close, product_bound
from families import KINDS, make_job
from safetensors.torch import load_file, save_file
from tiny import (
    KEPT,
    answers,
    dequantized,
    edit_config,
    edit_json,
    edit_tensors,
    first_output,
    of_the_same_class,
    quantized,
    quantized_names,
    tensors_of,
    tiny,
)
from torch import Tensor, nn

import epmq
from epmq import QuantLinear, replace_linear, restore_linear
from epmq.config import Format
from epmq.errors import FormatError

LOADERS = {
    "llama": transformers.AutoModelForCausalLM,
    "bert": transformers.AutoModelForSequenceClassification,
    "t5": transformers.AutoModelForSeq2SeqLM,
    "clip": transformers.AutoModel,
}


def fields(words: Tensor, bits: int, count: int) -> Any:
    """Unsigned ``bits``-wide fields of each row of int32 words, low bits first: written without this package."""
    stream = np.unpackbits(words.contiguous().numpy().view(np.uint8), axis=1, bitorder="little")
    return stream[:, : count * bits].reshape(len(words), count, bits) @ (1 << np.arange(bits))


def independent_weight(tensors: dict[str, Tensor], name: str, weights: dict[str, Any]) -> Tensor:
    """(u - z) s from the format's description."""
    bits = weights["num_bits"]
    rows, columns = tensors[f"{name}.weight_shape"].tolist()
    codes = fields(tensors[f"{name}.weight_packed"], bits, columns)
    scales = tensors[f"{name}.weight_scale"]
    zeros = np.full(scales.shape, 2 ** (bits - 1))
    if not weights["symmetric"]:
        zeros = fields(tensors[f"{name}.weight_zero_point"].T, bits, rows).T
    size = columns if weights["strategy"] == "channel" else weights["group_size"]
    steps = torch.from_numpy(codes - zeros.repeat(size, axis=1)).float()
    return (steps * scales.float().repeat_interleave(size, 1)).to(scales.dtype)


def scheme_of(folder: Path, name: str) -> dict[str, Any]:
    groups = json.loads((folder / "config.json").read_text())["quantization_config"]["config_groups"].values()
    named = [group for group in groups if any(names_it(target, name) for target in group["targets"])]
    found: dict[str, Any] = (named or [group for group in groups if group["targets"] == ["Linear"]])[0]["weights"]
    return found


def names_it(target: str, name: str) -> bool:
    return target == name or (target.startswith("re:") and re.match(target.removeprefix("re:"), name) is not None)


def load_with_transformers(kind: str, folder: Path) -> nn.Module:
    model, info = LOADERS[kind].from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    loaded: nn.Module = model.eval()
    return loaded


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("bits", "sym", "group_size"),
    [
        (4, True, 32), (4, True, -1), (8, True, 32), (8, True, -1),
        (4, False, 32), (8, False, -1), (3, True, 32), (2, False, 64),
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_transformers_loads_what_we_write(
    kind: str, bits: int, sym: bool, group_size: int, dtype: torch.dtype, tmp_path: Path
) -> None:
    model = quantized(kind, bits, sym, group_size, dtype)
    epmq.save(model, tmp_path / "out", shard_bytes=20_000, format="compressed-tensors")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    theirs = load_with_transformers(kind, tmp_path / "out")
    logits = answers(theirs)  # a symmetric language model is unpacked by its first forward
    tensors = tensors_of(tmp_path / "out")
    for name in quantized_names(model):
        weight = theirs.get_parameter(f"{name}.weight")
        assert weight.dtype == dtype
        assert torch.equal(weight, independent_weight(tensors, name, scheme_of(tmp_path / "out", name))), name
    wanted = answers(dequantized(epmq.load(tmp_path / "out")))
    assert wanted.norm() > 0
    assert (logits - wanted).norm() <= 0.01 * wanted.norm()


@pytest.mark.parametrize("kind", ["llama", "bert", "t5", "clip"])
@pytest.mark.parametrize(("bits", "sym", "group_size"), [(4, True, 32), (3, False, 32), (4, True, 48), (4, False, 64)])
def test_our_loader_gives_back_every_bit(
    kind: str, bits: int, sym: bool, group_size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Groups that were split sum in another order where products are scaled group by group.
    monkeypatch.setenv("EPMQ_BACKEND", "reference")
    model = quantized(kind, bits, sym, group_size)
    epmq.save(model, tmp_path / "out")
    ours = epmq.load(tmp_path / "out")
    assert quantized_names(ours) == quantized_names(model)
    for name in quantized_names(model):
        found, wanted = ours.get_submodule(name), model.get_submodule(name)
        assert isinstance(found, QuantLinear)
        assert isinstance(wanted, QuantLinear)
        assert torch.equal(found.packed, wanted.packed)
        assert torch.equal(found.weight, wanted.weight)
    assert torch.equal(answers(ours), answers(model))


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("kind", ["t5", "clip"])
def test_families_that_transformers_must_unpack(kind: str, sym: bool, tmp_path: Path) -> None:
    model = quantized(kind, 4, sym, 64)
    epmq.save(model, tmp_path / "out")
    theirs = load_with_transformers(kind, tmp_path / "out")
    for name in quantized_names(model):
        wanted = model.get_submodule(name).weight
        assert torch.equal(theirs.get_parameter(f"{name}.weight"), wanted), name  # type: ignore[arg-type]
    wanted_logits = answers(dequantized(model))
    assert (answers(theirs) - wanted_logits).norm() <= 0.01 * wanted_logits.norm()


def test_zero_points_need_the_dequantize_key(tmp_path: Path) -> None:
    epmq.save(quantized("llama", 4, False, 32), tmp_path / "out")
    load_with_transformers("llama", tmp_path / "out")
    edit_config(tmp_path / "out", lambda config: config.pop("dequantize"))
    with pytest.raises(RuntimeError):
        load_with_transformers("llama", tmp_path / "out")


def test_the_plainest_file(tmp_path: Path) -> None:
    epmq.save(quantized("llama", 4, True, 32), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    settings = config["quantization_config"]
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["dtype"] == "float32"
    assert settings["ignore"] == ["lm_head"]
    assert settings["quantization_status"] == "compressed"
    assert "dequantize" not in settings
    assert [group["targets"] for group in settings["config_groups"].values()] == [["Linear"]]
    tensors = tensors_of(tmp_path / "out")
    name = "model.layers.0.mlp.down_proj"
    assert {key: (t.dtype, list(t.shape)) for key, t in tensors.items() if key.startswith(name)} == {
        f"{name}.weight_packed": (torch.int32, [64, 12]),
        f"{name}.weight_scale": (torch.float32, [64, 3]),
        f"{name}.weight_shape": (torch.int64, [2]),
    }


def mixture(sym: bool) -> nn.Module:
    model = tiny("llama")
    replace_linear(model, 8, 32, sym, include=["down_proj"])
    replace_linear(model, 4, 32, sym)
    return model


def test_linears_of_different_bits_get_their_own_groups(tmp_path: Path) -> None:
    model = mixture(sym=True)
    epmq.save(model, tmp_path / "out")
    theirs = load_with_transformers("llama", tmp_path / "out")
    answers(theirs)
    for name in quantized_names(model):
        assert torch.equal(theirs.get_parameter(f"{name}.weight"), model.get_submodule(name).weight), name  # type: ignore[arg-type]
    assert torch.equal(answers(epmq.load(tmp_path / "out")), answers(model))


@pytest.mark.parametrize("headless", [False, True], ids=["saved class", "without its head"])
@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_a_mixture_loads_with_the_head_and_without(kind: str, headless: bool, tmp_path: Path) -> None:
    model: Any = tiny(kind)
    replace_linear(model, 4, 32, True, include=["attn", "attention"], exclude=["layers?\\.1\\."])
    replace_linear(model, 8, 32, True, exclude=[*KEPT, "pooler", "layers?\\.0\\.self_attn"])
    epmq.save(model, tmp_path / "out")
    theirs = of_the_same_class(tmp_path / "out", headless)
    wanted = first_output(dequantized(model.base_model if headless else model))
    assert (first_output(theirs) - wanted).norm() <= 0.01 * wanted.norm()


@pytest.mark.parametrize("headless", [False, True], ids=["saved class", "without its head"])
def test_linears_left_out_are_so_with_the_head_and_without(headless: bool, tmp_path: Path) -> None:
    model: Any = tiny("llama")
    replace_linear(model, 4, 32, True, exclude=["lm_head", "layers\\.0\\.self_attn"])
    epmq.save(model, tmp_path / "out")
    theirs = of_the_same_class(tmp_path / "out", headless)
    wanted = first_output(dequantized(model.base_model if headless else model))
    assert (first_output(theirs) - wanted).norm() <= 0.01 * wanted.norm()


@pytest.mark.parametrize("headed", [False, True], ids=["saved class", "with a head"])
def test_a_mixture_of_a_model_without_head_loads_with_one(headed: bool, tmp_path: Path) -> None:
    model: Any = tiny("bert").bert
    replace_linear(model, 4, 32, True, include=["attention"])
    replace_linear(model, 8, 32, True, exclude=["pooler"])
    epmq.save(model, tmp_path / "out")
    kind: Any = transformers.BertForSequenceClassification if headed else transformers.AutoModel
    theirs = kind.from_pretrained(tmp_path / "out").eval()
    first_output(theirs)  # unpacks
    wanted = first_output(dequantized(model))
    assert (first_output(theirs.base_model) - wanted).norm() <= 0.01 * wanted.norm()


# -- linears that are stored the other way round ---------------------------------------------------------------------


def result_of_gpt2() -> epmq.QuantResult:
    job = make_job(KINDS["gpt2"])
    return epmq.quantize(job.merged, job.experts, job.calibration, epmq.QuantConfig(group_size=16))


@pytest.mark.parametrize("format", ["compressed-tensors", "gptq"])
@pytest.mark.parametrize("made_by", ["quantize", "replace_linear", "load"])
def test_a_conv1d_is_refused_however_it_was_quantized(made_by: str, format: Any, tmp_path: Path) -> None:
    result: Any = result_of_gpt2() if made_by != "replace_linear" else make_job(KINDS["gpt2"]).merged
    if made_by == "replace_linear":
        replace_linear(result, group_size=16)
    if made_by == "load":
        epmq.save(result, tmp_path / "native", format="native")
        result = epmq.load(tmp_path / "native")
    with pytest.raises(
        FormatError, match=r"c_attn' is not an nn.Linear, which is all that .* takes; use format native"
    ):
        epmq.save(result, tmp_path / "out", format=format)
    assert not (tmp_path / "out").exists()


def test_an_asymmetric_mixture_is_refused_by_transformers_and_never_loaded_wrong(tmp_path: Path) -> None:
    model = mixture(sym=False)
    epmq.save(model, tmp_path / "out")
    assert "transformers 5.23 refuses it" in (tmp_path / "out" / "README.md").read_text()
    with pytest.raises(RuntimeError):
        load_with_transformers("llama", tmp_path / "out")
    assert torch.equal(answers(epmq.load(tmp_path / "out")), answers(model))


@pytest.mark.parametrize("group_size", [32, None])
@pytest.mark.parametrize("sym", [True, False])
def test_a_file_that_the_package_itself_writes_is_read(sym: bool, group_size: int | None, tmp_path: Path) -> None:
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
        apply_quantization_config,
    )

    theirs: Any = tiny("llama")
    strategy = "channel" if group_size is None else "group"
    weights = QuantizationArgs(num_bits=4, type="int", symmetric=sym, strategy=strategy, group_size=group_size)
    groups = {"group_0": QuantizationScheme(targets=["Linear"], weights=weights)}
    apply_quantization_config(
        theirs, QuantizationConfig(config_groups=groups, ignore=["lm_head"], format="pack-quantized")
    )
    for module in theirs.modules():
        if hasattr(module, "weight_scale"):
            grouped = module.weight.detach().reshape(len(module.weight), module.weight_scale.shape[1], -1)
            module.weight_scale.data = grouped.abs().amax(-1) / 6.0
            if not sym:
                module.weight_zero_point.data = torch.randint(-3, 3, module.weight_scale.shape, dtype=torch.int8)
    compressor = ModelCompressor.from_pretrained_model(theirs)
    compressor.compress_model(theirs)
    theirs.save_pretrained(tmp_path / "out")
    compressor.update_config(tmp_path / "out")
    compressor.decompress_model(theirs)
    ours = epmq.load(tmp_path / "out")
    assert len(quantized_names(ours)) == 14
    for name in quantized_names(ours):
        assert torch.equal(ours.get_submodule(name).weight, theirs.get_parameter(f"{name}.weight")), name  # type: ignore[arg-type]


TEXT: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2,
}  # fmt: skip
SIGHT = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16,
    "patch_size": 8,
}  # fmt: skip


def with_vision(kind: str) -> nn.Module:
    torch.manual_seed(0)
    model: Any
    if kind == "qwen2vl":
        rotary = {"rope_type": "default", "mrope_section": [2, 3, 3]}
        vision = {"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "patch_size": 8}
        model = transformers.Qwen2VLForConditionalGeneration(
            transformers.Qwen2VLConfig(text_config={**TEXT, "rope_parameters": rotary}, vision_config=vision)
        )
    elif kind == "gemma3":
        model = transformers.Gemma3ForConditionalGeneration(
            transformers.Gemma3Config(
                text_config={**TEXT, "head_dim": 16}, vision_config=SIGHT, mm_tokens_per_image=4, image_token_index=60
            )
        )
    else:
        config = transformers.LlavaConfig(
            text_config={**TEXT, "model_type": "llama"},
            vision_config={**SIGHT, "model_type": "clip_vision_model"},
            image_token_index=60,
        )
        model = transformers.LlavaForConditionalGeneration(config)
    made: nn.Module = model.eval()
    return made


def older(kind: str, name: str) -> str:
    """What transformers 4.51 called a tensor."""
    if kind == "qwen2vl":
        return name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")
    name = name.replace("model.language_model.", "language_model.model.").replace("lm_head", "language_model.lm_head")
    return name.replace("model.vision_tower.", "vision_tower.").replace("model.multi_modal", "multi_modal")


@pytest.mark.parametrize("kind", ["qwen2vl", "gemma3", "llava"])
def test_names_of_older_layouts_are_written_and_both_are_read(kind: str, tmp_path: Path) -> None:
    model = with_vision(kind)
    model.save_pretrained(tmp_path / "theirs")  # type: ignore[operator]
    kept = r"vision|visual"  # in 8 bits
    language = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and "vis" not in name]
    replace_linear(model, 8, 16, True, include=kept)
    replace_linear(model, 4, 16, True, exclude=("lm_head", kept, language[0]))
    epmq.save(model, tmp_path / "out")
    path = tmp_path / "out" / "model.safetensors"
    tensors = load_file(path)
    stored = {re.sub("weight_(packed|scale|shape)$", "weight", name) for name in tensors}
    assert stored == load_file(tmp_path / "theirs" / "model.safetensors").keys()
    wanted = model.state_dict()
    newer = {older(kind, name): name for name in (*wanted, *model_parts(model))}
    for names in ({}, newer):
        save_file({names.get(name, name): tensor for name, tensor in tensors.items()}, path, metadata={"format": "pt"})
        loaded = epmq.load(tmp_path / "out").state_dict()
        assert loaded.keys() == wanted.keys()
        assert all(torch.equal(loaded[name], tensor) for name, tensor in wanted.items())
        if kind == "gemma3":
            continue  # SigLIP's initialisation reads weights, which a mixture of bits leaves packed in transformers
        dense = copy.deepcopy(model)
        restore_linear(dense)
        theirs = of_the_same_class(tmp_path / "out", headless=False)
        first_output(theirs)  # unpacks it
        found = theirs.state_dict()
        assert all(torch.equal(found[name], tensor) for name, tensor in dense.state_dict().items())
    # One layout a file: transformers would take whichever came last.
    name = next(name for name in tensors if name.endswith("norm.weight") and newer.get(name, name) != name)
    save_file({**tensors, newer[name]: tensors[name].clone()}, path, metadata={"format": "pt"})
    with pytest.raises(FormatError, match=r"are both .* in the model; remove one of them"):
        epmq.load(tmp_path / "out")


def model_parts(model: nn.Module) -> list[str]:
    """What the parts of packed linears are called in files that keep the model's names."""
    return [f"{name}.weight_{part}" for name in quantized_names(model) for part in ("packed", "scale", "shape")]


def test_permuted_columns_as_older_files_have_them(tmp_path: Path) -> None:
    model = quantized("llama", 4, False, 32)
    epmq.save(model, tmp_path / "out")
    name = "model.layers.1.mlp.down_proj"
    groups = (torch.arange(96) // 32)[torch.randperm(96)].int()
    edit_tensors(tmp_path / "out", {f"{name}.weight_g_idx": groups})
    layer = epmq.load(tmp_path / "out").get_submodule(name)
    assert isinstance(layer, QuantLinear)
    tensors = tensors_of(tmp_path / "out")
    codes = torch.from_numpy(fields(tensors[f"{name}.weight_packed"], 4, 96))
    zeros = torch.from_numpy(fields(tensors[f"{name}.weight_zero_point"].T, 4, 64).T.copy())
    weight = (codes - zeros[:, groups]) * tensors[f"{name}.weight_scale"][:, groups]
    assert torch.equal(layer.weight, weight)
    x = torch.randn(5, 96)
    bound = product_bound(x.abs().double() @ weight.abs().double().T, 96)
    assert_close(layer(x), x.double() @ weight.double().T, bound, "permuted")
    # Natively the order is kept; here it has no place.
    epmq.save(epmq.load(tmp_path / "out"), tmp_path / "native", format="native")
    assert torch.equal(epmq.load(tmp_path / "native").get_submodule(name).weight, weight)  # type: ignore[arg-type]
    with pytest.raises(FormatError, match="has no permuted columns; use format native"):
        epmq.save(epmq.load(tmp_path / "out"), tmp_path / "again")


# -- what cannot be written ------------------------------------------------------------------------------------------


def test_group_sizes_that_leave_too_few_columns_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        FormatError, match=r"q_proj'.* 36 and 64 both; choose another group_size, exclude it or use format native"
    ):
        epmq.save(quantized("llama", 4, True, 36), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_scales_that_loaders_would_round_are_refused(tmp_path: Path) -> None:
    model = tiny("bert").bfloat16()
    replace_linear(model.bert, 4, 32)  # type: ignore[arg-type]
    layer = model.bert.encoder.layer[0].output.dense  # type: ignore[union-attr,index]
    layer.scales = layer.scales.float()
    with pytest.raises(FormatError, match="float32 scales to the model's bfloat16; set scale_dtype to bfloat16"):
        epmq.save(model, tmp_path / "out")


def test_models_without_a_configuration_are_refused(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(32, 32))
    replace_linear(model, 4, 32)
    with pytest.raises(FormatError, match="compressed-tensors is for transformers models"):
        epmq.save(model, tmp_path / "out", format="compressed-tensors")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("schemes", "told"),
    [
        ([(4, 32, True)], "reads it where it knows the class"),
        ([(4, 64, False)], "reads it where it knows the class"),
        ([(4, 16, True)], "groups there are multiples of 32"),
        ([(8, 32, False)], "no blocks for 8 bits with zero points"),
        ([(3, 32, True)], "unpack it first"),
        ([(4, -1, True)], "unpack it first"),
        ([(4, 16, True), (4, 32, True)], "unpack it first"),
    ],
)
def test_the_card_tells_of_llama_cpp(schemes: list[tuple[int, int, bool]], told: str, tmp_path: Path) -> None:
    model = tiny("llama")
    for part, (bits, group, sym) in zip(("mlp", "self_attn"), 2 * schemes, strict=False):
        replace_linear(model, bits, group, sym, include=part)
    epmq.save(model, tmp_path / "out")
    assert re.search(f"llama.cpp.*{told}", (tmp_path / "out" / "README.md").read_text())


@pytest.mark.parametrize("format", ["native", "compressed-tensors"])
def test_a_lost_bias_is_missed(format: Format, tmp_path: Path) -> None:
    epmq.save(quantized("bert", 4, True, 32), tmp_path / "out", format=format)
    name = "bert.encoder.layer.1.attention.self.query.bias"
    edit_tensors(tmp_path / "out", {name: None})
    if format == "native":
        digest = hashlib.sha256((tmp_path / "out" / "model.safetensors").read_bytes()).hexdigest()
        edit_json(tmp_path / "out" / "epmq.json", lambda about: about["sha256"].update({"model.safetensors": digest}))
    with pytest.raises(FormatError, match=f"tensor '{name}', which the model needs, is not in the checkpoint"):
        epmq.load(tmp_path / "out")
