"""What `export --to gptq` and `quantize --format gptq` write, in GPTQModel's own kernel: `make test-gptqmodel`."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from bitshard.export import export
from bitshard.integrations.transformers import load
from bitshard.spec import MixSpec, QuantSpec
from dense import character_tokenizer
from factory import random_checkpoint, token_ids

pytestmark = [
    pytest.mark.gptqmodel,
    pytest.mark.skipif(find_spec("gptqmodel") is None, reason="GPTQModel is not installed"),
]


@pytest.mark.parametrize(
    "spec", [MixSpec(), MixSpec(fraction_4bit=1.0), QuantSpec(4, 32, sym=True), QuantSpec(3, 32, sym=False)], ids=str
)
def test_logits(spec: MixSpec | QuantSpec, tmp_path: Path) -> None:
    """In float16, which its processor kernel wants, off from float32's by at most twice what ours are."""
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # on 2 cores it refuses to be imported without
    from gptqmodel import BACKEND, GPTQModel

    folder = where = random_checkpoint(tmp_path / "m", "llama", spec, hidden_size=128, head_dim=64)
    if isinstance(spec, MixSpec):
        where = tmp_path / "exported"
        export(folder, where, "gptq")
    character_tokenizer().save_pretrained(where)  # it loads none without
    ids = token_ids(96)
    with torch.no_grad():
        exact, ours = (load(folder, dtype=dtype)(ids).logits.float() for dtype in (torch.float32, torch.float16))
        model = GPTQModel.load(str(where), device="cpu", backend=BACKEND.GPTQ_TORCH, dtype=torch.float16)
        theirs = model.model(ids).logits.float()
    assert type(model.model.model.layers[0].self_attn.q_proj).__name__ == "TorchLinear"
    assert (theirs - exact).norm() <= 2 * (ours - exact).norm() and (ours - exact).norm() < 0.01 * exact.norm()
