"""`bitshard eval`: perplexity on a text, divergence from the 16-bit model, and the tasks of lm-eval.

Memory beside the models: the logits of one window for each, in the model's dtype (1 GiB in fp32 for 1,024 tokens of
Gemma's vocabulary of 262,144); probabilities are made for CHUNK tokens at a time.
"""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from bitshard.checkpoint import Checkpoint
from bitshard.errors import CheckpointError, SpecError
from bitshard.integrations.transformers import load, require_tokens
from bitshard.progress import Progress, silent
from bitshard.sources import encode, load_tokenizer, read_text, tokens_before

LARGEST_LOSS = 700  # its exp is still a float; a uniform guess costs 12
CHUNK = 128
BATCH_SIZE = 8  # of tasks: weights are dequantized once for all of it
BOOTSTRAP = 1000  # samples for standard errors that have no formula
FEWSHOT_SEED = 1234  # lm-eval's own default


@dataclass(frozen=True)
class TextOptions:
    """What is predicted. stride: None is `context`. windows: None is all of the text. against: the reference model."""

    file: Path
    context: int = 1024
    stride: int | None = None
    windows: int | None = None
    against: Path | None = None


@dataclass(frozen=True)
class TaskOptions:
    """names: tasks, groups, tags or globs of lm-eval and of `include_path`. limit: documents of each; None is all."""

    names: Sequence[str]
    limit: int | None = None
    include_path: Path | None = None


@dataclass(frozen=True)
class Windows:
    """Windows of one tokenized text, for any number of models: the last `stride` tokens of each are scored.

    first: token ids that the tokenizer puts before a text (Gemma's `<bos>`), at the start of every window; not scored.
    tokens_WS: int64 [windows, context - len(first)], a view of the text's tokens that overlaps where stride < context.
    """

    first: list[int]
    tokens_WS: torch.Tensor
    stride: int

    @property
    def context(self) -> int:
        return len(self.first) + self.tokens_WS.shape[1]

    @property
    def scored(self) -> int:
        """Tokens scored in one window: nothing predicts the first one of a text that no other comes before."""
        return min(self.stride, self.context - max(1, len(self.first)))

    def __len__(self) -> int:
        return len(self.tokens_WS)

    def __getitem__(self, i: int) -> torch.Tensor:
        """Window i: int64 [1, context]."""
        return torch.cat([torch.tensor(self.first, dtype=torch.int64), self.tokens_WS[i]])[None]


@dataclass(frozen=True)
class Divergence:
    """How far a model's next-token distribution Q is from the reference's P, over all scored tokens.

    KL is sum P log(P / Q), in nats per token; top1_agreement the share of tokens where both predict the same one.
    """

    reference_perplexity: float
    mean_kl: float
    median_kl: float
    kl_quantile_99: float
    top1_agreement: float


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean negative log-likelihood of every scored token, and the settings it was measured at.

    standard_error: from the spread of the windows' means; None for a single window.
    """

    perplexity: float
    standard_error: float | None
    context: int
    stride: int
    windows: int
    tokens: int
    seconds: float
    divergence: Divergence | None


@dataclass(frozen=True)
class TaskScore:
    """One metric of one task, as lm-eval names and computes it."""

    task: str
    metric: str
    value: float
    standard_error: float | None
    documents: int | None
    shots: int | None


@dataclass(frozen=True)
class Evaluation:
    text: Perplexity | None
    tasks: list[TaskScore]


def evaluate(
    path: Path,
    text: TextOptions | None = None,
    tasks: TaskOptions | None = None,
    progress: Progress = silent,
    backend: str = "exact",
) -> Evaluation:
    """Evaluate the checkpoint `path` on a text, on tasks or on both; the models are loaded once. backend: see kernels.

    Raises SpecError for options that cannot be met and for a reference with another vocabulary, and CheckpointError for
    files that cannot be read, models that predict nothing and tasks that cannot be had.
    """
    # what is refused is refused before a model is loaded, and a folder without one before its tokenizer is missed
    Checkpoint.open(path)
    task_set = None if tasks is None else load_tasks(tasks)
    windows, tokenizer, against = None, None, None
    if text is not None:
        content, tokenizer, against = read_text(text.file, "--text"), load_tokenizer(path), text.against
        windows = text_windows(tokenizer, content, text.context, text.stride, text.windows, str(text.file))
        if against is not None:
            _require_same_vocabulary(tokenizer, against, path)
    model, measured, scores = load(path, backend=backend), None, []
    if windows is not None:
        measured = perplexity(model, windows, load(against) if against else None, progress)
    if tasks is not None:
        scores = task_scores(model, tokenizer or load_tokenizer(path), task_set, tasks.limit)
    return Evaluation(measured, scores)


def _require_same_vocabulary(tokenizer: Any, against: Path, path: Path) -> None:
    ours, theirs = tokenizer.get_vocab(), load_tokenizer(against).get_vocab()
    if ours != theirs:
        token = min(token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token))
        raise SpecError(
            str(against), f"a vocabulary of {len(theirs)} tokens, with {token!r} at {theirs.get(token)}",
            f"that of {path}: {len(ours)} tokens, with {token!r} at {ours.get(token)}",
            "compare with the model that it was quantized from",
        )  # fmt: skip


def text_windows(
    tokenizer: Any, text: str, context: int, stride: int | None = None, count: int | None = None, where: str = "text"
) -> Windows:
    """The first `count` windows of a text, or all that it fills; each begins `stride` tokens after the one before.

    stride = context, the default: disjoint windows, every token in one of them. A smaller one gives every scored token
    at least context - stride tokens to be predicted from, at context / stride times the work. Raises SpecError, with
    `where` as its name, when the text is too short.
    """
    stride = context if stride is None else stride
    first = tokens_before(tokenizer)
    least = max(2, len(first) + 1)
    if context < least:
        raise SpecError("context", str(context), f"{least} tokens or more", "choose for example 1024")
    if not 1 <= stride <= context:
        raise SpecError("stride", str(stride), f"1 to the context, {context}", "leave it out for disjoint windows")
    if count is not None and count < 1:
        raise SpecError("windows", str(count), "1 or more", "leave it out for all of the text")
    tokens = torch.tensor(encode(tokenizer, text), dtype=torch.int64)
    size = context - len(first)
    step = min(stride, size)
    available = max(0, (len(tokens) - size) // step + 1)
    wanted = available if count is None else count
    if not 1 <= wanted <= available:
        raise SpecError(
            where,
            f"{len(tokens)} tokens, {available} windows of {context}",
            f"at least {max(wanted, 1)}",
            "use a longer text, a shorter --context or fewer --windows",
        )
    return Windows(first, tokens.unfold(0, size, step)[:wanted], stride)


def perplexity(
    model: PreTrainedModel, windows: Windows, reference: PreTrainedModel | None = None, progress: Progress = silent
) -> Perplexity:
    """Perplexity of a loaded model, and with `reference` its divergence from that model, on the same windows.

    Raises CheckpointError when a model cannot read the tokens or predicts nothing (NaN, or a loss that overflows).
    """
    models = [model] if reference is None else [model, reference]
    for one in models:
        require_tokens(one, windows.tokens_WS, windows.context, "context")
    start = time.perf_counter()
    losses_MW = np.empty((len(models), len(windows)))
    kl_WS = torch.zeros(len(windows) if reference is not None else 0, windows.scored)
    agreeing = 0
    with torch.no_grad():
        for w in progress(range(len(windows)), "evaluating"):
            window = windows[w]
            logits = [_scored_logits(one, window, windows.scored) for one in models]
            if reference is not None and logits[0].shape != logits[1].shape:
                ours, theirs = (f"{one.shape[1]}" for one in logits)
                raise SpecError(
                    reference.name_or_path,
                    f"logits for {theirs} tokens",
                    ours,
                    "compare with the model it was made from",
                )
            losses = np.zeros(len(models))
            for at in range(0, windows.scored, CHUNK):
                chunk = slice(at, at + CHUNK)
                targets = window[0, -windows.scored :][chunk].to(model.device)
                logs = [one[chunk].float().log_softmax(-1) for one in logits]
                losses += [torch.nn.functional.nll_loss(log, targets, reduction="sum").item() for log in logs]
                if reference is not None:
                    log_q, log_p = logs
                    kl_WS[w, chunk] = (log_p.exp() * (log_p - log_q)).sum(-1).cpu()
                    agreeing += int((log_p.argmax(-1) == log_q.argmax(-1)).sum())
            losses_MW[:, w] = losses / windows.scored
    means, tokens = losses_MW.mean(1), len(windows) * windows.scored
    for one, mean in zip(models, means, strict=True):
        if not mean < LARGEST_LOSS:
            raise CheckpointError(
                one.name_or_path, f"a mean loss of {mean:g}", f"a number below {LARGEST_LOSS}", "check the model"
            )
    value = math.exp(means[0])
    spread = None if len(windows) == 1 else value * float(losses_MW[0].std(ddof=1)) / math.sqrt(len(windows))
    divergence = None
    if reference is not None:
        kl = kl_WS.numpy()
        median, highest = map(float, np.quantile(kl, [0.5, 0.99]))
        divergence = Divergence(math.exp(means[1]), float(kl.mean()), median, highest, agreeing / tokens)
    seconds = time.perf_counter() - start
    return Perplexity(value, spread, windows.context, windows.stride, len(windows), tokens, seconds, divergence)


def _scored_logits(model: PreTrainedModel, window_1T: torch.Tensor, scored: int) -> torch.Tensor:
    """[scored, vocabulary]: what the model predicts for the last `scored` tokens."""
    logits: torch.Tensor = model(window_1T.to(model.device), use_cache=False).logits
    return logits[0, -scored - 1 : -1]


def load_tasks(options: TaskOptions) -> Any:
    """lm-eval's tasks and groups of these names with their documents, for any number of models.

    Raises SpecError without the package and for an unknown name, CheckpointError for documents that cannot be had.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise SpecError("--tasks", "no lm-eval", "the package lm-eval", "pip install 'lm-eval>=0.4.13,<0.5'") from None
    if options.limit is not None and options.limit < 1:
        raise SpecError("limit", str(options.limit), "1 document or more", "leave it out for all")
    if options.include_path is not None and not options.include_path.is_dir():
        raise CheckpointError(str(options.include_path), "no such folder", "a folder of lm-eval tasks", "name another")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of its defaults, task by task
    manager = TaskManager(include_path=options.include_path)
    found: list[Any] = []
    tasks = None
    for pattern in options.names:
        names = manager.match_tasks([pattern])
        if not names:
            allowed = "a task, group, tag or glob of lm-eval or of --include-path"
            raise SpecError("--tasks", repr(pattern), allowed, "choose one of those that `lm-eval ls tasks` prints")
        try:
            with redirect_stdout(sys.stderr):
                for name in names:
                    loaded = manager.load([name])
                    found += [loaded["groups"][name]] if name in loaded["groups"] else loaded["tasks"].values()
                tasks = manager.load(found)
        except Exception as error:  # whatever a task of others may raise
            lines = str(error).splitlines() or [""]
            raise CheckpointError(
                f"task {pattern}", f"{type(error).__name__}: {lines[0]}", "a task whose documents can be read, once",
                "check the network, or name local tasks with --include-path DIR",
            ) from None  # fmt: skip
    return tasks


def task_scores(model: PreTrainedModel, tokenizer: Any, tasks: Any, limit: int | None = None) -> list[TaskScore]:
    """Every metric of what `load_tasks` returned, on the first `limit` documents of each task or on all.

    Raises CheckpointError for a tokenizer that has no token to put before a text, or after it.
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        raise CheckpointError(
            tokenizer.name_or_path, "a tokenizer without a first or last token", "a `bos_token` or `eos_token`",
            "name one in tokenizer_config.json",
        )  # fmt: skip
    for task in tasks["tasks"].values():
        task.set_fewshot_seed(FEWSHOT_SEED)
    with redirect_stdout(sys.stderr):  # it says what it does
        judged = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=BATCH_SIZE)
        results = lm_eval.evaluate(judged, tasks, limit=limit, bootstrap_iters=BOOTSTRAP, log_samples=False)
    scores = []
    for task, values in results["results"].items():
        for key, value in values.items():  # "acc,none": the metric and the filter of the answer
            name, _, answer_filter = key.partition(",")
            if not answer_filter or name.endswith("_stderr"):
                continue
            metric = name if answer_filter == "none" else f"{name} ({answer_filter})"
            error = values.get(f"{name}_stderr,{answer_filter}")
            scores.append(
                TaskScore(
                    task, metric, float(value), float(error) if isinstance(error, float) else None,
                    results["n-samples"].get(task, {}).get("effective"), results["n-shot"].get(task),
                )
            )  # fmt: skip
    return scores
