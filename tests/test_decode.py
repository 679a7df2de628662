"""decode.cu, the kernel for a few tokens: on a GPU, or on a processor where there is none (cuda_on_host.h)."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils import cpp_extension

import nvcc
from bitshard.kernels import decode
from bitshard.kernels.decode import Variant
from bitshard.layout import Mix64Layout
from bitshard.mixed import MixedWeight
from bitshard.records import mix64_lanes
from bitshard.spec import MixSpec
from factory import random_mixed_weight
from on_host import COMPILER, emulate

pytestmark = pytest.mark.usefixtures("poisoned")
needs_nvcc = pytest.mark.skipif(not (nvcc.NVCC and nvcc.NVDISASM), reason="no nvcc or no nvdisasm")


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Where `decode.mix64_linear` runs, as it is: on a processor as on a card of four multiprocessors."""
    if torch.cuda.is_available():
        assert not decode.missing(), decode.missing()
        return torch.device("cuda")
    if COMPILER is None:
        pytest.skip("no g++")
    emulate(monkeypatch)
    return torch.device("cpu")


def weight(
    spec: MixSpec, n: int, k: int, device: torch.device, outliers: float = 0.0
) -> tuple[MixedWeight, dict[str, Any]]:
    found = random_mixed_weight(n, k, spec, torch.Generator().manual_seed(n), outliers=outliers)
    tensors = Mix64Layout().pack(found)
    lanes = mix64_lanes(tensors, spec)
    assert lanes is not None
    return found, {name: t if t is None else t.to(device) for name, t in {**tensors, **lanes}.items()}


def run(tensors: dict[str, Any], spec: MixSpec, x: torch.Tensor, n: int) -> torch.Tensor:
    outliers = [tensors[name] for name in Mix64Layout.outliers if name in tensors]
    x = x.to(tensors["qweight"].device)
    return decode.mix64_linear(x, tensors["qweight"], tensors["scales2"], outliers, n, spec.widths.count(4)).cpu()


def check(
    spec: MixSpec, n: int, k: int, outliers: float, dtype: torch.dtype, tokens: Sequence[int], device: torch.device
) -> None:
    """Identity bit for bit, and of random tokens an error at most twice torch's."""
    logical, tensors = weight(spec, n, k, device, outliers)
    W_KN = logical.dequantize().T
    chosen = torch.randperm(k, generator=torch.Generator().manual_seed(k))
    for m in tokens:
        for some in chosen[: 2 * m].split(m):
            assert torch.equal(run(tensors, spec, torch.eye(k, dtype=dtype)[some], n), W_KN[some].to(dtype))
        x_MK = torch.randn(m, k, generator=torch.Generator().manual_seed(m)).to(dtype)
        exact_MN = x_MK.double() @ W_KN.double()
        torchs_MN, y_MN = x_MK @ W_KN.to(dtype), run(tensors, spec, x_MK, n)
        assert y_MN.dtype == dtype and y_MN.shape == (m, n)
        assert (y_MN.double() - exact_MN).norm() <= 2 * (torchs_MN.double() - exact_MN).norm()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("outliers", [0.0, 0.05])
@pytest.mark.parametrize("fraction", [0.0, 0.25, 0.5])
def test_mixed_strips(fraction: float, outliers: float, dtype: torch.dtype, device: torch.device) -> None:
    check(MixSpec(2, fraction), 67, 448, outliers, dtype, (1, 2, 3, 5), device)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("spec", "n", "k"), [(MixSpec(2, 1.0), 5, 64), (MixSpec(4, 0.0), 16, 1216)], ids=str)
def test_four_bits(spec: MixSpec, n: int, k: int, dtype: torch.dtype, device: torch.device) -> None:
    check(spec, n, k, 0.0, dtype, (1, 4, 8), device)


def test_more_tokens_than_one_block_of_threads_takes(device: torch.device) -> None:
    check(MixSpec(), 40, 192, 0.02, torch.float16, (9, 16, 37), device)


@pytest.mark.parametrize("stages", [1, 2, 5])
@pytest.mark.parametrize("prefetch", [0, 1])
@pytest.mark.parametrize("splits", [1, 3])
def test_however_it_overlaps(device: torch.device, stages: int, prefetch: int, splits: int) -> None:
    """Each asynchronous part switched off, K split or not; twice to the bit, as nothing may be left behind."""
    spec, n, k = MixSpec(), 24, 128 * 41
    logical, tensors = weight(spec, n, k, device)
    x_MK = torch.randn(2, k, generator=torch.Generator().manual_seed(0)).half().to(device)
    variant = Variant(spec.widths.count(4), 2, 1, 0, warps=2, stages=stages, prefetch=prefetch)
    kernel, blocks = decode._compiled(variant, device), (2, splits, 1)
    first_MN, second_MN = x_MK.new_empty(2, n), x_MK.new_empty(2, n)
    for y_MN in (first_MN, second_MN):
        decode.launch(kernel, variant, blocks, x_MK, y_MN, tensors["qweight"], tensors["scales2"], ())
    assert torch.equal(first_MN, second_MN)
    expected_MN = x_MK.cpu().float() @ logical.dequantize().T
    torch.testing.assert_close(first_MN.cpu().float(), expected_MN, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("tokens", [1, 37])
def test_splits_with_outliers_and_batches(tokens: int, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "_multiprocessors", lambda device: 16)
    n, k = 24, 128 * 24
    variant = Variant.of(1, tokens, torch.float16)
    assert (
        min(decode.grid(variant, tokens, n, k, 16)[1:]) > 1 if tokens > 16 else decode.grid(variant, 1, n, k, 16)[1] > 1
    )
    check(MixSpec(), n, k, 0.05, torch.float16, (tokens,), device)
    _, tensors = weight(MixSpec(), n, k, device, 0.05)
    x_MK = torch.randn(tokens, k, generator=torch.Generator().manual_seed(0)).half()
    assert torch.equal(run(tensors, MixSpec(), x_MK, n), run(tensors, MixSpec(), x_MK, n))


def test_the_grid_fills_the_card_and_no_more() -> None:
    one = Variant.of(1, 1, torch.float16)
    assert decode.grid(one, 1, 8192, 28672, 132) == (512, 1, 1)
    rows, splits, batches = decode.grid(one, 1, 256, 8192, 132)
    assert (rows, batches) == (16, 1) and splits == 8 and rows * splits <= 2 * 132
    assert decode.grid(one, 1, 16, 64, 132) == (1, 1, 1)
    assert decode.grid(Variant.of(1, 37, torch.float16), 37, 4096, 4096, 132) == (256, 1, 3)


def test_empty_and_strided(device: torch.device) -> None:
    spec, n, k = MixSpec(), 19, 128
    _, tensors = weight(spec, n, k, device)
    assert run(tensors, spec, torch.zeros(2, 0, k).half(), n).shape == (2, 0, n)
    x = torch.randn(2, 3, 2 * k, generator=torch.Generator().manual_seed(0)).half()[..., ::2]
    assert torch.equal(run(tensors, spec, x, n), run(tensors, spec, x.contiguous(), n))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_activation_that_is_not_finite_is_not_hidden(value: float, device: torch.device) -> None:
    spec, n, k = MixSpec(), 16, 128
    _, tensors = weight(spec, n, k, device)
    x = torch.randn(2, k, generator=torch.Generator().manual_seed(0)).half()
    x[0, 3] = value
    found = run(tensors, spec, x, n)
    assert not found[0].isfinite().any() and found[1].isfinite().all()


def test_no_toolkit_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's compiler of kernels would stop where it finds none, as beside most torches from pip."""

    class Kernel:
        def __init__(self, source: str, name: str, nvcc_options: list[str]) -> None:
            assert name in source and cpp_extension.include_paths("cuda")

        def set_shared_memory_config(self, nbytes: int) -> None:
            assert nbytes == variant.shared_bytes

    variant = Variant.of(1, 1, torch.float16)
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", None)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "_compile_kernel", Kernel)
    with pytest.raises(OSError, match="CUDA_HOME"):
        cpp_extension.include_paths("cuda")
    assert isinstance(decode._compiled.__wrapped__(variant, torch.device("cuda")), Kernel)
    assert cpp_extension.CUDA_HOME is None


def compiled(*parts: str) -> None:
    """Variants with a part in their names compile to what the golden table says, whatever nvcc's version.

    No register is spilled, and registers and shared memory are enough for 16 warps of a multiprocessor at once.
    """
    golden = json.loads(Path(__file__).with_name("golden").joinpath("decode.json").read_text())
    jobs = nvcc.jobs(parts)
    assert jobs and nvcc.jobs().keys() == golden.keys()
    for name, (variant, card) in jobs.items():
        facts, known = nvcc.facts(variant, card), golden[name]
        about = f"{name}: {facts}"
        assert facts["local"] == 0, about
        assert facts["registers"] <= min(known["registers"] + 8, 65536 // (16 * 32)), about
        assert facts["shared"] == known["shared"], about
        assert 16 // variant.warps * (facts["shared"] + 1024) <= {80: 164 << 10, 90: 228 << 10}[card], about
        assert facts["loop"] <= 1.03 * known["loop"], about  # 1.005 with ptxas 12.8 for a table made with 13.0


@needs_nvcc
def test_what_the_compiler_makes_of_it() -> None:
    compiled(
        "fp16 mix64-1 1-token", "fp16 mix64-1 8-token", "fp16 mix64-1 16-token",
        "bf16 mix64-0 4-token", "bf16 mix64-2 2-token", "bf16 mix64-4 16-token",
    )  # fmt: skip


@needs_nvcc
@pytest.mark.slow
def test_what_the_compiler_makes_of_all() -> None:
    compiled()


@needs_nvcc
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("wide", "tokens"), [*((wide, 1) for wide in nvcc.WIDE), *((1, tokens) for tokens in nvcc.TOKENS[1:])]
)
def test_copies_are_of_16_bytes_and_of_nothing_else_than_the_file_has(
    wide: int, tokens: int, dtype: torch.dtype
) -> None:
    variant = Variant.of(wide, tokens, dtype)
    ptx = nvcc.build(variant, 90, "ptx")[0].decode()
    spec, n, k = MixSpec(2, wide / 4), 64, 256
    stored = spec.code_bytes(k, n) + spec.scale_bytes(k, n)
    stage = (stored + 3 * 64) // (n // 16)  # two records; second-order scales, 64 bytes, are read by each tile of rows
    assert tokens > 1 or variant.shared_bytes == variant.warps * variant.stages * stage
    copies = -(-stage // (32 * 16))  # of every lane
    last = int(variant.columns < 8)  # behind the loop there is a turn for one record that is left
    turns = variant.stages - 1 + 1 + last
    assert len(re.findall(r"cp\.async\.cg\.shared\.global \[.*\], \[.*\], 16;", ptx)) == copies * turns
    products = variant.columns * variant.tiles * (8 // variant.columns + 1)  # of a record: its strips, and ones
    assert ptx.count("cp.async.ca") == 0 and ptx.count("mma.sync.aligned.m16n8k16") == (2 + last) * products
