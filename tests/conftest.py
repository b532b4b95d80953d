"""Shared by all tests: one thread, fixed seeds, and small models of the kind the engine works on."""

from __future__ import annotations

import copy
import os
from dataclasses import dataclass
from typing import Any
from zlib import crc32

import pytest
import torch
from torch import Tensor, nn

from epmq import extension

torch.set_num_threads(1)
if extension.module is None:
    os.environ["EPMQ_EXTENSION"] = "0"  # where it cannot be built its absence is not told by every command
PTX_ARCH = os.environ.get("EPMQ_PTX")  # such as 90: kernels are compiled for that GPU, and their PTX is run
if PTX_ARCH:
    os.environ.pop("TRITON_INTERPRET", None)  # a worker of pytest-xdist inherits what the driver sets below
    from ptx import driver
    from ptx.machine import Watch

    driver.use(int(PTX_ARCH), Watch(hazards=True))
elif not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported: its kernels run in the interpreter here


class ToyBlock(nn.Module):
    """Pre-norm block: query and key share an input; out, up and down have one each."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.query, self.key, self.out = (nn.Linear(width, width) for _ in range(3))
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, hidden: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.norm(hidden)
        scores = torch.softmax(self.query(x) @ self.key(x).transpose(1, 2) / x.shape[-1] ** 0.5, -1)
        hidden = hidden + self.out(scores @ x)
        return hidden + self.down(torch.relu(self.up(self.norm(hidden))))


class ToyModel(nn.Module):
    """Embedding, blocks, head: logits ``[B, S, 5]`` from token ids ``[B, S]``."""

    def __init__(self, width: int = 32, depth: int = 2, vocabulary: int = 40):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(ToyBlock(width) for _ in range(depth))
        self.head = nn.Linear(width, 5)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        hidden = self.embedding(input_ids)
        for block in self.blocks:
            hidden = block(hidden, attention_mask)
        logits: Tensor = self.head(hidden)
        return logits


@dataclass
class ToyJob:
    """A base, its experts, their merge and calibration data."""

    base: nn.Module
    experts: dict[str, nn.Module]
    merged: nn.Module
    calibration: dict[str, list[dict[str, Tensor]]]


def make_toy_job(tasks: int = 3, width: int = 32, depth: int = 2, seed: int = 0, spread: float = 0.3) -> ToyJob:
    """Experts are the base plus noise in the blocks; the merge is task arithmetic with 0.4."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    base = ToyModel(width, depth)
    experts: dict[str, nn.Module] = {}
    for number in range(tasks):
        expert: ToyModel = copy.deepcopy(base)
        with torch.no_grad():
            for parameter in expert.blocks.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * spread * 0.1)
        experts[f"task{number}"] = expert
    merged = copy.deepcopy(base)
    with torch.no_grad():
        for name, parameter in merged.named_parameters():
            start = parameter.clone()
            for task in experts:
                parameter.add_(0.4 * (experts[task].get_parameter(name) - start))
    calibration = {task: toy_batches(generator) for task in experts}
    return ToyJob(base, experts, merged, calibration)


def toy_batches(generator: torch.Generator, count: int = 3) -> list[dict[str, Tensor]]:
    """Batches of 8 sequences of up to 12 tokens, padded on the right."""
    batches = []
    for _ in range(count):
        ids = torch.randint(0, 40, (8, 12), generator=generator)
        lengths = torch.randint(4, 13, (8, 1), generator=generator)
        batches.append({"input_ids": ids, "attention_mask": (torch.arange(12) < lengths).long()})
    return batches


@pytest.fixture
def toy_job() -> ToyJob:
    return make_toy_job()


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where a Triton kernel runs: interpreted or as PTX on the CPU, compiled on a GPU."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    if request.param == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("Triton compiles here, it does not interpret")
    return torch.device(request.param)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Random problems of the kernels by their seeds, ten a test; EPMQ_STRESS says how many (``make stress``)."""
    if "random_seeds" in metafunc.fixturenames:
        count = int(os.environ.get("EPMQ_STRESS", "30"))
        parts = [range(first, min(first + 10, count)) for first in range(0, count, 10)]
        metafunc.parametrize("random_seeds", parts, ids=lambda seeds: f"{seeds.start}-{seeds.stop - 1}")


# Files of minutes, the longest first: begun last, they would run while the other process has nothing left to do.
LONGEST = (
    "test_compiled.py",
    "test_world.py",
    "test_examples.py",
    "test_resume.py",
    "test_gptq_block.py",
    "test_cli.py",
)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Long files first; with EPMQ_SAMPLE=i/n the i-th of n parts of the cases of tests marked ``sampled``."""
    order = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.name, len(LONGEST)))
    if "EPMQ_SAMPLE" not in os.environ:
        return
    part, parts = map(int, os.environ["EPMQ_SAMPLE"].split("/"))
    kept: list[pytest.Item] = []
    left: list[pytest.Item] = []
    for item in items:
        away = item.get_closest_marker("sampled") and crc32(item.nodeid.encode()) % parts != part
        (left if away else kept).append(item)
    config.hook.pytest_deselected(items=left)
    items[:] = kept


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def relative_error(ours: Tensor, wanted: Tensor) -> float:
    """‖ours - wanted‖² / ‖wanted‖²."""
    return float((ours - wanted).square().sum() / wanted.square().sum())


def state_of(model: nn.Module) -> dict[str, Any]:
    """A copy of a model's state, to see that it was left alone."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}
