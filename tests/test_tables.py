"""The tables of the documentation are those of the measured results."""

from __future__ import annotations

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


def test_a_changed_figure_is_noticed() -> None:
    text = "<!-- table averages -->\n| nothing |\n<!-- end -->"
    assert filled(text) != text
