"""An engine's own server over a checkpoint, asked by OpenAI's client."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bitshard.errors import BitshardError
from bitshard.serve import ENGINES, ServeOptions, command
from bitshard.spec import MixSpec, QuantSpec
from commands import free_port, refusal
from dense import character_tokenizer
from factory import random_checkpoint

pytest.importorskip("fastapi")
openai = pytest.importorskip("openai")


@pytest.fixture(scope="module", params=[MixSpec(), QuantSpec(4, 16, sym=False, desc_act=True)], ids=str)
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, int]]:
    """A checkpoint's name and the port where transformers answers for it."""
    path = random_checkpoint(tmp_path_factory.mktemp("served") / "m", "llama", request.param)
    tokenizer = character_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    tokenizer.save_pretrained(path)
    port, environment = free_port(), {**os.environ, "HF_HUB_OFFLINE": "1"}
    arguments = [sys.executable, "-m", "bitshard", "serve", path, "--port", str(port), "--log-level", "error"]
    with subprocess.Popen(arguments, env=environment, stderr=subprocess.PIPE, text=True) as server:
        yield str(path), port
        server.terminate()


def ask(port: int, call: Any) -> Any:
    """The server's answer, as soon as it gives one."""
    client = openai.OpenAI(base_url=f"http://localhost:{port}/v1", api_key="none", max_retries=0)
    for _ in range(240):
        try:
            return call(client)
        except openai.APIConnectionError:
            time.sleep(0.5)
    raise AssertionError("no answer")


def test_chat_and_completion(served: tuple[str, int]) -> None:
    model, port = served
    messages, how = [{"role": "user", "content": "Hello"}], {"model": model, "max_tokens": 5}
    whole = ask(port, lambda client: client.chat.completions.create(messages=messages, **how))
    assert whole.usage.completion_tokens <= 5 and whole.choices[0].message.content is not None
    chunks = list(ask(port, lambda client: client.chat.completions.create(messages=messages, stream=True, **how)))
    assert len(chunks) >= 2
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.choices[0].message.content
    assert ask(port, lambda client: client.completions.create(prompt="Hello", **how)).choices[0].text is not None


def test_the_engines_own_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = random_checkpoint(tmp_path / "m", "llama", MixSpec())
    arguments, environment = command(path, ServeOptions(port=1234, extra=("--dtype", "bfloat16")))
    assert arguments[1:5] == ["-m", "transformers.cli.transformers", "serve", str(path)]
    assert arguments[5:] == ["--host", "localhost", "--port", "1234", "--dtype", "bfloat16"]
    assert environment["BITSHARD_BACKEND"] == "auto" and environment["BITSHARD_GPTQ"] == "1"
    monkeypatch.setitem(ENGINES, "vllm", ((), ""))
    for spec in (MixSpec(), QuantSpec(4, 32)):
        path = random_checkpoint(tmp_path / str(spec), "llama", spec)
        arguments, _ = command(path, ServeOptions("vllm"))
        assert arguments[1:7] == ["-m", "vllm.entrypoints.openai.api_server", "--model", str(path),
                                  "--tensor-parallel-size", "1"]  # fmt: skip
        assert arguments[7:9] == ["--quantization", "bitshard"]


def test_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = random_checkpoint(tmp_path / "m", "llama", MixSpec())
    assert "engine: found 'sglang'; allowed: transformers or vllm" in refusal("serve", path, "--engine", "sglang")
    assert "--tp: found 2 ranks; allowed: 1 with transformers' server" in refusal("serve", path, "--tp", 2)
    assert "nothing" in refusal("serve", tmp_path / "nothing")
    if not torch.cuda.is_available():
        for backend in ("decode", "triton"):
            sentence = refusal("serve", path, "--backend", backend)
            assert f"found {backend}, which does not run here" in sentence and "GPU is needed" in sentence
    old = random_checkpoint(tmp_path / "old", "llama", QuantSpec(4, 16))
    config = json.loads((old / "config.json").read_text())
    del config["quantization_config"]
    (old / "config.json").write_text(json.dumps(config))
    assert "in a file of its own; allowed: one that transformers sees" in refusal("serve", old)
    monkeypatch.setitem(ENGINES, "vllm", (("no_such_engine",), "install vLLM"))
    with pytest.raises(BitshardError, match="engine: found vllm without no_such_engine.*install vLLM"):
        ServeOptions("vllm")
