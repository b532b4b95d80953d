"""Heat maps: one grid per task and list of blocks, a row per kind of linear, a column per block."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from epmq.page.layout import Panel, panels
from epmq.page.markup import Html, join, tag
from epmq.page.numbers import STEPS, Scale, percent
from epmq.report import LayerRow, RunReport

# Wider grids show squares instead of numbers; the numbers stay for screen readers and the line above the grids.
NUMBERED_COLUMNS = 8
LABELS = {"merged": "merged", "gptq": "GPTQ", "epmq": "E-PMQ", "regmean": "RegMean", "rtn": "rounded to nearest"}


@dataclass(frozen=True)
class View:
    """What the heat map can show: the errors of one candidate in one stage, {(linear, task): error}."""

    key: str
    stage: str
    label: str
    group: str
    errors: Mapping[tuple[str, str], float]


def label_of(method: str) -> str:
    """A candidate's name as it is written."""
    return LABELS.get(method, method)


def views_of(report: RunReport) -> list[View]:
    """All views of a report, the closed form's before the last pass's."""
    closed = report.stages.closed_form
    if closed is None:
        return _stage("run", "", report.layers, {})
    told = {"merged": "distilled, unrounded"}
    first = _stage("closed", "Closed form, against the experts", closed.layers, {})
    return first + _stage("run", "Rounding, against the distilled model", report.layers, told)


def _stage(stage: str, group: str, layers: list[LayerRow], told: Mapping[str, str]) -> list[View]:
    methods = dict.fromkeys(method for row in layers for errors in row.tasks.values() for method in errors)
    return [
        View(
            f"{stage}-{number}",
            stage,
            told.get(method, label_of(method)),
            group,
            {(row.linear, task): e[method] for row in layers for task, e in row.tasks.items() if method in e},
        )
        for number, method in enumerate(methods)
    ]


def first_view(views: list[View]) -> View:
    """The one shown at first: the result of the stage that is measured against the experts."""
    return [view for view in views if view.stage == views[0].stage][-1]


def error_map(report: RunReport) -> Html | None:
    """The switch, the legends, the line that tells about one cell, and a grid per task; None without any error.

    Views of one stage share a colour scale; the stages have their own, for their errors are of other sizes.
    """
    views = views_of(report)
    if not views:
        return None
    shown = first_view(views)
    stages = list(dict.fromkeys(view.stage for view in views))
    scales = {s: Scale(e for view in views if view.stage == s for e in view.errors.values()) for s in stages}
    tasks = list(dict.fromkeys(task for view in views for _, task in view.errors))
    grids = panels([row.linear for row in report.layers], [row.block for row in report.blocks])
    order: list[tuple[str, str]] = []
    pieces = []
    means: dict[str, list[str]] = {view.key: [] for view in views}
    for task in tasks:
        for panel in grids:
            name = f"{task} · {panel.list_name}" if len(grids) > 1 else task
            for view in views:
                means[view.key].append(_mean(task, panel, view.errors))
            pieces.append(_grid(name, task, panel, shown.errors, scales[shown.stage], order))
    data = {
        "views": [[view.key, view.stage, view.label] for view in views],
        "cells": {v.key: [_cell_value(v.errors.get(place), scales[v.stage]) for place in order] for v in views},
        "means": means,
    }
    # "<" as an escape: nothing in the data can end the element.
    told = Html(json.dumps(data, ensure_ascii=True, separators=(",", ":")).replace("<", "\\u003c"))
    legends = [
        tag("div", legend(scale, percent, "Error in percent"), data_stage=stage, hidden=stage != shown.stage)
        for stage, scale in scales.items()
    ]
    hint = "Choose a cell to read its values; arrow keys move from cell to cell."
    return join(
        tag("div", _switch(views, shown), *legends, tag("p", hint, id="cell", aria_live="polite"), class_="map-head"),
        tag("div", *pieces, class_="grids", id="error-map"),
        tag("script", told, type="application/json", id="errors"),
    )


def _switch(views: list[View], shown: View) -> Html:
    groups = list(dict.fromkeys(view.group for view in views))
    sets = []
    for group in groups:
        choices = [
            tag(
                "label",
                tag("input", type="radio", name="view", value=view.key, checked=view is shown),
                tag("span", view.label),
            )
            for view in views
            if view.group == group
        ]
        sets.append(tag("fieldset", tag("legend", group or "Output error of"), *choices))
    return tag("div", *sets, class_="switch")


def _cell_value(value: float | None, scale: Scale) -> list[str | int] | None:
    return None if value is None else [scale.step(value), percent(value)]


def _grid(
    name: str,
    task: str,
    panel: Panel,
    values: Mapping[tuple[str, str], float],
    scale: Scale,
    order: list[tuple[str, str]],
) -> Html:
    """A table of one task; the place of every cell is appended to ``order``."""
    rows = []
    for kind in panel.kinds:
        cells = []
        for block in panel.blocks:
            linear = panel.names.get((kind, block))
            if linear is None or (linear, task) not in values:
                cells.append(tag("td", class_="none"))
                continue
            order.append((linear, task))
            value = values[linear, task]
            first = len(order) == 1
            cells.append(
                tag(
                    "td",
                    tag("span", percent(value)),
                    class_=f"q{scale.step(value)}",
                    tabindex=0 if first else -1,
                    data_at=f"{linear} · {task}",
                )
            )
        rows.append(tag("tr", tag("th", _breakable(kind), scope="row"), *cells))
    return _table(name, _mean(task, panel, values), panel, rows, "grid")


def _mean(task: str, panel: Panel, values: Mapping[tuple[str, str], float]) -> str:
    here = [values[linear, task] for linear in panel.names.values() if (linear, task) in values]
    return f"mean {percent(sum(here) / len(here))} %" if here else ""


def _table(name: str, aside: str, panel: Panel, rows: list[Html], role: str | None = None) -> Html:
    dense = len(panel.blocks) > NUMBERED_COLUMNS
    every = max(1, -(-len(panel.blocks) // 8)) if dense else 1
    head = [
        tag("th", tag("span", block), scope="col", class_=None if number % every == 0 else "skipped")
        for number, block in enumerate(panel.blocks)
    ]
    return tag(
        "table",
        tag("caption", tag("b", name), tag("span", aside, class_="aside")),
        tag("thead", tag("tr", tag("td", "block", class_="corner"), *head)),
        tag("tbody", *rows),
        class_="heat dense" if dense else "heat",
        role=role,
    )


def _breakable(name: str) -> Html:
    """A dotted name that may break after its dots."""
    return Html(join(name).replace(".", ".<wbr>"))


def legend(scale: Scale, told: Callable[[float], str], name: str) -> Html:
    """The colours in order: the values they stand for, or those between them."""
    if scale.values is not None:
        steps = [(scale.step(value), told(value)) for value in scale.values]
    else:
        steps = [(step, told(scale.bounds[step]) if step < len(scale.bounds) else "") for step in range(STEPS)]
    parts = [tag("span", tag("i", class_=f"q{step}"), tag("small", text)) for step, text in steps]
    kind = "legend exact" if scale.values is not None else "legend"
    return tag("div", tag("p", name), tag("div", *parts), class_=kind)


def layer_map(report: RunReport, name: str, value: Callable[[LayerRow], float], marked: set[str]) -> Html:
    """A grid per list of blocks of one number per linear; marked linears carry a triangle."""
    rows = {row.linear: row for row in report.layers}
    scale = Scale((value(row) for row in report.layers), exact=True)
    pieces = []
    for panel in panels(rows, [row.block for row in report.blocks]):
        lines = []
        for kind in panel.kinds:
            cells = []
            for block in panel.blocks:
                linear = panel.names.get((kind, block))
                if linear is None:
                    cells.append(tag("td", class_="none"))
                    continue
                number = value(rows[linear])
                raised = tag("abbr", "▲", title="raised") if linear in marked else None
                cells.append(
                    tag("td", tag("span", f"{number:.3g}"), raised, class_=f"q{scale.step(number)}", title=linear)
                )
            lines.append(tag("tr", tag("th", _breakable(kind), scope="row"), *cells))
        pieces.append(_table(f"{name}{' · ' + panel.list_name if panel.list_name else ''}", "", panel, lines))
    return join(legend(scale, lambda number: f"{number:.2g}", name), tag("div", *pieces, class_="grids cool"))
