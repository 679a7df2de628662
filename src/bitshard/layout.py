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

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Literal

import torch

from bitshard.bitpack import pack, packed_length, unpack
from bitshard.errors import FormatError
from bitshard.quantized import QuantizedWeight, trivial_g_idx
from bitshard.spec import WORD_BITS, QuantSpec, codes_per_pack

FORMAT_VERSION = 1  # of what bitshard writes beside the public tensors: config section and safetensors metadata
FLOATS = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class GptqLayout:
    """The public GPTQ format. zeros_version: 1 stores every zero minus one (AutoGPTQ), 2 as it is (GPTQModel)."""

    zeros_version: Literal[1, 2]

    name = "gptq"
    suffixes = ("qweight", "qzeros", "scales", "g_idx", "bias")

    def unpack(self, name: str, tensors: Mapping[str, torch.Tensor], spec: QuantSpec) -> QuantizedWeight:
        """Tensors by suffix -> logical value. FormatError names the matrix and what is wrong with it."""
        self.check(name, tensors, spec)
        qweight, scales = tensors["qweight"], tensors["scales"]
        codes = unpack(qweight, spec.bits, dim=0)
        zeros = self.unpack_zeros(tensors["qzeros"], spec.bits)
        g_idx = tensors.get("g_idx")
        if g_idx is None:
            g_idx = trivial_g_idx(codes.shape[0], spec.group(codes.shape[0]))
        return QuantizedWeight(spec, codes, scales, zeros, g_idx.to(torch.int32), tensors.get("bias"))

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

    def check(self, name: str, tensors: Mapping[str, torch.Tensor], spec: QuantSpec) -> None:
        """Shapes, dtypes and values that any reader relies on; codes can hold anything, so qweight is not read."""
        check_shapes(name, {suffix: tensor.shape for suffix, tensor in tensors.items()}, spec)
        for suffix in ("qweight", "qzeros"):
            if tensors[suffix].dtype != torch.int32:
                raise FormatError(
                    f"{name}.{suffix}", f"dtype {tensors[suffix].dtype}", "int32",
                    "pack the file with 32-bit words (pack_dtype int32)",
                )  # fmt: skip
        for suffix in ("scales", "bias"):
            if suffix in tensors and tensors[suffix].dtype not in FLOATS:
                raise FormatError(
                    f"{name}.{suffix}", f"dtype {tensors[suffix].dtype}", "float16, bfloat16 or float32",
                    "get the file again",
                )  # fmt: skip
            if suffix in tensors and not bool(torch.isfinite(tensors[suffix]).all()):
                raise FormatError(f"{name}.{suffix}", "NaN or infinite values", "finite floats", "quantize it again")
        if "g_idx" in tensors:
            check_g_idx(name, tensors["g_idx"], spec)
        elif spec.irregular:
            raise FormatError(
                f"{name}.g_idx", "no such tensor, and desc_act=true", "a g_idx, as the order of channels is free",
                "get the file again, or correct desc_act",
            )  # fmt: skip
        if spec.sym:
            self._check_version(name, self.unpack_zeros(tensors["qzeros"], spec.bits), 1 << (spec.bits - 1))

    def _check_version(self, name: str, zeros_GN: torch.Tensor, middle: int) -> None:
        """A symmetric weight has one possible zero, so it shows when the declared version is the wrong one."""
        off_by_one = middle + 1 if self.zeros_version == 1 else middle - 1
        if bool((zeros_GN == off_by_one).all()):
            raise FormatError(
                f"{name}.qzeros",
                f"sym=true with zeros that are right only in version {3 - self.zeros_version}, "
                f"declared as version {self.zeros_version}",
                "checkpoint_format 'gptq' with zeros stored minus one, or 'gptq_v2' with zeros as they are",
                "correct checkpoint_format in config.json and quantize_config.json",
            )


def _ones(bits: int) -> int:
    """A one in every field of a word. Version 1 files are made by subtracting it from whole words, borrow and all."""
    return sum(1 << i for i in range(0, 32, bits))


def check_shapes(
    name: str, shapes: Mapping[str, Sequence[int]], spec: QuantSpec, size: tuple[int, int] | None = None
) -> tuple[int, int]:
    """The sizes K and N of a matrix from the shapes of its tensors by suffix; FormatError when they do not fit.

    size: K and N as config.json has them, where it does.
    """
    for suffix in ("qweight", "qzeros", "scales"):
        if suffix not in shapes:
            raise FormatError(
                f"{name}.{suffix}", "no such tensor", "qweight, qzeros and scales for each matrix", "get the file again"
            )
    words, n = shapes["qweight"] if len(shapes["qweight"]) == 2 else (0, 0)
    k = words * WORD_BITS // spec.bits
    if size and k and (k, n) != size:
        raise FormatError(
            f"{name}.qweight",
            f"{k} x {n} channels",
            f"{size[0]} x {size[1]} channels, as config.json has it",
            "correct bits or sizes in config.json, or get the files again",
        )
    groups = ceil(k / spec.group(k)) if k else 0
    expected = {
        "qweight": (packed_length(k, spec.bits), n),
        "qzeros": (groups, packed_length(n, spec.bits)),
        "scales": (groups, n),
        "g_idx": (k,),
        "bias": (n,),
    }
    for suffix, shape in expected.items():
        if suffix in shapes and (tuple(shapes[suffix]) != shape or 0 in shape):
            raise FormatError(
                f"{name}.{suffix}",
                f"shape {list(shapes[suffix])}",
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
    return k, n


def check_g_idx(name: str, g_idx: torch.Tensor, spec: QuantSpec) -> None:
    """Every input channel is in a group that exists, and all groups are full."""
    if g_idx.dim() != 1 or len(g_idx) == 0 or g_idx.dtype not in (torch.int32, torch.int64):
        raise FormatError(
            f"{name}.g_idx", f"{g_idx.dtype} {list(g_idx.shape)}", "int32, one for each channel", "get the file again"
        )
    group = spec.group(len(g_idx))
    groups = len(g_idx) // group
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
