"""llama.cpp's rows: runs in a virtual environment that holds llama-cpp-python==0.3.36.

    python peer_llama.py MODEL.gguf OUT.gguf --type Q2_K

What `llama-quantize --allow-requantize` does, with its own choice of a type for every tensor.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import llama_cpp


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--type", required=True, help="Q2_K, Q3_K_S, Q3_K_M, ...")
    arguments = parser.parse_args()
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{arguments.type}")
    params.allow_requantize = True
    params.nthread = 2
    if llama_cpp.llama_model_quantize(str(arguments.model).encode(), str(arguments.out).encode(), params):
        raise SystemExit(f"{arguments.model}: llama.cpp could not quantize it to {arguments.type}")


if __name__ == "__main__":
    main()
