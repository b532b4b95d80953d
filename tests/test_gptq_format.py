"""GPTQ files: versions 1 and 2 held to an independent reader and read back; mixed up and broken ones are named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from close import assert_close, product_bound
from tiny import answers, copy_of, edit_config, edit_tensors, quantized, quantized_names, tensors_of, tiny
from torch import Tensor, nn

import epmq
from epmq import QuantLinear, replace_linear
from epmq.errors import FormatError

NAME = "model.layers.0.mlp.down_proj"
HALF = torch.float16


def fields(words: Tensor, bits: int, count: int) -> Any:
    """Unsigned fields along the rows of int32 words, low bits first: written without this package."""
    stream = np.unpackbits(words.contiguous().numpy().view(np.uint8), axis=1, bitorder="little")
    return (stream[:, : count * bits].reshape(len(words), count, bits) @ (1 << np.arange(bits))).astype(np.int64)


def words(values: Any, bits: int) -> Tensor:
    """Inverse of :func:`fields`."""
    planes = (np.asarray(values)[:, :, None] >> np.arange(bits)) & 1
    stream = np.packbits(planes.reshape(len(values), -1).astype(np.uint8), axis=1, bitorder="little")
    return torch.from_numpy(stream.view(np.int32).copy())


def independent_weight(tensors: dict[str, Tensor], name: str, settings: dict[str, Any]) -> Tensor:
    """fp32 (u - z) s with the group of each column, as the format is described."""
    bits, scales = settings["bits"], tensors[f"{name}.scales"]
    groups = tensors[f"{name}.g_idx"].long()
    codes = fields(tensors[f"{name}.qweight"].T, bits, len(groups))
    zeros = fields(tensors[f"{name}.qzeros"], bits, scales.shape[1]).T
    if settings["checkpoint_format"] == "gptq":
        zeros = (zeros + 1) % 2**bits
    return torch.from_numpy(codes - zeros[:, groups]).float() * scales.T.float()[:, groups]


def settings_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())["quantization_config"]
    return found


def weight_of(model: nn.Module, name: str) -> Tensor:
    layer = model.get_submodule(name)
    assert isinstance(layer, QuantLinear)
    return layer.weight


def write(folder: Path, bits: int = 4, sym: bool = True, group_size: int = 32, dtype: torch.dtype = HALF) -> nn.Module:
    model = quantized("llama", bits, sym, group_size, dtype)
    epmq.save(model, folder, shard_bytes=20_000, format="gptq")
    return model


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("group_size", [32, -1])
@pytest.mark.parametrize("sym", [True, False], ids=["v1", "v2"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_files_hold_what_the_format_says_and_come_back(
    bits: int, sym: bool, group_size: int, dtype: torch.dtype, tmp_path: Path
) -> None:
    model = write(tmp_path / "out", bits, sym, group_size, dtype)
    tensors, settings = tensors_of(tmp_path / "out"), settings_of(tmp_path / "out")
    assert settings == {
        "quant_method": "gptq", "checkpoint_format": "gptq" if sym else "gptq_v2", "bits": bits,
        "group_size": group_size, "sym": sym, "desc_act": False, "lm_head": False, "pack_dtype": "int32",
    }  # fmt: skip
    assert (settings["bits"], settings["group_size"], settings["sym"]) == (bits, group_size, sym)
    groups = 1 if group_size == -1 else 3
    assert {key.removeprefix(f"{NAME}."): (t.dtype, list(t.shape)) for key, t in tensors.items() if NAME in key} == {
        "qweight": (torch.int32, [96 * bits // 32, 64]),
        "qzeros": (torch.int32, [groups, 64 * bits // 32]),
        "scales": (dtype, [groups, 64]),
        "g_idx": (torch.int32, [96]),
    }
    assert tensors["lm_head.weight"].dtype == dtype
    ours = epmq.load(tmp_path / "out")
    assert len(quantized_names(ours)) == 14
    for name in quantized_names(model):
        assert torch.equal(weight_of(model, name), independent_weight(tensors, name, settings).to(dtype)), name
        assert torch.equal(weight_of(ours, name), weight_of(model, name)), name
    assert answers(ours).isfinite().all()


def test_a_zero_point_of_zero_survives_version_2(tmp_path: Path) -> None:
    model = tiny("llama").half()
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight.data.abs_()
    replace_linear(model, 4, 32)
    assert not model.get_buffer(f"{NAME}.zeros").any()
    epmq.save(model, tmp_path / "out", format="gptq")
    assert torch.equal(weight_of(epmq.load(tmp_path / "out"), NAME), weight_of(model, NAME))


@pytest.mark.parametrize("sym", [True, False])
def test_permuted_groups_are_honoured(sym: bool, tmp_path: Path) -> None:
    epmq.save(quantized("llama", 4, sym, 32, HALF), tmp_path / "out", format="gptq")
    groups = (torch.arange(96) // 32)[torch.randperm(96)].int()
    edit_tensors(tmp_path / "out", {f"{NAME}.g_idx": groups})
    weight = independent_weight(tensors_of(tmp_path / "out"), NAME, settings_of(tmp_path / "out"))
    loaded = epmq.load(tmp_path / "out")
    assert torch.equal(weight_of(loaded, NAME), weight.half())
    x = torch.randn(10, 96)
    bound = product_bound(x.abs().double() @ weight.abs().double().T, 96)
    assert_close(loaded.get_submodule(NAME)(x), x.double() @ weight.double().T, bound, "permuted")
    with pytest.raises(FormatError, match="its columns are permuted; use format native"):
        epmq.save(loaded, tmp_path / "again", format="gptq")
    epmq.save(loaded, tmp_path / "native", format="native")
    assert torch.equal(weight_of(epmq.load(tmp_path / "native"), NAME), weight.half())


def test_settings_of_older_writers(tmp_path: Path) -> None:
    """quantize_config.json beside a plain config.json, the key format, zero biases, no g_idx, a table of angles."""
    model = quantized("llama", 4, False, 32, HALF)
    folder = tmp_path / "out"
    epmq.save(model, folder, format="gptq")
    config = json.loads((folder / "config.json").read_text())
    settings = config.pop("quantization_config")
    settings["format"] = settings.pop("checkpoint_format")
    settings.pop("quant_method")
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "quantize_config.json").write_text(json.dumps(settings))
    changes: dict[str, Tensor | None] = {f"{name}.g_idx": None for name in quantized_names(model)}
    changes[f"{NAME}.bias"] = torch.zeros(64, dtype=HALF)
    changes["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    edit_tensors(folder, changes)
    (folder / "model.safetensors").rename(folder / "gptq_model-4bit-32g.safetensors")
    loaded = epmq.load(folder)
    for name in quantized_names(model):
        assert torch.equal(weight_of(loaded, name), weight_of(model, name))
    assert loaded.get_submodule(NAME).bias is not None


def test_an_asymmetric_version_1_file_is_read(tmp_path: Path) -> None:
    model = quantized("llama", 4, False, 32, HALF)
    folder = tmp_path / "out"
    epmq.save(model, folder, format="gptq")
    stored = {}
    for name, tensor in tensors_of(folder).items():
        if name.endswith(".qzeros"):
            zeros = fields(tensor, 4, tensor.shape[1] * 8)
            assert zeros.min() > 0
            stored[name] = words(zeros - 1, 4)
    edit_tensors(folder, dict(stored))
    edit_config(folder, lambda config: config.update(checkpoint_format="gptq"))
    loaded = epmq.load(folder)
    for name in quantized_names(model):
        assert torch.equal(weight_of(loaded, name), weight_of(model, name))


def test_single_linears_of_other_bits_are_read(tmp_path: Path) -> None:
    """GPTQModel's ``dynamic``: bits follow from the shapes."""
    for bits, folder in ((4, tmp_path / "four"), (8, tmp_path / "eight")):
        epmq.save(quantized("llama", bits, True, 32, HALF), folder, format="gptq")
    eight = tensors_of(tmp_path / "eight")
    edit_tensors(tmp_path / "four", {key: tensor for key, tensor in eight.items() if key.startswith(NAME)})
    loaded = epmq.load(tmp_path / "four")
    assert loaded.get_submodule(NAME).bits == 8
    assert torch.equal(weight_of(loaded, NAME), independent_weight(eight, NAME, settings_of(tmp_path / "eight")).half())


# -- versions mixed up -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def symmetric(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gptq") / "sym"
    epmq.save(quantized("llama", 4, True, 32, HALF), folder, format="gptq")
    return folder


@pytest.fixture(scope="module")
def asymmetric(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gptq") / "asym"
    epmq.save(quantized("llama", 4, False, 32, HALF), folder, format="gptq")
    return folder


def refusal(folder: Path) -> str:
    with pytest.raises(FormatError) as caught:
        epmq.load(folder)
    return str(caught.value)


def test_a_symmetric_file_under_the_wrong_version_is_found(symmetric: Path, tmp_path: Path) -> None:
    folder = copy_of(symmetric, tmp_path / "bad")
    edit_config(folder, lambda config: config.update(checkpoint_format="gptq_v2"))
    assert "are not 8; they fit checkpoint_format 'gptq'." in refusal(folder)
    zeros = {
        key: words(np.full((t.shape[0], t.shape[1] * 8), 8), 4)
        for key, t in tensors_of(folder).items()
        if "qzeros" in key
    }
    edit_tensors(folder, dict(zeros))
    epmq.load(folder)
    edit_config(folder, lambda config: config.update(checkpoint_format="gptq"))
    assert "are not 8; they fit checkpoint_format 'gptq_v2'." in refusal(folder)


def test_zero_points_that_contradict_sym_are_found(asymmetric: Path, tmp_path: Path) -> None:
    folder = copy_of(asymmetric, tmp_path / "bad")
    edit_config(folder, lambda config: config.update(sym=True))
    assert "says sym, but the zero points of" in refusal(folder)
    assert "set sym to false there if they are right" in refusal(folder)


def test_a_wrapped_zero_point_in_version_1_is_refused(asymmetric: Path, tmp_path: Path) -> None:
    folder = copy_of(asymmetric, tmp_path / "bad")
    zeros = fields(tensors_of(folder)[f"{NAME}.qzeros"], 4, 64)
    zeros[1, 5] = 15
    edit_tensors(folder, {f"{NAME}.qzeros": words(zeros, 4)})
    edit_config(folder, lambda config: config.update(checkpoint_format="gptq"))
    assert f"'{NAME}.qzeros' has a zero point of 0, which version 1 cannot tell from" in refusal(folder)


# -- what cannot be written ------------------------------------------------------------------------------------------


def test_encoders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="causal language models, which BertForSequenceClassification is not"):
        epmq.save(quantized("bert", 4, True, 32, HALF), tmp_path / "out", format="gptq")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ([{"exclude": ["lm_head", "k_proj"]}], "'model.layers.0.self_attn.k_proj' stays unquantized"),
        ([{"exclude": []}], "'lm_head' is the output head"),
        ([{"include": ["k_proj"], "bits": 8}, {}], "have one bits, group_size, sym and scale dtype"),
        ([{"include": ["k_proj"], "sym": True}, {}], "have one bits, group_size, sym and scale dtype"),
        ([{"group_size": 40}], "group_size 40 does not divide its 64 columns"),
    ],
)
def test_models_that_loaders_would_not_take_are_refused(
    settings: list[dict[str, Any]], message: str, tmp_path: Path
) -> None:
    model = tiny("llama").half()
    for one in settings:
        replace_linear(model, **{"bits": 4, "group_size": 32, **one})
    with pytest.raises(FormatError, match=message):
        epmq.save(model, tmp_path / "out", format="gptq")
    assert list(tmp_path.iterdir()) == []


def test_a_model_of_conv1d_alone_has_nothing_to_store(tmp_path: Path) -> None:
    config = transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=4, n_positions=32)
    with pytest.raises(FormatError, match="hold quantized linears, and none is; use format native or compressed-"):
        epmq.save(transformers.GPT2LMHeadModel(config), tmp_path / "out", format="gptq")
    assert list(tmp_path.iterdir()) == []


def test_full_precision_scales_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="set scale_dtype to float16"):
        epmq.save(quantized("llama", 4, True, 32), tmp_path / "out", format="gptq")


def test_widths_that_words_do_not_fill_are_refused(tmp_path: Path) -> None:
    model = tiny("llama").half()
    model.model.layers[1].mlp.up_proj = nn.Linear(64, 48, dtype=HALF)  # type: ignore[union-attr,index]
    replace_linear(model, 4, 32, True)
    with pytest.raises(FormatError, match=r"up_proj' is 64 -> 48: gptq needs multiples of 32"):
        epmq.save(model, tmp_path / "out", format="gptq")


# -- what cannot be read ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"qweight": None}, "tensor '{}.weight', which the model needs, is not in the checkpoint"),
        ({"qweight": torch.zeros(12, 63, dtype=torch.int32)}, "'{}.scales' has shape [3, 64], expected [3, 63]"),
        ({"qweight": torch.zeros(7, 64, dtype=torch.int32)}, "'{}.qweight' has shape [7, 64], expected [6, 64]"),
        ({"qweight": torch.zeros(12, 64)}, "'{}.qweight' has dtype float32, expected int32"),
        ({"qweight": torch.zeros(12, dtype=torch.int32)}, "linear '{}' has no qweight and scales of two dimensions"),
        ({"scales": None}, "linear '{}' has no qweight and scales of two dimensions"),
        ({"scales": torch.ones(2, 64)}, "'{}.scales' has 2 groups; 96 columns in groups of 32 have 3"),
        ({"qzeros": None}, "there is no tensor '{}.qzeros'"),
        ({"qzeros": torch.zeros(3, 64, dtype=torch.int32)}, "'{}.qzeros' has shape [3, 64], expected [3, 8]"),
        ({"g_idx": torch.zeros(96, dtype=torch.int32)}, "'{}.g_idx' does not put 32 columns into each of its groups"),
        ({"g_idx": torch.full((96,), -1, dtype=torch.int32)}, "'{}.g_idx' does not put 32 columns into each"),
        ({"g_idx": torch.zeros(0, dtype=torch.int32)}, "'{}.qweight' holds 384 bits for each of 0 columns"),
        ({"g_idx": torch.arange(48, dtype=torch.int32) // 32}, "'{}.scales' has 3 groups; 48 columns"),
        ({"weight": torch.zeros(64, 96)}, "linear '{}' is there twice"),
    ],
)  # fmt: skip
def test_tensors_that_contradict_the_format_are_named(
    changes: dict[str, Tensor | None], message: str, symmetric: Path, tmp_path: Path
) -> None:
    folder = copy_of(symmetric, tmp_path / "bad")
    edit_tensors(folder, {f"{NAME}.{part}": tensor for part, tensor in changes.items()})
    assert message.format(NAME) in refusal(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 5}, "bits is 5; epmq reads 2, 3, 4, 8"),
        ({"bits": "4"}, "bits is '4'"),
        ({"group_size": 0}, "group_size is 0"),
        ({"group_size": None}, "group_size is None"),
        ({"group_size": 16}, "columns in groups of 16 have"),
        ({"checkpoint_format": "gptq_p"}, "checkpoint_format is gptq_p; epmq reads gptq and gptq_v2"),
        ({"format": "gptq_v2"}, "checkpoint_format and format is gptq and gptq_v2"),
        ({"quant_method": "awq"}, "says 'awq'"),
    ],
)
def test_configurations_of_another_kind_are_refused(
    changes: dict[str, Any], message: str, symmetric: Path, tmp_path: Path
) -> None:
    folder = copy_of(symmetric, tmp_path / "bad")
    edit_config(folder, lambda config: config.update(changes))
    assert message in refusal(folder)


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_a_truncated_file_is_named(keep: int, symmetric: Path, tmp_path: Path) -> None:
    folder = copy_of(symmetric, tmp_path / "bad")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    assert f"{path}: not a complete safetensors file" in refusal(folder)
