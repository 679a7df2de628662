"""GPTQ for `mix64`: strips of 16 channels rounded one after another, the channels not yet rounded making up for it.

Two things differ from plain GPTQ (solver.gptq). Strips are visited with the wide ones last, because a 4-bit channel
takes up the errors of 2-bit ones far better than the other way round: 12 % less error on SmolLM2. And a strip's scale
and zero codes are searched for by the loss that error feedback will really leave: with H = R R^T, R upper triangular,
it is |(W - Q) R|^2, of which each channel visited settles its part, so rounding a strip once for each candidate
compares them. R and the errors so far also say what a strip is to be rounded to; the inverse of H, by which GPTQ passes
errors on, is not needed.

Shape legend: N output channels, K input channels (whole blocks of 64), S strips, R = 16 channels of one strip, T tiles
of output channels with common second-order scales, C scale codes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil

import torch
from torch.nn.functional import pad

from bitshard.errors import SolverError
from bitshard.mixed import MixedWeight, Outliers, strip_widths
from bitshard.solver.allocate import choose_outliers, choose_strips, fit_ranges, share_of_wide_strips, strip_importance
from bitshard.solver.gptq import SMALLEST_SCALE, SolveReport, alive, check_finite
from bitshard.solver.hessian import factor, squared_outputs
from bitshard.spec import BLOCK, STRIP, MixRecipe, MixSpec, zero_base

LAZY = 8  # strips whose feedback reaches the rest at once: 128 channels, as in solver.gptq
SAMPLE_ROWS, SAMPLE_BLOCKS = 256, 16  # that choices are made by
CLEARLY = 0.9  # of the loss that min-max leaves: with less, the search is taken for the better one
PASSES = 1  # over all strips once everything is rounded; a second one lowers the loss by another 1 %


@torch.no_grad()
def solve_mixed(
    W_NK: torch.Tensor, H_KK: torch.Tensor, spec: MixSpec, recipe: MixRecipe, name: str
) -> tuple[MixedWeight, SolveReport]:
    """Quantize one matrix [N, K], any float dtype, with the Hessian of its inputs, float32, on the same device.

    What leaves the least output error is kept of what is tried: two visiting orders, on a sample; min-max and searched
    ranges, in full unless a sample is CLEARLY in favour of the search; every strip rounded once more. Raises
    SolverError for values that are not finite, scales beyond fp16 or a Hessian that cannot be factored.
    """
    check_finite(W_NK, H_KK, name)
    matrix = _Matrix.of(W_NK, H_KK, spec, recipe)
    sample = matrix.sample()
    visits = {falling: sample.visit(falling, name)[:2] for falling in (True, False)}
    losses = {falling: sample.solve(*visit, "minmax").loss for falling, visit in visits.items()}
    falling = min(losses, key=losses.__getitem__)
    visit_K, R_KK, damp = matrix.visit(falling, name)
    tried = ["minmax"]
    if recipe.ranges == "search":
        gains = sample.solve(*visits[falling], "search").loss < CLEARLY * losses[falling]
        tried = ["search"] if gains else ["search", "minmax"]
    best = min((matrix.solve(visit_K, R_KK, ranges) for ranges in tried), key=lambda state: state.loss)
    del R_KK  # 321 MB for K = 8,960, as much as `refine` is about to take
    if not bool(torch.isfinite(best.Q_NK).all()):
        raise SolverError(name, "a scale beyond fp16", "scales up to 65504", "check the layer's weights")
    if recipe.ranges == "search":
        for _ in range(PASSES):
            matrix.refine(best, visit_K, damp, name)
    dead = int((H_KK.diagonal() == 0).sum())
    relative = matrix.relative_error(best, damp)
    return matrix.result(best, W_NK.shape[1]), SolveReport(name, relative, damp, dead, matrix.share_4bit())


@dataclass
class _State:
    """A matrix rounded so far, in stored order; dequantized values and every code that led to them, as float32."""

    Q_NK: torch.Tensor
    codes_NS: torch.Tensor  # of scales
    zeros_NS: torch.Tensor
    steps_TS: torch.Tensor
    offsets_TS: torch.Tensor
    loss: float = 0.0  # squared error of the outputs, damping in


@dataclass(frozen=True)
class _Matrix:
    """One matrix to solve, input channels in stored order and filled up to whole blocks; float32."""

    spec: MixSpec
    recipe: MixRecipe
    W_NK: torch.Tensor  # zero where the input never is
    H_KK: torch.Tensor  # dead channels given the others' mean, so that it can be factored
    outlier_NK: torch.Tensor  # bool
    row_scales_N: torch.Tensor | None  # metadata "paper": of all 4-bit strips, and their zeros
    row_zeros_N: torch.Tensor | None
    strip_order_S: torch.Tensor | None

    @classmethod
    def of(cls, W_NK: torch.Tensor, H_KK: torch.Tensor, spec: MixSpec, recipe: MixRecipe) -> _Matrix:
        n, k = W_NK.shape
        if fill := -k % BLOCK:
            W_NK, H_KK = pad(W_NK, (0, fill)), pad(H_KK, (0, fill, 0, fill))
        W, H = alive(W_NK, H_KK)
        order_S = None
        if recipe.order == "none" and len(set(spec.widths)) > 1:
            order_S = choose_strips(strip_importance(W, H.diagonal(), recipe.ranking), spec)
            channels = _channels(order_S)
            W, H = W[:, channels], H[channels][:, channels]
        outlier_NK = torch.zeros_like(W, dtype=torch.bool)
        if recipe.outliers:
            count = round(recipe.outliers * n * k)
            outlier_NK = choose_outliers(W, H.diagonal(), spec, recipe.ranges, count)
        row_scales_N = row_zeros_N = None
        if spec.metadata == "paper":
            wide_NC = W.view(n, -1, STRIP)[:, ::4].reshape(n, 1, -1)
            low_N, high_N = wide_NC.amin((1, 2)).clamp(max=0), wide_NC.amax((1, 2)).clamp(min=0)
            row_scales_N = _stored((high_N - low_N) / 15)
            row_zeros_N = torch.round(-low_N / row_scales_N).clamp(0, 15)
        return cls(spec, recipe, W, H, outlier_NK, row_scales_N, row_zeros_N, order_S)

    def share_4bit(self) -> float:
        rows = slice(None, None, ceil(len(self.W_NK) / SAMPLE_ROWS))
        return share_of_wide_strips(self.W_NK[rows], self.H_KK.diagonal(), self.spec)

    def sample(self) -> _Matrix:
        """Some rows and some blocks, enough to tell one way to solve from another."""
        blocks = torch.arange(0, self.W_NK.shape[1], BLOCK, device=self.W_NK.device)
        blocks = blocks[:: ceil(len(blocks) / SAMPLE_BLOCKS)]
        channels = (blocks[:, None] + torch.arange(BLOCK, device=blocks.device)).flatten()
        rows = slice(None, None, ceil(len(self.W_NK) / SAMPLE_ROWS))
        row_wise = None if self.row_scales_N is None else self.row_scales_N[rows]
        zeros = None if self.row_zeros_N is None else self.row_zeros_N[rows]
        return replace(
            self,
            W_NK=self.W_NK[rows, channels],
            H_KK=self.H_KK[channels][:, channels],
            outlier_NK=self.outlier_NK[rows, channels],
            row_scales_N=row_wise,
            row_zeros_N=zeros,
        )

    def visit(self, falling: bool, name: str) -> tuple[torch.Tensor, torch.Tensor, float]:
        """Input channels as they are visited [K], the factor of their Hessian [K, K], and its damping.

        Strips by rising width; among equals by falling sensitivity or by rising, which is better where few of them have
        most of it, as in down projections: 30 % less error there. In a strip the most active channel comes first.
        """
        importance_S = (self.H_KK.diagonal() * self.W_NK.square().sum(0)).view(-1, STRIP).sum(1)
        widths_S = strip_widths(self.spec, len(importance_S)).to(importance_S.device)
        order_S = importance_S.argsort(descending=falling, stable=True)
        order_S = order_S[widths_S[order_S].argsort(stable=True)]
        within_SR = self.H_KK.diagonal().view(-1, STRIP).argsort(dim=1, descending=True, stable=True)
        starts_S1 = torch.arange(0, self.W_NK.shape[1], STRIP, device=within_SR.device)[:, None]
        visit_K = (within_SR + starts_S1)[order_S].flatten()
        return visit_K, *factor(self.H_KK, visit_K, name, self.recipe.damp)

    def relative_error(self, state: _State, damp: float) -> float:
        """Squared error of the outputs, tr(E H E^T), over what they are; undamped."""
        damping = damp * self.H_KK.diagonal().mean() * (self.W_NK - state.Q_NK).square().sum()
        total = squared_outputs(self.W_NK, self.H_KK)
        return max(0.0, state.loss - float(damping)) / total if total else 0.0

    def solve(self, visit_K: torch.Tensor, R_KK: torch.Tensor, ranges: str) -> _State:
        """Round all strips in the order of `visit_K`, with the factor of the Hessian in that order."""
        n, k = self.W_NK.shape
        state = self._empty()
        W_NK, outlier_NK = self.W_NK[:, visit_K], self.outlier_NK[:, visit_K]
        U_SRR = _inverses(R_KK.view(k // STRIP, STRIP, -1, STRIP).diagonal(dim1=0, dim2=2).permute(2, 0, 1))
        errors_NK = torch.zeros_like(W_NK)  # (W - Q) R so far
        for start in range(0, k, LAZY * STRIP):
            stop = min(start + LAZY * STRIP, k)
            off_NL = W_NK.new_empty(n, stop - start)
            for first in range(start, stop, STRIP):
                own, strip = slice(first, first + STRIP), int(visit_K[first]) // STRIP
                done = off_NL[:, : first - start]
                U_RR, so_far_NR = U_SRR[first // STRIP], errors_NK[:, own] + done @ R_KK[start:first, own]
                target_NR = W_NK[:, own] + so_far_NR @ U_RR
                rounded = self._new_strip(state, strip, target_NR, U_RR, outlier_NK[:, own], ranges)
                state.Q_NK[:, visit_K[own]] = rounded.Q_NR
                torch.sub(W_NK[:, own], rounded.Q_NR, out=off_NL[:, first - start : first - start + STRIP])
                state.loss += float(rounded.loss_N.sum())
            errors_NK[:, stop:].addmm_(off_NL, R_KK[start:stop, stop:])
        return state

    def refine(self, state: _State, visit_K: torch.Tensor, damp: float, name: str) -> None:
        """Round every strip again, all others as they are; what does not lower the loss is left. Changes `state`.

        In visiting order, where what is not visited yet lies together: the rest of the gradient is of no more use.
        """
        k, strips_S = len(visit_K), (visit_K[::STRIP] // STRIP).tolist()
        H_KK = self.H_KK[visit_K][:, visit_K]
        H_KK.diagonal().add_(damp * H_KK.diagonal().mean())
        Q_NK, outlier_NK = state.Q_NK[:, visit_K], self.outlier_NK[:, visit_K]
        gradient_NK = (self.W_NK[:, visit_K] - Q_NK) @ H_KK
        H_SRR = H_KK.view(-1, STRIP, k // STRIP, STRIP).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
        L_SRR, failed_S = torch.linalg.cholesky_ex(H_SRR.flip(1, 2))
        if bool(failed_S.any()):  # although it could be factored as a whole: its numbers are too small for float32
            raise SolverError(
                name, f"a Hessian of numbers about {float(H_KK.diagonal().mean()):.0e}",
                "numbers that float32 can factor", "check the layer's weights and activations",
            )  # fmt: skip
        U_SRR = _inverses(L_SRR.flip(1, 2))
        for start in range(0, k, LAZY * STRIP):
            stop = min(start + LAZY * STRIP, k)
            change_NL = Q_NK.new_zeros(len(Q_NK), stop - start)
            for first in range(start, stop, STRIP):
                own, strip, U_RR = slice(first, first + STRIP), strips_S[first // STRIP], U_SRR[first // STRIP]
                Q_NR, so_far_NR = Q_NK[:, own], gradient_NK[:, own] @ U_RR.T
                target_NR = Q_NR + so_far_NR @ U_RR  # where the optimum lies, the others fixed
                rounded = self._search(state, strip, target_NR, U_RR, outlier_NK[:, own], neighbours=True)
                so_far_N = so_far_NR.square().sum(1)
                better_N = rounded.loss_N < so_far_N * (1 - 1e-6)
                change_NR = change_NL[:, first - start : first - start + STRIP]
                torch.sub(rounded.Q_NR, Q_NR, out=change_NR).mul_(better_N[:, None])
                gradient_NK[:, first + STRIP : stop].addmm_(change_NR, H_KK[own, first + STRIP : stop], alpha=-1)
                Q_NK[:, own] = torch.where(better_N[:, None], rounded.Q_NR, Q_NR)
                state.codes_NS[better_N, strip] = rounded.codes_N[better_N]
                state.zeros_NS[better_N, strip] = rounded.zeros_N[better_N]
                state.loss -= float((so_far_N - rounded.loss_N)[better_N].sum())
            gradient_NK[:, stop:].addmm_(change_NL, H_KK[start:stop, stop:], alpha=-1)
        state.Q_NK[:, visit_K] = Q_NK

    def result(self, state: _State, in_features: int) -> MixedWeight:
        """The codes behind the dequantized values."""
        n, k = self.W_NK.shape
        scales_NS = torch.stack(
            [self._scales(state, s).gather(1, state.codes_NS[:, s, None].long())[:, 0] for s in range(k // STRIP)],
            dim=1,
        )
        steps_NSR = (state.Q_NK.view(n, -1, STRIP) / scales_NS[..., None]).round_()
        steps_NSR.masked_fill_(self.outlier_NK.view(n, -1, STRIP), 0.0)
        codes_NK = (steps_NSR + state.zeros_NS[..., None]).view(n, k)
        return MixedWeight(
            spec=self.spec,
            in_features=in_features,
            codes_NK=codes_NK.to(torch.uint8),
            scale_codes_NS=state.codes_NS.to(torch.uint8),
            zeros_NS=state.zeros_NS.to(torch.uint8),
            steps_TS=state.steps_TS,
            offsets_TS=state.offsets_TS,
            row_scales_N=None if self.row_scales_N is None else self.row_scales_N.to(torch.float16),
            outliers=Outliers.of(state.Q_NK, self.outlier_NK) if bool(self.outlier_NK.any()) else None,
            strip_order_S=self.strip_order_S,
        )

    def _empty(self) -> _State:
        n, strips = len(self.W_NK), self.W_NK.shape[1] // STRIP
        new, tiles = self.W_NK.new_zeros, self.spec.tiles(n)
        return _State(
            torch.empty_like(self.W_NK), new(n, strips), new(n, strips), new(tiles, strips), new(tiles, strips)
        )

    def _is_row_wise(self, strip: int) -> bool:
        return self.row_scales_N is not None and self.spec.widths[strip % 4] == 4

    def _scales(self, state: _State, strip: int) -> torch.Tensor:
        """Every scale that a strip of each row can have, float32 [N, C]: what the layout will hold, exactly."""
        if self._is_row_wise(strip):
            assert self.row_scales_N is not None
            return self.row_scales_N[:, None]
        n = len(self.W_NK)
        steps_N, offsets_N = (
            p[:, strip, None].repeat_interleave(self.spec.tile, dim=0)[:n] for p in (state.steps_TS, state.offsets_TS)
        )
        codes_C = torch.arange(self.spec.scale_tops[strip % 4] + 1, device=steps_N.device)
        return (steps_N * codes_C + offsets_N).to(torch.float16).float()

    def _fit_second_order(self, state: _State, strip: int, scales_N: torch.Tensor) -> None:
        """Step and offset of each tile, so that its rows' codes reach from their smallest scale to their largest."""
        tiles, top = self.spec.tiles(len(scales_N)), self.spec.scale_tops[strip % 4]
        filled = scales_N.new_empty(tiles * self.spec.tile).fill_(scales_N[-1])
        filled[: len(scales_N)] = scales_N
        low_T, high_T = filled.view(tiles, -1).aminmax(dim=1)
        if self.spec.metadata == "fine":
            state.steps_TS[:, strip] = ((high_T - low_T) / top).to(torch.float16)
            state.offsets_TS[:, strip] = _stored(low_T)
        else:  # an integer zero of as many bits as the codes: where the scales are too alike for it, a wider step
            step_T = _stored(torch.maximum((high_T - low_T) / top, high_T / (2 * top)))
            state.steps_TS[:, strip] = step_T
            state.offsets_TS[:, strip] = step_T * (low_T / step_T).round().clamp(1, top)

    def _new_strip(
        self, state: _State, strip: int, T_NR: torch.Tensor, U_RR: torch.Tensor, outlier_NR: torch.Tensor, ranges: str
    ) -> _Rounded:
        """Fit a strip's ranges, then round it. Writes the strip's codes and second-order scales into `state`."""
        if self._is_row_wise(strip):
            assert self.row_zeros_N is not None
            state.zeros_NS[:, strip] = self.row_zeros_N
        else:
            weights_R = U_RR.diagonal().square().reciprocal()  # what an error costs when later channels make up for it
            others_RN = T_NR.masked_fill(outlier_NR, 0.0).T.contiguous()
            scales_N, zeros_N, _ = fit_ranges(others_RN, weights_R[:, None], self.spec.widths[strip % 4], ranges)
            self._fit_second_order(state, strip, scales_N)
            state.codes_NS[:, strip] = (self._scales(state, strip) - scales_N[:, None]).abs().argmin(1).float()
            state.zeros_NS[:, strip] = zeros_N
        rounded = self._search(state, strip, T_NR, U_RR, outlier_NR, neighbours=ranges == "search")
        state.codes_NS[:, strip], state.zeros_NS[:, strip] = rounded.codes_N, rounded.zeros_N
        return rounded

    def _search(
        self,
        state: _State,
        strip: int,
        T_NR: torch.Tensor,
        U_RR: torch.Tensor,
        outlier_NR: torch.Tensor,
        neighbours: bool,
    ) -> _Rounded:
        """Round a strip with its codes of scale and zero as they are, and with their neighbours; the best per row."""
        width, table_NC = self.spec.widths[strip % 4], self._scales(state, strip)
        tried = [(0, 0)]
        if neighbours and not self._is_row_wise(strip):
            tried += [(-1, 0), (1, 0), (0, -1), (0, 1)]  # with the diagonal ones too the loss is 0.1 % less
        offsets_P2 = T_NR.new_tensor(tried)
        codes_PN = (state.codes_NS[:, strip] + offsets_P2[:, :1]).clamp_(0, table_NC.shape[1] - 1)
        zeros_PN = state.zeros_NS[:, strip] + offsets_P2[:, 1:]
        if not self._is_row_wise(strip):
            zeros_PN.clamp_(zero_base(width), zero_base(width) + 3)
        scales_PN = table_NC.T.gather(0, codes_PN.long())
        Q_RPN, error_RPN = _round(T_NR, U_RR, scales_PN, zeros_PN, (1 << width) - 1, outlier_NR)
        loss_PN = error_RPN.square().sum(0)
        best_1N = loss_PN.argmin(0, keepdim=True)
        codes_N, zeros_N, loss_N = (values.gather(0, best_1N)[0] for values in (codes_PN, zeros_PN, loss_PN))
        Q_NR = Q_RPN.gather(1, best_1N.expand(STRIP, 1, -1))[:, 0].T
        return _Rounded(Q_NR, loss_N, codes_N, zeros_N)


@dataclass(frozen=True)
class _Rounded:
    """One strip: dequantized, its part of the loss, and the codes of each row."""

    Q_NR: torch.Tensor
    loss_N: torch.Tensor
    codes_N: torch.Tensor
    zeros_N: torch.Tensor


def _round(
    T_NR: torch.Tensor,
    U_RR: torch.Tensor,
    scales_PN: torch.Tensor,
    zeros_PN: torch.Tensor,
    top: int,
    outlier_NR: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Round 16 channels in turn for P choices of scale and zero: dequantized values and errors over U_jj [R, P, N].

    U_RR: the inverse of R's part for this strip. T_NR: what it would be, could it be anything.
    """
    shape = STRIP, *scales_PN.shape
    Q_RPN, error_RPN = T_NR.new_empty(shape), T_NR.new_empty(shape)
    T_RN, outlier_RN = T_NR.T.contiguous(), outlier_NR.T if bool(outlier_NR.any()) else None
    low_PN, high_PN = -zeros_PN, top - zeros_PN
    for i in range(STRIP):
        # one product over what is rounded already reads half of what updating all that is not would write
        w_PN = T_RN[i] - (U_RR[:i, i] @ error_RPN[:i].flatten(1)).view(scales_PN.shape)
        q_PN = torch.div(w_PN, scales_PN, out=Q_RPN[i]).round_()
        torch.maximum(q_PN, low_PN, out=q_PN)
        torch.minimum(q_PN, high_PN, out=q_PN).mul_(scales_PN)
        if outlier_RN is not None:
            q_PN.copy_(torch.where(outlier_RN[i], w_PN.to(torch.float16).float(), q_PN))
        torch.sub(w_PN, q_PN, out=error_RPN[i]).div_(U_RR[i, i])
    return Q_RPN, error_RPN


def _inverses(R_SRR: torch.Tensor) -> torch.Tensor:
    """Of upper triangles."""
    eye_SRR = torch.eye(STRIP, device=R_SRR.device).expand_as(R_SRR)
    inverse_SRR: torch.Tensor = torch.linalg.solve_triangular(R_SRR, eye_SRR, upper=True)
    return inverse_SRR


def _stored(scales: torch.Tensor) -> torch.Tensor:
    """Positive numbers as 16 bits hold them."""
    return scales.to(torch.float16).float().clamp(min=SMALLEST_SCALE)


def _channels(strips_S: torch.Tensor) -> torch.Tensor:
    """All input channels of strips, strip after strip [K]."""
    return (strips_S[:, None] * STRIP + torch.arange(STRIP, device=strips_S.device)).flatten()
