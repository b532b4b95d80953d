"""What a job will take, told before it starts: memory, disk and time, from shapes alone."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from epmq.blocks import find_blocks
from epmq.config import DistillSettings, QuantConfig
from epmq.errors import ConfigError, OutputError
from epmq.experts import shares
from epmq.orientation import features_of, is_linear
from epmq.reuse import DEFAULT_LIMIT_BYTES
from epmq.rows import SAMPLE_ROWS

FLOAT = 4
# Copies of a group's K x K matrices and of its N x K matrices that are alive at once: Hessians per task, folded,
# permuted, factored, and totals in fp64; weights of merge, expert and anchor, pull, step, target, codes of two
# roundings.
SQUARES, RECTANGLES = 13, 9
PROBE, PROBE_ELSEWHERE = 768, 4096
# Deployed runs of a block (outputs of finished linears are reused), and one inside the expert.
RUNS = 4


@dataclass(frozen=True)
class Estimate:
    """fixed: bytes of memory that no setting spares. states: bytes of hidden states, in memory or on disk. disk: bytes
    in the output's place while the run lasts. seconds: per block, on this machine. blocks: their number. walks: over
    all of them. tuning: seconds of distillation, 0 without it."""

    fixed: int
    states: int
    disk: int
    seconds: float
    blocks: int
    walks: int = 1
    tuning: float = 0.0

    def told(self) -> str:
        """The estimate in words."""
        minutes = (self.walks * self.blocks * self.seconds + self.tuning) / 60
        work = f"{self.blocks} blocks of {self.seconds:.1f} s"
        work += " twice" if self.walks == 2 else ""
        work += f", {self.tuning:.0f} s of distillation" if self.tuning else ""
        return (
            f"estimate: {work}, {minutes:.1f} min beside reading and writing; memory {_mib(self.fixed)}"
            f" beyond imports, and {_mib(self.states)} of hidden states there or on disk; disk {_mib(self.disk)}"
        )

    def room(self, memory: int) -> tuple[int, int]:
        """Bytes for hidden states and for outputs that are reused, out of ``memory`` beyond imports.

        Raises ConfigError when not even one block fits.
        """
        left = memory - self.fixed
        if left < 0:
            raise ConfigError(
                f"one block of this model takes about {_mib(self.fixed)} of memory, and {_mib(memory)} may be used;"
                " use a machine with more, raise memory: in the recipe, or lower calibration.batch_size."
            )
        reused = min(DEFAULT_LIMIT_BYTES, left // 4)
        return left - reused, reused

    def check_disk(self, free: int, spilled: int, place: str) -> None:
        """Raise OutputError when the run will not fit on a disk with ``free`` bytes."""
        if free < self.disk + spilled:
            raise OutputError(
                f"{place}: the run needs about {_mib(self.disk + spilled)} of disk there, and {_mib(free)} are free;"
                " make room, or choose another place."
            )


def estimate(
    skeleton: nn.Module,
    calibration: Mapping[str, Sequence[Mapping[str, Any]]],
    config: QuantConfig,
    experts: int,
    processes: int,
    device: torch.device,
    merging: int,
) -> Estimate:
    """For one of ``processes`` equal processes that compute on ``device``, disk for all of them; skeleton is the whole
    model, as on meta. merging: how many tensors of a size are in memory while one is merged or read."""
    addresses = find_blocks(skeleton)
    blocks = [skeleton.get_submodule(address.name) for address in addresses]
    block = max(blocks, key=_elements)
    whole, largest = _elements(skeleton), _elements(block)
    outer = whole - sum(_elements(one) for one in blocks)
    groups = _groups(block)
    width = _width(groups)
    batches = [_positions(inputs, width) for stream in calibration.values() for inputs in stream]
    positions = math.ceil(sum(batches) / processes)
    fixed = outer + 2 * largest + _matrices(groups)
    fixed += merging * max((t.numel() for t in skeleton.state_dict().values()), default=0)
    # Each process keeps the samples of its share of the tasks until the group is rounded.
    sampled = sum(max(SAMPLE_ROWS, len(stream)) for stream in calibration.values())
    fixed += math.ceil(sampled / processes) * max((group.outputs + group.columns for group in groups), default=0)
    fixed += _flows(groups, max(batches, default=0))
    if config.distill is not None:
        fixed += whole * 2 + round(3 * config.distill.last_blocks * (whole - outer))
    inside = 1 if config.needs_expert_features and experts else 0
    streams = (1 + inside) * positions * width
    seen = inside * positions * (width + sum(group.columns for group in groups if not group.of_mixture))
    bits = 16 if config.bits is None else config.bits + 32 / max(config.group_size, 16)
    written = round((whole - outer) * bits / 8 + outer * FLOAT)
    moments = sum((1 + 2 * inside) * group.share * group.columns**2 for group in groups)
    forward = positions * (RUNS * 2.0 * _read_elements(block, groups) + moments)
    solving = sum((2 * experts + 6) * 2 * group.outputs * group.columns**2 / processes for group in groups)
    dtype: torch.dtype = getattr(torch, config.forward_dtype)
    states = FLOAT * streams + dtype.itemsize * seen
    disk = 2 * written + 2 * processes * FLOAT * streams
    single, passing = (_speed(kind, device) for kind in (torch.float32, dtype))
    seconds = forward / passing + solving / single
    walks, tuning = 1, 0.0
    if config.distill is not None:
        walks = 2 if config.rounds else 1
        # In fp16 it would need loss scaling, and runs in fp32.
        rate = passing if dtype == torch.bfloat16 else single
        tuning = tuning_operations(config.distill, calibration, width, whole - outer) / processes / rate
    return Estimate(FLOAT * fixed, states, disk, seconds, len(blocks), walks, tuning)


def work_bytes(block: nn.Module, batches: Sequence[Mapping[str, Any]]) -> int:
    """Memory that calibrating one block on these batches takes beyond the experts' streams: its weights twice, a
    group's matrices, what its linears read and give of one batch, and the hidden states of all."""
    groups = _groups(block)
    width = _width(groups)
    positions = [_positions(inputs, width) for inputs in batches]
    hidden = 2 * sum(positions) * width
    return FLOAT * (2 * _elements(block) + hidden + _matrices(groups) + _flows(groups, max(positions, default=0)))


def tuning_operations(
    settings: DistillSettings, calibration: Mapping[str, Sequence[Mapping[str, Any]]], width: int, weights: int
) -> float:
    """Operations of a distillation of blocks with so many ``weights``: the experts' features on every text and its
    copies, on those of a similar task too, and the steps, each a few examples of every task, through all blocks
    forwards and through the tuned ones backwards, where a weight is multiplied twice."""
    total, each = 0.0, 0.0
    for batches in calibration.values():
        positions = [_positions(inputs, width) for inputs in batches]
        shares = [min(1.0, settings.examples / max(1, _examples(inputs))) for inputs in batches]
        total += sum(positions)
        each += sum(p * share for p, share in zip(positions, shares, strict=True)) / max(1, len(batches))
    similar = 2 if settings.cross_weight and len(calibration) > 1 else 1
    targets = 2.0 * weights * total * (1 + settings.copies) * similar
    return targets + 2.0 * weights * (1 + 2 * settings.last_blocks) * each * settings.steps


class _Group(NamedTuple):
    """Linears that probably read the same input: their outputs together, and what they read. share: of the positions,
    all but for experts of a mixture."""

    outputs: int
    columns: int
    share: float
    of_mixture: bool


def _groups(block: nn.Module) -> list[_Group]:
    """Groups as the module lists them: linears of the same parent and width."""
    shared = {f"{name}.": share for name, share in shares(block).items()}
    found: dict[tuple[str, int], _Group] = {}
    for name, module in block.named_modules():
        if is_linear(module):
            columns, outputs = features_of(module) or (0, 0)
            share = next((share for mixture, share in shared.items() if name.startswith(mixture)), None)
            key = (name.rpartition(".")[0], columns)
            before = found[key].outputs if key in found else 0
            found[key] = _Group(before + outputs, columns, 1.0 if share is None else share, share is not None)
    return list(found.values())


def _width(groups: list[_Group]) -> int:
    """Of hidden states: what the first linear reads that is not in a mixture."""
    return next((group.columns for group in sorted(groups, key=lambda group: group.of_mixture)), 1)


def _read_elements(block: nn.Module, groups: list[_Group]) -> float:
    """Weights that a position is multiplied by."""
    return _elements(block) - sum((1.0 - group.share) * group.outputs * group.columns for group in groups)


def _matrices(groups: list[_Group]) -> int:
    """Entries of the matrices of the group that has most of them."""
    rectangle = max((group.outputs * group.columns for group in groups), default=0)
    square = max((group.columns**2 for group in groups), default=0)
    return RECTANGLES * rectangle + SQUARES * square


def _flows(groups: list[_Group], positions: int) -> int:
    """Entries of what linears read and give of so many positions, twice."""
    return math.ceil(2 * positions * sum(group.share * (group.outputs + group.columns) for group in groups))


def _elements(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _positions(inputs: Mapping[str, Any], width: int) -> int:
    """Rows of hidden states that a batch makes: one per token, or per ``width`` numbers of anything else."""
    tensors = [value for value in inputs.values() if isinstance(value, Tensor)]
    return max((-(-t.numel() // width) if t.is_floating_point() else t.numel() for t in tensors), default=0)


def _examples(inputs: Mapping[str, Any]) -> int:
    return max((len(value) for value in inputs.values() if isinstance(value, Tensor) and value.dim()), default=1)


def _speed(dtype: torch.dtype, device: torch.device) -> float:
    """Floating-point operations per second of a product of the usual size."""
    size = PROBE if device.type == "cpu" else PROBE_ELSEWHERE
    a = torch.ones(size, size, dtype=dtype, device=device)
    (a @ a)[0, 0].item()  # which waits for the device
    started = time.perf_counter()
    (a @ a)[0, 0].item()
    return 2.0 * size**3 / max(time.perf_counter() - started, 1e-9)


def _mib(size: float) -> str:
    return f"{size / 2**20:,.0f} MiB"
