"""In vLLM itself, greedy tokens as in transformers, on one rank and on two: `make test-vllm`."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from pydoc_data.topics import topics
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from bitshard.checkpoint import Checkpoint
from bitshard.errors import BitshardError, PlanError
from bitshard.export import export
from bitshard.integrations.transformers import load
from bitshard.nn import eight_bit
from bitshard.sources import load_tokenizer
from bitshard.spec import MixSpec, QuantSpec
from commands import free_port
from dense import character_tokenizer
from factory import CONFIGS, random_checkpoint, token_ids

pytestmark = [pytest.mark.vllm, pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")]
# a rank then has whole tiles of 64 output channels of k and v, and whole groups; 96 channels are filled up to blocks
SIZES = {"hidden_size": 96, "head_dim": 64, "intermediate_size": 256, "eos_token_id": None}
OF_QWEN2 = {**SIZES, "hidden_size": 256}  # whose heads are what that many channels leave each
TOKENS = 6
DEMO = Path(__file__).parents[1] / "build" / "demo"
# of logits whose deviation is 0.2: vLLM's own float32 on a processor is off by up to 0.003, whichever kernel is ours
LEAST_GAP, LEAST_GAP_BFLOAT16 = 0.01, 0.02
LEAST_GAP_OF_REAL = 0.1
LEAST_GAP_AUTO = 0.04  # rounding what the products take to 8 bits moves logits by up to 0.014
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # for apply_model
    "HF_HUB_OFFLINE": "1",
    "BITSHARD_BACKEND": "exact",
}
GENERATE = """
import json, sys
from operator import attrgetter
from vllm import LLM, SamplingParams
if __name__ == "__main__":
    path, tp_size, quantization, dtype, prompts, tokens = json.loads(sys.argv[1])
    model = LLM(
        path, quantization=quantization, tensor_parallel_size=tp_size, dtype=dtype, enforce_eager=True,
        skip_tokenizer_init=True, max_model_len=64, max_num_seqs=4,
    )
    how = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    done = model.generate([{"prompt_token_ids": ids} for ids in prompts], how)
    print("HEADS", *model.apply_model(attrgetter("lm_head.quant_method.__class__.__name__")))
    print("TOKENS", json.dumps([list(one.outputs[0].token_ids) for one in done]))
"""


def run(
    folder: Path,
    tp_size: int,
    quantization: str | None,
    prompts: torch.Tensor,
    dtype: str = "float32",
    backend: str = "exact",
) -> subprocess.CompletedProcess[str]:
    script = folder.parent / "generate.py"  # vLLM starts its processes anew from it
    script.write_text(GENERATE)
    arguments = json.dumps([str(folder), tp_size, quantization, dtype, prompts.tolist(), TOKENS])
    threads = {"VLLM_CPU_OMP_THREADS_BIND": "|".join(map(str, range(tp_size)))} if tp_size > 1 else {}
    command, environment = (
        [sys.executable, script, arguments],
        {**os.environ, **ENVIRONMENT, **threads, "BITSHARD_BACKEND": backend},
    )
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)


@pytest.mark.parametrize("tp_size", [1, 2])
@pytest.mark.parametrize(
    ("spec", "quantization", "model_type"),
    [
        (MixSpec(), None, "qwen2"),
        (MixSpec(), None, "qwen3"),
        (QuantSpec(4, 32, sym=True, desc_act=True), "bitshard", "llama"),
        (QuantSpec(3, 32, sym=False), "bitshard", "qwen3"),
    ],
    ids=str,
)
def test_greedy_tokens(
    spec: MixSpec | QuantSpec, quantization: str | None, model_type: str, tp_size: int, tmp_path: Path
) -> None:
    sizes = OF_QWEN2 if model_type == "qwen2" else SIZES
    folder = random_checkpoint(tmp_path / "m", model_type, spec, **sizes)
    prompts = token_ids(96, shape=(16, 9))
    done = run(folder, tp_size, quantization, prompts)
    require_same_tokens(folder, done, prompts, LEAST_GAP)
    assert "HEADS UnquantizedEmbeddingMethod" in done.stdout


def test_one_kv_head_on_two_ranks(tmp_path: Path) -> None:
    """Both hold it."""
    folder = random_checkpoint(tmp_path / "m", "llama", MixSpec(), **{**SIZES, "num_key_value_heads": 1})
    prompts = token_ids(96, shape=(16, 9))
    require_same_tokens(folder, run(folder, 2, None, prompts), prompts, LEAST_GAP)


@pytest.mark.parametrize(("tied", "tp_size"), [(False, 2), (True, 1)])
def test_the_output_matrix_in_eight_bits(tied: bool, tp_size: int, tmp_path: Path) -> None:
    folder = random_checkpoint(
        tmp_path / "m", "llama", MixSpec(), **{**SIZES, "hidden_size": 128, "tie_word_embeddings": tied}
    )
    prompts = token_ids(96, shape=(24, 9))
    done = run(folder, tp_size, None, prompts, backend="auto")
    assert f"HEADS {' '.join(['EightBitHead'] * tp_size)}\n" in done.stdout, done.stdout + done.stderr
    require_same_tokens(folder, done, prompts, LEAST_GAP_AUTO, "auto")


@pytest.mark.parametrize("tied", [False, True])
def test_one_copy_of_the_output_matrix(tied: bool) -> None:
    """In 8 bits alone, unless it is the embedding, too."""
    from bitshard.integrations.vllm import EightBitHead

    head, weight = EightBitHead(), torch.nn.Parameter(torch.randn(80, 128))
    layer, x, bias = SimpleNamespace(weight=weight), torch.randn(3, 128), torch.randn(80)
    if tied:
        layer = head.tie_weights(SimpleNamespace(weight=None), layer)
    head.process_weights_after_loading(layer)
    assert layer.weight is weight if tied else not layer.weight.numel()
    assert torch.equal(head.apply(layer, x, bias), eight_bit(weight)(x) + bias)


def test_an_output_matrix_that_groups_do_not_divide() -> None:
    """It stays as it is."""
    from bitshard.integrations.vllm import EightBitHead

    head, layer = EightBitHead(), torch.nn.Module()
    layer.weight, layer.bias = torch.nn.Parameter(torch.randn(128, 96), requires_grad=False), None
    head.process_weights_after_loading(layer)
    x, bias = torch.randn(3, 96), torch.randn(128)
    assert head.rounded is None
    assert torch.allclose(head.apply(layer, x, bias), x @ layer.weight.T + bias, atol=1e-4)


@pytest.mark.parametrize("tp_size", [1, None], ids=["one rank", "several"])
@pytest.mark.parametrize(
    "folder", sorted([*DEMO.glob("*-mix64"), *DEMO.glob("*-gptq")]), ids=lambda folder: folder.name
)
def test_checkpoints_of_make_demo(folder: Path, tp_size: int | None, tmp_path: Path) -> None:
    """Real models: `mix64`, and act_order as it is. MODEL=... of `make demo` adds others."""
    tp_size = tp_size or min(degree for degree in Checkpoint.open(folder).plan().legal_degrees() if degree > 1)
    linked = tmp_path / "m"
    linked.symlink_to(folder)
    ids = load_tokenizer(folder)("\n".join(topics.values()), return_tensors="pt")["input_ids"]
    prompts = ids[0, : 16 * 9].view(16, 9)
    done = run(linked, tp_size, None if folder.name.endswith("mix64") else "bitshard", prompts)
    require_same_tokens(linked, done, prompts, LEAST_GAP_OF_REAL)


def require_same_tokens(
    folder: Path,
    done: subprocess.CompletedProcess[str],
    prompts: torch.Tensor,
    least_gap: float,
    backend: str = "exact",
) -> None:
    """As transformers in float32 with the checkpoint `folder`, up to the first that is not certain."""
    expected: Any = load(folder, backend=backend).generate(
        prompts, max_new_tokens=TOKENS, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("TOKENS"))[len("TOKENS") :])
    best_BT2 = torch.stack(expected.logits, 1).topk(2).values
    certain_BT = (best_BT2[..., 0] - best_BT2[..., 1] > least_gap).int().cumprod(1)
    for own, wanted, count in zip(found, expected.sequences[:, 9:].tolist(), certain_BT.sum(1).tolist(), strict=True):
        assert own[:count] == wanted[:count]
    assert certain_BT.sum() >= 30


@pytest.mark.parametrize(
    ("spec", "to"),
    [
        (MixSpec(), "compressed-tensors"),
        (QuantSpec(4, 32, sym=True), "compressed-tensors"),
        (QuantSpec(4, 32, sym=True), None),  # what `quantize --format gptq --order model` writes, as it is
    ],
    ids=str,
)
def test_exports_in_vllms_own_methods(spec: MixSpec | QuantSpec, to: str | None, tmp_path: Path) -> None:
    """Its own kernel, in bfloat16 as it wants: without us."""
    folder = random_checkpoint(tmp_path / "m", "llama", spec, zeros_version=1, **{**SIZES, "hidden_size": 128})
    if to:
        export(folder, tmp_path / "exported", to)
    prompts = token_ids(96, shape=(24, 9))
    done = run(tmp_path / "exported" if to else folder, 1, None, prompts, "bfloat16")
    assert "CPUWNA16LinearKernel" in done.stdout + done.stderr
    require_same_tokens(folder, done, prompts, LEAST_GAP_BFLOAT16)


@pytest.mark.parametrize("tp_size", [1, 2])
def test_uniform_matrices_in_vllms_kernels(tp_size: int, tmp_path: Path) -> None:
    """act_order, which they do not know: sorted, and one gather for q, k and v."""
    spec = QuantSpec(4, 32, sym=True, desc_act=True)
    folder = random_checkpoint(tmp_path / "m", "llama", spec, **{**SIZES, "hidden_size": 128})
    prompts = token_ids(96, shape=(24, 9))
    done = run(folder, tp_size, "bitshard", prompts, "bfloat16", "vllm")
    assert "CPUWNA16LinearKernel" in done.stdout + done.stderr
    require_same_tokens(folder, done, prompts, LEAST_GAP_BFLOAT16)


def test_registering_touches_no_gpu() -> None:
    """In each of vLLM's processes, some of which are forked, and as often as it likes."""
    from bitshard.integrations import vllm

    code = (
        "import torch; torch.cuda._lazy_init = None\n"
        "from vllm.plugins import load_general_plugins; load_general_plugins()\n"
        "from bitshard.integrations import vllm; vllm.register(); vllm.register()\n"
        "from vllm.model_executor.layers.quantization import get_quantization_config\n"
        "assert get_quantization_config('bitshard') is vllm.BitshardConfig and not torch.cuda.is_initialized()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    vllm.register()
    vllm.register()


def test_what_the_plugin_cannot_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Each in a sentence: other methods, fused layers of two kinds, other models, adapters."""
    from vllm.model_executor.layers.linear import QKVParallelLinear

    from bitshard.integrations import vllm

    section = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": True}
    with pytest.raises(BitshardError, match="found quant_method 'awq'"):
        vllm.BitshardConfig.from_config({**section, "quant_method": "awq"})
    assert vllm.BitshardConfig.override_quantization_method({**section, "quant_method": "awq"}, "bitshard") is None
    assert vllm.BitshardConfig.override_quantization_method(section, None) is None
    assert vllm.BitshardConfig.override_quantization_method(section, "bitshard") == "bitshard"

    partly = vllm.BitshardConfig.from_config({**section, "dynamic": {r"-:.*self_attn\.q_proj": {}}})
    for name, why in (("mixtral", "a mixture of experts"), ("gpt_bigcode", "q, k and v in one matrix")):
        with pytest.raises(PlanError, match=f"found {why}; allowed: other models; to do: run it with transformers"):
            partly.maybe_update_config("m", AutoConfig.for_model(name, **CONFIGS[name]))
    partly.maybe_update_config("m", AutoConfig.for_model("llama", **CONFIGS["llama"]))
    whole = random_checkpoint(tmp_path / "m", "llama", QuantSpec(4, 32))
    partly.maybe_update_config(str(whole), AutoConfig.from_pretrained(whole))
    tensors = load_file(whole / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, whole / "model.safetensors")
    with pytest.raises(BitshardError, match=r"no tensor model\.norm\.weight; allowed: all tensors of the model"):
        partly.maybe_update_config(str(whole), AutoConfig.from_pretrained(whole))
    partly.packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    layer = QKVParallelLinear.__new__(QKVParallelLinear)
    lora = SimpleNamespace(lora_config=None)
    monkeypatch.setattr(vllm, "get_current_vllm_config", lambda: lora)
    with pytest.raises(PlanError, match="qkv_proj: found 16-bit and quantized matrices in one layer"):
        partly.get_quant_method(layer, "model.layers.0.self_attn.qkv_proj")
    lora.lora_config = object()
    with pytest.raises(PlanError, match="--enable-lora: found LoRA adapters; allowed: none with bitshard's"):
        partly.get_quant_method(layer, "model.layers.0.self_attn.qkv_proj")


def test_a_degree_that_does_not_fit(tmp_path: Path) -> None:
    """A rank would have half a tile of k's channels."""
    folder = random_checkpoint(tmp_path / "m", "llama", MixSpec(), **{**SIZES, "head_dim": 32})
    done = run(folder, 2, None, token_ids(96, shape=(1, 9)))
    assert done.returncode != 0
    assert (
        "found tensor_parallel_size 2: 64 channels / 2 splits a tile of 64 output channels" in done.stdout + done.stderr
    )


def test_lm_eval_as_it_is(tmp_path: Path) -> None:
    """`lm_eval --model vllm` and `--model hf` are told nothing of us, and agree."""
    pytest.importorskip("lm_eval")
    folder = random_checkpoint(tmp_path / "m", "llama", MixSpec(), **SIZES)
    tokenizer = character_tokenizer()
    tokenizer.eos_token = "~"  # lm-eval wants one
    tokenizer.save_pretrained(folder)
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    documents = [{"question": f"Question {i}", "answer": f": it is {i * i}"} for i in range(12)]
    (tasks / "documents.jsonl").write_text("\n".join(map(json.dumps, documents)))
    (tasks / "task.yaml").write_text(
        f"task: answers\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tasks}/documents.jsonl}}}}\n"
        "test_split: test\noutput_type: loglikelihood\ndoc_to_text: '{{question}}'\ndoc_to_target: '{{answer}}'\n"
        "metric_list: [{metric: perplexity}]\n"
    )
    found = {}
    for model, more in (("hf", ""), ("vllm", ",enforce_eager=True,max_model_len=64")):
        told = [f"pretrained={folder},dtype=float32{more}", "--tasks", "answers", "--include_path", str(tasks)]
        command = [sys.executable, "-m", "lm_eval", "--model", model, "--model_args", *told]
        where = {"HF_DATASETS_CACHE": str(tmp_path / "cache"), **ENVIRONMENT}
        done = subprocess.run(
            [*command, "--output_path", str(tmp_path / model)],
            env={**os.environ, **where},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        (result,) = (tmp_path / model).rglob("results*.json")
        found[model] = json.loads(result.read_text())["results"]["answers"]["perplexity,none"]
    assert found["vllm"] == pytest.approx(found["hf"], rel=1e-4)


def test_two_hundred_requests_at_once(tmp_path: Path) -> None:
    """vLLM's own server, started by `bitshard serve`: nothing is lost, and the client can stream."""
    openai = pytest.importorskip("openai")
    folder, port = random_checkpoint(tmp_path / "m", "llama", MixSpec(), **SIZES), free_port()
    tokenizer = character_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    how = ["--port", str(port), "--dtype", "float32", "--enforce-eager", "--max-model-len", "64"]
    command = [sys.executable, "-m", "bitshard", "serve", str(folder), "--engine", "vllm", "--backend", "exact", *how]

    async def ask() -> tuple[list[Any], int]:
        client = openai.AsyncOpenAI(base_url=f"http://localhost:{port}/v1", api_key="none", max_retries=0, timeout=300)
        for _ in range(150):
            try:
                await client.models.list()
                break
            except openai.APIConnectionError:
                await asyncio.sleep(2)
        own = {"model": str(folder), "max_tokens": TOKENS, "temperature": 0, "extra_body": {"ignore_eos": True}}
        answers = (client.completions.create(prompt=f"Question {i}: ", **own) for i in range(200))
        found = await asyncio.gather(*answers)
        messages = [{"role": "user", "content": "hello"}]
        stream = await client.chat.completions.create(messages=messages, stream=True, **own)
        return [answer.usage.completion_tokens for answer in found], len([chunk async for chunk in stream])

    with subprocess.Popen(command, env={**os.environ, **ENVIRONMENT}) as server:
        try:
            counts, chunks = asyncio.run(ask())
        finally:
            server.terminate()
    assert counts == 200 * [TOKENS] and chunks >= TOKENS
