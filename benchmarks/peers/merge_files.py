"""The same files through both: mergekit's YAML read here and run there, LoRA adapters read here and merged by peft."""

from __future__ import annotations

import contextlib
import copy
import io
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from epmq.adapters import AdapterSource, open_model
from epmq.merge import MergedSource
from epmq.mergekit import read_mergekit
from epmq.sources import FileSource

ROUNDOFF = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8}
# Sums of three inputs in another order: two roundings for each input's product and sum.
LIMIT = 6.0


def models(folder: Path, dtype: torch.dtype) -> None:
    """A tiny Llama, two experts tuned from it, and an adapter over it."""
    import peft
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=5, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    base: Any = transformers.LlamaForCausalLM(config).to(dtype)
    base.save_pretrained(folder / "base")
    for name in ("A", "B"):
        expert = copy.deepcopy(base)
        with torch.no_grad():
            for parameter in expert.parameters():
                parameter.add_(0.02 * torch.randn(parameter.shape).to(dtype))
        expert.save_pretrained(folder / name)
    adapted: Any = peft.get_peft_model(base, peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "up_proj"]))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.1)
    adapted.save_pretrained(folder / "adapter")
    write_tokenizer(folder / "base")


def write_tokenizer(folder: Path) -> None:
    import transformers
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    words = Tokenizer(WordLevel({f"w{i}": i for i in range(64)}, unk_token="w0"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(folder)


def configurations(dtype: torch.dtype) -> Iterator[tuple[str, dict[str, Any]]]:
    """What of mergekit's YAML is read here. Trims only in float32: bfloat16 has too many equal magnitudes."""

    def one(method: str, a: Any, b: Any, second: str = "B", **rest: Any) -> dict[str, Any]:
        listed = [{"model": "A", "parameters": a}, {"model": second, "parameters": b}]
        return {"merge_method": method, "base_model": "base", "models": listed, **rest}

    half, third = {"weight": 0.5}, {"weight": 0.3}
    yield "task_arithmetic", one("task_arithmetic", half, third)
    yield (
        "task_arithmetic, lambda, normalize",
        one("task_arithmetic", half, third, parameters={"lambda": 0.7, "normalize": True}),
    )
    gradient = {"weight": [0, 0.9, 0.2]}
    yield "gradient", one("task_arithmetic", gradient, half)
    rules = {"weight": [{"filter": "mlp", "value": [1, 0.1]}, {"filter": "layers.2.", "value": 0.4}]}
    yield "filters, the rest from above", one("task_arithmetic", rules, {}, parameters={"weight": [0.25, 0.75]})
    yield (
        "lambda by filter",
        one("ties", half, half, parameters={"lambda": [{"filter": "self_attn", "value": 0.4}, {"value": 1.2}]}),
    )
    yield "ties", one("ties", half, third)
    yield "ties, not normalized", one("ties", half, {"weight": -0.3}, parameters={"normalize": "no"})
    yield "linear with the base", one("linear", half, third, parameters={"weight": 0.2})
    yield (
        "linear, base listed",
        {
            "merge_method": "linear",
            "base_model": "base",
            "models": [{"model": "base", "parameters": third}, {"model": "A", "parameters": half}],
        },
    )
    linear = one("linear", half, gradient)
    del linear["base_model"]
    yield "linear without base, gradient", linear
    yield "linear, not normalized", linear | {"parameters": {"normalize": False}}
    yield "out_dtype", one("task_arithmetic", half, third, dtype="float32", out_dtype="bfloat16")
    yield "dtype float32", one("ties", half, third, dtype="float32")
    yield "dtype bfloat16", one("task_arithmetic", half, third, dtype="torch.bfloat16")
    yield "tokenizer_source base", one("task_arithmetic", half, third, tokenizer_source="base")
    yield "adapter", one("task_arithmetic", half, third, second="base+adapter")
    if dtype == torch.float32:
        yield "ties, densities", one("ties", half | {"density": 0.3}, third | {"density": [0.2, 0.9]})
        yield "ties, density for all, rescale", one("ties", half, third, parameters={"density": 0.4, "rescale": True})


def run_mergekit(content: dict[str, Any], out: Path) -> FileSource:
    from mergekit.config import MergeConfiguration
    from mergekit.io.tasks import LoaderCache
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    options = MergeOptions(lora_merge_cache=str(out.with_name("lora")), copy_tokenizer=False, write_model_card=False)
    # It keeps files open under the names they had in other folders.
    LoaderCache().loaders.clear()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        run_merge(MergeConfiguration.model_validate(content), str(out), options)
    return FileSource(out)


def run_here(content: dict[str, Any], file: Path) -> MergedSource:
    file.write_text(yaml.safe_dump(content))
    read = read_mergekit(file)
    base = FileSource(read.base)
    return MergedSource(base, {name: open_model(path, name, base) for name, path in read.experts.items()}, read.merge)


def roundings(theirs: Tensor, ours: Tensor) -> float:
    """The largest difference in units of the roundoff of max(1, |value|)."""
    if theirs.dtype != ours.dtype or theirs.shape != ours.shape:
        return float("inf")
    a, b = theirs.double(), ours.double()
    scale = ROUNDOFF[ours.dtype] * b.abs().clamp(min=1)
    return float(((a - b).abs() / scale).max())


def compare_yaml(limit: float = LIMIT) -> tuple[int, int]:
    """Cases compared and cases in disagreement; prints a line per dtype of the models, and each disagreement."""
    total = failures = 0
    for dtype in (torch.float32, torch.bfloat16):
        with tempfile.TemporaryDirectory() as name, contextlib.chdir(name):
            models(Path(), dtype)
            cases, largest = 0, 0.0
            for title, content in configurations(dtype):
                theirs = run_mergekit(content, Path(f"out-{cases}").absolute())
                ours = run_here(content, Path("config.yml"))
                differences = {key: roundings(theirs.tensor(key), ours.tensor(key)) for key in ours.keys()}
                if set(theirs.keys()) != set(ours.keys()):
                    differences["names"] = float("inf")
                where = max(differences, key=lambda key: differences[key])
                cases += 1
                largest = max(largest, differences[where])
                if not differences[where] <= limit:
                    failures += 1
                    print(f"  DISAGREES  yaml, {dtype}, {title}: {differences[where]:.3g} roundings in {where}")
            total += cases
            print(f"{'mergekit':13}{f'YAML, Llama in {dtype}':36}{cases:>6}{largest:>10.2f} roundings")
    return total, failures


def compare_adapters() -> tuple[int, int]:
    """Adapters as sources against ``merge_and_unload``; every bit must agree."""
    import peft
    import transformers

    total = failures = 0
    for dtype in (torch.float32, torch.bfloat16):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            models(folder, dtype)
            base: Any = transformers.LlamaForCausalLM.from_pretrained(folder / "base", dtype=dtype)
            merged = peft.PeftModel.from_pretrained(base, str(folder / "adapter")).merge_and_unload()
            source = AdapterSource(folder / "adapter", FileSource(folder / "base"))
            wrong = [key for key, theirs in merged.state_dict().items() if not torch.equal(theirs, source.tensor(key))]
            total += 1
            failures += bool(wrong)
            if wrong:
                print(f"  DISAGREES  peft, adapter over {dtype}: {wrong[0]}")
        print(f"{'peft':13}{f'adapter on Llama in {dtype}':36}{1:>6}{len(wrong):>10} tensors differ")
    return total, failures
