"""Parts of an int4 product that are summed by the program of a tile that ends last, and the counters that tell it."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

import pytest
import torch
from test_int4_matmul import BF16, FP16, problem

pytest.importorskip("triton", reason="Triton is not installed")

from epmq.kernels import arrivals
from epmq.kernels.int4_check import case_of, check
from epmq.kernels.int4_launch import run
from epmq.kernels.timing import replayed
from epmq.kernels.tune import Config

# rows, columns, group, tokens, tokens of a tile, rows of a tile, parts
PROBLEMS = [
    (130, 1100, 128, 5, 8, 128, 9),  # every load of four parts with one, and tokens past the last
    (200, 700, 64, 9, 8, 64, 6),
    (300, 384, 128, 40, 32, 128, 3),  # three strips of a tile, the last past the tokens
    (650, 256, 128, 270, 64, 64, 2),  # in the order of many tokens
    (70, 640, -1, 130, 128, 64, 5),
]


@pytest.mark.sampled
@pytest.mark.parametrize("dtype", [FP16, BF16], ids=str)
@pytest.mark.parametrize("case", PROBLEMS, ids=str)
def test_sums_have_the_bits_of_a_second_launch(case: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    rows, columns, group, tokens, block_m, block_n, parts = case
    x, _, weight, bias = problem(rows, columns, group, False, dtype, tokens, device)
    two = Config(block_m, block_n, parts, 4, 3, True)
    one = replace(two, one_launch=True)

    def product(config: Config, offset: torch.Tensor | None) -> torch.Tensor:
        y: torch.Tensor = run(x, weight.words, weight.scale_words, offset, rows, weight.group_size, config)
        return y

    for offset in (bias, bias.float(), None):
        assert torch.equal(product(one, offset), product(two, offset))
    assert torch.equal(product(one, bias), product(two, bias))
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
    assert len(more) > arrivals.OF_STREAM and more.data_ptr() != first.data_ptr()
    assert arrivals.counters(device, 5).data_ptr() == more.data_ptr()


def test_all_that_is_taken_is_taken_once(known: dict[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrivals, "TOTAL", 1024)
    ours = arrivals.Counters(torch.device("cpu"))
    found: list[torch.Tensor] = []
    threads = [threading.Thread(target=lambda: found.extend(ours.take(33) for _ in range(8))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(tensor.data_ptr() % 16 == 0 and not tensor.any() for tensor in found)
    for number, tensor in enumerate(found):
        tensor[:33] = number + 1
    assert [int(tensor[32]) for tensor in found] == list(range(1, 33))
    inside = sum(tensor.untyped_storage().data_ptr() == ours.zeros.untyped_storage().data_ptr() for tensor in found)
    assert inside == 16


@pytest.mark.gpu
def test_a_graph_beside_a_stream_on_a_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    device = torch.device("cuda", torch.cuda.current_device())
    x, _, weight, bias = problem(512, 4096, 128, False, FP16, 16, device)
    config = Config(16, 64, 8, 4, 3, True, one_launch=True)

    def product() -> torch.Tensor:
        y: torch.Tensor = run(x, weight.words, weight.scale_words, bias, 512, weight.group_size, config)
        return y

    wanted = product()
    assert torch.equal(replayed(product), wanted)
    graph, others = torch.cuda.CUDAGraph(), [torch.cuda.Stream() for _ in range(3)]
    with torch.cuda.graph(graph):
        captured = [product() for _ in range(20)]
    torch.cuda.synchronize()
    beside = []
    for stream in others:
        with torch.cuda.stream(stream):
            beside += [product() for _ in range(50)]
    graph.replay()
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(y, wanted) for y in captured + beside)
