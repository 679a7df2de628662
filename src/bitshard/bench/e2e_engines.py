"""What a process of `bench e2e` does: open a model in an engine, check its next tokens, time it, say how much memory.

python -m bitshard.bench.e2e_engines JOB.json, as e2e.py writes it. An engine is a function from prompts of one length
and a number of new tokens, which are written greedily and to the last, to the tokens.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bitshard.bench.timing import cpu_seconds
from bitshard.parallel import launch

Write = Callable[[Sequence[Sequence[int]], int], list[list[int]]]


def transformers(job: dict[str, Any]) -> Write:
    from bitshard.integrations.transformers import load

    torch.set_num_threads(job["threads"])
    dtype = None if job["quantized"] else getattr(torch, job["dtype"])
    model: Any = load(Path(job["path"]), job["tp_size"], dtype=dtype, backend="auto")

    def write(prompts: Sequence[Sequence[int]], tokens: int) -> list[list[int]]:
        ids = torch.tensor(prompts, device=model.device)
        how = {"do_sample": False, "max_new_tokens": tokens, "min_new_tokens": tokens, "pad_token_id": 0}
        with torch.no_grad():
            found = model.generate(ids, attention_mask=torch.ones_like(ids), **how)
        new: list[list[int]] = found[:, ids.shape[1] :].tolist()
        return new

    return write


def vllm(job: dict[str, Any]) -> Write:
    from vllm import LLM, SamplingParams

    most = max(len(job["prompts"]), 1)
    model = LLM(
        job["path"], quantization="bitshard" if job["quantized"] else None, tensor_parallel_size=job["tp_size"],
        dtype=job["dtype"], max_model_len=job["longest"], max_num_seqs=most, enable_prefix_caching=False,
        max_num_batched_tokens=most * job["longest"], skip_tokenizer_init=True,
    )  # fmt: skip

    def write(prompts: Sequence[Sequence[int]], tokens: int) -> list[list[int]]:
        how = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        done = model.generate([{"prompt_token_ids": list(ids)} for ids in prompts], how, use_tqdm=False)
        return [list(one.outputs[0].token_ids) for one in done]

    return write


def llama_cpp(job: dict[str, Any]) -> Write:
    import llama_cpp as cpp

    batches = max(len(job["prompts"]), 1)
    cpp.llama_backend_init()
    cpp.llama_log_set(_QUIET, None)
    model = cpp.llama_model_load_from_file(job["path"].encode(), cpp.llama_model_default_params())
    if not model:
        raise OSError(f"llama.cpp cannot load {job['path']}")
    settings = cpp.llama_context_default_params()
    settings.n_ctx = settings.n_batch = batches * (job["longest"] + 256)  # which it shares out in 256s
    settings.n_seq_max, settings.n_threads, settings.n_threads_batch = batches, job["threads"], job["threads"]
    context = cpp.llama_init_from_model(model, settings)
    vocabulary = cpp.llama_vocab_n_tokens(cpp.llama_model_get_vocab(model))

    def decode(rows: Sequence[Sequence[int]], start: int) -> list[int]:
        """Each sequence's next tokens in, from position `start` on; the most likely one after them out."""
        batch = cpp.llama_batch_init(sum(map(len, rows)), 0, 1)
        at, last = 0, []
        for sequence, row in enumerate(rows):
            for position, token in enumerate(row, start):
                batch.token[at], batch.pos[at] = token, position
                batch.n_seq_id[at], batch.seq_id[at][0] = 1, sequence
                batch.logits[at] = position == start + len(row) - 1
                at += 1
            last.append(at - 1)
        batch.n_tokens = at
        if cpp.llama_decode(context, batch):
            raise OSError("llama.cpp cannot decode")
        logits = (_floats(cpp.llama_get_logits_ith(context, i), vocabulary) for i in last)
        best = [int(row.argmax()) for row in logits]
        cpp.llama_batch_free(batch)
        return best

    def write(prompts: Sequence[Sequence[int]], tokens: int) -> list[list[int]]:
        cpp.llama_memory_clear(cpp.llama_get_memory(context), True)
        new = [decode(prompts, 0)]
        for step in range(tokens - 1):
            new.append(decode([[token] for token in new[-1]], len(prompts[0]) + step))
        return [list(row) for row in zip(*new, strict=True)]

    return write


_QUIET = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda *said: None)


def _floats(pointer: Any, count: int) -> torch.Tensor:
    return torch.frombuffer(ctypes.cast(pointer, ctypes.POINTER(ctypes.c_float * count)).contents, dtype=torch.float32)


ENGINES: dict[str, Callable[[dict[str, Any]], Write]] = {
    "transformers": transformers, "vllm": vllm, "llama.cpp": llama_cpp,
}  # fmt: skip


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Next tokens of the check's prompts; if these are right, the times of each case in milliseconds, and memory.

    A step is what each token after the first took. The first repetition of a case is not counted.
    """
    write, config = ENGINES[job["engine"]](job), job["config"]
    found: dict[str, Any] = {"next_tokens": [write([prompt], 1)[0][0] for prompt in job["checks"]]}
    if "expected" in job:
        right = sum(a == b for a, b in zip(found["next_tokens"], job["expected"], strict=True))
        found["agreement"] = right / len(job["checks"])
        if found["agreement"] < job["least"]:
            return found
    found["times"] = []
    for batch in config["batches"]:
        for context in config["contexts"]:
            prompts = [prompt[:context] for prompt in job["prompts"][:batch]]
            first, step = [], []
            for repetition in range(-1, config["repetitions"]):
                one, all_of_them = (
                    1e3 * cpu_seconds(partial(write, prompts, 1 + more)) for more in (0, config["new_tokens"])
                )
                if repetition >= 0:
                    first.append(one)
                    step.append((all_of_them - one) / config["new_tokens"])
            found["times"].append((batch, context, first, step))
    found["peak_bytes"] = _peak_bytes(os.getpid())
    return found


def _peak_bytes(process: int) -> int:
    """The most memory that a process ever had resident, and those that it has started; 0 where there is no /proc."""
    folder = Path(f"/proc/{process}")
    children = [child for file in folder.glob("task/*/children") for child in file.read_text().split()]
    own = re.search(r"VmHWM:\s*(\d+) kB", (folder / "status").read_text()) if folder.exists() else None
    return (1024 * int(own[1]) if own else 0) + sum(_peak_bytes(int(child)) for child in children)


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    if job["engine"] == "transformers" and job["tp_size"] > 1:
        ranks = launch(job["tp_size"], measure, job)
        found = {**ranks[0], "peak_bytes": sum(rank.get("peak_bytes", 0) for rank in ranks)}
    else:
        found = measure(job)
    Path(job["found"]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
