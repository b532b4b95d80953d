"""Where every batch's streams stand between blocks: in the deployed model, inside its expert, and inside one block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from epmq.blocks import StreamState
from epmq.inside import Seen
from epmq.shelf import Shelf, read_value
from epmq.streams import Batch


class States:
    """The states of the batches this process runs, on a shelf that may lie on disk.

    deployed: per block list the latest output of the deployed model. inside: hidden states ``[B, S, D]`` of the
    expert. seen: what one run of the expert's block read and gave, kept for that block only.
    """

    def __init__(self, shelf: Shelf, streams: Mapping[str, Sequence[Batch]]):
        self.shelf = shelf
        self.batches = [(task, batch.number) for task, batches in streams.items() for batch in batches]
        self._task = {task: place for place, task in enumerate(streams)}
        self._deployed: set[tuple[str, int]] = set()
        self._inside: set[tuple[str, int]] = set()

    def _key(self, kind: str, task: str, number: int) -> str:
        return f"{kind}-{self._task[task]:04d}-{number:06d}"

    def deployed(self, task: str, number: int) -> StreamState:
        """The state to run the deployed model from."""
        if (task, number) not in self._deployed:
            return StreamState()
        return StreamState(self.shelf.get(self._key("deployed", task, number)))

    def advance(self, task: str, number: int, list_name: str, output: Any) -> None:
        """Keep a finished block's output in place of the one before it."""
        outputs = {**self.deployed(task, number).outputs, list_name: output}
        self.shelf.put(self._key("deployed", task, number), outputs)
        self._deployed.add((task, number))

    def inside(self, task: str, number: int) -> Tensor:
        """Hidden states inside the expert."""
        hidden: Tensor = self.shelf.get(self._key("inside", task, number))
        return hidden

    def go_inside(self, task: str, number: int, hidden: Tensor) -> None:
        """Keep the expert's hidden states in place of those before them."""
        self.shelf.put(self._key("inside", task, number), hidden)
        self._inside.add((task, number))

    def keep_seen(self, task: str, number: int, seen: Seen) -> None:
        """Keep what was seen inside the expert's block."""
        self.shelf.put(self._key("seen", task, number), seen)

    def seen(self, task: str, number: int, name: str) -> Tensor:
        """What was seen at one module of the expert's block."""
        tensor: Tensor = self.shelf.part(self._key("seen", task, number), name)
        return tensor

    def forget_seen(self) -> None:
        """Drop what was seen inside the experts' block."""
        for task, number in self.batches:
            self.shelf.drop(self._key("seen", task, number))

    def save(self, folder: Path) -> None:
        """Leave every batch's states in files of a folder that is there already."""
        for task, number in self.batches:
            for kind, known in (("deployed", self._deployed), ("inside", self._inside)):
                if (task, number) in known:
                    key = self._key(kind, task, number)
                    self.shelf.export(key, folder / f"{key}.safetensors")

    def saved(self, folder: Path) -> bool:
        """Whether the folder holds a deployed state of each of this process's batches."""
        return all((folder / f"{self._key('deployed', *batch)}.safetensors").is_file() for batch in self.batches)

    def load(self, folder: Path) -> None:
        """Take up what :meth:`save` left, in this or another number of processes."""
        for batch in self.batches:
            for kind, known in (("deployed", self._deployed), ("inside", self._inside)):
                key = self._key(kind, *batch)
                path = folder / f"{key}.safetensors"
                if path.is_file():
                    self.shelf.put(key, read_value(path))
                    known.add(batch)
