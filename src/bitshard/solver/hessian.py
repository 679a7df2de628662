"""What inputs say about weights: H = 2/n * sum of x x^T (2210.17323 section 2), and its factors."""

from __future__ import annotations

import torch

from bitshard.errors import SolverError

DAMP_GROWTH = 10.0  # each retry damps this much more, up to the mean of the diagonal itself
LEAST_RETRY = 1e-4  # where the first try had no damping at all
CORRECTION_DAMP = 0.3  # 0.1 is as good on the text calibrated with; 0.01 is worse there, and far worse on other text
PANEL = 512  # channels of a Hessian that are worked on at once, and of a triangle that is inverted as a whole


class Hessian:
    """Running sum over activations, fp32 [K, K] on one device. Matrices with the same input share one.

    drift_of: what the 16-bit model has over these inputs, for weights to make up for, is told of the "inputs" or of the
    "outputs", which are fewer for o and down but serve one matrix.
    """

    def __init__(self, in_features: int, device: torch.device, drift_of: str = "inputs") -> None:
        self._sum_KK = torch.zeros(in_features, in_features, device=device)
        self._drift_of = drift_of
        self._cross_MK: torch.Tensor | None = None  # of drifts with the inputs
        self.count = 0  # activation rows seen

    def add(self, x: torch.Tensor, drift: torch.Tensor | None = None) -> None:
        """x [..., K], any float dtype; drift: the 16-bit model's inputs or outputs [..., M] less what they are here."""
        x_TK = x.reshape(-1, x.shape[-1]).to(self._sum_KK.dtype)
        for start in range(0, x_TK.shape[1], PANEL):  # the lower triangle follows from the upper
            own_TP = x_TK[:, start : start + PANEL]
            self._sum_KK[start : start + PANEL, start:].addmm_(own_TP.T, x_TK[:, start:], alpha=2)
        self.count += x_TK.shape[0]
        if drift is not None:
            if self._cross_MK is None:
                self._cross_MK = x_TK.new_zeros(drift.shape[-1], x_TK.shape[1])
            # in the inputs' own dtype: drifts are small, and their noise is more than bfloat16's
            drift_TM = drift.reshape(len(x_TK), -1).to(x.dtype)
            self._cross_MK.add_(drift_TM.T @ x.reshape(x_TK.shape), alpha=2)

    def corrected(self, W_NK: torch.Tensor, damp: float = CORRECTION_DAMP) -> torch.Tensor:
        """The matrix that makes of these inputs what W makes of the 16-bit model's, by damped least squares [N, K].

        W X = W' X' is the target of GPTAQ (2504.02692), reached here before rounding instead of inside it. K numbers
        fitted to T tokens explain K / T of what is mere chance, so that much less of the change is made: 2 % less error
        on other text. With nothing of the 16-bit model it is W itself.
        """
        if self._cross_MK is None:
            return W_NK
        W_NK, sum_KK = W_NK.to(self._sum_KK.dtype), self._symmetric()
        missing_NK = W_NK @ self._cross_MK if self._drift_of == "inputs" else self._cross_MK
        # a dead channel has no drift either, so any positive number keeps its weights as they are
        sum_KK.diagonal().add_(damp * sum_KK.diagonal().mean())
        L_KK, failed = torch.linalg.cholesky_ex(sum_KK)
        if int(failed):  # the solve will say so, with more damping and the matrix's name
            return W_NK
        # from the right side, a third faster on a CPU than cholesky_solve of the transpose
        half_NK = torch.linalg.solve_triangular(L_KK.T, missing_NK, upper=True, left=False)
        change_NK: torch.Tensor = torch.linalg.solve_triangular(L_KK, half_NK, upper=False, left=False)
        return W_NK + max(0.0, 1 - len(L_KK) / self.count) * change_NK

    def matrix(self) -> torch.Tensor:
        """H_KK; the identity when nothing was seen (an expert no token reached), so that the solve rounds plainly."""
        if self.count == 0:
            return torch.eye(self._sum_KK.shape[0], device=self._sum_KK.device)
        return self._symmetric().div_(self.count)

    def _symmetric(self) -> torch.Tensor:
        """A copy of the sum with both triangles."""
        sum_KK = self._sum_KK.triu()
        for start in range(0, len(sum_KK), PANEL):
            own = slice(start, start + PANEL)
            sum_KK[own, own] += sum_KK[own, own].triu(1).T
            sum_KK[start + PANEL :, own] = sum_KK[own, start + PANEL :].T
        return sum_KK


def squared_outputs(W_NK: torch.Tensor, H_KK: torch.Tensor) -> float:
    """tr(W H W^T), what a matrix makes of the inputs, squared and summed; H is symmetric and read on one side."""
    total = 0.0
    for start in range(0, len(H_KK), PANEL):
        own, right = slice(start, start + PANEL), slice(start + PANEL, None)
        to_right_NK = W_NK[:, own] @ H_KK[own, right]
        total += float(((W_NK[:, own] @ H_KK[own, own]) * W_NK[:, own]).sum())
        total += 2 * float((to_right_NK * W_NK[:, right]).sum())
    return total


def factor(H_KK: torch.Tensor, order_K: torch.Tensor, name: str, damp: float) -> tuple[torch.Tensor, float]:
    """(R_KK upper triangular with H = R R^T, H's channels taken in this order; the damping used).

    `damp` times the mean of the diagonal is added to it; when the factorization fails, ten times more, up to once the
    mean. Raises SolverError with the matrix's name when that fails too: a silent rounding would hide a broken model.
    """
    tried = damp
    while True:  # three matrices at most in memory, H among them: 321 MB each for K = 8,960
        ordered_KK = H_KK[order_K][:, order_K]
        mean, damped_KK = ordered_KK.diagonal().mean(), ordered_KK.flip(0, 1)
        del ordered_KK
        damped_KK.diagonal().add_(tried * mean)
        L_KK, failed = torch.linalg.cholesky_ex(damped_KK)
        del damped_KK
        if not int(failed):
            return L_KK.flip(0, 1), tried  # the Cholesky factor of H read backwards
        if tried >= 1:
            raise SolverError(
                name,
                f"a Hessian that is not positive definite, even with damping {tried:g}",
                f"a Hessian that factors with damping of {damp:g} to 1 times its mean diagonal",
                "calibrate with more or other text, and check the layer's weights and activations",
            )
        tried = min(max(tried * DAMP_GROWTH, LEAST_RETRY), 1.0)


def inverse_factor(H_KK: torch.Tensor, order_K: torch.Tensor, name: str, damp: float) -> tuple[torch.Tensor, float]:
    """(U_KK upper triangular with H^-1 = U^T U in this order, damping used), 2210.17323 section 3.3: U = R^-1."""
    R_KK, used = factor(H_KK, order_K, name, damp)
    return _inverse_of_upper(R_KK), used


def _inverse_of_upper(R_KK: torch.Tensor) -> torch.Tensor:
    """By halves: [[A, B], [0, D]]^-1 = [[A^-1, -A^-1 B D^-1], [0, D^-1]], half of what solving for I takes."""
    k, inverse_KK = len(R_KK), torch.zeros_like(R_KK)
    if k <= PANEL:
        inverse_KK.fill_diagonal_(1)
        torch.linalg.solve_triangular(R_KK, inverse_KK, upper=True, out=inverse_KK)
        return inverse_KK
    half = k // 2
    A, D = _inverse_of_upper(R_KK[:half, :half]), _inverse_of_upper(R_KK[half:, half:])
    inverse_KK[:half, :half], inverse_KK[half:, half:] = A, D
    inverse_KK[:half, half:] = -(A @ R_KK[:half, half:] @ D)
    return inverse_KK
