"""Merging fine-tuned models: a merged model is just another weight source, computed one tensor at a time.

Methods: task arithmetic (Ilharco et al. 2023), the weighted average (Wortsman et al. 2022) and TIES in three dialects
(:mod:`epmq.ties`). Arithmetic is float32, or float64 where an input is, whatever the stored dtype, unless the setting
dtype asks for another, as packages do that merge bfloat16 models in bfloat16.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property, reduce
from typing import Any, NamedTuple, TypeVar, overload

import torch
from torch import Tensor, nn

from epmq import ties
from epmq.adapters import notes_on, open_model
from epmq.errors import ConfigError, NumericalError, SourceError
from epmq.merge_config import ZERO_WEIGHT, MergeConfig
from epmq.sources import WeightSource, read_finite, require_same_layout, unwrapped

log = logging.getLogger("epmq")
Value = TypeVar("Value")
# Tensors of a size that merging one takes, measured: base, expert, difference, sum and what a step makes of them.
IN_HAND = 6


class GlobalTrim(NamedTuple):
    """What fusion_bench's TIES has to know of the whole model before it can merge one tensor of it."""

    limits: dict[str, Tensor]
    """By expert: the smallest magnitude that is kept, a 0-dim tensor."""
    majority: int
    """Sign of the sum of the elected signs over all entries: -1, 0 or 1."""


class MergedSource:
    """The merge of experts into one weight source; no tensor is computed before it is asked for.

    One tensor is merged at a time, from one expert after the other; TIES holds the differences of all of them. The
    fusion_bench dialect of TIES trims over whole models: its first tensor is preceded by three passes over base and
    experts (five where a tensor is float64), each with one tensor of each model in memory.

    Names and dtypes are those of `base`; without a base (weighted_average only), of the first expert. Tensors that are
    not float are copied if equal in all inputs. In the fusion_bench dialect their entries count in the trim all the
    same, as zeros of the delta. What counts is what the sources list: a tied tensor under two names counts twice.

    Raises ConfigError for settings that do not fit the experts, SourceError for experts whose layout differs.
    """

    def __init__(
        self, base: WeightSource | None, experts: Mapping[str, WeightSource], settings: MergeConfig | None = None
    ):
        self.settings = settings or MergeConfig()
        self.base = base
        self.experts = dict(experts)
        if not self.experts:
            raise ConfigError("merge: there is no expert; give at least one by name.")
        self.settings.check_experts(self.experts)
        # Every method but the average without base_weight reads the base.
        self._inputs = list(self.experts.items())
        if self.settings.method != "weighted_average" or self.settings.base_weight is not None:
            if base is None:
                used = self.settings.method if self.settings.base_weight is None else "base_weight"
                raise ConfigError(f"merge: {used} needs a base; give one, or use weighted_average without base_weight.")
            self._inputs.insert(0, ("base", base))
        self._layout = self._inputs[0][1] if base is None else base
        require_same_layout(self._layout, self.experts)
        self._at = self.settings.over(self.keys())
        self.notes = self.settings.unmatched(self.keys())
        if not self.settings.varies:
            self.settings.weight_of(self.experts)
        methods: dict[tuple[str, str | None], Callable[[str, MergeConfig], Tensor]] = {
            ("task_arithmetic", None): self._task_arithmetic,
            ("weighted_average", None): self._weighted_average,
            ("ties", "mergekit"): self._ties_mergekit,
            ("ties", "peft"): self._ties_peft,
            ("ties", "fusion_bench"): self._ties_fusion_bench,
        }
        self._merge_float = methods[self.settings.method, self.settings.dialect]
        # fusion_bench flattens whole models, and one float64 tensor makes the whole vector float64.
        self._all_wide = self.settings.dialect == "fusion_bench" and any(map(self._has_float64, self.keys()))

    @property
    def name(self) -> str:
        return f"{self.settings.method} of {', '.join(self.experts)} over {self._layout.name}"

    def keys(self) -> list[str]:
        return self._layout.keys()

    def shape(self, key: str) -> tuple[int, ...]:
        return self._layout.shape(key)

    @property
    def tensors_held(self) -> int:
        """How many of a tensor's size are in memory while it is merged: of TIES all experts' differences."""
        return IN_HAND + (len(self.experts) if self.settings.method == "ties" else 0)

    def dtype(self, key: str) -> torch.dtype:
        stored = self._layout.dtype(key)
        if not stored.is_floating_point:
            return stored
        if self.settings.out_dtype is not None:
            return _named(self.settings.out_dtype)
        return stored if self.settings.dtype is None else self._work_dtype(key)

    def tensor(self, key: str, dtype: torch.dtype | None = None) -> Tensor:
        """The merged tensor, cast once to the dtype of the settings or else the base's, or to `dtype` if it is float.

        Raises SourceError for NaN, Inf or contradictions in the inputs, NumericalError if the result leaves the range
        of the dtype, ConfigError if `dtype` is not float.
        """
        merged = self.tensor_uncast(key)
        if not merged.is_floating_point():
            return merged
        target = dtype or self.dtype(key)
        if not target.is_floating_point:
            raise ConfigError(f"merge: {target} cannot hold tensor {key!r}; ask for a float dtype.")
        result = merged.to(target)
        if not bool(torch.isfinite(result).all()):
            raise NumericalError(
                f"merged tensor {key!r} leaves the range of {target}; ask for a wider dtype or merge with less scaling."
            )
        return result

    def tensor_uncast(self, key: str) -> Tensor:
        """The merged tensor before the cast, in the dtype of the arithmetic; a tensor that is not float as it is.

        Raises as :meth:`tensor` does.
        """
        if not self._is_float(key):
            return self._equal_in_all(key)
        merged = self._merge_float(key, self._at(key))
        if not bool(torch.isfinite(merged).all()):
            raise NumericalError(f"merged tensor {key!r} leaves the range of {merged.dtype}; merge with less scaling.")
        return merged

    # -- reading ------------------------------------------------------------------------------------------------------

    def _is_float(self, key: str) -> bool:
        """Whether a tensor is merged (float in all inputs) or copied (float in none)."""
        dtypes = {label: source.dtype(key) for label, source in self._inputs}
        floats = {dtype.is_floating_point for dtype in dtypes.values()}
        if len(floats) > 1:
            seen = ", ".join(f"{label}: {dtype}" for label, dtype in dtypes.items())
            raise SourceError(f"tensor {key!r} is float in some inputs and not in others ({seen}).")
        return floats.pop()

    def _equal_in_all(self, key: str) -> Tensor:
        (first_label, first), *others = self._inputs
        tensor = first.tensor(key)
        for label, source in others:
            other = source.tensor(key).to(tensor.device)
            if other.dtype != tensor.dtype or not torch.equal(tensor, other):
                raise SourceError(
                    f"tensor {key!r} ({tensor.dtype}) differs between {first_label} ({first.name}) and {label}"
                    f" ({source.name}); tensors that are not float are copied, so make them equal."
                )
        # A source in memory hands out its own tensor; what this method returns belongs to the caller.
        return tensor.clone()

    def _read(self, source: WeightSource, key: str, like: Tensor | None = None) -> Tensor:
        """One float tensor in the work dtype, on the device of `like`. May be the source's own: never written to."""
        tensor = read_finite(source, key)
        return tensor.to(self._work_dtype(key)) if like is None else tensor.to(like)

    def _read_base(self, key: str) -> Tensor:
        return self._read(_filled(self.base), key)

    def _deltas(self, key: str, base: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Expert minus base, one expert at a time; the caller may write to what it is given."""
        for label, source in self.experts.items():
            yield label, self._read(source, key, base) - base

    def _trimmed(self, key: str, base: Tensor, trim: Callable[[str, Tensor], Tensor]) -> Tensor:
        """The trimmed deltas of all experts, [T, *shape]."""
        stack = base.new_empty((len(self.experts), *base.shape))
        for row, (label, delta) in enumerate(self._deltas(key, base)):
            stack[row] = trim(label, delta)
        return stack

    def _work_dtype(self, key: str) -> torch.dtype:
        if self.settings.dtype == "stored":
            return reduce(torch.promote_types, [source.dtype(key) for _, source in self._inputs])
        if self.settings.dtype is not None:
            return _named(self.settings.dtype)
        return torch.float64 if self._all_wide or self._has_float64(key) else torch.float32

    def _has_float64(self, key: str) -> bool:
        return any(source.dtype(key) == torch.float64 for _, source in self._inputs)

    # -- methods: one float tensor, in the work dtype -----------------------------------------------------------------

    def _task_arithmetic(self, key: str, settings: MergeConfig) -> Tensor:
        base = self._read_base(key)
        weights = settings.weight_of(self.experts)
        # Half precision is summed in float32, as torch.sum does, and rounded once.
        mixed = torch.zeros_like(base, dtype=_sum_dtype(base.dtype))
        for label, delta in self._deltas(key, base):
            mixed.add_(delta.mul_(base.new_tensor(weights[label])))
        mixed = mixed.to(base.dtype)
        total = base.new_tensor(list(weights.values())).sum()
        # As mergekit: weights that cancel are not divided by.
        if settings.normalize and abs(float(total)) >= ZERO_WEIGHT:
            mixed.div_(total)
        return mixed.mul_(_constant(settings.scaling)).add_(base)

    def _weighted_average(self, key: str, settings: MergeConfig) -> Tensor:
        weights = list(settings.weight_of(self.experts).values())
        if settings.base_weight is not None:
            weights.insert(0, _constant(settings.base_weight))
        first = self._read(self._inputs[0][1], key)
        average = first.to(_sum_dtype(first.dtype)) * weights[0]
        for (_, source), weight in zip(self._inputs[1:], weights[1:], strict=True):
            average.add_(self._read(source, key, first), alpha=weight)
        return (average.div_(sum(weights)) if settings.normalize else average).to(first.dtype)

    def _ties_mergekit(self, key: str, settings: MergeConfig) -> Tensor:
        densities = settings.density_of(self.experts)

        def trim(label: str, delta: Tensor) -> Tensor:
            return ties.trim_mergekit(delta, densities[label], _filled(settings.rescale))

        base = self._read_base(key)
        stack = self._trimmed(key, base, trim)
        weights = list(settings.weight_of(self.experts).values())
        mixed = ties.merge_mergekit(stack, weights, _filled(settings.normalize))
        return mixed.mul_(_constant(settings.scaling)).add_(base)

    def _ties_peft(self, key: str, settings: MergeConfig) -> Tensor:
        densities = settings.density_of(self.experts)
        base = self._read_base(key)
        stack = self._trimmed(key, base, lambda label, delta: ties.trim_peft(delta, densities[label]))
        weights = list(settings.weight_of(self.experts).values())
        return base + ties.merge_peft(stack, weights, _filled(settings.election))

    def _ties_fusion_bench(self, key: str, settings: MergeConfig) -> Tensor:
        whole = self._global_trim
        base = self._read_base(key)
        stack = self._trimmed_globally(key, base, whole.limits)
        mixed = ties.merge_fusion_bench(stack, whole.majority, _filled(settings.merge_func))
        return torch.add(base, mixed, alpha=_constant(settings.scaling))

    # -- what fusion_bench's trim needs of the whole model ------------------------------------------------------------

    def _trimmed_globally(self, key: str, base: Tensor, limits: Mapping[str, Tensor]) -> Tensor:
        return self._trimmed(key, base, lambda label, delta: ties.trim_fusion_bench(delta, limits[label]))

    @cached_property
    def _global_trim(self) -> GlobalTrim:
        limits = self._global_limits()
        majority = 0
        for key in filter(self._is_float, self.keys()):
            stack = self._trimmed_globally(key, self._read_base(key), limits)
            # Counted as integers: a float sum over billions of entries would lose single ones.
            majority += int(ties.elected_sign(stack).to(torch.int8).sum())
        return GlobalTrim(limits, (majority > 0) - (majority < 0))

    def _global_limits(self) -> dict[str, Tensor]:
        entries = sum(math.prod(self.shape(key)) for key in self.keys())
        dtype = torch.float64 if self._all_wide else torch.float32
        searches = {
            label: ties.StreamedMagnitude(ties.kept_rank(entries, density), dtype)
            for label, density in self.settings.density_of(self.experts).items()
        }
        while not all(search.done for search in searches.values()):
            for key in self.keys():
                if not self._is_float(key):
                    # Equal in all inputs, or :meth:`tensor` refuses it: no difference, but as many entries.
                    for search in searches.values():
                        search.count(torch.zeros(self.shape(key)))
                    continue
                for label, delta in self._deltas(key, self._read_base(key)):
                    searches[label].count(delta)
            for search in searches.values():
                search.next_digit()
        return {label: search.value for label, search in searches.items()}


@overload
def merge(base: nn.Module, experts: Mapping[str, Any], method: str = ..., **settings: Any) -> nn.Module: ...
@overload
def merge(base: Any, experts: Mapping[str, Any], method: str = ..., **settings: Any) -> MergedSource: ...
def merge(
    base: Any, experts: Mapping[str, Any], method: str = "task_arithmetic", **settings: Any
) -> nn.Module | MergedSource:
    """Merge experts given as modules, state dicts, checkpoints, LoRA adapters (paths or hub ids), or sources.

    Args:
        base: the model the experts were fine-tuned from; None is enough for a weighted average that leaves it out.
        experts: name -> expert.
        method, settings: see :class:`epmq.merge_config.MergeConfig`.

    Returns:
        For a module as base a new module of the same kind, with the base's dtypes and devices; base and experts stay as
        they are. Heads that the base has not are left out, and a warning names them. Otherwise a
        :class:`MergedSource`, from which nothing is read yet.

    Raises:
        ConfigError: settings that are unknown, out of range or of no use to the method.
        SourceError: experts whose tensors differ in name or shape, or hold NaN or Inf.
        NumericalError: a merged tensor outside the range of its dtype.
    """
    config = MergeConfig.read({"method": method, **settings})
    if not isinstance(experts, Mapping):
        raise ConfigError(f"merge: experts must map a name to each expert, got a {type(experts).__name__}.")
    module = unwrapped(base, "base") if isinstance(base, nn.Module) else None
    base_source = None if base is None else open_model(base, "base")
    sources = {str(label): open_model(e, f"expert {label!r}", base_source, module) for label, e in experts.items()}
    merged = MergedSource(base_source, sources, config)
    for note in [*notes_on(sources), *merged.notes]:
        log.warning(note)
    return merged if module is None else _as_module(module, merged)


def _as_module(base: nn.Module, merged: MergedSource) -> nn.Module:
    module = copy.deepcopy(base)
    key_at: dict[tuple[int, torch.Size], str] = {}
    with torch.no_grad():
        for key, target in module.state_dict().items():
            tensor = merged.tensor(key).to(target.device)
            # Tied parameters are one storage under several names, and the last name written would win silently.
            first = key_at.setdefault((target.data_ptr(), target.shape), key) if target.numel() else key
            if first != key and not torch.equal(target, tensor):
                raise SourceError(
                    f"tensors {first!r} and {key!r} are one tied parameter in the base, but their merged values differ;"
                    f" tie them in every expert, or untie them in the base."
                )
            target.copy_(tensor)
    return module


def _constant(value: object) -> float:
    """A setting of one tensor, in which nothing varies any more."""
    assert isinstance(value, (int, float))
    return value


def _named(dtype: str) -> torch.dtype:
    found: torch.dtype = getattr(torch, dtype)
    return found


def _sum_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _filled(value: Value | None) -> Value:
    """A setting that MergeConfig has filled in for the method, or a base that the method has been given."""
    assert value is not None
    return value
