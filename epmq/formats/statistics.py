"""Statistics of one expert on its own data as a folder: what an owner can hand out in place of the data.

``statistics.json`` names the task, every group of linears that read one input, the number of rows behind each, and a
checksum of the weights they were gathered with. Beside it lie safetensors (shards with an index when there are many):
``GROUP.hessian``, fp32 ``[K (K + 1) / 2]``, the lower triangle of Σ r x xᵀ row by row, and ``GROUP.sum_x``, fp32
``[K]``, Σ r x. No row of data is kept.
"""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from epmq import files, trust
from epmq.errors import FormatError, SourceError
from epmq.formats.shards import DEFAULT_SHARD_BYTES, ShardWriter
from epmq.sources import FileSource, all_finite
from epmq.statistics import Expert, TaskStatistics

FORMAT = "epmq-statistics"
VERSION = 1
MANIFEST_NAME = "statistics.json"


@dataclass(frozen=True)
class GroupFacts:
    """linears: full names, in the order they run. columns: K. weight: Σ r. sha256: of the stacked fp32 weights."""

    linears: tuple[str, ...]
    columns: int
    weight: float
    sha256: str


class StatisticsWriter:
    """Streams groups into a folder (usually a temporary one, see :func:`epmq.files.new_folder`)."""

    def __init__(self, folder: Path, shard_bytes: int = DEFAULT_SHARD_BYTES):
        self.folder = folder
        self.shards = ShardWriter(folder, shard_bytes)
        self._groups: dict[str, dict[str, Any]] = {}

    def group(self, linears: tuple[str, ...], statistics: TaskStatistics, expert: Expert) -> None:
        """Store a group under its first linear's name."""
        columns = len(statistics.sum_x)
        rows, cols = torch.tril_indices(columns, columns, device=statistics.hessian.device)
        self.shards.add(f"{linears[0]}.hessian", statistics.hessian[rows, cols].float())
        self.shards.add(f"{linears[0]}.sum_x", statistics.sum_x.float())
        self._groups[linears[0]] = asdict(GroupFacts(linears, columns, statistics.weight, digest_of(expert)))

    def finish(self, task: str, about: dict[str, Any]) -> None:
        """Write the last shard and the manifest; ``about`` is what a person should know of the data."""
        self.shards.finish()
        manifest = {"format": FORMAT, "version": VERSION, "task": task, "about": about, "groups": self._groups}
        files.write_text(self.folder / MANIFEST_NAME, json.dumps(manifest, indent=1))


class StatisticsReader:
    """A statistics folder, checked: manifest, names, shapes. Raises FormatError naming the file at fault."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        path = self.folder / MANIFEST_NAME
        if not trust.exists(path):
            raise FormatError(f"{folder}: not a folder of statistics, {MANIFEST_NAME} is missing; make one by collect.")
        kind = "a manifest this version can read"
        manifest = trust.read_json(path, FormatError, kind)
        try:
            if (manifest["format"], manifest["version"]) != (FORMAT, VERSION):
                raise FormatError(f"{path}: {manifest['format']!r} {manifest['version']!r} is not {FORMAT} {VERSION}.")
            self.task: str = manifest["task"]
            self.groups = {
                name: GroupFacts(**{**facts, "linears": tuple(facts["linears"])})
                for name, facts in manifest["groups"].items()
            }
        except (KeyError, TypeError, AttributeError) as error:
            raise FormatError(f"{path}: not {kind} ({error!r}).") from error
        if not isinstance(self.task, str):
            raise FormatError(f"{path}: task {self.task!r} is no name.")
        try:
            self.source = FileSource(self.folder)
            for name, facts in self.groups.items():
                self._check(path, name, facts)
        except SourceError as error:
            raise FormatError(str(error)) from error

    def _check(self, path: Path, name: str, facts: GroupFacts) -> None:
        named = all(isinstance(linear, str) for linear in facts.linears) and facts.linears[:1] == (name,)
        if not trust.is_whole(facts.columns, 1) or not named or len(set(facts.linears)) < len(facts.linears):
            raise FormatError(f"{path}: group {name!r} has {facts.columns!r} columns and linears {facts.linears}.")
        if type(facts.weight) not in (int, float) or not 0.0 < facts.weight <= sys.float_info.max:
            raise FormatError(f"{path}: group {name!r} has {facts.weight!r} rows; it must be a positive number.")
        wanted = {"hessian": facts.columns * (facts.columns + 1) // 2, "sum_x": facts.columns}
        for part, length in wanted.items():
            shape, dtype = self.source.shape(f"{name}.{part}"), self.source.dtype(f"{name}.{part}")
            if shape != (length,) or dtype != torch.float32:
                raise FormatError(f"{self.folder}: tensor '{name}.{part}' is not fp32 of {length} entries.")

    def read(self, name: str, expert: Expert) -> TaskStatistics:
        """The statistics of one group, which must have been gathered with ``expert``'s weights; on their device."""
        facts = self.groups[name]
        if digest_of(expert) != facts.sha256:
            raise FormatError(f"{self.folder}: {name} was collected with other weights than expert {self.task!r} has.")
        device = expert.weight.device
        statistics = TaskStatistics(facts.columns, None, device=device)
        rows, cols = torch.tril_indices(facts.columns, facts.columns, device=device)
        statistics.hessian[rows, cols] = self._finite(f"{name}.hessian").to(device)
        statistics.sum_x += self._finite(f"{name}.sum_x").to(device)
        statistics.weight = float(facts.weight)
        if bool((statistics.hessian.diagonal() < 0).any()):
            raise FormatError(f"{self.folder}: tensor '{name}.hessian' has a negative diagonal, which no data gives.")
        return statistics

    def _finite(self, key: str) -> Tensor:
        tensor = self.source.tensor(key)
        if not all_finite(tensor):
            raise FormatError(f"{self.folder}: tensor {key!r} holds NaN or Inf; collect it again.")
        return tensor


def digest_of(expert: Expert) -> str:
    """SHA-256 of weights and biases as fp32."""
    digest = hashlib.sha256()
    for tensor in (expert.weight, expert.bias):
        digest.update(tensor.float().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()
