"""compressed-tensors folders that are truncated, foreign or contradict themselves are refused by what is at fault."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import (
    copy_of,
    edit_config,
    edit_json,
    edit_tensors,
    quantized,
)
from torch import Tensor

import epmq
from epmq.errors import FormatError


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ct") / "good"
    epmq.save(quantized("llama", 4, False, 32), folder)
    return folder


@pytest.fixture(scope="module")
def good_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ct") / "shards"
    epmq.save(quantized("llama", 4, True, 32), folder, shard_bytes=20_000)
    return folder


def refusal(folder: Path) -> str:
    with pytest.raises(FormatError) as caught:
        epmq.load(folder)
    return str(caught.value)


NAME = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight_scale": None}, "there is no tensor '{}.weight_scale'"),
        ({"weight_shape": None}, "there is no tensor '{}.weight_shape'"),
        ({"weight_zero_point": None}, "there is no tensor '{}.weight_zero_point'"),
        ({"weight_packed": None}, "tensor '{}.weight', which the model needs, is not in the checkpoint"),
        ({"weight_packed": torch.zeros(64, 9, dtype=torch.int32)}, "'{}.weight_packed' has shape [64, 9]"),
        ({"weight_packed": torch.zeros(64, 8)}, "'{}.weight_packed' has dtype float32, expected int32"),
        ({"weight_scale": torch.ones(64, 1)}, "'{}.weight_scale' has shape [64, 1], expected [64, 2]"),
        ({"weight_scale": torch.ones(64, 2, dtype=torch.int32)}, "'{}.weight_scale' has dtype int32"),
        ({"weight_zero_point": torch.ones(64, 2, dtype=torch.int8)}, "'{}.weight_zero_point' has shape [64, 2]"),
        ({"weight_shape": torch.tensor([64, 2**40])}, "'{}.weight_packed' has shape [64, 8], expected"),
        ({"weight_shape": torch.tensor([-64, 64])}, "'{}.weight_shape' says -64 x 64"),
        ({"weight_shape": torch.tensor([64])}, "'{}.weight_shape' has shape [1], expected [2]"),
        ({"weight_g_idx": torch.zeros(64, dtype=torch.int32)}, "'{}.weight_g_idx' does not put 32 columns into each"),
        ({"weight_g_idx": torch.zeros(3, dtype=torch.int32)}, "'{}.weight_g_idx' has shape [3], expected [64]"),
        ({"weight": torch.zeros(64, 64)}, "linear '{}' is there twice"),
        ({"bias2": torch.zeros(64)}, "'{}.bias2' has no place in the model"),
    ],
)  # fmt: skip
def test_tensors_that_contradict_the_format_are_named(
    changes: dict[str, Tensor | None], message: str, good: Path, tmp_path: Path
) -> None:
    folder = copy_of(good, tmp_path / "bad")
    edit_tensors(folder, {f"{NAME}.{part}": tensor for part, tensor in changes.items()})
    assert message.format(NAME) in refusal(folder)


def weights(config: Any) -> dict[str, Any]:
    found: dict[str, Any] = config["config_groups"]["group_0"]["weights"]
    return found


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(quantization_status="frozen"), "quantization_status is 'frozen'"),
        (lambda c: c.pop("config_groups"), "has no config_groups"),
        (lambda c: c.update(config_groups=[]), "has no config_groups"),
        (lambda c: c.update(sparsity_config={"format": "sparse-24"}), "sparsity_config is"),
        (lambda c: c.update(transform_config={"a": 1}), "transform_config is set"),
        (lambda c: c.update(kv_cache_scheme={"num_bits": 8}), "kv_cache_scheme is set"),
        (lambda c: c["config_groups"]["group_0"].update(format="float-quantized"), "format 'float-quantized' is not"),
        (lambda c: c["config_groups"]["group_0"].update(input_activations={}), "input_activations are quantized"),
        (lambda c: c["config_groups"]["group_0"].update(weights=None), "weights is missing"),
        (lambda c: c["config_groups"]["group_0"].update(targets=["Conv2d"]), "no config group covers"),
        (lambda c: c["config_groups"]["group_0"].update(targets=["re:("]), "no usable targets"),
        (lambda c: c["config_groups"]["group_0"].update(targets=None), "no usable targets"),
        (lambda c: weights(c).update(num_bits=5), "weights of 5 bits"),
        (lambda c: weights(c).update(type="float"), "type 'float'"),
        (lambda c: weights(c).update(group_size=0), "with group_size 0"),
        (lambda c: weights(c).update(strategy="block"), "strategy 'block'"),
        (lambda c: weights(c).update(num_bits=8), r"weight_packed' has shape \[64, 12\], expected \[64, 24\]"),
        (
            lambda c: weights(c).update(num_bits=3),
            r"expected \[64, 9\] \(3-bit files of compressed-tensors before 0.18",
        ),
    ],
)
def test_configurations_of_another_kind_are_refused(change: Any, message: str, good: Path, tmp_path: Path) -> None:
    folder = copy_of(good, tmp_path / "bad")
    edit_config(folder, change)
    with pytest.raises(FormatError, match=message):
        epmq.load(folder)


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_a_truncated_shard_is_named(keep: int, good_shards: Path, tmp_path: Path) -> None:
    folder = copy_of(good_shards, tmp_path / "bad")
    path = sorted(folder.glob("*.safetensors"))[1]
    path.write_bytes(path.read_bytes()[:keep])
    assert f"{path}: not a complete safetensors file" in refusal(folder)


def test_a_broken_index_is_named(good_shards: Path, tmp_path: Path) -> None:
    folder = copy_of(good_shards, tmp_path / "bad")
    index = folder / "model.safetensors.index.json"
    key = f"{NAME}.weight_scale"
    before = index.read_text()
    edit_json(index, lambda c: c["weight_map"].update({key: "../evil.safetensors"}))
    assert "leaves the folder" in refusal(folder)
    index.write_text(before)
    edit_json(index, lambda c: c["weight_map"].update({key: "model-00099-of-00099.safetensors"}))
    assert "shard 'model-00099-of-00099.safetensors' is missing" in refusal(folder)
    index.write_text(before)
    edit_json(index, lambda c: c["weight_map"].update(ghost=c["weight_map"][key]))
    assert "promises tensor 'ghost'" in refusal(folder)
    index.write_text(before.replace('"weight_map": {', f'"weight_map": {{"{key}": "model.safetensors",', 1))
    assert f"name {key!r} is there twice" in refusal(folder)
    index.write_text("{")
    assert "not a shard index" in refusal(folder)


def test_a_tensor_in_two_shards_is_refused(good_shards: Path, tmp_path: Path) -> None:

    folder = copy_of(good_shards, tmp_path / "bad")
    first, second = sorted(folder.glob("*.safetensors"))[:2]
    key = next(iter(load_file(first)))
    save_file({**load_file(second), key: load_file(first)[key]}, second)
    assert f"tensor {key!r} is in {first.name} and in {second.name}" in refusal(folder)


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 99999])
def test_a_configuration_that_is_no_json_object_is_named(text: str, good: Path, tmp_path: Path) -> None:
    folder = copy_of(good, tmp_path / "bad")
    (folder / "config.json").write_text(text)
    assert f"{folder / 'config.json'}: " in refusal(folder)


def test_other_methods_are_named(good: Path, tmp_path: Path) -> None:
    folder = copy_of(good, tmp_path / "bad")
    edit_config(folder, lambda config: config.update(quant_method="awq"))
    assert "no quantized checkpoint epmq knows" in refusal(folder)
    assert "says 'awq'" in refusal(folder)
