"""LoRA adapters as experts: equal to peft's merge_and_unload bit by bit, and every other kind refused by name."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import bert_language_model, gpt2, llama, save_adapter
from conftest import ToyModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import epmq
from epmq.adapters import AdapterSource, open_model
from epmq.errors import SourceError
from epmq.names import NamedForModel
from epmq.sources import DictSource, FileSource

pytest.importorskip("transformers")
pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")  # peft's and transformers' own

ATTENTION = ["q_proj", "v_proj"]
Make = Callable[[], nn.Module]


def saved(model: Any, folder: Path) -> FileSource:
    model.save_pretrained(folder)
    return FileSource(folder)


def assert_equal(source: AdapterSource, expected: dict[str, Tensor], changed: int) -> None:
    """Every tensor as peft has it, and as many changed ones as the adapter has."""
    different = 0
    for key in source.keys():
        ours, base = source.tensor(key), source.base.tensor(key)
        assert ours.dtype == expected[key].dtype == source.dtype(key), key
        assert torch.equal(ours, expected[key]), f"{key}: {(ours.double() - expected[key].double()).abs().max()}"
        different += not torch.equal(ours, base)
    assert different == changed


LLAMA_CASES: dict[str, tuple[dict[str, Any], int]] = {
    "plain": ({"r": 4, "lora_alpha": 6, "target_modules": ATTENTION}, 4),
    "rslora": ({"r": 4, "lora_alpha": 6, "target_modules": ATTENTION, "use_rslora": True}, 4),
    "all linear": ({"r": 2, "lora_alpha": 3, "target_modules": "all-linear"}, 14),
    "patterns": (
        {
            "r": 4,
            "lora_alpha": 6,
            "target_modules": [*ATTENTION, "down_proj"],
            # The first that matches the end of the name counts, also where a later one fits better.
            "rank_pattern": {r"layers\.1\.self_attn\.q_proj": 8, "q_proj": 2, r".*\.1\.mlp\.down_proj": 3},
            "alpha_pattern": {"proj": 5, r"0\..*v_proj": 9, "q_proj": 7, r"^down_proj": 11},
        },
        6,
    ),
    "patterns with rslora": (
        {
            "r": 4,
            "lora_alpha": 6,
            "target_modules": ATTENTION,
            "rank_pattern": {"q_proj": 2},
            "alpha_pattern": {"v_proj": 5},
            "use_rslora": True,
        },
        4,
    ),
    "embeddings": ({"r": 4, "lora_alpha": 6, "target_modules": ["embed_tokens", "q_proj"]}, 3),
    "modules to save": ({"r": 4, "lora_alpha": 6, "target_modules": ATTENTION, "modules_to_save": ["lm_head"]}, 5),
    # peft saves whichever modules' names end so: every norm.
    "norms saved": ({"r": 4, "lora_alpha": 6, "target_modules": ATTENTION, "modules_to_save": ["norm"]}, 9),
    "gaussian start": ({"r": 4, "lora_alpha": 6, "target_modules": ATTENTION, "init_lora_weights": "gaussian"}, 4),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", LLAMA_CASES)
def test_a_llama_with_an_adapter_is_what_peft_merges(case: str, dtype: torch.dtype, tmp_path: Path) -> None:
    settings, changed = LLAMA_CASES[case]
    model = llama(dtype=dtype)
    base = saved(model, tmp_path / "base")
    expected = save_adapter(model, tmp_path / "adapter", **settings)
    assert_equal(AdapterSource(tmp_path / "adapter", base), expected, changed)


def test_float64_stays_float64(tmp_path: Path) -> None:
    model = llama(dtype=torch.float64)
    base = saved(model, tmp_path / "base")
    expected = save_adapter(model, tmp_path / "adapter", target_modules=ATTENTION)
    assert_equal(AdapterSource(tmp_path / "adapter", base), expected, 4)


@pytest.mark.parametrize("targets", [["c_attn"], ["c_proj", "c_fc"], ["c_attn", "wte"]], ids="-".join)
def test_conv1d_weights_are_added_transposed(targets: list[str], tmp_path: Path) -> None:
    model = gpt2()
    base = saved(model, tmp_path / "base")
    expected = save_adapter(model, tmp_path / "adapter", r=4, lora_alpha=6, target_modules=targets)
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["fan_in_fan_out"] is True
    changed = {"c_attn": 2, "c_proj": 4, "c_fc": 2, "wte": 1}
    assert_equal(AdapterSource(tmp_path / "adapter", base), expected, sum(changed[target] for target in targets))


@pytest.mark.parametrize("linear", ["c_attn", "attn.c_proj", "mlp.c_proj"])
def test_each_layer_is_added_the_way_round_that_it_is_stored(linear: str, tmp_path: Path) -> None:
    """peft writes fan_in_fan_out for the layer that it adapted last: here for the output, an nn.Linear."""
    model = gpt2(tied=False)
    base = saved(model, tmp_path / "base")
    expected = save_adapter(model, tmp_path / "adapter", r=4, lora_alpha=6, target_modules=[linear, "lm_head"])
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["fan_in_fan_out"] is False
    assert_equal(AdapterSource(tmp_path / "adapter", base, model), expected, 3)
    in_memory: Any = epmq.merge(model, {"a": tmp_path / "adapter"}, scaling=1.0)
    for name, tensor in in_memory.state_dict().items():
        # Base plus the difference to the base, each rounded once.
        largest = 2 * expected[name].abs().max() + base.tensor(name).abs().max()
        assert float((tensor - expected[name]).abs().max()) <= 2.0**-24 * float(largest), name
    if linear == "attn.c_proj":  # square, and without the module there is nothing that tells
        assert "cannot be told from its square shape" in refusal(tmp_path / "adapter", base)
    else:
        assert_equal(AdapterSource(tmp_path / "adapter", base), expected, 3)


def test_fan_in_fan_out_of_a_base_without_conv1d_is_not_believed(plain: Path, tmp_path: Path) -> None:
    folder = changed(plain, tmp_path / "adapter", fan_in_fan_out=True)
    assert "nor from fan_in_fan_out" in refusal(folder, FileSource(plain / "base"))
    model = llama()
    ours, expected = (AdapterSource(place, FileSource(plain / "base"), model) for place in (folder, plain / "adapter"))
    assert all(torch.equal(ours.tensor(key), expected.tensor(key)) for key in expected.keys())


@pytest.mark.parametrize("tied", [False, True])
def test_embeddings_saved_beside_an_adapter_take_the_bases_place(tied: bool, tmp_path: Path) -> None:
    import peft

    model: Any = llama(tied=tied)
    base = saved(model, tmp_path / "base")
    adapted: Any = peft.get_peft_model(model, peft.LoraConfig(target_modules=ATTENTION, init_lora_weights=False))
    with torch.no_grad():
        adapted.get_input_embeddings().weight.add_(0.1)
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {"base_model.model.model.embed_tokens.weight", "base_model.model.lm_head.weight"} <= set(stored)
    loaded: Any = peft.PeftModel.from_pretrained(llama(tied=tied), tmp_path / "adapter")
    expected = {name: tensor.detach() for name, tensor in loaded.merge_and_unload().state_dict().items()}
    assert_equal(AdapterSource(tmp_path / "adapter", base), expected, 5)


def test_a_tied_embedding_changes_under_all_its_names(tmp_path: Path) -> None:
    model = llama(tied=True)
    expected = save_adapter(model, tmp_path / "adapter", target_modules=["embed_tokens"])
    file = AdapterSource(tmp_path / "adapter", saved(model, tmp_path / "base"))
    assert "lm_head.weight" not in file.keys()
    assert torch.equal(file.tensor("model.embed_tokens.weight"), expected["model.embed_tokens.weight"])
    memory = AdapterSource(tmp_path / "adapter", DictSource(model.state_dict(), "base"))
    for key in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(memory.tensor(key), expected[key])


@pytest.mark.parametrize("where", ["file", "module"])
def test_an_embedding_trained_whole_is_refused_where_peft_unties_it(where: str, tmp_path: Path) -> None:
    model = llama(tied=True)
    base = NamedForModel(saved(model, tmp_path / "base"), model) if where == "file" else DictSource(model.state_dict())
    settings: dict[str, Any] = {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}
    expected = save_adapter(model, tmp_path / "untied", **settings)
    assert not torch.equal(expected["model.embed_tokens.weight"], expected["lm_head.weight"])
    with pytest.raises(SourceError) as caught:
        AdapterSource(tmp_path / "untied", base, model)
    assert "is tied to 'lm_head.weight', and peft leaves the latter as it was; untie the base, or train" in str(
        caught.value
    )
    # What was saved and not changed says nothing of the other.
    path = tmp_path / "untied" / "adapter_model.safetensors"
    embedding = {"base_model.model.model.embed_tokens.weight": base.tensor("model.embed_tokens.weight").clone()}
    save_file({**load_file(path), **embedding}, path)
    AdapterSource(tmp_path / "untied", base, model)
    expected = save_adapter(model, tmp_path / "tied", **settings, ensure_weight_tying=True)
    path = tmp_path / "tied" / "adapter_model.safetensors"
    ours = AdapterSource(tmp_path / "tied", base, model)
    assert_equal(ours, expected, 3 if where == "file" else 4)
    save_file({key: tensor for key, tensor in load_file(path).items() if "lm_head" not in key}, path)
    assert_equal(AdapterSource(tmp_path / "tied", base, model), expected, 3 if where == "file" else 4)


def test_a_base_saved_without_or_with_the_prefix_of_its_class(tmp_path: Path) -> None:
    model: Any = bert_language_model()
    expected = save_adapter(model, tmp_path / "adapter", target_modules=["query", "value"])
    plain = AdapterSource(tmp_path / "adapter", saved(model.bert, tmp_path / "plain"))
    assert "encoder.layer.0.attention.self.query.weight" in plain.keys()
    assert_equal(plain, {key: expected[f"bert.{key}"] for key in plain.keys()}, 4)
    inner: Any = model.bert
    without = save_adapter(inner, tmp_path / "inner", target_modules=["query", "value"])
    full = AdapterSource(tmp_path / "inner", saved(model, tmp_path / "full"))
    key = "encoder.layer.1.attention.self.value.weight"
    assert torch.equal(full.tensor(f"bert.{key}"), without[key])


@pytest.mark.parametrize("known", [True, False])
def test_heads_of_adapters_over_a_bare_base_are_left_out(known: bool, tmp_path: Path) -> None:
    import transformers

    language_model: Any = bert_language_model()
    base = saved(language_model.bert, tmp_path / "base")
    torch.manual_seed(0)
    classifier: Any = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3)
    settings: dict[str, Any] = {"target_modules": ["query", "value"], "task_type": "SEQ_CLS"}
    expected = save_adapter(classifier, tmp_path / "a", **settings)
    bare = language_model.bert
    source = (
        AdapterSource(tmp_path / "a", NamedForModel(base, bare), bare) if known else AdapterSource(tmp_path / "a", base)
    )
    assert_equal(source, {key: expected[f"bert.{key}"] for key in source.keys()}, 4)
    assert [note for note in source.notes if "left out" in note] == [
        f"classifier.{leaf}: in a but not in the model; left out." for leaf in ("bias", "weight")
    ]
    # A base that has a head, or lacks what the adapter has inside the model, is another one.
    other = {f"bert.{key}": base.tensor(key) for key in base.keys()}
    assert "brings 'classifier." in refusal(tmp_path / "a", DictSource(other))
    fewer = {key: base.tensor(key) for key in base.keys() if "layer.1." not in key}
    assert "changes 'bert.encoder.layer.1." in refusal(tmp_path / "a", DictSource(fewer))


def test_merging_adapters_is_merging_the_models_they_stand_for(tmp_path: Path) -> None:
    model = llama()
    saved(model, tmp_path / "base")
    full = {n: save_adapter(model, tmp_path / n, seed, target_modules=ATTENTION) for seed, n in enumerate("ab", 1)}
    adapters = {name: tmp_path / name for name in full}
    by_path: Any = epmq.merge(tmp_path / "base", adapters, scaling=0.4)
    in_memory: Any = epmq.merge(model, adapters, scaling=0.4)
    whole: Any = epmq.merge(model, full, scaling=0.4)
    for key, tensor in whole.state_dict().items():
        assert torch.equal(by_path.tensor(key), tensor)
        assert torch.equal(in_memory.state_dict()[key], tensor)


def test_quantizing_towards_adapters_is_quantizing_towards_their_models(tmp_path: Path) -> None:
    model = llama()
    full = {n: save_adapter(model, tmp_path / n, seed, target_modules=ATTENTION) for seed, n in enumerate("ab", 1)}
    merged = epmq.merge(model, full, scaling=0.4)
    texts = {name: [{"input_ids": torch.randint(0, 48, (4, 10))}] for name in full}
    config = epmq.QuantConfig(group_size=16)
    towards_models = epmq.quantize(merged, full, texts, config).model.state_dict()
    adapters = {name: tmp_path / name for name in full}
    towards_adapters = epmq.quantize(merged, adapters, texts, config, base=model).model.state_dict()
    assert all(torch.equal(towards_adapters[name], tensor) for name, tensor in towards_models.items())
    with pytest.raises(SourceError, match=r"expert 'a': .* is an adapter, which needs the model"):
        epmq.quantize(merged, adapters, texts, config)


def test_no_tensor_is_kept(tmp_path: Path) -> None:
    model = llama()
    save_adapter(model, tmp_path / "adapter", target_modules=ATTENTION)
    source = AdapterSource(tmp_path / "adapter", saved(model, tmp_path / "base"))
    assert all(weakref.ref(source.tensor(key))() is None for key in source.keys())


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    model = llama()
    saved(model, folder / "base")
    save_adapter(model, folder / "adapter", r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])
    return folder


def changed(plain: Path, folder: Path, tensors: dict[str, Tensor | None] | None = None, **config: Any) -> Path:
    """A copy of the plain adapter with other tensors (None: removed) and other settings."""
    folder.mkdir()
    content = json.loads((plain / "adapter" / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**content, **config}))
    stored = {**load_file(plain / "adapter" / "adapter_model.safetensors"), **(tensors or {})}
    save_file({key: t for key, t in stored.items() if t is not None}, folder / "adapter_model.safetensors")
    return folder


def refusal(folder: Path, base: Any) -> str:
    with pytest.raises(SourceError) as caught:
        source = AdapterSource(folder, base)
        for key in source.keys():
            source.tensor(key)
    message = str(caught.value)
    assert str(folder) in message
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ({"use_dora": True}, "use_dora is set to true, which is not supported"),
        ({"lora_bias": True}, "lora_bias is set to true"),
        ({"bias": "lora_only"}, "bias is trained too"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices is set to [1, 2]"),
        ({"target_parameters": ["mlp.gate"]}, "target_parameters is set to"),
        ({"layer_replication": [[0, 2]]}, "layer_replication is set to"),
        ({"use_qalora": True}, "use_qalora is set to"),
        ({"use_bdlora": {"nblocks": 2}}, "use_bdlora is set to"),
        ({"arrow_config": {"top_k": 2}}, "arrow_config is set to"),
        ({"alora_invocation_tokens": [5]}, "alora_invocation_tokens is set to"),
        ({"megatron_config": {"x": 1}}, "megatron_config is set to"),
        ({"key_of_tomorrow": 3}, "key_of_tomorrow is set to 3"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa' changed the base's weights"),
        ({"init_lora_weights": "olora"}, "init_lora_weights 'olora'"),
        ({"init_lora_weights": "corda"}, "init_lora_weights 'corda'"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights 'loftq'"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights 'pissa_niter_4'"),
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA'; only LORA"),
        ({"peft_type": None}, "peft_type is None"),
        ({"r": 8}, "has rank 4, adapter_config.json says 8"),
        ({"r": "four"}, "r: Input should be a valid integer"),
        ({"rank_pattern": {"q_proj": 2}}, "has rank 4, adapter_config.json says 2"),
        ({"rank_pattern": {"(": 2}}, "'(' is not a regular expression"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_a_setting_under_which_the_sum_is_another(
    setting: dict[str, Any], sentence: str, plain: Path, tmp_path: Path
) -> None:
    assert sentence in refusal(changed(plain, tmp_path / "adapter", **setting), FileSource(plain / "base"))


HEAD = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("tensors", "sentence"),
    [
        ({f"{HEAD}.lora_magnitude_vector": torch.ones(32)}, "lora_magnitude_vector' belongs to no kind of LoRA"),
        ({f"{HEAD}.lora_B.bias": torch.ones(32)}, "lora_B.bias' belongs to no kind of LoRA"),
        ({f"{HEAD}.lora_B.weight": None}, f"tensor '{HEAD}.lora_A.weight' has no counterpart"),
        ({f"{HEAD}.lora_A.weight": torch.ones(4, 16)}, "makes a weight of shape [32, 16]"),
        ({f"{HEAD}.lora_A.weight": torch.ones(4, 32, 1, 1)}, "has 4 dimensions"),
        ({f"{HEAD}.lora_A.weight": torch.full((4, 32), float("nan"))}, "holds NaN or Inf"),
        ({f"{HEAD}.base_layer.weight": torch.ones(32, 32)}, "differs from 'model.layers.0.self_attn.q_proj.weight'"),
        ({"base_model.model.lm_head.weight": torch.ones(50, 32)}, "makes a weight of shape [50, 32], but"),
        ({"base_model.model.extra.weight": torch.ones(2)}, "brings 'extra.weight' whole (save_embedding_layers)"),
        ({"lora_A.weight": torch.ones(2)}, "does not begin with 'base_model.model.'"),
        ({"base_model.model.model.layers.7.mlp.up_proj.lora_A.weight": torch.ones(4, 32),
          "base_model.model.model.layers.7.mlp.up_proj.lora_B.weight": torch.ones(48, 4)},
         "the adapter changes 'model.layers.7.mlp.up_proj.weight', which"),
    ],
    ids=["dora", "bias", "half", "shape", "convolution", "nan", "other base", "head", "extra", "foreign", "layer"],
)  # fmt: skip
def test_a_tensor_that_does_not_fit(
    tensors: dict[str, Tensor | None], sentence: str, plain: Path, tmp_path: Path
) -> None:
    assert sentence in refusal(changed(plain, tmp_path / "adapter", tensors), FileSource(plain / "base"))


def test_real_dora_and_bias_adapters_are_refused(tmp_path: Path) -> None:
    model = llama()
    base = saved(model, tmp_path / "base")
    for name in ("use_dora", "lora_bias"):
        save_adapter(model, tmp_path / name, target_modules=["q_proj"], merge=False, **{name: True})
        assert f"{name} is set to true" in refusal(tmp_path / name, base)


def test_an_adapter_of_another_base(plain: Path, tmp_path: Path) -> None:
    message = refusal(plain / "adapter", saved(gpt2(), tmp_path / "gpt2"))
    assert "it was made for another base" in message
    assert f"{tmp_path / 'gpt2'} does not have" in message
    adapted = AdapterSource(plain / "adapter", saved(llama(), tmp_path / "elsewhere" / "copy"))
    assert adapted.notes == []  # peft was given no path, so the adapter names no base
    named = changed(plain, tmp_path / "named", base_model_name_or_path="meta-llama/Llama-3.2-1B")
    (note,) = AdapterSource(named, FileSource(tmp_path / "elsewhere" / "copy")).notes
    assert "the adapter names 'meta-llama/Llama-3.2-1B' as its base; it is applied to" in note
    local = changed(plain, tmp_path / "local", base_model_name_or_path="/home/someone/models/llama")
    (told,) = AdapterSource(local, FileSource(tmp_path / "elsewhere" / "copy")).notes
    assert told == "local: the adapter names 'llama' as its base; it is applied to copy."
    same = changed(plain, tmp_path / "same", base_model_name_or_path="/other/machine/copy")
    assert AdapterSource(same, FileSource(tmp_path / "elsewhere" / "copy")).notes == []


def test_a_module_saved_whole_that_the_base_lacks(tmp_path: Path) -> None:
    import transformers

    model: Any = llama(tied=True)
    base = saved(model, tmp_path / "base")
    save_adapter(model, tmp_path / "tied", target_modules=["q_proj"], modules_to_save=["lm_head"], merge=False)
    assert "brings 'lm_head.weight' whole (modules_to_save)" in refusal(tmp_path / "tied", base)
    classifier: Any = transformers.LlamaForSequenceClassification(model.config)
    save_adapter(classifier, tmp_path / "head", target_modules=["q_proj"], task_type="SEQ_CLS", merge=False)
    assert "brings 'score.weight' whole (modules_to_save)" in refusal(tmp_path / "head", base)


def test_a_folder_that_is_half_an_adapter(plain: Path, tmp_path: Path) -> None:
    folder = changed(plain, tmp_path / "adapter")
    (folder / "adapter_model.safetensors").unlink()
    assert "no adapter_model.safetensors; save the adapter as safetensors" in refusal(
        folder, FileSource(plain / "base")
    )
    (folder / "adapter_config.json").write_text("{")
    assert "adapter_config.json: not a JSON file" in refusal(folder, FileSource(plain / "base"))


def test_an_adapter_needs_a_base(plain: Path) -> None:
    with pytest.raises(SourceError, match=r"expert 'x': .* is an adapter, which needs the model"):
        open_model(plain / "adapter", "expert 'x'")
    with pytest.raises(SourceError, match="is an adapter, not a whole checkpoint"):
        FileSource(plain / "adapter")
    with pytest.raises(SourceError, match="is an adapter"):
        epmq.merge(None, {"a": plain / "adapter"}, method="weighted_average")


def test_an_integer_base_is_refused(plain: Path) -> None:
    tensors = {key: FileSource(plain / "base").tensor(key) for key in FileSource(plain / "base").keys()}
    key = "model.layers.1.self_attn.q_proj.weight"
    message = refusal(plain / "adapter", DictSource({**tensors, key: tensors[key].to(torch.int8)}, "base"))
    assert "is torch.int8; an adapter needs a float base" in message


def test_other_things_are_opened_as_before() -> None:
    model = ToyModel()
    assert open_model(model, "expert").keys() == list(model.state_dict())
    with pytest.raises(SourceError, match="there is no such file or folder"):
        open_model("/nowhere/at/all", "expert 'x'")
