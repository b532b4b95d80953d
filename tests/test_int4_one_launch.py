"""Parts of an int4 product that are summed by the program of a tile that ends last, and the counters that tell it."""

from __future__ import annotations

import math
import threading
from dataclasses import replace
from typing import Any

import pytest
import torch
from test_int4_matmul import BF16, FP16, problem
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

from epmq.kernels import arrivals, tune
from epmq.kernels.int4_check import case_of, check
from epmq.kernels.int4_launch import run
from epmq.kernels.int4_matmul import int4_matmul
from epmq.kernels.timing import replayed
from epmq.kernels.tune import Config

# rows, columns, group, tokens, tokens of a tile, rows of a tile, parts
PROBLEMS = [
    (130, 1100, 128, 5, 8, 128, 9),  # every load of four parts with one, and tokens past the last
    (130, 700, 64, 5, 8, 64, 6),
    (300, 384, 128, 40, 32, 128, 3),  # three strips of a tile, the last past the tokens
    (330, 256, 128, 257, 128, 128, 2),  # in the order of many tokens
    (70, 640, -1, 130, 128, 64, 5),
]


def poisoned(x: Tensor, rows: int, config: Config) -> None:
    """Leave NaN in the memory that the next sums of parts are likely to get: what is summed too early is seen."""
    torch.full((config.split_k, len(x), rows), math.nan, device=x.device)


@pytest.mark.sampled
@pytest.mark.parametrize("dtype", [FP16, BF16], ids=str)
@pytest.mark.parametrize("case", PROBLEMS, ids=str)
def test_sums_have_the_bits_of_a_second_launch(case: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    rows, columns, group, tokens, block_m, block_n, parts = case
    x, _, weight, bias = problem(rows, columns, group, False, dtype, tokens, device)
    two = Config(block_m, block_n, parts, 4, 3, True)
    one = replace(two, one_launch=True)

    def product(config: Config, offset: Tensor | None, sign: int) -> Tensor:
        poisoned(x, rows, config)
        y: Tensor = run(sign * x, weight.words, weight.scale_words, offset, rows, weight.group_size, config)
        return y

    for offset, sign in ((bias, 1), (bias, -1), (bias.float(), 1), (None, -1)):
        assert torch.equal(product(one, offset, sign), product(two, offset, sign))
    assert not arrivals.counters(x.device, 1).any()


@pytest.mark.parametrize("dtype", [FP16, BF16], ids=str)
def test_they_pass_the_check_before_first_use(dtype: torch.dtype, device: torch.device) -> None:
    config = Config(16, 64, 3, 4, 3, True, one_launch=True)
    x = torch.zeros(16, 512, dtype=dtype, device=device)
    case = case_of(x, None, 128, 128, config)
    assert case.config.one_launch and case.parts == 2
    check(device, case)


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> dict[Any, Any]:
    fresh: dict[Any, Any] = {}
    monkeypatch.setattr(arrivals, "_of_device", fresh)
    return fresh


def test_a_stream_keeps_its_counters(known: dict[Any, Any], device: torch.device) -> None:
    device = torch.empty(0, device=device).device
    first = arrivals.counters(device, 5)
    assert len(first) >= 5 and first.dtype == torch.int32 and not first.any()
    assert arrivals.counters(device, 100).data_ptr() == first.data_ptr()
    more = arrivals.counters(device, arrivals.OF_STREAM + 1)
    assert len(more) == 2 * arrivals.OF_STREAM and more.data_ptr() != first.data_ptr()
    assert arrivals.counters(device, 5).data_ptr() == more.data_ptr()
    beyond = arrivals.counters(device, arrivals.TOTAL)
    assert len(beyond) == arrivals.TOTAL and not beyond.any()
    assert arrivals.counters(device, 5).data_ptr() == more.data_ptr()


def test_all_that_is_taken_is_taken_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrivals, "TOTAL", 1024)
    ours = arrivals.Counters(torch.device("cpu"))
    found: list[Tensor | None] = []
    threads = [threading.Thread(target=lambda: found.extend(ours.take(33) for _ in range(8))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    there = [tensor for tensor in found if tensor is not None]
    assert len(found) == 32 and len(there) == 16
    for number, tensor in enumerate(there):
        assert tensor.data_ptr() % 16 == 0 and not tensor.any()
        tensor[:33] = number + 1
    assert [int(tensor[32]) for tensor in there] == list(range(1, 17))


def test_threads_that_begin_together_share_what_they_make(known: dict[Any, Any]) -> None:
    found: set[int] = set()
    barrier = threading.Barrier(8)

    def ask() -> None:
        barrier.wait()
        found.add(arrivals.counters(torch.device("cpu"), 3).data_ptr())

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 1


# ---- on a GPU --------------------------------------------------------------------------------------------------------

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
SLEEP = 200_000_000  # cycles, about 0.1 s: longer than all launches of a test take to be queued


class Several:
    """Products of one weight with some inputs of their own, whose results two launches have made."""

    def __init__(self, rows: int, columns: int, tokens: int, config: Config, count: int):
        device = torch.device("cuda", torch.cuda.current_device())
        first, _, self.weight, self.bias = problem(rows, columns, 128, False, FP16, tokens, device)
        self.rows, self.config = rows, config
        self.inputs = [first * (number + 1) / count for number in range(count)]
        self.wanted = [self.product(x, replace(config, one_launch=False)) for x in self.inputs]

    def product(self, x: Tensor, config: Config | None = None) -> Tensor:
        poisoned(x, self.rows, self.config)
        words, grid, group = self.weight.words, self.weight.scale_words, self.weight.group_size
        y: Tensor = run(x, words, grid, self.bias, self.rows, group, config or self.config)
        return y

    def all(self) -> list[Tensor]:
        return [self.product(x) for x in self.inputs]

    def right(self, found: list[Tensor]) -> bool:
        return all(torch.equal(y, wanted) for y, wanted in zip(found, self.wanted, strict=True))


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("size", [(28672, 4096, 256, 128, 128, 2), (512, 4096, 16, 16, 64, 8)], ids=str)
def test_many_products_one_after_the_other_on_a_gpu(size: tuple[int, ...]) -> None:
    rows, columns, tokens, block_m, block_n, parts = size
    several = Several(rows, columns, tokens, Config(block_m, block_n, parts, 4, 3, True, one_launch=True), 5)
    assert all(several.right(several.all()) for _ in range(10))
    x = several.inputs[1]
    assert torch.equal(replayed(lambda: several.product(x)), several.wanted[1])


@pytest.mark.gpu
@needs_gpu
def test_graphs_and_streams_beside_each_other_on_a_gpu() -> None:
    several = Several(512, 4096, 16, Config(16, 64, 8, 4, 3, True, one_launch=True), 30)
    several.all()
    graphs, streams = [torch.cuda.CUDAGraph() for _ in range(2)], [torch.cuda.Stream() for _ in range(5)]
    found = []
    for graph in graphs:
        with torch.cuda.graph(graph):
            found.append(several.all())
    torch.cuda.synchronize()
    for _ in range(3):
        beside = []
        for stream in streams:
            with torch.cuda.stream(stream):
                torch.cuda._sleep(SLEEP)
        for graph, stream in zip(graphs, streams, strict=False):
            with torch.cuda.stream(stream):
                graph.replay()
        for stream in streams[len(graphs) :]:
            with torch.cuda.stream(stream):
                beside.append(several.all())
        torch.cuda.synchronize()
        assert all(several.right(ys) for ys in found + beside)


@pytest.mark.gpu
@needs_gpu
def test_counters_made_while_torch_prepares_a_graph_on_a_gpu(
    known: dict[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch.compile lets what it runs before a capture allocate in the graph's own pool, and looks for what stays."""
    x, _, weight, bias = problem(512, 4096, 128, False, FP16, 16, torch.device("cuda", torch.cuda.current_device()))
    config = Config(16, 64, 8, 4, 3, True, one_launch=True)
    wanted = run(x, weight.words, weight.scale_words, bias, 512, weight.group_size, replace(config, one_launch=False))
    monkeypatch.setattr(tune, "chosen", lambda *of: config)
    known.clear()
    compiled = torch.compile(lambda x: int4_matmul(x, weight, bias) + 0, mode="reduce-overhead")
    for _ in range(4):
        assert torch.equal(compiled(x), wanted)
