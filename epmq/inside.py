"""What happens inside an expert: the inputs and outputs of a block's modules while the expert's own weights run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from epmq.calls import BlockCall
from epmq.inputs import observe
from epmq.precision import Precision

Seen = dict[str, Tensor]


def run_inside(
    expert_block: nn.Module, call: BlockCall, inputs_of: list[str], outputs_of: list[str]
) -> tuple[Any, Seen]:
    """The block's output, and copies of what the named modules read, or give, on the way, in the call's precision."""
    seen: Seen = {}
    keep_first = partial(_keep_first, seen, call.precision)
    with observe(expert_block, inputs_of, keep_first), outputs(expert_block, outputs_of, seen, call.precision):
        output = call.run(expert_block)
    return output, seen


@contextmanager
def outputs(block: nn.Module, names: list[str], seen: Seen, precision: Precision) -> Iterator[None]:
    """While active, copies of the outputs of named submodules are kept in ``seen``, each of its first run."""

    def hook_for(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            _keep_first(seen, precision, name, output)

        return hook

    handles = [block.get_submodule(name).register_forward_hook(hook_for(name)) for name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _keep_first(seen: Seen, precision: Precision, name: str, tensor: Tensor) -> None:
    """Keep what a tensor holds now, as the block may write into it later; a module that runs again is seen as it ran
    first, inside the expert and as deployed."""
    if name not in seen:
        seen[name] = precision.copied(tensor)
