"""Files of somebody hostile: each trap is refused with one sentence, and a short run of the fuzzer finds none open."""

from __future__ import annotations

import ast
import json
import os
import re
import socket
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fuzz
import pytest
from hypothesis import given
from hypothesis import strategies as st
from readers import READERS

from epmq import patterns, trust
from epmq.errors import ConfigError, EpmqError, FormatError, ModelError, SourceError
from epmq.huggingface import skeleton_from_folder, tokenizer_from_folder
from epmq.sources import INDEX_NAME, FileSource

PACKAGE = Path(__file__).resolve().parent.parent / "epmq"


def refusal(error: type[EpmqError], call: Callable[..., Any], *arguments: Any) -> str:
    with pytest.raises(error) as caught:
        call(*arguments)
    return str(caught.value)


# -- files ------------------------------------------------------------------------------------------------------------


def make_pipe(path: Path) -> str:
    os.mkfifo(path)
    return "a named pipe"


def make_socket(path: Path) -> str:
    here = os.getcwd()
    os.chdir(path.parent)  # names of sockets are short
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(path.name)
    os.chdir(here)
    return "a socket"


def make_device(path: Path) -> str:
    path.symlink_to("/dev/zero")
    return "a device"


def make_folder(path: Path) -> str:
    path.mkdir()
    return "a folder"


@pytest.mark.parametrize("make", [make_pipe, make_socket, make_device, make_folder])
@pytest.mark.parametrize(("name", "file"), [(n, f) for n, r in READERS.items() for f in dict.fromkeys(r.spoilt)])
def test_what_is_no_regular_file_is_never_waited_for(
    name: str, file: str, make: Callable[[Path], str], tmp_path: Path
) -> None:
    READERS[name].write(tmp_path)
    (tmp_path / file).unlink()
    kind = make(tmp_path / file)
    told = refusal(EpmqError, READERS[name].read, tmp_path)
    # A head may be a folder, a shard may not be there; told is either.
    assert kind in told or "is missing" in told or "expected model.safetensors" in told, told


def test_links_to_regular_files_are_read_as_in_the_cache_of_the_hub(tmp_path: Path) -> None:
    for name, reader in READERS.items():
        folder = tmp_path / name
        folder.mkdir()
        reader.write(folder)
        for file in set(reader.spoilt):
            (folder / file).rename(tmp_path / f"{name}-{file}")
            (folder / file).symlink_to(tmp_path / f"{name}-{file}")
        reader.read(folder)


@pytest.mark.parametrize(
    "shard", ["..", ".", "", "../one.safetensors", "/etc/passwd", "a" * 300, "\0", "\ud800", 3, None, []]
)
def test_a_shard_stays_in_its_folder(shard: Any, tmp_path: Path) -> None:
    READERS["shards"].write(tmp_path)
    path = tmp_path / INDEX_NAME
    content = json.loads(path.read_text())
    content["weight_map"]["c"] = shard
    path.write_text(json.dumps(content))
    assert INDEX_NAME in refusal(SourceError, FileSource, tmp_path)


def test_names_from_files_cannot_write_over_the_terminal(tmp_path: Path) -> None:
    told = str(SourceError("tensor \x1b[31m\n\u2028\ud800 " + "x" * 10**6))
    assert told.isprintable()
    assert len(told) < 4_100
    assert "\\x1b[31m\\n\\u2028\\ud800" in told


# -- safetensors ------------------------------------------------------------------------------------------------------


def write_header(path: Path, header: Any, data: bytes = b"\0" * 16, length: int | None = None) -> None:
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


def entry(shape: list[Any], start: int = 0, end: int = 16, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


@pytest.mark.parametrize(
    "header",
    [
        {"a": entry([2**60])},
        {"a": entry([2**60], 0, 2**62)},
        {"a": entry([2**32, 2**32, 4])},
        {"a": entry([2**62, 2**62, 0], 0, 0)},
        {"a": entry([2**63, 0], 0, 0), "b": entry([4])},
        {"a": entry([-4])},
        {"a": entry([4], 16, 0)},
        {"a": entry([4], -16, 0)},
        {"a": entry([2], 0, 8), "b": entry([2], 4, 12)},
        {"a": entry([2], 0, 8)},
        {"a": entry([4.5])},
        {"a": entry([4], dtype="F99")},
        {"a": 3},
        [],
    ],
    ids=str,
)
def test_a_header_that_promises_what_the_file_does_not_hold(header: Any, tmp_path: Path) -> None:
    write_header(tmp_path / "model.safetensors", header)
    assert "model.safetensors: " in refusal(SourceError, FileSource, tmp_path)


@pytest.mark.parametrize("length", [0, 2**31, 2**60, 2**64 - 1])
def test_a_header_of_impossible_length(length: int, tmp_path: Path) -> None:
    write_header(tmp_path / "model.safetensors", {"a": entry([4])}, length=length)
    assert "not a complete safetensors file" in refusal(SourceError, FileSource, tmp_path)


# -- JSON and YAML ----------------------------------------------------------------------------------------------------

BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{i + 1}: &a{i + 1} [{', '.join([f'*a{i}'] * 9)}]\n" for i in range(9))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOMB, "stands for too many values"),
        ("a: &a [*a]", "contains itself"),
        ("a: 1\nb: 2\na: 3", "key 'a' is there twice"),
        ("[" * 70 + "]" * 70, "nested more than 64 deep"),
        ("[" * 99_999, "not a YAML file"),
        ("a: &a0 [1]\n" + "".join(f"b{i}: &a{i + 1} [*a{i}]\n" for i in range(80)), "nested more than 64 deep"),
        ("a: " + "9" * 5000, "a number of 5000 digits"),
        ("a: 1" + ":1" * 5000, "digits"),
        ('a: "\\ud800"', "half a surrogate pair"),
        ("a: !!python/object/apply:os.system ['true']", "not a YAML file"),
        ("a: !!bool x", "not a YAML file"),
        ("a: !!timestamp x", "not a YAML file"),
        ("a: !!int ''", "not a YAML file"),
        ("a: 2001-99-99", "not a YAML file"),
        ("a: " + "x" * 300_000, "more than 0.25 MiB"),
        ("a: \udcff", "not a YAML file"),
    ],
    ids=lambda value: value[:20],
)
@pytest.mark.parametrize("name", ["recipe", "mergekit", "paper"])
def test_yaml_traps(text: str, message: str, name: str, tmp_path: Path) -> None:
    READERS[name].write(tmp_path)
    (tmp_path / READERS[name].spoilt[0]).write_bytes(text.encode("utf-8", "surrogateescape"))
    assert message in refusal(ConfigError, READERS[name].read, tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1, "a": 2}', "name 'a' is there twice"),
        ("[" * 70 + "]" * 70, "nested more than 64 deep"),
        ("[" * 99_999, "recursion"),
        ("9" * 5000, "limit"),
    ],
    ids=lambda value: value[:20],
)
def test_json_traps(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(text)
    assert message in refusal(FormatError, trust.read_json, tmp_path / "x.json", FormatError)


def test_an_endless_file_is_not_read_to_its_end(tmp_path: Path) -> None:
    with open(tmp_path / "x.json", "wb") as handle:
        handle.truncate(2**40)  # sparse
    assert "more than 64 MiB" in refusal(FormatError, trust.read_json, tmp_path / "x.json", FormatError)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@given(JSON)
def test_every_ordinary_json_value_is_read_as_it_is(value: Any) -> None:
    assert trust.parse_json(json.dumps(value)) == value


@given(st.text())
def test_no_name_leaves_the_folder(name: str) -> None:
    try:
        found = trust.shard_in(PACKAGE, name, PACKAGE, SourceError)
    except SourceError:
        return
    assert found.parent == PACKAGE


# -- expressions and numbers ------------------------------------------------------------------------------------------


def test_an_expression_that_would_take_for_ever_is_given_up() -> None:
    told = refusal(ConfigError, patterns.match, "(a|aa)+$", "a" * 200 + "b")
    assert "the regular expression '(a|aa)+$' takes longer than" in told


@pytest.mark.parametrize("pattern", ["(", "a{99999999999}", "(" * 2_001, "(" * 1_500, "(?R)"])
def test_expressions_that_are_none(pattern: str) -> None:
    with pytest.raises(ValueError, match="regular expression"):
        patterns.check(pattern)


@pytest.mark.parametrize(("pattern", "name"), [(r"(.*\.)?(q|k)$", "a.q"), ("^b", "ab"), ("x", "axb"), ("", "")])
def test_expressions_mean_what_they_mean_in_python(pattern: str, name: str) -> None:
    assert patterns.match(pattern, name) == (re.match(pattern, name) is not None)
    assert patterns.search(pattern, name) == (re.search(pattern, name) is not None)


@pytest.mark.parametrize("value", [True, 4.0, "4", None, 0, 10**30, [4]])
@pytest.mark.parametrize("name", ["compressed-tensors", "gptq", "native"])
def test_bits_are_whole_numbers(name: str, value: Any, tmp_path: Path) -> None:
    READERS[name].write(tmp_path)
    path = tmp_path / READERS[name].spoilt[0]
    path.write_text(re.sub(r'("(num_)?bits": ?)\d', lambda found: found[1] + json.dumps(value), path.read_text()))
    assert "bits" in refusal(FormatError, READERS[name].read, tmp_path)


@pytest.mark.parametrize("value", [True, 4.0, "4", 0, -2, 2**31, 10**30])
@pytest.mark.parametrize("name", ["compressed-tensors", "gptq", "native"])
def test_group_sizes_are_whole_numbers(name: str, value: Any, tmp_path: Path) -> None:
    READERS[name].write(tmp_path)
    path = tmp_path / READERS[name].spoilt[0]
    path.write_text(re.sub(r'("group_size": ?)\d+', lambda found: found[1] + json.dumps(value), path.read_text()))
    refusal(FormatError, READERS[name].read, tmp_path)


@pytest.mark.parametrize(
    "change", [{"r": 0}, {"r": 10**30}, {"lora_alpha": float("nan")}, {"rank_pattern": {"a": 0}}], ids=str
)
def test_numbers_of_an_adapter(change: dict[str, Any], tmp_path: Path) -> None:
    READERS["adapter"].write(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    assert f"adapter_config.json: {next(iter(change))}" in refusal(SourceError, READERS["adapter"].read, tmp_path)


# -- code of others ---------------------------------------------------------------------------------------------------

CODE = "from pathlib import Path\nPath({!r}).touch()\n"


def test_a_model_of_remote_code_is_refused_and_not_run(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    (tmp_path / "own.py").write_text(CODE.format(str(tmp_path / "ran")))
    auto = {"AutoConfig": "own.C", "AutoModel": "own.M", "AutoTokenizer": ["own.T", None]}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": auto}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "T", "auto_map": auto}))
    (tmp_path / "vocab.txt").write_text("a")
    assert "config.json" in refusal(ModelError, skeleton_from_folder, tmp_path, set())
    assert "no tokenizer can be loaded" in refusal(ModelError, tokenizer_from_folder, tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "change",
    [{"attn_implementation": "org/kernel"}, {"architectures": ["pipeline"]}, {"architectures": ["Trainer"]}],
    ids=str,
)
def test_names_in_a_configuration_choose_no_code(
    change: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    transformers = pytest.importorskip("transformers")
    READERS["config"].write(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    for name in ("pipeline", "Trainer"):
        monkeypatch.setattr(transformers, name, lambda *a, **k: pytest.fail("it was called"))
    model: Any = skeleton_from_folder(tmp_path, set())
    assert model.config._attn_implementation in ("sdpa", "eager")


@pytest.mark.parametrize(
    "change",
    [
        {"num_hidden_layers": 10**9},
        {"num_labels": 10**9},
        {"n_groups": 10**9},
        {"text_config": {"moe_num_experts": 10**9}},
        {"max_position_embeddings": 2**40},
        {"num_hidden_layers": 20_000},
    ],
    ids=str,
)
def test_a_configuration_larger_than_its_checkpoint(change: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    READERS["config"].write(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    assert "config.json" in refusal(ModelError, skeleton_from_folder, tmp_path, {"a"})


def test_large_numbers_that_are_no_sizes_are_none_of_our_concern(tmp_path: Path) -> None:
    """As in configurations of Gemma 4 with sound."""
    pytest.importorskip("transformers")
    READERS["config"].write(tmp_path)
    path = tmp_path / "config.json"
    audio = {"audio_config": {"attention_invalid_logits_value": -1e9}}
    path.write_text(json.dumps({**json.loads(path.read_text()), **audio}))
    skeleton_from_folder(tmp_path, {"a"})


def test_no_pickle_no_remote_code_no_unsafe_yaml() -> None:
    """In the whole package, by its own text."""
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            where = f"{path.name}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
                assert not {"pickle", "dill", "joblib", "marshal", "shelve"} & set(names), where
            if not isinstance(node, ast.Call):
                continue
            call = ast.unparse(node.func)
            keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            assert call not in ("torch.load", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "eval", "exec"), where
            if re.search(r"Auto\w+\.from_(pretrained|config)$", call):
                assert keywords.get("trust_remote_code") == "False", where
            if re.search(r"(AutoModel\w*|CLIPModel)\.from_pretrained$", call):
                assert keywords.get("use_safetensors") == "True", where


# -- the fuzzer -------------------------------------------------------------------------------------------------------


def test_what_was_found_once_stays_closed(tmp_path: Path) -> None:
    (tmp_path / "good").mkdir()
    fuzzer = fuzz.Fuzzer(tmp_path / "good", limited=False)
    for path in sorted(fuzz.CORPUS.iterdir()):
        name, _, file = path.name.split("--", 2)
        assert fuzzer.outcome(name, file, path.read_bytes()) in ("read", "refused"), path.name


def test_a_short_run_finds_nothing(tmp_path: Path) -> None:
    counts, findings = fuzz.run(2_000, 7, tmp_path / "corpus")
    assert not findings, [path.name for path in findings]
    assert sum(counts.values()) == 2_000
    for name in READERS:
        assert counts[name, "refused"] > 0, f"{name}: no input was refused"


def test_the_fuzzer_sees_what_is_wrong(tmp_path: Path) -> None:
    fuzzer = fuzz.Fuzzer(tmp_path, limited=False)

    def with_reader(read: Callable[[Path], Any]) -> str:
        fuzzer.readers = {"jsonl": fuzz_reader(read)}
        return fuzzer.outcome("jsonl", "data.jsonl", b"")

    def fuzz_reader(read: Callable[[Path], Any]) -> Any:
        return type(READERS["jsonl"])(lambda folder: None, ("data.jsonl",), read)

    def raises(error: BaseException) -> Callable[[Path], Any]:
        def read(folder: Path) -> None:
            raise error

        return read

    assert with_reader(lambda folder: None) == "read"
    assert with_reader(raises(SourceError("a file that is bad."))) == "refused"
    assert "KeyError" in with_reader(raises(KeyError("x")))
    assert "MemoryError" in with_reader(raises(MemoryError()))
    assert "no sentence" in with_reader(raises(SourceError("")))
    assert "longer than" in with_reader(raises(fuzz.Hang()))
