"""Checkpoints as users of transformers load them: by name, saved again, dequantized, compiled, with adapters."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModel, AutoModelForCausalLM, LlamaForCausalLM
from transformers.distributed import DistributedConfig
from transformers.quantizers.auto import AutoQuantizationConfig

from bitshard import versions
from bitshard.checkpoint import Checkpoint
from bitshard.convert import convert
from bitshard.errors import BitshardError, PlanError
from bitshard.integrations.transformers import BitshardConfig, load
from bitshard.kernels import cpu
from bitshard.nn import PackedLinear
from bitshard.parallel import launch
from bitshard.serve import command
from bitshard.spec import MixSpec, QuantSpec
from factory import CONFIGS, dense_model, random_checkpoint, token_ids

ACT_ORDER = QuantSpec(4, 16, sym=False, desc_act=True)
SPECS = [MixSpec(), ACT_ORDER, QuantSpec(3, 32, sym=True)]
ONE_GROUP = QuantSpec(4, -1, sym=False)  # its scales are every rank's
WHOLE = [name for name in CONFIGS if name != "mixtral"]  # in one MLP a block


def from_pretrained(
    path: Path, spec: QuantSpec | MixSpec = ACT_ORDER, backend: str | None = None, **kwargs: Any
) -> Any:
    own = {} if isinstance(spec, MixSpec) and not backend else {"quantization_config": BitshardConfig(backend)}
    return AutoModelForCausalLM.from_pretrained(path, **{"dtype": torch.float32, **own, **kwargs}).eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(token_ids(96), use_cache=False).logits


def test_nobody_imports_bitshard(tmp_path: Path) -> None:
    """What bitshard.pth is for: lm-eval and `transformers serve` know of transformers alone."""
    path = random_checkpoint(tmp_path / "m", "llama", MixSpec())
    script = f"""
import sys
assert not any(name.startswith("bitshard.") or name == "torch" for name in sys.modules)
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(path)!r}, dtype="float32")
print(type(model.model.layers[0].mlp.down_proj).__module__)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.strip() == "bitshard.nn", done.stderr


@pytest.mark.parametrize("model_type", CONFIGS)
def test_every_architecture_by_its_name(model_type: str, tmp_path: Path) -> None:
    for i, spec in enumerate(SPECS[:2]):
        path = random_checkpoint(tmp_path / str(i), model_type, spec)
        expected = logits(dense_model(path))
        torch.testing.assert_close(
            logits(from_pretrained(path, spec)), expected, rtol=0, atol=6e-5 * expected.abs().max().item()
        )


def test_act_order_as_it_is_equals_converted(tmp_path: Path) -> None:
    path = random_checkpoint(tmp_path / "m", "llama", ACT_ORDER)
    convert(path, tmp_path / "tp")
    expected = logits(from_pretrained(tmp_path / "tp"))
    torch.testing.assert_close(logits(from_pretrained(path)), expected, rtol=0, atol=6e-5 * expected.abs().max().item())


@pytest.mark.filterwarnings("ignore:You passed:UserWarning")  # transformers', where a config is given
def test_what_bitshard_wrote_is_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """GPTQ that it quantized or converted needs no config, nor does lm-eval's, which says what the file says."""
    convert(random_checkpoint(tmp_path / "m", "llama", ACT_ORDER), tmp_path / "tp")
    theirs = random_checkpoint(tmp_path / "theirs", "llama", ACT_ORDER)

    def packed(path: Path, **own: Any) -> bool:
        try:
            model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **own).eval()
        except ImportError:  # transformers' own asks for packages that are not there
            return False
        assert torch.equal(logits(model), logits(load(path)))
        return any(isinstance(module, PackedLinear) for module in model.modules())

    def said(path: Path, **more: Any) -> Any:
        section = json.loads((path / "config.json").read_text())["quantization_config"]
        return AutoQuantizationConfig.from_dict({**section, **more})

    for asked, ours, others in ((None, True, False), ("0", False, False), ("1", True, True)):
        if asked is not None:
            monkeypatch.setenv("BITSHARD_GPTQ", asked)
        for path, expected in ((tmp_path / "tp", ours), (theirs, others)):
            assert packed(path) is packed(path, quantization_config=said(path)) is expected, (asked, path)
            assert not packed(path, quantization_config=said(path, backend="torch"))


def test_a_config_of_its_own_file(tmp_path: Path) -> None:
    """Older quantizers write no section in config.json; what is saved has one."""
    path = random_checkpoint(tmp_path / "m", "llama", ACT_ORDER)
    expected, config = logits(load(path)), json.loads((path / "config.json").read_text())
    section = config.pop("quantization_config")
    (path / "config.json").write_text(json.dumps(config))
    model = from_pretrained(path)
    assert torch.equal(logits(model), expected)
    model.save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]
    assert saved["quant_method"] == "gptq" and {**section, **saved} == saved


@pytest.mark.parametrize("model_type", WHOLE)
@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("backend", ["exact", "auto"])
def test_saved_and_loaded_again(backend: str, spec: QuantSpec | MixSpec, model_type: str, tmp_path: Path) -> None:
    """The same packed tensors under the same names, in one file or many, and the same logits."""
    outliers = 0.02 if isinstance(spec, MixSpec) else 0.0
    path = random_checkpoint(tmp_path / "m", model_type, spec, outliers=outliers)
    model = from_pretrained(path, spec, backend)
    model.save_pretrained(tmp_path / "saved", max_shard_size="40KB")
    old, new = Checkpoint.open(path), Checkpoint.open(tmp_path / "saved")
    assert len(set(new.files.values())) > 1 and set(old.files) == set(new.files)
    assert old.config["quantization_config"] == new.config["quantization_config"]
    for name in (n for n in old.files if n.rpartition(".")[0] in set(old.matrices())):
        assert torch.equal(old.tensor(name), new.tensor(name)), name
    assert torch.equal(logits(from_pretrained(tmp_path / "saved", spec, backend)), logits(model))


@pytest.mark.parametrize("model_type", WHOLE)
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_dequantized(spec: QuantSpec | MixSpec, model_type: str, tmp_path: Path) -> None:
    """An ordinary model, of ordinary modules, that can be saved and needs none of ours."""
    path = random_checkpoint(tmp_path / "m", model_type, spec)
    expected = logits(dense_model(path))
    for backend in ("exact", "auto"):  # which rounds lm_head
        model = from_pretrained(path, spec, backend)
        model.dequantize()
        assert not any(isinstance(module, PackedLinear) for module in model.modules())
        torch.testing.assert_close(logits(model), expected, rtol=0, atol=2e-6 * expected.abs().max().item())
        own, shared = model.get_output_embeddings().weight, model.get_input_embeddings().weight
        assert (own is shared) == bool(model.config.tie_word_embeddings)
        model.save_pretrained(tmp_path / backend)
        saved = from_pretrained(path, spec, backend)
        saved.save_pretrained(tmp_path / f"packed-{backend}")
        saved.dequantize()  # whose dtype saving has made a name
        assert torch.equal(logits(saved), logits(model))
        again = AutoModelForCausalLM.from_pretrained(tmp_path / backend, dtype=torch.float32)
        assert torch.equal(logits(again), logits(model)) and not hasattr(again.config, "quantization_config")


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_dtypes_devices_and_caches(spec: QuantSpec | MixSpec, tmp_path: Path) -> None:
    path = random_checkpoint(tmp_path / "m", "llama", spec, eos_token_id=None)
    whole = from_pretrained(path, spec)
    mapped = from_pretrained(path, spec, device_map="cpu", attn_implementation="eager")
    torch.testing.assert_close(logits(mapped), logits(whole), rtol=1e-4, atol=1e-4)
    half = from_pretrained(path, spec, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    error = (logits(half).float() - logits(whole)).norm() / logits(whole).norm()
    assert error < 0.03
    prompt, how = token_ids(96, shape=(1, 5)), {"max_new_tokens": 8, "do_sample": False, "disable_compile": True}
    plain, static = (whole.generate(prompt, **how, cache_implementation=cache) for cache in (None, "static"))
    assert torch.equal(plain, static) and plain.shape == (1, 13)


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("model_type", ["llama", "gpt_bigcode"])
def test_gradients_of_the_input_are_those_of_a_plain_model(
    model_type: str, spec: QuantSpec | MixSpec, tmp_path: Path
) -> None:
    path, ids = random_checkpoint(tmp_path / "m", model_type, spec), token_ids(96)
    grads = []
    for model in (from_pretrained(path, spec), dense_model(path)):
        x = model.get_input_embeddings()(ids).detach().requires_grad_()
        model(inputs_embeds=x, use_cache=False).logits.square().sum().backward()
        grads.append(x.grad)
    torch.testing.assert_close(grads[0], grads[1], rtol=0, atol=2e-5 * grads[1].abs().max().item())


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")  # PEFT's
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_adapters_are_trained_saved_and_loaded(spec: QuantSpec | MixSpec, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    from bitshard.integrations.peft import adapted

    path, ids = random_checkpoint(tmp_path / "m", "llama", spec), token_ids(96)
    model = from_pretrained(path, spec)
    packed = {name: tensor.clone() for name, tensor in model.named_parameters() if name.endswith("qweight")}
    model = peft.get_peft_model(model, adapted(peft.LoraConfig(r=4, target_modules="all-linear"), model))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    losses = []
    for _ in range(5):
        losses.append(model(input_ids=ids, labels=ids).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.1
    for name, tensor in packed.items():
        assert torch.equal(
            model.get_parameter(f"base_model.model.{name.replace('.qweight', '.base_layer.qweight')}"), tensor
        )
    for fails in (model.base_model.model.dequantize, lambda: model.base_model.model.save_pretrained(tmp_path / "no")):
        with pytest.raises(PlanError, match="found an adapter around it"):
            fails()
    with pytest.raises(PlanError, match="adapters: found packed weights to merge them into"):
        model.merge_and_unload()
    model.save_pretrained(tmp_path / "adapter")
    other, config = from_pretrained(path, spec), peft.PeftConfig.from_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(other, tmp_path / "adapter", config=adapted(config, other))
    assert torch.equal(logits(again), logits(model))
    config.base_model_name_or_path = "the-model-that-was-quantized"
    with pytest.raises(
        PlanError, match="adapters of the-model-that-was-quantized: found .*may be in an order of its own"
    ):
        adapted(config, other)
    config.base_model_name_or_path, other._tp_size = str(path), 2
    with pytest.raises(PlanError, match="adapters: found a model on 2 ranks; allowed: one rank"):
        adapted(config, other)


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("name", ["model.norm.weight", "model.embed_tokens.weight", "layers.1.self_attn.q_proj.bias"])
def test_a_tensor_that_is_missing(name: str, spec: QuantSpec | MixSpec, tmp_path: Path) -> None:
    """transformers would fill it with random numbers, or do without a bias."""
    path = random_checkpoint(tmp_path / "m", "qwen2", spec)
    from_pretrained(path, spec)
    for file in path.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            metadata, tensors = opened.metadata(), {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
        save_file({key: tensor for key, tensor in tensors.items() if not key.endswith(name)}, file, metadata)
    for index in path.glob("*.index.json"):
        index.unlink()
    with pytest.raises(BitshardError, match=f"no tensor .*{name}; allowed: all tensors of the model"):
        from_pretrained(path, spec)
    for engine in ("transformers", "vllm"):
        with pytest.raises(BitshardError, match=f"no tensor .*{name}"):
            command(path, SimpleNamespace(engine=engine))  # type: ignore[arg-type]


def test_what_cannot_be_loaded_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = random_checkpoint(tmp_path / "m", "llama", MixSpec())
    dense_model(path).save_pretrained(tmp_path / "dense")
    with pytest.raises(BitshardError, match="no quantization_config; allowed: a quantized checkpoint"):
        from_pretrained(tmp_path / "dense")
    with pytest.raises(BitshardError, match="backend: found 'fast'"):
        from_pretrained(path, backend="fast")
    with pytest.raises(BitshardError, match="device_map: found modules on disk"):
        from_pretrained(path, MixSpec(), device_map={"model": "cpu", "lm_head": "disk"}, offload_folder=tmp_path)
    with pytest.raises(BitshardError, match="dequantize: found a mixture of experts"):
        from_pretrained(random_checkpoint(tmp_path / "moe", "mixtral", MixSpec()), MixSpec()).dequantize()
    with pytest.raises(BitshardError, match="LlamaModel: found no model.layers.1.*AutoModelForCausalLM"):
        AutoModel.from_pretrained(path)
    monkeypatch.setattr(versions, "TESTED", {"transformers": ("4.0",)})
    versions.report_untested.cache_clear()
    from_pretrained(path, MixSpec())
    assert "bitshard was tested with 4.0" in caplog.text
    versions.report_untested.cache_clear()
    monkeypatch.setenv("BITSHARD_BACKEND", "nothing")
    with pytest.raises(BitshardError, match="backend: found 'nothing'"):
        from_pretrained(path, MixSpec())


def test_scales_keep_their_dtype(tmp_path: Path) -> None:
    """The C kernels would read what is not there."""
    for i, spec in enumerate(SPECS):
        model = from_pretrained(random_checkpoint(tmp_path / str(i), "llama", spec), spec)
        expected = logits(model)
        found = logits(model.to(torch.bfloat16)).float()
        assert (found - expected).norm() < 0.03 * expected.norm()


def test_one_config_for_several_checkpoints(tmp_path: Path) -> None:
    config, paths = (
        BitshardConfig(),
        [random_checkpoint(tmp_path / str(i), "llama", spec) for i, spec in enumerate(SPECS)],
    )
    models = [LlamaForCausalLM.from_pretrained(path, quantization_config=config) for path in paths]
    assert config.section == {}
    for i, model in enumerate(models):
        model.save_pretrained(tmp_path / f"saved{i}")
        saved, own = (json.loads((p / "config.json").read_text()) for p in (tmp_path / f"saved{i}", paths[i]))
        assert saved["quantization_config"] == own["quantization_config"]
    with pytest.raises(BitshardError, match="BitshardConfig: found backendd; allowed: backend, strategy"):
        BitshardConfig(backendd="auto")
    with pytest.raises(BitshardError, match="strategy: found 'fast'"):
        BitshardConfig(strategy="fast")  # type: ignore[arg-type]


@pytest.mark.skipif(cpu.library() is None, reason="the C kernels are not built here")
def test_the_environment_names_a_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BITSHARD_BACKEND", "auto")
    model = from_pretrained(random_checkpoint(tmp_path / "m", "llama", MixSpec()), MixSpec())
    down = model.model.layers[0].mlp.down_proj
    assert down.kernel(torch.float32, 1) == "cpu-int8" and down.arrangement == "cpu"


def on_a_rank(paths: list[str]) -> list[torch.Tensor]:
    """As under torchrun."""
    torch.set_num_threads(1)
    plan, found = DistributedConfig(tp_size=2, tp_plan="auto"), []
    for path in paths:
        model = from_pretrained(Path(path), backend="exact", distributed_config=plan)
        found.append(logits(model))
        with pytest.raises(PlanError, match="gradients: found a model on 2 ranks"):
            model(token_ids(96), use_cache=False).logits.sum().backward()
    return found


def test_transformers_own_plan_on_two_ranks(tmp_path: Path) -> None:
    wide = {"head_dim": 64, "intermediate_size": 256}  # of which two ranks have whole tiles, blocks and groups
    paths = [random_checkpoint(tmp_path / f"{i}", "llama", spec, **wide) for i, spec in enumerate([*SPECS, ONE_GROUP])]
    convert(paths[1], tmp_path / "tp")
    paths[1] = tmp_path / "tp"
    for found in launch(2, on_a_rank, [str(path) for path in paths]):
        for path, own in zip(paths, found, strict=True):
            expected = logits(load(path))
            torch.testing.assert_close(own, expected, rtol=0, atol=6e-5 * expected.abs().max().item())


def test_a_degree_that_does_not_fit(tmp_path: Path) -> None:
    path = random_checkpoint(tmp_path / "m", "llama", ACT_ORDER)
    with pytest.raises(Exception, match="mlp.down_proj: found an irregular g_idx.*bitshard convert"):
        launch(2, on_a_rank, [str(path)])
