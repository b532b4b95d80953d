"""Second moments by every form against torch's products."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial

import torch
from gpu.setting import NUMBER_SECONDS, Row, Setting, expect, relative
from gpu.timing import clocks
from torch import Tensor

from epmq import ops
from epmq.kernels import gram as moments
from epmq.kernels.gram import Plan
from epmq.kernels.timing import Call, microseconds
from epmq.kernels.tune import device_facts

CUDA_FORM_ROWS = 2048  # of a launch of csrc/cuda/statistics.cu


def drift(rows: int) -> float:
    """How far a sum over so many rows on tensor cores may be off, relative to itself, without being wrong.

    They do not round to nearest. A step of 16 rows takes in 16 products; products and running sum are cut off behind
    the last place of the largest of them (sm_90: two binary places further on; sm_80: one, in two steps of 8), and so
    is their sum. With u the last place of the running sum, at most 2⁻²³ of it, a step loses at most 16 u/4 + u = 5 u on
    sm_90 and 2 (8 u/2 + u) = 10 u on sm_80, half of that on the mean; hundreds of steps are near their mean: 5 · 2⁻²³
    of the running sum for 16 rows. Over all steps the running sum is on the mean 1/2 of the last one where products
    have one sign, and 1/√3 of it, root mean square, where they have either. Adding the parts rounds to nearest.
    """
    return rows / 16 * 5 * 2.0**-23 / math.sqrt(3) + 2.0**-23


def gram(setting: Setting, count: int, columns: int, targets: int) -> Iterator[Row]:
    """H, or H and C, of bf16 rows: every registered form against calls of torch.addmm with fp32 results.

    Small integers have moments that no rounding changes: these must be exact. Those of normal numbers may drift.
    """
    count, columns = setting.shape(count, columns)
    targets = setting.shape(targets)[0] if targets else 0
    device = setting.device
    sums = [torch.zeros(columns, columns, device=device), torch.zeros(columns, device=device)]
    crossed: list[Tensor | None] = [None, None]
    if targets:
        crossed = [torch.zeros(targets, columns, device=device), torch.zeros(targets, device=device)]
    some = torch.arange(0, columns, max(1, columns // 16), device=device)

    def errors(function: Callable[..., None], x: Tensor, target: Tensor | None) -> list[float]:
        """Relative errors of some columns of H, and of C."""
        for tensor in (*sums, *crossed):
            if tensor is not None:
                tensor.zero_()
        function(x, *sums, target, *crossed)
        wide = x[:, some].double()
        found = [relative(sums[0][some][:, some].tril(), (wide.T @ wide).tril())]
        if target is not None and crossed[0] is not None:
            found.append(relative(crossed[0][:, some], target.double().T @ wide))
        return found

    def taken(call: Call) -> float:
        each: float = microseconds([call], NUMBER_SECONDS)[0]
        return each / 1e3

    def drawn(whole: bool, width: int) -> Tensor:
        if whole:
            return torch.randint(-2, 3, (count, width), device=device).bfloat16()
        return torch.randn(count, width, device=device, dtype=torch.bfloat16)

    forms = {form.backend: form for form in ops.implementations("accumulate") if form.backend in ("cuda", "triton")}
    if "cuda" not in forms:
        setting.absent["CUDA form of accumulate"] = "the extension is not built with EPMQ_CUDA=1"
    if device.type != "cuda":
        forms.pop("cuda", None)
    rows_of = {
        "cuda": CUDA_FORM_ROWS,
        "triton": moments.plan(*device_facts(device), count, columns, targets, torch.bfloat16).rows,
    }
    row: Row = {"tokens": count, "K": columns, "P": targets}
    whole = drawn(True, columns), drawn(True, targets) if targets else None
    for name, form in forms.items():
        exact = errors(form.function, *whole)
        expect(row, not any(exact), f"{name}: moments of small integers have a relative error of {max(exact):.2g}")
    del whole
    x, target = drawn(False, columns), drawn(False, targets) if targets else None
    for name, form in sorted(forms.items(), reverse=True):
        error, limit = max(errors(form.function, x, target)), drift(min(count, rows_of[name]))
        row[f"{name} error"] = error
        expect(row, error < limit, f"{name}: relative error {error:.2g}, at most {limit:.2g} is drift")
        if setting.timed:
            call = partial(form.function, x, *sums, target, *crossed)
            row[f"{name} ms"] = taken(call)
            work = 2.0 * count * columns * (columns / 2 + targets)
            row[f"{name} of bf16 peak"] = setting.share(work, 1e3 * row[f"{name} ms"], "bfloat16_tflop_s")
            row["clocks"] = clocks()
            yield row
            if name == "triton":
                # What the choice of a plan reckons with.
                longest = moments.most_rows(device_facts(device)[0], torch.bfloat16)
                plans = {f"tiles of {across}, uncut": Plan(across, longest) for across in (128, 256)}
                plans |= {f"bands of {band}": Plan(256, longest, band=band) for band in (2, 8, 32)}
                for how, chosen in plans.items():
                    timed = partial(call, chosen=chosen)
                    row[f"triton, {how} ms"] = setting.attempt(f"gram in {how}", partial(taken, timed))
        yield row
    if setting.timed:

        def two_products() -> None:
            torch.addmm(sums[0], x.T, x, out_dtype=torch.float32)
            if target is not None and crossed[0] is not None:
                torch.addmm(crossed[0], target.T, x, out_dtype=torch.float32)

        row["torch.addmm ms"] = setting.attempt("torch.addmm", partial(taken, two_products))
        yield row
