"""`bitshard eval`: perplexity of a checkpoint on a text, with the context length it was measured at."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from bitshard.checkpoint import reason
from bitshard.errors import CheckpointError, SpecError
from bitshard.integrations.transformers import load, load_tokenizer, require_tokens
from bitshard.progress import Progress, silent

LARGEST_LOSS = 700  # its exp is still a float; a uniform guess costs 12


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean negative log-likelihood of every predicted token; a window predicts `context` - 1 of them."""

    perplexity: float
    context: int
    windows: int
    tokens: int
    seconds: float


def perplexity(
    path: Path, text: Path, context: int = 1024, windows: int | None = None, progress: Progress = silent
) -> Perplexity:
    """Perplexity on consecutive windows of `context` tokens from the start of `text`, in fp32 on a CPU.

    windows: how many, or None for all that the text fills. The text is tokenized once; a tokenizer that puts a first
    token before a text (Gemma's `<bos>`) has it put before every window. Raises SpecError when the text is too short.
    """
    if context < 2:
        raise SpecError("context", str(context), "2 tokens or more", "choose for example 1024")
    try:
        content = text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(str(text), reason(error), "a readable UTF-8 text file", "check the file") from None
    tokenizer, model = load_tokenizer(path), load(path)
    ids = tokenizer(content, add_special_tokens=False, verbose=False)["input_ids"]
    first = tokenizer("")["input_ids"][:1]
    step = context - len(first)
    available = len(ids) // step
    wanted = available if windows is None else windows
    if not 1 <= wanted <= available:
        raise SpecError(
            str(text),
            f"{len(ids)} tokens, {available} windows of {context}",
            f"at least {max(wanted, 1)}",
            "use a longer text, a shorter --context or fewer --windows",
        )
    require_tokens(model, torch.tensor(ids), context)
    start, total = time.perf_counter(), 0.0
    with torch.no_grad():
        for i in progress(range(wanted), "evaluating"):
            window = torch.tensor([first + ids[i * step : (i + 1) * step]], device=model.device)
            logits = model(window, use_cache=False).logits[0, :-1].float()
            total += torch.nn.functional.cross_entropy(logits, window[0, 1:], reduction="sum").item()
    tokens = wanted * (context - 1)
    if not total / tokens < LARGEST_LOSS:
        raise CheckpointError(
            str(path), f"a mean loss of {total / tokens:g}", f"a number below {LARGEST_LOSS}", "check the model"
        )
    return Perplexity(math.exp(total / tokens), context, wanted, tokens, time.perf_counter() - start)
