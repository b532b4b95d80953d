"""Spoilt files for every reader: each is read, or refused by an EpmqError of one line; all else is a finding.

    python tests/fuzz.py --inputs 100000            tells the counts; findings are kept in tests/corpus
    python tests/fuzz.py --only journal --only gptq of these readers only
    python tests/fuzz.py tests/corpus/FILE          reads one of them again, with the whole traceback

Inputs are numbered: the same seed and number make the same file. Workers read them in their own processes with a limit
of processor time for each and of address space beyond what the libraries take; one that dies is a finding, and another
goes on behind it.
"""

from __future__ import annotations

import argparse
import faulthandler
import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from random import Random
from types import FrameType
from typing import Any

CORPUS = Path(__file__).with_name("corpus")
SECONDS = 10.0  # of processor time for one input
WALL_SECONDS = 120  # in which nothing may wait, however busy the machine is
ROOM = 512 * 2**20  # of address space: seeds have a few KiB
LONGEST = 4_100
BATCH = 20_000  # inputs that one worker reads
KINDS = ("read", "refused")
CURRENT = "current.bin"


class Hang(BaseException):
    """Raised by the clock; no reader may catch it as one of its own failures."""


class Fuzzer:
    """Good folders of all readers, and what they make of spoilt files."""

    def __init__(self, folder: Path, limited: bool = True, only: Sequence[str] = ()):
        from readers import READERS

        self.readers = {name: READERS[name] for name in only or READERS}
        self.folder = folder
        self.turns = [name for name, reader in self.readers.items() for _ in range(reader.share)]
        Random(0).shuffle(self.turns)
        self.good: dict[tuple[str, str], bytes] = {}
        for name, reader in self.readers.items():
            (folder / name).mkdir()
            reader.write(folder / name)
            reader.read(folder / name)  # what is good is read, and everything is imported
            self.good.update({(name, file): (folder / name / file).read_bytes() for file in reader.spoilt})
        signal.signal(signal.SIGPROF, _stop)
        if limited:
            size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + ROOM
            resource.setrlimit(resource.RLIMIT_AS, (size, resource.getrlimit(resource.RLIMIT_AS)[1]))

    def input(self, seed: int, number: int) -> tuple[str, str, bytes]:
        """Reader, file and its content."""
        from mutations import mutate

        random = Random(f"{seed}/{number}")
        name = self.turns[number % len(self.turns)]
        file = random.choice(self.readers[name].spoilt)
        return name, file, mutate(self.good[name, file], file, random)

    def outcome(self, name: str, file: str, content: bytes) -> str:
        """``read``, ``refused``, or what is wrong."""
        path = self.folder / name / file
        path.write_bytes(content)
        if file in self.readers[name].mend:
            self.readers[name].mend[file](self.folder / name)
        faulthandler.dump_traceback_later(WALL_SECONDS, exit=True)
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        try:
            return _attempt(self.readers[name].read, self.folder / name)
        except Hang:
            return f"it takes longer than {SECONDS:g} s of processor time"
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            faulthandler.cancel_dump_traceback_later()
            for spoilt in self.readers[name].spoilt:
                (self.folder / name / spoilt).write_bytes(self.good[name, spoilt])


def _attempt(read: Any, folder: Path) -> str:
    from epmq.errors import EpmqError

    try:
        read(folder)
    except EpmqError as error:
        told = str(error)
        whole = told.endswith((".", "?")) and told.isprintable() and 10 < len(told) < LONGEST
        return "refused" if whole else f"its refusal is no sentence: {told!r}"
    except Hang:
        raise
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        return "".join(traceback.format_exception(error)[-6:])
    return "read"


def _stop(signal: int, frame: FrameType | None) -> None:
    raise Hang


# -- processes --------------------------------------------------------------------------------------------------------


def work(seed: int, first: int, count: int, scratch: Path, only: Sequence[str]) -> None:
    """In a worker: tells each input's number before it is read and its outcome behind it, a JSON line each."""
    channel = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what a library prints is no outcome
    warnings.simplefilter("ignore")
    import logging

    logging.disable(logging.CRITICAL)
    fuzzer = Fuzzer(scratch, only=only)
    for number in range(first, first + count):
        name, file, content = fuzzer.input(seed, number)
        (scratch / CURRENT).write_bytes(content)
        print(json.dumps([number, name, file]), file=channel, flush=True)
        told = fuzzer.outcome(name, file, content)
        content = b"" if told in KINDS else content
        print(json.dumps({"told": told, "content": content.hex()}), file=channel, flush=True)


def run(inputs: int, seed: int, corpus: Path, only: Sequence[str] = ()) -> tuple[Counter[tuple[str, str]], list[Path]]:
    """Counts by (reader, ``read`` or ``refused`` or ``wrong``), and the files of what is wrong."""
    counts: Counter[tuple[str, str]] = Counter()
    findings: list[Path] = []
    first = 0
    while first < inputs:
        current: list[Any] = []
        with tempfile.TemporaryDirectory() as scratch:
            command = [
                sys.executable,
                __file__,
                "--work",
                str(seed),
                str(first),
                str(min(BATCH, inputs - first)),
                scratch,
                *(part for name in only for part in ("--only", name)),
            ]
            with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=_environment()) as worker:
                assert worker.stdout is not None
                for line in worker.stdout:
                    found = json.loads(line)
                    if isinstance(found, list):
                        current = found
                        continue
                    first = current[0] + 1
                    counts[current[1], found["told"] if found["told"] in KINDS else "wrong"] += 1
                    if found["told"] not in KINDS:
                        findings.append(_keep(corpus, seed, current, bytes.fromhex(found["content"]), found["told"]))
                    current = []
            if worker.returncode != 0:
                if not current:
                    raise SystemExit(f"a worker ended with status {worker.returncode} before it had read anything")
                first = current[0] + 1
                counts[current[1], "wrong"] += 1
                content, told = (Path(scratch) / CURRENT).read_bytes(), f"the process ended: {worker.returncode}"
                findings.append(_keep(corpus, seed, current, content, told))
    return counts, findings


def _keep(corpus: Path, seed: int, current: list[Any], content: bytes, told: str) -> Path:
    number, name, file = current
    path = corpus / f"{name}--{hashlib.sha256(content).hexdigest()[:8]}--{file}"
    print(f"{path.name} (seed {seed}, number {number}): {told}", file=sys.stderr, flush=True)
    corpus.mkdir(exist_ok=True)
    path.write_bytes(content)
    return path


def _environment() -> dict[str, str]:
    path = os.pathsep.join([str(Path(__file__).resolve().parent.parent), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONHASHSEED": "0"}


def main() -> None:
    parser = argparse.ArgumentParser(description="Spoilt files for every reader.")
    parser.add_argument("file", nargs="?", type=Path)
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", action="append", default=[], metavar="READER")
    parser.add_argument("--work", nargs=4, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.work:
        seed, first, count = map(int, given.work[:3])
        work(seed, first, count, Path(given.work[3]), given.only)
        return
    if given.file:
        name, _, file = given.file.name.split("--", 2)
        with tempfile.TemporaryDirectory() as scratch:
            print(Fuzzer(Path(scratch), limited=False).outcome(name, file, given.file.read_bytes()))
        return
    counts, findings = run(given.inputs, given.seed, CORPUS, given.only)
    for name in sorted({name for name, _ in counts}):
        told = ", ".join(f"{counts[name, kind]} {kind}" for kind in ("read", "refused", "wrong"))
        print(f"{name}: {told}")
    print(f"{sum(counts.values())} inputs, {len(findings)} findings")
    sys.exit(1 if findings else 0)


if __name__ == "__main__":
    main()
