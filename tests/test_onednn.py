"""fp32 linears by oneDNN: what they compute, and that all others are left to torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from close import assert_close, product_bound
from families import KINDS, make_job
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

import epmq
from epmq import QuantConfig, extension, onednn
from epmq.linear import QuantLinear
from epmq.precision import AS_IT_IS, Precision
from epmq.quantized import unpack

if not torch.backends.mkldnn.is_available():
    pytest.skip("this torch has no oneDNN", allow_module_level=True)

OPERATOR = torch.ops.mkldnn._linear_pointwise.default


class Called(TorchDispatchMode):
    """Counts the calls of oneDNN's linear."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is OPERATOR
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def by_onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, int]:
    with Called() as called, onednn.Linears():
        y = functional.linear(x, weight, bias)
    return y, called.count


def test_products_are_those_of_torch_for_every_layout() -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(3, 5), torch.randn(7, 5), torch.randn(7)
    gaps = [torch.stack([tensor, torch.randn_like(tensor)], -1)[..., 0] for tensor in (x, weight, bias)]
    cases: dict[str, tuple[Tensor, Tensor, Tensor | None]] = {
        "no bias": (x, weight, None),
        "one dimension": (x[0], weight, bias),
        "three dimensions": (torch.randn(2, 3, 5), weight, bias),
        "one row": (x[:1], weight, bias),
        "one input": (x[:, :1], weight[:, :1], bias),
        "one output": (x, weight[:1], bias[:1]),
        "turned x": (torch.randn(5, 3).T, weight, bias),
        "turned weight": (x, torch.randn(5, 7).T, bias),
        "x with gaps": (gaps[0], weight, bias),
        "weight with gaps": (x, gaps[1], bias),
        "bias with gaps": (x, weight, gaps[2]),
        "a row for all": (x[:1].expand(4, 5), weight, bias),
        "one bias for all": (x, weight, bias[:1].expand(7)),
        "large": (torch.randn(130, 768), torch.randn(384, 768), torch.randn(384)),
    }
    for name, case in cases.items():
        y, calls = by_onednn(*case)
        left, right = case[0].double(), case[1].double().T
        added = torch.zeros(()).double() if case[2] is None else case[2].double()
        assert calls == 1 and y.is_contiguous(), name
        assert_close(
            y, left @ right + added, product_bound(left.abs() @ right.abs() + added.abs(), len(right) + 1), name
        )


def test_gathered_rows_are_filled_up_to_few_numbers() -> None:
    seen: list[int] = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is OPERATOR:
                seen.append(len(args[0]))
            return func(*args, **(kwargs or {}))

    weight = torch.randn(3, 4)
    for rows in range(1, 600):
        x = torch.randn(rows, 4)
        with torch.no_grad(), Sizes(), onednn.Linears():
            y, whole = functional.linear(x, weight), functional.linear(x.unsqueeze(0), weight)
        assert y.shape == (rows, 3) and y.is_contiguous()
        bound = product_bound(x.abs().double() @ weight.abs().double().T, 4)
        assert_close(y, x.double() @ weight.double().T, bound, f"{rows} rows")
        assert whole.shape == (1, rows, 3) and seen[-1] == 1  # a batch of whole texts is as it is
        assert rows <= seen[-2] <= rows * 9 / 8
    assert len(set(seen[::2])) == 16 + 8 * 5 + 2  # as many as there are up to 16, eight for each doubling to 512, two


def test_numbers_that_are_not_finite_stay_so() -> None:
    x = torch.tensor([[float("nan"), 1.0], [float("inf"), 1.0], [1.0, 1.0]])
    y, _ = by_onednn(x, torch.ones(3, 2), torch.ones(3))
    assert bool(y[0].isnan().all()) and bool((y[1] == float("inf")).all()) and bool((y[2] == 3.0).all())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes_are_left_to_torch(dtype: torch.dtype) -> None:
    x, weight = torch.ones(3, 4, dtype=dtype), torch.ones(2, 4, dtype=dtype)
    y, calls = by_onednn(x, weight)
    assert calls == 0 and torch.equal(y, torch.full((3, 2), 4.0, dtype=dtype))


@pytest.mark.parametrize(("rows", "columns"), [(0, 4), (3, 0)])
def test_empty_ones_are_left_to_torch(rows: int, columns: int) -> None:
    y, calls = by_onednn(torch.ones(rows, columns), torch.ones(2, columns), torch.ones(2))
    assert calls == 0 and torch.equal(y, torch.ones(rows, 2))


@pytest.mark.parametrize("shape", [(), (1,), (1, 2), (3, 2)])
def test_biases_of_other_shapes_are_left_to_torch(shape: tuple[int, ...]) -> None:
    y, calls = by_onednn(torch.ones(3, 4), torch.ones(2, 4), torch.full(shape, 3.0))
    assert calls == 0 and torch.equal(y, torch.full((3, 2), 7.0))


def test_what_torch_refuses_is_refused_in_its_words() -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        by_onednn(torch.ones(3, 4), torch.ones(2, 5))


def test_sparse_weights_are_left_to_torch() -> None:
    y, calls = by_onednn(torch.ones(3, 4), torch.ones(2, 4).to_sparse_csr())
    assert calls == 0 and torch.equal(y, torch.full((3, 2), 4.0))


def test_gradients_are_left_to_torch() -> None:
    weight = torch.ones(2, 4, requires_grad=True)
    with Called() as called, onednn.Linears():
        total = functional.linear(torch.ones(3, 4), weight).sum()
    assert called.count == 0 and torch.equal(torch.autograd.grad(total, weight)[0], torch.full((2, 4), 3.0))


def test_autocast_comes_first() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        y, calls = by_onednn(torch.ones(3, 4), torch.ones(2, 4))
    assert calls == 0 and y.dtype == torch.bfloat16


def test_it_is_not_used_where_it_is_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extension, "beats_library", lambda: True)
    assert onednn.preferred()
    with torch.backends.mkldnn.flags(enabled=False):
        assert not onednn.preferred()


def test_derivatives_are_carried_forward() -> None:
    x, weight, direction = torch.randn(3, 5), torch.randn(7, 5), torch.randn(3, 5)
    with onednn.Linears(), torch.no_grad():
        tangent = torch.func.jvp(lambda rows: functional.linear(rows, weight), (x,), (direction,))[1]
    torch.testing.assert_close(tangent, direction @ weight.T)


@pytest.mark.parametrize("preferred", [False, True])
def test_forward_passes_in_fp32_take_what_is_preferred(preferred: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onednn, "preferred", lambda: preferred)
    with Called() as called, torch.no_grad():
        with AS_IT_IS.active():
            functional.linear(torch.ones(3, 4), torch.ones(2, 4))
        assert called.count == preferred
        with Precision(torch.bfloat16).active():
            functional.linear(torch.ones(3, 4), torch.ones(2, 4))
        assert called.count == preferred


def test_either_way_gives_the_same_model(monkeypatch: pytest.MonkeyPatch) -> None:
    codes = []
    for preferred in (False, True):
        monkeypatch.setattr(onednn, "preferred", lambda preferred=preferred: preferred)
        job = make_job(KINDS["bert"])
        with Called() as called:
            model = epmq.quantize(job.merged, job.experts, job.calibration, QuantConfig(group_size=16)).model
        assert (called.count > 0) == preferred
        linears = [module for module in model.modules() if isinstance(module, QuantLinear)]
        codes.append(torch.cat([unpack(linear.packed, 4, linear.in_features).flatten() for linear in linears]))
    # Only those within some roundings of fp32 of a tie may change, and what these do to later columns.
    assert float((codes[0] == codes[1]).double().mean()) > 0.99
