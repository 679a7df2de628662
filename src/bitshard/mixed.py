"""MixedWeight: the logical value of a `mix64` matrix, before any packing.

Shape legend: N output channels, K input channels (stored: filled up to whole blocks of 64), S strips of 16 input
channels, T tiles of output channels that share second-order scales. Orientation is the model's own, [N, K].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bitshard.spec import BLOCK, STRIP, MixSpec, zero_base


@dataclass(frozen=True)
class Outliers:
    """Single weights kept in 16 bits beside the codes, in CSR form; columns count stored input channels.

    row_starts int32 [N+1], columns int32 [nnz], rising within a row, values float16 [nnz].
    """

    row_starts: torch.Tensor
    columns: torch.Tensor
    values: torch.Tensor

    @classmethod
    def of(cls, values_NK: torch.Tensor, chosen_NK: torch.Tensor) -> Outliers:
        """The chosen entries (bool [N, K]) of a dense matrix, rounded to float16."""
        rows, columns = chosen_NK.nonzero(as_tuple=True)
        counts = torch.bincount(rows, minlength=len(values_NK))
        starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        values = values_NK[rows, columns].to(torch.float16)
        return cls(starts.to(torch.int32), columns.to(torch.int32), values)

    def rows(self) -> torch.Tensor:
        """The row of every entry, int64 [nnz]."""
        counts = self.row_starts.diff().long()
        return torch.arange(len(counts), device=counts.device).repeat_interleave(counts)


@dataclass(frozen=True)
class MixedWeight:
    """w[n, k] = (code[n, k] - zero[n, s]) * scale[n, s], s = k // 16, plus the outliers, plus an output bias.

    scale[n, s] = float16(step[t, s] * scale_code[n, s] + offset[t, s]), t = n // tile, rounded once. That makes every
    weight exact in float32: a difference of at most 8 bits times 11 bits.

    codes_NK uint8, K whole blocks; in_features: the channels that are real, the rest dequantizes to zero.
    scale_codes_NS uint8; zeros_NS uint8, the true zero points; steps_TS and offsets_TS float32, exact in what a layout
    stores. row_scales_N float16: of all 4-bit strips, which share one zero per row too; with metadata "paper" only.
    strip_order_S: which strip of the input stands at each place, where the matrix is not in the model's order; int64.
    """

    spec: MixSpec
    in_features: int
    codes_NK: torch.Tensor
    scale_codes_NS: torch.Tensor
    zeros_NS: torch.Tensor
    steps_TS: torch.Tensor
    offsets_TS: torch.Tensor
    row_scales_N: torch.Tensor | None = None
    outliers: Outliers | None = None
    strip_order_S: torch.Tensor | None = None
    bias_N: torch.Tensor | None = None

    @property
    def out_features(self) -> int:
        return self.codes_NK.shape[0]

    def scales(self) -> torch.Tensor:
        """float16 [N, S]."""
        n, spec = self.out_features, self.spec
        steps_NS, offsets_NS = (p.repeat_interleave(spec.tile, dim=0)[:n] for p in (self.steps_TS, self.offsets_TS))
        scales_NS = (steps_NS * self.scale_codes_NS + offsets_NS).to(torch.float16)
        if self.row_scales_N is not None:
            scales_NS[:, strip_widths(spec, scales_NS.shape[1]) == 4] = self.row_scales_N[:, None]
        return scales_NS

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The matrix [N, K] in the model's order of channels: exact in float32, rounded once to any other dtype."""
        n, k = self.codes_NK.shape
        codes_NSR = self.codes_NK.view(n, -1, STRIP).to(torch.int16) - self.zeros_NS[..., None].to(torch.int16)
        W_NK = (codes_NSR.float() * self.scales()[..., None].float()).view(n, k)
        if self.outliers is not None:
            W_NK[self.outliers.rows(), self.outliers.columns.long()] += self.outliers.values.float()
        if self.strip_order_S is not None:
            stored, W_NK = W_NK.view(n, -1, STRIP), torch.empty_like(W_NK)
            W_NK.view(n, -1, STRIP)[:, self.strip_order_S] = stored
        return W_NK[:, : self.in_features].to(dtype)


def strip_widths(spec: MixSpec, strips: int) -> torch.Tensor:
    """Bits of each strip, int64 [S]."""
    return torch.tensor(spec.widths).repeat(strips * STRIP // BLOCK)


def zero_bases(spec: MixSpec, strips: int) -> torch.Tensor:
    """What each strip's zero code is counted from, uint8 [S]."""
    return torch.tensor([zero_base(w) for w in spec.widths], dtype=torch.uint8).repeat(strips * STRIP // BLOCK)
