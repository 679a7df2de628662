"""Every variant of decode.cu compiled for GPUs that need not be there; prints as JSON what each compiled to.

    python tests/nvcc.py [part of a name ...] > tests/golden/decode.json

`loop` counts the instructions of a turn, which takes two records, `per_weight` those of a lane for a weight.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

import torch

from bitshard.kernels.decode import CHANNELS, SOURCE, Variant
from bitshard.records import ROWS
from sass import loops, read

NVCC = shutil.which("nvcc")
CARDS = (80, 90)
WIDE = (0, 1, 2, 4)
TOKENS = (1, 2, 4, 8, 16)
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
WEIGHTS = 2 * CHANNELS * ROWS // 32  # of a lane in a turn


def nvdisasm() -> str | None:
    """The toolkit's, or the one in Triton's wheel, which is not imported for it."""
    triton = find_spec("triton")
    wheels = triton and triton.origin and Path(triton.origin).parent / "backends/nvidia/bin"
    return shutil.which("nvdisasm") or (shutil.which("nvdisasm", path=wheels) if wheels else None)


NVDISASM = nvdisasm()


def build(variant: Variant, card: int, kind: str) -> tuple[bytes, str]:
    """A cubin or ptx, and what was said about it."""
    assert NVCC is not None
    with tempfile.NamedTemporaryFile() as file:
        command = [NVCC, "-std=c++17", f"-arch=sm_{card}", f"-{kind}", "-Xptxas", "-v", *variant.options()]
        run = subprocess.run([*command, "-o", file.name, SOURCE], check=True, capture_output=True, text=True)
        return file.read(), run.stderr


def facts(variant: Variant, card: int) -> dict[str, Any]:
    assert NVDISASM is not None
    cubin, said = build(variant, card, "cubin")
    loop = min(loops(read(NVDISASM, "-c", cubin)))  # jumps back from behind the kernel's end make longer ones
    return {
        "registers": int(re.findall(r"Used (\d+) registers", said)[0]),
        "local": sum(map(int, re.findall(r"(\d+) bytes (?:stack|spill)", said))),
        "shared": variant.shared_bytes,
        "loop": loop,
        "per_weight": round(loop / WEIGHTS, 2),
    }


def jobs(parts: Sequence[str] = ()) -> dict[str, tuple[Variant, int]]:
    """All that `Variant.of` gives, by name, or those with one of the parts in their names."""
    found = {
        f"sm_{card} {name} mix64-{wide} {tokens}-token": (Variant.of(wide, tokens, dtype), card)
        for card, (name, dtype), wide, tokens in product(CARDS, DTYPES.items(), WIDE, TOKENS)
    }
    return {name: job for name, job in found.items() if not parts or any(part in name for part in parts)}


if __name__ == "__main__":
    lines = (f"  {json.dumps(name)}: {json.dumps(facts(*job))}" for name, job in jobs(sys.argv[1:]).items())
    print("{", ",\n".join(lines), "}", sep="\n")
