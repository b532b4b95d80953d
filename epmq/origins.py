"""Follows through a model's forward what each tensor was made of, whatever computes it: autograd sees no detach."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

Marks = frozenset[Hashable]
NO_MARKS: Marks = frozenset()


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors in nested tuples, lists and mappings."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)


class Origins(TorchDispatchMode):
    """While active, every result of an operation carries the marks of all that it was made of."""

    def __init__(self) -> None:
        super().__init__()
        self._marks = WeakTensorKeyDictionary()

    def mark(self, tensor: Tensor, mark: Hashable) -> None:
        """Let a tensor stand for itself, whatever it was made of."""
        self._marks[tensor] = frozenset([mark])

    def of(self, value: Any) -> Marks:
        """The marks of all tensors in a value."""
        return NO_MARKS.union(*(self._marks.get(tensor, NO_MARKS) for tensor in tensors_in(value)))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        found = self.of((args, kwargs))
        for tensor in tensors_in(output) if found else ():
            # What an operation writes into keeps what it was made of before; through a view it writes into the whole.
            for written in (tensor, tensor._base):
                if written is not None:
                    self._marks[written] = found | self._marks.get(written, NO_MARKS)
        return output
