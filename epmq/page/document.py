"""report.html: a run as one page that needs no other file, no network and no script to be read."""

from __future__ import annotations

import base64
import hashlib
from importlib import resources
from pathlib import Path

from epmq import files
from epmq.page import sections
from epmq.page.markup import Html, join, tag
from epmq.report import Results, RunReport, read_report, read_results

PAGE_NAME = "report.html"


def write_page(folder: str | Path) -> Path:
    """Make ``folder/report.html`` from the report.json there, and results.json where there is one.

    Raises FormatError when a file is missing or malformed, OutputError when the page cannot be written.
    """
    folder = Path(folder)
    page = document(read_report(folder), read_results(folder))
    files.write_text(folder / PAGE_NAME, page)
    return folder / PAGE_NAME


def document(report: RunReport, results: Results | None) -> Html:
    """The whole page. All text from the files is escaped; the policy in its head forbids anything from elsewhere."""
    parts: list[tuple[str, str, Html | None]] = [
        ("accuracy", "Accuracy by method and task", sections.accuracy(results)),
        ("errors-by-layer", "Error by layer and task", sections.errors(report)),
        ("hidden", "Error of the hidden states", sections.hidden(report)),
        ("strength", "λ and damping", sections.strength(report)),
        ("size", "Size and time", sections.size_and_time(report)),
        ("layers", "Layers", sections.layers(report)),
        ("notes", "Notes", sections.notes(report)),
        ("settings", "Settings", sections.settings(report)),
        ("machine", "Machine", sections.machine(report)),
    ]
    shown = [(key, title, body) for key, title, body in parts if body is not None]
    links = [tag("li", tag("a", title, href=f"#{key}")) for key, title, _ in shown]
    bodies = [
        tag("section", tag("h2", title, id=f"{key}-title"), body, id=key, aria_labelledby=f"{key}-title")
        for key, title, body in shown
    ]
    title = f"epmq report: {sections.headline(report)}"
    script = _resource("page.js")
    return join(
        Html("<!doctype html>\n"),
        tag(
            "html",
            tag(
                "head",
                tag("meta", charset="utf-8"),
                tag("meta", http_equiv="Content-Security-Policy", content=_policy(script)),
                tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
                tag("meta", name="color-scheme", content="light dark"),
                tag("link", rel="icon", href="data:,"),
                tag("title", title),
                tag("style", Html(_resource("page.css"))),
            ),
            tag(
                "body",
                tag("a", "Skip to the report", href="#main", class_="skip"),
                tag(
                    "header",
                    tag("p", "epmq report", class_="kicker"),
                    tag("h1", sections.headline(report)),
                    tag("p", sections.subline(report), class_="subline"),
                ),
                tag("nav", tag("ul", *links), aria_label="Sections"),
                tag("main", sections.cards(report, results), *bodies, id="main", tabindex=-1),
                tag("footer", tag("p", "Made by epmq from report.json", " and results.json" if results else "", ".")),
                tag("script", Html(script)),
            ),
            lang="en",
        ),
    )


def _resource(name: str) -> str:
    return resources.files("epmq.page").joinpath(name).read_text(encoding="utf-8")


def _policy(script: str) -> str:
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
