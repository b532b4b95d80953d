"""What lies in files between blocks is what would have lain in memory: for every family, spilled and taken up again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from epmq.calls import BlockAddress
from epmq.config import QuantConfig
from epmq.engine import Engine
from epmq.pipeline import ModuleSink, run
from epmq.progress import Journal
from epmq.shelf import Shelf
from epmq.skeleton import meta_copy
from epmq.sources import DictSource
from epmq.surroundings import Surroundings
from epmq.world import World

pytest.importorskip("transformers")

from families import KINDS, make_job, tensors_of


class CutOff(Exception):
    """Ends a run after a block."""


@pytest.mark.parametrize("family", ["t5", "gpt2"])
def test_cut_off_anywhere_and_on_disk(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = make_job(KINDS[family])
    experts = {task: DictSource(model.state_dict()) for task, model in job.experts.items()}
    overrides: Any = {r"(wi|c_fc)": {"bits": 3}, "nothing": {"bits": 2}}
    config = QuantConfig(group_size=16, overrides=overrides)

    def once(journal: Journal | None, shelf: Shelf) -> tuple[dict[str, list[Tensor]], dict[str, Any]]:
        sink = ModuleSink()
        found = run(
            meta_copy(job.merged), DictSource(job.merged.state_dict()), None, experts, job.calibration, config, sink,
            lambda *_: None, None, Surroundings(shelf=shelf), journal,
        )  # fmt: skip
        return tensors_of(sink), found

    wanted, told = once(None, Shelf())
    original, finished = Engine._block, 0

    def block(self: Engine, address: BlockAddress) -> None:
        nonlocal finished
        if finished == 1:
            finished = 0
            raise CutOff
        finished += 1
        original(self, address)

    monkeypatch.setattr(Engine, "_block", block)
    journal = Journal(tmp_path / "out", World())
    starts = 0
    while True:
        starts += 1
        try:
            # One block for each start, with no room for any state.
            with journal.kept(dict):
                ours, ours_told = once(journal, Shelf(0, journal.scratch))
            break
        except CutOff:
            journal._lock.close()
    assert starts == len(told["blocks"])
    assert ours.keys() == wanted.keys()
    for name, parts in wanted.items():
        assert all(torch.equal(a, b) for a, b in zip(ours[name], parts, strict=True)), name
    assert ours_told["notes"] == told["notes"]
    assert [row["tasks"] for row in ours_told["layers"]] == [row["tasks"] for row in told["layers"]]
