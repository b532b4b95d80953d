"""What a quantization has around it: other processes, room for what it keeps, and a journal."""

from __future__ import annotations

from dataclasses import dataclass, field

from epmq.progress import Stage
from epmq.reuse import DEFAULT_LIMIT_BYTES
from epmq.shelf import Shelf
from epmq.world import World


@dataclass(frozen=True)
class Surroundings:
    """Where an engine works. world: the processes that share the work. shelf: where hidden states are kept.
    reuse_bytes: memory for outputs of finished linears. takes_spare: whether on a GPU they may take more, half of what
    a block's work leaves free. stage: its part of a journal, or None when a run that is cut off need not go on."""

    world: World = field(default_factory=World)
    shelf: Shelf = field(default_factory=Shelf)
    reuse_bytes: int = DEFAULT_LIMIT_BYTES
    takes_spare: bool = True
    stage: Stage | None = None
