"""QuantLinear: a drop-in for nn.Linear whose weight stays packed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from epmq import extension, ops
from epmq.config import ClipSearch, QuantConfig
from epmq.errors import ConfigError, NumericalError
from epmq.gradient import gradient, in_forward_mode, keep
from epmq.kernels.layout import kernel_group, rows_of_words
from epmq.orientation import weight_of
from epmq.quantized import SUPPORTED_BITS, QuantizedTensor, group_count, pack, packed_words, unpack
from epmq.sources import all_finite
from epmq.sweep import quantize_to_nearest
from epmq.unread import UnreadTensor


@torch.library.custom_op("epmq::quant_linear", mutates_args=())
def quant_linear(
    x: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, bits: int, group_size: int
) -> Tensor:
    """``x · dequant(W)ᵀ + bias`` for x ``[M, K]``; see :func:`epmq.reference.dequant_matmul`."""
    return ops.dequant_matmul(x, packed, scales, zeros, bias, bits, group_size)


@quant_linear.register_fake
def _(
    x: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, bits: int, group_size: int
) -> Tensor:
    return x.new_empty(x.shape[0], packed.shape[0])


quant_linear.register_autograd(gradient, setup_context=keep)


class QuantLinear(nn.Module):
    """``y = x · dequant(W)ᵀ + b`` with W as packed codes; takes the place of an nn.Linear of the same size.

    Buffers: packed int32 ``[N, ceil(K*bits/32)]``, scales ``[N, G]`` (keep their dtype through ``.to(dtype)``), zeros
    uint8 ``[N, G]`` or None when symmetric, columns int32 ``[K]`` or None (see :class:`epmq.quantized.QuantizedTensor`;
    inputs are put into that order first). Inputs ``[..., K]`` in fp32, fp16 or bf16; outputs in the same dtype.
    Under autocast the input takes its dtype. Gradients reach the input and the bias, never the codes. Raises
    RuntimeError, as nn.Linear does, for an input of another width or without floats.

    On an NVIDIA GPU 16-bit inputs are multiplied by :mod:`epmq.kernels.int4_matmul`, whose layout of the codes is made
    at the first call and kept beside the buffers; the state dict does not know of it. After :meth:`pack_for_gpu` that
    layout is the one form of the codes: the buffer words takes the place of packed, which is None.
    """

    # The class of what it took the place of: a Conv1D keeps its weight the other way round in files.
    stands_for = "Linear"
    packed: Any  # a Tensor, or None while there is words
    words: Tensor
    scales: Tensor
    zeros: Tensor | None
    columns: Tensor | None
    _converted_to: torch.dtype | None
    _tiles: tuple[Tensor, Tensor] | None
    _tiles_for: tuple[torch.dtype, torch.device, tuple[int, ...]] | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        bits: int = 4,
        group_size: int = 128,
        sym: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        permuted: bool = False,
    ):
        super().__init__()
        self._forget_tiles()
        self._converted_to = None
        if bits not in SUPPORTED_BITS:
            raise ConfigError(f"bits={bits}: use one of {', '.join(map(str, SUPPORTED_BITS))}.")
        if group_size != -1 and group_size < 1:
            raise ConfigError(f"group_size={group_size}: use a positive number, or -1 for the whole row.")
        dtype = dtype or torch.get_default_dtype()
        self.in_features, self.out_features = in_features, out_features
        self.bits, self.group_size, self.sym = bits, group_size, sym
        groups = group_count(in_features, group_size)
        self.register_buffer(
            "packed", torch.zeros(out_features, packed_words(in_features, bits), dtype=torch.int32, device=device)
        )
        self.register_buffer("scales", torch.ones(out_features, groups, dtype=dtype, device=device))
        zeros = None if sym else torch.zeros(out_features, groups, dtype=torch.uint8, device=device)
        self.register_buffer("zeros", zeros)
        order = torch.arange(in_features, dtype=torch.int32, device=device) if permuted else None
        self.register_buffer("columns", order)
        self.bias = nn.Parameter(torch.zeros(out_features, dtype=dtype, device=device)) if bias else None

    @classmethod
    def from_linear(
        cls, linear: nn.Module, bits: int = 4, group_size: int = 128, sym: bool = False, clip: ClipSearch = "none"
    ) -> QuantLinear:
        """Round to nearest the weight of an nn.Linear, or of transformers' Conv1D.

        Raises NumericalError for a weight with NaN or Inf, ConfigError for one without memory.
        """
        config = QuantConfig(method="rtn", bits=bits, group_size=group_size, sym=sym, clip=clip)
        weight = weight_of(linear)
        require_quantizable(weight, "the weight")
        bias: Any = linear.bias
        tensor = quantize_to_nearest(weight.float(), config, weight.dtype)
        layer = cls.from_quantized(tensor, None if bias is None else bias.detach())
        layer.stands_for = type(linear).__name__
        return layer

    @classmethod
    def from_quantized(cls, tensor: QuantizedTensor, bias: Tensor | None) -> QuantLinear:
        """A layer that owns the packed form of ``tensor``; bias ``[N]`` or None is copied."""
        rows, columns = tensor.shape
        layer = cls(columns, rows, bias is not None, tensor.bits, tensor.group_size, tensor.symmetric, device="meta")
        layer.packed = pack(tensor.codes, tensor.bits)
        layer.scales = tensor.scales.clone()
        layer.zeros = None if tensor.zeros is None else tensor.zeros.clone()
        layer.columns = None if tensor.columns is None else tensor.columns.clone()
        layer.bias = None if bias is None else nn.Parameter(bias.clone())
        return layer

    def stand_for(self, linear: nn.Module, dtype: torch.dtype) -> None:
        """Take the place of ``linear``, whose weight is of ``dtype``: that of ``weight`` and of what :meth:`to_linear`
        gives, where it was that of the scales."""
        self.stands_for = type(linear).__name__
        self._converted_to = dtype

    def quantized(self) -> QuantizedTensor:
        """The weight as unpacked codes, scales and zeros."""
        codes = unpack(self._rows(), self.bits, self.in_features)
        return QuantizedTensor(codes, self.scales, self.zeros, self.bits, self.group_size, self.columns)

    def _rows(self) -> Tensor:
        """The codes as the state dict has them: packed, made anew where it was given up."""
        rows: Tensor = self.packed
        if self.packed is None:
            rows = rows_of_words(self.words, self.out_features, self.in_features)
        return rows

    @property
    def weight(self) -> Tensor:
        """The dequantized weight ``[N, K]``, computed when its values are read, anew for each access.

        Its dtype is the scales', or that of the last ``.to(dtype)``; T5 asks for no more than that, at every call.
        ``nn.Parameter`` takes it as ``weight.detach()``.
        """
        if torch.compiler.is_compiling():
            return self._dequantize()
        return UnreadTensor(
            self._dequantize, (self.out_features, self.in_features), self._weight_dtype(), self.scales.device
        )

    def _dequantize(self) -> Tensor:
        return self.quantized().dequantize(self._weight_dtype())

    def _weight_dtype(self) -> torch.dtype:
        return self._converted_to or self.scales.dtype

    def to_linear(self) -> nn.Linear:
        """An nn.Linear with the dequantized weight."""
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        linear.weight = nn.Parameter(self._dequantize())
        linear.bias = None if self.bias is None else nn.Parameter(self.bias.detach().clone())  # type: ignore[assignment]
        return linear

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() == 0 or x.shape[-1] != self.in_features or not x.is_floating_point():
            raise RuntimeError(
                f"x: {x.dtype} of shape {tuple(x.shape)}; this layer takes floats whose last dimension is"
                f" {self.in_features}."
            )
        if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
            # Inside, sums of 16-bit inputs are fp32, which autocast would round.
            with torch.autocast(x.device.type, enabled=False):
                y: Tensor = self.forward(x.to(torch.get_autocast_dtype(x.device.type)))
            return y
        columns = self._buffers["columns"]  # nn.Module's own look-up of an attribute takes half a microsecond
        if columns is not None:
            x = x.index_select(-1, columns)
        rows = x if x.dim() == 2 else x.reshape(-1, self.in_features)
        y = self._multiply_tiles(rows) if self._fits_words(rows) else self._multiply(rows)
        return y if x.dim() == 2 else y.view(*x.shape[:-1], self.out_features)

    def _fits_words(self, x: Tensor) -> bool:
        """Whether codes were given up for the kernels' layout, and the kernel takes this input."""
        buffers = self._buffers
        if buffers["packed"] is not None or x.dtype not in (torch.float16, torch.bfloat16):
            return False
        if x.device != buffers["words"].device:  # type: ignore[union-attr]
            return False
        return ops.wanted_backend() in (None, "triton") and not in_forward_mode()

    def _multiply(self, x: Tensor) -> Tensor:
        call = (x, self._rows(), self.scales, self.zeros, self.bias, self.bits, self.group_size)
        chosen = ops.choose("dequant_matmul", *call)
        y: Tensor
        if chosen.backend == "triton":
            y = self._multiply_tiles(x)
        elif chosen.backend == "cpp" or in_forward_mode():
            y = chosen.function(*call)  # an operator with a gradient of its own, or torch's
        else:
            if not torch.compiler.is_compiling():
                extension.notes(x.device)
            y = quant_linear(*call)
        return y

    def _multiply_tiles(self, x: Tensor) -> Tensor:
        """The fused kernel's product, with the codes in its layout: packed at the first call and after a change."""
        made_for = (x.dtype, x.device, self._versions())
        tiles = self._tiles
        if tiles is None or self._tiles_for != made_for:
            tiles = self._lay_out(x.dtype)
            self._tiles, self._tiles_for = tiles, made_for
        group = kernel_group(self.group_size, self.in_features)
        y: Tensor = _kernel().multiply(x, *tiles, self.bias, self.out_features, group, False)
        return y

    def _lay_out(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Codes and grid as the kernel reads them; dtype: of the inputs."""
        grid = (self.scales, self.zeros, self.group_size, self.in_features, dtype)
        tiles: tuple[Tensor, Tensor]
        if self.packed is None:
            tiles = (self.words, _kernel().pack_grid(*grid))
        else:
            tiles = _kernel().pack_tiles(self.packed, *grid)
        return tiles

    def pack_for_gpu(self, dtype: torch.dtype | None = None) -> bool:
        """Keep the codes in the GPU kernel's layout alone: half a byte a weight instead of a whole one.

        dtype: fp16 or bf16, of the inputs to come; None is the scales' own. Returns False, and changes nothing, where
        the kernel does not take the layer (another device, other bits or groups, fp32). State dicts and saving make
        packed anew from words, and so does each call with fp32 inputs, slowly; moving the layer to a device without the
        kernel brings it back.
        """
        dtype = dtype or self.scales.dtype
        if self.packed is not None:
            probe = torch.empty(0, self.in_features, dtype=dtype, device=self.scales.device)
            call = (probe, self.packed, self.scales, self.zeros, self.bias, self.bits, self.group_size)
            if ops.choose("dequant_matmul", *call).backend != "triton":
                return False
            self.register_buffer("words", self._lay_out(dtype)[0], persistent=False)
            self.packed = None
        return True

    def _take_codes_back(self) -> None:
        if self.packed is None:
            self.packed = self._rows()

    def _versions(self) -> tuple[int, ...]:
        """How often codes and grid were written in place; inference tensors and compiled calls do not count that."""
        if torch.compiler.is_compiling():
            return self._tiles_for[2] if self._tiles_for else ()
        buffers = self._buffers
        codes = buffers["words"] if buffers["packed"] is None else buffers["packed"]
        return _version(codes), _version(buffers["scales"]), _version(buffers["zeros"])

    def _forget_tiles(self) -> None:
        self._tiles = None
        self._tiles_for = None

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name in ("packed", "scales", "zeros"):
            self._forget_tiles()
        if name == "packed" and value is not None and "words" in self._buffers:
            del self.words

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles pack anew."""
        return {**self.__dict__, "_tiles": None, "_tiles_for": None}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantLinear:
        before = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        self._forget_tiles()
        dtype = fn(torch.empty(0, dtype=self._weight_dtype(), device=self.scales.device)).dtype
        self._converted_to = dtype if dtype != self._weight_dtype() else self._converted_to
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            # Codes were made for these exact scales: no conversion of a model may round or widen them.
            moved: Any = self._buffers[name]
            if moved.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(moved.device)
        if self.scales.device.type != before["scales"].device.type:
            self._take_codes_back()
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.packed is None:
            destination[prefix + "packed"] = self._rows()

    def _load_from_state_dict(self, *args: Any) -> None:
        given_up = self.packed is None
        self._take_codes_back()
        super()._load_from_state_dict(*args)
        if given_up:
            # The codes' layout is the same for both 16-bit dtypes, and scales may be fp32.
            self.pack_for_gpu(torch.bfloat16)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"bits={self.bits}, group_size={self.group_size}, sym={self.sym}"
        )


def _version(tensor: Tensor | None) -> int:
    return 0 if tensor is None or tensor.is_inference() else tensor._version


def _kernel() -> Any:
    """The fused kernel's module, which imports Triton."""
    import epmq.kernels.int4_matmul as kernels

    return kernels


def require_quantizable(weight: Tensor, name: str) -> None:
    """Raise ConfigError for a weight without memory, NumericalError for one with NaN or Inf."""
    if weight.is_meta:
        raise ConfigError(f"{name} is on the meta device; load it before it is quantized.")
    if not all_finite(weight):
        raise NumericalError(f"{name} holds NaN or Inf; repair the checkpoint before it is quantized.")
