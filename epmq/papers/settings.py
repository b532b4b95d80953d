"""A paper's benchmark as settings: models, data, merge, the rows to make, and what is published.

The files are in recipes/, what they mean in docs/families.md.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from epmq import trust
from epmq.compare import CLOSED, METHODS
from epmq.config import QuantConfig
from epmq.errors import ConfigError
from epmq.merge_config import MergeConfig
from epmq.settings import Settings, nearest
from epmq.trust import INT32_MAX

# Rows that quantize nothing: the base as it is, each task's own expert, the merge.
UNQUANTIZED = ("pretrained", "expert", "merged")


class DataSet(Settings):
    """A data set by hub id or local path: its subset and splits, and the columns that are read.

    template: for causal models, a text with {column} for each column it is made of.
    """

    path: str
    subset: str | None = None
    train: str = "train"
    test: str = "test"
    image: str = "image"
    label: str = "label"
    template: str | None = None


class Row(Settings):
    """A row to measure: a method of :class:`epmq.compare.Comparison`, or pretrained, expert, merged; bits, or null."""

    method: Literal[(*UNQUANTIZED, *METHODS, CLOSED)]  # type: ignore[valid-type]
    bits: int | None = None


class Published(Settings):
    """A published row: accuracies in percent and where they stand. method is one of ours, or any other name."""

    method: str
    bits: int | None = None
    average: float
    tasks: dict[str, float] = Field(default_factory=dict)
    source: str


class Paper(Settings):
    """kind: ``clip`` (image towers, zero-shot heads of the base's text tower), ``glue`` (text to text, exact match) or
    ``causal`` (language models, saved for scoring elsewhere). base, experts: hub ids or folders. examples: calibration
    inputs per task, drawn from the training split with ``seed``. generated: most tokens of an answer. test_examples: of
    each test split; null is all. quantization: :class:`epmq.QuantConfig` settings of all quantized rows.
    """

    title: str
    kind: Literal["clip", "glue", "causal"]
    base: str
    experts: dict[str, str]
    data: dict[str, DataSet]
    merge: MergeConfig
    examples: int = Field(default=256, ge=1, le=INT32_MAX)
    seed: int = Field(default=42, ge=0, le=INT32_MAX)
    batch_size: int = Field(default=32, ge=1, le=INT32_MAX)
    max_length: int = Field(default=512, ge=1, le=INT32_MAX)
    generated: int = Field(default=10, ge=1, le=INT32_MAX)
    test_examples: int | None = Field(default=None, ge=1, le=INT32_MAX)
    group_size: int = 128
    quantization: dict[str, Any] = Field(default_factory=dict)
    rows: tuple[Row, ...]
    published: tuple[Published, ...] = ()


def read_paper(path: str | Path) -> Paper:
    """Read and check a paper's file. Raises ConfigError with one sentence that names the file and the key at fault."""
    path = Path(path)
    content = trust.read_yaml(path, ConfigError)
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected keys and values, such as title: and kind:.")
    if not {"kind", "rows", "published"} & content.keys():
        raise ConfigError(f"{path}: a recipe for epmq quantize, no paper's benchmark.")
    paper = Paper.parse(content, str(path))
    for task in paper.experts:
        if task not in paper.data:
            raise ConfigError(f"{path}: expert {task!r} has no data; {nearest(task, list(paper.data) or ['none'])}")
    for task in paper.data:
        if task not in paper.experts:
            raise ConfigError(f"{path}: data.{task} has no expert of that name; add one or take it out.")
    for row in paper.rows:
        if row.bits is None and row.method not in (*UNQUANTIZED, "fp", "epmq"):
            raise ConfigError(f"{path}: rows: method {row.method!r} needs bits.")
    QuantConfig.parse(paper.quantization, f"{path}: quantization")
    return paper
