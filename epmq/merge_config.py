"""Settings of a merge: validated here, so that the rooms below take them as they are."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, Literal

from pydantic import ConfigDict, model_validator

from epmq.errors import ConfigError
from epmq.schedules import Choice, Schedule, layer_places, numbers_in, value_at
from epmq.settings import Settings, nearest

METHODS = ("task_arithmetic", "weighted_average", "ties")
DIALECTS = ("mergekit", "peft", "fusion_bench")
# Weights whose sum is smaller than this cancel; mergekit draws the line there.
ZERO_WEIGHT = 1e-8

# Settings that may vary over the model.
VARYING = ("weights", "base_weight", "scaling", "density")

# What each method, and each dialect of ties, takes beside `method` and `dialect`, with its default. The defaults of a
# dialect are those of its package (mergekit 0.1.5, fusion_bench 0.2.33 as its shipped recipe sets them); REQUIRED
# where the package has none.
REQUIRED = object()
STORAGE = {"dtype": None, "out_dtype": None}
TAKES: dict[tuple[str, str | None], dict[str, Any]] = {
    ("task_arithmetic", None): {"weights": None, "scaling": 0.3, "normalize": False, **STORAGE},
    ("weighted_average", None): {"weights": None, "base_weight": None, "normalize": True, **STORAGE},
    ("ties", "mergekit"): {
        "weights": None,
        "density": 1.0,
        "scaling": 1.0,
        "normalize": True,
        "rescale": False,
        **STORAGE,
    },
    ("ties", "peft"): {"weights": None, "density": REQUIRED, "election": "total", **STORAGE},
    ("ties", "fusion_bench"): {"density": 20.0, "scaling": 0.3, "merge_func": "sum"},
}


class MergeConfig(Settings):
    """How experts are merged. Frozen; only the settings that the method (and dialect) uses may be given.

    ==============  =====================================================================  =========================
    setting         meaning                                                                used by
    ==============  =====================================================================  =========================
    method          task_arithmetic (default), weighted_average or ties                    all
    dialect         mergekit, peft or fusion_bench; ties has no default, they differ       ties
    weights         expert name -> weight; 1 each when not given                           all but fusion_bench
    base_weight     weight of the base as one more input; not an input when not given      weighted_average
    scaling         factor on the merged delta (mergekit calls it lambda)                  task_arithmetic, mergekit,
                                                                                           fusion_bench
    normalize       divide by the sum of the weights that took part                        task_arithmetic, mergekit,
                                                                                           weighted_average
    density         share of the entries of a delta that is kept: a fraction, or by        ties
                    expert name (mergekit only); fusion_bench: above 1 it is percent
    rescale         restore each delta's L1 norm after the trim                            mergekit
    election        total (sign of the summed deltas) or frequency (of the summed signs)   peft
    merge_func      sum, mean or max of the entries that agree with the elected sign       fusion_bench
    dtype           of the arithmetic and of the result: float32, float16, bfloat16,       all but fusion_bench
                    float64, or stored (what the inputs promote to, as mergekit does);
                    not given: float32 arithmetic, the base's dtypes
    out_dtype       of the result alone                                                    all but fusion_bench
    ==============  =====================================================================  =========================

    weights, base_weight, scaling and density may vary over the model (:mod:`epmq.schedules`; not in the fusion_bench
    dialect); :meth:`at` gives the settings of one tensor.

    Raises ConfigError: one sentence that names the setting at fault and what to do.
    """

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    method: Literal["task_arithmetic", "weighted_average", "ties"] = "task_arithmetic"
    dialect: Literal["mergekit", "peft", "fusion_bench"] | None = None
    weights: dict[str, Schedule] | None = None
    base_weight: Schedule | None = None
    scaling: Schedule | None = None
    normalize: bool | None = None
    density: dict[str, Schedule] | Schedule | None = None
    rescale: bool | None = None
    election: Literal["total", "frequency"] | None = None
    merge_func: Literal["sum", "mean", "max"] | None = None
    dtype: Literal["stored", "float32", "float16", "bfloat16", "float64"] | None = None
    out_dtype: Literal["float32", "float16", "bfloat16", "float64"] | None = None

    @model_validator(mode="before")
    @classmethod
    def _fit_and_fill(cls, given: Any) -> Any:
        """Refuse what the method does not use, then write its defaults in, so that a report shows what was used."""
        if not isinstance(given, Mapping):
            return given
        given = {key: value for key, value in given.items() if value is not None}
        for key in given:
            if key not in cls.model_fields:
                raise ValueError(f"there is no merge setting {key!r}; {nearest(key, list(cls.model_fields))}")
        method, dialect = given.get("method", "task_arithmetic"), given.get("dialect")
        _one_of("method", method, METHODS)
        if method == "ties" and dialect is None:
            raise ValueError(f"ties needs a dialect, because they differ: set dialect to {_listed(DIALECTS)}.")
        if method == "ties":
            _one_of("dialect", dialect, DIALECTS)
        elif dialect is not None:
            raise ValueError(f"dialect belongs to method ties; remove it or set method to ties (method is {method}).")
        takes = TAKES[method, dialect]
        what = f"{method} in the {dialect} dialect" if dialect else method
        for key in given:
            if key not in takes and key not in ("method", "dialect"):
                raise ValueError(f"{key} has no meaning for {what}, which takes {_listed(takes)}; remove it.")
        for key, default in takes.items():
            if default is REQUIRED and key not in given:
                raise ValueError(f"{what} has no default {key}; set it.")
        return {key: value for key, value in takes.items() if value is not None} | given

    @model_validator(mode="after")
    def _check_ranges(self) -> MergeConfig:
        if self.weights is not None and not self.weights:
            raise ValueError("weights is empty; name every expert in it, or leave it out for 1 each.")
        if isinstance(self.density, dict) and self.dialect != "mergekit":
            raise ValueError(f"density by expert name exists only in the mergekit dialect, not in {self.dialect}.")
        for schedule in self._schedules("density"):
            for density in numbers_in(schedule):
                self._check_density(density)
        if self.dialect == "fusion_bench" and self.varies:
            raise ValueError("the fusion_bench dialect trims whole models; its density and scaling cannot vary in one.")
        return self

    def _check_density(self, density: float) -> None:
        if self.dialect == "fusion_bench":
            if not 0 <= density < 100 or density == 1:
                raise ValueError(
                    f"density must be a fraction in [0, 1) or a percentage in (1, 100) for fusion_bench,"
                    f" whose threshold cannot keep everything; got {density:g}."
                )
        elif not 0 <= density <= 1:
            raise ValueError(f"density is the fraction of entries kept, between 0 and 1; got {density:g}.")

    @classmethod
    def read(cls, settings: Mapping[str, Any]) -> MergeConfig:
        """The settings, validated.

        Raises ConfigError with one sentence that names the setting at fault and what to do.
        """
        return cls.parse(dict(settings), "merge")

    # -- settings that vary over the model ----------------------------------------------------------------------------

    @property
    def varies(self) -> bool:
        """Whether some setting has another value in some tensors."""
        return any(isinstance(schedule, tuple) for key in VARYING for schedule in self._schedules(key))

    def over(self, names: Iterable[str]) -> Callable[[str], MergeConfig]:
        """The settings by tensor name, for a model with these tensors.

        Raises ConfigError where a gradient has no list of layers to run over.
        """
        if not self.varies:
            return lambda name: self
        gradients = any(_has_gradient(schedule) for key in VARYING for schedule in self._schedules(key))
        place = layer_places(names) if gradients else lambda name: 0.0
        return lambda name: self.at(name, place(name))

    def at(self, name: str, place: float) -> MergeConfig:
        """The settings of one tensor whose layer lies at ``place`` (0: first, 1: last); nothing varies in them.

        Raises ConfigError when a setting's choices leave this tensor without a value.
        """
        changes: dict[str, Any] = {}
        for key in VARYING:
            setting = getattr(self, key)
            if isinstance(setting, dict):
                changes[key] = {expert: _value(f"{key}.{expert}", one, name, place) for expert, one in setting.items()}
            elif setting is not None:
                changes[key] = _value(key, setting, name, place)
        return self.model_copy(update=changes)

    def unmatched(self, names: Collection[str]) -> list[str]:
        """Notes on filters that are part of none of these tensors' names."""
        schedules = [(key, schedule) for key in VARYING for schedule in self._schedules(key)]
        choices = {
            (key, entry.filter): None
            for key, schedule in schedules
            for entry in (schedule if isinstance(schedule, tuple) else ())
            if isinstance(entry, Choice) and entry.filter not in (None, "*")
        }
        return [
            f"merge: {key}: filter {wanted!r} is part of no tensor's name."
            for key, wanted in choices
            if not any(str(wanted) in name for name in names)
        ]

    def _schedules(self, key: str) -> list[Any]:
        setting = getattr(self, key)
        if setting is None:
            return []
        return list(setting.values()) if isinstance(setting, dict) else [setting]

    # -- by expert; nothing may vary ----------------------------------------------------------------------------------

    def check_experts(self, experts: Iterable[str]) -> None:
        """Raise ConfigError for an expert without a weight or density, or one of these without an expert."""
        names = list(experts)
        for key, setting in (("weights", self.weights), ("density", self.density)):
            _by_expert(key, 1.0 if setting is None else setting, names)

    def weight_of(self, experts: Iterable[str]) -> dict[str, float]:
        """The weight of each expert, in their order.

        Raises ConfigError for an expert without a weight, a weight without an expert, or, for a normalized weighted
        average, weights whose sum is zero.
        """
        weights = _by_expert("weights", 1.0 if self.weights is None else self.weights, experts)
        if self.method == "weighted_average" and self.normalize:
            total = sum(weights.values()) + (self.base_weight or 0.0)
            if abs(total) < ZERO_WEIGHT:
                raise ConfigError(f"merge: the weights sum to {total:g}, so there is no average; change weights.")
        return weights

    def density_of(self, experts: Iterable[str]) -> dict[str, float]:
        """The density of each expert, in their order; raises ConfigError as :meth:`weight_of` does."""
        return _by_expert("density", 1.0 if self.density is None else self.density, experts)


def _value(key: str, schedule: Any, name: str, place: float) -> float:
    value = value_at(schedule, name, place)
    if value is None:
        raise ConfigError(f"merge: {key} has no value for tensor {name!r}; add an entry without filter.")
    return value


def _has_gradient(schedule: Any) -> bool:
    if not isinstance(schedule, tuple):
        return False
    return any(_has_gradient(entry.value) if isinstance(entry, Choice) else len(schedule) > 1 for entry in schedule)


def _by_expert(setting: str, value: Any, experts: Iterable[str]) -> dict[str, Any]:
    names = list(experts)
    if not isinstance(value, Mapping):
        return dict.fromkeys(names, value)
    for name in names:
        if name not in value:
            raise ConfigError(f"merge: {setting} lacks expert {name!r}; it must name every expert.")
    for name in value:
        if name not in names:
            raise ConfigError(f"merge: {setting} names {name!r}, which is no expert; {nearest(name, names)}")
    return {name: value[name] for name in names}


def _one_of(key: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{key} {value!r} is not known; use {_listed(allowed)}.")


def _listed(names: Iterable[str]) -> str:
    *first, last = names
    return f"{', '.join(first)} or {last}" if first else last
