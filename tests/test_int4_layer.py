"""Where the int4 product is used: the table and QuantLinear."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_toy_job
from test_int4_matmul import BF16, FP16, check, problem
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import epmq
from epmq import QuantLinear, ops, placement, reference
from epmq.errors import ConfigError
from epmq.kernels import int4_matmul as kernels
from epmq.quantized import QuantizedTensor, pack

# ---- the table and QuantLinear ---------------------------------------------------------------------------------------


@pytest.fixture
def on_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EPMQ_BACKEND", "triton")


@pytest.mark.usefixtures("on_triton")
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
def test_the_form_in_the_table(symmetric: bool, device: torch.device) -> None:
    x, tensor, _, bias = problem(40, 200, 64, symmetric, FP16, 5, device)
    zeros = None if tensor.zeros is None else tensor.zeros.to(device)
    arguments = (x, pack(tensor.codes, 4).to(device), tensor.scales.to(device), zeros, bias, 4, 64)
    assert ops.choose("dequant_matmul", *arguments).backend == "triton"
    y = ops.dequant_matmul(*arguments)
    check(y, x, tensor, bias)
    # Beside the definition, whose weights are not rounded, by half a step of 16 bits a weight.
    size = x.float().abs() @ tensor.dequantize().abs().T.to(device)
    allowed = torch.finfo(FP16).eps * (size + y.float().abs())
    assert bool(((y.float() - reference.dequant_matmul(*arguments).float()).abs() <= allowed).all())


@pytest.mark.usefixtures("on_triton")
@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({}, True),
        ({"dtype": torch.float32}, False),
        ({"bits": 8}, False),
        ({"group": 48}, False),
        ({"group": -1}, True),
    ],
    ids=str,
)
def test_calls_that_the_table_gives_to_triton(changes: dict[str, Any], wanted: bool, device: torch.device) -> None:
    bits, group = changes.get("bits", 4), changes.get("group", 64)
    layer = QuantLinear(192, 20, bits=bits, group_size=group, device=device, dtype=FP16)
    x = torch.zeros(2, 192, dtype=changes.get("dtype", FP16), device=device)
    chosen = ops.choose("dequant_matmul", x, layer.packed, layer.scales, layer.zeros, layer.bias, bits, group)
    assert (chosen.backend == "triton") == wanted


class Seen(TorchDispatchMode):
    """Names of the operators that torch runs while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.usefixtures("on_triton")
def test_the_operator_is_called_where_something_looks_at_operators(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, tensor, weight, bias = problem(20, 128, 64, True, FP16, 3, device)
    called: list[Tensor] = []
    operator = kernels.product

    def noted(*given: Any) -> Any:
        called.append(given[0])
        return operator(*given)

    monkeypatch.setattr(kernels, "product", noted)
    with torch.no_grad():
        plain = kernels.int4_matmul(x, weight, bias)
        assert not called
        with Seen() as seen:
            observed = kernels.int4_matmul(x, weight, bias)
        assert "epmq.int4_matmul.default" in seen.names
    assert torch.equal(plain, observed) and len(called) == 1
    y = kernels.int4_matmul(x.clone().requires_grad_(), weight, bias)
    assert y.requires_grad and len(called) == 2
    check(plain, x, tensor, bias)


@pytest.mark.usefixtures("on_triton")
def test_a_traced_layer_keeps_the_operator(device: torch.device) -> None:
    x, tensor, _, _ = problem(20, 128, 64, True, FP16, 3, device)
    layer = QuantLinear.from_quantized(tensor, None).to(device)
    with torch.no_grad():
        layer(x)  # lays the codes out, which is not to be traced
        traced = torch.jit.trace(layer, x)
        assert "epmq::int4_matmul" in str(traced.inlined_graph)
        assert torch.equal(traced(x + 1), layer(x + 1))


def test_cpu_tensors_go_to_the_interpreter_only_when_asked() -> None:
    layer = QuantLinear(64, 8, group_size=32, dtype=FP16)
    x = torch.zeros(2, 64, dtype=FP16)
    chosen = ops.choose("dequant_matmul", x, layer.packed, layer.scales, layer.zeros, layer.bias, 4, 32)
    assert chosen.backend != "triton"


def quantized_layer(device: torch.device) -> QuantLinear:
    torch.manual_seed(3)
    return QuantLinear.from_linear(nn.Linear(70, 20).half(), bits=4, group_size=32).to(device)


def check_layer(layer: QuantLinear, x: Tensor) -> None:
    tensor = layer.quantized()
    zeros = None if tensor.zeros is None else tensor.zeros.cpu()
    exact = QuantizedTensor(tensor.codes.cpu(), tensor.scales.cpu(), zeros, 4, 32)
    check(layer(x), x, exact, layer.bias)


@pytest.mark.usefixtures("on_triton")
def test_quant_linear_packs_once_and_after_every_change(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    layer, original = quantized_layer(device), kernels.pack_tiles
    packed: list[int] = []

    def counted(*arguments: Any) -> Any:
        packed.append(1)
        return original(*arguments)

    monkeypatch.setattr(kernels, "pack_tiles", counted)
    names = list(layer.state_dict())
    x = torch.randn(3, 70, device=device).half()
    with torch.no_grad():
        check_layer(layer, x)
        check_layer(layer, x)
        assert len(packed) == 1
        state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
        layer.scales.mul_(2)
        check_layer(layer, x)
        layer.load_state_dict(state)
        check_layer(layer, x)
        layer.packed = torch.zeros_like(layer.packed)
        check_layer(layer, x)
        assert len(packed) == 4
        layer.bfloat16()
        check(layer(x.bfloat16()), x.bfloat16(), QuantizedTensor(*unrounded(layer)), layer.bias)
        assert len(packed) == 5
    assert list(layer.state_dict()) == names


def unrounded(layer: QuantLinear) -> tuple[Tensor, Tensor, Tensor | None, int, int]:
    """A layer's parts with its fp16 scales as bf16, which is what a bf16 input multiplies."""
    tensor = layer.quantized()
    zeros = None if tensor.zeros is None else tensor.zeros.cpu()
    return tensor.codes.cpu(), tensor.scales.bfloat16().cpu(), zeros, 4, 32


@pytest.mark.usefixtures("on_triton")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("warm", [True, False])
def test_quant_linear_compiles_before_and_after_it_has_packed(warm: bool, device: torch.device) -> None:
    layer = quantized_layer(device)
    x = torch.randn(3, 70, device=device).half().requires_grad_()
    if warm:
        layer(x)
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    first, second = compiled(x), compiled(x)
    wanted = layer(x)
    assert torch.equal(first, wanted) and torch.equal(second, wanted)
    gradients = [torch.autograd.grad(y.float().square().sum(), x)[0] for y in (second, wanted)]
    assert torch.equal(*gradients)


@pytest.mark.usefixtures("on_triton")
def test_quant_linear_in_inference_mode(device: torch.device) -> None:
    with torch.inference_mode():
        layer = quantized_layer(device)
        check_layer(layer, torch.randn(3, 70, device=device).half())


# ---- the kernel's layout as the one form of the codes ----------------------------------------------------------------


def bytes_of(layer: nn.Module) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in layer.buffers())


@pytest.mark.usefixtures("on_triton")
@pytest.mark.parametrize(("rows", "columns", "group", "sym"), [(20, 70, 32, False), (130, 256, 128, True)])
def test_a_layer_packed_for_the_gpu_is_the_same_layer(
    rows: int, columns: int, group: int, sym: bool, device: torch.device
) -> None:
    layer = QuantLinear.from_linear(nn.Linear(columns, rows).bfloat16(), group_size=group, sym=sym).to(device)
    x = torch.randn(3, columns, device=device).bfloat16()
    before, state, weight = layer(x), layer.state_dict(), layer.weight
    assert layer.pack_for_gpu() and layer.packed is None
    assert torch.equal(layer(x), before)
    assert torch.equal(layer.weight, weight)
    found = layer.state_dict()
    assert set(found) == set(state)
    assert all(torch.equal(found[name], state[name]) for name in state)
    assert torch.equal(copy.deepcopy(layer)(x), before)
    assert torch.equal(pickle.loads(pickle.dumps(layer))(x), before)
    assert torch.equal(QuantLinear.from_quantized(layer.quantized(), layer.bias)(x), before)


@pytest.mark.usefixtures("on_triton")
def test_a_packed_layer_holds_its_codes_once(device: torch.device) -> None:
    layer = QuantLinear.from_linear(nn.Linear(1024, 128, bias=False).half(), sym=True).to(device)
    held = bytes_of(layer)
    layer.pack_for_gpu()
    assert bytes_of(layer) == held


@pytest.mark.usefixtures("on_triton")
def test_a_packed_layer_takes_new_weights_and_scales(device: torch.device) -> None:
    layer, other = quantized_layer(device), QuantLinear.from_linear(nn.Linear(70, 20).half(), group_size=32).to(device)
    x = torch.randn(3, 70, device=device).half()
    layer.pack_for_gpu()
    layer(x)
    layer.load_state_dict(other.state_dict())
    assert layer.packed is None
    assert torch.equal(layer(x), other(x))
    for module in (layer, other):
        module.scales.mul_(2)
    assert torch.equal(layer(x), other(x))
    layer.packed = torch.zeros_like(other.packed)
    assert "words" not in layer._buffers
    with torch.no_grad():
        check_layer(layer, x)


@pytest.mark.usefixtures("on_triton")
def test_a_packed_layer_with_wide_scales_stays_packed_when_it_is_loaded(device: torch.device) -> None:
    layer = QuantLinear.from_linear(nn.Linear(70, 20), group_size=32).to(device)
    state, x = layer.state_dict(), torch.randn(3, 70, device=device).bfloat16()
    assert layer.pack_for_gpu(BF16)
    before = layer(x)
    layer.load_state_dict(state)
    assert layer.packed is None
    assert torch.equal(layer(x), before)


@pytest.mark.usefixtures("on_triton")
def test_a_packed_layer_runs_in_other_dtypes(device: torch.device) -> None:
    layer, x = quantized_layer(device), torch.randn(3, 70, device=device)
    wide = layer.quantized().dequantize()
    layer.pack_for_gpu()
    layer(x.half())
    layer.bfloat16().requires_grad_(False)
    assert layer.packed is None
    check(layer(x.bfloat16()), x.bfloat16(), QuantizedTensor(*unrounded(layer)), layer.bias)
    layer.float()
    assert layer.bias is not None
    wanted = torch.nn.functional.linear(x, wide, layer.bias)
    # Two fp32 sums of 70 products.
    size = torch.nn.functional.linear(x.abs(), wide.abs(), layer.bias.abs())
    assert bool(((layer(x) - wanted).abs() <= 2 * 71 * torch.finfo(torch.float32).eps * size).all())


@pytest.mark.usefixtures("on_triton")
def test_a_packed_layer_gets_its_codes_back_on_a_device_without_the_kernel(device: torch.device) -> None:
    layer = quantized_layer(device)
    codes = layer.packed.clone()
    layer.pack_for_gpu()
    layer.to("cpu" if device.type == "cuda" else "meta")
    assert "words" not in layer._buffers and layer.packed.shape == codes.shape
    assert layer.packed.is_meta or torch.equal(layer.packed, codes.cpu())


@pytest.mark.usefixtures("on_triton")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("warm", [True, False])
def test_a_packed_layer_compiles(warm: bool, device: torch.device) -> None:
    layer = quantized_layer(device)
    x = torch.randn(3, 70, device=device).half().requires_grad_()
    wanted = layer(x)
    layer.pack_for_gpu()
    if warm:
        layer(x)
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), wanted) and torch.equal(compiled(x), wanted)


@pytest.mark.usefixtures("on_triton")
def test_layers_that_the_kernel_does_not_take_are_left_alone(device: torch.device) -> None:
    settings: list[dict[str, Any]] = [{}, {"bits": 8}, {"group_size": 48}, {"dtype": torch.float32}]
    model = nn.Sequential(*(QuantLinear(96, 8, **{"dtype": FP16, "group_size": 32, **s}) for s in settings)).to(device)
    assert epmq.pack_for_gpu(model) == ["0"]
    assert [layer.packed is None for layer in model.children()] == [True, False, False, False]
    assert epmq.pack_for_gpu(model, BF16) == ["0", "3"]


def test_on_a_cpu_nothing_is_packed_for_the_gpu() -> None:
    layer = QuantLinear(64, 8, group_size=32, dtype=FP16)
    assert not layer.pack_for_gpu() and layer.packed is not None


@pytest.mark.usefixtures("on_triton")
def test_a_model_placed_on_a_gpu_keeps_one_form_of_its_codes(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, device: torch.device
) -> None:
    monkeypatch.setattr(placement, "home_of", lambda model: torch.device("cuda"))
    model = nn.Sequential(nn.Linear(96, 64), QuantLinear(64, 96, group_size=32), QuantLinear(96, 8, bits=3))
    placement.place(model, device, "bfloat16")
    assert model[0].weight.dtype == BF16
    assert [layer.packed is None for layer in list(model)[1:]] == [True, False]
    assert "1 of 2 quantized layers, such as 2, do not fit the GPU's int4 kernel" in caplog.text
    with pytest.raises(ConfigError, match="dtype: 'int8' is none of float32, float16, bfloat16"):
        placement.place(model, None, "int8")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here")
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_model_loaded_onto_a_gpu(tmp_path: Path, dtype: str) -> None:
    job = make_toy_job(1, 64, 1)
    result = epmq.quantize(job.merged, job.experts, job.calibration, epmq.QuantConfig(group_size=32), device="cpu")
    epmq.save(result, tmp_path / "out")
    model = epmq.load(tmp_path / "out", copy.deepcopy(job.merged), "cuda", dtype)
    layers = [module for module in model.modules() if isinstance(module, QuantLinear)]
    assert layers and all(layer.packed is None for layer in layers)
    ids = torch.arange(24).view(2, 12)
    with torch.no_grad():
        logits, wanted = model(ids.cuda()).float().cpu(), result.model(ids)
    # Two blocks of a dozen 16-bit roundings each.
    assert float((logits - wanted).norm() / wanted.norm()) < 24 * torch.finfo(getattr(torch, dtype)).eps
    assert all(
        torch.equal(t.cpu(), result.model.state_dict()[n]) for n, t in model.state_dict().items() if "packed" in n
    )
