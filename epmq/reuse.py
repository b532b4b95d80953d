"""Keeps what a block's modules gave while nothing that they depend on can change, so that the block's next run asks
them no more.

A block runs once for every group of its linears, each time a little further. All that has finished before the first
linear still to be quantized is final: a later run may take it as it is. The outermost modules that finished are kept,
and what lies inside them is dropped: an attention's context takes the place of its queries, keys and values.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from epmq.calls import Versions, intact, versions_of

DEFAULT_LIMIT_BYTES = 2 * 2**30

_Key = tuple[object, str, int]


@dataclass(frozen=True)
class _Kept:
    """What one call of a module gave. inside: how often it called each module within it."""

    output: Any
    tensors: Versions
    inside: Counter[str]
    size: int


class OutputStore:
    """Outputs of the modules of ``block``, per batch and call; refuses what would pass ``limit_bytes``.

    pending: the modules whose weights are still to change, by name within the block; :meth:`settle` takes them out.
    What the store has no room for, what the block has written into, and what a module gives that is handed objects
    which it may change unnoticed (a cache), is computed again.
    """

    def __init__(self, block: nn.Module, pending: Iterable[str], limit_bytes: int = DEFAULT_LIMIT_BYTES):
        self.limit_bytes = limit_bytes
        self._modules = [(name, module) for name, module in block.named_modules() if name and _costs(module)]
        self._pending = set(pending)
        self._kept: dict[_Key, _Kept] = {}
        self._written: set[str] = set()
        self._bytes = 0

    def settle(self, names: Iterable[str]) -> None:
        """The weights of these modules are final."""
        self._pending.difference_update(names)

    @contextmanager
    def active(self, batch: object) -> Iterator[None]:
        """While active, one run of the block on this batch takes from the store what it can, and fills it."""
        run = _Run(self, batch)
        # A module may have a forward of its own, which is put back.
        own = [module.__dict__.get("forward") for _, module in self._modules]
        for name, module in self._modules:
            module.forward = run.forward_of(name, module.forward)
        try:
            yield
        finally:
            for (_, module), forward in zip(self._modules, own, strict=True):
                if forward is None:
                    del module.forward
                else:
                    module.forward = forward

    def find(self, key: _Key) -> _Kept | None:
        """What was kept of a call, if it still holds."""
        kept = self._kept.get(key)
        if kept is not None and not intact(kept.tensors):
            # Keeping it again would be in vain, and would drop what lies inside.
            self._written.add(key[1])
            self._drop(key)
            return None
        return kept

    def keep(self, key: _Key, kept: _Kept, within: list[_Key]) -> None:
        """Keep what a call gave in place of what the calls ``within`` it gave, where there is room."""
        if key[1] in self._written:
            return
        held = [inner for inner in within if inner in self._kept]
        if self._bytes + kept.size - sum(self._kept[inner].size for inner in held) > self.limit_bytes:
            return
        for inner in held:
            self._drop(inner)
        self._kept[key] = kept
        self._bytes += kept.size

    def is_pending(self, name: str) -> bool:
        """Whether the weights of that module will change."""
        return name in self._pending

    def _drop(self, key: _Key) -> None:
        self._bytes -= self._kept.pop(key).size


class _Run:
    """One run of a block: counts the calls of each module, and knows when the first that is not final has begun."""

    def __init__(self, store: OutputStore, batch: object):
        self.store, self.batch = store, batch
        self.calls: Counter[str] = Counter()
        self.tainted = False

    def forward_of(self, name: str, compute: Callable[..., Any]) -> Callable[..., Any]:
        """The module's forward, answering from the store where it can."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            key = (self.batch, name, self.calls[name])
            kept = None if self.tainted else self.store.find(key)
            if kept is not None:
                self.calls.update(kept.inside)
                self.calls[name] += 1
                return kept.output
            self.tainted |= self.store.is_pending(name)
            before = self.calls.copy()
            given = versions_of((args, kwargs))
            output = compute(*args, **kwargs)
            inside = self.calls - before
            self.calls[name] += 1
            if not self.tainted and given is not None and intact(given):
                self._keep(key, output, inside, before)
            return output

        return forward

    def _keep(self, key: _Key, output: Any, inside: Counter[str], before: Counter[str]) -> None:
        tensors = versions_of(output)
        if tensors is None:
            return
        # A part of a tensor keeps all of it.
        storages = {storage._cdata: storage.nbytes() for storage in (t.untyped_storage() for t, _ in tensors)}
        size = sum(storages.values())
        within = [(self.batch, name, before[name] + n) for name, count in inside.items() for n in range(count)]
        self.store.keep(key, _Kept(output, tensors, inside, size), within)


def _costs(module: nn.Module) -> bool:
    """Whether a module has weights or other modules: what has neither is cheaper run than kept."""
    return next(module.parameters(), None) is not None or next(module.children(), None) is not None
