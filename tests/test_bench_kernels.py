"""`bench kernels`: every contender checked and timed, and nothing timed that is wrong."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bitshard import kernels as registry
from bitshard.bench import contenders, ggml, kernels
from bitshard.bench.gpu_peers import Peer
from bitshard.bench.kernels import KernelBench, bench_kernels
from bitshard.bench.timing import cpu_seconds
from bitshard.errors import BenchError, CheckpointError, SpecError
from bitshard.kernels import why_not_arranged, why_not_triton
from bitshard.nn import PackedLinear
from on_host import COMPILER, emulate

pytestmark = pytest.mark.skipif(bool(why_not_arranged("cpu")), reason="the C kernels were not built")
SMALL = KernelBench(((64, 256), (80, 192)), (1, 5), (1, 2), 3)


@pytest.fixture(autouse=True)
def few_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contenders, "MOST_COPIES", 2)


def test_every_case_is_measured_and_written(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    report = bench_kernels(SMALL, tmp_path / "out" / "k.json")
    ours = [f"{layout} {kernel}" for layout in ("mix64", "gptq 4-bit") for kernel in ("cpu-int8", "cpu")]
    variants = ("mix64 C call", "mix64, 0.2% outliers, cpu-int8", "mix64, 2-bit strips alone, cpu-int8")
    wanted = [*ours[:2], *variants, *ours[2:], "torch float32", "torch bfloat16"]
    for n, k in SMALL.shapes:
        of_ggml = ["ggml q2_K"] if ggml.libraries() is not None and k % 256 == 0 else []
        for tokens in SMALL.tokens:
            for count in SMALL.threads:
                rows = [r for r in report.rows if (r.n, r.k, r.tokens, r.threads) == (n, k, tokens, count)]
                assert [row.kernel for row in rows] == wanted + of_ggml
                assert all(0 < r.times.p10 <= r.times.median <= r.times.p90 and r.error < 0.02 for r in rows)
    assert torch.get_num_threads() == threads and set(report.floors) == {1, 2}
    written = json.loads((tmp_path / "out" / "k.json").read_text())
    assert len(written["rows"]) == len(report.rows) and {"cpu", "commit", "date", "load"} <= written["header"].keys()
    assert (tmp_path / "out" / "k.png").read_bytes().startswith(b"\x89PNG")
    assert report.render().row_count == len(report.rows)


def test_nothing_is_timed_that_is_wrong(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(contenders.MOST_ERROR, "int8", 1e-6)
    report = bench_kernels(SMALL, tmp_path / "k.json")
    assert {row.kernel for row in report.rows} >= {"mix64 cpu", "torch float32"}
    assert not any("int8" in row.kernel for row in report.rows) and len(report.refused) == 2 * 2 * 2 * 5
    assert json.loads((tmp_path / "k.json").read_text())["refused"] == report.refused
    with pytest.raises(
        BenchError, match=r"found 40 that were not timed: mix64 cpu-int8, 64x256, M=1, 1 threads: error .*; allowed"
    ):
        report.require_all()


def test_what_was_measured_stays(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Whatever ends a run."""

    def interrupt(turns: object, repetitions: int) -> list[list[float]]:
        if len(cases) == 3:
            raise KeyboardInterrupt
        cases.append(1)
        return times(turns, repetitions)

    cases, times = list[int](), kernels._times
    monkeypatch.setattr(kernels, "_times", interrupt)
    with pytest.raises(KeyboardInterrupt):
        bench_kernels(SMALL, tmp_path / "k.json")
    written = json.loads((tmp_path / "k.json").read_text())
    assert {row["tokens"] for row in written["rows"]} == {1, 5} and written["cases_left"] == 5


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("shapes", ((4096, 100),)),
        ("shapes", ((8, 64),)),
        ("shapes", ((17, 64),)),
        ("shapes", ((16, 64_000_000_000),)),
        ("tokens", (0,)),
        ("tokens", (99_999_999_999,)),
        ("threads", ()),
        ("threads", (100_000,)),
        ("repetitions", 2),
    ],
)
def test_refuses(option: str, value: object) -> None:
    with pytest.raises(SpecError, match=option):
        KernelBench(**{option: value})


def test_needs_the_kernels_and_a_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="suffix '.txt'"):
        bench_kernels(SMALL, tmp_path / "k.txt")
    (tmp_path / "k.json").mkdir()
    with pytest.raises(CheckpointError, match="k.json: found Is a directory; allowed: a file that can be written"):
        bench_kernels(KernelBench(((64, 256),), (1,), (1,), 3), tmp_path / "k.json")
    assert [path.name for path in tmp_path.iterdir()] == ["k.json"]
    monkeypatch.setattr(kernels, "why_not_arranged", lambda device: "install it again")
    with pytest.raises(BenchError, match="no kernels for cpu.*install it again"):
        bench_kernels(SMALL)


def other_programs(W_NK: torch.Tensor, rows: int) -> list[tuple[str, Callable[[], Peer]]]:
    def broken() -> Peer:
        raise ImportError("no such\n  symbol")

    peer = Peer("another", W_NK.nbytes, W_NK[:rows].float(), lambda: lambda x_MK: x_MK @ W_NK.T)
    return [("another", lambda: peer), ("one more", broken)]


@pytest.mark.skipif(COMPILER is None, reason="no g++")
@pytest.mark.skipif(bool(why_not_triton()), reason="no triton")
def test_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Every line of what a GPU runs, where none is: the kernels emulated and interpreted, one call for a graph."""

    def arrange(linear: PackedLinear) -> None:
        found = linear.arranged({name: p.data for name, p in linear.named_parameters(recurse=False)}, "cuda")
        assert found is not None
        linear.file_shape, linear.arrangement = linear.qweight.shape, "gpu"
        linear.replace(**found)

    emulate(monkeypatch)
    monkeypatch.setattr(PackedLinear, "arrange", arrange)
    monkeypatch.setattr(registry, "KERNELS", tuple(replace(k, missing=lambda: "") for k in registry.KERNELS))
    monkeypatch.setattr(kernels, "why_not_arranged", lambda device: "")
    monkeypatch.setattr(contenders, "GPU", contenders.CPU)
    monkeypatch.setitem(registry.HOMES, "gpu", "cpu")
    monkeypatch.setattr(kernels, "capture", lambda call: call)
    monkeypatch.setattr(kernels, "cuda_seconds", cpu_seconds)
    monkeypatch.setattr(kernels, "MOST_ELEMENTS", 1 << 10)
    monkeypatch.setattr(kernels, "LEAST_CALLS", 3)
    monkeypatch.setattr(kernels, "AWAKE_SECONDS", 0)
    monkeypatch.setattr(contenders, "peers", other_programs)
    registry.choose.cache_clear()
    with pytest.raises(BenchError, match="no GPU that torch sees"):
        bench_kernels(KernelBench(device="cuda"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    report = bench_kernels(KernelBench(((64, 256),), (1, 9), (1,), 3, "cuda"), tmp_path / "k.json")
    registry.choose.cache_clear()
    decodes = ["mix64 decode", "mix64 decode, no ring", "mix64 decode, no prefetch of x"]
    others = "mix64 triton", "mix64, 0.2% outliers, decode", "gptq 4-bit triton", "torch float16", "another"
    assert {row.kernel for row in report.rows} == {*decodes, *others}
    assert len(report.rows) == 8 + 7 and all(row.error < 2e-3 for row in report.rows)
    assert report.refused == {"one more, 64x256": "ImportError: no such symbol"}


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
@pytest.mark.parametrize("failing", ["pytest", "bitshard", ""])
def test_the_command_for_a_gpu(failing: str, tmp_path: Path) -> None:
    """Kernels are timed even when a test fails, and either failure is the command's."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\necho "$*" >> {tmp_path}/said\n[ "$2" != "{failing}" ]\n')
    python.chmod(0o755)
    done = subprocess.run(["make", "gpu-check", f"GPU_PYTHON={python}"], cwd=Path(__file__).parents[1], check=False)
    tests, bench = (tmp_path / "said").read_text().splitlines()
    assert (done.returncode == 0) == (not failing)
    assert tests.startswith("-m pytest") and all((Path(__file__).parents[1] / f).exists() for f in tests.split()[-4:])
    assert bench.startswith("-m bitshard bench kernels --device cuda --out benchmarks/results/")
