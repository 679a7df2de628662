"""`bench e2e`: every engine checked and timed in a process of its own, and nothing timed that is wrong."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import torch

from bitshard.bench import e2e, e2e_engines
from bitshard.bench.e2e import E2eBench, bench_e2e
from bitshard.errors import BenchError, SpecError
from bitshard.pipeline import Calibration, quantize
from bitshard.spec import requested
from commands import refusal

JOB: dict[str, Any] = {
    "engine": "fake",
    "checks": [[1, 2], [3, 4]],
    "prompts": [[1, 2, 3, 4], [5, 6, 7, 8]],
    "least": 0.5,
    "config": {"batches": [1, 2], "contexts": [2, 4], "new_tokens": 3, "repetitions": 3},
}


@pytest.fixture(scope="module")
def quantized(stories: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("e2e")
    (folder / "text").write_text(topics["types"])  # of the kind that the check is made of
    spec, how = requested("mix64", None, {"fraction_4bit": 1.0})
    quantize(str(stories), folder / "out", spec, Calibration(folder / "text", 8, 64), how)
    return folder / "out"


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[list[int]], int]]:
    """Calls of an engine that says a prompt's first token plus one, again and again."""
    calls = []

    def write(prompts: Sequence[Sequence[int]], tokens: int) -> list[list[int]]:
        calls.append(([list(prompt) for prompt in prompts], tokens))
        return [[prompt[0] + 1] * tokens for prompt in prompts]

    monkeypatch.setitem(e2e_engines.ENGINES, "fake", lambda job: write)
    return calls


def test_what_is_timed(asked: list[Any]) -> None:
    found = e2e_engines.measure({**JOB, "expected": [2, 9]})
    assert found["next_tokens"] == [2, 4] and found["agreement"] == 0.5 and found["peak_bytes"] > 1 << 26
    assert [(batch, context) for batch, context, *_ in found["times"]] == [(1, 2), (1, 4), (2, 2), (2, 4)]
    assert all(len(first) == len(step) == 3 for *_, first, step in found["times"])
    # one call is not counted; then one of a token, for the first, and one of three more
    assert asked[:2] == [([[1, 2]], 1), ([[3, 4]], 1)]
    assert asked[2:] == [
        (prompts, tokens)
        for prompts in ([[1, 2]], [[1, 2, 3, 4]], [[1, 2], [5, 6]], [[1, 2, 3, 4], [5, 6, 7, 8]])
        for _ in range(4)
        for tokens in (1, 4)
    ]


def test_nothing_is_timed_that_is_wrong(asked: list[Any]) -> None:
    found = e2e_engines.measure({**JOB, "expected": [7, 9]})
    assert found == {"next_tokens": [2, 4], "agreement": 0.0} and len(asked) == 2


def test_transformers_beside_what_is_not_installed(stories: Path, quantized: Path, tmp_path: Path) -> None:
    gguf = tmp_path / "q.gguf"
    gguf.write_bytes(b"none")
    config = E2eBench((1, 2), (16, 32), 2, (1,), 3)
    report = bench_e2e(stories, quantized, gguf, config, tmp_path / "out" / "e.json")
    rows = [row for row in report.rows if "transformers" in row.run]
    assert [(row.run, row.batch, row.context) for row in rows] == [
        (run, batch, context)
        for run in ("16-bit, transformers", "bitshard, transformers")
        for batch in (1, 2)
        for context in (16, 32)
    ]
    assert all(0 < row.first.p10 <= row.first.median <= row.first.p90 for row in rows)
    assert all(row.peak_bytes > 1 << 26 for row in rows)
    for row in rows:  # of all prompts together
        assert row.tokens_per_second == pytest.approx(row.batch * 1000 / row.step.median)
    assert rows[0].agreement > 0.8 and rows[-1].agreement > 0.3  # in bfloat16; at 4.4 bits
    for engine, module in e2e.MODULES.items():
        if find_spec(module) is None:
            assert any(engine in run and module in why for run, why in report.refused.items())
    assert any("q, llama.cpp" in run for run in report.refused)
    written = json.loads((tmp_path / "out" / "e.json").read_text())
    assert written == json.loads(json.dumps(report.to_dict())) and written["runs_left"] == 0
    assert {"cpu", "commit", "date", "load", "bytes_per_second"} <= written["header"].keys()
    assert (tmp_path / "out" / "e.png").read_bytes().startswith(b"\x89PNG")
    assert report.render().row_count == len(report.rows)
    with pytest.raises(BenchError, match="runs that were not timed: .*; allowed: engines that run here"):
        report.require_all()


@pytest.mark.slow
def test_two_ranks(stories: Path, quantized: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(e2e, "MODULES", {"transformers": "transformers", "vllm": "no_such_module"})
    report = bench_e2e(stories, quantized, None, E2eBench((1,), (16,), 2, (2,), 3))
    assert [(row.run, row.tp_size, row.threads) for row in report.rows] == [
        ("16-bit, transformers, 2 ranks", 2, 1),
        ("bitshard, transformers, 2 ranks", 2, 1),
    ]
    assert all(row.agreement > 0.3 for row in report.rows)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"batches": (0,)}, "batches: found (0,); allowed: numbers of 1 or more"),
        ({"contexts": ()}, "contexts: found (); allowed: numbers of 1 or more"),
        ({"new_tokens": 0}, "new_tokens: found 0; allowed: 1 or more"),
        ({"repetitions": 2}, "repetitions: found 2; allowed: 3 or more"),
        ({"ranks": (1, 4096)}, "ranks: found 4096 ranks on 1 cores; allowed: a core for each"),
    ],
)
def test_refuses_what_cannot_be_measured(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(SpecError) as error:
        E2eBench(**{"ranks": (1,), **options})
    assert str(error.value).startswith(sentence)


def test_the_command_refuses_files(stories: Path, quantized: Path, tmp_path: Path) -> None:
    one = ["--ranks", "1"]
    said = refusal("bench", "e2e", quantized, stories, *one)
    assert "found a quantized checkpoint; allowed: the 16-bit model" in said
    assert "found a 16-bit model; allowed: a quantized" in refusal("bench", "e2e", stories, stories, *one)
    said = refusal("bench", "e2e", stories, quantized, *one, "--gguf", tmp_path / "none.gguf")
    assert "none.gguf: found no such file" in said
    said = refusal("bench", "e2e", stories, quantized, *one, "--contexts", "100000")
    assert "--contexts: found 100033 tokens in all; allowed: 512, the model's longest" in said
