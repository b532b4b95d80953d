"""What all parts of the suite share: where and how large, and what a check that fails leaves behind.

An item yields its row as soon as our own numbers stand in it, and again as it grows: no rival that comes afterwards can
lose them. A row whose check fails is kept, and says so under ``failed``.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from gpu import rivals
from torch import Tensor

from epmq.errors import NumericalError

Row = dict[str, Any]
GROUP, BITS = 128, 4
NUMBER_SECONDS = 0.12  # that most numbers are allowed to take; there are hundreds


@dataclass
class Setting:
    """Where and how large: ``tiny`` shrinks every shape, for a run that need not have a GPU; only ``timed`` times."""

    device: torch.device
    tiny: bool
    limits: dict[str, float]
    absent: dict[str, str]
    timed: bool = False

    def shape(self, *sizes: int, least: int = 32) -> tuple[int, ...]:
        return tuple(max(least, size // 512 // 16 * 16) if self.tiny else size for size in sizes)

    def share(self, amount: float, taken_us: float, limit: str) -> float | None:
        """Which share of this card's rate (in units of 1e12 a second) a call reaches."""
        return amount / taken_us / 1e6 / self.limits[limit] if limit in self.limits else None

    def attempt(self, name: str, measure: Callable[[], float]) -> float | None:
        """The number that ``measure`` gives; None, with the reason kept, of a rival that is absent or fails. What of
        ours computes wrongly raises NumericalError."""
        try:
            return measure()
        except NumericalError:
            raise
        except rivals.Absent as reason:
            self.absent.setdefault(name, str(reason))
        except Exception as failure:  # whatever a rival throws is a fact about the rival
            traceback.print_exc()
            self.absent[name] = f"failed: {type(failure).__name__}: {str(failure).splitlines()[:1]}"
            if self.device.type == "cuda":
                torch.cuda.synchronize()  # raises where nothing can run after it
        return None


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def expect(row: Row, holds: bool, otherwise: str) -> None:
    """Write into a row that a check of it failed."""
    if not holds:
        row["failed"] = f"{row['failed']}; {otherwise}" if "failed" in row else otherwise
