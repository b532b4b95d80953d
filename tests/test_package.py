"""What is installed: the wheel holds every module, imports outside the checkout, and works without the extension."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
USE = """
import sys
# An editable installation finds its modules for a package of the same name.
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in getattr(finder, "__module__", "")]
import torch, epmq
from epmq import extension
assert extension.module is None
assert "transformers" not in sys.modules and "triton" not in sys.modules
model = torch.nn.Sequential(torch.nn.Linear(64, 8))
assert epmq.replace_linear(model, group_size=32) == ["0"]
print(epmq.__file__, model(torch.ones(2, 64)).shape)
dense = torch.nn.Sequential(torch.nn.Sequential(torch.nn.Linear(64, 64)), torch.nn.Sequential(torch.nn.Linear(64, 64)))
config = epmq.QuantConfig(method="gptq", group_size=32)
print(epmq.quantize(dense, None, {"x": [{"input": torch.randn(8, 64)}]}, config).report["notes"])
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of the pure-Python package, built with what is installed here."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "EPMQ_EXTENSION": "0"})
    assert done.returncode == 0, done.stderr
    return next(folder.glob("epmq-*.whl"))


def test_wheel_holds_every_module_and_no_test(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "epmq").rglob("*.py") if "kernels" not in path.parts}
    modules |= {f"epmq/kernels/{path.name}" for path in (ROOT / "kernels").glob("*.py")}
    assert modules <= names
    assert {"epmq/py.typed", "epmq/page/page.css", "epmq/page/page.js"} <= names
    assert {"epmq/papers/clip.yaml", "epmq/papers/glue.yaml"} <= names
    assert not [name for name in names if name.startswith(("tests/", "benchmarks/", "csrc/"))]


@pytest.mark.parametrize("asked_for", [True, False])
def test_installed_package_runs_elsewhere_and_tells_once_that_it_is_slow(
    wheel: Path, tmp_path: Path, asked_for: bool
) -> None:
    target = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(target)
    environment = {**os.environ, "PYTHONPATH": str(target), "EPMQ_EXTENSION": "0" if asked_for else ""}
    done = subprocess.run(
        [sys.executable, "-c", USE], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(target)), done.stdout
    told = "no compiled extension: many times slower on a CPU; see README, The compiled extension."
    assert done.stderr == ("" if asked_for else f"{told}\n")
    assert done.stdout.splitlines()[-1] == ("[]" if asked_for else f"['{told}']")
