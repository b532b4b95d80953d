"""A headless browser that shows a page as a person would see it, and what to ask of the page."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("selenium", reason="selenium is not installed: pip install -e '.[dev]'")

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
)  # fmt: skip

# Text nodes that can be seen, with the contrast of their colour against the first opaque colour behind them (WCAG 2).
CONTRASTS = """
const channel = (v) => { v /= 255; return v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; };
const luminance = (c) => 0.2126 * channel(c[0]) + 0.7152 * channel(c[1]) + 0.0722 * channel(c[2]);
const parse = (text) => text.match(/[\\d.]+/g).map(Number);
const behind = (element) => {
  for (let e = element; e; e = e.parentElement) {
    const c = parse(getComputedStyle(e).backgroundColor);
    if (c.length < 4 || c[3] === 1) return c;
  }
  return [255, 255, 255];
};
const found = [];
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (walker.nextNode()) {
  const element = walker.currentNode.parentElement, text = walker.currentNode.textContent.trim();
  const style = getComputedStyle(element), box = element.getBoundingClientRect();
  if (!text || ["SCRIPT", "STYLE"].includes(element.tagName) || !element.checkVisibility() || box.width <= 1) continue;
  const [a, b] = [luminance(parse(style.color)), luminance(behind(element))];
  found.push([text, (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), parse(style.color), behind(element)]);
}
return found;
"""

# Whatever reaches past the right edge, other than inside a frame that scrolls by itself.
TOO_WIDE = """
return [...document.body.querySelectorAll("*")]
  .filter((e) => e.checkVisibility() && e.getBoundingClientRect().right > innerWidth + 0.5 && !e.closest(".frame"))
  .filter((e) => getComputedStyle(e).position !== "absolute" || e.getBoundingClientRect().width > 1)
  .map((e) => e.outerHTML.slice(0, 100));
"""


class Browser:
    """One window; ``open`` shows a file in a theme and width."""

    def __init__(self, driver: Any):
        self.driver = driver

    def open(self, page: Path, theme: str = "light", width: int = 1100, scripts: bool = True) -> None:
        self.ask("Emulation.setScriptExecutionDisabled", value=not scripts)
        phone = width < 500
        self.ask("Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=phone)
        # Without motion: a click while the page still scrolls would miss.
        wishes = {"prefers-color-scheme": theme, "prefers-reduced-motion": "reduce"}
        features = [{"name": name, "value": value} for name, value in wishes.items()]
        self.ask("Emulation.setEmulatedMedia", features=features)
        self.driver.get_log("browser")
        self.driver.get(page.as_uri())

    def ask(self, command: str, **parameters: Any) -> Any:
        """A command of the browser's own protocol."""
        return self.driver.execute_cdp_cmd(command, parameters)

    def run(self, script: str, *arguments: Any) -> Any:
        """The value a script of the test returns on the page."""
        return self.driver.execute_script(script, *arguments)

    def press(self, *keys: str) -> Any:
        """Press keys one after the other; the element that has the focus then."""
        from selenium.webdriver.common.action_chains import ActionChains

        ActionChains(self.driver).send_keys(*keys).perform()
        return self.driver.switch_to.active_element

    def complaints(self) -> list[str]:
        """What the page wrote to the console, errors and refusals of its policy included."""
        return [entry["message"] for entry in self.driver.get_log("browser")]


def start() -> Iterator[Browser]:
    """A browser with an empty profile, ended afterwards; skips where none is installed."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    binary, chromedriver = shutil.which("chromium"), shutil.which("chromedriver")
    if binary is None or chromedriver is None:
        pytest.skip("chromium and chromedriver are not installed: apt-get install chromium chromium-driver")
    with tempfile.TemporaryDirectory() as profile:
        options = webdriver.ChromeOptions()
        options.binary_location = binary
        for flag in (*FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        driver = webdriver.Chrome(options=options, service=Service(chromedriver))
        try:
            yield Browser(driver)
        finally:
            driver.quit()
