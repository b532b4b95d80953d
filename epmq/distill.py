"""Label-free distillation: tunes the last blocks of a merged model so that its features follow every expert's.

The closed form sets each layer by its own least squares; what is left is the way errors add up through the network.
Here the model's pooled features are pulled towards the expert's on (varied) calibration inputs. Distances are taken in
the directions in which the expert's own features vary. Tasks whose inputs look alike are also shown to each other's
experts, because one model must give either expert's answer on either kind of input.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from epmq import trust
from epmq.augment import augmented, can_augment, token_pool
from epmq.config import DistillSettings
from epmq.errors import CalibrationError, ConfigError, NumericalError
from epmq.features import pooled
from epmq.precision import AS_IT_IS, Precision
from epmq.shelf import altered, read_value
from epmq.sources import all_finite
from epmq.streams import Batch, take
from epmq.tuning_state import fits, keep, take_up
from epmq.world import World

OpenExpert = Callable[[str], nn.Module]
KEEP_STEPS = 20


@dataclass
class _Example:
    """A batch, the features its own expert gives ``[B, D]``, and those of the experts of similar tasks."""

    batch: Batch
    feature: Tensor
    varied: bool
    crossed: dict[str, Tensor] = field(default_factory=dict)


def distill(
    model: nn.Module,
    trained: list[nn.Module],
    open_expert: OpenExpert,
    streams: Mapping[str, list[Batch]],
    settings: DistillSettings,
    progress: Callable[[str, int, int], None],
    world: World | None = None,
    kept_in: Path | None = None,
    frozen: Collection[nn.Module] = (),
    precision: Precision = AS_IT_IS,
) -> dict[str, Any]:
    """Tune the modules ``trained`` of ``model`` (fp32), in place; returns losses and pairs for the report.

    open_expert: gives a task's expert as a module; one is open at a time. streams: calibration batches per task.
    world: processes that share the tasks of every step; their gradients are added up. kept_in: a file for the state
    after every 20 steps, from which a later call goes on. frozen: modules within ``trained`` that stay as they are.
    precision: of all forward passes; features, distances, gradients and weights are fp32 in any.
    """
    world = world or World()
    parameters = _trainable(model, trained, frozen)
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, betas=(0.9, 0.98), weight_decay=0.0)
    generator = torch.Generator().manual_seed(settings.seed)
    kept = read_value(kept_in) if kept_in is not None and trust.exists(kept_in) else None
    if kept_in is not None and kept is not None and not fits(kept, parameters, settings.steps):
        raise altered(kept_in, "it is of another distillation")
    losses: list[float] = []
    pairs: dict[str, list[str]] = {}
    start = 0
    if kept is not None and kept["step"] == settings.steps:
        losses, pairs, start = take_up(kept, parameters, optimizer, generator)
    else:
        pairs = similar_tasks(model, streams, settings, precision)
        padding = getattr(getattr(model, "config", None), "pad_token_id", None)
        examples = _examples(open_expert, streams, pairs, settings, generator, progress, world, padding, precision)
        metrics = {task: _metrics(task, [e.feature for e in found], settings) for task, found in examples.items()}
        if kept is not None:
            losses, pairs, start = take_up(kept, parameters, optimizer, generator)
    for step in range(start, settings.steps):
        warm = min(1.0, (step + 1) / max(1.0, 0.1 * settings.steps))
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * warm * (1.0 - step / settings.steps)
        optimizer.zero_grad(set_to_none=True)
        total = 0.0
        for place, (task, batches) in enumerate(examples.items()):
            # Drawn by every process, so that all draw alike.
            example = _pick(batches, settings, generator)
            if place % world.size != world.rank:
                continue
            feature = pooled(model, example.batch, precision)
            loss = _distance(feature - example.feature, metrics[task][0])
            for other, wanted in example.crossed.items():
                loss = loss + settings.cross_weight * _distance(feature - wanted, metrics[other][1])
            loss = loss / len(examples)
            loss.backward()
            total += float(loss.detach())
        losses.append(_over_processes(parameters, total, world))
        optimizer.step()
        if kept_in is not None and world.main and ((step + 1) % KEEP_STEPS == 0 or step + 1 == settings.steps):
            keep(kept_in, step + 1, parameters, optimizer, generator, losses, pairs)
        progress("distilling", step + 1, settings.steps)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for parameter in parameters:
        world.spread(parameter)
    tenth = max(1, len(losses) // 10)
    return {
        "steps": settings.steps,
        "first_loss": sum(losses[:tenth]) / tenth,
        "last_loss": sum(losses[-tenth:]) / tenth,
        "pairs": sorted([first, second] for first, others in pairs.items() for second in others),
    }


def _over_processes(parameters: list[nn.Parameter], loss: float, world: World) -> float:
    """Add up the gradients of all processes in place; returns the sum of their losses."""
    if world.size == 1:
        return loss
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    total = torch.tensor([loss], dtype=torch.float64)
    world.add_up([*(parameter.grad for parameter in parameters if parameter.grad is not None), total])
    return float(total)


@torch.no_grad()
def similar_tasks(
    model: nn.Module, streams: Mapping[str, list[Batch]], settings: DistillSettings, precision: Precision = AS_IT_IS
) -> dict[str, list[str]]:
    """For each task the tasks whose inputs look most like its own: nearest by the cosine of centred mean features."""
    tasks = list(streams)
    if settings.cross_weight == 0.0 or len(tasks) < 2:
        return {task: [] for task in tasks}
    means = []
    for task in tasks:
        features = torch.cat(
            [pooled(model, batch, precision) for batch in streams[task][:: max(1, len(streams[task]) // 4)]]
        )
        means.append(features.mean(0))
    centred = torch.stack(means) - torch.stack(means).mean(0)
    cosine = torch.nn.functional.normalize(centred, dim=1)
    similarity = cosine @ cosine.T
    similarity.fill_diagonal_(-1.0)
    nearest = similarity.argmax(1).tolist()
    pairs: dict[str, list[str]] = {task: [] for task in tasks}
    for first, second in enumerate(nearest):
        if float(similarity[first, second]) > settings.least_similarity:
            for a, b in ((first, second), (second, first)):
                if tasks[b] not in pairs[tasks[a]]:
                    pairs[tasks[a]].append(tasks[b])
    return pairs


@torch.no_grad()
def _examples(
    open_expert: OpenExpert,
    streams: Mapping[str, list[Batch]],
    pairs: Mapping[str, list[str]],
    settings: DistillSettings,
    generator: torch.Generator,
    progress: Callable[[str, int, int], None],
    world: World,
    padding: int | None,
    precision: Precision,
) -> dict[str, list[_Example]]:
    """Originals and varied copies of every task's batches, with what the experts make of them.

    Each expert is run by one process, and what it makes of them is then known to all.
    """
    copies = settings.copies if all(can_augment(b) for batches in streams.values() for b in batches) else 0
    everyone = (
        torch.cat([token_pool(batches) for batches in streams.values()])
        if copies
        else torch.empty(0, dtype=torch.int64)
    )
    variants: dict[str, list[tuple[Batch, bool]]] = {}
    for task, batches in streams.items():
        variants[task] = [(batch, False) for batch in batches]
        own = token_pool(batches) if copies else everyone
        for _ in range(copies):
            variants[task] += [(augmented(batch, own, everyone, generator, padding), True) for batch in batches]
    shown = {expert: [expert, *(other for other in streams if expert in pairs[other])] for expert in streams}
    found: dict[str, list[Tensor]] = {}
    for number, expert in enumerate(streams):
        if number % world.size == world.rank:
            progress(f"targets of {expert}", number, len(streams))
            module = open_expert(expert)
            found[expert] = [pooled(module, batch, precision) for task in shown[expert] for batch, _ in variants[task]]
    width = max(world.gather(max((features[0].shape[1] for features in found.values()), default=0)))
    device = next(iter(streams.values()))[0].held.device
    for expert in streams:
        sizes = [len(batch.held) for task in shown[expert] for batch, _ in variants[task]]
        own = torch.cat(found[expert]) if expert in found else torch.empty(0, width, dtype=torch.float32, device=device)
        found[expert] = list(world.concat(own).split(sizes))
    examples = {
        task: [_Example(batch, feature, varied) for (batch, varied), feature in zip(variants[task], found[task])]  # noqa: B905
        for task in streams
    }
    for expert, tasks in shown.items():
        features = iter(found[expert])
        for task in tasks:
            for example in examples[task]:
                feature = next(features)
                if task != expert:
                    example.crossed[expert] = feature
    return examples


def _metrics(task: str, features: list[Tensor], settings: DistillSettings) -> tuple[Tensor, Tensor]:
    """Two metrics ``[D, D]`` from the covariance S of an expert's features, both 1 for a typical deviation: one that
    keeps a share of all directions, and S / ‖S‖²_F alone, for inputs of other tasks."""
    rows = torch.cat(features)
    if not all_finite(rows):
        raise NumericalError(f"the features of expert {task!r} are NaN or Inf on its calibration inputs.")
    if bool((rows == rows[0]).all()):
        raise CalibrationError(
            f"task {task!r}: its expert has the same features for all of its calibration examples, and distillation"
            " goes by how they vary; give examples that differ, or leave distill out."
        )
    size = rows.shape[1]
    covariance = torch.cov(rows.T).view(size, size)
    own = covariance / covariance.square().sum().clamp_min(1e-30)
    even = torch.eye(size, dtype=rows.dtype, device=rows.device) / covariance.trace().clamp_min(1e-30)
    share = settings.covariance_share
    return (1.0 - share) * even + share * own, own


def _distance(difference: Tensor, metric: Tensor) -> Tensor:
    return ((difference @ metric) * difference).sum(-1).mean()


def _pick(examples: list[_Example], settings: DistillSettings, generator: torch.Generator) -> _Example:
    """A few rows of a random batch (batches hold texts of similar length, so little of them is padding)."""
    varied = float(torch.rand((), generator=generator, dtype=torch.float32)) >= settings.originals
    pool = [example for example in examples if example.varied == varied] or examples
    chosen = pool[int(torch.randint(len(pool), (), generator=generator))]
    if not _is_one_per_example(chosen.batch):
        return chosen
    # Drawn on the CPU, so that a seed means the same on every device.
    rows = torch.randperm(len(chosen.feature), generator=generator)[: settings.examples].to(chosen.feature.device)
    return _Example(
        take(chosen.batch, rows),
        chosen.feature[rows],
        chosen.varied,
        {task: feature[rows] for task, feature in chosen.crossed.items()},
    )


def _is_one_per_example(batch: Batch) -> bool:
    """Whether every input has a first dimension of examples, or is one for all of them. The patches of all images in a
    row, say, cannot be told apart by example."""
    tensors = [value for value in batch.inputs.values() if isinstance(value, Tensor) and value.dim() > 0]
    return all(tensor.shape[0] in (1, len(batch.held)) for tensor in tensors)


def _trainable(model: nn.Module, trained: list[nn.Module], frozen: Collection[nn.Module]) -> list[nn.Parameter]:
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    kept = {id(parameter) for module in frozen for parameter in module.parameters()}
    found = {id(parameter): parameter for module in trained for parameter in module.parameters()}
    parameters = [parameter for key, parameter in found.items() if key not in kept]
    if not parameters:
        raise ConfigError("include and exclude leave distillation nothing to tune; change them, or leave distill out.")
    for parameter in parameters:
        parameter.requires_grad_(True)
    return parameters
