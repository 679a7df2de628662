"""Machine code of GPUs, as the disassembler writes it."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path


def read(tool: str | Path, flag: str, cubin: bytes) -> str:
    """What nvdisasm or cuobjdump says of it."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, flag, file.name], capture_output=True, text=True, check=True).stdout


def loops(sass: str) -> list[int]:
    """Instructions from a label to a jump back to it, for each such jump with asynchronous loads among them."""
    labels: dict[str, int] = {}
    seen: list[str] = []
    found = []
    for label, instruction in re.findall(r"^(\.L_x_\d+):|^\s*/\*[0-9a-f]{4,}\*/\s+(.*?);", sass, re.M):
        if label:
            labels[label] = len(seen)
            continue
        seen.append(instruction)
        target = re.search(r"BRA.*\((\.L_x_\d+)\)", instruction)
        if target and target[1] in labels:
            body = seen[labels[target[1]] :]
            if any("LDGSTS" in line for line in body):
                found.append(len(body))
    return found
