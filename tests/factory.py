"""Small quantized checkpoints with random weights for every architecture, and the dense models they stand for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from bitshard.checkpoint import Checkpoint
from bitshard.layout import FORMAT_VERSION, GptqLayout, Layout, Mix64Layout
from bitshard.mixed import MixedWeight, Outliers, strip_widths, zero_bases
from bitshard.models import architecture, block_linears, shapes
from bitshard.quantconfig import QuantConfig
from bitshard.quantized import QuantizedWeight, trivial_g_idx
from bitshard.spec import STRIP, MixSpec, QuantSpec

ASSETS = Path(__file__).parents[1].parent / "shared" / "assets"

LLAMA = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": 96,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {**LLAMA, "head_dim": 16},
    "mistral": {**LLAMA, "sliding_window": None},
    "qwen2": LLAMA,
    "qwen3": {**LLAMA, "head_dim": 16},
    "granite": {**LLAMA, "tie_word_embeddings": True},
    "glm": {**LLAMA, "head_dim": 16},
    "gemma3_text": {
        **LLAMA,
        "head_dim": 16,
        "tie_word_embeddings": True,
        "sliding_window": 4,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "mixtral": {**LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2},
    "gpt_bigcode": {
        "n_embd": 64,
        "n_inner": 128,
        "n_head": 4,
        "n_layer": 2,
        "vocab_size": 96,
        "n_positions": 128,
        "multi_query": True,
        "bos_token_id": 0,
        "eos_token_id": 1,
    },
}


def random_weight(k: int, n: int, spec: QuantSpec, generator: torch.Generator, order: torch.Tensor | None = None,
                  bias: bool = False) -> QuantizedWeight:  # fmt: skip
    """A quantized matrix with random codes; an irregular spec groups its channels in `order`, or in a random one."""
    group = spec.group(k)
    codes = torch.randint(0, spec.max_code + 1, (k, n), generator=generator, dtype=torch.uint8)
    zeros = torch.full((k // group, n), 1 << (spec.bits - 1), dtype=torch.uint8)
    if not spec.sym:
        zeros = torch.randint(1, spec.max_code + 1, (k // group, n), generator=generator, dtype=torch.uint8)
    # scaled so that activations neither die nor explode: weights of about 1 / sqrt(K)
    scales = (0.5 + torch.rand(k // group, n, generator=generator)) / (k**0.5 * spec.max_code)
    g_idx = trivial_g_idx(k, group)
    if spec.irregular:
        g_idx = g_idx[torch.randperm(k, generator=generator) if order is None else order]
    bias_N = torch.randn(n, generator=generator).half() * 0.1 if bias else None
    return QuantizedWeight(spec, codes, scales.half(), zeros, g_idx, bias_N)


def random_mixed_weight(n: int, k: int, spec: MixSpec, generator: torch.Generator, outliers: float = 0.0,
                        ordered: bool = True, bias: bool = False) -> MixedWeight:  # fmt: skip
    """A `mix64` matrix that uses every field's whole range. ordered: no `strip_order`."""
    strips, tiles = 4 * spec.blocks(k), spec.tiles(n)
    widths_S = strip_widths(spec, strips)

    def random(*shape: int, below: torch.Tensor | int) -> torch.Tensor:
        return torch.randint(0, 1 << 30, shape, generator=generator) % below

    def halves(*shape: int) -> torch.Tensor:  # steps that make weights of about 1 / sqrt(K)
        return (torch.rand(*shape, generator=generator) / (8 * max(k, 16) ** 0.5 * spec.bits**2)).half().float()

    codes_NSR = random(n, strips, STRIP, below=(1 << widths_S)[:, None]).to(torch.uint8)
    zeros_NS = zero_bases(spec, strips) + random(n, strips, below=4).to(torch.uint8)
    scale_codes_NS, steps_TS = random(n, strips, below=16), halves(tiles, strips)
    offsets_TS, row_scales_N = halves(tiles, strips), None
    if spec.metadata == "paper":
        tops_S = torch.tensor([1, 8, 8, 16]).repeat(strips // 4)
        scale_codes_NS, steps_TS[:, ::4] = scale_codes_NS % tops_S, 0
        offsets_TS, row_scales_N = steps_TS * random(tiles, strips, below=tops_S), halves(n).half()
        zeros_NS[:, ::4] = random(n, 1, below=16).to(torch.uint8)
    order_S = torch.arange(strips) if ordered else torch.randperm(strips, generator=generator)
    real_K = (order_S[:, None] * STRIP + torch.arange(STRIP) < k).view(-1)
    codes_NK, zeros_NK = codes_NSR.view(n, -1), zeros_NS.repeat_interleave(STRIP, dim=1)
    narrow_K = real_K & (widths_S.repeat_interleave(STRIP) == 2)
    chosen_NK = (torch.rand(n, len(real_K), generator=generator) < outliers) & narrow_K
    return MixedWeight(
        spec, k, torch.where(real_K & ~chosen_NK, codes_NK, zeros_NK), scale_codes_NS.to(torch.uint8), zeros_NS,
        steps_TS, offsets_TS, row_scales_N,
        Outliers.of(torch.randn(n, len(real_K), generator=generator) / k**0.5, chosen_NK) if outliers else None,
        None if ordered else order_S,
        torch.randn(n, generator=generator).half() * 0.1 if bias else None,
    )  # fmt: skip


def random_checkpoint(folder: Path, model_type: str, spec: QuantSpec | MixSpec, seed: int = 0, zeros_version: int = 2,
                      outliers: float = 0.0, ordered: bool = True, **changes: Any) -> Path:  # fmt: skip
    """A quantized checkpoint of this architecture: matrices that share an input share g_idx, as real ones do."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    config = AutoConfig.for_model(model_type, **{**CONFIGS[model_type], **changes})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    raw = json.loads(config.to_json_string(use_diff=False)) | {"architectures": [type(model).__name__]}
    arch = architecture(raw)
    sizes = shapes(arch, raw)
    layout: Layout = Mix64Layout() if isinstance(spec, MixSpec) else GptqLayout(1 if zeros_version == 1 else 2)
    dense = {name: tensor for name, tensor in model.state_dict().items()}
    tensors: dict[str, torch.Tensor] = {}
    for layer in range(sizes.layers):
        prefix, orders = f"{arch.blocks}.{layer}.", {}
        for linear in block_linears(arch, sizes):
            shared = linear.name.rpartition(".")[0] if linear.role == "column" else linear.name
            order = orders.setdefault(shared, torch.randperm(linear.in_features, generator=generator))
            bias = f"{arch.module_name(prefix + linear.name)}.bias" in dense
            k, n = linear.in_features, linear.out_features
            weight: QuantizedWeight | MixedWeight
            if isinstance(spec, MixSpec):
                weight = random_mixed_weight(n, k, spec, generator, outliers, ordered, bias)
            else:
                weight = random_weight(k, n, spec, generator, order, bias)
            for suffix, tensor in layout.pack(weight).items():
                tensors[f"{prefix}{linear.name}.{suffix}"] = tensor
    replaced = {arch.module_name(name).rpartition(".")[0] for name in tensors}
    for name, tensor in dense.items():
        if name.rpartition(".")[0] not in replaced and ".experts." not in name:
            tensors[_on_disk(arch, name)] = tensor.half().contiguous()
    if raw.get("tie_word_embeddings"):
        tensors.pop("lm_head.weight", None)
    write_folder(folder, raw, tensors, QuantConfig(spec, layout))
    return folder


def _on_disk(arch: Any, name: str) -> str:
    if arch.mlp.experts and ".mlp.gate." in name:
        return name.replace(".mlp.", ".block_sparse_moe.")
    return name


def write_folder(folder: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor], quant: QuantConfig) -> None:
    """One file and its config; GPTQ as public quantizers write it: both config files, no section of ours."""
    folder.mkdir(parents=True)
    section = quant.to_json()
    if isinstance(quant.layout, GptqLayout):
        del section["bitshard"]
        (folder / "quantize_config.json").write_text(json.dumps(section))
    else:
        section["bitshard"] = {"version": FORMAT_VERSION, "layout": quant.layout.name}
    save_file({n: t.clone() for n, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": section}))


def dense_model(path: Path) -> Any:
    """The fp32 transformers model with the dequantized weights of a quantized checkpoint: the reference for logits."""
    checkpoint = Checkpoint.open(path)
    config = AutoConfig.from_pretrained(path)
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    arch, matrices = checkpoint.arch, set(checkpoint.matrices())
    state: dict[str, torch.Tensor] = {}
    for name in checkpoint.files:
        if name.rpartition(".")[0] not in matrices:
            state[arch.module_name(name)] = checkpoint.tensor(name).float()
    for name in matrices:
        weight = checkpoint.weight(name)
        matrix = weight.dequantize() if isinstance(weight, MixedWeight) else weight.dequantize().T
        state[arch.module_name(name) + ".weight"] = matrix.contiguous()
        if weight.bias_N is not None:
            state[arch.module_name(name) + ".bias"] = weight.bias_N.float()
    if arch.mlp.experts:
        _fuse_experts(state, checkpoint.sizes.layers, checkpoint.sizes.experts)
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
    return model.eval()


def _fuse_experts(state: dict[str, torch.Tensor], layers: int, experts: int) -> None:
    for layer in range(layers):
        prefix = f"model.layers.{layer}.mlp.experts."
        w = {(e, i): state.pop(f"{prefix}{e}.w{i}.weight") for e in range(experts) for i in (1, 2, 3)}
        state[prefix + "gate_up_proj"] = torch.stack([torch.cat([w[e, 1], w[e, 3]]) for e in range(experts)])
        state[prefix + "down_proj"] = torch.stack([w[e, 2] for e in range(experts)])


def token_ids(vocab: int, seed: int = 0, shape: tuple[int, int] = (2, 17)) -> torch.Tensor:
    return torch.randint(0, vocab, shape, generator=torch.Generator().manual_seed(seed))


def rewrite(folder: Path, changes: dict[str, torch.Tensor]) -> None:
    """Replace tensors of a one-file checkpoint."""
    checkpoint = Checkpoint.open(folder)
    tensors = {name: tensor.clone() for name, tensor in checkpoint.read(checkpoint.files).items()} | changes
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
