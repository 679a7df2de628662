"""Tuning: the codes and scale codes of all matrices of a block together, against the 16-bit block's outputs.

GPTQ makes each matrix repeat its own outputs; what counts is the block's. Behind every code stands a real number that
Adam moves and that is rounded before the block is run (straight-through, as in AutoRound, 2309.05516, and EfficientQAT,
2407.11062). A number whose best place is between two codes goes to and fro (2203.11086), and where it stands in the end
is chance; so a code becomes what it was on average in the second half of the steps. A step, a judgement and the result
alike come from weights that MixedWeight dequantizes: there are none that a file cannot hold. Zeros, second-order scales
and outliers stay as they are.

Shape legend: S segments of L tokens, H hidden channels; N output channels, K input channels of a matrix; of codes,
S strips of R = 16.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch.nn.functional import pad

from bitshard.mixed import MixedWeight, strip_widths
from bitshard.spec import STRIP

TAUGHT = 8  # segments that are learned from for each one that judges, which GPTQ has not seen either
CODE_RATE, SCALE_RATE = 0.001, 0.02  # codes moved in the first step; less in each, down to zero
NEAR = 0.49  # how far from its code a number starts at most


@dataclass(frozen=True)
class Tuned:
    """A block's matrices by name, and the error of its outputs on held-out segments: |Y' - Y|^2 / |Y|^2."""

    weights: Mapping[str, MixedWeight]
    before: float
    after: float


def judges(samples: int) -> int:
    """How many segments it takes beside those that are learned from."""
    return max(1, samples // TAUGHT)


@torch.enable_grad()
def tune(
    solved: Mapping[str, MixedWeight],
    originals: Mapping[str, torch.Tensor],
    parameters: Mapping[str, torch.Tensor],
    run: Callable[[torch.Tensor], torch.Tensor],
    inputs_SLH: torch.Tensor,
    targets_SLH: torch.Tensor,
    teachers: int,
    steps: int,
) -> Tuned:
    """Take `steps` steps of a segment each; where the segments after the first `teachers`, held out, gain nothing, what
    was solved is kept.

    solved, originals, parameters: by name, what GPTQ made of a matrix, its 16-bit weights [N, K], and the float32
    tensor [N, K] that `run` computes with, inputs [1, L, H] -> outputs [1, L, H]; it ends as what is kept.
    """
    numbers = {name: _Numbers(weight, originals[name]) for name, weight in solved.items()}
    generator = torch.Generator().manual_seed(0)

    def error(segment: int) -> torch.Tensor:
        outputs_1LH = run(inputs_SLH[segment, None])
        return (outputs_1LH - targets_SLH[segment].to(outputs_1LH.device)).square().sum()

    @torch.no_grad()
    def use(weights: Mapping[str, MixedWeight]) -> None:
        for name, weight in weights.items():
            parameters[name].copy_(weight.dequantize())

    @torch.no_grad()
    def judge() -> float:
        return sum(float(error(segment)) for segment in range(teachers, len(inputs_SLH)))

    use(solved)
    before = judge()
    groups = [
        {"params": [matrix.codes_NSR for matrix in numbers.values()], "lr": CODE_RATE},
        {"params": [matrix.scale_codes_NS for matrix in numbers.values()], "lr": SCALE_RATE},
    ]
    adam = torch.optim.Adam(groups, betas=(0.9, 0.95), eps=1e-20)  # no gradient is too small to count
    falling = torch.optim.lr_scheduler.LambdaLR(adam, lambda step: 1 - step / steps)
    order: list[int] = []
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    for step in range(steps):
        order = order or torch.randperm(teachers, generator=generator).tolist()
        torch.autograd.backward(error(order.pop()))
        for name, matrix in numbers.items():
            matrix.take_gradient(parameters[name].grad)
            parameters[name].grad = None
        adam.step()
        falling.step()
        use({name: matrix.rounded() for name, matrix in numbers.items()})
        if step >= steps // 2:
            for matrix in numbers.values():
                matrix.count()
    for parameter in parameters.values():
        parameter.requires_grad_(False)
    tuned = {name: matrix.average() for name, matrix in numbers.items()}
    use(tuned)
    after, total = judge(), float(targets_SLH[teachers:].square().sum())
    if not after < before:
        use(solved)
        tuned, after = dict(solved), before
    return Tuned(tuned, before / total if total else 0.0, after / total if total else 0.0)


class _Numbers:
    """The real numbers behind the codes of a matrix, as they are stored; each rounds to its code at first.

    A weight's number starts towards where the 16-bit weight lies, so that the least costly roundings change first.
    """

    def __init__(self, solved: MixedWeight, W_NK: torch.Tensor) -> None:
        self.solved, spec = solved, solved.spec
        n, strips = solved.scale_codes_NS.shape
        device = solved.codes_NK.device
        self.tops_S1 = (2 ** strip_widths(spec, strips) - 1)[:, None].to(device)
        self.scale_tops_S = torch.tensor(spec.scale_tops).repeat(strips // 4).to(device)
        codes_NSR = solved.codes_NK.view(n, strips, STRIP).float()
        W_NSR = self._stored(W_NK.to(device, torch.float32))
        exact_NSR = W_NSR / solved.scales()[..., None].float() + solved.zeros_NS[..., None]
        self.codes_NSR = codes_NSR + (exact_NSR - codes_NSR).clamp_(-NEAR, NEAR)
        self.scale_codes_NS = solved.scale_codes_NS.float()
        self.fixed_NSR = torch.zeros_like(codes_NSR, dtype=torch.bool)
        if solved.outliers is not None:
            self.fixed_NSR.view(n, -1)[solved.outliers.rows(), solved.outliers.columns.long()] = True
        self.counted = 0
        self.sums_NSR, self.sums_NS = torch.zeros_like(self.codes_NSR), torch.zeros_like(self.scale_codes_NS)

    def take_gradient(self, gradient_NK: torch.Tensor | None) -> None:
        """From that of the weights; None where no token reached the matrix.

        Scales, and steps between them, are left out as factors: Adam's steps do not depend on them.
        """
        if gradient_NK is None:
            self.codes_NSR.grad = self.scale_codes_NS.grad = None
            return
        gradient_NSR = self._stored(gradient_NK).masked_fill(self.fixed_NSR, 0.0)
        self.scale_codes_NS.grad = (gradient_NSR * (self._codes() - self.solved.zeros_NS[..., None])).sum(-1)
        self.codes_NSR.grad = gradient_NSR

    def rounded(self) -> MixedWeight:
        """What the numbers stand for; those beyond the codes there are come back to the last one."""
        torch.minimum(self.codes_NSR.clamp_(min=0), self.tops_S1, out=self.codes_NSR)
        torch.minimum(self.scale_codes_NS.clamp_(min=0), self.scale_tops_S, out=self.scale_codes_NS)
        return replace(
            self.solved,
            codes_NK=self._codes().to(torch.uint8).view_as(self.solved.codes_NK),
            scale_codes_NS=self.scale_codes_NS.round().to(torch.uint8),
        )

    def count(self) -> None:
        """Let the codes of this step count."""
        self.counted += 1
        self.sums_NSR += self._codes()
        self.sums_NS += self.scale_codes_NS.round()

    def average(self) -> MixedWeight:
        """The mean of what was counted; the numbers become it."""
        self.codes_NSR, self.scale_codes_NS = self.sums_NSR / self.counted, self.sums_NS / self.counted
        return self.rounded()

    def _codes(self) -> torch.Tensor:
        return self.codes_NSR.round()

    def _stored(self, values_NK: torch.Tensor) -> torch.Tensor:
        """Values in the model's order of channels, as a matrix is stored [N, S, R]."""
        n, k = self.solved.codes_NK.shape
        values_NSR = pad(values_NK, (0, k - self.solved.in_features)).view(n, -1, STRIP)
        order_S = self.solved.strip_order_S
        return values_NSR if order_S is None else values_NSR[:, order_S]
