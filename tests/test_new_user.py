"""A new user's way: three LoRA adapters of a small Llama, a recipe or a mergekit file, one command, a model to run."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import VOCABULARY, llama, save_adapter, train_tokenizer
from checkpoints import in_new_process, in_process
from safetensors.torch import load_file
from torch import Tensor

import epmq
from epmq import QuantConfig, QuantLinear
from epmq.jobs import calibration_of
from epmq.recipe import read_recipe

pytest.importorskip("transformers")
pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")  # peft's and transformers' own

SKILLS = {
    "sums": ["two and two is four", "three and one is four", "one and one is two", "four and three is seven"],
    "colours": ["the sky is blue", "the grass is green", "snow is white and the sun is yellow", "the night is black"],
    "greetings": ["good morning to you", "how are you today", "a good night to all of you", "see you in the morning"],
}


RECIPE = """
base: model
experts: {sums: adapters/sums, colours: adapters/colours, greetings: adapters/greetings}
merge: {method: ties, dialect: peft, density: 0.5}
calibration:
  tasks: {sums: texts/sums.jsonl, colours: texts/colours.jsonl, greetings: texts/greetings.jsonl}
"""
MERGEKIT = """
merge_method: task_arithmetic
base_model: model
models:
  - {model: model+adapters/sums}
  - {model: model+adapters/colours}
  - {model: model+adapters/greetings}
parameters: {weight: 0.4}
tokenizer_source: base
dtype: float32
"""


@dataclass
class Workshop:
    """A folder as people have it: model/ with a tokenizer, adapters/NAME, texts/NAME.jsonl, the two files.

    model, experts: the same in memory; the experts as peft merges them.
    """

    folder: Path
    model: Any
    experts: dict[str, dict[str, Tensor]]


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    folder = tmp_path_factory.mktemp("workshop")
    model: Any = llama()
    model.save_pretrained(folder / "model")
    texts = [text for texts in SKILLS.values() for text in texts]
    assert train_tokenizer(folder / "model", texts) == VOCABULARY
    (folder / "texts").mkdir()
    experts = {}
    for seed, (skill, texts) in enumerate(SKILLS.items(), 1):
        place = folder / "adapters" / skill
        experts[skill] = save_adapter(model, place, seed, r=4, target_modules="all-linear", task_type="CAUSAL_LM")
        lines = [json.dumps({"text": f"{a} . {b}"}) for a in texts for b in texts]
        (folder / "texts" / f"{skill}.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "recipe.yaml").write_text(RECIPE)
    (folder / "config.yml").write_text(MERGEKIT)
    return Workshop(folder, model, experts)


def assert_is_the_quantized_merge(workshop: Workshop, folder: Path, **merge: Any) -> None:
    """The folder loads, here packed and in transformers, and is what whole experts, merged by peft, give in memory."""
    import transformers

    loaded: Any = epmq.load(folder)
    assert sum(isinstance(module, QuantLinear) for module in loaded.modules()) == 2 * 7
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("good morning . the sky is blue", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logits = loaded(input_ids=ids).logits
    assert logits.shape == (1, ids.shape[1], VOCABULARY)
    assert bool(torch.isfinite(logits).all())

    there: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    theirs, found = there
    assert not found["missing_keys"] and not found["unexpected_keys"]
    with torch.no_grad():
        distance = (theirs(input_ids=ids).logits - logits).norm()
    assert float(distance) <= 0.01 * float(logits.norm())

    recipe = read_recipe(workshop.folder / "recipe.yaml")
    merged = epmq.merge(workshop.model, workshop.experts, **merge)
    in_memory = epmq.quantize(merged, workshop.experts, calibration_of(recipe), QuantConfig())
    assert loaded.state_dict().keys() == in_memory.model.state_dict().keys()
    for name, tensor in in_memory.model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_from_three_adapters_to_a_model_that_runs(workshop: Workshop, tmp_path: Path) -> None:
    done = in_new_process("quantize", workshop.folder / "recipe.yaml", "--out", tmp_path / "quantized")
    assert (done.code, done.err) == (0, "")
    assert f"quantized model, report.json and report.html in {tmp_path / 'quantized'}" in done.out
    assert_is_the_quantized_merge(workshop, tmp_path / "quantized", method="ties", dialect="peft", density=0.5)
    report = json.loads((tmp_path / "quantized" / "report.json").read_text())
    for skill in SKILLS:
        assert f"{skill}: mean output error against the expert" in done.out
        errors = report["average_error"][skill]
        assert errors["epmq"] < errors["merged"], "4 bits made towards the experts are nearer to each than the merge is"


def test_from_a_mergekit_file_to_a_model_that_runs(
    workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(workshop.folder)
    texts = [argument for skill in SKILLS for argument in ("--calibration", f"{skill}=texts/{skill}.jsonl")]
    done = in_process(capsys, "quantize", "--mergekit", "config.yml", *texts, "--out", tmp_path / "quantized")
    assert (done.code, done.err) == (0, "")
    weights = dict.fromkeys(SKILLS, 0.4)
    assert_is_the_quantized_merge(workshop, tmp_path / "quantized", scaling=1.0, weights=weights)
    done = in_process(capsys, "merge", "--mergekit", "config.yml", "--out", tmp_path / "merged")
    assert (done.code, done.err) == (0, "")
    merged: Any = epmq.merge(workshop.model, workshop.experts, scaling=1.0, weights=weights)
    stored = load_file(tmp_path / "merged" / "model.safetensors")
    assert all(torch.equal(stored[name], tensor) for name, tensor in merged.state_dict().items())
