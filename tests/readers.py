"""Every reader of files with a small good folder, for tests/fuzz.py: what is written, what may be spoilt, a call."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from checkpoints import write_tokenizer
from safetensors.torch import save_file
from small_runs import PLACES, forge, read_forged, read_journal, read_statistics, write_journal, write_statistics
from torch import nn

import epmq
from epmq.adapters import AdapterSource
from epmq.config import QuantConfig
from epmq.data import read_jsonl
from epmq.evaluate import load_task
from epmq.formats.kinds import open_reader
from epmq.huggingface import skeleton_from_folder, stop_tokens, tokenizer_from_folder
from epmq.mergekit import read_mergekit
from epmq.page.document import document
from epmq.papers.run import read_results as read_paper_results
from epmq.papers.run import tables
from epmq.papers.settings import read_paper
from epmq.quantized import pack
from epmq.recipe import read_recipe
from epmq.report import read_report, read_results
from epmq.sources import DictSource, FileSource, total_bytes

TENSORS = {
    "a.weight": torch.arange(12.0).reshape(3, 4), "b.weight": torch.ones(2, 2).half(), "c": torch.ones(3).bfloat16(),
    "d": torch.zeros(0, 3), "e": torch.tensor(3.5, dtype=torch.float64), "f": torch.tensor([1, 2]),
    "g": torch.tensor([True]),
}  # fmt: skip


@dataclass(frozen=True)
class Reader:
    """write: makes the good folder. spoilt: the files in it that are changed. read: raises EpmqError or nothing.
    share: of the inputs, against the others. mend: what else has to be changed with a file."""

    write: Callable[[Path], None]
    spoilt: tuple[str, ...]
    read: Callable[[Path], Any]
    share: int = 4
    mend: dict[str, Callable[[Path], None]] = field(default_factory=dict)


def _all(source: Any) -> None:
    total_bytes(source)
    for key in source.keys():
        source.tensor(key)


def _write_file(folder: Path) -> None:
    save_file(TENSORS, folder / "model.safetensors", metadata={"format": "pt"})


def _write_shards(folder: Path) -> None:
    names = list(TENSORS)
    parts = {"one.safetensors": names[:3], "two.safetensors": names[3:]}
    for file, keys in parts.items():
        save_file({key: TENSORS[key] for key in keys}, folder / file)
    index = {"metadata": {"total_size": 1}, "weight_map": {key: file for file, keys in parts.items() for key in keys}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _model() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 4), nn.LayerNorm(4), nn.Linear(4, 3, bias=False))


def _write_native(folder: Path) -> None:
    model = _model()
    epmq.replace_linear(model, bits=3, group_size=4)
    epmq.save(model, folder / "saved", format="native")
    for path in (folder / "saved").iterdir():
        path.rename(folder / path.name)


def _mend_native(folder: Path) -> None:
    """The checksum is no secret: whoever changes a shard changes it too."""
    manifest = json.loads((folder / "epmq.json").read_text())
    manifest["sha256"] = {"model.safetensors": hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()}
    (folder / "epmq.json").write_text(json.dumps(manifest))


def _forge(folder: Path, name: str) -> None:
    forge(folder / name)


def _write_compressed(folder: Path) -> None:
    codes = torch.arange(64, dtype=torch.uint8).reshape(8, 8) % 16
    save_file(
        {
            "m.weight_packed": pack(codes, 4), "m.weight_scale": torch.ones(8, 2), "m.weight_shape": torch.tensor([8,
            8]),
            "m.weight_zero_point": pack(codes[:2], 4).T.contiguous(), "m.weight_g_idx": torch.tensor([0, 1] * 4),
            "m.bias": torch.ones(8), "norm.weight": torch.ones(8),
        },
        folder / "model.safetensors",
    )  # fmt: skip
    weights = {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "group", "group_size": 4}
    group = {"targets": ["re:.*m$"], "format": "pack-quantized", "weights": weights, "input_activations": None}
    settings = {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
        "config_groups": {"group_0": group}, "ignore": [],
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": settings}))


def _write_gptq(folder: Path) -> None:
    codes = torch.arange(32 * 8, dtype=torch.int64).reshape(8, 32).to(torch.uint8) % 16
    save_file(
        {
            "m.qweight": pack(codes, 4).T.contiguous(), "m.scales": torch.ones(2, 8).half(), "m.bias": torch.ones(8),
            "m.qzeros": pack(torch.full((2, 8), 7, dtype=torch.uint8), 4), "m.g_idx": torch.tensor([0, 1] * 16).int(),
            "norm.weight": torch.ones(8),
        },
        folder / "model.safetensors",
    )  # fmt: skip
    settings = {"quant_method": "gptq", "bits": 4, "group_size": 16, "sym": True, "checkpoint_format": "gptq"}
    (folder / "config.json").write_text(json.dumps({"quantization_config": settings}))


def _read_packed(folder: Path) -> None:
    reader = open_reader(folder)
    reader.names()
    list(reader.tensors())


def _write_config(folder: Path) -> None:
    import transformers

    sizes: dict[str, Any] = {
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 8,
        "vocab_size": 9,
    }
    config = transformers.BertConfig(**sizes, max_position_embeddings=8, architectures=["BertModel"])
    config.save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 2], "max_length": 20}))


def _write_adapter(folder: Path) -> None:
    save_file(
        {
            f"base_model.model.a.lora_{part}.weight": torch.ones(*shape)
            for part, shape in {"A": (2, 4), "B": (3, 2)}.items()
        },
        folder / "adapter_model.safetensors",
    )
    config = {
        "peft_type": "LORA", "r": 2, "lora_alpha": 4, "bias": "none", "rank_pattern": {"a": 2},
        "alpha_pattern": {"z.*": 3},
        "target_modules": ["a"], "modules_to_save": None, "use_rslora": False, "fan_in_fan_out": False,
        "init_lora_weights": True, "base_model_name_or_path": "org/base", "task_type": None, "use_dora": False,
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))


def _write_recipe(folder: Path) -> None:
    for name in ("base", "x", "y"):
        (folder / name).mkdir()
    for name in ("x.jsonl", "head.safetensors"):
        (folder / name).write_text("")
    (folder / "recipe.yaml").write_text(
        yaml.safe_dump(
            {
                "base": "base", "experts": {"x": "x", "y": "y"},
                "merge": {"method": "ties", "dialect": "mergekit", "weights": {"x": [0.1, 1], "y": 2}, "density": 0.5},
                "calibration": {"tasks": {"x": "x.jsonl"}, "examples": 8, "max_length": 16, "seed": 3},
                "quantization": {"bits": 4, "group_size": 16, "anchor": "auto", "include": [".*x"], "preset": "best",
                                 "overrides": {"q$": {"bits": 8}}, "distill": {"steps": 3}},
                "evaluation": {"tasks": {"x": {"data": "x.jsonl", "head": "head.safetensors"}}, "pooling": "mean"},
                "format": "native", "device": "cpu", "shard_bytes": 1000,
            }
        )
    )  # fmt: skip


def _read_recipe(folder: Path) -> None:
    recipe = read_recipe(folder / "recipe.yaml")
    recipe.model_dump(mode="json")
    for name in ("encoder.layer.0.query", "a" * 60):
        recipe.quantization.selects(name)
        recipe.quantization.override_of(name)
    if recipe.merge is not None:
        recipe.merge.check_experts(recipe.experts)
        recipe.merge.over(["layers.0.a", "layers.1.a"])("layers.1.a")


def _write_mergekit(folder: Path) -> None:
    for name in ("base", "x", "y"):
        (folder / name).mkdir()
    content = {
        "merge_method": "ties", "base_model": str(folder / "base"), "dtype": "bfloat16",
        "parameters": {"normalize": True, "lambda": 0.5, "density": [0.2, 0.5]},
        "models": [
            {"model": str(folder / "x"), "parameters": {"weight": [{"filter": "mlp", "value": 0.5}, {"value": 1}]}},
            {"model": str(folder / "y"), "parameters": {"weight": 0.3}},
        ],
    }  # fmt: skip
    (folder / "merge.yml").write_text(yaml.safe_dump(content))


def _write_jsonl(folder: Path) -> None:
    rows = [{"text": f"some words {i}", "label": i % 3, "more": [1.5, None, {"a": "b"}]} for i in range(4)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    save_file({"weight": torch.ones(3, 4), "bias": torch.ones(3)}, folder / "head.safetensors")


def _read_jsonl(folder: Path) -> None:
    def tokenizer(texts: list[str], **options: Any) -> dict[str, list[list[int]]]:
        return {"input_ids": [list(text.encode()) for text in texts]}

    read_jsonl(folder / "data.jsonl", 2)
    load_task(tokenizer, folder / "data.jsonl", folder / "head.safetensors", 16)


def _write_report(folder: Path) -> None:
    row = {
        "linear": "blocks.0.q", "shape": [4, 8], "lambda": 0.1, "damp": 0.0, "escalated": False, "seconds": 0.1,
        "tasks": {"x": {"epmq": 0.1, "gptq": 0.2}},
    }  # fmt: skip
    block = {"block": "blocks.0", "seconds": 0.2, "hidden_error": {"x": 0.1}}
    report = {
        "settings": QuantConfig().model_dump(mode="json"), "seconds": 1.5, "peak_memory_bytes": 1000,
        "bytes": {"merged": 100, "quantized": 30}, "machine": {"processor": "p", "threads": 1}, "escalated": [],
        "average_error": {"x": {"epmq": 0.1}}, "layers": [row, {**row, "linear": "blocks.0.k"}], "blocks": [block],
        "notes": ["a note"], "stages": {"distill": {"steps": 3, "first_loss": 1.0, "last_loss": 0.5, "pairs": [["x",
        "y"]]}},
    }  # fmt: skip
    (folder / "report.json").write_text(json.dumps(report))
    results = {"rows": [{"merge": "ties", "method": "epmq", "bits": 4, "average": 90.0, "tasks": {"x": 90.0}}]}
    (folder / "results.json").write_text(json.dumps(results))


def _write_paper(folder: Path) -> None:
    content = {
        "title": "t", "kind": "glue", "base": "org/base", "experts": {"x": "org/x"}, "data": {"x": {"path": "p",
        "subset": "s"}},
        "merge": {"method": "task_arithmetic", "scaling": 0.3}, "rows": [{"method": "merged"}, {"method": "epmq",
        "bits": 4}],
        "published": [{"method": "merged", "average": 80.5, "tasks": {"x": 80.5}, "source": "s"}],
        "quantization": {"sym": True},
    }  # fmt: skip
    (folder / "paper.yaml").write_text(yaml.safe_dump(content))
    paper = read_paper(folder / "paper.yaml")
    results = read_paper_results(paper, folder)
    results["rows"] = [{"merge": "t", "method": "merged", "bits": None, "average": 80.0, "tasks": {"x": 80.0}}]
    (folder / "results.json").write_text(json.dumps(results))


def _read_paper(folder: Path) -> None:
    paper = read_paper(folder / "paper.yaml")
    tables(paper, read_paper_results(paper, folder))


READERS = {
    "safetensors": Reader(_write_file, ("model.safetensors",), lambda f: _all(FileSource(f)), 12),
    "shards": Reader(
        _write_shards, ("model.safetensors.index.json", "one.safetensors"), lambda f: _all(FileSource(f)), 8
    ),
    "native": Reader(
        _write_native,
        ("epmq.json", "model.safetensors"),
        lambda f: epmq.load(f, _model().to("meta")),
        8,
        {"model.safetensors": _mend_native},
    ),
    "compressed-tensors": Reader(_write_compressed, ("config.json", "model.safetensors"), _read_packed, 10),
    "gptq": Reader(_write_gptq, ("config.json", "model.safetensors"), _read_packed, 10),
    "adapter": Reader(
        _write_adapter,
        ("adapter_config.json", "adapter_model.safetensors"),
        lambda f: _all(AdapterSource(f, DictSource({"a.weight": torch.ones(3, 4), "b": torch.ones(2)}, "base"))),
        10,
    ),
    "recipe": Reader(_write_recipe, ("recipe.yaml",), _read_recipe, 8),
    "mergekit": Reader(_write_mergekit, ("merge.yml",), lambda f: read_mergekit(f / "merge.yml"), 8),
    "jsonl": Reader(_write_jsonl, ("data.jsonl", "data.jsonl", "head.safetensors"), _read_jsonl, 10),
    "report": Reader(
        _write_report, ("report.json", "results.json"), lambda f: document(read_report(f), read_results(f)), 8
    ),
    "paper": Reader(_write_paper, ("paper.yaml", "results.json"), _read_paper, 6),
    "statistics": Reader(write_statistics, ("statistics.json", "model.safetensors"), read_statistics, 4),
    "journal": Reader(write_journal, tuple(PLACES), read_journal, 4),
    "journal-forged": Reader(
        write_journal,
        tuple(PLACES)[1:],
        read_forged,
        4,
        {name: partial(_forge, name=name) for name in tuple(PLACES)[1:]},
    ),
    "config": Reader(_write_config, ("config.json",), lambda f: skeleton_from_folder(f, {"a"}), 1),
    "generation": Reader(_write_config, ("generation_config.json",), stop_tokens, 1),
    "tokenizer": Reader(
        lambda f: write_tokenizer(f, ["a", "b"]), ("tokenizer.json", "tokenizer_config.json"), tokenizer_from_folder, 1
    ),
}
