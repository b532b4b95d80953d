"""Perplexity, generation and lm-eval's tasks on a tiny Llama, plain and quantized; the layer benchmark."""

from __future__ import annotations

import importlib.util
import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import in_process, make_job
from language_models import POSITIONS, TEXT, make_llama, quantized_folder
from torch import Tensor, nn

import epmq
from epmq.bench import interleaved, parse_counts, parse_shapes
from epmq.errors import CalibrationError, ConfigError, ModelError, NumericalError
from epmq.huggingface import stop_tokens
from epmq.language import generate_text, open_language_model, text_perplexity
from epmq.perplexity import perplexity
from epmq.scoring import load_any

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("llama") / "plain")


@pytest.fixture(scope="module")
def packed(llama: Path) -> Path:
    return quantized_folder(llama, llama.parent / "packed")


@pytest.fixture(scope="module")
def text(llama: Path) -> Path:
    path = llama.parent / "text.txt"
    path.write_text(TEXT)
    return path


class CountingModel(nn.Module):
    """Logits from the token and from how many tokens of context there are, so that windows can be told apart."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 11)

    def forward(self, input_ids: Tensor) -> Tensor:
        position = torch.arange(1, input_ids.shape[1] + 1).view(1, -1, 1)
        logits: Tensor = self.table(input_ids) * position.float().sqrt()
        return logits


@torch.no_grad()
def expected(model: CountingModel, ids: list[int], window: int, stride: int) -> tuple[float, int]:
    """The definition, token by token: of the windows that hold a token and one before it, the first one scores it."""
    surprise = []
    for place in range(1, len(ids)):
        starts = [s for s in range(0, len(ids), stride) if s <= place < s + window]
        if starts[0] == place:
            continue
        logits = model(torch.tensor([ids[starts[0] : place]]))[0, -1].double()
        surprise.append(-float(torch.log_softmax(logits, 0)[ids[place]]))
    return math.exp(sum(surprise) / len(surprise)), len(surprise)


@pytest.mark.parametrize(("window", "stride"), [(8, 8), (8, 3), (8, 7), (8, 1), (2, 1), (2, 2), (100, 100), (37, 5)])
def test_perplexity_is_its_definition(window: int, stride: int) -> None:
    model = CountingModel()
    ids = torch.randint(11, (37,)).tolist()
    found = perplexity(model, ids, window, stride)
    value, scored = expected(model, ids, window, stride)
    # fp32 log-probabilities against fp64: K = 11 terms each.
    assert math.isclose(found.perplexity, value, rel_tol=11 * 2.0**-20)
    assert found.scored == scored == (36 if stride < window else 37 - math.ceil(37 / window))
    assert found.tokens == 37


def test_many_rows_are_scored_in_parts_that_sum_to_the_whole() -> None:
    model = CountingModel()
    ids = torch.randint(11, (700,)).tolist()
    logits = model(torch.tensor([ids]))[0, :-1].detach().double()
    mean = nn.functional.cross_entropy(logits, torch.tensor(ids[1:]))
    assert math.isclose(perplexity(model, ids, 700).perplexity, math.exp(mean), rel_tol=11 * 2.0**-20)


def test_perplexity_refuses_what_has_no_answer() -> None:
    model = CountingModel()
    with pytest.raises(ConfigError, match="window=1"):
        perplexity(model, [1, 2, 3], 1)
    for stride in (0, 9):
        with pytest.raises(ConfigError, match=f"stride={stride}"):
            perplexity(model, [1, 2, 3], 8, stride)
    with pytest.raises(CalibrationError, match="two tokens"):
        perplexity(model, [1], 8)
    with torch.no_grad():
        model.table.weight[3] = math.nan
    with pytest.raises(NumericalError, match="NaN or Inf"):
        perplexity(model, [3, 3, 3], 8)


def test_eval_text(llama: Path, packed: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = {}
    for folder in (llama, packed):
        done = in_process(capsys, "eval", folder, "--text", text, "--json", tmp_path / "row.json")
        assert (done.code, done.err) == (0, "")
        results[folder.name] = json.loads((tmp_path / "row.json").read_text())
        assert done.out.startswith(f"perplexity {results[folder.name]['perplexity']:.4f} (")
    plain = results["plain"]
    assert plain["window"] == plain["stride"] == POSITIONS
    assert plain["scored"] == plain["tokens"] - math.ceil(plain["tokens"] / POSITIONS)
    # The same again from transformers' own loss, window by window.
    model, tokenizer = open_language_model(llama)
    ids = torch.tensor([tokenizer(TEXT)["input_ids"]])
    losses = [
        (float(model(input_ids=part, labels=part).loss), part.shape[1] - 1)
        for part in ids.split(POSITIONS, 1)
        if part.shape[1] > 1
    ]
    mean = sum(loss * count for loss, count in losses) / sum(count for _, count in losses)
    assert math.isclose(plain["perplexity"], math.exp(mean), rel_tol=1e-4)
    # A random model knows nothing: the perplexity is about the size of its vocabulary, rounded or not.
    assert 0.5 * len(tokenizer) < results["packed"]["perplexity"] < 2 * len(tokenizer)
    assert results["packed"]["perplexity"] != plain["perplexity"]
    done = in_process(capsys, "eval", llama, "--text", text, "--window", "32", "--stride", "16")
    assert f"({plain['tokens'] - 1} of {plain['tokens']} tokens scored, window 32, stride 16)" in done.out


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "give one of --recipe, --text and --lm-eval"),
        (["--text", "{text}", "--lm-eval", "a"], "give one of --recipe, --text and --lm-eval"),
        (["--recipe", "{text}", "--window", "8"], "belong to --text"),
        (["--text", "{text}", "--limit", "8"], "belong to --lm-eval"),
        (["--text", "{text}", "--window", "65"], "window=65: the model reads at most 64 tokens"),
        (["--text", "{text}", "--window", "32", "--stride", "33"], "stride=33"),
        (["--text", "{folder}/missing.txt"], "missing.txt: the file cannot be read"),
        (["--text", "{folder}/empty.txt"], "empty.txt: holds no text"),
        (["--text", "{folder}/blank.txt"], "blank.txt: holds no text"),
        (["--text", "{text}", "--window", "0"], "window=0: a window needs at least two tokens"),
        (["--text", "{folder}/latin.txt"], "latin.txt: not a text in UTF-8"),
    ],
)
def test_eval_refuses(
    llama: Path, text: Path, tmp_path: Path, arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "blank.txt").write_text("\ufeff \n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 ")
    done = in_process(capsys, "eval", llama, *(a.format(text=text, folder=tmp_path) for a in arguments))
    assert done.code == 2 and told in done.err and "Traceback" not in done.err


def test_a_folder_that_is_not_there(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gone = tmp_path / "gone"
    told = (2, "", f"epmq: {gone}: there is no such folder.\n")
    assert in_process(capsys, "eval", gone, "--text", text) == told
    assert in_process(capsys, "generate", gone, "--prompt", "a") == told


def test_a_byte_order_mark_is_not_scored(llama: Path, text: Path, tmp_path: Path) -> None:
    marked = tmp_path / text.name
    marked.write_bytes(b"\xef\xbb\xbf" + text.read_bytes())
    assert text_perplexity(llama, marked) == text_perplexity(llama, text)


def test_tokens_beyond_the_embedding_are_refused(
    llama: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A tokenizer that was extended after the model."""
    import transformers

    folder = tmp_path / "extended"
    shutil.copytree(llama, folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["Merging"])
    tokenizer.save_pretrained(folder)
    told = f"the tokenizer makes token {len(tokenizer) - 1} of it, and LlamaForCausalLM's embedding has"
    done = in_process(capsys, "eval", folder, "--text", text)
    assert done.code == 2 and f"{text}: {told}" in done.err
    done = in_process(capsys, "generate", folder, "--prompt", "Merging", "--max-new-tokens", "2")
    assert done.code == 2 and f"the prompt: {told}" in done.err


def test_generate_streams_text_and_tells_its_speed(packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done = in_process(capsys, "generate", packed, "--prompt", "Merging gives", "--max-new-tokens", "12")
    assert done.code == 0
    told = done.err.splitlines()
    assert len(told) == 2
    assert told[0].startswith("prefill: ") and told[0].endswith(" tokens/s")
    assert told[1].startswith("decode: ")
    again = in_process(capsys, "generate", packed, "--prompt", "Merging gives", "--max-new-tokens", "12")
    assert again.out == done.out and done.out.endswith("\n")
    # The likeliest tokens, one after the other, without any cache.
    model, tokenizer = open_language_model(packed)
    ids = tokenizer("Merging gives", return_tensors="pt")["input_ids"]
    start = ids.shape[1]
    with torch.no_grad():
        for _ in range(12):
            ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
            if int(ids[0, -1]) == tokenizer.eos_token_id:
                break
    assert done.out == tokenizer.decode(ids[0, start:], skip_special_tokens=True) + "\n"
    assert told[0].startswith(f"prefill: {start} tokens in ")
    assert told[1].startswith(f"decode: {ids.shape[1] - start - 1} tokens in ")


def test_drawing_follows_the_seed(packed: Path) -> None:
    def draw(seed: int, temperature: float = 1.0) -> str:
        pieces: list[str] = []
        generate_text(packed, "The", pieces.append, 12, temperature, seed)
        return "".join(pieces)

    assert draw(1) == draw(1) != draw(2)
    # Towards zero the drawing becomes the likeliest token.
    assert draw(1, 1e-4) == draw(2, 0.0)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--prompt", "a", "--max-new-tokens", "0"], "max_new_tokens=0"),
        (["--prompt", "a", "--max-new-tokens", "64"], "more than the 64 that the model reads"),
        (["--prompt", "a", "--temperature", "-1"], "temperature=-1.0"),
        (["--prompt", "a", "--temperature", "nan"], "temperature=nan"),
        (["--prompt", "a", "--device", "gpu"], "'gpu' is not a device here"),
        (["--prompt", "a", "--device", "mps"], "'mps' is not a device here"),
        (["--prompt", "a", "--seed", "99999999999999999999999"], "Invalid value for '--seed'"),
        (["--prompt", "a", "--dtype", "int8"], "'int8' is not one of"),
        ([], "Missing option '--prompt'"),
    ],
)
def test_generate_refuses(packed: Path, arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    if "mps" in arguments and torch.backends.mps.is_available():
        pytest.skip("there is such a device")
    done = in_process(capsys, "generate", packed, *arguments)
    assert done.code == 2 and told in done.err and done.out == ""


def test_a_model_is_saved_with_settings_that_its_generation_does_not_use(llama: Path, tmp_path: Path) -> None:
    """transformers refuses to write them, but for those it has read from a file."""
    import transformers

    model: Any = transformers.AutoModelForCausalLM.from_pretrained(llama)
    model.generation_config.temperature = 0.7
    epmq.replace_linear(model, group_size=16)
    epmq.save(model, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["temperature"] == 0.7
    epmq.load(tmp_path / "out")
    assert stop_tokens(tmp_path / "out") == 1


def test_a_model_runs_in_the_dtype_asked_for(packed: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = open_language_model(packed)[0].dtype
    other = torch.bfloat16 if own == torch.float32 else torch.float32
    assert open_language_model(packed, "cpu", other)[0].dtype == other
    for dtype in (own, other):
        wide = in_process(capsys, "eval", packed, "--text", text, "--device", "cpu", "--dtype", str(dtype)[6:]).out
        assert (wide == in_process(capsys, "eval", packed, "--text", text, "--device", "cpu").out) == (dtype == own)


def test_rotary_frequencies_stay_as_they_are_made(packed: Path) -> None:
    frequencies = {n: b for n, b in epmq.load(packed).named_buffers() if n.endswith("inv_freq")}
    for dtype in (torch.bfloat16, torch.float16):
        model = epmq.load(packed, dtype=dtype)
        found = {n: b for n, b in model.named_buffers() if n.endswith("inv_freq")}
        assert found and all(torch.equal(found[n], b) and b.dtype == torch.float32 for n, b in frequencies.items())
        assert {parameter.dtype for parameter in model.parameters()} == {dtype}


def test_an_encoder_is_no_language_model(tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    encoder = make_job(tmp_path / "job").folder / "base"
    calls: list[list[str | Path]] = [["eval", encoder, "--text", text], ["generate", encoder, "--prompt", "a"]]
    for arguments in calls:
        done = in_process(capsys, *arguments)
        assert done.code == 2 and "BertModel is not a causal language model" in done.err


def test_lm_eval_is_asked_for_when_it_is_absent(
    llama: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    done = in_process(capsys, "eval", llama, "--lm-eval", "hellaswag")
    assert done.code == 2
    assert done.err == "epmq: tasks of lm-eval need lm-eval, which is not installed: pip install 'epmq[lm-eval]'.\n"


TASK = """
task: which_word
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: label
metric_list: [{{metric: acc}}]
"""


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed: pip install lm-eval")
def test_tasks_of_lm_eval(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A task of our own, from a local file; the labels are what the model itself finds likelier."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    model, tokenizer = open_language_model(packed)
    rows: list[dict[str, Any]] = []
    for number in range(6):
        question, choices = f"Question {number}:", [" merged", " experts"]
        scores = [likelihood(model, tokenizer, question, choice) for choice in choices]
        best = scores.index(max(scores))
        rows.append({"question": question, "choices": choices, "label": best if number < 4 else 1 - best})
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "which_word.yaml").write_text(TASK.format(data=tmp_path / "rows.jsonl"))
    target = tmp_path / "out.json"
    done = in_process(capsys, "eval", packed, "--lm-eval", "which_word", "--include", tmp_path, "--json", target)
    assert done.code == 0, done.err
    assert "| which_word | acc | 0.6667 |" in done.out
    assert json.loads(target.read_text())["tasks"]["which_word"]["acc,none"] == pytest.approx(4 / 6)
    done = in_process(capsys, "eval", packed, "--lm-eval", "no_such_task", "--include", tmp_path)
    assert done.code == 2 and "lm-eval knows no task 'no_such_task'" in done.err


def likelihood(model: Any, tokenizer: Any, question: str, choice: str) -> float:
    before = len(tokenizer(question)["input_ids"])
    ids = torch.tensor([tokenizer(question + choice)["input_ids"]])
    with torch.no_grad():
        log_p = torch.log_softmax(model(input_ids=ids).logits[0], -1)
    return float(sum(log_p[place - 1, ids[0, place]] for place in range(before, ids.shape[1])))


def test_load_any_gives_the_same_model_for_both_folders(llama: Path, packed: Path) -> None:
    ids = torch.tensor([[0, 5, 9, 20]])
    with torch.no_grad():
        plain, small = load_any(llama)(input_ids=ids).logits, load_any(packed)(input_ids=ids).logits
    assert plain.shape == small.shape and not torch.equal(plain, small)
    with pytest.raises(ModelError, match="tokenizer"):
        open_language_model(llama.parent)


def test_bench_prints_a_line_per_shape_and_size(capsys: pytest.CaptureFixture[str]) -> None:
    done = in_process(
        capsys, "bench", "--shape", "64x128,32x64", "--tokens", "1,3", "--group-size", "32", "--seconds", "0.01"
    )
    assert (done.code, done.err) == (0, "")
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in done.out.splitlines()[3:]]
    assert [line[:3] for line in lines] == [
        ["64", "128", "1"], ["64", "128", "3"], ["32", "64", "1"], ["32", "64", "3"]
    ]  # fmt: skip
    assert all(float(line[3]) > 0 and float(line[4]) > 0 for line in lines)
    # 4 bits and, per 32 columns, a scale of 4 bytes and a zero of 1: (16 + 5) / 128 of fp32.
    assert {line[6] for line in lines} == {f"{21 / 128:.3f}"}


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--shape", "64"], "shape '64': give OUTxIN"),
        (["--shape", "0x4"], "shape '0x4'"),
        (["--tokens", "1,x"], "tokens 'x'"),
        (["--bits", "5", "--shape", "8x8"], "bits=5: use one of 2, 3, 4, 8."),
        (["--group-size", "0", "--shape", "8x8"], "group_size=0: use a positive number, or -1"),
        (["--shape", "99999999x99999999"], "shape 99999999x99999999: rounding it takes 149,011,609 GiB, and "),
        (["--device", "cuda"], "device: 'cuda' is not there, CUDA offers 0"),
        (["--device", "foo"], "device: 'foo' is not a device here; use auto, cpu, cuda or cuda:0."),
        (["--device", "mps"], "device: 'mps' is not a device here"),
        (["--device", "meta"], "device: 'meta' is not a device here"),
    ],
)
def test_bench_refuses(arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    if "mps" in arguments and torch.backends.mps.is_available():
        pytest.skip("there is such a device")
    done = in_process(capsys, "bench", *arguments)
    assert (done.code, done.out) == (2, "") and told in done.err


def test_interleaved_calls_take_turns() -> None:
    order: list[str] = []
    times = interleaved({name: lambda name=name: order.append(name) for name in "ab"}, 0.0)  # type: ignore[misc]
    assert order == ["a", "b"] * 6
    assert set(times) == {"a", "b"}
    assert parse_shapes("2x3, 4X5") == [(2, 3), (4, 5)] and parse_counts("1, 2") == [1, 2]
