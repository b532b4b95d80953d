"""Lines for ``SHIPPED`` in kernels/tune.py: the fastest way of each product that part ``tiles`` of the suite timed.

    PYTHONPATH=.:benchmarks python -m gpu.shipped benchmarks/results/nvidia-h200/gpu.json --arch 90 --processors 132

What arithmetic on the shape would choose anyway has no entry, nor has what failed or was cut off.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from gpu.int4_products import told
from gpu.setting import GROUP

from epmq.kernels import tune


def lines(results: dict[str, Any], arch: int, processors: int) -> list[str]:
    """One line a layer, in the order in which they were timed."""
    layers: dict[tuple[int, int], dict[int, tune.Cut]] = {}
    whole = (item for name, item in results["items"].items() if name.startswith("tiles ") and "error" not in item)
    rows = [row for item in whole for row in item["rows"] if "failed" not in row]
    if not rows:
        raise SystemExit("there is no product that part tiles has timed to its end and found right.")
    for row in rows:
        key = tune.Key(arch, processors, row["N"], row["K"], row["M"], GROUP, "fp16")
        ways = [*tune.candidates(key), *filter(None, [tune.shipped(key)])]
        ways += [replace(config, one_launch=True) for config in ways if config.split_k > 1]
        times = {config: row["all µs"].get(told(config)) for config in ways}
        best = min(ways, key=lambda config: times[config] or math.inf)
        if best != tune.default(key):
            layers.setdefault((row["N"], row["K"]), {})[row["M"]] = tune.as_cut(best, key)
    return [
        f"{layer}: {{{', '.join(f'{m}: {short(cut)}' for m, cut in cuts.items())}}}," for layer, cuts in layers.items()
    ]


def short(cut: tune.Cut) -> str:
    """The arguments of a cut without those at its end that are left at their defaults."""
    shown = list(cut)
    while len(shown) > 3 and shown[-1] is False:
        shown.pop()
    return f"({', '.join(map(str, shown))})"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="gpu.json of the suite")
    parser.add_argument("--arch", type=int, required=True, help="compute capability times ten")
    parser.add_argument("--processors", type=int, required=True, help="multiprocessors")
    chosen = parser.parse_args()
    print("\n".join(lines(json.loads(chosen.results.read_text()), chosen.arch, chosen.processors)))
