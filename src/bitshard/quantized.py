"""QuantizedWeight: the logical value of a quantized matrix, before any packing.

Shape legend: K input channels, N output channels, G groups. Orientation is GPTQ's, [K, N].
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from bitshard.spec import QuantSpec


def trivial_g_idx(in_features: int, group: int) -> torch.Tensor:
    """The group of each input channel when groups are consecutive: int32 [K], `arange(K) // group`."""
    return torch.arange(in_features, dtype=torch.int32) // group


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

    def renumber_groups(self) -> QuantizedWeight:
        """Groups numbered by first appearance; scales and zeros follow. Changes no weight."""
        first_seen = list(dict.fromkeys(self.g_idx_K.tolist()))
        order = torch.tensor(first_seen)
        number = torch.empty_like(order)
        number[order] = torch.arange(len(first_seen))
        return replace(
            self,
            scales_GN=self.scales_GN[order],
            zeros_GN=self.zeros_GN[order],
            g_idx_K=number[self.g_idx_K.long()].to(torch.int32),
        )
