"""Language models from a folder: perplexity on a text, text from a prompt."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from epmq import trust
from epmq.console import progress_bar
from epmq.devices import home_of, moved
from epmq.errors import CalibrationError, ConfigError, ModelError
from epmq.huggingface import stop_tokens, tokenizer_from_folder
from epmq.perplexity import perplexity
from epmq.scoring import load_any
from epmq.texts import check_vocabulary, longest_input

LONGEST_WINDOW = 2048


@dataclass(frozen=True)
class Speed:
    """Tokens read before the first new one and seconds they took; new tokens after the first, and theirs."""

    prompt_tokens: int
    prefill_seconds: float
    new_tokens: int
    decode_seconds: float

    def lines(self) -> list[str]:
        """The two rates, in tokens per second."""
        prefill = _rate("prefill", self.prompt_tokens, self.prefill_seconds)
        return [prefill, _rate("decode", max(0, self.new_tokens - 1), self.decode_seconds)]


def _rate(name: str, count: int, seconds: float) -> str:
    rate = f"{count / seconds:.1f} tokens/s" if count and seconds > 0.0 else "too short to tell"
    return f"{name}: {count} tokens in {seconds:.3f} s, {rate}"


def open_language_model(
    folder: str | Path, device: str | torch.device | None = None, dtype: str | torch.dtype | None = None
) -> tuple[Any, Any]:
    """A folder's causal language model, ready to run, and its tokenizer. Raises ModelError for any other model."""
    tokenizer = tokenizer_from_folder(folder)
    model: Any = load_any(folder, device, dtype)
    config = getattr(model, "config", None)
    can_generate = getattr(model, "can_generate", None)
    if config is None or can_generate is None or not can_generate() or getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"{folder}: {type(model).__name__} is not a causal language model; this needs one.")
    return model, tokenizer


def text_perplexity(
    folder: str | Path,
    text_file: str | Path,
    window: int | None = None,
    stride: int | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
) -> dict[str, Any]:
    """Perplexity of a model folder on a text file, tokenised whole with what the tokenizer adds (see perplexity.py).

    window: min(2048, what the model can read) when left out; stride: the window.
    """
    try:
        with trust.open_file(text_file, CalibrationError) as handle:
            # A mark at the start, which some editors leave, is not part of the text.
            text = handle.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise CalibrationError(f"{text_file}: not a text in UTF-8 ({error.reason} at byte {error.start}).") from error
    if not text.strip():
        raise CalibrationError(f"{text_file}: holds no text.")
    model, tokenizer = open_language_model(folder, device, dtype)
    limit = longest_input(model)
    if window is None:
        window = min(LONGEST_WINDOW, limit or LONGEST_WINDOW)
    elif limit is not None and window > limit:
        raise ConfigError(f"window={window}: the model reads at most {limit} tokens.")
    ids: list[int] = tokenizer(text, verbose=False)["input_ids"]
    if len(ids) < 2:
        raise CalibrationError(f"{text_file}: holds {len(ids)} tokens; perplexity needs at least two.")
    check_vocabulary(model, max(ids), text_file)
    with progress_bar("perplexity") as progress:
        found = perplexity(model, ids, window, stride, progress)
    return {"model": Path(folder).name, "text": Path(text_file).name, **vars(found)}


def generate_text(
    folder: str | Path,
    prompt: str,
    write: Callable[[str], None],
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    seed: int = 0,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
) -> Speed:
    """Continue a prompt; whole words go to ``write`` as they come.

    temperature: 0 takes the likeliest token; above, tokens are drawn from softmax(logits / temperature) with ``seed``,
    nothing cut off. Ends at the tokenizer's or the folder's end-of-text token, or after ``max_new_tokens``.
    """
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens={max_new_tokens}: use at least 1.")
    if not 0.0 <= temperature < float("inf"):
        raise ConfigError(f"temperature={temperature}: use 0 or a positive number.")
    model, tokenizer = open_language_model(folder, device, dtype)
    inputs = moved(dict(tokenizer(prompt, return_tensors="pt")), home_of(model))
    count = inputs["input_ids"].shape[1]
    if count == 0:
        raise ConfigError("the prompt is empty after tokenisation; give some text.")
    check_vocabulary(model, int(inputs["input_ids"].max()), "the prompt")
    limit = longest_input(model)
    if limit is not None and count + max_new_tokens > limit:
        raise ConfigError(
            f"the prompt's {count} tokens and {max_new_tokens} new ones are more than the {limit} that the model reads;"
            " give fewer."
        )
    watch = _stopwatch(tokenizer, write)
    torch.manual_seed(seed)
    model.generate(
        inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        generation_config=_generation_config(folder, tokenizer, max_new_tokens, temperature),
        streamer=watch,
    )
    times: list[float] = watch.times
    return Speed(count, times[1] - times[0], len(times) - 1, times[-1] - times[1])


def _generation_config(folder: str | Path, tokenizer: Any, max_new_tokens: int, temperature: float) -> Any:
    from transformers import GenerationConfig

    stop = stop_tokens(folder) or tokenizer.eos_token_id
    first = stop[0] if isinstance(stop, list) else stop
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else first
    chosen: dict[str, Any] = {"do_sample": False}
    if temperature > 0.0:
        chosen = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    return GenerationConfig(max_new_tokens=max_new_tokens, eos_token_id=stop, pad_token_id=pad, **chosen)


def _stopwatch(tokenizer: Any, write: Callable[[str], None]) -> Any:
    """A streamer that notes when the prompt and each new token came, and hands on finished words."""
    from transformers import TextStreamer

    class Stopwatch(TextStreamer):
        def __init__(self) -> None:
            super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
            self.times: list[float] = []

        def put(self, value: Tensor) -> None:
            self.times.append(time.perf_counter())
            super().put(value)

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            write(text + ("\n" if stream_end else ""))

    return Stopwatch()
