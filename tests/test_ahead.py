"""What experts of a mixture read is seen in one run of a block for many: the same result, in little memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from epmq import visit
from epmq.ahead import InputsAhead, side_by_side
from epmq.calls import BlockCall
from epmq.config import QuantConfig
from epmq.experts import SeparateExperts, separate
from epmq.inputs import InputGroup, inputs_of
from epmq.names import NamedForModel
from epmq.pipeline import ModuleSink, run
from epmq.skeleton import meta_copy
from epmq.sources import DictSource
from epmq.surroundings import Surroundings

transformers = pytest.importorskip("transformers")
if transformers.__version__.startswith("4."):
    pytest.skip("transformers 4 keeps experts apart itself", allow_module_level=True)

from mixtures import make, varied  # noqa: E402

TASKS = ("a", "b")
WIDTH = 32
ROW = 4 * WIDTH  # bytes


def qwen(experts: int) -> Any:
    return make("Qwen3Moe", num_experts=experts)


# -- order -----------------------------------------------------------------------------------------------------------


def test_experts_come_side_by_side_and_all_else_where_it_was() -> None:
    block = separate(meta_copy(qwen(4))).get_submodule("model.layers.0")
    groups = [
        ("self_attn.q_proj", "self_attn.k_proj"),
        ("mlp.experts.0.gate_proj", "mlp.experts.0.up_proj"),
        ("mlp.experts.0.down_proj",),
        ("mlp.experts.2.gate_proj", "mlp.experts.2.up_proj"),
        ("mlp.experts.2.down_proj",),
        ("mlp.experts.3.down_proj",),  # whose others are excluded
        ("mlp.shared.up_proj",),
    ]
    steps: list[InputGroup | str] = ["input_layernorm", *map(InputGroup, groups)]
    found = [step if isinstance(step, str) else step.first for step in side_by_side(block, steps)]
    experts = [f"mlp.experts.{name}" for name in ("0.gate_proj", "2.gate_proj", "3.down_proj")]
    experts += [f"mlp.experts.{name}" for name in ("0.down_proj", "2.down_proj")]
    assert found == ["input_layernorm", "self_attn.q_proj", *experts, "mlp.shared.up_proj"]


# -- whole quantizations ---------------------------------------------------------------------------------------------


def quantized(room: int, experts: int = 4, **settings: Any) -> dict[str, Tensor]:
    """All codes; two batches a task, the second of few positions, which do not reach all experts."""
    model = qwen(experts)
    skeleton = separate(meta_copy(model))
    deployed, *others = (
        NamedForModel(DictSource(one.state_dict()), skeleton, aliases=True)
        for one in (model, *(varied(model) for _ in TASKS))
    )
    ids = torch.arange(3, 3 + 8 * 16).remainder(50).add(3).view(8, 16)
    mask = torch.ones_like(ids)
    mask[2, 9:] = 0
    few = torch.tensor([[7, 8]])
    batches = [{"input_ids": ids, "attention_mask": mask}, {"input_ids": few, "attention_mask": few > 0}]
    sink = ModuleSink()
    run(
        skeleton, deployed, None, dict(zip(TASKS, others, strict=True)), dict.fromkeys(TASKS, batches),
        QuantConfig(**{"group_size": 16, "sym": True, **settings}), sink, lambda *_: None, None,
        Surroundings(reuse_bytes=room, takes_spare=False),
    )  # fmt: skip
    return {name: layer.quantized().codes for name, layer in sink.linears.items()}


@pytest.mark.parametrize("settings", [{}, {"anchor": "auto"}, {"norm_refit": True, "gamma": 0.7}], ids=str)
def test_the_codes_are_those_of_one_expert_after_the_other(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as alone:
        alone.setattr(visit, "side_by_side", lambda block, steps: steps)
        alone.setattr(InputsAhead, "companions", lambda self, name: [])
        wanted = quantized(2**30, **settings)
    assert sum(".experts." in name for name in wanted) == 2 * 4 * 3
    # None, for two experts of the four in each batch, for all of the first batches, for all.
    for rows in (0, 2 * 4 * 64, 2 * 256, 2**20):
        ours = quantized(2 * rows * ROW, **settings)
        assert wanted.keys() == ours.keys()
        assert all(torch.equal(ours[name], codes) for name, codes in wanted.items())


def test_a_block_runs_hardly_more_often_for_more_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[int] = []
    forward = SeparateExperts.forward

    def counted(self: SeparateExperts, *arguments: Any) -> Tensor:
        runs.append(self.count)
        return forward(self, *arguments)

    monkeypatch.setattr(SeparateExperts, "forward", counted)
    for experts in (4, 16):
        quantized(2**30, experts)
    # It may take another batch to find all of them.
    assert runs.count(16) <= 1.2 * runs.count(4)
    quantized(0, 16)
    assert runs.count(16) > 3 * runs.count(4)


# -- what is kept ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("limit", "runs"), [(0, 6 * 4), (6 * 8, 12), (6 * 12, 6), (2**20, 6)])
def test_equal_batches_are_seen_as_often_as_there_is_room(limit: int, runs: int) -> None:
    """Six batches of four rows for each of four experts: one ahead of the other three, two, all."""
    assert seen_in_runs(limit * ROW, [[4, 4, 4, 4]] * 6) == runs


@pytest.mark.parametrize("limit", [0, 1, 32, 256, 2**20])
@pytest.mark.parametrize("counts", [
    [[1, 1]] + 15 * [[15, 1]],
    [[8, 0, 0, 0, 0, 0, 0, 0]] + 15 * [[64, 8, 8, 8, 8, 8, 8, 16]],
    [[0, 3, 0, 2]] * 3 + [[5, 0, 7, 0]] * 3,
    [[0, 0, 1], [0, 1, 0], [9, 9, 9]],
], ids=["small first", "one expert first", "now these now those", "few"])  # fmt: skip
def test_no_more_is_kept_than_there_is_room_for(counts: list[list[int]], limit: int) -> None:
    runs = seen_in_runs(limit * ROW, counts)
    assert len(counts) <= runs <= len(counts) * len(counts[0])


def seen_in_runs(limit: int, counts: list[list[int]]) -> int:
    """How often a mixture runs until all experts have been given their inputs of all batches, which are ``counts`` rows
    each; holds what they are given, and what is kept, against the truth."""
    size = len(counts[0])
    block = Alone(SeparateExperts(qwen(size).model.layers[0].mlp.experts).to_empty(device="cpu"))
    experts: Any = block.experts
    experts.keeps_rows = True
    chosen = [torch.arange(size).repeat_interleave(torch.tensor(rows)) for rows in counts]
    x = [torch.randn(len(numbers), WIDTH) for numbers in chosen]
    names = [f"experts.{number}.gate_proj" for number in range(size)]
    ahead = InputsAhead(block, [InputGroup((name,)) for name in names], limit, len(counts))
    runs = 0
    for expert, name in enumerate(names):
        for batch, (numbers, rows) in enumerate(zip(chosen, x, strict=True)):
            experts.rows = None
            if ahead.has(("a", batch), name):
                found = ahead.take(("a", batch), name)
            else:
                call = BlockCall((rows, numbers[:, None], torch.ones(len(rows), 1)), {})
                seen = inputs_of(block, call, name, ahead.companions(name), ahead.room(name))
                ahead.keep(("a", batch), name, seen)
                found = seen.get(name)
                runs += 1
            kept = {tensor.untyped_storage() for tensor, _ in ahead._kept.values() if tensor is not None}
            assert sum(storage.nbytes() for storage in kept) <= limit
            wanted = rows[numbers == expert]
            assert torch.equal(wanted, torch.zeros(0, WIDTH) if found is None else found)
            if len(wanted):
                assert experts.rows[0] == len(rows)
                assert [len(part) for part in experts.rows[1]] == counts[batch]
    assert not ahead._kept and not ahead._bytes
    return runs


class Alone(nn.Module):
    """A block that is nothing but a mixture."""

    def __init__(self, experts: nn.Module):
        super().__init__()
        self.experts = experts

    def forward(self, *arguments: Any) -> Any:
        return self.experts(*arguments)
