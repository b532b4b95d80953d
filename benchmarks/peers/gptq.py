"""Our GPTQ beside llm-compressor's ``quantize_weight`` on identical W, H and grids.

Run inside the peer's environment (``make peers``). Static groups on both sides, damping 0.01, no activation order and
with it. Exit status 0 when at least 99 % of the codes agree and output errors are within 1 %, 1 otherwise.
"""

from __future__ import annotations

import sys
from importlib.metadata import version

import torch
from compressed_tensors.quantization import QuantizationArgs
from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight as their_quantize
from torch import Tensor

from epmq.config import QuantConfig
from epmq.grids import fit_grid
from epmq.quantized import column_groups
from epmq.solve import factorize
from epmq.sweep import column_order, quantize_weight

LEAST_AGREEMENT, MOST_DIFFERENCE = 0.99, 0.01
SIZE, SAMPLES, DAMP = 512, 2048, 0.01
CASES = [
    (bits, group, sym, act_order)
    for bits in (4, 3, 2)
    for group in (128, 32, -1)
    for sym in (True, False)
    for act_order in (False, True)
]


def problem(seed: int) -> tuple[Tensor, Tensor]:
    """A random weight ``[512, 512]`` and the Hessian of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(SIZE, SIZE, generator=generator) * 0.05
    mixing = torch.randn(SIZE, SIZE, generator=generator) / SIZE**0.5
    x = torch.randn(SAMPLES, SIZE, generator=generator) @ (mixing + 0.5 * torch.eye(SIZE))
    return weight, 2.0 * x.T @ x / SAMPLES


def error(quantized: Tensor, weight: Tensor, hessian: Tensor) -> float:
    """tr(D H Dᵀ) / tr(W H Wᵀ)."""
    change = (quantized - weight).double()
    hessian = hessian.double()
    return float((change @ hessian * change).sum() / (weight.double() @ hessian * weight.double()).sum())


def compare(bits: int, group: int, sym: bool, act_order: bool) -> tuple[float, float, float]:
    """Share of equal codes, our error, their error."""
    weight, hessian = problem(bits)
    # Like with like: the clip search that is ours by default below 4 bits would give another grid.
    config = QuantConfig(method="gptq", bits=bits, group_size=group, sym=sym, act_order=act_order, clip="none")
    order = column_order(hessian, act_order)
    factor = factorize(hessian[order][:, order], 0.0, DAMP, "peer")
    ours = quantize_weight(weight, hessian, factor, order, config, torch.float32)

    grid = fit_grid(weight, bits, group, sym, torch.float32)
    arguments = QuantizationArgs(
        num_bits=bits,
        symmetric=sym,
        strategy="channel" if group == -1 else "group",
        group_size=None if group == -1 else group,
        actorder="weight" if act_order else None,
    )
    # It keeps zero points signed and destroys W and H.
    signed = (grid.zeros - 2 ** (bits - 1)).to(torch.int8)
    theirs = their_quantize(
        weight.clone()[None], hessian.clone()[None], grid.scales[None], signed[None], None, arguments,
        blocksize=128, percdamp=DAMP,
    )[0][0].float()  # fmt: skip
    groups = column_groups(SIZE, group).long()
    their_codes = torch.round(theirs / grid.scales[:, groups]) + grid.zeros[:, groups]
    agreement = float((their_codes == ours.codes.float()).float().mean())
    return agreement, error(ours.dequantize(), weight, hessian), error(theirs, weight, hessian)


def main() -> int:
    print(f"llmcompressor {version('llmcompressor')}, torch {torch.__version__}, {SIZE} x {SIZE}")
    print("bits group sym   act_order  agreement  our error  their error")
    worst = 0
    for bits, group, sym, act_order in CASES:
        agreement, ours, theirs = compare(bits, group, sym, act_order)
        agrees = agreement >= LEAST_AGREEMENT and abs(ours / theirs - 1.0) <= MOST_DIFFERENCE
        worst = max(worst, 0 if agrees else 1)
        mark = "" if agrees else "  DISAGREES"
        print(f"{bits:4} {group:5} {sym!s:5} {act_order!s:9}  {agreement:9.5f}  {ours:9.6f}  {theirs:11.6f}{mark}")
    return worst


if __name__ == "__main__":
    sys.exit(main())
