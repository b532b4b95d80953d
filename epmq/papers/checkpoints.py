"""Published checkpoints as weight sources under the names of a module of ours, read one tensor at a time."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from epmq.errors import SourceError
from epmq.sources import DictSource, WeightSource


class ForModule:
    """A checkpoint under a module's tensor names: with or without ``prefix``, under any name of a tied tensor.

    Raises SourceError for a tensor that the checkpoint has under none of its names.
    """

    def __init__(self, source: WeightSource, module: nn.Module, prefix: str = ""):
        self._source = source
        present = set(source.keys())
        state = module.state_dict(keep_vars=True)
        aliases: dict[int, list[str]] = {}
        for name, tensor in state.items():
            aliases.setdefault(id(tensor), []).append(name)
        self._key_of: dict[str, str] = {}
        for name, tensor in state.items():
            names = [name, *aliases[id(tensor)]]
            found = next((key for n in names for key in (n, prefix + n) if key in present), None)
            if found is None:
                raise SourceError(f"{source.name}: tensor {name!r}, which the base has, is missing.")
            self._key_of[name] = found

    @property
    def name(self) -> str:
        return self._source.name

    def keys(self) -> list[str]:
        return list(self._key_of)

    def shape(self, key: str) -> tuple[int, ...]:
        return self._source.shape(self._key_of[key])

    def dtype(self, key: str) -> torch.dtype:
        return self._source.dtype(self._key_of[key])

    def tensor(self, key: str) -> Tensor:
        return self._source.tensor(self._key_of[key])


class PartOf:
    """A whole model of which one part, under ``prefix``, comes from elsewhere: an expert that was published without the
    rest (a projection, a head)."""

    def __init__(self, whole: nn.Module, prefix: str, part: WeightSource):
        self._whole, self._prefix, self._part = DictSource(whole.state_dict(), "base"), prefix, part

    @property
    def name(self) -> str:
        return self._part.name

    def keys(self) -> list[str]:
        return self._whole.keys()

    def shape(self, key: str) -> tuple[int, ...]:
        source, key = self._place(key)
        return source.shape(key)

    def dtype(self, key: str) -> torch.dtype:
        source, key = self._place(key)
        return source.dtype(key)

    def tensor(self, key: str) -> Tensor:
        source, key = self._place(key)
        return source.tensor(key)

    def _place(self, key: str) -> tuple[WeightSource, str]:
        if key.startswith(self._prefix):
            return self._part, key.removeprefix(self._prefix)
        return self._whole, key
