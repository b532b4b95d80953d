"""report.html in a headless browser: light, dark, on a phone, by keyboard, for a screen reader, without scripts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from browser import CONTRASTS, TOO_WIDE, Browser, start
from conftest import make_toy_job
from selenium.webdriver.common.keys import Keys

import epmq
from epmq.evaluate import row
from epmq.page.document import write_page
from epmq.report import whole_report, write_report

EVIL = "<script>document.title='owned'</script>&\"'"
LOOKS = [("light", 1100), ("dark", 1100), ("light", 360), ("dark", 360)]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    yield from start()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real run with distillation and results; one task's name is HTML, one damping was raised."""
    target = tmp_path_factory.mktemp("run")
    job = make_toy_job()
    rename = {"task0": "reviews", "task1": "intents", "task2": EVIL}
    experts = {rename[task]: expert for task, expert in job.experts.items()}
    calibration = {rename[task]: batches for task, batches in job.calibration.items()}
    config = epmq.preset("best", group_size=16, distill={"steps": 2, "copies": 1})
    report = epmq.quantize(job.merged, experts, calibration, config).report
    report["notes"].append(f"a note about {EVIL}")
    report["layers"][3].update(escalated=True, damp=0.001)
    report["escalated"].append(report["layers"][3]["linear"])
    write_report(target, report)
    scores = dict.fromkeys(experts, 80.0)
    rows = [row(None, "expert", None, scores), row("ties", "merged", None, scores), row("ties", "epmq", 4, scores)]
    (target / "results.json").write_text(json.dumps({"rows": rows}))
    write_page(target)
    return target


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> Path:
    """The same run as if the model had 40 blocks, a λ of its own for every linear, and no distillation."""
    target = tmp_path_factory.mktemp("deep")
    report = whole_report(folder)
    del report["stages"]
    first = [entry for entry in report["layers"] if entry["linear"].startswith("blocks.0.")]
    report["blocks"] = [{**report["blocks"][0], "block": f"blocks.{n}"} for n in range(40)]
    report["layers"] = [
        {**entry, "linear": entry["linear"].replace(".0.", f".{n}."), "lambda": 0.01 * (1 + n)}
        for n in range(40)
        for entry in first
    ]
    write_report(target, report)
    write_page(target)
    return target


def page(folder: Path) -> Path:
    return folder / "report.html"


@pytest.mark.parametrize(("theme", "width"), LOOKS)
@pytest.mark.parametrize("which", ["folder", "deep"])
def test_it_shows_in_every_theme_and_width(
    browser: Browser, request: pytest.FixtureRequest, which: str, theme: str, width: int
) -> None:
    browser.open(page(request.getfixturevalue(which)), theme, width)
    assert browser.complaints() == []
    assert browser.run("return performance.getEntriesByType('resource').map((e) => e.name)") == []
    assert browser.run("return document.documentElement.scrollWidth") <= width
    assert browser.run(TOO_WIDE) == []
    dark = browser.run("return getComputedStyle(document.body).backgroundColor") == "rgb(24, 21, 19)"
    assert dark == (theme == "dark")
    browser.run("document.querySelectorAll('details').forEach((d) => (d.open = true))")
    assert browser.run("return document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_stands_out_from_what_is_behind_it(browser: Browser, folder: Path, theme: str) -> None:
    browser.open(page(folder), theme)
    # Every step of both colour scales, whether this run has such a value or not.
    browser.run(
        "const add = (html) => document.querySelector('main').insertAdjacentHTML('beforeend', html);"
        "for (const kind of ['', 'cool']) for (let q = 0; q < 8; q++)"
        "  add(`<div class='${kind}'><span class='q${q}'>step ${q}</span></div>`);"
        "document.querySelectorAll('details').forEach((d) => (d.open = true));"
    )
    found = browser.run(CONTRASTS)
    assert len([text for text, *_ in found if text.startswith("step ")]) == 16
    assert len(found) > 150
    assert [entry for entry in found if entry[1] < 4.5] == []


def test_colour_steps_go_one_way_in_lightness(browser: Browser, folder: Path) -> None:
    """So that the scale is read without seeing hues."""
    for theme, sign in (("light", -1), ("dark", 1)):
        browser.open(page(folder), theme)
        for kind in ("grids", "grids cool"):
            colours = browser.run(
                "const box = document.createElement('div'); box.className = arguments[0]; document.body.append(box);"
                "return [...Array(8).keys()].map((q) => { const i = document.createElement('i'); i.className = `q${q}`;"
                "box.append(i); return getComputedStyle(i).backgroundColor.match(/[\\d.]+/g).map(Number); });",
                kind,
            )
            lightness = [0.2126 * r + 0.7152 * g + 0.0722 * b for r, g, b in colours]
            assert sorted(lightness, key=lambda value: sign * value) == lightness, (theme, kind, colours)


def tab_to(browser: Browser, selector: str, limit: int = 60) -> Any:
    for _ in range(limit):
        focused = browser.press(Keys.TAB)
        if browser.run("return arguments[0].matches(arguments[1])", focused, selector):
            return focused
    raise AssertionError(f"{selector} is not reached with {limit} tabs")


def test_the_keyboard_reaches_everything_and_shows_where_it_is(browser: Browser, folder: Path) -> None:
    browser.open(page(folder))
    skip = browser.press(Keys.TAB)
    assert skip.text == "Skip to the report"
    assert browser.run("return arguments[0].getBoundingClientRect().top >= 0", skip)
    link = browser.press(Keys.TAB)
    assert link.text == "Accuracy by method and task"
    assert browser.run("return getComputedStyle(arguments[0]).outlineStyle", link) == "solid"
    radio = tab_to(browser, 'input[name="view"]')
    mark = "return getComputedStyle(arguments[0].nextElementSibling).outlineStyle"
    assert browser.run(mark, radio) == "solid"

    cell = tab_to(browser, "td[data-at]")
    assert browser.run("return getComputedStyle(arguments[0]).outlineStyle", cell) == "solid"
    at = [cell.get_attribute("data-at")]
    for key in (Keys.ARROW_DOWN, Keys.ARROW_RIGHT, Keys.ARROW_UP, Keys.END, Keys.HOME):
        cell = browser.press(key)
        at.append(cell.get_attribute("data-at"))
    assert [name.split(" ")[0] for name in at] == [
        "blocks.0.query", "blocks.0.key", "blocks.1.key", "blocks.1.query", "blocks.1.query", "blocks.0.query"
    ]  # fmt: skip
    assert browser.run("return document.getElementById('cell').textContent").startswith(f"{at[-1]}: ")
    assert len(browser.driver.find_elements("css selector", 'td[tabindex="0"]')) == 1
    # Down from the last linear of a task is the first of the next.
    for _ in range(5):
        cell = browser.press(Keys.ARROW_DOWN)
    assert cell.get_attribute("data-at") == "blocks.0.query · intents"


@pytest.mark.parametrize("width", [1100, 360])
def test_the_cell_with_the_focus_is_not_covered(browser: Browser, folder: Path, width: int) -> None:
    """The line that tells about it stays in view, and does not lie over it."""
    browser.open(page(folder), width=width)
    tab_to(browser, "td[data-at]")
    cell = browser.press(*[Keys.ARROW_DOWN] * 3)
    # Scrolled so that the cell is right below the line: the one above it is covered until it gets the focus.
    under = "arguments[0].getBoundingClientRect().top - document.getElementById('cell').getBoundingClientRect().bottom"
    for _ in range(20):
        browser.run(f"scrollBy(0, {under});", cell)
    assert abs(browser.run(f"return {under}", cell)) <= 1
    cell = browser.press(Keys.ARROW_UP)
    assert browser.run(f"return {under}", cell) >= 0
    assert browser.run("return document.getElementById('cell').getBoundingClientRect().top") >= 0


def test_the_switch_shows_each_candidate(browser: Browser, folder: Path) -> None:
    report = whole_report(folder)
    browser.open(page(folder))
    labels = browser.driver.find_elements("css selector", ".switch label")
    assert [label.text for label in labels] == ["merged", "E-PMQ", "distilled, unrounded", "GPTQ", "E-PMQ"]
    stages = [report["stages"]["closed_form"]["layers"]] * 2 + [report["layers"]] * 3
    shown = set()
    for label, layers, method in zip(labels, stages, ["merged", "epmq", "merged", "gptq", "epmq"], strict=True):
        label.click()
        cells = browser.run(
            "return [...document.querySelectorAll('td[data-at]')].map((c) => [c.dataset.at, c.innerText])"
        )
        wanted = {f"{e['linear']} · {t}": 100 * v[method] for e in layers for t, v in e["tasks"].items()}
        assert len(cells) == len(wanted) == 2 * 5 * 3
        for place, text in cells:
            exact = wanted[place]
            if text == "<0.01":
                assert exact < 0.01
            else:
                assert abs(float(text) - exact) <= (0.005 if exact < 1 else 0.05 if exact < 10 else 0.5) * 1.0001, place
        shown.add(json.dumps(cells))
        legends = browser.driver.find_elements("css selector", ".map-head .legend")
        assert [legend.is_displayed() for legend in legends] == [layers is stages[0], layers is stages[-1]]
    assert len(shown) == 5


def test_it_is_read_aloud_in_order(browser: Browser, folder: Path) -> None:
    browser.open(page(folder))
    count = "return document.querySelectorAll(arguments[0]).length"
    for landmark in ("body > header", "nav[aria-label]", "main", "body > footer", "h1", "html[lang=en]", "title"):
        assert browser.run(count, landmark) == 1, landmark
    levels = browser.run("return [...document.querySelectorAll('h1, h2, h3, h4')].map((h) => Number(h.tagName[1]))")
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    links = browser.run(
        "return [...document.querySelectorAll('nav a')].map((a) => document.querySelector(a.hash)?.tagName)"
    )
    assert len(links) >= 8 and set(links) == {"SECTION"}
    assert browser.run(count, "table") == browser.run(count, "table > caption")
    assert browser.run(count, "th:not([scope])") == 0
    tree = browser.ask("Accessibility.getFullAXTree")["nodes"]
    named: dict[str, list[str]] = {}
    for node in tree:
        if not node.get("ignored"):
            named.setdefault(node["role"]["value"], []).append(node.get("name", {}).get("value", ""))
    for role in ("radio", "grid", "table", "region", "navigation", "img", "image", "link"):
        assert all(name.strip() for name in named.get(role, [])), (role, named.get(role))
    assert {"main", "navigation", "banner", "contentinfo", "grid", "gridcell", "radio", "table"} <= named.keys()
    assert len(named["grid"]) == 3
    # Two choices are called E-PMQ; the names of their groups tell them apart.
    assert {"Closed form, against the experts", "Rounding, against the distilled model"} <= set(named["group"])


def test_names_from_files_stay_text(browser: Browser, folder: Path) -> None:
    browser.open(page(folder))
    assert browser.driver.title.startswith("epmq report: E-PMQ with distillation, 4 bits")
    assert browser.run("return document.querySelectorAll('script').length") == 2
    assert browser.run("return document.body.innerText").count(EVIL) >= 5
    for place in browser.run("return [...document.querySelectorAll('td[data-at]')].map((c) => c.dataset.at)"):
        assert place.split(" · ")[1] in ("reviews", "intents", EVIL)


def test_it_is_whole_without_scripts(browser: Browser, folder: Path) -> None:
    browser.open(page(folder), scripts=False)
    visible = browser.driver.find_elements("css selector", "td[data-at]")
    assert all(cell.text for cell in visible) and len(visible) == 30
    assert not browser.driver.find_element("css selector", ".switch").is_displayed()
    browser.open(page(folder))
    assert browser.driver.find_element("css selector", ".switch").is_displayed()


def test_deep_models_keep_their_numbers_for_readers(browser: Browser, deep: Path) -> None:
    browser.open(page(deep), width=360)
    table = browser.driver.find_element("css selector", "table.heat.dense")
    assert browser.run("return arguments[0].querySelectorAll('tbody tr:first-child td').length", table) == 40
    cell = browser.run("return arguments[0].querySelector('td[data-at]')", table)
    assert browser.run("return arguments[0].textContent", cell)
    box = browser.run("const r = arguments[0].getBoundingClientRect(); return [r.width, r.height]", cell)
    assert box[0] >= 4 and box[1] >= 16
    assert len(browser.driver.find_elements("css selector", ".cool table")) == 2
