"""Models whose forward does more between its blocks than hand on hidden states: right, or refused by one sentence."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from epmq import QuantConfig, quantize
from epmq.blocks import find_blocks
from epmq.calls import hidden_of
from epmq.engine import Engine
from epmq.errors import ModelError
from epmq.pipeline import ModuleSink
from epmq.shelf import Shelf
from epmq.skeleton import meta_copy
from epmq.sources import DictSource, open_source
from epmq.surroundings import Surroundings

WIDTH, DEPTH, LENGTH = 16, 3, 6
# fp32 keeps 24 bits; a thousand roundings one way would be left of 1e-4, squared 1e-8.
EXACT = 1e-8


class Block(nn.Module):
    """A residual block of two linears; what else it is given is added to what its first one reads."""

    def __init__(self, width: int = WIDTH):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def inner(self, x: Tensor) -> Tensor:
        found: Tensor = self.down(torch.relu(self.up(self.norm(x))))
        return found

    def forward(self, x: Tensor, more: Tensor | float = 0.0) -> Any:
        return x + self.inner(x + more)


class Model(nn.Module):
    """Token embedding, blocks, head."""

    def __init__(self, make: Callable[[], nn.Module] = Block) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, WIDTH)
        self.layers: Any = nn.ModuleList(make() for _ in range(DEPTH))
        self.head = nn.Linear(WIDTH, 4)

    def between(self, x: Tensor, ids: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x

    def forward(self, input_ids: Tensor) -> Tensor:
        found: Tensor = self.head(self.between(self.embedding(input_ids), input_ids))
        return found


# -- what goes through -----------------------------------------------------------------------------------------------


class InputsPerLayer(Model):
    """Each block reads a slice of its own of a second embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.more = nn.Embedding(20, WIDTH * DEPTH)

    def between(self, x: Tensor, ids: Tensor) -> Tensor:
        more = self.more(ids).view(*ids.shape, DEPTH, WIDTH)
        for number, layer in enumerate(self.layers):
            x = layer(x, more[:, :, number])
        return x


class SomeInputsPerLayer(Model):
    """The first and the last block share one tensor; the one between has its own, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Embedding(20, WIDTH), nn.Embedding(20, WIDTH)

    def between(self, x: Tensor, ids: Tensor) -> Tensor:
        one, other = self.one(ids), self.other(ids)
        x = self.layers[0](x, more=one)
        x = self.layers[1](x, more=other)
        return self.layers[2](x, more=one)  # type: ignore[no-any-return]


class BiasOutside(Model):
    """All blocks are given one table of positions, made outside of them, without a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Embedding(LENGTH, WIDTH)

    def between(self, x: Tensor, ids: Tensor) -> Tensor:
        bias = self.positions(torch.arange(ids.shape[1]))
        for layer in self.layers:
            x = layer(x, bias)
        return x


class Bundled(Block):
    """Is given a tuple."""

    def forward(self, x: Tensor, more: Any = None) -> Any:
        return super().forward(x, more[0] * more[1])


class BundleOutside(BiasOutside):
    """As above, in a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Bundled() for _ in range(DEPTH))

    def between(self, x: Tensor, ids: Tensor) -> Tensor:
        bundle = (self.positions(torch.arange(ids.shape[1])), torch.tensor(0.5))
        for layer in self.layers:
            x = layer(x, bundle)
        return x


class NormsBetween(Model):
    """A norm with weights between any two blocks, and what the model was given is added once more."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(DEPTH))

    def between(self, x: Tensor, ids: Tensor) -> Tensor:
        start = x
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = norm(layer(x)).detach() + start
        return x


class TwoLists(Model):
    """Blocks of two lists take turns, and the last of one reads what came out of the other."""

    def __init__(self) -> None:
        super().__init__()
        self.others = nn.ModuleList(Block() for _ in range(DEPTH))
        self.join = nn.Linear(WIDTH, WIDTH)

    def between(self, x: Tensor, ids: Tensor) -> Tensor:
        y: Tensor = self.join(x)
        for layer, other in zip(self.layers, self.others, strict=True):
            x = layer(x, y)
            y = other(y, self.join(x))
        return y


class Halving(Block):
    """Gives half as many positions of twice the width."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.reduce = nn.Linear(2 * width, 2 * width)

    def forward(self, x: Tensor, more: Tensor | float = 0.0) -> Any:
        found: Tensor = self.reduce(super().forward(x, more).reshape(len(x), -1, 2 * x.shape[-1]))
        return found


class Hierarchy(Model):
    """Every block has a width of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList((Halving(WIDTH), Halving(2 * WIDTH)))
        self.head = nn.Linear(4 * WIDTH, 4)

    def between(self, x: Tensor, ids: Tensor) -> Tensor:
        return super().between(torch.cat([x, x], 1), ids)


class Found(NamedTuple):
    hidden: Tensor
    half: Tensor


class Naming(Block):
    """Gives a named tuple."""

    def forward(self, x: Tensor, more: Tensor | float = 0.0) -> Any:
        found = super().forward(x, more)
        return Found(found, found / 2)


class NamedTuples(Model):
    """Blocks give named tuples, whose second item the next one reads."""

    def __init__(self) -> None:
        super().__init__(Naming)

    def between(self, x: Tensor, ids: Tensor) -> Tensor:
        more: Tensor | float = 0.0
        for layer in self.layers:
            found = layer(x, more)
            x, more = found.hidden, found.half
        return x


class NamedBlocks(Model):
    """The blocks have names in place of numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(OrderedDict((f"layer_{number}", Block()) for number in range(DEPTH)))

    def between(self, x: Tensor, ids: Tensor) -> Tensor:
        found: Tensor = self.layers(x)
        return found


class Remembering(Block):
    """Writes into a state that it is given, and gives it on."""

    def forward(self, x: Tensor, more: Any = None) -> Any:
        found = super().forward(x, more)
        more += x.mean(1, keepdim=True)
        return found, more


class State(Model):
    """As recurrent models keep one between texts."""

    def __init__(self) -> None:
        super().__init__(Remembering)

    def between(self, x: Tensor, ids: Tensor) -> Tensor:
        state = torch.zeros(len(ids), 1, WIDTH)
        for layer in self.layers:
            x, state = layer(x, state)
        return x


class Twice(Block):
    """Calls a linear twice, on other inputs."""

    def inner(self, x: Tensor) -> Tensor:
        found: Tensor = self.down(torch.relu(self.up(self.norm(x)) + self.up(torch.tanh(x))))
        return found


class CalledTwice(Model):
    """Blocks that call a linear twice."""

    def __init__(self) -> None:
        super().__init__(Twice)


class Gated(Block):
    """Another kind of block."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, more: Tensor | float = 0.0) -> Any:
        return x + self.inner(x) * self.gate(x).sigmoid()


class TwoKindsOfBlocks(Model):
    """As state spaces with a layer of attention now and then."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(), Gated(), Block()])


GOES = [
    Model, TwoKindsOfBlocks, InputsPerLayer, SomeInputsPerLayer, BiasOutside, BundleOutside, NormsBetween, TwoLists,
    Hierarchy, NamedTuples, NamedBlocks, State, CalledTwice,
]  # fmt: skip


def make(kind: type[Model]) -> tuple[Model, dict[str, list[dict[str, Tensor]]]]:
    torch.manual_seed(0)
    batches = [{"input_ids": torch.randint(0, 20, (8, LENGTH))} for _ in range(3)]
    return varied(kind().eval()), {"a": batches}


def varied(model: Model) -> Model:
    """Another model of the kind, none of whose weights are zero."""
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    return twin


@pytest.mark.parametrize("refit", [False, True])
@pytest.mark.parametrize("kind", GOES)
def test_one_expert_that_is_the_merged_model_moves_nothing(kind: type[Model], refit: bool) -> None:
    merged, calibration = make(kind)
    config = QuantConfig(bits=None, alpha=1.0, bias_refit=refit, norm_refit=refit)
    result = quantize(merged, {"a": merged}, calibration, config)
    assert len(result.report["blocks"]) == len(find_blocks(merged))
    for row in result.report["blocks"]:
        assert row["hidden_error"]["a"] < EXACT, row["block"]
    for name, tensor in merged.state_dict().items():
        moved = (result.model.state_dict()[name] - tensor).square().sum()
        # Least squares tell a weight worse than the outputs in directions that few inputs have.
        assert moved <= 100 * EXACT * tensor.square().sum(), name
    for batch in calibration["a"]:
        with torch.no_grad():
            ours, wanted = result.model(**batch), merged(**batch)
        assert (ours - wanted).square().sum() <= EXACT * wanted.square().sum()


def last_outputs(model: nn.Module, name: str, batches: list[dict[str, Tensor]]) -> Iterator[Tensor]:
    """What a block gives in a model's own forward, batch by batch."""
    seen: list[Tensor] = []
    model.get_submodule(name).register_forward_hook(lambda module, args, output: seen.append(hidden_of(output)))
    for batch in batches:
        with torch.no_grad():
            model(**batch)
        yield seen[-1]


@pytest.mark.parametrize("kind", GOES)
def test_both_streams_are_what_the_whole_models_compute(kind: type[Model]) -> None:
    merged, calibration = make(kind)
    expert = varied(merged)
    sink, source = ModuleSink(), DictSource(merged.state_dict())
    config = QuantConfig(bits=3, group_size=16, alpha=1.0)
    engine = Engine(meta_copy(merged), source, None, {"a": open_source(expert)}, calibration, config, sink)
    engine.run()
    model = sink.assemble(engine.restore(), open_source(merged)).eval()
    last, states = engine.walk.addresses[-1], engine.walk.states
    ours, theirs = (last_outputs(whole, last.name, calibration["a"]) for whole in (model, expert))
    for number, (deployed, inside) in enumerate(zip(ours, theirs, strict=True)):
        for found, wanted in (
            (hidden_of(states.deployed("a", number).outputs[last.list_name]), deployed),
            (states.inside("a", number).hidden, inside),
        ):
            assert (found - wanted).square().sum() <= EXACT * wanted.square().sum()


@pytest.mark.parametrize("kind", [InputsPerLayer, BiasOutside])
def test_of_what_is_made_outside_the_blocks_only_that_is_kept_which_later_blocks_read(kind: type[Model]) -> None:
    merged, calibration = make(kind)
    source, config = DictSource(merged.state_dict()), QuantConfig(bits=3, group_size=16, alpha=1.0)
    engine = Engine(meta_copy(merged), source, None, {"a": source}, calibration, config, ModuleSink())
    engine.run()
    assert set(engine.walk.states.inside("a", 0).shared) == (set() if kind is InputsPerLayer else {1})


def test_named_tuples_come_back_from_files_with_their_names(tmp_path: Path) -> None:
    merged, calibration = make(NamedTuples)
    config, found = QuantConfig(bits=3, group_size=16, alpha=1.0), []
    for shelf in (Shelf(), Shelf(0, tmp_path / "spilled")):
        sink, source, around = ModuleSink(), DictSource(merged.state_dict()), Surroundings(shelf=shelf)
        engine = Engine(meta_copy(merged), source, None, {"a": source}, calibration, config, sink, around=around)
        engine.run()
        found.append(sink.assemble(engine.restore(), source).state_dict())
    for name, tensor in found[0].items():
        assert torch.equal(tensor, found[1][name]), name


class Table(Block):
    """Multiplies a table that it makes itself, as Swin v2 the coordinates of a window."""

    table: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Linear(2, WIDTH)
        self.register_buffer("table", torch.linspace(0, 1, 2 * LENGTH).view(LENGTH, 2), persistent=False)

    def forward(self, x: Tensor, more: Tensor | float = 0.0) -> Any:
        return super().forward(x, self.position(self.table))


@pytest.mark.parametrize("distill", [None, {"steps": 2, "examples": 2}])
def test_buffers_of_16_bits_that_no_checkpoint_holds_are_read_as_the_weights_are(distill: Any) -> None:
    merged, calibration = make(lambda: Model(Table))  # type: ignore[arg-type]
    merged = merged.bfloat16()
    result = quantize(merged, {"a": merged}, calibration, QuantConfig(bits=8, group_size=16, distill=distill))
    with torch.no_grad():
        ours, wanted = (model(**calibration["a"][0]).float() for model in (result.model, merged))
    # 8 bits of mantissa, in sums of a few dozen.
    assert (ours - wanted).square().sum() < 1e-2 * wanted.square().sum()


# -- what is refused -------------------------------------------------------------------------------------------------


class ResidualOutside(Model):
    def between(self, x: Tensor, ids: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


class SkipOutside(Model):
    def between(self, x: Tensor, ids: Tensor) -> Tensor:
        first = self.layers[0](x)
        return self.layers[2](self.layers[1](first) + first.detach())  # type: ignore[no-any-return]


class SkipInPlace(Model):
    def between(self, x: Tensor, ids: Tensor) -> Tensor:
        first = self.layers[0](x)
        second: Tensor = self.layers[1](first)
        second[:, 1:] += first[:, 1:]
        return self.layers[2](second)  # type: ignore[no-any-return]


class SkippedArgument(Model):
    def between(self, x: Tensor, ids: Tensor) -> Tensor:
        first = self.layers[0](x)
        return self.layers[2](self.layers[1](first), more=first)  # type: ignore[no-any-return]


class MaskedAtRandom(Model):
    def between(self, x: Tensor, ids: Tensor) -> Tensor:
        return super().between(x[:, torch.randperm(LENGTH)[:3]], ids)


class SharedPart(Model):
    def __init__(self) -> None:
        super().__init__()
        for layer in self.layers[1:]:
            layer.down = self.layers[0].down


class SharedWeight(Model):
    def __init__(self) -> None:
        super().__init__()
        self.layers[2].up.weight = self.layers[1].up.weight


class SharedBetweenLists(TwoLists):
    def __init__(self) -> None:
        super().__init__()
        self.others[1].up = self.layers[1].up


class CalledThroughTwoLists(Model):
    def __init__(self) -> None:
        super().__init__()
        self.again = nn.ModuleList(self.layers[1:])

    def between(self, x: Tensor, ids: Tensor) -> Tensor:
        x = super().between(x, ids)
        for layer in self.again:
            x = layer(x)
        return x


class Leaving(Block):
    def forward(self, x: Tensor, more: Any = None) -> Any:
        found = super().forward(x)
        more["keys"] = (found,)
        return found


class LeftForLater(Model):
    def __init__(self) -> None:
        super().__init__(Leaving)

    def between(self, x: Tensor, ids: Tensor) -> Tensor:
        shared: dict[str, Any] = {}
        for layer in self.layers:
            x = layer(x, shared)
        return x


class Pairs(Model):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleList((Block(), nn.Linear(WIDTH, WIDTH))) for _ in range(DEPTH))

    def between(self, x: Tensor, ids: Tensor) -> Tensor:
        for block, linear in self.layers:
            x = linear(block(x))
        return x


REFUSED: dict[type[Model], str] = {
    ResidualOutside: r"block layers\.2 depends on what came out of layers\.0 by a way around",
    SkipOutside: r"block layers\.2 depends on what came out of layers\.0 by a way around",
    SkipInPlace: r"block layers\.2 depends on what came out of layers\.0 by a way around",
    SkippedArgument: r"block layers\.2 depends on what came out of layers\.0 by a way around",
    MaskedAtRandom: r"block layers\.0: the model's forward, run again on the same inputs, gives it other hidden states",
    SharedPart: r"layers\.1\.down: block layers\.0 has the same weight",
    SharedWeight: r"layers\.2\.up: block layers\.1 has the same weight",
    SharedBetweenLists: r"others\.1\.up: block layers\.1 has the same weight",
    CalledThroughTwoLists: r"block again\.0 is called more than once",
    LeftForLater: r"block layers\.0 leaves something for later blocks",
    Pairs: r"no repeated blocks found .* a forward of their own",
}


@pytest.mark.parametrize("method", ["gptq", "epmq"])
@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_calibrated_block_by_block_is_refused(kind: type[Model], method: str) -> None:
    merged, calibration = make(kind)
    with pytest.raises(ModelError, match=REFUSED[kind]):
        quantize(merged, {"a": merged}, calibration, QuantConfig(method=method, group_size=16))


@pytest.mark.parametrize("kind", [ResidualOutside, SharedPart, LeftForLater])
def test_what_is_refused_can_be_rounded_to_nearest_as_it_is_told(kind: type[Model]) -> None:
    merged, calibration = make(kind)
    result = quantize(merged, {"a": merged}, {}, QuantConfig(method="rtn", bits=8, group_size=16))
    with torch.no_grad():
        ours, wanted = (model(**calibration["a"][0]) for model in (result.model, merged))
    # 8 bits: a step is 1/255 of a group's range.
    assert (ours - wanted).square().sum() < 1e-3 * wanted.square().sum()
