"""Which of the model's inputs a block's positions are those of, and so whose mask weighs them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from epmq import QuantConfig, quantize

WIDTH = 32
GPTQ = QuantConfig(method="gptq", group_size=16)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.relu(self.linear(x))


def blocks() -> nn.ModuleList:
    return nn.ModuleList([Block(), Block()])


class TwoListsInARow(nn.Module):
    """A decoder of two lists, of which the second reads the first's output and no input."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(60, WIDTH)
        self.encoder, self.one, self.two = blocks(), blocks(), blocks()

    def forward(
        self, input_ids: Tensor, decoder_input_ids: Tensor, attention_mask: Tensor, decoder_attention_mask: Tensor
    ) -> Tensor:
        x = self.embedding(input_ids)
        for block in self.encoder:
            x = block(x)
        y: Tensor = self.embedding(decoder_input_ids) + x.mean(1, keepdim=True)
        for block in [*self.one, *self.two]:
            y = block(y)
        return y


class Sounds(nn.Module):
    """Reads floats, and may be given labels and texts that it does not read there."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.layers = nn.Linear(8, WIDTH), blocks()

    def forward(self, input_features: Tensor, labels: Tensor | None = None, **texts: Tensor) -> Tensor:
        x: Tensor = self.embedding(input_features)
        for block in self.layers:
            x = block(x)
        return x


class Queries(nn.Module):
    """Its first list works on learned vectors alone, its second on a text."""

    def __init__(self) -> None:
        super().__init__()
        self.queries, self.embedding = nn.Parameter(torch.randn(1, 10, WIDTH)), nn.Embedding(60, WIDTH)
        self.asked, self.layers = blocks(), blocks()

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        y: Tensor = self.queries.expand(len(input_ids), -1, -1)
        for block in self.asked:
            y = block(y)
        x: Tensor = self.embedding(input_ids) + y.mean(1, keepdim=True)
        for block in self.layers:
            x = block(x)
        return x


def differing(model: nn.Module, *batches: dict[str, Any]) -> list[str]:
    """Tensors that calibrating on the one batch and on the other leaves different."""
    one, other = (quantize(copy.deepcopy(model), None, {"a": [b]}, GPTQ).model.state_dict() for b in batches)
    return [name for name in one if not torch.equal(one[name], other[name])]


def test_a_second_list_is_weighed_as_the_one_that_feeds_it() -> None:
    torch.manual_seed(0)
    ids, mask = torch.randint(3, 60, (4, 10)), torch.ones(4, 10, dtype=torch.int64)
    mask[:, 4:] = 0
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(mask), "decoder_attention_mask": mask}
    padded = [{**batch, "decoder_input_ids": torch.where(mask > 0, ids.flip(0), pad)} for pad in (7, 8)]
    assert differing(TwoListsInARow(), *padded) == []


def test_labels_weigh_nothing_that_is_not_made_of_them() -> None:
    torch.manual_seed(0)
    batch = {"input_features": torch.randn(4, 10, 8)}
    labels = torch.full((4, 10), 5)
    labels[:, 3:] = -100
    assert differing(Sounds(), batch, {**batch, "labels": labels}) == []


def test_a_mask_beside_a_text_is_the_texts() -> None:
    torch.manual_seed(0)
    batch = {"input_features": torch.randn(4, 10, 8), "input_ids": torch.randint(3, 60, (4, 10))}
    mask = torch.ones(4, 10, dtype=torch.int64)
    mask[:, 4:] = 0
    assert differing(Sounds(), batch, {**batch, "attention_mask": mask}) == []
    # Without a text it is that of what there is.
    del batch["input_ids"]
    assert differing(Sounds(), batch, {**batch, "attention_mask": mask}) != []


def test_what_is_made_of_no_input_has_no_mask() -> None:
    torch.manual_seed(0)
    batch = {"input_ids": torch.randint(3, 60, (4, 10))}
    mask = torch.ones(4, 10, dtype=torch.int64)
    mask[:, 4:] = 0
    changed = differing(Queries(), batch, {**batch, "attention_mask": mask})
    assert changed and all(name.startswith("layers.") for name in changed)


def test_ids_that_are_labels_too_are_weighed_by_the_mask() -> None:
    """One tensor under two names, as language models are trained."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=60, hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    model = transformers.LlamaForCausalLM(config).eval()
    ids, mask = torch.randint(3, 60, (4, 10)), torch.ones(4, 10, dtype=torch.int64)
    mask[:, 4:] = 0
    batch = {"input_ids": ids, "attention_mask": mask}
    assert differing(model, batch, {**batch, "labels": ids}) == []


@pytest.mark.parametrize("examples", [1, 3])
def test_images_in_a_text_need_not_be_in_every_example(examples: int) -> None:
    """Such models check the places in the text by the number of images, so that no id may be tried instead of one."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.PaliGemmaConfig(
        text_config=transformers.GemmaConfig(vocab_size=60, num_key_value_heads=2, head_dim=8, **sizes),
        vision_config=transformers.SiglipVisionConfig(image_size=12, patch_size=4, **sizes),
        image_token_index=50,
        image_token_id=50,
        projection_dim=WIDTH,
        hidden_size=WIDTH,
    )
    model = transformers.PaliGemmaForConditionalGeneration(config).eval()
    ids = torch.randint(3, 40, (examples, 16))
    ids[:, 2:11] = 50
    batch = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(examples, 3, 12, 12),
        "token_type_ids": torch.zeros_like(ids),
    }
    result = quantize(model, None, {"a": [batch]}, GPTQ)
    assert len(result.report["layers"]) == 2 * 6 + 2 * 7


@pytest.mark.parametrize("asked_in", ["batch", "config"])
def test_the_result_still_gives_its_hidden_states(asked_in: str) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=60, hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4
    )
    config.output_hidden_states = asked_in == "config"
    model = transformers.LlamaForCausalLM(config).eval()
    ids = torch.randint(3, 60, (4, 9))
    batch: dict[str, Any] = {"input_ids": ids}
    if asked_in == "batch":
        batch["output_hidden_states"] = True
    result = quantize(model, None, {"a": [batch]}, QuantConfig(method="gptq", bits=8, group_size=16)).model
    wanted, found = (m(ids, output_hidden_states=True).hidden_states for m in (model, result))
    assert len(found) == 4
    for ours, theirs in zip(found, wanted, strict=True):
        assert (ours - theirs).square().sum() < 1e-3 * theirs.square().sum()
