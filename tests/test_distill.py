"""Distillation and the label-free variants of texts it draws on."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import transformers
from conftest import ToyJob, ToyModel, make_toy_job, state_of, toy_batches
from torch import nn

from epmq import QuantConfig, QuantResult, quantize
from epmq.augment import augmented, can_augment, token_pool
from epmq.config import DistillSettings
from epmq.distill import distill, similar_tasks
from epmq.errors import CalibrationError, ConfigError, ModelError
from epmq.features import pooled
from epmq.precision import AS_IT_IS, Precision
from epmq.streams import Batch, make_streams, take

QUICK = DistillSettings(steps=30, copies=1, learning_rate=1e-3)


def silent(what: str, done: int, total: int) -> None:
    """No progress."""


def features(model: nn.Module, batches: list[Batch]) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([pooled(model, batch) for batch in batches])


def run(job: ToyJob, settings: DistillSettings) -> nn.Module:
    model = copy.deepcopy(job.merged)
    streams = make_streams(job.calibration)
    distill(model, [model.get_submodule("blocks.1")], job.experts.__getitem__, streams, settings, silent)
    return model


def test_distill_brings_features_nearer_to_every_expert() -> None:
    job = make_toy_job(spread=1.0)
    tuned = run(job, DistillSettings(steps=80, copies=0, learning_rate=1e-3, cross_weight=0.0))
    for task, batches in make_streams(job.calibration).items():
        wanted = features(job.experts[task], batches)
        before = (features(job.merged, batches) - wanted).square().sum()
        assert (features(tuned, batches) - wanted).square().sum() < before


def test_distill_in_bfloat16_keeps_weights_and_features_in_fp32() -> None:
    """Passes run in it, and lead where those in fp32 lead."""
    job, settings = make_toy_job(spread=1.0), DistillSettings(steps=80, copies=0, learning_rate=1e-3, cross_weight=0.0)
    half = Precision.of("bfloat16", torch.device("cpu")).with_gradients()
    streams = make_streams(job.calibration)
    model = copy.deepcopy(job.merged)
    seen: set[torch.dtype] = set()
    model.get_submodule("blocks.1").register_forward_hook(lambda module, args, output: seen.add(output.dtype))
    linear = next(m for m in model.get_submodule("blocks.1").modules() if isinstance(m, nn.Linear))
    linear.register_forward_hook(lambda module, args, output: seen.add(output.dtype))
    distill(
        model, [model.get_submodule("blocks.1")], job.experts.__getitem__, streams, settings, silent, precision=half
    )
    assert torch.bfloat16 in seen
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float32}
    exact = run(job, settings)
    for task, batches in streams.items():
        wanted = features(job.experts[task], batches)
        assert pooled(model, batches[0], half).dtype == torch.float32
        before, after, best = (
            float((features(m, batches) - wanted).square().sum()) for m in (job.merged, model, exact)
        )
        # bf16 rounds each product by 2^-9 of its size: a small part of what distillation gains.
        assert after - best < 0.1 * (before - best)


def test_gradients_are_never_float16() -> None:
    cpu = torch.device("cpu")
    assert Precision.of("float16", cpu).with_gradients() == Precision.of("float32", cpu).with_gradients() == AS_IT_IS
    half = Precision.of("bfloat16", cpu).with_gradients()
    assert half.dtype == torch.bfloat16 and half.gradients


def test_attention_that_gradients_follow_is_fp32_on_a_cpu() -> None:
    half = Precision.of("bfloat16", torch.device("cpu"))
    q = torch.randn(1, 2, 5, 8, requires_grad=True)
    mask = torch.zeros(5, 5)
    exact = nn.functional.scaled_dot_product_attention(q, q, q, mask)
    with half.with_gradients().active():
        found = nn.functional.scaled_dot_product_attention(q.bfloat16(), q, value=q, attn_mask=mask)
        assert nn.functional.linear(q, torch.eye(8)).dtype == torch.bfloat16
        with torch.no_grad():
            assert nn.functional.scaled_dot_product_attention(q, q, q).dtype == torch.bfloat16
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, exact, atol=0.02, rtol=0.02)
    with half.active():
        assert nn.functional.scaled_dot_product_attention(q, q, q).dtype == torch.bfloat16


def test_distill_touches_only_the_blocks_it_is_given(toy_job: ToyJob) -> None:
    before = state_of(toy_job.merged)
    after = run(toy_job, QUICK).state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(name.startswith("blocks.1.") for name in changed)


def test_distill_repeats_under_its_seed_and_not_under_another(toy_job: ToyJob) -> None:
    first, second = run(toy_job, QUICK).state_dict(), run(toy_job, QUICK).state_dict()
    other = run(toy_job, QUICK.model_copy(update={"seed": 1})).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_pooled_takes_the_mean_over_unmasked_positions_only() -> None:
    model = ToyModel()
    inputs = toy_batches(torch.Generator().manual_seed(0), 1)[0]
    batch = make_streams({"a": [inputs]})["a"][0]
    with torch.no_grad():
        hidden = model(**inputs)
        for row in range(3):
            length = int(inputs["attention_mask"][row].sum())
            torch.testing.assert_close(pooled(model, batch)[row], hidden[row, :length].mean(0))


def test_similar_tasks_pairs_tasks_with_like_inputs() -> None:
    torch.manual_seed(0)
    model = ToyModel()

    def stream(low: int, high: int) -> list[Batch]:
        return make_streams({"t": [{"input_ids": torch.randint(low, high, (16, 10))} for _ in range(4)]})["t"]

    streams = {"a": stream(0, 8), "b": stream(20, 28), "c": stream(0, 8)}
    pairs = similar_tasks(model, streams, DistillSettings())
    assert "c" in pairs["a"] and "a" in pairs["c"]
    assert "a" not in pairs["b"] and "c" not in pairs["b"]
    assert similar_tasks(model, streams, DistillSettings(cross_weight=0.0)) == {"a": [], "b": [], "c": []}


def test_take_cuts_rows_and_padding() -> None:
    inputs = {
        "input_ids": torch.arange(24).view(3, 8),
        "attention_mask": (torch.arange(8) < torch.tensor([[2], [5], [8]])).long(),
        "scale": torch.tensor(2.0),
    }
    batch = make_streams({"a": [inputs]})["a"][0]
    taken = take(batch, torch.tensor([1, 0]))
    assert taken.inputs["input_ids"].tolist() == [[8, 9, 10, 11, 12], [0, 1, 2, 3, 4]]
    assert taken.inputs["attention_mask"].tolist() == [[1] * 5, [1, 1, 0, 0, 0]]
    assert taken.inputs["scale"] == 2.0
    assert taken.position_weights is not None and taken.position_weights.shape == (2, 5)


@pytest.mark.parametrize("seed", range(5))
def test_augmented_keeps_ends_and_length_limit(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([[3], [7], [12], [12]])
    ids = torch.randint(5, 40, (4, 12), generator=generator)
    ids[:, 0] = 1
    ids.scatter_(1, lengths - 1, 2)
    inputs = {"input_ids": ids, "attention_mask": (torch.arange(12) < lengths).long()}
    batch = make_streams({"a": [inputs]})["a"][0]
    pool = token_pool([batch])
    assert not set(pool.tolist()) & {1, 2}
    varied = augmented(batch, pool, pool, generator)
    mask = varied.inputs["attention_mask"]
    assert mask.shape[1] <= 12
    for row, length in enumerate(mask.sum(1).tolist()):
        text = varied.inputs["input_ids"][row, :length].tolist()
        assert text[0] == 1 and text[-1] == 2
        assert set(text[1:-1]) <= set(pool.tolist())


@pytest.mark.parametrize("left", [False, True], ids=["padded right", "padded left"])
@pytest.mark.parametrize("padded", [True, False])
def test_a_classifier_that_finds_the_last_token_by_its_padding_sees_varied_texts(padded: bool, left: bool) -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": 40,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_labels": 3,
    }
    config = transformers.LlamaConfig(**sizes, num_attention_heads=2, pad_token_id=39)
    model = transformers.LlamaForSequenceClassification(config).eval()
    lengths = torch.tensor([[4], [7], [12], [12]] if padded else [[12]] * 4)
    mask = (torch.arange(12) < lengths).long()
    mask = mask.flip(1) if left else mask
    ids = torch.where(mask > 0, torch.randint(1, 39, (4, 12)), 39)
    batch = make_streams({"a": [{"input_ids": ids, "attention_mask": mask}]})["a"][0]
    pool = token_pool([batch])
    seen = set()
    for seed in range(5):
        varied = augmented(batch, pool, pool, torch.Generator().manual_seed(seed), config.pad_token_id)
        with torch.no_grad():
            found = pooled(model, varied)
            for row, length in enumerate(varied.inputs["attention_mask"].sum(1).tolist()):
                alone = model(varied.inputs["input_ids"][row : row + 1, :length]).logits[0]
                torch.testing.assert_close(found[row], alone)
                seen.add(length)
    assert len(seen) > 1


def test_only_token_batches_can_be_augmented() -> None:
    assert can_augment(make_streams({"a": [{"input_ids": torch.ones(2, 3, dtype=torch.long)}]})["a"][0])
    assert not can_augment(make_streams({"a": [{"images": torch.ones(2, 8, 8)}]})["a"][0])


def test_texts_with_places_for_images_are_not_varied() -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 8,
        "patch_size": 4,
    }  # fmt: skip
    texts: dict[str, Any] = {**sizes, "vocab_size": 40, "model_type": "llama"}
    config = transformers.LlavaConfig(
        text_config=texts, vision_config={**sizes, "model_type": "siglip_vision_model"}, image_token_index=39,
        vision_feature_select_strategy="full", vision_feature_layer=-1,
    )  # fmt: skip
    merged = transformers.LlavaForConditionalGeneration(config).eval()
    ids = torch.randint(3, 38, (3, 9))
    ids[:, 2:6] = 39
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.randn(3, 3, 8, 8)}
    experts = {"a": varied(merged), "b": varied(merged)}
    found = best(merged, experts, {task: [batch] for task in experts}, distill={"copies": 3})
    assert found.report["stages"]["distill"]["steps"] == 6


class Bare(nn.Module):
    """A model whose blocks stand the other way round than it calls them; beside them some that it never calls."""

    def __init__(self, outputs: int = 5):
        super().__init__()
        self.late, self.early, self.unused = (
            nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(2)) for _ in range(3)
        )
        self.head = nn.Linear(16, outputs)

    def forward(self, x: torch.Tensor) -> dict[str, Any]:
        for block in (*self.early, *self.late):
            x = block(x)
        return {"loss": torch.tensor(1.0), "logits": self.head(x.mean(1)), "names": ["a"]}


def best(merged: nn.Module, experts: dict[str, nn.Module], data: Any, **settings: Any) -> QuantResult:
    distilled = {"steps": 6, "copies": 1, "examples": 2, **settings.pop("distill", {})}
    return quantize(merged, experts, data, QuantConfig(**{"bits": None, **settings, "distill": distilled}))


def varied(model: nn.Module) -> nn.Module:
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape))
    return twin


@pytest.mark.parametrize("outputs", [1, 5])
def test_any_output_with_features_will_do_and_the_blocks_called_last_are_tuned(outputs: int) -> None:
    merged = Bare(outputs)
    experts = {"a": varied(merged), "b": varied(merged)}
    data = {task: [{"x": torch.randn(6, 3, 16)}] for task in experts}
    plain = quantize(merged, experts, data, QuantConfig(bits=None)).model.state_dict()
    tuned = best(merged, experts, data).model.state_dict()
    # Every one of them, because the closed form alone gives the others.
    moved = {name.rpartition(".")[0] for name in plain if not torch.equal(plain[name], tuned[name])}
    assert moved == {"late.0.0", "late.1.0"}


def test_one_example_does_not_tell_how_features_vary() -> None:
    merged = Bare()
    with pytest.raises(CalibrationError, match="task 'a': its expert has the same features for all"):
        best(merged, {"a": varied(merged)}, {"a": [{"x": torch.randn(1, 3, 16)}]})


def test_an_output_without_features_is_refused() -> None:
    class Silent(Bare):
        def forward(self, x: torch.Tensor) -> Any:
            super().forward(x)
            return {"names": ["a"]}

    merged = Silent()
    with pytest.raises(ModelError, match="Silent: its output holds no tensor of features"):
        best(merged, {"a": varied(merged)}, {"a": [{"x": torch.randn(2, 3, 16)}]})


def test_what_is_excluded_is_not_tuned(toy_job: ToyJob) -> None:
    settings = {"exclude": ["blocks.1.up"], "distill": {"copies": 0, "steps": 20}}
    tuned = best(toy_job.merged, toy_job.experts, toy_job.calibration, **settings).model.state_dict()
    merged = toy_job.merged.state_dict()
    same = {name for name in merged if name.startswith("blocks.1.") and torch.equal(merged[name], tuned[name])}
    assert same == {"blocks.1.up.weight", "blocks.1.up.bias"}
    linears = ["query", "key", "out", "up", "down", "norm"]
    toy_job.merged.get_submodule("blocks.1").norm = nn.Identity()
    for expert in toy_job.experts.values():
        expert.get_submodule("blocks.1").norm = nn.Identity()
    with pytest.raises(ConfigError, match="leave distillation nothing to tune"):
        best(toy_job.merged, toy_job.experts, toy_job.calibration, exclude=[f"blocks.1.{n}" for n in linears])


def test_the_head_of_a_language_model_is_not_run() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=40, **sizes)).eval()
    (batch,) = make_streams({"a": [{"input_ids": torch.randint(0, 40, (2, 6))}]})["a"]
    with torch.no_grad():
        wanted = model.model(**batch.inputs)[0].mean(1)
        model.lm_head.register_forward_hook(lambda *_: pytest.fail("its logits were computed"))
        assert torch.equal(pooled(model, batch), wanted)


def bert_inputs(kind: str) -> dict[str, torch.Tensor]:
    """Inputs of eight examples of up to twelve positions."""
    mask = (torch.arange(12) < torch.tensor([12, 5, 4, 3, 6, 5, 4, 7]).unsqueeze(1)).long()
    ids = torch.randint(1, 40, (8, 12))
    if kind == "embeds":
        return {"inputs_embeds": torch.randn(8, 12, 32), "attention_mask": mask}
    if kind == "a text without tokens":
        return {"input_ids": ids, "attention_mask": mask * (torch.arange(8) != 3).long().unsqueeze(1)}
    shared = {"position_ids": torch.arange(12).unsqueeze(0), "input_ids": ids}
    return shared if kind == "shared positions" else {**shared, "attention_mask": mask}


@pytest.mark.parametrize("kind", ["embeds", "a text without tokens", "shared positions", "shared positions, padded"])
def test_inputs_of_every_kind_are_taken_in_parts(kind: str) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    merged = transformers.BertModel(transformers.BertConfig(vocab_size=40, **sizes), add_pooling_layer=False).eval()
    experts = {"a": varied(merged), "b": varied(merged)}
    data = {task: [bert_inputs(kind) for _ in range(2)] for task in experts}
    report = best(merged, experts, data, distill={"steps": 12, "examples": 1}).report
    assert all(math.isfinite(report["stages"]["distill"][name]) for name in ("first_loss", "last_loss"))


def test_parts_of_other_inputs_than_texts_stay_whole() -> None:
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    inputs = {
        "attention_mask": mask, "inputs_embeds": torch.randn(2, 3, 4), "bbox": torch.ones(2, 3, 4, dtype=torch.int64),
        "pixel_values": torch.randn(2, 3, 8, 8), "position_ids": torch.arange(3).unsqueeze(0),
    }  # fmt: skip
    taken = take(make_streams({"a": [inputs]})["a"][0], torch.tensor([1]))
    assert {name: tuple(value.shape) for name, value in taken.inputs.items()} == {
        "attention_mask": (1, 1), "inputs_embeds": (1, 1, 4), "bbox": (1, 1, 4), "pixel_values": (1, 3, 8, 8),
        "position_ids": (1, 1),
    }  # fmt: skip


class PatchReader(nn.Module):
    """Reads the patches of all images of a batch in a row, four to an image."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.patches = nn.Embedding(40, 16), nn.Linear(6, 16)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.ReLU()) for _ in range(2))

    def forward(self, input_ids: torch.Tensor, pixel_values: torch.Tensor) -> torch.Tensor:
        x: torch.Tensor = self.embedding(input_ids) + self.patches(pixel_values).view(-1, 4, 16).mean(1, keepdim=True)
        for block in self.blocks:
            x = x + block(x)
        return x


def test_images_stay_with_their_texts() -> None:
    """Towards itself a model has nothing to learn, unless texts are compared with those of other images."""
    torch.manual_seed(0)
    model = PatchReader()
    batch = {"input_ids": torch.randint(3, 40, (6, 5)), "pixel_values": 10.0 * torch.randn(24, 6)}
    settings = DistillSettings(steps=8, copies=0, examples=6, learning_rate=1e-2)
    trained = copy.deepcopy(model)
    distill(trained, [trained.blocks[1]], lambda task: model, make_streams({"a": [batch]}), settings, silent)
    assert all(torch.equal(tensor, trained.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_a_head_that_reads_time_first_is_pooled_by_example() -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "langs": ["a", "b"], "src_vocab_size": 40, "tgt_vocab_size": 40, "d_model": 16, "encoder_layers": 1,
        "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 24,
        "decoder_ffn_dim": 24,
    }  # fmt: skip
    model: Any = transformers.FSMTForConditionalGeneration(transformers.FSMTConfig(**sizes)).eval()
    inputs = {"input_ids": torch.randint(3, 40, (4, 9)), "decoder_input_ids": torch.randint(3, 40, (4, 7))}
    with torch.no_grad():
        wanted = model(**inputs, output_hidden_states=True).decoder_hidden_states[-1].mean(1)
        torch.testing.assert_close(pooled(model, make_streams({"a": [inputs]})["a"][0]), wanted)


def test_features_that_are_none_of_an_example_are_refused() -> None:
    """Pixtral sees all images of a batch as one sequence."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 8,
        "patch_size": 4,
    }  # fmt: skip
    merged = transformers.PixtralVisionModel(transformers.PixtralVisionConfig(**sizes))
    experts, data = {"a": varied(merged)}, {"a": [{"pixel_values": torch.randn(3, 3, 8, 8)} for _ in range(2)]}
    with pytest.raises(ModelError, match=r"PixtralVisionModel: it gives 1 features for a batch of 3 examples"):
        best(merged.eval(), experts, data)


@pytest.mark.parametrize("length", [9, 7])
def test_features_of_a_decoder_are_averaged_over_its_own_positions(length: int) -> None:
    sizes: dict[str, Any] = {"vocab_size": 60, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    sizes |= {"decoder_start_token_id": 0, "pad_token_id": 0}
    config = transformers.T5Config(**sizes)
    model = transformers.T5ForConditionalGeneration(config).eval()
    mask = (torch.arange(9) < torch.tensor([[9], [4], [5], [6]])).long()
    used = torch.arange(length) < torch.tensor([[3], [length], [2], [5]])
    labels = torch.where(used, torch.randint(3, 60, (4, length)), -100)
    inputs = {"input_ids": torch.randint(3, 60, (4, 9)) * mask, "attention_mask": mask, "labels": labels}
    batch = make_streams({"a": [inputs]})["a"][0]
    with torch.no_grad():
        hidden = model(**inputs, output_hidden_states=True).decoder_hidden_states[-1]
        if config.tie_word_embeddings:
            hidden = hidden * config.d_model**-0.5
        found = pooled(model, batch)
    wanted = (hidden * used.unsqueeze(-1)).sum(1) / used.sum(1, keepdim=True)
    torch.testing.assert_close(found, wanted)


# -- models that score positions -------------------------------------------------------------------------------------


def answering(kind: str) -> nn.Module:
    sizes: dict[str, Any] = {
        "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
        "pad_token_id": 0,
    }  # fmt: skip
    bart: dict[str, Any] = {
        "vocab_size": 40, "d_model": 16, "encoder_layers": 1, "decoder_layers": 2, "encoder_attention_heads": 2,
        "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "max_position_embeddings": 32,
    }  # fmt: skip
    task, settings = {
        "Bert": ("QuestionAnswering", sizes),
        "Llama": ("QuestionAnswering", sizes),
        "Bart": ("QuestionAnswering", bart),
        "Electra": ("PreTraining", {**sizes, "embedding_size": 16}),
    }[kind]
    model: nn.Module = getattr(transformers, f"{kind}For{task}")(getattr(transformers, f"{kind}Config")(**settings))
    return model.eval()


def texts_of(length: int) -> dict[str, torch.Tensor]:
    lengths = torch.randint(4, length + 1, (5, 1))
    lengths[0] = length
    mask = (torch.arange(length) < lengths).long()
    return {"input_ids": torch.randint(3, 40, (5, length)) * mask, "attention_mask": mask}


@pytest.mark.parametrize("kind", ["Bert", "Llama", "Electra", "Bart"])
def test_a_model_that_scores_positions_is_followed_by_its_last_hidden_states(kind: str) -> None:
    torch.manual_seed(0)
    merged = answering(kind)
    experts = {"a": varied(merged), "b": varied(merged)}
    data = {task: [texts_of(length) for length in (9, 12)] for task in experts}
    found = best(merged, experts, data, bits=None).report["stages"]["distill"]
    assert found["last_loss"] > 0
    if kind == "Bert":
        batch = make_streams(data)["a"][0]
        with torch.no_grad():
            hidden = merged.bert(**batch.inputs).last_hidden_state  # type: ignore[operator]
            for row, length in enumerate(batch.inputs["attention_mask"].sum(1).tolist()):
                torch.testing.assert_close(pooled(merged, batch)[row], hidden[row, :length].mean(0))


def test_as_many_classes_as_tokens_are_no_scores_of_positions() -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_labels": 9,
    }  # fmt: skip
    model = transformers.BertForSequenceClassification(transformers.BertConfig(**sizes)).eval()
    inputs = texts_of(9)
    labelled = {**inputs, "labels": torch.randint(0, 9, (5,))}
    with torch.no_grad():
        wanted = model(**inputs).logits
        for batch in make_streams({"a": [inputs, labelled]})["a"]:
            assert torch.equal(pooled(model, batch), wanted)


def test_a_model_that_writes_into_its_state_in_place_is_distilled() -> None:
    torch.manual_seed(0)
    config = transformers.RwkvConfig(vocab_size=40, hidden_size=16, num_hidden_layers=2, context_length=32)
    merged = transformers.RwkvForCausalLM(config).eval()
    assert merged.config.use_cache
    experts = {"a": varied(merged), "b": varied(merged)}
    data = {task: [texts_of(9)] for task in experts}
    assert best(merged, experts, data, bits=None).report["stages"]["distill"]["steps"] == 6
