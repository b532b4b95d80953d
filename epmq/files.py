"""Output folders and files that appear whole or not at all: write beside, flush, rename. Only this file renames."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from epmq.errors import OutputError

NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# How a file system says that it does not flush folders by themselves.
NO_FLUSH = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP)


@contextmanager
def new_folder(target: str | Path, working: Path | None = None) -> Iterator[Path]:
    """A temporary folder beside ``target`` that takes its name when the body ends well, and vanishes otherwise.

    ``target`` may be absent or an empty folder. ``working``: another place for the temporary folder, on the same file
    system. What processes that were killed left of the same target is removed. Raises OutputError when ``target`` holds
    something or cannot be made.
    """
    target = Path(target).resolve()
    check_free(target)
    working = working or _working(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with suppress(OSError):
            _remove_leftovers(target)
        shutil.rmtree(working, ignore_errors=True)
        working.mkdir()
        held = _hold(working)
    except OSError as error:
        raise OutputError(f"{target}: the output folder cannot be made ({error.strerror}).") from error
    try:
        yield working
        _flush_tree(working)
        if target.exists():
            target.rmdir()
        os.rename(working, target)
        _flush(target.parent)
    except OSError as error:
        raise _refused(error, Path(error.filename or target), f"{target}: writing the output failed") from error
    finally:
        shutil.rmtree(working, ignore_errors=True)
        if held is not None:
            os.close(held)


def _working(target: Path) -> Path:
    return target.parent / f".{target.name}.partial-{os.getpid()}"


def _hold(folder: Path) -> int | None:
    """A lock on a folder until the descriptor is closed; None where another has it or the file system has none."""
    descriptor = None
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        if descriptor is not None:
            os.close(descriptor)
        return None
    return descriptor


def _remove_leftovers(target: Path) -> None:
    """Remove temporary folders of ``target`` that belong to no process: none of that number is here, and none anywhere
    else holds them, as one of another machine or container would."""
    pattern = re.compile(rf"\.{re.escape(target.name)}\.partial-(\d+)")
    for folder in target.parent.iterdir():
        found = pattern.fullmatch(folder.name)
        if found is None or folder.is_symlink() or not folder.is_dir() or _runs(int(found[1])):
            continue
        held = _hold(folder)
        if held is not None:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(held)


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        pass  # It is another user's.
    return True


@contextmanager
def written_whole(path: Path, size: int = 0) -> Iterator[Path]:
    """A temporary name beside ``path``; when the body ends well the file written there is flushed and takes its name.

    size: bytes that are about to be written, for the message. Raises OutputError naming the file, and the space
    needed when the disk is full; nothing is left then.
    """
    working = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        yield working
        _flush(working)
        os.rename(working, path)
        _flush(path.parent)
    except OSError as error:
        raise _refused(error, path, f"{path}: the file cannot be written", size) from error
    finally:
        with suppress(OSError):
            working.unlink(missing_ok=True)


@contextmanager
def naming_space(path: Path, size: int = 0, what: str = "it") -> Iterator[None]:
    """Errors of the system while ``size`` bytes of ``what`` are written to ``path``, as OutputErrors that name them."""
    try:
        yield
    except OSError as error:
        raise _refused(error, path, f"{path}: the file cannot be written", size, what) from error


def _refused(error: OSError, path: Path, sentence: str, size: int = 0, what: str = "it") -> OutputError:
    if error.errno not in NO_SPACE:
        return OutputError(f"{sentence} ({error.strerror or error}).")
    needed = f"{size:,} bytes are needed for {what}" if size else "it does not fit"
    if error.errno == errno.EFBIG:
        return OutputError(f"{path}: the file would pass the size limit: {needed}; raise the limit (ulimit -f).")
    try:
        free = f"{shutil.disk_usage(path.parent).free:,} are free"
    except OSError:
        free = "and how much is free cannot be told"
    return OutputError(f"{path}: the disk is full: {needed}, {free}; make room there.")


def check_free(target: str | Path) -> None:
    """Raise OutputError unless ``target`` is absent or an empty folder in a place that can be written."""
    target = Path(target).resolve()
    check_name(target)
    if target.exists():
        if not target.is_dir():
            raise OutputError(f"{target}: there is a file of that name; choose another output folder.")
        if os.path.ismount(target):
            raise OutputError(
                f"{target}: it is a mount point, whose place no new folder can take; give a folder in it, such as"
                f" {target / 'epmq'}."
            )
        if any(target.iterdir()):
            raise OutputError(f"{target}: the output folder is not empty; choose another or remove it.")
    parent = _existing(target.parent)
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise OutputError(f"{target}: the output folder cannot be made, {parent} is not a writable folder.")


def check_file(path: str | Path) -> None:
    """Raise OutputError unless a file can be written at ``path``, by writing another where it is to be."""
    path = Path(path).absolute()
    with naming_space(path):
        if path.is_dir():
            raise OutputError(f"{path}: there is a folder of that name; choose another file.")
        with tempfile.TemporaryFile(dir=_existing(path.parent)), suppress(FileNotFoundError):
            os.lstat(_working(path))  # whose name may be too long


def check_name(target: Path) -> None:
    """Raise OutputError when ``target``, or the temporary folder beside it, can have no such name."""
    for path in (target, _working(target)):
        try:
            os.lstat(path)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            raise OutputError(f"{target}: the output folder cannot be made ({error.strerror}).") from error


def check_space(target: str | Path, needed: int) -> None:
    """Raise OutputError when fewer than ``needed`` bytes are free where ``target`` is to be."""
    free = free_bytes(target)
    if free < needed:
        raise OutputError(
            f"{target}: the output needs {_mebibytes(needed)}, and {_mebibytes(free)} are free there; make room, or"
            " choose another place."
        )


def free_bytes(target: str | Path) -> int:
    """Bytes free where ``target`` is or is to be."""
    return shutil.disk_usage(_existing(Path(target).absolute())).free


def _existing(place: Path) -> Path:
    """The place, or the nearest folder above it that is there."""
    while not place.exists():
        place = place.parent
    return place


def write_text(path: str | Path, text: str) -> None:
    """Write a text file atomically."""
    path = Path(path)
    with naming_space(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path, len(text.encode())) as working:
        working.write_text(text, encoding="utf-8")


def rename_within(folder: Path, names: dict[str, str]) -> None:
    """Give files of a folder that is not yet visible their final names."""
    for old, new in names.items():
        os.rename(folder / old, folder / new)


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"


def link(existing: Path, path: Path) -> None:
    """Give a file a second name, in place of what had that name; a copy where the file system knows no links."""
    with written_whole(path, existing.stat().st_size) as working:
        try:
            os.link(existing, working)
        except OSError:
            shutil.copyfile(existing, working)


def remove(path: Path) -> None:
    """Remove a file or a folder with all it holds, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _flush_tree(folder: Path) -> None:
    for path in folder.rglob("*"):
        _flush(path)
    _flush(folder)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NO_FLUSH or not path.is_dir():
            raise
    finally:
        os.close(descriptor)
