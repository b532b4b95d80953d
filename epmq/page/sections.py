"""The sections of the page, each from the report alone; a section without data is left out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from epmq.config import DistillSettings, QuantConfig
from epmq.page.charts import accuracy_strips, error_line, folded, method_name, size_bars, table, time_columns
from epmq.page.heat import error_map, first_view, label_of, layer_map, views_of
from epmq.page.markup import Html, join, tag
from epmq.page.numbers import duration, percent, size
from epmq.report import BlockRow, LayerRow, ResultRow, Results, RunReport


def headline(report: RunReport) -> str:
    """What was done: method and bits."""
    bits = report.settings.get("bits")
    method = label_of(str(report.settings.get("method", "")))
    return f"{method}{' with distillation' if report.settings.get('distill') else ''}, {_bits(bits)}"


def subline(report: RunReport) -> str:
    """The grid, the linears and the tasks."""
    settings = report.settings
    parts = []
    if settings.get("bits") is not None:
        group = settings.get("group_size")
        parts.append("whole rows" if group == -1 else f"groups of {group}")
        parts.append("symmetric" if settings.get("sym") else "asymmetric")
    parts.append(f"{len(report.layers)} linears in {len(report.blocks)} blocks")
    tasks = len(report.average_error)
    parts += [f"{tasks} task{'' if tasks == 1 else 's'}"] if tasks else []
    examples = [counts.get("examples", 0) for counts in report.calibration.values()]
    if examples:
        each = f"{min(examples):,}" if min(examples) == max(examples) else f"{min(examples):,} to {max(examples):,}"
        parts.append(f"{each} calibration example{'' if max(examples) == 1 else 's'} each")
    return " · ".join(parts)


def _bits(bits: Any) -> str:
    return "not rounded" if bits is None else f"{bits} bits"


def cards(report: RunReport, results: Results | None) -> Html:
    """The figures that are looked for first."""
    found = [_accuracy_card(results.rows) if results is not None else None, _error_card(report)]
    before, after = report.sizes.get("merged", 0), report.sizes.get("quantized", 0)
    if before and after:
        found.append(_card("Size", f"{before / after:.1f}× smaller", f"{size(before)} → {size(after)}"))
    found.append(_card("Time", duration(report.seconds), f"peak memory {size(report.peak_memory_bytes)}"))
    count = len(report.notes) + len(report.escalated)
    told = "nothing was less exact than asked" if count == 0 else "see Notes"
    found.append(_card("Notes", "none" if count == 0 else str(count), told))
    return tag("dl", *found, class_="cards")


def _card(name: str, value: str, told: str) -> Html:
    return tag("div", tag("dt", name), tag("dd", tag("b", value), tag("span", told.replace(" %", "\u00a0%"))))


def _accuracy_card(rows: Sequence[ResultRow]) -> Html | None:
    ours = next((row for row in rows if row.method == "epmq"), None)
    merged = next((row for row in rows if row.method == "merged"), None)
    if ours is None or merged is None:
        return None
    bits = "" if ours.bits is None else f" at {ours.bits} bits"
    return _card("Accuracy", f"{ours.average:.1f} %", f"E-PMQ{bits}; the merge, not rounded, {merged.average:.1f} %")


def _error_card(report: RunReport) -> Html | None:
    sums: dict[str, list[float]] = {}
    for errors in report.average_error.values():
        for method, error in errors.items():
            sums.setdefault(method, []).append(error)
    means = [(method, sum(found) / len(found)) for method, found in sums.items()]
    if not means:
        return None
    method, error = means[-1]
    others = ", ".join(f"{_told_against(report, name)} {percent(value)} %" for name, value in means[:-1])
    target = "the distilled model" if report.stages.closed_form is not None else "the experts"
    return _card("Mean output error", f"{percent(error)} %", f"against {target}" + (f"; {others}" if others else ""))


def _told_against(report: RunReport, method: str) -> str:
    return "unrounded" if method == "merged" and report.stages.closed_form is not None else label_of(method)


def accuracy(results: Results | None) -> Html | None:
    """Every row of results.json as a picture and as a table."""
    rows = [] if results is None else [row for row in results.rows if row.tasks]
    if not rows:
        return None
    merges = {row.merge for row in rows if row.merge is not None}
    tasks = list(dict.fromkeys(task for row in rows for task in row.tasks))
    columns: list[list[float | None]] = [[row.average for row in rows]]
    columns += [[row.tasks.get(task) for row in rows] for task in tasks]
    best = [
        max((v for v, row in zip(c, rows, strict=True) if v is not None and row.merge), default=None) for c in columns
    ]
    lines: list[list[str | Html]] = []
    for place, row in enumerate(rows):
        cells = [_score(column[place], top if row.merge else None) for column, top in zip(columns, best, strict=True)]
        name = method_name(row) if len(merges) > 1 else row.method
        lines.append([name, "–" if row.bits is None else str(row.bits), *cells])
    merge = f" The merge is {merges.pop().replace('_', ' ')}." if len(merges) == 1 else ""
    caption = f"Accuracy in percent.{merge} Bold: the best of the merged models."
    return join(
        tag("p", "A line runs from the worst task to the best; rings are tasks, the diamond is their average."),
        accuracy_strips(rows),
        table(caption, ["method", "bits", "average", *tasks], lines),
    )


def _score(value: float | None, best: float | None) -> str | Html:
    text = "–" if value is None else f"{value:.1f}"
    return tag("strong", text) if value is not None and value == best else text


def errors(report: RunReport) -> Html | None:
    """The heat map, and the cells that stand out."""
    found = error_map(report)
    if found is None:
        return None
    shown = first_view(views_of(report))
    worst = sorted(shown.errors.items(), key=lambda entry: -entry[1] if math.isfinite(entry[1]) else -math.inf)[:5]
    items = [tag("li", tag("code", linear), f" on {task}: {percent(error)} %") for (linear, task), error in worst]
    stages = " Each stage has its own scale." if shown.group else ""
    return join(
        tag(
            "p",
            "How far each linear's output is from its target, as the share of the target's energy that is error, in"
            f" percent: a grid per task, a column per block, a row per linear. All grids share one scale.{stages}",
        ),
        found,
        tag("h3", f"Largest errors of {shown.label}{f' ({shown.group.lower()})' if shown.group else ''}"),
        tag("ol", *items),
    )


def strength(report: RunReport) -> Html | None:
    """λ and damping of every linear: a sentence where they are all the same, a grid where not."""
    layers = report.layers
    if not layers:
        return None
    marked = set(report.escalated)
    pieces = [
        _one_strength(report, "λ", "the pull towards the merged weights", lambda row: row.anchor, set()),
        _one_strength(report, "Damping", "added to the Hessian to factor it", lambda row: row.damp, marked),
    ]
    if marked:
        raised = [tag("li", tag("code", name)) for name in report.escalated]
        pieces.append(join(tag("h3", "Damping was raised at"), tag("ul", *raised)))
    return join(tag("p", "Both are relative to the mean diagonal of the layer's Hessian."), *pieces)


def _one_strength(report: RunReport, name: str, what: str, value: Any, marked: set[str]) -> Html:
    values = sorted({value(row) for row in report.layers})
    if len(values) == 1:
        return tag("p", tag("b", name), f", {what}: {values[0]:.3g} in every layer.")
    grid = layer_map(report, name, value, marked)
    return join(tag("h3", f"{name}, {what}"), tag("p", f"From {values[0]:.3g} to {values[-1]:.3g}."), grid)


def hidden(report: RunReport) -> Html | None:
    """How the hidden states drift away along the blocks, per stage."""
    closed = report.stages.closed_form
    if closed is None:
        return _drift(report.blocks)
    first, last = _drift(closed.blocks), _drift(report.blocks)
    if first is None and last is None:
        return None
    return join(
        None if first is None else join(tag("h3", "Closed form, against the experts"), first),
        None if last is None else join(tag("h3", "Rounding, against the distilled model"), last),
    )


def _drift(blocks: Sequence[BlockRow]) -> Html | None:
    usable = [block for block in blocks if block.hidden_error]
    tasks = list(dict.fromkeys(task for block in usable for task in block.hidden_error))
    values = [error for block in usable for error in block.hidden_error.values() if math.isfinite(error) and error > 0]
    if not tasks or not values:
        return None
    low, high = min(values), max(values)
    series = {task: [block.hidden_error[task] for block in usable if task in block.hidden_error] for task in tasks}
    rows = [[block.block, *(percent(block.hidden_error.get(task, math.nan)) for task in tasks)] for block in usable]
    return join(
        tag(
            "p",
            "Relative squared error of the hidden states behind each block, from the first block on the left to the"
            " last on the right. One logarithmic scale for all tasks.",
        ),
        tag("div", *(error_line(task, found, low, high) for task, found in series.items()), class_="sparks"),
        folded(
            "The numbers", table("Error of the hidden states behind each block, in percent", ["block", *tasks], rows)
        ),
    )


def size_and_time(report: RunReport) -> Html:
    """Bytes before and after, seconds per block."""
    seconds = [(block.block, block.seconds) for block in report.blocks]
    told = f"{duration(report.seconds)} in all, at most {size(report.peak_memory_bytes)} of memory."
    return join(
        tag("p", told), size_bars(report.sizes), time_columns(seconds) if seconds else None, distillation(report)
    )


def distillation(report: RunReport) -> Html | None:
    """What the tuning stage did."""
    stage = report.stages.distill
    if stage is None:
        return None
    pairs = ", ".join(" and ".join(pair) for pair in stage.pairs if pair == sorted(pair))
    told = f" Shown to each other's experts: {pairs}." if pairs else ""
    text = f"{stage.steps} steps of distillation took the loss from {stage.first_loss:.3g} to {stage.last_loss:.3g}."
    return tag("p", text + told)


def layers(report: RunReport) -> Html | None:
    """Every linear with its numbers."""
    if not report.layers:
        return None
    methods = list(dict.fromkeys(method for row in report.layers for e in row.tasks.values() for method in e))
    head = ["linear", "shape", "λ", "damping", "seconds", *(f"{_told_against(report, m)}, %" for m in methods)]
    return folded(
        f"All {len(report.layers)} linears as a table",
        table("Every linear; errors are means over the tasks", head, [_line(row, methods) for row in report.layers]),
    )


def _line(row: LayerRow, methods: Sequence[str]) -> list[str | Html]:
    means = []
    for method in methods:
        found = [e[method] for e in row.tasks.values() if method in e]
        means.append(percent(sum(found) / len(found)) if found else "–")
    damp = f"{row.damp:.3g}" + (" (raised)" if row.escalated else "")
    return [row.linear, " × ".join(map(str, row.shape)), f"{row.anchor:.3g}", damp, f"{row.seconds:.3f}", *means]


def settings(report: RunReport) -> Html:
    """Every setting, those that are not the defaults first."""
    defaults = {**QuantConfig().model_dump(mode="json"), "distill": DistillSettings().model_dump(mode="json")}
    usual, given = _flat(defaults), _flat(report.settings)
    rows: list[tuple[bool, list[str | Html]]] = []
    for key, value in given.items():
        changed = key != "distill" and (key not in usual or usual[key] != value)
        mark: str | Html = tag("strong", "changed") if changed else ""
        rows.append((changed, [key, _shown(value), _shown(usual[key]) if key in usual else "–", mark]))
    if report.settings.get("distill"):
        rows.insert(0, (True, ["distill", "yes", "none", tag("strong", "changed")]))
    changed_rows = [row for changed, row in rows if changed]
    head = ["setting", "value", "default", ""]
    return join(
        table("Settings that are not the defaults", head, changed_rows, 9)
        if changed_rows
        else tag("p", "All settings are the defaults."),
        folded("All settings", table("Settings of the run beside the defaults", head, [row for _, row in rows], 9)),
    )


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            found.update(_flat(value, f"{prefix}{key}."))
        else:
            found[f"{prefix}{key}"] = value
    return found


def _shown(value: Any) -> str:
    if value is None or value == []:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def machine(report: RunReport) -> Html:
    """Where it ran."""
    rows = [[key, _shown(value)] for key, value in report.machine.items()]
    return table("Machine and versions of the run", ["", "value"], rows, 9)


def notes(report: RunReport) -> Html:
    """What was less exact than asked for."""
    found = [tag("li", note) for note in report.notes]
    found += [tag("li", tag("code", name), ": damping was raised.") for name in report.escalated]
    return tag("ul", *found) if found else tag("p", "None: everything was done as it was asked for.")
