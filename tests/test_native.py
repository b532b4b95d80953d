"""Saved and loaded, bit for bit; truncated, altered and foreign folders."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ToyJob, ToyModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import epmq
from epmq import QuantConfig, QuantLinear, QuantResult, replace_linear
from epmq.errors import FormatError, OutputError
from epmq.files import new_folder
from epmq.formats import native
from epmq.formats.native import MANIFEST_NAME, NativeReader, NativeWriter
from epmq.formats.shards import ShardWriter
from epmq.report import whole_report
from epmq.skeleton import meta_copy
from epmq.sources import FileSource

IDS = torch.arange(24).reshape(2, 12)


def quantized(job: ToyJob, **settings: Any) -> QuantResult:
    return epmq.quantize(job.merged, job.experts, job.calibration, QuantConfig(**{"group_size": 16, **settings}))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A quantized model's folder, in shards."""
    model = ToyModel()
    replace_linear(model, bits=3, group_size=16)
    epmq.save(model, tmp_path / "out", shard_bytes=4000)
    return tmp_path / "out"


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        out: Tensor = model.eval()(IDS)
    return out


def assert_same_state(ours: nn.Module, wanted: nn.Module) -> None:
    assert ours.state_dict().keys() == wanted.state_dict().keys()
    for name, tensor in wanted.state_dict().items():
        assert ours.state_dict()[name].dtype == tensor.dtype, name
        assert torch.equal(ours.state_dict()[name], tensor), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shard_bytes", [2**30, 4000, 1], ids=["one file", "shards", "a file each"])
@pytest.mark.parametrize(("bits", "sym", "group_size"), [(4, False, 16), (3, True, -1), (2, False, 24), (8, True, 32)])
def test_the_reloaded_model_is_bit_identical(
    bits: int, sym: bool, group_size: int, shard_bytes: int, dtype: torch.dtype, tmp_path: Path
) -> None:
    model = ToyModel().to(dtype)
    replace_linear(model, bits=bits, sym=sym, group_size=group_size, exclude=["head"])
    epmq.save(model, tmp_path / "out", shard_bytes)
    assert (len(list((tmp_path / "out").glob("*.safetensors"))) == 1) == (shard_bytes == 2**30)
    for fresh in (ToyModel(), meta_copy(ToyModel())):
        loaded = epmq.load(tmp_path / "out", fresh)
        assert loaded is fresh
        assert_same_state(loaded, model)
        assert torch.equal(logits(loaded), logits(model))
        assert isinstance(loaded.get_submodule("blocks.0.up"), QuantLinear)


@pytest.mark.parametrize("settings", [{}, {"bits": None}, {"bits": 2, "sym": True, "norm_refit": True}], ids=str)
def test_a_result_is_saved_with_its_report(settings: dict[str, Any], toy_job: ToyJob, tmp_path: Path) -> None:
    result = quantized(toy_job, **settings)
    epmq.save(result, tmp_path / "out")
    loaded = epmq.load(tmp_path / "out", ToyModel())
    assert torch.equal(logits(loaded), logits(result.model))
    assert whole_report(tmp_path / "out") == json.loads(json.dumps(result.report))
    assert "library_name" not in (tmp_path / "out" / "README.md").read_text()  # epmq alone reads this format


def test_linears_without_bias_and_tied_tensors(tmp_path: Path) -> None:
    model = ToyModel()
    model.head = nn.Linear(32, 40, bias=False)
    model.head.weight = model.embedding.weight
    model.blocks[0].up = nn.Linear(32, 64, bias=False)
    fresh = copy.deepcopy(model)
    replace_linear(model, group_size=16, exclude=["head"])
    epmq.save(model, tmp_path / "out")
    assert "head.weight" not in FileSource(tmp_path / "out").keys()
    loaded = epmq.load(tmp_path / "out", fresh)
    assert loaded.get_parameter("head.weight") is loaded.get_parameter("embedding.weight")
    assert torch.equal(logits(loaded), logits(model))
    untied = copy.deepcopy(fresh)
    untied.head = nn.Linear(32, 40, bias=False)
    assert "tensor 'head.weight', which the model needs, is not in the checkpoint" in refusal(tmp_path / "out", untied)


def test_what_begins_where_another_tensor_does_is_stored_as_well(tmp_path: Path) -> None:
    model = ToyModel()
    table = model.embedding.weight.data
    for name, view in {"row": table[:1], "turned": table[:32].T, "again": table[:1]}.items():
        model.register_buffer(name, view)
    fresh = copy.deepcopy(model)
    replace_linear(model, group_size=16)
    epmq.save(model, tmp_path / "out")
    loaded = epmq.load(tmp_path / "out", fresh)
    for name in ("row", "turned", "again", "embedding.weight"):
        assert torch.equal(loaded.state_dict()[name], model.state_dict()[name])


def test_codes_are_packed_on_disk(saved: Path) -> None:
    source = FileSource(saved)
    assert source.dtype("blocks.0.up.packed") == torch.int32
    assert source.shape("blocks.0.up.packed") == (64, 3)
    assert source.dtype("blocks.0.up.zeros") == torch.uint8
    assert "blocks.0.up.weight" not in source.keys()


def test_loading_holds_no_unpacked_weight(saved: Path) -> None:
    loaded = epmq.load(saved, ToyModel())
    assert {tensor.dtype for name, tensor in loaded.state_dict().items() if ".up." in name} == {
        torch.int32, torch.uint8, torch.float32
    }  # fmt: skip
    assert not [name for name, _ in loaded.named_parameters() if name.endswith("up.weight")]


# -- folders that cannot be trusted ----------------------------------------------------------------------------------


def refusal(folder: Path, model: nn.Module | None = None) -> str:
    with pytest.raises(FormatError) as caught:
        epmq.load(folder, model or ToyModel())
    return str(caught.value)


def shards_of(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def edit_manifest(folder: Path, change: Any) -> None:
    path = folder / MANIFEST_NAME
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_a_truncated_shard_is_named(keep: int, saved: Path) -> None:
    path = shards_of(saved)[1]
    path.write_bytes(path.read_bytes()[:keep])
    assert refusal(saved) == f"{path}: truncated or altered, its checksum is not the manifest's."


@pytest.mark.parametrize("place", [3, 30, -1])
def test_a_flipped_bit_is_found(place: int, saved: Path) -> None:
    path = shards_of(saved)[0]
    content = bytearray(path.read_bytes())
    content[place] ^= 0x10
    path.write_bytes(bytes(content))
    assert f"{path}: truncated or altered" in refusal(saved)


def test_a_missing_shard_is_named(saved: Path) -> None:
    path = shards_of(saved)[1]
    path.unlink()
    assert refusal(saved) == f"{saved / MANIFEST_NAME}: shard {path.name!r} is missing from the folder."


def test_a_missing_index_is_named(saved: Path) -> None:
    (saved / "model.safetensors.index.json").unlink()
    assert "model.safetensors.index.json" in refusal(saved)


def test_a_truncated_manifest_is_named(saved: Path) -> None:
    path = saved / MANIFEST_NAME
    path.write_text(path.read_text()[:-20])
    assert f"{path}: not a manifest this version can read" in refusal(saved)


def test_folders_of_other_kinds_are_refused(tmp_path: Path, saved: Path) -> None:
    assert "there is no such folder" in refusal(tmp_path / "nowhere")
    assert "it is a file, and a folder is wanted" in refusal(saved / MANIFEST_NAME)
    plain = tmp_path / "plain"
    plain.mkdir()
    save_file(ToyModel().state_dict(), plain / "model.safetensors")
    assert f"{plain}: no quantized checkpoint epmq knows; there is no epmq.json" in refusal(plain)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(format="other"), "format 'other' is not 'epmq-native'"),
        (lambda m: m.update(version=99), "version 99 .*use the epmq that wrote it"),
        (lambda m: m.pop("format"), "not a manifest"),
        (lambda m: m.pop("linears"), "not a manifest"),
        (lambda m: m.pop("sha256"), "not a manifest"),
        (lambda m: m.update(linears=3), "not a manifest"),
        (lambda m: m.update(linears={"head": {"bits": 4}}), "not a manifest"),
        (lambda m: m["linears"]["head"].update(bits=5), "linear 'head' has 5 bits"),
        (lambda m: m["linears"]["head"].update(bits=4), r"'head\.packed' has shape \[5, 3\], expected \[5, 4\]"),
        (lambda m: m["linears"]["head"].update(bits="3"), "linear 'head'"),
        (lambda m: m["linears"]["head"].update(in_features="32"), "linear 'head'"),
        (lambda m: m["linears"]["head"].update(in_features=-32), "linear 'head'"),
        (lambda m: m["linears"]["head"].update(group_size=0), "linear 'head'"),
        (lambda m: m["linears"]["head"].update(group_size=8), r"'head\.scales' has shape \[5, 2\], expected \[5, 4\]"),
        (lambda m: m["linears"]["head"].update(out_features=6), r"'head\.packed' has shape"),
        (lambda m: m["linears"].update(ghost=m["linears"]["head"]), r"there is no tensor 'ghost\.packed'"),
        (lambda m: m["sha256"].update({"../evil.safetensors": "0"}), "leaves the folder"),
    ],
)
def test_a_manifest_that_contradicts_the_tensors_is_refused(change: Any, message: str, saved: Path) -> None:
    edit_manifest(saved, change)
    with pytest.raises(FormatError, match=message):
        epmq.load(saved, ToyModel())


@pytest.mark.parametrize("text", ["[]", "null", "3", "{", "[" * 99999])
def test_a_manifest_of_another_shape_is_refused(text: str, saved: Path) -> None:
    (saved / MANIFEST_NAME).write_text(text)
    assert "not a manifest" in refusal(saved)


def test_a_packed_tensor_of_another_dtype_is_refused(tmp_path: Path) -> None:
    model = ToyModel()
    replace_linear(model, bits=3, group_size=16)
    epmq.save(model, tmp_path / "out")
    path = tmp_path / "out" / "model.safetensors"
    tensors = load_file(path)
    tensors["head.packed"] = tensors["head.packed"].float()
    save_file(tensors, path)
    edit_manifest(tmp_path / "out", lambda m: m["sha256"].update({path.name: native._digest(path)}))
    assert "'head.packed' has dtype float32, expected int32" in refusal(tmp_path / "out")


def test_a_shard_without_a_checksum_is_refused(saved: Path) -> None:
    name = shards_of(saved)[0].name
    edit_manifest(saved, lambda m: m["sha256"].pop(name))
    assert f"{name}" in refusal(saved)


def test_another_class_is_refused(saved: Path) -> None:
    assert "tensor 'blocks.2." in refusal(saved, ToyModel(depth=3))
    assert "no submodule 'blocks.1." in refusal(saved, ToyModel(depth=1))
    assert "32 -> 32 here but 16 -> 16 in the model" in refusal(saved, ToyModel(width=16))
    assert "no submodule" in refusal(saved, nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)))
    without = ToyModel()
    without.blocks[0].up = nn.Identity()
    assert "'blocks.0.up' is 32 -> 64 here but None -> None" in refusal(saved, without)
    less = ToyModel()
    del less.embedding
    assert "'embedding.weight' has no place in the model" in refusal(saved, less)


def test_a_table_of_another_size_is_refused(saved: Path) -> None:
    assert "'embedding.weight'" in refusal(saved, ToyModel(vocabulary=41))


def test_a_plain_model_must_be_given(saved: Path) -> None:
    with pytest.raises(FormatError, match="give an instance of ToyModel as model="):
        epmq.load(saved)


# -- whole or not at all ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("after", [0, 3, 20])
def test_a_save_that_fails_in_the_middle_leaves_nothing(
    after: int, error: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = ToyModel()
    replace_linear(model, group_size=16)
    original, calls = ShardWriter.add, 0

    def failing(self: ShardWriter, name: str, tensor: Tensor) -> None:
        nonlocal calls
        calls += 1
        if calls > after:
            raise error
        original(self, name, tensor)

    monkeypatch.setattr(ShardWriter, "add", failing)
    with pytest.raises(error):
        epmq.save(model, tmp_path / "out", shard_bytes=1000)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_empty_is_kept(saved: Path) -> None:
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    with pytest.raises(OutputError, match="not empty"):
        epmq.save(ToyModel(), saved)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before


def test_a_failed_disk_write_is_an_output_error(tmp_path: Path) -> None:
    model = ToyModel()
    with (
        pytest.raises(OutputError, match=r"shard-00000\.safetensors: the file cannot be written"),
        new_folder(tmp_path / "out") as working,
    ):
        (working / "shard-00000.safetensors").mkdir()  # stands where a shard goes
        epmq.api.write_result(model, working)
    assert list(tmp_path.iterdir()) == []


def test_a_name_written_twice_is_refused(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path)
    writer.add("a", torch.ones(1))
    with pytest.raises(FormatError, match="'a' is written twice"):
        writer.add("a", torch.ones(1))


def test_shards_are_filled_in_order_and_read_by_safetensors(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, shard_bytes=100)
    tensors: dict[str, Tensor] = {
        "odd": torch.arange(3, dtype=torch.uint8),
        "float": torch.randn(4, 3),
        "wide": torch.randn(2, dtype=torch.float64),
        "half": torch.randn(5).half(),
        "strided": torch.randn(4, 6)[:, ::2],
        "words": torch.arange(5, dtype=torch.int32),
        "empty": torch.zeros(0, 4),
        "flags": torch.tensor([True, False, True]),
        "scalar": torch.tensor(2.5).bfloat16(),
    }
    for name, tensor in tensors.items():
        writer.add(name, tensor)
    names = writer.finish()
    assert names == [f"model-{i + 1:05d}-of-{len(names):05d}.safetensors" for i in range(len(names))]
    assert len(names) > 1
    assert sorted(p.name for p in tmp_path.iterdir()) == [*names, "model.safetensors.index.json"]
    read = {key: tensor for name in names for key, tensor in load_file(tmp_path / name).items()}
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in tensors.values())


def test_one_shard_has_the_plain_name(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path)
    writer.add("a", torch.ones(1))
    assert writer.finish() == ["model.safetensors"]
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


def test_reader_gives_back_what_the_writer_was_told(tmp_path: Path) -> None:
    writer = NativeWriter(tmp_path, about={"class": "Thing", "note": [1, 2]})
    layer = QuantLinear.from_linear(nn.Linear(20, 3), bits=3, group_size=7)
    writer.linear("deep.layer", layer.quantized(), layer.bias)
    writer.tensor("other", torch.ones(2))
    writer.finish()
    reader = NativeReader(tmp_path)
    assert reader.manifest["class"] == "Thing"
    assert reader.manifest["note"] == [1, 2]
    assert vars(reader.linears["deep.layer"]) == {
        "in_features": 20, "out_features": 3, "bits": 3, "group_size": 7, "sym": False, "bias": True,
        "permuted": False,
    }  # fmt: skip
    tensors = dict(reader.tensors())
    assert torch.equal(tensors["deep.layer.packed"], layer.packed)
    assert sorted(tensors) == ["deep.layer.bias", "deep.layer.packed", "deep.layer.scales", "deep.layer.zeros", "other"]


def test_a_copied_folder_is_as_good(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path / "copy")
    assert_same_state(epmq.load(tmp_path / "copy", ToyModel()), epmq.load(saved, ToyModel()))


@pytest.mark.parametrize("tied", [False, True])
def test_transformers_models_are_rebuilt_from_their_configuration(tied: bool, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48
    )
    if tied:
        config = transformers.LlamaConfig(
            vocab_size=40, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
            tie_word_embeddings=True,
        )  # fmt: skip
    kind = transformers.LlamaForCausalLM if tied else transformers.BertForSequenceClassification
    model = kind(config).eval()
    replace_linear(model, group_size=16, exclude=["classifier", "lm_head"])
    epmq.save(model, tmp_path / "out")
    assert config.architectures is None
    loaded = epmq.load(tmp_path / "out")
    assert type(loaded) is kind
    if tied:
        assert loaded.lm_head.weight is loaded.model.embed_tokens.weight  # type: ignore[union-attr]
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, model(IDS).logits)
