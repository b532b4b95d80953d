"""Where every batch's streams stand between blocks: in the deployed model, inside its expert, and inside one block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from epmq import trust
from epmq.calls import ArgumentPlace, BlockAddress, BlockCall, Origin, StreamState, hidden_of
from epmq.inside import Seen
from epmq.shelf import Shelf, bytes_of
from epmq.streams import Batch


@dataclass(frozen=True)
class Inside:
    """A batch inside its expert. outputs: per block list the expert's latest output. hidden, shared: what the expert's
    own outer weights made of it for the first block of a list, and for later ones (:class:`epmq.calls.Origin`)."""

    outputs: dict[str, Any]
    hidden: Tensor
    shared: dict[ArgumentPlace, Tensor]

    def within(self, call: BlockCall, origin: Origin) -> BlockCall:
        """A call that was made from ``outputs`` with other outer weights, as the expert's own would have made it."""
        call = call.with_places({place: value for place, value in self.shared.items() if place in origin.shared})
        return call.with_hidden(self.hidden) if origin.first else call


class States:
    """The states of the batches this process runs, on a shelf that may lie on disk.

    deployed: per block list the latest output of the deployed model. inside: the batch in its expert (:class:`Inside`).
    seen: what one run of the expert's block read and gave, kept for that block only. with_inside: whether batches run
    inside their experts at all.
    """

    def __init__(self, shelf: Shelf, streams: Mapping[str, Sequence[Batch]], with_inside: bool):
        self.shelf = shelf
        self._kinds = ("deployed", "inside") if with_inside else ("deployed",)
        self.batches = [(task, batch.number) for task, batches in streams.items() for batch in batches]
        self._task = {task: place for place, task in enumerate(streams)}
        self._deployed: set[tuple[str, int]] = set()
        self._inside: set[tuple[str, int]] = set()
        self._with_calls: dict[tuple[str, int], StreamState] = {}

    def _key(self, kind: str, task: str, number: int) -> str:
        return f"{kind}-{self._task[task]:04d}-{number:06d}"

    def deployed(self, task: str, number: int) -> StreamState:
        """The state to run the deployed model from."""
        if (task, number) in self._with_calls:
            return self._with_calls[task, number]
        if (task, number) not in self._deployed:
            return StreamState()
        return StreamState(self.shelf.get(self._key("deployed", task, number)))

    def remember(self, task: str, number: int, address: BlockAddress, state: StreamState) -> None:
        """Keep a state with the block's arguments in it until the batch advances, where memory has room for them."""
        call = state.kept(address)
        spilled = (task, number) in self._deployed and not self.shelf.holds(self._key("deployed", task, number))
        if call is None or spilled or (task, number) in self._with_calls:
            return
        if self.shelf.reserve(self._key("call", task, number), bytes_of((call.args, call.kwargs))):
            self._with_calls[task, number] = state

    def advance(self, task: str, number: int, list_name: str, output: Any) -> None:
        """Keep a finished block's output in place of the one before it."""
        outputs = {**self.deployed(task, number).outputs, list_name: _plain(output)}
        self._with_calls.pop((task, number), None)
        self.shelf.drop(self._key("call", task, number))
        self.shelf.put(self._key("deployed", task, number), outputs)
        self._deployed.add((task, number))

    def outputs_inside(self, task: str, number: int) -> dict[str, Any]:
        """Per block list the expert's latest output; nothing in front of the first list."""
        if (task, number) not in self._inside:
            return {}
        found: dict[str, Any] = self.shelf.part(self._key("inside", task, number), "outputs")
        return found

    def inside(self, task: str, number: int) -> Inside:
        """The batch inside its expert."""
        kept = self.shelf.get(self._key("inside", task, number))
        hidden = hidden_of(kept["outputs"][kept["list"]]) if kept["hidden"] is None else kept["hidden"]
        return Inside(kept["outputs"], hidden, dict(kept["sequences"]))

    def start_inside(self, task: str, number: int, call: BlockCall, origin: Origin) -> None:
        """Begin a list of blocks inside the expert with the arguments of its first one."""
        outputs, places = self.outputs_inside(task, number), call.places()
        sequences = [(place, places[place]) for place in places if place in origin.shared]
        self._put_inside(task, number, {"outputs": outputs, "hidden": call.hidden, "sequences": sequences})

    def go_inside(self, task: str, number: int, before: Inside, list_name: str, output: Any, origin: Origin) -> None:
        """Keep the output of an expert's block in place of the one before it."""
        outputs = {**before.outputs, list_name: _plain(output)}
        sequences = [(place, value) for place, value in before.shared.items() if place in origin.onward]
        # The hidden states are in the output, and are not kept twice.
        place = {"list": list_name, "hidden": None}
        self._put_inside(task, number, {"outputs": outputs, "sequences": sequences, **place})

    def _put_inside(self, task: str, number: int, value: dict[str, Any]) -> None:
        self.shelf.put(self._key("inside", task, number), value)
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
        """Whether the folder holds all states of each of this process's batches."""
        names = (f"{self._key(kind, *batch)}.safetensors" for batch in self.batches for kind in self._kinds)
        return all(trust.exists(folder / name) for name in names)

    def load(self, folder: Path, lists: Set[str]) -> None:
        """Take up what :meth:`save` left, in this or another number of processes, behind blocks of these lists.

        Raises FormatError for a damaged file.
        """
        for batch in self.batches:
            for kind, known, fits in (
                ("deployed", self._deployed, _are_outputs),
                ("inside", self._inside, _is_inside),
            ):
                key = self._key(kind, *batch)
                path = folder / f"{key}.safetensors"
                if trust.exists(path):
                    self.shelf.take(key, path, partial(fits, lists=lists))
                    known.add(batch)


def _plain(output: Any) -> Any:
    """A block's output as a file can hold it: without a named tuple's names."""
    return tuple(output) if isinstance(output, tuple) else output


def _are_outputs(value: Any, lists: Set[str]) -> bool:
    """Whether a value from a file can be outputs of these block lists."""
    if not isinstance(value, dict) or set(value) != lists:
        return False
    firsts = [output[0] if isinstance(output, (tuple, list)) and output else output for output in value.values()]
    return all(isinstance(first, Tensor) for first in firsts)


def _is_inside(value: Any, lists: Set[str]) -> bool:
    """Whether a value from a file can be what :class:`Inside` is made of."""
    if not isinstance(value, dict) or "hidden" not in value or not _are_outputs(value.get("outputs"), lists):
        return False
    hidden, sequences, last = value["hidden"], value.get("sequences"), value.get("list")
    if not isinstance(hidden, Tensor) and not (hidden is None and isinstance(last, str) and last in lists):
        return False
    return isinstance(sequences, list) and all(
        isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], (int, str)) and isinstance(pair[1], Tensor)
        for pair in sequences
    )
