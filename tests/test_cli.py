"""The command line, end to end on a model folder."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from checkpoints import TASKS, Job, environment, in_new_process, in_process, make_job
from safetensors.torch import load_file

import epmq
from epmq import QuantLinear, cli, extension
from epmq.errors import ModelError
from epmq.scoring import load_any

pytest.importorskip("transformers")
no_amx = pytest.mark.skipif("amx" in extension.build_report().get("cpu_levels", ["amx"]), reason="has AMX")
signals = pytest.mark.parametrize(
    ("number", "code", "word"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
compiled = pytest.mark.skipif(extension.module is None, reason="needs the compiled extension")


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return make_job(tmp_path / "job")


def test_merge_quantize_and_eval(job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = job.write()
    merged, quantized = tmp_path / "merged", tmp_path / "deep" / "quantized"

    done = in_process(capsys, "merge", recipe, "--out", merged)
    assert (done.code, done.err) == (0, "")
    assert done.out == f"merged model in {merged}\n"
    base = load_file(job.folder / "base" / "model.safetensors")
    ours = load_file(merged / "model.safetensors")
    assert ours.keys() == base.keys()
    for name, tensor in base.items():
        deltas = sum((job.tensor(task, name) - tensor for task in TASKS), torch.zeros(()))
        assert torch.allclose(ours[name], tensor + 0.4 * deltas, atol=1e-6)
    assert {"config.json", "tokenizer.json", "model.safetensors"} <= {path.name for path in merged.iterdir()}

    done = in_new_process("quantize", recipe, "--out", quantized)
    assert (done.code, done.err) == (0, "")
    assert "peak memory" in done.out
    assert f"quantized model, report.json and report.html in {quantized}" in done.out
    for task in TASKS:
        assert f"{task}: mean output error against the expert: merged " in done.out
    assert {path.name for path in quantized.iterdir()} == {
        "README.md", "config.json", "model.safetensors", "report.html", "report.json", "run.json", "tokenizer.json",
        "tokenizer_config.json",
    }  # fmt: skip
    report = json.loads((quantized / "report.json").read_text())
    assert "seconds" not in json.dumps(report)
    assert len(report["layers"]) == 2 * 6
    assert report["calibration"].keys() == set(TASKS)
    card = (quantized / "README.md").read_text()
    for task, counts in report["calibration"].items():
        assert counts["examples"] == 8 < counts["positions"] <= 8 * 16
        assert f"- {task}: 8 examples, {counts['positions']} positions" in card
    assert "  max_length: 16" in card
    again = in_new_process("quantize", recipe, "--out", quantized, "--resume")
    assert (again.code, again.err) == (
        0,
        f"{quantized}: an earlier run of this job has finished it; nothing was done.\n",
    )
    model = epmq.load(quantized)
    assert sum(isinstance(module, QuantLinear) for module in model.modules()) == 2 * 6

    rows = {}
    for folder in (merged, quantized, job.folder / "base"):
        target = tmp_path / "rows" / f"{folder.name}.json"
        done = in_process(capsys, "eval", folder, "--recipe", recipe, "--json", target)
        assert (done.code, done.err) == (0, "")
        assert all(task in done.out for task in TASKS)
        rows[folder.name] = json.loads(target.read_text())
        assert rows[folder.name]["method"] == folder.name
        assert 0.0 <= rows[folder.name]["average"] <= 100.0
        assert rows[folder.name]["bits"] == (4 if folder == quantized else None)
        assert ("| quantized | 4 |" if folder == quantized else f"| {folder.name} | – |") in done.out


def test_quantizing_a_recipe_is_quantizing_its_merge_in_memory(job: Job, tmp_path: Path) -> None:
    from epmq.jobs import calibration_of, quantize_to_folder
    from epmq.merge_jobs import merge_to_folder
    from epmq.recipe import read_recipe

    recipe = read_recipe(job.write())
    report = quantize_to_folder(recipe, tmp_path / "out")
    merge_to_folder(recipe, tmp_path / "merged")
    merged = load_any(tmp_path / "merged")
    in_memory = epmq.quantize(merged, recipe.experts, calibration_of(recipe), recipe.quantization)
    loaded = epmq.load(tmp_path / "out")
    assert loaded.state_dict().keys() == in_memory.model.state_dict().keys()
    for name, tensor in in_memory.model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert report["average_error"] == in_memory.report["average_error"]
    # And the same from the merged model's own folder.
    job.recipe = {**job.recipe, "merged": "../merged"}
    del job.recipe["merge"]
    quantize_to_folder(read_recipe(job.write()), tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (
        tmp_path / "out" / "model.safetensors"
    ).read_bytes()


def test_presets_and_distillation_from_a_recipe(job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job.recipe["quantization"] = {"preset": "best", "group_size": 16, "distill": {"steps": 3, "copies": 1}}
    done = in_process(capsys, "quantize", job.write(), "--out", tmp_path / "out")
    assert (done.code, done.err) == (0, "")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["stages"]["distill"]["steps"] == 3
    epmq.load(tmp_path / "out")
    # The closed form against the experts first, then what rounding adds.
    first, card = report["stages"]["closed_form"]["layers"], (tmp_path / "out" / "README.md").read_text()
    for task in TASKS:
        merged, ours = (sum(row["tasks"][task][of] for row in first) / len(first) for of in ("merged", "epmq"))
        then = report["average_error"][task]
        against = f"{task}: mean output error against the expert: merged {merged:.4f}, closed form {ours:.4f}\n"
        rounding = f"{task}: rounding the distilled model: distilled {then['merged']:.4f}, gptq {then['gptq']:.4f}"
        assert done.out.index(against) < done.out.index(rounding)
        assert f"| {task} | {merged:.4f} | {ours:.4f} |" in card
    assert "| task | merged | closed form |" in card and "| task | distilled | gptq | epmq |" in card


@pytest.mark.parametrize("sym", [False, True])
def test_a_file_that_transformers_refuses_is_told(
    sym: bool, job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mixture = {"bits": 4, "group_size": 16, "sym": sym, "overrides": {"query": {"bits": 8}}}
    job.recipe["quantization"] = mixture
    done = in_process(capsys, "quantize", job.write(), "--out", tmp_path / "out")
    told = "transformers 5.23 refuses it: a mixture loads there only when all of it is symmetric (`sym: true`)."
    assert (told in done.out.splitlines()) is not sym
    assert (told in json.loads((tmp_path / "out" / "report.json").read_text())["notes"]) is not sym


def test_errors_of_a_distilled_model_that_is_not_rounded(
    job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job.recipe["quantization"] = {"preset": "best", "bits": None, "distill": {"steps": 2, "copies": 1}}
    done = in_process(capsys, "quantize", job.write(), "--out", tmp_path / "out")
    assert done.code == 0
    assert "mean output error against the expert: merged" in done.out and "rounding" not in done.out


def test_rounding_to_nearest_needs_no_calibration(job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    del job.recipe["calibration"]
    job.recipe["quantization"] = {"method": "rtn", "group_size": 16}
    done = in_process(capsys, "quantize", job.write(), "--out", tmp_path / "out")
    assert (done.code, done.err) == (0, "")
    epmq.load(tmp_path / "out")


def test_env_tells_versions_and_implementations(capsys: pytest.CaptureFixture[str]) -> None:
    done = in_process(capsys, "env")
    assert (done.code, done.err) == (0, "")
    lines = dict(line.split(": ", 1) for line in done.out.splitlines() if ": " in line)
    assert lines["epmq"] == epmq.__version__
    assert lines["torch"] == torch.__version__
    for op in ("accumulate", "gptq_sweep", "dequant_matmul"):
        assert lines[op].endswith("reference")


@pytest.mark.parametrize("backend", ["reference", *(["cpp"] if extension.module else [])])
def test_env_tells_what_is_used_here(
    backend: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("EPMQ_BACKEND", backend)
    lines = dict(line.split(": ", 1) for line in in_process(capsys, "env").out.splitlines() if ": " in line)
    for op in ("accumulate", "gptq_sweep", "dequant_matmul"):
        assert lines[op].startswith(f"{backend} for fp32 on the CPU")
    assert lines["cholesky"].startswith("reference for fp32 on the CPU")


@pytest.mark.parametrize(
    ("variable", "value", "told"),
    [
        pytest.param("EPMQ_CPU", "sse9", "is not an instruction set of this build; use one of plain", marks=compiled),
        pytest.param("EPMQ_CPU", "amx", "asks for instructions that this CPU does not have", marks=no_amx),
        ("EPMQ_EXTENSION", "x", "is not understood; use 0 to ignore the extension"),
        ("EPMQ_BACKEND", "x", "is not a backend; use one of reference"),
    ],
)
def test_a_wrong_variable_is_one_sentence(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, told: str
) -> None:
    monkeypatch.setenv(variable, value)
    done = in_new_process("quantize", job.write(), "--out", tmp_path / "out")
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith(f"epmq: {variable}=") and told in done.err and done.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_the_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert in_process(capsys, "--version") == (0, f"epmq {epmq.__version__}\n", "")


@pytest.mark.parametrize("arguments", [["--help"], ["quantize", "--help"], ["merge", "--help"], ["eval", "--help"]])
def test_help_is_given(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    done = in_process(capsys, *arguments)
    assert (done.code, done.err) == (0, "")
    assert "Usage:" in done.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["quantise"], "No such command 'quantise'"),
        (["quantize", "recipe.yaml"], "Missing option '--out'"),
        (["quantize", "--out", "out"], "Give either RECIPE or --mergekit FILE"),
    ],
)
def test_misuse_is_one_message(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    done = in_process(capsys, *arguments)
    assert done.code == 2
    assert message in done.err
    assert "Traceback" not in done.err


def test_texts_are_given_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    twice = ["--calibration", "X=a.jsonl", "--calibration", "X=b.jsonl"]
    done = in_process(capsys, "quantize", "--mergekit", tmp_path / "c.yml", *twice, "--out", tmp_path / "out")
    assert done.code == 2
    assert "--calibration: expert 'X' is given twice; give one file for each." in done.err


def test_a_name_that_is_too_long_is_refused(job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for verb in ("quantize", "merge"):
        done = in_process(capsys, verb, job.write(), "--out", tmp_path / ("n" * 300))
        assert (done.code, done.out) == (2, "")
        assert done.err.endswith("n: the output folder cannot be made (File name too long).\n")
    assert [path.name for path in tmp_path.iterdir()] == ["job"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_an_output_that_takes_nothing_is_told(job: Job, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "epmq", "merge", str(job.write()), "--out", str(tmp_path / "out")]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, env=environment(), check=False)
    told = "epmq: the standard output cannot be written (No space left on device); nothing else failed.\n"
    assert (done.returncode, done.stderr) == (2, told)
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_signs_that_the_terminal_lacks_are_escaped(job: Job) -> None:
    command = [sys.executable, "-m", "epmq", "eval", str(job.folder / "base"), "--recipe", str(job.write())]
    narrow = {**environment(), "PYTHONIOENCODING": "latin-1"}
    done = subprocess.run(command, capture_output=True, text=True, env=narrow, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "| \\u2013 | base | \\u2013 |" in done.stdout


def heed_interrupts() -> None:
    """A job started in the background of a shell inherits that SIGINT is ignored; a person's does not."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@signals
def test_an_interrupted_run_can_go_on(tmp_path: Path, number: int, code: int, word: str) -> None:
    job = make_job(tmp_path / "job", blocks=40, examples=40)
    out = tmp_path / "results" / "out"
    command = [sys.executable, "-m", "epmq", "quantize", str(job.write()), "--out", str(out)]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        preexec_fn=heed_interrupts,
    )
    kept = out.with_name(".out.partial")
    try:
        deadline = time.monotonic() + 120
        while not (finished := len(list(kept.glob("blocks/*.safetensors")))) and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        os.kill(process.pid, number)
        stdout, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert 0 < finished < 40, "the run ended before it could be interrupted"
    assert process.returncode == code, stderr
    told = f"epmq: {word}. Finished blocks are kept in {kept}; go on with --resume, or remove it."
    assert stderr.strip() == told
    assert stdout == ""
    assert list(out.parent.iterdir()) == [kept]
    assert not (kept / "result").exists()


def exit_status() -> object:
    """Of the command line in this process, which heeds interrupts meanwhile."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(SystemExit) as end:
            cli.main()
    finally:
        signal.signal(signal.SIGINT, before)
    return end.value.code


@signals
@pytest.mark.parametrize("kind", [ValueError, ModelError, SystemError])
def test_a_signal_that_a_library_tells_as_its_own_error_is_a_signal(
    number: int,
    code: int,
    word: str,
    kind: type[Exception],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """torch does so when its C++ calls Python and the handler runs there: "could not determine the shape of ..."."""

    def told_otherwise(standalone_mode: bool) -> None:
        try:
            signal.raise_signal(number)
        except KeyboardInterrupt:
            other = kind("could not determine the shape of object type 'torch.storage.UntypedStorage'")
            other.add_note("Finished blocks are kept.")
            raise other from None

    monkeypatch.setattr(cli, "app", told_otherwise)
    assert (exit_status(), capsys.readouterr().err) == (code, f"epmq: {word}. Finished blocks are kept.\n")


@signals
def test_a_signal_that_a_library_drops_is_raised_again(
    number: int, code: int, word: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not while something else is handled, which may be a cleaning up."""
    cleaned = []

    def dropping(standalone_mode: bool) -> None:
        for _ in range(3):
            with contextlib.suppress(KeyboardInterrupt):
                signal.raise_signal(number)
        try:
            raise ValueError
        except ValueError:
            wait(0.5)
            cleaned.append(True)
        wait(60.0)

    def wait(seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            time.sleep(0.01)

    monkeypatch.setattr(cli, "app", dropping)
    told = f"epmq: {word}; nothing half-written was left.\n"
    assert (exit_status(), capsys.readouterr().err, cleaned) == (code, told, [True])
