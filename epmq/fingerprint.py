"""What the result of a job depends on, in a form that two runs can compare: settings, files, versions."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from epmq.errors import SourceError
from epmq.huggingface import carried
from epmq.recipe import Recipe

# Larger files are known by a sample and by when they were changed.
WHOLE_BYTES = 2**30
SAMPLES, SAMPLE_BYTES = 64, 2**16
# What changes where or how fast a job runs, but not what comes out.
NOT_OF_THE_RESULT = {"evaluation", "memory", "device"}
PACKAGES = ("epmq", "torch", "transformers", "tokenizers")


def fingerprint(recipe: Recipe, device: torch.device) -> dict[str, Any]:
    """Nested dict of JSON values. Files are known by name, size and content, so that a moved job is the same job.

    device: where the recipe's ``device`` led to; its kind is what counts.
    """
    content = recipe.model_dump(exclude=NOT_OF_THE_RESULT)
    return {
        "device": device.type,
        "files": {
            f"{key}, {name}": describe(file)
            for key, path in _paths(content)
            for name, file in _files(key, path).items()
        },
        "settings": _named(content),
        "versions": {package: _version(package) for package in PACKAGES},
    }


def digest(of: dict[str, Any]) -> str:
    """SHA-256 of a fingerprint."""
    return hashlib.sha256(json.dumps(of, sort_keys=True).encode()).hexdigest()


def describe(file: Path) -> dict[str, Any]:
    """Size and SHA-256 of a file; of one above 1 GiB that of its start, end and 64 pieces, and its time of change."""
    try:
        status = file.stat()
        content = hashlib.sha256()
        with open(file, "rb") as handle:
            if status.st_size <= WHOLE_BYTES:
                while piece := handle.read(2**20):
                    content.update(piece)
                return {"size": status.st_size, "sha256": content.hexdigest()}
            for number in range(SAMPLES):
                handle.seek((status.st_size - SAMPLE_BYTES) * number // (SAMPLES - 1))
                content.update(handle.read(SAMPLE_BYTES))
        return {"size": status.st_size, "sha256 of samples": content.hexdigest(), "changed": status.st_mtime_ns}
    except OSError as error:
        raise SourceError(f"{file}: the file cannot be read ({error.strerror}).") from error


def _files(key: str, path: Path) -> dict[str, Path]:
    """By name, a file or those of a folder; of the base's inner folders too what is copied into the result."""
    if path.is_file():
        return {path.name: path}
    found = sorted(file for file in path.iterdir() if file.is_file())
    if key == "base":
        found += carried(path)
    return {file.relative_to(path).as_posix(): file for file in found}


def _paths(value: Any, key: str = "") -> Iterator[tuple[str, Path]]:
    if isinstance(value, Path):
        yield key, value
    elif isinstance(value, dict):
        for name, item in value.items():
            yield from _paths(item, f"{key}.{name}" if key else str(name))


def _named(value: Any) -> Any:
    if isinstance(value, Path):
        return value.name
    if isinstance(value, dict):
        return {str(key): _named(item) for key, item in value.items()}
    return [_named(item) for item in value] if isinstance(value, (list, tuple)) else value


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
