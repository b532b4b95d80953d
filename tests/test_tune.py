"""How a product is cut: what is chosen for a shape, what is kept on disk, and ``epmq tune`` without a GPU."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from epmq.cli import app
from epmq.errors import ConfigError
from epmq.kernels import tune
from epmq.kernels.tune import Config, Key

ROOT = Path(__file__).parents[1]
SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024}
LAYERS = [(6144, 4096), (4096, 14336), (57344, 8192), (1024, 1024), (40, 70), (64, 128), (1000, 100_000)]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("EPMQ_CACHE", str(tmp_path))
    forget()
    yield tmp_path / "int4.json"
    forget()


def forget() -> None:
    tune.cached.cache_clear()
    tune.choose.cache_clear()
    tune.chosen.cache_clear()


def key(tokens: int = 8, arch: int = 90, layer: tuple[int, int] = (4096, 4096), group: int = 128) -> Key:
    return Key(arch, 132, *layer, tokens, group, "fp16")


@pytest.mark.parametrize("arch", [80, 86, 90, 100, 120])
@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_every_choice_is_a_tile_that_the_gates_compile(layer: tuple[int, int], arch: int) -> None:
    for tokens in tune.BUCKETS:
        config = tune.default(key(tokens, arch, layer))
        if config.two_stages:
            assert tokens >= tune.TWO_STAGES_FROM
            continue
        tiles = [(s.block_m, s.block_n, s.warps, s.stages, s.joined) for s in tune.shapes(arch)]
        assert (config.block_m, config.block_n, config.warps, config.stages, config.joined) in tiles
        blocks = -(-layer[1] // 128)
        assert 1 <= config.split_k <= 16
        assert config.split_k == 1 or blocks // config.split_k >= tune.SHORTEST_PART
        assert config.block_n <= -(-layer[0] // 64) * 64


def test_small_batches_are_split_until_the_gpu_is_full() -> None:
    # 32 tiles of 128 rows: 128 programs for 132 multiprocessors. With 448 they are full anyway.
    assert tune.default(key(8)).split_k == 4
    assert tune.default(key(8, layer=(57344, 8192))).split_k == 1


@pytest.mark.parametrize(
    ("layer", "tokens", "tile", "parts"),
    [
        ((8192, 8192), 32, (32, 128), 4), ((8192, 8192), 64, (64, 128), 4),
        ((8192, 8192), 128, (128, 64), 2), ((8192, 8192), 512, (128, 128), 1), ((8192, 8192), 1024, (128, 128), 1),
        ((4096, 4096), 8, (8, 128), 4), ((4096, 4096), 16, (16, 64), 4), ((4096, 4096), 64, (64, 64), 4),
        ((4096, 4096), 128, (128, 64), 4), ((4096, 4096), 1024, (128, 128), 1), ((28672, 4096), 8, (8, 128), 1),
    ],
)  # fmt: skip
def test_the_choice_is_what_was_fastest_on_an_h200(
    layer: tuple[int, int], tokens: int, tile: tuple[int, int], parts: int
) -> None:
    """Of all tiles and parts that were timed there (benchmarks/results/nvidia-h200/int4.json)."""
    config = tune.default(key(tokens, layer=layer))
    assert ((config.block_m, config.block_n), config.split_k) == (tile, parts)


def test_the_tokens_of_a_tile_hold_the_bucket() -> None:
    assert [tune.default(key(tokens)).block_m for tokens in (8, 16, 32, 64, 128)] == [8, 16, 32, 64, 128]
    assert [tune.default(key(tokens, 80)).block_m for tokens in (8, 16, 32, 64, 128)] == [8, 16, 32, 64, 64]


@pytest.mark.parametrize(("tokens", "wanted"), [(1, 8), (8, 8), (9, 16), (8192, 8192), (100_000, 8192)])
def test_buckets(tokens: int, wanted: int) -> None:
    assert tune.bucket(tokens) == wanted


@pytest.mark.parametrize(("version", "joined"), [("3.6.0+git1234", False), ("3.9.0", True), ("4.0.1.post2", True)])
def test_tiles_of_8_tokens_follow_triton(version: str, joined: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its own version: a distribution of another name may have brought it."""
    monkeypatch.setattr(pytest.importorskip("triton"), "__version__", version)
    assert tune.joins.__wrapped__(90, 8) == joined
    assert tune.joins.__wrapped__(90, 16) and not tune.joins.__wrapped__(80, 16)


def test_the_fixed_choice_does_not_know_the_tokens() -> None:
    assert len({tune.fixed(key(tokens)) for tokens in tune.BUCKETS}) == 1


def test_the_fastest_candidate_is_kept_and_chosen(cache: Path) -> None:
    wanted = tune.candidates(key(64))[3]
    found = tune.tune([key(64)], lambda _, config: 1.0 if config == wanted else 2.0)
    assert found == {key(64): wanted}
    assert tune.choose(key(64)) == tune.default(key(64)) != wanted
    assert tune.store(found) == cache
    assert tune.choose(key(64)) == wanted
    tune.store({key(16): wanted})
    assert tune.choose(key(64)) == tune.choose(key(16)) == wanted
    assert set(json.loads(cache.read_text())) == {key(64).text(), key(16).text()}


def test_the_fastest_with_parts_are_timed_in_one_launch_too(cache: Path) -> None:
    times = tune.timed(key(16), lambda _, config: 1.0 / config.split_k if not config.one_launch else 0.5)
    ones = [config for config in times if config.one_launch]
    plain = [config for config in times if not config.one_launch]
    assert plain == tune.candidates(key(16)) and len(ones) == tune.FINALISTS
    fastest = sorted(plain, key=lambda config: -config.split_k)[: tune.FINALISTS]
    assert [replace(config, one_launch=False) for config in ones] == fastest
    best = min(tune.candidates(key(16)), key=lambda config: -config.split_k)
    found = tune.tune([key(16)], lambda _, config: 1.0 - config.one_launch if config.split_k == best.split_k else 2.0)
    assert found == {key(16): replace(best, one_launch=True)}
    tune.store(found)
    assert tune.choose(key(16)) == found[key(16)]


def test_among_equals_the_default_stays() -> None:
    assert tune.tune([key(16)], lambda *_: 1.0) == {key(16): tune.default(key(16))}


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("tokens", tune.BUCKETS)
def test_candidates_are_different_and_fit(tokens: int, arch: int) -> None:
    found = tune.candidates(key(tokens, arch))
    assert found[0] == tune.default(key(tokens, arch))
    assert len(set(found)) == len(found) > 1
    assert sum(config.two_stages for config in found) == 1


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("group", [0, 32, 64, 128])
def test_of_tiles_that_are_only_tried_three_fit_on_a_multiprocessor(group: int, dtype: str) -> None:
    """By shared memory, counted as the layout has it; registers are the compiler's, which the gates look at."""
    for shape in tune.trials(90, group, dtype):
        words, x = shape.block_n * 64, shape.block_m * 256
        grid = 4 * shape.block_n * (128 // group if group else 0)
        # The compiler holds a stage less of the weights, which go through registers.
        shared = shape.stages * x + (shape.stages - 1) * (words + grid)
        assert 3 * (shared + 1024) <= 228 * 1024
        assert 0 <= shape.registers <= 65536 // (3 * 32 * shape.warps)
        tried = {
            config.split_k
            for config in tune.candidates(replace(key(64), group_size=group, dtype=dtype))
            if replace(config, split_k=1) == shape
        }
        assert 1 in tried and len(tried) > 1
    assert tune.trials(80, group, dtype) == tune.trials(120, group, dtype) == []


@pytest.mark.parametrize("text", ["{", "[1]", '{"a": {"tile": 1}}', '{"a": 3}'])
def test_a_foreign_cache_is_refused_by_name(text: str, cache: Path) -> None:
    cache.write_text(text)
    with pytest.raises(ConfigError, match=r"int4\.json.*delete it"):
        tune.choose(key())


def test_shipped_values_come_before_the_default(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "SHIPPED", {(90, 132): {(4096, 4096): {8: (8, 64, 2)}}})
    chosen = tune.choose(key())
    assert (chosen.block_m, chosen.block_n, chosen.split_k) == (8, 64, 2)
    assert not cache.exists()
    for other in (key(16), key(arch=80), key(layer=(4096, 8192)), key(group=32)):
        assert tune.choose(other) == tune.default(other)


def test_every_entry_of_the_table_names_a_tile() -> None:
    for (arch, processors), layers in tune.SHIPPED.items():
        for layer, cuts in layers.items():
            for tokens, cut in cuts.items():
                found = tune.shipped(Key(arch, processors, *layer, tokens, 128, "fp16"))
                assert found is not None and found.split_k == cut[2]


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("arch", [80, 90])
def test_the_table_can_say_every_way_that_is_timed(
    arch: int, dtype: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for tokens in tune.BUCKETS:
        wanted = replace(key(tokens, arch), dtype=dtype)
        for config in tune.candidates(wanted):
            for way in {config, replace(config, one_launch=config.split_k > 1)}:
                entry = {(4096, 4096): {tokens: tuple(tune.as_cut(way, wanted))}}
                monkeypatch.setattr(tune, "SHIPPED", {(arch, 132): entry})
                assert tune.shipped(wanted) == way


def test_a_trial_that_bf16_has_not_is_not_chosen_for_it(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "SHIPPED", {(90, 132): {(4096, 4096): {64: (64, 128, 5, True)}}})
    assert tune.choose(key(64)).registers == 168
    narrow = replace(key(64), dtype="bf16")
    tune.choose.cache_clear()
    assert tune.choose(narrow) == tune.default(narrow)


def test_shipped_values_are_the_fastest_of_those_that_were_timed() -> None:
    """benchmarks/results holds the times; a tile there is told as 16x128 w4 s3 p7j."""
    timed = json.loads((ROOT / "benchmarks/results/nvidia-h200/int4.json").read_text())["products"]
    seen = set()
    for product in timed:
        wanted = tune.SHIPPED[90, 132][product["N"], product["K"]].get(max(8, product["M"]))
        if wanted is None:
            assert product["times"][0][0] == "two" and product["M"] >= tune.TWO_STAGES_FROM
            continue
        seen.add((product["N"], product["K"], max(8, product["M"])))
        stages = {(s.block_m, s.block_n): s.stages for s in tune.shapes(90)}
        tile = f"{wanted[0]}x{wanted[1]} w4 s{stages[wanted[:2]]} p{wanted[2]}"
        best = next(name for name, _ in product["times"] if name.removesuffix("j") in every_tile(stages))
        assert best.removesuffix("j") == tile
    assert len(seen) == sum(map(len, tune.SHIPPED[90, 132].values()))


def test_lines_of_the_shipped_table_are_the_fastest_ways() -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    from gpu import shipped
    from gpu.int4_products import told

    def row(tokens: int, fastest: Config) -> dict[str, Any]:
        wanted = key(tokens, layer=(8192, 8192))
        times: dict[str, float | None] = {told(config): 9.0 for config in tune.candidates(wanted)}
        times[told(tune.candidates(wanted)[-1])] = None  # failed
        return {"N": 8192, "K": 8192, "M": tokens, "all µs": {**times, told(fastest): 8.0}}

    first, thirds = tune.default(key(8, layer=(8192, 8192))), tune.trials(90, 128, "fp16")[2]
    rows = [
        row(8, replace(first, one_launch=True)),
        row(64, replace(thirds, split_k=1)),
        row(128, tune.default(key(128, layer=(8192, 8192)))),
        row(1024, tune.TWO_STAGES),
    ]
    items: dict[str, Any] = {f"tiles llama-3-70b o M={found['M']}": {"rows": [found]} for found in rows}
    items["tiles cut off"] = {"rows": [row(512, first)], "error": "begun, and never ended"}
    items["tiles wrong"] = {"rows": [{**row(256, first), "failed": "other bits than in two launches"}]}
    with pytest.raises(SystemExit, match="no product that part tiles has timed"):
        shipped.lines({"items": {"tiles cut off": items["tiles cut off"]}}, 90, 132)
    assert shipped.lines({"items": {**items, "int4 llama-3-70b o M=8": {"rows": [{"N": 1}]}}}, 90, 132) == [
        "(8192, 8192): {8: (8, 128, 3, False, True), 64: (64, 128, 1, True), 1024: (0, 0, 1)},"
    ]


def every_tile(stages: dict[tuple[int, int], int]) -> set[str]:
    return {f"{m}x{n} w4 s{depth} p{parts}" for (m, n), depth in stages.items() for parts in range(1, 33)}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to tune on")
def test_tuning_without_a_gpu_is_one_sentence() -> None:
    result = CliRunner().invoke(app, ["tune", "--shape", "4096x4096"])
    assert isinstance(result.exception, ConfigError)
    assert str(result.exception) == "epmq tune times kernels on an NVIDIA GPU, and torch sees none here."


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["--shape", "4096"], "--shape 4096"),
        (["--shape", "0x5"], "--shape 0x5"),
        (["--shape", "64x512", "--group-size", "48"], "--group-size 48"),
        (["--shape", "64x512", "--tokens", "0"], "--tokens"),
    ],
)
def test_bad_arguments_of_tune_are_named(arguments: list[str], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        CliRunner().invoke(app, ["tune", *arguments], catch_exceptions=False)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_tuning_on_a_gpu(cache: Path) -> None:
    result = CliRunner().invoke(app, ["tune", "--shape", "1024x1024", "--tokens", "1"], catch_exceptions=False)
    assert result.exit_code == 0
    assert len(json.loads(cache.read_text())) == 1
