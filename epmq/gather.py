"""Statistics of one step of a block, gathered task by task from the streams that run through it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from epmq.errors import CalibrationError, NumericalError
from epmq.inputs import InputGroup, narrows
from epmq.norms import CHANNELS_SECOND, NormStatistics, reads_one_input
from epmq.rows import SAMPLE_ROWS
from epmq.sources import all_finite
from epmq.statistics import Expert, Folded, Sample, TaskStatistics
from epmq.streams import rows_of, rows_read, split_held
from epmq.visit import Visit

ROUTED_NOTE = (
    "{}: some of its linears read rows that the model picks, and picks otherwise inside the experts; their targets are"
    " what the experts' weights make of the deployed model's rows (alpha 0)."
)


@dataclass(frozen=True)
class Gathered:
    """What all tasks say about a group of linears.

    problem: defines the target of the outputs this process solves for. inputs: defines the rounding's Hessian; the
    same object unless gamma shrinks the former. split: the problem of all outputs on fitted and on held-out examples,
    where the anchor is chosen by them. samples: rows for the report, of the tasks this process reports on.
    """

    problem: Folded
    inputs: Folded
    split: tuple[Folded, Folded] | None
    samples: dict[str, Sample]

    def of_rows(self, rows: Tensor | slice) -> tuple[Folded, Folded]:
        """``problem`` and ``inputs`` for some of the outputs."""
        problem = self.problem.of_rows(rows)
        return problem, problem if self.inputs is self.problem else self.inputs


def gather(visit: Visit, group: InputGroup, anchor: Expert, own: slice) -> Gathered | None:
    """The problem of a group around its anchor, for this process's share ``own`` of the outputs; None where no batch
    reaches it any more, because what picks its rows was rounded before it."""
    walk, config = visit.walk, visit.walk.config
    own_anchor = anchor.of_rows(own)
    rows, columns = anchor.weight.shape

    def empty(count: int) -> Folded:
        return Folded.empty(count, columns, device=walk.device)

    def fold(into: Folded, statistics: TaskStatistics, expert: Expert) -> None:
        part, own_expert = statistics.of_rows(own), expert.of_rows(own)
        into.fold(part, own_expert, own_anchor, config.alpha, config.task_weights, config.gamma)

    count = len(own_anchor.bias)
    problem = empty(count)
    inputs = problem if config.gamma == 1.0 else empty(0)
    automatic = config.method == "epmq" and config.anchor == "auto"
    split = (empty(count), empty(count)) if automatic else None
    samples: dict[str, Sample] = {}
    missing: list[str] = []
    for place, task in enumerate(walk.streams):
        # Without experts the anchor is the merged weights, and these are what the report compares with.
        expert = visit.read(walk.experts[task], group) if walk.experts else anchor
        found = _of_task(visit, group, task, expert, automatic)
        if found is None:
            missing.append(task)
            continue
        fitted, held = found
        if split is not None and held is not None:
            fold(split[0], fitted, expert)
            fold(split[1], held, expert)
            fitted.join(held)
        if config.needs_experts:
            fold(problem, fitted, expert)
        else:
            problem.fold_inputs(fitted, config.task_weights)
        if not all_finite(problem.sum_pull):
            where = visit.name_of(group.first)
            raise NumericalError(f"{where}: the targets of task {task!r} are NaN or Inf; check its expert's weights.")
        if inputs is not problem:
            inputs.fold_inputs(fitted, config.task_weights)
        if place % walk.world.size == walk.world.rank:
            samples[task] = fitted.sampled(expert, config.alpha)
    if problem.weight == 0.0:
        return None
    if missing:
        visit.notes.append(f"{visit.name_of(group.first)}: reached by no calibration input of {', '.join(missing)}.")
    if split is not None:
        split = (split[0].whole(own, rows, walk.world), split[1].whole(own, rows, walk.world))
    return Gathered(problem, inputs, split, samples)


def _of_task(
    visit: Visit, group: InputGroup, task: str, expert: Expert, automatic: bool
) -> tuple[TaskStatistics, TaskStatistics | None] | None:
    """Statistics of all processes' batches of a task, fitted and, for ``automatic``, held out; None where none of them
    reaches the group."""
    walk, where = visit.walk, visit.name_of(group.first)
    outputs, columns = expert.weight.shape
    of_outputs = narrows(visit.block, group)
    targets = None
    if walk.inside and walk.config.alpha > 0:
        targets = outputs if of_outputs else columns
    fitted = TaskStatistics(columns, targets, of_outputs, device=walk.device, exact=True)
    held = TaskStatistics(columns, targets, of_outputs, device=walk.device, exact=True) if automatic else None
    sample = max(1, SAMPLE_ROWS // walk.counts[task])
    sequence = walk.sequence if group.sequence is None else None
    reached = False
    for batch in walk.streams[task]:
        x = visit.input_of(task, batch, group.first)
        if x is None:
            continue
        reached = True
        positions = batch.weights_of(sequence)
        rows, weights, matched = rows_read(visit.block, group.first, x, positions)
        if not matched:
            visit.notes.append(f"{where}: reads no row per position; all its rows count alike.")
        target = None
        if targets is not None:
            names = group.linears if of_outputs else (group.first,)
            target = None if visit.is_expert(group.first) else visit.rows_inside(task, batch, names)
            if target is None or len(target) != len(rows) or visit.is_routed(task, batch, x):
                # Rows inside the expert are others, so its weights are shown those of the deployed model.
                target = rows.float() @ expert.weight.T if of_outputs else rows
                visit.notes.append(ROUTED_NOTE.format(visit.address.name))
            elif of_outputs:
                target = target - expert.bias
            target = walk.runner.precision.read(target)
        if held is None:
            fitted.add(rows, target, weights, sample)
        else:
            fit_weights, held_weights = split_held(rows, weights, x, batch, sequence)
            fitted.add(rows, target, fit_weights, sample)
            held.add(rows, target, held_weights)
    for statistics in (fitted, held):
        if statistics is not None:
            statistics.over(walk.world)
    if fitted.weight + (0.0 if held is None else held.weight) == 0.0 and not any(walk.world.gather(reached)):
        return None
    if held is not None and min(held.weight, fitted.weight) <= 0.0:
        if not any(walk.world.gather(any(bool(batch.held.any()) for batch in walk.streams[task]))):
            raise CalibrationError(
                f'task {task!r}: anchor: "auto" holds out every fifth example, and there is none; give more examples,'
                " or give a number as anchor."
            )
        # Few rows find the way to some parts, as to an expert of a mixture that the model seldom picks.
        visit.notes.append(f"{where}: too few rows of {task} to hold some out; its anchor is chosen without them.")
        fitted.join(held)
        held = None
    fitted.check(task, where)
    return fitted, held


def gather_norm(visit: Visit, name: str) -> NormStatistics | None:
    """What a norm gives as deployed and inside the experts, over all tasks; None where that cannot be compared, as the
    notes then tell."""
    walk, where = visit.walk, visit.name_of(name)
    norm = visit.block.get_submodule(name)
    weight: Tensor = norm.weight  # type: ignore[assignment]
    channels = len(weight)
    if not reads_one_input(norm):
        visit.notes.append(f"{where}: it reads more than what it normalises, such as a gate; not refitted.")
        return None
    moments = NormStatistics(channels, walk.device)
    for task, batches in walk.streams.items():
        own = NormStatistics(channels, walk.device)
        taken = False
        for batch in batches:
            output = visit.output_of(task, batch, name)
            if output is None:
                continue
            if isinstance(norm, CHANNELS_SECOND) or output.shape[-1] != channels:
                visit.notes.append(f"{where}: its channels are not the last dimension; not refitted.")
                return None
            z, weights, _ = rows_of(output, batch.weights_of(walk.sequence))
            y = visit.rows_inside(task, batch, (name,))
            if len(y) != len(z) or visit.is_routed(task, batch, output):
                continue
            taken = True
            z, y = z.float(), y.float()
            own.add(z, y, z.new_ones(len(z)) if weights is None else weights)
        own.over(walk.world)
        if own.weight > 0.0:
            moments.fold(own)
        elif any(walk.world.gather(taken)):
            raise CalibrationError(f"task {task!r} has no calibration rows at {where}: all positions are masked out.")
    if moments.weight == 0.0:
        visit.notes.append(f"{where}: reads rows that the model picks otherwise inside the experts; not refitted.")
        return None
    return moments
