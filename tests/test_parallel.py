"""The three strategies on real processes: every rank's output, and every collective with its bytes.

Shape legend: M tokens, K input, H hidden, N output channels, T ranks.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from bitshard.bench.mlp_case import DenseWeight, linear
from bitshard.errors import PlanError, SpecError
from bitshard.nn import QuantLinear
from bitshard.parallel import (
    STRATEGIES,
    Matrix,
    MlpShard,
    Strategy,
    count_collectives,
    gather_permute_chunk,
    launch,
    parse_strategy,
    row_parallel,
    shard_mlp,
)
from bitshard.quantized import QuantizedWeight
from bitshard.reorder import mlp_order
from bitshard.spec import QuantSpec

Weight = DenseWeight | QuantizedWeight


@dataclass(frozen=True)
class Mlp:
    """An act-order MLP: gate, up, down; or fc1, fc2 with biases. spec None: dense weights. x is [*tokens, K]."""

    spec: QuantSpec | None
    gated: bool
    sizes: tuple[int, int, int]  # K, H, N
    tokens: tuple[int, ...] = (3,)
    dtype: torch.dtype = torch.float32
    seed: int = 0

    def weight(self, k: int, n: int, g_idx_K: torch.Tensor, bias: bool) -> Weight:
        group = g_idx_K.bincount()[0].item()
        if self.spec is None:
            return DenseWeight((torch.randn(k, n) * k**-0.5).to(self.dtype), g_idx_K, group)
        g, top = k // group, self.spec.max_code + 1
        middle = torch.full((g, n), top // 2, dtype=torch.uint8)
        return QuantizedWeight(
            self.spec,
            codes_KN=torch.randint(top, (k, n), dtype=torch.uint8),
            scales_GN=((torch.rand(g, n) + 0.5) * k**-0.5 / top).to(self.dtype),
            zeros_GN=middle if self.spec.sym else torch.randint(top, (g, n), dtype=torch.uint8),
            g_idx_K=g_idx_K,
            bias_N=torch.randn(n).to(self.dtype) if bias else None,
        )

    def build(self) -> tuple[torch.Tensor, tuple[Weight, ...], Weight, torch.Tensor | None]:
        """x, column matrices, row matrix and its bias: the same on every rank."""
        torch.manual_seed(self.seed)
        k, h, n = self.sizes
        group = self.spec.group_size if self.spec else 16
        orders = [(torch.randperm(size) // group).to(torch.int32) for size in (k, h)]
        bias = self.spec is not None and not self.gated
        columns = tuple(self.weight(k, h, orders[0], bias) for _ in range(2 if self.gated else 1))
        row = self.weight(h, n, orders[1], False)
        return torch.randn(*self.tokens, k).to(self.dtype), columns, row, torch.randn(n) if bias else None

    def activate(self, hidden: list[torch.Tensor]) -> torch.Tensor:
        return F.silu(hidden[0]) * hidden[1] if self.gated else F.gelu(hidden[0])

    def unsharded(self, dtype: torch.dtype) -> torch.Tensor:
        """The output in plain torch, nothing permuted and nothing cut."""
        x, columns, row, bias = self.build()
        hidden = []
        for column in columns:
            y = x.to(dtype) @ column.dequantize(dtype)
            column_bias = getattr(column, "bias_N", None)
            hidden.append(y if column_bias is None else y + column_bias.to(dtype))
        y = self.activate(hidden) @ row.dequantize(dtype)
        return y if bias is None else y + bias.to(dtype)

    def run(self, shard: MlpShard[Weight], x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        hidden = self.activate([linear(column)(x) for column in shard.columns])
        y = row_parallel(hidden, linear(shard.row), shard.gather_K)
        return y if bias is None else y + bias.to(y.dtype)

    def relative_error(self, y: torch.Tensor) -> float:
        """Error against float64 (float32 for 16 bits), over that of torch in the same dtype; root mean squares."""
        wide = self.unsharded(torch.float64 if self.dtype == torch.float32 else torch.float32)
        errors = [(out.to(wide.dtype) - wide).square().mean().sqrt().item() for out in (y, self.unsharded(self.dtype))]
        return errors[0] / errors[1]


ASYM, SYM = QuantSpec(4, 16, sym=False, desc_act=True), QuantSpec(4, 16, desc_act=True)
MLPS = [
    Mlp(None, gated=True, sizes=(48, 384, 40)),
    Mlp(None, gated=False, sizes=(80, 128, 8), tokens=(2, 3), seed=1),
    Mlp(None, gated=True, sizes=(256, 1024, 256), tokens=(16,), dtype=torch.bfloat16),
    Mlp(SYM, gated=True, sizes=(48, 384, 40), tokens=(1,)),
    Mlp(ASYM, gated=True, sizes=(48, 384, 40), tokens=(2, 3)),
    Mlp(ASYM, gated=True, sizes=(48, 384, 40), seed=1),
    Mlp(ASYM, gated=False, sizes=(112, 128, 24), tokens=(5,)),
    Mlp(SYM, gated=False, sizes=(112, 640, 24), seed=2),
    Mlp(ASYM, gated=True, sizes=(256, 1024, 256), tokens=(16,), dtype=torch.bfloat16, seed=3),
    Mlp(replace(ASYM, bits=3, group_size=32), gated=False, sizes=(96, 256, 64)),
    Mlp(replace(ASYM, bits=2, group_size=32), gated=True, sizes=(96, 768, 64), seed=4),
]


@dataclass(frozen=True)
class Outcome:
    """What one rank saw. held: scales' rows of W2; left: what W2 still does at run time, "perm" and "g_idx"."""

    y: torch.Tensor
    calls: dict[str, int]
    bytes: dict[str, int]
    held: int
    left: set[str]


def on_rank(function: Callable[[], list[Outcome]]) -> list[Outcome]:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    try:
        return function()
    finally:
        dist.destroy_process_group()


def all_strategies() -> list[Outcome]:
    """MLPS x STRATEGIES, in this order."""
    outcomes = []
    for mlp in MLPS:
        x, columns, row, bias = mlp.build()
        for strategy in STRATEGIES:
            shard = shard_mlp(columns, row, strategy, dist.get_rank(), dist.get_world_size())
            with count_collectives() as traffic:
                y = mlp.run(shard, x, bias)
            module = linear(shard.row)
            left = {name for name in ("perm", "g_idx") if getattr(module, name, None) is not None}
            held = len(module.scales) if isinstance(module, QuantLinear) else 0
            outcomes.append(Outcome(y, traffic.calls, traffic.bytes, held, left))
    return outcomes


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_every_rank_equals_the_unsharded_mlp_and_sends_no_more_than_it_must(ranks: int) -> None:
    results = launch(ranks, on_rank, all_strategies)
    cases = [(mlp, strategy) for mlp in MLPS for strategy in STRATEGIES]
    for (mlp, strategy), *outcomes in zip(cases, *results, strict=True):
        assert mlp.relative_error(outcomes[0].y) <= 2, (mlp, strategy)
        for outcome in outcomes:
            assert torch.equal(outcome.y, outcomes[0].y), (mlp, strategy)
            assert outcome.bytes == expected_bytes(mlp, strategy, ranks), (mlp, strategy)
            assert outcome.calls == dict.fromkeys(outcome.bytes, 1), (mlp, strategy)
            check_what_is_left(mlp, strategy, ranks, outcome)


def expected_bytes(mlp: Mlp, strategy: Strategy, ranks: int) -> dict[str, int]:
    _, h, n = mlp.sizes
    values = torch.Size(mlp.tokens).numel() * mlp.dtype.itemsize
    if ranks == 1:
        return {}
    return {"AllReduce": values * n} | ({"AllGather": values * h} if strategy == "naive" else {})


def check_what_is_left(mlp: Mlp, strategy: Strategy, ranks: int, outcome: Outcome) -> None:
    """Sorted before the cut: nothing is left and scales are the rank's own. Cut before: a gather and all scales."""
    if strategy != "local-sort":
        assert outcome.left == set()
    elif ranks > 1:
        assert outcome.left == ({"perm", "g_idx"} if mlp.spec else {"perm"})
    if mlp.spec:
        groups = mlp.sizes[1] // mlp.spec.group_size
        assert outcome.held == (groups if strategy == "local-sort" else groups // ranks)


def broken() -> list[Outcome]:
    """tp-aware and naive, each with the order of two hidden channels swapped on purpose."""
    outcomes = []
    for mlp in (MLPS[0], MLPS[4]):
        x, columns, row, bias = mlp.build()
        for strategy in ("tp-aware", "naive"):
            shard = shard_mlp(columns, row, strategy, dist.get_rank(), dist.get_world_size())
            local = torch.arange(mlp.sizes[1] // dist.get_world_size())
            swapped = torch.cat([local[[1, 0]], local[2:]])
            if shard.gather_K is None:
                shard = replace(shard, columns=tuple(column.permute_columns(swapped) for column in shard.columns))
            else:
                shard.gather_K[[0, 1]] = shard.gather_K[[1, 0]]
            outcomes.append(Outcome(mlp.run(shard, x, bias), {}, {}, 0, set()))
    return outcomes


def test_two_channels_in_the_wrong_order_are_seen() -> None:
    for rank in launch(2, on_rank, broken):
        for i, outcome in enumerate(rank):
            assert (MLPS[0], MLPS[4])[i // 2].relative_error(outcome.y) > 1000


def gathered() -> list[Outcome]:
    x = torch.arange(24.0).view(2, 2, 6).chunk(2, dim=-1)[dist.get_rank()]
    perm = torch.tensor([5, 0, 1, 2, 4, 3])
    return [Outcome(gather_permute_chunk(x, perm), {}, {}, 0, set())]


def test_gather_permute_chunk_is_one_permutation_of_the_whole() -> None:
    results = launch(2, on_rank, gathered)
    whole = torch.arange(24.0).view(2, 2, 6)[..., [5, 0, 1, 2, 4, 3]]
    assert torch.equal(torch.cat([rank[0].y for rank in results], dim=-1), whole)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("ranks", range(1, 9))
def test_shards_put_together_are_the_mlp(ranks: int, strategy: Strategy, gated: bool) -> None:
    mlp = Mlp(ASYM, gated, (16, 16 * ranks * 3, 8), seed=ranks)
    x, columns, row, bias = mlp.build()
    shards = [shard_mlp(columns, row, strategy, rank, ranks) for rank in range(ranks)]
    hidden = [mlp.activate([linear(column)(x) for column in shard.columns]) for shard in shards]
    if strategy == "naive":
        hidden = list(torch.cat(hidden, dim=-1)[..., mlp_order(row.g_idx_K)].chunk(ranks, dim=-1))
    y = torch.stack([linear(shard.row)(part) for shard, part in zip(shards, hidden, strict=True)]).sum(0)
    torch.testing.assert_close(y if bias is None else y + bias, mlp.unsharded(torch.float32))


def matrices(hidden: int, group: int) -> tuple[Matrix, Matrix]:
    g_idx = torch.randperm(hidden) // group
    return DenseWeight(torch.ones(4, hidden), torch.zeros(4), 4), DenseWeight(torch.ones(hidden, 4), g_idx, group)


@pytest.mark.parametrize("strategy", ["naive", "tp-aware"])
def test_a_cut_inside_a_group_is_refused(strategy: Strategy) -> None:
    column, row = matrices(hidden=96, group=32)
    with pytest.raises(PlanError, match="found 96 input channels on 2 ranks; allowed: a multiple of 32 channels"):
        shard_mlp((column,), row, strategy, 0, 2)


def test_local_sort_cuts_anywhere_but_not_unevenly() -> None:
    column, row = matrices(hidden=96, group=32)
    assert len(shard_mlp((column,), row, "local-sort", 1, 2).row.g_idx_K) == 48
    with pytest.raises(PlanError, match="found 96 input channels on 5 ranks"):
        shard_mlp((column,), row, "local-sort", 0, 5)


def test_an_unknown_strategy_is_refused() -> None:
    with pytest.raises(SpecError, match="found 'fast'; allowed: naive, local-sort, tp-aware"):
        parse_strategy("fast")
