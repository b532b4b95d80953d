"""Finds the repeated blocks of any model."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from epmq.calls import BlockAddress
from epmq.errors import ModelError
from epmq.orientation import is_linear


def find_blocks(model: nn.Module) -> list[BlockAddress]:
    """Blocks of a model: members of its outermost lists of modules that hold linears, of one class or, in a ModuleList,
    of several of which some stand there more than once (layers of attention among those of a state space).

    Raises ModelError when there are none.
    """
    addresses: list[BlockAddress] = []
    taken: list[str] = []
    for name, module in model.named_modules():
        if any(not prefix or name.startswith(prefix + ".") for prefix in taken) or not _is_block_list(module):
            continue
        if len({id(child) for child in module}) < len(module):
            raise ModelError(
                f"{name or 'the model'}: one block stands several times in this list, which is not supported."
            )
        taken.append(name)
        addresses.extend(BlockAddress(name, child) for child, _ in module.named_children())
    if not addresses:
        raise ModelError(
            f"{type(model).__name__}: no repeated blocks found (a ModuleList or Sequential of modules of one class,"
            " or a ModuleList of a few classes, that hold linear layers and have a forward of their own)."
        )
    return addresses


def linears_of(blocks: Mapping[str, nn.Module]) -> list[str]:
    """The names of all linears in blocks that are given by name."""
    return [
        f"{block}.{name}"
        for block, module in blocks.items()
        for name, inner in module.named_modules()
        if is_linear(inner)
    ]


def _is_block_list(module: nn.Module) -> bool:
    if not isinstance(module, (nn.ModuleList, nn.Sequential)) or len(module) == 0:
        return False
    if isinstance(module, nn.Sequential) and len(module) == 1:
        return False
    classes = {type(child) for child in module}
    if len(classes) > 1 and (isinstance(module, nn.Sequential) or len(classes) == len(module)):
        return False
    # A list in a list has no forward: the model takes it apart.
    if any(is_linear(child) or type(child).forward is nn.Module.forward for child in module):
        return False
    return all(any(is_linear(inner) for inner in child.modules()) for child in module)
