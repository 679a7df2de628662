"""`bitshard generate`: text from a checkpoint on one rank or several, and what each token sends between them."""

from __future__ import annotations

import math
import os
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import CompileConfig, PreTrainedModel, StoppingCriteria, TextStreamer
from transformers.utils import logging as transformers_logging

from bitshard.checkpoint import Checkpoint
from bitshard.errors import CheckpointError, SpecError
from bitshard.integrations.transformers import load, require_tokens
from bitshard.integrations.transformers_parallel import require_degree
from bitshard.kernels import require_backend
from bitshard.parallel import Strategy, Traffic, count_collectives, launch
from bitshard.sources import load_tokenizer, readable

LEAST_TEMPERATURE = 1e-6  # less is greedy, and soon divides logits to infinity


@dataclass(frozen=True)
class GenerateOptions:
    """temperature 0 is greedy. chat: wrap the prompt in the tokenizer's chat template if it has one. backend: see
    kernels; "auto" is the fastest. compile: make one graph of a token's step before the clock runs.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    seed: int = 0
    chat: bool = True
    stream: bool = False
    backend: str = "auto"
    compile: bool = False

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise SpecError("max_new_tokens", str(self.max_new_tokens), "1 or more", "ask for at least one token")
        if self.temperature != 0 and not LEAST_TEMPERATURE <= self.temperature < math.inf:
            raise SpecError(
                "temperature", str(self.temperature), f"0, or {LEAST_TEMPERATURE:g} or more",
                "choose 0 for greedy decoding",
            )  # fmt: skip
        require_backend(self.backend)


@dataclass(frozen=True)
class Generation:
    """The new text, and the measurements of the run on rank 0. traffic: collectives of one decoded token.

    compile_seconds: what compiling took before `seconds` began, None without.
    """

    text: str
    token_ids: list[int]
    tp_size: int
    strategy: Strategy
    seconds: float
    tokens_per_second: float
    traffic: Traffic
    weight_bytes_per_rank: int
    compile_seconds: float | None = None


def generate(
    path: Path, prompt: str, options: GenerateOptions, tp_size: int = 1, strategy: Strategy = "tp-aware"
) -> Generation:
    """Continue `prompt` with the checkpoint `path` on `tp_size` ranks.

    Inside a torchrun job of that size this process is one of its ranks; otherwise the ranks are started here.
    Raises PlanError when the degree or strategy does not fit, before any rank starts, and SpecError when the model's
    step cannot be compiled.
    """
    if options.compile and tp_size > 1:
        raise SpecError("--compile", f"{tp_size} ranks", "one rank", "leave it out, or choose --tp 1")
    checkpoint = Checkpoint.open(path)
    if checkpoint.quantization is not None:
        checkpoint.check_matrices()
    if tp_size > 1:
        require_degree(checkpoint.plan(), tp_size, strategy)
    if tp_size == 1 or "TORCHELASTIC_RUN_ID" in os.environ:
        return _run(path, prompt, options, tp_size, strategy)
    return launch(tp_size, _run, path, prompt, options, tp_size, strategy)[0]


def _run(path: Path, prompt: str, options: GenerateOptions, tp_size: int, strategy: Strategy) -> Generation:
    if os.environ.get("RANK", "0") != "0":
        transformers_logging.disable_progress_bar()  # one bar is enough for all ranks
    if tp_size > 1:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // tp_size))
    tokenizer = load_tokenizer(path)
    model = load(path, tp_size, strategy, backend=options.backend)
    inputs = _encode(tokenizer, prompt, options.chat).to(model.device)
    length = inputs["input_ids"].shape[1] + options.max_new_tokens
    require_tokens(model, inputs["input_ids"], length, "max_new_tokens")
    torch.manual_seed(options.seed)  # the same on every rank, so that they all draw the same tokens
    first_rank = not dist.is_initialized() or dist.get_rank() == 0
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    sampling = {"do_sample": True, "temperature": options.temperature} if options.temperature else {"do_sample": False}
    compile_seconds: float | None = None
    guards: AbstractContextManager[None] = nullcontext()
    if options.compile:
        start = time.perf_counter()
        sampling |= _compiled(model, inputs, options.max_new_tokens)
        compile_seconds = time.perf_counter() - start
        # every step is the one that has been compiled; to ask whether it is took 1.9 ms of a token's 25
        guards = torch.compiler.set_stance(skip_guard_eval_unsafe=True)
    start = time.perf_counter()
    with torch.no_grad(), guards:
        ids = model.generate(
            **inputs,
            **sampling,
            max_new_tokens=options.max_new_tokens,
            streamer=streamer if options.stream and first_rank else None,
        )
    seconds = time.perf_counter() - start
    with torch.no_grad(), count_collectives() as traffic:
        model(ids[:, -1:])
    new_ids = ids[0, inputs["input_ids"].shape[1] :].tolist()
    return Generation(
        text=tokenizer.decode(new_ids, skip_special_tokens=True),
        token_ids=new_ids,
        tp_size=tp_size,
        strategy=strategy,
        seconds=seconds,
        tokens_per_second=len(new_ids) / seconds,
        traffic=traffic,
        weight_bytes_per_rank=sum(p.numel() * p.element_size() for p in model.parameters()),
        compile_seconds=compile_seconds,
    )


class _Until(StoppingCriteria):  # type: ignore[misc]
    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.length, device=input_ids.device)


def _compiled(model: PreTrainedModel, inputs: Any, max_new_tokens: int) -> dict[str, Any]:
    """Arguments of `model.generate` that run a compiled step over a cache of fixed length; it is compiled here."""
    quantizer = getattr(model, "hf_quantizer", None)
    if not model._can_compile_fullgraph or not (quantizer is None or quantizer.is_compileable):
        raise _not_one_graph(model, "whose step is found out in Python")
    torch.compiler.reset()  # of graphs for other sizes and models it keeps no more than eight
    from bitshard.kernels.fuse import FuseLinears  # imports torch's compiler, which takes seconds

    # the first is all that transformers' own mode, reduce-overhead, means; torch takes no options beside a mode
    options = {"triton.cudagraphs": True, "post_grad_custom_pre_pass": FuseLinears()}
    config = CompileConfig(fullgraph=True, dynamic=False, mode=None, options=options)
    config._compile_all_devices = True  # processors too
    settings = {"cache_implementation": "static", "compile_config": config}

    def write(tokens: int) -> None:
        until, tokens = _Until(inputs["input_ids"].shape[1] + tokens), min(tokens, max_new_tokens)
        length = {"min_new_tokens": tokens, "max_new_tokens": max_new_tokens}
        with torch.no_grad():
            model.generate(**inputs, **settings, **length, do_sample=False, stopping_criteria=[until])

    try:
        write(2)  # the first comes of the prompt, the second compiles
        with torch.compiler.set_stance("fail_on_recompile"):
            write(3)  # and the third must not, as it would where a step counts in Python: sliding windows
    except (RuntimeError, OSError) as error:  # the compiler's own are RuntimeErrors
        says = str(error).strip().splitlines()
        found = f"{type(error).__name__}: {says[0] if says else ''}"
        if isinstance(error, (OSError, torch._inductor.exc.InductorError)):
            raise SpecError(
                "--compile", found, "a working C++ compiler, and a folder for what it makes",
                "install one, g++ for example; TORCHINDUCTOR_CACHE_DIR names the folder; or leave it out",
            ) from None  # fmt: skip
        raise _not_one_graph(model, found) from None
    return settings


def _not_one_graph(model: PreTrainedModel, why: str) -> SpecError:
    found, allowed = f"model_type {model.config.model_type} ({why})", "a model whose step is the same graph every time"
    return SpecError("--compile", found, allowed, "leave it out")


def _encode(tokenizer: Any, prompt: str, chat: bool) -> Any:
    try:
        prompt.encode()
    except UnicodeEncodeError:  # bytes of a command line that are no UTF-8
        raise SpecError("prompt", ascii(prompt), "UTF-8 text", "write it in UTF-8") from None
    if chat and tokenizer.chat_template:
        messages = [{"role": "user", "content": prompt}]
        try:
            return tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        except Exception as error:  # whatever a template, which is a program, may raise
            says = " ".join(str(error).split())
            raise CheckpointError(
                tokenizer.name_or_path, f"a chat template that fails ({type(error).__name__}: {says})",
                "a template for one user message", "get the tokenizer files again, or pass --no-chat",
            ) from None  # fmt: skip
    with readable(tokenizer):
        return tokenizer(prompt, return_tensors="pt")
