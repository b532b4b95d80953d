"""The quantized merge of minilm8 as a folder on disk, scored as transformers loads it and as epmq does.

    python benchmarks/minilm8_loaded.py --data UNFOLDED [--json FILE]

``epmq quantize`` writes compressed-tensors, 4 bits in groups of 128: the preset ``best`` as in the table of minilm8.py
(asymmetric), and the closed form, asymmetric and symmetric. ``transformers.AutoModel`` loads the folders with no help
from epmq. DATA is as for minilm8.py.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from minilm8 import Benchmark
from statistics_files import epmq, write_recipe
from transformers import AutoModel

from epmq import load
from epmq.evaluate import markdown_table, row
from epmq.files import write_text
from epmq.report import machine

KINDS: dict[str, dict[str, Any]] = {
    "best": {"preset": "best", "bits": 4},
    "closed form": {"bits": 4},
    "closed form, symmetric": {"bits": 4, "sym": True},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the unfolded folder of minilm8.py")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    args = parser.parse_args()
    data = args.data.resolve()
    bench = Benchmark(data, "test", None)
    folder = Path(tempfile.mkdtemp(prefix="epmq-loaded-"))
    rows: list[dict[str, Any]] = []
    try:
        for kind, settings in KINDS.items():
            recipe = write_recipe(folder / f"{kind}.yaml", data, list(bench.tasks), settings, True)
            epmq("quantize", recipe, "--out", folder / kind)
            ours = load(folder / kind)
            theirs, told = AutoModel.from_pretrained(
                folder / kind, dtype=torch.float32, add_pooling_layer=False, output_loading_info=True
            )
            if told["missing_keys"] or told["unexpected_keys"]:
                raise SystemExit(f"transformers: missing {told['missing_keys']}, unexpected {told['unexpected_keys']}")
            for who, model in (("transformers", theirs), ("epmq.load", ours)):
                rows.append(row("task_arithmetic", f"{kind}: {who}", 4, bench.score(model.eval())))
                print(f"{rows[-1]['method']}: {rows[-1]['average']:.2f}", flush=True)
    finally:
        shutil.rmtree(folder)
    print(markdown_table(rows))
    if args.json is not None:
        write_text(args.json, json.dumps({"machine": machine(), "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
