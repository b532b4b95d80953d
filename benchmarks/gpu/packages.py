"""``python benchmarks/gpu/packages.py WHEELS TARGET``: what this Python lacks, from a folder of wheels into TARGET.

A GPU machine's image has its own torch, Triton and much else, and often no network. What ``make gpu`` needs besides is
brought along: ``make gpu-wheels`` fills the folder on a machine that has one. Nothing that is there is replaced.
"""

from __future__ import annotations

import importlib.util
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


def missing(wanted: dict[str, str]) -> list[str]:
    """Distributions that this Python cannot import."""
    return [name for module, name in wanted.items() if importlib.util.find_spec(module) is None]


def main(wheels: Path, target: Path) -> None:
    welcome = missing(WELCOME)
    brought = all(any(wheels.glob(f"{name.replace('-', '_')}-*.whl")) for name in welcome)
    names = missing(NEEDED) + (welcome if brought else [])
    if not names:
        return
    if not wheels.is_dir():
        sys.exit(
            f"make gpu: {', '.join(names)} cannot be imported here and {wheels} is not there; run make gpu-wheels "
            "where there is a network and bring that folder along."
        )
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
        sys.exit(f"make gpu: {', '.join(names)} could not be installed from {wheels}.")
    print(f"from {wheels}: {', '.join(names)}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
