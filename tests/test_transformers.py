"""Whole models on T ranks under transformers: logits equal one rank's, and every collective is counted."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bitshard.checkpoint import Checkpoint
from bitshard.convert import convert
from bitshard.errors import PlanError, RankError
from bitshard.generate import GenerateOptions, generate
from bitshard.integrations.transformers import load
from bitshard.integrations.transformers_parallel import require_degree
from bitshard.kernels import cpu
from bitshard.nn import QuantLinear
from bitshard.parallel import STRATEGIES, Strategy, count_collectives, launch
from bitshard.spec import MixSpec, QuantSpec
from commands import refusal
from dense import character_tokenizer
from factory import ASSETS, CONFIGS, dense_model, random_checkpoint, token_ids

SPEC = QuantSpec(4, 16, sym=False, desc_act=True)
REAL = ASSETS / "gptq-smollm2-4l" / "asym-g32-v2"
IDS = (2, 17)  # sequences, tokens
Case = tuple[str, Strategy]
Result = tuple[torch.Tensor, dict[str, int], dict[str, int], dict[str, tuple[int, ...]]]


def run_cases(cases: list[Case], tp_size: int, vocab: int, backend: str = "exact") -> list[Result]:
    """On one rank: logits, collectives, their bytes, and the shapes of the slices it holds."""
    torch.set_num_threads(1)
    results = []
    for path, strategy in cases:
        model = load(Path(path), tp_size, strategy, backend=backend)
        with torch.no_grad(), count_collectives() as traffic:
            logits = model(token_ids(vocab, shape=IDS), use_cache=False).logits
        slices = {name: tuple(p.shape) for name, p in model.named_parameters()}
        results.append((logits, traffic.calls, traffic.bytes, slices))
    return results


def one_rank(path: Path, vocab: int) -> torch.Tensor:
    with torch.no_grad():
        return load(path)(token_ids(vocab, shape=IDS), use_cache=False).logits


def assert_ranks_agree(results: list[list[Result]], i: int, expected: torch.Tensor) -> Result:
    for rank in results:
        torch.testing.assert_close(rank[i][0], expected, rtol=0, atol=6e-5 * expected.abs().max().item())
    return results[0][i]


def both(tmp_path: Path, model_type: str, **changes: Any) -> tuple[Path, Path]:
    source = random_checkpoint(tmp_path / model_type, model_type, SPEC, **changes)
    convert(source, tmp_path / f"{model_type}-tp")
    return source, tmp_path / f"{model_type}-tp"


def test_every_architecture_and_strategy_on_two_ranks(tmp_path: Path) -> None:
    paths = {model_type: both(tmp_path, model_type) for model_type in CONFIGS}
    cases: list[Case] = []
    for source, converted in paths.values():
        cases += [(str(converted if s == "tp-aware" else source), s) for s in STRATEGIES]
    results = launch(2, run_cases, cases, 2, 96, "reference")  # which keeps the file's tensors, for their shapes
    for i, (path, strategy) in enumerate(cases):
        checkpoint = Checkpoint.open(Path(path))
        _, calls, sizes, slices = assert_ranks_agree(results, i, one_rank(Path(path), 96))
        blocks = checkpoint.sizes.layers
        assert calls["AllReduce"] == 2 * blocks, path  # one for the MLP and one for attention, and nothing else
        assert sizes["AllReduce"] == 2 * blocks * IDS[0] * IDS[1] * checkpoint.sizes.hidden * 4
        assert ("AllGather" in calls) == (strategy == "naive") and len(calls) <= 2
        assert_slices(checkpoint, slices, strategy)


def assert_slices(checkpoint: Checkpoint, slices: dict[str, tuple[int, ...]], strategy: Strategy) -> None:
    """A rank holds half of every matrix, and half of the row matrices' scales unless it keeps a local order."""
    plan = checkpoint.plan()
    for name, linear in plan.linears(0):
        module = plan.arch.module_name(name)
        k, n = checkpoint.weight(name).codes_KN.shape
        if linear.role == "row":
            whole = name in plan.gathered and strategy != "naive"
            assert slices[f"{module}.qweight"] == (k // 8 // 2, n)
            assert slices[f"{module}.scales"] == (k // 16 if whole else k // 16 // 2, n)
        elif plan.arch.model_types == ("gpt_bigcode",) and linear.name == "attn.c_attn":
            assert slices[f"{module}.qweight"] == (k // 8, 64 // 2 + 2 * 16)  # half of q, all of the one k and v
        else:
            assert slices[f"{module}.qweight"] == (k // 8, n // 2)
            assert slices[f"{module}.qzeros"] == (k // 16, n // 8 // 2)


def test_more_ranks(tmp_path: Path) -> None:
    """Four ranks: more query heads than KV heads would divide, padded, and a multi-query model."""
    wide = {"num_attention_heads": 8, "num_key_value_heads": 4, "hidden_size": 128}
    _, llama = both(tmp_path, "llama", **wide)
    source, bigcode = both(tmp_path, "gpt_bigcode", n_embd=128, n_head=8)
    padded = tmp_path / "padded"
    convert(random_checkpoint(tmp_path / "odd", "qwen2", SPEC, intermediate_size=112), padded, pad_to=4)
    cases: list[Case] = [(str(llama), "tp-aware"), (str(bigcode), "tp-aware"), (str(source), "naive")]
    cases += [(str(padded), "tp-aware")]
    results = launch(4, run_cases, cases, 4, 96)
    for i, (path, strategy) in enumerate(cases):
        _, calls, _, _ = assert_ranks_agree(results, i, one_rank(Path(path), 96))
        assert calls.get("AllGather", 0) == (4 if strategy == "naive" else 0) and calls["AllReduce"] == 4


@pytest.mark.skipif(not REAL.is_dir(), reason=f"no {REAL}: the shared assets are not on this machine")
def test_real_weights_on_three_ranks(tmp_path: Path) -> None:
    convert(REAL, tmp_path / "tp")
    cases: list[Case] = [(str(REAL), "naive"), (str(REAL), "local-sort"), (str(tmp_path / "tp"), "tp-aware")]
    results = launch(3, run_cases, cases, 3, 4096)
    with torch.no_grad():
        expected = dense_model(REAL)(token_ids(4096, shape=IDS)).logits
    for i, (_, strategy) in enumerate(cases):
        _, calls, sizes, _ = assert_ranks_agree(results, i, expected)
        assert calls == ({"AllGather": 8, "AllReduce": 8} if strategy == "naive" else {"AllReduce": 8})
        tokens = IDS[0] * IDS[1]
        assert sizes["AllReduce"] == 8 * tokens * 576 * 4
        assert sizes.get("AllGather", 0) == (4 * tokens * (576 + 1536) * 4 if strategy == "naive" else 0)


def test_one_gather_for_each_norm(tmp_path: Path) -> None:
    """q, k, v and gate, up share the gather of their norm's output; no matrix but the row ones keeps its own."""
    model = load(random_checkpoint(tmp_path / "in", "llama", SPEC))
    hooked = [name for name, module in model.named_modules() if module._forward_hooks]
    assert sorted(hooked) == [f"model.layers.{i}.{n}" for i in range(2)
                              for n in ("input_layernorm", "post_attention_layernorm")]  # fmt: skip
    gathering = {n for n, m in model.named_modules() if isinstance(m, QuantLinear) and m.perm is not None}
    assert gathering == {f"model.layers.{i}.{n}" for i in range(2) for n in ("self_attn.o_proj", "mlp.down_proj")}


def test_degrees_and_strategies_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    source, converted = both(tmp_path, "llama")
    with pytest.raises(PlanError, match="mlp.down_proj: found an irregular g_idx.*bitshard convert"):
        require_degree(Checkpoint.open(source).plan(), 2, "tp-aware")
    with pytest.raises(PlanError, match="degree 3: 4 heads do not divide by 3; allowed: degrees 1, 2;"):
        require_degree(Checkpoint.open(converted).plan(), 3, "tp-aware")


def test_ranks_that_nobody_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = random_checkpoint(tmp_path / "m", "llama", QuantSpec(4, 16))
    with pytest.raises(RankError, match="tp_size: found 2 ranks, and one process; .* `torchrun --nproc-per-node 2`"):
        load(str(folder), tp_size=2)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(RankError, match="tp_size: found 2 ranks, and 3 processes; .*--nproc-per-node 2"):
        load(str(folder), tp_size=2)


def test_compile_and_meta(tmp_path: Path) -> None:
    """The op has a fake: it runs on meta tensors, and torch.compile traces a layer with no graph break."""
    model = load(random_checkpoint(tmp_path / "in", "llama", SPEC))
    layer = model.get_submodule("model.layers.0.mlp.down_proj")
    x = torch.randn(3, 128)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert torch.equal(compiled(x), layer(x))
    assert layer.to("meta")(x.to("meta")).shape == (3, 64)


@pytest.mark.parametrize("model_type", [name for name in CONFIGS if name not in ("chatglm", "mixtral")])
@pytest.mark.parametrize("spec", [SPEC, MixSpec()])
def test_a_whole_model_is_one_graph(spec: QuantSpec | MixSpec, model_type: str, tmp_path: Path) -> None:
    """fullgraph: a break is an error."""
    path = random_checkpoint(tmp_path / "in", model_type, spec, outliers=0.02 if isinstance(spec, MixSpec) else 0)
    for backend in ("exact", "auto"):
        model, ids = load(path, backend=backend), token_ids(CONFIGS[model_type]["vocab_size"], shape=IDS)
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        with torch.no_grad():
            assert torch.equal(compiled(ids, use_cache=False).logits, model(ids, use_cache=False).logits)
        torch.compiler.reset()


@pytest.mark.parametrize("model_type", ["llama", "qwen2"])  # the second has biases
def test_a_compiled_step_writes_the_same_text(model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = random_checkpoint(tmp_path / "in", model_type, MixSpec())
    character_tokenizer().save_pretrained(path)
    plain = GenerateOptions(12, temperature=1.0, seed=3)  # compiling must not draw
    calls, found = list[int](), cpu.array_of
    monkeypatch.setattr(cpu, "array_of", lambda *weights: calls.append(len(weights)) or found(*weights))  # type: ignore[func-returns-value]
    runs = [generate(path, "Hello", options) for options in (plain, replace(plain, compile=True))]
    if cpu.library() is not None:  # before the 14 of the token that is looked at for its collectives
        assert calls[-22:-14] == 2 * [3, 1, 2, 1]  # q, k and v; o; gate and up; down
    assert runs[0].token_ids == runs[1].token_ids and len(runs[0].token_ids) == 12
    assert runs[0].compile_seconds is None and (runs[1].compile_seconds or 0) > runs[1].seconds
    torch.compiler.reset()


def test_what_cannot_be_compiled_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = random_checkpoint(tmp_path / "in", "llama", MixSpec())
    character_tokenizer().save_pretrained(path)
    options = "generate", path, "Hello", "--compile"
    assert "--compile: found 2 ranks; allowed: one rank" in refusal(*options, "--tp", 2)
    for folder in (tmp_path / "made", "/proc/nothing"):  # no compiler, then no folder
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(folder))
        with torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)}):
            assert "allowed: a working C++ compiler" in refusal(*options)


def test_a_step_that_is_another_graph_every_time_is_refused(tmp_path: Path) -> None:
    path = random_checkpoint(tmp_path / "in", "gemma3_text", MixSpec(), sliding_window=16)
    character_tokenizer().save_pretrained(path)
    sentence = refusal("generate", path, "Hello", "--compile", "--max-new-tokens", 6)
    assert "--compile: found model_type gemma3_text" in sentence and "every time" in sentence


def test_a_mixture_of_experts_is_not_compiled(tmp_path: Path) -> None:
    path = random_checkpoint(tmp_path / "in", "mixtral", MixSpec())
    character_tokenizer().save_pretrained(path)
    assert "--compile: found model_type mixtral" in refusal("generate", path, "Hello", "--compile")
