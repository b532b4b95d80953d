"""How transformers keeps a mixture's experts in a few tensors, and where in those each one's weights and biases are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

# What an expert reads with, by the tensor that has it of all of them: W = [gate; up], or up alone without a gate.
INPUTS = {"gate_up_proj": ("gate_proj", "up_proj"), "up_proj": ("up_proj",)}
OUTPUT = "down_proj"
BIAS = "_bias"
# The words in which transformers 5 has a class say how it keeps its experts.
SAID = ("has_gate", "has_bias", "is_transposed", "is_concatenated")

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Part:
    """One expert's weight or bias in a fused tensor: that expert's number and the rows of it, or, where the tensor is
    transposed, the columns."""

    number: int
    rows: slice
    transposed: bool

    def shape(self, fused: Shape) -> Shape:
        """Of the part, from that of the fused tensor."""
        long = len(range(*self.rows.indices(fused[-1 if self.transposed else 1])))
        return (long, fused[1]) if self.transposed else (long, *fused[2:])

    def of(self, fused: Tensor) -> Tensor:
        """The part of a tensor."""
        return self.read(lambda number, rows: fused[number, rows])

    def put(self, fused: Tensor, part: Tensor) -> None:
        """Write the part of a tensor."""
        one = fused[self.number]
        (one[:, self.rows].T if self.transposed else one[self.rows]).copy_(part)

    def read(self, part_of: Callable[[int, slice], Tensor]) -> Tensor:
        """The part, from a function that gives some rows, which lie together, of an expert."""
        if self.transposed:
            return part_of(self.number, slice(None))[:, self.rows].T.contiguous()
        if self.rows.step is not None:
            return part_of(self.number, slice(None))[self.rows].contiguous()
        return part_of(self.number, self.rows)


@dataclass(frozen=True)
class Layout:
    """What a class says of its fused tensors.

    ``gate_up_proj`` ``[E, 2I, H]``, or without a gate ``up_proj`` ``[E, I, H]``, and ``down_proj`` ``[E, H, I]``.
    biased: as many tensors more, ``gate_up_proj_bias`` ``[E, 2I]`` and so on. transposed: weights are ``[E, H, 2I]``
    and ``[E, I, H]``. interleaved: gate and up have every other row, not the first and the second half.
    """

    gated: bool
    biased: bool = False
    transposed: bool = False
    interleaved: bool = False

    @property
    def reads(self) -> str:
        """The one of INPUTS that there is."""
        return "gate_up_proj" if self.gated else "up_proj"

    def shapes(self, count: int, width: int, inner: int) -> dict[str, Shape]:
        """Of all tensors: E, H and I as above."""
        long = len(INPUTS[self.reads]) * inner
        sizes = {self.reads: (long, width), OUTPUT: (width, inner)}
        weights = {name: (count, *(size[::-1] if self.transposed else size)) for name, size in sizes.items()}
        return weights | ({f"{name}{BIAS}": (count, size[0]) for name, size in sizes.items()} if self.biased else {})

    def parts(self, leaf: str, shape: Shape) -> dict[str, Part]:
        """Each expert's part of a tensor of that shape, by its name below the module of all."""
        weights = not leaf.endswith(BIAS)
        turned = weights and self.transposed
        owners = INPUTS.get(leaf.removesuffix(BIAS), (OUTPUT,))
        size = shape[-1 if turned else 1] // len(owners)
        found = {}
        for place, owner in enumerate(owners):
            apart = slice(place, None, len(owners))
            rows = apart if self.interleaved and len(owners) > 1 else slice(place * size, (place + 1) * size)
            for number in range(shape[0]):
                found[f"{number}.{owner}.{'weight' if weights else 'bias'}"] = Part(number, rows, turned)
        return found


def is_fused(module: nn.Module) -> bool:
    """Whether a module is one of fused experts, which do no more than :class:`Layout` can say."""
    said = (getattr(module, word, None) for word in SAID)
    return None not in said and getattr(module, "has_post_expert_norm", True) is False


def layout_of(fused: nn.Module) -> Layout:
    """What a module of fused experts says of itself."""
    gated, biased, transposed, concatenated = (bool(getattr(fused, word)) for word in SAID)
    return Layout(gated, biased, transposed, not concatenated)
