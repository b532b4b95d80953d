"""What people get wrong, each with one sentence that names the place and a way out; nothing is left behind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import Done, Job, in_process, make_job
from conftest import ToyJob
from safetensors.torch import load_file
from torch import nn

from epmq import QuantConfig, preset, quantize
from epmq.errors import CalibrationError, ConfigError, EpmqError, NumericalError, SourceError
from epmq.skeleton import meta_copy

pytest.importorskip("transformers")

QUERY = "encoder.layer.1.attention.self.query.weight"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One job on disk that every test copies."""
    folder = tmp_path_factory.mktemp("made") / "job"
    job = make_job(folder)
    (folder / "recipe.json").write_text(json.dumps(job.recipe))
    return folder


@pytest.fixture
def job(made: Path, tmp_path: Path) -> Job:
    shutil.copytree(made, tmp_path / "job")
    return Job(tmp_path / "job", json.loads((made / "recipe.json").read_text()))


Run = Callable[..., Done]


@pytest.fixture
def run(job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a verb on the job's recipe; checks that a refusal is one sentence and leaves nothing."""

    def call(verb: str = "quantize", out: Path = tmp_path / "out") -> Done:
        done = in_process(capsys, verb, job.write(), "--out", out)
        if done.code:
            assert done.code == 2
            assert done.out == ""
            assert done.err.startswith("epmq: ")
            assert done.err.count("\n") == 1
            assert not list(tmp_path.glob(".*partial*"))
        return done

    return call


def expect(done: Done, *parts: str) -> None:
    assert done.code == 2, done
    for part in parts:
        assert part in done.err, done.err


# -- recipes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("bsae",), "x", "unknown key 'bsae'; did you mean 'base'?"),
        (("mergekiit",), "x", "unknown key 'mergekiit'; did you mean 'mergekit'?"),
        (("quantization", "presett"), "x", "unknown key 'quantization.presett'; did you mean 'preset'?"),
        (
            ("merge", "method"),
            "slerp",
            "merge: method 'slerp' is not known; use task_arithmetic, weighted_average or ties.\n",
        ),
        (("kind",), "clip", "recipe.yaml: the recipe of a paper's benchmark; run it with epmq paper "),
        (("quantization", "group_sise"), 16, "unknown key 'quantization.group_sise'; did you mean 'group_size'?"),
        (("calibration", "max_lenght"), 16, "unknown key 'calibration.max_lenght'; did you mean 'max_length'?"),
        (("quantization", "distill"), {"stepz": 3}, "unknown key 'quantization.distill.stepz'; did you mean 'steps'?"),
        (("merge", "scalling"), 0.3, "merge: there is no merge setting 'scalling'; did you mean 'scaling'?\n"),
        (("evaluation", "zzzzz"), 1, "unknown key 'evaluation.zzzzz'; known are max_length, pooling, tasks, text_key."),
        (("quantization", "bits"), 5, "quantization.bits: use one of 2, 3, 4, 8"),
        (("quantization", "bits"), "four", "quantization.bits"),
        (("quantization", "group_size"), 0, "quantization.group_size: use a positive number"),
        (("quantization", "sym"), "perhaps", "quantization.sym"),
        (("quantization", "alpha"), 1.5, "quantization.alpha"),
        (
            ("quantization", "anchor"),
            "automatic",
            "quantization.anchor: use a number >= 0, or \"auto\", got 'automatic'.",
        ),
        (("quantization", "anchor"), -1, 'quantization.anchor: use a number >= 0, or "auto", got -1.'),
        (("quantization", "anchor"), float("nan"), "quantization.anchor"),
        (("quantization", "method"), "awq", "quantization.method"),
        (
            ("quantization", "forward_dtype"),
            "float8",
            "quantization.forward_dtype: Input should be 'float32', 'bfloat16' or 'float16', got 'float8'.",
        ),
        (("quantization", "damp"), 2.0, "quantization.damp"),
        (("quantization", "include"), ["("], "not a regular expression"),
        (("quantization", "preset"), "bset", "unknown preset 'bset'; did you mean 'best'?"),
        (("quantization", "preset"), ["best"], "unknown preset ['best']"),
        (("quantization",), 4, "quantization: expected keys with values, got 4."),
        (("quantization",), None, "quantization: expected keys with values, got None."),
        (("quantization", "include"), "query", "quantization.include: expected a list, got 'query'."),
        (("quantization", "static_groups"), False, "act_order needs static_groups"),
        (("merge", "method"), "tise", "tise"),
        (("merge",), {"method": "ties"}, "dialect"),
        (("experts",), ["experts/reviews"], "experts: expected keys with values, got ['experts/reviews']."),
        (("experts", "reviews"), 3, "experts.reviews: expected a path, got 3."),
        (("experts", False), "experts/reviews", "experts: the name False is no text; put it in quotes."),
        (("experts", 2024), "experts/reviews", "experts: the name 2024 is no text; put it in quotes."),
        (("calibration", "tasks", True), "a.jsonl", "calibration.tasks: the name True is no text; put it in quotes."),
        (("calibration", "examples"), 0, "calibration.examples"),
        (("calibration", "examples"), "many", "calibration.examples"),
        (("calibration", "tasks"), None, "calibration.tasks"),
        (("base",), None, "base: expected a path, got None."),
        (("base",), "nowhere", "base: there is no"),
        (("experts", "reviews"), "experts/gone", "experts.reviews: there is no"),
        (("calibration", "tasks", "reviews"), "gone.jsonl", "calibration.tasks.reviews: there is no"),
        (("evaluation", "tasks", "reviews", "head"), "gone", "evaluation.tasks.reviews.head: there is no"),
        (("merged",), "gone", "merged: there is no"),
        (("merged",), "base", "give either merge or merged, not both"),
        (("shard_bytes",), -1, "shard_bytes"),
    ],
    ids=lambda value: ".".join(map(str, value)) if isinstance(value, tuple) else None,
)
def test_a_recipe_that_cannot_be_used(path: tuple[Any, ...], value: Any, message: str, job: Job, run: Run) -> None:
    section = job.recipe
    for key in path[:-1]:
        section = section[key]
    section[path[-1]] = value
    if value == "gone":
        job.recipe.pop("merge")
    expect(run(), "recipe.yaml", message)


@pytest.mark.parametrize("text", ["", "just words", "[1, 2]", "a: [", "\x00", "3", "{1: 2}", "&a [*a]"])
def test_a_file_that_is_no_recipe(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "recipe.yaml").write_text(text)
    done = in_process(capsys, "quantize", tmp_path / "recipe.yaml", "--out", tmp_path / "out")
    assert done.code == 2
    assert "recipe.yaml" in done.err


def test_a_missing_recipe_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in (tmp_path / "gone.yaml", tmp_path):
        expect(in_process(capsys, "merge", path, "--out", tmp_path / "out"), f"{path}: the recipe cannot be read")


def test_a_verb_that_needs_another_section(job: Job, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    for section in ("experts", "calibration", "evaluation"):
        del job.recipe[section]
    expect(run("merge"), "merging needs experts")
    expect(run("quantize"), "needs calibration")
    expect(in_process(capsys, "eval", job.folder / "base", "--recipe", job.write()), "no evaluation: section")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bitz": 4}, "unknown key 'bitz'; did you mean 'bits'"),
        ({"bits": 6}, "use one of 2, 3, 4, 8"),
        ({"bits": None, "method": "gptq"}, "leaves nothing to do"),
        ({"distill": {}, "method": "gptq"}, "distill belongs to method epmq"),
        ({"bias_refit": True, "gamma": 0.9}, "bias_refit"),
        ({"scale_refit": True, "act_order": False, "static_groups": False}, "scale_refit needs static_groups"),
        ({"norm_refit": True, "method": "gptq"}, "norm_refit belongs to method epmq, not to gptq"),
        ({"rho": -1}, "rho"),
        ({"alpha": float("nan")}, "alpha"),
        ({"anchor": float("inf")}, "anchor"),
        ({"exclude": "head"}, "exclude"),
    ],
)
def test_a_config_that_cannot_be_used(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        QuantConfig(**changes)


def test_an_unknown_preset_in_python() -> None:
    with pytest.raises(ConfigError, match="did you mean 'paper'"):
        preset("papper")


# -- experts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["merge", "quantize"])
def test_an_expert_of_another_shape(verb: str, job: Job, run: Run) -> None:
    job.change_expert("intents", **{QUERY: torch.ones(32, 31)})
    expect(run(verb), "expert 'intents'", QUERY, "has shape [32, 31]", "expected [32, 32]")


@pytest.mark.parametrize("verb", ["merge", "quantize"])
def test_an_expert_without_a_tensor(verb: str, job: Job, run: Run) -> None:
    job.change_expert("intents", **{QUERY: None})
    expect(run(verb), "expert 'intents'", f"lacks tensor '{QUERY}'")


@pytest.mark.parametrize("verb", ["merge", "quantize"])
def test_an_expert_with_an_extra_tensor(verb: str, job: Job, run: Run) -> None:
    job.change_expert("intents", **{"adapter.weight": torch.ones(3)})
    expect(run(verb), "expert 'intents'", "has an extra tensor 'adapter.weight'")


@pytest.mark.parametrize("verb", ["merge", "quantize"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_expert_that_is_not_finite(verb: str, value: float, job: Job, run: Run) -> None:
    bad = job.tensor("intents", QUERY)
    bad[3, 4] = value
    job.change_expert("intents", **{QUERY: bad})
    expect(run(verb), "experts/intents", f"tensor '{QUERY}' holds NaN or Inf")


@pytest.mark.parametrize("verb", ["merge", "quantize"])
def test_an_expert_that_is_truncated(verb: str, job: Job, run: Run) -> None:
    path = job.expert("reviews")
    path.write_bytes(path.read_bytes()[:5000])
    expect(run(verb), "experts/reviews/model.safetensors: not a complete safetensors file")


@pytest.mark.parametrize("verb", ["merge", "quantize"])
@pytest.mark.parametrize("where", ["base", "experts/reviews"])
def test_a_checkpoint_of_pickles(where: str, verb: str, job: Job, run: Run, caplog: pytest.LogCaptureFixture) -> None:
    tensors = load_file(job.folder / where / "model.safetensors")
    (job.folder / where / "model.safetensors").unlink()
    torch.save(tensors, job.folder / where / "pytorch_model.bin")
    done = run(verb)
    expect(done, f"{where}: holds pytorch_model.bin but no model.safetensors", "save it again (save_pretrained)")
    assert caplog.text == ""  # nothing is merged by the names in such files


@pytest.mark.parametrize("verb", ["merge", "quantize"])
@pytest.mark.parametrize("where", ["base", "experts/reviews", "merged"])
@pytest.mark.parametrize("format", ["compressed-tensors", "native"])
def test_a_checkpoint_that_is_quantized_already(
    format: str, where: str, verb: str, job: Job, run: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    job.recipe["quantization"] = {"method": "rtn", "group_size": 16}
    job.recipe["format"] = format
    assert run("quantize", tmp_path / "first").code == 0
    if where == "merged":
        del job.recipe["merge"]
        job.recipe["merged"] = "merged"
    shutil.rmtree(job.folder / where, ignore_errors=True)
    shutil.copytree(tmp_path / "first", job.folder / where)
    label = "expert 'reviews'" if where.startswith("experts") else where
    expect(run(verb), f"{label}: {job.folder / where} is quantized already ({format}); give the model that it was made")
    assert caplog.text == ""


def test_mxfp4_is_told_the_way_to_16_bits(job: Job, run: Run) -> None:
    path = job.folder / "base" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": {"quant_method": "mxfp4"}}))
    expect(run("quantize"), "quantized already (mxfp4); give the model that it was made from, or in Python a module")


def test_a_configuration_with_a_byte_order_mark(job: Job, run: Run) -> None:
    path = job.folder / "base" / "config.json"
    path.write_text("\ufeff" + path.read_text(), encoding="utf-8")
    expect(run(), f"{path}: begins with a byte order mark, which JSON has not; save it as UTF-8 without one.")


def test_a_base_without_configuration_or_tokenizer(job: Job, run: Run) -> None:
    for name in ("tokenizer.json", "config.json"):
        (job.folder / "base" / name).unlink()
        expect(run(), str(job.folder / "base"), name.removesuffix(".json"))


def test_a_base_of_an_unknown_kind(job: Job, run: Run) -> None:
    (job.folder / "base" / "config.json").write_text('{"model_type": "nonesuch"}')
    expect(run(), "transformers cannot read config.json")


def test_experts_of_modules_in_memory(toy_job: ToyJob) -> None:
    config = QuantConfig(group_size=16)

    def refused(error: type[EpmqError], message: str, **experts: Any) -> None:
        with pytest.raises(error, match=message):
            quantize(toy_job.merged, {**toy_job.experts, **experts}, toy_job.calibration, config)

    state = toy_job.experts["task1"].state_dict()
    name = "blocks.1.up.weight"
    refused(SourceError, f"expert 'task1'.*'{name}' has shape", task1={**state, name: torch.ones(3, 3)})
    refused(SourceError, "expert 'task1'.*lacks tensor", task1={k: v for k, v in state.items() if k != name})
    refused(SourceError, "expert 'task1'.*extra tensor 'more'", task1={**state, "more": torch.ones(1)})
    for value in (float("nan"), float("inf")):
        bad = state[name].clone()
        bad[0, 0] = value
        refused(SourceError, f"expert 'task1': tensor '{name}' holds NaN or Inf", task1={**state, name: bad})
    refused(SourceError, "expert 'task1': expected a path", task1=3)
    refused(SourceError, "there is no such file", task1="/nowhere/at/all")
    with torch.no_grad():
        toy_job.merged.get_parameter(name)[0, 0] = float("nan")
    refused(SourceError, f"merged model: tensor '{name}' holds NaN or Inf")


# -- calibration -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", ["", "\n\n", '{"text": ""}\n{"text": " "}\n'])
def test_an_empty_calibration_file(content: str, job: Job, run: Run) -> None:
    (job.folder / "reviews.jsonl").write_text(content)
    expect(run(), "reviews.jsonl: holds no calibration text")


@pytest.mark.parametrize("section", ["calibration", "evaluation"])
def test_a_length_that_leaves_nothing_of_a_text(
    section: str, job: Job, run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Tokenizers then cut nothing, so that texts were as long as they are."""
    job.recipe[section]["max_length"] = 2  # [CLS] and [SEP]
    told = f"{section}.max_length=2: the tokenizer puts 2 tokens of its own around every text"
    if section == "calibration":
        expect(run(), told, "use 3 or more")
    else:
        expect(in_process(capsys, "eval", job.folder / "base", "--recipe", job.write()), told)


def test_a_byte_order_mark_before_texts_is_passed_over(job: Job, run: Run, tmp_path: Path) -> None:
    assert run("quantize", tmp_path / "plain").code == 0
    path = job.folder / "reviews.jsonl"
    path.write_text("\ufeff" + path.read_text(), encoding="utf-8")
    assert run("quantize", tmp_path / "marked").code == 0
    plain, marked = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("plain", "marked"))
    assert plain == marked


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("not json", "reviews.jsonl, line 2: not JSON"),
        ("[1]", "reviews.jsonl, line 2: expected a JSON object, got list"),
        ('{"txt": "a"}', "reviews.jsonl, object 2: it has no text under the key 'text'"),
        ('{"text": 3}', "reviews.jsonl, object 2: it has no text under the key 'text'"),
        ("[" * 99999, "reviews.jsonl, line 2: not JSON"),
    ],
    ids=["words", "list", "other key", "number", "deep"],
)
def test_a_calibration_line_that_is_no_text(line: str, message: str, job: Job, run: Run) -> None:
    (job.folder / "reviews.jsonl").write_text(f'{{"text": "w1 w2"}}\n{line}\n')
    expect(run(), message)


def test_a_task_without_expert_and_an_expert_without_task(job: Job, run: Run) -> None:
    tasks = job.recipe["calibration"]["tasks"]
    tasks["extra"] = "reviews.jsonl"
    expect(run(), "recipe.yaml: calibration.tasks.extra: there is no expert of that name; known are intents, reviews.")
    del tasks["extra"], tasks["reviews"]
    expect(run(), "expert 'reviews' has no calibration data under that task name")
    del tasks["intents"]
    expect(run(), "the calibration data names no task")


def test_calibration_of_modules_in_memory(toy_job: ToyJob) -> None:
    config = QuantConfig(group_size=16)

    def refused(error: type[EpmqError], message: str, calibration: Any) -> None:
        with pytest.raises(error, match=message):
            quantize(toy_job.merged, toy_job.experts, calibration, config)

    whole = toy_job.calibration
    refused(CalibrationError, "names no task", {})
    refused(CalibrationError, "task 'task1': its calibration set is empty", {**whole, "task1": []})
    refused(CalibrationError, "task 'more' has calibration data but no expert", {**whole, "more": whole["task0"]})
    refused(
        CalibrationError, "expert 'task2' has no calibration data", {t: b for t, b in whole.items() if t != "task2"}
    )
    nothing = [{"input_ids": torch.zeros(0, 4, dtype=torch.int64)}]
    refused(CalibrationError, "task 'task1' has no calibration rows", {**whole, "task1": nothing})
    bare = [torch.zeros(2, 4, dtype=torch.int64)]
    refused(CalibrationError, "task 'task1': batch 0 is a Tensor; give a dict", {**whole, "task1": bare})


def test_arguments_of_another_kind(toy_job: ToyJob) -> None:
    def refused(error: type[EpmqError], message: str, **given: Any) -> None:
        known = {"model": toy_job.merged, "experts": toy_job.experts, "calibration": toy_job.calibration}
        with pytest.raises(error, match=message):
            quantize(**{**known, **given})

    refused(SourceError, "merged model: expected a module, got str; load it first", model="merged")
    rounded = quantize(toy_job.merged, None, {}, QuantConfig(method="rtn", group_size=16)).model
    refused(SourceError, r"merged model: its blocks\.\S+ is quantized already; give the model", model=rounded)
    refused(SourceError, "merged model: tensor '.*' is on the meta device", model=meta_copy(toy_job.merged))
    refused(SourceError, "experts must map a task to each expert, got a list", experts=[toy_job.base])
    batches = toy_job.calibration["task0"]
    refused(CalibrationError, "calibration must map a task to its batches, got a list", calibration=batches)
    refused(ConfigError, "config: expected a QuantConfig, got a dict", config={"bits": 4})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_an_activation_that_is_not_finite(alpha: float, value: float, toy_job: ToyJob) -> None:
    class Spoiled(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.where(x > 1.5, torch.full_like(x, value), x)

    for model in (toy_job.merged, *toy_job.experts.values()):
        for block in model.blocks:  # type: ignore[union-attr]
            block.norm = nn.Sequential(block.norm, Spoiled())
    config = QuantConfig(group_size=16, alpha=alpha)
    with pytest.raises(NumericalError, match=r"blocks\.0\.query: an activation of task 'task0' is NaN or Inf"):
        quantize(toy_job.merged, toy_job.experts, toy_job.calibration, config)


def test_an_activation_that_is_not_finite_inside_an_expert(toy_job: ToyJob) -> None:
    with torch.no_grad():
        toy_job.experts["task1"].get_parameter("blocks.0.norm.weight").mul_(1e38)
    with pytest.raises(NumericalError, match=r"blocks\.0\.query: an activation inside expert 'task1' is NaN or Inf"):
        quantize(toy_job.merged, toy_job.experts, toy_job.calibration, QuantConfig(group_size=16))


def test_a_weight_that_makes_the_target_overflow(toy_job: ToyJob) -> None:
    with torch.no_grad():
        toy_job.experts["task1"].get_parameter("blocks.0.up.weight").mul_(1e38)
    with pytest.raises(NumericalError, match=r"blocks\.0\.up: the targets of task 'task1' are NaN or Inf"):
        quantize(toy_job.merged, toy_job.experts, toy_job.calibration, QuantConfig(group_size=16))


# -- output folders --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["merge", "quantize"])
def test_an_output_folder_that_is_not_empty(verb: str, run: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    expect(run(verb), f"{out}: the output folder is not empty")
    assert [path.name for path in out.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("verb", ["merge", "quantize"])
def test_an_output_folder_below_a_file(verb: str, run: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    expect(run(verb, tmp_path / "file" / "out"), "the output folder cannot be made")
    expect(run(verb, tmp_path / "file"), "there is a file of that name")


def test_the_output_folder_is_looked_at_before_any_work(job: Job, run: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    job.expert("reviews").write_bytes(b"broken")
    expect(run("quantize", tmp_path / "file" / "out"), "the output folder cannot be made")


def test_a_json_file_that_cannot_be_written(job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("x")
    done = in_process(
        capsys, "eval", job.folder / "base", "--recipe", job.write(), "--json", tmp_path / "file" / "row.json"
    )
    assert done.code == 2
    assert "row.json: the file cannot be written" in done.err
    assert done.out == ""  # before anything is scored
    expect(
        in_process(capsys, "eval", job.folder / "base", "--recipe", job.write(), "--json", tmp_path),
        f"{tmp_path}: there is a folder of that name",
    )
    expect(
        in_process(capsys, "eval", job.folder / "base", "--recipe", job.write(), "--json", tmp_path / ("x" * 300)),
        "the file cannot be written (File name too long)",
    )


# -- evaluation ------------------------------------------------------------------------------------------------------


def test_evaluation_of_things_that_cannot_be_scored(
    job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def evaluate(folder: Path) -> Done:
        return in_process(capsys, "eval", folder, "--recipe", job.write())

    expect(evaluate(tmp_path / "nowhere"), "there is no such file or folder")
    expect(evaluate(job.folder / "experts" / "reviews"), "config.json")
    (job.folder / "reviews.jsonl").write_text('{"text": "w1", "label": "good"}\n')
    expect(evaluate(job.folder / "base"), "reviews.jsonl, object 1: it has no whole number under the key 'label'")
    (job.folder / "reviews.jsonl").write_text("")
    expect(evaluate(job.folder / "base"), "reviews.jsonl: holds no example")
