"""Loads the compiled extension ``epmq._C`` where it is built, and offers its operators to :mod:`epmq.ops`.

The extension is optional: without it everything runs as PyTorch, which is told once. One that is there but cannot be
loaded, or not with what the environment asks for, is an error at its first use; ``EPMQ_EXTENSION=0`` ignores it.
"""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Callable
from functools import cache, partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from epmq.errors import ConfigError, EpmqError, ExtensionError, first_line
from epmq.gradient import gradient, in_forward_mode, keep
from epmq.rows import kept_rows

# Columns from which products with 16 significant bits, and those in fp32, are preferred.
LEAST_ROUNDED, LEAST_SUBTRACTED = 1536, 512
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
ABSENT = "no compiled extension: many times slower on a CPU; see README, The compiled extension."

log = logging.getLogger("epmq")


def load() -> ModuleType | None:
    """The module ``epmq._C``, or None when it was not built or ``EPMQ_EXTENSION=0``.

    Raises ExtensionError for one that cannot be loaded, ConfigError for environment variables it cannot follow.
    """
    wanted = os.environ.get("EPMQ_EXTENSION", "")
    if wanted not in ("", "0", "1"):
        raise ConfigError(
            f"EPMQ_EXTENSION={wanted} is not understood; use 0 to ignore the extension, or leave it unset."
        )
    if wanted == "0":
        return None
    try:
        module = importlib.import_module("epmq._C")
    except ModuleNotFoundError as error:
        if error.name == "epmq._C":
            return None
        raise
    except ImportError as error:
        raise ExtensionError(
            f"epmq._C is built but cannot be loaded ({error}); rebuild it for torch {torch.__version__}, "
            "or set EPMQ_EXTENSION=0 to run without it."
        ) from error
    check_torch(module.build_info()["torch"], torch.__version__)
    try:
        module.cpu_level()
    except ValueError as error:
        raise ConfigError(first_line(error)) from error
    return module


def check_torch(built: str, running: str) -> None:
    """Refuse an extension of another torch, whose symbols may be there and mean something else."""
    if built.split(".")[:2] != running.split(".")[:2]:
        raise ExtensionError(
            f"epmq._C was built for torch {built}, and this is torch {running}; rebuild it, "
            "or set EPMQ_EXTENSION=0 to run without it."
        )


def _loaded() -> tuple[ModuleType | None, EpmqError | None]:
    try:
        return load(), None
    except EpmqError as error:
        return None, error


# An import that fails could be told by nobody but Python.
module, refusal = _loaded()


def check() -> None:
    """Raise what :func:`load` raised when this package was imported."""
    if refusal is not None:
        raise refusal.with_traceback(None)


def notes(device: torch.device) -> list[str]:
    """For the report: that there is no extension for work on ``device``, unless that was asked for. Logged once."""
    if module is not None or device.type != "cpu" or os.environ.get("EPMQ_EXTENSION") == "0":
        return []
    _tell_absence()
    return [ABSENT]


@cache
def _tell_absence() -> None:
    log.warning(ABSENT)


def build_report() -> dict[str, Any]:
    """What was built and what this CPU uses of it; empty without the extension."""
    check()
    if module is None:
        return {}
    cpu = {"cpu_levels": module.cpu_levels(), "cpu_level": module.cpu_level(), "cpu_vendor": module.cpu_vendor()}
    return {**module.build_info(), **cpu}


def _on(device: str, *tensors: Tensor | None) -> bool:
    return all(tensor is None or tensor.device.type == device for tensor in tensors)


def accumulates(
    reachable: Callable[..., bool],
    sums_in: tuple[torch.dtype, ...],
    x: Tensor,
    hessian: Tensor,
    sum_x: Tensor,
    target: Tensor | None = None,
    cross: Tensor | None = None,
    sum_target: Tensor | None = None,
    row_weights: Tensor | None = None,
) -> bool:
    """Whether compiled forms take this call: floats and contiguous sums of one of ``sums_in``, all ``reachable``."""
    sums = [tensor for tensor in (hessian, sum_x, cross, sum_target) if tensor is not None]
    return (
        reachable(x, *sums, target, row_weights)
        and x.dtype in FLOATS
        and (target is None or target.dtype in FLOATS)
        and hessian.dtype in sums_in
        and all(tensor.dtype == hessian.dtype and tensor.is_contiguous() for tensor in sums)
    )


def _accumulates_on_cuda(x: Tensor, *args: Any, **kwargs: Any) -> bool:
    target, row_weights = _argument(args, kwargs, 2, "target"), _argument(args, kwargs, 5, "row_weights")
    return (
        accumulates(partial(_on, "cuda"), (torch.float32,), x, *args, **kwargs)
        and has_code(build_report()["cuda_archs"], _capability(x))
        and (target is None or target.dtype == x.dtype)
        and (row_weights is None or (row_weights.dtype == torch.float32 and row_weights.is_contiguous()))
    )


def has_code(archs: str, capability: tuple[int, int]) -> bool:
    """Whether a build for ``archs`` ("sm_80 sm_90") runs on a GPU: machine code serves later ones of its generation."""
    built = (divmod(int(arch.removeprefix("sm_")), 10) for arch in archs.split())
    return any(capability[0] == major and capability[1] >= minor for major, minor in built)


def _capability(x: Tensor) -> tuple[int, int]:
    # Of the ways to ask this, the one that torch.compile takes for a constant.
    facts = torch.cuda.get_device_properties(x.device)
    return facts.major, facts.minor


def _accumulate_on_cuda(
    x: Tensor,
    hessian: Tensor,
    sum_x: Tensor,
    target: Tensor | None = None,
    cross: Tensor | None = None,
    sum_target: Tensor | None = None,
    row_weights: Tensor | None = None,
) -> None:
    x, target, weights = kept_rows(x, target, row_weights)
    torch.ops.epmq_native.accumulate(x, hessian, sum_x, target, cross, sum_target, weights)


def _argument(args: tuple[Any, ...], kwargs: dict[str, Any], place: int, name: str) -> Any:
    return args[place] if len(args) > place else kwargs.get(name)


def sweeps(
    reachable: Callable[..., bool],
    weight: Tensor,
    unit_upper: Tensor,
    scales: Tensor,
    zeros: Tensor,
    group_of: Tensor,
    bits: int,
) -> bool:
    """Whether compiled forms take this call: fp32, all of it ``reachable``."""
    floats = (weight, unit_upper, scales, zeros)
    return reachable(*floats, group_of) and all(tensor.dtype == torch.float32 for tensor in floats)


def rounds_products() -> bool:
    """Whether the compiled products of the target's solve take 16 significant bits: on matrix tiles."""
    return module is not None and bool(module.cpu_level() == "amx")


def beats_library() -> bool:
    """Whether MKL's fp32 products are the slower ones: it uses half of AVX-512 where Intel is not the maker."""
    if module is None or module.cpu_vendor() == "GenuineIntel":
        return False
    return bool(module.cpu_level().startswith("avx512")) and torch.backends.mkl.is_available()


def _subtracts(out: Tensor, a: Tensor, b: Tensor) -> bool:
    """Where it pays. Not by the number of rows: a share of them must get the same bits."""
    if rounds_products():
        return b.shape[1] >= LEAST_ROUNDED and _subtractable(out, a, b)
    return b.shape[1] >= LEAST_SUBTRACTED and beats_library() and _subtractable(out, a, b)


def _subtracts_gram(out: Tensor, a: Tensor) -> bool:
    return beats_library() and _subtractable(out, a)


def _subtractable(out: Tensor, *factors: Tensor) -> bool:
    given = (out, *factors)
    return _on("cpu", *given) and all(tensor.dtype == torch.float32 for tensor in given) and out.stride(1) == 1


def _weighs_grids(
    weight: Tensor,
    scales: Tensor,
    zeros: Tensor,
    bits: int,
    group_size: int,
    power: float,
    importance: Tensor | None = None,
) -> bool:
    given = [tensor for tensor in (weight, scales, zeros, importance) if tensor is not None]
    return _on("cpu", *given) and all(tensor.dtype == torch.float32 for tensor in given)


def _multiplies(
    x: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, bits: int, group_size: int
) -> bool:
    # Written out, for it is asked about every product of one token.
    return (
        x.is_cpu
        and packed.is_cpu
        and scales.is_cpu
        and (zeros is None or zeros.is_cpu)
        and (bias is None or bias.is_cpu)
        and x.dtype in FLOATS
        and scales.dtype in FLOATS
        and not in_forward_mode()
    )


def _dequant_matmul(
    product: Callable[..., Tensor],
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group_size: int,
) -> Tensor:
    """Past autograd where no gradient is kept: what torch runs there in Python takes as long as a small product."""
    keeps = x.requires_grad or (bias is not None and bias.requires_grad)
    if (keeps and torch.is_grad_enabled()) or torch.compiler.is_compiling():
        return product(x, packed, scales, zeros, bias, bits, group_size)
    with torch._C._AutoDispatchBelowAutograd():
        return product(x, packed, scales, zeros, bias, bits, group_size)


def _on_one_device(fake: Callable[..., Any], first: Tensor, *args: Any, **kwargs: Any) -> Any:
    """One meta tensor among real ones brings a call here, where nothing is computed."""
    for given in (*args, *kwargs.values()):
        if isinstance(given, Tensor) and given.device != first.device:
            raise ValueError(f"all tensors must be on one device, got {first.device} and {given.device}.")
    return fake(first, *args, **kwargs)


def _register_fakes() -> None:
    """Shapes without data, for torch.compile and opcheck, and the gradient of the matmul."""

    def writes(*_: Any) -> None:
        return None

    def gptq_sweep(weight: Tensor, *_: Any) -> Tensor:
        return weight.new_empty(weight.shape, dtype=torch.uint8)

    def grid_losses(weight: Tensor, scales: Tensor, *_: Any) -> Tensor:
        return scales.new_empty(scales.shape)

    def dequant_matmul(x: Tensor, packed: Tensor, *_: Any) -> Tensor:
        return x.new_empty((x.shape[0], packed.shape[0]))

    fakes = {"accumulate": writes, "subtract_product": writes, "subtract_gram": writes}
    for name, fake in (fakes | {form.__name__: form for form in (gptq_sweep, grid_losses, dequant_matmul)}).items():
        torch.library.register_fake(f"epmq_native::{name}", partial(_on_one_device, fake))

    torch.library.register_autograd("epmq_native::dequant_matmul", gradient, setup_context=keep)


def offer(register: Callable[..., None]) -> None:
    """Register the compiled forms of the operations, where there are any."""
    if module is None:
        return
    _register_fakes()
    native, on_cpu = torch.ops.epmq_native, partial(_on, "cpu")
    # fp32 sums of some hundred rows at a time are added to fp64 ones.
    register("accumulate", "cpp", native.accumulate, partial(accumulates, on_cpu, (torch.float32, torch.float64)))
    register("gptq_sweep", "cpp", native.gptq_sweep, partial(sweeps, on_cpu))
    register("subtract_product", "cpp", native.subtract_product, _subtracts)
    register("subtract_gram", "cpp", native.subtract_gram, _subtracts_gram)
    register("grid_losses", "cpp", native.grid_losses, _weighs_grids)
    register("dequant_matmul", "cpp", partial(_dequant_matmul, native.dequant_matmul.default), _multiplies)
    if module.build_info()["cuda_archs"]:
        register("accumulate", "cuda", _accumulate_on_cuda, _accumulates_on_cuda)
