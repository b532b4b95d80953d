"""Merging: the numbers of the released packages, and the promises of MergedSource."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from epmq.errors import ConfigError, EpmqError, NumericalError, SourceError
from epmq.merge import MergedSource, merge
from epmq.merge_config import MergeConfig
from epmq.sources import DictSource, WeightSource

Model = dict[str, Tensor]


def model(a: list[float], b: list[float]) -> Model:
    return {"a": torch.tensor(a, dtype=torch.float32), "b": torch.tensor(b, dtype=torch.float32)}


BASE = model([0.0] * 4, [0.0] * 4)
A = model([4, -3, 2, 1], [0.5, -8, 6, 2])
B = model([-1, -5, 2, 3], [8, 0.25, -6, 1])

MK = {"method": "ties", "dialect": "mergekit"}
PEFT = {"method": "ties", "dialect": "peft"}
FB = {"method": "ties", "dialect": "fusion_bench", "scaling": 1.0}
TA = {"method": "task_arithmetic"}
AVG = {"method": "weighted_average"}


def w(a: float, b: float) -> dict[str, float]:
    return {"A": a, "B": b}


# What mergekit 0.1.5, peft 0.21.2 and fusion_bench 0.2.33 answer for these two experts over a zero base.
# benchmarks/peers/merge.py asks them again.
PACKAGE_NUMBERS: list[tuple[str, dict[str, Any], list[float], list[float]]] = [
    ("mergekit half", MK | {"density": 0.5}, [4, -4, 0, 3], [8, -8, 6, 0]),
    ("mergekit half unnormalized", MK | {"density": 0.5, "normalize": False}, [4, -8, 0, 3], [8, -8, 6, 0]),
    (
        "mergekit half rescaled",
        MK | {"density": 0.5, "rescale": True},
        [5.714286, -5.580357, 0, 4.125],
        [8.714286, -9.428572, 7.071429, 0],
    ),
    ("mergekit equal weights cancel", MK | {"density": 0.5, "weights": w(0.5, 0.5)}, [4, -4, 0, 3], [8, -8, 6, 0]),
    (
        "mergekit equal weights unnormalized",
        MK | {"density": 0.5, "weights": w(0.5, 0.5), "normalize": False},
        [2, -4, 0, 1.5],
        [4, -4, 3, 0],
    ),
    ("mergekit unequal weights", MK | {"density": 0.5, "weights": w(1, 0.25)}, [4, -3.4, 0, 3], [8, -8, 6, 0]),
    (
        "mergekit unequal weights unnormalized",
        MK | {"density": 0.5, "weights": w(1, 0.25), "normalize": False},
        [4, -4.25, 0, 0.75],
        [2, -8, 6, 0],
    ),
    ("mergekit lambda", MK | {"density": 0.5, "scaling": 0.3}, [1.2, -1.2, 0, 0.9], [2.4, -2.4, 1.8, 0]),
    ("mergekit a fifth keeps one", MK | {"density": 0.2}, [4, -5, 0, 0], [8, -8, 0, 0]),
    ("mergekit density by expert", MK | {"density": w(1, 0.2)}, [4, -4, 2, 1], [4.25, -8, 6, 2]),
    ("mergekit everything", MK | {"density": 1.0}, [4, -4, 2, 2], [4.25, -8, 6, 1.5]),
    ("mergekit nothing", MK | {"density": 0.0}, [0, 0, 0, 0], [0, 0, 0, 0]),
    ("mergekit opposed weights", MK | {"weights": w(1, -1)}, [5, -5, 2, 3], [8, -8.25, 12, 2]),
    (
        "mergekit opposed weights unnormalized",
        MK | {"weights": w(1, -1), "normalize": False},
        [5, 5, 2, -3],
        [-8, -8.25, 12, 2],
    ),
    ("peft half", PEFT | {"density": 0.5}, [4, -4, 0, 3], [8, -8, 6, 0]),
    ("peft equal weights", PEFT | {"density": 0.5, "weights": w(0.5, 0.5)}, [2, -2, 0, 1.5], [4, -4, 3, 0]),
    ("peft unequal weights", PEFT | {"density": 0.5, "weights": w(1, 0.25)}, [4, -2.125, 0, 0.75], [2, -8, 6, 0]),
    ("peft a fifth keeps none", PEFT | {"density": 0.2}, [0, 0, 0, 0], [0, 0, 0, 0]),
    ("peft everything", PEFT | {"density": 1.0}, [4, -4, 2, 2], [4.25, -8, 6, 1.5]),
    ("peft opposed weights", PEFT | {"density": 1.0, "weights": w(1, -1)}, [4, 1, 0, -1], [-3.75, -8, 6, 0.5]),
    ("fusion_bench sum", FB | {"density": 50.0}, [4, -8, 4, 3], [8, -8, 6, 2]),
    ("fusion_bench fraction", FB | {"density": 0.5}, [4, -8, 4, 3], [8, -8, 6, 2]),
    ("fusion_bench mean", FB | {"density": 50.0, "merge_func": "mean"}, [4, -4, 2, 3], [8, -8, 6, 2]),
    ("fusion_bench max", FB | {"density": 50.0, "merge_func": "max"}, [4, -5, 2, 3], [8, -8, 6, 2]),
    ("fusion_bench scaled", FB | {"density": 50.0, "scaling": 0.3}, [1.2, -2.4, 1.2, 0.9], [2.4, -2.4, 1.8, 0.6]),
    ("fusion_bench 20 percent", FB | {"density": 20.0}, [0, 0, 0, 0], [8, -8, -6, 0]),
    ("fusion_bench 25 percent", FB | {"density": 25.0}, [4, -5, 0, 0], [8, -8, -6, 0]),
    ("fusion_bench 99 percent", FB | {"density": 99.0}, [4, -8, 4, 4], [8.5, -8, 6, 3]),
    ("task arithmetic weights", TA | {"weights": w(0.5, 0.5), "scaling": 1.0}, [1.5, -4, 2, 2], [4.25, -3.875, 0, 1.5]),
    ("task arithmetic scaling", TA | {"scaling": 0.5}, [1.5, -4, 2, 2], [4.25, -3.875, 0, 1.5]),
    (
        "task arithmetic both",
        TA | {"weights": w(0.5, 0.5), "scaling": 0.3},
        [0.45, -1.2, 0.6, 0.6],
        [1.275, -1.1625, 0, 0.45],
    ),
    ("task arithmetic default", {}, [0.9, -2.4, 1.2, 1.2], [2.55, -2.325, 0, 0.9]),
    (
        "task arithmetic normalized",
        TA | {"weights": w(1, 3), "scaling": 1.0, "normalize": True},
        [0.25, -4.5, 2, 2.5],
        [6.125, -1.8125, -3, 1.25],
    ),
    (
        "task arithmetic weights that cancel are not divided by",
        TA | {"weights": w(1, -1), "scaling": 1.0, "normalize": True},
        [5, 2, 0, -2],
        [-7.5, -8.25, 12, 1],
    ),
    (
        "average",
        AVG | {"weights": w(0.5, 0.25)},
        [2.333333, -3.666667, 2, 1.666667],
        [3, -5.25, 2, 1.666667],
    ),
    (
        "average unnormalized",
        AVG | {"weights": w(0.5, 0.25), "normalize": False},
        [1.75, -2.75, 1.5, 1.25],
        [2.25, -3.9375, 1.5, 1.25],
    ),
    ("average with the base", AVG | {"base_weight": 2.0}, [0.75, -2, 1, 1], [2.125, -1.9375, 0, 0.75]),
]


def merged(base: Model | None, experts: dict[str, Model], **settings: Any) -> MergedSource:
    sources = {name: DictSource(expert, name) for name, expert in experts.items()}
    return MergedSource(None if base is None else DictSource(base, "base"), sources, MergeConfig.read(settings))


def tensors(source: MergedSource) -> Model:
    return {key: source.tensor(key) for key in source.keys()}


@pytest.mark.parametrize(
    ("settings", "a", "b"), [case[1:] for case in PACKAGE_NUMBERS], ids=[case[0] for case in PACKAGE_NUMBERS]
)
def test_numbers_of_the_packages(settings: dict[str, Any], a: list[float], b: list[float]) -> None:
    source = merged(BASE, {"A": A, "B": B}, **settings)
    torch.testing.assert_close(tensors(source), model(a, b), rtol=0, atol=1e-6)


OVER_A_BASE = [case for case in PACKAGE_NUMBERS if case[1].get("method") != "weighted_average"]


@pytest.mark.parametrize(
    ("settings", "a", "b"), [case[1:] for case in OVER_A_BASE], ids=[case[0] for case in OVER_A_BASE]
)
def test_only_differences_from_the_base_count(settings: dict[str, Any], a: list[float], b: list[float]) -> None:
    shift = {"a": torch.tensor([8.0, -2.0, 1.0, 0.5]), "b": torch.tensor([-4.0, 16.0, 0.25, 2.0])}
    moved = [{key: tensor + shift[key] for key, tensor in expert.items()} for expert in (A, B)]
    source = merged(shift, {"A": moved[0], "B": moved[1]}, **settings)
    difference = {key: tensor - shift[key] for key, tensor in tensors(source).items()}
    torch.testing.assert_close(difference, model(a, b), rtol=0, atol=2e-6)


@pytest.mark.parametrize(("density", "mergekit", "peft", "fusion_bench"), [(0.5, 2, 2, 3), (0.3, 1, 1, 2)])
def test_kept_count_of_five(density: float, mergekit: int, peft: int, fusion_bench: int) -> None:
    five = {"a": torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0])}
    for dialect, kept in (("mergekit", mergekit), ("peft", peft), ("fusion_bench", fusion_bench)):
        source = merged({"a": torch.zeros(5)}, {"x": five}, method="ties", dialect=dialect, density=density)
        assert int(source.tensor("a").count_nonzero()) == kept, dialect


def test_integer_buffer_shifts_the_global_trim_only() -> None:
    buffer = {"ids": torch.arange(3)}
    for settings, b in ((FB | {"density": 50.0}, [8, -8, 6, 3]), (MK | {"density": 0.5}, [8, -8, 6, 0])):
        source = merged(BASE | buffer, {"A": A | buffer, "B": B | buffer}, **settings)
        assert source.tensor("b").tolist() == b
        assert source.tensor("ids").equal(torch.arange(3))
        assert source.dtype("ids") == torch.int64


@pytest.mark.parametrize(
    ("rest", "elected"),
    [([1.0, 1.0], 5.0), ([-1.0, -1.0], -5.0), ([1.0, -1.0], -5.0)],
    ids=["model mostly plus", "model mostly minus", "undecided: minus"],
)
def test_zero_sum_takes_the_sign_of_the_whole_model(rest: list[float], elected: float) -> None:
    base = {"x": torch.zeros(1), "rest": torch.zeros(2)}
    experts = {
        "A": {"x": torch.tensor([5.0]), "rest": torch.tensor(rest)},
        "B": {"x": torch.tensor([-5.0]), "rest": torch.tensor(rest)},
    }
    for merge_func in ("sum", "mean", "max"):
        source = merged(base, experts, **FB, density=99.0, merge_func=merge_func)
        expected = 0.0 if merge_func == "max" and sum(rest) == 0 else elected
        assert source.tensor("x").tolist() == [expected], merge_func


def test_peft_frequency_counts_signs() -> None:
    experts = {"A": {"x": torch.tensor([9.0])}, "B": {"x": torch.tensor([-1.0])}, "C": {"x": torch.tensor([-2.0])}}
    base = {"x": torch.zeros(1)}
    assert merged(base, experts, **PEFT, density=1.0).tensor("x").item() == 9
    assert merged(base, experts, **PEFT, density=1.0, election="frequency").tensor("x").item() == -1.5


# -- properties ----------------------------------------------------------------------------------------------------


def fusion_bench_whole(base: Model, experts: list[Model], density: float, merge_func: str) -> Model:
    """The dialect by its definition, on the concatenated model; deltas only."""
    keys = sorted(base)
    deltas = torch.stack([torch.cat([(e[k].float() - base[k].float()).reshape(-1) for k in keys]) for e in experts])
    n = deltas.shape[1]
    limits = deltas.abs().kthvalue(n - int(n * density), dim=1, keepdim=True).values
    deltas[deltas.abs() < limits] = 0
    sign = deltas.sum(dim=0).sign()
    sign[sign == 0] = sign.sum().sign()
    result = torch.zeros(n)
    for i in range(n):
        agreeing = [float(d) for d in deltas[:, i] if (d > 0 if sign[i] > 0 else d < 0)]
        if agreeing:
            total = sum(agreeing)
            largest = float(sign[i]) * max(abs(value) for value in agreeing)
            result[i] = {"sum": total, "mean": total / len(agreeing), "max": largest}[merge_func]
    sizes = [base[key].numel() for key in keys]
    return {k: part.reshape(base[k].shape) for k, part in zip(keys, result.split(sizes), strict=True)}  # type: ignore[no-untyped-call]


@hypothesis.settings(deadline=None)
@given(
    st.integers(0, 2**31),
    st.integers(1, 4),
    st.sampled_from([0.0, 0.2, 0.37, 0.5, 0.9, 0.999]),
    st.sampled_from(["sum", "mean", "max"]),
    st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
)
def test_streamed_fusion_bench_is_the_concatenated_one(
    seed: int, count: int, density: float, merge_func: str, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"z": (3, 4), "a": (5,), "scalar": (), "m.weight": (2, 3, 2)}

    def small_integers() -> Model:  # many ties, many sums of zero
        return {k: torch.randint(-3, 4, shape, generator=generator).to(dtype) for k, shape in shapes.items()}

    base = small_integers() | {"ids": torch.arange(4), "none": torch.zeros(0, 2)}
    experts = [base | small_integers() for _ in range(count)]
    named = {f"e{i}": expert for i, expert in enumerate(experts)}
    source = merged(base, named, **FB, density=density, merge_func=merge_func)
    expected = fusion_bench_whole(base, experts, density, merge_func)
    for key in shapes:
        got = source.tensor_uncast(key) - base[key].float()
        torch.testing.assert_close(got, expected[key], rtol=0, atol=1e-5)


@hypothesis.settings(deadline=None)
@given(st.sampled_from([MK, PEFT | {"density": 1.0}, FB | {"density": 99.9999}, TA | {"scaling": 1.0}, AVG]))
def test_one_expert_whole_is_the_expert(settings: dict[str, Any]) -> None:
    source = merged(BASE, {"A": A}, **settings)
    assert source.tensor("a").equal(A["a"])
    assert source.tensor("b").equal(A["b"])


# -- dtypes -------------------------------------------------------------------------------------------------------

ALL_METHODS = [
    pytest.param(TA, id="task_arithmetic"),
    pytest.param(AVG, id="weighted_average"),
    pytest.param(MK | {"density": 0.4}, id="mergekit"),
    pytest.param(PEFT | {"density": 0.4}, id="peft"),
    pytest.param(FB | {"density": 40.0}, id="fusion_bench"),
]


def random_models(count: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Model]:
    torch.manual_seed(seed)
    shapes = {"x.weight": (7, 5), "x.bias": (7,), "norm": (5,)}
    base = {key: torch.randn(shape, dtype=torch.float64) for key, shape in shapes.items()}
    deltas = [{k: 0.1 * torch.randn_like(v) for k, v in base.items()} for _ in range(count)]
    models = [base, *({k: v + delta[k] for k, v in base.items()} for delta in deltas)]
    return [{k: v.to(dtype) for k, v in one.items()} for one in models]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("settings", ALL_METHODS)
def test_computed_in_float32_and_cast_once(settings: dict[str, Any], dtype: torch.dtype) -> None:
    base, a, b = random_models(2, dtype)
    source = merged(base, {"A": a, "B": b}, **settings)
    wide = [{k: v.float() for k, v in one.items()} for one in (base, a, b)]
    exact = merged(wide[0], {"A": wide[1], "B": wide[2]}, **settings)
    for key in base:
        assert source.tensor(key).dtype == dtype == source.dtype(key)
        assert source.tensor_uncast(key).dtype == torch.float32
        assert source.tensor_uncast(key).equal(exact.tensor(key))
        assert source.tensor(key).equal(exact.tensor(key).to(dtype))
        assert source.tensor(key, torch.float64).equal(exact.tensor(key).double())


@pytest.mark.parametrize("settings", ALL_METHODS)
def test_float64_stays_float64(settings: dict[str, Any]) -> None:
    base, a, b = random_models(2, torch.float64)
    source = merged(base, {"A": a, "B": b}, **settings)
    exact = source.tensor_uncast("x.weight")
    assert exact.dtype == torch.float64
    assert not exact.equal(exact.float().double())


@pytest.mark.parametrize("settings", ALL_METHODS)
def test_inputs_of_different_dtypes_give_the_dtype_of_the_base(settings: dict[str, Any]) -> None:
    base, a, b = random_models(2)
    halves = {k: v.half() for k, v in base.items()}
    source = merged(halves, {"A": {k: v.bfloat16() for k, v in a.items()}, "B": b}, **settings)
    assert all(tensor.dtype == torch.float16 for tensor in tensors(source).values())
    assert source.tensor_uncast("norm").dtype == torch.float32


def test_result_outside_the_dtype_is_refused() -> None:
    base, far = {"x": torch.zeros(2, dtype=torch.float16)}, {"x": torch.full((2,), 60000.0, dtype=torch.float16)}
    source = merged(base, {"A": far, "B": far}, scaling=1.0)
    with pytest.raises(NumericalError, match=r"'x' leaves the range of torch\.float16"):
        source.tensor("x")
    assert source.tensor("x", torch.float32).tolist() == [120000.0, 120000.0]
    with pytest.raises(ConfigError, match="int8 cannot hold tensor 'x'"):
        source.tensor("x", torch.int8)
    with pytest.raises(NumericalError, match=r"'x' leaves the range of torch\.float32"):
        merged(base, {"A": far}, scaling=1e38).tensor_uncast("x")


# -- one tensor at a time -----------------------------------------------------------------------------------------


class WatchedSource:
    """Hands out copies, and notes how many of them are alive at once."""

    def __init__(self, tensors: Model):
        self._source = DictSource(tensors, "watched")
        self.reads: list[str] = []
        self.alive = self.most_alive = 0
        self.name = "watched"

    def keys(self) -> list[str]:
        return self._source.keys()

    def shape(self, key: str) -> tuple[int, ...]:
        return self._source.shape(key)

    def dtype(self, key: str) -> torch.dtype:
        return self._source.dtype(key)

    def tensor(self, key: str) -> Tensor:
        tensor = self._source.tensor(key).clone()
        self.reads.append(key)
        self.alive += 1
        self.most_alive = max(self.most_alive, self.alive)
        weakref.finalize(tensor, self._gone)
        return tensor

    def _gone(self) -> None:
        self.alive -= 1


@pytest.mark.parametrize("settings", ALL_METHODS)
def test_reads_one_tensor_of_each_model_at_a_time(settings: dict[str, Any]) -> None:
    watched = [WatchedSource(one | {"ids": torch.arange(3)}) for one in random_models(3)]
    experts: dict[str, WeightSource] = {f"e{i}": source for i, source in enumerate(watched[1:])}
    source = MergedSource(watched[0], experts, MergeConfig.read(settings))
    assert all(not one.reads for one in watched), "nothing is read before it is asked for"
    tensors(source)
    passes = 3 if settings.get("dialect") == "fusion_bench" else 0
    for one in watched:
        skipped = one is watched[0] and settings["method"] == "weighted_average"
        floats = 0 if skipped else 1 + passes
        assert [one.reads.count(key) for key in ("x.weight", "x.bias", "norm")] == [floats] * 3
        assert one.reads.count("ids") == (0 if skipped else 1)
        assert one.most_alive == (0 if skipped else 1)
        assert one.alive == 0


@pytest.mark.parametrize("settings", ALL_METHODS)
def test_result_belongs_to_the_caller_and_inputs_stay(settings: dict[str, Any]) -> None:
    models = [one | {"ids": torch.arange(3)} for one in random_models(2)]
    before = [{k: v.clone() for k, v in one.items()} for one in models]
    source = merged(models[0], {"A": models[1], "B": models[2]}, **settings)
    for tensor in tensors(source).values():
        tensor.zero_()
    for one, was in zip(models, before, strict=True):
        assert all(one[key].equal(was[key]) for key in one)


# -- files and modules --------------------------------------------------------------------------------------------


def test_files_and_folders_are_merged_as_state_dicts_are(tmp_path: Path) -> None:
    base, a, b = random_models(2)
    for name, one in (("base", base), ("a", a), ("b", b)):
        (tmp_path / name).mkdir()
        save_file(one, tmp_path / name / "model.safetensors")
    experts = {"A": tmp_path / "a", "B": str(tmp_path / "b" / "model.safetensors")}
    from_files = merge(tmp_path / "base", experts, method="ties", dialect="fusion_bench")
    assert isinstance(from_files, MergedSource)
    in_memory = merge(base, {"A": a, "B": b}, method="ties", dialect="fusion_bench")
    torch.testing.assert_close(tensors(from_files), tensors(in_memory), rtol=0, atol=0)
    assert from_files.name == f"ties of A, B over {tmp_path / 'base'}"


class Tied(nn.Module):
    def __init__(self, tie: bool = True):
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.head = nn.Linear(4, 6, bias=False)
        self.norm = nn.BatchNorm1d(4)
        if tie:
            self.head.weight = self.embed.weight


def test_modules_give_a_new_module_and_stay_as_they_are() -> None:
    torch.manual_seed(0)
    base, a, b = (Tied().to(torch.bfloat16) for _ in range(3))
    base.eval()
    before = [{k: v.clone() for k, v in one.state_dict().items()} for one in (base, a, b)]
    result = merge(base, {"A": a, "B": b})
    assert isinstance(result, Tied)
    assert not result.training
    assert result.head.weight is result.embed.weight
    assert all(parameter.requires_grad for parameter in result.parameters())
    for key, tensor in result.state_dict().items():
        was, of_a, of_b = (state[key].float() for state in before)
        expected = was + 0.3 * ((of_a - was) + (of_b - was))
        torch.testing.assert_close(tensor, expected.to(tensor.dtype), rtol=1e-2, atol=1e-2)
        assert tensor.dtype == before[0][key].dtype
    assert not result.embed.weight.equal(base.embed.weight)
    for one, state in zip((base, a, b), before, strict=True):
        torch.testing.assert_close(dict(one.state_dict()), state, rtol=0, atol=0)


def test_a_tie_that_an_expert_has_broken_is_refused() -> None:
    torch.manual_seed(0)
    with pytest.raises(SourceError, match=r"'embed\.weight' and 'head\.weight' are one tied parameter"):
        merge(Tied(), {"A": Tied(tie=False)})


# -- bad input ----------------------------------------------------------------------------------------------------


def bad_experts() -> list[Any]:
    nan, inf = A["a"].clone(), A["a"].clone()
    nan[1], inf[0] = float("nan"), float("-inf")
    return [
        pytest.param({"A": A, "B": A | {"b": torch.zeros(2, 2)}}, "expert 'B'.*'b' has shape", id="shape"),
        pytest.param({"A": A, "B": {"a": A["a"]}}, "expert 'B'.*lacks tensor 'b'", id="missing"),
        pytest.param({"A": A | {"c": A["a"]}, "B": A}, "expert 'A'.*extra tensor 'c'", id="extra"),
        pytest.param({"A": A, "B": A | {"a": nan}}, "tensor 'a' holds NaN or Inf", id="nan"),
        pytest.param({"A": A | {"a": inf}, "B": A}, "tensor 'a' holds NaN or Inf", id="inf"),
        pytest.param({"A": A, "B": A | {"a": torch.arange(4)}}, "'a' is float in some inputs.*int64", id="kind"),
    ]


@pytest.mark.parametrize("settings", ALL_METHODS)
@pytest.mark.parametrize(("experts", "sentence"), bad_experts())
def test_experts_that_do_not_fit(experts: dict[str, Model], sentence: str, settings: dict[str, Any]) -> None:
    with pytest.raises(SourceError, match=sentence):
        tensors(merge(BASE, experts, **settings))


@pytest.mark.parametrize("settings", ALL_METHODS)
@pytest.mark.parametrize(
    "other", [torch.tensor([0, 9]), torch.tensor([0, 1], dtype=torch.int32)], ids=["value", "dtype"]
)
def test_unequal_integers_are_refused(other: Tensor, settings: dict[str, Any]) -> None:
    ids = {"ids": torch.arange(2)}
    source = merge(BASE | ids, {"A": A | ids, "B": B | {"ids": other}}, **settings)
    with pytest.raises(SourceError, match=r"'ids' \(torch\.int64\) differs between .* and B"):
        source.tensor("ids")


def test_nan_in_the_base_is_refused() -> None:
    with pytest.raises(SourceError, match="base: tensor 'a' holds NaN or Inf"):
        merge(BASE | {"a": torch.full((4,), float("nan"))}, {"A": A}).tensor("a")


def test_average_needs_no_base_but_the_others_do() -> None:
    source = merge(None, {"A": A, "B": B}, method="weighted_average")
    assert isinstance(source, MergedSource)
    assert source.tensor("a").tolist() == [1.5, -4, 2, 2]
    needing: list[dict[str, Any]] = [TA, MK, AVG | {"base_weight": 1.0}]
    for settings in needing:
        with pytest.raises(ConfigError, match="needs a base"):
            merge(None, {"A": A, "B": B}, **settings)


def test_experts_must_be_named() -> None:
    with pytest.raises(ConfigError, match="no expert"):
        merge(BASE, {})
    with pytest.raises(ConfigError, match="experts must map a name to each expert, got a list"):
        merge(BASE, [A, B])  # type: ignore[call-overload]
    with pytest.raises(EpmqError, match="expected a path, a module or a state dict, got int"):
        merge(BASE, {"A": 3})
