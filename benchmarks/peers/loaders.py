"""Checkpoint folders between packages: ours loaded by others, theirs loaded by us; the table of docs/formats.md.

    loaders.py write FOLDER           tiny random models in every kind of file we write
    loaders.py read FOLDER            inside a peer's environment: loads what write left there
    loaders.py table FOLDER FILE.md   what was seen, between the markers of FILE.md

A file counts as loaded when no tensor is missing or left over, every quantized weight is bit for bit the one that was
written, and the logits are within 1 % of the dequantized model's. ``read`` also lets llm-compressor and GPTQModel
quantize a tiny model, where they are installed, and loads that with epmq. ``--case`` restricts both to one row. The
exit status is 1 when a cell differs from what this script expects of that pair of versions. PYTHONPATH holds the
checkout and its tests, whose tiny models these are.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # GPTQModel compiles otherwise, for minutes
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # with two cores it takes one, and its loader asks for two
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny import KEPT, answers, dequantized, tiny
from torch import Tensor

import epmq
from epmq import QuantLinear, replace_linear

REFERENCE = "reference.safetensors"
SEEN = "seen.json"
START, END = "<!-- loaders: begin -->", "<!-- loaders: end -->"
# Relative distance of logits; GPTQModel and optimum compute in float16 with kernels of their own.
MOST_DISTANCE = 0.01
OURS, BASE = "epmq.load", "base-llama"
# What the versions of setup.sh are known not to load: {part of a column: {expression on rows: beginning of a cell}}.
LIMITS: dict[str, dict[str, str]] = {
    "transformers 5.23": {r"4\+8bit-asym": "refused"},
    "transformers 5.17": {"ct-t5": "refused"},
    "transformers 4.57": {"-3bit-": "refused"},
    "optimum": {"4bit-.*-channel": "refused"},
}


@dataclass(frozen=True)
class Case:
    """One file: a tiny model of a kind, quantized so and stored so. others: bits of its down projections."""

    kind: str
    bits: int
    sym: bool
    group_size: int
    format: str = "compressed-tensors"
    dtype: torch.dtype = torch.float32
    others: int | None = None

    @property
    def name(self) -> str:
        group = "channel" if self.group_size == -1 else f"g{self.group_size}"
        form = {"compressed-tensors": "ct", "gptq": "gptq-v1" if self.sym else "gptq-v2"}[self.format]
        bits = f"{self.bits}" if self.others is None else f"{self.bits}+{self.others}"
        half = "" if self.dtype == torch.float32 or self.format == "gptq" else "-bf16"
        return f"{form}-{self.kind}-{bits}bit-{'sym' if self.sym else 'asym'}-{group}{half}"


CASES = [
    *(Case("llama", bits, True, group) for bits in (4, 8) for group in (32, -1)),
    Case("llama", 4, True, 32, dtype=torch.bfloat16),
    *(Case("llama", bits, False, 32) for bits in (4, 8)),
    *(Case("llama", bits, sym, 32) for bits in (3, 2) for sym in (True, False)),
    *(Case("llama", 4, sym, 32, others=8) for sym in (True, False)),
    *(Case(kind, 4, sym, 32) for kind in ("bert", "clip", "t5") for sym in (True, False)),
    *(Case("llama", bits, sym, 32, "gptq", torch.float16) for sym in (True, False) for bits in (4, 8, 3, 2)),
    *(Case("llama", 4, sym, -1, "gptq", torch.float16) for sym in (True, False)),
]


# -- write -----------------------------------------------------------------------------------------------------------


def write_case(case: Case, folder: Path) -> None:
    model = tiny(case.kind).to(case.dtype)
    if case.others is not None:
        replace_linear(model, case.others, case.group_size, case.sym, include=["down_proj"])
    replace_linear(model, case.bits, case.group_size, case.sym, exclude=KEPT)
    epmq.save(model, folder, format=case.format)
    reloaded = epmq.load(folder)
    reference = {n: m.weight for n, m in reloaded.named_modules() if isinstance(m, QuantLinear)}
    save_file({**reference, "logits": answers(dequantized(reloaded)).float()}, folder / REFERENCE)


def write(folder: Path) -> None:
    from checkpoints import write_tokenizer  # GPTQModel asks for a tokenizer

    tiny("llama").half().save_pretrained(folder / BASE)
    write_tokenizer(folder / BASE)
    for case in CASES:
        shutil.rmtree(folder / case.name, ignore_errors=True)
        write_case(case, folder / case.name)
        write_tokenizer(folder / case.name)
        print(case.name)


# -- read ------------------------------------------------------------------------------------------------------------


def has(package: str) -> bool:
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True


def auto_class(kind: str) -> Any:
    return {
        "llama": transformers.AutoModelForCausalLM,
        "bert": transformers.AutoModelForSequenceClassification,
        "t5": transformers.AutoModelForSeq2SeqLM,
        "clip": transformers.AutoModel,
    }[kind]


def load_with_transformers(case: Case, folder: Path) -> Any:
    # transformers 4 takes float16 for quantized files unless it is told.
    dtype = torch.float16 if case.format == "gptq" else "auto"
    model, info = auto_class(case.kind).from_pretrained(folder, output_loading_info=True, dtype=dtype)
    for key in ("missing_keys", "unexpected_keys"):
        if info[key]:
            raise Silent(f"{len(info[key])} {key.replace('_', ' ')}")
    return model


def load_with_gptqmodel(case: Case, folder: Path) -> Any:
    from gptqmodel import BACKEND, GPTQModel

    return GPTQModel.load(str(folder), backend=BACKEND.TORCH, device="cpu", dtype=torch.float16).model


class Silent(Exception):
    """Loaded without an error, and wrong."""


def weights_and_answers(model: Any, names: Iterable[str]) -> tuple[dict[str, Tensor], Tensor]:
    """Dequantized weights in float32, and logits."""
    layers = {name: model.get_submodule(name) for name in names}
    # GPTQModel's layers give their weights before the first forward, which repacks them; those of compressed-tensors
    # have one after it.
    weights = {n: m.dequantize_weight().T for n, m in layers.items() if hasattr(m, "dequantize_weight")}
    logits = answers(model).float()
    weights.update({n: m.weight for n, m in layers.items() if n not in weights})
    return {name: weight.detach().float() for name, weight in weights.items()}, logits


def judge(case: Case, folder: Path, load: Callable[[Case, Path], Any]) -> str:
    """What a loader makes of one file: ``ok``, or ``refused`` or ``WRONG`` with the reason."""
    reference = load_file(folder / REFERENCE)
    logits = reference.pop("logits")
    try:
        model = load(case, folder).eval()
        weights, found = weights_and_answers(model, reference)
        if not all(torch.equal(weights[name], wanted.float()) for name, wanted in reference.items()):
            raise Silent("weights differ")
        if not found.isfinite().all() or (found - logits).norm() > MOST_DISTANCE * logits.norm():
            raise Silent(f"logits differ by {float((found - logits).norm() / logits.norm()):.3f}")
    except Silent as error:
        return f"WRONG, no error: {error}"
    except ModuleNotFoundError:
        raise  # it tells of the environment, not of the file
    except Exception as error:
        return f"refused: {type(error).__name__}"
    return "ok"


def loaders() -> dict[str, tuple[str, Callable[[Case, Path], Any]]]:
    """{column: (format, loader)} of this environment."""
    here = f"transformers {version('transformers')}"
    found: dict[str, tuple[str, Callable[[Case, Path], Any]]] = {}
    if has("compressed-tensors"):
        column = f"{here}, compressed-tensors {version('compressed-tensors')}"
        found[column] = ("compressed-tensors", load_with_transformers)
    if has("gptqmodel"):
        found[f"GPTQModel {version('gptqmodel')}"] = ("gptq", load_with_gptqmodel)
        if has("optimum"):
            found[f"{here}, optimum {version('optimum')}"] = ("gptq", load_with_transformers)
    return found


def judge_ours(folder: Path, make: Callable[[Path], Callable[[], Any]]) -> str:
    """Let a package quantize a tiny Llama into ``folder``; what epmq makes of it, held to the package's own loader."""
    shutil.rmtree(folder, ignore_errors=True)
    load = make(folder)
    model = epmq.load(folder)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}
    found = answers(model).float()
    weights, logits = weights_and_answers(load().eval(), layers)
    for name, layer in layers.items():
        if not torch.equal(weights[name], layer.weight.float()):
            return f"WRONG: {name} differs"
    if len(layers) != 14 or (found - logits).norm() > MOST_DISTANCE * logits.norm():
        return f"WRONG: {len(layers)} linears, logits differ by {float((found - logits).norm() / logits.norm()):.3f}"
    return "ok"


def made_by_llmcompressor(bits: int, sym: bool, group: int, calibrated: bool) -> Callable[[Path], Callable[[], Any]]:
    def make(folder: Path) -> Callable[[], Any]:
        from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
        from datasets import Dataset
        from llmcompressor import oneshot
        from llmcompressor.modifiers.gptq import GPTQModifier
        from llmcompressor.modifiers.quantization import QuantizationModifier

        strategy = {"strategy": "channel"} if group == -1 else {"strategy": "group", "group_size": group}
        scheme = QuantizationScheme(
            targets=["Linear"], weights=QuantizationArgs(num_bits=bits, symmetric=sym, type="int", **strategy)
        )
        kind = GPTQModifier if calibrated else QuantizationModifier
        model = transformers.AutoModelForCausalLM.from_pretrained(folder.parent / BASE)
        data: dict[str, Any] = {}
        if calibrated:
            ids = torch.randint(3, 64, (8, 16), generator=torch.Generator().manual_seed(0)).tolist()
            texts = Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * 16] * 8})
            data.update(dataset=texts, num_calibration_samples=8, max_seq_length=16)
        oneshot(model=model, recipe=kind(config_groups={"group_0": scheme}, ignore=["lm_head"]), **data)
        model.save_pretrained(folder, save_compressed=True)

        def load() -> Any:
            return transformers.AutoModelForCausalLM.from_pretrained(folder)

        return load

    return make


def made_by_gptqmodel(bits: int, sym: bool, group: int, order: bool, form: str) -> Callable[[Path], Callable[[], Any]]:
    def make(folder: Path) -> Callable[[], Any]:
        from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

        settings = QuantizeConfig(
            bits=bits, group_size=group, sym=sym, desc_act=order, act_group_aware=False, format=form
        )
        model = GPTQModel.load(str(folder.parent / BASE), settings, device="cpu")
        ids = torch.randint(3, 64, (16, 32), generator=torch.Generator().manual_seed(0)).tolist()
        model.quantize([{"input_ids": row, "attention_mask": [1] * 32} for row in ids], batch_size=1)
        model.save(str(folder))

        def load() -> Any:
            return GPTQModel.load(str(folder), backend=BACKEND.TORCH, device="cpu", dtype=torch.float16).model

        return load

    return make


def others() -> dict[str, Callable[[Path], Callable[[], Any]]]:
    """{what a package of this environment writes: its maker}."""
    found: dict[str, Callable[[Path], Callable[[], Any]]] = {}
    if has("llmcompressor"):
        by = f"llm-compressor {version('llmcompressor')}"
        for bits, sym, group in ((4, True, 32), (4, False, 32), (8, True, -1)):
            groups = "channel" if group == -1 else f"groups of {group}"
            told = f"{bits} bits, {'symmetric' if sym else 'asymmetric'}, {groups}"
            found[f"{by}, `oneshot`, rounding to nearest, {told}"] = made_by_llmcompressor(bits, sym, group, False)
        found[f"{by}, `oneshot`, GPTQ, 4 bits, symmetric, groups of 32"] = made_by_llmcompressor(4, True, 32, True)
    if has("gptqmodel"):
        by = f"GPTQModel {version('gptqmodel')}"
        for bits, sym, order, form in (
            (4, True, False, "gptq"), (4, True, True, "gptq"), (4, False, False, "gptq"), (4, False, True, "gptq_v2"),
            (8, True, False, "gptq"), (3, True, False, "gptq_v2"),
        ):  # fmt: skip
            told = f"{bits} bits, {'symmetric' if sym else 'asymmetric'}, groups of 32"
            found[f"{by}, `{form}`, {told}{', desc_act' if order else ''}"] = made_by_gptqmodel(
                bits, sym, 32, order, form
            )
    return found


def read(folder: Path, only: str | None) -> int:
    path = folder / SEEN
    os.chdir(folder)  # some packages leave logs where they are run
    seen: dict[str, dict[str, str]] = json.loads(path.read_text()) if path.is_file() else {}
    surprises = 0
    columns, made = loaders(), others()
    if not columns and not made:
        print("neither compressed-tensors nor gptqmodel is installed here; there is nothing to compare with.")
        return 1
    for column, (format, load) in columns.items():
        for case in CASES:
            if case.format == format and only in (None, case.name):
                outcome = judge(case, folder / case.name, load)
                seen.setdefault(column, {})[case.name] = outcome
                surprises += say(column, case.name, outcome, limit(column, case.name))
    for number, (name, make) in enumerate(made.items()):
        if only in (None, name):
            outcome = judge_ours(folder / f"theirs-{sys.prefix.rsplit('/', 1)[-1]}-{number}", make)
            seen.setdefault(OURS, {})[name] = outcome
            surprises += say("epmq.load", name, outcome, "ok")
    path.write_text(json.dumps(seen, indent=1, ensure_ascii=False))
    return min(surprises, 1)


def limit(column: str, case: str) -> str:
    """The beginning of what this script expects: ``ok`` unless the versions' limits say otherwise."""
    for versions, limits in LIMITS.items():
        if versions in column:
            return next((outcome for pattern, outcome in limits.items() if re.search(pattern, case)), "ok")
    return "ok"


def say(column: str, row: str, outcome: str, expected: str) -> bool:
    surprise = not outcome.startswith(expected)
    print(f"{column}: {row}: {outcome}{f'  UNEXPECTED, not {expected}' if surprise else ''}", flush=True)
    return surprise


# -- table -----------------------------------------------------------------------------------------------------------


def table(folder: Path, page: Path) -> None:
    seen: dict[str, dict[str, str]] = json.loads((folder / SEEN).read_text())
    lines = [START]
    for format in ("compressed-tensors", "gptq"):
        rows = [case.name for case in CASES if case.format == format]
        columns = sorted((column for column in seen if any(row in seen[column] for row in rows)), reverse=True)
        lines += ["", f"| our file | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
        lines += [f"| {row} | {' | '.join(seen[column].get(row, '–') for column in columns)} |" for row in rows]
    lines += ["", "| written by | `epmq.load` |", "|---|---|"]
    lines += [f"| {row} | {outcome} |" for row, outcome in sorted(seen.get(OURS, {}).items())]
    text = page.read_text()
    before, rest = text.split(START)
    page.write_text(before + "\n".join([*lines, "", END]) + rest.split(END)[1])


def main() -> int:
    parser = argparse.ArgumentParser(description="Checkpoint folders between epmq and other packages.")
    parser.add_argument("verb", choices=["write", "read", "table"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("page", type=Path, nargs="?")
    parser.add_argument("--case", help="only this row of the table")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.verb == "write":
        write(arguments.folder)
    elif arguments.verb == "read":
        return read(arguments.folder.resolve(), arguments.case)
    else:
        table(arguments.folder, arguments.page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
