"""Tensor parallelism of column-parallel then row-parallel matrices: three strategies, and what they send.

A row-parallel matrix whose `g_idx` is irregular wants its input channels in another order than its neighbours made them.

| strategy   | offline                                | on every call                                    | source |
|------------|----------------------------------------|--------------------------------------------------|--------|
| naive      | sort W2's rows, cut                    | AllGather, permute, chunk, W2, AllReduce         | 2402.04925 Algorithm 2 |
| local-sort | cut W2's rows, sort inside each rank   | permute locally, W2 with all scales, AllReduce   | vLLM <= 0.29, SGLang |
| tp-aware   | sort W2's rows and W1's columns, cut   | W2, AllReduce                                    | 2402.04925 Algorithm 3 |

The AllReduce after W2 is the same in all three. Shape legend: M tokens, K input channels, P ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, cast, get_args

import torch
import torch.distributed as dist
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from torch.utils._python_dispatch import TorchDispatchMode

from bitshard.errors import SpecError

# torch 2.13 renames it and warns at the old name, which is all that torch 2.11 has
all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

Result = TypeVar("Result")
Strategy = Literal["naive", "local-sort", "tp-aware"]
STRATEGIES: tuple[Strategy, ...] = get_args(Strategy)


def parse_strategy(name: str) -> Strategy:
    if name not in STRATEGIES:
        raise SpecError("strategy", repr(name), ", ".join(STRATEGIES), "choose one of these")
    return cast(Strategy, name)


def gather_permute_chunk(
    x_local: torch.Tensor, perm_K: torch.Tensor, group: dist.ProcessGroup | None = None
) -> torch.Tensor:
    """Algorithm 2, lines 2 to 4: [M, K/P] in W1's order -> this rank's [M, K/P] in W2's sorted order."""
    size = dist.get_world_size(group)
    gathered_PMK = x_local.new_empty(size, *x_local.shape)
    all_gather(gathered_PMK.view(-1, *x_local.shape[1:]), x_local.contiguous(), group=group)
    x = gathered_PMK.movedim(0, -2).flatten(-2)
    return x[..., perm_K].chunk(size, dim=-1)[dist.get_rank(group)]


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


class count_collectives(TorchDispatchMode):  # noqa: N801 - used as a context manager
    """`with count_collectives() as traffic:` fills a Traffic with every collective this rank takes part in."""

    def __enter__(self) -> Traffic:  # type: ignore[override]
        self.traffic = Traffic()
        super().__enter__()
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

    `function` is importable by name; torch.distributed is initialised by it or by what it calls. Raises RuntimeError's
    kin ChildFailedError when a rank fails.
    """
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=tp_size,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        start_method="spawn",
        max_restarts=0,
    )
    results: dict[int, Result] = elastic_launch(config, function)(*args)
    return [results[rank] for rank in range(tp_size)]
