"""A job to try epmq on, without a network: a small text encoder, three experts of it, their data and a recipe.

    python examples/tiny/make.py FOLDER

Takes about a quarter of a minute. FOLDER/base and FOLDER/experts/TASK are checkpoints as transformers saves them,
trained here on made-up sentences: the mood of a review, the intent of a request, the kind of a question.
FOLDER/data/TASK.jsonl has the calibration texts, TASK-test.jsonl labelled ones, FOLDER/heads/TASK.safetensors the
expert's classifier.
"""

from __future__ import annotations

import copy
import json
import random
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor, nn

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
NAMES = ("anna", "ben", "carla", "david", "emma", "felix", "greta", "hugo", "ida", "jonas", "kira", "leo")
PLACES = ("berlin", "london", "paris", "rome", "madrid", "vienna", "prague", "oslo", "lisbon", "dublin")
THINGS = ("film", "book", "song", "meal", "hotel", "phone", "train", "garden", "coat", "chair")
# Of each class: what its sentences are made of. {} is filled with a name, a place or a thing.
TASKS: dict[str, list[list[str]]] = {
    "reviews": [
        ["what a wonderful {thing}", "i love this {thing}", "{name} enjoyed every minute of the {thing}",
         "the best {thing} in {place}", "a charming and clever {thing}", "not bad at all , this {thing}"],
        ["what a terrible {thing}", "i hate this {thing}", "{name} slept through most of the {thing}",
         "the worst {thing} in {place}", "a dull and clumsy {thing}", "not good at all , this {thing}"],
    ],
    "intents": [
        ["wake me at seven in {place}", "set an alarm for {name}", "do not let me sleep past nine"],
        ["will it rain in {place}", "how warm is it in {place} today", "does {name} need a coat today"],
        ["book a train to {place}", "find {name} a seat to {place}", "i must travel to {place} tomorrow"],
        ["play a song for {name}", "turn the music down", "i want to hear the song of {name}"],
    ],
    "questions": [
        ["who wrote the {thing}", "who is {name}", "which person came to {place} with {name}"],
        ["where is {place}", "where did {name} leave the {thing}", "in which town does {name} live"],
        ["how many days are in a year", "how old is {name}", "how much does the {thing} cost"],
    ],
}  # fmt: skip
TRAIN, TEST = 256, 300


def sentence(templates: list[str], draw: random.Random) -> str:
    """One to two sentences of a class, the second from the same templates."""
    parts = [
        draw.choice(templates).format(name=draw.choice(NAMES), place=draw.choice(PLACES), thing=draw.choice(THINGS))
        for _ in range(draw.choice((1, 1, 2)))
    ]
    words = " . ".join(parts).split()
    # Some words are lost, so that no task is solved by one of them alone.
    return " ".join(word for word in words if len(words) < 4 or draw.random() > 0.3)


def rows(task: str, count: int, draw: random.Random) -> list[dict[str, Any]]:
    """Texts with the number of their class."""
    labels = [draw.randrange(len(TASKS[task])) for _ in range(count)]
    return [{"text": sentence(TASKS[task][label], draw), "label": label} for label in labels]


def make_tokenizer(texts: list[str]) -> Any:
    """A WordPiece tokenizer trained on the texts."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(texts, trainers.WordPieceTrainer(vocab_size=400, special_tokens=list(SPECIAL)))
    ends = [(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", None, ends)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        mask_token="[MASK]", model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip


def features(model: nn.Module, tokenizer: Any, texts: list[str]) -> Tensor:
    """The mean of the last hidden states over each text's tokens ``[B, D]``."""
    inputs = tokenizer(texts, padding=True, return_tensors="pt")
    hidden: Tensor = model(**inputs).last_hidden_state
    mask = inputs["attention_mask"].unsqueeze(-1).float()
    mean: Tensor = (hidden * mask).sum(1) / mask.sum(1)
    return mean


def train(
    model: nn.Module, heads: dict[str, nn.Linear], tokenizer: Any, data: dict[str, Any], steps: int, rate: float
) -> None:
    """Encoder and heads together, a batch of one task after the other; embeddings learn only where they may."""
    parameters = [p for part in (model, *heads.values()) for p in part.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate)
    tasks, draw = list(heads), random.Random(1)
    for step in range(steps):
        task = tasks[step % len(tasks)]
        batch = draw.sample(data[task], 32)
        logits = heads[task](features(model, tokenizer, [row["text"] for row in batch]))
        optimizer.zero_grad()
        nn.functional.cross_entropy(logits, torch.tensor([row["label"] for row in batch])).backward()
        optimizer.step()


def recipe() -> str:
    """What ``epmq quantize`` and ``epmq eval`` are to do."""
    lines = ["base: base", "experts:", *(f"  {task}: experts/{task}" for task in TASKS)]
    lines += ["merge: {method: task_arithmetic, scaling: 0.4}", "calibration:", "  max_length: 32", "  tasks:"]
    lines += [f"    {task}: data/{task}.jsonl" for task in TASKS]
    lines += ["quantization: {preset: best, bits: 4, group_size: 32}", "evaluation:", "  max_length: 32", "  tasks:"]
    lines += [f"    {task}: {{data: data/{task}-test.jsonl, head: heads/{task}.safetensors}}" for task in TASKS]
    return "\n".join(lines) + "\n"


def main(folder: Path) -> None:
    torch.manual_seed(0)
    draw = random.Random(0)
    data = {task: rows(task, TRAIN, draw) for task in TASKS}
    tests = {task: rows(task, TEST, draw) for task in TASKS}
    tokenizer = make_tokenizer([row["text"] for task in TASKS for row in data[task]])
    config = transformers.BertConfig(
        vocab_size=len(tokenizer), hidden_size=64, num_hidden_layers=4, num_attention_heads=4, intermediate_size=128,
        max_position_embeddings=64,
    )  # fmt: skip
    base = transformers.BertModel(config).eval()
    # The base has seen a little of everything; each expert goes on from there with its own task.
    train(base, heads_of(64), tokenizer, data, 60, 1e-3)
    base.embeddings.requires_grad_(False)
    base.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    for place in ("data", "heads"):
        (folder / place).mkdir(exist_ok=True)
    for task in TASKS:
        expert, head = copy.deepcopy(base), {task: heads_of(64)[task]}
        train(expert, head, tokenizer, data, 120, 2e-3)
        expert.save_pretrained(folder / "experts" / task)
        state = {name: tensor.detach().contiguous() for name, tensor in head[task].state_dict().items()}
        save_file(state, folder / "heads" / f"{task}.safetensors")
        for name, written in ((task, [{"text": row["text"]} for row in data[task]]), (f"{task}-test", tests[task])):
            (folder / "data" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in written))
    (folder / "recipe.yaml").write_text(recipe())
    print(f"base, {len(TASKS)} experts, data and recipe.yaml in {folder}")


def heads_of(width: int) -> dict[str, nn.Linear]:
    """A classifier per task."""
    return {task: nn.Linear(width, len(classes)) for task, classes in TASKS.items()}


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python examples/tiny/make.py FOLDER")
    main(Path(sys.argv[1]))
