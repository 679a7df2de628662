"""Tokens a second of `bitshard generate` beside llama.cpp: same prompt, same number of new tokens, same threads.

    python benchmarks/generation/run.py --checkpoint OUT --gguf Q2_K.gguf --llama VL/bin/python --threads 1,2

Each run is a process of its own, all take turns, and the best of each is kept: what else a machine does only adds.
Both count from the prompt's first to the last new token; compiling, which comes before, is in the file.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from bitshard.bench import report

PEER = Path(__file__).with_name("peer_llama.py")
PROMPT = "<|im_start|>user\nWrite a Python function that merges two sorted lists.<|im_end|>\n<|im_start|>assistant\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--gguf", type=Path, required=True)
    parser.add_argument("--llama", required=True, help="Python of an environment with llama-cpp-python")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    rows = []
    for threads in map(int, arguments.threads.split(",")):
        calls = {
            "bitshard auto": lambda t=threads: ours(arguments, t, "auto"),
            "bitshard auto, compiled": lambda t=threads: ours(arguments, t, "auto", "--compile"),
            "bitshard exact": lambda t=threads: ours(arguments, t, "exact"),
            "llama.cpp": lambda t=threads: theirs(arguments, t),
        }
        taken: dict[str, list[dict[str, Any]]] = {name: [] for name in calls}
        for _ in range(arguments.repetitions):
            for name, call in calls.items():
                taken[name].append(call())
        for name, runs in taken.items():
            rates = [run["tokens"] / run["seconds"] for run in runs]
            rows.append({"program": name, "threads": threads, "rates": rates, "best": max(rates), **runs[0]})
            print(f"{threads} threads  {name:24} {max(rates):6.1f} tokens a second  ({runs[0]['tokens']} tokens)")
    files = {
        "checkpoint": arguments.checkpoint.name,
        "gguf": arguments.gguf.name,
        "gguf_bytes": arguments.gguf.stat().st_size,
    }
    checkpoint_bytes = sum(file.stat().st_size for file in arguments.checkpoint.glob("*.safetensors"))
    result = {"benchmark": "generation", "header": report.header("cpu"), **files, "checkpoint_bytes": checkpoint_bytes}
    report.write_json(arguments.out, {**result, "prompt": PROMPT, "rows": rows})


def ours(arguments: argparse.Namespace, threads: int, backend: str, *more: str) -> dict[str, Any]:
    options = ["--no-chat", "--json", "--max-new-tokens", str(arguments.tokens), "--backend", backend, *more]
    command = [sys.executable, "-m", "bitshard", "generate", str(arguments.checkpoint), PROMPT, *options]
    found = json.loads(spoken(command, threads))
    times = {name: found[name] for name in ("seconds", "compile_seconds")}
    return {"text": found["text"], "tokens": len(found["token_ids"]), **times}


def theirs(arguments: argparse.Namespace, threads: int) -> dict[str, Any]:
    options = ["--prompt", PROMPT, "--tokens", str(arguments.tokens), "--threads", str(threads)]
    return json.loads(spoken([arguments.llama, str(PEER), str(arguments.gguf), *options], threads))


def spoken(command: list[str], threads: int) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    return subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout


if __name__ == "__main__":
    main()
