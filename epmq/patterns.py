"""Regular expressions from settings and checkpoints: Python's own syntax, matched in bounded time."""

from __future__ import annotations

import re
from typing import Any

import regex

from epmq.errors import ConfigError

LONGEST = 2_000
# Of processor time for one name; a sane expression takes microseconds, a hostile one centuries.
SECONDS = 0.25


def check(pattern: str) -> None:
    """Raise ValueError unless ``pattern`` is a regular expression of at most LONGEST signs."""
    if len(pattern) > LONGEST:
        raise ValueError(f"a regular expression of {len(pattern)} signs is too long, at most {LONGEST} are read")
    try:
        re.compile(pattern)
        regex.compile(pattern)
    except (re.error, regex.error, OverflowError, RecursionError) as error:
        raise ValueError(f"{pattern!r} is not a regular expression ({error})") from None


def search(pattern: str, name: str) -> bool:
    """Whether ``pattern`` is found in ``name``. Raises ConfigError when that takes longer than SECONDS."""
    return _found(regex.search, pattern, name)


def match(pattern: str, name: str) -> bool:
    """Whether ``name`` begins with ``pattern``. Raises ConfigError when that takes longer than SECONDS."""
    return _found(regex.match, pattern, name)


def _found(how: Any, pattern: str, name: str) -> bool:
    try:
        return how(pattern, name, timeout=SECONDS) is not None
    except TimeoutError:
        raise ConfigError(
            f"the regular expression {pattern!r} takes longer than {SECONDS:g} s on {name!r}; use a simpler one."
        ) from None
