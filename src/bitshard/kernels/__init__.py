"""The one torch op of the `gptq` layout, `torch.ops.bitshard.gptq_linear`, and the kernel behind it.

    y[..., n] = sum_k x[..., k] * (code[k, n] - zero[g[k], n]) * scale[g[k], n]

x float [..., K]; qweight, qzeros int32 and scales float as in layout.GptqLayout; g_idx int32 [K], or None when groups
are consecutive and of equal length, which lets a kernel read every scale in order. Output [..., N] in x's dtype.
"""

from __future__ import annotations

import torch

from bitshard.kernels import reference

gptq_linear = torch.library.custom_op("bitshard::gptq_linear", reference.gptq_linear, mutates_args=())


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
