"""Several processes started by torchrun: the same result as one, and what happens when one of them dies."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import TASKS, Job, environment, in_process, make_job
from test_resume import content

from epmq import quantized
from epmq.formats.native import NativeReader
from epmq.report import whole_report
from epmq.statistics import TaskStatistics
from epmq.world import ROW_STEP, World, shares

pytest.importorskip("transformers")


STANDALONE = ["--standalone"]


def start(processes: int, *arguments: str | Path, place: list[str] = STANDALONE) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", *place, "--nproc-per-node", str(processes)]
    return subprocess.Popen(
        [*command, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        start_new_session=True,
    )


def together(processes: int, *arguments: str | Path, agents: int = 1) -> tuple[int, str, str]:
    """Run on ``agents`` machines, as far as torchrun can tell, of so many processes each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{free.getsockname()[1]}"
    place = ["--nnodes", str(agents), "--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint]
    several = [start(processes, *arguments, place=place if agents > 1 else STANDALONE) for _ in range(agents)]
    try:
        told = [process.communicate(timeout=300) for process in several]
    finally:
        for process in several:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    code = max(process.returncode for process in several)
    return code, "".join(out for out, _ in told), "".join(err for _, err in told)


class Part(World):
    """One of several processes, as far as it concerns the sharing of work."""

    def __init__(self, rank: int, size: int):
        self.rank, self.size = rank, size


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("count", [1, 15, 16, 47, 48, 100, 1152])
def test_rows_are_shared_out_in_order(size: int, count: int) -> None:
    parts = [range(count)[Part(rank, size).rows(count)] for rank in range(size)]
    if count <= ROW_STEP * (size - 1):
        assert all(part == range(count) for part in parts)
        return
    assert [row for part in parts for row in part] == list(range(count))
    assert max(map(len, parts)) - min(map(len, parts)) <= 2 * ROW_STEP


def test_batches_are_shared_out_by_cost() -> None:
    costs = {"a": [float(i) for i in range(1, 9)], "b": [float(i) for i in range(1, 8)], "c": [3.0]}
    owners = shares(costs, 2)
    assert {task: len(places) for task, places in owners.items()} == {"a": 8, "b": 7, "c": 1}
    for task in "ab":
        loads = [sum(c for c, r in zip(costs[task], owners[task], strict=True) if r == rank) for rank in (0, 1)]
        assert abs(loads[0] - loads[1]) <= max(costs[task])
    totals = [sum(c for t in costs for c, r in zip(costs[t], owners[t], strict=True) if r == rank) for rank in (0, 1)]
    assert abs(totals[0] - totals[1]) <= 3.0
    assert owners["a"][-1] == 0
    assert shares(costs, 1) == {"a": [0] * 8, "b": [0] * 7, "c": [0]}


EXCHANGE = """
import os
import torch
from epmq.world import by_turns, world
def threads():
    return sorted(open(f"/proc/self/task/{task}/comm").read().strip() for task in os.listdir("/proc/self/task"))
alone = threads()
w = world()
assert threads() != alone
import torch._dynamo
assert w.size == 3
# Sums in the order of ranks: in another order this one is rounded otherwise.
big = torch.tensor([1.0, 2.0**-24, 2.0**-24])[w.rank].repeat(300000)
small = torch.tensor([float(w.rank), 1.0], dtype=torch.float64)
w.add_up([big, small])
assert torch.equal(big, torch.full((300000,), 1.0)), big
assert small.tolist() == [3.0, 3.0]
for dtype in (torch.float32, torch.bfloat16, torch.uint8, torch.int64):
    own = torch.full((w.rank, 2), w.rank, dtype=dtype)
    assert w.concat(own).tolist() == [[1, 1], [2, 2], [2, 2]]
assert w.concat(torch.full((1,), w.rank)).tolist() == [0, 1, 2]
assert w.gather({"rank": w.rank, "text": "a\\nb"}) == [{"rank": r, "text": "a\\nb"} for r in range(3)]
assert w.from_main(w.rank + 0.1) == 0.1
told = torch.tensor([w.rank + 0.5])
w.spread(told, 2)
assert told.item() == 2.5
assert by_turns(4, w, lambda i: [i, w.rank]) == [[0, 0], [1, 1], [2, 2], [3, 0]]
spoke = w.gather(w.speaks("x"))
assert sum(spoke) == 1, spoke
w.close()
assert threads() == alone, threads()
"""


def test_exchanges_between_three_processes(tmp_path: Path) -> None:
    (tmp_path / "exchange.py").write_text(EXCHANGE)
    code, _, err = together(3, tmp_path / "exchange.py")
    assert code == 0, err


def codes(folder: Path) -> dict[str, torch.Tensor]:
    reader = NativeReader(folder)
    return {
        name: quantized.unpack(reader.source.tensor(f"{name}.packed"), facts.bits, facts.in_features)
        for name, facts in reader.linears.items()
    }


def alike(first: Path, second: Path) -> float:
    ours, theirs = codes(first), codes(second)
    assert ours.keys() == theirs.keys()
    same = sum(int((ours[name] == theirs[name]).sum()) for name in ours)
    return same / sum(tensor.numel() for tensor in ours.values())


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    job = make_job(tmp_path_factory.mktemp("made") / "job", blocks=3, examples=24)
    job.recipe["calibration"].update(examples=24, batch_size=4)
    job.recipe["format"] = "native"
    return job


def both(job: Job, folder: Path, capsys: pytest.CaptureFixture[str], **settings: Any) -> Path:
    """Run a job in one process and in two; returns the recipe."""
    job.recipe["quantization"] = {"bits": 4, "group_size": 16, **settings}
    recipe = job.write()
    assert in_process(capsys, "quantize", recipe, "--out", folder / "one").code == 0
    code, out, err = together(2, "-m", "epmq", "quantize", recipe, "--out", folder / "two")
    assert code == 0, err
    assert out.count("quantized model, report.json and report.html in") == 1
    assert sorted(path.name for path in folder.iterdir()) == ["one", "two"]
    return recipe


def test_two_processes_give_what_one_gives(job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = both(job, tmp_path, capsys, anchor="auto", norm_refit=True)
    assert alike(tmp_path / "one", tmp_path / "two") == 1.0
    one, two = whole_report(tmp_path / "one"), whole_report(tmp_path / "two")
    assert (one.pop("processes"), two.pop("processes")) == (1, 2)
    assert [row["linear"] for row in one["layers"]] == [row["linear"] for row in two["layers"]]
    for ours, theirs in zip(one["layers"], two["layers"], strict=True):
        assert list(ours["tasks"]) == list(theirs["tasks"])
        assert ours["lambda"] == theirs["lambda"]
    code, out, err = together(2, "-m", "epmq", "quantize", recipe, "--out", tmp_path / "two", "--resume")
    assert code == 0, err
    assert out.count("quantized model, report.json and report.html in") == 1
    scored = tmp_path / "scored.json"
    code, out, err = together(2, "-m", "epmq", "eval", tmp_path / "two", "--recipe", recipe, "--json", scored)
    assert code == 0, err
    assert in_process(capsys, "eval", tmp_path / "two", "--recipe", recipe).out == out


def test_forward_passes_in_16_bits_are_shared_out_too(
    job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    both(job, tmp_path, capsys, anchor="auto", norm_refit=True, forward_dtype="bfloat16")
    assert alike(tmp_path / "one", tmp_path / "two") == 1.0


def test_sums_have_a_fixed_order(job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = both(job, tmp_path, capsys, distill={"steps": 4, "copies": 1, "examples": 4})
    # And where they are does not matter.
    code, _, err = together(1, "-m", "epmq", "quantize", recipe, "--out", tmp_path / "again", agents=2)
    assert code == 0, err
    assert content(tmp_path / "two") == content(tmp_path / "again")
    # Adam turns the rounding of a gradient that ought to be zero into a whole step, so only the first loss, which
    # comes before any step, must be that of one process; it is a mean of some thousand products in fp32.
    one, two = (whole_report(tmp_path / name)["stages"]["distill"] for name in ("one", "two"))
    assert two["first_loss"] == pytest.approx(one["first_loss"], rel=1000 * torch.finfo(torch.float32).eps)
    assert one["pairs"] == two["pairs"]


def test_what_is_not_shared_out_is_done_by_one(job: Job, tmp_path: Path) -> None:
    for verb, *more in (["merge"], ["collect", "--task", TASKS[0]]):
        code, out, err = together(2, "-m", "epmq", verb, job.write(), *more, "--out", tmp_path / verb)
        assert code == 0, err
        assert len(out.splitlines()) == 1
    code, out, err = together(2, "-m", "epmq", "quantize", job.write(), "--dry-run", "--out", tmp_path / "unmade")
    assert code == 0, err
    assert len(out.splitlines()) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["collect", "merge"]


def test_a_refusal_is_told_once_and_ends_all(job: Job, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/there").touch()
    script = tmp_path / "refused.py"
    script.write_text(
        "import atexit\nfrom epmq.cli import main\natexit.register(print, 'the interpreter ended')\nmain()\n"
    )
    code, out, err = together(2, script, "quantize", job.write(), "--out", tmp_path / "out")
    assert (code, out) == (1, "")
    assert re.findall(r"^epmq: .*$", err, re.MULTILINE) == [
        f"epmq: {tmp_path / 'out'}: the output folder is not empty; choose another or remove it."
    ]
    assert re.search(r"failed \(exitcode: 2\) local_rank: 0 ", err), err


def test_a_dead_process_is_named_and_the_rest_goes_on(
    job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    big = make_job(tmp_path / "job", blocks=30, examples=24)
    big.recipe["format"] = "native"
    recipe, out = big.write(), tmp_path / "place" / "out"
    kept = out.with_name(".out.partial")
    process = start(3, "-m", "epmq", "quantize", recipe, "--out", out)
    deadline = time.monotonic() + 120
    while len(list(kept.glob("blocks/*"))) < 2:
        assert time.monotonic() < deadline and process.poll() is None, process.communicate()
        time.sleep(0.02)
    children = subprocess.run(
        ["ps", "--ppid", str(process.pid), "-o", "pid="], capture_output=True, text=True, check=True
    )
    victims = [int(pid) for pid in children.stdout.split()]
    ranks = {int(Path(f"/proc/{pid}/environ").read_text().split("\0RANK=")[1].split("\0")[0]): pid for pid in victims}
    os.kill(ranks[1], signal.SIGKILL)
    started = time.monotonic()
    _, err = process.communicate(timeout=60)
    assert time.monotonic() - started < 30
    assert process.returncode != 0
    lines = re.findall(r"^epmq: .*$", err, re.MULTILINE)
    assert len(lines) == 1, err
    assert re.match(rf"epmq: rank 1 \(.*, process {ranks[1]}\) died or no longer answers", lines[0])
    assert list(out.parent.iterdir()) == [kept]
    # One process takes up what three began.
    assert in_process(capsys, "quantize", recipe, "--out", out, "--resume").code == 0
    assert list(out.parent.iterdir()) == [out]
    assert len(NativeReader(out).linears) == 30 * 6


class Pair(World):
    """Two processes one after the other: the second adds what the first left."""

    size = 2

    def __init__(self) -> None:
        self.left: list[torch.Tensor] = []

    def add_up(self, tensors: Sequence[torch.Tensor]) -> None:
        for tensor, earlier in zip(tensors, self.left, strict=False):
            tensor += earlier
        self.left = [tensor.clone() for tensor in tensors]


def test_moments_do_not_depend_on_who_took_which_batch() -> None:
    batches = [torch.randn(40, 48) * 2.0 ** (number % 5) for number in range(9)]
    alone = TaskStatistics(48, 48, exact=True)
    for x in batches:
        alone.add(x, x + 1.0, None)
    alone.over(World())
    for split in (batches[::2], batches[1::2]), (batches[5:], batches[:5]):
        pair = Pair()
        for part in split:
            ours = TaskStatistics(48, 48, exact=True)
            for x in part:
                ours.add(x, x + 1.0, None)
            ours.over(pair)
        assert ours.weight == alone.weight == 9 * 40
        for name in ("hessian", "cross", "sum_x", "sum_target"):
            assert torch.equal(getattr(ours, name), getattr(alone, name)), name
