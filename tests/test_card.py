"""The model card: written with the checkpoint, and what `eval --card` adds to it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from bitshard.card import COLUMNS
from commands import bitshard, refusal
from dense import random_model, random_text

FORMATS = {
    "mix64": ["--damp", 0],
    "gptq": ["--format", "gptq", "--group-size", 32],
    "act_order": ["--format", "gptq", "--group-size", 32, "--desc-act"],
}


@pytest.mark.parametrize("format", FORMATS)
def test_a_card_says_what_was_done_and_measured(format: str, tmp_path: Path) -> None:
    source, out, text = random_model(tmp_path / "tiny", "llama"), tmp_path / "out", tmp_path / "te|xt.txt"
    text.write_text(random_text(6000))
    (source / "README.md").write_text("---\nlicense: gemma\ntags: [x]\n---\n# Tiny\nlicense: none\n")
    how = "--calibration", text, "--samples", 4, "--length", 64, *FORMATS[format], "--max-tp", 1
    assert bitshard("quantize", source, out, *how).code == 0
    card = (out / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n") and "# tiny, " in card and "base_model" not in card
    assert "\nlicense: gemma\ntags: [bitshard" in card and "license: none" not in card
    assert "calibration | 4 segments of 64 tokens, seed 0" in card and "on average, counted from the bytes" in card
    assert ("an ordinary GPTQ file, which" in card) == (format == "gptq") and "gptq_v2" not in card
    assert ('quantization="bitshard"' in card) == ("BitshardConfig())" in card) == (format != "mix64")
    assert f"damp {0.0 if format == 'mix64' else 0.01} |" in card
    assert f"correct={'yes' if format == 'mix64' else 'no'}" in bitshard("inspect", out).stdout
    assert "Nothing yet" in card and not [line for line in card.splitlines() if len(line) > 240]
    with (out / "README.md").open("a") as file:
        file.write("\n## Mine\n\nHello.\n")
    (out / "README.md").rename(tmp_path / "shared.md")  # as the hub's cache has it
    (out / "README.md").symlink_to(tmp_path / "shared.md")
    for _ in range(2):
        assert (
            bitshard("eval", out, "--text", text, "--context", 64, "--windows", 2, "--against", source, "--card").code
            == 0
        )
    assert "Nothing yet" in (tmp_path / "shared.md").read_text()
    measured, _, mine = (out / "README.md").read_text().rpartition("## Measured\n\n")[2].partition("\n## ")
    assert mine == "Mine\n\nHello.\n"
    rows = measured.splitlines()
    assert len(rows) == 4 and rows[0] == f"| {' | '.join(COLUMNS)} |" and rows[2] == rows[3]
    cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", rows[2])[1:-1]]
    assert cells[:5] == ["te\\|xt.txt", "64", "64", "2", "exact"] and len(cells) == len(COLUMNS)
    assert all(float(cell) > 0 for cell in cells[5:8])
    sentence = refusal("eval", out, "--text", text, "--context", 64, "--windows", 2, "--against", out, "--card")
    assert "out: found a quantized checkpoint; allowed: the 16-bit model, as --card will say" in sentence


def test_no_card_to_add_to(tmp_path: Path) -> None:
    source, text = random_model(tmp_path / "tiny", "llama"), tmp_path / "text.txt"
    text.write_text(random_text(6000))
    sentence = refusal("eval", source, "--text", text, "--context", 64, "--windows", 2, "--card")
    assert "README.md: found No such file or directory; allowed: the card that `bitshard quantize`" in sentence
    assert bitshard("eval", source, "--tasks", "piqa", "--card").code == 2
