"""What a user would pick instead on a GPU: other programs' 4-bit kernels, for comparison, each where it is installed.

They are called as the sources of bitsandbytes 0.50.2, gemlite 0.6.0.post2, vllm 0.33.0 (Marlin) and humming-kernels
0.1.19 read. NF4 has a scale for each 64 weights; the others get the same codes, rounded here once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from functools import cache, partial
from importlib.util import find_spec
from math import gcd

import torch

from bitshard.bitpack import pack

GROUP = 128  # channels of one scale; 64 where K is no multiple
Multiply = Callable[[torch.Tensor], torch.Tensor]
Made = tuple[Multiply, Iterable[torch.Tensor], torch.Tensor]  # the call, its weights, W_RK; deepcopy copies the call


@dataclass(frozen=True)
class Peer:
    """Another program's kernel for one matrix. nbytes: of its weights.

    W_RK: the first rows as it has rounded them, float32. copy: makes one more copy of the weights, returned as a call
    x [M, K] float16 -> y [M, N].
    """

    name: str
    nbytes: int
    W_RK: torch.Tensor
    copy: Callable[[], Multiply]


def peers(W_NK: torch.Tensor, rows: int) -> Iterator[tuple[str, Callable[[], Peer]]]:
    """Names of what is installed, each with what imports it and quantizes the matrix (float16 on a GPU) for it."""
    codes = cache(partial(_round, W_NK))
    for module, name, make in (
        ("bitsandbytes", "bitsandbytes NF4", lambda: _bitsandbytes(W_NK, rows)),
        ("gemlite", "gemlite 4-bit", lambda: _gemlite(codes(), rows)),
        ("vllm", "Marlin 4-bit", lambda: _marlin(codes(), rows)),
        ("humming", "Humming 4-bit", lambda: _humming(codes(), rows)),
    ):
        if find_spec(module) is not None:
            yield name, partial(_peer, name, make)


def _peer(name: str, make: Callable[[], Made]) -> Peer:
    multiply, weights, W_RK = make()
    return Peer(name, sum(weight.nbytes for weight in weights), W_RK, partial(deepcopy, multiply))


@dataclass(frozen=True)
class _Codes:
    """Symmetric 4 bits, rounded to nearest on the grid of GPTQ's files: (code - 8) times the scale of its group."""

    codes_NK: torch.Tensor
    scales_NG: torch.Tensor
    group: int

    def dequantize(self, rows: int) -> torch.Tensor:
        scales_RK = self.scales_NG[:rows].float().repeat_interleave(self.group, dim=1)
        return (self.codes_NK[:rows].float() - 8) * scales_RK


def _round(W_NK: torch.Tensor) -> _Codes:
    W_NGS = W_NK.float().view(len(W_NK), -1, gcd(W_NK.shape[1], GROUP))
    scales_NG = (W_NGS.abs().amax(dim=2) / 7.5).half()
    codes_NGS = (W_NGS / scales_NG.float()[:, :, None]).round_().clamp_(-8, 7).add_(8)
    return _Codes(codes_NGS.to(torch.uint8).view_as(W_NK), scales_NG, W_NGS.shape[2])


def _bitsandbytes(W_NK: torch.Tensor, rows: int) -> Made:
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit, Params4bit

    n, k = W_NK.shape
    # scales in float32, as transformers asks for unless told; its own default is to round them to 8 bits
    how = {"compress_statistics": False, "quant_type": "nf4"}
    linear = Linear4bit(k, n, bias=False, compute_dtype=torch.float16, device="meta", **how)
    linear.weight = Params4bit(W_NK, requires_grad=False, **how)
    linear.to(W_NK.device)  # quantizes
    weight, state = linear.weight.data, linear.weight.quant_state
    return linear, (weight, state.absmax), dequantize_4bit(weight, state)[:rows].float()


def _gemlite(codes: _Codes, rows: int) -> Made:
    from gemlite.helper import A16W4_HQQ_INT

    helper = A16W4_HQQ_INT(device=codes.codes_NK.device, dtype=torch.float16)
    linear = helper.from_weights(codes.codes_NK, codes.scales_NG, torch.full_like(codes.scales_NG, 8))
    return linear, (linear.W_q, linear.scales, linear.zeros), codes.dequantize(rows)


def _marlin(codes: _Codes, rows: int) -> Made:
    """As vLLM's layers call it, but for the locks, which they get from their engine."""
    from vllm import _custom_ops as ops
    from vllm.model_executor.layers.quantization.utils import marlin_utils as marlin
    from vllm.scalar_type import scalar_types

    (n, k), device = codes.codes_NK.shape, codes.codes_NK.device
    weight = ops.gptq_marlin_repack(pack(codes.codes_NK.T, 4, dim=0), size_k=k, size_n=n, num_bits=4)
    scale = marlin.marlin_permute_scales(codes.scales_NG.T, size_k=k, size_n=n, group_size=codes.group)
    multiply = partial(
        marlin.apply_gptq_marlin_linear,
        weight=weight,
        weight_scale=scale,
        weight_zp=marlin.marlin_make_empty(device),
        workspace=marlin.marlin_make_workspace_new(device, marlin.MARLIN_MAX_BLOCKS_PER_SM),
        wtype=scalar_types.uint4b8,
        output_size_per_partition=n,
        input_size_per_partition=k,
    )
    return multiply, (weight, scale), codes.dequantize(rows)


def _humming(codes: _Codes, rows: int) -> Made:
    from humming.layer import HummingLayer

    (n, k), how = codes.codes_NK.shape, {"dtype": "int4", "group_size": codes.group}
    linear = HummingLayer(shape_n=n, shape_k=k, weight_config=how, torch_dtype=torch.float16).to(codes.codes_NK.device)
    linear.load_from_tensors({"weight": pack(codes.codes_NK, 4, dim=1), "weight_scale": codes.scales_NG})
    linear.transform()
    return linear, linear.parameters(), codes.dequantize(rows)
