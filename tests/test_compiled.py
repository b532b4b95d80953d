"""The Triton kernels as a GPU gets them: compiled for sm_80 and sm_90, their PTX run on the CPU.

Runs the tests of the kernels again in processes of their own, because this one interprets its kernels. What the
interpreter cannot show is seen here: inline assembly, bf16, the layouts of tensor core operands, copies that are not
waited for, and races in shared memory.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from xml.etree import ElementTree

import pytest

pytest.importorskip("triton", reason="Triton is not installed")
# All six runs share the machine's cores, and the first test waits for most of them.
pytestmark = pytest.mark.timeout(1800)
ROOT = Path(__file__).parents[1]
ARCHS = (80, 90)
KERNELS = (
    "test_int4_matmul.py",
    "test_int4_one_launch.py",
    "test_int4_check.py",
    "test_int4_layer.py",
    "test_gptq_block.py",
    "test_gram.py",
    "test_gpu_suite.py",
)

# Instructions that order memory are taken out of a compiled kernel: each must be missed.
BROKEN = """
import sys
import torch
from ptx import driver
from ptx.machine import Program, Watch
from ptx.source import PtxError, kernels

driver.use(ARCH, Watch(hazards=True))
from epmq.kernels import gram, int4_launch, tune
from test_int4_matmul import problem

x, _, weight, bias = problem(128, 768, 128, False, torch.float16, 16, torch.device("cpu"))
config = next(shape for shape in tune.shapes(ARCH) if (shape.block_m, shape.block_n) == (16, 128))
rows = torch.randn(384, 136).half()

def product():
    return int4_launch.run(x, weight.words, weight.scale_words, bias, 128, 128, config)

def moments():
    hessian = torch.zeros(136, 136)
    gram.accumulate(rows, hessian, torch.zeros(136))
    return hessian

def parts():
    hessian = torch.zeros(136, 136)
    gram.accumulate(rows, hessian, torch.zeros(136), chosen=gram.Plan(128, 192))
    return hessian

faults = []
for work in (product, moments, parts):
    unseen, tried = [], 0
    driver.PROGRAMS.clear()
    right = work()
    texts = [text for text in driver.PROGRAMS if b"cp.async" in text]
    (text,) = texts
    lines = text.decode().splitlines()
    whole = driver.PROGRAMS[text]
    for number, line in enumerate(lines):
        if not any(word in line for word in ("bar.sync", "cp.async.wait_group", "wgmma.wait_group")):
            continue
        broken = "\\n".join(lines[:number] + lines[number + 1 :])
        tried += 1
        vars(whole).update(vars(Program(kernels(broken)[0])))
        try:
            wrong = not torch.equal(work(), right)
        except PtxError as error:
            wrong = True
        print(work.__name__, number, line.strip(), "missed" if wrong else "not missed")
        # The last wait for copies is for those that nothing reads; compilers add some barriers that nothing needs.
        if not wrong and line.split()[-1] + line.split()[0] != "0;cp.async.wait_group":
            unseen.append(line)
    if len(unseen) > tried // 3 or any("bar.sync" not in line for line in unseen):
        faults.append(f"{work.__name__}: not missed: {unseen}")
sys.exit("\\n".join(faults) or 0)
"""

# What the loops read and write goes through memory with as few passes and sectors as its bytes need.
TRAFFIC = """
import sys
import torch
from ptx import driver
from ptx.machine import Watch
from ptx.traffic import Traffic

traffic = Traffic()
driver.use(ARCH, Watch(traffic=traffic))
from epmq.kernels import gptq_block, gram, int4_launch, tune
from test_int4_matmul import problem
from forms import sweep_problem

def seen(name):
    for (_, space), cost in traffic.costs.items():
        if cost.taken > cost.least:
            print(f"{name}: {cost.text}: {space}, {cost.taken} in place of {cost.least}")
            found.append((name, cost))
    traffic.costs.clear()

found = []
for dtype in (torch.float16, torch.bfloat16):
    for group in (32, 128, -1):
        for shape in tune.shapes(ARCH):
            rows = shape.block_n
            x, _, weight, _ = problem(rows, 1024, group, False, dtype, shape.block_m, torch.device("cpu"))
            int4_launch.run(x, weight.words, weight.scale_words, None, rows, weight.group_size, shape)
            seen(f"int4 {dtype} g{group} {shape.block_m}x{rows}")
    for plan in [gram.Plan(128, 8192)] + [gram.Plan(256, 8192)] * (ARCH >= 90):
        x, target = torch.randn(256, 512).to(dtype), torch.randn(256, 256).to(dtype)
        gram.accumulate(x, torch.zeros(512, 512), torch.zeros(512), target, torch.zeros(256, 512), torch.zeros(256),
                        chosen=plan)
        seen(f"gram {dtype} {plan}")
gptq_block.gptq_sweep(*sweep_problem(64, 256, 128, 4, False), 4)
seen("gptq")
sys.exit(1 if found else 0)
"""


def environment(arch: int) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "EPMQ_BACKEND")}
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    own = {"EPMQ_PTX": str(arch), "EPMQ_SAMPLE": f"{ARCHS.index(arch)}/3", "PYTHONPATH": paths}
    return {**kept, **own, "TRITON_DEFAULT_FP_FUSION": "0"}


def run(arch: int, *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *command], cwd=ROOT, env=environment(arch), capture_output=True, text=True)


def command_of(kind: str, arch: int, folder: Path) -> list[str]:
    """What python is to do. Of the tests it is a sample that takes minutes, of those marked ``sampled`` another third
    of the cases on each architecture; make test-ptx runs them all."""
    if kind != "tests":
        return ["-c", (BROKEN if kind == "broken" else TRAFFIC).replace("ARCH", str(arch))]
    # Some compile a kernel for each of many cases, and what the suite does with processes and clocks is the same for
    # any kernel. The sweep uses no instruction that only one of the two has: most of its cases run on one.
    left = ["random_problems", "right_kernel", "stopped", "written_down", "machine_lacks"]
    left += ["codes_are_the_references"] * (arch == 80)
    chosen = ["-k", " and ".join(f"not {name}" for name in left)]
    junit = f"--junitxml={folder}/tests-{arch}.xml"
    return ["-m", "pytest", "-p", "no:cacheprovider", junit, *chosen, *(f"tests/{name}" for name in KERNELS)]


Runs = dict[tuple[str, int], Future[subprocess.CompletedProcess[str]]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Runs, Path]]:
    """All of them, two at a time: each is one thread."""
    folder = tmp_path_factory.mktemp("compiled")
    with ThreadPoolExecutor(2) as pool:
        kinds = ("tests", "broken", "traffic")
        yield {(k, a): pool.submit(run, a, *command_of(k, a, folder)) for k in kinds for a in ARCHS}, folder


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
def test_the_kernels_pass_their_tests_compiled(arch: int, runs: tuple[Runs, Path]) -> None:
    done = runs[0]["tests", arch].result()
    assert done.returncode == 0, done.stdout[-5000:]
    suite = ElementTree.parse(runs[1] / f"tests-{arch}.xml").getroot()[0]
    assert int(suite.get("tests", 0)) - int(suite.get("skipped", 0)) > 100


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
def test_kernels_without_their_barriers_and_waits_are_found_out(arch: int, runs: tuple[Runs, Path]) -> None:
    done = runs[0]["broken", arch].result()
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
def test_no_bank_conflicts_and_whole_sectors(arch: int, runs: tuple[Runs, Path]) -> None:
    done = runs[0]["traffic", arch].result()
    assert done.returncode == 0, done.stdout + done.stderr
