"""One block with eight experts, from its weights to its codes: seconds, and what they go to."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any
from unittest import mock

import torch
from gpu.setting import GROUP, Row, Setting, expect


def block(setting: Setting, forward: str) -> Iterator[Row]:
    """Calibration, solve and rounding of one block with eight experts: seconds, and the most GPU memory at one time.

    Twice: the first time kernels are compiled, libraries loaded and memory taken, once for all blocks of a model. And
    once more to tell what the seconds go to.
    """
    from gpu.llama import random_job

    import epmq

    job = random_job(setting.tiny, setting.device)
    config = epmq.QuantConfig(diagnostics=False, group_size=GROUP, forward_dtype=forward)

    def timed() -> tuple[epmq.QuantResult, float]:
        started = time.perf_counter()
        result = epmq.quantize(job.merged, job.experts, job.calibration, config, device=setting.device)
        return result, time.perf_counter() - started

    row: Row = {"forward": forward, "experts": len(job.experts), "tokens per expert": job.tokens, "width": job.width}
    result, seconds = timed()
    if setting.timed:
        row["first time s"] = seconds
        yield row
        torch.cuda.reset_peak_memory_stats()
        result, row["seconds"] = timed()
        row["peak GPU GiB"] = torch.cuda.max_memory_allocated() / 2**30
        row |= {f"{name} s": spent for name, spent in block_seconds(result.report).items()}
    expect(row, len(result.report["layers"]) == 7, "not every linear of the block was quantized")
    errors = [methods["epmq"] for methods in result.report["average_error"].values()]
    expect(row, all(0.0 <= error < 1.0 for error in errors), f"output errors {errors}")
    yield row
    if setting.timed:
        row |= {f"{kind} s": spent for kind, spent in seconds_by_kind(setting.device, timed).items()}
        yield row


def seconds_by_kind(device: torch.device, run: Callable[[], Any]) -> dict[str, float]:
    """Seconds of a run by kind of work, and all of them.

    The GPU is waited for before and after each piece, so that none pays for another: they are more in all than those of
    a run left alone, where the processor is ahead.
    """
    from epmq import engine
    from epmq.calls import BlockCall
    from epmq.statistics import Folded, TaskStatistics
    from epmq.visit import Visit
    from epmq.walk import Walk

    kinds: dict[str, list[tuple[Any, str]]] = {
        "statistics": [(TaskStatistics, "__init__"), (TaskStatistics, "add"), (TaskStatistics, "over")],
        "fold": [(Folded, "fold")],
        "solve and sweep": [(engine, "quantize_group")],
        "loading": [(Walk, "load"), (Visit, "read")],
        "forward": [(BlockCall, "run")],
    }
    spent = dict.fromkeys(kinds, 0.0)

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    def clocked(kind: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            started = now()
            try:
                return function(*args, **kwargs)
            finally:  # a forward pass may end where what was asked for is there
                spent[kind] += now() - started

        return call

    with ExitStack() as stack:
        for kind, places in kinds.items():
            for owner, name in places:
                stack.enter_context(mock.patch.object(owner, name, clocked(kind, getattr(owner, name))))
        started = now()
        run()
        spent["all, piece by piece"] = now() - started
    return spent


def block_seconds(report: dict[str, Any]) -> dict[str, float]:
    """Seconds of the block's groups by the linear that names them."""
    return {layer["linear"].rsplit(".", 1)[1]: layer["seconds"] for layer in report["layers"]}
