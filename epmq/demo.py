"""The demo: a small vision transformer, four experts on turned, flipped and inverted digits, merged and quantized.

The images ship with scikit-learn. Everything is made here, in about a minute, and is the same for the same seed.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from epmq import files
from epmq.api import QuantResult, quantize, write_result
from epmq.compare import METHODS, Comparison
from epmq.config import preset
from epmq.console import progress_bar
from epmq.errors import ConfigError
from epmq.evaluate import row
from epmq.merge import merge
from epmq.page.document import write_page
from epmq.report import machine, write_report

TASKS: dict[str, Callable[[Tensor], Tensor]] = {
    "turned": lambda images: images.rot90(1, (1, 2)),
    "flipped": lambda images: images.flip(2),
    "inverted": lambda images: 1.0 - images,
    "upside-down": lambda images: images.rot90(2, (1, 2)),
}
BITS = (4, 3, 2)
GROUP_SIZE = 32
SCALING = 0.3
CALIBRATION_IMAGES = 128
TRAINING_IMAGES = 1200


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        batch, length, width = hidden.shape
        x = self.attention_norm(hidden)
        q, k, v = (
            linear(x).view(batch, length, self.heads, -1).transpose(1, 2)
            for linear in (self.query, self.key, self.value)
        )
        mixed = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, length, width)
        hidden = hidden + self.out(mixed)
        output: Tensor = hidden + self.down(nn.functional.gelu(self.up(self.mlp_norm(hidden))))
        return output


class DigitTransformer(nn.Module):
    """8 × 8 images as 16 patches of 2 × 2; logits of ten digits from the mean over patches."""

    def __init__(self, width: int = 64, depth: int = 4, heads: int = 4):
        super().__init__()
        self.patches = nn.Linear(4, width)
        self.positions = nn.Parameter(torch.randn(16, width) * 0.02)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        patches = images.unfold(1, 2, 2).unfold(2, 2, 2).reshape(-1, 16, 4)
        hidden = self.patches(patches) + self.positions
        for block in self.blocks:
            hidden = block(hidden)
        logits: Tensor = self.head(self.norm(hidden).mean(1))
        return logits


def digits(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images ``[n, 8, 8]`` in [0, 1] and labels, test images and labels; shuffled by ``seed``."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ConfigError("the demo needs scikit-learn: pip install 'epmq[demo]'.") from error
    data = load_digits()
    images, labels = torch.tensor(data.images).float() / 16.0, torch.tensor(data.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    train, test = order[:TRAINING_IMAGES], order[TRAINING_IMAGES:]
    return images[train], labels[train], images[test], labels[test]


def train(
    model: nn.Module, images: Tensor, labels: Tensor, epochs: int, rate: float, seed: int, frozen: str = ""
) -> None:
    """AdamW with a linear decay; parameters whose name starts with ``frozen`` stay as they are."""
    generator = torch.Generator().manual_seed(seed)
    chosen = [p for name, p in model.named_parameters() if not frozen or not name.startswith(frozen)]
    optimizer = torch.optim.AdamW(chosen, lr=rate, weight_decay=0.01)
    batches = -(-len(images) // 64)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, epochs * batches)
    for _ in range(epochs):
        for rows in torch.randperm(len(images), generator=generator).split(64):
            loss = nn.functional.cross_entropy(model(images[rows]), labels[rows])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Percent."""
    return 100.0 * float((model(images).argmax(1) == labels).float().mean())


def run_demo(out: Path, seed: int = 0) -> dict[str, Any]:
    """Train, merge, quantize; returns the results, and leaves checkpoint, report, results and picture in ``out``."""
    files.check_free(out)
    # Matrices of 64 columns: a second thread only adds waiting, and one makes sums come out the same everywhere.
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    images, labels, test_images, test_labels = digits(seed)
    with progress_bar("demo") as progress:
        base = DigitTransformer()
        progress("training the base", 0, 3)
        train(base, images, labels, 20, 2e-3, seed)
        experts: dict[str, nn.Module] = {}
        for number, (task, change) in enumerate(TASKS.items()):
            progress(f"training expert {task}", 1, 3)
            experts[task] = copy.deepcopy(base)
            train(experts[task], change(images), labels, 12, 1e-3, seed + 1 + number, frozen="head")
        merged = merge(base, experts, method="task_arithmetic", scaling=SCALING)
        calibration: dict[str, list[Mapping[str, Any]]] = {
            task: [{"images": part} for part in change(images[:CALIBRATION_IMAGES]).split(32)]
            for task, change in TASKS.items()
        }
        progress("comparing methods", 2, 3)
        rows, result = _rows(base, experts, merged, calibration, test_images, test_labels)
        progress("done", 3, 3)
    results = {
        "rows": rows,
        "settings": {"seed": seed, "scaling": SCALING, "best": preset("best").model_dump(mode="json")},
        "machine": machine(),
    }
    with files.new_folder(out) as working:
        write_result(result, working / "int4")
        write_report(working, result.report)
        (working / "results.json").write_text(json.dumps(results, indent=1))
        draw(rows, working / "accuracy.png")
        write_page(working)
    return results


def _rows(
    base: nn.Module,
    experts: dict[str, nn.Module],
    merged: nn.Module,
    calibration: dict[str, list[Mapping[str, Any]]],
    images: Tensor,
    labels: Tensor,
) -> tuple[list[dict[str, Any]], QuantResult]:
    def scores(model: nn.Module) -> dict[str, float]:
        return {task: accuracy(model, change(images), labels) for task, change in TASKS.items()}

    own = {task: accuracy(experts[task], change(images), labels) for task, change in TASKS.items()}
    merge_name = "task_arithmetic"
    rows = [row(None, "expert", None, own), row(None, "base", None, scores(base))]
    rows.append(row(merge_name, "merged", None, scores(merged)))
    comparison = Comparison(merged, experts, calibration, GROUP_SIZE)
    for method in METHODS:
        if method == "fp":
            rows.append(row(merge_name, method, None, scores(comparison.model(method, None))))
            continue
        rows += [row(merge_name, method, bits, scores(comparison.model(method, bits))) for bits in BITS]
    result = quantize(merged, experts, calibration, preset("best", bits=BITS[0], group_size=GROUP_SIZE))
    return rows, result


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """One picture: accuracy by method and task, with the average as a line."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot as plt
    except ImportError as error:
        raise ConfigError("the demo's picture needs matplotlib: pip install 'epmq[demo]'.") from error
    shown = [entry for entry in rows if entry["bits"] in (None, BITS[0])]
    tasks = list(shown[0]["tasks"])
    figure, axes = plt.subplots(figsize=(9, 4.5))
    width = 0.8 / len(tasks)
    for number, task in enumerate(tasks):
        places = [i + (number - (len(tasks) - 1) / 2) * width for i in range(len(shown))]
        axes.bar(places, [entry["tasks"][task] for entry in shown], width, label=task)
    for i, entry in enumerate(shown):
        axes.plot([i - 0.42, i + 0.42], [entry["average"]] * 2, color="black", linewidth=1.5)
        axes.annotate(f"{entry['average']:.1f}", (i, entry["average"]), (0, 3), textcoords="offset points", ha="center")
    names = [entry["method"] + (f"\n{entry['bits']} bits" if entry["bits"] else "") for entry in shown]
    axes.set_xticks(range(len(shown)), names)
    axes.set_ylabel("test accuracy, %")
    axes.set_ylim(0, 112)
    axes.set_title("Accuracy by method and task; the line is the average")
    axes.legend(ncols=len(tasks), loc="lower center", frameon=True)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
