"""``python benchmarks/gpu/packages.py WHEELS TARGET``: what this Python lacks, from a folder of wheels into TARGET.

A GPU machine's image has its own torch, Triton and much else, and often no network. What ``make gpu`` needs besides is
brought along: on a machine that has one, ``make gpu-wheels`` fills the folder (``--fetch WHEELS PYTHON``, PYTHON the
version of the other's). Nothing that is there is replaced.
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

# Distributions by the module they bring; dependencies stand here too, because none is resolved there.
NEEDED = {
    "annotated_types": "annotated-types",
    "click": "click",
    "hypothesis": "hypothesis",
    "iniconfig": "iniconfig",
    "markdown_it": "markdown-it-py",
    "mdurl": "mdurl",
    "ninja": "ninja",
    "numpy": "numpy",
    "packaging": "packaging",
    "pluggy": "pluggy",
    "pybind11": "pybind11",
    "pydantic": "pydantic",
    "pydantic_core": "pydantic-core",
    "pygments": "pygments",
    "pytest": "pytest",
    "pytest_timeout": "pytest-timeout",
    "regex": "regex",
    "rich": "rich",
    "safetensors": "safetensors",
    "sortedcontainers": "sortedcontainers",
    "typing_extensions": "typing-extensions",
    "typing_inspection": "typing-inspection",
    "yaml": "pyyaml",
}
# With these the tests run several at a time; where neither the Python nor the folder has them, one after the other.
WELCOME = {"execnet": "execnet", "xdist": "pytest-xdist"}
# What is measured beside ours; each that is not there is named as absent. llm-compressor is the version that
# benchmarks/peers knows, with the compressed-tensors that it pins; it imports datasets, and that the two after it. What
# else these import, images with torch and transformers have: no auto-round, but pyarrow, pandas, xxhash, nvidia-ml-py
# and, for Humming, cuda-bindings and an nvcc.
RIVALS = {
    "gemlite": "gemlite",
    "humming": "humming-kernels",
    "llmcompressor": "llmcompressor==0.14.0.1",
    "compressed_tensors": "compressed-tensors==0.19.0",
    "loguru": "loguru",
    "datasets": "datasets<6",
    "dill": "dill<0.4.2",
    "multiprocess": "multiprocess<0.70.20",
}
# Those of which there is no wheel to fetch: make gpu-wheels builds it, of Python alone.
BUILT = ("gemlite",)


def missing(wanted: dict[str, str]) -> list[str]:
    """Distributions that this Python cannot import."""
    return [name for module, name in wanted.items() if importlib.util.find_spec(module) is None]


def among(wheels: Path, requirement: str) -> bool:
    """Whether the folder has a wheel of this distribution, of whichever version."""
    name = re.split("[<>=!~]", requirement)[0].replace("-", "_")
    return any(wheels.glob(f"{name}-*.whl"))


def install(wheels: Path, target: Path, names: list[str]) -> bool:
    """Whether pip could install these from the folder."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-index",
        "--no-deps",
        "--find-links",
        str(wheels),
    ]
    if subprocess.run([*command, "--target", str(target), *names]).returncode != 0:
        return False
    print(f"from {wheels}: {', '.join(names)}")
    return True


def fetch(wheels: Path, python: str) -> None:
    """Fill the folder for this version of Python on x86-64 Linux; what rivals need besides stands in their table."""
    pip = [sys.executable, "-m", "pip"]
    kept = [name for name in RIVALS.values() if name not in BUILT]
    only = ["--only-binary=:all:", "--python-version", python]
    for platform in ("manylinux_2_28", "manylinux_2_17", "manylinux2014"):
        only += ["--platform", f"{platform}_x86_64"]
    for command in (
        ["download", "--dest", str(wheels), *only, *NEEDED.values(), *WELCOME.values()],
        ["download", "--dest", str(wheels), *only, "--no-deps", *kept],
        ["wheel", "--wheel-dir", str(wheels), "--no-deps", *BUILT],
    ):
        subprocess.run([*pip, *command, "--quiet"], check=True)


def main(wheels: Path, target: Path) -> None:
    welcome = missing(WELCOME)
    names = missing(NEEDED) + (welcome if all(among(wheels, name) for name in welcome) else [])
    if names and not wheels.is_dir():
        sys.exit(
            f"make gpu: {', '.join(names)} cannot be imported here and {wheels} is not there; run make gpu-wheels "
            "where there is a network and bring that folder along."
        )
    if names and not install(wheels, target, names):
        sys.exit(f"make gpu: {', '.join(names)} could not be installed from {wheels}.")
    beside = [name for name in missing(RIVALS) if among(wheels, name)]
    if beside and not install(wheels, target, beside):
        print(f"make gpu: {', '.join(beside)} could not be installed from {wheels}; all goes on without them.")


if __name__ == "__main__":
    if sys.argv[1] == "--fetch":
        fetch(Path(sys.argv[2]), sys.argv[3])
    else:
        main(Path(sys.argv[1]), Path(sys.argv[2]))
