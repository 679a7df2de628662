"""Every Triton kernel compiled for GPUs that need not be there; prints as JSON what each compiled to.

    TRITON_DEFAULT_FP_FUSION=1 python tests/aot.py [part of a name ...] > tests/golden/triton.json

Without TRITON_INTERPRET: a kernel is one or the other from the moment it is decorated. `per_weight` is the number of
lane instructions for a weight in the loop along K.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bitshard.kernels.triton import TILES, Tile, _dequantize, _linear, _sum
from sass import loops, read

BIN = Path(triton.__file__).parent / "backends/nvidia/bin"
CARDS = (80, 90)
DTYPES = {"fp16": 2, "bf16": 2, "fp32": 4}
COUNTED = {
    "cp_async": r"LDGSTS",
    "cp_async_128": r"LDGSTS\S*\.128",
    "loads_128": r"LDG\.\S*128",
    "mma": r"HMMA|HGMMA",
    "wgmma": r"HGMMA",
}
MIX64 = {"BITS": None, "ALIGNED": None}
LAYOUTS: dict[str, dict[str, Any]] = {
    **{f"mix64-{wide}": {**MIX64, "WIDE": wide} for wide in (0, 1, 2, 4)},
    **{f"mix64-{wide}-outliers": {**MIX64, "WIDE": wide} for wide in (0, 1, 2)},
    **{f"gptq-{bits}": {"BITS": bits, "ALIGNED": 128, "WIDE": None} for bits in (2, 3, 4, 8)},
    "gptq-4-group-32": {"BITS": 4, "ALIGNED": 32, "WIDE": None},
    "gptq-4-irregular": {"BITS": 4, "ALIGNED": 1, "WIDE": None},
}


def build(
    kernel: Any, types: dict[str, str | None], constants: dict[str, Any], card: int, warps: int
) -> dict[str, Any]:
    """types: of all arguments but constants, None for what is left out; pointers and sizes are aligned."""
    constants = {**constants, **{name: None for name, kind in types.items() if kind is None}}
    signature = {name: "constexpr" if name in constants else types[name] for name in kernel.arg_names}
    odd = {"M", "splits", *(name for name in signature if signature[name] == "constexpr")}
    aligned = [i for i, name in enumerate(kernel.arg_names) if name not in odd]
    source = ASTSource(
        fn=kernel, signature=signature, constexprs=constants, attrs={(i,): [["tt.divisibility", 16]] for i in aligned}
    )
    built = triton.compile(source, target=GPUTarget("cuda", card, 32), options={"num_warps": warps})
    cubin = built.asm["cubin"]
    usage, sass = read(BIN / "cuobjdump", "--dump-resource-usage", cubin), read(BIN / "nvdisasm", "-c", cubin)
    used = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage))
    return {
        "registers": int(used["REG"]),
        "local": int(used["STACK"]) + int(used["LOCAL"]),
        "shared": built.metadata.shared,
        "loop": max(loops(sass), default=0),
        **{name: len(re.findall(rf"\b(?:{pattern})", sass)) for name, pattern in COUNTED.items()},
    }


def weights(layout: str) -> dict[str, str | None]:
    types: dict[str, str | None] = {"qweight": "*i32", "scales": "*i32", "zeros": None, "g_idx": None}
    if layout.startswith("gptq"):
        types |= {"scales": "*fp16", "zeros": "*u8", "g_idx": "*i32" if layout.endswith("irregular") else None}
    return types | {"N": "i32", "K": "i32", "group": "i32"}


def linear(layout: str, dtype: str, tile: Tile, card: int) -> dict[str, Any]:
    outliers = ("*i32", "*u16", "*fp16") if layout.endswith("outliers") else (None, None, None)
    names = "outlier_rows", "outlier_columns", "outlier_values"
    types = {"x": f"*{dtype}", "y": "*fp32", **dict(zip(names, outliers, strict=True)), "M": "i32", "split_K": "i32"}
    sizes = {"BM": tile.BM, "BN": tile.BN, "BK": tile.BK, "STAGES": tile.stages}
    found = build(_linear, {**types, **weights(layout)}, {**LAYOUTS[layout], **sizes}, card, tile.warps)
    return {**found, "per_weight": round(found["loop"] * 32 * tile.warps / (tile.BN * tile.BK), 1)}


def dequantize(layout: str, dtype: str, tile: Tile, card: int) -> dict[str, Any]:
    types, sizes = {"matrix": f"*{dtype}", **weights(layout)}, {"BN": tile.BN, "BK": tile.BK}
    return build(_dequantize, types, {**LAYOUTS[layout], **sizes}, card, tile.warps)


def jobs() -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Names and what compiles them; bfloat16 is float16 but for a conversion, so two layouts stand for all."""
    for card, (dtype, size) in product(CARDS, DTYPES.items()):
        start = f"sm_{card} {dtype}"
        for layout in ("mix64-1", "gptq-4") if dtype == "bf16" else LAYOUTS:
            decode, prefill = TILES[size, True], TILES[size, False]
            yield f"{start} {layout} decode", partial(linear, layout, dtype, decode, card)
            yield f"{start} {layout} prefill", partial(linear, layout, dtype, prefill, card)
            if not layout.endswith("outliers"):
                yield f"{start} {layout} dequantize", partial(dequantize, layout, dtype, decode, card)
        types = {"parts": "*fp32", "y": f"*{dtype}", "size": "i32", "splits": "i32"}
        yield f"{start} sum", partial(build, _sum, types, {"BLOCK": 1024}, card, 4)


if __name__ == "__main__":
    asked = sys.argv[1:]
    found = {name: job() for name, job in jobs() if not asked or any(part in name for part in asked)}
    lines = (f"  {json.dumps(name)}: {json.dumps(facts)}" for name, facts in found.items())
    print("{", ",\n".join(lines), "}", sep="\n")
