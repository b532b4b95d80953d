"""What the experts of a mixture read, from one run of the block for many of them, kept until it is asked for.

No expert depends on another where a block calls its mixture once: what one reads is the same whatever weights the
others have. So the block need not run again for each of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import Any

from torch import Tensor, nn

from epmq.experts import separated
from epmq.inputs import InputGroup, Step, names_of

_Batch = tuple[str, int]


def side_by_side(block: nn.Module, steps: Sequence[Step]) -> list[Step]:
    """The steps of a block with those of a mixture in waves: the first of each expert, then the second of each."""
    mixtures, found = list(separated(block)), list[Step]()
    for mixture, members in groupby(steps, lambda step: _mixture_of(step, mixtures)):
        if mixture is None:
            found += members
        else:
            found += [step for wave in _waves(list(members), mixture) for step in wave]
    return found


class InputsAhead:
    """Inputs of linears per batch, by the first linears of their groups: copies of no more than ``limit_bytes``.

    steps: as of :func:`side_by_side`. batches: how many there are. copied: makes the copy that is kept. Asked in the
    order of the steps, for all batches of one after the other, it has them ready for as many experts as there is room
    for.
    """

    def __init__(
        self,
        block: nn.Module,
        steps: Sequence[InputGroup | str],
        limit_bytes: int,
        batches: int,
        copied: Callable[[Tensor], Tensor] = Tensor.clone,
    ):
        self._block, self._limit, self._batches, self._copied = block, limit_bytes, batches, copied
        self._mixture: dict[str, str] = {}
        self._wave: dict[str, list[str]] = {}
        for mixture in separated(block):
            members = [step for step in steps if _mixture_of(step, [mixture])]
            for wave in _waves(members, mixture):
                names = [step.first for step in wave if isinstance(step, InputGroup)]
                self._wave |= dict.fromkeys(names, names)
                self._mixture |= dict.fromkeys(names, mixture)
        # Those that the first batch had room for; of the others no more than these are kept.
        self._together: list[str] = []
        self._kept: dict[tuple[_Batch, str], tuple[Tensor | None, Any]] = {}
        self._bytes = 0

    def companions(self, name: str) -> list[str]:
        """The linears that a run for this one should see as well."""
        wave = self._together if name in self._together else self._wave.get(name, [name])
        return wave[wave.index(name) + 1 :] if self._limit else []

    def room(self, name: str) -> int:
        """Bytes for what a run for this linear sees of its companions."""
        free = self._limit - self._bytes
        return free if name in self._together else min(free, self._limit // self._batches)

    def keep(self, batch: _Batch, name: str, seen: Mapping[str, Tensor | None]) -> None:
        """Keep what a run for ``name`` saw of its companions, as far as there is room."""
        companions, room = self.companions(name), self.room(name)
        is_first = name not in self._together
        if is_first:
            self._together = [name]
        experts: Any = self._block.get_submodule(self._mixture[name]) if companions else None
        for other in filter(seen.__contains__, companions):
            found = seen[other]
            x = None if found is None else self._copied(found)
            size = 0 if x is None else x.nbytes
            if size > room:
                break
            room -= size
            self._bytes += size
            self._kept[batch, other] = (x, experts.rows)
            if is_first:
                self._together.append(other)

    def has(self, batch: _Batch, name: str) -> bool:
        """Whether a run for another linear has seen what this one reads."""
        return (batch, name) in self._kept

    def take(self, batch: _Batch, name: str) -> Tensor | None:
        """What a linear reads, None where the batch does not reach it; its mixture is as after the run that saw it. It
        is kept no longer."""
        x, rows = self._kept.pop((batch, name))
        self._bytes -= 0 if x is None else x.nbytes
        experts: Any = self._block.get_submodule(self._mixture[name])
        experts.rows = rows
        return x


def _waves(members: Sequence[Step], mixture: str) -> list[list[Step]]:
    """Steps of a mixture: the first of each expert in the order in which it calls them, the second of each, ..."""
    steps_of: dict[int, list[Step]] = {}
    for step in members:
        number = int(names_of(step)[0].removeprefix(f"{mixture}.").partition(".")[0])
        steps_of.setdefault(number, []).append(step)
    ordered = [steps_of[number] for number in sorted(steps_of)]
    longest = max(map(len, ordered), default=0)
    return [[steps[place] for steps in ordered if place < len(steps)] for place in range(longest)]


def _mixture_of(step: InputGroup | str, mixtures: Sequence[str]) -> str | None:
    return next((mixture for mixture in mixtures if names_of(step)[0].startswith(f"{mixture}.")), None)
