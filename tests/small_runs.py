"""A model of two blocks with what a run leaves of it: statistics folders, and journals of runs that were cut off."""

from __future__ import annotations

import json
import shutil
import struct
import tempfile
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from epmq import pipeline
from epmq.collected import collect, quantize_collected
from epmq.config import DistillSettings, QuantConfig
from epmq.formats.statistics import StatisticsReader, StatisticsWriter
from epmq.page.document import document
from epmq.pipeline import ModuleSink
from epmq.progress import Journal
from epmq.report import build_report, read_report, write_report
from epmq.shelf import checksum
from epmq.sources import DictSource
from epmq.streams import make_streams
from epmq.surroundings import Surroundings
from epmq.world import World

TASKS = ("x", "y")
CPU = torch.device("cpu")
STATISTICS = QuantConfig(bits=4, group_size=4)
# Distilled to its end, so that its state is only taken up.
RUN = QuantConfig(bits=4, group_size=4, anchor=0.1, distill=DistillSettings(steps=2, copies=0, examples=2))
FINGERPRINT: dict[str, Any] = {"device": "cpu", "settings": {"bits": 4, "seed": None}, "versions": {"epmq": "1"}}
# Where the files of a journal's folder lie; beside each other they are easier to spoil.
PLACES = {
    "fingerprint.json": "fingerprint.json",
    "closed.safetensors": "blocks/closed-00001.safetensors",
    "block.safetensors": "blocks/rounding-00000.safetensors",
    "deployed.safetensors": "streams/rounding-00001/deployed-0001-000000.safetensors",
    "inside.safetensors": "streams/rounding-00001/inside-0000-000000.safetensors",
    "distill.safetensors": "distill.safetensors",
}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.out = nn.Linear(4, 4), nn.Linear(4, 4, bias=False), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        changed: Tensor = x + self.out(torch.relu(self.first(x)) + self.second(x))
        return changed


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def skeleton() -> Model:
    return Model().to("meta")


@cache
def _state(seed: int) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(seed)
    return {key: torch.randn(value.shape, generator=random) / 2 for key, value in Model().state_dict().items()}


def source(name: str) -> DictSource:
    return DictSource(_state({"base": 0, "x": 1, "y": 2, "merged": 3}[name]), name)


@cache
def _inputs(task: str) -> list[dict[str, Tensor]]:
    return [{"x": torch.randn(4, 3, 4, generator=torch.Generator().manual_seed(10 + TASKS.index(task)))}]


def _quiet(what: str, done: int, total: int) -> None:
    return


# -- statistics -------------------------------------------------------------------------------------------------------


def write_statistics(folder: Path, task: str = "x") -> None:
    writer = StatisticsWriter(folder)
    collect(skeleton(), source(task), task, make_streams({task: _inputs(task)})[task], writer, _quiet, CPU)
    writer.finish(task, {"examples": 4})


def read_statistics(folder: Path) -> None:
    """As a job does it that quantizes from them, to the page of its report."""
    reader = StatisticsReader(folder)
    statistics, experts = {"x": reader}, {"x": source("x")}
    sink = ModuleSink()
    found = quantize_collected(
        skeleton(), source("merged"), source("base"), experts, statistics, STATISTICS, sink, _quiet, CPU
    )
    _report(found, STATISTICS)


def _report(found: dict[str, Any], config: QuantConfig) -> None:
    with tempfile.TemporaryDirectory() as place:
        write_report(Path(place), build_report(found, config, 1.0, {"merged": 100, "quantized": 30}))
        document(read_report(place), None)


# -- journals ---------------------------------------------------------------------------------------------------------


class _CutOff(BaseException):
    pass


def _run(out: Path, progress: Callable[[str, int, int], None]) -> ModuleSink:
    journal = Journal(out, World())
    journal.done(True, lambda: "")
    sink = ModuleSink()
    with journal.kept(lambda: FINGERPRINT):
        experts = {task: source(task) for task in TASKS}
        calibration = {task: _inputs(task) for task in TASKS}
        found = pipeline.run(
            skeleton(),
            source("merged"),
            source("base"),
            experts,
            calibration,
            RUN,
            sink,
            progress,
            CPU,
            Surroundings(),
            journal,
        )
        _report(found, RUN)
    return sink


def write_journal(folder: Path) -> None:
    """What is left of a run that was cut off between the two blocks of its last walk over them."""
    seen: list[str] = []

    def cut(what: str, done: int, total: int) -> None:
        seen.append(what)
        if seen.count("blocks.1") == 2:
            raise _CutOff

    try:
        _run(folder / "out", cut)
    except _CutOff:
        pass
    kept = folder / ".out.partial"
    for name, place in PLACES.items():
        (kept / place).rename(folder / name)


def _laid_out(folder: Path, place: Path) -> Path:
    """The journal's folder again, with links to the files that may be spoilt; returns the output that it is for."""
    shutil.copytree(folder / ".out.partial", place / ".out.partial")
    for name, where in PLACES.items():
        (place / ".out.partial" / where).symlink_to(folder / name)
    return place / "out"


@cache
def _wanted() -> list[Any]:
    with tempfile.TemporaryDirectory() as place:
        return _plain(_run(Path(place) / "out", _quiet))


def _plain(sink: ModuleSink) -> list[Any]:
    def told(value: Tensor | None) -> Any:
        return None if value is None else [str(value.dtype), value.tolist()]

    linears = [
        [name, layer.bits, layer.group_size, *map(told, (layer.packed, layer.scales, layer.zeros, layer.bias))]
        for name, layer in sink.linears.items()
    ]
    return [*linears, *([name, told(tensor)] for name, tensor in sink.tensors.items())]


def read_journal(folder: Path) -> None:
    """Goes on with the run; what is not refused must give what the run gives that was never cut off."""
    with tempfile.TemporaryDirectory() as place:
        found = _plain(_run(_laid_out(folder, Path(place)), _quiet))
    assert json.dumps(found) == json.dumps(_wanted()), "it was believed"


def forge(path: Path) -> None:
    """Make the checksums of a file of a journal anew, where there is a place for them: they are no secret."""
    try:
        with safe_open(path, framework="pt") as handle:
            metadata = handle.metadata()
            structure = json.loads(metadata["structure"], object_hook=lambda item: _checked(item, handle))
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError):
        return
    metadata["structure"] = json.dumps(structure)
    metadata["crc32"] = str(zlib.crc32(metadata["structure"].encode()))
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.dumps({**json.loads(content[8 : 8 + length]), "__metadata__": metadata}).encode()
    header += b" " * (-len(header) % 8)
    path.write_bytes(struct.pack("<Q", len(header)) + header + content[8 + length :])


def _checked(item: dict[str, Any], handle: Any) -> dict[str, Any]:
    name = item.get("tensor")
    return {**item, "crc32": checksum(handle.get_tensor(name))} if isinstance(name, str) and "crc32" in item else item


def read_forged(folder: Path) -> None:
    """Goes on with a run whatever its files say."""
    with tempfile.TemporaryDirectory() as place:
        _run(_laid_out(folder, Path(place)), _quiet)
