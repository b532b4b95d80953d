"""Experts that were taken apart and not packed, put together again as they are handed out."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from epmq.experts import fused_shapes, parts_of
from epmq.fused import Part
from epmq.progress import Sink
from epmq.quantized import QuantizedTensor


class JoiningSink:
    """Hands on what it is given, to ``sink``, with one tensor in place of the parts of experts.

    apart: the model whose tensors are given. whole: the same with some of its mixtures joined
    (:func:`epmq.experts.join`); both may be meta. A fused tensor is held until its last part is there.
    """

    def __init__(self, sink: Sink, apart: nn.Module, whole: nn.Module):
        self._sink = sink
        self._shapes = fused_shapes(apart)
        for name in fused_shapes(whole):
            del self._shapes[name]
        self._part: dict[str, tuple[str, Part]] = {}
        for name, shape in self._shapes.items():
            self._part |= {key: (name, part) for key, part in parts_of(apart, name, shape).items()}
        self._made: dict[str, Tensor] = {}
        self._missing = {name: sum(1 for to, _ in self._part.values() if to == name) for name in self._shapes}

    def linear(self, name: str, tensor: QuantizedTensor, bias: Tensor | None) -> None:
        """As of a Sink."""
        self._sink.linear(name, tensor, bias)

    def tensor(self, name: str, tensor: Tensor) -> None:
        """As of a Sink."""
        if name not in self._part:
            self._sink.tensor(name, tensor)
            return
        whole, part = self._part[name]
        if whole not in self._made:
            self._made[whole] = torch.empty(self._shapes[whole], dtype=tensor.dtype, device=tensor.device)
        part.put(self._made[whole], tensor)
        self._missing[whole] -= 1
        if not self._missing[whole]:
            self._sink.tensor(whole, self._made.pop(whole))
