"""Changes to files that somebody hostile could make: to bytes, to words, and to the structure of each kind of file."""

from __future__ import annotations

import copy
import json
import struct
from random import Random
from typing import Any

import yaml

WORDS = [
    b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b"\r", b"\x85", b"\xe2\x80\xa8", b"\x1b[31m", b'"\\ud800"', b"NaN",
    b"-Infinity",
    b"1e999", b"9" * 25, b"9" * 5000, b"0x" + b"f" * 200, b"-1", b"[" * 200, b"{" * 200, b'{"a":' * 200, b'"', b"\\",
    b"null",
    b"&a ", b"*a", b"&a [*a]", b"<<: *a", b"<<: [{a: 1}]", b"!!python/name:os.system ", b"!!bool x", b"!!int x",
    b"!!float x",
    b"!!timestamp x", b"!!binary x", b"!!set {a, b}", b"!!omap [a]", b"2001-99-99", b"1:1" + b":1" * 60,
    b"? [a]\n: b\n",
    b"--- ", b"%YAML 9.9\n", b"\t", b"|\n", b"../", b"/dev/zero", b"F8_E4M3", b"BF16",
]  # fmt: skip
VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 3, 4.0, 0.5, 2**31, 2**32, 2**60, 2**63 - 1, 2**63, 2**64, -(2**63), 10**30,
    10**400, 1e308,
    float("nan"), float("inf"), "", " ", "\0", "\n", "\x1b[31m", "\ud800", "a" * 5000, "..", "../x", "/dev/zero",
    "/etc/passwd",
    "sub/x", "model.safetensors", ".", "re:(a|aa)+$", "re:(", "(a|aa)+$", "(?R)", "a{99999999999}", "(" * 300,
    "org/name",
    "org/name@../../x", [], {}, [[]], [None], {"": None}, {"a": {"a": {}}}, [1, "a"], [2**62, 2**62], [2**32, 2**32,
    0], [0],
    "F32", "I64", "F8_E4M3", "pipeline", "Trainer", "__doc__", "LORA", "eager", "kernels-community/attention",
]  # fmt: skip


def mutate(content: bytes, name: str, random: Random) -> bytes:
    """One to three changes; half of them keep the file's structure."""
    for _ in range(random.choice((1, 1, 2, 3))):
        try:
            content = (_structure if random.random() < 0.6 else _bytes)(content, name, random)
        except (
            ValueError,
            KeyError,
            TypeError,
            AttributeError,
            IndexError,
            struct.error,
            yaml.YAMLError,
            RecursionError,
        ):
            content = _bytes(content, name, random)  # what was changed before has no structure any more
    return content


def _structure(content: bytes, name: str, random: Random) -> bytes:
    if name.endswith(".safetensors"):
        return _safetensors(content, random)
    if name.endswith((".yaml", ".yml")):
        return yaml.safe_dump(_value(yaml.safe_load(content), random)).encode("utf-8", "surrogatepass")
    if name.endswith(".jsonl"):
        lines = content.splitlines()
        place = random.randrange(len(lines))
        lines[place] = json.dumps(_value(json.loads(lines[place]), random)).encode()
        return b"\n".join(lines)
    return json.dumps(_value(json.loads(content), random)).encode()


def _safetensors(content: bytes, random: Random) -> bytes:
    """Another header over the same data, or a header of another length."""
    (length,) = struct.unpack("<Q", content[:8])
    header, data = content[8 : 8 + length], content[8 + length :]
    if random.random() < 0.1:
        return struct.pack("<Q", random.choice((0, 1, length - 1, length + 1, 2**31, 2**60, 2**64 - 1))) + content[8:]
    entries = json.loads(header)
    inner = entries.get("__metadata__", {}).get("structure")
    if inner is not None and random.random() < 0.5:
        entries["__metadata__"]["structure"] = json.dumps(_value(json.loads(inner), random))
    else:
        entries = _value(entries, random)
    text = json.dumps(entries).encode()
    if random.random() < 0.5:
        text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data


def _value(content: Any, random: Random) -> Any:
    """The same value with one place in it changed."""
    content = copy.deepcopy(content)
    holder: dict[int, Any] = {0: content}
    place: Any = 0
    box: Any = holder
    while isinstance(box[place], (dict, list)) and box[place] and (box is holder or random.random() < 0.8):
        box = box[place]
        place = random.choice(list(box)) if isinstance(box, dict) else random.randrange(len(box))
    kind = random.randrange(8)
    if kind == 0 and box is not holder:
        del box[place]
    elif kind == 1 and isinstance(box, dict) and box is not holder:
        box[str(random.choice(VALUES))] = box.pop(place)
    elif kind == 2 and isinstance(box[place], dict):
        box[place][str(random.choice(VALUES))] = random.choice(VALUES)
    elif kind == 3 and isinstance(box[place], (int, float)):
        box[place] = random.choice((box[place] + 1, box[place] - 1, -box[place], box[place] * 2, str(box[place])))
    elif kind == 4 and isinstance(box[place], str):
        box[place] = random.choice((box[place] * 2, box[place][1:], box[place] + "/x", [box[place]], box[place] + "\n"))
    elif kind == 5:
        box[place] = random.choice(([box[place]] * 3, {"a": box[place]}))
    else:
        box[place] = copy.deepcopy(random.choice(VALUES))
    return holder[0]


def _bytes(content: bytes, name: str, random: Random) -> bytes:
    start = random.randrange(len(content) + 1)
    end = min(len(content), start + random.choice((1, 2, 8, 64)))
    kind = random.randrange(7)
    if kind == 0 and start < len(content):
        return content[:start] + bytes([content[start] ^ 1 << random.randrange(8)]) + content[start + 1 :]
    if kind == 1:
        return content[:start]
    if kind == 2:
        return content[:start] + content[end:]
    if kind == 3:
        return content[:start] + random.randbytes(end - start) + content[end:]
    if kind == 4:
        return content[:end] + content[start:end] * random.choice((1, 2, 20)) + content[end:]
    word = random.choice(WORDS)
    return content[:start] + word + content[start if kind == 5 else min(len(content), start + len(word)) :]
