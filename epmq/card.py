"""The model card of a quantized folder: README.md with what went in, the settings, the errors measured, the loaders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from epmq import files
from epmq.config import QuantConfig
from epmq.report import told_errors

CARD_NAME = "README.md"


def write_card(
    folder: Path,
    model_class: str,
    format: str,
    limits: Sequence[str],
    report: Mapping[str, Any] | None = None,
    made_from: Mapping[str, Any] | None = None,
) -> None:
    """Leave the card in a folder. limits: sentences about loaders. made_from: base, experts, merge, where known."""
    files.write_text(folder / CARD_NAME, "\n".join(_lines(model_class, format, limits, report, made_from)) + "\n")


def _lines(
    model_class: str,
    format: str,
    limits: Sequence[str],
    report: Mapping[str, Any] | None,
    made_from: Mapping[str, Any] | None,
) -> list[str]:
    front: dict[str, Any] = {} if format == "native" else {"library_name": "transformers"}
    front["tags"] = ["epmq", format, *(["merge"] if made_from else [])]
    quantized = report is None or QuantConfig.model_validate(report["settings"]).rounds
    title = f"# {'Quantized' if quantized else 'Calibrated'} {model_class}"
    lines = ["---", yaml.safe_dump(front, sort_keys=False).rstrip(), "---", "", title, ""]
    lines += [f"Format: {format}, made by epmq.", "", "## Loading", ""]
    lines += [f"- {sentence}" for sentence in limits]
    if made_from:
        lines += ["", "## Made from", "", *_block(made_from)]
    if report is None:
        return lines
    lines += ["", "## Settings", "", *_block({k: v for k, v in report["settings"].items() if v not in (None, [])})]
    if report.get("calibration"):
        lines += ["", "## Calibration", ""]
        for task, counts in report["calibration"].items():
            lines.append(f"- {task}: " + ", ".join(f"{count:,} {what}" for what, count in counts.items()))
    if report["average_error"]:
        lines += ["", "## Measured errors"]
        for what, errors in told_errors(report):
            lines += ["", f"{what.capitalize()}:", "", *_error_table(errors)]
        lines += ["", "Relative squared errors of the layers' outputs, means over layers, on calibration rows."]
    before, after = report["bytes"]["merged"], report["bytes"]["quantized"]
    lines += ["", f"{before / 2**20:.1f} MiB before, {after / 2**20:.1f} MiB after."]
    if report["notes"]:
        lines += ["", "## Notes", "", *(f"- {note}" for note in report["notes"])]
    return lines


def _block(content: Mapping[str, Any]) -> list[str]:
    return ["```yaml", yaml.safe_dump(dict(content), sort_keys=False, allow_unicode=True).rstrip(), "```"]


def _error_table(errors: Mapping[str, Mapping[str, float]]) -> list[str]:
    methods = list(dict.fromkeys(method for row in errors.values() for method in row))
    lines = [f"| task | {' | '.join(methods)} |", "|---" * (len(methods) + 1) + "|"]
    for task, row in errors.items():
        cells = [f"{row[method]:.4f}" if method in row else "–" for method in methods]
        lines.append(f"| {task} | {' | '.join(cells)} |")
    return lines
