"""AutoRound's rows: runs in a virtual environment that holds auto-round==0.16.1 and torch==2.13.0.

    python peer_autoround.py MODEL SEGMENTS OUT --bits 2 --group-size 32 --recipe light

MODEL: a 16-bit folder. SEGMENTS: JSON, a list of lists of token ids. Its defaults: symmetric, batches of 8, mixed
precision, SignSGD on rounding and ranges, 200 steps a block; or its recipe `light`, 50 larger ones. Writes GPTQ's
format.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from auto_round import AutoRound
from transformers import AutoModelForCausalLM, AutoTokenizer

RECIPES: dict[str, dict[str, Any]] = {"default": {"iters": 200}, "light": {"iters": 50, "lr": 5e-3}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("segments", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--bits", type=int, required=True)
    parser.add_argument("--group-size", type=int, required=True)
    parser.add_argument("--recipe", choices=RECIPES, default="default")
    arguments = parser.parse_args()
    segments = torch.tensor(json.loads(arguments.segments.read_text()))
    calibration = [{"input_ids": ids[None], "attention_mask": torch.ones_like(ids)[None]} for ids in segments]
    model = AutoModelForCausalLM.from_pretrained(arguments.model.resolve(), dtype=torch.float32)
    rounder = AutoRound(
        model,
        AutoTokenizer.from_pretrained(arguments.model.resolve()),
        bits=arguments.bits,
        group_size=arguments.group_size,
        sym=True,
        **RECIPES[arguments.recipe],
        dataset=calibration,
        nsamples=len(segments),
        seqlen=segments.shape[1],
        batch_size=8,
        device_map="cpu",
    )
    made = arguments.out.with_name(f"{arguments.out.name}.made")
    rounder.quantize_and_save(str(made), format="auto_gptq")
    next(made.glob("*/config.json")).parent.rename(arguments.out)  # it puts a folder of its own naming in between
    made.rmdir()


if __name__ == "__main__":
    main()
