"""The papers' benchmarks on tiny stand-ins, through the code that the real ones run; the recipes themselves."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from checkpoints import ROOT, in_process, write_tokenizer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import epmq
from epmq.errors import CalibrationError, ConfigError, ModelError, SourceError
from epmq.language import text_perplexity
from epmq.linear import QuantLinear
from epmq.papers.clip import PROMPTS, ClipBenchmark
from epmq.papers.glue import GlueBenchmark, number_in, spearman
from epmq.papers.hub import hub_rows, model_folder
from epmq.papers.run import RESULTS_NAME, read_results, run_paper, tables
from epmq.papers.settings import DataSet, Paper, read_paper

transformers = pytest.importorskip("transformers")
images = pytest.importorskip("PIL.Image")

RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
# Templates per task of the protocol (fusion_bench).
TEMPLATES = {
    "sun397": 2, "stanford-cars": 8, "resisc45": 18, "eurosat": 3, "svhn": 1, "gtsrb": 3, "mnist": 1, "dtd": 8,
    "oxford_flowers102": 1, "pcam": 1, "fer2013": 6, "oxford-iiit-pet": 1, "stl10": 2, "cifar100": 18, "cifar10": 18,
    "food101": 1, "fashion_mnist": 2, "emnist_letters": 1, "kmnist": 1, "rendered-sst2": 1,
}  # fmt: skip
CLASSES = {
    "resisc45": 45, "eurosat": 10, "svhn": 10, "gtsrb": 43, "mnist": 10, "dtd": 47, "pcam": 2, "fer2013": 7,
    "stl10": 10, "fashion_mnist": 10, "emnist_letters": 26, "kmnist": 10, "rendered-sst2": 2,
}  # fmt: skip


class Split(list[dict[str, Any]]):
    """Rows with a description of their label, as ``datasets`` has one."""

    features: Mapping[str, Any] = {"label": SimpleNamespace(names=["old_mill", "lake", "office"])}


def varied(model: nn.Module, spread: float = 0.1) -> Any:
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(spread * parameter.std().nan_to_num(0.1) * torch.randn(parameter.shape))
    return twin


def lively(model: nn.Module) -> Any:
    """Weights of a size at which a random model tells its inputs apart."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape) / min(parameter.shape) ** 0.5)
    return model.eval()


def rows_from(splits: Mapping[str, list[dict[str, Any]]], wanted: list[tuple[str, Any]] | None = None) -> Any:
    """``rows`` of the papers from rows in memory by "path/split"; notes what was asked for."""

    def rows(data: DataSet, split: str, seed: int | None) -> Iterable[Mapping[str, Any]]:
        if wanted is not None:
            wanted.append((f"{data.path}/{split}", seed))
        return splits[f"{data.path}/{split}"]

    return rows


def written(folder: Path, paper: Mapping[str, Any]) -> Path:
    path = folder / "paper.yaml"
    path.write_text(yaml.safe_dump(dict(paper)))
    return path


# -- CLIP ------------------------------------------------------------------------------------------------------------


def picture(tint: int) -> Any:
    pixels = (torch.rand(14, 18, 3) * 80).to(torch.uint8)
    pixels[..., tint % 3] += 100
    return images.fromarray(pixels.numpy())


@pytest.fixture
def clip_job(tmp_path: Path) -> tuple[dict[str, Any], dict[str, list[dict[str, Any]]]]:
    """A CLIPModel with tokenizer and processor, two tuned image towers as published, and their data."""
    text = {
        "vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48,
        "max_position_embeddings": 40, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3,
    }  # fmt: skip
    vision = {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "image_size": 12,
        "patch_size": 4,
    }  # fmt: skip
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
    base: Any = lively(transformers.CLIPModel(config))
    base.save_pretrained(tmp_path / "base")
    write_tokenizer(
        tmp_path / "base", ["a", "photo", "of", "the", "number", ":", "old", "mill", "lake", "office", *"0123456789"]
    )
    processor = transformers.CLIPImageProcessor(size={"shortest_edge": 12}, crop_size={"height": 12, "width": 12})
    processor.save_pretrained(tmp_path / "base")
    splits: dict[str, list[dict[str, Any]]] = {}
    paper: dict[str, Any] = {
        "title": "tiny", "kind": "clip", "base": str(tmp_path / "base"), "experts": {}, "data": {},
        "merge": {"method": "task_arithmetic", "scaling": 0.3}, "examples": 8, "batch_size": 5, "group_size": 16,
        "rows": [{"method": "pretrained"}, {"method": "expert"}, {"method": "merged"}, {"method": "rtn", "bits": 4},
                 {"method": "epmq-paper", "bits": 4}, {"method": "epmq-closed", "bits": 4}],
    }  # fmt: skip
    for task, classes in (("mnist", 10), ("sun397", 3)):
        tower = transformers.CLIPVisionModel(base.config.vision_config).eval()
        inner = getattr(tower, "vision_model", tower)
        inner.load_state_dict(varied(base.vision_model).state_dict())
        tower.save_pretrained(tmp_path / task)
        paper["experts"][task], paper["data"][task] = str(tmp_path / task), {"path": task}
        for split, count in (("train", 10), ("test", 12)):
            labels = [i % classes for i in range(count)]
            splits[f"{task}/{split}"] = Split({"image": picture(i), "label": i} for i in labels)
    return paper, splits


def test_clip_from_folders_to_the_table(clip_job: Any, tmp_path: Path) -> None:
    content, splits = clip_job
    content["published"] = [{"method": "epmq-paper", "bits": 4, "average": 73.6, "source": "the paper"}]
    paper = read_paper(written(tmp_path, content))
    asked: list[tuple[str, Any]] = []
    results = run_paper(paper, tmp_path / "out", rows=rows_from(splits, asked))
    assert [(row["method"], row["bits"]) for row in results["rows"]] == [(row.method, row.bits) for row in paper.rows]
    assert {(name, seed) for name, seed in asked if name.endswith("train")} == {
        ("mnist/train", 42),
        ("sun397/train", 42),
    }
    assert {seed for name, seed in asked if name.endswith("test")} == {None}
    benchmark = ClipBenchmark(paper, rows_from(splits))
    whole: Any = transformers.CLIPModel.from_pretrained(content["base"]).eval()
    for row in results["rows"][:3]:
        for task in ("mnist", "sun397"):
            assert row["tasks"][task] == by_hand(whole, benchmark, row["method"], task, splits), (row["method"], task)
    text = tables(paper, results)
    average = next(row["average"] for row in results["rows"] if row["method"] == "epmq-paper")
    assert f"| epmq-paper | 4 | **{average:.2f}** | 73.6 | the paper |" in text
    assert "not measured" not in text
    # What is there is not made again, and other settings are not mixed in.
    again = run_paper(paper, tmp_path / "out", rows=rows_from({}))
    assert again == json.loads((tmp_path / "out" / RESULTS_NAME).read_text()) == results
    with pytest.raises(ConfigError, match="made with other settings"):
        run_paper(paper.model_copy(update={"examples": 4}), tmp_path / "out", rows=rows_from(splits))


def by_hand(whole: Any, benchmark: Any, method: str, task: str, splits: Any) -> float:
    """Accuracy from CLIPModel's own logits, with the tower that a row is about in its place."""
    clip = copy.deepcopy(whole)
    if method == "expert":
        state = load_file(Path(benchmark.paper.experts[task]) / "model.safetensors")
        clip.vision_model.load_state_dict({name.removeprefix("vision_model."): t for name, t in state.items()})
    if method == "merged":
        towers = {t: epmq.sources.open_source(Path(p)) for t, p in benchmark.paper.experts.items()}
        merged = {
            name: tensor + 0.3 * sum(_tower(source, name) - tensor for source in towers.values())
            for name, tensor in whole.vision_model.state_dict().items()
        }
        clip.vision_model.load_state_dict(merged)
    names = [str(i) for i in range(10)] if task == "mnist" else ["old mill", "lake", "office"]
    templates = ['a photo of the number: "{}".'] if task == "mnist" else ["a photo of a {}.", "a photo of the {}."]
    pixels = benchmark.processor(images=[row["image"] for row in splits[f"{task}/test"]], return_tensors="pt")
    logits: Any = 0.0
    with torch.no_grad():
        per_template = []
        for template in templates:
            inputs = benchmark.tokenizer([template.format(n) for n in names], padding=True, return_tensors="pt")
            out = clip(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], **pixels)
            per_template.append(out)
        mean = torch.stack([out.text_embeds for out in per_template]).mean(0)
        logits = per_template[0].image_embeds @ (mean / mean.norm(dim=1, keepdim=True)).T
        if len(templates) == 1:
            assert torch.equal(logits.argmax(1), per_template[0].logits_per_image.argmax(1))
    labels = torch.tensor([row["label"] for row in splits[f"{task}/test"]])
    return 100.0 * int((logits.argmax(1) == labels).sum()) / len(labels)


def _tower(source: Any, name: str) -> Tensor:
    found: Tensor = source.tensor(name if name in source.keys() else f"vision_model.{name}")
    return found


def test_the_command_prints_what_is_there(clip_job: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path, clip_job[0])
    done = in_process(capsys, "paper", path, "--out", tmp_path / "out", "--table")
    assert done.code == 0
    assert done.out.count("not measured") == 6
    assert not (tmp_path / "out").exists()
    done = in_process(capsys, "paper", tmp_path / "absent.yaml", "--out", tmp_path / "out")
    assert (done.code, done.err) == (
        2,
        f"epmq: {tmp_path}/absent.yaml: the file cannot be read (No such file or directory).\n",
    )


def without_prompts(paper: Any) -> None:
    paper["experts"]["own"] = paper["base"]
    paper["data"]["own"] = {"path": "own"}


LACKS: dict[str, tuple[Callable[[Any, Any], Any], type[Exception], str]] = {
    "column": (
        lambda paper, splits: paper["data"]["mnist"].update(image="picture"),
        CalibrationError,
        "mnist, train: there is no column 'picture'; it has image, label",
    ),
    "rows": (lambda paper, splits: splits["mnist/train"].clear(), CalibrationError, "mnist, train: it has no rows"),
    "classes": (
        lambda paper, splits: paper["data"]["sun397"].update(label="name"),
        CalibrationError,
        "does not name the classes of 'name'",
    ),
    "expert": (
        lambda paper, splits: paper["experts"].update(mnist=paper["base"] + "/none"),
        ModelError,
        "neither a folder nor a hub id",
    ),
    "prompts": (lambda paper, splits: without_prompts(paper), CalibrationError, "task 'own' has no prompts"),
}


@pytest.mark.parametrize("lack", LACKS)
def test_what_a_benchmark_lacks_is_named(clip_job: Any, tmp_path: Path, lack: str) -> None:
    change, error, message = LACKS[lack]
    content, splits = clip_job
    change(content, splits)
    paper = read_paper(written(tmp_path, content))
    with pytest.raises(error, match=re.escape(message)):
        run_paper(paper, tmp_path / "out", rows=rows_from(splits))
    assert not (tmp_path / "out").exists()


def test_an_expert_that_lacks_a_tensor_is_named(clip_job: Any, tmp_path: Path) -> None:
    content, splits = clip_job
    file = tmp_path / "mnist" / "model.safetensors"
    tensors = load_file(file)
    name = next(key for key in tensors if key.endswith("layers.1.mlp.fc1.weight"))
    del tensors[name]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(
        SourceError, match=r"mnist.*encoder\.layers\.1\.mlp\.fc1\.weight', which the base has, is missing"
    ):
        ClipBenchmark(read_paper(written(tmp_path, content)), rows_from(splits))


# -- GLUE ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def glue_job(tmp_path: Path) -> tuple[Paper, dict[str, list[dict[str, Any]]]]:
    config = transformers.T5Config(
        vocab_size=40, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, dropout_rate=0.0, pad_token_id=0,
        decoder_start_token_id=0, eos_token_id=3,
    )  # fmt: skip
    base = lively(transformers.T5ForConditionalGeneration(config))
    words = ["Indicate", "sentence", "Consider", "scale", "good", "bad", "long", "short", *"0123456789"]
    splits: dict[str, list[dict[str, Any]]] = {}
    paper: dict[str, Any] = {
        "title": "tiny", "kind": "glue", "base": str(tmp_path / "base"), "experts": {}, "data": {},
        "merge": {"method": "ties", "dialect": "fusion_bench", "density": 20, "scaling": 0.3}, "examples": 6,
        "batch_size": 4, "generated": 5, "max_length": 30, "group_size": 16,
        "rows": [{"method": "expert"}, {"method": "epmq-closed", "bits": 4}],
    }  # fmt: skip
    base.save_pretrained(tmp_path / "base")
    write_tokenizer(tmp_path / "base", words)
    for task, columns in (("cola", ["sentence"]), ("stsb", ["sentence1", "sentence2"])):
        varied(base).save_pretrained(tmp_path / task)
        paper["experts"][task], paper["data"][task] = str(tmp_path / task), {"path": task}
        for split in ("train", "test"):
            splits[f"{task}/{split}"] = [
                {column: " ".join(words[int(i)] for i in torch.randint(4, 18, (3 + number % 4,))) for column in columns}
                for number in range(7)
            ]
    return read_paper(written(tmp_path, paper)), splits


def test_glue_from_folders_to_exact_match(glue_job: Any, tmp_path: Path) -> None:
    paper, splits = glue_job
    benchmark = GlueBenchmark(paper, rows_from(splits))
    expert: Any = transformers.T5ForConditionalGeneration.from_pretrained(paper.experts["cola"]).eval()
    answers = []
    for row in splits["cola/test"]:
        text = benchmark.prompts["cola"]["prompt"].format(**row)
        ids = benchmark.tokenizer(text, return_tensors="pt")["input_ids"]
        out = expert.generate(input_ids=ids, max_new_tokens=5, num_beams=1, do_sample=False)
        answers.append(benchmark.tokenizer.decode(out[0], skip_special_tokens=True))
    # The labels are what the expert itself says, but for the last two.
    known = list(dict.fromkeys(answers))
    benchmark.prompts["cola"]["answers"] = [*known, "never said"]
    for row, answer in zip(splits["cola/test"], answers, strict=True):
        row["label"] = known.index(answer)
    for row in splits["cola/test"][-2:]:
        row["label"] = len(known)
    assert benchmark.score is not None
    assert benchmark.score(expert, "cola") == pytest.approx(100.0 * 5 / 7)


def test_glue_is_calibrated_on_prompts_and_the_experts_own_answers(glue_job: Any) -> None:
    paper, splits = glue_job  # without a label in sight
    benchmark = GlueBenchmark(paper, rows_from(splits))
    calibration = benchmark.calibration()
    assert {task: sum(len(b["input_ids"]) for b in batches) for task, batches in calibration.items()} == {
        "cola": 6,
        "stsb": 6,
    }
    expert: Any = transformers.T5ForConditionalGeneration.from_pretrained(paper.experts["stsb"]).eval()
    for batch in calibration["stsb"]:
        ids, mask = batch["decoder_input_ids"], batch["decoder_attention_mask"]
        assert bool((ids[:, 0] == 0).all())
        assert bool(mask[:, 0].all())
        with torch.no_grad():
            said = expert(**batch).logits.argmax(-1)
        # Greedy: what the expert says next at every position that counts is what stands there.
        follows = mask[:, 1:].bool()
        assert torch.equal(said[:, :-1][follows], ids[:, 1:][follows])
    result = epmq.quantize(benchmark.merged, benchmark.experts, calibration, epmq.QuantConfig(group_size=16))
    assert sum(isinstance(module, QuantLinear) for module in result.model.modules()) == 32
    assert not result.report["notes"]


def test_glue_runs_whole(glue_job: Any, tmp_path: Path) -> None:
    paper, splits = glue_job
    for name, rows in splits.items():
        for number, row in enumerate(rows):
            row["label"] = number % 2 if name.startswith("cola") else 0.5 * number
    results = run_paper(paper, tmp_path / "out", rows=rows_from(splits))
    assert [row["method"] for row in results["rows"]] == ["expert", "epmq-closed"]
    assert all(set(row["tasks"]) == {"cola", "stsb"} for row in results["rows"])


def test_spearman_is_scipys() -> None:
    stats = pytest.importorskip("scipy.stats")
    for x in (torch.randn(50), torch.randint(0, 5, (50,)), torch.arange(50).flip(0)):
        y = torch.randint(0, 9, (50,)) + x
        assert spearman(x, y) == pytest.approx(float(stats.spearmanr(x, y).statistic), abs=1e-12)
    assert spearman(torch.ones(5), torch.arange(5)) == 0.0
    assert [number_in(text) for text in ("3.4", "4", "yes", "")] == [3.4, 4.0, 0.0, 0.0]


# -- language models -------------------------------------------------------------------------------------------------


def test_language_models_are_left_for_others_to_score(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(
        vocab_size=34, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=48, max_position_embeddings=64,
    )  # fmt: skip
    base = lively(transformers.LlamaForCausalLM(config))
    base.to(torch.bfloat16).save_pretrained(tmp_path / "base")
    write_tokenizer(tmp_path / "base")
    content: dict[str, Any] = {
        "title": "tiny", "kind": "causal", "base": str(tmp_path / "base"), "experts": {}, "data": {},
        "merge": {"method": "task_arithmetic", "scaling": 0.4}, "examples": 6, "batch_size": 4, "max_length": 12,
        "group_size": 16, "quantization": {"sym": True},
        "rows": [{"method": "merged"}, {"method": "epmq-closed", "bits": 4}],
    }  # fmt: skip
    splits = {}
    for task in ("math", "coding"):
        varied(base).to(torch.bfloat16).save_pretrained(tmp_path / task)
        content["experts"][task] = str(tmp_path / task)
        content["data"][task] = {"path": task, "template": "w1 {query} w2 {answer}"}
        splits[f"{task}/train"] = [{"query": f"w{i} w4", "answer": "w5 " * i} for i in range(1, 9)]
    paper = read_paper(written(tmp_path, content))
    results = run_paper(paper, tmp_path / "out", rows=rows_from(splits))
    words = tmp_path / "words.txt"
    words.write_text("w1 w2 w3")
    assert results["rows"] == []
    assert "| epmq-closed | 4 | not measured | – | |" in tables(paper, results)
    model: Any = epmq.load(tmp_path / "out" / "epmq-closed-4bit")
    assert type(model.model.layers[0].mlp.up_proj) is QuantLinear
    assert model.lm_head.weight.dtype == torch.bfloat16
    for name in ("merged", "epmq-closed-4bit"):
        assert text_perplexity(tmp_path / "out" / name, words)["scored"] == 4
    run_paper(paper, tmp_path / "out", rows=rows_from({}))  # what is there is not made again
    content["merge"]["scaling"] = 0.5
    with pytest.raises(ConfigError, match=r"results\.json: made with other settings than this paper's"):
        run_paper(read_paper(written(tmp_path, content)), tmp_path / "out", rows=rows_from(splits))
    content["data"]["math"].pop("template")
    with pytest.raises(ConfigError, match=r"data\.math\.template"):
        run_paper(read_paper(written(tmp_path, content)), tmp_path / "other", rows=rows_from(splits))


# -- recipes ---------------------------------------------------------------------------------------------------------


def test_the_recipes_are_there() -> None:
    assert [path.stem for path in RECIPES] == [
        "clip-vit-b32-ta8", "clip-vit-b32-ties8", "clip-vit-l14-ta20", "flan-t5-base-glue", "llama-3.1-8b",
    ]  # fmt: skip


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_say_what_the_protocol_says(path: Path, tmp_path: Path) -> None:
    paper = read_paper(path)
    assert paper.examples == 256
    assert list(paper.experts) == list(paper.data)
    for entry in paper.published:
        if entry.tasks:
            assert set(entry.tasks) == set(paper.data)
            # Both sides are rounded to a tenth (hundredth) of a percent at the coarsest.
            assert abs(sum(entry.tasks.values()) / len(entry.tasks) - entry.average) <= 0.1001, entry
    text = tables(paper, read_results(paper, tmp_path))
    assert text.count("not measured") >= len(paper.rows) - 1
    for entry in paper.published:
        assert entry.source in text


def test_prompts_are_the_protocols() -> None:
    prompts = yaml.safe_load(PROMPTS.read_text(encoding="utf-8"))
    assert {task: len(entry["templates"]) for task, entry in prompts.items()} == TEMPLATES
    assert {task: len(entry["classes"]) for task, entry in prompts.items() if "classes" in entry} == CLASSES
    for entry in prompts.values():
        assert all(template.count("{}") == 1 for template in entry["templates"])
        assert all(isinstance(name, str) for name in entry.get("classes", []))
        assert len(set(entry["templates"])) == len(entry["templates"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "vit"}, "kind: "),
        ({"example": 3}, "unknown key 'example'; did you mean 'examples'?"),
        ({"rows": [{"method": "gptq"}]}, "rows: method 'gptq' needs bits"),
        ({"rows": [{"method": "awq", "bits": 4}]}, "rows.0.method: "),
        ({"quantization": {"symmetric": True}}, "quantization: unknown key 'symmetric'"),
        ({"experts": {"a": "x", "b": "y"}}, "expert 'b' has no data"),
        ({"experts": {}}, "data.a has no expert of that name"),
    ],
    ids=str,
)
def test_papers_that_make_no_sense_are_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    content = {
        "title": "t", "kind": "clip", "base": "b", "experts": {"a": "x"}, "data": {"a": {"path": "p"}},
        "merge": {"method": "task_arithmetic"}, "rows": [{"method": "merged"}], **change,
    }  # fmt: skip
    path = written(tmp_path, content)
    with pytest.raises(ConfigError, match=re.escape(message)) as refusal:
        read_paper(path)
    assert str(path) in str(refusal.value)


def test_a_job_s_recipe_is_no_paper(tmp_path: Path) -> None:
    path = written(tmp_path, {"base": "b", "experts": {"a": "x"}, "merge": {"method": "task_arithmetic"}})
    with pytest.raises(ConfigError, match=re.escape(f"{path}: a recipe for epmq quantize, no paper's benchmark.")):
        read_paper(path)


# -- data sets -------------------------------------------------------------------------------------------------------


def test_rows_are_streamed_by_datasets(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="datasets is not installed; pip install 'epmq[papers]'")
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "train.jsonl").write_text("".join(json.dumps({"text": f"t{i}", "label": i}) + "\n" for i in range(50)))
    rows = hub_rows(DataSet(path=str(folder)), "train", None)
    assert isinstance(rows, datasets.IterableDataset)
    assert [row["label"] for row in rows] == list(range(50))
    drawn = [row["label"] for row in hub_rows(DataSet(path=str(folder)), "train", 42)]
    assert sorted(drawn) == list(range(50)) != drawn
    with pytest.raises(CalibrationError, match="split 'none' cannot be loaded"):
        list(hub_rows(DataSet(path=str(folder)), "none", None))


def test_a_model_that_is_nowhere_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelError, match="no/such model: neither a folder nor a hub id"):
        model_folder("no/such model")
