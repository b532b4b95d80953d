"""Blocks whose linears do not see every position: mixtures of experts, tables of positions, weights in no linear."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from epmq import QuantConfig, QuantLinear, QuantResult, quantize
from epmq.inputs import InputGroup, with_new

WIDTH = 16


class Mixture(nn.Module):
    """Each position goes to one of ``count`` linears, behind a norm of its own."""

    def __init__(self, count: int):
        super().__init__()
        self.router = nn.Linear(WIDTH, count, bias=False)
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(count))
        self.linears = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(count))

    def forward(self, hidden: Tensor) -> Tensor:
        x = hidden.reshape(-1, WIDTH)
        chosen = self.router(x).argmax(-1)
        out = torch.zeros_like(x)
        for number, (norm, linear) in enumerate(zip(self.norms, self.linears, strict=True)):
            rows = (chosen == number).nonzero().flatten()
            if len(rows):
                out[rows] = linear(norm(x[rows]))
        return hidden + out.view(hidden.shape)


class Model(nn.Module):
    def __init__(self, *blocks: nn.Module, vocabulary: int = 40):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, WIDTH)
        self.blocks = nn.ModuleList(blocks)

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden: Tensor = self.embedding(input_ids)
        for block in self.blocks:
            hidden = block(hidden)
        return hidden


def varied(model: nn.Module, spread: float = 0.2) -> nn.Module:
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(spread * torch.randn(parameter.shape))
    return twin


def run(model: nn.Module, count: int, size: tuple[int, int], **settings: Any) -> QuantResult:
    """Two tasks of ``count`` batches."""
    experts = {task: varied(model) for task in ("a", "b")}
    calibration = {task: [{"input_ids": torch.randint(0, 40, size)} for _ in range(count)] for task in experts}
    return quantize(model, experts, calibration, QuantConfig(**{"group_size": 16, **settings}))


def rounded(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, QuantLinear)}


@pytest.mark.parametrize(
    "settings", [{}, {"alpha": 0.0}, {"method": "gptq"}, {"norm_refit": True}, {"anchor": "auto"}], ids=str
)
def test_a_mixture_is_calibrated_on_whatever_reaches_its_experts(settings: dict[str, Any]) -> None:
    # Eight experts and five positions a batch: no batch reaches all of them.
    result = run(Model(Mixture(8), Mixture(8)), 12, (1, 5), **settings)
    left = {note.split(":")[0] for note in result.report["notes"] if "not reached" in note}
    names = {f"blocks.{b}.{part}" for b in (0, 1) for part in ["router", *(f"linears.{n}" for n in range(8))]}
    assert rounded(result.model) == names - left
    assert len(left) < 4
    shown = {row["linear"]: set(row["tasks"]) for row in result.report["layers"]}
    for note in result.report["notes"]:
        where, _, told = note.partition(": reached by no calibration input of ")
        if told and where in shown:
            assert shown[where] == {"a", "b"} - {told.rstrip(".")}
    routed = [note for note in result.report["notes"] if "(alpha 0)" in note]
    assert bool(routed) == ("alpha" not in settings and "method" not in settings)


def test_towards_itself_a_mixture_stays_what_it_was() -> None:
    model = Model(Mixture(4))
    calibration = {"a": [{"input_ids": torch.randint(0, 40, (2, 6))} for _ in range(6)]}
    config = QuantConfig(bits=None, bias_refit=False)
    result = quantize(model, {"a": model}, calibration, config)
    for name, tensor in model.state_dict().items():
        assert torch.allclose(result.model.state_dict()[name], tensor, atol=1e-5), name  # fp32 solves


def test_equally_many_rows_of_other_positions_are_not_paired() -> None:
    """One expert of the mixture reads two rows as deployed and two others inside the fine-tuned model."""
    model = Model(Mixture(3), vocabulary=5)
    with torch.no_grad():
        model.embedding.weight.copy_(torch.eye(5, WIDTH))
    tuned = varied(model)
    for module, chosen in ((model, [0, 0, 1, 2, 2]), (tuned, [1, 0, 0, 1, 2])):
        with torch.no_grad():
            module.get_parameter("embedding.weight").copy_(model.embedding.weight)
            router = module.get_parameter("blocks.0.router.weight")
            router.zero_()[:, :5] = torch.nn.functional.one_hot(torch.tensor(chosen)).T.float()
    calibration = {"a": [{"input_ids": torch.arange(5).view(1, 5)}]}
    with_inside, without = (
        quantize(model, {"a": tuned}, calibration, QuantConfig(bits=None, alpha=alpha, exclude=["router"]))
        for alpha in (1.0, 0.0)
    )
    for name, tensor in without.model.state_dict().items():
        assert torch.equal(with_inside.model.state_dict()[name], tensor), name
    assert [note.split(":")[0] for note in with_inside.report["notes"]] == ["blocks.0"]


def test_a_linear_that_reads_a_table_is_no_mixture() -> None:
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(3, WIDTH))
            self.linear, self.positions = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

        def forward(self, hidden: Tensor) -> Tensor:
            out: Tensor = self.linear(hidden) + self.positions(self.table).mean(0)
            return out

    result = run(Model(Table(), Table()), 2, (4, 6))
    assert len(rounded(result.model)) == 4
    assert result.report["notes"] == []


def test_steps_of_another_batch_come_where_it_has_them() -> None:
    one, two, three, four = (InputGroup((name,)) for name in "abcd")
    known: list[InputGroup | str] = [one, four]
    found: list[InputGroup | str] = [one, two, "n", four]
    assert with_new(known, found) == found
    assert with_new([one, three], [two, three, four]) == [two, one, three, four]
    assert with_new([InputGroup(("a", "b"))], [one, two, three]) == [three, InputGroup(("a", "b"))]


class Fused(nn.Module):
    def __init__(self, count: int):
        super().__init__()
        self.linear, self.experts = nn.Linear(WIDTH, WIDTH), nn.Parameter(torch.randn(count, WIDTH, WIDTH) / 10)

    def forward(self, hidden: Tensor) -> Tensor:
        out: Tensor = self.linear(hidden) + (hidden.unsqueeze(-3) @ self.experts).mean(-3)
        return out


def test_weights_in_no_linear_are_told() -> None:
    (note,) = run(Model(Fused(3), Fused(3)), 1, (4, 6)).report["notes"]
    # 3 of 4 matrices and a bias; the bias belongs to the linear.
    assert note.startswith("74% of the blocks' weights, such as blocks.0.experts, are in no linear layer")


class Grouped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.GroupNorm(4, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden: Tensor) -> Tensor:
        out: Tensor = hidden + self.linear(self.norm(hidden.transpose(1, 2)).transpose(1, 2))
        return out


@pytest.mark.parametrize("length", [6, WIDTH])
def test_a_norm_of_another_dimension_is_left_and_told(length: int) -> None:
    model = Model(Grouped())
    result = run(model, 2, (4, length), norm_refit=True)
    assert torch.equal(result.model.get_parameter("blocks.0.norm.weight"), model.get_parameter("blocks.0.norm.weight"))
    assert result.report["notes"] == ["blocks.0.norm: its channels are not the last dimension; not refitted."]


class GatedNorm(nn.LayerNorm):
    """What it normalises is gated by another tensor."""

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x) * gate.sigmoid()


def test_a_norm_with_a_gate_is_left_and_told() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.linear = GatedNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

        def forward(self, hidden: Tensor) -> Tensor:
            out: Tensor = hidden + self.linear(self.norm(hidden, hidden))
            return out

    result = run(Model(Block(), Block()), 3, (4, 6), norm_refit=True)
    told = [note for note in result.report["notes"] if "such as a gate; not refitted" in note]
    assert [note.split(":")[0] for note in told] == ["blocks.0.norm", "blocks.1.norm"]


def test_too_few_rows_to_hold_some_out_are_told() -> None:
    notes = run(Model(Mixture(8), Mixture(8)), 6, (1, 5), anchor="auto").report["notes"]
    assert any("too few rows of" in note and "anchor is chosen without them" in note for note in notes)
