"""CLIP's benchmark: fine-tuned image towers, zero-shot heads from the base's text tower, top-1 accuracy."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from epmq.errors import CalibrationError, ModelError
from epmq.merge import merge
from epmq.papers.checkpoints import ForModule, PartOf
from epmq.papers.hub import Rows, batched, class_names, model_folder, read
from epmq.papers.settings import DataSet, Paper
from epmq.sources import FileSource, WeightSource

PROMPTS = Path(__file__).with_name("clip.yaml")
TUNED = "vision_model"


class ClipBenchmark:
    """Models, calibration batches and scores of a ``clip`` paper. Scores are percent of the test split."""

    def __init__(self, paper: Paper, rows: Rows):
        import transformers

        self.paper, self.rows = paper, rows
        self.folder = model_folder(paper.base)
        clip = transformers.CLIPModel.from_pretrained(self.folder, use_safetensors=True).eval()
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(self.folder, trust_remote_code=False)
        self.processor = transformers.CLIPImageProcessor.from_pretrained(self.folder)
        self.base = image_tower(clip)
        tuned = self.base.get_submodule(TUNED)
        parts: dict[str, WeightSource] = {
            task: ForModule(FileSource(model_folder(name)), tuned, f"{TUNED}.") for task, name in paper.experts.items()
        }
        self.experts: dict[str, WeightSource] = {
            task: PartOf(self.base, f"{TUNED}.", part) for task, part in parts.items()
        }
        # Merged without the projection, which was not tuned: TIES trims over all entries it is given.
        self.merged = copy.deepcopy(self.base)
        self.merged.set_submodule(TUNED, merge(tuned, parts, **paper.merge.model_dump(exclude_none=True)))
        prompts = yaml.safe_load(PROMPTS.read_text(encoding="utf-8"))
        self.heads = {task: self._head(clip, task, prompts) for task in paper.data}

    def calibration(self) -> dict[str, list[dict[str, Tensor]]]:
        """Images of the training splits, through the base's processor; no label is read."""
        batches = {}
        for task, data in self.paper.data.items():
            rows = read(self.rows, data, data.train, self.paper.seed, self.paper.examples, [data.image])
            batches[task] = [
                {"pixel_values": self._pixels(data, batch)} for batch in batched(rows, self.paper.batch_size)
            ]
        return batches

    @torch.no_grad()
    def score(self, model: nn.Module, task: str) -> float:
        data, right, seen = self.paper.data[task], 0, 0
        device = next(model.parameters()).device
        rows = read(self.rows, data, data.test, None, self.paper.test_examples, [data.image, data.label])
        for batch in batched(rows, self.paper.batch_size):
            features = model(pixel_values=self._pixels(data, batch).to(device)).image_embeds.float().cpu()
            # The temperature is positive and a feature's length is common to all classes: neither moves the maximum.
            chosen = (features @ self.heads[task].T).argmax(1)
            right += int((chosen == torch.tensor([row[data.label] for row in batch])).sum())
            seen += len(batch)
        return 100.0 * right / seen

    def _head(self, clip: Any, task: str, prompts: Mapping[str, Any]) -> Tensor:
        if task not in prompts:
            raise CalibrationError(f"task {task!r} has no prompts; add templates for it to {PROMPTS.name}.")
        classes = prompts[task].get("classes")
        if classes is None:
            data = self.paper.data[task]
            classes = class_names(self.rows(data, data.test, None), data.label, data.path)
        return zero_shot_head(clip, self.tokenizer, classes, prompts[task]["templates"])

    def _pixels(self, data: DataSet, rows: list[dict[str, Any]]) -> Tensor:
        images = [row[data.image].convert("RGB") for row in rows]
        pixels: Tensor = self.processor(images=images, return_tensors="pt")["pixel_values"]
        return pixels


def image_tower(clip: Any) -> nn.Module:
    """A CLIPVisionModelWithProjection with the image tower and projection of a CLIPModel."""
    import transformers

    if not isinstance(clip, transformers.CLIPModel):
        raise ModelError(f"a clip paper needs a CLIPModel as base, got {type(clip).__name__}.")
    config: Any = copy.deepcopy(clip.config.vision_config)
    config.projection_dim = clip.config.projection_dim
    tower: nn.Module = transformers.CLIPVisionModelWithProjection(config).eval()
    tower.get_submodule(TUNED).load_state_dict(clip.vision_model.state_dict())
    tower.get_submodule("visual_projection").load_state_dict(clip.visual_projection.state_dict())
    return tower.to(clip.dtype)


@torch.no_grad()
def zero_shot_head(clip: Any, tokenizer: Any, classes: list[str], templates: list[str]) -> Tensor:
    """fp32 ``[C, D]``: each class's prompts embedded, normalised, averaged, normalised again (Radford et al. 2021)."""
    rows = []
    for name in classes:
        texts = tokenizer([template.format(name) for template in templates], padding=True, return_tensors="pt")
        pooled = clip.text_model(input_ids=texts["input_ids"], attention_mask=texts["attention_mask"]).pooler_output
        embedded = nn.functional.normalize(clip.text_projection(pooled).float(), dim=1)
        rows.append(nn.functional.normalize(embedded.mean(0), dim=0))
    return torch.stack(rows)
