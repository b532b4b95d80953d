"""mergekit's YAML: its numbers, precedence and defaults, and everything that is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from checkpoints import TASKS, in_process, make_job, write_tokenizer
from safetensors.torch import load_file, save_file
from torch import Tensor

from epmq.errors import ConfigError
from epmq.merge import MergedSource
from epmq.mergekit import read_mergekit
from epmq.recipe import read_recipe
from epmq.sources import FileSource

Model = dict[str, Tensor]


def model(a: list[float], b: list[float]) -> Model:
    return {"a": torch.tensor(a, dtype=torch.float32), "b": torch.tensor(b, dtype=torch.float32)}


BASE = model([0.0] * 4, [0.0] * 4)
A = model([4, -3, 2, 1], [0.5, -8, 6, 2])
B = model([-1, -5, 2, 3], [8, 0.25, -6, 1])


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """base, A and B as folders in the working directory, where mergekit looks for paths."""
    for name, tensors in (("base", BASE), ("A", A), ("B", B)):
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def config(method: str, a: Any = None, b: Any = None, **rest: Any) -> dict[str, Any]:
    models = [{"model": "A", "parameters": a}, {"model": "B", "parameters": b}]
    base = {} if method == "linear" else {"base_model": "base"}
    return {"merge_method": method, "models": models, **base, **rest}


def opened(folder: Path, content: Any) -> MergedSource:
    (folder / "config.yml").write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    read = read_mergekit(folder / "config.yml")
    return MergedSource(FileSource(read.base), {n: FileSource(p) for n, p in read.experts.items()}, read.merge)


def w(value: Any, **rest: Any) -> dict[str, Any]:
    return {"weight": value, **rest}


HALF = {"density": 0.5}
# What mergekit 0.1.5 answers for these files; benchmarks/peers/merge.py asks it again.
NUMBERS: list[tuple[str, dict[str, Any], list[float], list[float]]] = [
    ("ties half", config("ties", w(1, **HALF), w(1, **HALF)), [4, -4, 0, 3], [8, -8, 6, 0]),
    (
        "ties half, parameters for all",
        config("ties", parameters={"weight": 1, "density": 0.5}),
        [4, -4, 0, 3],
        [8, -8, 6, 0],
    ),
    (
        "ties unnormalized",
        config("ties", w(1), w(1), parameters={**HALF, "normalize": False}),
        [4, -8, 0, 3],
        [8, -8, 6, 0],
    ),
    (
        "ties rescaled",
        config("ties", w(1), w(1), parameters={**HALF, "rescale": True}),
        [5.714286, -5.580357, 0, 4.125],
        [8.714286, -9.428572, 7.071429, 0],
    ),
    ("ties equal weights", config("ties", w(0.5), w(0.5), parameters=HALF), [4, -4, 0, 3], [8, -8, 6, 0]),
    (
        "ties unequal weights",
        config("ties", w(1), w(0.25), parameters=HALF),
        [4, -3.4, 0, 3],
        [8, -8, 6, 0],
    ),
    (
        "ties unequal weights unnormalized",
        config("ties", w(1), w(0.25), parameters={**HALF, "normalize": "no"}),
        [4, -4.25, 0, 0.75],
        [2, -8, 6, 0],
    ),
    (
        "ties lambda",
        config("ties", w(1), w(1), parameters={**HALF, "lambda": 0.3}),
        [1.2, -1.2, 0, 0.9],
        [2.4, -2.4, 1.8, 0],
    ),
    ("ties fifth", config("ties", w(1), w(1), parameters={"density": 0.2}), [4, -5, 0, 0], [8, -8, 0, 0]),
    ("ties whole by default", config("ties", w(1), w(1)), [4, -4, 2, 2], [4.25, -8, 6, 1.5]),
    ("ties opposed", config("ties", w(1), w(-1)), [5, -5, 2, 3], [8, -8.25, 12, 2]),
    (
        "ties opposed unnormalized",
        config("ties", w(1), w(-1), parameters={"normalize": False, "int8_mask": True}),
        [5, 5, 2, -3],
        [-8, -8.25, 12, 2],
    ),
    ("task arithmetic", config("task_arithmetic", w(0.5), w(0.5)), [1.5, -4, 2, 2], [4.25, -3.875, 0, 1.5]),
    (
        "task arithmetic lambda",
        config("task_arithmetic", w(0.5), w(0.5), parameters={"lambda": 0.3}),
        [0.45, -1.2, 0.6, 0.6],
        [1.275, -1.1625, 0, 0.45],
    ),
    (
        "task arithmetic, weights that cancel are not divided by",
        config("task_arithmetic", w(1), w(-1), parameters={"normalize": True}),
        [5, 2, 0, -2],
        [-7.5, -8.25, 12, 1],
    ),
    (
        "linear",
        config("linear", w(0.5), w(0.25)),
        [2.333333, -3.666667, 2, 1.666667],
        [3, -5.25, 2, 1.666667],
    ),
    (
        "linear unnormalized",
        config("linear", w(0.5), w(0.25), parameters={"normalize": False}),
        [1.75, -2.75, 1.5, 1.25],
        [2.25, -3.9375, 1.5, 1.25],
    ),
    (
        "linear, the base is one more input with the weight for all",
        config("linear", base_model="base", parameters={"weight": 1}),
        [1, -8 / 3, 4 / 3, 4 / 3],
        [8.5 / 3, -7.75 / 3, 0, 1],
    ),
]


@pytest.mark.parametrize(("content", "a", "b"), [case[1:] for case in NUMBERS], ids=[case[0] for case in NUMBERS])
def test_numbers_of_mergekit(content: dict[str, Any], a: list[float], b: list[float], models: Path) -> None:
    source = opened(models, content)
    torch.testing.assert_close(source.tensor("a"), torch.tensor(a, dtype=torch.float32), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(source.tensor("b"), torch.tensor(b, dtype=torch.float32), rtol=1e-6, atol=1e-6)


def test_the_base_among_the_models(models: Path) -> None:
    listed = [{"model": "A"}, {"model": "base", "parameters": {"weight": 3}}, {"model": "B"}]
    # Not an input of its own, so that its weight counts for nothing.
    ties = opened(models, config("ties", models=listed, parameters={"weight": 1}))
    assert ties.tensor("a").tolist() == [4, -4, 2, 2]
    # Of linear it is one.
    linear = opened(models, config("linear", models=listed, base_model="base", parameters={"weight": 1}))
    torch.testing.assert_close(linear.tensor("a"), torch.tensor([3 / 5, -8 / 5, 4 / 5, 4 / 5]))


# -- values that vary over the model ----------------------------------------------------------------------------------

LAYERS = [f"model.layers.{i}.{part}.weight" for i in range(5) for part in ("mlp", "attn")]
NAMES = ["model.embed.weight", *LAYERS, "model.norm.weight", "lm_head.weight"]


@pytest.fixture
def layered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Experts whose difference from the base is one everywhere: the merge shows the weights."""
    for name, value in (("base", 0.0), ("A", 1.0), ("B", 1.0)):
        (tmp_path / name).mkdir()
        save_file({key: torch.full((2,), value) for key in NAMES}, tmp_path / name / "model.safetensors")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def weights_seen(folder: Path, weight: Any, overall: Any = None) -> dict[str, float]:
    parameters = {"weight": 0.0} if overall is None else {"weight": overall}
    content = config("task_arithmetic", {"weight": weight}, {"weight": 0.0}, parameters=parameters)
    source = opened(folder, content)
    return {key: round(float(source.tensor(key)[0]), 6) for key in NAMES}


def test_a_gradient_runs_over_the_layers(layered: Path) -> None:
    seen = weights_seen(layered, [0.0, 1.0, 0.5])
    assert [seen[f"model.layers.{i}.mlp.weight"] for i in range(5)] == [0.0, 0.5, 1.0, 0.75, 0.5]
    # What lies outside the layers has the first value, also behind them.
    assert {seen[key] for key in ("model.embed.weight", "model.norm.weight", "lm_head.weight")} == {0.0}


def test_the_first_filter_that_fits_counts(layered: Path) -> None:
    rules = [
        {"filter": "layers.3", "value": 7},
        {"filter": "mlp", "value": [1, 3]},
        {"filter": "attn", "value": 5},
        {"value": 2},
    ]
    seen = weights_seen(layered, rules)
    assert [seen[f"model.layers.{i}.mlp.weight"] for i in range(5)] == [1.0, 1.5, 2.0, 7.0, 3.0]
    assert [seen[f"model.layers.{i}.attn.weight"] for i in range(5)] == [5.0, 5.0, 5.0, 7.0, 5.0]
    assert seen["lm_head.weight"] == seen["model.embed.weight"] == 2.0


def test_where_no_filter_fits_the_next_scope_is_asked(layered: Path) -> None:
    seen = weights_seen(
        layered, {"filter": "mlp", "value": 4}, overall=[{"filter": "attn", "value": 5}, {"filter": "*", "value": 6}]
    )
    assert seen["model.layers.0.mlp.weight"] == 4.0
    assert seen["model.layers.0.attn.weight"] == 5.0
    assert seen["lm_head.weight"] == 6.0
    with pytest.raises(ConfigError, match=r"weights\.A has no value for tensor 'model\.embed\.weight'"):
        weights_seen(layered, {"filter": "mlp", "value": 4}, overall=[{"filter": "attn", "value": 5}])


def test_lambda_and_density_vary_too(layered: Path) -> None:
    content = config("ties", w(1), w(1), parameters={"lambda": [1, 3], "density": [{"filter": "attn", "value": 0.0}]})
    source = opened(layered, content)
    assert source.tensor("model.layers.2.mlp.weight").tolist() == [2.0, 2.0]
    assert source.tensor("model.layers.4.mlp.weight").tolist() == [3.0, 3.0]
    assert source.tensor("model.layers.4.attn.weight").tolist() == [0.0, 0.0]


def test_a_model_of_one_layer_has_the_last_value(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("base", 0.0), ("A", 1.0), ("B", 1.0)):
        (tmp_path / name).mkdir()
        save_file(
            {"h.0.weight": torch.full((1,), value), "norm": torch.full((1,), value)},
            tmp_path / name / "model.safetensors",
        )
    monkeypatch.chdir(tmp_path)
    source = opened(tmp_path, config("task_arithmetic", w([2, 3]), w(0)))
    assert (float(source.tensor("h.0.weight")), float(source.tensor("norm"))) == (3.0, 2.0)


def test_a_gradient_without_one_list_of_layers(models: Path) -> None:
    with pytest.raises(ConfigError, match="runs over the layers of a model that has one list of them; found are none"):
        opened(models, config("ties", w([0, 1]), w(1)))


# -- dtypes -----------------------------------------------------------------------------------------------------------


def half_models(folder: Path, dtype: torch.dtype) -> list[Model]:
    torch.manual_seed(0)
    base = {"x": torch.randn(64)}
    found = [base, *({"x": base["x"] + 0.1 * torch.randn(64)} for _ in range(2))]
    found = [{key: tensor.to(dtype) for key, tensor in one.items()} for one in found]
    for name, tensors in zip(("base", "A", "B"), found, strict=True):
        save_file(tensors, folder / name / "model.safetensors")
    return found


def in_bfloat16(base: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Task arithmetic with weights of 0.3 and 0.6 as mergekit does it in the models' own dtype."""
    stack = torch.stack([a - base, b - base]) * torch.tensor([[0.3], [0.6]], dtype=base.dtype)
    return base + stack.sum(dim=0)


def test_dtype_is_that_of_the_arithmetic_and_out_dtype_of_the_result(models: Path) -> None:
    base, a, b = (one["x"] for one in half_models(models, torch.bfloat16))
    content = config("task_arithmetic", w(0.3), w(0.6))
    stored = opened(models, content).tensor("x")
    assert torch.equal(stored, in_bfloat16(base, a, b))
    wide = opened(models, content | {"dtype": "torch.float32"}).tensor("x")
    assert wide.dtype == torch.float32
    torch.testing.assert_close(wide, in_bfloat16(base.float(), a.float(), b.float()))
    assert not torch.equal(wide.bfloat16(), stored)
    back = opened(models, content | {"dtype": "float32", "out_dtype": "bfloat16"})
    assert back.dtype("x") == torch.bfloat16
    assert torch.equal(back.tensor("x"), wide.bfloat16())
    base, a, b = (one["x"] for one in half_models(models, torch.float32))
    narrow = opened(models, content | {"dtype": "bfloat16"}).tensor("x")
    assert torch.equal(narrow, in_bfloat16(base.bfloat16(), a.bfloat16(), b.bfloat16()))


def test_models_of_different_dtypes_are_merged_in_the_wider(models: Path) -> None:
    half_models(models, torch.bfloat16)
    save_file({"x": torch.randn(64).half()}, models / "A" / "model.safetensors")
    assert opened(models, config("linear", w(1), w(1))).tensor("x").dtype == torch.float32


# -- what is refused --------------------------------------------------------------------------------------------------

TA = config("task_arithmetic", w(1), w(1))
TIES = config("ties", w(1), w(1))
LINEAR = config("linear", w(1), w(1))


def entry(**changes: Any) -> dict[str, Any]:
    return TA | {"models": [{"model": "A", "parameters": w(1)} | changes]}


REFUSED: list[tuple[Any, str]] = [
    ("models: [", "not a YAML file"),
    ("- 1", "expected keys and values"),
    ("merge_method: !!python/object/apply:os.system ['true']", "not a YAML file"),
    (TA | {"merge_method": "slerp"}, "merge_method 'slerp' of mergekit is not supported"),
    (TA | {"merge_method": "dare_ties"}, "merge_method 'dare_ties' of mergekit is not supported"),
    (TA | {"merge_method": "tise"}, "merge_method 'tise' is not known; supported are linear, task_arithmetic, ties"),
    ({k: v for k, v in TA.items() if k != "merge_method"}, "merge_method None is not known"),
    (TA | {"slices": [{}]}, "slices is not supported: layers of different models"),
    (TA | {"modules": {}}, "modules is not supported"),
    (TA | {"tokenizer": {"source": "union"}}, "tokenizer is not supported"),
    (TA | {"chat_template": "auto"}, "chat_template is not supported"),
    (TA | {"dtpye": "float32"}, "unknown key 'dtpye', which mergekit would ignore; did you mean 'dtype'?"),
    (TA | {"lambda": 0.5}, "unknown key 'lambda'"),
    (TA | {"parameters": {"wieght": 1}}, "unknown parameter 'wieght', which mergekit would ignore; did you mean"),
    (TA | {"parameters": {"density": 0.5}}, "parameters: density has no meaning for merge_method task_arithmetic"),
    (LINEAR | {"parameters": {"lambda": 0.5}}, "parameters: lambda has no meaning for merge_method linear"),
    (TIES | {"parameters": {"gamma": 0.5}}, "parameters: gamma has no meaning for merge_method ties"),
    (TA | {"parameters": {"rescale": True}}, "parameters: rescale has no meaning for merge_method task_arithmetic"),
    (entry(parameters=w(1, **{"lambda": 0.3})), "lambda is read only from the top level's parameters"),
    (entry(parameters=w(1, normalize=True)), "normalize is read only from the top level's parameters"),
    (entry(paramters={}), "models, entry 1: unknown key 'paramters'"),
    (entry(parameters=3), "models, entry 1: expected parameters by name"),
    (entry(parameters=w("heavy")), "weight: expected a number, a list of numbers or a list of {filter, value}, got"),
    (entry(parameters=w(True)), "weight: expected a number"),
    (entry(parameters=w([1, {"value": 2}])), "weight: expected a number"),
    (entry(parameters=w([])), "weight: the list is empty"),
    (entry(parameters=w([{"filter": "mlp"}])), "has the keys filter and value"),
    (entry(parameters=w([{"filter": 3, "value": 1}])), "filter is a part of a tensor's name"),
    (entry(parameters=w("nan")), "finite"),
    (entry(parameters={}), "models: 'A' has no weight, and parameters has none for all"),
    (entry(model="A+one+two"), "is not of the form path, path@revision or path+adapter"),
    (entry(model={"model": {"path": "A"}}), "a model is a text"),
    (entry(model="B+A"), "the adapter of 'B+A' is not on 'base'"),
    (entry(model="C"), "there is no such file or folder: C"),
    (TA | {"models": []}, "models: expected a list"),
    (TA | {"models": None}, "models: expected a list"),
    (TA | {"models": ["A"]}, "models, entry 1: expected {model, parameters}"),
    (TA | {"models": [{"model": "A", "parameters": w(1)}] * 2}, "models: 'A' is listed twice"),
    (TA | {"models": [{"model": "base"}]}, "names no model beside base_model"),
    (TA | {"base_model": "base+A"}, "base_model 'base+A' has an adapter"),
    ({k: v for k, v in TIES.items() if k != "base_model"}, "ties needs base_model"),
    (LINEAR | {"base_model": "base"}, "models: 'base' has no weight"),
    (config("linear", w(1), w(-1)), "the weights sum to 0"),
    (TA | {"dtype": "auto"}, "dtype: 'auto' is no dtype to merge in"),
    (TA | {"out_dtype": "int8"}, "out_dtype: 'int8'"),
    (TIES | {"parameters": {"normalize": [True, False]}}, "normalize: expected true or false for the whole model"),
    (TIES | {"parameters": {"density": 50}}, "density is the fraction of entries kept, between 0 and 1; got 50"),
    (TA | {"tokenizer_source": "union"}, "tokenizer_source 'union' is not supported"),
    (TA | {"tokenizer_source": "A"}, "tokenizer_source 'A' is not supported"),
]  # fmt: skip


@pytest.mark.parametrize(("content", "sentence"), REFUSED, ids=[case[1] for case in REFUSED])
def test_what_is_not_read_is_refused_by_name(content: Any, sentence: str, models: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        opened(models, content)
    message = str(caught.value)
    assert sentence in message
    assert message.startswith((str(models / "config.yml"), "merge: "))
    assert "\n" not in message


def test_texts_that_are_numbers_or_switches_are_read_as_such(models: Path) -> None:
    text = (
        "merge_method: ties\nbase_model: base\nmodels:\n- {model: A, parameters: {weight: '1.0'}}\n"
        "- {model: B, parameters: {weight: 1e0}}\nparameters: {density: '5e-1', normalize: 'off', int8_mask: 1}\n"
    )
    source = opened(models, text)
    assert source.tensor("a").tolist() == [4, -8, 0, 3]


def test_tokenizer_source_base(models: Path) -> None:
    for name in ("base", "A"):
        write_tokenizer(models / name)
        size = len(json.loads((models / name / "tokenizer.json").read_text())["model"]["vocab"])
        (models / name / "config.json").write_text(json.dumps({"model_type": "bert", "vocab_size": size}))
    for source in ("base", "./base"):
        opened(models, TA | {"tokenizer_source": source, "base_model": source})
    (models / "base" / "config.json").write_text(json.dumps({"model_type": "bert", "vocab_size": size + 6}))
    with pytest.raises(ConfigError, match=f"would cut or fill the embeddings of {size + 6} rows to the {size} tokens"):
        opened(models, TA | {"tokenizer_source": "base"})
    other = json.loads((models / "A" / "tokenizer.json").read_text())
    vocabulary = other["model"]["vocab"]
    vocabulary["w0"], vocabulary["w1"] = vocabulary["w1"], vocabulary["w0"]
    (models / "A" / "tokenizer.json").write_text(json.dumps(other))
    with pytest.raises(ConfigError, match="the vocabulary of 'A' is not that of 'base'"):
        opened(models, TA | {"tokenizer_source": "base"})


# -- as part of a recipe, and on the command line ---------------------------------------------------------------------


def test_experts_are_called_by_the_last_part_of_their_path(models: Path) -> None:
    for place in ("one/final", "two/final"):
        (models / place).mkdir(parents=True)
        save_file(A, models / place / "model.safetensors")
    listed = [{"model": name} for name in ("A", "one/final", "two/final")]
    read = opened(models, TA | {"models": listed, "parameters": {"weight": 1}})
    assert list(read.experts) == ["A", "one/final", "two/final"]


def test_a_recipe_names_a_mergekit_configuration(models: Path) -> None:
    (models / "jobs").mkdir()
    (models / "jobs" / "config.yml").write_text(yaml.safe_dump(TIES))
    (models / "jobs" / "recipe.yaml").write_text("mergekit: config.yml\nquantization: {bits: 3}\n")
    recipe = read_recipe(models / "jobs" / "recipe.yaml")
    assert recipe.base == models / "base"
    assert recipe.experts == {"A": models / "A", "B": models / "B"}
    assert recipe.merge is not None
    assert (recipe.merge.method, recipe.merge.dialect, recipe.merge.dtype) == ("ties", "mergekit", "stored")
    for rest, sentence in (
        ("base: ../base", "base and mergekit say the same thing"),
        ("merge: {method: ties}", "merge and mergekit say the same thing"),
        ("mergekit: 3", "mergekit: expected the name of a file"),
        ("mergekit: gone.yml", "gone.yml: the mergekit configuration cannot be read"),
    ):
        (models / "jobs" / "recipe.yaml").write_text(
            "mergekit: config.yml\n" * (not rest.startswith("mergekit")) + rest
        )
        with pytest.raises(ConfigError, match=sentence):
            read_recipe(models / "jobs" / "recipe.yaml")


def test_merge_from_the_command_line(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (models / "config.yml").write_text(yaml.safe_dump(TIES | {"dtype": "bfloat16"}))
    (models / "base" / "config.json").write_text('{"model_type": "bert", "torch_dtype": "float32"}')
    done = in_process(capsys, "merge", "--mergekit", "config.yml", "--out", "merged")
    assert (done.code, done.err) == (0, "")
    merged = load_file(models / "merged" / "model.safetensors")
    assert merged["a"].dtype == torch.bfloat16
    assert merged["a"].tolist() == [4, -4, 2, 2]
    assert json.loads((models / "merged" / "config.json").read_text())["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize("verb", ["merge", "quantize"])
def test_the_configuration_says_the_dtype_that_the_merge_came_to(
    verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without dtype mergekit merges in what the inputs promote to."""
    job = make_job(tmp_path)
    base = tmp_path / "base"
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(base / "model.safetensors").items()}
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    content = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**content, "dtype": "bfloat16"}))
    models = [{"model": str(job.expert(task).parent), "parameters": {"weight": 0.5}} for task in TASKS]
    content = {"merge_method": "task_arithmetic", "base_model": str(base), "models": models}
    (tmp_path / "config.yml").write_text(yaml.safe_dump(content))
    job.recipe = {"mergekit": "config.yml", "calibration": job.recipe["calibration"], "format": "native"}
    job.recipe["quantization"] = {"group_size": 16}
    assert in_process(capsys, verb, job.write(), "--out", tmp_path / "out").code == 0
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert merged["embeddings.word_embeddings.weight"].dtype == torch.float32
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float32"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["merge", "--out", "o"], "Give either RECIPE or --mergekit FILE"),
        (["merge", "r.yaml", "--mergekit", "config.yml", "--out", "o"], "Give either RECIPE or --mergekit FILE"),
        (["quantize", "r.yaml", "--calibration", "A=a.jsonl", "--out", "o"], "--calibration belongs to --mergekit"),
        (["quantize", "--mergekit", "config.yml", "--calibration", "a.jsonl", "--out", "o"], "expects EXPERT=FILE"),
        (["quantize", "--mergekit", "config.yml", "--out", "o"], "method 'epmq' needs calibration texts for A, B:"),
        (
            ["quantize", "--mergekit", "config.yml", "--calibration", "C=a.jsonl", "--out", "o"],
            "--calibration: 'C' is no expert of config.yml; its experts are A, B.",
        ),
        (
            ["quantize", "--mergekit", "config.yml", "--calibration", "B=a.jsonl", "--out", "o"],
            "--calibration: expert 'A' has none; config.yml has the experts A, B.",
        ),
        (
            ["quantize", "--mergekit", "config.yml", "--calibration", "A=no.jsonl", "--calibration", "B=a.jsonl",
             "--out", "o"],
            "calibration.tasks.A: there is no no.jsonl",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)  # fmt: skip
def test_misuse_of_the_command_line(
    arguments: list[str], sentence: str, models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (models / "config.yml").write_text(yaml.safe_dump(TA))
    (models / "a.jsonl").write_text('{"text": "w1"}\n')
    done = in_process(capsys, *arguments)
    assert done.code == 2
    assert sentence in done.err
    assert "Traceback" not in done.err
    assert not (models / "o").exists()
