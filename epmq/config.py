"""QuantConfig: the settings of one quantization, and the two presets that the tables name."""

from __future__ import annotations

from collections.abc import Collection
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from epmq import patterns
from epmq.errors import ConfigError
from epmq.quantized import SUPPORTED_BITS
from epmq.settings import Settings, nearest
from epmq.trust import INT32_MAX, INT64_MAX

DAMP_LIMIT = 1.0
ClipSearch = Literal["auto", "none", "mse", "hessian"]
# Of checkpoints, see docs/formats.md.
Format = Literal["compressed-tensors", "gptq", "native"]


class DistillSettings(Settings):
    """Tuning of the last blocks towards the experts' features, between closed form and rounding (docs/method.md).

    It holds the whole model in fp32, and one expert beside it while targets are made; both run in bf16 where that is
    the ``forward_dtype``, in fp32 otherwise. steps, learning_rate: of AdamW.
    examples: per task and step. copies: varied copies of each text (token models only). originals: share of steps on
    unvaried inputs. last_blocks: share of the blocks that is tuned. covariance_share: how far distances follow the
    expert's own feature covariance. cross_weight: weight of similar tasks' experts; least_similarity: cosine from which
    tasks count as similar.
    """

    steps: int = Field(default=280, ge=1, le=INT32_MAX)
    learning_rate: float = Field(default=3e-4, gt=0.0)
    examples: int = Field(default=8, ge=1, le=INT32_MAX)
    copies: int = Field(default=3, ge=0, le=INT32_MAX)
    originals: float = Field(default=0.34, ge=0.0, le=1.0)
    last_blocks: float = Field(default=0.5, gt=0.0, le=1.0)
    covariance_share: float = Field(default=0.8, ge=0.0, le=1.0)
    cross_weight: float = Field(default=0.5, ge=0.0)
    least_similarity: float = Field(default=0.1, ge=-1.0, le=1.0)
    seed: int = Field(default=0, ge=-INT64_MAX, le=INT64_MAX)


def _known_bits(bits: int | None) -> int | None:
    if bits is not None and bits not in SUPPORTED_BITS:
        raise ValueError(f"use one of {', '.join(map(str, SUPPORTED_BITS))}, or null for no rounding")
    return bits


def _known_group(group_size: int) -> int:
    if group_size != -1 and not 1 <= group_size <= INT32_MAX:
        raise ValueError("use a positive number of columns, or -1 for the whole row")
    return group_size


class Override(Settings):
    """Settings of some linears: those of ``bits`` and ``group_size`` that are given replace the general ones."""

    bits: Annotated[int | None, AfterValidator(_known_bits)] = None
    group_size: Annotated[int, AfterValidator(_known_group)] = 128

    @model_validator(mode="after")
    def _says_something(self) -> Override:
        if not self.model_fields_set:
            raise ValueError("give bits or group_size, or leave the pattern out")
        return self

    @model_serializer
    def given(self) -> dict[str, int | None]:
        """The settings that were given."""
        return {name: getattr(self, name) for name in type(self).model_fields if name in self.model_fields_set}


class QuantConfig(Settings):
    """How to quantize. The defaults are the closed form at its best; the preset ``best`` adds distillation.

    method: ``epmq`` targets each expert's outputs (eq. 1 of docs/method.md), ``regmean`` is its case without anchor,
    ``gptq`` keeps the merged weights as target, ``rtn`` rounds them to nearest.
    bits: 2, 3, 4 or 8; None solves for the target and leaves it unquantized.
    group_size: columns that share a scale; -1 is the whole row. The last group may be short.
    sym: symmetric grid (no zero points). act_order: sweep columns by descending Hessian diagonal.
    static_groups: grids are fitted before the sweep, on the target; False fits each when the sweep reaches it.
    clip: search over shrunken ranges: ``mse`` by the sum of |error|^2.4, ``hessian`` by the Hessian's diagonal,
    ``none``; ``auto`` is ``hessian`` below 4 bits, ``none`` from 4 bits on. Where a grid is fitted without a Hessian
    (method rtn, static_groups False), ``hessian`` is ``mse``.
    scale_refit: least-squares refit of the scales after the sweep, codes fixed.
    scale_dtype: stored dtype of the scales; ``auto`` is the merged weight's.
    damp: diagonal added to the Hessian relative to its mean diagonal; it pulls towards the anchor, as lambda does.
    None: 0.01 for plain GPTQ, 0 where the anchor, or gamma while solving, keeps the Hessian positive definite.
    anchor: lambda relative to the mean diagonal of the Hessian, or ``auto``: chosen for each group of linears by the
    error on held-out calibration rows. rho: anchor A = rho * merged + (1 - rho) * base.
    alpha: 0 applies the expert's weights to the deployed model's inputs, 1 to the inputs inside the expert.
    gamma: off-diagonal entries of every task's Hessian are multiplied by it while solving (RegMean's shrinkage).
    task_weights: ``tokens`` weighs a task by 1/n_t, ``hessian_norm`` by 1/||H_t||_F.
    bias_refit: centre the problem and refit biases; None does so for method ``epmq`` unless gamma
    shrinks. norm_refit: refit scale and shift of norm layers.
    distill: settings of a tuning stage after the closed form, or None for the closed form alone.
    forward_dtype: of linears, attention and products while calibration inputs run through the blocks; the statistics
    are those of inputs rounded to it. Weights, norms, residual sums and all solving stay fp32. Distillation runs its
    passes in bfloat16 where that is the choice, else in fp32.
    diagnostics: also round the merged weights with plain GPTQ at each layer, for the report's comparison.
    include / exclude: regular expressions searched in linear names; exclude wins.
    overrides: {regular expression: {bits, group_size}} for the linears in whose names it is found; the first that
    matches counts. bits null solves for the target of these linears and leaves it unrounded, as it does for all.
    """

    method: Literal["epmq", "regmean", "gptq", "rtn"] = "epmq"
    bits: Annotated[int | None, AfterValidator(_known_bits)] = 4
    group_size: Annotated[int, AfterValidator(_known_group)] = 128
    sym: bool = False
    act_order: bool = True
    static_groups: bool = True
    clip: ClipSearch = "auto"
    scale_refit: bool = False
    scale_dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    damp: float | None = Field(default=None, ge=0.0, le=DAMP_LIMIT)
    anchor: float | Literal["auto"] = 0.1
    alpha: float = Field(default=1.0, ge=0.0, le=1.0)
    rho: float = Field(default=1.0, ge=0.0, le=4.0)
    gamma: float = Field(default=1.0, ge=0.0, le=1.0)
    task_weights: Literal["tokens", "hessian_norm"] = "tokens"
    bias_refit: bool | None = None
    norm_refit: bool = False
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    overrides: dict[str, Override] = Field(default_factory=dict)
    distill: DistillSettings | None = None
    forward_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    diagnostics: bool = True

    @field_validator("anchor", mode="wrap")
    @classmethod
    def _known_anchor(cls, given: Any, validate: ValidatorFunctionWrapHandler) -> float | Literal["auto"]:
        try:
            anchor: float | Literal["auto"] = validate(given)
        except ValidationError:
            anchor = -1.0
        if anchor != "auto" and not 0.0 <= anchor < float("inf"):
            raise ValueError('use a number >= 0, or "auto"')
        return anchor

    @field_validator("include", "exclude", "overrides")
    @classmethod
    def _regular_expressions(cls, given: Any) -> Any:
        for pattern in given:
            patterns.check(pattern)
        return given

    @model_validator(mode="after")
    def _consistent(self) -> QuantConfig:
        if self.act_order and not self.static_groups:
            raise ValueError("act_order needs static_groups; set one of them otherwise")
        if self.scale_refit and not self.static_groups:
            raise ValueError("scale_refit needs static_groups; set one of them otherwise")
        if self.norm_refit and self.method != "epmq":
            raise ValueError(f"norm_refit belongs to method epmq, not to {self.method}; leave it out")
        if not self.rounds and self.method in ("gptq", "rtn"):
            raise ValueError(f"bits: null leaves nothing to do for method {self.method}")
        if self.distill is not None and self.method != "epmq":
            raise ValueError(f"distill belongs to method epmq, not to {self.method}")
        if self.bias_refit and self.gamma != 1.0:
            raise ValueError(
                "bias_refit centres the Hessian, which gamma below 1 contradicts; set one of them otherwise"
            )
        return self

    @property
    def rounds(self) -> bool:
        """Whether any linear is rounded."""
        return any(bits is not None for bits in (self.bits, *(o.bits for o in self.overrides.values())))

    @property
    def needs_experts(self) -> bool:
        """Whether the target is made from expert weights."""
        return self.method in ("epmq", "regmean")

    @property
    def clip_search(self) -> Literal["none", "mse", "hessian"]:
        """The clip search to use."""
        if self.clip != "auto":
            return self.clip
        return "hessian" if self.bits is not None and self.bits < 4 else "none"

    @property
    def refits_bias(self) -> bool:
        """Whether biases are refitted where there are some."""
        return self.method == "epmq" and self.gamma == 1.0 if self.bias_refit is None else self.bias_refit

    @property
    def needs_expert_features(self) -> bool:
        """Whether experts' own activations are needed (alpha > 0, or refitted norms)."""
        return self.method == "epmq" and (self.alpha > 0 or self.norm_refit)

    def selects(self, linear: str) -> bool:
        """Whether a linear of this name is to be quantized."""
        if any(patterns.search(pattern, linear) for pattern in self.exclude):
            return False
        return not self.include or any(patterns.search(pattern, linear) for pattern in self.include)

    def override_of(self, linear: str) -> str | None:
        """The pattern whose settings a linear of this name has; None for the general ones."""
        return next((pattern for pattern in self.overrides if patterns.search(pattern, linear)), None)

    def unmatched(self, linears: Collection[str], used: Collection[str | None]) -> list[str]:
        """Notes on patterns that choose nothing. linears: all of the blocks. used: patterns of ``overrides``."""
        notes = [
            f"{key}: {pattern!r} matches no linear of a block; only those of blocks are quantized."
            for key, given in (("include", self.include), ("exclude", self.exclude))
            for pattern in given
            if not any(patterns.search(pattern, linear) for linear in linears)
        ]
        return notes + [
            f"overrides: {pattern!r} is the first match of no quantized linear."
            for pattern in self.overrides
            if pattern not in used
        ]

    def of(self, pattern: str | None) -> QuantConfig:
        """The settings of the linears that a pattern of ``overrides`` matches."""
        return self if pattern is None else self.model_copy(update=self.overrides[pattern].given())


PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"alpha": 0.0, "anchor": 0.1, "bias_refit": False},
    "best": {"distill": {}},
}


def preset(name: str, **changes: Any) -> QuantConfig:
    """A named setting with changes on top: ``preset("paper", bits=3)``."""
    if name not in PRESETS:
        raise ConfigError(f"unknown preset {name!r}; {nearest(name, list(PRESETS))}")
    return QuantConfig(**{**PRESETS[name], **changes})
