"""The Triton kernels against the dequantized matrix: on a GPU if there is one, else in Triton's interpreter.

conftest.py sets TRITON_INTERPRET where there is no GPU; then what they compile to is checked in a process without it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import triton

from bitshard.bitpack import pack
from bitshard.kernels import triton as kernels
from bitshard.layout import Mix64Layout
from bitshard.records import mix64_lanes
from bitshard.spec import BLOCK, MixSpec, QuantSpec
from factory import random_mixed_weight
from test_kernels import gptq as gptq_layer

pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    # what the interpreter of Triton 3.6 does; NumPy 2.4 no longer takes it
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning"),
]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOKENS = (1, 3, 16, 17, 65)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
FRACTIONS = tuple(MixSpec(2, fraction) for fraction in (0.0, 0.25, 0.5, 1.0))
ANY = 1 << 30
Multiply = Callable[[torch.Tensor], torch.Tensor]


def mix64(spec: MixSpec, n: int, k: int, outliers: float) -> tuple[Multiply, torch.Tensor]:
    """A product by a matrix, and that matrix [K, N], K filled up to whole blocks."""
    weight = random_mixed_weight(n, k, spec, torch.Generator().manual_seed(n), outliers=outliers)
    packed = Mix64Layout().pack(weight)
    lanes = mix64_lanes(packed, spec)
    assert lanes is not None and lanes["qweight"] is not None and lanes["scales2"] is not None
    qweight, scales2 = lanes["qweight"].to(DEVICE), lanes["scales2"].to(DEVICE)
    sparse = [packed[suffix].to(DEVICE) for suffix in Mix64Layout.outliers] if outliers else ()
    W_KN = torch.nn.functional.pad(weight.dequantize(), (0, -k % BLOCK)).T.to(DEVICE)
    return lambda x: kernels.mix64_linear(x, qweight, scales2, sparse, n, spec.widths.count(4)), W_KN


def gptq(spec: QuantSpec, n: int, k: int, gathered: bool = False) -> tuple[Multiply, torch.Tensor]:
    """The same by a layer's matrix in the order that `order_rows` has sorted it to."""
    linear, W_KN = gptq_layer(spec, n, k, gathered)
    assert linear.g_idx is None and (linear.perm is not None) == gathered
    qweight, scales = linear.qweight.data.to(DEVICE), linear.scales.data.to(DEVICE)
    zeros = linear.layout.unpack_zeros(linear.qzeros.data, spec.bits).to(DEVICE)
    W_KN = (W_KN if linear.perm is None else W_KN[linear.perm]).to(DEVICE)
    return lambda x: kernels.gptq_linear(x, qweight, scales, zeros, None, spec.bits), W_KN


def irregular(bits: int, scale: torch.dtype, n: int = 50, k: int = 160) -> tuple[Multiply, torch.Tensor]:
    """GPTQ whose groups are in order but of any length, some of none: what a slice of a sorted matrix has."""
    generator = torch.Generator().manual_seed(bits)
    codes_KN = torch.randint(0, 1 << bits, (k, n), dtype=torch.uint8, generator=generator)
    zeros_GN = torch.randint(0, 1 << bits, (6, n), dtype=torch.uint8, generator=generator)
    scales_GN = (0.01 + 0.01 * torch.rand(6, n, generator=generator)).to(scale)
    g_idx = torch.randint(1, 5, (k,), generator=generator).sort().values
    W_KN = ((codes_KN.int() - zeros_GN[g_idx].int()) * scales_GN[g_idx].float()).to(DEVICE)
    tensors = [t.to(DEVICE) for t in (pack(codes_KN, bits, dim=0), scales_GN, zeros_GN, g_idx.int())]
    return lambda x: kernels.gptq_linear(x, *tensors, bits), W_KN


def random(m: int, k: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(m, k, generator=torch.Generator().manual_seed(m)).to(DEVICE, dtype)


def check(
    multiply: Multiply, W_KN: torch.Tensor, dtype: torch.dtype, tokens: tuple[int, ...], patch: pytest.MonkeyPatch
) -> None:
    """Identity bit for bit, and of random tokens an error at most twice torch's."""
    k, W = len(W_KN), W_KN.to(dtype)
    eye = torch.eye(k, device=DEVICE, dtype=dtype)
    some = torch.randperm(k, generator=torch.Generator().manual_seed(0))[: kernels.MOST_DECODE_TOKENS].to(DEVICE)
    assert torch.equal(multiply(eye[some]), W[some])
    for crossing in (ANY, 0):  # in the kernel, and as a matrix first
        with patch.context() as inner:
            inner.setattr(kernels, "CROSSING", crossing)
            assert torch.equal(multiply(eye), W)
    xs = [random(m, k, dtype) for m in tokens]
    exact_MN = torch.cat(xs).double() @ W_KN.double()
    torchs_MN, y_MN = torch.cat(xs) @ W, torch.cat([multiply(x) for x in xs])
    assert y_MN.dtype == dtype
    assert (y_MN.double() - exact_MN).norm() <= 2 * (torchs_MN.double() - exact_MN).norm()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("spec", "outliers"),
    [(spec, share) for spec in FRACTIONS for share in (0.0, 0.05) if 2 in spec.widths or not share],
)
def test_mix64(spec: MixSpec, outliers: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    check(*mix64(spec, 50, 190, outliers), dtype, (3, 17), monkeypatch)


@pytest.mark.parametrize(("n", "k"), [(16, 64), (5, 128), (130, 192)])
def test_sizes_of_uniform_4_bit_mix64(n: int, k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    check(*mix64(MixSpec(4, 0.0), n, k, 0.0), torch.float16, (1, 3), monkeypatch)


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq(bits: int, sym: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A matrix that is gathered, too; groups that are tiles, parts of one, neither, or all channels; N and K odd."""
    for group_size, n, k, gathered, dtype in (
        (32, 96, 160, True, torch.float32),
        (128, 32, 256, False, torch.bfloat16),
        (-1, 64, 160, False, torch.float16),
        (96, 32, 288, False, torch.float16),
    ):
        check(*gptq(QuantSpec(bits, group_size, sym), n, k, gathered), dtype, (3, 17), monkeypatch)


@pytest.mark.parametrize(("bits", "scale"), [(2, torch.float32), (3, torch.bfloat16), (8, torch.float16)], ids=str)
def test_irregular_gptq(bits: int, scale: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    for dtype in DTYPES:
        check(*irregular(bits, scale), dtype, (3,), monkeypatch)


def matrices() -> list[tuple[Multiply, torch.Tensor]]:
    return [mix64(MixSpec(), 67, 190, 0.05), gptq(QuantSpec(4, 32), 40, 96), gptq(QuantSpec(8, 20), 36, 20)]


@pytest.mark.parametrize("which", range(3))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_numbers_of_tokens(which: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    check(*matrices()[which], dtype, TOKENS, monkeypatch)


@pytest.mark.parametrize("crossing", [ANY, 0])
def test_4096_tokens(crossing: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "CROSSING", crossing)
    for multiply, W_KN in (mix64(MixSpec(), 16, 64, 0.02), gptq(QuantSpec(4, 32), 32, 64)):
        x_MK = random(4096, len(W_KN), torch.float16)
        exact_MN, torchs_MN = x_MK.double() @ W_KN.double(), x_MK @ W_KN.half()
        assert (multiply(x_MK).double() - exact_MN).norm() <= 2 * (torchs_MN.double() - exact_MN).norm()


@pytest.mark.parametrize("which", range(3))
def test_any_shape_and_stride(which: int) -> None:
    multiply, W_KN = matrices()[which]
    k, n = W_KN.shape
    x = random(6, 2 * k, torch.float32).view(2, 3, 2 * k)[..., ::2]
    assert not x.is_contiguous() and torch.equal(multiply(x), multiply(x.contiguous()))
    assert multiply(x).shape == (2, 3, n) and multiply(x[0, 0]).shape == (n,)
    assert multiply(x[:, :0]).shape == (2, 0, n)
    many = x[:, :1].expand(2, kernels.CROSSING, k)
    assert multiply(many).shape == (2, kernels.CROSSING, n)
    assert torch.equal(multiply(torch.zeros_like(x)), torch.zeros(2, 3, n, device=DEVICE))


@pytest.mark.parametrize("m", [3, 20])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_shared_along_k(dtype: torch.dtype, m: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs that share a tile's channels and outliers: every one is counted, and the same bits come twice."""
    for multiply, W_KN in (mix64(MixSpec(), 19, 704, 0.01), gptq(QuantSpec(4, 128), 24, 640)):
        x, sums = random(m, len(W_KN), dtype), []
        for count in (3, 3, 1):
            monkeypatch.setattr(kernels, "splits", lambda *_, count=count: count)
            sums.append(multiply(x))
        assert torch.equal(sums[0], sums[1])
        torchs, exact = x @ W_KN.to(dtype), x.double() @ W_KN.double()
        for found in sums:
            assert (found.double() - exact).norm() <= 2 * (torchs.double() - exact).norm()


def test_how_many_share() -> None:
    assert kernels.splits(programs=64, steps=32, processors=132) == 8
    assert kernels.splits(programs=64, steps=8, processors=132) == 2
    assert kernels.splits(programs=1000, steps=32, processors=132) == 1
    assert kernels.splits(programs=1, steps=1, processors=132) == 1


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_activation_that_is_not_finite_stays_in_its_token(value: float) -> None:
    for multiply, W_KN in matrices():
        x = random(3, len(W_KN), torch.float16)
        x[1, 3] = value
        y = multiply(x)
        assert not y[1].isfinite().any() and y[[0, 2]].isfinite().all()


@pytest.mark.skipif(DEVICE == "cuda", reason="the interpreter's loads are watched")
@pytest.mark.parametrize("processors", [1, 132])
def test_nothing_is_read_or_written_beyond_a_tensor(processors: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime import interpreter

    inside: list[tuple[int, int]] = []
    call, own = interpreter.GridExecutor.__call__, interpreter._interpreter

    def launch(executor: Any, *args: Any, **kwargs: Any) -> Any:
        tensors = [arg for arg in args if isinstance(arg, torch.Tensor)]
        inside[:] = [(t.data_ptr(), t.data_ptr() + t.numel() * t.itemsize) for t in tensors]
        return call(executor, *args, **kwargs)

    def watched(access: Callable[..., Any], mask_at: int) -> Callable[..., Any]:
        def accessed(pointers: Any, *rest: Any) -> Any:
            at = torch.from_numpy(pointers[rest[mask_at]].astype("int64"))
            assert sum(((at >= low) & (at < high)).sum() for low, high in inside) == len(at)
            return access(pointers, *rest)

        return accessed

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", launch)
    watching = {"load": watched(own.load, 0), "store": watched(own.store, 1)}
    names = {name: getattr(own, name) for name in dir(own) if not name.startswith("_")}
    monkeypatch.setattr(interpreter, "_interpreter", SimpleNamespace(**{**names, **watching}))
    monkeypatch.setattr(kernels, "processors", lambda device: processors)
    uniform = [mix64(MixSpec(4, 0.0), 5, 1088, 0.0)]
    for multiply, W_KN in (*matrices(), *uniform, irregular(3, torch.float16), gptq(QuantSpec(2, 64, False), 16, 1088)):
        for m in (1, 17, 2 * kernels.CROSSING):
            assert multiply(random(m, len(W_KN), torch.float16)).isfinite().all()


OLDER = {  # what Triton 3.6 makes otherwise than 3.9, of which the golden table is
    "sm_80 fp16 mix64-4 prefill": {"local": 8},
    "sm_90 fp16 mix64-4 decode": {"registers": 128},
    "sm_80 fp16 gptq-8 decode": {"shared": 53824},  # copies of 128 bits, where 3.9 has 32
    "sm_80 fp16 gptq-8 prefill": {"shared": 41152},
    "sm_90 fp16 gptq-8 dequantize": {"shared": 8192},
}


def compiled(*parts: str) -> None:
    """The kernels with a part in their names compile to what the golden table says, or OLDER for other versions.

    No spills; no more shared memory; registers, instructions for a weight and asynchronous loads about as many, those
    of 128 bits no fewer; tensor cores where there were some.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, Path(__file__).with_name("aot.py"), *parts],
        env={**environment, "TRITON_DEFAULT_FP_FUSION": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    golden = json.loads(Path(__file__).with_name("golden").joinpath("triton.json").read_text())
    found = json.loads(run.stdout)
    assert found and found.keys() == {name for name in golden if not parts or any(part in name for part in parts)}
    older = {} if triton.__version__.startswith("3.9.") else OLDER
    for name, facts in found.items():
        known, about = golden[name] | older.get(name, {}), f"{name}: {facts}"
        assert facts["local"] <= known["local"], about
        assert facts["shared"] <= known["shared"] <= (163 if "sm_80" in name else 227) * 1024, about
        assert facts["registers"] <= 1.25 * known["registers"] + 16, about
        assert facts.get("per_weight", 0) <= 1.25 * known.get("per_weight", 0), about
        assert facts["cp_async"] <= 1.5 * known["cp_async"] and facts["cp_async_128"] >= known["cp_async_128"], about
        assert all((facts[kind] > 0) == (known[kind] > 0) for kind in ("mma", "wgmma")), about
        assert "decode" not in name or facts["cp_async_128"] > 0 and (facts["mma"] > 0 or "fp32" in name), about


def test_what_the_kernels_compile_to() -> None:
    """Both layouts and cards, all dtypes, decode, prefill and dequantize; what is unlike the others among them."""
    compiled(
        "sm_80 fp16 gptq-4 decode", "sm_80 fp16 gptq-8 decode", "sm_80 fp16 mix64-1 dequantize",
        "sm_80 fp16 mix64-4 prefill", "sm_80 bf16 mix64-1 decode", "sm_80 fp32 mix64-1 decode",
        "sm_90 fp16 gptq-4-irregular decode", "sm_90 fp16 gptq-3 prefill", "sm_90 fp16 mix64-1-outliers",
        "sm_90 bf16 gptq-4", "sm_90 bf16 mix64-1 prefill", "sm_90 bf16 sum",
    )  # fmt: skip


@pytest.mark.slow
def test_what_all_kernels_compile_to() -> None:
    compiled()
