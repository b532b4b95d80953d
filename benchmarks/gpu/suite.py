"""The benchmarks of ``make gpu``: the int4 product, what a launch costs, second moments, GPTQ and one whole block.

    PYTHONPATH=.:benchmarks python -m gpu.suite [--part int4 gram ...] [--minutes 8] [--out FOLDER] [--list]

Each part runs in a process of its own, and again in a new one where the GPU's memory or an illegal access ended it.
Results are written after each row to gpu.json and gpu.md in ``--out``, from the start; a run that was cut off, or ran
out of its minutes, goes on where it stopped, also from a copy of that folder. ``--tiny`` checks every item on small
shapes and times nothing; it runs without a GPU, in Triton's interpreter.
"""

from __future__ import annotations

import argparse
import faulthandler
import os
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch
from gpu import tables
from gpu.parts import PARTS, items
from gpu.setting import Setting
from gpu.timing import card_limits

RESULTS = Path(__file__).parents[1] / "results"
ITEM_SECONDS = 150  # a process whose item takes longer is ended: a kernel that waits for ever is ended by nothing else
GRACE = 45  # seconds that an item which was begun in time may take after it
LOST = 3  # exit status of a process that cannot use the GPU any more
BEGUN = "begun, and never ended"


def options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS), help="which parts, all when left out")
    parser.add_argument("--minutes", type=float, default=8.0, help="no item is begun after this time")
    parser.add_argument("--out", type=Path, help="folder of the results; benchmarks/results/DEVICE when left out")
    parser.add_argument("--list", action="store_true", help="print the items and what is done of them")
    parser.add_argument("--tiny", action="store_true", help="check small shapes, time nothing")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)  # run one part's items here
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
    chosen.out = chosen.out or RESULTS / str(about["device"]).lower().replace(" ", "-")
    results = tables.read(chosen.out, about)
    setting = Setting(torch.device("cuda" if there else "cpu"), chosen.tiny, {}, results["absent"], not chosen.tiny)
    every = items(setting)
    planned = [name for part in chosen.part for name in every if name.split()[0] == part]
    if chosen.list:
        print("\n".join(f"{'done' if finished(results, name) else 'open'}  {name}" for name in planned))
    elif chosen.inside:
        todo = {name: every[name] for name in planned if name not in results["items"]}
        run(setting, results, todo, chosen.minutes, chosen.out, list(every))
    else:
        conduct(results, planned, chosen, list(every))


def finished(results: tables.Results, name: str) -> bool:
    """Whether an item is done and its checks hold; what failed is run again."""
    item = results["items"].get(name, {"error": "open"})
    return "error" not in item and not any("failed" in row for row in item["rows"])


def conduct(results: tables.Results, planned: list[str], chosen: argparse.Namespace, every: list[str]) -> None:
    """Run what is open, each part in processes of its own, until the time is up; exits with status 1 when anything
    failed."""
    started = time.monotonic()
    results.pop("limits", None)
    for name in planned:
        if not finished(results, name):
            results["items"].pop(name, None)
    tables.write(chosen.out, results, every)
    paths = [str(RESULTS.parents[1]), str(RESULTS.parent), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path)}
    faults = []
    for part in chosen.part:
        names = [name for name in planned if name.split()[0] == part]
        while (left := 60 * chosen.minutes - (time.monotonic() - started)) > 0:
            before = tables.read(chosen.out, results["facts"])["items"]
            if all(name in before for name in names):
                break
            command = [sys.executable, "-m", "gpu.suite", "--inside", "--part", part, "--minutes", str(left / 60)]
            command += ["--out", str(chosen.out), *(["--tiny"] if chosen.tiny else [])]
            try:
                status: int | None = subprocess.run(command, env=environment, timeout=left + GRACE).returncode
            except subprocess.TimeoutExpired:
                status = None
            if status is None or len(tables.read(chosen.out, results["facts"])["items"]) == len(before):
                if status != 0:
                    faults.append(f"{part}: {'cut off' if status is None else f'ended with status {status}'}")
                break
    results = tables.read(chosen.out, results["facts"])
    print(tables.markdown(results, every))
    print("\n".join(faults))
    sys.exit(int(bool(faults) or not all(finished(results, name) for name in results["items"])))


def run(
    setting: Setting, results: tables.Results, todo: dict[str, Any], minutes: float, folder: Path, every: list[str]
) -> None:
    """Run these items here until the time is up; exits with status LOST where the GPU cannot be used any more."""
    started = time.monotonic()
    if setting.timed and todo:
        setting.limits = results["limits"] = results.get("limits") or card_limits()
        print("this card:", ", ".join(f"{name} {value:.3g}" for name, value in setting.limits.items()), flush=True)
    for name, item in todo.items():
        if time.monotonic() - started > 60 * minutes:
            print("time is up; the same command goes on from here")
            break
        begun = time.monotonic()
        done: dict[str, Any] = {"rows": [], "error": BEGUN}
        results["items"][name] = done
        tables.write(folder, results, every)
        if setting.timed:
            faulthandler.dump_traceback_later(ITEM_SECONDS, exit=True)
        try:
            for row in item():
                if not any(row is known for known in done["rows"]):
                    done["rows"].append(row)
                tables.write(folder, results, every)
            del done["error"]
        except Exception as error:  # a harness: what one item throws says nothing about the next
            traceback.print_exc()
            done["error"] = f"{type(error).__name__}: {str(error).splitlines()[:1]}"
        faulthandler.cancel_dump_traceback_later()
        done["seconds"] = round(time.monotonic() - begun, 1)
        tables.write(folder, results, every)
        print(f"{name}: {done.get('error', 'done')}, {done['seconds']} s", flush=True)
        if setting.timed and "error" in done and lost():
            sys.exit(LOST)
        if setting.timed:
            torch.cuda.empty_cache()


def lost() -> bool:
    """Whether the GPU refuses this process, as it does after an illegal access."""
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


if __name__ == "__main__":
    main()
