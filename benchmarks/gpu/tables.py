"""Results as JSON and Markdown: written after every row, read again when the suite goes on."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

from epmq.files import write_text

Results = dict[str, Any]
JSON_NAME, MARKDOWN_NAME = "gpu.json", "gpu.md"


def read(folder: Path, facts: dict[str, Any]) -> Results:
    """What was measured here before on the same card with the same versions; else nothing."""
    path = folder / JSON_NAME
    if path.is_file():
        earlier: Results = json.loads(path.read_text())
        if earlier["facts"] == facts:
            return earlier
        raise SystemExit(f"{path}: measured with other versions or settings; name another folder or remove it.")
    return {"facts": facts, "items": {}, "absent": {}}


def write(folder: Path, results: Results, planned: list[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / JSON_NAME, json.dumps(results, indent=1))
    write_text(folder / MARKDOWN_NAME, markdown(results, planned))


def markdown(results: Results, planned: list[str]) -> str:
    """Facts, one table per part, what is absent, and what was not run."""
    lines = ["# GPU benchmarks", ""]
    lines += [f"- {key}: {shown(value)}" for key, value in results["facts"].items()]
    lines += [f"- absent: {name} ({reason})" for name, reason in results["absent"].items()]
    for part in dict.fromkeys(name.split()[0] for name in planned):
        rows = [
            row for name in planned if name.split()[0] == part for row in results["items"].get(name, {}).get("rows", [])
        ]
        if rows:
            lines += ["", f"## {part}", "", *table(rows)]
    missing = [name for name in planned if name not in results["items"]]
    if missing:
        lines += ["", "## Not measured", ""]
        for same, names in itertools.groupby(missing, lambda name: name.split(" M=")[0]):
            tokens = [name.removeprefix(f"{same} ") for name in names if name != same]
            lines.append(f"- {same}" + (f", {', '.join(tokens)}" if tokens else ""))
    failed = [(name, item["error"]) for name, item in results["items"].items() if "error" in item]
    failed += [
        (name, row["failed"]) for name, item in results["items"].items() for row in item["rows"] if "failed" in row
    ]
    if failed:
        lines += ["", "## Failed", "", *[f"- {name}: {error}" for name, error in failed]]
    return "\n".join(lines) + "\n"


def table(rows: list[dict[str, Any]]) -> list[str]:
    """A Markdown table whose columns are all keys of the rows, in the order they first appear; without those that
    hold several values, which the JSON has."""
    keys = list(dict.fromkeys(key for row in rows for key, value in row.items() if not isinstance(value, dict)))
    lines = ["| " + " | ".join(keys) + " |", "|" + "---|" * len(keys)]
    return lines + ["| " + " | ".join(shown(row.get(key)) for key in keys) + " |" for row in rows]


def shown(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
