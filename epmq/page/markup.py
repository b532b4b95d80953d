"""HTML as values: what is not marked as HTML is escaped, so no text from a file can become markup."""

from __future__ import annotations

import html


class Html(str):
    """A piece of HTML; any other string is text."""


Child = str | Html | None


def tag(element: str, /, *children: Child, **attributes: str | int | bool | None) -> Html:
    """An element. Attribute names lose a final underscore, other underscores become hyphens; None and False leave an
    attribute out, True gives it without a value."""
    told = []
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        key = key.rstrip("_").replace("_", "-")
        told.append(f" {key}" if value is True else f' {key}="{html.escape(str(value))}"')
    opening = f"<{element}{''.join(told)}>"
    return Html(opening) if element in VOID else Html(f"{opening}{join(*children)}</{element}>")


def join(*children: Child) -> Html:
    """Pieces one after the other, text escaped."""
    return Html("".join(child if isinstance(child, Html) else html.escape(child) for child in children if child))


VOID = {"meta", "link", "input", "br"}
