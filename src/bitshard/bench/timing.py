"""Times of calls that run on every rank together: interleaved, the slowest rank's, with their spread."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median, quantiles
from typing import TypeVar

import torch
import torch.distributed as dist

Call = Callable[[], object]
Name = TypeVar("Name", bound=str)


@dataclass(frozen=True)
class Times:
    """Milliseconds of one call: the median of many, and the 10th and 90th percentile."""

    median: float
    p10: float
    p90: float

    @classmethod
    def of(cls, milliseconds: Sequence[float]) -> Times:
        tenths = quantiles(milliseconds, n=10, method="inclusive")
        return cls(median(milliseconds), tenths[0], tenths[-1])


def interleaved(
    calls: Mapping[Name, Call], seconds: Callable[[Call], float], repetitions: int, warmup: int, device: torch.device
) -> dict[Name, Times]:
    """Time each call `repetitions` times: every round runs each of them once, in random order, the same on all ranks.

    So drift of the clock or the load, and what a call leaves behind for the next, hit all alike. Every timed call
    starts at a barrier, and a repetition's time is that of the slowest rank. Called by all ranks; all return the same.
    """
    names = list(calls)
    taken = torch.zeros(len(names), repetitions, dtype=torch.float64, device=device)
    orders = torch.Generator().manual_seed(0)
    for r in range(-warmup, repetitions):
        for s in torch.randperm(len(names), generator=orders).tolist():
            dist.barrier()
            duration = seconds(calls[names[s]])
            if r >= 0:
                taken[s, r] = duration
    dist.all_reduce(taken, op=dist.ReduceOp.MAX)
    quantiles = taken.new_tensor([0.5, 0.1, 0.9])
    milliseconds = (torch.quantile(taken, quantiles, dim=1) * 1e3).T.tolist()
    return {name: Times(*values) for name, values in zip(names, milliseconds, strict=True)}


def cpu_seconds(call: Call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def cuda_seconds(call: Call) -> float:
    """Time on the device's own clock between two events around the call, its waiting for Python included."""
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    call()
    stop.record()
    stop.synchronize()
    return float(start.elapsed_time(stop)) / 1e3


def capture(call: Call, warmup: int = 3) -> Call:
    """The call as a CUDA graph: one launch, no Python in between. Inputs and outputs stay where they are.

    Warm-up runs on a side stream, as capture demands: NCCL makes its communicators and the allocator its pools there.
    """
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(warmup):
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay
