"""Runs that are cut off, at any moment and by anything, and go on: the same bytes, nothing twice, nothing left."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import pathlib
import random
import resource
import shutil
import signal
import subprocess
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import Job, in_process, make_job
from safetensors.torch import load_file
from torch import Tensor

from epmq import files, progress
from epmq.calls import BlockAddress
from epmq.engine import Engine
from epmq.errors import OutputError
from epmq.fingerprint import fingerprint
from epmq.jobs import quantize_to_folder
from epmq.page.document import PAGE_NAME
from epmq.progress import Journal, first_difference
from epmq.recipe import read_recipe
from epmq.report import RUN_NAME, whole_report
from epmq.shelf import write_value
from epmq.world import World

pytest.importorskip("transformers")

KILLS = int(os.environ.get("EPMQ_KILLS", "4"))
# The first backward pass starts a thread for each device, after which no child of a process may run one. Without a GPU
# there is none now; in a CUDA build torch.compile makes one up later.
torch.zeros(1, requires_grad=True).sum().backward()
BEST = {"distill": {"steps": 45, "copies": 1, "examples": 2}}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Job:
    job = make_job(tmp_path_factory.mktemp("made") / "job", blocks=4)
    job.write()
    return job


@pytest.fixture
def job(made: Job, tmp_path: Path) -> Job:
    shutil.copytree(made.folder, tmp_path / "job")
    return Job(tmp_path / "job", json.loads(json.dumps(made.recipe)))


def content(folder: Path) -> dict[str, bytes]:
    """Every file's bytes but of those that tell of the run itself."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in (RUN_NAME, PAGE_NAME)
    }


def in_child(work: Callable[[], Any]) -> int:
    """A process that has imported everything already and does one thing; pytest shows its errors when a test fails."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        work()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def quantize(recipe: Path, out: Path, resume: bool = True) -> None:
    quantize_to_folder(read_recipe(recipe), out, resume)


def ended(child: int) -> int:
    """How a child ended: its exit status, or minus the signal."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.timeout(600 + 60 * KILLS)
@pytest.mark.parametrize("settings", [{}, BEST], ids=["closed form", "best"])
def test_killed_at_random_moments_and_resumed(settings: dict[str, Any], job: Job, tmp_path: Path) -> None:
    job.recipe["quantization"].update(settings)
    recipe = job.write()
    whole, out = tmp_path / "whole", tmp_path / "place" / "out"
    started = time.perf_counter()
    assert ended(in_child(lambda: quantize(recipe, whole))) == 0
    seconds = time.perf_counter() - started
    wanted = content(whole)
    moments = random.Random(f"{settings}")
    killed = 0
    while killed < KILLS:
        while True:
            child = in_child(lambda: quantize(recipe, out))
            time.sleep(moments.uniform(0.0, seconds))
            os.kill(child, signal.SIGKILL)
            if ended(child) == 0:
                break
            killed += 1
            if moments.random() < 0.5:
                assert ended(in_child(lambda: quantize(recipe, out))) == 0
                break
        assert [path.name for path in out.parent.iterdir()] == ["out"]
        assert content(out) == wanted
        shutil.rmtree(out)


def test_a_file_that_would_be_carried_is_part_of_the_job(
    job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, out = job.write(), tmp_path / "out"
    quantize(recipe, out)
    (job.folder / "base" / "notes").mkdir()
    (job.folder / "base" / "notes" / "config.json").write_text("{}")
    assert in_process(capsys, "quantize", recipe, "--out", out, "--resume").code == 0
    (job.folder / "base" / "1_Pooling").mkdir()
    (job.folder / "base" / "1_Pooling" / "config.json").write_text("{}")
    done = in_process(capsys, "quantize", recipe, "--out", out, "--resume")
    assert (done.code, done.err) == (
        2,
        f"epmq: {out}: the output folder is not empty; choose another or remove it.\n",
    )


def test_a_dry_run_refuses_what_the_run_refuses(job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe, out = job.write(), tmp_path / "out"
    out.mkdir()
    (out / "there").touch()
    full = f"epmq: {out}: the output folder is not empty; choose another or remove it.\n"
    for more in ([], ["--resume"]):
        for dry in ([], ["--dry-run"]):
            assert in_process(capsys, "quantize", recipe, "--out", out, *more, *dry) == (2, "", full)
    shutil.rmtree(out)
    kept = cut_off(recipe, out, 1)
    left = content(kept)
    begun = in_process(capsys, "quantize", recipe, "--out", out, "--dry-run")
    assert begun.code == 2 and "began and did not end; go on with --resume" in begun.err
    assert in_process(capsys, "quantize", recipe, "--out", out, "--dry-run", "--resume").out.startswith("estimate: ")
    whole = recipe.read_text()
    job.recipe["quantization"]["bits"] = 3
    other = in_process(capsys, "quantize", job.write(), "--out", out, "--dry-run", "--resume")
    assert (other.code, other.out) == (2, "")
    assert "begun otherwise: settings, quantization, bits was 4 and is 3; restore that" in other.err
    recipe.write_text(whole)
    assert content(kept) == left
    quantize(recipe, out)
    told = in_process(capsys, "quantize", recipe, "--out", out, "--dry-run", "--resume")
    assert (told.code, told.out) == (
        0,
        f"{out}: an earlier run of this job has finished it; nothing would be done.\n",
    )


def cut_off(recipe: Path, out: Path, blocks: int) -> Path:
    """A run that is killed once so many blocks are finished; returns its working folder."""
    kept = out.with_name(f".{out.name}.partial")

    def work() -> None:
        original = write_value

        def write_and_die(path: Path, value: Any) -> None:
            original(path, value)
            if path.parent.name == "blocks" and len(list(path.parent.iterdir())) == blocks:
                os.kill(os.getpid(), signal.SIGKILL)

        setattr(progress, "write_value", write_and_die)  # noqa: B010
        quantize(recipe, out)

    assert ended(in_child(work)) == -signal.SIGKILL
    assert len(list((kept / "blocks").iterdir())) == blocks
    return kept


def killing(original: Callable[..., Any], when: Callable[..., bool], after: bool) -> Callable[..., Any]:
    """Does as the function does, and when it is called so kills this process before or after."""

    def act(*arguments: Any, **settings: Any) -> Any:
        hit = when(*arguments)
        if hit and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(*arguments, **settings)
        if hit:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    return act


def dying(name: str, when: Callable[[], bool], after: bool) -> Callable[..., Any]:
    """As :func:`killing`, for what removes parts of a working folder whose output has its name."""
    owner, _, leaf = name.rpartition(".")
    original = getattr(pathlib.Path if owner == "pathlib.Path" else shutil, leaf)
    return killing(original, lambda *arguments: when() and out_exists(arguments), after)


def out_exists(arguments: tuple[Any, ...]) -> bool:
    """Whether what is removed lies in, or is, the working folder of an output that has its name."""
    path = Path(arguments[0])
    kept = next((folder for folder in [path, *path.parents] if folder.name == ".out.partial"), None)
    return kept is not None and (kept.parent / "out").exists()


@pytest.mark.parametrize("point", [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (3, 0), (4, 0), (4, 1)])
def test_killed_around_the_last_rename(point: tuple[int, int], job: Job, tmp_path: Path) -> None:
    recipe, whole, out = job.write(), tmp_path / "whole", tmp_path / "place" / "out"
    assert ended(in_child(lambda: quantize(recipe, whole))) == 0
    which, after = point

    def work() -> None:
        last = {0: "finished", 1: "out"}
        renamed = killing(os.rename, lambda old, new: Path(new).name == last.get(which), bool(after))
        setattr(os, "rename", renamed)  # noqa: B010
        die = {2: "shutil.rmtree", 3: "pathlib.Path.unlink", 4: "pathlib.Path.rmdir"}
        if which in die:
            # While the working folder is removed: before the first of its folders, before its marks, at the very end.
            kept = out.with_name(".out.partial")
            pytest.MonkeyPatch().setattr(
                die[which], dying(die[which], lambda: (kept / "finished").exists() or which == 4, bool(after))
            )
        quantize(recipe, out)

    assert ended(in_child(work)) == -signal.SIGKILL
    assert ended(in_child(lambda: quantize(recipe, out))) == 0
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    assert content(out) == content(whole)


def test_a_finished_folder_is_left_to_the_same_job_alone(
    job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, out = job.write(), tmp_path / "out"
    first = in_process(capsys, "quantize", recipe, "--out", out)
    made = content(out)
    full = f"epmq: {out}: the output folder is not empty; choose another or remove it.\n"
    again = in_process(capsys, "quantize", recipe, "--out", out, "--resume")
    assert (again.code, again.out) == (0, first.out)
    assert in_process(capsys, "quantize", recipe, "--out", out)[::2] == (2, full)
    job.recipe["quantization"]["damp"] = 0.02
    assert in_process(capsys, "quantize", job.write(), "--out", out, "--resume")[::2] == (2, full)
    assert content(out) == made
    # Nor when an earlier run had yet to clear up.
    kept = out.with_name(".out.partial")
    kept.mkdir()
    (kept / "finished").touch()
    assert in_process(capsys, "quantize", job.write(), "--out", out, "--resume")[::2] == (2, full)
    assert (kept / "finished").exists()
    job.recipe["quantization"].pop("damp")
    assert in_process(capsys, "quantize", job.write(), "--out", out, "--resume").code == 0
    assert not kept.exists()


@pytest.mark.parametrize("lost", ["model.safetensors", "report.json", RUN_NAME])
def test_a_finished_folder_without_all_its_files_is_refused(
    lost: str, job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, out = job.write(), tmp_path / "out"
    assert in_process(capsys, "quantize", recipe, "--out", out).code == 0
    (out / lost).unlink()
    again = in_process(capsys, "quantize", recipe, "--out", out, "--resume")
    assert (again.code, again.err) == (
        2,
        f"epmq: {out}: the output folder is not empty; choose another or remove it.\n",
    )


def test_a_half_finished_folder_is_not_overwritten(
    job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, out = job.write(), tmp_path / "out"
    kept = cut_off(recipe, out, 2)
    before = content(kept)
    done = in_process(capsys, "quantize", recipe, "--out", out)
    assert (done.code, done.out) == (2, "")
    assert done.err == (
        f"epmq: {kept}: a run that was to write out began and did not end; go on with --resume, or remove that folder"
        " to begin anew.\n"
    )
    assert content(kept) == before


def test_finished_blocks_are_not_computed_again(
    job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, out = job.write(), tmp_path / "out"
    cut_off(recipe, out, 3)
    computed: list[str] = []
    original = Engine._block

    def block(self: Engine, address: BlockAddress) -> None:
        computed.append(address.name)
        original(self, address)

    monkeypatch.setattr(Engine, "_block", block)
    assert in_process(capsys, "quantize", recipe, "--out", out, "--resume").code == 0
    assert computed == ["encoder.layer.3"]
    names = [row["linear"] for row in whole_report(out)["layers"]]
    assert len(names) == len(set(names)) == 4 * 6
    assert len([name for name in load_file(out / "model.safetensors") if name.endswith(".weight_packed")]) == 4 * 6


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda job: job.recipe["quantization"].update(bits=3), "settings, quantization, bits was 4 and is 3"),
        (
            lambda job: job.recipe["quantization"].update(forward_dtype="bfloat16"),
            "settings, quantization, forward_dtype was float32 and is bfloat16",
        ),
        (lambda job: job.recipe["merge"].update(scaling=0.5), "settings, merge, scaling was 0.4 and is 0.5"),
        (
            lambda job: job.change_expert("intents", **{"embeddings.LayerNorm.weight": torch.zeros(32)}),
            "files, experts.intents, model.safetensors, sha256 was ",
        ),
        (
            lambda job: (job.folder / "reviews.jsonl").write_text('{"text": "w1 w2"}\n'),
            "files, calibration.tasks.reviews, reviews.jsonl, sha256 was ",
        ),
    ],
    ids=["settings", "forward dtype", "merge", "expert", "data"],
)
def test_another_run_is_not_gone_on_with(
    change: Callable[[Job], Any], told: str, job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = tmp_path / ".out.partial"
    (kept / "blocks").mkdir(parents=True)
    files.write_text(kept / "fingerprint.json", json.dumps(fingerprint(read_recipe(job.write()), torch.device("cpu"))))
    (kept / "blocks" / "rounding-00000.safetensors").write_bytes(b"kept")
    change(job)
    done = in_process(capsys, "quantize", job.write(), "--out", tmp_path / "out", "--resume")
    assert done.code == 2
    assert told in done.err
    assert (kept / "blocks" / "rounding-00000.safetensors").read_bytes() == b"kept"


@pytest.mark.parametrize("content", [None, b"", b"[]", b"{", b"\xff", b'{"a": 1, "a": 2}', b"[" * 10_000])
def test_a_fingerprint_that_is_none(
    content: bytes | None, job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = tmp_path / ".out.partial"
    (kept / "blocks").mkdir(parents=True)
    (kept / "blocks" / "rounding-00000.safetensors").write_bytes(b"kept")
    if content is not None:
        (kept / "fingerprint.json").write_bytes(content)
    done = in_process(capsys, "quantize", job.write(), "--out", tmp_path / "out", "--resume")
    assert done.code == 2
    assert done.err.startswith(f"epmq: {kept}/fingerprint.json: ")
    assert f"remove {kept} to begin anew." in done.err
    assert (kept / "blocks" / "rounding-00000.safetensors").read_bytes() == b"kept"


@pytest.mark.parametrize(
    "place",
    [
        "blocks/rounding-00000",
        "blocks/rounding-00001",
        "streams/rounding-00002/deployed-*",
        "streams/rounding-00002/inside-*",
    ],
)
def test_a_damaged_file_is_refused_and_can_be_removed(
    place: str, job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, whole, out = job.write(), tmp_path / "whole", tmp_path / "out"
    assert ended(in_child(lambda: quantize(recipe, whole))) == 0
    kept = cut_off(recipe, out, 2)
    path = next(kept.glob(f"{place}.safetensors"))
    damaged = bytearray(path.read_bytes())
    damaged[-1] ^= 1
    path.write_bytes(damaged)
    done = in_process(capsys, "quantize", recipe, "--out", out, "--resume")
    assert done.code == 2
    assert f"{path}: truncated or altered (the checksum of tensor " in done.err
    assert "remove that file to have its content computed again." in done.err
    path.unlink()
    assert in_process(capsys, "quantize", recipe, "--out", out, "--resume").code == 0
    assert content(out) == content(whole)


def test_first_difference_names_the_place() -> None:
    assert first_difference({"a": {"b": 1, "c": [1]}}, {"a": {"b": 1, "c": [1]}}) is None
    assert first_difference({"a": {"b": 1}}, {"a": {"c": 2}}) == "a, b was 1 and is absent"


@pytest.mark.parametrize("resume", [["--resume"], []], ids=["resume", "anew"])
@pytest.mark.parametrize("blocks", [1, 0])
def test_two_runs_do_not_share_a_folder(
    job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str], blocks: int, resume: list[str]
) -> None:
    kept = cut_off(job.write(), tmp_path / "out", 1)
    if blocks == 0:
        shutil.rmtree(kept / "blocks")
    (kept / "result").mkdir(exist_ok=True)
    before = sorted(kept.rglob("*"))
    with open(kept / "lock", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        done = in_process(capsys, "quantize", job.write(), "--out", tmp_path / "out", *resume)
    assert (done.code, done.out) == (2, "")
    assert done.err == f"epmq: {kept}: another process is at work on it; wait for its end.\n"
    assert sorted(kept.rglob("*")) == before


def test_a_run_that_comes_second_leaves_the_first_alone(job: Job, tmp_path: Path) -> None:
    """Both have looked, and found nobody, before either locks the folder."""
    first, second = (Journal(tmp_path / "out", World()) for _ in range(2))
    with first.kept(dict):
        first.result.mkdir()
        with pytest.raises(OutputError, match="another process is at work on it"), second.kept(dict):
            pytest.fail("the body must not run")
        assert first.result.is_dir()
    assert not first.folder.exists()


def test_a_file_system_without_locks_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(file: Any, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    journal = Journal(tmp_path / "out", World())
    with pytest.raises(OutputError, match=r"has no locks \(No locks available\)"), journal.kept(dict):
        pytest.fail("the body must not run")
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_failed_holds_no_lock(tmp_path: Path) -> None:
    """Its journal may live on in a traceback that a notebook keeps."""
    journal = Journal(tmp_path / "out", World())
    with pytest.raises(KeyboardInterrupt), journal.kept(dict):
        (journal.folder / "blocks" / "rounding-00000.safetensors").touch()
        raise KeyboardInterrupt
    assert Journal(tmp_path / "out", World()).done(True, str) is False


# -- faults of the machine -------------------------------------------------------------------------------------------


def limited(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


@pytest.fixture(scope="module")
def sizes(made: Job, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, bytes], list[int]]:
    """What an undisturbed run leaves, and the sizes of all files it writes on its way."""
    out = tmp_path_factory.mktemp("whole") / "out"
    listing = out.with_name("sizes")

    def work() -> None:
        original = os.rename
        seen: set[int] = set()

        def rename(old: Any, new: Any) -> None:
            seen.update(path.stat().st_size for path in [Path(old), *Path(old).glob("*")] if path.is_file())
            original(old, new)

        setattr(os, "rename", rename)  # noqa: B010
        quantize(made.folder / "recipe.yaml", out)
        listing.write_text(json.dumps(sorted(seen - {0})))

    assert ended(in_child(work)) == 0
    return content(out), json.loads(listing.read_text())


def test_a_full_disk_at_every_size(
    made: Job, sizes: tuple[dict[str, bytes], list[int]], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    wanted, written = sizes
    out = tmp_path / "out"
    told = []
    for size in written:

        def work(size: int = size) -> None:
            limited(size - 1)
            try:
                quantize(made.folder / "recipe.yaml", out)
            except Exception as error:
                (tmp_path / "told").write_text(f"{type(error).__name__} {error}")
                raise SystemExit from error

        assert ended(in_child(work)) == 1
        told.append((tmp_path / "told").read_text())
        assert not out.exists()
        assert ".partial" in told[-1] and "the file would pass the size limit" in told[-1], told[-1]
        assert "bytes are needed for " in told[-1]
        assert not [path for path in tmp_path.glob("**/.*.partial-*") if path.name != ".out.partial"]
    assert ended(in_child(lambda: quantize(made.folder / "recipe.yaml", out))) == 0
    assert content(out) == wanted


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(place)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"a small file system cannot be mounted here ({mounted.stderr.strip()})")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_room_is_made_on_a_full_disk(
    made: Job,
    sizes: tuple[dict[str, bytes], list[int]],
    small_disk: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe, out, ballast = made.folder / "recipe.yaml", small_disk / "out", small_disk / "ballast"
    ballast.write_bytes(bytes(560 * 1024))
    done = in_process(capsys, "quantize", recipe, "--out", out)
    assert done.code == 2
    assert "of disk there" in done.err and "make room" in done.err
    assert [path.name for path in small_disk.iterdir()] == ["ballast"]

    ballast.unlink()
    with monkeypatch.context() as patch:
        after_block(1, lambda: ballast.write_bytes(bytes(shutil.disk_usage(small_disk).free // 4096 * 4096)), patch)
        done = in_process(capsys, "quantize", recipe, "--out", out)
    kept = small_disk / ".out.partial"
    assert done.code == 2
    assert f"epmq: {kept}/" in done.err and "the disk is full" in done.err and "bytes are needed for " in done.err
    assert sorted(small_disk.iterdir()) == [kept, ballast]
    ballast.unlink()
    assert in_process(capsys, "quantize", recipe, "--out", out, "--resume").code == 0
    assert list(small_disk.iterdir()) == [out]
    assert content(out) == sizes[0]


def test_a_folder_that_cannot_be_written(made: Job, tmp_path: Path) -> None:
    """Root may write everywhere, so this is asked by another user."""
    place = tmp_path / "closed"
    place.mkdir(mode=0o555)

    def work() -> None:
        if os.getuid() == 0:
            os.setuid(65534)
        try:
            files.check_free(place / "out")
        except Exception as error:
            os._exit(7 if f"{place} is not a writable folder" in str(error) else 8)

    if os.getuid() == 0:
        for parent in [tmp_path, *tmp_path.parents]:
            if not os.stat(parent).st_mode & 0o001:
                os.chmod(parent, os.stat(parent).st_mode | 0o011)
    assert ended(in_child(work)) == 7


def after_block(number: int, do: Callable[[], Any], patch: pytest.MonkeyPatch) -> None:
    """Let something happen once block ``number`` is finished."""
    original = Engine._commit

    def commit(self: Engine, finished: int, *rest: Any) -> None:
        original(self, finished, *rest)
        if finished == number:
            do()

    patch.setattr(Engine, "_commit", commit)


@pytest.mark.parametrize("fate", ["changed", "vanished"])
def test_a_source_that_changes_meanwhile(
    fate: str, job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = job.expert("intents")
    change = {"embeddings.LayerNorm.bias": torch.ones(32)}
    after_block(1, file.unlink if fate == "vanished" else lambda: job.change_expert("intents", **change), monkeypatch)
    done = in_process(capsys, "quantize", job.write(), "--out", tmp_path / "out")
    assert done.code == 2
    assert f"{file}: the file " in done.err and fate in done.err
    assert "go on with --resume" in done.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        # Finite weights whose products are not, in one expert, which the merge leaves out.
        (
            "output.LayerNorm.weight",
            torch.full((32,), 3e38),
            "encoder.layer.2.intermediate.dense: an activation inside expert 'reviews' is NaN or Inf",
        ),
        (
            "self.value.weight",
            torch.full((32, 32), 3e38),
            "encoder.layer.2.attention.self.query: the targets of task 'reviews' are NaN or Inf",
        ),
    ],
    ids=["activation", "target"],
)
def test_overflow_names_task_and_block(
    name: str, value: Tensor, told: str, job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job.change_expert("reviews", **{f"encoder.layer.2.attention.{name}": value})
    job.recipe["merge"] = {"method": "weighted_average", "weights": {"reviews": 0.0, "intents": 1.0}}
    done = in_process(capsys, "quantize", job.write(), "--out", tmp_path / "out")
    assert done.code == 2
    assert told in done.err
    assert f"Finished blocks are kept in {tmp_path}/.out.partial; go on with --resume" in done.err


def test_out_of_space_is_told_with_the_size(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with (
        pytest.raises(OutputError, match=rf"{path}: the disk is full: 5,000 bytes are needed for it, .* are free"),
        files.naming_space(path, 5000),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")
