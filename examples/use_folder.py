"""Load a folder that ``epmq quantize`` made from a sentence encoder, and compare texts with it.

    python examples/use_folder.py quantized "a first text" "a second text"

The weights stay packed in memory; the folder has the tokenizer and the configuration beside them.
"""

from __future__ import annotations

import sys

import torch
from transformers import AutoTokenizer

import epmq


@torch.no_grad()
def main(folder: str, *texts: str) -> None:
    model = epmq.load(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)

    packed = [module for module in model.modules() if isinstance(module, epmq.QuantLinear)]
    dense = 4 * sum(layer.in_features * layer.out_features for layer in packed)
    held = sum(t.numel() * t.element_size() for layer in packed for t in layer.state_dict().values())
    print(f"{len(packed)} linears hold {held / 1024:.1f} KiB; in 32 bits they would hold {dense / 1024:.1f} KiB")

    inputs = tokenizer(list(texts), padding=True, return_tensors="pt")
    hidden = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).last_hidden_state
    mask = inputs["attention_mask"].unsqueeze(-1)
    features = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)
    for text, row in zip(texts, (features @ features.T).tolist(), strict=True):
        print("  ".join(f"{value:5.2f}" for value in row), text)


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit('usage: python examples/use_folder.py FOLDER "a text" "another text" ...')
    main(*sys.argv[1:])
