"""epmq: merge fine-tuned experts, quantize towards them, run the result in 4 bits."""

from epmq.api import QuantResult, load, quantize, save
from epmq.config import PRESETS, QuantConfig, preset
from epmq.errors import EpmqError
from epmq.heads import with_head
from epmq.linear import QuantLinear
from epmq.merge import merge
from epmq.swap import pack_for_gpu, replace_linear, restore_linear

__version__ = "0.1.0"
__all__ = [
    "PRESETS",
    "EpmqError",
    "QuantConfig",
    "QuantLinear",
    "QuantResult",
    "load",
    "merge",
    "pack_for_gpu",
    "preset",
    "quantize",
    "replace_linear",
    "restore_linear",
    "save",
    "with_head",
]
