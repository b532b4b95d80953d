"""QuantLinear keeps nn.Linear's contract, with the weight packed."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import ToyModel
from torch import Tensor, nn
from torch.autograd import forward_ad

from epmq import QuantLinear, replace_linear, restore_linear
from epmq.errors import ConfigError, NumericalError
from epmq.linear import quant_linear
from epmq.quantized import pack, packed_words, unpack

FLOATS = [torch.float32, torch.float16, torch.bfloat16]
GRIDS = [(2, 32, False), (3, 32, True), (4, 128, False), (8, -1, True), (3, 7, False)]


def name_of(value: Any) -> str:
    return str(value).removeprefix("torch.")


def layer_and_linear(
    bits: int = 4, group_size: int = 32, sym: bool = False, bias: bool = True, dtype: torch.dtype = torch.float32
) -> tuple[QuantLinear, nn.Linear]:
    """A QuantLinear 70 -> 20 and the nn.Linear with exactly its dequantized weight."""
    linear = nn.Linear(70, 20, bias, dtype=dtype)
    layer = QuantLinear.from_linear(linear, bits, group_size, sym)
    return layer, layer.to_linear()


def assert_product(y: Tensor, x: Tensor, layer: QuantLinear) -> None:
    """y against the fp64 product with the dequantized weight, within K roundings of fp32 and one of y's dtype."""
    weight = layer.quantized().dequantize().double()
    exact, size = x.double() @ weight.T, x.double().abs() @ weight.abs().T
    if layer.bias is not None:
        exact, size = exact + layer.bias.double(), size + layer.bias.double().abs()
    bound = 2 * x.shape[-1] * 2.0**-24 * size + torch.finfo(y.dtype).eps * exact.abs()
    assert y.shape == exact.shape
    assert bool(((y.double() - exact).abs() <= bound).all())


@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize(("bits", "group_size", "sym"), GRIDS)
def test_output_is_the_dequantized_product(
    bits: int, group_size: int, sym: bool, bias: bool, dtype: torch.dtype
) -> None:
    layer, linear = layer_and_linear(bits, group_size, sym, bias, dtype)
    x = torch.randn(9, 70, dtype=dtype)
    y = layer(x)
    assert y.dtype == dtype
    assert_product(y, x, layer)
    assert linear.weight.dtype == dtype
    assert (linear.bias is None) == (layer.bias is None) == (not bias)


@pytest.mark.parametrize("shape", [(70,), (1, 70), (2, 3, 70), (2, 3, 4, 70), (0, 70), (2, 0, 70)], ids=str)
def test_any_leading_shape(shape: tuple[int, ...]) -> None:
    layer, linear = layer_and_linear()
    x = torch.randn(shape)
    assert layer(x).shape == linear(x).shape
    assert_product(layer(x), x, layer)


def test_inputs_need_not_be_contiguous() -> None:
    layer, _ = layer_and_linear()
    x = torch.randn(70, 5, 2).permute(2, 1, 0)
    assert torch.equal(layer(x), layer(x.contiguous()))
    wide = torch.randn(4, 140)[:, ::2]
    assert torch.equal(layer(wide), layer(wide.contiguous()))


@pytest.mark.parametrize("shape", [(4, 35), (4, 140), (71,), (2, 69)])
def test_a_wrong_number_of_features_is_refused(shape: tuple[int, ...]) -> None:
    layer, linear = layer_and_linear()
    for module in (linear, layer):
        with pytest.raises(RuntimeError, match="shape"):
            module(torch.randn(shape))


@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
@pytest.mark.parametrize("sym", [False, True])
def test_gradients_reach_input_and_bias_as_in_nn_linear(sym: bool, dtype: torch.dtype) -> None:
    layer, linear = layer_and_linear(sym=sym, dtype=dtype)
    x, grad = torch.randn(3, 4, 70, dtype=dtype, requires_grad=True), torch.randn(3, 4, 20, dtype=dtype)
    layer(x).backward(grad)
    assert x.grad is not None
    weight = layer.quantized().dequantize().double()
    exact, size = grad.double() @ weight, grad.double().abs() @ weight.abs()
    bound = 2 * 20 * 2.0**-24 * size + torch.finfo(dtype).eps * exact.abs()
    assert bool(((x.grad.double() - exact).abs() <= bound).all())
    assert layer.bias is not None
    assert layer.bias.grad is not None
    linear(x.detach()).backward(grad)
    total = grad.double().sum((0, 1))
    for bias in (layer.bias, linear.bias):
        assert bias.grad is not None
        # A sum of 12 numbers in their own dtype.
        assert bool(((bias.grad.double() - total).abs() <= 12 * torch.finfo(dtype).eps * 12).all())
    assert [name for name, _ in layer.named_parameters()] == ["bias"]


def test_gradient_of_the_input_alone() -> None:
    layer, _ = layer_and_linear(bias=False)
    x = torch.randn(2, 70, requires_grad=True)
    (gradient,) = torch.autograd.grad(layer(x).sum(), x)
    assert torch.allclose(gradient, layer.weight.sum(0).expand(2, 70), atol=20 * 2.0**-22)


@pytest.mark.parametrize("backend", ["", "reference"])
def test_derivatives_are_carried_forward(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EPMQ_BACKEND", backend)
    torch.manual_seed(0)
    layer = QuantLinear.from_linear(nn.Linear(64, 8), 4, 32)
    dense = layer.to_linear()
    x, direction = torch.randn(3, 64), torch.randn(3, 64)
    found, tangent = torch.func.jvp(layer, (x,), (direction,))[:2]
    torch.testing.assert_close(found, dense(x))
    torch.testing.assert_close(tangent, direction @ dense.weight.T)
    torch.testing.assert_close(torch.func.jacfwd(layer)(x[0]), dense.weight)
    with torch.no_grad(), forward_ad.dual_level():
        pair = forward_ad.unpack_dual(layer(forward_ad.make_dual(x, direction)))
    torch.testing.assert_close(pair.tangent, direction @ dense.weight.T)


def test_a_frozen_layer_under_an_adapter_trains_the_adapter() -> None:
    layer, _ = layer_and_linear()
    down, up = nn.Linear(70, 2, bias=False), nn.Linear(2, 20, bias=False)
    before = layer.packed.clone()
    x, wanted = torch.randn(32, 70), torch.randn(32, 20)
    optimizer = torch.optim.SGD([*down.parameters(), *up.parameters()], lr=0.02)
    losses = []
    for _ in range(20):
        loss = (layer(x) + up(down(x)) - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert torch.equal(layer.packed, before)


@pytest.mark.parametrize("sym", [False, True])
@pytest.mark.parametrize("bias", [True, False])
def test_state_dict_round_trip(sym: bool, bias: bool) -> None:
    layer, _ = layer_and_linear(3, 32, sym, bias)
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    fresh = QuantLinear(70, 20, bias, 3, 32, sym)
    fresh.load_state_dict(torch.load(buffer, weights_only=True))
    x = torch.randn(5, 70)
    assert torch.equal(fresh(x), layer(x))
    assert ("zeros" in layer.state_dict()) == (not sym)


def test_deepcopy_is_apart() -> None:
    layer, _ = layer_and_linear()
    twin = copy.deepcopy(layer)
    x = torch.randn(5, 70)
    before = layer(x)
    twin.packed.zero_()
    twin.scales.mul_(2)
    assert torch.equal(layer(x), before)
    assert not torch.equal(twin(x), before)


@pytest.mark.parametrize("start", FLOATS, ids=name_of)
@pytest.mark.parametrize("end", [*FLOATS, torch.float64], ids=name_of)
def test_a_change_of_dtype_keeps_scales_and_changes_the_bias(start: torch.dtype, end: torch.dtype) -> None:
    layer, _ = layer_and_linear(dtype=start)
    weight = layer.quantized().dequantize()
    scales = layer.scales.clone()
    layer.to(end)
    assert layer.scales.dtype == start
    assert torch.equal(layer.scales, scales)
    assert torch.equal(layer.quantized().dequantize(), weight)
    assert layer.bias is not None
    assert layer.bias.dtype == end
    assert (layer.packed.dtype, layer.zeros is not None and layer.zeros.dtype) == (torch.int32, torch.uint8)
    x = torch.randn(2, 70, dtype=end)
    assert layer(x).dtype == end


def test_half_and_back_inside_a_model_changes_no_weight() -> None:
    model = nn.Sequential(nn.Linear(70, 20), nn.ReLU(), nn.Linear(20, 3))
    replace_linear(model, group_size=32)
    first = model[0]
    assert isinstance(first, QuantLinear)
    before = first.quantized().dequantize()
    model.half().float()
    assert torch.equal(first.quantized().dequantize(), before)


def test_codes_stay_packed_in_memory() -> None:
    layer, _ = layer_and_linear(4, 32, True, bias=False)
    layer(torch.randn(3, 70))
    held = sum(t.numel() * t.element_size() for t in layer.state_dict().values())
    assert held == 20 * packed_words(70, 4) * 4 + 20 * 3 * 4
    assert layer.weight.shape == (20, 70)


@pytest.mark.parametrize(("bits", "group_size", "sym"), GRIDS)
def test_quantized_form_round_trip(bits: int, group_size: int, sym: bool) -> None:
    layer, _ = layer_and_linear(bits, group_size, sym)
    twin = QuantLinear.from_quantized(layer.quantized(), layer.bias)
    assert torch.equal(pack(unpack(layer.packed, bits, 70), bits), twin.packed)
    x = torch.randn(3, 70)
    assert torch.equal(layer(x), twin(x))
    assert (twin.in_features, twin.out_features, twin.bits, twin.group_size, twin.sym) == (
        70,
        20,
        bits,
        group_size,
        sym,
    )


@pytest.mark.parametrize("clip", ["none", "mse"])
def test_from_linear_rounds_to_nearest(clip: str) -> None:
    linear = nn.Linear(64, 8)
    layer = QuantLinear.from_linear(linear, bits=4, group_size=32, clip=clip)  # type: ignore[arg-type]
    zeros = layer.zeros
    assert zeros is not None
    scales, places = layer.scales.repeat_interleave(32, 1), zeros.float().repeat_interleave(32, 1)
    nearest = (torch.round(linear.weight.detach() / scales) + places).clamp(0, 15)
    off = (layer.quantized().codes.float() - nearest).abs()
    # Multiplying by the inverse scale may decide a tie the other way.
    assert float(off.max()) <= 1
    assert float(off.mean()) < 0.01


@pytest.mark.parametrize("changes", [{"bits": 5}, {"bits": 16}, {"group_size": 0}, {"group_size": -2}])
def test_impossible_settings_are_refused(changes: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=next(iter(changes))):
        QuantLinear(64, 8, **changes)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=next(iter(changes))):
        QuantLinear.from_linear(nn.Linear(64, 8), **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("sym", "bias", "dtype"),
    [
        (False, True, torch.float32),
        (True, False, torch.float32),
        (True, True, torch.float16),
        (False, False, torch.bfloat16),
    ],
    ids=name_of,
)
def test_opcheck(sym: bool, bias: bool, dtype: torch.dtype) -> None:
    layer, _ = layer_and_linear(3, 32, sym, bias, dtype)
    x = torch.randn(4, 70, dtype=dtype, requires_grad=True)
    torch.library.opcheck(
        quant_linear, (x, layer.packed, layer.scales, layer.zeros, layer.bias, layer.bits, layer.group_size)
    )


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compile_without_graph_breaks() -> None:
    model = nn.Sequential(nn.Linear(70, 20), nn.GELU(), nn.Linear(20, 3, bias=False))
    replace_linear(model, group_size=32)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 5, 70, requires_grad=True)
    ours, wanted = compiled(x), model(x)
    assert torch.equal(ours, wanted)
    gradients = [torch.autograd.grad(y.square().sum(), x)[0] for y in (ours, wanted)]
    assert torch.allclose(gradients[0], gradients[1], atol=1e-5)
    with torch.no_grad():
        assert torch.equal(compiled(x[:1]), model(x[:1]))


def test_replace_and_restore_a_model() -> None:
    model = ToyModel()
    ids = torch.randint(0, 40, (2, 6))
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    weights = {name: model.get_submodule(name).weight.detach().clone() for name in names}  # type: ignore[union-attr,operator]
    assert replace_linear(model, bits=8, group_size=16) == names
    assert not any(isinstance(module, nn.Linear) for module in model.modules())
    quantized = model(ids)
    assert restore_linear(model) == names
    assert not any(isinstance(module, QuantLinear) for module in model.modules())
    assert torch.allclose(model(ids), quantized, atol=1e-4)
    for name in names:
        linear = model.get_submodule(name)
        assert type(linear) is nn.Linear
        step = (weights[name].amax(1) - weights[name].amin(1)).max() / 255
        assert float((linear.weight.detach() - weights[name]).abs().max()) <= float(step)


def test_replace_obeys_include_and_exclude() -> None:
    model = ToyModel()
    names = replace_linear(model, group_size=16, include=["query", "key", "head"], exclude=[r"blocks\.1", "head"])
    assert names == ["blocks.0.query", "blocks.0.key"]


class Renamed(nn.Linear):
    """As Falcon's: an nn.Linear that computes the same in other words."""

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T if self.bias is None else x @ self.weight.T + self.bias


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = super().forward(x) * 0.1
        return y


class Told(nn.Linear):
    def forward(self, x: Tensor, scale: float) -> Tensor:  # type: ignore[override]
        y: Tensor = super().forward(x) * scale
        return y


def test_linears_that_compute_something_else_are_left_alone() -> None:
    model = nn.ModuleDict({kind.__name__: kind(8, 8) for kind in (nn.Linear, Renamed, Scaled, Told)})
    model["patched"] = patched = nn.Linear(8, 8)
    patched.forward = lambda x: 2.0 * nn.functional.linear(x, patched.weight)  # type: ignore[method-assign, assignment]
    model["attention"] = nn.MultiheadAttention(8, 2)
    before = torch.random.get_rng_state()
    assert replace_linear(model, group_size=8) == ["Linear", "Renamed"]
    assert torch.equal(torch.random.get_rng_state(), before)


def test_replace_and_restore_keep_the_training_mode() -> None:
    model = nn.ModuleDict({"plain": nn.Linear(8, 8)}).eval()
    for change in (replace_linear, restore_linear):
        change(model)
        assert not model["plain"].training


def test_layer_text_names_its_facts() -> None:
    text = repr(QuantLinear(64, 8, bits=3, group_size=32, sym=True))
    for fact in ("in_features=64", "out_features=8", "bits=3", "group_size=32", "sym=True", "bias=True"):
        assert fact in text


def test_device_and_dtype_of_the_constructor() -> None:
    layer = QuantLinear(64, 8, device="meta", dtype=torch.bfloat16)
    assert {t.device.type for t in layer.state_dict().values()} == {"meta"}
    assert (layer.scales.dtype, layer.bias is not None and layer.bias.dtype) == (torch.bfloat16, torch.bfloat16)


def test_what_a_weight_is_like_can_be_asked_without_computing_it(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, _ = layer_and_linear(dtype=torch.float16)
    wanted = layer.quantized().dequantize(torch.float16)
    computed: list[int] = []

    def dequantize() -> Tensor:
        computed.append(1)
        return wanted

    monkeypatch.setattr(layer, "_dequantize", dequantize)
    weight = layer.weight
    assert isinstance(weight, torch.Tensor)
    assert (weight.dtype, weight.device, weight.shape) == (torch.float16, torch.device("cpu"), (20, 70))
    assert (weight.size(1), weight.dim(), weight.ndim, weight.numel(), len(weight)) == (70, 2, 2, 1400, 20)
    assert weight.is_floating_point() and not weight.requires_grad and not weight.is_cuda and not computed
    assert torch.equal(weight, wanted) and torch.equal(weight + 1, wanted + 1) and len(computed) == 1


@pytest.mark.parametrize(
    "use",
    [
        lambda w: w.numpy(),
        lambda w: w.tolist(),
        lambda w: w[2:5, ::3],
        lambda w: w.T.contiguous(),
        lambda w: list(w),
        lambda w: w.data,
        lambda w: w.detach().float().numpy(),
        lambda w: float(w.abs().max()),
        lambda w: repr(w),
        lambda w: nn.Parameter(w.detach()).data,
        lambda w: copy.deepcopy(w),
        lambda w: pickle.loads(pickle.dumps(w)),
        lambda w: torch.cat([w, w]),
        lambda w: torch.empty(20, 70).copy_(w),
        lambda w: torch.nn.functional.linear(torch.ones(1, 70), w),
        lambda w: torch.ops.aten.mul.Tensor(w, w),
        lambda w: torch.utils.dlpack.from_dlpack(w),
        lambda w: w.stride(),
        lambda w: w.is_contiguous(),
        lambda w: w.untyped_storage().nbytes(),
        lambda w: w == w,
    ],
)
def test_a_weight_is_a_tensor_like_any_other(use: Callable[[Any], Any]) -> None:
    layer, _ = layer_and_linear()
    found, wanted = use(layer.weight), use(layer.quantized().dequantize())
    if isinstance(wanted, torch.Tensor):
        assert type(found) is torch.Tensor and torch.equal(found, wanted)
    else:
        assert str(found) == str(wanted)


def test_a_converted_layer_has_the_weight_of_a_converted_linear() -> None:
    layer, _ = layer_and_linear()
    weight, x = layer.weight.bfloat16(), torch.randn(3, 70).bfloat16()
    layer.bfloat16()
    assert layer.weight.dtype == torch.bfloat16 and torch.equal(layer.weight, weight)
    assert torch.equal(layer.to_linear()(x), torch.nn.functional.linear(x, weight, layer.bias))
    assert layer.float().weight.dtype == torch.float32


@pytest.mark.parametrize(
    "x",
    [torch.ones(1, 70, dtype=torch.long), torch.ones(2, 71), torch.ones(0, 71), torch.ones(1, 70) > 0, torch.ones(())],
)
def test_inputs_that_are_no_floats_of_the_right_width_are_refused(x: Tensor) -> None:
    layer, _ = layer_and_linear()
    with pytest.raises(RuntimeError, match=r"takes floats whose last dimension is 70"):
        layer(x)
    with pytest.raises(RuntimeError, match=r"complex64"):
        layer(torch.ones(1, 70, dtype=torch.complex64))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=name_of)
def test_autocast_rules_over_the_inputs_dtype(dtype: torch.dtype) -> None:
    layer, linear = layer_and_linear()
    x = torch.randn(3, 70, requires_grad=True)
    with torch.autocast("cpu", dtype):
        y, wanted = layer(x), linear(x)
        assert layer(x.double()).dtype == torch.float64
    assert y.dtype == wanted.dtype == dtype
    assert torch.equal(y, layer(x.to(dtype)))
    (gradient,) = torch.autograd.grad(y.float().sum(), x)
    assert gradient.dtype == torch.float32


def test_no_conversion_touches_the_codes() -> None:
    layer, _ = layer_and_linear()
    weight = layer.quantized().dequantize()
    layer.type(torch.bfloat16)
    assert torch.equal(layer.quantized().dequantize(), weight)
    assert layer.weight.dtype == torch.bfloat16


def test_a_weight_that_cannot_be_quantized_is_named_and_nothing_is_swapped() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    nn.init.constant_(model[1].weight, float("nan"))  # type: ignore[arg-type]
    with pytest.raises(NumericalError, match=r"^1: the weight holds NaN or Inf"):
        replace_linear(model, group_size=8)
    assert type(model[0]) is nn.Linear
    with pytest.raises(ConfigError, match=r"^0: the weight is on the meta device"):
        replace_linear(nn.Sequential(nn.Linear(8, 8, device="meta")), group_size=8)
    with pytest.raises(ValueError, match=r"not a regular expression"):
        replace_linear(model, include="(")


def test_what_replace_linear_leaves_alone_and_swaps_twice() -> None:
    model = nn.ModuleDict({"embedding": nn.Embedding(8, 8), "head": nn.Linear(8, 8), "lora_A": nn.Linear(8, 2)})
    model["head"].weight = model["embedding"].weight
    model["up"] = model["again"] = nn.Linear(8, 8)
    assert replace_linear(model, group_size=8, exclude="nothing", include="head|up|again") == ["up", "again"]
    assert model["up"] is model["again"] and isinstance(model["up"], QuantLinear)
    assert restore_linear(model) == ["up", "again"] and model["up"] is model["again"]
    assert replace_linear(model, group_size=8, exclude=["again", "up"]) == ["lora_A"]
