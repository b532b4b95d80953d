"""Models and data sets of the papers, from the hub or from local folders."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from epmq.errors import CalibrationError, ModelError, SourceError, first_line
from epmq.hub import find_model
from epmq.papers.settings import DataSet

Rows = Callable[[DataSet, str, int | None], Iterable[Mapping[str, Any]]]
SHUFFLED_AT_ONCE = 2_000  # encoded images of a streamed split are held that long


def model_folder(name: str) -> Path:
    """The folder of a model: ``name`` itself when there is one, else a download of that hub id."""
    try:
        return find_model(name)
    except SourceError as error:
        raise ModelError(f"{name}: neither a folder nor a hub id that can be reached ({error})") from error


def hub_rows(data: DataSet, split: str, seed: int | None) -> Iterable[Mapping[str, Any]]:
    """Rows of a split, streamed; shuffled with ``seed`` unless it is None."""
    try:
        import datasets
    except ImportError as error:
        raise CalibrationError(f"{data.path}: reading it needs datasets: pip install 'epmq[papers]'.") from error
    try:
        rows: Any = datasets.load_dataset(data.path, data.subset, split=split, streaming=True)
    except Exception as error:  # what goes wrong is up to the data set's own script or server
        raise CalibrationError(f"{data.path}: split {split!r} cannot be loaded ({first_line(error)}).") from error
    found: Iterable[Mapping[str, Any]] = rows
    return found if seed is None else rows.shuffle(seed=seed, buffer_size=SHUFFLED_AT_ONCE)


def read(
    rows: Rows, data: DataSet, split: str, seed: int | None, count: int | None, columns: list[str]
) -> Iterator[dict[str, Any]]:
    """The named columns of the first ``count`` rows of a split (None: all), one row at a time.

    Raises CalibrationError for a missing column, and for a split without rows.
    """
    empty = True
    for row in itertools.islice(rows(data, split, seed), count):
        empty = False
        for column in columns:
            if column not in row:
                known = ", ".join(sorted(row))
                raise CalibrationError(f"{data.path}, {split}: there is no column {column!r}; it has {known}.")
        yield {column: row[column] for column in columns}
    if empty:
        raise CalibrationError(f"{data.path}, {split}: it has no rows.")


def batched(rows: Iterable[dict[str, Any]], size: int) -> Iterator[list[dict[str, Any]]]:
    """Rows in lists of ``size``, the last one shorter."""
    rows = iter(rows)
    while batch := list(itertools.islice(rows, size)):
        yield batch


def class_names(rows: Any, label: str, where: str) -> list[str]:
    """Names of the classes, from a data set's own description of its label."""
    feature = (getattr(rows, "features", None) or {}).get(label)
    names = getattr(feature, "names", None)
    if not names:
        raise CalibrationError(
            f"{where}: it does not name the classes of {label!r}; add them to epmq/papers/clip.yaml."
        )
    return [str(name).replace("_", " ") for name in names]
