"""Peak resident memory of merge-and-quantize from a recipe, by depth and by number of experts.

Every case runs in a process of its own on generated checkpoints; the calibration texts are shared out among the
experts, so that their number stays the same. Exits with status 1 when 48 blocks need more than 12 did, or 8 experts
more than 2, by over a tenth of what the process holds beyond its imports. ``--limit GIB`` runs the largest case alone,
in a process that can get no more address space than that (as by ``ulimit -v``), which must be less than its weights.
See ``--help``; ``make memory`` runs it.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

BLOCKS, EXPERTS = (6, 12, 24, 48), (2, 4, 8)
SHARD_BYTES = 64 * 2**20
WIDTH, VOCABULARY, TEXTS, LENGTH = 512, 1000, 64, 32
ALLOWED_GROWTH = 0.1


def peak_mib() -> float:
    """Largest resident size of this process so far, in MiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def generate(folder: Path, blocks: int, experts: int, texts: int = TEXTS) -> None:
    """A recipe with a BERT-like base and experts of one seed each, written tensor by tensor."""
    import torch
    import transformers
    import yaml
    from tokenizers import Tokenizer, models, pre_tokenizers

    from epmq.formats.shards import ShardWriter

    config = transformers.BertConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=blocks, num_attention_heads=8,
        intermediate_size=4 * WIDTH, max_position_embeddings=LENGTH,
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.BertModel(config, add_pooling_layer=False)
    names = {f"task{i}": folder / f"experts/task{i}" for i in range(experts)}
    for seed, place in enumerate([folder / "base", *names.values()]):
        place.mkdir(parents=True)
        writer = ShardWriter(place, SHARD_BYTES)
        start, noise = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed)
        for name, tensor in model.state_dict().items():
            value = 0.04 * torch.randn(tensor.shape, generator=start)
            if seed:
                value += 0.004 * torch.randn(tensor.shape, generator=noise)
            writer.add(name, value + 1.0 if name.endswith("LayerNorm.weight") else value)
        writer.finish()
    config.architectures = ["BertModel"]
    config.save_pretrained(folder / "base")
    words = {f"w{i}": i for i in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="w0", unk_token="w0")
    fast.save_pretrained(folder / "base")
    drawn = torch.randint(1, VOCABULARY, (texts, LENGTH), generator=torch.Generator().manual_seed(1)).tolist()
    lines = [json.dumps({"text": " ".join(f"w{token}" for token in text)}) for text in drawn]
    for number, name in enumerate(names):
        (folder / f"{name}.jsonl").write_text("\n".join(lines[number::experts]))
    recipe: dict[str, Any] = {
        "base": "base",
        "experts": {name: str(place.relative_to(folder)) for name, place in names.items()},
        "calibration": {"tasks": {name: f"{name}.jsonl" for name in names}, "batch_size": 8, "examples": texts},
        "quantization": {"bits": 4, "group_size": 128},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))


def quantize(folder: Path, limit: int | None) -> None:
    """In the measured process: prints what its imports take, and its peak after the whole job."""
    import transformers

    from epmq.jobs import quantize_to_folder
    from epmq.recipe import read_recipe

    if limit is not None:
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    recipe = read_recipe(folder / "recipe.yaml")
    _ = (transformers.BertModel, transformers.AutoTokenizer.from_pretrained(str(recipe.base)))
    before = peak_mib()
    report = quantize_to_folder(recipe, folder / "quantized")
    print(json.dumps({"imports": before, "peak": peak_mib(), "seconds": report["seconds"]}))


def measure(blocks: int, experts: int, limit: float | None = None) -> dict[str, float]:
    """Generate and quantize, each in a fresh process; ``limit`` is GiB of address space for the latter."""
    folder = Path(tempfile.mkdtemp(prefix="epmq-memory-"))
    try:
        for step in ("generate", "quantize"):
            command = [sys.executable, __file__, "--step", step, "--folder", str(folder)]
            command += ["--blocks", str(blocks), "--experts", str(experts)]
            command += [] if limit is None else ["--limit", str(limit)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        weights = sum(path.stat().st_size for path in folder.rglob("*.safetensors") if "quantized" not in path.parts)
        return {**json.loads(done.stdout.splitlines()[-1]), "weights": weights / 2**20}
    finally:
        shutil.rmtree(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--limit", type=float, help="GiB of address space; only the largest case is run")
    parser.add_argument("--step", choices=["generate", "quantize"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--blocks", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--experts", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.step == "generate":
        return generate(args.folder, args.blocks, args.experts)
    if args.step == "quantize":
        return quantize(args.folder, None if args.limit is None else int(args.limit * 2**30))
    if args.limit is not None:
        row = measure(args.blocks or BLOCKS[-1], args.experts or EXPERTS[-1], args.limit)
        figures = f"{row['weights']:.0f} MiB of weights under a limit of {args.limit * 1024:.0f} MiB"
        print(f"{figures}: {row['seconds']:.0f} s, peak {row['peak']:.0f} MiB")
        sys.exit(int(row["weights"] <= args.limit * 1024))

    cases = [(blocks, experts) for experts in EXPERTS for blocks in BLOCKS]
    found: dict[tuple[int, int], dict[str, float]] = {}
    print("| blocks | experts | weights on disk, MiB | imports, MiB | peak, MiB | seconds |\n|---|---|---|---|---|---|")
    for case in cases:
        row = found[case] = measure(*case)
        figures = " | ".join(f"{row[key]:.0f}" for key in ("weights", "imports", "peak", "seconds"))
        print(f"| {case[0]} | {case[1]} | {figures} |", flush=True)
    if args.json is not None:
        rows = [{"blocks": blocks, "experts": experts, **row} for (blocks, experts), row in found.items()]
        args.json.write_text(json.dumps(rows, indent=1))
    small, deep, many, both = (found[case] for case in ((12, 2), (48, 2), (12, 8), (48, 8)))
    grew = False
    for what, large in (("12 to 48 blocks", deep), ("2 to 8 experts", many), ("both", both)):
        used = small["peak"] - small["imports"]
        growth = (large["peak"] - large["imports"] - used) / used
        grew |= growth > ALLOWED_GROWTH
        print(f"{what}: {growth:+.1%} of the {used:.0f} MiB beyond imports (allowed {ALLOWED_GROWTH:+.0%})")
    sys.exit(int(grew))


if __name__ == "__main__":
    main()
