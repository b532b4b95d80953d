"""Language models (MergeBench): calibrated on its validation texts, left in folders for others to score."""

from __future__ import annotations

from string import Formatter
from typing import Any

from torch import Tensor, nn

from epmq.data import padded_batches, tokenize
from epmq.errors import ConfigError
from epmq.merge import merge
from epmq.papers.checkpoints import ForModule
from epmq.papers.hub import Rows, model_folder, read
from epmq.papers.settings import Paper
from epmq.sources import FileSource, WeightSource


class CausalBenchmark:
    """Models and calibration batches of a ``causal`` paper; it has no score of its own."""

    score = None

    def __init__(self, paper: Paper, rows: Rows):
        import transformers

        self.paper, self.rows = paper, rows
        self.folder = model_folder(paper.base)
        self.base: nn.Module = transformers.AutoModelForCausalLM.from_pretrained(
            self.folder, trust_remote_code=False, use_safetensors=True, dtype="auto"
        ).eval()
        self.tokenizer: Any = transformers.AutoTokenizer.from_pretrained(self.folder, trust_remote_code=False)
        self.experts: dict[str, WeightSource] = {
            task: ForModule(FileSource(model_folder(name)), self.base) for task, name in paper.experts.items()
        }
        self.merged = merge(self.base, self.experts, **paper.merge.model_dump(exclude_none=True))

    def calibration(self) -> dict[str, list[dict[str, Tensor]]]:
        """Instructions with their answers, as the experts were tuned on them."""
        batches: dict[str, list[dict[str, Tensor]]] = {}
        for task, data in self.paper.data.items():
            if data.template is None:
                raise ConfigError(f"data.{task}.template: say how a text is made of the columns, as in '{{text}}'.")
            columns = [name for _, name, _, _ in Formatter().parse(data.template) if name]
            rows = read(self.rows, data, data.train, self.paper.seed, self.paper.examples, columns)
            ids = tokenize(self.tokenizer, [data.template.format(**row) for row in rows], self.paper.max_length)
            # The padding is masked everywhere, so any token will do where the tokenizer has none for it.
            pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else 0
            batches[task] = [inputs for _, inputs in padded_batches(ids, self.paper.batch_size, pad)]
        return batches
