"""One group of linears that read the same input: from folded statistics to quantized weights and biases."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from epmq.config import QuantConfig
from epmq.errors import NumericalError
from epmq.quantized import QuantizedTensor
from epmq.solve import Factor, choose_anchor, factorize, is_coarse, solve_right
from epmq.sources import all_finite
from epmq.statistics import Expert, Folded
from epmq.sweep import column_order, columns_in_order, quantize_to_nearest, quantize_weight
from epmq.world import World

PLAIN_GPTQ_DAMP = 0.01
COARSE_NOTE = (
    "targets of wide linears were made with products of 16 significant bits, on a CPU's matrix tiles (EPMQ_CPU=avx512"
    " takes 24) or a GPU's tensor cores (EPMQ_BACKEND=reference takes 24)."
)


@dataclass
class GroupOutcome:
    """What a group of linears becomes, rows stacked as they came in.

    weight: fp32 ``[N, K]`` as deployed (dequantized, or the unrounded target when bits is None). quantized: its codes,
    or None. bias: ``[N]``. anchor: relative lambda used. damp: relative damping used in the end. escalated: whether
    that is more than was asked for. coarse: whether the target was made with products of 16 significant bits.
    """

    weight: Tensor
    quantized: QuantizedTensor | None
    bias: Tensor
    anchor: float
    damp: float
    escalated: bool = False
    coarse: bool = False

    def check(self, where: str) -> None:
        """Raise NumericalError where it is not finite."""
        if not (all_finite(self.weight) and all_finite(self.bias)):
            raise NumericalError(f"{where}: the quantized weights are not finite.")

    def whole(self, own: slice, rows: int, world: World) -> GroupOutcome:
        """All ``rows`` of a group, when this is a process's share ``own`` of them."""
        if own == slice(0, rows):
            return self
        if self.quantized is None:
            weight, quantized = world.concat(self.weight), None
        else:
            q = self.quantized
            zeros = None if q.zeros is None else world.concat(q.zeros)
            quantized = QuantizedTensor(world.concat(q.codes), world.concat(q.scales), zeros, q.bits, q.group_size)
            weight = quantized.dequantize()
        return replace(self, weight=weight, quantized=quantized, bias=world.concat(self.bias))


def default_damp(config: QuantConfig, anchor: float, shrunken: bool) -> float:
    """The setting, or 0.01 where neither an anchor nor RegMean's shrinkage keeps the Hessian away from singular."""
    if config.damp is not None:
        return config.damp
    return PLAIN_GPTQ_DAMP if anchor < PLAIN_GPTQ_DAMP and not shrunken else 0.0


def anchor_strength(config: QuantConfig, split: tuple[Folded, Folded] | None, refit_bias: bool) -> float:
    """Relative lambda: the setting, or for ``auto`` the choice made on ``split``, fitted and held-out statistics; the
    default where no row was held out."""
    if split is None:
        return float(config.anchor) if config.method == "epmq" else 0.0
    if split[1].weight == 0.0:
        return float(QuantConfig.model_fields["anchor"].default)
    fit, held = (part.centred() if refit_bias else part for part in split)
    return choose_anchor(fit, held)


def quantize_group(
    problem: Folded,
    inputs: Folded,
    anchor: Expert,
    strength: float,
    config: QuantConfig,
    refit_bias: bool,
    stored: torch.dtype,
    where: str,
) -> GroupOutcome:
    """Solve eq. (2) around the anchor, round it, refit the bias.

    problem: folded statistics that define the target. inputs: those that define the rounding's Hessian; the same
    object unless gamma shrinks the former. strength: relative lambda. ``where`` names the group in messages.
    """
    if config.method == "rtn":
        if config.bits is None:
            return GroupOutcome(anchor.weight, None, anchor.bias, 0.0, 0.0)
        nearest = quantize_to_nearest(anchor.weight, config, stored)
        return GroupOutcome(nearest.dequantize(), nearest, anchor.bias, 0.0, 0.0)
    # What gamma shrinks is the problem that defines a target, never the inputs that are rounded on.
    damp = default_damp(config, strength, config.needs_experts and config.gamma != 1.0)
    if refit_bias:
        same = inputs is problem
        problem = problem.centred()
        inputs = problem if same else inputs.centred()
    order = column_order(inputs.hessian, config.act_order)
    factor = _ordered_factor(problem.hessian, order, strength, damp, where)
    target = anchor.weight
    if config.needs_experts:
        step = solve_right(columns_in_order(problem.pull, order), factor)
        target = columns_in_order(step, torch.argsort(order)).add_(anchor.weight)
    used, escalated = factor.damp, factor.damp > damp
    quantized: QuantizedTensor | None = None
    weight = target
    if config.bits is not None:
        if inputs is not problem:
            damp = default_damp(config, strength, False)
            factor = _ordered_factor(inputs.hessian, order, strength, damp, where)
            used, escalated = max(used, factor.damp), escalated or factor.damp > damp
        hessian = inputs.hessian
        if config.scale_refit or config.clip_search == "hessian":  # nothing else looks at it
            hessian = _damped(hessian, strength, factor.damp)
        quantized = quantize_weight(target, hessian, factor, order, config, stored)
        weight = quantized.dequantize()
    bias = problem.bias(anchor, weight) if refit_bias else anchor.bias
    coarse = config.needs_experts and is_coarse(problem.pull, problem.hessian)
    return GroupOutcome(weight, quantized, bias, strength, used, escalated, coarse)


def _ordered_factor(hessian: Tensor, order: Tensor, strength: float, damp: float, where: str) -> Factor:
    return factorize(columns_in_order(hessian.index_select(0, order), order), strength, damp, where)


def _damped(hessian: Tensor, strength: float, damp: float) -> Tensor:
    """H + (λ + δ) I in checkpoint column order, as the factor has it."""
    damped = hessian.clone()
    damped.diagonal().add_((strength + damp) * hessian.diagonal().mean())
    return damped
