"""``make cuda-check``: compile every .cu for sm_80 and sm_90 as an extension of torch; refuse register spills.

Needs nvcc, no GPU. Prints registers, spills and shared memory of every kernel as ptxas reports them.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from torch.utils.cpp_extension import COMMON_NVCC_FLAGS, include_paths

ARCHS = ("80", "90")
HERE = Path(__file__).parent
ENTRY = re.compile(r"Compiling entry function '(\w+)' for '(sm_\w+)'")
SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers(?:.*?(\d+) bytes smem)?")


def compile_source(source: Path, out: Path, nvcc: str, *more: str) -> subprocess.CompletedProcess[str]:
    """Compile one file with the flags of an extension of torch."""
    command = [nvcc, "-O3", "-std=c++20", "-DUSE_CUDA", *COMMON_NVCC_FLAGS, *more, str(source), "-o", str(out)]
    command += [part for path in include_paths() for part in ("-isystem", path)]
    return subprocess.run(command, capture_output=True, text=True)


def plain_name(kernel: str) -> str:
    """A mangled name without its arguments."""
    return subprocess.run(["c++filt", kernel], capture_output=True, text=True).stdout.split("(epmq::")[0].strip()


def report(source: Path, nvcc: str) -> bool:
    """Compile one file; True when nothing spills."""
    with tempfile.TemporaryDirectory() as folder:
        archs = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ARCHS]
        done = compile_source(source, Path(folder) / "out.o", nvcc, "-c", "-Xptxas", "-v", *archs)
    if done.returncode != 0:
        print(done.stderr)
        return False
    clean, kernel, arch, spills, stack = True, "", "", 0, 0
    for line in done.stderr.splitlines():
        if found := ENTRY.search(line):
            kernel, arch = found.groups()
        elif found := SPILLS.search(line):
            stack, spills = int(found[1]), int(found[2]) + int(found[3])
        elif (found := USED.search(line)) and kernel:
            print(
                f"{source.name} {arch} {plain_name(kernel)}: {found[1]} registers, {spills} bytes spilled, "
                f"{stack} bytes stack, {found[2] or 0} bytes shared"
            )
            clean, kernel = clean and spills == 0, ""
    return clean


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nvcc", default="nvcc")
    options = parser.parse_args()
    results = [report(source, options.nvcc) for source in sorted(HERE.glob("*.cu"))]
    sys.exit(0 if all(results) else "A kernel spills registers, or a file does not compile.")


if __name__ == "__main__":
    main()
