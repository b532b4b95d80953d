"""A writer's tensors with experts that were taken apart, and not packed, put together again."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from epmq.experts import fused_shapes, parts_of
from epmq.formats.packed import Writer
from epmq.fused import Part
from epmq.quantized import QuantizedTensor


class JoiningWriter:
    """Hands on what it is given, to ``writer``, with one tensor in place of the parts of experts.

    apart: the model whose tensors are given. whole: the same with some of its mixtures joined
    (:func:`epmq.experts.join`), as ``writer`` knows it; both may be meta. A fused tensor is held until its last part is
    there.
    """

    def __init__(self, writer: Writer, apart: nn.Module, whole: nn.Module):
        self._writer, self.shards, self.limits = writer, writer.shards, writer.limits
        there = fused_shapes(whole)
        self._shapes = {name: shape for name, shape in fused_shapes(apart).items() if name not in there}
        self._part: dict[str, tuple[str, Part]] = {}
        self._missing: dict[str, int] = {}
        for name in self._shapes:
            parts = parts_of(apart, name)
            self._part |= {key: (name, part) for key, part in parts.items()}
            self._missing[name] = len(parts)
        self._made: dict[str, Tensor] = {}

    def linear(self, name: str, tensor: QuantizedTensor, bias: Tensor | None) -> None:
        """Store linear ``name``."""
        self._writer.linear(name, tensor, bias)

    def tensor(self, name: str, tensor: Tensor) -> None:
        """Store a tensor as it is, or with the other parts of its whole when these are there."""
        if name not in self._part:
            self._writer.tensor(name, tensor)
            return
        whole, part = self._part[name]
        if whole not in self._made:
            self._made[whole] = torch.empty(self._shapes[whole], dtype=tensor.dtype, device=tensor.device)
        part.put(self._made[whole], tensor)
        self._missing[whole] -= 1
        if not self._missing[whole]:
            self._writer.tensor(whole, self._made.pop(whole))

    def finish(self) -> None:
        """As of the writer."""
        assert not self._made, f"parts of {', '.join(self._made)} were not given"
        self._writer.finish()
