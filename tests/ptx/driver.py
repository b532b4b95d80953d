"""A driver for Triton that has no GPU: kernels are compiled for one to PTX, and that PTX is run.

:func:`use` makes ``kernel[grid](...)`` take tensors of the CPU, with the specialization, the assembly and the layouts
that a GPU of that architecture would get.
"""

from __future__ import annotations

import os
import struct
from types import SimpleNamespace
from typing import Any

import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.backends.nvidia.compiler import CUDABackend

from ptx.machine import Program, Watch
from ptx.source import kernels

SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024}
PROGRAMS: dict[bytes, Program] = {}
INTEGERS = {"i1": "b", "i8": "b", "i16": "h", "i32": "i", "i64": "q", "u8": "B", "u16": "H", "u32": "I", "u64": "Q"}
PACKED = INTEGERS | {"fp32": "f", "fp64": "d"}


class PtxBackend(CUDABackend):  # type: ignore[misc]
    """Triton's own compiler for NVIDIA GPUs, ending at PTX."""

    def __init__(self, target: Any):
        super().__init__(target)
        self.binary_ext = "ptx"

    def add_stages(self, stages: dict[str, Any], *arguments: Any) -> None:
        super().add_stages(stages, *arguments)
        stages.pop("cubin", None)

    def hash(self) -> str:
        return f"{super().hash()}-run-as-ptx"


class Launcher:
    """What Triton calls to start a compiled kernel."""

    def __init__(self, source: Any, metadata: Any):
        self.kinds = list(source.signature.values())
        self.threads = 32 * metadata.num_warps
        self.shared = metadata.shared

    def __call__(self, x: int, y: int, z: int, stream: Any, program: Program, *rest: Any) -> None:
        values = rest[-len(self.kinds) :]
        packed, regions = [], []
        for kind, value in zip(self.kinds, values, strict=True):
            if kind == "constexpr":
                continue
            if isinstance(value, Tensor):
                packed.append(struct.pack("<Q", value.data_ptr()))
                storage = value.untyped_storage()
                regions.append((storage.data_ptr(), storage.nbytes()))
            else:
                packed.append(struct.pack(f"<{PACKED[kind]}", value))
        packed += [bytes(8)] * (len(program.kernel.parameters) - len(packed))  # Triton's scratch memory, unused
        program.run((x, y, z), self.threads, packed, regions, self.shared, Driver.watch)


def load(name: str, text: bytes, shared: int, device: int) -> tuple[str, Program, int, int, int]:
    """As the CUDA driver's: module, function, registers, spills, most threads."""
    if text not in PROGRAMS:
        PROGRAMS[text] = Program(next(kernel for kernel in kernels(text.decode()) if kernel.name == name))
    return name, PROGRAMS[text], 0, 0, 1024


class Driver(DriverBase):  # type: ignore[misc]
    """One GPU of an architecture such as 80 or 90."""

    watch = Watch()  # what the runs of this process look at

    def __init__(self, arch: int):
        super().__init__()
        self.arch = arch
        self.launcher_cls = Launcher
        self.utils = SimpleNamespace(
            load_binary=load,
            unload_module=lambda module: None,
            get_device_properties=lambda device: {"max_shared_mem": SHARED_BYTES[arch], "warpSize": 32},
        )

    @staticmethod
    def is_active() -> bool:
        return True

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise NotImplementedError

    def get_active_torch_device(self) -> Any:
        raise NotImplementedError

    def get_benchmarker(self) -> Any:
        raise NotImplementedError


def use(arch: int, watch: Watch | None = None) -> None:
    """Run Triton's kernels as PTX for this architecture from now on, in this process."""
    from triton.backends import Backend, backends

    from epmq.kernels import tune

    triton.knobs.runtime.interpret = False
    os.environ["TRITON_INTERPRET"] = "1"  # for epmq.triton_forms: the kernels take tensors of the CPU
    Driver.watch = watch or Watch()
    backends["nvidia"] = Backend(compiler=PtxBackend, driver=Driver)
    triton.runtime.driver.set_active(Driver(arch))
    tune.device_facts = lambda device: (arch, 4)
