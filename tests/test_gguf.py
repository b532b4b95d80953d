"""GGUF: blocks as ggml reads them, and a quantized folder's codes in a file such as llama.cpp's converter makes."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import numpy
import pytest
import torch
import transformers
from click.testing import CliRunner
from gguf import MODEL_ARCH, GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter, get_tensor_name_map, quants
from tiny import KEPT, copy_of, edit_tensors, tensors_of, tiny
from torch import Tensor, nn

import epmq
from epmq import replace_linear, restore_linear
from epmq.cli import app
from epmq.config import Format
from epmq.errors import ConfigError, EpmqError, FormatError, OutputError
from epmq.formats.gguf import BLOCK_BYTES, BlockType, block_type, blocks, has_scales
from epmq.formats.packed import LinearFacts
from epmq.gguf_jobs import Summary, gguf_file
from epmq.quantized import QuantizedTensor, group_count

HALF_ULP = 2.0**-11  # of float16, relative
TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


# -- blocks ------------------------------------------------------------------------------------------------------------


def weight(bits: int, sym: bool, group: int, dtype: torch.dtype = torch.float16, columns: int = 128) -> QuantizedTensor:
    generator = torch.Generator().manual_seed(bits)
    groups = (6, group_count(columns, group))
    codes = torch.randint(0, 2**bits, (6, columns), dtype=torch.uint8, generator=generator)
    scales = (0.01 + 0.02 * torch.rand(groups, generator=generator)).to(dtype)
    zeros = torch.randint(0, 2**bits, groups, dtype=torch.uint8, generator=generator)
    return QuantizedTensor(codes, scales, None if sym else zeros, bits, group)


def facts_of(tensor: QuantizedTensor) -> LinearFacts:
    rows, columns = tensor.shape
    permuted = tensor.columns is not None
    return LinearFacts(columns, rows, tensor.bits, tensor.group_size, tensor.symmetric, False, permuted)


def read_blocks(data: Tensor, kind: str) -> Tensor:
    return torch.from_numpy(quants.dequantize(data.numpy(), GGMLQuantizationType[kind]))


@pytest.mark.parametrize("group", [32, 64, -1, 512])
@pytest.mark.parametrize(
    ("bits", "sym", "kind"),
    [
        (4, True, "Q4_0"),
        (3, True, "Q4_0"),
        (3, False, "Q4_0"),
        (2, True, "Q4_0"),
        (2, False, "Q4_0"),
        (8, True, "Q8_0"),
    ],
)
def test_blocks_are_the_very_weights(bits: int, sym: bool, kind: BlockType, group: int) -> None:
    tensor = weight(bits, sym, group)
    assert block_type([facts_of(tensor)]) == kind
    data, moved = blocks(tensor, kind)
    assert data.shape == (6, 4 * BLOCK_BYTES[kind]) and moved == 0
    assert torch.equal(read_blocks(data, kind), tensor.dequantize())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_four_bits_with_zero_points_round_the_minimum_alone(dtype: torch.dtype) -> None:
    tensor = weight(4, False, 32, dtype)
    assert block_type([facts_of(tensor)]) == "Q4_1"
    data, moved = blocks(tensor, "Q4_1")
    error = (read_blocks(data, "Q4_1") - tensor.dequantize()).abs()
    # The minimum is at most 15 steps, and so is what the rounded step is taken times.
    rounded = 15 * HALF_ULP * (1 if dtype == torch.float16 else 2)
    assert 0 < moved <= rounded
    # All of this is computed in fp32, whose errors are below a millionth of the largest weight, of 15 steps.
    assert moved == pytest.approx(float(error.max()) / float(tensor.scales.max()), abs=15e-6)


def test_the_order_of_codes_in_a_block_is_that_of_ggml() -> None:
    codes = torch.arange(32, dtype=torch.uint8).remainder(16).view(1, 32)
    codes[0, 16] = 5
    data, _ = blocks(QuantizedTensor(codes, torch.tensor([[0.5]]).half(), None, 4, 32), "Q4_0")
    assert data[0, :2].view(torch.float16).item() == 0.5
    assert data[0, 2] == 0 | 5 << 4 and data[0, 3] == 1 | 1 << 4 and data[0, 17] == 15 | 15 << 4
    signed, _ = blocks(QuantizedTensor(codes + 100, torch.tensor([[0.5]]).half(), None, 8, -1), "Q8_0")
    assert signed[0, 2:].view(torch.int8).tolist() == (codes[0].int() + 100 - 128).tolist()


def test_scales_beyond_float16_are_told_by_how_far_they_move() -> None:
    tensor = QuantizedTensor(torch.full((1, 32), 3, dtype=torch.uint8), torch.tensor([[1e6]]), None, 4, 32)
    assert not blocks(tensor, "Q4_0")[1] <= 1
    below = QuantizedTensor(torch.full((1, 32), 3, dtype=torch.uint8), torch.tensor([[-1e6]]), None, 4, 32)
    assert not blocks(below, "Q4_0")[1] <= 1
    assert not has_scales(1e6, float("inf"), "Q4_0") and not has_scales(1e-9, 1e-9, "Q4_0")
    assert has_scales(1.0, HALF_ULP, "Q8_0") and not has_scales(1.0, 1.1 * HALF_ULP, "Q8_0")
    nothing = QuantizedTensor(torch.full((1, 32), 8, dtype=torch.uint8), torch.tensor([[1e-12]]), None, 4, 32)
    assert blocks(nothing, "Q4_0")[1] == 0


@pytest.mark.parametrize(
    ("linears", "wanted"),
    [
        ([LinearFacts(64, 8, 4, 32, True, False), LinearFacts(64, 8, 4, 32, False, False)], "Q4_1"),
        ([LinearFacts(64, 8, 4, 32, True, False), LinearFacts(64, 8, 8, 32, True, False)], "Q8_0"),
        ([LinearFacts(64, 8, 4, 32, False, False), LinearFacts(64, 8, 8, 32, True, False)], "Q8_0"),
        ([LinearFacts(64, 8, 8, 32, False, False)], "zero points"),
        ([LinearFacts(64, 8, 4, 48, True, False)], "groups of 48"),
        ([LinearFacts(48, 8, 4, -1, True, False)], "rows of 48"),
        ([LinearFacts(64, 8, 4, 32, True, False, True)], "not neighbours"),
    ],
)
def test_the_smallest_type_that_holds_all_rows_is_taken(linears: list[LinearFacts], wanted: str) -> None:
    found = block_type(linears)
    assert found == wanted if wanted in get_args(BlockType) else wanted in found


# -- files -------------------------------------------------------------------------------------------------------------


def llama(
    folder: Path, dtype: torch.dtype = torch.float32, format: Format = "compressed-tensors", **settings: Any
) -> Path:
    """A quantized folder: four bits, symmetric, groups of 32 unless said otherwise."""
    model = tiny("llama").to(dtype)
    replace_linear(model, **{"bits": 4, "group_size": 32, "sym": True, "exclude": KEPT, **settings})
    epmq.save(model, folder, format=format)
    return folder


def interleaved(weight: Tensor, heads: int) -> Tensor:
    """Rows of queries and keys as llama.cpp's rotary positions of a Llama take them."""
    return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def convert(model: nn.Module, path: Path, kind: str = "F16", **more: Any) -> Path:
    """What convert_hf_to_gguf.py makes of a Llama: matrices in ``kind``, queries and keys interleaved."""
    names = get_tensor_name_map(MODEL_ARCH.LLAMA, 2)
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_context_length(2048)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_dimension_count(16)
    writer.add_vocab_size(64)
    writer.add_array("general.tags", ["a", "b"])
    for name, tensor in {**model.state_dict(), **more}.items():
        kept = tensor.float()
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            kept = interleaved(kept, 4 if "q_proj" in name else 2)
        raw = GGMLQuantizationType[kind if kept.dim() > 1 else "F32"]
        data = quants.quantize(kept.numpy(), raw)
        writer.add_tensor(names.get_name(name, (".weight", ".bias")) or name, data, raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def plain(folder: Path) -> nn.Module:
    """The folder's model with ordinary linears that hold the very weights."""
    model: nn.Module = epmq.load(folder, dtype="float32")
    restore_linear(model)
    return model


def contents(path: Path) -> dict[str, tuple[str, Tensor]]:
    """Type and values of each tensor."""
    return {
        tensor.name: (tensor.tensor_type.name, torch.tensor(quants.dequantize(tensor.data, tensor.tensor_type)))
        for tensor in GGUFReader(path).tensors
    }


def made(folder: Path, tmp_path: Path, kind: str = "F16", **more: Any) -> tuple[Path, Summary]:
    wide = convert(plain(folder), tmp_path / "wide.gguf", kind, **more)
    return tmp_path / "q4.gguf", gguf_file(folder, wide, tmp_path / "q4.gguf")


@pytest.mark.parametrize("kind", ["F16", "BF16", "F32"])
@pytest.mark.parametrize("format", ["compressed-tensors", "gptq", "native"])
def test_every_linear_is_found_and_holds_the_very_weights(format: Format, kind: str, tmp_path: Path) -> None:
    folder = llama(tmp_path / "folder", torch.float16, format)
    out, summary = made(folder, tmp_path, kind)
    assert len(summary.packed) == 14 and set(summary.packed.values()) == {"Q4_0"}
    assert not summary.wide and not summary.absent and summary.moved == 0
    before, after = contents(tmp_path / "wide.gguf"), contents(out)
    names = get_tensor_name_map(MODEL_ARCH.LLAMA, 2)
    for name, tensor in plain(folder).state_dict().items():
        inside = names.get_name(name, (".weight",)) or ""
        if inside not in summary.packed:
            assert after[inside][0] == before[inside][0]
            assert torch.equal(after[inside][1], before[inside][1])
            continue
        wanted = interleaved(tensor, 4 if "q_proj" in name else 2) if "q_proj" in name or "k_proj" in name else tensor
        assert after[inside][0] == "Q4_0" and torch.equal(after[inside][1], wanted)
    assert list(before) == list(after)
    told, kept = GGUFReader(out).fields, GGUFReader(tmp_path / "wide.gguf").fields
    assert {name: field.contents() for name, field in kept.items() if not name.startswith("GGUF.")}.items() <= {
        name: field.contents() for name, field in told.items()
    }.items()
    assert told["general.file_type"].contents() == 2 and told["general.quantized_by"].contents().startswith("epmq ")
    assert summary.bytes_after == out.stat().st_size < summary.bytes_before


def test_transformers_reads_the_same_model(tmp_path: Path) -> None:
    folder = llama(tmp_path / "folder", torch.float16)
    made(folder, tmp_path, "F32")
    read = transformers.LlamaForCausalLM.from_pretrained(tmp_path, gguf_file="q4.gguf", dtype=torch.float32)
    wanted, found = plain(folder).state_dict(), read.state_dict()
    assert {name for name in wanted if not torch.equal(wanted[name], found[name])} == set()


def test_a_model_that_was_unpacked_and_saved_is_found_too(tmp_path: Path) -> None:
    folder = llama(tmp_path / "folder", torch.bfloat16)
    model = epmq.load(folder)
    restore_linear(model)
    assert model.dtype == torch.bfloat16
    summary = gguf_file(folder, convert(model, tmp_path / "wide.gguf", "BF16"), tmp_path / "q4.gguf")
    assert len(summary.packed) == 14
    with pytest.raises(FormatError, match="restore_linear makes of it in float32"):
        gguf_file(folder, convert(model, tmp_path / "f16.gguf", "F16"), tmp_path / "other.gguf")


def test_bits_and_grids_may_differ_from_linear_to_linear(tmp_path: Path) -> None:
    model = tiny("llama")
    for start, settings in {
        "model.layers.0.self_attn": {"bits": 4, "sym": False},
        "model.layers.0.mlp": {"bits": 8, "sym": True},
        "model.layers.1.self_attn": {"bits": 2, "sym": False},
        "model.layers.1.mlp": {"bits": 8, "sym": False},
    }.items():
        others = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and start not in name]
        replace_linear(model, group_size=32, exclude=others, **settings)  # type: ignore[arg-type]
    epmq.save(model, tmp_path / "folder")
    out, summary = made(tmp_path / "folder", tmp_path, "F32")
    kinds = {name: kind for name, (kind, _) in contents(out).items()}
    assert [kinds[f"blk.0.{leaf}.weight"] for leaf in ("attn_q", "ffn_up")] == ["Q4_1", "Q8_0"]
    assert [kinds[f"blk.1.{leaf}.weight"] for leaf in ("attn_q", "ffn_up")] == ["Q4_0", "F32"]
    assert sorted(summary.wide) == [f"blk.1.ffn_{leaf}.weight" for leaf in ("down", "gate", "up")]
    assert "sym: true" in "\n".join(summary.lines())
    # Scales are the model's float32 here.
    assert 0 < summary.moved <= 128 * HALF_ULP


def test_rows_of_several_linears_make_one_tensor(tmp_path: Path) -> None:
    """As fused queries, keys and values, and as the experts of a mixture."""
    folder = llama(tmp_path / "folder", torch.float16)
    state = plain(folder).state_dict()
    ups = [state[f"model.layers.{block}.mlp.up_proj.weight"] for block in (0, 1)]
    fused = torch.cat([state[f"model.layers.1.self_attn.{part}_proj.weight"] for part in ("v", "q", "k")])
    half = torch.cat([ups[0], torch.randn(8, 64)])
    more = {"blk.9.ffn_up_exps.weight": torch.stack(ups), "blk.9.attn_qkv.weight": fused, "blk.9.half.weight": half}
    out, summary = made(folder, tmp_path, "F16", **more)
    after = contents(out)
    for name in ("blk.9.ffn_up_exps.weight", "blk.9.attn_qkv.weight"):
        assert after[name][0] == "Q4_0" and torch.equal(after[name][1], more[name])
    assert after["blk.9.half.weight"][0] == "F16"
    assert summary.wide == {"blk.9.half.weight": "8 of its 104 rows are not the folder's"}


def with_rows_of_zeros(folder: Path, share: float) -> None:
    """As pruned models have; the first linear in 8 bits, the others in 4."""
    model = tiny("llama")
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.weight[: round(share * len(module.weight))] = 0.0
    first = "layers.0.self_attn.q_proj"
    replace_linear(model, 8, 32, True, include=first)
    replace_linear(model, 4, 32, True, exclude=(*KEPT, first))
    epmq.save(model, folder)


@pytest.mark.parametrize("share", [0.25, 0.6])
def test_rows_that_are_alike_are_of_the_linear_that_has_the_others(share: float, tmp_path: Path) -> None:
    with_rows_of_zeros(tmp_path / "folder", share)
    own = plain(tmp_path / "folder").state_dict()["model.layers.1.mlp.up_proj.weight"]
    own = own[own.any(1)].repeat(200, 1)[:6000]
    strange = torch.randn(4000, 64, generator=torch.Generator().manual_seed(0))
    more = {"blk.9.mixed.weight": torch.cat([torch.zeros(3000, 64), own, strange])}
    _, summary = made(tmp_path / "folder", tmp_path, "F32", **more)
    kinds = {name: kind for name, kind in summary.packed.items() if kind != "Q4_0"}
    assert kinds == {"blk.0.attn_q.weight": "Q8_0"} and len(summary.packed) == 14 and not summary.absent
    assert summary.wide == {"blk.9.mixed.weight": "4000 of its 13000 rows are not the folder's"}


def test_zeros_alone_are_nobodys(tmp_path: Path) -> None:
    """llama.cpp adds biases and token types, and adds no blocks."""
    with_rows_of_zeros(tmp_path / "folder", 0.25)
    more = {"token_types.weight": torch.zeros(2, 64), "blk.0.attn_q.bias": torch.zeros(64)}
    out, summary = made(tmp_path / "folder", tmp_path, "F16", **more)
    after = contents(out)
    assert after["token_types.weight"][0] == "F16" and after["blk.0.attn_q.bias"][0] == "F32"
    assert len(summary.packed) == 14 and not summary.wide


def test_all_that_a_file_may_hold_is_kept(tmp_path: Path) -> None:
    folder, wide = llama(tmp_path / "folder"), tmp_path / "wide.gguf"
    convert(plain(folder), wide)
    whole = GGUFReader(wide)
    writer = GGUFWriter(tmp_path / "odd.gguf", "llama")
    writer.data_alignment = 256
    writer.add_custom_alignment(256)
    writer.add_array("a.bools", [True, False])
    writer.add_key_value("a.bytes", [1, 2], GGUFValueType.ARRAY, GGUFValueType.UINT8)
    writer.add_string("a.text", "")
    writer.add_int16("split.count", 1)
    for tensor in whole.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    narrow = quants.quantize(numpy.ones((2, 64), numpy.float32), GGMLQuantizationType.BF16)
    writer.add_tensor("narrow", narrow, raw_dtype=GGMLQuantizationType.BF16)
    writer.add_tensor("numbers", numpy.arange(7, dtype=numpy.int32))
    writer.add_tensor("last", numpy.ones(1, numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    summary = gguf_file(folder, tmp_path / "odd.gguf", tmp_path / "out.gguf")
    assert len(summary.packed) == 14
    before, after = GGUFReader(tmp_path / "odd.gguf"), GGUFReader(tmp_path / "out.gguf")
    for name, field in before.fields.items():
        if not name.startswith("GGUF."):
            assert (after.fields[name].contents(), after.fields[name].types) == (field.contents(), field.types)
    kept = [tensor for tensor in before.tensors if tensor.name not in summary.packed]
    found = {tensor.name: tensor for tensor in after.tensors}
    for tensor in kept:
        assert found[tensor.name].tensor_type == tensor.tensor_type
        assert numpy.array_equal(found[tensor.name].data, tensor.data)


def test_linears_that_the_file_lacks_are_told(tmp_path: Path) -> None:
    folder = llama(tmp_path / "folder")
    model = plain(folder)
    del model.get_submodule("model.layers.1.mlp").down_proj
    summary = gguf_file(folder, convert(model, tmp_path / "wide.gguf"), tmp_path / "q4.gguf")
    assert summary.absent == ["model.layers.1.mlp.down_proj"] and len(summary.packed) == 13
    assert "other matrices stay as they are, 0.0 MiB: token_embd.weight, output.weight" in summary.lines()
    assert summary.lines()[-1].startswith("1 of the folder's quantized linears are not in it")


def test_embeddings_and_head_are_rounded_as_ggml_does(tmp_path: Path) -> None:
    folder = llama(tmp_path / "folder")
    wide = convert(plain(folder), tmp_path / "wide.gguf")
    arguments = ["gguf", str(folder), str(wide), "--out", str(tmp_path / "q4.gguf"), "--embeddings", "q8_0"]
    told = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert told.exit_code == 0 and "tensors: 14 as Q4_0, 2 as Q8_0; " in told.output and "stay" not in told.output
    before, after = contents(wide), contents(tmp_path / "q4.gguf")
    for name in ("token_embd.weight", "output.weight"):
        wanted = quants.dequantize(
            quants.quantize(before[name][1].numpy(), GGMLQuantizationType.Q8_0), GGMLQuantizationType.Q8_0
        )
        assert after[name][0] == "Q8_0" and numpy.array_equal(after[name][1], wanted)


@pytest.fixture
def job(tmp_path: Path) -> Iterator[tuple[Path, Path, Path]]:
    """Folder, wide file, and a place for the result, where nothing may be left."""
    folder = llama(tmp_path / "folder")
    out = tmp_path / "out" / "q4.gguf"
    out.parent.mkdir()
    yield folder, convert(plain(folder), tmp_path / "wide.gguf"), out
    assert not list(out.parent.iterdir())


def refused(error: type[EpmqError], match: str, job: tuple[Path, Path, Path]) -> None:
    with pytest.raises(error, match=match):
        gguf_file(*job)


def test_files_that_do_not_belong_together_are_refused(job: tuple[Path, Path, Path], tmp_path: Path) -> None:
    folder, wide, out = job
    other = convert(tiny("llama"), tmp_path / "other.gguf")
    refused(FormatError, r"other\.gguf: it has no row of a quantized linear of .*folder", (folder, other, out))
    refused(FormatError, "no quantized checkpoint epmq knows", (tmp_path / "out", wide, out))
    refused(FormatError, r"wide\.gguf: it is a file, and a folder is wanted", (wide, folder, out))
    packed = tmp_path / "packed.gguf"
    gguf_file(folder, wide, packed, "Q8_0")
    refused(FormatError, "matrices that are Q4_0, Q8_0 already", (folder, packed, out))
    grouped = llama(tmp_path / "grouped", group_size=16)
    wide = convert(plain(grouped), tmp_path / "grouped.gguf")
    refused(FormatError, "can be packed, .* because its groups of 16", (grouped, wide, out))


@pytest.mark.parametrize("spoil", ["cut", "other", "folder", "absent"])
def test_what_is_no_whole_gguf_file_is_refused(spoil: str, job: tuple[Path, Path, Path]) -> None:
    folder, wide, out = job
    content = wide.read_bytes()
    wide.unlink()
    if spoil == "folder":
        wide.mkdir()
    elif spoil != "absent":
        wide.write_bytes(content[:-100] if spoil == "cut" else b"no gguf" * 100)
    refused(FormatError, r"wide\.gguf", (folder, wide, out))


@pytest.mark.parametrize(("count", "match"), [(2, "llama-gguf-split --merge"), ("many", "no GGUF file")])
def test_a_part_of_a_split_file_is_refused(count: int | str, match: str, job: tuple[Path, Path, Path]) -> None:
    folder, wide, out = job
    writer = GGUFWriter(wide, "llama")
    writer.add_key_value("split.count", count, GGUFValueType.STRING if isinstance(count, str) else GGUFValueType.UINT16)
    writer.add_tensor("a", numpy.zeros((2, 32), numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    refused(FormatError, match, (folder, wide, out))


@pytest.mark.parametrize("factor", [1e9, 1e-9])
def test_a_linear_whose_scales_float16_lacks_stays_wide(
    factor: float, job: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    folder = copy_of(job[0], tmp_path / "odd")
    name = "model.layers.1.mlp.up_proj.weight_scale"
    edit_tensors(folder, {name: tensors_of(folder)[name] * factor})
    wide = convert(plain(folder), tmp_path / "odd.gguf", "F32")
    summary = gguf_file(folder, wide, tmp_path / "q4.gguf")
    assert summary.wide == {"blk.1.ffn_up.weight": "its scales are too large or too small for float16"}
    assert len(summary.packed) == 13 and summary.moved <= 8 * HALF_ULP
    assert torch.equal(
        contents(tmp_path / "q4.gguf")["blk.1.ffn_up.weight"][1], contents(wide)["blk.1.ffn_up.weight"][1]
    )


def test_a_folder_without_codes_is_refused(job: tuple[Path, Path, Path], tmp_path: Path) -> None:
    epmq.save(tiny("llama"), tmp_path / "none", format="native")
    refused(FormatError, "none: nothing in it is quantized", (tmp_path / "none", *job[1:]))


def test_a_folder_in_place_of_the_file_is_refused(job: tuple[Path, Path, Path], tmp_path: Path) -> None:
    refused(OutputError, "folder: there is a folder of that name", (*job[:2], job[0]))


@pytest.mark.parametrize("missing", [1, 200, 5000])
def test_a_disk_that_takes_not_all_is_told(missing: int, job: tuple[Path, Path, Path], tmp_path: Path) -> None:
    size = gguf_file(*job[:2], tmp_path / "whole.gguf").bytes_after
    limit = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({size - missing},) * 2)"
    command = f"{limit}; from epmq.cli import main; main()"
    arguments = ["gguf", str(job[0]), str(job[1]), "--out", str(job[2])]
    done = subprocess.run([sys.executable, "-c", command, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert re.search(r"q4\.gguf: the file would pass the size limit: [\d,]+ bytes are needed", done.stderr)


def test_a_folder_for_the_file_is_made(tmp_path: Path) -> None:
    folder = llama(tmp_path / "folder")
    gguf_file(folder, convert(plain(folder), tmp_path / "wide.gguf"), tmp_path / "a" / "b" / "q4.gguf")
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["q4.gguf"]


def test_no_file_is_overwritten(job: tuple[Path, Path, Path], tmp_path: Path) -> None:
    before = job[1].read_bytes()
    refused(OutputError, r"wide\.gguf: there is a file of that name", (*job[:2], job[1]))
    assert job[1].read_bytes() == before


def test_without_the_package_gguf_it_is_named(job: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    refused(ConfigError, r"epmq\[gguf\]", job)
