"""What every reader asks of a file before it believes it: a regular file of a sane size, JSON and YAML without traps,
shard names that stay in their folder. docs/security.md says what follows from it."""

from __future__ import annotations

import codecs
import json
import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

import yaml

from epmq.errors import EpmqError

# The largest published index has some ten MiB, the longest recipe a few KiB.
JSON_BYTES = 64 * 2**20
YAML_BYTES = 256 * 2**10
# Of values inside values; an alias counts as what it stands for.
DEEPEST = 64
YAML_VALUES = 100_000
# Longer than any 64-bit number in any notation.
NUMBER_LENGTH = 80
# What torch can count, and what a setting that counts something can sensibly be.
INT64_MAX = 2**63 - 1
INT32_MAX = 2**31 - 1

_KINDS = (
    (stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a named pipe"), (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"), (stat.S_ISBLK, "a device"),
)  # fmt: skip
# What a constructor of PyYAML raises for a value that its tag does not fit (`!!bool x` is a KeyError).
_CONSTRUCTION = (ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError, RecursionError)


# -- files ------------------------------------------------------------------------------------------------------------


def exists(path: str | Path) -> bool:
    """Whether there is anything of that name; False for what can be no name (too long, a NUL inside)."""
    return _mode(path) is not None


def is_file(path: str | Path) -> bool:
    """Whether there is a regular file of that name, or a link to one, as the hub's cache is made of."""
    mode = _mode(path)
    return mode is not None and stat.S_ISREG(mode)


def require_file(path: str | Path, error: type[EpmqError], noun: str = "the file") -> None:
    """Raise ``error`` unless ``path`` is a regular file or a link to one; a pipe would be waited on forever."""
    try:
        mode = os.stat(path).st_mode
    except OSError as cause:
        raise error(f"{path}: {noun} cannot be read ({cause.strerror}).") from cause
    except ValueError as cause:
        raise error(f"{path}: {noun} cannot be read ({cause}).") from cause
    if not stat.S_ISREG(mode):
        kind = next((name for is_kind, name in _KINDS if is_kind(mode)), "no file")
        raise error(f"{path}: {noun} cannot be read (it is {kind}, not a regular file).")


def open_file(path: str | Path, error: type[EpmqError], noun: str = "the file") -> BinaryIO:
    """A regular file, opened for reading; raises ``error`` for anything else, and never waits."""
    require_file(path, error, noun)
    try:
        # Not blocking, should the file have become a pipe meanwhile.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
        return open(descriptor, "rb")
    except OSError as cause:
        raise error(f"{path}: {noun} cannot be read ({cause.strerror}).") from cause


def shard_in(folder: Path, name: str, where: Path, error: type[EpmqError]) -> Path:
    """The file of a plain name in a folder; raises ``error``, naming ``where`` that name stands, for all others."""
    if Path(name).name != name or "\0" in name:
        raise error(f"{where}: shard name {name!r} leaves the folder; use a plain file name.")
    if not is_file(folder / name):
        raise error(f"{where}: shard {name!r} is missing from the folder.")
    return folder / name


def _mode(path: str | Path) -> int | None:
    try:
        return os.stat(path).st_mode
    except (OSError, ValueError):
        return None


# -- JSON -------------------------------------------------------------------------------------------------------------


def read_json(path: str | Path, error: type[EpmqError], kind: str = "a JSON file") -> Any:
    """What a JSON file of at most JSON_BYTES holds.

    Raises ``error`` for what cannot be read or is not ``kind``: names that are there twice, nesting beyond DEEPEST.
    """
    text = _read(path, error, JSON_BYTES, "the file")
    if text.startswith(codecs.BOM_UTF8):
        raise error(f"{path}: begins with a byte order mark, which JSON has not; save it as UTF-8 without one.")
    try:
        return parse_json(text.decode("utf-8"))
    except (ValueError, RecursionError) as cause:
        raise error(f"{path}: not {kind} ({cause}).") from cause


def parse_json(text: str) -> Any:
    """A JSON text. Raises ValueError or RecursionError, as ``json.loads`` does, and as :func:`read_json` says."""
    content = json.loads(text, object_pairs_hook=_unique)
    layer = [content]
    for _ in range(DEEPEST):
        layer = [inner for outer in layer if isinstance(outer, (dict, list)) for inner in _inside(outer)]
        if not layer:
            return content
    raise ValueError(f"it is nested more than {DEEPEST} deep")


def _inside(outer: dict[str, Any] | list[Any]) -> Iterable[Any]:
    return outer.values() if isinstance(outer, dict) else outer


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError(f"name {_first_repeated(name for name, _ in pairs)!r} is there twice")
    return found


def _first_repeated(names: Iterable[Any]) -> Any:
    seen = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None


# -- YAML -------------------------------------------------------------------------------------------------------------


def read_yaml(path: str | Path, error: type[EpmqError], noun: str = "the file") -> Any:
    """What a YAML file of at most YAML_BYTES holds; of its tags those for plain values are known.

    Raises ``error`` for what cannot be read or is not YAML, keys that are there twice, values that aliases blow up
    beyond YAML_VALUES or that contain themselves, nesting beyond DEEPEST.
    """
    content = _read(path, error, YAML_BYTES, noun)
    try:
        loader = yaml.SafeLoader(content.decode("utf-8"))
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _weigh(node, {}, 0)
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except (yaml.YAMLError, *_CONSTRUCTION) as cause:
        told = " ".join(str(cause).split())
        raise error(f"{path}: not a YAML file ({told or type(cause).__name__}).") from cause


def _weigh(node: Any, known: dict[int, tuple[int, int] | None], depth: int) -> tuple[int, int]:
    """How many values a node stands for with its aliases written out, and how deep they go; ValueError for a trap."""
    if isinstance(node, yaml.ScalarNode):
        if node.tag == "tag:yaml.org,2002:int" and len(node.value) > NUMBER_LENGTH:
            raise ValueError(f"line {node.start_mark.line + 1}: a number of {len(node.value)} digits")
        if any("\ud800" <= sign <= "\udfff" for sign in node.value):
            raise ValueError(f"line {node.start_mark.line + 1}: half a surrogate pair")
        return 1, 0
    line = node.start_mark.line + 1
    if id(node) in known:
        weight = known[id(node)]
        if weight is None:
            raise ValueError(f"line {line}: a value that contains itself")
        return weight
    if depth == DEEPEST:
        raise ValueError(f"line {line}: it is nested more than {DEEPEST} deep")
    known[id(node)] = None
    inside = list(node.value)
    if isinstance(node, yaml.MappingNode):
        names = [(key.tag, key.value) for key, _ in inside if isinstance(key, yaml.ScalarNode)]
        if (twice := _first_repeated(names)) is not None:
            raise ValueError(f"line {line}: key {twice[1]!r} is there twice")
        inside = [one for pair in inside for one in pair]
    weights = [_weigh(one, known, depth + 1) for one in inside]
    count = 1 + sum(weight for weight, _ in weights)
    height = 1 + max((height for _, height in weights), default=0)
    if count > YAML_VALUES or depth + height > DEEPEST:
        what = "stands for too many values" if count > YAML_VALUES else f"is nested more than {DEEPEST} deep"
        raise ValueError(f"line {line}: it {what}")
    known[id(node)] = count, height
    return count, height


def _read(path: str | Path, error: type[EpmqError], limit: int, noun: str) -> bytes:
    with open_file(path, error, noun) as handle:
        try:
            content = handle.read(limit + 1)
        except OSError as cause:
            raise error(f"{path}: {noun} cannot be read ({cause.strerror}).") from cause
    if len(content) > limit:
        raise error(f"{path}: {noun} cannot be read (it has more than {limit / 2**20:g} MiB).")
    return content


# -- numbers ----------------------------------------------------------------------------------------------------------


def is_whole(value: Any, least: int, most: int = INT32_MAX) -> bool:
    """Whether a value from JSON is a whole number in that range; True and 4.0 are none."""
    return type(value) is int and least <= value <= most
