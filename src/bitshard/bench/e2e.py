"""`bench e2e`: time to the first token and tokens a second of whole models, in every engine a user could choose.

Each run - a model in an engine on some ranks - is a process of its own (e2e_engines.py), one after another: threads
and memory are then its own. A run is checked against the 16-bit model before it is timed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from rich.table import Table

from bitshard.bench import report
from bitshard.bench.kernels import floors_of
from bitshard.bench.timing import Times
from bitshard.checkpoint import Checkpoint
from bitshard.errors import BenchError, BitshardError, CheckpointError, SpecError
from bitshard.integrations.transformers import load_config
from bitshard.progress import Progress, silent
from bitshard.sources import encode, load_tokenizer, tokens_before

CHECKS, CHECK_TOKENS = 32, 48  # prompts of the check, and how long they are
LEAST_AGREEMENT = 0.3  # of their next tokens with the 16-bit model's: at 2.5 bits 0.5 and more, of wrong kernels 0.05
MODULES = {"transformers": "transformers", "vllm": "vllm", "llama.cpp": "llama_cpp"}
SECONDS = 1800  # that a run may take


@dataclass(frozen=True)
class E2eBench:
    """batches: prompts at once. contexts: tokens of a prompt. new_tokens: written after the first. ranks: degrees."""

    batches: tuple[int, ...] = (1, 4)
    contexts: tuple[int, ...] = (128, 512)
    new_tokens: int = 32
    ranks: tuple[int, ...] = (1, 2)
    repetitions: int = 5

    def __post_init__(self) -> None:
        for name in ("batches", "contexts", "ranks"):
            if not getattr(self, name) or min(getattr(self, name)) < 1:
                raise SpecError(name, str(getattr(self, name)), "numbers of 1 or more", "choose others")
        if self.new_tokens < 1:
            raise SpecError("new_tokens", str(self.new_tokens), "1 or more", "ask for at least one token")
        if self.repetitions < 3:
            raise SpecError("repetitions", str(self.repetitions), "3 or more", "ask for more")
        if max(self.ranks) > torch.get_num_threads():
            found = f"{max(self.ranks)} ranks on {torch.get_num_threads()} cores"
            raise SpecError("ranks", found, "a core for each", "choose fewer ranks")

    @property
    def longest(self) -> int:
        return max(CHECK_TOKENS, *self.contexts) + self.new_tokens + 1


@dataclass(frozen=True)
class Run:
    """A model in an engine. dtype: of activations, and of 16-bit weights."""

    engine: str
    model: str
    path: Path
    tp_size: int
    threads: int
    dtype: str = "float32"

    @property
    def name(self) -> str:
        return f"{self.model}, {self.engine}" + (f", {self.tp_size} ranks" if self.tp_size > 1 else "")

    @property
    def nbytes(self) -> int:
        """Of the files with weights."""
        files = [self.path] if self.path.is_file() else self.path.glob("*.safetensors")
        return sum(file.stat().st_size for file in files)


@dataclass(frozen=True)
class E2eRow:
    """One run with one batch of one context. first, step: milliseconds to the first new token, and of each step after.

    peak_bytes: resident memory of all its processes. agreement: share of the check's next tokens that are the 16-bit
    model's in float32.
    """

    run: str
    tp_size: int
    threads: int
    nbytes: int
    peak_bytes: int
    agreement: float
    batch: int
    context: int
    first: Times
    step: Times

    @property
    def tokens_per_second(self) -> float:
        return 1e3 * self.batch / self.step.median


@dataclass(frozen=True)
class E2eReport:
    """refused: why a run was not timed. runs_left: not come to yet."""

    header: dict[str, Any]
    config: E2eBench
    rows: list[E2eRow]
    refused: dict[str, str]
    runs_left: int = 0

    def to_dict(self) -> dict[str, Any]:
        return {
            "benchmark": "e2e",
            "header": self.header,
            "config": asdict(self.config),
            "rows": [asdict(row) for row in self.rows],
            "refused": self.refused,
            "runs_left": self.runs_left,
        }

    def require_all(self) -> None:
        """Raises BenchError for all runs that were not timed."""
        report.require_timed(
            self.refused, "bench e2e", "runs that were not timed", "engines that run here and are right"
        )

    def render(self) -> Table:
        lines = [
            (
                row.run, f"{row.batch} x {row.context}", f"{row.first.median:.0f}", f"{row.tokens_per_second:.1f}",
                f"{row.peak_bytes / 2**30:.2f}", f"{row.agreement:.2f}",
            )
            for row in self.rows
        ]  # fmt: skip
        columns = ("model, engine", "prompts", "first ms", "tok/s", "peak GiB", "agrees")
        return report.table("whole models, end to end", columns, lines, report.caption(self.header))

    def write(self, out: Path) -> None:
        report.write_json(out, self.to_dict())
        panels = []
        for title, times in (("first token", "first"), ("each step after it", "step")):
            lines: list[dict[str, list[tuple[float, Times]]]] = [{} for _ in self.config.contexts]
            for row in self.rows:
                own = lines[self.config.contexts.index(row.context)]
                own.setdefault(row.run, []).append((row.batch, getattr(row, times)))
            named = zip(lines, self.config.contexts, strict=True)
            panels.append([report.Panel(f"{title}, prompts of {context}", own) for own, context in named])
        caption = report.caption(self.header)
        report.plot(out.with_suffix(".png"), "whole models, end to end", panels, "prompts at once", caption)


def bench_e2e(
    model: Path,
    checkpoint: Path,
    gguf: Path | None = None,
    config: E2eBench | None = None,
    out: Path | None = None,
    progress: Progress = silent,
) -> E2eReport:
    """Check, then time every run, and write `out` (.json after every run, .png beside it at the end) if given.

    model: the 16-bit one. A run that is wrong or fails is not timed; `require_all` of the report says so. Raises
    CheckpointError for files that are not what they should be, and BenchError when the 16-bit model itself fails.
    """
    config = config or E2eBench()
    if out is not None:
        report.require_json_path(out)
    _require_files(model, checkpoint, gguf, config)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    header = report.header(device)
    header["bytes_per_second"] = floors_of(device).bytes_per_second
    job = {"config": asdict(config), "longest": config.longest, **_prompts(model, config)}
    rows, refused = list[E2eRow](), dict[str, str]()
    cores = torch.get_num_threads()
    whole = Run("transformers", "16-bit", model, 1, cores)
    try:
        expected = _result(whole, {**job, "config": {**job["config"], "batches": []}})["next_tokens"]
    except BenchError as error:
        raise BenchError(whole.name, error.found, "a model that transformers runs", "mend that first") from None
    job["expected"], job["least"] = expected, LEAST_AGREEMENT
    runs = _runs(model, checkpoint, gguf, config, cores)
    for left, run in zip(range(len(runs) - 1, -1, -1), progress(runs, "measuring"), strict=True):
        try:
            if find_spec(MODULES[run.engine]) is None:
                raise BenchError(run.name, f"no {MODULES[run.engine]}", "the engine installed", "docs/bench-e2e.md")
            if run.tp_size > 1:
                Checkpoint.open(run.path).plan().require(run.tp_size)
            found = _result(run, job)
            for batch, context, first, step in found["times"]:
                facts = (run.name, run.tp_size, run.threads, run.nbytes, found["peak_bytes"], found["agreement"])
                rows.append(E2eRow(*facts, batch, context, Times.of(first), Times.of(step)))
        except BitshardError as error:
            refused[run.name] = error.found
        if out is not None:  # what has been measured stays, whatever ends the others
            report.write_json(out, E2eReport(header, config, rows, refused, left).to_dict())
    header["load_after"] = report.load()
    result = E2eReport(header, config, rows, refused)
    if out is not None:
        result.write(out)
    return result


def _runs(model: Path, checkpoint: Path, gguf: Path | None, config: E2eBench, cores: int) -> list[Run]:
    runs = []
    for engine in ("transformers", "vllm"):
        for size in config.ranks:
            runs.append(Run(engine, "16-bit", model, size, cores // size, "bfloat16"))
            runs.append(Run(engine, "bitshard", checkpoint, size, cores // size))
    if gguf is not None:
        runs.append(Run("llama.cpp", gguf.stem, gguf, 1, cores))
    return runs


def _require_files(model: Path, checkpoint: Path, gguf: Path | None, config: E2eBench) -> None:
    if Checkpoint.open(model).quantization is not None:
        raise CheckpointError(str(model), "a quantized checkpoint", "the 16-bit model", "name it first, then the other")
    if (quantized := Checkpoint.open(checkpoint)).quantization is None:
        raise CheckpointError(str(checkpoint), "a 16-bit model", "a quantized checkpoint of it", "name it second")
    quantized.check_matrices()
    if gguf is not None and not gguf.is_file():
        raise CheckpointError(str(gguf), "no such file", "a .gguf file of the same model", "check the name")
    most = getattr(load_config(model), "max_position_embeddings", config.longest)
    if config.longest > most:
        raise SpecError("contexts", f"{config.longest} tokens in all", f"{most}, the model's longest", "ask for fewer")


def _prompts(model: Path, config: E2eBench) -> dict[str, Any]:
    """Token ids of Python's own documentation, which every machine has: to check with, and for each batch's rows."""
    tokenizer = load_tokenizer(model)
    before = tokens_before(tokenizer)
    text = "\n\n".join(topics[name] for name in sorted(topics))[:200_000]
    ids = encode(tokenizer, text)

    def prompts(count: int, length: int) -> list[list[int]]:
        own = length - len(before)
        starts = [i * len(ids) // count % max(1, len(ids) - own) for i in range(count)]
        return [[*before, *ids[start : start + own]] for start in starts]

    longest = max(config.contexts)
    if len(ids) < longest:
        raise SpecError("contexts", str(longest), f"{len(ids)} tokens or fewer", "ask for shorter prompts")
    return {"checks": prompts(CHECKS, CHECK_TOKENS), "prompts": prompts(max(config.batches), longest)}


def _result(run: Run, job: dict[str, Any]) -> dict[str, Any]:
    """What the run's process found. Raises BenchError with its last words when it fails, and when its check is red."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(run.threads), **_vllm_environment(run)}
    with tempfile.TemporaryDirectory(prefix="bitshard-e2e-") as folder:
        asked, found = Path(folder) / "job.json", Path(folder) / "found.json"
        facts = {**asdict(run), "path": str(run.path), "quantized": run.model == "bitshard"}
        asked.write_text(json.dumps({**facts, **job, "found": str(found)}))
        command = [sys.executable, "-m", "bitshard.bench.e2e_engines", str(asked)]
        try:
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=SECONDS)
        except subprocess.TimeoutExpired:
            raise BenchError(run.name, f"no end within {SECONDS} s", "less work", "ask for fewer tokens") from None
        if done.returncode or not found.exists():
            raise BenchError(run.name, _last_words(done.stderr), "a run to the end", "mend that, then run it again")
        result: dict[str, Any] = json.loads(found.read_text())
    if "times" not in result:
        said = f"{result['agreement']:.0%} of its next tokens are the 16-bit model's, at least {LEAST_AGREEMENT:.0%}"
        raise BenchError(run.name, said + " allowed", "a sound model", "mend that, then run it again")
    return result


def _vllm_environment(run: Run) -> dict[str, str]:
    """What vLLM on a processor wants to be told: each rank's cores, room for keys and values, and to be quiet."""
    cores = sorted(os.sched_getaffinity(0))[: run.threads * run.tp_size]
    ranks = [cores[i : i + run.threads] for i in range(0, len(cores), run.threads)]
    bound = "|".join(",".join(map(str, rank)) for rank in ranks)
    return {"VLLM_CPU_OMP_THREADS_BIND": bound, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}


def _last_words(stderr: str) -> str:
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    return next((line for line in reversed(lines) if "Error" in line), lines[-1] if lines else "nothing said")[:300]
