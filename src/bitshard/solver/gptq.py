"""GPTQ (2210.17323, Algorithm 1): round one input channel at a time, let the channels not yet rounded make up for it.

Shape legend: N output channels, K input channels, G groups, R channels of one group, B channels of one lazy block.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd

import torch

from bitshard.errors import SolverError, SpecError
from bitshard.quantized import QuantizedWeight
from bitshard.solver.hessian import inverse_factor, squared_outputs
from bitshard.spec import QuantSpec

BLOCK = 128  # channels whose feedback reaches the rest at once (section 3.3, lazy batch updates)
SMALLEST_SCALE = 2.0**-24  # fp16's smallest positive number


@dataclass(frozen=True)
class SolveReport:
    """How one matrix came out.

    relative_error: |(W - Q) X|^2 / |W X|^2 over the calibration inputs X. damp: what the factorization needed.
    dead: input channels that were never active; their weights became zero. share_4bit: of the Hessian-weighted error
    that 2 bits everywhere would leave, the part in the strips that got 4; `mix64` alone has them.
    """

    name: str
    relative_error: float
    damp: float
    dead: int
    share_4bit: float = 0.0


@dataclass(frozen=True)
class _Grid:
    """Scales and zeros [G, N] of a matrix, in the dtype of the solve; scales are exact in fp16."""

    spec: QuantSpec
    scales_GN: torch.Tensor
    zeros_GN: torch.Tensor

    def fit(self, groups: slice, W_GRN: torch.Tensor) -> None:
        """Min-max ranges with zero inside; a symmetric grid's zero is its middle code, whatever the weights' signs."""
        low_GN, high_GN = W_GRN.amin(dim=1).clamp(max=0), W_GRN.amax(dim=1).clamp(min=0)
        span_GN = 2 * torch.maximum(-low_GN, high_GN) if self.spec.sym else high_GN - low_GN
        # rounded to what the file stores before any weight is rounded against it
        scales_GN = (span_GN / self.spec.max_code).to(torch.float16).clamp(min=SMALLEST_SCALE).to(W_GRN.dtype)
        self.scales_GN[groups] = torch.where(span_GN == 0, 1.0, scales_GN)
        if self.spec.sym:
            self.zeros_GN[groups] = 1 << (self.spec.bits - 1)
        else:
            self.zeros_GN[groups] = torch.round(-low_GN / self.scales_GN[groups]).clamp(0, self.spec.max_code)


@torch.no_grad()
def gptq(
    W_NK: torch.Tensor, H_KK: torch.Tensor, spec: QuantSpec, name: str, damp: float
) -> tuple[QuantizedWeight, SolveReport]:
    """Quantize a matrix against the Hessian of its inputs. Computes in the dtype and on the device of H_KK.

    desc_act visits channels in order of falling diag(H). Groups are runs of channels in that order, with ranges from
    the weights as feedback left them; static groups, and one group for all, are runs in natural order with ranges from
    the weights as they came. Rows keep their places either way: `g_idx` says which group each belongs to. damp: of the
    mean of diag(H), added to all of it; the paper has 0.01 (section 3.3).

    Raises SpecError when groups do not divide K; SolverError for values that are not finite, scales beyond fp16 or a
    Hessian that cannot be factored. Both carry `name`.
    """
    _check(W_NK, H_KK, spec, name)
    k, group = W_NK.shape[1], spec.group(W_NK.shape[1])
    alive_NK, alive_KK = alive(W_NK, H_KK)
    W_KN = alive_NK.T.contiguous()
    channels = torch.arange(k, device=H_KK.device)
    order_K = torch.argsort(H_KK.diagonal(), descending=True, stable=True) if spec.desc_act else channels
    U_KK, used_damp = inverse_factor(alive_KK, order_K, name, damp)

    grid = _Grid(spec, *(H_KK.new_empty(k // group, W_KN.shape[1]) for _ in range(2)))
    fixed = spec.static_groups or spec.group_size == -1
    if fixed:
        grid.fit(slice(None), W_KN.view(k // group, group, -1))
    visited_groups_K = (order_K if fixed else channels) // group
    visited_codes_KN = _round_channels(W_KN[order_K], U_KK, grid, visited_groups_K.tolist(), fixed)
    if not bool(torch.isfinite(grid.scales_GN).all()):
        raise SolverError(name, "a scale beyond fp16", "scales up to 65504", "check the layer's weights")

    codes_KN, g_idx_K = torch.empty_like(visited_codes_KN), torch.empty_like(visited_groups_K, dtype=torch.int32)
    codes_KN[order_K], g_idx_K[order_K] = visited_codes_KN, visited_groups_K.to(torch.int32)
    scales_GN, zeros_GN = grid.scales_GN.to(torch.float16), grid.zeros_GN.to(torch.uint8)
    weight = QuantizedWeight(spec, codes_KN, scales_GN, zeros_GN, g_idx_K)
    return weight, SolveReport(name, _relative_error(W_NK, weight, H_KK), used_damp, int((H_KK.diagonal() == 0).sum()))


def _round_channels(
    W_KN: torch.Tensor, U_KK: torch.Tensor, grid: _Grid, groups: list[int], fixed: bool
) -> torch.Tensor:
    """Codes uint8 [K, N] in visiting order. Overwrites W_KN; fits each group when it is reached unless `fixed`."""
    (k, n), group = W_KN.shape, W_KN.shape[0] // len(grid.scales_GN)
    codes_KN = torch.empty(k, n, dtype=torch.uint8, device=W_KN.device)
    # a group is fitted when it is reached; lying in one block, or starting with one, it has all feedback in by then
    block = BLOCK if fixed else group * (BLOCK // group) or gcd(group, BLOCK)
    for start in range(0, k, block):
        stop = min(start + block, k)
        error_BN = W_KN.new_empty(stop - start, n)
        for i in range(start, stop):
            if not fixed and i % group == 0:
                grid.fit(slice(groups[i], groups[i] + 1), W_KN[None, i : i + group])
            scale_N, zero_N = grid.scales_GN[groups[i]], grid.zeros_GN[groups[i]]
            code_N = (W_KN[i] / scale_N).round_().add_(zero_N).clamp_(0, grid.spec.max_code)
            codes_KN[i] = code_N
            error_N = W_KN[i].sub_(code_N.sub_(zero_N).mul_(scale_N)).div_(U_KK[i, i])
            error_BN[i - start] = error_N
            W_KN[i + 1 : stop].addr_(U_KK[i, i + 1 : stop], error_N, alpha=-1)
        W_KN[stop:].addmm_(U_KK[start:stop, stop:].T, error_BN, alpha=-1)
    return codes_KN


def _relative_error(W_NK: torch.Tensor, weight: QuantizedWeight, H_KK: torch.Tensor) -> float:
    W_NK = W_NK.to(H_KK.dtype)
    total = squared_outputs(W_NK, H_KK)
    return squared_outputs(W_NK - weight.dequantize(H_KK.dtype).T, H_KK) / total if total else 0.0


def _check(W_NK: torch.Tensor, H_KK: torch.Tensor, spec: QuantSpec, name: str) -> None:
    k = W_NK.shape[1]
    if k % spec.group(k):
        raise SpecError(
            name,
            f"{k} input channels",
            f"whole groups of {spec.group_size}",
            "choose a group_size that divides, -1 for one group, or zero-pad the model (`--max-tp 1`)",
        )
    check_finite(W_NK, H_KK, name)


def alive(W_NK: torch.Tensor, H_KK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """W in H's dtype, and H; channels that were never active have zero weights and the others' mean activity.

    Any positive number does for them; the mean leaves the damping as it would be without them. H itself is returned
    where there are none, and never changed.
    """
    diagonal_K = H_KK.diagonal()
    dead_K = diagonal_K == 0
    if bool(dead_K.any()):
        filler = diagonal_K[~dead_K].mean() if not bool(dead_K.all()) else 1.0
        H_KK = H_KK.clone()
        H_KK.diagonal().add_(dead_K * filler)
    return W_NK.to(H_KK.dtype).masked_fill(dead_K, 0.0), H_KK


def check_finite(W_NK: torch.Tensor, H_KK: torch.Tensor, name: str) -> None:
    """SolverError with the matrix's name unless all numbers are finite."""
    if not bool(torch.isfinite(W_NK).all()):
        raise SolverError(name, "NaN or infinite weights", "finite weights", "get the 16-bit model again")
    if not bool(torch.isfinite(H_KK).all()):
        raise SolverError(
            name, "NaN or infinite activations during calibration", "finite activations",
            "check the model's weights and the layers before this one, or calibrate with other text",
        )  # fmt: skip
