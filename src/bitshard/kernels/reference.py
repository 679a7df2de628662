"""Plain torch: what every kernel must equal. Shape legend: M tokens, K input, N output channels, G groups."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from bitshard.bitpack import unpack
from bitshard.layout import GptqLayout, Mix64Layout
from bitshard.records import mix64_from_lanes, mix64_from_rows, ungroup_rows
from bitshard.spec import BLOCK, MixSpec


def dequantize(
    qweight: torch.Tensor,
    scales_GN: torch.Tensor,
    qzeros: torch.Tensor,
    g_idx_K: torch.Tensor | None,
    bits: int,
    zeros_version: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """GPTQ tensors to the matrix [K, N] in `dtype`: an exact integer difference times the scale, rounded once."""
    layout = GptqLayout(1) if zeros_version == 1 else GptqLayout(2)
    codes_KN = unpack(qweight, bits, dim=0)
    zeros_GN = (qzeros if qzeros.dtype == torch.uint8 else layout.unpack_zeros(qzeros, bits)).float()
    scales_GN = scales_GN.float()
    if g_idx_K is not None:
        g = g_idx_K.long()
        return ((codes_KN.float() - zeros_GN[g]) * scales_GN[g]).to(dtype)
    groups, n = scales_GN.shape
    codes_GBN = codes_KN.view(groups, -1, n).float()
    return codes_GBN.sub_(zeros_GN[:, None]).mul_(scales_GN[:, None]).view(-1, n).to(dtype)


def gptq_matrix(
    dtype: torch.dtype,
    qweight: torch.Tensor,
    scales: torch.Tensor,
    qzeros: torch.Tensor,
    g_idx: torch.Tensor | None,
    out_features: int,
    bits: int,
    zeros_version: int,
) -> torch.Tensor:
    """The dequantized matrix [N, K], however its tensors are arranged."""
    if qweight.dim() == 3:
        qweight, scales, qzeros = (ungroup_rows(tensor, out_features).T for tensor in (qweight, scales, qzeros))
    return dequantize(qweight, scales, qzeros, g_idx, bits, zeros_version, dtype).T


def mix64_matrix(
    dtype: torch.dtype,
    in_features: int,
    qweight: torch.Tensor,
    qextra: torch.Tensor | None,
    metadata: Sequence[torch.Tensor],
    outliers: Sequence[torch.Tensor],
    out_features: int,
    spec: MixSpec,
    arrangement: str,
) -> torch.Tensor:
    """The dequantized matrix [N, K], outliers included. arrangement: file, cpu or gpu."""
    layout, tensors = Mix64Layout(), {"qweight": qweight, **({} if qextra is None else {"qextra": qextra})}
    if arrangement == "file":
        tensors |= zip(layout.metadata[spec.metadata], metadata, strict=True)
    elif arrangement == "cpu":
        tensors = mix64_from_rows({**tensors, "scales2": metadata[0]}, spec, out_features)
    else:
        blocks = in_features // BLOCK
        tensors = mix64_from_lanes({**tensors, "scales2": metadata[0]}, spec, out_features, blocks)
    tensors |= zip(layout.outliers, outliers, strict=False)  # none, or all three
    return layout.decode(tensors, spec, in_features).dequantize(dtype)
