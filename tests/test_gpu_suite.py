"""The GPU suite where there is none: its items on small shapes in the interpreter, its tables, how it goes on."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import re
import subprocess
import sys
import time
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from forms import CUT_OFF, cut_off_sums

pytest.importorskip("triton", reason="Triton is not installed")

from gpu import int4_products, job, packages, parts, rivals, second_moments, solver, suite, tables, whole_block
from gpu import timing as walls
from gpu.setting import Row, Setting, relative
from triton.runtime.errors import OutOfResources

from epmq import ops, reference
from epmq.errors import NumericalError
from epmq.kernels import timing
from epmq.quantized import pack

FACTS = {"device": "a card", "torch": "2"}


def run(*arguments: str) -> int:
    """Exit status of the suite with these arguments."""
    with pytest.raises(SystemExit) as left:
        suite.main(list(arguments))
    code = left.value.code
    return code if isinstance(code, int) else 1


def inside(part: str, folder: Path) -> dict[str, Any]:
    """What a part's own process writes, run in this one."""
    suite.main(["--tiny", "--inside", "--part", part, "--out", str(folder)])
    items: dict[str, Any] = json.loads((folder / "gpu.json").read_text())["items"]
    return items


def setting(timed: bool = False) -> Setting:
    return Setting(torch.device("cuda" if torch.cuda.is_available() else "cpu"), True, {}, {}, timed)


@pytest.mark.parametrize("part", ["launch", "gram", "gptq", "product", "block"])
def test_each_part_checks_itself_on_small_shapes(part: str, tmp_path: Path) -> None:
    found = inside(part, tmp_path)
    assert {name.split()[0] for name in found} == {part}
    assert all(item["rows"] and "error" not in item for item in found.values())
    assert not any("failed" in row for item in found.values() for row in item["rows"])
    text = (tmp_path / "gpu.md").read_text()
    assert f"## {part}" in text and "## Not measured" in text and "int4 llama-3-8b o 4096x4096, M=1, M=4," in text


@pytest.mark.parametrize("tokens", int4_products.TOKENS[:3])
def test_an_item_of_the_int4_part_checks_itself_on_a_small_shape(tokens: int) -> None:
    (row,) = int4_products.int4(setting(), "llama-3-8b o", 4096, 4096, tokens)
    assert row["M"] == tokens and "failed" not in row


def test_it_goes_on_where_it_stopped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    some = ["--tiny", "--part", "block", "launch", "--out", str(tmp_path)]
    assert run(*some, "--minutes", "-1") == 0
    assert json.loads((tmp_path / "gpu.json").read_text())["items"] == {}
    first, second, third, fourth = (name for name in parts.items(setting()) if name.split()[0] in ("block", "launch"))
    kept = {"rows": [{"N": 1}], "seconds": 0.0}
    results = tables.read(tmp_path, suite.facts(True))
    broken = {"rows": [{"N": 2, "failed": "wrong"}], "seconds": 0.0}
    half = {"rows": [{"N": 3}], "error": suite.BEGUN}
    tables.write(tmp_path, {**results, "items": {first: kept, second: broken, third: half}}, [first])
    suite.main([*some, "--list"])
    listed = capsys.readouterr().out
    assert f"done  {first}" in listed and f"open  {second}" in listed and f"open  {fourth}" in listed
    # Each part in a process of its own; what failed or was cut off is run again.
    assert run(*some) == 0
    found = json.loads((tmp_path / "gpu.json").read_text())["items"]
    assert found[first] == kept and set(found) == {first, second, third, fourth}
    for name in (second, third, fourth):
        (row,) = found[name]["rows"]
        assert "error" not in found[name] and "failed" not in row and ("M" in row or "forward" in row)


@pytest.mark.parametrize(
    "error",
    [AssertionError("wrong"), OutOfResources(300_000, 232_448, "shared memory"), NumericalError("wrong"), TypeError()],
    ids=lambda error: type(error).__name__,
)
def test_what_an_item_throws_ends_only_that_item(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    right, calls = int4_products.launch, []

    def broken(*arguments: Any) -> Iterator[Row]:
        calls.append(arguments)
        if len(calls) > 1:
            yield from right(*arguments)
            return
        row: Row = {"M": 1}
        yield row
        row["µs"] = 2.0
        yield row
        raise error

    monkeypatch.setattr(int4_products, "launch", broken)
    first, second = inside("launch", tmp_path).values()
    assert first["rows"] == [{"M": 1, "µs": 2.0}] and first["error"].startswith(type(error).__name__)
    assert "error" not in second and second["rows"]
    assert "in broken" in capfd.readouterr().err  # the traceback
    assert f"launch {parts.LAUNCHED[0]}: {first['error']}" in (tmp_path / "gpu.md").read_text()


def test_a_process_that_dies_is_followed_by_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after an illegal access: what was begun is named, the next item has a process of its own."""
    names = [name for name in parts.items(setting()) if name.split()[0] == "gptq"]
    commands: list[list[str]] = []

    def dies(command: list[str], **_: Any) -> Any:
        commands.append(command)
        results = tables.read(tmp_path, suite.facts(True))
        results["items"][names[len(commands) - 1]] = {"rows": [], "error": suite.BEGUN}
        tables.write(tmp_path, results, names)
        return subprocess.CompletedProcess(command, -9)

    monkeypatch.setattr(subprocess, "run", dies)
    assert run("--tiny", "--part", "gptq", "--out", str(tmp_path)) == 1
    assert len(commands) == len(names) and suite.BEGUN in (tmp_path / "gpu.md").read_text()

    def cannot_begin(command: list[str], **_: Any) -> Any:
        commands.append(command)
        return subprocess.CompletedProcess(command, 1)

    monkeypatch.setattr(subprocess, "run", cannot_begin)
    assert run("--tiny", "--part", "gptq", "--out", str(tmp_path)) == 1
    assert len(commands) == len(names) + 1


def test_a_failed_check_is_written_into_its_row(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    right = reference.gptq_sweep
    monkeypatch.setattr(reference, "gptq_sweep", lambda *problem: right(*problem) ^ 1)
    rows = [row for item in inside("gptq", tmp_path).values() for row in item["rows"]]
    assert len(rows) == len(parts.SWEEPS) and all("of the codes differ" in row["failed"] for row in rows)
    assert "## Failed" in (tmp_path / "gpu.md").read_text()


def test_moments_that_miss_a_row_are_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    form = next(form for form in ops.implementations("accumulate") if form.backend == "triton")
    short = dataclasses.replace(
        form,
        function=lambda x, h, s, target, *rest: form.function(
            x[1:], h, s, None if target is None else target[1:], *rest
        ),
    )
    monkeypatch.setattr(ops, "implementations", lambda op: [short])
    (row,) = second_moments.gram(setting(), *parts.GRAMS[2])
    assert "moments of small integers" in row["failed"]


@pytest.mark.parametrize(("places", "step"), CUT_OFF.values(), ids=[f"sm_{arch}" for arch in CUT_OFF])
def test_drift_is_what_sums_that_are_cut_off_have(places: int, step: int) -> None:
    """A part of 8192 rows. For sums of squares a hundred thousandth, which 512 sums rounded to nearest would keep to,
    is too little."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(8192, 12, generator=generator).bfloat16().double() for _ in range(2))
    for left in (x, y):
        error = relative(cut_off_sums(left, x, places, step), left.T @ x)
        print(f"{error:.3g} of {second_moments.drift(8192):.3g}")
        assert error < second_moments.drift(8192)
        assert left is y or error > 1e-5


def test_tiles_are_checked_and_the_fastest_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    (row,) = int4_products.tiles(setting(), "llama-3-8b o", 4096, 4096, 16)
    assert row["others"] > 3 and "failed" not in row
    monkeypatch.setattr(int4_products, "product_milliseconds", lambda key, config, seconds: 2.0 - (config.block_m == 8))
    *_, row = int4_products.tiles(setting(timed=True), "llama-3-8b o", 4096, 4096, 16)
    assert row["chosen µs"] == 2000.0 and row["fastest µs"] == 1000.0
    assert row["chosen"].startswith("16x") and row["fastest"].startswith("8x")
    assert "failed" not in row and row["all µs"][row["fastest"]] == 1000.0 and len(row["all µs"]) == row["others"] + 1
    assert any("in one launch" in name for name in row["all µs"])
    assert "all µs" not in tables.table([row])[0] and "fastest µs" in tables.table([row])[0]


@pytest.mark.parametrize("part", ["int4", "launch", "gram", "gptq"])
def test_a_failing_rival_does_not_lose_our_row(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is timed, with clocks that stand still: all rivals fail, our numbers stay, and why is written down."""

    def fails(*_: Any, **__: Any) -> Any:
        raise MemoryError("too large")

    for name, fake in {
        "microseconds": lambda calls, *a: ([call() for call in calls], (1.0, "graph"))[1],
        "milliseconds": lambda call, *a, **k: (call(), 1.0)[1],
        "launch_microseconds": lambda call, *a: (call(), 1.0)[1],
        "clocks": lambda: "1980, 3201",
        "replayed": lambda call: call(),
    }.items():
        for module in (int4_products, second_moments, solver):
            monkeypatch.setattr(module, name, fake, raising=False)
    monkeypatch.setattr(rivals, "PRODUCTS", {"cublas": rivals.cublas, "another": fails})
    for module, name in ((rivals, "llm_compressor"), (torch, "compile"), (torch, "addmm")):
        monkeypatch.setattr(module, name, fails)
    here = setting(timed=True)
    item = next(item for name, item in parts.items(here).items() if name.startswith(part))
    rows = list({id(row): row for row in item()}.values())
    assert len(rows) == 1 and "failed" not in rows[0]
    own = {"int4": "epmq µs", "launch": "from Python µs", "gram": "triton ms", "gptq": "sweep ms"}[part]
    assert rows[0][own] == (1e-3 if part == "gram" else 1.0)  # microseconds, in milliseconds
    assert all(reason.startswith("failed: MemoryError") for name, reason in here.absent.items() if "form" not in name)
    assert len(here.absent) >= 1


def test_a_block_is_timed_when_all_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, fake in {"reset_peak_memory_stats": lambda: None, "max_memory_allocated": lambda: 2**30}.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    ticks = itertools.chain([0.0, 9.0, 20.0, 21.0], itertools.count(30.0))
    monkeypatch.setattr(whole_block, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    rows = list(whole_block.block(setting(timed=True), "float32"))
    assert len(rows) == 3 and rows[0] is rows[1] is rows[2] and "failed" not in rows[0]
    assert rows[0]["first time s"] == 9.0 and rows[0]["seconds"] == 1.0 and rows[0]["peak GPU GiB"] == 1.0
    # Every look at the clock takes a second: a call of a kind is one of them.
    experts, batches, groups = 2, 1, 4
    assert rows[0]["solve and sweep s"] == groups and rows[0]["fold s"] == experts * groups
    assert rows[0]["statistics s"] == experts * groups * (2 + batches)
    assert rows[0]["loading s"] == 1 + experts + experts * groups
    assert rows[0]["forward s"] >= experts * batches * (2 + groups)
    assert rows[0]["all, piece by piece s"] > sum(rows[0][f"{kind} s"] for kind in ("statistics", "forward", "fold"))


def test_clocks_that_take_long_are_asked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[float] = []

    def slow(*_: Any, **__: Any) -> Any:
        asked.append(now[0])
        now[0] += 0.5
        return SimpleNamespace(stdout="1980, 3201\n")

    now = [0.0]
    monkeypatch.setattr(walls, "_without_clocks", [])
    monkeypatch.setattr(walls, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(subprocess, "run", slow)
    assert [walls.clocks(), walls.clocks()] == ["1980, 3201", None] and len(asked) == 1


def test_results_of_other_versions_are_not_mixed(tmp_path: Path) -> None:
    tables.write(tmp_path, {"facts": FACTS, "items": {}, "absent": {}}, [])
    assert tables.read(tmp_path, FACTS)["facts"] == FACTS
    with pytest.raises(SystemExit, match="measured with other versions"):
        tables.read(tmp_path, {**FACTS, "torch": "3"})


def test_tables_hold_every_key_and_say_what_is_missing() -> None:
    rows: list[dict[str, Any]] = [{"M": 1, "ours µs": 12.34567}, {"M": 2, "ours µs": None, "rival µs": 3.0}]
    assert tables.table(rows) == [
        "| M | ours µs | rival µs |", "|---|---|---|", "| 1 | 12.35 | – |", "| 2 | – | 3 |",
    ]  # fmt: skip
    results = {"facts": FACTS, "items": {"int4 a": {"rows": rows}}, "absent": {"marlin": "no vLLM"}}
    text = tables.markdown(results, ["int4 a", "gram b"])
    assert "- absent: marlin (no vLLM)" in text and "## Not measured\n\n- gram b" in text


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="no NVIDIA GPU here"):
        suite.main(["--out", str(tmp_path)])
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(SystemExit, match="set TRITON_INTERPRET=1"):
        suite.main(["--tiny", "--out", str(tmp_path)])


def wheel_of(module: str, folder: Path) -> None:
    """A wheel of an empty module."""
    with zipfile.ZipFile(folder / f"{module}-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{module}.py", "")
        about = f"{module}-1.0.dist-info"
        wheel.writestr(f"{about}/METADATA", f"Metadata-Version: 2.1\nName: {module.replace('_', '-')}\nVersion: 1.0\n")
        wheel.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{about}/RECORD", "")


def test_what_a_machine_lacks_is_named_or_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "WELCOME", {})
    monkeypatch.setattr(packages, "NEEDED", {"torch": "torch"})
    packages.main(tmp_path / "none", tmp_path / "target")  # nothing to do
    monkeypatch.setattr(packages, "NEEDED", {"epmq_needs_this": "epmq-needs-this", "torch": "torch"})
    with pytest.raises(SystemExit, match=r"epmq-needs-this cannot be imported .*none is not there; run make"):
        packages.main(tmp_path / "none", tmp_path / "target")
    with pytest.raises(SystemExit, match="epmq-needs-this could not be installed"):
        packages.main(tmp_path, tmp_path / "target")
    wheel_of("epmq_needs_this", tmp_path)
    packages.main(tmp_path, tmp_path / "target")
    assert (tmp_path / "target" / "epmq_needs_this.py").is_file()


def test_what_is_welcome_is_installed_where_it_was_brought(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "NEEDED", {})
    monkeypatch.setattr(packages, "WELCOME", {"epmq_likes_this": "epmq-likes-this", "torch": "torch"})
    packages.main(tmp_path / "none", tmp_path / "target")
    packages.main(tmp_path, tmp_path / "target")
    assert not (tmp_path / "target").exists()
    wheel_of("epmq_likes_this", tmp_path)
    packages.main(tmp_path, tmp_path / "target")
    assert (tmp_path / "target" / "epmq_likes_this.py").is_file()


def test_rivals_are_installed_where_they_were_brought_and_never_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """One is not there, one is there already; a version that is asked for and is not among the wheels stops nothing."""
    monkeypatch.setattr(packages, "NEEDED", {})
    monkeypatch.setattr(packages, "WELCOME", {})
    rival = {"epmq_is_beside_this": "epmq-is-beside-this==1.0", "epmq_is_absent": "epmq-is-absent", "torch": "torch"}
    monkeypatch.setattr(packages, "RIVALS", rival)
    packages.main(tmp_path / "none", tmp_path / "target")
    wheel_of("epmq_is_beside_this", tmp_path)
    wheel_of("torch", tmp_path)
    packages.main(tmp_path, tmp_path / "target")
    assert sorted(path.name for path in (tmp_path / "target").glob("*.py")) == ["epmq_is_beside_this.py"]
    monkeypatch.setattr(packages, "RIVALS", {"epmq_is_beside_this": "epmq-is-beside-this==2.0"})
    packages.main(tmp_path, tmp_path / "other")
    assert not (tmp_path / "other").exists() and "goes on without them" in capfd.readouterr().out


def test_wheels_are_fetched_without_what_rivals_bring_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []
    monkeypatch.setattr(subprocess, "run", lambda command, **_: commands.append(command))
    packages.fetch(tmp_path, "3.12")
    needed, beside, built = commands
    assert "numpy" in needed and "--no-deps" not in needed and not {*packages.RIVALS.values()} & {*needed}
    assert "--no-deps" in beside and "compressed-tensors==0.19.0" in beside and "gemlite" not in beside
    assert "wheel" in built and "--no-deps" in built and "gemlite" in built


def test_what_compiles_is_measured_at_some_products_until_it_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rivals, "failures", Counter())
    assert set(rivals.SOME) <= set(rivals.PRODUCTS)
    layers = set(int4_products.LAYERS.values())
    for shapes in rivals.SOME.values():
        assert set(shapes) <= layers and all({*counts} <= {*int4_products.TOKENS} for counts in shapes.values())
    assert rivals.measured("cublas", 3072, 1024, 8192) and not rivals.measured("tinygemm", 3072, 1024, 512)
    assert rivals.measured("humming", 8192, 8192, 64) and not rivals.measured("humming", 6144, 4096, 64)
    rivals.failures["humming"] += rivals.MOST_FAILURES
    assert not rivals.measured("humming", 8192, 8192, 64) and rivals.measured("gemlite", 4096, 4096, 16)


def test_humming_is_given_our_codes_and_told_its_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in the checkpoints that it reads: words of eight codes along the input, of eight zeros along the output."""
    given: dict[str, Any] = {}

    class Layer:
        humming_config = "config"

        def __init__(self, rows: int, columns: int, form: dict[str, Any], torch_dtype: torch.dtype) -> None:
            given.update(form, shape=(rows, columns), dtype_of_scales=torch_dtype)

        def to(self, device: torch.device) -> Layer:
            return self

        def load_from_tensors(self, tensors: dict[str, torch.Tensor]) -> None:
            given.update(tensors)

        def transform(self) -> None:
            given["transformed"] = True

        def __call__(self, x: torch.Tensor, tuning_config: str) -> None:
            given["programs"] = json.loads(tuning_config)

    fakes = {
        "humming.layer": SimpleNamespace(HummingLayer=Layer),
        "humming.tune": SimpleNamespace(get_heuristics_config=lambda config, shape_m: {"for": shape_m}),
        "torch.utils.cpp_extension": SimpleNamespace(CUDA_HOME=None),
    }
    monkeypatch.setattr(rivals, "_module", fakes.__getitem__)
    monkeypatch.setitem(rivals.SOME, "humming", {(64, 256): (1, 16, 64)})
    monkeypatch.setenv("HUMMING_COMPILER", "nvcc")
    weight = int4_products.random_weight(64, 256, torch.device("cpu"), 0)
    assert weight.zeros is not None
    rivals.humming(torch.zeros(16, 256).half(), weight)()
    assert given["transformed"] and given["shape"] == (64, 256) and given["has_zero_point"]
    assert torch.equal(given["weight"], pack(weight.codes, 4))
    assert torch.equal(given["zero_point"], pack(weight.zeros.T, 4).T) and given["zero_point"].shape == (8, 2)
    assert given["programs"] == [[0, 1, {"for": 1}], [1, 16, {"for": 16}], [16, 64, {"for": 64}]]


def test_rotating_data_exceeds_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    class Card:
        L2_cache_size = 50 * 2**20

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Card)
    for size in (2**20, 40 * 2**20, 400 * 2**20):
        copies = timing.copies_needed(size, torch.device("cuda"))
        assert copies == 64 or (copies - 1) * size >= 2 * Card.L2_cache_size
    assert timing.copies_needed(1, torch.device("cpu")) == 1


class Card:
    """A GPU for the timer: calls take ``each`` seconds of its own clock, and events read it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, each: float):
        card, seen = self, list[str]()
        self.now, self.each, self.seen = 0.0, each, seen

        class Graph:
            def replay(self) -> None:
                card.seen.append("replay")
                card.now += len(card.captured) * each

        class Event:
            def __init__(self, enable_timing: bool):
                self.at = 0.0

            def record(self) -> None:
                card.seen.append("record")
                self.at = card.now

            def synchronize(self) -> None:
                pass

            def elapsed_time(self, other: Any) -> float:
                return 1e3 * float(other.at - self.at)

        @contextlib.contextmanager
        def graph(made: Any) -> Iterator[None]:
            before = self.now
            self.captured: list[int] = []
            yield
            self.captured, self.now = list(range(round((self.now - before) / each))), before

        for name, fake in {
            "CUDAGraph": Graph, "Event": Event, "graph": graph, "synchronize": lambda: None,
            "_sleep": lambda cycles: self.seen.append("sleep"),
        }.items():  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, fake)
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.now)

    def call(self) -> None:
        self.now += self.each


@pytest.mark.parametrize("each", [5e-6, 1e-3, 0.1, 0.2, 3.0])
def test_the_timer_counts_right_and_keeps_to_its_seconds(each: float, monkeypatch: pytest.MonkeyPatch) -> None:
    card = Card(monkeypatch, each)
    found, how = timing.microseconds([card.call], 0.5)
    assert found == pytest.approx(1e6 * each)
    assert card.now < max(0.6, 3 * each)
    assert how == ("graph" if each < 0.125 else "wall")
    if how == "wall":
        return
    # The GPU waits until all is queued; it has its clocks by then.
    first = card.seen.index("sleep")
    assert first * len(card.captured) * each >= min(timing.WARM_SECONDS, each)
    assert card.seen[first : first + 2] == ["sleep", "record"] and card.seen[-1] == "record"
    if each < 1e-5:
        assert len(card.captured) == timing.LAUNCHES
        assert card.seen[first + 2 : first + 7] == ["replay"] * timing.ROUNDS + ["record"]
        assert card.seen.count("sleep") == timing.REPLAYS


def test_a_step_ends_in_its_time_and_is_written_down(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    command = [sys.executable, "-c", "import os, time; print(os.environ['SAID'], flush=True); time.sleep(60)"]
    begun = time.monotonic()
    assert job.step(command, 5, tmp_path / "log", SAID="here") != 0
    assert time.monotonic() - begun < 30
    assert (tmp_path / "log").read_text() == capfd.readouterr().out == "here\n"
    assert job.step([sys.executable, "-c", "pass"], 60, tmp_path / "log") == 0


def test_without_the_extension_the_rest_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    steps: list[tuple[list[str], float, dict[str, str]]] = []

    def step(command: list[str], seconds: float, log: Path, **variables: str) -> int:
        assert log.parent == tmp_path.resolve()
        steps.append((command, seconds, variables))
        return int("setup.py" in command)

    monkeypatch.setattr(job, "step", step)
    with pytest.raises(SystemExit) as left:
        job.main(["--part", "tests", "int4", "gram", "--minutes", "9", "--out", str(tmp_path)])
    assert left.value.code == 0 and "goes on without it" in capsys.readouterr().out
    (built, *_), (tested, _, for_tests), (measured, seconds, for_suite) = steps
    assert "setup.py" in built and for_tests == for_suite == {"EPMQ_EXTENSION": "0"}
    assert all((job.ROOT / path).is_file() for path in tested if path.startswith("tests/"))
    assert measured[3:6] == ["--part", "int4", "gram"] and measured[-2:] == ["--out", str(tmp_path.resolve())]
    assert 480 < seconds < 600
    assert job.BUILD_SECONDS + job.TESTS_SECONDS < 60 * 9 - 120


def test_the_files_with_tests_for_a_gpu_are_all_named() -> None:
    marked = re.compile(r"mark\.gpu\b|\bforms\(|^def test_\w+\([^)]*\bdevice: torch\.device", re.MULTILINE)
    found = [path.name for path in Path(__file__).parent.glob("test_*.py") if marked.search(path.read_text())]
    assert sorted(found) == sorted(job.TESTS)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here")
def test_times_on_a_gpu_are_positive_and_graphs_are_used() -> None:
    x = torch.randn(256, 256, device="cuda")
    taken, how = timing.microseconds([lambda: x @ x])
    assert taken > 0 and how == "graph"
    assert torch.equal(timing.replayed(lambda: x @ x), x @ x)
    assert walls.launch_microseconds(lambda: x @ x) > 0 and walls.milliseconds(lambda: x @ x) > 0
