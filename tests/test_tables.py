"""The tables of the documentation are those of the measured results."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from tables import PAGES, REGION, ROOT, TABLES, filled


@pytest.mark.parametrize("page", [page for page in PAGES if (ROOT / page).is_file()])
def test_tables_are_those_of_the_results(page: str) -> None:
    text = (ROOT / page).read_text()
    assert filled(text) == text, f"{page}: run make tables"


def test_every_table_is_shown_somewhere() -> None:
    shown = [
        found[1] for page in PAGES if (ROOT / page).is_file() for found in REGION.findall((ROOT / page).read_text())
    ]
    assert sorted(TABLES) == sorted(set(shown))


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize("target", ["minilm8", "whole-job", "statistics"])
def test_without_its_data_a_benchmark_says_so(target: str, tmp_path: Path) -> None:
    command = [
        "make",
        "--no-print-directory",
        "-o",
        ".venv/ready",
        f"MINILM8={tmp_path}",
        f"UNFOLDED={tmp_path / 'unfolded'}",
        target,
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode != 0
    told = f"The data of minilm8 are not in this repository and not in {tmp_path}; see docs/minilm8.md.\n"
    assert done.stdout == told and not list(tmp_path.iterdir())


def test_a_changed_figure_is_noticed() -> None:
    text = "<!-- table averages -->\n| nothing |\n<!-- end -->"
    assert filled(text) != text
