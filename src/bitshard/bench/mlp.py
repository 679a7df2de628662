"""`bench mlp`: the three tensor-parallel strategies on the paper's MLP, side by side in one run."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from bitshard.bench import report
from bitshard.bench.mlp_case import measure
from bitshard.bench.mlp_config import BACKENDS, SPEC, Case, MlpBench
from bitshard.bench.mlp_report import MlpReport, MlpRow
from bitshard.errors import BenchError, RankError, SpecError
from bitshard.parallel import launch
from bitshard.progress import Progress, silent

__all__ = ["MlpBench", "MlpReport", "bench_mlp"]


def bench_mlp(config: MlpBench, out: Path | None = None, progress: Progress = silent) -> MlpReport:
    """Check, then time, and write `out` (.json, and .png beside it) if given.

    Starts the ranks itself, or is called on every rank of a torchrun job of the one size in `config.ranks`; then all
    return the same and rank 0 writes. Raises SpecError when the machine has not what `config` asks for, BenchError when
    a strategy's output or traffic is wrong (that case is not timed then), RankError when a rank fails or cannot join.
    """
    in_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
    _require_machine(config, in_torchrun)
    if out is not None:
        report.require_json_path(out)
    header = report.header(config.device)
    rows: list[MlpRow] = []
    with _process_group(config.device) if in_torchrun else nullcontext():
        for size, case in progress(config.cells(), "measuring"):
            rows += measure(config, case) if in_torchrun else _launch(config, size, case)
    header["load_after"] = report.load()
    sizes = {model: config.sizes(model) for model in config.models}
    result = MlpReport(header, asdict(config) | {"sizes": sizes, "spec": asdict(SPEC)}, tuple(rows))
    if out is not None and (not in_torchrun or os.environ["RANK"] == "0"):
        result.write(out)
    return result


def _require_machine(config: MlpBench, in_torchrun: bool) -> None:
    if in_torchrun:
        world = int(os.environ["WORLD_SIZE"])
        if config.ranks != (world,):
            raise SpecError(
                "ranks", str(config.ranks), f"({world},), this torchrun job's size", "or start without torchrun"
            )
    elif config.device == "cuda" and torch.cuda.device_count() < max(config.ranks):
        found = f"{max(config.ranks)} ranks and {torch.cuda.device_count()} CUDA devices"
        raise SpecError("ranks", found, "one device for each rank", "choose fewer ranks, or device cpu")


@contextmanager
def _process_group(device: str) -> Iterator[None]:
    """Join the group that torchrun's environment variables describe."""
    backend, rank = BACKENDS[device], os.environ["RANK"]
    try:
        gpu = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if device == "cuda" else None
        if gpu is not None:
            torch.cuda.set_device(gpu)
        dist.init_process_group(backend, timeout=timedelta(minutes=5), device_id=gpu)
    except (RuntimeError, ValueError, OSError) as error:
        raise RankError(
            f"process group, rank {rank} of {os.environ['WORLD_SIZE']}",
            f"{backend} says: {error}",
            f"ranks that reach each other through {backend}",
            "check the network interface (GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME) and that no rank is missing",
        ) from error
    try:
        yield
    finally:
        dist.destroy_process_group()


def _launch(config: MlpBench, size: int, case: Case) -> list[MlpRow]:
    """Measure one case on `size` new processes. A red check, on which all ranks agree, comes back as a value."""
    result = launch(size, _rank, config, case)[0]
    if isinstance(result, BenchError):
        raise result
    return result


def _rank(config: MlpBench, case: Case) -> list[MlpRow] | BenchError:
    with _process_group(config.device):
        torch.set_num_threads(max(1, torch.get_num_threads() // dist.get_world_size()))  # ranks share the cores
        try:
            return measure(config, case)
        except BenchError as error:
            return error
