"""Whole GPTQ from a given H, 4 bits in groups of 128: a rival and ours, interleaved, in the rival's environment.

    python gptq_time.py llmcompressor|gptqmodel [--size 4096] [--threads 1] [--rounds 3] [--json]

Both sides start from W and H and end with codes and grids: damping, factor and sweep are counted. The error is
``tr(D H Dᵀ) / tr(W H Wᵀ)``, D the change of the weight.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from torch import Tensor

from epmq import extension, ops
from epmq.quantized import column_groups
from epmq.solve import factorize

GROUP, BITS, DAMP = 128, 4, 0.01


def ours(weight: Tensor, hessian: Tensor) -> Tensor:
    """Static symmetric grids, one factor, one sweep; returns the dequantized weight. Destroys the Hessian."""
    rows, columns = weight.shape
    unit = factorize(hessian, 0.0, DAMP, "benchmark").unit_upper
    scales = weight.view(rows, -1, GROUP).abs().amax(-1) / ((2**BITS - 1) / 2)
    zeros = torch.full_like(scales, 2.0 ** (BITS - 1))
    codes = ops.gptq_sweep(weight, unit, scales, zeros, column_groups(columns, GROUP), BITS)
    return ((codes.view(rows, -1, GROUP).float() - zeros.unsqueeze(-1)) * scales.unsqueeze(-1)).view(rows, columns)


def llmcompressor() -> Callable[[Tensor, Tensor], Tensor]:
    """Its quantize_weight with its own min-max observer."""
    from compressed_tensors.quantization import QuantizationArgs
    from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight
    from llmcompressor.observers import Observer

    arguments = QuantizationArgs(num_bits=BITS, symmetric=True, strategy="group", group_size=GROUP)

    def run(weight: Tensor, hessian: Tensor) -> Tensor:
        observer = Observer.load_from_registry("memoryless_minmax", base_name="weight", args=arguments)
        observer(weight)
        grid = observer.get_qparams()
        scale, zero = (grid["scale"], grid["zero_point"]) if isinstance(grid, dict) else grid[:2]
        # It destroys both of its inputs.
        weights, hessians = weight.clone().unsqueeze(0), hessian.clone().unsqueeze(0)
        found = quantize_weight(
            weights, hessians, scale.unsqueeze(0), zero.unsqueeze(0), None, arguments, blocksize=128, percdamp=DAMP
        )
        return found[0][0].float()

    return run


def gptqmodel() -> Callable[[Tensor, Tensor], Tensor]:
    """Its GPTQ class with damping and groups as ours; its default of refitted groups made static."""
    from gptqmodel.quantization import QuantizeConfig
    from gptqmodel.quantization.gptq import GPTQ

    settings = QuantizeConfig(
        bits=BITS,
        group_size=GROUP,
        sym=True,
        desc_act=False,
        static_groups=True,
        act_group_aware=False,
        damp_percent=DAMP,
    )

    def run(weight: Tensor, hessian: Tensor) -> Tensor:
        linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        linear.weight.data.copy_(weight)
        task = GPTQ(linear, settings)
        task.quantizer.configure(perchannel=True)
        task.H, task.nsamples, task._hessian_dirty = hessian.clone(), 4096, False
        return task.quantize(blocksize=128)[0].float()

    return run


def error(found: Tensor, weight: Tensor, hessian: Tensor) -> float:
    """Relative output error."""
    change = found - weight
    return float(((change @ hessian) * change).sum() / ((weight @ hessian) * weight).sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("peer", choices=["llmcompressor", "gptqmodel"])
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cpu-time", action="store_true", help="process time instead of wall time, for a busy machine")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if extension.module is None:
        sys.exit("the extension is not built for this environment's torch")
    clock = time.process_time if options.cpu_time else time.perf_counter
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    size = options.size
    x = torch.randn(2 * size, size) @ (torch.eye(size) + torch.randn(size, size) / size**0.5)
    hessian, weight = x.T @ x / len(x), torch.randn(size, size)
    rival = {"llmcompressor": llmcompressor, "gptqmodel": gptqmodel}[options.peer]()
    times: dict[str, list[float]] = {"ours": [], options.peer: []}
    errors: dict[str, float] = {}
    for _ in range(options.rounds):
        for name, call in (("ours", ours), (options.peer, rival)):
            given, second = weight.clone(), hessian.clone()
            with torch.no_grad():
                start = clock()
                found = call(given, second)
                times[name].append(clock() - start)
            errors[name] = error(found, weight, hessian)
    mine, other = (1e3 * statistics.median(times[name]) for name in ("ours", options.peer))
    row = {
        "op": "gptq",
        "case": f"N=K={size} 4-bit g128 {options.threads} thread",
        "ours_ms": round(mine, 1),
        "rival": options.peer,
        "rival_ms": round(other, 1),
        "ratio": round(other / mine, 3),
        "ours_error": errors["ours"],
        "rival_error": errors[options.peer],
    }
    print(json.dumps(row) if options.json else "\n".join(f"{key}: {value}" for key, value in row.items()))


if __name__ == "__main__":
    main()
