"""decode.cu, the GPU's kernel for a few tokens, run on a processor: a coroutine for each thread (cuda_on_host.h)."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from bitshard.kernels import decode
from bitshard.kernels.decode import Variant
from bitshard.layout import Mix64Layout
from bitshard.mixed import MixedWeight
from bitshard.records import mix64_lanes
from bitshard.spec import MixSpec
from factory import random_mixed_weight

COMPILER = shutil.which("g++")
pytestmark = pytest.mark.skipif(COMPILER is None, reason="no g++")


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """variant -> what torch.cuda would have compiled, for a processor."""
    folder = tmp_path_factory.mktemp("decode")

    @cache
    def compiled(variant: Variant) -> Any:
        assert COMPILER is not None
        built = folder / ("_".join(option[2:].replace("=", "") for option in variant.options()) + ".so")
        here = Path(__file__).parent
        command = [COMPILER, "-std=c++17", "-O1", "-shared", "-fPIC", "-w", f'-DDECODE_CU="{decode.SOURCE}"']
        subprocess.run([*command, *variant.options(), "-o", built, here / "decode_on_host.cpp"], check=True)
        run = ctypes.CDLL(str(built)).run

        def kernel(grid: Sequence[int], block: Sequence[int], args: Sequence[Any], shared_mem: int) -> None:
            tensors, sizes = args[:9], args[9:]
            pointers = (ctypes.c_void_p * 9)(*[tensor.data_ptr() or None for tensor in tensors])
            run((ctypes.c_int * 3)(*grid), block[0], shared_mem, pointers, (ctypes.c_int * 3)(*sizes))

        return kernel

    return compiled


@pytest.fixture
def on_host(host: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """`decode.mix64_linear` as it is, on a card of four multiprocessors."""
    monkeypatch.setattr(decode, "_compiled", lambda variant, device: host(variant))
    monkeypatch.setattr(decode, "_multiprocessors", lambda device: 4)
    decode._counters.cache_clear()


def weight(spec: MixSpec, n: int, k: int, outliers: float = 0.0) -> tuple[MixedWeight, dict[str, Any]]:
    found = random_mixed_weight(n, k, spec, torch.Generator().manual_seed(n), outliers=outliers)
    tensors = Mix64Layout().pack(found)
    lanes = mix64_lanes(tensors, spec)
    assert lanes is not None
    return found, {**tensors, **lanes}


def run(tensors: dict[str, Any], spec: MixSpec, x: torch.Tensor, n: int) -> torch.Tensor:
    outliers = [tensors[name] for name in Mix64Layout.outliers if name in tensors]
    return decode.mix64_linear(x, tensors["qweight"], tensors["scales2"], outliers, n, spec.widths.count(4))


def check(spec: MixSpec, n: int, k: int, outliers: float, dtype: torch.dtype, tokens: Sequence[int]) -> None:
    """Identity bit for bit, and of random tokens an error at most twice torch's."""
    logical, tensors = weight(spec, n, k, outliers)
    W_KN = logical.dequantize().T
    chosen = torch.randperm(k, generator=torch.Generator().manual_seed(k))[:16]
    assert torch.equal(run(tensors, spec, torch.eye(k, dtype=dtype)[chosen], n), W_KN[chosen].to(dtype))
    for m in tokens:
        x_MK = torch.randn(m, k, generator=torch.Generator().manual_seed(m)).to(dtype)
        exact_MN = x_MK.double() @ W_KN.double()
        torchs_MN, y_MN = x_MK @ W_KN.to(dtype), run(tensors, spec, x_MK, n)
        assert y_MN.dtype == dtype and y_MN.shape == (m, n)
        assert (y_MN.double() - exact_MN).norm() <= 2 * (torchs_MN.double() - exact_MN).norm()


@pytest.mark.usefixtures("on_host")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("outliers", [0.0, 0.05])
@pytest.mark.parametrize("fraction", [0.0, 0.25, 0.5])
def test_mixed_strips(fraction: float, outliers: float, dtype: torch.dtype) -> None:
    check(MixSpec(2, fraction), 67, 448, outliers, dtype, (1, 2, 3, 5))


@pytest.mark.usefixtures("on_host")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("spec", "n", "k"), [(MixSpec(2, 1.0), 5, 64), (MixSpec(4, 0.0), 16, 1216)], ids=str)
def test_four_bits(spec: MixSpec, n: int, k: int, dtype: torch.dtype) -> None:
    check(spec, n, k, 0.0, dtype, (1, 4, 8))


@pytest.mark.usefixtures("on_host")
def test_more_tokens_than_one_block_of_threads_takes() -> None:
    check(MixSpec(), 40, 192, 0.02, torch.float16, (9, 16, 37))


@pytest.mark.parametrize("stages", [1, 2, 5])
@pytest.mark.parametrize("prefetch", [0, 1])
@pytest.mark.parametrize("splits", [1, 3])
def test_the_same_bits_however_it_overlaps(host: Any, stages: int, prefetch: int, splits: int) -> None:
    """Each asynchronous part switched off, K split or not; twice, as counters must be left at zero."""
    spec, n, k = MixSpec(), 24, 128 * 21 + 64
    logical, tensors = weight(spec, n, k)
    x_MK = torch.randn(2, k, generator=torch.Generator().manual_seed(0)).half()
    variant = Variant(spec.widths.count(4), 2, 1, 0, warps=2, stages=stages, prefetch=prefetch)
    for _ in range(2):
        y_MN = torch.full((2, n), torch.nan, dtype=torch.half)
        blocks = (2, splits, 1)
        decode.launch(host(variant), variant, blocks, x_MK, y_MN, tensors["qweight"], tensors["scales2"], ())
        expected_MN = x_MK.float() @ logical.dequantize().T
        torch.testing.assert_close(y_MN.float(), expected_MN, rtol=2e-3, atol=2e-3)
        assert not decode._counters(x_MK.device, 2).any()


def test_the_grid_fills_the_card_and_no_more() -> None:
    one = Variant.of(1, 1, torch.float16)
    assert decode.grid(one, 1, 8192, 28672, 132) == (512, 1, 1)
    rows, splits, batches = decode.grid(one, 1, 256, 8192, 132)
    assert (rows, batches) == (16, 1) and splits == 8 and rows * splits <= 132
    assert decode.grid(one, 1, 16, 64, 132) == (1, 1, 1)
    assert decode.grid(Variant.of(1, 37, torch.float16), 37, 4096, 4096, 132) == (256, 1, 3)


@pytest.mark.usefixtures("on_host")
def test_empty_and_strided() -> None:
    spec, n, k = MixSpec(), 19, 128
    _, tensors = weight(spec, n, k)
    assert run(tensors, spec, torch.zeros(2, 0, k).half(), n).shape == (2, 0, n)
    x = torch.randn(2, 3, 2 * k, generator=torch.Generator().manual_seed(0)).half()[..., ::2]
    assert torch.equal(run(tensors, spec, x, n), run(tensors, spec, x.contiguous(), n))


@pytest.mark.usefixtures("on_host")
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_activation_that_is_not_finite_is_not_hidden(value: float) -> None:
    spec, n, k = MixSpec(), 16, 128
    _, tensors = weight(spec, n, k)
    x = torch.randn(2, k, generator=torch.Generator().manual_seed(0)).half()
    x[0, 3] = value
    found = run(tensors, spec, x, n)
    assert not found[0].isfinite().any() and found[1].isfinite().all()
