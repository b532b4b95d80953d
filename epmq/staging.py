"""Tensors of the CPU on their way to a GPU, through memory that it reads by itself.

From where a tensor lies the driver copies it into such memory piece by piece, in one thread, and waits for each; here
torch's threads do, while the piece before is on its way. Two pieces are enough for that; four also bridge what the
processor does between two tensors.
"""

from __future__ import annotations

import logging
import threading
from functools import cache

import torch
from torch import Tensor

from epmq.errors import first_line

log = logging.getLogger("epmq")

PIECES, PIECE_BYTES = 4, 16 * 2**20
# Below, the one copy that the driver makes takes no longer.
LEAST_BYTES = 2**20


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """What ``tensor.to(device)`` gives. The copy is queued on the device's current stream, and not waited for; the
    tensor itself may be written to or given back at once."""
    if not _suits(tensor, device):
        return tensor.to(device)
    staging = _staging(torch.cuda.current_device() if device.index is None else device.index)
    if staging is None:
        return tensor.to(device)
    if not tensor.is_contiguous():
        return staging.send(tensor.T).T
    return staging.send(tensor)


def _suits(tensor: Tensor, device: torch.device) -> bool:
    """Whether it is a plain dense tensor, or matrix on its side, that no gradient follows."""
    return (
        device.type == "cuda"
        and tensor.device.type == "cpu"
        and type(tensor) in (Tensor, torch.nn.Parameter)
        and tensor.layout == torch.strided
        and tensor.numel() * tensor.element_size() >= LEAST_BYTES
        and (tensor.is_contiguous() or (tensor.dim() == 2 and tensor.T.is_contiguous()))
        and not tensor.is_pinned()
        and not (tensor.requires_grad and torch.is_grad_enabled())
    )


class Staging:
    """Owns the pieces of pinned memory through which tensors go to one GPU."""

    def __init__(self, device: torch.device):
        self.device = device
        with torch.inference_mode(False):  # those of inference mode could not be written to outside of it
            self._pieces = [_pinned(PIECE_BYTES) for _ in range(PIECES)]
        self._left = [torch.cuda.Event() for _ in self._pieces]
        self._next = 0
        self._lock = threading.Lock()

    @torch.no_grad()
    def send(self, tensor: Tensor) -> Tensor:
        """A contiguous tensor on the GPU."""
        there = torch.empty(tensor.shape, dtype=tensor.dtype, device=self.device)
        elements = PIECE_BYTES // tensor.element_size()
        with self._lock:
            stream = torch.cuda.current_stream(self.device)
            for source, target in zip(tensor.view(-1).split(elements), there.view(-1).split(elements), strict=True):
                # An event that has not been recorded yet is not waited for.
                self._left[self._next].synchronize()
                piece = self._pieces[self._next].view(tensor.dtype)[: len(source)]
                piece.copy_(source)
                target.copy_(piece, non_blocking=True)
                self._left[self._next].record(stream)
                self._next = (self._next + 1) % PIECES
        return there


def _pinned(size: int) -> Tensor:
    return torch.empty(size, dtype=torch.uint8, pin_memory=True)


@cache
def _staging(index: int) -> Staging | None:
    """That of a GPU; None where the system gives no pinned memory."""
    try:
        return Staging(torch.device("cuda", index))
    except RuntimeError as error:
        log.warning("no pinned memory (%s): weights go to the GPU the slow way.", first_line(error))
        return None
