"""Statistics that owners hand out in place of their data, and models made from them alone."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import TASKS, Job, in_process, make_job
from safetensors.torch import load_file, save_file
from test_resume import content, ended, in_child
from torch import Tensor, nn

import epmq
from epmq.collected import collect
from epmq.data import calibration_batches
from epmq.formats.statistics import MANIFEST_NAME, StatisticsReader, StatisticsWriter
from epmq.huggingface import skeleton_from_folder, tokenizer_from_folder
from epmq.names import NamedForModel
from epmq.recipe import read_recipe
from epmq.report import whole_report
from epmq.skeleton import fill, meta_copy
from epmq.sources import DictSource, FileSource
from epmq.statistics import Expert, Folded
from epmq.statistics_jobs import collect_to_folder
from epmq.streams import make_streams

pytest.importorskip("transformers")

LINEAR = "encoder.layer.1.attention.self.query"
OTHER, WIDE = "encoder.layer.1.attention.output.dense", "encoder.layer.1.output.dense"


@pytest.fixture(scope="module")
def owned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Job, dict[str, Path]]:
    """A job, and each owner's folder: made from a copy that holds the base, the own expert and the own data only."""
    place = tmp_path_factory.mktemp("owned")
    job = make_job(place / "job")
    folders = {}
    for task in TASKS:
        own = place / f"owner-{task}"
        shutil.copytree(job.folder / "base", own / "base")
        shutil.copytree(job.folder / "experts" / task, own / "experts" / task)
        shutil.copy(job.folder / f"{task}.jsonl", own)
        recipe = {
            "base": "base",
            "experts": {task: f"experts/{task}"},
            "calibration": {**job.recipe["calibration"], "tasks": {task: f"{task}.jsonl"}},
        }
        folders[task] = own / "statistics"
        written = Job(own, recipe).write()
        assert ended(in_child(lambda: collect_to_folder(read_recipe(written), task, folders[task]))) == 0  # noqa: B023
    for task in TASKS:
        (job.folder / f"{task}.jsonl").unlink()
    del job.recipe["calibration"], job.recipe["evaluation"]
    return job, folders


@pytest.fixture
def given(owned: tuple[Job, dict[str, Path]], tmp_path: Path) -> tuple[Job, dict[str, Path]]:
    job, folders = owned
    copies = {task: Path(shutil.copytree(folder, tmp_path / f"from-{task}")) for task, folder in folders.items()}
    return Job(job.folder, json.loads(json.dumps(job.recipe))), copies


def inputs_inside(job: Job, folder: Path, task: str) -> Tensor:
    """What the linear reads inside the expert's whole model, position by position."""
    owner = folder.parent
    model = skeleton_from_folder(owner / "base", set(FileSource(owner / "base").keys()))
    fill(model, "", NamedForModel(FileSource(owner / "experts" / task), model), torch.float32)
    tokenizer = tokenizer_from_folder(owner / "base")
    rows = []
    model.get_submodule(LINEAR).register_forward_pre_hook(lambda module, args: rows.append(args[0]))
    batches = calibration_batches(tokenizer, owner / f"{task}.jsonl", "text", 8, 16, 4, None)
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    return torch.cat([x[batch["attention_mask"] > 0] for x, batch in zip(rows, batches, strict=True)])


def test_the_solution_is_regmeans(
    owned: tuple[Job, dict[str, Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job, folders = owned
    damp = 0.01
    recipe = {**job.recipe, "quantization": {"method": "regmean", "bits": None, "damp": damp}}
    arguments = [part for folder in folders.values() for part in ("--statistics", folder)]
    done = in_process(capsys, "quantize", Job(job.folder, recipe).write(), *arguments, "--out", tmp_path / "out")
    assert (done.code, done.err) == (0, "")
    weights = {task: job.tensor(task, f"{LINEAR}.weight").double() for task in folders}
    base = load_file(job.folder / "base" / "model.safetensors")[f"{LINEAR}.weight"].double()
    anchor = base + 0.4 * sum(weight - base for weight in weights.values())
    pull, hessian = torch.zeros(32, 32, dtype=torch.float64), torch.zeros(32, 32, dtype=torch.float64)
    for task, folder in folders.items():
        x = inputs_inside(job, folder, task).double()
        second = x.T @ x / len(x)
        hessian += second
        pull += (weights[task] - anchor) @ second
    damped = hessian + damp * hessian.diagonal().mean() * torch.eye(32, dtype=torch.float64)
    wanted = anchor + torch.linalg.solve(damped, pull.T).T
    ours = load_file(tmp_path / "out" / "model.safetensors")[f"{LINEAR}.weight"].double()
    # The error of a solution in fp32 grows with the condition of what is solved.
    allowed = 10 * float(torch.linalg.cond(damped)) * torch.finfo(torch.float32).eps
    assert allowed < 0.01
    assert float((ours - wanted).norm() / wanted.norm()) < allowed


def test_a_quantized_merge_from_statistics_alone(
    given: tuple[Job, dict[str, Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job, folders = given
    job.recipe["quantization"] = {"bits": 4, "group_size": 16}
    one, other = folders.values()
    for name, order in (("out", (one, other)), ("turned", (other, one))):
        arguments = [part for folder in order for part in ("--statistics", folder)]
        done = in_process(capsys, "quantize", job.write(), *arguments, "--out", tmp_path / name)
        assert (done.code, done.err) == (0, "")
    assert content(tmp_path / "out") == content(tmp_path / "turned")
    epmq.load(tmp_path / "out")
    report = whole_report(tmp_path / "out")
    assert len(report["layers"]) == 2 * 6
    for errors in report["average_error"].values():
        assert 0.0 < errors["epmq"] < errors["merged"]
    assert report["notes"] == []


def test_a_dry_run_needs_no_data_either(
    given: tuple[Job, dict[str, Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job, folders = given
    before = sorted(tmp_path.iterdir())
    arguments = [part for folder in folders.values() for part in ("--statistics", folder)]
    start: list[str | Path] = ["quantize", job.write(), "--out", tmp_path / "out", "--dry-run"]
    done = in_process(capsys, *start, *arguments)
    assert (done.code, done.err) == (0, "")
    assert re.match(r"estimate: 2 blocks of .* s, .* min beside reading and writing; memory .* disk ", done.out)
    done = in_process(capsys, *start, *arguments[:2])
    assert (done.code, done.out) == (2, "") and "has no statistics; give the folder" in done.err
    assert sorted(tmp_path.iterdir()) == before


def test_what_a_folder_holds(owned: tuple[Job, dict[str, Path]]) -> None:
    job, folders = owned
    for task, folder in folders.items():
        manifest = json.loads((folder / MANIFEST_NAME).read_text())
        assert manifest["task"] == task
        assert manifest["about"] == {"examples": 8, "max_length": 16, "model": "BertModel"}
        assert len(manifest["groups"]) == 2 * 4
        facts = manifest["groups"][LINEAR]
        assert facts["linears"] == [LINEAR, LINEAR.replace("query", "key"), LINEAR.replace("query", "value")]
        x = inputs_inside(job, folder, task)
        assert facts["weight"] == len(x)
        reader = StatisticsReader(folder)
        assert reader.source.shape(f"{LINEAR}.hessian") == (32 * 33 // 2,)
        lower = torch.zeros(32, 32)
        lower[*torch.tril_indices(32, 32)] = reader.source.tensor(f"{LINEAR}.hessian")
        assert torch.allclose(lower, (x.T @ x).tril(), rtol=1e-5, atol=1e-4)
        assert torch.allclose(reader.source.tensor(f"{LINEAR}.sum_x"), x.sum(0), rtol=1e-5, atol=1e-4)
        assert sorted(path.name for path in folder.iterdir()) == ["model.safetensors", MANIFEST_NAME]


def change_manifest(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    manifest = json.loads((folder / MANIFEST_NAME).read_text())
    change(manifest)
    (folder / MANIFEST_NAME).write_text(json.dumps(manifest))


def change_tensor(folder: Path, key: str, change: Callable[[Tensor], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors[key])
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda f: (f / MANIFEST_NAME).unlink(), "not a folder of statistics, statistics.json is missing"),
        (lambda f: change_manifest(f, lambda m: m.update(task="reviews")), "a second folder for task 'reviews'"),
        (lambda f: change_manifest(f, lambda m: m.update(task="else")), "task 'else', which has no expert"),
        (lambda f: change_manifest(f, lambda m: m.update(version=2)), "is not epmq-statistics 1"),
        (lambda f: change_manifest(f, lambda m: m["groups"][LINEAR].update(weight=-1.0)), "has -1.0 rows"),
        (lambda f: change_manifest(f, lambda m: m["groups"][LINEAR].update(columns=31)), "is not fp32 of 496 entries"),
        (lambda f: change_manifest(f, lambda m: m["groups"].pop(LINEAR)), f"group '{LINEAR}' is not as in"),
        (
            lambda f: change_manifest(f, lambda m: m["groups"][LINEAR].update(sha256="0")),
            "was collected with other weights",
        ),
        (lambda f: change_manifest(f, lambda m: m.update(task=["intents"])), "task ['intents'] is no name"),
        (
            lambda f: change_manifest(f, lambda m: m["groups"][LINEAR].update(weight=10**400)),
            "must be a positive number",
        ),
        (lambda f: change_manifest(f, lambda m: m["groups"][LINEAR].update(columns=True)), "has True columns"),
        (lambda f: change_manifest(f, lambda m: m["groups"][LINEAR]["linears"].reverse()), "32 columns and linears"),
        (lambda f: change_manifest(f, lambda m: m["groups"][LINEAR].update(linears=[[1]])), "32 columns and linears"),
        (lambda f: change_tensor(f, f"{LINEAR}.hessian", lambda t: t.fill_(float("nan"))), "holds NaN or Inf"),
        (lambda f: change_tensor(f, f"{LINEAR}.hessian", lambda t: t.neg_()), "has a negative diagonal"),
    ],
    ids=[
        "no manifest",
        "twice",
        "unknown",
        "version",
        "rows",
        "columns",
        "group",
        "weights",
        "task",
        "large",
        "switch",
        "order",
        "kind",
        "nan",
        "negative",
    ],
)
def test_folders_that_are_refused(
    change: Callable[[Path], Any],
    told: str,
    given: tuple[Job, dict[str, Path]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    change(given[1]["intents"])
    check_refused(*given, tmp_path, capsys, told)


def check_refused(
    job: Job, folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], told: str
) -> None:
    """One line says why, and nothing is written."""
    job.recipe["quantization"] = {"group_size": 16}
    arguments = [part for folder in folders.values() for part in ("--statistics", folder)]
    done = in_process(capsys, "quantize", job.write(), *arguments, "--out", tmp_path / "out")
    assert (done.code, done.out) == (2, "")
    assert told in done.err and done.err.count("\n") == 1, done.err
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]


def joined(groups: dict[str, Any], first: str, second: str) -> None:
    groups[first]["linears"] += groups.pop(second)["linears"]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda g: joined(g, LINEAR, LINEAR.replace("1", "0")), f"group '{LINEAR}' holds linears of several blocks"),
        (lambda g: g[OTHER]["linears"].append(LINEAR), f"linear '{LINEAR}' is in two groups"),
        (lambda g: joined(g, LINEAR, WIDE), f"linear '{WIDE}' reads 32 columns, and 48 in this model"),
    ],
    ids=["blocks", "twice", "width"],
)
def test_groups_that_are_none_of_the_model(
    change: Callable[[dict[str, Any]], Any],
    told: str,
    given: tuple[Job, dict[str, Path]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In all folders alike."""
    for folder in given[1].values():
        change_manifest(folder, lambda m: change(m["groups"]))
    check_refused(*given, tmp_path, capsys, told)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (
            {"preset": "best"},
            "distill has no use for statistics, or needs the data themselves; remove distill or preset: best.",
        ),
        ({"anchor": "auto"}, "anchor: auto has no use for statistics"),
        ({"norm_refit": True}, "norm_refit has no use for statistics"),
        ({"method": "rtn"}, "method: rtn has no use for statistics"),
        ({"forward_dtype": "bfloat16"}, "forward_dtype has no use for statistics"),
    ],
)
def test_settings_that_need_the_data(
    settings: dict[str, Any],
    told: str,
    given: tuple[Job, dict[str, Path]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    job, folders = given
    job.recipe["quantization"] = settings
    done = in_process(capsys, "quantize", job.write(), "--statistics", folders["reviews"], "--out", tmp_path / "out")
    assert done.code == 2
    assert told in done.err


def test_every_expert_needs_its_folder(
    given: tuple[Job, dict[str, Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job, folders = given
    done = in_process(capsys, "quantize", job.write(), "--statistics", folders["reviews"], "--out", tmp_path / "out")
    assert done.code == 2
    assert "expert 'intents' has no statistics" in done.err
    done = in_process(capsys, "collect", job.write(), "--task", "intents", "--out", tmp_path / "out")
    assert done.code == 2
    assert "task 'intents': name its expert under experts: and its data under calibration:" in done.err


class Constant(nn.Module):
    """A block that reads a few of its columns alone: the others never vary."""

    level: Tensor
    varies: Tensor

    def __init__(self, width: int, varying: int):
        super().__init__()
        self.linear = nn.Linear(width, width)
        level = 20.0 + torch.arange(width) / 3
        self.register_buffer("level", level)
        self.register_buffer("varies", (torch.arange(width) < varying).float())

    def forward(self, hidden: Tensor) -> Tensor:
        moved: Tensor = hidden + 0.0 * self.linear(self.level + self.varies * hidden)
        return moved


def test_columns_that_never_vary_are_known_however_many_batches_there_are(tmp_path: Path) -> None:
    """A sum that were rounded at each batch would leave them a variance that is none."""
    width, varying = 32, 8
    torch.manual_seed(0)
    model = nn.Sequential(Constant(width, varying), Constant(width, varying))
    streams = make_streams({"own": [{"input": torch.randn(4, 256, width)} for _ in range(600)]}, torch.device("cpu"))
    tmp_path.joinpath("out").mkdir()
    writer = StatisticsWriter(tmp_path / "out")
    source = DictSource(model.state_dict())
    collect(meta_copy(model), source, "own", streams["own"], writer, lambda *_: None, torch.device("cpu"))
    writer.finish("own", {})
    reader = StatisticsReader(tmp_path / "out")
    for name in ("0.linear", "1.linear"):
        expert = Expert(source.tensor(f"{name}.weight"), source.tensor(f"{name}.bias"))
        problem = Folded.empty(0, width)
        problem.fold_inputs(reader.read(name, expert), "tokens")
        assert (problem.centred().hessian.diagonal() == 0).tolist() == [False] * varying + [True] * (width - varying)
