"""Second and first moments of a group of linears' inputs: per task, then folded over tasks relative to the anchor.

Everything here is a sum over rows, so it adds over batches, tasks and processes.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from epmq import ops
from epmq.errors import CalibrationError, NumericalError
from epmq.reference import symmetrize
from epmq.world import World

CARRIED_ROWS, CARRIED_ON_GPU = 256, 2048  # what a cache holds; what makes few launches
# The share of a column's sum of squares that may be rounding. A sum of d equal terms in fp32, one after the other, is
# off by up to d/3 units of 2^-24, and the variance takes Σx² once and Σx twice: d units, whatever dtype keeps the sums.
# d is 160 rows in a part of the extension's (no more in BLAS) and then the parts of a batch: 512 at 56,320 rows. On a
# GPU 1024 rows of Σx² and few of Σx come to as much, and so do 2048 to 8192 through tensor cores, by dtype and GPU.
ROUNDING = 512 * 2.0**-24


class TaskStatistics:
    """Moments of one task's rows at one group of linears.

    x are the rows the deployed model feeds to the group, ``target`` the rows inside the expert: what its group reads
    (P = K features), or, where that is less, what its linears make of it (P = N outputs, without their bias).
    hessian: ``[K, K]`` lower triangle of Σ r x xᵀ. sum_x: ``[K]``. cross ``[P, K]`` and sum_target ``[P]``: Σ r d xᵀ
    and Σ r d, where d are target outputs, or how far target features are from x, which is all that a problem around the
    anchor needs, and exactly zero for an expert that sees what the deployed model sees.
    weight: Σ r. A thin sample of rows is kept for reporting errors. targets is P, or None when alpha is 0.

    exact: add up the batches' fp32 moments in fp64, where such sums hardly ever round, so that the result does not
    depend on which process took which batch. The moments are then to be read after :meth:`over`.
    """

    def __init__(
        self,
        columns: int,
        targets: int | None,
        of_outputs: bool = False,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
        exact: bool = False,
    ):
        self.hessian = torch.zeros(columns, columns, dtype=dtype, device=device)
        self.sum_x = torch.zeros(columns, dtype=dtype, device=device)
        self.cross = None if targets is None else torch.zeros(targets, columns, dtype=dtype, device=device)
        self.sum_target = None if targets is None else torch.zeros(targets, dtype=dtype, device=device)
        self.of_outputs = of_outputs
        self.weight = 0.0
        self.sample_x: list[Tensor] = []
        self.sample_target: list[Tensor] = []
        self._totals = [moment.double() for moment in self._moments()] if exact else []
        # Some forms add to fp64 sums themselves.
        self._straight = exact and ops.choose("accumulate", self.hessian[:0], *self._totals[:2]).backend == "cpp"

    def _moments(self) -> list[Tensor]:
        given = (self.hessian, self.sum_x, self.cross, self.sum_target)
        return [moment for moment in given if moment is not None]

    def add(self, x: Tensor, target: Tensor | None, row_weights: Tensor | None, sample: int = 0) -> None:
        """Add rows ``[M, K]``; ``row_weights`` fp32 ``[M]``; keep about ``sample`` of them for the report."""
        # In 16 bits too torch subtracts in fp32 and rounds once.
        given = target if target is None or self.of_outputs else target - x
        hessian, sum_x, *crossed = self._totals if self._straight else self._moments()
        cross, sum_target = crossed or (None, None)
        ops.accumulate(x, hessian, sum_x, given, cross, sum_target, row_weights)
        if not self._straight:
            for total, moment in zip(self._totals, self._moments(), strict=False):
                _carry(total, moment, lower=moment is self.hessian)
        self.weight += float(x.shape[0] if row_weights is None else row_weights.sum())
        if sample:
            everything = torch.arange(x.shape[0], device=x.device)
            kept = everything if row_weights is None else torch.nonzero(row_weights).flatten()
            kept = kept[:: max(1, len(kept) // sample)][:sample]
            self.sample_x.append(x[kept].float())
            if target is not None:
                self.sample_target.append(target[kept].float())

    def join(self, other: TaskStatistics) -> None:
        """Add another part of the same task's rows; the sample stays as it is."""
        self.hessian += other.hessian
        self.sum_x += other.sum_x
        if self.cross is not None and other.cross is not None:
            self.cross += other.cross
        if self.sum_target is not None and other.sum_target is not None:
            self.sum_target += other.sum_target
        self.weight += other.weight

    def over(self, world: World) -> None:
        """Make these the statistics of all processes' rows; the samples stand in the order of ranks."""
        weight = self.sum_x.new_full((1,), self.weight, dtype=torch.float64)
        world.add_up([weight, *(self._totals or self._moments())])
        self.weight = float(weight)
        for total, moment in zip(self._totals, self._moments(), strict=False):
            moment.copy_(total)
        self._totals = []
        if world.size == 1:
            return
        # A process may have no rows of this task.
        self.sample_x = [world.concat(torch.cat([self.sum_x.new_empty(0, len(self.sum_x)).float(), *self.sample_x]))]
        if self.sum_target is not None:
            nothing = self.sum_target.new_empty(0, len(self.sum_target)).float()
            self.sample_target = [world.concat(torch.cat([nothing, *self.sample_target]))]

    def of_rows(self, rows: slice) -> TaskStatistics:
        """The same for some of the group's outputs: targets that are outputs are those of these."""
        if not self.of_outputs or self.cross is None or self.sum_target is None:
            return self
        part = copy.copy(self)
        part.cross, part.sum_target = self.cross[rows], self.sum_target[rows]
        return part

    def sampled(self, expert: Expert, alpha: float) -> Sample:
        """The sampled rows and what the expert makes of them."""
        x = torch.cat(self.sample_x)
        if not self.sample_target:
            return Sample(x, x @ expert.weight.T + expert.bias)
        target = torch.cat(self.sample_target)
        if self.of_outputs:
            return Sample(x, torch.lerp(x @ expert.weight.T, target, alpha) + expert.bias)
        return Sample(x, torch.lerp(x, target, alpha) @ expert.weight.T + expert.bias)

    def check(self, task: str, where: str) -> None:
        """Refuse statistics without rows, or with NaN or Inf in them."""
        if self.weight <= 0:
            raise CalibrationError(f"task {task!r} has no calibration rows at {where}: all positions are masked out.")
        if not bool(torch.isfinite(self.sum_x).all() and torch.isfinite(self.hessian.diagonal()).all()):
            raise NumericalError(f"{where}: an activation of task {task!r} is NaN or Inf on its calibration inputs.")
        if self.sum_target is not None and not bool(torch.isfinite(self.sum_target).all()):
            raise NumericalError(f"{where}: an activation inside expert {task!r} is NaN or Inf.")


@dataclass
class Expert:
    """One expert's weights at a group of linears, rows stacked: weight ``[N, K]``, bias ``[N]`` (zeros if none)."""

    weight: Tensor
    bias: Tensor

    def of_rows(self, rows: Tensor | slice) -> Expert:
        """Some of the outputs."""
        return Expert(self.weight[rows], self.bias[rows])


@dataclass(frozen=True)
class Sample:
    """A few of a task's rows: x ``[M, K]`` as deployed, y ``[M, N]`` the targets at alpha."""

    x: Tensor
    y: Tensor

    def error(self, candidate: Expert, rows: slice) -> float:
        """Relative squared output error of weights that stand in place of ``rows`` of the group."""
        return output_error(candidate.weight, candidate.bias, self.x, self.y[:, rows])


@dataclass(frozen=True)
class Moments:
    """All of a task's rows by their moments, and the expert's weights that give the targets."""

    task: TaskStatistics
    expert: Expert

    @cached_property
    def hessian(self) -> Tensor:
        """Σ r x xᵀ, full ``[K, K]``."""
        return symmetrize(self.task.hessian)

    def error(self, candidate: Expert, rows: slice) -> float:
        """As :meth:`Sample.error`, over all rows that were gathered."""
        expert = self.expert.of_rows(rows)
        difference = Expert(candidate.weight - expert.weight, candidate.bias - expert.bias)
        return self._energy(difference) / max(self._energy(expert), torch.finfo(torch.float32).tiny)

    def _energy(self, of: Expert) -> float:
        """Σ ‖W x + b‖² over the rows."""
        quadratic = ((of.weight @ self.hessian) * of.weight).sum() + 2.0 * (of.bias @ (of.weight @ self.task.sum_x))
        return float(quadratic + self.task.weight * of.bias.square().sum())


@dataclass
class Folded:
    """What is left of all tasks: the least-squares problem around the anchor.

    hessian: ``[K, K]`` H = Σ w_t X_t X_tᵀ, full. pull: ``[N, K]`` E = C - A H, the pull of the experts' targets away
    from the anchor's own outputs. sum_x: ``[K]`` Σ w_t X_t 1. sum_pull: ``[N]``, the targets' summed distance from the
    anchor's outputs. weight: s = Σ w_t n_t.
    """

    hessian: Tensor
    pull: Tensor
    sum_x: Tensor
    sum_pull: Tensor
    weight: float = 0.0

    @classmethod
    def empty(
        cls, rows: int, columns: int, dtype: torch.dtype = torch.float32, device: torch.device | None = None
    ) -> Folded:
        return cls(
            torch.zeros(columns, columns, dtype=dtype, device=device),
            torch.zeros(rows, columns, dtype=dtype, device=device),
            torch.zeros(columns, dtype=dtype, device=device),
            torch.zeros(rows, dtype=dtype, device=device),
        )

    def of_rows(self, rows: Tensor | slice) -> Folded:
        """The problem of some of the outputs, on the same inputs."""
        return Folded(self.hessian, self.pull[rows], self.sum_x, self.sum_pull[rows], self.weight)

    def fold(
        self,
        task: TaskStatistics,
        expert: Expert,
        anchor: Expert,
        alpha: float,
        weighting: Literal["tokens", "hessian_norm"],
        gamma: float = 1.0,
    ) -> None:
        """Add one task's problem. The statistics may be dropped afterwards.

        Written as differences from the anchor, so that an expert equal to it pulls by exactly zero. Products are added
        afterwards: those that add as they go round some numbers of rows otherwise, and a process's share of the rows
        would not be what a single process makes of them.
        """
        hessian = symmetrize(task.hessian)
        w = task_weight(hessian, task.weight, weighting)
        if alpha > 0.0 and task.cross is not None and task.sum_target is not None:
            if task.of_outputs:
                self.pull.add_(task.cross - ops.product(expert.weight, hessian), alpha=w * alpha)
                self.sum_pull.add_(task.sum_target - expert.weight @ task.sum_x, alpha=w * alpha)
            else:
                self.pull.add_(ops.product(expert.weight, task.cross), alpha=w * alpha)
                self.sum_pull.add_(expert.weight @ task.sum_target, alpha=w * alpha)
        if gamma != 1.0:
            diagonal = hessian.diagonal().clone()
            hessian.mul_(gamma).diagonal().copy_(diagonal)
        towards = expert.weight - anchor.weight
        offset = expert.bias - anchor.bias
        self.hessian.add_(hessian, alpha=w)
        self.pull.add_(ops.product(towards, hessian), alpha=w)
        self.pull.addr_(offset, task.sum_x, alpha=w)
        self.sum_x.add_(task.sum_x, alpha=w)
        self.sum_pull.add_(towards @ task.sum_x + offset * task.weight, alpha=w)
        self.weight += w * task.weight

    def fold_inputs(self, task: TaskStatistics, weighting: Literal["tokens", "hessian_norm"]) -> None:
        """Add one task's inputs only: the target stays the anchor (plain GPTQ)."""
        hessian = symmetrize(task.hessian)
        w = task_weight(hessian, task.weight, weighting)
        self.hessian.add_(hessian, alpha=w)
        self.sum_x.add_(task.sum_x, alpha=w)
        self.weight += w * task.weight

    def whole(self, own: slice, rows: int, world: World) -> Folded:
        """The problem of all ``rows``, when this is that of a process's share ``own`` of them."""
        if own == slice(0, rows):
            return self
        return replace(self, pull=world.concat(self.pull), sum_pull=world.concat(self.sum_pull))

    def centred(self) -> Folded:
        """The problem with weighted means taken out of inputs and targets; sums are kept for the bias."""
        mean_x, mean_pull = self.sum_x / self.weight, self.sum_pull / self.weight
        hessian = torch.addr(self.hessian, mean_x, mean_x, alpha=-self.weight)
        # A column that never varies leaves rounding noise behind, which must not pass for a tiny variance.
        constant = hessian.diagonal() <= ROUNDING * self.hessian.diagonal()
        hessian[constant, :] = 0.0
        hessian[:, constant] = 0.0
        pull = torch.addr(self.pull, mean_pull, mean_x, alpha=-self.weight)
        pull[:, constant] = 0.0
        return Folded(hessian, pull, self.sum_x, self.sum_pull, self.weight)

    def bias(self, anchor: Expert, weight: Tensor) -> Tensor:
        """The bias ``[N]`` that centres the outputs of ``weight`` on the targets' mean: ȳ - Q x̄."""
        mean_x, mean_pull = self.sum_x / self.weight, self.sum_pull / self.weight
        return anchor.bias + mean_pull + (anchor.weight - weight) @ mean_x


def _carry(total: Tensor, moment: Tensor, lower: bool) -> None:
    """Move what is in ``moment`` over to ``total``; of a lower triangle little more than that."""
    step = (CARRIED_ROWS if moment.device.type == "cpu" else CARRIED_ON_GPU) if lower else max(1, len(moment))
    for start in range(0, len(moment), step):
        rows = slice(start, start + step)
        columns = (rows, slice(0, start + step)) if lower else (rows,)
        total[columns] += moment[columns]
        moment[columns] = 0.0


def task_weight(hessian: Tensor, rows: float, weighting: Literal["tokens", "hessian_norm"]) -> float:
    """1/n_t, or 1/‖H_t‖_F (then every task's Hessian has unit norm; FeatCal, arXiv 2605.13030)."""
    if weighting == "tokens":
        return 1.0 / rows
    norm = float(torch.linalg.matrix_norm(hessian))
    return 1.0 / norm if norm > 0 else 1.0 / rows


def output_error(weight: Tensor, bias: Tensor, x: Tensor, y: Tensor) -> float:
    """Relative squared output error ``‖Q x + b - y‖² / ‖y‖²`` on rows x ``[M, K]`` with targets y ``[M, N]``."""
    error = x @ weight.T + bias - y
    return float(error.square().sum() / y.square().sum().clamp_min(torch.finfo(y.dtype).tiny))
