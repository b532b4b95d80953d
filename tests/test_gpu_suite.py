"""The GPU suite where there is none: its items on small shapes in the interpreter, its tables, how it goes on."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from gpu import packages, parts, suite, tables

from epmq import reference
from epmq.kernels import timing

FACTS = {"device": "a card", "torch": "2"}


def run(*arguments: str) -> int:
    """Exit status of the suite with these arguments."""
    with pytest.raises(SystemExit) as left:
        suite.main(list(arguments))
    code = left.value.code
    return code if isinstance(code, int) else 1


def setting() -> parts.Setting:
    return parts.Setting(torch.device("cuda" if torch.cuda.is_available() else "cpu"), True, {}, {})


@pytest.mark.parametrize("part", ["gptq", "gram", "block"])
def test_each_part_checks_itself_on_small_shapes(part: str, tmp_path: Path) -> None:
    assert run("--tiny", "--part", part, "--out", str(tmp_path)) == 0
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert {name.split()[0] for name in found["items"]} == {part}
    assert all(item["rows"] for item in found["items"].values())
    text = (tmp_path / "gpu.md").read_text()
    assert f"## {part}" in text and "## Not measured" in text and "int4 llama-3-8b o 4096x4096" in text


def test_an_item_of_the_int4_part_checks_itself_on_a_small_shape() -> None:
    assert [row["M"] for row in parts.int4(setting(), "llama-3-8b o", 4096, 4096)] == list(parts.TOKENS[:3])


def test_it_goes_on_where_it_stopped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--tiny", "--part", "gptq", "--minutes", "-1", "--out", str(tmp_path)) == 0
    assert json.loads((tmp_path / "gpu.json").read_text())["items"] == {}
    first = next(iter(parts.items(setting())))
    kept = {"rows": [{"N": 1}], "seconds": 0.0}
    results = tables.read(tmp_path, suite.facts(True))
    tables.write(tmp_path, {**results, "items": {first: kept}}, [first])
    suite.main(["--tiny", "--list", "--out", str(tmp_path)])
    listed = capsys.readouterr().out
    assert f"done  {first}" in listed and "open  block" in listed
    assert run("--tiny", "--part", "gptq", "--out", str(tmp_path)) == 0
    found = json.loads((tmp_path / "gpu.json").read_text())["items"]
    assert found[first] == kept and len(found) == len(parts.SWEEPS)


def test_a_failed_check_is_written_down_and_ends_in_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> list[parts.Row]:
        raise AssertionError("relative error 1")

    monkeypatch.setattr(parts, "block", broken)
    assert run("--tiny", "--part", "block", "--out", str(tmp_path)) == 1
    text = (tmp_path / "gpu.md").read_text()
    assert "block llama-3-8b, eight experts, bfloat16: AssertionError: ['relative error 1']" in text


def test_a_wrong_kernel_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = reference.gptq_sweep
    monkeypatch.setattr(reference, "gptq_sweep", lambda *problem: right(*problem) ^ 1)
    with pytest.raises(AssertionError, match="of the codes differ"):
        parts.gptq(setting(), 4096, 4096)


def test_results_of_other_versions_are_not_mixed(tmp_path: Path) -> None:
    tables.write(tmp_path, {"facts": FACTS, "items": {}, "absent": {}}, [])
    assert tables.read(tmp_path, FACTS)["facts"] == FACTS
    with pytest.raises(SystemExit, match="measured with other versions"):
        tables.read(tmp_path, {**FACTS, "torch": "3"})


def test_tables_hold_every_key_and_say_what_is_missing() -> None:
    rows: list[dict[str, Any]] = [{"M": 1, "ours µs": 12.34567}, {"M": 2, "ours µs": None, "rival µs": 3.0}]
    assert tables.table(rows) == [
        "| M | ours µs | rival µs |", "|---|---|---|", "| 1 | 12.35 | – |", "| 2 | – | 3 |",
    ]  # fmt: skip
    results = {"facts": FACTS, "items": {"int4 a": {"rows": rows}}, "absent": {"marlin": "no vLLM"}}
    text = tables.markdown(results, ["int4 a", "gram b"])
    assert "- absent: marlin (no vLLM)" in text and "## Not measured\n\n- gram b" in text


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="no NVIDIA GPU here"):
        suite.main(["--out", str(tmp_path)])
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(SystemExit, match="set TRITON_INTERPRET=1"):
        suite.main(["--tiny", "--out", str(tmp_path)])


def test_what_a_machine_lacks_is_named_or_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert packages.missing() == []
    packages.main(tmp_path / "none", tmp_path / "target")  # nothing to do
    monkeypatch.setattr(packages, "NEEDED", {"epmq_needs_this": "epmq-needs-this", "torch": "torch"})
    with pytest.raises(SystemExit, match=r"epmq-needs-this cannot be imported .*none is not there; run make"):
        packages.main(tmp_path / "none", tmp_path / "target")
    with pytest.raises(SystemExit, match="epmq-needs-this could not be installed"):
        packages.main(tmp_path, tmp_path / "target")
    module = tmp_path / "epmq_needs_this-1.0-py3-none-any.whl"
    with zipfile.ZipFile(module, "w") as wheel:
        wheel.writestr("epmq_needs_this.py", "")
        about = "epmq_needs_this-1.0.dist-info"
        wheel.writestr(f"{about}/METADATA", "Metadata-Version: 2.1\nName: epmq-needs-this\nVersion: 1.0\n")
        wheel.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{about}/RECORD", "")
    packages.main(tmp_path, tmp_path / "target")
    assert (tmp_path / "target" / "epmq_needs_this.py").is_file()


def test_rotating_data_exceeds_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    class Card:
        L2_cache_size = 50 * 2**20

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Card)
    for size in (2**20, 40 * 2**20, 400 * 2**20):
        copies = timing.copies_needed(size, torch.device("cuda"))
        assert copies == 64 or (copies - 1) * size >= 2 * Card.L2_cache_size
    assert timing.copies_needed(1, torch.device("cpu")) == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here")
def test_times_on_a_gpu_are_positive_and_graphs_are_used() -> None:
    x = torch.randn(256, 256, device="cuda")
    taken, how = timing.microseconds([lambda: x @ x])
    assert taken > 0 and how == "graph"
