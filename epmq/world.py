"""The processes of one run: who computes what, and sums whose order is fixed. One process alone is the usual case.

Several are started by torchrun. Every process holds the same objects and calls the same exchanges in the same order.
"""

from __future__ import annotations

import json
import math
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from importlib import import_module
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from epmq.errors import ProcessError

BEAT_SECONDS = 1.0
# A process that has not said anything for so long is taken for dead.
SILENT_SECONDS = 12.0
# How long one that lost its peers waits for their last words.
LAST_WORDS_SECONDS = 4.0
CHUNK_ELEMENTS = 2**24
ROW_STEP = 16


class World:
    """One process: all work is its own, and every exchange gives back what it was given."""

    rank = 0
    size = 1

    @property
    def main(self) -> bool:
        """Whether this process writes and talks."""
        return self.rank == 0

    def rows(self, count: int) -> slice:
        """This process's share of ``count`` rows in whole steps of 16; all of them where there is no step for each."""
        each, left = divmod(-(-count // ROW_STEP), self.size)
        if each == 0:
            return slice(0, count)
        start = self.rank * each + min(self.rank, left)
        stop = start + each + (self.rank < left)
        return slice(start * ROW_STEP, min(stop * ROW_STEP, count))

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor, in place, by its sum over all processes, taken in the order of their ranks."""

    def concat(self, tensor: Tensor) -> Tensor:
        """All processes' tensors ``[M_r, ...]`` behind one another in the order of ranks."""
        return tensor

    def gather(self, value: Any) -> list[Any]:
        """All processes' values (anything JSON can hold) in the order of ranks."""
        return [value]

    def from_main(self, value: Any) -> Any:
        """The main process's value (anything JSON can hold)."""
        return value

    def spread(self, tensor: Tensor, source: int = 0) -> None:
        """Replace the tensor, in place, by that of process ``source``."""

    def wait(self) -> None:
        """Return when all processes have come here."""

    def speaks(self, message: str) -> bool:
        """Whether this process is the one to tell of an error that ends the run; the first to ask is."""
        return True

    def lost(self) -> str | None:
        """A sentence naming the processes that have died, or None."""
        return None

    def close(self) -> None:
        """Leave the others in peace: this process has done its part."""


class Processes(World):
    """Processes joined by torch.distributed: gloo for tensors in memory, nccl for those of a GPU."""

    def __init__(self) -> None:
        self.rank, self.size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        backend = "gloo"
        if torch.cuda.device_count() >= processes_here():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
            backend = "cpu:gloo,cuda:nccl"
        # Its functions hold for ever the group there is when they are imported, and torch._dynamo imports it. A group
        # that outlives close() has threads at the interpreter's end, which aborts one that then gives back a tensor.
        import_module("torch.distributed.nn.functional")
        # Long, because the main process may write for hours; that peers are alive is seen by their beats.
        dist.init_process_group(backend, timeout=timedelta(hours=24))
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(address, port, None, False, timedelta(seconds=SILENT_SECONDS))  # type: ignore[attr-defined]
        self._store = dist.PrefixStore(f"epmq/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)  # type: ignore[attr-defined]
        self._closing = threading.Event()
        self._names = self.gather(f"{socket.gethostname()}, process {os.getpid()}")
        self._store.set(f"beat/{self.rank}", "0")
        self.wait()
        self._watch = threading.Thread(target=self._beat, daemon=True)
        self._watch.start()

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        small = [tensor for tensor in tensors if tensor.numel() < CHUNK_ELEMENTS // 64]
        for dtype in sorted({tensor.dtype for tensor in small}, key=str):
            alike = [tensor for tensor in small if tensor.dtype == dtype]
            joined = torch.cat([tensor.reshape(-1) for tensor in alike])
            self._add_up_flat(joined)
            for tensor, part in zip(alike, joined.split([tensor.numel() for tensor in alike]), strict=True):
                tensor.copy_(part.view_as(tensor))
        for tensor in tensors:
            if tensor.numel() >= CHUNK_ELEMENTS // 64:
                assert tensor.is_contiguous()
                for chunk in tensor.view(-1).split(CHUNK_ELEMENTS):
                    self._add_up_flat(chunk)

    def _add_up_flat(self, flat: Tensor) -> None:
        """Every process adds up one part of all processes' tensors, then all parts go to all."""
        length = -(-flat.numel() // self.size)
        sent = torch.zeros(self.size * length, dtype=flat.dtype, device=flat.device)
        sent[: flat.numel()] = flat
        received = torch.empty_like(sent)
        with self._together():
            dist.all_to_all_single(received, sent)
        parts = received.view(self.size, length)
        total = parts[0].clone()
        for part in parts[1:]:
            total += part
        with self._together():
            dist.all_gather(list(sent.view(self.size, length)), total)
        flat.copy_(sent[: flat.numel()])

    def concat(self, tensor: Tensor) -> Tensor:
        # As bytes, because not every dtype travels on every backend.
        width = math.prod(tensor.shape[1:]) * tensor.element_size()
        lengths = torch.zeros(self.size, dtype=torch.int64, device=tensor.device)
        lengths[self.rank] = len(tensor)
        self._add_up_flat(lengths)
        padded = torch.zeros(int(lengths.max()), width, dtype=torch.uint8, device=tensor.device)
        padded[: len(tensor)] = tensor.contiguous().view(-1).view(torch.uint8).view(len(tensor), width)
        parts = [torch.empty_like(padded) for _ in range(self.size)]
        with self._together():
            dist.all_gather(parts, padded)
        whole = torch.cat([part[:count] for part, count in zip(parts, lengths.tolist(), strict=True)])
        return whole.view(-1).view(tensor.dtype).view(len(whole), *tensor.shape[1:])

    def gather(self, value: Any) -> list[Any]:
        text = json.dumps(value).encode() + b"\n"
        joined = self.concat(torch.frombuffer(bytearray(text), dtype=torch.uint8))
        return [json.loads(line) for line in bytes(joined.tolist()).splitlines()]

    def from_main(self, value: Any) -> Any:
        return self.gather(value if self.main else None)[0]

    def spread(self, tensor: Tensor, source: int = 0) -> None:
        with self._together():
            dist.broadcast(tensor, source)

    def wait(self) -> None:
        self._add_up_flat(torch.zeros(self.size))

    def speaks(self, message: str) -> bool:
        try:
            return self._store.compare_set("failed", "", f"{self.rank}: {message}").decode().startswith(f"{self.rank}:")
        except RuntimeError:
            # The store went with the process that held it, so nobody can be asked.
            return True

    def lost(self) -> str | None:
        try:
            before = self._beats()
            deadline = time.monotonic() + LAST_WORDS_SECONDS
            while time.monotonic() < deadline:
                if self._store.check(["failed"]):
                    return None
                time.sleep(0.2)
            after = self._beats()
        except RuntimeError:
            return "the process that started the others no longer answers."
        return self._obituary([r for r in range(self.size) if r != self.rank and before[r] == after[r] != "ended"])

    def close(self) -> None:
        if not self._closing.is_set():
            self._closing.set()
            self._watch.join()
            try:
                self._store.set(f"beat/{self.rank}", "ended")
                dist.destroy_process_group()
            except RuntimeError:
                pass

    def _obituary(self, dead: list[int]) -> str | None:
        if not dead:
            return None
        names = " and ".join(f"rank {r} ({self._names[r]})" for r in dead)
        return f"{names} died or no longer answers; the other processes of this run ended too."

    def _beats(self) -> list[str]:
        return [value.decode() for value in self._store.multi_get([f"beat/{rank}" for rank in range(self.size)])]

    def _beat(self) -> None:
        """In a thread of its own: tells that this process lives, and ends it when another is silent for too long."""
        count = 0
        heard = [(time.monotonic(), "")] * self.size
        while not self._closing.wait(BEAT_SECONDS):
            count += 1
            try:
                self._store.set(f"beat/{self.rank}", str(count))
                beats = self._beats()
            except RuntimeError:
                # Without the store there is nothing to be seen; the next exchange fails where the others are gone.
                continue
            now = time.monotonic()
            heard = [(now, new) if new != old else (at, old) for (at, old), new in zip(heard, beats, strict=True)]
            silent = [rank for rank, (at, beat) in enumerate(heard) if now - at > SILENT_SECONDS and beat != "ended"]
            message = self._obituary([rank for rank in silent if rank != self.rank])
            if message is not None:
                self._end(message)

    def _end(self, message: str) -> None:
        """The main thread may wait for the dead for ever, and then heeds nothing but the end of the process."""
        if self._closing.wait(2 * LAST_WORDS_SECONDS):
            return
        if self.speaks(message):
            os.write(2, f"epmq: {message}\n".encode())
        os._exit(2)

    @contextmanager
    def _together(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise ProcessError(self.lost() or "another process of this run ended early.") from error


def processes_here() -> int:
    """How many processes of this run are on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


@cache
def world() -> World:
    """The processes this one was started with: by torchrun several, else it is alone."""
    return Processes() if several() else World()


def several() -> bool:
    """Whether this process was started with others."""
    return "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1 and "MASTER_ADDR" in os.environ


def shares(costs: Mapping[str, Sequence[float]], size: int) -> dict[str, list[int]]:
    """Which process runs which item of each task: {task: rank per item}.

    Within a task the next dearest item goes to the process with the least of that task, then of all tasks, so that
    none waits long for another at the end of a task.
    """
    total = [0.0] * size
    owners: dict[str, list[int]] = {}
    for task, items in costs.items():
        own = [0.0] * size
        owners[task] = [0] * len(items)
        for place in sorted(range(len(items)), key=lambda i: (-items[i], i)):
            rank = min(range(size), key=lambda r: (own[r], total[r], r))
            owners[task][place] = rank
            own[rank] += items[place]
            total[rank] += items[place]
    return owners


def by_turns(count: int, world: World, work: Callable[[int], Any]) -> list[Any]:
    """``[work(0), work(1), ...]`` with each call made by one process and its (JSON) result known to all."""
    own = {str(i): work(i) for i in range(world.rank, count, world.size)}
    known: dict[str, Any] = {}
    for part in world.gather(own):
        known.update(part)
    return [known[str(i)] for i in range(count)]
