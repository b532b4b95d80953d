"""Memory that is bounded: hidden states on disk, estimates before the start, refusals of what cannot fit."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import Job, in_process, make_job
from conftest import ToyJob
from test_resume import content

from epmq.config import DistillSettings, QuantConfig, preset
from epmq.errors import ConfigError, FormatError, OutputError
from epmq.estimate import Estimate, estimate, tuning_operations
from epmq.formats.shards import write_tensors
from epmq.memory import available_bytes, peak_memory_bytes, resident_bytes
from epmq.recipe import Recipe
from epmq.shelf import ALIGNMENT, Shelf, bytes_of, read_value, settled, write_value
from epmq.skeleton import meta_copy

VALUE = {"blocks": (torch.arange(6.0).view(2, 3), None, [torch.ones(2, dtype=torch.bfloat16), 3, 0.1, "x", True])}


def same(first: Any, second: Any) -> bool:
    if isinstance(first, torch.Tensor):
        return first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, (list, tuple)):
        return type(first) is type(second) and all(map(same, first, second))
    return bool(first == second and type(first) is type(second))


@pytest.mark.parametrize("budget", [None, 10**6, 27, 0])
def test_a_shelf_gives_back_what_was_put(budget: int | None, tmp_path: Path) -> None:
    shelf = Shelf(budget, tmp_path / "scratch")
    shelf.put("a", VALUE)
    shelf.put("b", {"x": torch.zeros(3), "y": torch.ones(2)})
    assert same(shelf.get("a"), VALUE)
    assert same(shelf.part("b", "y"), torch.ones(2))
    assert budget is None or shelf.in_memory <= budget
    on_disk = len(list(tmp_path.glob("scratch/*")))
    assert on_disk == {None: 0, 10**6: 0, 27: 1, 0: 2}[budget]
    shelf.export("a", tmp_path / "kept")
    shelf.put("a", {"blocks": torch.full((2,), 7.0)})
    assert same(read_value(tmp_path / "kept"), VALUE)
    assert same(shelf.get("a"), {"blocks": torch.full((2,), 7.0)})
    shelf.drop("a")
    shelf.drop("b")
    assert shelf.in_memory == 0 and not list(tmp_path.glob("scratch/*"))
    with pytest.raises(KeyError):
        shelf.get("a")


def test_what_a_file_cannot_hold_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="a set cannot be kept in a file"):
        write_value(tmp_path / "x", {"a": {1, 2}})
    with pytest.raises(FormatError, match=f"{tmp_path}/x: this file is missing"):
        read_value(tmp_path / "x")
    write_value(tmp_path / "x", VALUE)
    (tmp_path / "x").write_bytes((tmp_path / "x").read_bytes()[:-3])
    with pytest.raises(FormatError, match=f"{tmp_path}/x: truncated or altered"):
        read_value(tmp_path / "x")


def test_a_file_with_any_byte_changed_is_refused_or_the_same(tmp_path: Path) -> None:
    write_value(tmp_path / "x", VALUE)
    good = (tmp_path / "x").read_bytes()
    refused = 0
    for place in range(len(good)):
        for changed in (good[place] ^ 1, good[place] ^ 32, 0):
            (tmp_path / "x").write_bytes(good[:place] + bytes([changed]) + good[place + 1 :])
            try:
                assert same(read_value(tmp_path / "x"), VALUE)
            except FormatError as error:
                assert str(error).startswith(f"{tmp_path}/x: truncated or altered (")
                refused += 1
    assert refused > 2 * len(good)


def test_a_tensor_has_one_place(tmp_path: Path) -> None:
    """A small file must not fill the memory."""
    structure = json.dumps({"list": [{"tensor": "0"}] * 10**6})
    write_tensors(tmp_path / "x", {"0": torch.zeros(1000)}, {"structure": structure})
    with pytest.raises(FormatError, match="tensor '0' stands in two places"):
        read_value(tmp_path / "x", own=True)


def test_tensors_lie_as_they_would_after_a_file() -> None:
    whole = torch.arange(64.0).view(8, 8)
    for view in (whole, whole.T, whole[:, 1:], whole.view(-1)[1:9]):
        ours = settled({"a": [view]})["a"][0]
        assert torch.equal(ours, view)
        assert ours.is_contiguous() and ours.data_ptr() % ALIGNMENT == 0
    assert settled(whole) is not None and settled(whole).data_ptr() == whole.data_ptr()
    assert bytes_of(VALUE) == 6 * 4 + 2 * 2


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Job:
    return make_job(tmp_path_factory.mktemp("made") / "job", blocks=3)


@pytest.fixture
def job(made: Job, tmp_path: Path) -> Job:
    shutil.copytree(made.folder, tmp_path / "job")
    return Job(tmp_path / "job", dict(made.recipe))


def test_hidden_states_on_disk_change_nothing(
    job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert in_process(capsys, "quantize", job.write(), "--out", tmp_path / "in memory").code == 0
    spilled: list[Path] = []

    def seen(path: Path, value: Any) -> None:
        spilled.append(path)
        write_value(path, value)

    monkeypatch.setattr("epmq.shelf.write_value", seen)
    # Room for nothing but what no setting spares.
    monkeypatch.setattr(Estimate, "room", lambda self, memory: (0, 0))
    assert in_process(capsys, "quantize", job.write(), "--out", tmp_path / "on disk").code == 0
    assert len([path for path in spilled if path.parent.name == "scratch-0"]) > 3 * 2 * 3
    assert content(tmp_path / "in memory") == content(tmp_path / "on disk")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in memory", "job", "on disk"]


@pytest.mark.parametrize(
    ("given", "wanted"), [(1000, 1000), ("8GiB", 8 * 2**30), ("1.5 MB", 1_500_000), ("64KiB", 65536), (None, None)]
)
def test_memory_in_a_recipe(given: Any, wanted: int | None) -> None:
    assert Recipe.parse({"base": "x", "memory": given}, "recipe.yaml").memory == wanted


@pytest.mark.parametrize("given", ["8 gigs", "GiB", "-1GiB", 0, -5, "nan GiB"])
def test_memory_that_makes_no_sense(given: Any) -> None:
    with pytest.raises(ConfigError, match=r"recipe.yaml: memory: "):
        Recipe.parse({"base": "x", "memory": given}, "recipe.yaml")


def test_what_cannot_fit_is_refused_before_the_start(
    job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job.recipe["memory"] = "64KiB"
    done = in_process(capsys, "quantize", job.write(), "--out", tmp_path / "out")
    assert done.code == 2
    assert "one block of this model takes about" in done.err and "raise memory: in the recipe" in done.err
    assert [path.name for path in tmp_path.iterdir()] == ["job"]


def test_a_dry_run_tells_and_does_nothing(job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done = in_process(capsys, "quantize", job.write(), "--out", tmp_path / "out", "--dry-run")
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith("estimate: 3 blocks of ")
    assert [path.name for path in tmp_path.iterdir()] == ["job"]


def test_estimates_grow_with_what_they_count(toy_job: ToyJob, monkeypatch: pytest.MonkeyPatch) -> None:
    skeleton = meta_copy(toy_job.merged)
    batches = toy_job.calibration

    def of(config: QuantConfig = QuantConfig(), processes: int = 1, times: int = 1) -> Estimate:  # noqa: B008
        return estimate(
            skeleton, {task: b * times for task, b in batches.items()}, config, 3, processes, torch.device("cpu"), 4
        )

    plain = of()
    rows = 3 * 3 * 8 * 12
    # Deployed and inside the expert, and inside the block: the expert's inputs of query, up (32 wide) and down (64).
    assert plain.states == 4 * rows * (2 * 32 + 32 + 32 + 64)
    assert of(times=2).states == 2 * plain.states and of(times=2).fixed == plain.fixed
    assert of(processes=3).states == plain.states // 3
    assert of(QuantConfig(alpha=0.0)).states == 4 * rows * 32
    assert of(QuantConfig(forward_dtype="bfloat16")).states == rows * (4 * 2 * 32 + 2 * (32 + 32 + 64))
    # 256 rows for each of the three tasks: what query, key, out and up give, taken for one group, and their input.
    assert plain.fixed - of(processes=3).fixed == 4 * 2 * 256 * (3 * 32 + 64 + 32)
    best = of(preset("best"))
    assert best.fixed > plain.fixed
    assert (plain.walks, plain.tuning) == (1, 0.0) and best.walks == 2 and best.tuning > 0.0
    assert f"{best.blocks} blocks of {best.seconds:.1f} s twice, {best.tuning:.0f} s of distillation" in best.told()
    assert of(QuantConfig(bits=8)).disk > plain.disk
    # In bfloat16 the passes of a distillation run at that dtype's rate, in float16 they stay in fp32.
    monkeypatch.setattr("epmq.estimate._speed", lambda dtype, device: 1e9 if dtype == torch.float32 else 4e9)
    tuning = {kind: of(preset("best", forward_dtype=kind)).tuning for kind in ("float32", "bfloat16", "float16")}
    assert tuning["float32"] == tuning["float16"] == 4 * tuning["bfloat16"]
    assert plain.blocks == 2 and plain.seconds > 0.0


MERGING = """
import sys
import torch
from epmq import memory, ties
from epmq.merge import MergedSource
from epmq.merge_config import MergeConfig
from epmq.sources import DictSource

class Made(DictSource):
    def tensor(self, key):
        return torch.randn(10_000_000, generator=torch.Generator().manual_seed(len(self.name)))

def made(length):
    source = Made({}, "x" * length)
    source.keys, source.shape, source.dtype = lambda: ["a"], lambda key: (10_000_000,), lambda key: torch.float32
    return source

torch.set_num_threads(1)
ways = {"method": "ties", "dialect": sys.argv[1], "density": 0.2} if sys.argv[1:] else {"method": "task_arithmetic"}
settings = MergeConfig.read(ways)
merged = MergedSource(made(1), {str(n): made(n) for n in range(2, 8)}, settings)
before = memory.peak_memory_bytes()
merged.tensor("a")
taken, allowed = memory.peak_memory_bytes() - before, merged.tensors_held * 40_000_000 + 4 * 4 * ties.CHUNK
sys.exit(0 if allowed / 2 < taken < allowed else f"{taken:,} bytes, reckoned {allowed:,}")
"""


@pytest.mark.parametrize("dialect", [None, "mergekit", "peft", "fusion_bench"])
def test_a_merge_takes_the_memory_that_is_reckoned(dialect: str | None) -> None:
    done = subprocess.run(
        [sys.executable, "-c", MERGING, *([dialect] if dialect else [])], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_operations_of_a_distillation(toy_job: ToyJob) -> None:
    settings = DistillSettings(steps=10, examples=2, copies=3, last_blocks=0.5)
    # 3 tasks of 3 batches of 8 texts of 12 tokens: experts on four variants of each and on a similar task's, then steps
    # of 2 texts a task, through all weights forwards and half of them backwards.
    targets = 2 * 1000 * (3 * 3 * 8 * 12) * 4 * 2
    steps = 10 * 3 * 2 * 12 * (2 * 1000 + 4 * 500)
    assert tuning_operations(settings, toy_job.calibration, 32, 1000) == targets + steps


def test_room_is_shared_out() -> None:
    found = Estimate(fixed=100, states=1000, disk=50, seconds=1.0, blocks=2)
    assert found.room(500) == (300, 100)
    with pytest.raises(ConfigError, match="one block of this model takes"):
        found.room(99)
    found.check_disk(50, 0, "/x")
    with pytest.raises(OutputError, match=r"/x: the run needs about .* MiB of disk there"):
        found.check_disk(50, 1, "/x")


def test_memory_of_this_process_is_told() -> None:
    assert 0 < resident_bytes() <= peak_memory_bytes() * 1.01
    before = resident_bytes()
    held = torch.ones(2**24)
    assert resident_bytes() - before > 0.9 * held.numel() * 4
    assert available_bytes() > 0
