"""What experts of a mixture read is seen in one run of a block for many: the same result, in little memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from epmq.ahead import InputsAhead, side_by_side
from epmq.config import QuantConfig
from epmq.experts import SeparateExperts, separate
from epmq.inputs import InputGroup, observe
from epmq.names import NamedForModel
from epmq.pipeline import ModuleSink, run
from epmq.skeleton import meta_copy
from epmq.sources import DictSource
from epmq.surroundings import Surroundings

transformers = pytest.importorskip("transformers")
if transformers.__version__.startswith("4."):
    pytest.skip("transformers 4 keeps experts apart itself", allow_module_level=True)

from test_experts import TASKS, make, varied  # noqa: E402

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
def test_the_codes_do_not_depend_on_the_room(settings: dict[str, Any]) -> None:
    wanted = quantized(0, **settings)
    assert sum(".experts." in name for name in wanted) == 2 * 4 * 3
    # For two experts of the four in each batch, for all of the first batches, for all.
    for rows in (2 * 4 * 64, 2 * 256, 2**20):
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


@pytest.mark.parametrize(("limit", "together"), [(0, 1), (2 * 3 * 4 * ROW, 3), (2**20, 4)])
def test_no_more_is_kept_than_there_is_room_for(limit: int, together: int) -> None:
    """Four experts, each with four of a batch's sixteen rows, two batches."""
    block = nn.ModuleDict({"experts": SeparateExperts(qwen(4).model.layers[0].mlp.experts).to_empty(device="cpu")})
    experts: Any = block["experts"]
    experts.keeps_rows = True
    x = torch.randn(2, 16, WIDTH)
    names = [f"experts.{number}.gate_proj" for number in range(4)]
    ahead = InputsAhead(block, [InputGroup((name,)) for name in names], limit, batches=2)
    runs = 0
    for name in names:
        for number in range(2):
            if not ahead.has(("a", number), name):
                seen: dict[str, Tensor] = {}
                with observe(block, ahead.companions(name), seen.__setitem__):
                    experts(x[number], torch.arange(16).remainder(4)[:, None], torch.ones(16, 1))
                ahead.keep(("a", number), name, seen)
                runs += 1
            kept = {tensor.untyped_storage() for tensor, _ in ahead._kept.values() if tensor is not None}
            assert sum(storage.nbytes() for storage in kept) <= max(limit, 4 * ROW)
            experts.rows = None
            found = ahead.take(("a", number), name)
            assert found is not None and torch.equal(found, x[number, names.index(name) :: 4])
            assert experts.rows[0] == 16 and len(experts.rows[1]) == 4
    assert runs == 2 * -(-4 // together)
    assert not ahead._kept
