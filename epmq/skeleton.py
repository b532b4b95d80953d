"""A model without weights, and its parts filled from a weight source when they are needed."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from epmq.devices import cast_there
from epmq.errors import SourceError
from epmq.sources import FiniteReader, WeightSource


def meta_copy(module: nn.Module) -> nn.Module:
    """A copy whose parameters and persistent buffers hold no memory; ties, and buffers outside the state, are kept."""
    stored = set(module.state_dict(keep_vars=True))
    memo: dict[int, object] = {}
    for _, parameter in module.named_parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), requires_grad=False)
    for name, buffer in module.named_buffers():
        if name in stored:
            memo[id(buffer)] = buffer.detach().to("meta")
    duplicate: nn.Module = copy.deepcopy(module, memo)
    return duplicate.eval()


@contextmanager
def without_cache(model: nn.Module) -> Iterator[None]:
    """While active, a transformers model keeps no keys and values for later tokens, which calibration does not need."""
    configs = {id(config): config for module in model.modules() if (config := getattr(module, "config", None))}
    kept = [config for config in configs.values() if getattr(config, "use_cache", False)]
    for config in kept:
        config.use_cache = False
    try:
        yield
    finally:
        for config in kept:
            config.use_cache = True


def fill(
    module: nn.Module,
    prefix: str,
    source: WeightSource,
    dtype: torch.dtype | None,
    device: torch.device | None = None,
) -> None:
    """Give every stored tensor of ``module`` its value ``source[prefix + name]``, floats cast to ``dtype``, on
    ``device`` (None: as stored, and where it is). Tied tensors are read once, under whichever name the source has.

    Raises SourceError when a tensor is absent under all its names, has another shape, or holds NaN or Inf.
    """
    aliases: dict[int, list[str]] = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        aliases.setdefault(id(tensor), []).append(name)
    present, reader = set(source.keys()), FiniteReader(source, device)
    for names in aliases.values():
        found = next((name for name in names if prefix + name in present), None)
        if found is None:
            raise SourceError(f"{source.name}: tensor {prefix + names[0]!r}, which the model needs, is missing.")
        value = reader.read(prefix + found)
        target = _get(module, found)
        if value.shape != target.shape:
            raise SourceError(
                f"{source.name}: tensor {prefix + found!r} has shape {list(value.shape)},"
                f" the model expects {list(target.shape)}."
            )
        value = cast_there(value, device, dtype)
        # A block may write into its buffers, and a source in memory hands out its own tensors.
        parameter = isinstance(target, nn.Parameter)
        replacement: Tensor = nn.Parameter(value, requires_grad=False) if parameter else value.clone()
        for name in names:
            _set(module, name, replacement)
    reader.settle()


def _get(module: nn.Module, name: str) -> Tensor:
    parent, _, leaf = name.rpartition(".")
    tensor: Tensor = getattr(module.get_submodule(parent), leaf)
    return tensor


def _set(module: nn.Module, name: str, tensor: Tensor) -> None:
    parent, _, leaf = name.rpartition(".")
    owner = module.get_submodule(parent)
    if isinstance(tensor, nn.Parameter):
        owner._parameters[leaf] = tensor
    else:
        owner._buffers[leaf] = tensor
