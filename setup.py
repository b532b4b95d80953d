"""Builds the optional C++/CUDA extension ``epmq._C``; everything declarative is in pyproject.toml.

EPMQ_EXTENSION=1  a failed build is an error that names what is missing; =0: no extension. Unset: pure Python instead.
EPMQ_CUDA=1|0     with or without the CUDA operators. Unset: with them when torch has CUDA and nvcc is found.
EPMQ_SANITIZE=1   AddressSanitizer and UndefinedBehaviorSanitizer (run with libasan preloaded, see ``make sanitize``).
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

from setuptools import setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

TORCH_MINIMUM = (2, 11)
CUDA_ARCHS = ("80", "90")
CPU_SOURCES = ["csrc/bindings.cpp", *sorted(str(p) for p in Path("csrc/cpu").glob("*.cpp"))]
CUDA_SOURCES = ["csrc/cuda/statistics.cu"]
# No -march: instruction sets are chosen at run time. No contraction: every fused multiply-add is written as one.
# uninitialized: GCC's own AVX-512 headers trip over it.
CXX_FLAGS = ["-O3", "-std=c++20", "-fopenmp", "-ffp-contract=off", "-fvisibility=hidden", "-g0", "-Wall", "-Wextra"]
QUIET = ["-Wno-uninitialized", "-Wno-maybe-uninitialized", "-Wno-unknown-pragmas", "-Wno-psabi"]
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer", "-g", "-O1"]


class Missing(Exception):
    """Something that the extension needs and that is not there."""


def switch(name: str) -> bool | None:
    """An environment switch: True, False, or None when unset."""
    value = os.environ.get(name, "")
    if value not in ("", "0", "1"):
        sys.exit(f"{name}={value!r} is not understood; use 0 or 1, or leave it unset.")
    return None if value == "" else value == "1"


def cuda_wanted(torch_cuda: str | None, cuda_home: str | None) -> bool:
    """Whether to build the CUDA operators: by what is installed, never by which GPU is visible."""
    wanted = switch("EPMQ_CUDA")
    if wanted:
        if torch_cuda is None:
            raise Missing("EPMQ_CUDA=1 needs a CUDA build of torch; the installed one is for CPU only")
        if cuda_home is None:
            raise Missing("EPMQ_CUDA=1 needs the CUDA toolkit; set CUDA_HOME to where it is installed")
    return (torch_cuda is not None and cuda_home is not None) if wanted is None else wanted


def toolkit(guessed: str | None) -> str | None:
    """Where the CUDA toolkit is. torch guesses it from where nvcc is, which may be a script far from the libraries."""
    for home in (guessed, "/usr/local/cuda"):
        if home is not None and any(any(Path(home, folder).glob("libcudart.so*")) for folder in ("lib64", "lib")):
            return home
    return guessed


def extension() -> dict[str, Any]:
    """Arguments of ``setup`` that build the extension; raises Missing."""
    try:
        import torch
        from torch.utils import cpp_extension
    except ImportError as error:
        raise Missing(
            f"torch cannot be imported here ({error}); install it first and pass --no-build-isolation"
        ) from error
    version = tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2])
    if version < TORCH_MINIMUM:
        raise Missing(f"torch {torch.__version__} is too old; version {'.'.join(map(str, TORCH_MINIMUM))} is needed")
    if not cpp_extension.is_ninja_available():
        raise Missing("ninja is not installed")

    cpp_extension.CUDA_HOME = toolkit(cpp_extension.CUDA_HOME)
    cuda = cuda_wanted(torch.version.cuda, cpp_extension.CUDA_HOME)
    flags = CXX_FLAGS + (SANITIZE if switch("EPMQ_SANITIZE") else [])
    archs = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in CUDA_ARCHS]
    facts = [
        ("EPMQ_FLAGS", " ".join(flags)),
        ("EPMQ_CUDA_ARCHS", " ".join(f"sm_{arch}" for arch in CUDA_ARCHS) if cuda else ""),
    ]
    compile_args = {"cxx": flags + QUIET, "nvcc": ["-O3", "-std=c++20", "-DUSE_CUDA", *archs]}
    kind = cpp_extension.CUDAExtension if cuda else cpp_extension.CppExtension
    module = kind(
        "epmq._C",
        CPU_SOURCES + (CUDA_SOURCES if cuda else []),
        define_macros=facts,
        extra_compile_args=compile_args,
        extra_link_args=["-fopenmp", *(SANITIZE[:1] if switch("EPMQ_SANITIZE") else [])],
    )

    class Build(cpp_extension.BuildExtension):  # type: ignore[misc]
        """Without EPMQ_EXTENSION=1 a failed build leaves a pure-Python package, and says so."""

        def run(self) -> None:
            inplace = self.inplace  # a run that fails leaves it unset
            try:
                super().run()
            except Exception as error:
                if switch("EPMQ_EXTENSION"):
                    raise
                tell(f"the build failed ({error})")
                if inplace:
                    remove_built()
                self.extensions = []

    return {"ext_modules": [module], "cmdclass": {"build_ext": Build}}


def tell(reason: str) -> None:
    """Say that the package will have no extension."""
    print(f"epmq: no C++ extension, the package runs as pure Python: {reason}.", file=sys.stderr)


def remove_built() -> None:
    """Take away what an earlier build left beside the sources, or it would be loaded all the same."""
    for built in [*Path("epmq").glob("_C*.so"), *Path("epmq").glob("_C*.pyd")]:
        built.unlink()


class InPlaceWithout(build_ext):
    """``build_ext --inplace`` where there is no extension to build."""

    def run(self) -> None:
        if self.inplace:
            remove_built()


class EditableWithout(build_py):
    """An editable installation without the extension."""

    def run(self) -> None:
        if self.editable_mode:
            remove_built()
        super().run()


WITHOUT: dict[str, Any] = {"cmdclass": {"build_ext": InPlaceWithout, "build_py": EditableWithout}}


def arguments() -> dict[str, Any]:
    """What this environment adds to the declarative metadata."""
    if switch("EPMQ_EXTENSION") is False:
        tell("EPMQ_EXTENSION=0")
        return WITHOUT
    try:
        return extension()
    except Missing as missing:
        if switch("EPMQ_EXTENSION") or switch("EPMQ_CUDA"):
            sys.exit(f"epmq: the extension cannot be built: {missing}.")
        tell(str(missing))
        return WITHOUT


setup(
    license="Apache-2.0",
    packages=["epmq", "epmq.formats", "epmq.kernels", "epmq.page", "epmq.papers"],
    package_dir={"epmq.kernels": "kernels"},
    **arguments(),
)
