"""llama.cpp's side of run.py, in a virtual environment with llama-cpp-python==0.3.36: prints what it took as JSON.

python peer_llama.py MODEL.gguf --prompt TEXT --tokens 64 --threads 2
"""

from __future__ import annotations

import argparse
import json
import time

import llama_cpp


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--tokens", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    arguments = parser.parse_args()
    threads = {"n_threads": arguments.threads, "n_threads_batch": arguments.threads}
    model = llama_cpp.Llama(arguments.model, n_ctx=1024, verbose=False, **threads)
    prompt = model.tokenize(arguments.prompt.encode(), special=True)
    model.eval(prompt)  # memory is mapped: what is read for the first time would be read from disk
    model.reset()
    start = time.perf_counter()
    tokens = []
    for token in model.generate(prompt, temp=0.0, top_k=1):
        tokens.append(token)
        if len(tokens) == arguments.tokens or token == model.token_eos():
            break
    seconds = time.perf_counter() - start
    text = model.detokenize(tokens).decode(errors="replace")
    print(json.dumps({"text": text, "prompt": len(prompt), "tokens": len(tokens), "seconds": seconds}))


if __name__ == "__main__":
    main()
