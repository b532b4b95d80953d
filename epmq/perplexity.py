"""Perplexity of a language model on one long text.

The text is one sequence x_0 … x_{L-1} of tokens, read in windows of N that start every S tokens, S <= N. A window
scores every token that no earlier window reached and that has a token before it in the window. With S < N each token
but x_0 is scored once, with at least N - S tokens of context (fewer only in the first window). With S = N, as tables of
quantized models are made, a window's first token has no context and is not scored. The last window may be short. The
result is exp(-1/T · Σ log p(x_i | context)) over the T scored tokens, so every token weighs the same whatever window it
was in.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from epmq.devices import home_of
from epmq.errors import CalibrationError, ConfigError, NumericalError

# Rows of logits that are turned into fp32 log-probabilities at once: vocabularies are large.
ROWS = 256


@dataclass(frozen=True)
class Perplexity:
    """perplexity: exp of the mean negative log-likelihood in nats. tokens: of the text; scored: those in the mean."""

    perplexity: float
    tokens: int
    scored: int
    window: int
    stride: int


@torch.no_grad()
def perplexity(
    model: nn.Module,
    ids: Sequence[int],
    window: int,
    stride: int | None = None,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> Perplexity:
    """Perplexity of ``ids`` (see the module). model: called with ``input_ids`` ``[1, n]``, gives logits ``[1, n, V]``.

    stride: ``window`` when left out. Raises ConfigError for window < 2 or a stride outside [1, window],
    CalibrationError for fewer than two tokens, NumericalError when the mean is not finite.
    """
    stride = window if stride is None else stride
    if window < 2:
        raise ConfigError(f"window={window}: a window needs at least two tokens.")
    if not 1 <= stride <= window:
        raise ConfigError(f"stride={stride}: use 1 to the window's {window} tokens; a longer one would leave gaps.")
    if len(ids) < 2:
        raise CalibrationError("perplexity needs a text of at least two tokens.")
    tokens = torch.tensor(ids, dtype=torch.int64)
    device = home_of(model)
    total, scored, reached = 0.0, 0, 0
    for start in range(0, len(ids), stride):
        end = min(start + window, len(ids))
        first = max(reached, start + 1)
        if first < end:
            output = model(input_ids=tokens[start:end].unsqueeze(0).to(device))
            logits: Tensor = output if isinstance(output, Tensor) else output.logits
            total += _surprise(logits[0, first - start - 1 : end - start - 1], tokens[first:end].to(device))
            scored += end - first
        reached = end
        progress("scoring", end, len(ids))
        if end == len(ids):
            break
    mean = total / scored
    if not math.isfinite(mean):
        raise NumericalError("the model's logits are NaN or Inf on this text; it has no perplexity.")
    return Perplexity(math.exp(mean) if mean < 700.0 else math.inf, len(ids), scored, window, stride)


def _surprise(logits: Tensor, targets: Tensor) -> float:
    """Sum of -log p over rows, log-probabilities in fp32 and their sum in fp64."""
    total = 0.0
    for rows, wanted in zip(logits.split(ROWS), targets.split(ROWS), strict=True):
        losses = nn.functional.cross_entropy(rows.float(), wanted, reduction="none")
        total += float(losses.double().sum())
    return total
