"""What the experts of a mixture read, from one run of the block for many of them, kept until it is asked for.

No expert depends on another: what one reads is the same whatever weights the others have. So the block need not run
again for each of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from torch import Tensor, nn

from epmq.experts import separated
from epmq.inputs import InputGroup, Step

_Batch = tuple[str, int]


def side_by_side(block: nn.Module, steps: Sequence[Step]) -> list[Step]:
    """The steps of a block with those of a mixture in waves: the first of each expert, then the second of each."""
    mixtures, found = list(separated(block)), list[Step]()
    for mixture, members in groupby(steps, lambda step: _expert_of(step, mixtures)[0]):
        if mixture is None:
            found += members
            continue
        waves, known = list[list[Step]](), Counter[str]()
        for step in members:
            number = _expert_of(step, mixtures)[1]
            if known[number] == len(waves):
                waves.append([])
            waves[known[number]].append(step)
            known[number] += 1
        found += [step for wave in waves for step in wave]
    return found


class InputsAhead:
    """Inputs of linears per batch, by the first linears of their groups; no more than ``limit_bytes`` of them.

    steps: as of :func:`side_by_side`. batches: how many there are. Asked in the order of the steps, for all batches of
    one after the other, it has them ready for as many experts as there is room for.
    """

    def __init__(self, block: nn.Module, steps: Sequence[InputGroup | str], limit_bytes: int, batches: int):
        self._block, self._limit, self._batches = block, limit_bytes, batches
        self._behind: dict[str, list[str]] = {}
        mixtures = list(separated(block))
        known = Counter[tuple[str | None, str]]()
        waves: dict[tuple[str, int], list[str]] = {}
        for step in steps:
            mixture, number = _expert_of(step, mixtures)
            if mixture is not None and isinstance(step, InputGroup):
                waves.setdefault((mixture, known[mixture, number]), []).append(step.first)
                known[mixture, number] += 1
        for wave in waves.values():
            self._behind |= {name: wave[place:] for place, name in enumerate(wave)}
        self._mixture = {name: mixture for (mixture, _), wave in waves.items() for name in wave}
        self._together: list[str] = []
        self._kept: dict[tuple[_Batch, str], tuple[Tensor | None, Any]] = {}
        self._bytes = 0

    def has(self, batch: _Batch, name: str) -> bool:
        """Whether a run for another linear has seen what this one reads."""
        return (batch, name) in self._kept

    def companions(self, name: str) -> list[str]:
        """The linears that a run for this one should see as well, itself the first."""
        if name in self._together:
            return self._together[self._together.index(name) :]
        return self._behind.get(name, [name])

    def keep(self, batch: _Batch, name: str, seen: Mapping[str, Tensor]) -> None:
        """Keep what a run saw: of ``name`` and, where there is room, of its companions."""
        names = self.companions(name)
        sizes = [seen[other].nbytes if other in seen else 0 for other in names]
        count = _fitting(sizes, self._limit - self._bytes)
        if name not in self._together:
            count = min(count, _fitting(sizes, self._limit // self._batches))
            self._together = names[:count]
        whole = sum(sizes[:count])
        experts: Any = self._block.get_submodule(self._mixture[name]) if name in self._mixture else None
        for other in names[:count]:
            x = seen.get(other)
            if x is not None and x.untyped_storage().nbytes() > whole:
                x = x.clone()  # a part of a tensor keeps all of it
            self._kept[batch, other] = (x, None if experts is None else experts.rows)
        self._bytes += whole

    def take(self, batch: _Batch, name: str) -> Tensor | None:
        """What a linear reads; its mixture is as after the run that saw it. It is kept no longer."""
        x, rows = self._kept.pop((batch, name))
        if x is not None:
            self._bytes -= x.nbytes
        if name in self._mixture:
            experts: Any = self._block.get_submodule(self._mixture[name])
            experts.rows = rows
        return x


def _fitting(sizes: Sequence[int], room: int) -> int:
    """How many of the first are no more than ``room`` together, but one at least."""
    total = 0
    for place, size in enumerate(sizes):
        total += size
        if place and total > room:
            return place
    return len(sizes)


def _expert_of(step: InputGroup | str, mixtures: Sequence[str]) -> tuple[str | None, str]:
    """The mixture that a step is in, and the number of its expert; None outside of any."""
    name = step if isinstance(step, str) else step.first
    for mixture in mixtures:
        if name.startswith(f"{mixture}."):
            return mixture, name.removeprefix(f"{mixture}.").partition(".")[0]
    return None, ""
