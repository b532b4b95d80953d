"""Settings of a merge: what is refused, in which words, and what is filled in."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import yaml

from epmq.errors import ConfigError
from epmq.merge import merge
from epmq.merge_config import MergeConfig

MK = {"method": "ties", "dialect": "mergekit"}
PEFT = {"method": "ties", "dialect": "peft"}
FB = {"method": "ties", "dialect": "fusion_bench"}
AVG = {"method": "weighted_average"}


def w(a: float, b: float) -> dict[str, float]:
    return {"A": a, "B": b}


BAD_SETTINGS: list[tuple[dict[str, Any], str]] = [
    ({"method": "slerp"}, "method 'slerp' is not known; use task_arithmetic, weighted_average or ties"),
    ({"method": "ties"}, "ties needs a dialect"),
    ({"method": "ties", "dialect": "paper"}, "dialect 'paper' is not known; use mergekit, peft or fusion_bench"),
    ({"dialect": "peft"}, "dialect belongs to method ties"),
    ({"densty": 0.5}, "no merge setting 'densty'; did you mean 'density'"),
    ({"density": 0.5}, "density has no meaning for task_arithmetic"),
    (AVG | {"scaling": 0.5}, "scaling has no meaning for weighted_average"),
    (PEFT, "ties in the peft dialect has no default density"),
    (PEFT | {"density": 0.5, "scaling": 0.3}, "scaling has no meaning for ties in the peft dialect"),
    (PEFT | {"density": w(0.5, 0.5)}, "density by expert name exists only in the mergekit dialect, not in peft"),
    (FB | {"weights": w(1, 1)}, "weights has no meaning for ties in the fusion_bench dialect"),
    (MK | {"merge_func": "sum"}, "merge_func has no meaning for ties in the mergekit dialect"),
    (MK | {"density": 50.0}, "density is the fraction of entries kept, between 0 and 1; got 50"),
    (MK | {"density": {"A": 0.5, "B": -1.0}}, "between 0 and 1; got -1"),
    (FB | {"density": 1.0}, "cannot keep everything; got 1"),
    (FB | {"density": 100.0}, "cannot keep everything; got 100"),
    (FB | {"density": -0.5}, "got -0.5"),
    ({"scaling": "0.3"}, "scaling: Input should be a valid number, got '0.3'"),
    ({"scaling": "1e999"}, "scaling: Input should be a finite number"),
    ({"scaling": "1e"}, "scaling: Input should be a valid number, got '1e'"),
    ({"scaling": float("nan")}, "scaling: Input should be a finite number"),
    ({"weights": {"A": True, "B": 1.0}}, "weights.A: Input should be a valid number"),
    ({"weights": {}}, "weights is empty"),
    ({"weights": {"A": 1.0}}, "weights lacks expert 'B'"),
    ({"weights": w(1, 1) | {"BB": 1.0}}, "weights names 'BB', which is no expert; did you mean 'B'"),
    (MK | {"density": {"A": 0.5}}, "density lacks expert 'B'"),
    ({"scaling": []}, "scaling: Input should be a number or a list that is not empty"),
    ({"scaling": [0.1, "x"]}, "scaling: Input should be a valid number"),
    ({"scaling": [{"filter": "mlp"}]}, "an entry of a list by tensor name has the keys filter and value"),
    (MK | {"density": [0.5, 1.5]}, "between 0 and 1; got 1.5"),
    (FB | {"scaling": [0.1, 0.2]}, "the fusion_bench dialect trims whole models"),
    (FB | {"dtype": "bfloat16"}, "dtype has no meaning for ties in the fusion_bench dialect"),
    ({"dtype": "int8"}, "dtype: Input should be 'stored', 'float32', 'float16', 'bfloat16' or 'float64'"),
    ({"out_dtype": "stored"}, "out_dtype: Input should be 'float32'"),
    (AVG | {"weights": w(0, 0)}, "the weights sum to 0"),
    (AVG | {"weights": w(1, -1)}, "the weights sum to 0"),
    (AVG | {"base_weight": -2.0}, "the weights sum to 0"),
]


@pytest.mark.parametrize(("settings", "sentence"), BAD_SETTINGS, ids=[case[1] for case in BAD_SETTINGS])
def test_settings_that_cannot_be_used(settings: dict[str, Any], sentence: str) -> None:
    def use() -> None:
        config = MergeConfig.read(settings)
        config.weight_of("AB")
        config.density_of("AB")

    with pytest.raises(ConfigError) as caught:
        use()
    message = str(caught.value)
    assert message.startswith("merge: ")
    assert sentence in message
    assert message.endswith((".", "?"))
    assert "\n" not in message


def test_settings_that_vary_over_the_model() -> None:
    config = MergeConfig.read(
        {"weights": {"A": [0, 1], "B": [{"filter": "mlp", "value": 2.0}, {"value": [4, 8]}]}, "scaling": 0.5}
    )
    assert config.varies
    assert MergeConfig.model_validate(config.model_dump()) == config
    at = config.over([f"h.{i}.{part}" for i in range(3) for part in ("mlp", "attn")] + ["norm"])
    assert at("h.1.attn").weight_of("AB") == {"A": 0.5, "B": 6.0}
    assert at("h.2.mlp").weight_of("AB") == {"A": 1.0, "B": 2.0}
    assert at("norm").weight_of("AB") == {"A": 0.0, "B": 4.0}
    assert not at("norm").varies
    with pytest.raises(ConfigError, match="found are 'decoder', 'encoder'"):
        config.over(["encoder.0.x", "decoder.0.x"])


def test_filters_that_are_part_of_no_name_are_told(caplog: pytest.LogCaptureFixture) -> None:
    entries = [{"filter": "gate_up", "value": 0.0}, {"filter": "mlp", "value": 0.5}, {"filter": "*", "value": 1.0}]
    config = MergeConfig.read({"method": "task_arithmetic", "scaling": entries})
    assert config.unmatched(["h.0.mlp.gate", "h.0.attn"]) == [
        "merge: scaling: filter 'gate_up' is part of no tensor's name."
    ]
    assert config.unmatched(["h.0.mlp.gate_up"]) == []
    base, expert = {"h.0.mlp": torch.zeros(2)}, {"h.0.mlp": torch.ones(2)}
    merged = merge(base, {"A": expert}, method="task_arithmetic", scaling=entries)
    assert "filter 'gate_up' is part of no tensor's name" in caplog.text
    assert torch.equal(merged.tensor("h.0.mlp"), torch.full((2,), 0.5))


def test_an_average_of_weights_that_cancel_in_one_tensor() -> None:
    config = MergeConfig.read(AVG | {"weights": {"A": 1.0, "B": [{"filter": "mlp", "value": -1.0}, {"value": 1.0}]}})
    at = config.over(["h.0.mlp", "h.0.attn"])
    assert at("h.0.attn").weight_of("AB") == {"A": 1.0, "B": 1.0}
    with pytest.raises(ConfigError, match="the weights sum to 0"):
        at("h.0.mlp").weight_of("AB")


def test_numbers_that_yaml_reads_as_texts() -> None:
    section = yaml.safe_load("{scaling: 1e-1, weights: {A: 2E+0, B: [1.e-2, 1]}}")
    assert section["scaling"] == "1e-1"
    config = MergeConfig.read(section)
    assert (config.scaling, config.weights) == (0.1, {"A": 2.0, "B": (0.01, 1.0)})


def test_config_is_frozen_and_shows_what_was_used() -> None:
    config = MergeConfig.read({"method": "ties", "dialect": "mergekit"})
    with pytest.raises(ValueError, match="frozen"):
        config.__setattr__("scaling", 2.0)
    dumped = config.model_dump()
    assert (dumped["density"], dumped["scaling"], dumped["normalize"]) == (1.0, 1.0, True)
    assert MergeConfig.model_validate(dumped) == config
    assert MergeConfig() == MergeConfig(method="task_arithmetic", scaling=0.3, normalize=False)
