"""Small pictures from HTML and SVG: they take the width and the colours of the page they stand on."""

from __future__ import annotations

import math
from collections.abc import Sequence

from epmq.page.markup import Html, join, tag
from epmq.page.numbers import duration, percent, size
from epmq.report import ResultRow


def method_name(row: ResultRow) -> str:
    """A row's method with its merge."""
    return row.method if row.merge is None else f"{row.method} · {row.merge.replace('_', ' ')}"


def accuracy_strips(rows: Sequence[ResultRow]) -> Html:
    """A line per row from the worst task to the best, a ring per task, a diamond at the average; grouped by bits."""
    scores = [score for row in rows for score in row.tasks.values() if math.isfinite(score)]
    low = 10.0 * math.floor(min(scores, default=0.0) / 10.0)
    low, high = min(low, 90.0), 100.0
    merges = {row.merge for row in rows if row.merge is not None}
    pieces = []
    for bits in dict.fromkeys(row.bits for row in rows):
        pieces.append(tag("p", "not rounded" if bits is None else f"{bits} bits", class_="strip-group"))
        for row in rows:
            if row.bits == bits:
                pieces.append(_strip(row, method_name(row) if len(merges) > 1 else row.method, low, high))
    step = 20.0 if high - low > 50.0 else 10.0
    ticks = [low + step * number for number in range(int((high - low) / step) + 1)]
    marks = [tag("span", f"{tick:.0f}", style=f"left:{_place(tick, low, high)}") for tick in ticks]
    axis = tag("div", tag("span"), tag("div", *marks, class_="axis"), tag("span", "%"), class_="strip")
    return tag("div", *pieces, axis, class_="strips", aria_hidden="true")


def _strip(row: ResultRow, label: str, low: float, high: float) -> Html:
    worst, best = min(row.tasks.values()), max(row.tasks.values())
    left, right = _place(worst, low, high), _place(best, low, high)
    dots = [
        tag("i", style=f"left:{_place(score, low, high)}", title=f"{task}: {score:.1f} %")
        for task, score in row.tasks.items()
    ]
    track = tag(
        "div",
        tag("s", style=f"left:{left};right:calc(100% - {right})"),
        *dots,
        tag("b", style=f"left:{_place(row.average, low, high)}"),
        class_="track",
    )
    ours = row.method.startswith("epmq")
    return tag(
        "div", tag("span", label), track, tag("strong", f"{row.average:.1f}"), class_="strip ours" if ours else "strip"
    )


def _place(value: float, low: float, high: float) -> str:
    share = (value - low) / (high - low) if math.isfinite(value) else 0.0
    return f"{100.0 * min(max(share, 0.0), 1.0):.2f}%"


def error_line(task: str, values: Sequence[float], low: float, high: float) -> Html:
    """One task's errors along the blocks on a logarithmic scale from low to high, which all tasks share."""
    usable = [max(value, low) if math.isfinite(value) else high for value in values]
    span = math.log(high / low) if high > low else 1.0
    points = [
        (100.0 * i / max(1, len(usable) - 1), 96.0 - 92.0 * math.log(value / low) / span)
        for i, value in enumerate(usable)
    ]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    told = f"Task {task}: {percent(values[0])} % behind the first block, {percent(values[-1])} % behind the last."
    svg = tag(
        "svg",
        tag("polygon", points=f"0,100 {line} 100,100"),
        tag("polyline", points=line),
        viewBox="0 0 100 100",
        preserveAspectRatio="none",
        role="img",
        aria_label=told,
    )
    ends = tag("div", tag("span", f"{percent(values[0])} %"), tag("span", f"{percent(values[-1])} %"), class_="ends")
    return tag("figure", tag("figcaption", task), svg, ends, class_="spark")


def size_bars(sizes: dict[str, int]) -> Html:
    """A bar per file size, the longest full width."""
    most = max([*sizes.values(), 1])
    return tag("div", *(_bar(name, count / most, size(count)) for name, count in sizes.items()), class_="bars")


def time_columns(blocks: Sequence[tuple[str, float]]) -> Html:
    """A column per block, as high as its seconds."""
    most = max([seconds for _, seconds in blocks] + [1e-9])
    slowest = max(blocks, key=lambda block: block[1])
    columns = [
        tag("i", style=f"height:{100.0 * seconds / most:.2f}%", title=f"{name}: {duration(seconds)}")
        for name, seconds in blocks
    ]
    told = f"Seconds per block, {len(blocks)} blocks; the slowest is {slowest[0]} with {duration(slowest[1])}."
    return tag(
        "figure",
        tag("div", *columns, class_="columns", role="img", aria_label=told),
        tag(
            "figcaption", f"Time per block, from first to last; the slowest, {slowest[0]}, took {duration(slowest[1])}."
        ),
    )


def _bar(name: str, share: float, told: str) -> Html:
    inside = tag("div", tag("i", style=f"width:{100.0 * share:.2f}%"), class_="bar", aria_hidden="true")
    return tag("div", tag("span", name), inside, tag("span", told), class_="bar-row")


def table(caption: str, head: Sequence[str], rows: Sequence[Sequence[str | Html]], numbers_from: int = 1) -> Html:
    """A table in a frame that scrolls by itself; the first cell of a row is its heading."""
    lines = []
    for row in rows:
        cells = [
            tag("td", cell, class_="number" if place >= numbers_from else None) for place, cell in enumerate(row[1:], 1)
        ]
        lines.append(tag("tr", tag("th", row[0], scope="row"), *cells))
    titles = [
        tag("th", title, scope="col", class_="number" if place >= numbers_from else None)
        for place, title in enumerate(head)
    ]
    inner = tag(
        "table", tag("caption", caption), tag("thead", tag("tr", *titles)), tag("tbody", *lines), class_="plain"
    )
    return tag("div", inner, class_="frame", role="region", aria_label=caption, tabindex=0)


def folded(title: str, *children: Html | None) -> Html:
    """Something to open."""
    return tag("details", tag("summary", title), join(*children))
