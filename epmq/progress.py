"""The journal of a run: finished blocks and the streams' states after them, from which ``--resume`` goes on.

It lies beside the output as ``.NAME.partial`` and holds

- ``fingerprint.json``: what the result depends on; a run with another one is refused;
- ``blocks/STAGE-NUMBER.safetensors``: a finished block's tensors and its lines of the report. The file appears whole,
  and its being there is what makes the block finished;
- ``streams/STAGE-NUMBER/``: the states in front of that block, of the latest one only;
- ``distill.safetensors``: the latest state of a distillation;
- ``result``: the output while it is written, which in the end takes the output's name.
"""

from __future__ import annotations

import errno
import fcntl
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from pydantic import BaseModel, ValidationError
from torch import Tensor

from epmq import files, trust
from epmq.errors import CalibrationError, ChangedError, ConfigError, FormatError, ModelError, OutputError, SourceError
from epmq.quantized import SUPPORTED_BITS, QuantizedTensor, group_count, pack, packed_words, unpack
from epmq.report import BlockRow, LayerRow, read_report
from epmq.shelf import altered, read_value, write_value
from epmq.sources import FileSource
from epmq.states import States
from epmq.world import World

FINGERPRINT = "fingerprint.json"
LOCK = "lock"
LINEAR_KEYS = {"linear", "bits", "group_size", "columns", "packed", "scales", "zeros", "order", "bias"}
# What only other input helps against, with which no finished block could be used.
OF_THE_INPUT = (CalibrationError, ConfigError, ModelError, SourceError)


class _NoLocks(OutputError):
    """A file system on which two runs cannot be kept apart."""


class Sink(Protocol):
    """Takes finished tensors of a block, each name once."""

    def linear(self, name: str, tensor: QuantizedTensor, bias: Tensor | None) -> None: ...

    def tensor(self, name: str, tensor: Tensor) -> None: ...


class Discard:
    """The sink of a process that does not write."""

    def linear(self, name: str, tensor: QuantizedTensor, bias: Tensor | None) -> None:
        """Nothing."""

    def tensor(self, name: str, tensor: Tensor) -> None:
        """Nothing."""


class Journal:
    """The working folder beside an output folder, shared by all processes of a run; the main one keeps it."""

    def __init__(self, out: str | Path, world: World):
        self.out = Path(out).resolve()
        self.folder = self.out.parent / f".{self.out.name}.partial"
        self.world = world
        self._lock: Any = None
        files.check_name(self.out)

    @property
    def result(self) -> Path:
        """Where the output is written."""
        return self.folder / "result"

    @property
    def scratch(self) -> Path:
        """Where this process may leave what it needs no longer than it lives."""
        return self.folder / f"scratch-{self.world.rank}"

    @property
    def distillation(self) -> Path:
        """The latest state of a distillation."""
        return self.folder / "distill.safetensors"

    def done(self, resume: bool, digest: Callable[[], str]) -> bool:
        """Whether an earlier run of the same job left nothing to do; what it had yet to remove is removed.

        digest: of the fingerprint. Raises OutputError for any other output that is there already, for a run that
        another process is at work on, and for one begun earlier unless it is to go on.
        """
        found = self.would_be_done(resume, digest)
        if found and self.folder.exists():
            self._clear()
        return found

    def would_be_done(self, resume: bool, digest: Callable[[], str]) -> bool:
        """As :meth:`done`, which it answers and raises, with nothing removed."""
        if trust.is_file(self.folder / LOCK):
            with self._opened("r") as lock:
                self._take(lock)
        nothing_left = self._renamed() or not self.folder.exists()
        if resume and nothing_left and (made := self._made_by()) is not None and made == digest():
            return True
        files.check_free(self.out)
        if self.folder.exists() and not resume:
            raise OutputError(
                f"{self.folder}: a run that was to write {self.out.name} began and did not end; go on with --resume,"
                " or remove that folder to begin anew."
            )
        return False

    def begun(self, fingerprint: Callable[[], Mapping[str, Any]]) -> bool:
        """Whether a run of that fingerprint began in the folder. Raises OutputError where another did, naming the first
        difference, and where blocks do not tell of which run they are."""
        path = self.folder / FINGERPRINT
        if trust.exists(path):
            difference = first_difference(self._earlier(path), json.loads(json.dumps(fingerprint())))
            if difference is not None:
                raise OutputError(
                    f"{self.folder}: the run to go on with was begun otherwise: {difference}; restore that, or remove"
                    " the folder to begin anew."
                )
            return True
        if any((self.folder / "blocks").glob("*")):
            raise OutputError(
                f"{path}: the file is missing that says which run the blocks beside it are of; remove {self.folder} to"
                " begin anew."
            )
        return False

    @contextmanager
    def kept(self, fingerprint: Callable[[], Mapping[str, Any]]) -> Iterator[None]:
        """The working folder while a run lasts: made or taken up, and removed when the body ends well.

        When it does not, the folder stays for ``--resume`` if it has any finished block, and the error has a note that
        says so. Raises OutputError when another process works there, when the earlier run was another (naming the
        first difference), or when a process of this run does not see the folder.
        """
        try:
            if self.world.main:
                self._open(fingerprint())
            self.world.wait()
            if not all(self.world.gather((self.folder / FINGERPRINT).is_file())):
                raise OutputError(f"{self.folder}: all processes of a run must see the folder of {self.out.name}.")
            yield
        except BaseException as error:
            self._abandon(error)
            raise
        else:
            if self.world.main:
                self._clear()
        finally:
            if self._lock is not None:
                self._lock.close()

    def _open(self, fingerprint: Mapping[str, Any]) -> None:
        made = not self.folder.exists()
        try:
            for place in ("blocks", "streams"):
                (self.folder / place).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"{self.folder}: the working folder cannot be made ({error.strerror}).") from error
        lock = self._opened("w")
        try:
            self._take(lock)
        except BaseException as error:
            lock.close()
            if made and isinstance(error, _NoLocks):
                files.remove(self.folder)
            raise
        # Held until the run ends, in whatever way. Without it the folder is not ours to clear.
        self._lock = lock
        stale = [*self.folder.rglob(".*.partial-*"), *self.folder.glob("scratch-*"), self.result, self._finished]
        for left in stale:
            files.remove(left)
        if not self.begun(lambda: fingerprint):
            files.write_text(self.folder / FINGERPRINT, json.dumps(fingerprint, indent=1))

    def _opened(self, mode: str) -> Any:
        try:
            return open(self.folder / LOCK, mode)
        except OSError as error:
            raise OutputError(f"{self.folder / LOCK}: the file cannot be opened ({error.strerror}).") from error

    def _take(self, lock: Any) -> None:
        """Lock the folder until the file is closed. Raises OutputError when another process has it, or none can."""
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise OutputError(f"{self.folder}: another process is at work on it; wait for its end.") from None
            raise _NoLocks(
                f"{self.folder}: the file system there has no locks ({error.strerror}), which keep two runs apart;"
                " choose an output folder on another."
            ) from error

    def _earlier(self, path: Path) -> dict[str, Any]:
        """The fingerprint that was left there."""
        try:
            found = trust.read_json(path, OutputError, "the fingerprint of a run")
            if not isinstance(found, dict):
                raise OutputError(f"{path}: not the fingerprint of a run.")
        except OutputError as error:
            raise OutputError(f"{str(error)[:-1]}; remove {self.folder} to begin anew.") from error
        return found

    def _abandon(self, error: BaseException) -> None:
        """Leave the folder for ``--resume``, or remove it when no block was finished or the input must be another."""
        holds = self.world.main and self._lock is not None
        hopeless = isinstance(error, OF_THE_INPUT) and not isinstance(error, ChangedError)
        if not hopeless and any((self.folder / "blocks").glob("*.safetensors")):
            if holds:
                for left in [*self.folder.glob("scratch-*"), self.result]:
                    files.remove(left)
            if holds or not self.world.main:
                error.add_note(f"Finished blocks are kept in {self.folder}; go on with --resume, or remove it.")
        elif holds:
            files.remove(self.folder)

    @property
    def _finished(self) -> Path:
        return self.folder / "finished"

    def _renamed(self) -> bool:
        """Whether an earlier run was ended between giving the result its name and the end of removing this folder."""
        if not (self.folder.is_dir() and self.out.is_dir() and any(self.out.iterdir())):
            return False
        left = {path.name for path in self.folder.iterdir()}
        return not left or (self._finished.name in left and self.result.name not in left)

    def _made_by(self) -> str | None:
        """The digest in the report of an output that is whole: it has its weights and its report."""
        try:
            FileSource(self.out)
            return read_report(self.out).fingerprint
        except (SourceError, FormatError):
            return None

    def _clear(self) -> None:
        """Remove the folder, and last the file that says that the output is whole."""
        for path in self.folder.iterdir():
            if path != self._finished:
                files.remove(path)
        files.remove(self._finished)
        self.folder.rmdir()

    def mark_finished(self) -> None:
        """Note that nothing is left but to give the result its name."""
        files.write_text(self._finished, "")


class _Rows(BaseModel):
    """A block's lines of the report, and what later blocks and the end of the run need of it."""

    layers: list[LayerRow]
    block: BlockRow
    notes: list[str]
    matched: list[str]
    sequence: str | None


class Stage:
    """One walk over the blocks, as the engine sees it: a sink for the block in hand, and what earlier ones left."""

    def __init__(self, journal: Journal, name: str):
        self.journal, self.name, self.world = journal, name, journal.world
        self._items: list[dict[str, Any]] = []
        finished = 0
        while self.world.main and trust.exists(self._block(finished)):
            finished += 1
        self.finished: int = self.world.from_main(finished)

    def _block(self, number: int) -> Path:
        return self.journal.folder / "blocks" / f"{self.name}-{number:05d}.safetensors"

    def _streams(self, number: int) -> Path:
        return self.journal.folder / "streams" / f"{self.name}-{number:05d}"

    def linear(self, name: str, tensor: QuantizedTensor, bias: Tensor | None) -> None:
        """Take a quantized linear of the block in hand."""
        if self.world.main:
            packed = pack(tensor.codes, tensor.bits)
            facts = {"bits": tensor.bits, "group_size": tensor.group_size, "columns": tensor.shape[1]}
            tensors = {"packed": packed, "scales": tensor.scales, "zeros": tensor.zeros, "order": tensor.columns}
            self._items.append({"linear": name, **facts, **tensors, "bias": bias})

    def tensor(self, name: str, tensor: Tensor) -> None:
        """Take any other tensor of the block in hand."""
        if self.world.main:
            self._items.append({"tensor": name, "value": tensor})

    def take_up(self, states: States, total: int) -> list[Any]:
        """The finished blocks' lines of the report; ``states`` are brought to where they stood behind them.

        Where those were not kept, no block counts as finished.
        """
        streams = self._streams(self.finished)
        rows = [self._rows(number) for number in range(self.finished)]
        if 0 < self.finished < total:
            if all(self.world.gather(states.saved(streams))):
                states.load(streams, {row["block"]["block"].rpartition(".")[0] for row in rows})
            else:
                rows, self.finished = [], 0
        self._forget_from(self.finished)
        return rows

    def _forget_from(self, first: int) -> None:
        """Remove the blocks that do not count as finished, which would count again beside new ones."""
        if self.world.main:
            blocks = (self.journal.folder / "blocks").glob(f"{self.name}-*.safetensors")
            for path in sorted(blocks, reverse=True):
                if path.name >= self._block(first).name:
                    files.remove(path)

    def _rows(self, number: int) -> Any:
        rows = read_value(self._block(number), "rows")
        try:
            _Rows.model_validate(rows, strict=True)
        except ValidationError as error:
            raise altered(self._block(number), f"no lines of a report: {error.errors()[0]['msg']}") from error
        return rows

    def commit(self, number: int, rows: dict[str, Any], states: States, last: bool) -> str | None:
        """The block in hand is finished; returns a note when its run could not be continued from here."""
        note = None
        if not last:
            folder = self._streams(number + 1)
            if self.world.main:
                files.remove(folder)
                folder.mkdir()
            self.world.wait()
            try:
                states.save(folder)
            except FormatError as error:
                note = f"the blocks' outputs cannot be kept ({error}); --resume would begin anew."
            self.world.wait()
        if self.world.main:
            write_value(self._block(number), {"items": self._items, "rows": rows})
            for folder in (self.journal.folder / "streams").iterdir():
                if last or folder != self._streams(number + 1):
                    files.remove(folder)
        self._items = []
        return note

    def replay(self, sink: Sink) -> None:
        """Hand all finished blocks' tensors on."""
        self.world.wait()
        if isinstance(sink, Discard):
            return
        number = 0
        while trust.exists(self._block(number)):
            items = read_value(self._block(number), "items")
            if not isinstance(items, list) or not all(isinstance(item, dict) and _fits(item) for item in items):
                raise altered(self._block(number), "the parts of a linear do not fit each other")
            for item in items:
                if "tensor" in item:
                    sink.tensor(item["tensor"], item["value"])
                    continue
                codes = unpack(item["packed"], item["bits"], item["columns"])
                grid = (item["scales"], item["zeros"], item["bits"], item["group_size"], item["order"])
                sink.linear(item["linear"], QuantizedTensor(codes, *grid), item["bias"])
            number += 1


def _fits(item: Mapping[str, Any]) -> bool:
    """Whether an item from a file can be handed to a sink: types and shapes as :class:`Stage` wrote them."""
    if set(item) == {"tensor", "value"}:
        return isinstance(item["tensor"], str) and isinstance(item["value"], Tensor)
    if set(item) != LINEAR_KEYS or not isinstance(item["linear"], str):
        return False
    bits, columns, size, packed = (item[name] for name in ("bits", "columns", "group_size", "packed"))
    sizes = trust.is_whole(columns, 1) and (trust.is_whole(size, 1) or trust.is_whole(size, -1, -1))
    if not sizes or not trust.is_whole(bits, 1) or bits not in SUPPORTED_BITS:
        return False
    rows = len(packed) if isinstance(packed, Tensor) and packed.dim() == 2 else 0
    grid, floats = (rows, group_count(columns, size)), (torch.float32, torch.float16, torch.bfloat16)
    return (
        _is(packed, (rows, packed_words(columns, bits)), (torch.int32,))
        and _is(item["scales"], grid, floats)
        and (item["zeros"] is None or _is(item["zeros"], grid, (torch.uint8,)))
        and (item["order"] is None or _is(item["order"], (columns,), (torch.int32,)))
        and (item["bias"] is None or _is(item["bias"], (rows,), (*floats, torch.float64)))
    )


def _is(value: Any, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]) -> bool:
    return isinstance(value, Tensor) and tuple(value.shape) == shape and value.dtype in dtypes


def first_difference(earlier: Any, now: Any, path: str = "") -> str | None:
    """The first place in which two nested dicts differ, in words."""
    if isinstance(earlier, dict) and isinstance(now, dict):
        for key in sorted({*earlier, *now}):
            found = first_difference(earlier.get(key), now.get(key), f"{path}, {key}" if path else str(key))
            if found is not None:
                return found
        return None
    return None if earlier == now else f"{path} was {_shown(earlier)} and is {_shown(now)}"


def _shown(value: Any) -> str:
    text = "absent" if value is None else str(value)
    return text if len(text) <= 80 else text[:77] + "..."
