"""Every Triton kernel compiled for GPUs that need not be there; prints as JSON what each compiled to.

Run as a program, and without TRITON_INTERPRET: a kernel is one or the other from the moment it is decorated.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bitshard.kernels.triton import TILES, Tile, _dequantize, _linear, _sum

BIN = Path(triton.__file__).parent / "backends/nvidia/bin"
CARDS = (80, 90)
DTYPES = {"fp16": 2, "bf16": 2, "fp32": 4}
COUNTED = {
    "cp_async": r"LDGSTS",
    "cp_async_128": r"LDGSTS\S*\.128",
    "loads_128": r"LDG\.\S*128",
    "mma": r"HMMA|HGMMA",
    "wgmma": r"HGMMA",
    "stores_to_stack": r"STL",
}
MIX64 = {"BITS": None, "ALIGNED": None}
LAYOUTS: dict[str, dict[str, Any]] = {
    **{f"mix64-{wide}": {**MIX64, "WIDE": wide} for wide in (0, 1, 2, 4)},
    **{f"gptq-{bits}": {"BITS": bits, "ALIGNED": 128, "WIDE": None} for bits in (2, 3, 4, 8)},
    "gptq-4-group-32": {"BITS": 4, "ALIGNED": 32, "WIDE": None},
    "gptq-4-irregular": {"BITS": 4, "ALIGNED": 1, "WIDE": None},
}


def build(
    kernel: Any, types: dict[str, str | None], constants: dict[str, Any], card: int, warps: int
) -> dict[str, int]:
    """types: of all arguments but constants, None for what is left out; pointers and sizes are aligned."""
    constants = {**constants, **{name: None for name, kind in types.items() if kind is None}}
    signature = {name: "constexpr" if name in constants else types[name] for name in kernel.arg_names}
    aligned = [
        i for i, name in enumerate(kernel.arg_names) if signature[name] != "constexpr" and name not in ("M", "splits")
    ]
    source = ASTSource(
        fn=kernel, signature=signature, constexprs=constants, attrs={(i,): [["tt.divisibility", 16]] for i in aligned}
    )
    built = triton.compile(source, target=GPUTarget("cuda", card, 32), options={"num_warps": warps})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        usage, sass = (
            subprocess.run([BIN / tool, flag, file.name], capture_output=True, text=True, check=True).stdout
            for tool, flag in (("cuobjdump", "--dump-resource-usage"), ("nvdisasm", "-c"))
        )
    used = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage))
    return {
        "registers": int(used["REG"]),
        "local": int(used["STACK"]) + int(used["LOCAL"]),
        "shared": built.metadata.shared,
        "instructions": len(re.findall(r"^\s*/\*[0-9a-f]+\*/", sass, re.M)),
        **{name: len(re.findall(rf"\b(?:{pattern})", sass)) for name, pattern in COUNTED.items()},
    }


def weights(layout: str) -> dict[str, str | None]:
    types: dict[str, str | None] = {"qweight": "*i32", "scales": "*i32", "zeros": None, "g_idx": None}
    if layout.startswith("gptq"):
        types |= {"scales": "*fp16", "zeros": "*u8", "g_idx": "*i32" if layout.endswith("irregular") else None}
    return types | {"N": "i32", "K": "i32", "group": "i32"}


def linear(layout: str, dtype: str, tile: Tile, card: int) -> dict[str, int]:
    outliers = (None, None, None) if layout.startswith("gptq") else ("*i32", "*u16", "*fp16")
    names = "outlier_rows", "outlier_columns", "outlier_values"
    types = {"x": f"*{dtype}", "y": "*fp32", **dict(zip(names, outliers, strict=True)), "M": "i32", "split_K": "i32"}
    sizes = {"BM": tile.BM, "BN": tile.BN, "BK": tile.BK, "STAGES": tile.stages}
    return build(_linear, {**types, **weights(layout)}, {**LAYOUTS[layout], **sizes}, card, tile.warps)


def compiled() -> Iterator[tuple[str, dict[str, int]]]:
    for card in CARDS:
        for dtype, size in DTYPES.items():
            for layout in LAYOUTS:
                for decode in (True, False):
                    name = f"sm_{card} {dtype} {layout} {'decode' if decode else 'prefill'}"
                    yield name, linear(layout, dtype, TILES[size, decode], card)
                tile = TILES[size, True]
                types = {"matrix": f"*{dtype}", **weights(layout)}
                sizes = {"BN": tile.BN, "BK": tile.BK}
                built = build(_dequantize, types, {**LAYOUTS[layout], **sizes}, card, tile.warps)
                yield f"sm_{card} {dtype} {layout} dequantize", built
            types = {"parts": "*fp32", "y": f"*{dtype}", "size": "i32", "splits": "i32"}
            yield f"sm_{card} {dtype} sum", build(_sum, types, {"BLOCK": 1024}, card, 4)


if __name__ == "__main__":
    found = {}
    for name, facts in compiled():
        print(name, facts, file=sys.stderr, flush=True)
        found[name] = facts
    print(json.dumps({"triton": triton.__version__, "kernels": found}))
