"""`bench mlp` end to end at toy size: what it writes, what it refuses, and that a red check is never timed."""

import json
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from bitshard.bench import mlp, mlp_case, report, timing
from bitshard.bench.mlp import MlpBench, bench_mlp
from bitshard.bench.mlp_config import Case
from bitshard.bench.mlp_report import MlpRow
from bitshard.errors import BenchError, BitshardError, CheckpointError, RankError, SpecError
from bitshard.parallel import STRATEGIES, MlpShard, shard_mlp

TINY = MlpBench(models=("granite-20b",), dtypes=("fp32",), ranks=(2,), tokens=(1, 3), scale=48, repetitions=3, warmup=1)
TINY_HIDDEN, TINY_OUT = 512, 128
ORDINARY_RANK = mlp._rank


def test_end_to_end_on_two_ranks(tmp_path: Path) -> None:
    seen: list[Any] = []
    report = bench_mlp(TINY, tmp_path / "new" / "mlp.json", lambda items, label: seen.extend(items) or items)
    assert seen == [(2, Case("granite-20b", "dense", "fp32")), (2, Case("granite-20b", "gptq", "fp32"))]
    assert [row.strategy for row in report.rows] == list(STRATEGIES) * 4  # 2 kinds of weights x 2 numbers of tokens

    data = json.loads((tmp_path / "new" / "mlp.json").read_text())
    assert (tmp_path / "new" / "mlp.png").read_bytes().startswith(b"\x89PNG")
    assert data == json.loads(json.dumps(report.to_dict()))
    assert {"date", "commit", "torch", "cpu", "cores", "load", "load_after"} <= set(data["header"])
    assert data["config"]["sizes"] == {"granite-20b": [128, TINY_HIDDEN, TINY_OUT]}
    for row in data["rows"]:
        values = row["tokens"] * 4
        gathered = values * TINY_HIDDEN if row["strategy"] == "naive" else 0
        assert row["checked"]["collective_bytes"] == values * TINY_OUT + gathered
        assert row["checked"]["error"] <= 2
        assert 0 < row["times"]["p10"] <= row["times"]["median"] <= row["times"]["p90"]


def test_a_commit_is_dirty_by_what_is_not_a_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "REPOSITORY", tmp_path)

    def git(*args: str) -> str:
        who = ["-c", "user.name=n", "-c", "user.email=e"]
        return subprocess.run(
            ["git", "-C", str(tmp_path), *who, *args], check=True, capture_output=True, text=True
        ).stdout

    assert report._commit() is None
    git("init")
    assert report._commit() is None, "no commit yet"
    source, result = tmp_path / "source.py", tmp_path / "benchmarks" / "results" / "row.json"
    result.parent.mkdir(parents=True)
    for path in (source, result):
        path.write_text("1")
    git("add", ".")
    git("commit", "-m", "one")
    commit = git("rev-parse", "--short", "HEAD").strip()
    assert report._commit() == commit
    result.write_text("2")
    assert report._commit() == commit
    source.write_text("2")
    assert report._commit() == f"{commit}-dirty"


def test_only_numbers_that_were_read_are_the_papers(tmp_path: Path) -> None:
    with one_rank_of_torchrun(tmp_path):
        report = bench_mlp(replace(TINY, ranks=(1,), weights=("dense",), models=("llama-70b",), scale=32, tokens=(1,)))
    paper = report.to_dict()["paper"]
    assert "2402.04925" in paper["source"]
    assert [(row["gpu"], row["ranks"], row["tokens"]) for row in paper["rows"]] == [
        ("A100", 1, 1),
        ("H100", 1, 1),
        ("A100", 4, 8),
        ("A100", 8, 4),
    ]
    assert [mean["naive_over_tp_aware"] for mean in paper["means_over_tokens"]] == [1.22, 1.78, 1.81]
    text = StringIO()
    Console(width=250, file=text).print(report.render())
    shown = text.getvalue()
    assert "llama-70b paper A100 full" in shown and "1.82x" in shown and "naive/aware" in shown


@contextmanager
def one_rank_of_torchrun(tmp_path: Path) -> Iterator[pytest.MonkeyPatch]:
    """This process as the only rank of a torchrun job, so that it can be tampered with."""
    with socket.socket() as free, pytest.MonkeyPatch.context() as patch:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
        variables = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
        for name, value in variables.items():
            patch.setenv(name, str(value))
        patch.setenv("TORCHELASTIC_RUN_ID", "test")
        free.close()
        yield patch


def shard_in_wrong_order(*args: Any) -> MlpShard[Any]:
    shard = shard_mlp(*args)
    return replace(shard, columns=tuple(column.permute_columns(torch.arange(512).roll(1)) for column in shard.columns))


def never_timed(*args: Any) -> None:
    raise AssertionError("a red check was timed")


def test_a_wrong_result_is_not_timed(tmp_path: Path) -> None:
    out = tmp_path / "mlp.json"
    with one_rank_of_torchrun(tmp_path) as patch:
        patch.setattr(mlp_case, "shard_mlp", shard_in_wrong_order)
        patch.setattr(mlp_case, "interleaved", never_timed)
        with pytest.raises(BenchError, match="times the error of torch unsharded .* allowed: at most 2 times"):
            bench_mlp(replace(TINY, ranks=(1,)), out)
    assert not out.exists()


def test_a_collective_too_many_is_not_timed(tmp_path: Path) -> None:
    with one_rank_of_torchrun(tmp_path) as patch:
        patch.setattr(mlp_case, "_expected_bytes", lambda *_: {"AllReduce": 512})
        patch.setattr(mlp_case, "interleaved", never_timed)
        with pytest.raises(BenchError, match=r"naive: found collectives \{\} of \{\} bytes; allowed: one each"):
            bench_mlp(replace(TINY, ranks=(1,)))


def red_rank(config: MlpBench, case: Case) -> list[MlpRow] | BenchError:
    mlp_case._expected_bytes = lambda *_: {}
    mlp_case.interleaved = never_timed
    return ORDINARY_RANK(config, case)


def failing_rank(config: MlpBench, case: Case) -> list[MlpRow] | BenchError:
    raise MemoryError("no room for the matrices")


@pytest.mark.parametrize(
    "rank, message",
    [
        (red_rank, "granite-20b dense fp32, 2 ranks, 1 tokens, naive: found collectives"),
        (failing_rank, "rank . of 2: found MemoryError: no room for the matrices"),
    ],
)
def test_an_error_on_the_ranks_is_one_sentence(
    rank: Callable[..., Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mlp, "_rank", rank)
    with pytest.raises(BitshardError, match=message):
        bench_mlp(TINY)


def test_no_process_group_is_one_sentence(tmp_path: Path) -> None:
    with one_rank_of_torchrun(tmp_path) as patch, socket.socket() as taken:
        taken.bind(("localhost", 0))
        taken.listen()
        patch.setenv("MASTER_PORT", str(taken.getsockname()[1]))
        with pytest.raises(
            RankError, match="process group, rank 0 of 1: found gloo says: .*; to do: check the network"
        ):
            bench_mlp(replace(TINY, ranks=(1,)))


def test_inside_torchrun_only_its_own_size(tmp_path: Path) -> None:
    with one_rank_of_torchrun(tmp_path), pytest.raises(SpecError, match=r"ranks: found \(2,\); allowed: \(1,\)"):
        bench_mlp(TINY)


def test_more_ranks_than_cuda_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(SpecError, match="found 2 ranks and 1 CUDA devices; allowed: one device for each rank"):
        bench_mlp(replace(TINY, device="cuda"))


def test_an_output_that_cannot_be_written_is_refused_before_measuring(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"found suffix '.txt'; allowed: .json"):
        bench_mlp(TINY, tmp_path / "mlp.txt")
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="a folder that can be written"):
        bench_mlp(TINY, tmp_path / "file" / "mlp.json")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"models": ("llama-7b",)}, "models: found llama-7b; allowed: llama-70b, granite-20b"),
        ({"weights": ()}, "weights: found none; allowed: dense, gptq"),
        ({"dtypes": ("int4",)}, "dtypes: found int4; allowed: fp16, bf16, fp32"),
        ({"device": "tpu"}, "device: found tpu; allowed: cpu, cuda"),
        ({"ranks": (0, 1)}, r"ranks: found \(0, 1\); allowed: one or more numbers from 1 up"),
        ({"tokens": ()}, r"tokens: found \(\); allowed: one or more numbers from 1 up"),
        ({"repetitions": 0}, "repetitions: found 0; allowed: a number from 1 up"),
        ({"scale": 7}, "scale: found 7, which makes llama-70b's K1 1170"),
        ({"scale": 8}, "N1 3584, on 8 ranks; allowed: .* N1 a multiple of 128 on every rank"),
        ({"scale": 128, "ranks": (1,)}, "allowed: a divisor that leaves K1 a multiple of 128"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        MlpBench(**options)


def test_cuda_calls_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """The two functions that need a GPU, on a stand-in that writes down what is asked of it."""
    log: list[str] = []

    class Stream:
        def wait_stream(self, other: object) -> None:
            log.append("wait")

    class Event:
        def __init__(self, enable_timing: bool) -> None: ...
        def record(self) -> None:
            log.append("record")

        def synchronize(self) -> None:
            log.append("synchronize")

        def elapsed_time(self, stop: object) -> float:
            return 5.0

    class Graph:
        def replay(self) -> None:
            log.append("replay")

    @contextmanager
    def inside(name: str) -> Iterator[None]:
        log.append(name)
        yield
        log.append(f"end {name}")

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: log.append("synchronize"))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: inside("side stream"))
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: inside("graph"))

    replay = timing.capture(lambda: log.append("call"), warmup=2)
    assert log == ["wait", "side stream", "call", "call", "end side stream", "wait", "synchronize"] + [
        "graph",
        "call",
        "end graph",
    ]
    log.clear()
    assert timing.cuda_seconds(replay) == 0.005
    assert log == ["record", "replay", "record", "synchronize"]
