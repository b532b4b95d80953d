"""Keeps outputs of linears that are already final, so that running a block again does not compute them again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

DEFAULT_LIMIT_BYTES = 2 * 2**30


class OutputStore:
    """Outputs of a block's finished linears, per batch and call; refuses what would pass ``limit_bytes``.

    A linear takes part from the moment it is named in ``final``. What the store has no room for, and what the block has
    written into since, is computed again.
    """

    def __init__(self, limit_bytes: int = DEFAULT_LIMIT_BYTES):
        self.limit_bytes = limit_bytes
        self.final: list[str] = []
        self._kept: dict[tuple[object, str, int], tuple[Tensor, int]] = {}
        self._bytes = 0

    @contextmanager
    def active(self, block: nn.Module, batch: object) -> Iterator[None]:
        """While active, finished linears of ``block`` answer from the store for this batch, or fill it."""
        linears = [(name, block.get_submodule(name)) for name in self.final]
        for name, linear in linears:
            linear.forward = self._answering(name, linear.forward, batch)
        try:
            yield
        finally:
            for _, linear in linears:
                del linear.forward

    def _answering(self, name: str, compute: Callable[..., Any], batch: object) -> Callable[..., Any]:
        calls = 0

        def forward(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            key = (batch, name, calls)
            calls += 1
            if key in self._kept:
                kept, version = self._kept[key]
                return kept if kept._version == version else compute(*args, **kwargs)
            output: Tensor = compute(*args, **kwargs)
            size = output.numel() * output.element_size()
            if self._bytes + size <= self.limit_bytes:
                self._kept[key] = (output, output._version)
                self._bytes += size
            return output

        return forward
