"""What Python and torch take for a call of QuantLinear on a GPU, without one.

The int4 product is compiled for sm_90 and its programs are started by a driver that starts nothing: what is left is
looking at arguments, finding the programs and making the outputs. Beside it the same with Triton's own start of both
programs at every call, and an nn.Linear of eight features, whose arithmetic takes next to nothing. Microseconds,
medians of rounds in which all take turns.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ["EPMQ_BACKEND"] = "triton"  # before what is chosen by it is imported

import torch
import triton
from ptx import driver
from torch import nn

from epmq import QuantLinear
from epmq.bench import interleaved
from epmq.kernels import tune
from epmq.kernels.launch import Launch
from epmq.report import machine

SECONDS, CALLS = 2.0, 2000
FEATURES, TOKENS = 4096, 16


class Nothing:
    """Takes the place of the driver's start."""

    def __init__(self, source: Any, metadata: Any):
        pass

    def __call__(self, *arguments: Any) -> None:
        pass


def many(call: Callable[[], Any]) -> None:
    for _ in range(CALLS):
        call()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="add the figures to this file, by version of Triton")
    options = parser.parse_args()
    driver.use(90)
    triton.runtime.driver.active.launcher_cls = Nothing
    tune.device_facts = lambda device: (90, 132)
    torch.set_num_threads(1)

    layer = QuantLinear(FEATURES, FEATURES, dtype=torch.float16)
    layer.pack_for_gpu()
    x = torch.zeros(TOKENS, FEATURES, dtype=torch.float16)
    small, few = nn.Linear(8, 8), torch.zeros(1, 8)

    def through_triton() -> None:
        Launch.__call__ = by_triton
        layer(x)
        Launch.__call__ = kept

    kept = Launch.__call__
    calls = {
        "QuantLinear": lambda: layer(x),
        "QuantLinear, its programs started by Triton": through_triton,
        "nn.Linear of 8 features": lambda: small(few),
    }
    with torch.inference_mode():
        times = interleaved({name: partial(many, call) for name, call in calls.items()}, SECONDS)
    found = {name: round(1e3 * taken / CALLS, 1) for name, taken in times.items()}
    for name, taken in found.items():
        print(f"{taken:6.1f}  {name}")
    if options.json:
        together = json.loads(options.json.read_text()) if options.json.exists() else {}
        together[f"Triton {triton.__version__}"] = {**machine(), "microseconds": found}
        options.json.write_text(json.dumps(together, indent=1) + "\n")


def by_triton(launch: Launch, *arguments: Any) -> None:
    """What a Launch does at its first call."""
    launch.program[launch.grid](*arguments, **launch.options)


if __name__ == "__main__":
    main()
