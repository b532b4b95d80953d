"""Outputs appear whole or not at all."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import stat
from pathlib import Path

import pytest

from epmq.errors import OutputError
from epmq.files import check_free, new_folder, rename_within, write_text


class _Stopped(BaseException):
    """Stands for anything that ends a run, an interruption included."""


def test_a_new_folder_appears_when_the_body_ends(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "out"
    with new_folder(target) as working:
        (working / "sub").mkdir()
        (working / "sub" / "a.txt").write_text("whole")
        assert not target.exists()
        assert working.parent == target.parent
    assert (target / "sub" / "a.txt").read_text() == "whole"
    assert [path.name for path in target.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("error", [_Stopped, KeyboardInterrupt, ValueError])
def test_nothing_is_left_when_the_body_fails(tmp_path: Path, error: type[BaseException]) -> None:
    target = tmp_path / "out"
    with pytest.raises(error), new_folder(target) as working:
        (working / "a.txt").write_text("half")
        raise error
    assert list(tmp_path.iterdir()) == []


def test_an_empty_folder_may_be_taken(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with new_folder(tmp_path / "out") as working:
        (working / "a.txt").write_text("x")
    assert (tmp_path / "out" / "a.txt").is_file()


def test_an_empty_folder_stays_when_the_body_fails(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match="no"), new_folder(tmp_path / "out"):
        raise ValueError("no")
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


def test_what_is_there_is_never_touched(tmp_path: Path) -> None:
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for target, reason in ((full, "not empty"), (tmp_path / "file", "there is a file of that name")):
        with pytest.raises(OutputError, match=reason):
            check_free(target)
        with pytest.raises(OutputError, match=reason), new_folder(target):
            pytest.fail("the body must not run")
    assert (full / "mine.txt").read_text() == (tmp_path / "file").read_text() == "mine"
    assert len(list(tmp_path.iterdir())) == 2


def test_a_folder_filled_meanwhile_is_kept(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with pytest.raises(OutputError, match="writing the output failed"), new_folder(target) as working:
        (working / "a.txt").write_text("ours")
        target.mkdir()
        (target / "theirs.txt").write_text("theirs")
    assert [path.name for path in target.iterdir()] == ["theirs.txt"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("deeper", ["out", "a/b/out"])
def test_a_parent_that_is_a_file_is_refused_before_any_work(tmp_path: Path, deeper: str) -> None:
    (tmp_path / "file").write_text("x")
    target = tmp_path / "file" / deeper
    with pytest.raises(OutputError, match="cannot be made"):
        check_free(target)
    with pytest.raises(OutputError, match="cannot be made"), new_folder(target):
        pytest.fail("the body must not run")


def test_a_failed_write_in_the_body_is_an_output_error(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="out: writing the output failed"), new_folder(tmp_path / "out") as working:
        (working / "absent" / "a.txt").write_text("x")
    assert list(tmp_path.iterdir()) == []


def test_write_text_replaces_a_file_whole(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "a.json"
    write_text(path, "first")
    write_text(path, "söcond")
    assert path.read_text(encoding="utf-8") == "söcond"
    assert [p.name for p in path.parent.iterdir()] == ["a.json"]


def test_write_text_that_fails_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_text(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "new \udcff")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_write_text_where_nothing_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "file" / "a.json", tmp_path / "folder"):
        with pytest.raises(OutputError, match="cannot be written"):
            write_text(path, "text")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]


def test_rename_within(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("1")
    rename_within(tmp_path, {"a": "b"})
    assert (tmp_path / "b").read_text() == "1"
    assert not (tmp_path / "a").exists()


def test_a_mount_point_is_refused_before_any_work() -> None:
    for target in ("/", "/proc"):
        with pytest.raises(
            OutputError, match=rf"^{target}: it is a mount point.* such as {target.rstrip('/')}/epmq\.$"
        ):
            check_free(target)


@pytest.mark.parametrize("length", [300, 250])
def test_a_name_that_is_too_long_is_refused_before_any_work(tmp_path: Path, length: int) -> None:
    with pytest.raises(OutputError, match=r"n: the output folder cannot be made \(File name too long\)\.$"):
        check_free(tmp_path / ("n" * length))


def test_everything_is_flushed_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "out"
    flushed: dict[bool, set[str]] = {False: set(), True: set()}
    original = os.fsync

    def fsync(descriptor: int) -> None:
        original(descriptor)
        flushed[target.exists()].add(os.readlink(f"/proc/self/fd/{descriptor}"))

    monkeypatch.setattr(os, "fsync", fsync)
    with new_folder(target) as working:
        (working / "sub").mkdir()
        (working / "sub" / "a.txt").write_text("a")
        (working / "b.txt").write_text("b")
        made = {str(path) for path in (working, working / "sub", working / "sub" / "a.txt", working / "b.txt")}
    assert flushed == {False: made, True: {str(tmp_path)}}


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP])
def test_a_file_system_that_flushes_no_folders_is_no_obstacle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    original = os.fsync

    def fsync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        original(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with new_folder(tmp_path / "out") as working:
        (working / "a.txt").write_text("whole")
    write_text(tmp_path / "b.txt", "whole")
    assert (tmp_path / "out" / "a.txt").read_text() == (tmp_path / "b.txt").read_text() == "whole"


def failing_fsync(descriptor: int) -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_a_disk_that_fails_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", failing_fsync)
    with pytest.raises(OutputError, match="out: writing the output failed"), new_folder(tmp_path / "out") as working:
        (working / "a.txt").write_text("whole")
    assert list(tmp_path.iterdir()) == []


def killed_while_writing(target: Path) -> Path:
    """What a process leaves that is killed inside :func:`new_folder`."""
    child = os.fork()
    if child == 0:
        with new_folder(target) as working:
            (working / "a.txt").write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    return target.with_name(f".{target.name}.partial-{child}")


def test_what_killed_processes_left_is_removed(tmp_path: Path) -> None:
    left, other = killed_while_writing(tmp_path / "out"), killed_while_writing(tmp_path / "other")
    assert (left / "a.txt").is_file() and (other / "a.txt").is_file()
    with new_folder(tmp_path / "out") as working:
        (working / "b.txt").write_text("whole")
    assert {path.name for path in tmp_path.iterdir()} == {"out", other.name}


def test_what_may_be_in_use_stays(tmp_path: Path) -> None:
    """A process of that number is here; or one of another container, whose numbers mean nothing here, holds it."""
    held = killed_while_writing(tmp_path / "out")
    ours = tmp_path / f".out.partial-{os.getppid()}"
    ours.mkdir()
    descriptor = os.open(held, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with new_folder(tmp_path / "out") as working:
        (working / "b.txt").write_text("whole")
    os.close(descriptor)
    assert {path.name for path in tmp_path.iterdir()} == {"out", ours.name, held.name}
