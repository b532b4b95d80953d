"""``make gpu``: builds, tests and measures on a machine with an NVIDIA GPU, all within a number of minutes.

    PYTHONPATH=.:benchmarks python -m gpu.job [--part tests int4 ...] [--minutes 9] [--out FOLDER]

Nothing that fails here keeps the rest from running: without a compiled extension all goes on without it, tests have
their time, and the benchmarks take what is left. What each step says is printed and kept beside the results.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from gpu.parts import PARTS
from gpu.suite import GRACE

ROOT = Path(__file__).parents[2]
# The most seconds of a step; a test that hangs on the GPU ends only with its process.
BUILD_SECONDS, TESTS_SECONDS, TEST_SECONDS = 150, 200, 90
# The files that hold tests for a GPU: what a machine lacks for others must not stop these.
TESTS = (
    "test_devices.py", "test_gptq_block.py", "test_gpu_suite.py", "test_gram.py", "test_int4_check.py",
    "test_int4_layer.py", "test_int4_matmul.py", "test_int4_one_launch.py", "test_ops_accumulate.py",
    "test_ops_matmul.py", "test_ops_solve.py", "test_ops_sweep.py", "test_staging.py", "test_tune.py",
)  # fmt: skip


def step(command: list[str], seconds: float, log: Path, **variables: str) -> int:
    """Exit status of a command in the checkout, ended with all its children after so many seconds. Its output is
    printed, and written to ``log``."""
    process = subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, **variables}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        errors="replace", process_group=0,
    )  # fmt: skip
    watch = threading.Timer(seconds, os.killpg, (process.pid, signal.SIGKILL))
    watch.start()
    assert process.stdout is not None
    with log.open("a") as file:
        for line in process.stdout:
            print(line, end="", flush=True)
            file.write(line)
            file.flush()
    status = process.wait()
    watch.cancel()
    return status


def build(logs: Path) -> dict[str, str]:
    """Build the extension with its CUDA part, in place; what later steps find in their environment."""
    check = "from epmq import extension; print('extension:', extension.build_report()['cpu_level'])"
    for command in (["setup.py", "-q", "build_ext", "--inplace"], ["-c", check]):
        status = step([sys.executable, *command], BUILD_SECONDS, logs / "build.log", EPMQ_CUDA="1", EPMQ_EXTENSION="1")
        if status != 0:
            print(f"make gpu: the extension is not there ({logs / 'build.log'}); all goes on without it.", flush=True)
            return {"EPMQ_EXTENSION": "0"}
    return {}


def tests() -> list[str]:
    """The command that runs the tests marked ``gpu``, several at a time where pytest-xdist is there."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
    command += ["--timeout", str(TEST_SECONDS), "--timeout-method", "thread"]
    command += ["-n", "8"] if importlib.util.find_spec("xdist") else []
    return command + [f"tests/{name}" for name in TESTS]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", choices=("tests", *PARTS), default=["tests", *PARTS])
    parser.add_argument("--minutes", type=float, default=9.0, help="for everything, the build included")
    parser.add_argument("--out", type=Path, help="folder of results and logs; left out, benchmarks/results/DEVICE")
    chosen = parser.parse_args(arguments)
    begun = time.monotonic()
    logs = chosen.out.resolve() if chosen.out else ROOT / "build" / "gpu"
    logs.mkdir(parents=True, exist_ok=True)
    variables = build(logs)
    failed = False
    if "tests" in chosen.part:
        failed = step(tests(), TESTS_SECONDS, logs / "tests.log", **variables) != 0
    parts = [part for part in chosen.part if part != "tests"]
    if parts:
        left = 60 * chosen.minutes - (time.monotonic() - begun) - GRACE
        command = [sys.executable, "-m", "gpu.suite", "--part", *parts, "--minutes", str(left / 60)]
        command += ["--out", str(logs)] if chosen.out else []
        failed |= step(command, left + GRACE + 15, logs / "suite.log", **variables) != 0
    sys.exit(int(failed))


if __name__ == "__main__":
    main()
