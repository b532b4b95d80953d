"""Finds the repeated blocks of any model."""

from __future__ import annotations

from torch import nn

from epmq.calls import BlockAddress
from epmq.errors import ModelError
from epmq.orientation import is_linear


def find_blocks(model: nn.Module) -> list[BlockAddress]:
    """Blocks of a model: members of its outermost lists of modules of one class that hold linears.

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
            f"{type(model).__name__}: no repeated blocks found (a ModuleList or Sequential of modules of one class"
            " that hold linear layers and have a forward of their own)."
        )
    return addresses


def _is_block_list(module: nn.Module) -> bool:
    if not isinstance(module, (nn.ModuleList, nn.Sequential)) or len(module) == 0:
        return False
    if isinstance(module, nn.Sequential) and len(module) == 1:
        return False
    first = next(iter(module))
    # A list in a list has no forward: the model takes it apart.
    if len({type(child) for child in module}) != 1 or is_linear(first) or type(first).forward is nn.Module.forward:
        return False
    return all(any(is_linear(inner) for inner in child.modules()) for child in module)
