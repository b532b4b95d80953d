"""GLUE as text to text (FLAN-T5): prompts and answers, greedy generation, exact match; Spearman's rho for stsb."""

from __future__ import annotations

from pathlib import Path
from string import Formatter
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from epmq.data import padded_batches, tokenize
from epmq.errors import CalibrationError
from epmq.merge import merge
from epmq.papers.checkpoints import ForModule
from epmq.papers.hub import Rows, model_folder, read
from epmq.papers.settings import Paper
from epmq.skeleton import fill, meta_copy
from epmq.sources import FileSource, WeightSource

PROMPTS = Path(__file__).with_name("glue.yaml")


class GlueBenchmark:
    """Models, calibration batches and scores of a ``glue`` paper. Scores are percent, stsb's 100 rho."""

    def __init__(self, paper: Paper, rows: Rows):
        import transformers

        self.paper, self.rows = paper, rows
        self.folder = model_folder(paper.base)
        self.base: Any = transformers.AutoModelForSeq2SeqLM.from_pretrained(
            self.folder, trust_remote_code=False, use_safetensors=True
        ).eval()
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(self.folder, trust_remote_code=False)
        self.experts: dict[str, WeightSource] = {
            task: ForModule(FileSource(model_folder(name)), self.base) for task, name in paper.experts.items()
        }
        self.merged = merge(self.base, self.experts, **paper.merge.model_dump(exclude_none=True))
        self.prompts: dict[str, Any] = yaml.safe_load(PROMPTS.read_text(encoding="utf-8"))
        for task in paper.data:
            if task not in self.prompts:
                raise CalibrationError(f"task {task!r} has no prompt; add one to {PROMPTS.name}.")

    def calibration(self) -> dict[str, list[dict[str, Tensor]]]:
        """Prompts of the training splits, and for the decoder what each task's expert answers: no label is read."""
        batches: dict[str, list[dict[str, Tensor]]] = {}
        for task, data in self.paper.data.items():
            expert: Any = meta_copy(self.base)
            fill(expert, "", self.experts[task], torch.float32)
            rows = list(read(self.rows, data, data.train, self.paper.seed, self.paper.examples, self._columns(task)))
            batches[task] = []
            for _, inputs in self._inputs(task, rows):
                answers = self._answers(expert, inputs)
                start = torch.ones(len(answers), 1, dtype=torch.int64)
                # The first position is the start token, which T5 writes as padding.
                mask = torch.cat([start, (answers[:, 1:-1] != self._pad).long()], 1)
                batches[task].append({**inputs, "decoder_input_ids": answers[:, :-1], "decoder_attention_mask": mask})
        return batches

    @torch.no_grad()
    def score(self, model: nn.Module, task: str) -> float:
        data = self.paper.data[task]
        columns = [*self._columns(task), data.label]
        rows = list(read(self.rows, data, data.test, None, self.paper.test_examples, columns))
        texts: list[str] = [""] * len(rows)
        for places, inputs in self._inputs(task, rows):
            answers = self.tokenizer.batch_decode(self._answers(model, inputs), skip_special_tokens=True)
            for place, answer in zip(places, answers, strict=True):
                texts[place] = answer
        labels = [row[data.label] for row in rows]
        known: list[str] | None = self.prompts[task].get("answers")
        if known is None:
            return 100.0 * spearman(torch.tensor([number_in(text) for text in texts]), torch.tensor(labels))
        right = [text == known[label] for text, label in zip(texts, labels, strict=True)]
        return 100.0 * right.count(True) / len(rows)

    @property
    def _pad(self) -> int:
        pad: int = self.base.config.pad_token_id
        return pad

    def _columns(self, task: str) -> list[str]:
        return [name for _, name, _, _ in Formatter().parse(self.prompts[task]["prompt"]) if name]

    def _inputs(self, task: str, rows: list[dict[str, Any]]) -> Any:
        texts = [self.prompts[task]["prompt"].format(**row) for row in rows]
        return padded_batches(tokenize(self.tokenizer, texts, self.paper.max_length), self.paper.batch_size, self._pad)

    def _answers(self, model: Any, inputs: dict[str, Tensor]) -> Tensor:
        """Token ids ``[B, S]``, start token first, padded behind the end."""
        device = next(model.parameters()).device
        given = {name: tensor.to(device) for name, tensor in inputs.items()}
        with torch.no_grad():
            ids = model.generate(**given, max_new_tokens=self.paper.generated, num_beams=1, do_sample=False)
        found: Tensor = ids.cpu()
        return found


def number_in(text: str) -> float:
    """The number that a text is, 0 where it is none."""
    try:
        return float(text)
    except ValueError:
        return 0.0


def spearman(x: Tensor, y: Tensor) -> float:
    """Spearman's rank correlation, equal values sharing their mean rank; 0 where one side is constant."""
    a, b = (_ranks(values.double()) for values in (x, y))
    a, b = a - a.mean(), b - b.mean()
    length = float(a.norm() * b.norm())
    return float(a @ b) / length if length > 0 else 0.0


def _ranks(values: Tensor) -> Tensor:
    _, place, count = values.unique(return_inverse=True, return_counts=True)
    mean_rank: Tensor = count.cumsum(0).double() - (count.double() - 1) / 2
    return mean_rank[place]
