"""Tensor parallelism of column-parallel then row-parallel matrices: three strategies, and what they send.

A row-parallel matrix W2 whose `g_idx` is irregular wants its input channels in another order than W1 made them.

| strategy   | offline                              | on every call                             | source              |
|------------|--------------------------------------|-------------------------------------------|---------------------|
| naive      | sort W2's rows, cut                  | AllGather, permute, chunk, W2, AllReduce  | 2402.04925 Alg. 2   |
| local-sort | cut W2's rows, sort inside each rank | permute locally, W2, all scales, AllReduce | vLLM<=0.29, SGLang  |
| tp-aware   | sort W2's rows and W1's columns, cut | W2, AllReduce                             | 2402.04925 Alg. 3   |

The AllReduce after W2 is the same in all three. Shape legend: M tokens, K input channels, P ranks.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from tempfile import TemporaryDirectory
from typing import Any, Generic, Literal, Protocol, Self, TypeVar, get_args

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from torch.utils._python_dispatch import TorchDispatchMode

from bitshard.errors import PlanError, RankError, SpecError
from bitshard.reorder import mlp_order

# torch 2.13 renames it and warns at the old name, which is all that torch 2.11 has
all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

Result = TypeVar("Result")
Strategy = Literal["naive", "local-sort", "tp-aware"]
STRATEGIES: tuple[Strategy, ...] = get_args(Strategy)


def parse_strategy(name: str) -> Strategy:
    if name not in STRATEGIES:
        raise SpecError("strategy", repr(name), ", ".join(STRATEGIES), "choose one of these")
    return name


def gather_permute_chunk(
    x_local: torch.Tensor, perm_K: torch.Tensor, group: dist.ProcessGroup | None = None
) -> torch.Tensor:
    """Algorithm 2, lines 2 to 4: [M, K/P] in W1's order -> this rank's [M, K/P] in W2's sorted order."""
    size = dist.get_world_size(group)
    gathered_PMK = x_local.new_empty(size, *x_local.shape)
    all_gather(gathered_PMK.view(-1, *x_local.shape[1:]), x_local.contiguous(), group=group)
    x = gathered_PMK.movedim(0, -2).flatten(-2)
    return x[..., perm_K].chunk(size, dim=-1)[dist.get_rank(group)]


class Matrix(Protocol):
    """What cutting asks of a [K, N] weight, such as QuantizedWeight. g_idx_K: the group of each input channel."""

    @property
    def g_idx_K(self) -> torch.Tensor: ...
    @property
    def group(self) -> int: ...
    def permute_rows(self, perm_K: torch.Tensor) -> Self: ...
    def permute_columns(self, perm_N: torch.Tensor) -> Self: ...
    def renumber_groups(self) -> Self: ...


MatrixT = TypeVar("MatrixT", bound=Matrix)


@dataclass(frozen=True)
class MlpShard(Generic[MatrixT]):
    """One rank's part of an MLP. gather_K: the order of all of the row matrix's input channels, for naive only."""

    columns: tuple[MatrixT, ...]
    row: MatrixT
    gather_K: torch.Tensor | None


def shard_mlp(
    columns: tuple[MatrixT, ...], row: MatrixT, strategy: Strategy, rank: int, size: int
) -> MlpShard[MatrixT]:
    """The offline half of a strategy for one MLP: column-parallel matrices (one, or gate and up), then a row-parallel.

    A rank's row matrix is left for its kernel to sort by its own `g_idx` (QuantLinear.order_rows): local-sort's sort is
    that one, and the others leave nothing to do. The row matrix has no bias: it is added once, after the AllReduce.
    Raises PlanError when the cut splits a group, except for local-sort, whose ranks hold all scales.
    """
    k = len(row.g_idx_K)
    unit = 1 if strategy == "local-sort" or row.group == k else row.group
    if k % (size * unit):
        raise PlanError(
            f"MLP row matrix, strategy {strategy}",
            f"{k} input channels on {size} ranks",
            f"a multiple of {unit} channels on each rank",
            "choose fewer ranks, or quantize with a smaller group_size",
        )
    mine = slice(rank * k // size, (rank + 1) * k // size)
    order, file_order = mlp_order(row.g_idx_K), torch.arange(k)
    row_local = row.permute_rows((file_order if strategy == "local-sort" else order)[mine])
    columns_order = (order if strategy == "tp-aware" else file_order)[mine]
    return MlpShard(
        columns=tuple(column.permute_columns(columns_order) for column in columns),
        row=row_local if strategy == "local-sort" else row_local.renumber_groups(),
        gather_K=order if strategy == "naive" else None,
    )


def row_parallel(
    x_local: torch.Tensor,
    linear: Callable[[torch.Tensor], torch.Tensor],
    gather_K: torch.Tensor | None = None,
    group: dist.ProcessGroup | None = None,
) -> torch.Tensor:
    """The half of a strategy that runs on every call: [M, K/P] on each rank -> [M, N], the sum over ranks, on each.

    On one rank there is nothing to gather or to sum: naive is left with its permutation, and no strategy communicates.
    """
    alone = dist.get_world_size(group) == 1
    if gather_K is not None:
        x_local = x_local[..., gather_K] if alone else gather_permute_chunk(x_local, gather_K, group)
    y = linear(x_local)
    if not alone:
        dist.all_reduce(y, group=group)
    return y


@dataclass
class Traffic:
    """Collectives by name, and the bytes of their results: what each rank ends up having received or reduced."""

    calls: dict[str, int] = field(default_factory=dict)
    bytes: dict[str, int] = field(default_factory=dict)

    @property
    def total_calls(self) -> int:
        return sum(self.calls.values())

    @property
    def total_bytes(self) -> int:
        return sum(self.bytes.values())


# dispatcher names of torch.distributed's collectives, plain and functional -> the name people use
COLLECTIVES = {
    "c10d.allreduce_": "AllReduce",
    "_c10d_functional.all_reduce": "AllReduce",
    "_c10d_functional.all_reduce_": "AllReduce",
    "c10d._allgather_base_": "AllGather",
    "c10d.allgather_": "AllGather",
    "_c10d_functional.all_gather_into_tensor": "AllGather",
    "c10d._reduce_scatter_base_": "ReduceScatter",
    "c10d.reduce_scatter_": "ReduceScatter",
    "_c10d_functional.reduce_scatter_tensor": "ReduceScatter",
    "c10d.broadcast_": "Broadcast",
    "_c10d_functional.broadcast": "Broadcast",
    "c10d.alltoall_base_": "AllToAll",
    "c10d.alltoall_": "AllToAll",
    "_c10d_functional.all_to_all_single": "AllToAll",
}


class count_collectives(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """`with count_collectives() as traffic:` fills a Traffic with every collective this rank takes part in."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.traffic = Traffic()

    def __enter__(self) -> Traffic:
        super().__enter__()  # type: ignore[no-untyped-call]
        return self.traffic

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        namespace = func.namespace
        if namespace in ("c10d", "_c10d_functional"):
            name = COLLECTIVES.get(f"{namespace}.{func._schema.name.partition('::')[2]}")
            if name:
                self.traffic.calls[name] = self.traffic.calls.get(name, 0) + 1
                self.traffic.bytes[name] = self.traffic.bytes.get(name, 0) + _result_bytes(out)
        return out


def _result_bytes(out: Any) -> int:
    if isinstance(out, torch.Tensor):
        return out.numel() * out.element_size()
    return sum(map(_result_bytes, out)) if isinstance(out, (list, tuple)) else 0


def launch(tp_size: int, function: Callable[..., Result], *args: Any) -> list[Result]:
    """Run `function(*args)` on `tp_size` ranks of this machine, as torchrun does, and return their results by rank.

    `function` is importable by name; torch.distributed is initialised by it or by what it calls. Raises RankError, with
    the rank's own error in it, when one fails, and KeyboardInterrupt when the job is stopped by a signal.
    """
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # it would print what is raised below
    try:
        with TemporaryDirectory(prefix="bitshard-ranks-") as logs:
            config = LaunchConfig(
                min_nodes=1,
                max_nodes=1,
                nproc_per_node=tp_size,
                logs_specs=DefaultLogsSpecs(log_dir=logs),
                run_id="bitshard",
                rdzv_backend="c10d",
                rdzv_endpoint="localhost:0",
                start_method="spawn",
                max_restarts=0,
            )
            results: dict[int, Result] = elastic_launch(config, function)(*args)
    except SignalException as error:
        raise KeyboardInterrupt from error
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        details: Any = failure.message
        message = details["message"] if isinstance(details, dict) else details
        raise RankError(
            f"rank {rank} of {tp_size}", message, "ranks that run to the end", "mend that, then run it again"
        ) from error
    return [results[rank] for rank in range(tp_size)]
