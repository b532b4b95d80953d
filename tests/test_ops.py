"""The operations as torch knows them, what they refuse, and which of their forms runs.

EPMQ_CPU=plain|avx2|avx512|avx512bf16|amx runs the tests of the operations through one instruction set, ``make
test-levels`` through each.
"""

from __future__ import annotations

import pytest
import torch
from forms import compiled, matmul_problem, moments, run_python, seeded, sweep_problem

from epmq import extension
from epmq.quantized import pack, packed_words


@compiled
def test_operators_pass_opcheck() -> None:
    native = torch.ops.epmq_native
    codes, scales, zeros = matmul_problem(20, 96, 32, 4, False)
    packed = pack(codes, 4)
    for x in (seeded(3, 96), seeded(3, 96).requires_grad_()):
        torch.library.opcheck(native.dequant_matmul.default, (x, packed, scales, zeros, seeded(20), 4, 32))
    torch.library.opcheck(native.gptq_sweep.default, (*sweep_problem(20, 60, 32, 4, True), 4))
    torch.library.opcheck(native.subtract_product.default, (seeded(9, 7), seeded(9, 5), seeded(5, 7)))
    torch.library.opcheck(native.subtract_gram.default, (seeded(9, 9), seeded(9, 5)))
    target = seeded(9, 5)
    hessian, sum_x, cross, sum_target = moments(16, 5)
    torch.library.opcheck(
        native.accumulate.default, (seeded(9, 16), hessian, sum_x, target, cross, sum_target, torch.ones(9))
    )


@compiled
def test_what_is_written_to_counts_as_changed() -> None:
    native = torch.ops.epmq_native
    sums = [torch.zeros(4, 4), torch.zeros(4), torch.zeros(2, 4), torch.zeros(2)]
    native.accumulate(seeded(3, 4), sums[0], sums[1], seeded(3, 2), sums[2], sums[3])
    assert [tensor._version for tensor in sums] == [1, 1, 1, 1]
    out, kept = torch.zeros(8, 8), torch.ones(8, 8, requires_grad=True)
    y = (kept * out).sum()
    native.subtract_product(out, seeded(8, 4), seeded(4, 8))
    native.subtract_gram(out, seeded(8, 4))
    assert out._version == 2
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()
    with pytest.raises(RuntimeError, match="subtract_product: a tensor that requires a gradient"):
        native.subtract_product(kept, seeded(8, 4), seeded(4, 8))
    with torch.no_grad():
        native.subtract_product(kept, seeded(8, 4), seeded(4, 8))
    with torch.inference_mode():
        native.subtract_gram(torch.zeros(8, 8), seeded(8, 4))


@compiled
def test_bad_arguments_are_refused_by_name() -> None:
    native = torch.ops.epmq_native
    codes, scales, zeros = matmul_problem(20, 96, 32, 4, False)
    packed = pack(codes, 4)
    for wanted, arguments in {
        "packed": (seeded(3, 97), packed, scales, zeros, None, 4, 32),
        "scales": (seeded(3, 96), packed, scales[:, :2], zeros, None, 4, 32),
        "zeros": (seeded(3, 96), packed, scales, zeros.int(), None, 4, 32),
        "bias": (seeded(3, 96), packed, scales, zeros, seeded(19), 4, 32),
        "bits": (seeded(3, 96), packed, scales, zeros, None, 5, 32),
    }.items():
        with pytest.raises(ValueError, match=wanted):
            native.dequant_matmul(*arguments)
    weight, upper, scales, zeros, groups = sweep_problem(20, 60, 32, 4, True)
    with pytest.raises(ValueError, match="group_of"):
        native.gptq_sweep(weight, upper, scales, zeros, groups + 2, 4)
    with pytest.raises(ValueError, match="out"):
        native.subtract_product(seeded(9, 6), seeded(9, 5), seeded(5, 7))
    with pytest.raises(ValueError, match="rows without gaps"):
        native.subtract_product(seeded(9, 14)[:, ::2], seeded(9, 5), seeded(5, 7))
    with pytest.raises(ValueError, match="out"):
        native.subtract_gram(seeded(9, 8), seeded(9, 5))
    with pytest.raises(ValueError, match="hessian"):
        native.accumulate(seeded(3, 4), torch.zeros(5, 5), torch.zeros(4))
    with pytest.raises(ValueError, match="sum_x"):
        native.accumulate(seeded(3, 4), torch.zeros(4, 4, dtype=torch.float64), torch.zeros(4))
    with pytest.raises(ValueError, match="hessian"):
        native.accumulate(seeded(3, 4), torch.zeros(4, 4, dtype=torch.int32), torch.zeros(4))
    with pytest.raises(ValueError, match="target: expected"):
        native.accumulate(seeded(3, 4), torch.zeros(4, 4), torch.zeros(4), seeded(3), torch.zeros(3, 4), torch.zeros(3))
    with pytest.raises(RuntimeError, match="refers to a single memory location"):
        native.subtract_product(torch.zeros(1, 8).expand(8, 8), seeded(8, 4), seeded(4, 8))
    with pytest.raises(RuntimeError, match="refers to a single memory location"):
        native.subtract_gram(torch.zeros(1, 8).expand(8, 8), seeded(8, 4))


@compiled
def test_one_meta_tensor_among_real_ones_is_refused() -> None:
    native = torch.ops.epmq_native
    x, (codes, scales, _) = seeded(2, 96), matmul_problem(20, 96, 32, 4, True)
    packed = pack(codes, 4)
    with pytest.raises(ValueError, match="one device, got cpu and meta"):
        native.dequant_matmul(x, packed, scales, None, torch.zeros(20, device="meta"), 4, 32)
    with pytest.raises(ValueError, match="one device, got meta and cpu"):
        native.dequant_matmul(x.to("meta"), packed, scales, None, None, 4, 32)
    with pytest.raises(ValueError, match="one device, got cpu and meta"):
        native.accumulate(x, torch.zeros(96, 96, device="meta"), torch.zeros(96))


def test_the_packed_layout_is_a_little_endian_stream() -> None:
    codes = torch.arange(40, dtype=torch.uint8).remainder(16).unsqueeze(0)
    packed = pack(codes, 4)
    assert packed.shape == (1, packed_words(40, 4))
    assert packed.view(torch.uint8)[0, :4].tolist() == [0x10, 0x32, 0x54, 0x76]


def test_the_package_works_without_the_extension() -> None:
    code = "from epmq import extension, ops; print(extension.module, ops.implementations('gptq_sweep')[-1].backend)"
    result = run_python(code, EPMQ_EXTENSION="0")
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "None reference"


@compiled
def test_an_extension_of_another_torch_is_refused() -> None:
    use = "from epmq import ops; ops.subtract_gram(torch.eye(2), torch.ones(2, 1))"
    result = run_python(f"import torch; torch.__version__ = '2.99.1'; {use}")
    assert result.returncode != 0
    assert "and this is torch 2.99.1; rebuild it, or set EPMQ_EXTENSION=0" in result.stderr
    extension.check_torch("2.13.0", "2.13.1+cpu")


@pytest.mark.parametrize(
    "capability, runs", [((7, 5), False), ((8, 0), True), ((8, 9), True), ((9, 0), True), ((10, 0), False)]
)
def test_cuda_code_runs_on_its_own_generation_alone(capability: tuple[int, int], runs: bool) -> None:
    assert extension.has_code("sm_80 sm_90", capability) == runs
    assert not extension.has_code("", capability) and not extension.has_code("sm_86", (8, 0))


@compiled
def test_an_unknown_instruction_set_is_refused() -> None:
    use = "import torch; from epmq import ops; ops.subtract_gram(torch.eye(2), torch.ones(2, 1))"
    result = run_python(use, EPMQ_CPU="sse9")
    assert result.returncode != 0
    assert "EPMQ_CPU=sse9 is not an instruction set of this build" in result.stderr


@compiled
@pytest.mark.parametrize("level", extension.module.cpu_levels() if extension.module else [])
def test_each_instruction_set_of_this_cpu_can_be_chosen(level: str) -> None:
    result = run_python("from epmq import extension; print(extension.build_report()['cpu_level'])", EPMQ_CPU=level)
    assert result.stdout.strip() == level, result.stderr
