"""A tiny job on disk: a BERT encoder with tokenizer, experts, texts, heads and the recipe that names them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from epmq.cli import main

ROOT = Path(__file__).resolve().parent.parent
WORDS = [f"w{i}" for i in range(30)]
TASKS = ("reviews", "intents")
WIDTH = 32


@dataclass
class Job:
    """Where everything is, and the recipe as a dict that a test may change before it is written."""

    folder: Path
    recipe: dict[str, Any] = field(default_factory=dict)

    def write(self) -> Path:
        path = self.folder / "recipe.yaml"
        path.write_text(yaml.safe_dump(self.recipe))
        return path

    def expert(self, task: str) -> Path:
        return self.folder / "experts" / task / "model.safetensors"

    def change_expert(self, task: str, **changes: Tensor | None) -> None:
        """Replace, add or (None) remove tensors of an expert."""
        tensors = load_file(self.expert(task))
        for name, tensor in changes.items():
            tensors.pop(name, None)
            if tensor is not None:
                tensors[name] = tensor
        save_file(tensors, self.expert(task), metadata={"format": "pt"})

    def tensor(self, task: str, name: str) -> Tensor:
        tensor: Tensor = load_file(self.expert(task))[name]
        return tensor


def make_job(folder: Path, blocks: int = 2, examples: int = 12, seed: int = 0) -> Job:
    """Experts are the base plus noise; test labels are what each expert's own head answers."""
    import transformers

    torch.manual_seed(seed)
    config = transformers.BertConfig(
        vocab_size=len(WORDS) + 4, hidden_size=WIDTH, num_hidden_layers=blocks, num_attention_heads=4,
        intermediate_size=48, max_position_embeddings=32, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    base = transformers.BertModel(config, add_pooling_layer=False).eval()
    base.save_pretrained(folder / "base")
    write_tokenizer(folder / "base")
    recipe: dict[str, Any] = {
        "base": "base",
        "experts": {},
        "merge": {"method": "task_arithmetic", "scaling": 0.4},
        "calibration": {"tasks": {}, "examples": 8, "batch_size": 4, "max_length": 16},
        "quantization": {"bits": 4, "group_size": 16},
        "evaluation": {"tasks": {}, "pooling": "mean", "max_length": 16},
    }
    for task in TASKS:
        place = folder / "experts" / task
        place.mkdir(parents=True)
        state = {n: t + 0.1 * torch.randn(t.shape) * t.std().nan_to_num(0.1) for n, t in base.state_dict().items()}
        save_file(state, place / "model.safetensors", metadata={"format": "pt"})
        weight, bias = torch.randn(3, WIDTH), torch.zeros(3)
        save_file({"weight": weight, "bias": bias}, folder / f"{task}-head.safetensors")
        lines = [json.dumps({"text": text(), "label": int(torch.randint(3, ()))}) for _ in range(examples)]
        (folder / f"{task}.jsonl").write_text("\n".join(lines) + "\n")
        recipe["experts"][task] = f"experts/{task}"
        recipe["calibration"]["tasks"][task] = f"{task}.jsonl"
        recipe["evaluation"]["tasks"][task] = {"data": f"{task}.jsonl", "head": f"{task}-head.safetensors"}
    return Job(folder, recipe)


def text() -> str:
    count = int(torch.randint(3, 14, ()))
    return " ".join(WORDS[int(i)] for i in torch.randint(len(WORDS), (count,)))


def write_tokenizer(folder: Path, words: list[str] = WORDS) -> None:
    """Words and signs of their own, [CLS] and [SEP] around them."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", None, [("[CLS]", 2), ("[SEP]", 3)])
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]"
    )
    fast.save_pretrained(folder)


def environment() -> dict[str, str]:
    """For a process of our own: this checkout's package, one thread, no network, no terminal width."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}


class Done(NamedTuple):
    """What a command line left behind."""

    code: int
    out: str
    err: str


def in_process(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> Done:
    """``epmq ARGUMENTS`` without the seconds that a new process takes to import torch."""
    capsys.readouterr()
    code = 0
    with mock.patch.object(sys, "argv", ["epmq", *map(str, arguments)]):
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
    return Done(code, *capsys.readouterr())


def in_new_process(*arguments: str | Path) -> Done:
    """``python -m epmq ARGUMENTS`` as a person runs it."""
    command = [sys.executable, "-m", "epmq", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=300, check=False)
    return Done(done.returncode, done.stdout, done.stderr)
