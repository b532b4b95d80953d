"""The examples run as they stand, and show what they say."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoints import ROOT, environment, make_job

EXAMPLES = ROOT / "examples"


def run(name: str, *arguments: str | Path) -> str:
    command = [sys.executable, str(EXAMPLES / name), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_example_is_run_here() -> None:
    assert {str(path.relative_to(EXAMPLES)) for path in EXAMPLES.rglob("*.py")} == {
        "own_experts.py", "tiny/make.py", "train_adapter.py", "use_folder.py",
    }  # fmt: skip


@pytest.mark.slow
def test_the_readmes_first_job_and_its_python(tmp_path: Path) -> None:
    """The commands under "First job", one after the other, then the block of Python on what they left."""
    pytest.importorskip("transformers")
    readme = (ROOT / "README.md").read_text()
    section = readme.partition("## First job\n")[2].partition("\n## ")[0]
    commands = [shlex.split(line, comments=True) for line in section.splitlines() if line.startswith("    ")]
    assert [command[:2] for command in commands] == [
        ["python", "examples/tiny/make.py"], ["epmq", "quantize"], ["epmq", "eval"], ["epmq", "report"],
    ]  # fmt: skip
    (tmp_path / "examples").symlink_to(EXAMPLES)
    told = ""
    for name, *arguments in commands:
        told = here([*([] if name == "python" else ["-m", "epmq"]), *arguments], tmp_path)
        if arguments[0] == "eval":
            average = float(told.splitlines()[-1].split("**")[1])
    assert average > 90.0 and told == "report in tiny/quantized/report.html\n"
    block = readme.partition("```python\n")[2].partition("```")[0]
    here(
        ["-c", block + "assert epmq.load('quantized').state_dict().keys() == result.model.state_dict().keys()"],
        tmp_path,
    )


def here(arguments: list[str], folder: Path) -> str:
    command = [sys.executable, *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment(), timeout=300, check=False, cwd=folder
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_own_experts_beat_their_merge_at_4_bits() -> None:
    told = run("own_experts.py")
    scores = {
        line[:16].strip(): [float(n) for n in re.findall(r"([\d.]+) %", line[16:])] for line in told.splitlines()[:4]
    }
    assert list(scores) == ["experts", "merged, 32 bits", "GPTQ, 4 bits", "E-PMQ, 4 bits"]
    average = {name: sum(values) / len(values) for name, values in scores.items()}
    assert average["experts"] > average["E-PMQ, 4 bits"] > average["merged, 32 bits"]
    assert average["E-PMQ, 4 bits"] > average["GPTQ, 4 bits"]


def test_adapters_learn_on_frozen_codes() -> None:
    told = run("train_adapter.py")
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", told)]
    assert len(losses) == 5 and losses == sorted(losses, reverse=True) and losses[-1] < 0.5 * losses[0]
    assert "2 linears in 4 bits, their codes unchanged" in told


def test_a_folder_is_loaded_and_used(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from epmq.jobs import quantize_to_folder
    from epmq.recipe import read_recipe

    quantize_to_folder(read_recipe(make_job(tmp_path / "job").write()), tmp_path / "quantized")
    lines = run("use_folder.py", tmp_path / "quantized", "w1 w2 w3", "w1 w2 w4", "w20 w21").splitlines()
    assert lines[0].startswith("12 linears hold ")
    table = [[float(n) for n in re.findall(r"-?\d\.\d\d", line)] for line in lines[1:]]
    assert [row[place] for place, row in enumerate(table)] == [1.0, 1.0, 1.0]
    assert table[0][1] > table[0][2] and table[0][1] == table[1][0]
