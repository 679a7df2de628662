"""One case of `bench mlp` on one rank of a process group: random weights, three strategies, the check, the times.

The MLP is two matrices, no gate and no activation function, as in 2402.04925. Both are act-order: W1's rows ask for
the gather P1 of the input, in all strategies alike; W2's rows ask for P2, in which the strategies differ. Dense weights
stand for quantized ones as in the paper: there are no scales, so local-sort is only a slice and a local gather. One
rank is the control: nothing communicates, and only tp-aware is spared the gather P2.

Shape legend: M tokens, K1 inputs, N1 hidden (= K2), N2 outputs, T ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.distributed as dist
from torch import nn

from bitshard.bench.mlp_config import DTYPES, SPEC, Case, MlpBench
from bitshard.bench.mlp_report import Checked, MlpRow
from bitshard.bench.timing import Call, capture, cpu_seconds, cuda_seconds, interleaved
from bitshard.errors import BenchError
from bitshard.layout import GptqLayout
from bitshard.nn import QuantLinear
from bitshard.parallel import STRATEGIES, Strategy, count_collectives, row_parallel, shard_mlp
from bitshard.quantized import QuantizedWeight
from bitshard.reorder import is_identity, mlp_order

LAYOUT = GptqLayout(zeros_version=2)


@dataclass(frozen=True)
class DenseWeight:
    """A float matrix that is cut and ordered like a quantized one. weight_KN float; g_idx_K int32, on the CPU."""

    weight_KN: torch.Tensor
    g_idx_K: torch.Tensor
    group: int

    def permute_rows(self, perm_K: torch.Tensor) -> DenseWeight:
        return replace(self, weight_KN=self.weight_KN[perm_K], g_idx_K=self.g_idx_K[perm_K])

    def permute_columns(self, perm_N: torch.Tensor) -> DenseWeight:
        return replace(self, weight_KN=self.weight_KN[:, perm_N].contiguous())

    def renumber_groups(self) -> DenseWeight:
        return self

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        return self.weight_KN.to(dtype)


class DenseLinear(nn.Module):
    """x[..., perm] @ weight, the rows sorted by group: what QuantLinear does to packed weights."""

    def __init__(self, weight: DenseWeight) -> None:
        super().__init__()
        order = mlp_order(weight.g_idx_K)
        self.perm = None if is_identity(order) else order.to(weight.weight_KN.device)
        self.weight_KN = nn.Parameter(weight.weight_KN[order], requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x if self.perm is None else x[..., self.perm]) @ self.weight_KN


def quant_linear(weight: QuantizedWeight) -> QuantLinear:
    """The module that runs this weight, or one rank's part of it."""
    linear = QuantLinear(
        weight.in_features, weight.out_features, weight.spec, LAYOUT, weight.bias_N is not None, weight.scales_GN.dtype
    )
    for name, tensor in LAYOUT.pack(weight).items():
        setattr(linear, name, nn.Parameter(tensor, requires_grad=False))
    linear.to(weight.scales_GN.device).order_rows()
    return linear


class RankMlp(nn.Module):
    """One rank's part of the MLP under one strategy: x [M, K1] -> [M, N2], the same on every rank."""

    def __init__(self, column: nn.Module, row: nn.Module, gather_K: torch.Tensor | None) -> None:
        super().__init__()
        self.column, self.row, self.gather_K = column, row, gather_K

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return row_parallel(self.column(x), self.row, self.gather_K)

    def weight_bytes(self) -> int:
        return sum(parameter.numel() * parameter.element_size() for parameter in self.parameters())


@dataclass(frozen=True)
class Reference:
    """The input x [M, K1] for the largest M, the unsharded output in a wider dtype, and torch's own error for each M.

    The wider dtype is float32 for 16-bit cases and float64 for float32. torch_error: root mean square, unsharded and
    unpermuted, in the case's dtype. hidden: N1.
    """

    x: torch.Tensor
    wide: torch.Tensor
    torch_error: Mapping[int, float]
    hidden: int


def random_weight(
    weights: str, k: int, n: int, dtype: torch.dtype, generator: torch.Generator
) -> DenseWeight | QuantizedWeight:
    """A [K, N] matrix, act-order with a random order of its channels as in the paper.

    Its entries have a variance of about 1/K, so that activations keep their size.
    """
    device = generator.device
    g_idx = (torch.randperm(k, generator=generator, device=device) // SPEC.group_size).to("cpu", torch.int32)
    if weights == "dense":
        matrix = torch.randn(k, n, generator=generator, device=device) * k**-0.5
        return DenseWeight(matrix.to(dtype), g_idx, SPEC.group_size)
    groups, middle = k // SPEC.group_size, 1 << (SPEC.bits - 1)
    scales = (torch.rand(groups, n, generator=generator, device=device) + 0.5) * k**-0.5 / (middle / 3**0.5)
    return QuantizedWeight(
        SPEC,
        codes_KN=torch.randint(SPEC.max_code + 1, (k, n), generator=generator, device=device, dtype=torch.uint8),
        scales_GN=scales.to(dtype),
        zeros_GN=torch.full((groups, n), middle, dtype=torch.uint8, device=device),
        g_idx_K=g_idx,
    )


def build(config: MlpBench, case: Case, device: torch.device) -> tuple[dict[Strategy, RankMlp], Reference]:
    """This rank's part of the MLP under each strategy, and what all must equal. Every rank makes the same weights."""
    dtype = DTYPES[case.dtype]
    k1, n1, n2 = config.sizes(case.model)
    generator = torch.Generator(device).manual_seed(config.seed)
    w1, w2 = (random_weight(case.weights, k, n, dtype, generator) for k, n in ((k1, n1), (n1, n2)))
    x = torch.randn(max(config.tokens), k1, generator=generator, device=device).to(dtype)
    reference = _reference(x, w1, w2, config.tokens)
    mlps = {}
    for strategy in STRATEGIES:
        shard = shard_mlp((w1,), w2, strategy, dist.get_rank(), dist.get_world_size())
        gather = None if shard.gather_K is None else shard.gather_K.to(device)
        mlps[strategy] = RankMlp(linear(shard.columns[0]), linear(shard.row), gather)
    return mlps, reference


def linear(weight: DenseWeight | QuantizedWeight) -> nn.Module:
    return DenseLinear(weight) if isinstance(weight, DenseWeight) else quant_linear(weight)


def _reference(
    x: torch.Tensor,
    w1: DenseWeight | QuantizedWeight,
    w2: DenseWeight | QuantizedWeight,
    tokens: tuple[int, ...],
) -> Reference:
    wide = torch.float64 if x.dtype == torch.float32 else torch.float32
    y = x.to(wide) @ w1.dequantize(wide) @ w2.dequantize(wide)
    plain = [w1.dequantize(x.dtype), w2.dequantize(x.dtype)]
    errors = {m: _rms(x[:m] @ plain[0] @ plain[1], y[:m]) for m in tokens}
    return Reference(x, y, errors, plain[0].shape[1])


def _rms(y: torch.Tensor, wide: torch.Tensor) -> float:
    return float((y.to(wide.dtype) - wide).square().mean().sqrt())


def check(where: str, mlps: Mapping[Strategy, RankMlp], reference: Reference, tokens: int) -> dict[Strategy, Checked]:
    """What each strategy's output and traffic were found to be. All ranks agree on it.

    Raises BenchError unless every strategy makes exactly its collectives, of its bytes, and its error against the wide
    unsharded reference is at most twice that of torch unsharded in the same dtype.
    """
    x, checked = reference.x[:tokens], {}
    for strategy, mlp in mlps.items():
        with count_collectives() as traffic:
            y = mlp(x)
        expected = _expected_bytes(strategy, y, reference.hidden)
        if traffic.bytes != expected or traffic.calls != dict.fromkeys(expected, 1):
            raise BenchError(
                f"{where}, {strategy}",
                f"collectives {traffic.calls} of {traffic.bytes} bytes",
                f"one each, of {expected} bytes",
                "this is a bug in bitshard.parallel or in the counting; nothing was timed",
            )
        ratio = x.new_tensor(_rms(y, reference.wide[:tokens]) / reference.torch_error[tokens], dtype=torch.float64)
        dist.all_reduce(ratio, op=dist.ReduceOp.MAX)
        if not ratio <= 2:
            raise BenchError(
                f"{where}, {strategy}",
                f"{float(ratio):.3g} times the error of torch unsharded in the same dtype",
                "at most 2 times",
                "this is a wrong result, so nothing was timed; run the tests of bitshard.parallel",
            )
        checked[strategy] = Checked(float(ratio), traffic.calls, traffic.total_bytes, mlp.weight_bytes())
    return checked


def _expected_bytes(strategy: Strategy, y: torch.Tensor, hidden: int) -> dict[str, int]:
    """One AllReduce of y [M, N2]; for naive one AllGather of [M, N1] before it; nothing on one rank."""
    if dist.get_world_size() == 1:
        return {}
    gathered = {"AllGather": len(y) * hidden * y.element_size()} if strategy == "naive" else {}
    return gathered | {"AllReduce": y.numel() * y.element_size()}


@torch.inference_mode()
def measure(config: MlpBench, case: Case) -> list[MlpRow]:
    """Rows of one case, on every rank of the process group: all numbers of tokens are checked before any is timed."""
    size, cuda = dist.get_world_size(), config.device == "cuda"
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    mlps, reference = build(config, case, device)
    checks = {m: check(f"{case}, {size} ranks, {m} tokens", mlps, reference, m) for m in config.tokens}
    rows = []
    for tokens in config.tokens:
        x = reference.x[:tokens]
        calls: dict[str, dict[Strategy, Call]] = {"eager": {s: partial(mlp, x) for s, mlp in mlps.items()}}
        if cuda:
            calls["graph"] = {s: capture(call) for s, call in calls["eager"].items()}
        for mode, by_strategy in calls.items():
            seconds = cuda_seconds if cuda else cpu_seconds
            times = interleaved(by_strategy, seconds, config.repetitions, config.warmup, device)
            rows += [MlpRow(case, size, tokens, mode, s, times[s], checks[tokens][s]) for s in mlps]
    return rows
