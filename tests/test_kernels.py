"""Every kernel against the dequantized matrix, on the layers that use it."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bitshard import kernels
from bitshard.errors import SpecError
from bitshard.kernels import choose, cpu, decode
from bitshard.kernels.fuse import FuseLinears
from bitshard.layout import GptqLayout, Mix64Layout
from bitshard.nn import (
    Mix64Linear,
    PackedLinear,
    QuantLinear,
    eight_bit,
    fits_eight_bit,
    fits_one_call,
    hoist_gather,
    side_by_side,
)
from bitshard.quantized import QuantizedWeight
from bitshard.records import why_not_read
from bitshard.spec import MixSpec, QuantSpec, codes_per_pack
from factory import random_mixed_weight

pytestmark = [
    pytest.mark.skipif(cpu.library() is None, reason="the C kernels were not built"),
    pytest.mark.usefixtures("poisoned"),
]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SETS = range(cpu.instruction_set() + 1 if cpu.library() is not None else 0)
MIXED = [
    (spec, n, k, outliers)
    for spec in (*(MixSpec(2, fraction) for fraction in (0.0, 0.25, 0.5, 1.0)), MixSpec(4, 0.0))
    for n, k in ((67, 90), (16, 64), (5, 192), (192, 576))
    for outliers in ((0.0, 0.05) if 2 in spec.widths else (0.0,))
]
GPTQ = [
    (QuantSpec(bits, group_size, sym), n, k)
    for bits in (2, 3, 4, 8)
    for sym in (True, False)
    for group_size, n, k in (
        (32, 32, 96),
        (128, 96, 384),
        (-1, 64, 160),
        (96, 160, 288),
        (64, codes_per_pack(bits), 64),
    )
]


@pytest.fixture(params=SETS, ids=lambda i: cpu.INSTRUCTION_SETS[i])
def instructions(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "instruction_set", lambda: request.param)


def mixed(spec: MixSpec, n: int, k: int, outliers: float) -> tuple[Mix64Linear, torch.Tensor]:
    """A layer in which a strip order goes with outliers, and its matrix [K, N]."""
    generator = torch.Generator().manual_seed(n)
    weight = random_mixed_weight(n, k, spec, generator, outliers=outliers, ordered=not outliers)
    linear = Mix64Linear(k, n, spec)
    linear.replace(**Mix64Layout().pack(weight))
    return linear, weight.dequantize().T


def gptq(spec: QuantSpec, n: int, k: int, gathered: bool = False) -> tuple[QuantLinear, torch.Tensor]:
    generator, groups = torch.Generator().manual_seed(n), k // spec.group(k)
    codes_KN = torch.randint(0, spec.max_code + 1, (k, n), dtype=torch.uint8, generator=generator)
    zeros_GN = torch.full((groups, n), 1 << (spec.bits - 1), dtype=torch.uint8)
    if not spec.sym:
        zeros_GN = torch.randint(1, spec.max_code + 1, (groups, n), dtype=torch.uint8, generator=generator)
    scales_GN = (0.01 + 0.01 * torch.rand(groups, n, generator=generator)).half()
    g_idx_K = torch.arange(k, dtype=torch.int32) // spec.group(k)
    if gathered:
        g_idx_K = g_idx_K[torch.randperm(k, generator=generator)]
    weight, layout = QuantizedWeight(spec, codes_KN, scales_GN, zeros_GN, g_idx_K), GptqLayout(1 if spec.sym else 2)
    linear = QuantLinear(k, n, spec, layout, False, torch.float32)
    linear.replace(**layout.pack(weight))
    linear.order_rows()
    return linear, weight.dequantize()


def check(linear: PackedLinear, W_KN: torch.Tensor, dtype: torch.dtype, tokens: tuple[int, ...]) -> None:
    """Identity bit for bit, and of random tokens an error at most twice torch's; int8 within half a step of each x,
    and where activations are whole steps as near as torch.
    """
    k, n = W_KN.shape
    linear.arrange()
    x_MK = torch.randn(sum(tokens), k, generator=torch.Generator().manual_seed(n)).to(dtype)
    exact_MN, torchs_MN = x_MK.double() @ W_KN.double(), x_MK @ W_KN.to(dtype)
    for linear.backend in ("cpu", "reference"):
        assert torch.equal(linear(torch.eye(k, dtype=dtype)), W_KN.to(dtype))
        y_MN = torch.cat([linear(x) for x in x_MK.split(tokens)])
        assert y_MN.dtype == dtype
        assert (y_MN.double() - exact_MN).norm() <= 2 * (torchs_MN.double() - exact_MN).norm()
    linear.backend = "cpu-int8"
    y_MN = torch.cat([linear(x) for x in x_MK.split(tokens)])
    # a block's step is a 127th of its largest x, and no block has a larger one than its token
    most_MN = x_MK.double().abs().amax(1, keepdim=True) / 254 * W_KN.double().abs().sum(0)
    assert ((y_MN - exact_MN).abs() <= most_MN + torch.finfo(dtype).eps * exact_MN.abs() + 1e-6).all()
    assert (y_MN - exact_MN).norm() < 0.01 * (x_MK.double().norm(dim=1)[:, None] * W_KN.double().norm(dim=0)).norm()
    x_MK = x_MK.mul(50).round().clamp(-126, 126)
    x_MK[:, ::16] = 127  # in every block, of which an 8-bit step then is 1
    exact_MN, torchs_MN = x_MK.double() @ W_KN.double(), x_MK @ W_KN.to(dtype)
    y_MN = torch.cat([linear(x) for x in x_MK.split(tokens)])
    assert (y_MN.double() - exact_MN).norm() <= 2 * (torchs_MN.double() - exact_MN).norm()


@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("spec", "n", "k", "outliers"), MIXED, ids=str)
def test_mix64(spec: MixSpec, n: int, k: int, outliers: float, dtype: torch.dtype) -> None:
    check(*mixed(spec, n, k, outliers), dtype, (1, 3, 12, 13, 70))


@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("spec", "n", "k"), GPTQ, ids=str)
def test_gptq(spec: QuantSpec, n: int, k: int, dtype: torch.dtype) -> None:
    check(*gptq(spec, n, k), dtype, (1, 3, 12, 13, 70))


@pytest.mark.usefixtures("instructions")
def test_scales_below_float16s_normal_numbers() -> None:
    linear, _ = mixed(MixSpec(), 67, 90, 0.0)
    linear.replace(scales2=linear.scales2.data / 4096)
    tensors = {name: parameter.data for name, parameter in linear.named_parameters()}
    weight = Mix64Layout().decode(tensors, linear.spec, 90)
    assert 0 < weight.scales().max() < 2.0**-14
    linear.arrange()
    assert torch.equal(linear(torch.eye(90)), weight.dequantize().T)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gathered_gptq(bits: int, sym: bool, dtype: torch.dtype) -> None:
    check(*gptq(QuantSpec(bits, 32, sym), 64, 128, gathered=True), dtype, (1, 5))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_4096_tokens(dtype: torch.dtype) -> None:
    for linear, W_KN in (mixed(MixSpec(), 67, 190, 0.05), gptq(QuantSpec(4, 32), 80, 128)):
        check(linear, W_KN, dtype, (4096,))


def layers() -> list[tuple[PackedLinear, torch.Tensor]]:
    return [mixed(MixSpec(), 67, 90, 0.05), gptq(QuantSpec(4, 32), 64, 96)]


@pytest.mark.parametrize("which", [0, 1])
def test_many_tokens_are_the_same_tokens_one_by_one(which: int) -> None:
    """More than a panel, by every number of threads."""
    linear, W_KN = layers()[which]
    linear.arrange()
    x_MK, threads = torch.randn(131, len(W_KN), generator=torch.Generator().manual_seed(0)), torch.get_num_threads()
    for linear.backend in ("cpu", "cpu-int8"):
        one_by_one = torch.cat([linear(x[None]) for x in x_MK])
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found = linear(x_MK)
            torch.set_num_threads(threads)
            torch.testing.assert_close(found, one_by_one, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("backend", ["cpu", "cpu-int8", "reference"])
def test_any_shape_and_stride(which: int, backend: str) -> None:
    linear, W_KN = layers()[which]
    linear.arrange()
    linear.backend = backend
    k, n = W_KN.shape
    x = torch.randn(2, 3, 2 * k, generator=torch.Generator().manual_seed(0))[..., ::2]
    assert not x.is_contiguous() and torch.equal(linear(x), linear(x.contiguous()))
    assert linear(x[:, :0]).shape == (2, 0, n) and linear(x[0, 0]).shape == (n,)
    assert torch.equal(linear(torch.zeros(1, k)), torch.zeros(1, n))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("backend", ["cpu", "cpu-int8"])
def test_an_activation_that_is_not_finite_is_not_hidden(backend: str, value: float) -> None:
    for linear, W_KN in layers():
        linear.arrange()
        linear.backend = backend
        x = torch.randn(2, len(W_KN))
        x[0, 3] = value
        assert not linear(x)[0].isfinite().any() and linear(x)[1].isfinite().all()


@pytest.mark.usefixtures("instructions")
def test_activations_next_to_nothing() -> None:
    """So small that the reciprocal of a step would be infinite: they come out as nothing, and no NaN."""
    for linear, W_KN in layers():
        linear.arrange()
        linear.backend = "cpu-int8"
        for value in (1e-44, 1e-40, 1e-37):
            y_MN = linear(torch.full((2, len(W_KN)), value))
            assert y_MN.isfinite().all() and (y_MN.abs() <= value * W_KN.abs().sum(0) * 1.01).all()


def test_a_gather_is_shared_only_by_all() -> None:
    """Not with a matrix that has another, or none."""
    one, same, _ = (gptq(QuantSpec(4, 32), 64, 96, gathered=True)[0] for _ in range(3))
    plain, other = gptq(QuantSpec(4, 32), 64, 96)[0], gptq(QuantSpec(4, 32), 32, 96, gathered=True)[0]
    for linears in ([one, plain], [plain, one], [one, other], [one, mixed(MixSpec(), 16, 96, 0.0)[0]], [plain, plain]):
        perms = [getattr(linear, "perm", None) for linear in linears]
        assert hoist_gather(linears) is None
        assert all(getattr(linear, "perm", None) is perm for linear, perm in zip(linears, perms, strict=True))
    perm = one.perm
    assert perm is not None and hoist_gather([one, same]) is perm and one.perm is same.perm is None


def test_the_reference_reads_grouped_rows_too() -> None:
    for linear, W_KN in layers():
        eye = torch.eye(len(W_KN))
        assert torch.equal(linear(eye), W_KN)
        linear.arrange()
        linear.backend = "reference"
        assert torch.equal(linear(eye), W_KN)


def test_what_the_kernels_cannot_read_stays_as_it_is() -> None:
    for linear, W_KN in (
        mixed(MixSpec(3, 0.0), 67, 90, 0.0),
        mixed(MixSpec(2, 0.25, "paper"), 67, 90, 0.0),
        gptq(QuantSpec(4, 8), 64, 96),
        gptq(QuantSpec(3, 48), 64, 96),
    ):
        before = linear.qweight.data
        linear.arrange()
        assert linear.qweight.data.data_ptr() == before.data_ptr() or torch.equal(linear.qweight.data, before)
        assert torch.equal(linear(torch.eye(len(W_KN))), W_KN)


def test_a_dense_layer_in_eight_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a step of each group of 64 at most, from unit tokens, however many rows at once; a bias is kept."""
    monkeypatch.setattr("bitshard.nn.AT_ONCE", 16)
    dense = torch.nn.Linear(128, 50)
    W_NK, linear = dense.weight.detach().clone(), eight_bit(dense.weight, dense.bias)
    linear.backend = "cpu"
    assert eight_bit(dense.weight).backend == "auto"
    assert fits_eight_bit(W_NK) and not fits_eight_bit(W_NK[:, :100]) and not fits_eight_bit(W_NK.to("meta"))
    found_NK = (linear(torch.eye(128)) - dense.bias).T.detach()
    most_NG1 = W_NK.view(50, 2, 64).abs().amax(2, keepdim=True)
    assert ((found_NK - W_NK).view(50, 2, 64).abs() <= most_NG1 / 254 + 1e-7).all()


@pytest.mark.parametrize("default", [torch.float16, torch.bfloat16])
def test_the_default_dtype_changes_no_scale(default: torch.dtype) -> None:
    """vLLM finishes loading under that of the model; in float16 the scales of small weights would be subnormal."""
    dense = 1e-5 * torch.randn(50, 128)
    before = torch.get_default_dtype()
    expected = eight_bit(dense)
    try:
        torch.set_default_dtype(default)
        found = eight_bit(dense)
    finally:
        torch.set_default_dtype(before)
    for name, tensor in expected.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor) and found.state_dict()[name].dtype == tensor.dtype, name


def test_the_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    half, single = torch.float16, torch.float32
    assert choose("mix64", "cpu", half, 1, "auto") == choose("gptq", "cpu", single, 4096, "auto") == "cpu-int8"
    assert choose("mix64", "cpu", half, 4096, "exact") == choose("gptq", "cpu", half, 1, "exact") == "cpu"
    assert choose("mix64", "file", half, 1, "auto") == choose("gptq", "cpu", half, 1, "reference") == "reference"
    assert choose("mix64", "cpu", torch.float64, 1, "auto") == "reference"
    with pytest.raises(
        SpecError, match="input: found int8; allowed: float16, bfloat16, float32, float64; to do: convert"
    ):
        choose("mix64", "cpu", torch.int8, 1, "exact")
    with pytest.raises(SpecError, match="found 'gpu'; allowed: exact, auto, cpu-int8, cpu, decode, triton, reference"):
        choose("mix64", "cpu", half, 1, "gpu")
    with pytest.raises(SpecError, match="cpu for mix64 weights as the file has them, float16 activations"):
        choose("mix64", "file", half, 1, "cpu")
    with pytest.raises(SpecError, match="decode for mix64 weights on a processor.*an NVIDIA GPU is needed"):
        choose("mix64", "cpu", half, 1, "decode")
    with pytest.raises(SpecError, match="decode for gptq weights on a processor.*; to do: choose one of these"):
        choose("gptq", "cpu", half, 1, "decode")


@pytest.fixture
def a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Kernels as if there were a GPU that runs them all."""
    found = tuple(replace(kernel, missing=lambda: "") for kernel in kernels.KERNELS)
    monkeypatch.setattr(kernels, "KERNELS", found)
    choose.cache_clear()
    yield
    choose.cache_clear()


@pytest.mark.usefixtures("a_gpu")
@pytest.mark.parametrize("backend", ["exact", "auto"])
def test_the_choice_on_a_gpu(backend: str) -> None:
    half, most = torch.bfloat16, decode.MOST_TOKENS
    assert choose("mix64", "gpu", half, most, backend) == "decode"
    assert choose("mix64", "gpu", half, most + 1, backend) == "triton"
    assert choose("mix64", "gpu", torch.float32, 1, backend) == choose("gptq", "gpu", half, 1, backend) == "triton"
    assert choose("mix64", "gpu", half, most + 1, "decode") == "decode"
    assert choose("mix64", "file", half, 1, backend) == "reference"
    with pytest.raises(SpecError, match="decode for gptq weights on a GPU, bfloat16 activations"):
        choose("gptq", "gpu", half, 1, "decode")


def test_without_triton_gptq_stays_as_it_is_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """decode, which needs no Triton, reads `mix64` alone."""
    monkeypatch.setattr(kernels, "why_not_triton", lambda: "install triton")
    for missing, whys in (("", ("", "install triton")), ("no GPU", ("install triton", "install triton"))):
        monkeypatch.setattr(decode, "missing", lambda missing=missing: missing)
        assert tuple(kernels.why_not_arranged("cuda", layout) for layout in ("mix64", "gptq")) == whys


def test_without_the_library_the_reference_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "library", lambda: None)
    linear, W_KN = layers()[0]
    linear.arrange()
    assert linear.arrangement == "file" and torch.equal(linear(torch.eye(len(W_KN))), W_KN)
    choose.cache_clear()
    with pytest.raises(SpecError, match="install bitshard again, where there is a C compiler"):
        choose("mix64", "cpu", torch.float32, 1, "cpu")
    choose.cache_clear()


def test_compiled_without_a_break() -> None:
    for linear, W_KN in layers():
        linear.arrange()
        x = torch.randn(3, len(W_KN))
        assert torch.equal(torch.compile(linear, fullgraph=True, backend="eager")(x), linear(x))


@pytest.mark.parametrize(
    ("tokens", "backend"), [(1, "auto"), (13, "auto"), (70, "auto"), (70, "exact"), (3, "reference")]
)
def test_matrices_that_read_the_same_become_one_call(
    tokens: int, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of different rows, fractions and outliers: those without in one call, those with in another. Bit for bit."""
    linears = [
        mixed(MixSpec(2, fraction), n, 128, outliers)[0]
        for fraction, n, outliers in ((0.25, 67, 0.0), (1.0, 16, 0.0), (0.0, 80, 0.05), (0.25, 5, 0.05), (0.5, 33, 0.0))
    ]
    for linear in linears:
        linear.backend, linear.strip_order = backend, None  # which gathers an input of its own
        linear.arrange()
    x, W_KN, calls = torch.randn(tokens, 128), torch.randn(128, 67), list[int]()

    def compute(x: torch.Tensor) -> list[torch.Tensor]:  # the last one is what inductor's own passes look at
        return [*(linear(x) for linear in linears), linears[0](x + 1), linears[0](x) + torch.mm(x, W_KN)]

    expected, found = compute(x), cpu.array_of
    monkeypatch.setattr(cpu, "array_of", lambda *weights: calls.append(len(weights)) or found(*weights))  # type: ignore[func-returns-value]
    together = torch.compile(compute, fullgraph=True, options={"post_grad_custom_pre_pass": FuseLinears()})
    with torch.no_grad():
        *outputs, last = together(x)
    assert all(map(torch.equal, outputs, expected)) and torch.allclose(last, expected[-1], rtol=1e-4, atol=1e-4)
    assert sorted(calls) == ([] if backend == "reference" else [1, 2, 4])
    torch.compiler.reset()


def test_matrices_of_two_backends_are_two_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    exact, rounded = (mixed(MixSpec(), 32, 128, 0.0)[0] for _ in range(2))
    for linear, linear.backend in ((exact, "exact"), (rounded, "auto")):
        linear.strip_order = None
        linear.arrange()
    x = torch.randn(3, 128)
    together = torch.compile(
        lambda x: (exact(x), rounded(x)), fullgraph=True, options={"post_grad_custom_pre_pass": FuseLinears()}
    )
    with torch.no_grad():
        assert all(map(torch.equal, together(x), (exact(x), rounded(x))))
    torch.compiler.reset()


@pytest.mark.parametrize("outliers", [0.0, 0.05])
@pytest.mark.parametrize("backend", ["auto", "exact"])
def test_side_by_side(backend: str, outliers: float) -> None:
    """Bit for bit what each makes alone."""
    parts = [mixed(MixSpec(2, f), n, 128, outliers)[0] for f, n in ((0.25, 67), (1.0, 16), (0.5, 33))]
    for part in parts:
        part.backend, part.strip_order = backend, None
        part.arrange()
    x = torch.randn(2, 5, 128)
    assert fits_one_call(parts)
    assert torch.equal(side_by_side(parts, x), torch.cat([part(x) for part in parts], -1))
    with pytest.raises(SpecError, match="input: found 64 channels; allowed: 128"):
        side_by_side(parts, x[..., :64])


def test_what_has_to_be_called_alone() -> None:
    def arranged(spec: MixSpec, k: int, outliers: float = 0.0, gathers: bool = False) -> Mix64Linear:
        linear, _ = mixed(spec, 48, k, outliers)
        linear.strip_order = linear.strip_order if gathers else None
        linear.arrange()
        return linear

    plain, sparse = arranged(MixSpec(), 128), arranged(MixSpec(), 128, 0.05)
    in_eight_bits, as_in_the_file = arranged(MixSpec(bits=8, fraction_4bit=0.0), 128), mixed(MixSpec(), 48, 128, 0.0)[0]
    gathers, filled = arranged(MixSpec(), 128, 0.05, gathers=True), arranged(MixSpec(), 96)
    assert fits_one_call([plain, plain]) and fits_one_call([sparse, sparse]) and not fits_one_call([plain])
    for one, other in ((plain, sparse), (plain, in_eight_bits), (plain, as_in_the_file), (sparse, gathers)):
        assert not fits_one_call([one, other]) and not fits_one_call([other, one])
    assert not fits_one_call([filled, filled])


def test_several_at_once_are_as_many_of_everything() -> None:
    own = torch.zeros(1)
    for scales2, outliers, rows in (([own], [], [16, 16]), ([own] * 2, [own] * 3, [16, 16]), ([own] * 2, [], [16])):
        with pytest.raises(ValueError):
            kernels.mix64_linears(torch.zeros(1, 64), [own] * 2, scales2, outliers, rows, [1, 1], "auto")
    with pytest.raises(ValueError, match="no weights"):
        kernels.mix64_linears(torch.zeros(1, 64), [], [], [], [], [], "auto")


def test_what_another_version_built_is_not_called(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "FUNCTIONS", {"bitshard_of_tomorrow": ()})
    cpu.library.cache_clear()
    assert cpu.missing() == "install bitshard again, where there is a C compiler"
    monkeypatch.undo()
    cpu.library.cache_clear()
    assert not cpu.missing()


def test_what_cannot_be_opened_is_not_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Half a file, or another processor's."""
    (tmp_path / "_linear.abi3.so").write_bytes(b"x")
    monkeypatch.setattr(cpu, "__file__", str(tmp_path / "cpu.py"))
    cpu.library.cache_clear()
    assert cpu.missing() == "install bitshard again, where there is a C compiler"
    monkeypatch.undo()
    cpu.library.cache_clear()
    assert not cpu.missing()


def test_one_thread_pool() -> None:
    """The kernels' OpenMP is torch's own, so that no second pool of threads competes with it."""
    code = "from bitshard.kernels import cpu; cpu.library(); print(open('/proc/self/maps').read())"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert len({line.split()[-1] for line in found.splitlines() if "libgomp" in line}) == 1


def test_what_kernels_read_is_known_without_the_weights() -> None:
    specs = [QuantSpec(bits, group_size) for bits in (2, 3, 4, 8) for group_size in (8, 16, 32, -1)]
    for linear, _ in (
        *(gptq(spec, 64, 96) for spec in specs),
        *(mixed(MixSpec(bits, 0.0), 16, 64, 0.0) for bits in (2, 3, 4, 8)),
        mixed(MixSpec(2, 0.25, "paper"), 16, 64, 0.0),
    ):
        assert isinstance(linear, QuantLinear | Mix64Linear)
        linear.arrange()
        why = why_not_read(linear.spec, linear.in_features, "cpu")
        assert (linear.arrangement == "cpu") == (not why) == (linear.kernel(torch.float32, 1) != "reference")


@pytest.mark.parametrize("arranged", [False, True])
def test_an_input_of_another_width_is_refused(arranged: bool) -> None:
    """Narrower or wider, by less than a block or more, whatever the layout; no kernel reads what is not there."""
    for linear, W_KN in (*layers(), gptq(QuantSpec(3, 32), 64, 96), gptq(QuantSpec(8, -1), 64, 96)):
        if arranged:
            linear.arrange()
        k = len(W_KN)
        for width in (0, 1, k - 64, k - 1, k + 1, k + 38, 2 * k):
            with pytest.raises(SpecError, match=rf"input: found {width} channels; allowed: {k}, as this"):
                linear(torch.zeros(2, width))
        with pytest.raises(SpecError, match=rf"input: found a single number; allowed: {k}, as this"):
            linear(torch.tensor(1.0))


def test_weights_and_input_are_on_one_device() -> None:
    """Of devices only one may be here: the check is of what is said of them."""
    for arrangement, x, weight in (
        ("file", "cpu", "meta"),
        ("cpu", "meta", "meta"),
        ("gpu", "cpu", "cpu"),
        ("gpu", "cpu", "meta"),
    ):
        with pytest.raises(SpecError, match=f"input: found one on {x}, with weights on {weight}"):
            kernels._require_device(torch.zeros(1, device=x), torch.zeros(1, device=weight), arrangement)  # type: ignore[arg-type]


def test_weights_that_are_not_there_make_nothing() -> None:
    """On the meta device, where torch asks for a result's shape alone."""
    for linear, W_KN in layers():
        linear.arrange()
        linear.to("meta")
        assert linear(torch.zeros(2, len(W_KN), device="meta")).shape == (2, W_KN.shape[1])
        with pytest.raises(SpecError, match="input: found one on cpu, with weights on meta"):
            linear(torch.ones(1, len(W_KN)))
    parts = [mixed(MixSpec(), n, 128, 0.0)[0].to("meta") for n in (16, 32)]
    with pytest.raises(SpecError, match="input: found one on cpu, with weights on meta"):
        side_by_side(parts, torch.ones(1, 128))


@pytest.mark.parametrize("op", ["gptq_linear", "mix64_linear"])
def test_plain_torch_runs_on_devices_that_have_no_kernels(op: str) -> None:
    for device in ("CPU", "CUDA", "MPS", "XPU"):
        assert torch._C._dispatch_has_computed_kernel_for_dispatch_key(f"bitshard::{op}", device)


def test_arranged_once() -> None:
    for linear, W_KN in layers():
        linear.arrange()
        linear.arrange()
        assert torch.equal(linear(torch.eye(len(W_KN))), W_KN)


def test_another_kernel_than_the_one_meant_is_reported_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    found = tuple(
        replace(kernel, missing=lambda why="no NVRTC" * (kernel.name == "decode"): why) for kernel in kernels.KERNELS
    )
    monkeypatch.setattr(kernels, "KERNELS", found)
    said = list[logging.LogRecord]()
    for cached in (kernels._report, kernels._to_run, choose):
        cached.cache_clear()
    for tokens in (1, 2):
        for case, runs in (
            (("mix64", "gpu", torch.float16, tokens, "exact"), "triton"),
            (("gptq", "gpu", torch.float16, tokens, "exact"), "triton"),
            (("mix64", "cpu", torch.float64, tokens, "auto"), "reference"),
            (("mix64", "cpu", torch.float32, tokens, "reference"), "reference"),
            (("mix64", "file", torch.float32, tokens, "auto"), "reference"),  # reported by name when loaded
        ):
            assert choose(*case) == runs
            assert tokens == 2 or len(caplog.records) == len(said)  # whoever only asks is told nothing
            assert kernels._to_run(*case) == runs
            said = list(caplog.records)
    assert [record.message for record in said] == [
        "triton runs instead of decode: no NVRTC",
        "plain torch runs mix64 for float64 activations, which no other kernel takes",
    ]
    for cached in (kernels._to_run, choose):
        cached.cache_clear()
