"""llama.cpp's K-quants as dense matrices: of a GGUF file, and of any matrix by ggml's own quantizer.

A K-quant's block is 256 input channels. Where K is not a multiple of it, llama.cpp silently takes another type of more
bits for the tensor; `quantized` pads K with zeros instead, so that a row of the table is one type throughout.
"""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader
from gguf.quants import dequantize
from transformers import PreTrainedModel

LINEARS = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
BLOCK = 256


class Ggml:
    """The C library inside an installed llama-cpp-python."""

    def __init__(self, library: Path) -> None:
        self._quantize = ctypes.CDLL(str(library)).ggml_quantize_chunk
        self._quantize.restype = ctypes.c_size_t
        pointer, integer = ctypes.c_void_p, ctypes.c_int64
        self._quantize.argtypes = [ctypes.c_int, pointer, pointer, integer, integer, integer, pointer]

    def quantized(
        self, weight_NK: torch.Tensor, kind: GGMLQuantizationType, importance_K: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, int]:
        """The matrix quantized and dequantized, float32 [N, K], and its bytes with K zero-padded to whole blocks.

        importance_K: mean squared input of each channel, what llama.cpp calls an importance matrix.
        """
        n, k = weight_NK.shape
        padding = -k % BLOCK
        source = np.ascontiguousarray(np.pad(weight_NK.float().numpy(), ((0, 0), (0, padding))))
        block, size = GGML_QUANT_SIZES[kind]
        packed = np.empty((n, (k + padding) // block * size), dtype=np.uint8)
        importance = None
        if importance_K is not None:
            importance = np.ascontiguousarray(np.pad(importance_K.float().numpy(), (0, padding)))
        written = self._quantize(
            int(kind), source.ctypes.data, packed.ctypes.data, 0, n, k + padding,
            None if importance is None else importance.ctypes.data,
        )  # fmt: skip
        assert written == packed.nbytes
        return torch.from_numpy(dequantize(packed, kind)[:, :k].copy()), packed.nbytes


def read_linears(path: Path) -> tuple[dict[str, torch.Tensor], int, dict[str, int]]:
    """A GGUF file's matrices in blocks by transformers' names, float32 [N, K]; their bytes; how many of each type."""
    reader = GGUFReader(path)
    architecture = reader.fields["general.architecture"].contents()
    heads = {"attn_q": "head_count", "attn_k": "head_count_kv"}
    weights, nbytes, kinds = {}, 0, Counter[str]()
    for tensor in reader.tensors:
        parts = tensor.name.split(".")
        if parts[0] != "blk" or parts[2] not in LINEARS or parts[3] != "weight":
            continue
        weight_NK = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        if architecture == "llama" and parts[2] in heads:  # its rotary pairs lie side by side in a GGUF file
            h = int(reader.fields[f"llama.attention.{heads[parts[2]]}"].contents())
            n, k = weight_NK.shape
            weight_NK = weight_NK.view(h, n // h // 2, 2, k).transpose(1, 2).reshape(n, k)
        weights[f"model.layers.{parts[1]}.{LINEARS[parts[2]]}"] = weight_NK
        nbytes += tensor.n_bytes
        kinds[f"{LINEARS[parts[2]].rpartition('.')[2]} {tensor.tensor_type.name}"] += 1
    return weights, nbytes, dict(kinds)


def importance(model: PreTrainedModel, names: Sequence[str], segments_SL: torch.Tensor) -> dict[str, torch.Tensor]:
    """Mean squared input of the named linears of a 16-bit model over the calibration segments, float32 [K] each."""
    sums = {name: torch.zeros(()) for name in names}

    def watch(name: str) -> torch.utils.hooks.RemovableHandle:
        def add(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            sums[name] = sums[name] + args[0].square().sum((0, 1))

        hook: torch.utils.hooks.RemovableHandle = model.get_submodule(name).register_forward_pre_hook(add)
        return hook

    hooks = [watch(name) for name in names]
    with torch.no_grad():
        for ids_L in segments_SL:
            model.base_model(ids_L[None], use_cache=False)
    for hook in hooks:
        hook.remove()
    return {name: total / segments_SL.numel() for name, total in sums.items()}
