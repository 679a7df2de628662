"""Packed layouts: the only place where a QuantizedWeight becomes bytes and back. Here: `gptq`, the public format.

Tensors of a matrix with K input and N output channels, G groups, b bits:

| name    | dtype            | shape          | order                                             |
|---------|------------------|----------------|---------------------------------------------------|
| qweight | int32            | [K*b/32, N]    | codes packed along K, bitpack's order             |
| qzeros  | int32            | [G, N*b/32]    | zeros packed along N; version 1 stores them minus one |
| scales  | float16/32, bf16 | [G, N]         |                                                   |
| g_idx   | int32            | [K], may be missing | group of each input channel                  |
| bias    | float            | [N], may be missing |                                              |
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil
from typing import Literal

import torch

from bitshard.bitpack import pack, packed_length, unpack
from bitshard.errors import FormatError
from bitshard.quantized import QuantizedWeight, trivial_g_idx
from bitshard.spec import QuantSpec, codes_per_pack

FORMAT_VERSION = 1  # of what bitshard writes beside the public tensors: config section and safetensors metadata


@dataclass(frozen=True)
class GptqLayout:
    """The public GPTQ format. zeros_version: 1 stores every zero minus one (AutoGPTQ), 2 as it is (GPTQModel)."""

    zeros_version: Literal[1, 2]

    name = "gptq"
    suffixes = ("qweight", "qzeros", "scales", "g_idx", "bias")

    def unpack(self, name: str, tensors: Mapping[str, torch.Tensor], spec: QuantSpec) -> QuantizedWeight:
        """Tensors by suffix -> logical value. FormatError names the matrix and what is wrong with it."""
        check(name, tensors, spec)
        qweight, scales = tensors["qweight"], tensors["scales"]
        codes = unpack(qweight, spec.bits, dim=0)
        zeros = self.unpack_zeros(tensors["qzeros"], spec.bits)
        g_idx = tensors.get("g_idx")
        if g_idx is None:
            g_idx = trivial_g_idx(codes.shape[0], spec.group(codes.shape[0]))
        weight = QuantizedWeight(spec, codes, scales, zeros, g_idx.to(torch.int32), tensors.get("bias"))
        self._check_zeros(name, weight)
        return weight

    def pack(self, weight: QuantizedWeight) -> dict[str, torch.Tensor]:
        """Logical value -> tensors by suffix, `g_idx` always among them. The exact inverse of `unpack`."""
        tensors = {
            "qweight": pack(weight.codes_KN, weight.spec.bits, dim=0),
            "qzeros": self.pack_zeros(weight.zeros_GN, weight.spec.bits),
            "scales": weight.scales_GN.contiguous(),
            "g_idx": weight.g_idx_K.to(torch.int32).contiguous(),
        }
        if weight.bias_N is not None:
            tensors["bias"] = weight.bias_N.contiguous()
        return tensors

    def unpack_zeros(self, qzeros: torch.Tensor, bits: int) -> torch.Tensor:
        """[G, N*bits/32] words to the true zeros, uint8 [G, N]."""
        if self.zeros_version == 1 and bits != 3:
            qzeros = (qzeros.long() + _ones(bits)).to(torch.int32)  # keeps the low 32 bits
        zeros = unpack(qzeros, bits, dim=1)
        if self.zeros_version == 1 and bits == 3:
            zeros = (zeros + 1) & 7
        return zeros

    def pack_zeros(self, zeros_GN: torch.Tensor, bits: int) -> torch.Tensor:
        if self.zeros_version == 1 and bits == 3:
            return pack((zeros_GN + 7) & 7, bits, dim=1)
        qzeros = pack(zeros_GN, bits, dim=1)
        return (qzeros.long() - _ones(bits)).to(torch.int32) if self.zeros_version == 1 else qzeros

    def permute_rows(self, qweight: torch.Tensor, bits: int, perm_K: torch.Tensor) -> torch.Tensor:
        """Packed rows in another order, `perm[new] = old`, without the other tensors."""
        return pack(unpack(qweight, bits, dim=0)[perm_K], bits, dim=0)

    def _check_zeros(self, name: str, weight: QuantizedWeight) -> None:
        """A symmetric weight has one possible zero, so it shows when the declared version is the wrong one."""
        middle = 1 << (weight.spec.bits - 1)
        if not weight.spec.sym or bool((weight.zeros_GN == middle).all()):
            return
        off_by_one = middle + 1 if self.zeros_version == 1 else middle - 1
        if bool((weight.zeros_GN == off_by_one).all()):
            other = 3 - self.zeros_version
            raise FormatError(
                f"{name}.qzeros",
                f"sym=true with zeros that are right only in version {other}, declared as version {self.zeros_version}",
                "checkpoint_format 'gptq' with zeros stored minus one, or 'gptq_v2' with zeros as they are",
                "correct checkpoint_format in config.json and quantize_config.json",
            )


def _ones(bits: int) -> int:
    """A one in every field of a word. Version 1 files are made by subtracting it from whole words, borrow and all."""
    return sum(1 << i for i in range(0, 32, bits))


def check(name: str, tensors: Mapping[str, torch.Tensor], spec: QuantSpec) -> None:
    """Shapes, dtypes and values that any reader relies on. Raises FormatError with the tensor's name."""
    for suffix in ("qweight", "qzeros", "scales"):
        if suffix not in tensors:
            raise FormatError(
                f"{name}.{suffix}", "no such tensor", "qweight, qzeros and scales for each matrix", "get the file again"
            )
    qweight, qzeros, scales = tensors["qweight"], tensors["qzeros"], tensors["scales"]
    for suffix, integer in (("qweight", qweight), ("qzeros", qzeros)):
        if integer.dtype != torch.int32:
            raise FormatError(
                f"{name}.{suffix}",
                f"dtype {integer.dtype}",
                "int32",
                "pack the file with 32-bit words (pack_dtype int32)",
            )
    n = qweight.shape[1] if qweight.dim() == 2 else 0
    k = qweight.shape[0] * 32 // spec.bits if qweight.dim() == 2 else 0
    expected = {
        "qweight": (packed_length(k, spec.bits), n),
        "qzeros": (ceil(k / spec.group(k)) if k else 0, packed_length(n, spec.bits)),
        "scales": (ceil(k / spec.group(k)) if k else 0, n),
        "g_idx": (k,),
        "bias": (n,),
    }
    for suffix, shape in expected.items():
        if suffix in tensors and (tuple(tensors[suffix].shape) != shape or 0 in shape):
            raise FormatError(
                f"{name}.{suffix}",
                f"shape {list(tensors[suffix].shape)}",
                f"{list(shape)} for {k} x {n} at {spec.bits} bits, group_size {spec.group_size}",
                "check bits and group_size in the config, or get the file again",
            )
    if k % spec.group(k) or n % codes_per_pack(spec.bits):
        raise FormatError(
            name,
            f"{k} input and {n} output channels",
            f"input channels in whole groups of {spec.group(k)}, output channels in whole words of "
            f"{codes_per_pack(spec.bits)}",
            "quantize with a group_size that divides, or with padding (`--pad-to 1`)",
        )
    if not scales.is_floating_point() or not bool(torch.isfinite(scales).all()):
        raise FormatError(f"{name}.scales", "NaN, infinite or non-float scales", "finite floats", "quantize it again")
    if "g_idx" in tensors:
        _check_g_idx(name, tensors["g_idx"], scales.shape[0], spec.group(k))


def _check_g_idx(name: str, g_idx: torch.Tensor, groups: int, group: int) -> None:
    low, high = int(g_idx.min()), int(g_idx.max())
    if low < 0 or high >= groups:
        raise FormatError(
            f"{name}.g_idx", f"groups {low} to {high}", f"0 to {groups - 1}", "get the file again or quantize it again"
        )
    sizes = torch.bincount(g_idx.long(), minlength=groups)
    if bool((sizes != group).any()):
        raise FormatError(
            f"{name}.g_idx",
            f"groups of {int(sizes.min())} to {int(sizes.max())} channels",
            f"{groups} groups of {group}",
            "quantize it again with a group_size that divides the input channels",
        )
