"""The rows of a results table: one merged model, every method, the same calibration data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from torch import nn

from epmq.api import quantize
from epmq.config import QuantConfig, preset
from epmq.errors import ConfigError

METHODS = ("rtn", "gptq", "regmean", "fp", "fp+gptq", "epmq-paper", "epmq")
# The closed form alone: the default of QuantConfig. Tables of a whole merge leave it out.
CLOSED = "epmq-closed"
REGMEAN_SHRINKAGE = 0.9


class Comparison:
    """Quantizes one merged model in the ways a table compares; what two ways share is computed once.

    regmean: RegMean++ (arXiv 2508.03121, off-diagonals times 0.9) at full precision, then plain GPTQ. fp: eq. (2) at
    full precision; fp+gptq: plain GPTQ of it. epmq-paper and epmq: the presets ``paper`` and ``best``; epmq-closed:
    the default settings, which are ``best`` without distillation.
    """

    def __init__(
        self,
        merged: nn.Module,
        experts: Mapping[str, Any],
        calibration: Mapping[str, Sequence[Mapping[str, Any]]],
        group_size: Mapping[int, int] | int = 128,
        **settings: Any,
    ):
        self.merged, self.experts, self.calibration = merged, experts, calibration
        self.group_size, self.settings = group_size, settings
        self.reports: dict[tuple[str, int | None], dict[str, Any]] = {}

    def model(self, method: str, bits: int | None) -> nn.Module:
        """The model a row is about; bits is None where nothing is rounded (fp, and epmq before its rounding)."""
        if method == "fp":
            return self._closed_form
        if method == "epmq" and bits is None:
            return self._before_rounding
        if bits is None:
            raise ConfigError(f"method {method!r} needs bits.")
        if method in ("rtn", "gptq"):
            return self._quantized(method, self.merged, self._config(bits, method=method))
        if method == "regmean":
            return self._quantized(method, self._regmean, self._config(bits, method="gptq"))
        if method == "fp+gptq":
            return self._quantized(method, self._closed_form, self._config(bits, method="gptq"))
        if method == "epmq-paper":
            return self._quantized(method, self.merged, preset("paper", **self._grid(bits)))
        if method == CLOSED:
            return self._quantized(method, self.merged, self._config(bits))
        if method == "epmq":
            # The preset's two stages: its tuning does not depend on the bits, so one serves them all.
            tuned = self._before_rounding
            config = QuantConfig(**self._grid(bits))
            result = quantize(tuned, dict.fromkeys(self.experts, tuned), self.calibration, config)
            self.reports[method, bits] = result.report
            return result.model
        raise ConfigError(f"unknown method {method!r}; known are {', '.join((*METHODS, CLOSED))}.")

    def _grid(self, bits: int) -> dict[str, Any]:
        size = self.group_size if isinstance(self.group_size, int) else self.group_size[bits]
        return {"bits": bits, "group_size": size, "diagnostics": False, **self.settings}

    def _config(self, bits: int, **more: Any) -> QuantConfig:
        return QuantConfig(**self._grid(bits), **more)

    def _quantized(self, label: str, model: nn.Module, config: QuantConfig) -> nn.Module:
        experts = self.experts if config.needs_experts else None
        result = quantize(model, experts, self.calibration, config)
        self.reports[label, config.bits] = result.report
        return result.model

    @cached_property
    def _regmean(self) -> nn.Module:
        config = QuantConfig(method="regmean", bits=None, gamma=REGMEAN_SHRINKAGE, alpha=0.0, diagnostics=False)
        return self._quantized("regmean", self.merged, config)

    @cached_property
    def _closed_form(self) -> nn.Module:
        return self._quantized("fp", self.merged, QuantConfig(bits=None, diagnostics=False))

    @cached_property
    def _before_rounding(self) -> nn.Module:
        return self._quantized("epmq", self.merged, preset("best", bits=None, diagnostics=False))
