"""A block that takes outputs of finished modules from the store gives what it gives without, and runs them once."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from epmq.config import QuantConfig
from epmq.estimate import work_bytes
from epmq.pipeline import ModuleSink, run
from epmq.reuse import OutputStore
from epmq.skeleton import meta_copy
from epmq.sources import DictSource
from epmq.surroundings import Surroundings
from epmq.walk import Walk


class Counted(nn.Linear):
    """A linear that counts its runs."""

    runs = 0

    def forward(self, x: Tensor) -> Tensor:
        self.runs += 1
        return super().forward(x)


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = Counted(4, 4), Counted(4, 4)

    def forward(self, x: Tensor, cache: Any = None) -> tuple[Tensor, None]:
        return self.two(torch.tanh(self.one(x))), None


class Block(nn.Module):
    """A finished part, called once inside ``inner`` and ``inner.one`` once more beside it, then the last linear."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.last = Inner(), Counted(4, 4)
        self.cache: Any = None
        self.writes = False

    def forward(self, x: Tensor) -> Tensor:
        inside, _ = self.inner(x, self.cache)
        beside = self.inner.one(2.0 * x)
        if self.writes:
            inside.add_(1.0)
        result: Tensor = self.last(inside + beside)
        return result


X = torch.arange(8.0).view(2, 4) / 8


def runs(block: Block) -> list[int]:
    return [block.inner.one.runs, block.inner.two.runs, block.last.runs]


def again(block: Block, store: OutputStore, x: Tensor = X, batch: object = 0) -> list[int]:
    """One run with the store, held to one without; how often each linear ran."""
    wanted = block(x)
    before = runs(block)
    with store.active(batch):
        assert torch.equal(block(x), wanted)
    return [now - then for now, then in zip(runs(block), before, strict=True)]


def test_finished_modules_run_once() -> None:
    block = Block()
    store = OutputStore(block, ["last"])
    assert again(block, store) == [2, 1, 1]
    # The part inside is answered as a whole; the call beside it keeps its own answer; what is pending runs.
    assert again(block, store) == [0, 0, 1]
    assert again(block, store, X + 1.0, "another batch") == [2, 1, 1]
    store.settle(["last"])
    assert again(block, store) == [0, 0, 1]
    assert again(block, store) == [0, 0, 0]


def test_nothing_after_a_module_that_will_change_is_kept() -> None:
    block = Block()
    store = OutputStore(block, ["inner.one"])
    assert again(block, store) == [2, 1, 1]
    with torch.no_grad():
        block.inner.one.weight.mul_(2.0)
    assert again(block, store) == [2, 1, 1]


def test_what_the_block_writes_into_is_computed_again() -> None:
    block = Block()
    block.writes = True
    store = OutputStore(block, ["last"])
    with torch.no_grad():
        again(block, store)
        again(block, store)
        # The part inside and its last linear give the tensor that is written into; its first one's is kept.
        assert again(block, store) == [0, 1, 1]


def test_a_module_that_is_handed_a_cache_is_not_answered_but_its_linears_are() -> None:
    block = Block()
    block.cache = object()
    store = OutputStore(block, ["last"])
    again(block, store)
    calls: list[Any] = []
    block.inner.register_forward_hook(lambda *_: calls.append(1))
    block.inner.forward = lambda x, cache: (calls.append(2), Inner.forward(block.inner, x, cache))[1]  # type: ignore
    assert again(block, store) == [0, 0, 1]
    assert calls.count(2) == 2


def test_a_forward_of_a_modules_own_is_put_back() -> None:
    block = Block()
    block.inner.forward = own = lambda x, cache: (3.0 * x, None)  # type: ignore[assignment]
    store = OutputStore(block, ["last"])
    for _ in range(2):
        again(block, store)
        assert block.inner.__dict__["forward"] is own
    assert "forward" not in block.last.__dict__


@pytest.mark.parametrize(("room", "left"), [(0, [2, 1, 1]), (1, [1, 0, 1]), (2, [0, 0, 1])])
def test_no_more_is_kept_than_there_is_room_for(room: int, left: list[int]) -> None:
    block = Block()
    store = OutputStore(block, ["last"], room * X.numel() * X.element_size())
    again(block, store)
    assert again(block, store) == left


@pytest.mark.parametrize(
    ("device", "takes_spare", "expected"), [("cpu", True, 100), ("cuda", False, 100), ("cuda", True, 2**29)]
)
def test_a_gpu_gives_half_of_what_work_leaves_free(
    device: str, takes_spare: bool, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    block, inputs = (
        nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 64)),
        {"input_ids": torch.ones(2, 8, dtype=torch.int64)},
    )
    work = work_bytes(block, [inputs])
    assert work_bytes(block, [inputs] * 2) > work > 4 * 13 * 64 * 64
    free: dict[str, Any] = {
        "mem_get_info": (2**30 + work - 500, 2**34),
        "memory_reserved": 700,
        "memory_allocated": 200,
    }
    free["get_per_process_memory_fraction"] = 1.0
    for name, found in free.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, found=found: found)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    around = Surroundings(reuse_bytes=100, takes_spare=takes_spare)
    streams = {"task": [SimpleNamespace(inputs=inputs)]}
    walk: Any = SimpleNamespace(device=torch.device(device), _around=around, streams=streams)
    assert Walk.reuse_bytes(walk, block) == expected
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device: work / 2**34)
    assert Walk.reuse_bytes(walk, block) == 100
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device: 1.0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (work // 2, 2**34))
    assert Walk.reuse_bytes(walk, block) == 100


FAMILIES = ["bert", "llama", "t5", "gpt2", "clip", "phi"]


@pytest.mark.parametrize("family", FAMILIES)
def test_quantization_is_the_same_without_the_store(family: str) -> None:
    pytest.importorskip("transformers")
    from families import KINDS, make_job, tensors_of

    job = make_job(KINDS[family])
    experts = {task: DictSource(model.state_dict()) for task, model in job.experts.items()}
    config = QuantConfig(group_size=16, alpha=1.0, norm_refit=True)

    def tensors(reuse_bytes: int) -> dict[str, list[Tensor]]:
        sink = ModuleSink()
        run(
            meta_copy(job.merged), DictSource(job.merged.state_dict()), None, experts, job.calibration, config, sink,
            lambda *_: None, None, Surroundings(reuse_bytes=reuse_bytes),
        )  # fmt: skip
        return tensors_of(sink)

    wanted, ours = tensors(0), tensors(2**30)
    assert wanted.keys() == ours.keys()
    for name, parts in wanted.items():
        assert all(torch.equal(a, b) for a, b in zip(ours[name], parts, strict=True)), name
