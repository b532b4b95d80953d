"""The quantized merge of minilm8 in llama.cpp: accuracy of its eight tasks with our codes and with its own rounding.

    llama_cpp_minilm8.py prepare DATA FOLDER             in the project's environment: merge and quantize into FOLDER
    llama_cpp_minilm8.py score DATA FOLDER LLAMA_CPP [--json FILE]     inside llama.cpp's: convert, pack, score

The preset ``best``, 4 bits, groups of 128, symmetric and not. llama.cpp is given the tokens of the model's tokenizer,
so that only engines differ. DATA is as for minilm8.py, LLAMA_CPP as for llama_cpp_files.py.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from minilm8 import Benchmark
from statistics_files import epmq, write_recipe
from torch import Tensor, nn

from epmq import load
from epmq.evaluate import markdown_table, row
from epmq.files import write_text

KINDS: dict[str, tuple[str, bool]] = {"Q4_0": ("symmetric", True), "Q4_1": ("asymmetric", False)}


class Engine(nn.Module):
    """A GGUF file's encoder; for each of a text's tokens the mean over all of them."""

    def __init__(self, path: Path):
        import llama_cpp

        super().__init__()
        mean = llama_cpp.LLAMA_POOLING_TYPE_MEAN
        self.llama = llama_cpp.Llama(str(path), embedding=True, pooling_type=mean, n_threads=2, verbose=False)
        self.llama.tokenize = lambda text: [int(word) for word in text.split()]

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **_: Any) -> Tensor:
        rows = (ids[mask.bool()].tolist() for ids, mask in zip(input_ids, attention_mask, strict=True))
        means = torch.tensor([self.llama.embed(" ".join(map(str, ids))) for ids in rows])
        return means.unsqueeze(1).expand(-1, input_ids.shape[1], -1)


def prepare(data: Path, folder: Path) -> None:
    folder.mkdir(parents=True)
    tasks = sorted(path.name for path in (data / "experts").iterdir())
    for kind, (_, sym) in KINDS.items():
        settings = {"preset": "best", "bits": 4, "sym": sym}
        recipe = write_recipe(folder / f"{kind}.yaml", data, tasks, settings, True)
        epmq("quantize", recipe, "--out", folder / kind)


def score(data: Path, folder: Path, llama: Path) -> list[dict[str, Any]]:
    from peers.llama_cpp_files import converted, rounded_there

    from epmq.gguf_jobs import gguf_file

    bench, rows = Benchmark(data, "test", None), []
    for kind, (grid, _) in KINDS.items():
        wide, ours, theirs = (folder / f"{kind}-{name}.gguf" for name in ("wide", "ours", "theirs"))
        print("\n".join(gguf_file(folder / kind, converted(llama, folder / kind, wide, "f16"), ours).lines()))
        sides: dict[str, nn.Module] = {
            "epmq.load": load(folder / kind),
            "llama.cpp, F16": Engine(wide),
            f"llama.cpp, {kind} with our codes": Engine(ours),
            f"llama.cpp, {kind} rounded there": Engine(rounded_there(wide, theirs, kind)),
        }
        for who, model in sides.items():
            rows.append(row("task_arithmetic", f"{grid}: {who}", 4, bench.score(model.eval())))
            print(f"{rows[-1]['method']}: {rows[-1]['average']:.2f}", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=["prepare", "score"])
    parser.add_argument("data", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("llama", type=Path, nargs="?")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    chosen = parser.parse_args()
    if chosen.step == "prepare":
        prepare(chosen.data.resolve(), chosen.folder)
        return
    if chosen.llama is None:
        parser.error("score needs LLAMA_CPP, the folder of llama.cpp's converter.")
    from peers.llama_cpp_files import about

    rows = score(chosen.data.resolve(), chosen.folder, chosen.llama)
    print(markdown_table(rows))
    if chosen.json is not None:
        write_text(chosen.json, json.dumps({**about(), "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
