"""GPTQModel's row: runs in a virtual environment that holds gptqmodel==7.6.0 and torch==2.13.0.

    python peer_gptqmodel.py MODEL SEGMENTS OUT --bits 3 --group-size 128

MODEL: a 16-bit folder. SEGMENTS: JSON, a list of lists of token ids. Loaded in fp32: its default on a CPU is bf16,
which would cost it accuracy. Otherwise its defaults with `desc_act`: symmetric, damping 5 %, true sequential.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # on 2 cores it refuses to be imported without

import torch
from gptqmodel import GPTQModel, QuantizeConfig


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("segments", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--bits", type=int, required=True)
    parser.add_argument("--group-size", type=int, required=True)
    arguments = parser.parse_args()
    segments = torch.tensor(json.loads(arguments.segments.read_text()))
    calibration = [{"input_ids": ids[None], "attention_mask": torch.ones_like(ids)[None]} for ids in segments]
    spec = QuantizeConfig(bits=arguments.bits, group_size=arguments.group_size, desc_act=True, sym=True)
    model = GPTQModel.load(str(arguments.model.resolve()), spec, dtype=torch.float32)
    model.quantize(calibration, batch_size=1)
    model.save(str(arguments.out))


if __name__ == "__main__":
    main()
