"""Compare merging with mergekit, peft and fusion_bench, whichever of them this environment has.

Run inside a peer's environment (see README.md here). Prints a line per case; exits with 1 on any disagreement and with
2 if there is no peer to compare with.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
import io
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from merge_files import compare_adapters, compare_yaml
from torch import Tensor, nn

from epmq.merge import merge

Model = dict[str, Tensor]
Settings = dict[str, Any]
TOLERANCE = 1e-6
NAMES = ("A", "B", "C")


class Trio(NamedTuple):
    """A base and its experts."""

    base: Model
    experts: dict[str, Model]


# -- models -----------------------------------------------------------------------------------------------------------


def worked_example() -> Trio:
    """The eight entries for which tests/test_merge.py has the peers' numbers written down."""
    a = {"a": torch.tensor([4.0, -3, 2, 1]), "b": torch.tensor([0.5, -8, 6, 2])}
    b = {"a": torch.tensor([-1.0, -5, 2, 3]), "b": torch.tensor([8, 0.25, -6, 1])}
    return Trio({key: torch.zeros(4) for key in a}, {"A": a, "B": b})


SHAPES = {"embed": (50, 16), "proj": (16, 24), "bias": (24,), "norm": (1,), "conv": (3, 4, 2, 2)}


def random_floats(dtype: torch.dtype, buffer: bool) -> Trio:
    """Three experts with no two equal magnitudes; optionally an integer buffer, as position ids are."""
    torch.manual_seed(7)
    base = {key: torch.randn(shape, dtype=torch.float64) for key, shape in SHAPES.items()}
    ids = {"ids": torch.arange(100)} if buffer else {}
    experts = {
        name: {key: (tensor + 0.1 * torch.randn_like(tensor)).to(dtype) for key, tensor in base.items()} | ids
        for name in NAMES
    }
    return Trio({key: tensor.to(dtype) for key, tensor in base.items()} | ids, experts)


def small_integers(dtype: torch.dtype, count: int = 3) -> Trio:
    """Experts of integers between -3 and 3: ties everywhere, many sums of zero, exact in every float dtype."""
    torch.manual_seed(11)

    def one() -> Model:
        integers = {key: torch.randint(-3, 4, shape).to(dtype) for key, shape in SHAPES.items()}
        return integers | {"ids": torch.arange(5)}

    return Trio(one(), {name: one() for name in NAMES[:count]})


def undecided(extra: float) -> Trio:
    """Sums of zero in a model whose elected signs cancel too, but for `extra`."""
    base = {"x": torch.zeros(4), "y": torch.zeros(3)}
    a = {"x": torch.tensor([5.0, -4, 3, 2]), "y": torch.tensor([1.0, -1, extra])}
    b = {"x": torch.tensor([-5.0, 4, -3, -2]), "y": torch.tensor([1.0, -1, extra])}
    return Trio(base, {"A": a, "B": b})


MODELS: dict[str, Callable[[], Trio]] = {
    "worked example": worked_example,
    "float32": lambda: random_floats(torch.float32, buffer=False),
    "float32 with integer buffer": lambda: random_floats(torch.float32, buffer=True),
    "float64": lambda: random_floats(torch.float64, buffer=False),
    "float32 small integers": lambda: small_integers(torch.float32),
    "bfloat16 small integers, 2 experts": lambda: small_integers(torch.bfloat16, count=2),
    "float16 small integers, 2 experts": lambda: small_integers(torch.float16, count=2),
    "undecided": lambda: undecided(0.0),
    "undecided but for one plus": lambda: undecided(1.0),
    "undecided but for one minus": lambda: undecided(-1.0),
}


# -- peers: models and our settings in, the peer's merged state dict out ----------------------------------------------


def mergekit(models: Trio, settings: Settings) -> Model:
    merge_state_dicts = importlib.import_module("mergekit.merge_methods").merge_state_dicts
    method = {"weighted_average": "linear"}.get(settings["method"], settings["method"])
    weights = {name: settings.get("weights", {}).get(name, 1.0) for name in models.experts}
    inputs = dict(models.experts)
    if method != "linear" or "base_weight" in settings:
        inputs = {"base": models.base} | inputs
    if "base_weight" in settings:
        weights = {"base": settings["base_weight"]} | weights
    named = {"scaling": "lambda", "density": "density", "normalize": "normalize", "rescale": "rescale"}
    parameters = {theirs: settings[ours] for ours, theirs in named.items() if ours in settings}
    merged: Model = merge_state_dicts(
        inputs, method, parameters={"weight": weights} | parameters, base=None if method == "linear" else "base"
    )
    return merged


def peft(models: Trio, settings: Settings) -> Model:
    merge_utils = importlib.import_module("peft.utils.merge_utils")
    weights = torch.tensor([settings.get("weights", {}).get(name, 1.0) for name in models.experts])
    merged = {}
    for key, base in models.base.items():
        if not base.is_floating_point():
            merged[key] = base
            continue
        deltas = [expert[key] - base for expert in models.experts.values()]
        if settings["method"] == "ties":
            election = settings.get("election", "total")
            mixed = merge_utils.ties(deltas, weights.to(base.dtype), settings["density"], election)
            # peft divides by a float32 count, so that half-precision deltas come back as float32.
            merged[key] = base + mixed.to(base.dtype)
        else:
            merged[key] = base + settings["scaling"] * merge_utils.task_arithmetic(deltas, weights.to(base.dtype))
    return merged


class Holder(nn.Module):
    """A state dict as a module: float tensors are parameters, the others buffers."""

    def __init__(self, tensors: Model):
        super().__init__()
        for key, tensor in tensors.items():
            if tensor.is_floating_point():
                self.register_parameter(key, nn.Parameter(tensor.clone()))
            else:
                self.register_buffer(key, tensor.clone())


def fusion_bench(models: Trio, settings: Settings) -> Model:
    method = importlib.import_module("fusion_bench.method")
    if settings["method"] == "ties":
        algorithm = method.TiesMergingAlgorithm(
            scaling_factor=settings["scaling"],
            threshold=settings["density"],
            remove_keys=[],
            merge_func=settings.get("merge_func", "sum"),
        )
    elif settings["method"] == "task_arithmetic":
        algorithm = method.TaskArithmeticAlgorithm(scaling_factor=settings["scaling"])
    else:
        algorithm = method.SimpleAverageAlgorithm(inplace=False)
    pool = {"_pretrained_": models.base} | models.experts
    result: nn.Module = algorithm.run({name: Holder(tensors) for name, tensors in pool.items()})
    return dict(result.state_dict())


PEERS: dict[str, Callable[[Trio, Settings], Model]] = {
    "mergekit": mergekit,
    "peft": peft,
    "fusion_bench": fusion_bench,
}

# Comparisons on model folders, which need transformers as well.
FILES: dict[str, Callable[[], tuple[int, int]]] = {"mergekit": compare_yaml, "peft": compare_adapters}

# -- cases ------------------------------------------------------------------------------------------------------------


def settings_of(peer: str) -> Iterator[Settings]:
    """Every setting this peer shares with us, in plain and in odd values."""
    unequal = {"weights": {"A": 1.0, "B": 0.25, "C": -0.5}}
    opposed = {"weights": {"A": 1.0, "B": -1.0, "C": 0.5}}
    if peer == "mergekit":
        for scaling in (0.3, 1.0):
            yield {"method": "task_arithmetic", "scaling": scaling}
        yield {"method": "task_arithmetic", "scaling": 0.5, "normalize": True} | unequal
        yield {"method": "weighted_average"}
        yield {"method": "weighted_average"} | unequal
        yield {"method": "weighted_average", "normalize": False} | unequal
        yield {"method": "weighted_average", "base_weight": 2.0} | unequal
        for density in (1.0, 0.5, 0.2, 0.037, 0.0):
            yield {"method": "ties", "density": density}
            yield {"method": "ties", "density": density, "normalize": False, "scaling": 0.3} | unequal
            yield {"method": "ties", "density": density, "rescale": True} | opposed
        yield {"method": "ties", "density": {"A": 0.9, "B": 0.1, "C": 0.5}}
    elif peer == "peft":
        yield {"method": "task_arithmetic", "scaling": 0.3}
        yield {"method": "task_arithmetic", "scaling": 1.0} | unequal
        for density in (1.0, 0.5, 0.2, 0.037, 0.0):
            yield {"method": "ties", "density": density}
            yield {"method": "ties", "density": density} | unequal
            yield {"method": "ties", "density": density, "election": "frequency"} | opposed
    else:
        yield {"method": "task_arithmetic", "scaling": 0.3}
        yield {"method": "weighted_average"}
        for density in (99.0, 0.99, 80.0, 50.0, 20.0, 0.2, 3.7, 0.0):
            for merge_func in ("sum", "mean", "max"):
                yield {"method": "ties", "density": density, "scaling": 0.3, "merge_func": merge_func}
        for merge_func in ("sum", "mean", "max"):
            yield {"method": "ties", "density": 50.0, "scaling": 1.0, "merge_func": merge_func}


def comparable(peer: str, model: str, settings: Settings) -> bool:
    """Whether the two sides mean the same thing here; README.md has the reasons where they do not."""
    densities = settings.get("density", 1.0)
    trims = not isinstance(densities, float) or 0 < densities < 1
    ties_at_the_limit = "small integers" in model or "undecided" in model
    if ties_at_the_limit and trims and peer != "fusion_bench":
        return False
    return "float16" not in model or settings.get("scaling", 1.0) == 1.0


def for_experts(settings: Settings, experts: dict[str, Model]) -> Settings:
    """The settings without the names that this model has no expert for."""
    return {
        key: {name: number for name, number in value.items() if name in experts} if isinstance(value, dict) else value
        for key, value in settings.items()
    }


def worst(theirs: Model, ours: Model) -> tuple[float, str]:
    """The largest difference, relative above 1, and the tensor it is in."""
    if set(theirs) != set(ours):
        return float("inf"), f"names differ: {sorted(set(theirs) ^ set(ours))}"
    found = (0.0, "-")
    for key, tensor in ours.items():
        if theirs[key].dtype != tensor.dtype or theirs[key].shape != tensor.shape:
            return float("inf"), f"{key}: {theirs[key].dtype} {tuple(theirs[key].shape)}"
        a, b = theirs[key].detach().double(), tensor.double()
        difference = ((a - b).abs() / b.abs().clamp(min=1)).max().item()
        # Written so that a NaN counts as a difference.
        if not difference <= found[0]:
            found = (difference, key)
    return found


def compare(peer: str) -> tuple[int, int]:
    """Cases compared and cases in disagreement; prints a line per model, and each disagreement."""
    total = failures = 0
    for model, make in MODELS.items():
        cases, largest = 0, 0.0
        for wanted in settings_of(peer):
            if not comparable(peer, model, wanted):
                continue
            models = make()
            settings = for_experts(wanted, models.experts)
            with contextlib.redirect_stdout(io.StringIO()):
                theirs = PEERS[peer](make(), settings)
            dialect = {"dialect": peer} if settings["method"] == "ties" else {}
            source = merge(models.base, models.experts, **settings, **dialect)
            difference, where = worst(theirs, {key: source.tensor(key) for key in models.base})
            cases += 1
            largest = max(largest, difference)
            if not difference <= TOLERANCE:
                failures += 1
                print(f"  DISAGREES  {peer}, {model}, {settings}: {difference:.3g} in {where}")
        total += cases
        print(f"{peer:13}{model:36}{cases:>6}{largest:>14.2e}")
    return total, failures


def main() -> int:
    # The peers import hub clients; nothing here needs a network.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    torch.set_num_threads(1)
    # peft warns that a density of 1 prunes nothing, which is what these cases ask for.
    warnings.filterwarnings("ignore", message="The density 1.0")
    total = failures = 0
    print(f"{'peer':13}{'model':36}{'cases':>6}{'largest diff':>14}")
    present = []
    for peer in PEERS:
        if importlib.util.find_spec(peer) is None:
            print(f"{peer:13}absent from this environment: not compared")
            continue
        present.append(f"{peer} {importlib.metadata.version(peer)}")
        cases, disagreeing = compare(peer)
        total, failures = total + cases, failures + disagreeing
        files = FILES.get(peer)
        if files is not None:
            cases, disagreeing = files()
            total, failures = total + cases, failures + disagreeing
    if not present:
        print("There is no peer in this environment; see benchmarks/peers/README.md.")
        return 2
    print(f"{', '.join(present)}: {total} cases, {failures} in disagreement (tolerance {TOLERANCE:g})")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
