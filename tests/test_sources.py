"""Weight sources: a file, shards with an index, a module, a dict; and everything that can be wrong with them."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ToyModel
from safetensors.torch import save_file
from torch import Tensor, nn

from epmq.errors import SourceError
from epmq.formats.shards import ShardWriter
from epmq.sources import (
    INDEX_NAME,
    DictSource,
    FileSource,
    WeightSource,
    all_finite,
    iterate,
    open_source,
    read_finite,
    require_same_layout,
    total_bytes,
)


def tensors() -> dict[str, Tensor]:
    return {
        "a.weight": torch.randn(3, 4),
        "b.weight": torch.randn(5, 2).half(),
        "c.weight": torch.randn(7).bfloat16(),
        "d.empty": torch.zeros(0, 3),
        "e.scalar": torch.tensor(3.5, dtype=torch.float64),
        "f.steps": torch.tensor([1, 2, 3]),
        "g.mask": torch.tensor([True, False]),
    }


def write_shards(folder: Path, parts: dict[str, dict[str, Tensor]]) -> None:
    folder.mkdir(exist_ok=True)
    for name, part in parts.items():
        save_file(part, folder / name)
    index = {"weight_map": {key: name for name, part in parts.items() for key in part}}
    (folder / INDEX_NAME).write_text(json.dumps(index))


def rewrite_index(folder: Path, **entries: Any) -> None:
    index = json.loads((folder / INDEX_NAME).read_text())
    index["weight_map"].update(entries)
    (folder / INDEX_NAME).write_text(json.dumps(index))


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    content = tensors()
    names = list(content)
    first, second = ({key: content[key] for key in part} for part in (names[:3], names[3:]))
    write_shards(tmp_path / "model", {"one.safetensors": first, "two.safetensors": second})
    return tmp_path / "model"


def assert_holds(source: WeightSource, content: dict[str, Tensor]) -> None:
    assert sorted(source.keys()) == sorted(content)
    for key, tensor in content.items():
        assert source.shape(key) == tuple(tensor.shape)
        assert source.dtype(key) == tensor.dtype
        assert torch.equal(source.tensor(key), tensor)


@pytest.mark.parametrize("form", ["file", "folder", "only file of a folder", "shards", "dict", "source"])
def test_every_form_gives_the_same_tensors(form: str, tmp_path: Path) -> None:
    content = tensors()
    what: Any = content
    if form == "file":
        what = tmp_path / "weights.safetensors"
        save_file(content, what)
    elif form in ("folder", "only file of a folder"):
        what = str(tmp_path)
        save_file(content, tmp_path / ("model.safetensors" if form == "folder" else "adapter.safetensors"))
        if form == "folder":
            save_file({"head": torch.ones(1)}, tmp_path / "head.safetensors")
    elif form == "shards":
        names = list(content)
        write_shards(tmp_path / "m", {"s1.safetensors": {k: content[k] for k in names[::2]},
                                      "s2.safetensors": {k: content[k] for k in names[1::2]}})  # fmt: skip
        what = tmp_path / "m"
    elif form == "source":
        what = DictSource(content)
    source = open_source(what)
    assert_holds(source, content)
    assert total_bytes(source) == sum(t.numel() * t.element_size() for t in content.values())
    assert {key: tensor.shape for key, tensor in iterate(source)} == {k: t.shape for k, t in content.items()}


def test_a_module_is_a_source_of_its_state() -> None:
    model = ToyModel()
    source = open_source(model, "merged model")
    assert source.name == "merged model"
    assert_holds(source, model.state_dict())


def test_shards_as_written_are_read(tmp_path: Path) -> None:
    content = tensors()
    writer = ShardWriter(tmp_path, shard_bytes=64)
    for key, tensor in content.items():
        writer.add(key, tensor)
    assert len(writer.finish()) > 1
    assert_holds(FileSource(tmp_path), content)


def test_a_single_file_counts_before_an_index_as_in_transformers(shards: Path) -> None:
    """save_pretrained leaves an older index where it is, and may leave its shards."""
    save_file({"a.weight": torch.full((3, 4), 7.0)}, shards / "model.safetensors")
    assert_holds(FileSource(shards), {"a.weight": torch.full((3, 4), 7.0)})
    for name in ("one", "two"):
        (shards / f"{name}.safetensors").unlink()
    assert_holds(FileSource(shards), {"a.weight": torch.full((3, 4), 7.0)})


def test_a_tensor_read_from_a_file_belongs_to_the_caller(tmp_path: Path) -> None:
    save_file({"a": torch.ones(3)}, tmp_path / "model.safetensors")
    source = FileSource(tmp_path)
    source.tensor("a").zero_()
    assert torch.equal(source.tensor("a"), torch.ones(3))


def test_opening_reads_headers_only_once(shards: Path) -> None:
    source = FileSource(shards)
    for path in shards.glob("*.safetensors"):
        path.unlink()
    assert source.shape("a.weight") == (3, 4)
    with pytest.raises(SourceError, match=r"one\.safetensors.*'a\.weight'"):
        source.tensor("a.weight")


@pytest.mark.parametrize("method", ["tensor", "shape", "dtype"])
@pytest.mark.parametrize("form", ["file", "dict"])
def test_an_unknown_tensor_is_named(form: str, method: str, shards: Path) -> None:
    source: WeightSource = FileSource(shards) if form == "file" else DictSource(tensors(), "expert")
    with pytest.raises(SourceError, match="there is no tensor 'z'"):
        getattr(source, method)("z")


def refusal(path: Path) -> str:
    with pytest.raises(SourceError) as caught:
        FileSource(path)
    return str(caught.value)


def test_a_missing_path_is_named(tmp_path: Path) -> None:
    assert refusal(tmp_path / "nowhere") == f"{tmp_path}/nowhere: there is no such file or folder."


def test_a_folder_without_a_checkpoint_says_what_it_looked_for(tmp_path: Path) -> None:
    assert "model.safetensors" in refusal(tmp_path)
    for name in ("x", "y"):
        save_file({"a": torch.ones(1)}, tmp_path / f"{name}.safetensors")
    assert "found 2 other" in refusal(tmp_path)


@pytest.mark.parametrize("keep", [0, 4, 20, -1])
def test_a_truncated_file_is_named(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "model.safetensors"
    save_file(tensors(), path)
    path.write_bytes(path.read_bytes()[:keep])
    assert "model.safetensors: not a complete safetensors file" in refusal(tmp_path)


def test_a_file_of_another_kind_is_named(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    torch.save({"a": torch.ones(3)}, path)
    assert "not a complete safetensors file" in refusal(path)


def test_an_unsupported_dtype_is_named(tmp_path: Path) -> None:
    header = json.dumps({"a": {"dtype": "F8_E4M3", "shape": [2], "data_offsets": [0, 2]}}).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + b"\0\0")
    assert "tensor 'a' has dtype F8_E4M3" in refusal(path)


def test_a_missing_shard_is_named(shards: Path) -> None:
    (shards / "two.safetensors").unlink()
    assert "shard 'two.safetensors' is missing" in refusal(shards)


def test_a_truncated_shard_is_named(shards: Path) -> None:
    path = shards / "two.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert "two.safetensors: not a complete safetensors file" in refusal(shards)


def test_an_index_that_promises_too_much_is_refused(shards: Path) -> None:
    rewrite_index(shards, ghost="one.safetensors")
    assert "one.safetensors: the index promises tensor 'ghost'" in refusal(shards)


def test_an_index_that_names_the_wrong_shard_is_refused(shards: Path) -> None:
    rewrite_index(shards, **{"a.weight": "two.safetensors"})
    assert "two.safetensors: the index promises tensor 'a.weight'" in refusal(shards)


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "sub/one.safetensors", "..", ""])
def test_an_index_cannot_leave_the_folder(shards: Path, name: str) -> None:
    save_file({"a.weight": torch.ones(3, 4)}, shards.parent / "outside.safetensors")
    rewrite_index(shards, **{"a.weight": name})
    assert "leaves the folder" in refusal(shards) or "is missing" in refusal(shards)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": ["a"]}', "\udcff", "[" * 99999])
def test_a_broken_index_is_named(shards: Path, text: str) -> None:
    (shards / INDEX_NAME).write_bytes(text.encode("utf-8", "surrogateescape"))
    assert f"{INDEX_NAME}: not a shard index" in refusal(shards)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_nan_and_inf_are_refused(value: float, dtype: torch.dtype) -> None:
    bad = torch.ones(3, 4, dtype=dtype)
    bad[1, 2] = value
    source = DictSource({"good": torch.ones(2), "steps": torch.ones(2, dtype=torch.int64), "bad": bad}, "expert 'x'")
    assert not all_finite(bad)
    read_finite(source, "good")
    read_finite(source, "steps")
    with pytest.raises(SourceError, match="expert 'x': tensor 'bad' holds NaN or Inf"):
        read_finite(source, "bad")
    with pytest.raises(SourceError, match="'bad'"):
        list(iterate(source))


def test_an_empty_tensor_is_finite() -> None:
    assert all_finite(torch.zeros(0))


@pytest.mark.parametrize("what", [None, 3, ["a"], {"a": 3}, {"a": "text"}])
def test_other_things_are_no_source(what: Any) -> None:
    with pytest.raises(SourceError, match="expected"):
        open_source(what, "expert 'x'")


def test_layouts_are_compared_name_by_name() -> None:
    reference = DictSource({"a": torch.ones(2), "b": torch.ones(3)}, "base")

    def refusal_of(**content: Tensor) -> str:
        with pytest.raises(SourceError) as caught:
            require_same_layout(reference, {"x": DictSource(content, "folder")})
        return str(caught.value)

    two, three = torch.ones(2), torch.ones(3)
    require_same_layout(reference, {"x": DictSource({"b": three.half(), "a": two})})
    assert "expert 'x' (folder) lacks tensor 'b'" in refusal_of(a=two)
    assert "lacks tensor 'a' and 1 more" in refusal_of()
    assert "has an extra tensor 'c'" in refusal_of(a=two, b=three, c=two)
    assert "tensor 'b' has shape [2], expected [3]" in refusal_of(a=two, b=two)
    assert "tensor 'a' has shape [2, 1], expected [2]" in refusal_of(a=two.unsqueeze(1), b=three)


def test_tied_modules_are_listed_under_both_names() -> None:
    model = nn.ModuleDict({"embedding": nn.Embedding(4, 3), "head": nn.Linear(3, 4, bias=False)})
    model["head"].weight = model["embedding"].weight
    source = open_source(model)
    assert source.keys() == ["embedding.weight", "head.weight"]
