"""decode.cu compiled for a processor, where each thread of a block is a coroutine (cuda_on_host.h)."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from bitshard.kernels import decode
from bitshard.kernels.decode import Variant

COMPILER = shutil.which("g++")


def emulate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `decode` compile for a processor and see a card of four multiprocessors."""
    monkeypatch.setattr(decode, "_compiled", lambda variant, device: compiled(variant))
    monkeypatch.setattr(decode, "_multiprocessors", lambda device: 4)


@cache
def compiled(variant: Variant) -> Callable[..., None]:
    """What torch.cuda would have made of the source, to be called alike."""
    assert COMPILER is not None
    built, here = _folder() / f"{len(list(_folder().iterdir()))}.so", Path(__file__).parent
    command = [COMPILER, "-std=c++17", "-O1", "-shared", "-fPIC", "-w", f'-DDECODE_CU="{decode.SOURCE}"']
    subprocess.run([*command, *variant.options(), "-o", built, here / "decode_on_host.cpp"], check=True)
    run = ctypes.CDLL(str(built)).run

    def kernel(grid: Sequence[int], block: Sequence[int], args: Sequence[Any], shared_mem: int) -> None:
        tensors, sizes = args[:9], args[9:]
        pointers = (ctypes.c_void_p * 9)(*[tensor.data_ptr() or None for tensor in tensors])
        lengths = (ctypes.c_long * 2)(args[0].nbytes, args[1].nbytes)
        run((ctypes.c_int * 3)(*grid), block[0], shared_mem, pointers, (ctypes.c_int * 3)(*sizes), lengths)

    return kernel


@cache
def _folder() -> Path:
    _folder.kept = tempfile.TemporaryDirectory()  # type: ignore[attr-defined]  # until the process ends
    return Path(_folder.kept.name)  # type: ignore[attr-defined]
