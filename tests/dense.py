"""16-bit and float32 model folders with tokenizers, small enough to quantize in a test."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from factory import ASSETS, CONFIGS

STORIES = ASSETS / "tiny-llama-stories260K"
ALPHABET = "".join(map(chr, range(32, 127)))  # with <unk>, as many tokens as the factory's models have


def random_model(folder: Path, model_type: str, seed: int = 0, dtype: torch.dtype = torch.float16,
                 **changes: Any) -> Path:  # fmt: skip
    """A model of this architecture with random weights, and a tokenizer that maps each ASCII character to a token."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(model_type, **{**CONFIGS[model_type], **changes})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and "embed" not in name:
            torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
        elif name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    model.to(dtype).save_pretrained(folder)
    character_tokenizer().save_pretrained(folder)
    return folder


def character_tokenizer() -> PreTrainedTokenizerFast:
    vocab = {"<unk>": 0, **{c: i for i, c in enumerate(ALPHABET, 1)}}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def framing_tokenizer() -> PreTrainedTokenizerFast:
    """One that puts tokens 1 and 2 before a text, as GLM-4's puts `[gMASK]<sop>`, and token 3 after it."""
    tokenizer = character_tokenizer()
    own = [(ALPHABET[i], i + 1) for i in range(3)]
    single = [*(character for character, _ in own[:2]), "$A", own[2][0]]
    tokenizer._tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=own)
    return tokenizer


def random_text(characters: int, seed: int = 0) -> str:
    ids = torch.randint(0, len(ALPHABET), (characters,), generator=torch.Generator().manual_seed(seed))
    return "".join(ALPHABET[i] for i in ids.tolist())


def stories_model(folder: Path) -> Path:
    """stories260K, a trained float32 Llama in llama2.c's first format, as a folder that transformers reads."""
    data = (STORIES / "stories260K.bin").read_bytes()
    dim, hidden, layers, heads, kv_heads, vocab, length = struct.unpack("<7i", data[:28])
    config = LlamaConfig(
        hidden_size=dim, intermediate_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, vocab_size=vocab, max_position_embeddings=length, rms_norm_eps=1e-5,
        tie_word_embeddings=True, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    numbers = torch.frombuffer(bytearray(data[28:]), dtype=torch.float32)
    d, kv = dim // heads, dim // heads * kv_heads
    shapes = {
        "embed_tokens": (vocab, dim), "input_layernorm": (layers, dim),
        "self_attn.q_proj": (layers, dim, dim), "self_attn.k_proj": (layers, kv, dim),
        "self_attn.v_proj": (layers, kv, dim), "self_attn.o_proj": (layers, dim, dim),
        "post_attention_layernorm": (layers, dim), "mlp.gate_proj": (layers, hidden, dim),
        "mlp.down_proj": (layers, dim, hidden), "mlp.up_proj": (layers, hidden, dim), "norm": (dim,),
    }  # fmt: skip
    state, start = {}, 0
    for name, shape in shapes.items():
        size = torch.Size(shape).numel()
        tensor, start = numbers[start : start + size].view(shape), start + size
        if shape[0] != layers:
            state[f"model.{name}.weight"] = tensor
            continue
        for layer, part in enumerate(tensor):
            if name.endswith(("q_proj", "k_proj")):  # rotary pairs are neighbours there, halves in transformers
                part = part.view(-1, d // 2, 2, dim).transpose(1, 2).reshape(part.shape)
            state[f"model.layers.{layer}.{name}.weight"] = part
    model = LlamaForCausalLM(config)
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and missing == ["lm_head.weight"]
    model.save_pretrained(folder)
    _stories_tokenizer(vocab).save_pretrained(folder)
    return folder


def _stories_tokenizer(vocab: int) -> PreTrainedTokenizerFast:
    data, at, pieces = (STORIES / "tok512.bin").read_bytes(), 4, []
    for _ in range(vocab):
        _, size = struct.unpack_from("<fi", data, at)
        pieces.append(data[at + 8 : at + 8 + size].decode().replace(" ", "▁"))
        at += 8 + size
    pieces[:3] = ["<unk>", "<s>", "</s>"]
    numbers = {piece: i for i, piece in enumerate(pieces)}
    # pieces are numbered in the order they were merged
    merges = [(p[:i], p[i:]) for p in pieces[259:] for i in range(1, len(p)) if {p[:i], p[i:]} <= numbers.keys()]
    tokenizer = Tokenizer(models.BPE(numbers, merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
