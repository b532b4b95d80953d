"""Block discovery, per-block arguments, groups by shared input; real architectures through the engine."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

import pytest
import torch
from conftest import ToyBlock, ToyModel
from torch import Tensor, nn

from epmq import QuantConfig, QuantLinear, quantize
from epmq.blocks import find_blocks
from epmq.calls import StreamState, hidden_of
from epmq.engine import Engine
from epmq.errors import ModelError
from epmq.inputs import input_groups, inputs_of, running_order
from epmq.pipeline import ModuleSink
from epmq.runner import BlockRunner
from epmq.skeleton import meta_copy
from epmq.sources import DictSource, open_source

transformers = pytest.importorskip("transformers")


def names(model: nn.Module) -> list[str]:
    return [address.name for address in find_blocks(model)]


def everything(_: str) -> bool:
    return True


# -- discovery -----------------------------------------------------------------------------------------------------


def test_blocks_of_a_model_in_forward_order() -> None:
    assert names(ToyModel(depth=3)) == ["blocks.0", "blocks.1", "blocks.2"]


def test_one_block_is_enough() -> None:
    assert names(ToyModel(depth=1)) == ["blocks.0"]


def test_lists_inside_blocks_belong_to_the_block() -> None:
    class Mixture(ToyBlock):
        def __init__(self, width: int):
            super().__init__(width)
            self.experts = nn.ModuleList(ToyBlock(width) for _ in range(4))

    model = nn.ModuleDict({"layers": nn.ModuleList(Mixture(8) for _ in range(2))})
    assert names(model) == ["layers.0", "layers.1"]


def test_a_model_may_be_the_list_itself() -> None:
    class Nested(ToyBlock):
        def __init__(self) -> None:
            super().__init__(8)
            self.inner = nn.ModuleList(ToyBlock(8) for _ in range(2))

    assert names(nn.Sequential(Nested(), Nested())) == ["0", "1"]


def test_every_outermost_list_counts() -> None:
    model = nn.ModuleDict(
        {
            "encoder": nn.ModuleDict({"layers": nn.Sequential(ToyBlock(8), ToyBlock(8))}),
            "decoder": nn.ModuleDict({"layers": nn.ModuleList(ToyBlock(8) for _ in range(2))}),
        }
    )
    assert names(model) == ["encoder.layers.0", "encoder.layers.1", "decoder.layers.0", "decoder.layers.1"]


def test_blocks_keep_the_names_that_they_have_in_their_list() -> None:
    model = nn.ModuleDict({"layers": nn.Sequential(OrderedDict(first=ToyBlock(8), second=ToyBlock(8)))})
    assert names(model) == ["layers.first", "layers.second"]
    runner = BlockRunner(model)
    blocks = [runner.block(address) for address in runner.addresses]
    assert list(runner.restore().get_submodule("layers").children()) == blocks


def test_lists_in_a_list_are_no_blocks() -> None:
    model = nn.ModuleList(nn.ModuleList((ToyBlock(8), ToyBlock(8))) for _ in range(2))
    assert names(model) == ["0.0", "0.1", "1.0", "1.1"]


class OtherBlock(ToyBlock):
    """As a layer of attention among those of a state space."""


def test_a_list_may_hold_blocks_of_a_few_classes() -> None:
    layers = nn.ModuleList([ToyBlock(8), OtherBlock(8), ToyBlock(8), ToyBlock(8)])
    assert names(nn.ModuleDict({"layers": layers})) == [f"layers.{n}" for n in range(4)]


@pytest.mark.parametrize(
    "model",
    [
        nn.ModuleList([ToyBlock(8), OtherBlock(8)]),
        nn.Sequential(ToyBlock(8), OtherBlock(8), ToyBlock(8)),
        nn.Linear(3, 3),
        nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3)),
        nn.ModuleList(nn.Linear(3, 3) for _ in range(4)),
        nn.ModuleList(nn.LayerNorm(3) for _ in range(4)),
        nn.ModuleList(nn.ModuleList((ToyBlock(3), nn.Linear(3, 3))) for _ in range(4)),
        nn.ModuleList(),
    ],
    ids=[
        "two of two classes",
        "stages",
        "linear",
        "sequential of kinds",
        "list of linears",
        "list without linears",
        "list of pairs",
        "empty list",
    ],
)
def test_a_model_without_blocks_is_refused(model: nn.Module) -> None:
    with pytest.raises(ModelError, match="no repeated blocks found"):
        find_blocks(model)


# -- arguments of each block ---------------------------------------------------------------------------------------


class TellingBlock(nn.Module):
    """Its output depends on each of its arguments, one of them by keyword only."""

    kind = "telling"

    def __init__(self, number: int, inplace: bool = False):
        super().__init__()
        self.linear, self.number, self.inplace = nn.Linear(8, 8), number, inplace

    def forward(self, hidden_states: Tensor, shift: Tensor, *, factor: float) -> Any:
        update = self.linear(torch.tanh(hidden_states) + shift) * factor
        if self.inplace:
            hidden_states += update
        else:
            hidden_states = hidden_states + update
        return hidden_states, "more"


class TellingModel(nn.Module):
    def __init__(self, by_name: bool = False, inplace: bool = False):
        super().__init__()
        self.embedding = nn.Embedding(10, 8)
        self.layers = nn.ModuleList(TellingBlock(i, inplace) for i in range(3))
        self.by_name = by_name

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden = self.embedding(input_ids)
        shift = input_ids.float().mean() * torch.ones(8)
        for number, layer in enumerate(self.layers[:3]):
            assert layer.kind == "telling"
            assert layer.number == number
            if self.by_name:
                hidden = layer(hidden_states=hidden, shift=shift * number, factor=0.5 + number)[0]
            else:
                hidden = layer(hidden, shift * number, factor=0.5 + number)[0]
        return hidden


@pytest.mark.parametrize("by_name", [False, True])
def test_each_block_gets_its_own_arguments(by_name: bool) -> None:
    model = TellingModel(by_name)
    inputs = {"input_ids": torch.tensor([[1, 2, 3]])}
    wanted: list[Tensor] = []
    handles = [b.register_forward_hook(lambda m, a, out: wanted.append(out[0])) for b in model.layers]
    final = model(**inputs)
    for handle in handles:
        handle.remove()
    runner = BlockRunner(model)
    state = StreamState()
    for number, address in enumerate(runner.addresses):
        call = runner.capture(address, inputs, state)
        assert call.kwargs["factor"] == 0.5 + number
        state.outputs[address.list_name] = call.run(runner.block(address))
        assert torch.equal(hidden_of(state.outputs[address.list_name]), wanted[number])
    assert torch.equal(runner.restore()(**inputs), final)
    assert all(type(block) is TellingBlock for block in model.layers)


def test_capture_runs_no_block() -> None:
    model = ToyModel(depth=3)
    runner = BlockRunner(model)
    for address in runner.addresses:
        runner.block(address).register_forward_pre_hook(lambda *_: pytest.fail("a block ran"))
    inputs = {"input_ids": torch.zeros(1, 4, dtype=torch.int64)}
    state = StreamState({"blocks": torch.full((1, 4, 32), 7.0)})
    assert torch.equal(runner.capture(runner.addresses[2], inputs, state).hidden, torch.full((1, 4, 32), 7.0))


def test_a_block_that_is_never_called_is_named() -> None:
    class Skipping(ToyModel):
        def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
            out: Tensor = self.head(self.blocks[0](self.embedding(input_ids)))
            return out

    model = Skipping(depth=2)
    runner = BlockRunner(model)
    inputs = {"input_ids": torch.zeros(1, 4, dtype=torch.int64)}
    runner.capture(runner.addresses[0], inputs, StreamState())
    with pytest.raises(ModelError, match=r"block blocks\.1 is never called"):
        runner.capture(runner.addresses[1], inputs, StreamState({"blocks": torch.zeros(1, 4, 32)}))


def test_a_block_without_hidden_states_is_refused() -> None:
    class Odd(ToyModel):
        def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
            out: Tensor = self.blocks[0](hidden=self.embedding(input_ids))
            return out

    runner = BlockRunner(Odd())
    with pytest.raises(ModelError, match="hidden states"):
        runner.capture(runner.addresses[0], {"input_ids": torch.zeros(1, 4, dtype=torch.int64)}, StreamState())


@pytest.mark.parametrize("output", [None, {"hidden": torch.ones(1)}, (None, torch.ones(1)), "text"])
def test_an_output_without_hidden_states_is_refused(output: Any) -> None:
    with pytest.raises(ModelError, match="a block returned"):
        hidden_of(output)


# -- groups --------------------------------------------------------------------------------------------------------


def test_linears_that_read_the_same_tensor_share_a_group() -> None:
    model = ToyModel()
    runner = BlockRunner(model)
    call = runner.capture(runner.addresses[0], {"input_ids": torch.zeros(2, 5, dtype=torch.int64)}, StreamState())
    block = runner.block(runner.addresses[0])
    groups = [group.linears for group in input_groups(block, call, everything)]
    assert groups == [("query", "key"), ("out",), ("up",), ("down",)]
    groups = [group.linears for group in input_groups(block, call, lambda name: name not in ("query", "up"))]
    assert groups == [("key",), ("out",), ("down",)]
    assert running_order(block, call, ["down", "norm", "query"]) == ["norm", "query", "down"]
    x = inputs_of(block, call, "query")["query"]
    assert x is not None and torch.equal(x, block.norm(call.hidden))  # type: ignore[operator]


def test_equal_values_in_other_places_are_another_group() -> None:
    class Copying(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.unused = (nn.Linear(8, 8) for _ in range(3))

        def forward(self, hidden: Tensor) -> Tensor:
            out: Tensor = self.a(hidden) + self.b(hidden.clone())
            return out

    model = nn.Sequential(Copying(), Copying())
    runner = BlockRunner(model)
    call = runner.capture(runner.addresses[0], {"input": torch.randn(3, 8)}, StreamState())
    groups = [group.linears for group in input_groups(runner.block(runner.addresses[0]), call, everything)]
    assert groups == [("a",), ("b",)]


# -- blocks that write into what they are given ----------------------------------------------------------------------


def test_blocks_that_add_in_place_are_calibrated_like_those_that_do_not() -> None:
    results = []
    for inplace in (False, True):
        torch.manual_seed(0)
        model = TellingModel(inplace=inplace)
        expert = copy.deepcopy(model)
        with torch.no_grad():
            expert.get_parameter("layers.0.linear.weight").add_(0.1 * torch.randn(8, 8))
        batches = [{"input_ids": torch.randint(0, 10, (4, 6))} for _ in range(2)]
        config = QuantConfig(group_size=8)
        results.append(quantize(model, {"a": expert}, {"a": batches}, config).model.state_dict())
    for name, tensor in results[0].items():
        assert torch.equal(tensor, results[1][name]), name


def test_linears_whose_output_is_changed_in_place_are_calibrated_like_others() -> None:
    class Block(nn.Module):
        def __init__(self, inplace: bool):
            super().__init__()
            self.first, self.second, self.third = (nn.Linear(8, 8) for _ in range(3))
            self.inplace = inplace

        def forward(self, hidden: Tensor) -> Tensor:
            inner = self.first(hidden)
            inner = inner.add_(hidden) if self.inplace else inner + hidden
            more = self.second(torch.relu(inner))
            more = more.add_(inner) if self.inplace else more + inner
            out: Tensor = self.third(more) + hidden
            return out

    results = []
    for inplace in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(Block(inplace), Block(inplace))
        expert = copy.deepcopy(model)
        with torch.no_grad():
            for parameter in expert.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape))
        batches = [{"input": torch.randn(20, 8)} for _ in range(2)]
        result = quantize(model, {"a": expert}, {"a": batches}, QuantConfig(group_size=8))
        results.append(result.model.state_dict())
    for name, tensor in results[0].items():
        assert torch.equal(tensor, results[1][name]), name


def test_a_block_that_writes_into_what_it_is_given_gets_it_as_it_was_each_time() -> None:
    class Between(TellingModel):
        """Adds in place between its blocks, as its blocks do, and starts from a weight of its own."""

        def forward(self, input_ids: Tensor) -> Tensor:
            hidden: Tensor = self.embedding.weight.view(1, 10, 8)
            for layer in self.layers:
                hidden = layer(hidden, torch.ones(8), factor=0.5)[0]
                hidden += 1.0
            return hidden

    runner = BlockRunner(Between(inplace=True))
    weight, inputs = runner.model.get_parameter("embedding.weight").clone(), {"input_ids": torch.zeros(1, 1)}
    state = StreamState({"layers": (torch.full((1, 10, 8), 7.0), "more")})
    wanted_at = (weight.view(1, 10, 8), torch.tensor(8.0), torch.tensor(8.0))
    for address, wanted in zip(runner.addresses, wanted_at, strict=True):
        for _ in range(2):
            call = runner.capture(address, inputs, state)
            assert torch.equal(call.hidden, wanted.expand(1, 10, 8))
            assert runner.capture(address, inputs, state).hidden is call.hidden
            with torch.no_grad():
                call.run(runner.block(address))
    assert torch.equal(runner.model.get_parameter("embedding.weight"), weight)
    assert torch.equal(hidden_of(state.outputs["layers"]), torch.full((1, 10, 8), 7.0))


# -- real architectures ----------------------------------------------------------------------------------------------


def bert() -> tuple[nn.Module, list[dict[str, Tensor]]]:
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
    )
    mask = (torch.arange(9) < torch.tensor([[9], [5], [7], [3]])).long()
    return transformers.BertModel(config), [
        {"input_ids": torch.randint(0, 50, (4, 9)), "attention_mask": mask} for _ in range(2)
    ]


def llama() -> tuple[nn.Module, list[dict[str, Tensor]]]:
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=48, max_position_embeddings=64,
    )  # fmt: skip
    ids = [torch.randint(0, 50, (4, 9)) for _ in range(2)]
    mask = (torch.arange(9) < torch.tensor([[9], [5], [7], [3]])).long()
    return transformers.LlamaModel(config), [{"input_ids": ids[0], "attention_mask": mask}, {"input_ids": ids[1]}]


def vit() -> tuple[nn.Module, list[dict[str, Tensor]]]:
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, image_size=8, patch_size=4
    )
    return transformers.ViTModel(config), [{"pixel_values": torch.randn(4, 3, 8, 8)} for _ in range(2)]


ARCHITECTURES = {"bert": (bert, 6), "llama": (llama, 7), "vit": (vit, 6)}


def varied(model: nn.Module, spread: float = 0.05) -> nn.Module:
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(spread * torch.randn(parameter.shape) * parameter.std().nan_to_num(0.1))
    return twin


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_real_architecture_goes_through(architecture: str) -> None:
    make, linears = ARCHITECTURES[architecture]
    merged, batches = make()
    merged.eval()
    experts = {"a": varied(merged), "b": varied(merged)}
    calibration = {"a": batches[:1], "b": batches[1:]}
    config = QuantConfig(bits=8, group_size=16, norm_refit=True)
    result = quantize(merged, experts, calibration, config)
    quantized = [name for name, module in result.model.named_modules() if isinstance(module, QuantLinear)]
    assert len(quantized) == 2 * linears
    with torch.no_grad():
        for batch in batches:
            ours, wanted = result.model(**batch)[0], merged(**batch)[0]
            # Near the experts, so near the merge as well; far from what a mixed-up layer would give.
            assert float((ours - wanted).norm() / wanted.norm()) < 0.1


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_towards_itself_and_unrounded_a_model_stays_what_it_was(architecture: str) -> None:
    merged, batches = ARCHITECTURES[architecture][0]()
    merged.eval()
    config = QuantConfig(bits=None, alpha=0.0, bias_refit=False)
    result = quantize(merged, {"a": merged}, {"a": batches}, config)
    for name, tensor in merged.state_dict().items():
        assert torch.equal(result.model.state_dict()[name], tensor), name
    with torch.no_grad():
        assert torch.equal(result.model(**batches[0])[0], merged(**batches[0])[0])


class Twice(nn.Module):
    """Runs a linear that narrows twice, and a norm: what counts of both is their first run."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.gate = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(8, 16)
        self.down = nn.Linear(16, 8)

    def forward(self, hidden: Tensor) -> Tensor:
        x = self.norm(hidden)
        hidden = hidden + self.down(torch.relu(self.up(x))) + 0.5 * self.down(3.0 * torch.tanh(self.gate(x)))
        return hidden + 0.1 * self.norm(2.0 + hidden.square())


def test_modules_that_run_twice_are_seen_alike_inside_the_expert_and_as_deployed() -> None:
    model = nn.Sequential(Twice(), Twice())
    # Without bits and towards itself nothing has a reason to change, but for what a solve rounds in fp32.
    config = QuantConfig(bits=None, bias_refit=False, norm_refit=True)
    result = quantize(model, {"a": model}, {"a": [{"input": torch.randn(4, 6, 8)} for _ in range(2)]}, config)
    for name, tensor in model.state_dict().items():
        assert torch.allclose(result.model.state_dict()[name], tensor, atol=1e-5), name


@pytest.mark.parametrize("norm_refit", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_streams_are_what_the_finished_model_computes(architecture: str, norm_refit: bool) -> None:
    merged, batches = ARCHITECTURES[architecture][0]()
    merged.eval()
    sink = ModuleSink()
    sources = {"a": open_source(varied(merged))}
    config = QuantConfig(bits=3, group_size=16, norm_refit=norm_refit)
    engine = Engine(meta_copy(merged), DictSource(merged.state_dict()), None, sources, {"a": batches}, config, sink)
    engine.run()
    model = sink.assemble(engine.restore(), open_source(merged)).eval()
    last = engine.walk.addresses[-1]
    seen: list[Tensor] = []
    model.get_submodule(last.name).register_forward_hook(lambda m, a, out: seen.append(hidden_of(out)))
    for number, batch in enumerate(batches):
        with torch.no_grad():
            model(**batch)
        deployed = hidden_of(engine.walk.states.deployed("a", number).outputs[last.list_name])
        weights = engine.walk.streams["a"][number].position_weights
        rows = torch.ones(deployed.shape[:2], dtype=torch.bool) if weights is None else weights > 0
        assert torch.allclose(seen[number][rows], deployed[rows], atol=1e-4)
