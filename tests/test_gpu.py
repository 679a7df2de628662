"""What only a GPU can show: layers on it, compiled, captured, and a whole model. `make gpu-check` runs it there."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bitshard.bench.timing import capture
from bitshard.integrations.transformers import load
from bitshard.kernels import decode, why_not_triton
from bitshard.layout import Mix64Layout
from bitshard.nn import Mix64Linear, PackedLinear
from bitshard.pipeline import Calibration, quantize
from bitshard.spec import GPTQ_RECIPE, MIX_RECIPE, PAPER_RECIPES, MixRecipe, MixSpec, QuantSpec
from bitshard.verify import verify
from dense import random_model, random_text
from factory import random_checkpoint, random_mixed_weight
from test_kernels import gptq

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
HALVES = (torch.float16, torch.bfloat16)


def layers() -> list[tuple[PackedLinear, torch.Tensor]]:
    """On the GPU, with their matrices [K, N] on the processor."""
    weight = random_mixed_weight(200, 1200, MixSpec(), torch.Generator().manual_seed(0), outliers=0.01)
    mixed = Mix64Linear(1200, 200, MixSpec())
    mixed.replace(**Mix64Layout().pack(weight))
    found = [(mixed, weight.dequantize().T), gptq(QuantSpec(4, 32), 64, 96), gptq(QuantSpec(3, 32), 64, 96, True)]
    for linear, _ in found:
        linear.cuda()
        linear.arrange()
    return found


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32], ids=str)
def test_every_kernel_that_reads_a_layer(dtype: torch.dtype) -> None:
    """Identity bit for bit; of random tokens an error at most twice torch's on the same device."""
    for linear, W_KN in layers():
        k = len(W_KN)
        assert linear.arrangement == "gpu"
        for linear.backend in ("exact", "triton", "reference"):
            found = torch.cat([linear(x) for x in torch.eye(k, dtype=dtype, device="cuda").split(16)])
            assert torch.equal(found.cpu(), W_KN.to(dtype)), linear.backend
            for tokens in (1, 7, 16, 40, 300, 4096):
                x_MK = torch.randn(tokens, k, generator=torch.Generator().manual_seed(tokens)).to(dtype)
                exact_MN, torchs_MN = x_MK.double() @ W_KN.double(), (x_MK.cuda() @ W_KN.to(dtype).cuda()).cpu()
                error = (linear(x_MK.cuda()).cpu().double() - exact_MN).norm()
                assert error <= 2 * (torchs_MN.double() - exact_MN).norm() + 1e-6, (linear.backend, tokens)


def test_which_kernel_runs() -> None:
    mixed, plain = layers()[0][0], layers()[1][0]
    assert not why_not_triton() and not decode.missing(), decode.missing()
    assert mixed.kernel(torch.float16, 1) == "decode"
    assert (
        mixed.kernel(torch.float16, 1000)
        == mixed.kernel(torch.float32, 1)
        == plain.kernel(torch.float16, 1)
        == "triton"
    )


@pytest.mark.parametrize("tokens", [1, 40])
def test_compiled_without_a_break_and_captured(tokens: int) -> None:
    for linear, W_KN in layers():
        x = torch.randn(tokens, len(W_KN), device="cuda", dtype=torch.float16)
        y = linear(x)
        assert torch.equal(torch.compile(linear, fullgraph=True)(x), y)
        outputs = []
        replay = capture(lambda linear=linear, x=x, outputs=outputs: outputs.append(linear(x)))
        outputs[-1].fill_(torch.nan)
        replay()
        torch.cuda.synchronize()
        assert torch.equal(outputs[-1], y)


@pytest.mark.parametrize(
    ("spec", "recipe"),
    [
        (MixSpec(), replace(MIX_RECIPE, tune=2)),
        PAPER_RECIPES["paper-v4"],
        (QuantSpec(4, 32, desc_act=True), GPTQ_RECIPE),
        (QuantSpec(4, 32), replace(GPTQ_RECIPE, order="model")),
    ],
)
def test_quantized_where_it_is(spec: MixSpec | QuantSpec, recipe: MixRecipe, tmp_path: Path) -> None:
    """The same bits and, within a tenth, the same errors as on a processor."""
    model, text = random_model(tmp_path / "m", "llama"), tmp_path / "text.txt"
    text.write_text(random_text(2000))
    reports = []
    for there in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.cuda, "is_available", lambda there=there: there)
            reports.append(quantize(model, tmp_path / str(there), spec, Calibration(text, 6, 24), recipe))
        verify(tmp_path / str(there))
    assert reports[0].average_bits == reports[1].average_bits
    for found, expected in zip(*(report.matrices for report in reports), strict=True):
        assert found.relative_error == pytest.approx(expected.relative_error, rel=0.1)


def test_a_whole_model(tmp_path: Path) -> None:
    """Logits as plain torch has them, on the same GPU."""
    path = random_checkpoint(tmp_path, "llama", MixSpec(), hidden_size=128, intermediate_size=256)
    tokens = torch.arange(12, device="cuda")[None]
    fast, plain = (load(path, dtype=torch.float16, backend=backend) for backend in ("exact", "reference"))
    linear = fast.get_submodule("model.layers.0.mlp.down_proj")
    assert isinstance(linear, Mix64Linear) and linear.kernel(torch.float16, 12) == "decode"
    torch.testing.assert_close(fast(tokens).logits, plain(tokens).logits, rtol=2e-2, atol=2e-2)
