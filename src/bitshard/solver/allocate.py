"""Where the bits go: between matrices, between strips, to single weights; and the ranges they are spent on.

Shape legend: N output channels, S strips of R = 16 input channels each.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from bitshard.mixed import strip_widths
from bitshard.solver.gptq import SMALLEST_SCALE
from bitshard.spec import FRACTIONS, STRIP, MixSpec, zero_base

ZEROS = 4  # zero codes of a strip
# of a zero's own min-max scale, tried one by one; 20 steps from 1.1 to 0.4 lower the loss by less than 1 %
SHRINKS = (1.0, 0.85, 0.7, 0.55, 0.4)


def fit_ranges(
    W_R: torch.Tensor, weights_R: torch.Tensor, width: int, ranges: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scales and zeros of strips of 16 weights, and the weighted squared error they leave when rounded alone.

    W_R: [16, ...]; weights_R: the same, or what broadcasts to it. ranges: "minmax" (with 0 inside, 2311.16442) or
    "search": every zero with shrunken ranges. Returns three tensors of shape [...].
    """
    base, top = zero_base(width), (1 << width) - 1
    low, high = W_R.amin(0).clamp(max=0), W_R.amax(0).clamp(min=0)
    if ranges == "minmax":
        scales = ((high - low) / top).clamp(min=SMALLEST_SCALE)
        wanted = torch.round(-low / scales)
        zeros = wanted.clamp(base, base + ZEROS - 1)
        # where the zero is beyond the reach of its two bits one side would be cut off, so the step grows
        wider = torch.maximum(high / (top - zeros), -low / zeros).clamp(min=SMALLEST_SCALE)
        scales = torch.where(zeros == wanted, scales, wider)
        codes_R = (W_R / scales).round_()
        codes_R = torch.minimum(torch.maximum(codes_R, -zeros), top - zeros)
        return scales, zeros, (codes_R * scales - W_R).square_().mul_(weights_R).sum(0)
    best_scales, best_zeros, best_loss = (torch.zeros_like(low) for _ in range(3))
    best_loss += torch.inf
    for zero in range(base, base + ZEROS):
        whole = torch.maximum(high / (top - zero) if zero < top else high, -low / zero if zero else -low)
        for shrink in SHRINKS:
            scales = (whole * shrink).clamp_(min=SMALLEST_SCALE)
            codes_R = (W_R / scales).round_().clamp_(-zero, top - zero)
            loss = codes_R.mul_(scales).sub_(W_R).square_().mul_(weights_R).sum(0)
            better = loss < best_loss
            best_loss = torch.where(better, loss, best_loss)
            best_scales = torch.where(better, scales, best_scales)
            best_zeros = best_zeros.masked_fill_(better, zero)
    return best_scales, best_zeros, best_loss


def strip_importance(W_NK: torch.Tensor, diagonal_K: torch.Tensor, ranking: str) -> torch.Tensor:
    """How much each strip wants 4 bits [S]: its rows' squared ranges (2311.16442 v1), weighted by the Hessian (v4)."""
    W_NSR = W_NK.view(len(W_NK), -1, STRIP)
    range_S = (W_NSR.amax(-1) - W_NSR.amin(-1)).square().sum(0)
    return range_S * diagonal_K.view(-1, STRIP).mean(1) if ranking == "hessian" else range_S


def choose_strips(importance_S: torch.Tensor, spec: MixSpec) -> torch.Tensor:
    """Strips of the input in the order they are stored, so that the most important ones stand in 4-bit places [S]."""
    wide = importance_S.argsort(descending=True, stable=True)[: round(len(importance_S) * spec.fraction_4bit)]
    is_wide = torch.zeros_like(importance_S, dtype=torch.bool).index_fill_(0, wide, True)
    order_S = torch.empty(len(importance_S), dtype=torch.int64, device=importance_S.device)
    places_wide = strip_widths(spec, len(importance_S)).to(importance_S.device) > spec.bits
    order_S[places_wide] = is_wide.nonzero()[:, 0]
    order_S[~places_wide] = (~is_wide).nonzero()[:, 0]
    return order_S


def choose_outliers(
    W_NK: torch.Tensor, diagonal_K: torch.Tensor, spec: MixSpec, ranges: str, count: int
) -> torch.Tensor:
    """Which weights to keep in 16 bits, bool [N, K]: at most one for each 2-bit strip of a row, where the others gain.

    A strip's gain is the weighted error it has, less the error it would have without its heaviest weight, its range
    fitted anew. Fewer than `count` are chosen where fewer strips gain; those that fill up a block never do.
    """
    W_RNS, weights_RNS, narrow = *_strips_first(W_NK, diagonal_K), _places(spec, W_NK) == 2
    W_RNS, weights_RNS = W_RNS[..., narrow], weights_RNS[..., narrow]
    heaviest = (W_RNS.square() * weights_RNS).argmax(0, keepdim=True)
    without = W_RNS.scatter(0, heaviest, 0.0)
    gain = fit_ranges(W_RNS, weights_RNS, 2, ranges)[2] - fit_ranges(without, weights_RNS, 2, ranges)[2]
    best = gain.flatten().topk(min(count, gain.numel())).indices
    wins = (gain > 0) & torch.zeros_like(gain, dtype=torch.bool).flatten().index_fill_(0, best, True).view_as(gain)
    chosen_NSR = torch.zeros(len(W_NK), len(narrow), STRIP, dtype=torch.bool, device=W_NK.device)
    chosen_NSR[:, narrow] = torch.zeros_like(W_RNS, dtype=torch.bool).scatter(0, heaviest, wins[None]).permute(1, 2, 0)
    return chosen_NSR.view_as(W_NK)


def share_of_wide_strips(W_NK: torch.Tensor, diagonal_K: torch.Tensor, spec: MixSpec) -> float:
    """Of the weighted error that 2 bits everywhere would leave, the part in the strips that got 4."""
    loss_S = fit_ranges(*_strips_first(W_NK, diagonal_K), 2, "search")[2].sum(0)
    total = float(loss_S.sum())
    return float(loss_S[_places(spec, W_NK) == 4].sum()) / total if total else 0.0


def _strips_first(W_NK: torch.Tensor, diagonal_K: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights [16, N, S] and Hessian diagonal [16, 1, S]."""
    W_NSR = W_NK.view(len(W_NK), -1, STRIP)
    return W_NSR.permute(2, 0, 1).contiguous(), diagonal_K.view(-1, STRIP).T[:, None].contiguous()


def _places(spec: MixSpec, W_NK: torch.Tensor) -> torch.Tensor:
    """Bits of each stored strip [S]."""
    return strip_widths(spec, W_NK.shape[1] // STRIP).to(W_NK.device)


def relative_errors(W_NK: torch.Tensor, diagonal_K: torch.Tensor) -> list[float]:
    """The share of one matrix's output that each fraction of 4-bit strips, in FRACTIONS' order, makes wrong.

    Without feedback, and as if channels were independent. K: whole blocks, whose first strips are the wide ones.
    """
    W_RNS, weights_RNS = _strips_first(W_NK, diagonal_K)
    loss_WS = [fit_ranges(W_RNS, weights_RNS, width, "search")[2].sum(0).view(-1, 4).sum(0) for width in (2, 4)]
    total = float((W_RNS.square() * weights_RNS).sum())
    wide = [int(4 * fraction) for fraction in FRACTIONS]
    return [float(loss_WS[1][:w].sum() + loss_WS[0][w:].sum()) / total if total else 0.0 for w in wide]


def spend(errors: Sequence[Sequence[float]], sizes: Sequence[Sequence[int]], budget: int) -> list[int]:
    """Which of its choices each matrix takes, so that all sizes together stay within the budget and errors are small.

    errors and sizes: of each matrix's choices. From the smallest on, the step that saves most error per byte is taken,
    over a choice that is no help by itself if need be, until none fits: the least errors but for the last few bytes.
    """
    # with outliers, which only 2-bit strips have, all strips at 4 bits may be the smallest
    chosen = [min(zip(own, wrong, range(len(own)), strict=True))[2] for own, wrong in zip(sizes, errors, strict=True)]
    left = budget - sum(map(min, sizes))
    while True:
        steps = [
            ((errors[m][at] - errors[m][to]) / (sizes[m][to] - sizes[m][at]), m, to)
            for m, at in enumerate(chosen)
            for to in range(len(errors[m]))
            if 0 < sizes[m][to] - sizes[m][at] <= left
        ]
        gain, matrix, to = max(steps, default=(0.0, 0, 0))
        if not gain > 0:
            return chosen
        left -= sizes[matrix][to] - sizes[matrix][chosen[matrix]]
        chosen[matrix] = to
