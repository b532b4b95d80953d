"""What the suite measures, by part: every item's name, shape and function."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from gpu import int4_products, second_moments, solver, whole_block
from gpu.int4_products import LAYERS, TOKENS
from gpu.setting import Row, Setting

PARTS = ("int4", "launch", "gram", "gptq", "product", "block", "tiles")
LAUNCHED = ("llama-3-8b o", "clip-vit-l fc2")
TILED = {
    **dict.fromkeys(
        ("llama-3-8b o", "llama-3-8b gate+up", "llama-3-70b o", "clip-vit-l fc1"), (8, 16, 64, 256, 1024, 2048)
    ),
    **dict.fromkeys(("llama-3-8b qkv", "llama-3-8b down", "llama-3-70b qkv", "llama-3-70b down"), (8, 16)),
}
SWEEPS = ((4096, 4096), (14336, 4096), (4096, 14336))
GRAMS = ((32768, 4096, 0), (32768, 14336, 0), (32768, 4096, 4096), (32768, 14336, 4096))


def items(setting: Setting) -> dict[str, Callable[[], Iterator[Row]]]:
    """Every item by name, in the order they are run; a name begins with its part."""
    made: dict[str, Callable[[], Iterator[Row]]] = {}
    for layer, (rows, columns) in LAYERS.items():
        for tokens in TOKENS:
            item = partial(int4_products.int4, setting, layer, rows, columns, tokens)
            made[f"int4 {layer} {rows}x{columns} M={tokens}"] = item
    for layer in LAUNCHED:
        made[f"launch {layer}"] = partial(int4_products.launch, setting, layer, *LAYERS[layer])
    for count, columns, targets in GRAMS:
        name = f"gram {count} tokens K={columns}" + (f" P={targets}" if targets else "")
        made[name] = partial(second_moments.gram, setting, count, columns, targets)
    for rows, columns in SWEEPS:
        made[f"gptq {rows}x{columns}"] = partial(solver.gptq, setting, rows, columns)
        made[f"product {rows}x{columns}"] = partial(solver.product, setting, rows, columns)
    for forward in ("bfloat16", "float32"):
        made[f"block llama-3-8b, eight experts, {forward}"] = partial(whole_block.block, setting, forward)
    for layer, numbers in TILED.items():
        for tokens in numbers:
            made[f"tiles {layer} M={tokens}"] = partial(int4_products.tiles, setting, layer, *LAYERS[layer], tokens)
    return made
