"""What is installed: the wheel holds every module, imports outside the checkout, and works without the extension."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
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


def test_source_distribution_runs_in_place(tmp_path: Path) -> None:
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(tmp_path)]
    command += ["sdist", "--dist-dir", str(tmp_path)]
    environment = {**os.environ, "EPMQ_EXTENSION": "0"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with tarfile.open(next(tmp_path.glob("epmq-*.tar.gz"))) as archive:
        archive.extractall(tmp_path, filter="data")
    place = next(tmp_path.glob("epmq-*/"))
    sources = {
        str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*") if path.suffix in (".h", ".cpp", ".cu")
    }
    assert all((place / source).is_file() for source in sources)
    assert not (place / "tests").exists()
    environment["PYTHONPATH"] = str(place)
    code = f"{USE}\nimport epmq.kernels.layout"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", [["build_ext", "--inplace"], ["editable_wheel"]], ids=lambda command: command[0])
@pytest.mark.parametrize("why", [{"EPMQ_EXTENSION": "0"}, {"CXX": "false", "EPMQ_CUDA": "0"}], ids=["asked", "failed"])
def test_an_old_extension_does_not_outlive_a_build_without(
    why: dict[str, str], command: list[str], tmp_path: Path
) -> None:
    for name in ("epmq", "kernels", "csrc"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("_C*", "__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    old = tmp_path / "epmq" / "_C.cpython-311-x86_64-linux-gnu.so"
    old.write_bytes(b"old")
    environment = {key: value for key, value in os.environ.items() if key not in ("EPMQ_EXTENSION", "EPMQ_CUDA")}
    run = [sys.executable, "setup.py", "-q", *command]
    done = subprocess.run(run, cwd=tmp_path, env=environment | why, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "the package runs as pure Python" in done.stderr
    assert not old.exists()
