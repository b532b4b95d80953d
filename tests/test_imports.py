"""Imports go down: each module knows only those below it, which this list names."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "epmq"

# From the ground up. Modules of one line know nothing of each other.
ORDER: list[tuple[str, ...]] = [
    ("errors", "fused", "quantized", "ties", "console", "memory", "orientation", "origins", "rows", "unread"),
    (
        "experts",
        "trust",
        "patterns",
        "gradient",
        "self_saving",
        "staging",
        "page.markup",
        "page.numbers",
        "page.layout",
    ),
    ("extension", "devices"),
    ("onednn",),
    ("precision",),
    ("settings", "schedules", "hub", "files", "sources", "data", "world", "calls"),
    ("blocks", "inputs"),
    ("ahead",),
    ("runner", "renames"),
    ("computed", "initial"),
    ("reference", "blocked", "pieces", "names", "texts"),
    ("triton_forms",),
    (
        "config",
        "merge_config",
        "adapters",
        "ops",
        "streams",
        "skeleton",
        "inside",
        "reuse",
        "huggingface",
        "evaluate",
        "norms",
        "trial",
    ),
    ("deviations",),
    ("grids", "formats.shards", "perplexity", "common", "heads"),
    ("merge", "mergekit", "statistics", "report", "augment", "shelf", "estimate"),
    ("features", "tuning_state"),
    ("solve", "distill", "recipe", "states", "card", "formats.statistics"),
    ("page.charts", "page.heat", "fingerprint", "progress"),
    ("page.sections",),
    ("page.document",),
    ("sweep",),
    ("group", "linear"),
    ("stacks", "diagnose", "bench", "surroundings", "swap"),
    ("placement",),
    ("walk",),
    ("visit",),
    ("gather",),
    ("formats.packed",),
    ("formats.native", "formats.compressed_tensors", "formats.gptq", "formats.gguf"),
    ("formats.kinds", "joining"),
    ("engine", "collected"),
    ("pipeline",),
    ("api",),
    ("__init__",),
    ("jobs", "compare", "environment", "scoring"),
    ("demo", "gguf_jobs", "merge_jobs", "statistics_jobs", "language", "papers.settings"),
    ("harness", "papers.hub", "papers.checkpoints"),
    ("papers.clip", "papers.glue", "papers.causal"),
    ("papers.run", "ending"),
    ("cli",),
    ("__main__",),
]
LEVEL = {name: level for level, names in enumerate(ORDER) for name in names}
# What the ground may use of the outside; transformers, rich and the like are met further up.
HEAVY = {"transformers", "peft", "huggingface_hub", "sklearn", "matplotlib", "triton", "lm_eval"}


def module_names() -> list[str]:
    files = [path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py") if "kernels" not in path.parts]
    return sorted(".".join(path.with_suffix("").parts) for path in files)


def path_of(name: str) -> Path:
    return PACKAGE / (name.replace(".", "/") + ".py")


def imported(name: str) -> list[str]:
    """Modules of this package that a module's import statements name, those inside functions included."""
    found = []
    for node in ast.walk(ast.parse(path_of(name).read_text())):
        if isinstance(node, ast.Import):
            wanted = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: relative import in line {node.lineno}"
            base = node.module or ""
            wanted = [f"{base}.{alias.name}" for alias in node.names]
            wanted = [w if path_of(w.removeprefix("epmq.")).is_file() else base for w in wanted]
        else:
            continue
        for what in wanted:
            if what == "epmq":
                found.append("__init__")
            elif what.startswith("epmq."):
                found.append(what.removeprefix("epmq."))
    return found


def test_every_module_has_its_place() -> None:
    empty = [name for name in module_names() if not path_of(name).read_text().strip()]
    assert sorted(LEVEL) == sorted(set(module_names()) - set(empty))


@pytest.mark.parametrize("name", [name for name in module_names() if name in LEVEL])
def test_imports_go_down(name: str) -> None:
    for other in imported(name):
        if other.startswith("kernels.") or other == "_C":
            continue
        assert other in LEVEL, f"{name} imports {other}, which has no place in the order"
        assert LEVEL[other] < LEVEL[name], f"{name} imports {other}, which is not below it"


@pytest.mark.parametrize("name", module_names())
def test_optional_packages_are_imported_where_they_are_used(name: str) -> None:
    for node in ast.parse(path_of(name).read_text()).body:
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        for what in names:
            assert what.split(".")[0] not in HEAVY, f"{name} imports {what} when it is loaded"
