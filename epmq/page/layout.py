"""Where a linear stands: which list of blocks, which block (a column), which kind of linear (a row)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Place:
    """The list a linear's block belongs to ("encoder.layer"), the block's own name ("3") and the linear's in it."""

    list_name: str
    block: str
    kind: str


@dataclass
class Panel:
    """One list of blocks as a grid; ``names`` has the linear of each (kind, block) that there is."""

    list_name: str
    blocks: list[str]
    kinds: list[str]
    names: dict[tuple[str, str], str]


def place_of(linear: str, blocks: Iterable[str]) -> Place:
    """The place of a linear; ``blocks`` are the names of all blocks, of which the longest that fits holds it."""
    fitting = [block for block in blocks if linear.startswith(f"{block}.")]
    block = max(fitting, key=len, default="")
    kind = linear[len(block) + 1 :] if block else linear
    list_name, _, own = block.rpartition(".")
    return Place(list_name, own, kind)


def panels(linears: Iterable[str], blocks: list[str]) -> list[Panel]:
    """The grids of a model, rows and columns in the order in which they first come."""
    known = set(blocks)
    found: dict[str, Panel] = {}
    for linear in linears:
        parts = linear.split(".")
        around = [name for name in (".".join(parts[:end]) for end in range(1, len(parts))) if name in known]
        place = place_of(linear, around)
        panel = found.setdefault(place.list_name, Panel(place.list_name, [], [], {}))
        if place.block not in panel.blocks:
            panel.blocks.append(place.block)
        if place.kind not in panel.kinds:
            panel.kinds.append(place.kind)
        panel.names[place.kind, place.block] = linear
    return list(found.values())
