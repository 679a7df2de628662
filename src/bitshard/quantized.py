"""QuantizedWeight: the logical value of a quantized matrix, before any packing.

Shape legend: K input channels, N output channels, G groups. Orientation is GPTQ's, [K, N].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from bitshard.errors import FormatError
from bitshard.spec import QuantSpec


def trivial_g_idx(in_features: int, group: int) -> torch.Tensor:
    """The group of each input channel when groups are consecutive: int32 [K], `arange(K) // group`."""
    return torch.arange(in_features, dtype=torch.int32) // group


def insert(tensor: torch.Tensor, places: Sequence[tuple[int, int]], value: float) -> torch.Tensor:
    """Entries of `value` put into the last dimension: (position in the old tensor, how many), positions rising."""
    pieces, start = [], 0
    for position, count in places:
        pieces += [tensor[..., start:position], tensor.new_full((*tensor.shape[:-1], count), value)]
        start = position
    return torch.cat([*pieces, tensor[..., start:]], dim=-1)


@dataclass(frozen=True)
class QuantizedWeight:
    """w[k, n] = (codes[k, n] - zeros[g_idx[k], n]) * scales[g_idx[k], n], plus an output bias.

    codes_KN uint8; scales_GN float; zeros_GN uint8, the true zero point (v1's "minus one" is a matter of the layout);
    g_idx_K int32; bias_N float or None. Columns are output channels, rows are input channels.
    """

    spec: QuantSpec
    codes_KN: torch.Tensor
    scales_GN: torch.Tensor
    zeros_GN: torch.Tensor
    g_idx_K: torch.Tensor
    bias_N: torch.Tensor | None = None

    @property
    def in_features(self) -> int:
        return self.codes_KN.shape[0]

    @property
    def out_features(self) -> int:
        return self.codes_KN.shape[1]

    @property
    def group(self) -> int:
        return self.spec.group(self.in_features)

    @property
    def is_trivial(self) -> bool:
        """True when consecutive channels share consecutive groups, so that every scale is read in order."""
        return torch.equal(self.g_idx_K, trivial_g_idx(self.in_features, self.group).to(self.g_idx_K.device))

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The matrix [K, N]: exact integer difference, one product in `dtype`."""
        g = self.g_idx_K.long()
        difference = self.codes_KN.to(torch.int16) - self.zeros_GN.to(torch.int16)[g]
        return difference.to(dtype) * self.scales_GN.to(dtype)[g]

    def permute_rows(self, perm_K: torch.Tensor) -> QuantizedWeight:
        """Input channels reordered, `perm[new] = old`; scales stay, they are indexed by group number."""
        return replace(self, codes_KN=self.codes_KN[perm_K], g_idx_K=self.g_idx_K[perm_K])

    def permute_columns(self, perm_N: torch.Tensor) -> QuantizedWeight:
        """Output channels reordered, `perm[new] = old`: codes, scales, zeros and bias."""
        return replace(
            self,
            codes_KN=self.codes_KN[:, perm_N],
            scales_GN=self.scales_GN[:, perm_N],
            zeros_GN=self.zeros_GN[:, perm_N],
            bias_N=None if self.bias_N is None else self.bias_N[perm_N],
        )

    def insert_columns(self, places: Sequence[tuple[int, int]]) -> QuantizedWeight:
        """Output channels that dequantize to zero: (position in the old columns, how many), positions rising."""
        middle = 1 << (self.spec.bits - 1)

        def widen(tensor: torch.Tensor, value: float) -> torch.Tensor:
            return insert(tensor, places, value)

        return replace(
            self,
            codes_KN=widen(self.codes_KN, middle),
            scales_GN=widen(self.scales_GN, 1),
            zeros_GN=widen(self.zeros_GN, middle),
            bias_N=None if self.bias_N is None else widen(self.bias_N, 0),
        )

    def append_rows(self, count: int) -> QuantizedWeight:
        """Input channels that dequantize to zero, in groups of their own (or in the only group there is).

        Raises FormatError when `count` is not whole groups.
        """
        if self.spec.group_size == -1:
            codes = torch.cat([self.codes_KN, self.zeros_GN.expand(count, -1)])
            return replace(self, codes_KN=codes, g_idx_K=torch.cat([self.g_idx_K, self.g_idx_K[:1].expand(count)]))
        groups, rest = divmod(count, self.group)
        if rest:
            raise FormatError("padding", f"{count} channels", f"whole groups of {self.group}", "pad to another degree")
        n, middle = self.out_features, 1 << (self.spec.bits - 1)
        first = self.scales_GN.shape[0]
        new_groups = torch.arange(first, first + groups, dtype=torch.int32).repeat_interleave(self.group)
        return replace(
            self,
            codes_KN=torch.cat([self.codes_KN, self.codes_KN.new_full((count, n), middle)]),
            scales_GN=torch.cat([self.scales_GN, self.scales_GN.new_ones(groups, n)]),
            zeros_GN=torch.cat([self.zeros_GN, self.zeros_GN.new_full((groups, n), middle)]),
            g_idx_K=torch.cat([self.g_idx_K, new_groups]),
        )

    def renumber_groups(self) -> QuantizedWeight:
        """Groups numbered by first appearance, unused ones dropped; scales and zeros follow. Changes no weight."""
        first_seen = list(dict.fromkeys(self.g_idx_K.tolist()))
        order = torch.tensor(first_seen)
        number = torch.empty(len(self.scales_GN), dtype=torch.int64)
        number[order] = torch.arange(len(first_seen))
        return replace(
            self,
            scales_GN=self.scales_GN[order],
            zeros_GN=self.zeros_GN[order],
            g_idx_K=number[self.g_idx_K.long()].to(torch.int32),
        )
