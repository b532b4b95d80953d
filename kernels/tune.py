"""Which tile sizes the int4 product runs with: tuned values where there are some, else arithmetic on the shape.

Three places are asked in turn: a cache on disk that ``epmq tune`` writes (``EPMQ_CACHE``, default ``~/.cache/epmq``),
the table ``SHIPPED``, and :func:`default`. Nothing is ever tuned behind a caller's back.
"""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from epmq.errors import ConfigError
from epmq.files import write_text
from epmq.kernels.layout import TILE_COLUMNS, TILE_ROWS, kernel_group, padded

BUCKETS = (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
DTYPE_NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16"}
# From this bucket on, dequantizing once and multiplying with cuBLAS is as fast: on an H200 402 us against 401 for
# 2048 tokens by 8192 x 8192, 1531 against 1657 for 8192.
TWO_STAGES_FROM = 2048
FINALISTS = 4  # of the candidates with several parts, which :func:`timed` also times in one launch
SHORTEST_PART = 4  # blocks of 128 columns: less leaves the pipeline no time to fill
# Fitted to 132 times on an H200 (benchmarks/results/nvidia-h200/int4.json), 10 % off in the mean: microseconds for a
# step of 128 columns, by tokens and rows of the tile, of one of two programs that share a multiprocessor; how much
# longer one alone takes, and one of 8 tokens, which waits for memory; steps that a program's start takes; microseconds
# of summing parts, and of each part; bytes a second, in 1e12, at which parts are written and read.
STEP = {
    (8, 64): 0.178, (8, 128): 0.265, (16, 64): 0.186, (16, 128): 0.284, (32, 64): 0.216, (32, 128): 0.35,
    (64, 64): 0.293, (64, 128): 0.479, (128, 64): 0.439, (128, 128): 0.779,
}  # fmt: skip
ALONE, ALONE_OF_8, FILLING, SUMMING, PART, SUM_RATE = 1.34, 1.05, 1, 1.0, 0.076, 4.66


@dataclass(frozen=True)
class Config:
    """How one product is cut: tokens and rows of a tile, parts of the columns, warps, stages, operand form.

    joined: one product of 128 columns a step instead of four of 32. two_stages: dequantize, then cuBLAS; the other
    fields are then unused. registers: the most that a thread may have, 0 for as many as the compiler takes.
    one_launch: parts are summed by the program of a tile that ends last, not by a second launch; no GPU has timed it.
    """

    block_m: int
    block_n: int
    split_k: int
    warps: int
    stages: int
    joined: bool
    two_stages: bool = False
    registers: int = 0
    one_launch: bool = False

    def options(self) -> dict[str, Any]:
        """What Triton compiles a tile with."""
        most = {"maxnreg": self.registers} if self.registers else {}
        return {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": False, **most}


TWO_STAGES = Config(0, 0, 1, 0, 0, False, two_stages=True)


@dataclass(frozen=True)
class Key:
    """What a configuration was tuned for. tokens is the bucket's upper end."""

    arch: int
    processors: int
    out_features: int
    in_features: int
    tokens: int
    group_size: int
    dtype: str

    def text(self) -> str:
        """The key as written in the cache."""
        return ",".join(str(value) for value in asdict(self).values())


class Cut(NamedTuple):
    """A configuration as ``SHIPPED`` has it: what :func:`shapes` and :func:`trials` know of a tile is not repeated.

    A tile of no tokens stands for dequantizing, then cuBLAS.
    """

    block_m: int
    block_n: int
    split_k: int
    trial: bool = False  # one of :func:`trials`
    one_launch: bool = False


# Timed on named GPUs, by compute capability and multiprocessors, output and input features, and bucket of tokens: the
# fastest way, as arguments of :class:`Cut`. Groups of 128 in fp16; bf16 takes as many instructions. Those with 132 are
# an H200's, with Triton 3.6 (benchmarks/results/nvidia-h200/int4.json). ``benchmarks/gpu/shipped.py`` prints lines for
# this table from what ``make gpu`` measured.
SHIPPED: dict[tuple[int, int], dict[tuple[int, int], dict[int, tuple[Any, ...]]]] = {
    (90, 132): {
        (8192, 8192): {
            8: (8, 128, 4), 16: (16, 128, 7), 32: (32, 128, 4), 64: (64, 128, 4), 128: (128, 64, 2),
            256: (128, 128, 2), 512: (128, 128, 1), 1024: (128, 128, 1), 2048: (128, 128, 1),
        },
        (4096, 4096): {
            8: (8, 128, 4), 16: (16, 64, 4), 64: (64, 64, 4), 128: (128, 64, 4), 256: (128, 128, 4),
            1024: (128, 128, 1),
        },
        (28672, 4096): {8: (8, 128, 1)},
    },
}  # fmt: skip


def bucket(tokens: int) -> int:
    """The smallest bucket that holds ``tokens``; the largest one holds all above it."""
    return next((size for size in BUCKETS if tokens <= size), BUCKETS[-1])


@functools.lru_cache(maxsize=4096)
def choose(key: Key) -> Config:
    """The configuration for a key: from the cache on disk, the shipped table, or :func:`default`."""
    return cached().get(key.text()) or shipped(key) or default(key)


@functools.lru_cache(maxsize=16384)
def chosen(
    device: torch.device, out_features: int, in_features: int, tokens: int, group_size: int, dtype: torch.dtype
) -> Config:
    """:func:`choose` for a product on a device, without making its key at each call."""
    return choose(device_key(device, out_features, in_features, tokens, group_size, dtype))


def shipped(key: Key) -> Config | None:
    """What ``SHIPPED`` has for a key."""
    layer = SHIPPED.get((key.arch, key.processors), {}).get((key.out_features, key.in_features), {})
    if key.group_size != 128 or key.tokens not in layer:
        return None
    cut = Cut(*layer[key.tokens])
    if cut.block_m == 0:
        return TWO_STAGES
    known = trials(key.arch, key.group_size, key.dtype) if cut.trial else shapes(key.arch)
    tiles = {(shape.block_m, shape.block_n): shape for shape in known}
    tile = tiles.get((cut.block_m, cut.block_n))  # bf16 lacks one of the trials
    return tile and replace(tile, split_k=cut.split_k, one_launch=cut.one_launch)


def as_cut(config: Config, key: Key) -> Cut:
    """The entry of ``SHIPPED`` from which :func:`shipped` makes this configuration again."""
    trial = replace(config, split_k=1, one_launch=False) in trials(key.arch, key.group_size, key.dtype)
    return Cut(config.block_m, config.block_n, config.split_k, trial, config.one_launch)


@functools.lru_cache(maxsize=4096)
def fixed(key: Key) -> Config:
    """The batch-invariant configuration: the same for any number of tokens, so that a row keeps its bits."""
    return default(Key(**{**asdict(key), "tokens": 64}))


def default(key: Key) -> Config:
    """The configuration that should take least, from the shape alone (docs/kernels.md says how that is reckoned)."""
    if key.tokens >= TWO_STAGES_FROM:
        return TWO_STAGES
    return min((with_parts(shape, key) for shape in fitting(key)), key=lambda config: estimate(config, key))


def fitting(key: Key) -> list[Config]:
    """Tiles for a key's tokens and rows, without their number of parts: none that is mostly empty or far too small."""
    rows = padded(key.out_features, TILE_ROWS)
    tiles = [shape for shape in shapes(key.arch, key.group_size) if shape.block_n <= rows]
    least = min(key.tokens, max(shape.block_m for shape in tiles))
    found = [shape for shape in tiles if least <= shape.block_m < 2 * least]
    return found or [shape for shape in tiles if shape.block_m == 8]


def with_parts(shape: Config, key: Key) -> Config:
    """``shape`` with the number of parts that should take least."""
    blocks = padded(key.in_features, TILE_COLUMNS) // TILE_COLUMNS
    cuts = [replace(shape, split_k=parts) for parts in range(1, max(1, min(16, blocks // SHORTEST_PART)) + 1)]
    return min(cuts, key=lambda config: estimate(config, key))


def estimate(config: Config, key: Key) -> float:
    """Microseconds of a product, but for what all take, on a GPU such as that of ``STEP``: to fill the multiprocessors
    with two programs each as often as is needed, and what several parts cost."""
    rows, blocks = padded(key.out_features, TILE_ROWS), padded(key.in_features, TILE_COLUMNS) // TILE_COLUMNS
    programs = -(-rows // config.block_n) * -(-key.tokens // config.block_m) * config.split_k
    full, rest = divmod(programs, 2 * key.processors)
    turns: float = 2 * full + (0 if rest == 0 else ALONE if rest <= key.processors else 2)
    if config.block_m == 8:  # bound by memory, which programs that end early leave to others
        turns = max(ALONE_OF_8, programs / key.processors)
    steps = -(-blocks // config.split_k) + FILLING
    sums = SUMMING + config.split_k * (PART + 8e-6 * key.tokens * rows / SUM_RATE) if config.split_k > 1 else 0.0
    taken: float = turns * steps * STEP[config.block_m, config.block_n] + sums
    return taken


def has_wgmma(arch: int) -> bool:
    """Whether this is sm_90, the one generation with wgmma; tiles for sm_80 run on all others."""
    return 90 <= arch < 100


@functools.cache
def joins(arch: int, block_m: int) -> bool:
    """Whether one product of 128 columns a step is the better operand: where the tensor instruction is wgmma.

    For tiles of 8 tokens that depends on Triton: 3.6 compiles them to mma, 3.9 to wgmma.
    """
    import triton  # which a distribution of another name may have brought

    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    return has_wgmma(arch) and (block_m >= 16 or version >= (3, 9))


def candidates(key: Key) -> list[Config]:
    """Configurations worth timing for a key, the default first."""
    found = [default(key), TWO_STAGES]
    blocks = padded(key.in_features, TILE_COLUMNS) // TILE_COLUMNS
    tried = trials(key.arch, key.group_size, key.dtype)
    for shape in shapes(key.arch, key.group_size) + tried:
        if shape.block_n > padded(key.out_features, TILE_ROWS) or shape.block_m > max(8, 2 * key.tokens):
            continue
        if shape.block_m < 64 and key.tokens > 4 * shape.block_m:
            continue
        best = with_parts(shape, key).split_k
        parts = {1, best - 1, best, best + 1, best // 2, 2 * best}
        if shape in tried:  # three programs a multiprocessor take half as many parts more
            parts = {1, best, 3 * best // 2, (3 * best + 1) // 2}
        found += [replace(shape, split_k=count) for count in sorted(parts) if 1 <= count <= max(1, blocks // 2)]
    return list(dict.fromkeys(found))


def shapes(arch: int, group_size: int = 128) -> list[Config]:
    """Every tile that is chosen untimed on an architecture, without its number of parts; ``make gates`` compiles all.

    group_size: as the kernels count it, 0 for the whole row.
    """
    if has_wgmma(arch):
        # Two programs of four warps share a multiprocessor: one's products hide the other's dequantization.
        stages = {
            (8, 64): 4, (8, 128): 4, (16, 64): 4, (16, 128): 3, (32, 64): 4, (32, 128): 4, (64, 64): 4, (64, 128): 4,
            (128, 64): 3, (128, 128): 3,
        }  # fmt: skip
        if group_size in (32, 64):
            del stages[128, 128]  # the groups' words leave no room for two
        return [Config(m, n, 1, 4, depth, joins(arch, m)) for (m, n), depth in stages.items()]
    # 32 and 64 by 64 spill on sm_80.
    tiles = ((8, 64, 4), (8, 128, 4), (16, 64, 4), (16, 128, 4), (32, 128, 4), (64, 128, 3))
    return [Config(m, n, 1, 4, depth, False) for m, n, depth in tiles]


def trials(arch: int, group_size: int, dtype: str) -> list[Config]:
    """Tiles that only :func:`candidates` and ``SHIPPED`` may have: three programs share a multiprocessor, which have a
    stage less each and, where the compiler would take more, a third of its registers. No GPU has timed them yet.

    group_size: as the kernels count it, 0 for the whole row. dtype: ``fp16`` or ``bf16``.
    """
    if not has_wgmma(arch):
        return []
    found = {(32, 128): (3, 168), (64, 64): (3, 0), (64, 128): (3, 168), (128, 64): (2, 0)}
    if dtype == "bf16" or group_size in (32, 64):
        del found[64, 128]  # spills
    return [Config(m, n, 1, 4, depth, True, registers=most) for (m, n), (depth, most) in found.items()]


# ---- the cache on disk -----------------------------------------------------------------------------------------------


def cache_file() -> Path:
    """Where ``epmq tune`` writes."""
    return Path(os.environ.get("EPMQ_CACHE") or Path.home() / ".cache" / "epmq") / "int4.json"


@functools.lru_cache(maxsize=1)
def cached() -> dict[str, Config]:
    """What was tuned on this machine, by the text of its key. Raises ConfigError for a file that is not ours."""
    path = cache_file()
    if not path.is_file():
        return {}
    try:
        return {key: Config(**fields) for key, fields in json.loads(path.read_text()).items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path}: not a file of tuned configurations ({error}); delete it.") from error


def store(found: dict[Key, Config]) -> Path:
    """Add tuned configurations to the cache; returns its path."""
    merged = {**cached(), **{key.text(): config for key, config in found.items()}}
    write_text(cache_file(), json.dumps({key: asdict(config) for key, config in merged.items()}, indent=1))
    cached.cache_clear()
    choose.cache_clear()
    chosen.cache_clear()
    return cache_file()


# ---- tuning ----------------------------------------------------------------------------------------------------------


def timed(key: Key, milliseconds: Callable[[Key, Config], float]) -> dict[Config, float]:
    """Times of all candidates, the default's first, and of the fastest with several parts also in one launch."""
    times = {config: milliseconds(key, config) for config in candidates(key)}
    several = [config for config in sorted(times, key=lambda config: times[config]) if config.split_k > 1]
    for config in several[:FINALISTS]:
        one = replace(config, one_launch=True)
        times[one] = milliseconds(key, one)
    return times


def tune(keys: Iterable[Key], milliseconds: Callable[[Key, Config], float]) -> dict[Key, Config]:
    """The fastest configuration of each key by ``milliseconds``; one that is not faster leaves the default."""
    best = {}
    for key in keys:
        times = timed(key, milliseconds)
        best[key] = min(times, key=lambda config: times[config])
    return best


def tune_command(shapes: Iterable[str], tokens: Iterable[int], group_size: int, dtype: str) -> list[str]:
    """``epmq tune``: lines that tell what was found. Raises ConfigError for bad arguments and without a GPU."""
    layers = []
    for text in shapes:
        if not re.fullmatch(r"[1-9]\d*x[1-9]\d*", text):
            raise ConfigError(f"--shape {text}: write output by input features, such as 4096x14336.")
        rows, columns = map(int, text.split("x"))
        if kernel_group(group_size, columns) is None:
            raise ConfigError(f"--group-size {group_size}: use 32, 64, a multiple of 128, or -1 for the whole row.")
        layers.append((rows, columns))
    if any(count < 1 for count in tokens):
        raise ConfigError("--tokens: use positive numbers.")
    if not torch.cuda.is_available():
        raise ConfigError("epmq tune times kernels on an NVIDIA GPU, and torch sees none here.")
    from epmq.kernels.timing import tune_on_gpu

    narrow = next(kind for kind, name in DTYPE_NAMES.items() if name == dtype)
    found = tune_on_gpu(layers, tokens, group_size, narrow)
    return [f"{key.text()}: {config}" for key, config in found.items()] + [f"kept in {cache_file()}"]


def device_key(
    device: torch.device, out_features: int, in_features: int, tokens: int, group_size: int, dtype: torch.dtype
) -> Key:
    """The key of a product on a device; a CPU, where kernels are interpreted, counts as a small sm_90."""
    arch, processors = device_facts(device)
    return Key(arch, processors, out_features, in_features, bucket(tokens), group_size, DTYPE_NAMES[dtype])


@functools.lru_cache(maxsize=64)
def device_facts(device: torch.device) -> tuple[int, int]:
    """Compute capability times ten, and the number of multiprocessors."""
    if device.type != "cuda":
        return 90, 4
    properties = torch.cuda.get_device_properties(device)
    return 10 * properties.major + properties.minor, properties.multi_processor_count
