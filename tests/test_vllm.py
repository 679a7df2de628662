"""In vLLM itself, greedy tokens as in transformers, on one rank and on two: `make test-vllm`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from bitshard.integrations.transformers import load
from bitshard.spec import MixSpec, QuantSpec
from factory import random_checkpoint, token_ids

pytestmark = [pytest.mark.vllm, pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")]
# a rank then has whole tiles of 64 output channels of k and v, and whole groups
SIZES = {"hidden_size": 128, "head_dim": 64, "intermediate_size": 256}
TOKENS = 12
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "BITSHARD_BACKEND": "exact",
}
GENERATE = """
import json, sys
from vllm import LLM, SamplingParams
if __name__ == "__main__":
    path, tp_size, quantization, prompts, tokens = json.loads(sys.argv[1])
    model = LLM(
        path, quantization=quantization, tensor_parallel_size=tp_size, dtype="float32", enforce_eager=True,
        skip_tokenizer_init=True, max_model_len=64, max_num_seqs=4,
    )
    how = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    done = model.generate([{"prompt_token_ids": ids} for ids in prompts], how)
    print("TOKENS", json.dumps([list(one.outputs[0].token_ids) for one in done]))
"""


def run(
    folder: Path, tp_size: int, quantization: str | None, prompts: torch.Tensor
) -> subprocess.CompletedProcess[str]:
    script = folder.parent / "generate.py"  # vLLM starts its processes anew from it
    script.write_text(GENERATE)
    arguments = json.dumps([str(folder), tp_size, quantization, prompts.tolist(), TOKENS])
    threads = {"VLLM_CPU_OMP_THREADS_BIND": "|".join(map(str, range(tp_size)))} if tp_size > 1 else {}
    command, environment = [sys.executable, script, arguments], {**os.environ, **ENVIRONMENT, **threads}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)


@pytest.mark.parametrize("tp_size", [1, 2])
@pytest.mark.parametrize(
    ("spec", "quantization", "model_type"),
    [
        (MixSpec(), None, "qwen2"),
        (QuantSpec(4, 32, sym=True, desc_act=True), "bitshard", "llama"),
        (QuantSpec(3, 64, sym=False), "bitshard", "qwen3"),
    ],
    ids=str,
)
def test_greedy_tokens(
    spec: MixSpec | QuantSpec, quantization: str | None, model_type: str, tp_size: int, tmp_path: Path
) -> None:
    folder = random_checkpoint(tmp_path / "m", model_type, spec, **SIZES)
    prompts = token_ids(96, shape=(3, 9))
    expected = load(folder).generate(prompts, max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False)
    done = run(folder, tp_size, quantization, prompts)
    assert done.returncode == 0, done.stdout + done.stderr
    found = next(line for line in done.stdout.splitlines() if line.startswith("TOKENS"))
    assert json.loads(found.removeprefix("TOKENS")) == expected[:, prompts.shape[1] :].tolist()


def test_a_degree_that_does_not_fit(tmp_path: Path) -> None:
    """A rank would have half a tile of k's channels."""
    folder = random_checkpoint(tmp_path / "m", "llama", MixSpec(), **{**SIZES, "head_dim": 32})
    done = run(folder, 2, None, token_ids(96, shape=(1, 9)))
    assert done.returncode != 0
    assert (
        "found tensor_parallel_size 2: 64 channels / 2 splits a tile of 64 output channels" in done.stdout + done.stderr
    )
