"""Label-free distillation: tunes the last blocks of a merged model so that its features follow every expert's.

The closed form sets each layer by its own least squares; what is left is the way errors add up through the network.
Here the model's pooled features are pulled towards the expert's on (varied) calibration inputs. Distances are taken in
the directions in which the expert's own features vary. Tasks whose inputs look alike are also shown to each other's
experts, because one model must give either expert's answer on either kind of input.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from epmq import trust
from epmq.augment import augmented, can_augment, token_pool
from epmq.blocks import find_blocks
from epmq.config import DistillSettings
from epmq.errors import CalibrationError, ConfigError, ModelError, NumericalError
from epmq.precision import AS_IT_IS, Precision
from epmq.shelf import altered, read_value, write_value
from epmq.sources import all_finite
from epmq.streams import DECODER_SEQUENCES, TEXT_SEQUENCES, Batch
from epmq.texts import is_encoder_decoder
from epmq.world import World

OpenExpert = Callable[[str], nn.Module]
KEEP_STEPS = 20


class _HeadReached(Exception):
    """Carries what the output embeddings read out of the model's forward."""

    def __init__(self, hidden: Tensor):
        super().__init__()
        self.hidden = hidden


@dataclass
class _Example:
    """A batch, the features its own expert gives ``[B, D]``, and those of the experts of similar tasks."""

    batch: Batch
    feature: Tensor
    varied: bool
    crossed: dict[str, Tensor] = field(default_factory=dict)


def pooled(model: nn.Module, batch: Batch, precision: Precision = AS_IT_IS) -> Tensor:
    """Features ``[B, D]`` of a batch, fp32: the model's first output, for a language model what its output embeddings
    read, for one that compares images and texts the features of both, for one that scores positions (answers to
    questions) what its last block gives; averaged over unmasked positions when it has them."""
    with nullcontext() if precision.dtype is None else precision.active():
        hidden = _last_hidden(model, batch).float()
        if hidden.dim() == 2 and _scores_positions(model, batch, hidden):
            hidden = _of_last_block(model, batch).float()
    count = len(batch.held)
    if len(hidden) != count and hidden.dim() == 3 and hidden.shape[1] == count:
        hidden = hidden.transpose(0, 1)  # time first
    if len(hidden) != count:
        raise ModelError(
            f"{type(model).__name__}: it gives {len(hidden)} features for a batch of {count} examples, and distillation"
            " compares those of each example; leave distill out."
        )
    if hidden.dim() < 3:
        return hidden.reshape(len(hidden), -1)
    weights = batch.output_weights(is_encoder_decoder(model))
    if weights is None or weights.shape != hidden.shape[:2]:
        return hidden.flatten(1, -2).mean(1)
    return (hidden * weights.unsqueeze(-1)).sum(1) / weights.sum(1, keepdim=True).clamp_min(1e-6)


def _last_hidden(model: nn.Module, batch: Batch) -> Tensor:
    find_head = getattr(model, "get_output_embeddings", None)
    head = find_head() if callable(find_head) else None
    if not isinstance(head, nn.Module):
        output = model(**batch.inputs)
        if isinstance(output, Mapping) and {"image_embeds", "text_embeds"} <= set(output):
            return torch.cat([output["image_embeds"], output["text_embeds"]], -1)
        return _first_features(model, output)
    handle = head.register_forward_pre_hook(_reach_head, with_kwargs=True)
    try:
        return _first_features(model, model(**batch.inputs))
    except _HeadReached as reached:
        return reached.hidden
    finally:
        handle.remove()


def _reach_head(head: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    # What a vocabulary of logits would take is not spent.
    raise _HeadReached(args[0] if args else next(iter(kwargs.values())))


def _first_features(model: nn.Module, output: Any) -> Tensor:
    """The first tensor of an output that can be features of examples; a loss in front of them is none."""
    if isinstance(output, Mapping):
        output = tuple(output.values())
    for value in output if isinstance(output, (tuple, list)) else (output,):
        if isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 0:
            return value
    raise ModelError(
        f"{type(model).__name__}: its output holds no tensor of features, which distillation compares; return one, or"
        " leave distill out."
    )


def _scores_positions(model: nn.Module, batch: Batch, output: Tensor) -> bool:
    """Whether an output ``[B, S]`` has one number per position, as shorter inputs show; else it is ``[B, D]``."""
    width = output.shape[1]
    texts = [
        value.shape[:2]
        for key, value in batch.inputs.items()
        if isinstance(value, Tensor)
        and key in (*DECODER_SEQUENCES, *TEXT_SEQUENCES)
        and value.dim() == (3 if key.endswith("embeds") else 2)
    ]
    if width < 2 or output.shape not in texts:
        return False
    shorter = {
        key: value[:, :-1].contiguous() if _stands_by_position(key, value) and value.shape[1] == width else value
        for key, value in batch.inputs.items()
    }
    with torch.no_grad():
        return _last_hidden(model, Batch(shorter, None, batch.held)).shape[1] == width - 1


def _of_last_block(model: nn.Module, batch: Batch) -> Tensor:
    """The hidden states ``[B, S, K]`` that leave the block which the forward calls last."""
    seen: list[Tensor] = []

    def see(module: nn.Module, args: Any, output: Any) -> None:
        seen[:] = [_first_features(module, output)]

    handles = [model.get_submodule(address.name).register_forward_hook(see) for address in find_blocks(model)]
    try:
        model(**batch.inputs)
    finally:
        for handle in handles:
            handle.remove()
    return seen[0]


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
    if kept_in is not None and kept is not None and not _fits(kept, parameters, settings.steps):
        raise altered(kept_in, "it is of another distillation")
    losses: list[float] = []
    pairs: dict[str, list[str]] = {}
    start = 0
    if kept is not None and kept["step"] == settings.steps:
        losses, pairs, start = _take_up(kept, parameters, optimizer, generator)
    else:
        pairs = similar_tasks(model, streams, settings, precision)
        padding = getattr(getattr(model, "config", None), "pad_token_id", None)
        examples = _examples(open_expert, streams, pairs, settings, generator, progress, world, padding, precision)
        metrics = {task: _metrics(task, [e.feature for e in found], settings) for task, found in examples.items()}
        if kept is not None:
            losses, pairs, start = _take_up(kept, parameters, optimizer, generator)
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
            _keep(kept_in, step + 1, parameters, optimizer, generator, losses, pairs)
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


def _keep(
    path: Path,
    step: int,
    parameters: list[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    generator: torch.Generator,
    losses: list[float],
    pairs: dict[str, list[str]],
) -> None:
    moments = [dict(optimizer.state.get(parameter, {})) for parameter in parameters]
    state = {"parameters": list(parameters), "moments": moments, "generator": generator.get_state()}
    write_value(path, {**state, "step": step, "losses": losses, "pairs": pairs})


def _fits(kept: Any, parameters: list[nn.Parameter], steps: int) -> bool:
    """Whether a value from a file can be the state of this distillation, as :func:`_keep` wrote it."""
    if not isinstance(kept, dict) or not trust.is_whole(kept.get("step"), 1, steps):
        return False
    values, moments, losses = (kept.get(name, ()) for name in ("parameters", "moments", "losses"))
    pairs = kept.get("pairs")
    if not all(isinstance(part, list) for part in (values, moments, losses)) or not isinstance(pairs, dict):
        return False
    if not len(values) == len(moments) == len(parameters) or len(losses) != kept["step"]:
        return False
    if not all(isinstance(loss, float) for loss in losses):
        return False
    if not all(isinstance(names, list) and all(isinstance(name, str) for name in names) for names in pairs.values()):
        return False
    try:
        torch.Generator().set_state(kept["generator"])
    except (KeyError, TypeError, RuntimeError):
        return False
    every = zip(parameters, values, moments, strict=True)
    return all(_is_like(value, parameter) and _are_moments(its, parameter) for parameter, value, its in every)


def _are_moments(kept: Any, parameter: nn.Parameter) -> bool:
    """Whether a value can be AdamW's state of a parameter; it is empty for one that never had a gradient."""
    if not isinstance(kept, dict) or not kept:
        return kept == {}
    step = kept.get("step")
    counted = isinstance(step, Tensor) and step.dim() == 0 and step.is_floating_point()
    return counted and all(_is_like(kept.get(name), parameter) for name in ("exp_avg", "exp_avg_sq")) and len(kept) == 3


def _is_like(value: Any, parameter: nn.Parameter) -> bool:
    return isinstance(value, Tensor) and value.shape == parameter.shape and value.dtype == parameter.dtype


@torch.no_grad()
def _take_up(
    kept: Mapping[str, Any],
    parameters: list[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    generator: torch.Generator,
) -> tuple[list[float], dict[str, list[str]], int]:
    for parameter, value in zip(parameters, kept["parameters"], strict=True):
        parameter.copy_(value)
    for parameter, moments in zip(parameters, kept["moments"], strict=True):
        if moments:
            # Adam's count of steps stays on the CPU.
            kept_there = {name: value.to(parameter.device) for name, value in moments.items() if name != "step"}
            optimizer.state[parameter] = {**moments, **kept_there}
    generator.set_state(kept["generator"])
    return kept["losses"], kept["pairs"], kept["step"]


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


def take(batch: Batch, rows: Tensor) -> Batch:
    """Some examples of a batch, with trailing columns that are all padding cut off."""
    count = len(batch.held)
    inputs = {
        key: value[rows] if isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == count else value
        for key, value in batch.inputs.items()
    }
    weights = batch.position_weights
    if weights is not None:
        weights = weights.unflatten(0, (count, -1))[rows].flatten(0, 1)
    mask = inputs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 2:
        width = mask.shape[1]
        used = max([1, *(mask.sum(0).nonzero().flatten() + 1).tolist()])
        for key, value in inputs.items():
            of_text = key not in DECODER_SEQUENCES and key != "decoder_attention_mask"
            if of_text and _stands_by_position(key, value) and value.shape[1] == width:
                inputs[key] = value[:, :used]
        weights = None if weights is None else weights[:, :used]
    decoder = None if batch.decoder_weights is None else batch.decoder_weights[rows]
    return Batch(inputs, weights, batch.held[rows], decoder)


def _stands_by_position(key: str, value: Any) -> bool:
    """Whether an input may have positions of a text as its second dimension. Images have channels there."""
    if not isinstance(value, Tensor) or value.dim() < 2:
        return False
    return value.dim() == 2 or key in TEXT_SEQUENCES or not value.is_floating_point()


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
