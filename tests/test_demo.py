"""The demo's parts, on a tenth of its work: images, training, comparison, picture."""

from __future__ import annotations

import copy
from pathlib import Path

import torch

from epmq import demo
from epmq.compare import Comparison
from epmq.merge import merge


def test_digits_are_the_same_for_a_seed_and_split_without_overlap() -> None:
    first, second, other = demo.digits(0), demo.digits(0), demo.digits(1)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0], other[0])
    assert len(first[0]) == demo.TRAINING_IMAGES and len(first[2]) == 1797 - demo.TRAINING_IMAGES
    assert first[0].min() >= 0.0 and first[0].max() <= 1.0


def test_tasks_are_different_images_of_the_same_digit() -> None:
    image = torch.rand(1, 8, 8)
    views = [image, *(change(image) for change in demo.TASKS.values())]
    assert all(view.shape == image.shape for view in views)
    assert all(not torch.equal(a, b) for i, a in enumerate(views) for b in views[:i])


def test_short_training_learns_and_quantized_expert_follows(tmp_path: Path) -> None:
    torch.manual_seed(0)
    images, labels, test_images, test_labels = demo.digits(0)
    base = demo.DigitTransformer(width=32, depth=2)
    demo.train(base, images[:400], labels[:400], 8, 4e-3, 0)
    experts: dict[str, torch.nn.Module] = {}
    for number, (task, change) in enumerate(list(demo.TASKS.items())[:2]):
        experts[task] = copy.deepcopy(base)
        demo.train(experts[task], change(images[:400]), labels[:400], 8, 4e-3, number, frozen="head")
        assert torch.equal(experts[task].get_parameter("head.weight"), base.head.weight)
        own = demo.accuracy(experts[task], change(test_images), test_labels)
        assert own > demo.accuracy(base, change(test_images), test_labels) + 10.0
    merged = merge(base, experts, method="task_arithmetic", scaling=0.4)
    calibration = {task: [{"images": demo.TASKS[task](images[:64])}] for task in experts}
    comparison = Comparison(merged, experts, calibration, 32)

    def average(model: torch.nn.Module) -> float:
        scores = [demo.accuracy(model, demo.TASKS[task](test_images), test_labels) for task in experts]
        return sum(scores) / len(scores)

    assert average(comparison.model("fp", None)) > average(comparison.model("gptq", 4))


def test_picture_is_drawn(tmp_path: Path) -> None:
    from epmq.evaluate import row

    rows = [
        row(None, "expert", None, {"a": 90.0, "b": 80.0}),
        row("task_arithmetic", "epmq", 4, {"a": 70.0, "b": 60.0}),
    ]
    demo.draw(rows, tmp_path / "accuracy.png")
    assert (tmp_path / "accuracy.png").read_bytes().startswith(b"\x89PNG")
