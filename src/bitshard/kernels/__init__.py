"""One torch op for each layout, `torch.ops.bitshard.gptq_linear` and `mix64_linear`, and the kernels behind them.

`gptq_linear`:

    y[..., n] = sum_k x[..., k] * (code[k, n] - zero[g[k], n]) * scale[g[k], n]

x float [..., K]; qweight, qzeros int32 and scales float as in layout.GptqLayout; g_idx int32 [K], or None when groups
are consecutive and of equal length, which lets a kernel read every scale in order. Output [..., N] in x's dtype.

`mix64_linear`: y[..., n] = sum_k x[..., k] * w[n, k] with w as in mixed.MixedWeight. x float [..., K], K whole blocks
of 64 channels in stored order. The tensors are layout.Mix64Layout's: metadata those it names for `metadata_kind`, in
that order, outliers its three or none. bits, fraction_4bit and metadata_kind are MixSpec's. Output [..., N], x's dtype.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from bitshard.kernels import reference

gptq_linear = torch.library.custom_op("bitshard::gptq_linear", reference.gptq_linear, mutates_args=())
mix64_linear = torch.library.custom_op("bitshard::mix64_linear", reference.mix64_linear, mutates_args=())


@gptq_linear.register_fake
def _(
    x: torch.Tensor,
    qweight: torch.Tensor,
    scales: torch.Tensor,
    qzeros: torch.Tensor,
    g_idx: torch.Tensor | None,
    bits: int,
    zeros_version: int,
) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], scales.shape[1])


@mix64_linear.register_fake
def _(
    x: torch.Tensor,
    qweight: torch.Tensor,
    qextra: torch.Tensor | None,
    metadata: Sequence[torch.Tensor],
    outliers: Sequence[torch.Tensor],
    bits: int,
    fraction_4bit: float,
    metadata_kind: str,
) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], qweight.shape[0])
