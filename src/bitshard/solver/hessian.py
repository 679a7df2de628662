"""What inputs say about weights: H = 2/n * sum of x x^T (2210.17323 section 2), and the factor of its inverse."""

from __future__ import annotations

import torch

from bitshard.errors import SolverError

DAMP_GROWTH = 10.0  # each retry damps this much more, up to the mean of the diagonal itself
LEAST_RETRY = 1e-4  # where the first try had no damping at all


class Hessian:
    """Running sum over activations, fp32 [K, K] on one device. Matrices with the same input share one.

    drift: also sum what the 16-bit model's inputs have over these, so that weights can make up for it.
    """

    def __init__(self, in_features: int, device: torch.device, drift: bool = False) -> None:
        self._sum_KK = torch.zeros(in_features, in_features, device=device)
        self._drift_KK = torch.zeros_like(self._sum_KK) if drift else None
        self.count = 0  # activation rows seen

    def add(self, x: torch.Tensor, exact: torch.Tensor | None = None) -> None:
        """x [..., K], any float dtype; exact: the same inputs in the 16-bit model."""
        x_TK = x.reshape(-1, x.shape[-1]).to(self._sum_KK.dtype)
        self._sum_KK.addmm_(x_TK.T, x_TK, alpha=2)
        self.count += x_TK.shape[0]
        if self._drift_KK is not None and exact is not None:
            self._drift_KK.addmm_((exact.reshape(x_TK.shape) - x_TK).T, x_TK, alpha=2)

    def corrected(self, W_NK: torch.Tensor, damp: float) -> torch.Tensor:
        """The matrix that makes of these inputs what W makes of the 16-bit model's, by damped least squares [N, K].

        W X = W' X' is the target of GPTAQ (2504.02692), reached here before rounding instead of inside it. K numbers
        fitted to T tokens explain K / T of what is mere chance, so that much less of the change is made: 2 % less error
        on other text. Without `drift` it is W itself.
        """
        if self._drift_KK is None or self.count == 0:
            return W_NK
        damped_KK = self._sum_KK.clone()
        # a dead channel has no drift either, so any positive number keeps its weights as they are
        damped_KK.diagonal().add_(damp * damped_KK.diagonal().mean())
        L_KK, failed = torch.linalg.cholesky_ex(damped_KK)
        if int(failed):  # the solve will say so, with more damping and the matrix's name
            return W_NK
        W_NK = W_NK.to(damped_KK.dtype)
        share = max(0.0, 1 - len(L_KK) / self.count)
        return W_NK + share * torch.cholesky_solve((W_NK @ self._drift_KK).T, L_KK).T

    def matrix(self) -> torch.Tensor:
        """H_KK; the identity when nothing was seen (an expert no token reached), so that the solve rounds plainly."""
        if self.count == 0:
            return torch.eye(self._sum_KK.shape[0], device=self._sum_KK.device)
        return self._sum_KK / self.count


def inverse_factor(H_KK: torch.Tensor, name: str, damp: float) -> tuple[torch.Tensor, float]:
    """(U_KK upper triangular with H^-1 = U^T U, the damping used), the Cholesky form of 2210.17323 section 3.3.

    `damp` times the mean of the diagonal is added to it; when the factorization fails, ten times more, up to once the
    mean. Raises SolverError with the matrix's name when that fails too: a silent rounding would hide a broken model.
    """
    mean = H_KK.diagonal().mean()
    tried = damp
    while True:
        damped = H_KK.clone()
        damped.diagonal().add_(tried * mean)
        # H = R R^T with R upper triangular is the Cholesky of H read backwards; then H^-1 = R^-T R^-1, so U = R^-1.
        L_KK, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
        if not int(failed):
            eye = torch.eye(len(H_KK), dtype=H_KK.dtype, device=H_KK.device)
            return torch.linalg.solve_triangular(L_KK.flip(0, 1), eye, upper=True), tried
        if tried >= 1:
            raise SolverError(
                name,
                f"a Hessian that is not positive definite, even with damping {tried:g}",
                f"a Hessian that factors with damping of {damp:g} to 1 times its mean diagonal",
                "calibrate with more or other text, and check the layer's weights and activations",
            )
        tried = min(max(tried * DAMP_GROWTH, LEAST_RETRY), 1.0)
