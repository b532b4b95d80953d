"""Output folders and files that appear whole or not at all: write beside, flush, rename. Only this file renames."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from epmq.errors import OutputError


@contextmanager
def new_folder(target: str | Path) -> Iterator[Path]:
    """A temporary folder beside ``target`` that takes its name when the body ends well, and vanishes otherwise.

    ``target`` may be absent or an empty folder. Raises OutputError when it holds something or cannot be made.
    """
    target = Path(target).resolve()
    check_free(target)
    working = target.with_name(f".{target.name}.partial-{os.getpid()}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(working, ignore_errors=True)
        working.mkdir()
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
        raise OutputError(
            f"{target}: writing the output failed ({error}); {_mebibytes(free_bytes(target))} are free there."
        ) from error
    finally:
        shutil.rmtree(working, ignore_errors=True)


def check_free(target: str | Path) -> None:
    """Raise OutputError unless ``target`` is absent or an empty folder in a place that can be written."""
    target = Path(target).resolve()
    if target.exists():
        if not target.is_dir():
            raise OutputError(f"{target}: there is a file of that name; choose another output folder.")
        if any(target.iterdir()):
            raise OutputError(f"{target}: the output folder is not empty; choose another or remove it.")
    parent = target.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise OutputError(f"{target}: the output folder cannot be made, {parent} is not a writable folder.")


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
    place = Path(target).absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def write_text(path: str | Path, text: str) -> None:
    """Write a text file atomically."""
    path = Path(path)
    working = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(working, "w", encoding="utf-8") as handle:
            handle.write(text)
            handle.flush()
            os.fsync(handle.fileno())
        os.rename(working, path)
    except OSError as error:
        raise OutputError(f"{path}: the file cannot be written ({error.strerror}).") from error
    finally:
        with suppress(OSError):
            working.unlink(missing_ok=True)


def rename_within(folder: Path, names: dict[str, str]) -> None:
    """Give files of a folder that is not yet visible their final names."""
    for old, new in names.items():
        os.rename(folder / old, folder / new)


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"


def _flush_tree(folder: Path) -> None:
    for path in folder.rglob("*"):
        _flush(path)
    _flush(folder)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
