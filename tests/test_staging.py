"""Tensors on their way to a GPU: bit-identical through every piece of pinned memory, and no piece filled too early."""

from __future__ import annotations

import logging
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from epmq import staging
from epmq.devices import cast_there
from epmq.staging import Staging, sent

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here")
SHAPES = {"a little": (700,), "a piece": (8, 512), "much": (3, 33, 123), "a scalar": ()}


class Event:
    """Stands behind a copy out of a piece, which may take until it is waited for."""

    queued: ClassVar[list[Event]] = []

    def __init__(self) -> None:
        self.open = False

    def record(self, stream: object) -> None:
        assert not self.open, "a piece was filled before it had left"
        self.open = True
        Event.queued.append(self)

    def synchronize(self) -> None:
        self.open = False


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Staging:
    """Pieces of 4 KiB, on the CPU."""
    monkeypatch.setattr(staging, "PIECE_BYTES", 4096)
    monkeypatch.setattr(staging, "_pinned", lambda size: torch.empty(size, dtype=torch.uint8))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    Event.queued = []
    return Staging(torch.device("cpu"))


def drawn(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Any bits, NaN of every kind among them."""
    width = torch.tensor([], dtype=dtype).element_size()
    raw = torch.randint(0, 256, (*shape, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return (raw % 2 if dtype == torch.bool else raw).view(dtype).reshape(shape)


def bits(tensor: Tensor) -> Tensor:
    return tensor.cpu().contiguous().reshape(-1).view(torch.uint8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64, torch.int8, torch.bool], ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_every_bit_arrives_and_no_piece_is_filled_too_early(
    small: Staging, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    tensor = drawn(shape, dtype)
    for _ in range(2):
        there = small.send(tensor)
        assert there.shape == tensor.shape and there.dtype == dtype
        assert torch.equal(bits(there), bits(tensor))
    pieces = -(-tensor.numel() * tensor.element_size() // 4096)
    assert len(Event.queued) == 2 * pieces


def test_what_stays_on_the_cpu_is_the_tensor_itself() -> None:
    tensor = torch.ones(staging.LEAST_BYTES)
    assert sent(tensor, torch.device("cpu")) is tensor


def test_without_pinned_memory_it_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(size: int) -> Tensor:
        raise RuntimeError("CUDA error: out of memory\nCompile with ...")

    monkeypatch.setattr(staging, "_pinned", fails)
    staging._staging.cache_clear()
    with caplog.at_level(logging.WARNING, "epmq"):
        assert staging._staging(0) is None and staging._staging(0) is None
    staging._staging.cache_clear()
    assert [record.getMessage() for record in caplog.records] == [
        "no pinned memory (CUDA error: out of memory): weights go to the GPU the slow way."
    ]


@pytest.mark.gpu
@GPU
@pytest.mark.parametrize("sideways", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int64], ids=str)
def test_a_gpu_gets_what_lies_on_the_cpu(dtype: torch.dtype, sideways: bool) -> None:
    device = torch.device("cuda")
    assert staging._staging(torch.cuda.current_device()) is not None
    tensors = [drawn((1111, size), dtype) for size in (512, 4096, 20000)]
    tensors = [tensor.T if sideways else tensor for tensor in tensors]
    copies = [tensor.clone() for tensor in tensors]
    found = []
    for tensor in tensors:
        found.append(cast_there(tensor, device, None))
        tensor.zero_()  # what is on its way is no longer here
    for there, copy in zip(found, copies, strict=True):
        assert there.device.type == "cuda" and there.stride() == copy.stride()
        assert torch.equal(bits(there), bits(copy))
