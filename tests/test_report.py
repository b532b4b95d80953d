"""Reading a report and making its page without a browser: refusals, kinds of runs, numbers."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from checkpoints import in_process
from conftest import ToyJob

import epmq
from epmq.errors import FormatError
from epmq.page import sections
from epmq.page.document import document, write_page
from epmq.page.layout import panels
from epmq.page.markup import Html, join, tag
from epmq.page.numbers import STEPS, Scale, duration, percent, size
from epmq.report import RunReport, read_report, write_report


def report_of(job: ToyJob, **settings: Any) -> dict[str, Any]:
    config = epmq.QuantConfig(group_size=16, **settings)
    experts = job.experts if config.needs_experts else None
    return epmq.quantize(job.merged, experts, job.calibration, config, base=job.base).report


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({}, "E-PMQ, 4 bits"),
        ({"bits": None}, "E-PMQ, not rounded"),
        ({"anchor": "auto", "sym": True, "norm_refit": True}, "E-PMQ, 4 bits"),
        ({"method": "gptq", "bits": 3}, "GPTQ, 3 bits"),
        ({"method": "regmean", "diagnostics": False}, "RegMean, 4 bits"),
        ({"method": "rtn"}, "rounded to nearest, 4 bits"),
    ],
)
def test_every_kind_of_run_has_a_page(toy_job: ToyJob, tmp_path: Path, settings: dict[str, Any], told: str) -> None:
    write_report(tmp_path, report_of(toy_job, **settings))
    text = write_page(tmp_path).read_text()
    assert f"<h1>{told}</h1>" in text
    assert "http://" not in text and "https://" not in text
    assert "Accuracy by method and task" not in text


def test_rounding_without_calibration_has_a_page(toy_job: ToyJob, tmp_path: Path) -> None:
    config = epmq.QuantConfig(method="rtn", group_size=16)
    write_report(tmp_path, epmq.quantize(toy_job.merged, None, {}, config).report)
    text = write_page(tmp_path).read_text()
    assert "Error by layer and task" not in text and "Size and time" in text


@pytest.mark.parametrize(
    ("settings", "changed"),
    [
        ({}, ["group_size"]),
        ({"overrides": {r"\.up$": {"bits": 8}}}, ["group_size", r"overrides.\.up$.bits"]),
        ({"distill": {"steps": 2}}, ["distill", "group_size", "distill.steps"]),
    ],
)
def test_settings_that_are_not_the_defaults_are_shown(
    toy_job: ToyJob, settings: dict[str, Any], changed: list[str]
) -> None:
    text = str(sections.settings(RunReport.model_validate(report_of(toy_job, **settings))))
    shown = re.search(r"Settings that are not the defaults.*?</table>", text, re.S)
    assert shown is not None
    assert re.findall(r"<tr[^>]*><t[hd][^>]*>([^<]+)", shown.group().split("</thead>")[1]) == changed


def test_values_that_are_not_finite_are_told(toy_job: ToyJob) -> None:
    report = report_of(toy_job)
    report["layers"][0]["tasks"]["task0"]["epmq"] = math.nan
    report["blocks"][0]["hidden_error"]["task0"] = math.inf
    text = document(RunReport.model_validate(report), None)
    assert "not finite" in text


def test_the_command_line_makes_the_page_and_refuses_with_one_sentence(
    toy_job: ToyJob, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_report(tmp_path, report_of(toy_job))
    done = in_process(capsys, "report", tmp_path)
    assert (done.code, done.out, done.err) == (0, f"report in {tmp_path / 'report.html'}\n", "")
    assert {path.name for path in tmp_path.iterdir()} == {"report.html", "report.json", "run.json"}
    before = (tmp_path / "report.html").read_bytes()
    (tmp_path / "results.json").write_text("[]")
    done = in_process(capsys, "report", tmp_path)
    assert done.code == 2 and done.err.count("\n") == 1
    assert done.err.startswith(f"epmq: {tmp_path / 'results.json'}: ")
    assert (tmp_path / "report.html").read_bytes() == before


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, "there is no such file; give a folder that epmq quantize or demo made"),
        ("{oops", "not JSON"),
        ("[]", "not a report of this version"),
        ("{}", "key 'settings' is missing; it is not a report of this version"),
        (b"\xff\xfe", "not JSON"),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_a_malformed_report_is_refused(tmp_path: Path, content: str | bytes | None, told: str) -> None:
    if content is not None:
        (tmp_path / "report.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(FormatError, match=told) as caught:
        write_page(tmp_path)
    assert str(tmp_path / "report.json") in str(caught.value)
    assert not (tmp_path / "report.html").exists()


def test_the_key_at_fault_is_named(toy_job: ToyJob, tmp_path: Path) -> None:
    report = report_of(toy_job)
    report["layers"][1]["damp"] = "much"
    write_report(tmp_path, report)
    with pytest.raises(FormatError, match=r"layers\.1\.damp: .*'much'"):
        read_report(tmp_path)
    del report["layers"][1]["damp"]
    write_report(tmp_path, report)
    with pytest.raises(FormatError, match=r"'layers\.1\.damp' is missing"):
        read_report(tmp_path)


def test_results_with_gaps_are_shown(toy_job: ToyJob, tmp_path: Path) -> None:
    write_report(tmp_path, report_of(toy_job))
    rows = [
        {"merge": None, "method": "expert", "bits": None, "average": 90.0, "tasks": {"a": 90.0, "b": 90.0}},
        {"merge": "ties", "method": "epmq", "bits": 4, "average": 70.0, "tasks": {"a": 70.0}},
        {"merge": "ties", "method": "gptq", "bits": 4, "average": 0.0, "tasks": {}},
    ]
    (tmp_path / "results.json").write_text(json.dumps({"rows": rows}))
    text = write_page(tmp_path).read_text()
    assert "<strong>70.0</strong>" in text and "The merge is ties." in text and "–" in text


def test_text_is_escaped_and_markup_is_not() -> None:
    assert tag("b", "<i>", tag("i", "&"), title='"x"') == '<b title="&quot;x&quot;">&lt;i&gt;<i>&amp;</i></b>'
    assert join("<", None, Html("<br>")) == "&lt;<br>"
    assert tag("input", checked=True, hidden=False, aria_label="a", class_="c", value=None) == (
        '<input checked aria-label="a" class="c">'
    )


@pytest.mark.parametrize(
    ("share", "text"),
    [
        (0.0, "0.00"),
        (1e-7, "<0.01"),
        (0.0034, "0.34"),
        (0.034, "3.4"),
        (0.34, "34"),
        (1.2, "120"),
        (math.inf, "not finite"),
    ],
)
def test_percent(share: float, text: str) -> None:
    assert percent(share) == text


def test_sizes_and_times() -> None:
    assert [size(2**20), size(3 * 2**30)] == ["1.0 MiB", "3.00 GiB"]
    assert [duration(s) for s in (0.02, 1.0, 125.0, 7260.0)] == ["20 ms", "1.0 s", "2 min 5 s", "2 h 1 min"]


def test_scale_is_logarithmic_over_three_decades_and_keeps_the_order() -> None:
    values = [10.0 ** (exponent / 5) for exponent in range(-30, 1)]
    scale = Scale(values)
    steps = [scale.step(value) for value in values]
    assert steps == sorted(steps) and steps[0] == 0 and steps[-1] == STEPS - 1
    assert scale.step(0.9e-3) == scale.step(1e-6) == 0 and scale.step(2.4e-3) == 1
    assert scale.step(math.nan) == STEPS - 1
    assert [Scale([0.0, 0.1], exact=True).step(value) for value in (0.0, 0.1)] == [0, STEPS - 1]
    assert Scale([]).step(1.0) == Scale([0.0]).step(0.0) == 0


def test_grids_follow_lists_of_blocks() -> None:
    blocks = ["vision.layers.0", "vision.layers.1", "text.layers.0", "text.layers.10"]
    linears = [f"{block}.{kind}" for block in blocks for kind in ("attn.q", "mlp")] + ["text.layers.10.extra", "head"]
    found = panels(linears, blocks)
    assert [(panel.list_name, panel.blocks) for panel in found] == [
        ("vision.layers", ["0", "1"]),
        ("text.layers", ["0", "10"]),
        ("", [""]),
    ]
    assert found[1].kinds == ["attn.q", "mlp", "extra"]
    assert found[1].names["extra", "10"] == "text.layers.10.extra" and ("extra", "0") not in found[1].names
