"""``make gpu``'s benchmarks: the int4 product, GPTQ, second moments and one whole block on this machine's GPU.

    PYTHONPATH=.:benchmarks python -m gpu.suite [--part gptq gram int4 block] [--minutes 8] [--out FOLDER] [--list]

Every item is checked before it is timed. Results are written after each item to gpu.json and gpu.md in
benchmarks/results/DEVICE; a run that was cut off, or ran out of its minutes, goes on where it stopped. ``--tiny``
checks every item on small shapes and times nothing; it runs without a GPU, in Triton's interpreter.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from gpu import tables
from gpu.parts import Setting, items
from gpu.timing import card_limits

PARTS = ("gptq", "gram", "int4", "block")
RESULTS = Path(__file__).parents[1] / "results"


def options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS), help="which parts, all when left out")
    parser.add_argument("--minutes", type=float, default=8.0, help="no item is begun after this time")
    parser.add_argument("--out", type=Path, help="folder of the results; benchmarks/results/DEVICE when left out")
    parser.add_argument("--list", action="store_true", help="print the items and what is done of them")
    parser.add_argument("--tiny", action="store_true", help="check small shapes, time nothing")
    return parser.parse_args(arguments)


def facts(tiny: bool) -> dict[str, Any]:
    """What results must agree on to stand in one table."""
    import triton

    name = "checks only" if tiny else torch.cuda.get_device_name()
    found = {"device": name, "torch": torch.__version__, "triton": triton.__version__, "python": sys.version.split()[0]}
    return found if tiny else {**found, "cuda": torch.version.cuda}


def main(arguments: list[str] | None = None) -> None:
    chosen = options(arguments)
    there = torch.cuda.is_available()
    if not there and not chosen.tiny:
        sys.exit("gpu.suite: no NVIDIA GPU here; --tiny checks what runs without one.")
    if not there and os.environ.get("TRITON_INTERPRET") != "1":
        sys.exit("gpu.suite: set TRITON_INTERPRET=1 to run the kernels without a GPU.")
    about = facts(chosen.tiny)
    folder = chosen.out or RESULTS / str(about["device"]).lower().replace(" ", "-")
    results = tables.read(folder, about)
    setting = Setting(torch.device("cuda" if there else "cpu"), chosen.tiny, {}, results["absent"])
    every = items(setting)
    planned = [name for name in every if name.split()[0] in chosen.part]
    if chosen.list:
        print("\n".join(f"{'done' if name in results['items'] else 'open'}  {name}" for name in planned))
        return
    run(setting, results, {name: every[name] for name in planned}, chosen.minutes, folder, list(every))


def run(
    setting: Setting, results: tables.Results, todo: dict[str, Any], minutes: float, folder: Path, every: list[str]
) -> None:
    """Run what is open, until the time is up; exits with status 1 when an item failed its check."""
    started = time.monotonic()
    if setting.timed:
        setting.limits = card_limits()
        results["limits"] = setting.limits
        print("this card:", ", ".join(f"{name} {value:.3g}" for name, value in setting.limits.items()), flush=True)
    for name, item in todo.items():
        if "rows" in results["items"].get(name, {}):
            continue
        if time.monotonic() - started > 60 * minutes:
            print("time is up; the same command goes on from here")
            break
        begun = time.monotonic()
        try:
            results["items"][name] = {"rows": item()}
        except (AssertionError, RuntimeError) as error:
            results["items"][name] = {"error": f"{type(error).__name__}: {str(error).splitlines()[:1]}"}
        results["items"][name]["seconds"] = round(time.monotonic() - begun, 1)
        tables.write(folder, results, every)
        print(f"{name}: {results['items'][name].get('error', 'done')}", flush=True)
        if setting.timed:
            torch.cuda.empty_cache()
    tables.write(folder, results, every)
    print((folder / tables.MARKDOWN_NAME).read_text())
    sys.exit(int(any("error" in item for item in results["items"].values())))


if __name__ == "__main__":
    main()
