"""Checkpoints unlike what one expects, and what goes wrong around them: loaded, or refused with the reason."""

from __future__ import annotations

import json
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from adapters import llama, save_adapter, train_tokenizer
from checkpoints import Done, in_process
from safetensors.torch import load_file, save_file
from torch import Tensor

import epmq
from epmq import files
from epmq.errors import OutputError

pytest.importorskip("transformers")
pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")  # peft's and transformers' own

Model = dict[str, Tensor]
Change = Callable[[Model], Model]
EMBEDDING, HEAD, LINEAR = "model.embed_tokens.weight", "lm_head.weight", "model.layers.0.mlp.up_proj.weight"
TEXTS = ["two and two is four", "one and one is two", "three and one is four", "four and four is more"]


class Job:
    """A Llama as base, one expert, their mean as merged checkpoint, texts; ``run`` is the command line on them."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str], tied: bool):
        self.folder, self.capsys = folder, capsys
        model: Any = llama(tied=tied)
        model.save_pretrained(folder / "base")
        train_tokenizer(folder / "base", TEXTS)
        base = load_file(folder / "base" / "model.safetensors")
        torch.manual_seed(1)
        expert = {name: tensor + 0.02 * torch.randn(tensor.shape) for name, tensor in base.items()}
        self.models = {
            "base": base,
            "expert": expert,
            "merged": {name: (tensor + expert[name]) / 2 for name, tensor in base.items()},
        }
        self.recipe: dict[str, Any] = {
            "base": "base", "experts": {"sums": "expert"}, "merged": "merged",
            "calibration": {"tasks": {"sums": "sums.jsonl"}},
        }  # fmt: skip
        self.write_texts(TEXTS)

    def write_texts(self, texts: list[str]) -> None:
        (self.folder / "sums.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))

    def run(self, verb: str = "quantize") -> Done:
        for name, tensors in self.models.items():
            (self.folder / name).mkdir(exist_ok=True)
            save_file(tensors, self.folder / name / "model.safetensors", metadata={"format": "pt"})
        (self.folder / "recipe.yaml").write_text(yaml.safe_dump(self.recipe))
        done = in_process(self.capsys, verb, self.folder / "recipe.yaml", "--out", self.folder / "out")
        # Finished blocks stay, and are told of.
        kept = [self.folder / ".out.partial"] if "go on with --resume" in done.err else []
        assert list(self.folder.glob(".*partial*")) == kept
        if done.code:
            assert (done.code, done.out, done.err.count("\n")) == (2, "", 1), done.err
            assert not (self.folder / "out").exists()
        return done

    def result(self) -> Any:
        """The quantized model, which has run; the folder is cleared for the next."""
        done = self.run()
        assert (done.code, done.err) == (0, "")
        model = epmq.load(self.folder / "out")
        with torch.no_grad():
            assert bool(torch.isfinite(model(input_ids=torch.arange(8)[None]).logits).all())
        for path in (self.folder / "out").iterdir():
            path.unlink()
        return model


@pytest.fixture
def job(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Job:
    return Job(tmp_path, capsys, tied=False)


@pytest.fixture
def tied_job(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Job:
    return Job(tmp_path, capsys, tied=True)


# -- tied tensors -----------------------------------------------------------------------------------------------------


def both(tensors: Model) -> Model:
    return {**tensors, HEAD: tensors[EMBEDDING].clone()}


def only_head(tensors: Model) -> Model:
    return {HEAD if name == EMBEDDING else name: tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize("model", ["base", "expert", "merged"])
@pytest.mark.parametrize("change", [both, only_head])
def test_tied_tensors_may_have_either_name_or_both(change: Change, model: str, tied_job: Job) -> None:
    expected = tied_job.result().state_dict()
    tied_job.models[model] = change(tied_job.models[model])
    found = tied_job.result().state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("model", ["base", "expert", "merged"])
def test_tied_tensors_that_contradict_each_other(model: str, tied_job: Job) -> None:
    tied_job.models[model] = both(tied_job.models[model])
    tied_job.models[model][HEAD][0, 0] += 1
    if model == "base":
        del tied_job.recipe["merged"]
    done = tied_job.run()
    assert f"{tied_job.folder / model}: tensors '{EMBEDDING}' and '{HEAD}' are tied in the model but differ" in done.err


def test_a_head_that_is_missing_and_not_tied(job: Job) -> None:
    del job.models["merged"][HEAD]
    done = job.run()
    assert f"'{HEAD}', which {job.folder / 'merged'} lacks" in done.err


# -- dtypes and zeros -------------------------------------------------------------------------------------------------


def mixed(tensors: Model) -> Model:
    kinds = {"norm": torch.float16, "o_proj": torch.bfloat16, "down_proj": torch.float64}
    return {
        name: tensor.to(next((dtype for part, dtype in kinds.items() if part in name), tensor.dtype))
        for name, tensor in tensors.items()
    }


@pytest.mark.parametrize("model", ["base", "expert", "merged"])
def test_mixed_dtypes_are_kept(model: str, job: Job) -> None:
    job.models[model] = mixed(job.models[model])
    if model == "base":
        del job.recipe["merged"]
    state = job.result().state_dict()
    narrow = model != "expert"  # the result has the dtypes of what is quantized, not those of the experts
    assert state["model.norm.weight"].dtype == (torch.float16 if narrow else torch.float32)
    assert state["model.layers.0.self_attn.o_proj.scales"].dtype == (torch.bfloat16 if narrow else torch.float32)
    assert state["model.layers.0.mlp.down_proj.scales"].dtype == torch.float32
    assert state["model.layers.0.self_attn.v_proj.scales"].dtype == torch.float32


QUANTIZATION: list[dict[str, Any]] = [
    {}, {"method": "gptq", "sym": True}, {"method": "rtn"}, {"bits": 2, "scale_refit": True}, {"method": "regmean"},
]  # fmt: skip


@pytest.mark.parametrize("quantization", QUANTIZATION, ids=str)
def test_a_linear_of_zeros_stays_one(quantization: dict[str, Any], job: Job) -> None:
    job.recipe["quantization"] = quantization
    for tensors in job.models.values():
        tensors[LINEAR].zero_()
    layer = job.result().get_submodule(LINEAR.removesuffix(".weight"))
    assert torch.equal(layer(torch.eye(32)), torch.zeros(32, 48))


@pytest.mark.parametrize("model", ["expert", "merged"])
def test_a_model_of_zeros_runs(model: str, job: Job) -> None:
    job.models[model] = {name: torch.zeros_like(tensor) for name, tensor in job.models[model].items()}
    job.result()


# -- adapters, tokenizers, texts --------------------------------------------------------------------------------------


def test_an_adapter_for_another_base(job: Job) -> None:
    wider: Any = llama(layers=3)
    save_adapter(wider, job.folder / "adapter", target_modules=["q_proj"])
    job.recipe["experts"] = {"sums": "adapter"}
    done = job.run()
    assert "the adapter changes 'model.layers.2.self_attn.q_proj.weight', which" in done.err
    assert f"{job.folder / 'base'} does not have; it was made for another base" in done.err


def test_an_adapter_that_names_another_base_is_a_note(job: Job) -> None:
    model: Any = llama()
    save_adapter(model, job.folder / "adapter", target_modules=["q_proj"])
    path = job.folder / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": "org/other"}))
    job.recipe["experts"] = {"sums": "adapter"}
    done = job.run()
    assert done.code == 0
    assert "the adapter names 'org/other' as its base; it is applied to" in done.out


def test_an_adapter_as_base(job: Job) -> None:
    model: Any = llama()
    save_adapter(model, job.folder / "adapter", target_modules=["q_proj"])
    job.recipe["base"] = "adapter"
    assert "adapter: is an adapter, not a whole checkpoint" in job.run().err


def test_a_base_without_tokenizer(job: Job) -> None:
    for path in (job.folder / "base").glob("*token*"):
        path.unlink()
    assert f"{job.folder / 'base'}: holds no tokenizer files" in job.run().err


def test_texts_that_are_empty_after_tokenisation(job: Job) -> None:
    job.write_texts(["", ""])
    assert "sums.jsonl: holds no calibration text (after tokenisation nothing is left)" in job.run().err


# -- disks that are full ----------------------------------------------------------------------------------------------


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """No file may grow beyond ``size`` bytes: what a full disk does to a write, at a place that is known."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("verb", ["merge", "quantize"])
@pytest.mark.parametrize("size", [100, 9_000, 20_000])
def test_a_disk_that_fills_up(size: int, verb: str, job: Job) -> None:
    del job.recipe["merged"]
    job.run("merge")  # everything but the output is written
    for path in (job.folder / "out").iterdir():
        path.unlink()
    (job.folder / "out").rmdir()
    job.models = {}
    with file_size_limit(size):
        done = job.run(verb)
    assert f"{job.folder}/.out.partial" in done.err
    assert "the file would pass the size limit" in done.err
    assert "; raise the limit (ulimit -f)" in done.err


def test_a_failed_write_names_the_tensor(job: Job) -> None:
    from epmq.formats.shards import ShardWriter

    with file_size_limit(100), pytest.raises(OutputError) as caught, files.new_folder(job.folder / "out") as working:
        ShardWriter(working).add("a.weight", torch.zeros(100))
    assert "400 bytes are needed for tensor 'a.weight'" in str(caught.value)
    assert not list(job.folder.glob("*out*"))


def test_a_disk_that_is_too_small_is_seen_before_the_work(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = files.free_bytes(tmp_path / "not" / "there")
    files.check_space(tmp_path / "not" / "there", free // 2)
    with pytest.raises(OutputError, match=r"the output needs [0-9.]+ MiB, and [0-9.]+ MiB are free there; make room"):
        files.check_space(tmp_path, 2**62)
    del job.recipe["merged"]
    monkeypatch.setattr(files, "free_bytes", lambda target: 1000)
    done = job.run("merge")
    assert "out: the output needs 0.1 MiB, and 0.0 MiB are free there" in done.err
