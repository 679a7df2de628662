"""What `bench kernels` measures: our kernels on random weights, torch, and other programs where they are installed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from math import inf
from typing import Any

import torch
import torch.nn.functional as F

from bitshard.bench import ggml
from bitshard.bench.gpu_peers import peers
from bitshard.bench.timing import Call
from bitshard.kernels import cpu, decode
from bitshard.kernels.reference import dequantize
from bitshard.layout import GptqLayout, Mix64Layout
from bitshard.nn import Mix64Linear, PackedLinear, QuantLinear
from bitshard.spec import MixSpec, QuantSpec

DEFAULT = MixSpec()
CPU, GPU = torch.device("cpu"), torch.device("cuda")
STREAMED = 256 << 20  # bytes: eight times this machine's largest cache
MOST_COPIES = 64
OUTLIERS = 0.002  # of a matrix that has some: the least of the paper's
CHECKED_ROWS = 64  # whose outputs are compared before anything is timed
MOST_ERROR = {  # by what is rounded; some peers keep sums in float16 too
    "float32": 1e-5, "float16": 2e-3, "bfloat16": 0.02, "int8": 0.02, "q2_K": 0.02, "peer": 5e-3,
}  # fmt: skip


@dataclass(frozen=True)
class Contender:
    """prepare(x, threads): a call for each copy of the matrix, and the first one's output once it has been called.

    rounds: key of MOST_ERROR. W_RK: the rows of the matrix that are checked. most_tokens: with which it is measured.
    """

    name: str
    rounds: str
    nbytes: int
    W_RK: torch.Tensor
    prepare: Callable[[torch.Tensor, int], tuple[list[Call], Callable[[], torch.Tensor]]]
    most_tokens: float = inf

    @property
    def most_error(self) -> float:
        return MOST_ERROR[self.rounds]


Contenders = tuple[list[Contender], dict[str, str]]  # and why there are not more, by name and shape


def of_processor(n: int, k: int) -> Contenders:
    found, both = [], (("cpu-int8", "int8"), ("cpu", "float32"))
    for name, (linear, W_RK), backends in (
        ("mix64", _random_mix64(n, k), both),
        (f"mix64, {OUTLIERS:.1%} outliers,", _random_mix64(n, k, outliers=OUTLIERS), both[:1]),
        ("mix64, 2-bit strips alone,", _random_mix64(n, k, spec=MixSpec(2, 0.0)), both[:1]),  # fewer bits than q2_K's
        ("gptq 4-bit", _random_gptq(n, k), both),
    ):
        nbytes, copies = _copied(linear)
        for backend, rounds in backends:
            found.append(Contender(f"{name} {backend}", rounds, nbytes, W_RK, partial(_packed, copies, backend)))
        if name == "mix64":
            found.append(Contender("mix64 C call", "int8", nbytes, W_RK, partial(_c_call, copies)))
    W_NK = torch.randn(n, k)
    for dtype in (torch.float32, torch.bfloat16):
        weight, rounds = W_NK.to(dtype), str(dtype).removeprefix("torch.")
        dense = [weight, *(weight.clone() for _ in range(_more(weight.nbytes)))]
        rows = weight[:CHECKED_ROWS].float()
        found.append(Contender(f"torch {rounds}", rounds, weight.nbytes, rows, partial(_dense, dense)))
    if ggml.libraries() is not None and k % ggml.BLOCK == 0:
        q2 = ggml.Q2Linear(W_NK, 1 + _more(n * k // ggml.BLOCK * ggml.BLOCK_BYTES))
        rows = q2.dequantize()[:CHECKED_ROWS]
        found.append(Contender("ggml q2_K", "q2_K", q2.nbytes, rows, partial(_ggml, q2)))
    return found, {}


def of_gpu(n: int, k: int) -> Contenders:
    """Each kernel, the decode kernel with each asynchronous part switched off, torch in float16, other programs'."""
    found, refused, device = [], dict[str, str](), GPU
    for name, (linear, W_RK), backends in (
        ("mix64", _random_mix64(n, k, device), ("decode", "triton")),
        (f"mix64, {OUTLIERS:.1%} outliers,", _random_mix64(n, k, device, OUTLIERS), ("decode",)),
        ("gptq 4-bit", _random_gptq(n, k, device), ("triton",)),
    ):
        nbytes, copies = _copied(linear)
        for backend in backends:
            found.append(Contender(f"{name} {backend}", "float16", nbytes, W_RK, partial(_packed, copies, backend)))
        if name == "mix64":
            for what, how, most in (("no ring", {"stages": 1}, inf), ("no prefetch of x", {"prefetch": 0}, 8)):
                found.append(
                    Contender(f"{name} decode, {what}", "float16", nbytes, W_RK, partial(_decode, copies, how), most)
                )
    weight = torch.randn(n, k, dtype=torch.float16, device=device)
    dense = [weight, *(weight.clone() for _ in range(_more(weight.nbytes)))]
    rows = weight[:CHECKED_ROWS].float()
    found.append(Contender("torch float16", "float16", weight.nbytes, rows, partial(_dense, dense)))
    for name, quantized in peers(weight, CHECKED_ROWS):
        try:
            peer = quantized()
            others = [peer.copy() for _ in range(1 + _more(peer.nbytes))]
        except Exception as error:  # other people's programs raise anything
            refused[f"{name}, {n}x{k}"] = said(error)
        else:
            found.append(Contender(name, "peer", peer.nbytes, peer.W_RK, partial(_peer, others)))
    return found, refused


def _more(nbytes: int) -> int:
    return min(STREAMED // nbytes, MOST_COPIES - 1)


def said(error: Exception) -> str:
    """In one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def _copied(linear: PackedLinear) -> tuple[int, list[PackedLinear]]:
    """Its bytes, and as many of it as are not in a cache when their turn comes."""
    nbytes = sum(p.nbytes for p in linear.parameters())
    return nbytes, [linear, *(deepcopy(linear) for _ in range(_more(nbytes)))]


def _decode(copies: Sequence[PackedLinear], how: dict[str, int], x_MK: torch.Tensor, threads: int) -> Any:
    """The decode kernel as a variant that the layer never asks for."""

    def multiply(linear: PackedLinear) -> torch.Tensor:
        scales2 = linear.get_parameter("scales2")
        return decode.mix64_linear(x_MK, linear.qweight, scales2, (), linear.rows, DEFAULT.widths.count(4), **how)

    return [partial(multiply, linear) for linear in copies], partial(multiply, copies[0])


def _packed(copies: Sequence[PackedLinear], backend: str, x_MK: torch.Tensor, threads: int) -> Any:
    def multiply(linear: PackedLinear) -> torch.Tensor:
        linear.backend = backend
        y_MN: torch.Tensor = linear(x_MK)
        return y_MN

    return [partial(multiply, linear) for linear in copies], partial(multiply, copies[0])


def _c_call(copies: Sequence[PackedLinear], x_MK: torch.Tensor, threads: int) -> Any:
    """`cpu-int8` as ggml's kernel is called, without a layer and torch's dispatcher around it."""
    library, y_MN = cpu.library(), x_MK.new_empty(len(x_MK), copies[0].rows)
    assert library is not None

    def multiply(weight: Any) -> None:
        how = 1, True, cpu.instruction_set(), threads
        library.bitshard_mix64_side_by_side(x_MK.data_ptr(), y_MN.data_ptr(), len(x_MK), weight, *how)

    wide = DEFAULT.widths.count(4)
    fields = (cpu.mix64_fields(x_MK, c.qweight, c.get_parameter("scales2"), (), c.rows, wide) for c in copies)
    return [partial(multiply, cpu.array_of(weight)) for weight in fields], lambda: y_MN


def _peer(copies: Sequence[Callable[[torch.Tensor], torch.Tensor]], x_MK: torch.Tensor, threads: int) -> Any:
    calls = [partial(multiply, x_MK) for multiply in copies]
    return calls, calls[0]


def _dense(copies: list[torch.Tensor], x_MK: torch.Tensor, threads: int) -> Any:
    calls = [partial(F.linear, x_MK.to(weight.dtype), weight) for weight in copies]
    return calls, calls[0]


def _ggml(linear: ggml.Q2Linear, x_MK: torch.Tensor, threads: int) -> Any:
    calls, y_MN = linear.prepare(x_MK, threads)
    return calls, lambda: y_MN


def _random_mix64(
    n: int, k: int, device: torch.device = CPU, outliers: float = 0.0, spec: MixSpec = DEFAULT
) -> tuple[Mix64Linear, torch.Tensor]:
    """A layer of random codes, and its first rows. outliers: their share, as many in each row."""
    layout, generator = Mix64Layout(), torch.Generator(device).manual_seed(0)
    blocks, tiles = spec.blocks(k), spec.tiles(n)

    def integers(dtype: torch.dtype, *shape: int) -> torch.Tensor:
        bounds = torch.iinfo(dtype)
        return torch.randint(bounds.min, bounds.max + 1, shape, dtype=dtype, generator=generator, device=device)

    tensors = {
        "qweight": integers(torch.int32, n, 4 * blocks),
        **({"qextra": integers(torch.int32, n, blocks * spec.extra_words)} if spec.extra_words else {}),
        "qscales": integers(torch.int16, n, blocks),
        "qzeros": integers(torch.uint8, n, blocks),
        "scales2": (torch.rand(tiles, 4 * blocks, 2, generator=generator, device=device) * 1e-3).half(),
    }
    if outliers:
        count = max(1, round(k * outliers))
        apart_NC = torch.randint(k // count, (n, count), generator=generator, device=device)
        columns_NC = apart_NC + k // count * torch.arange(count, device=device)
        tensors["outlier_rows"] = count * torch.arange(n + 1, dtype=torch.int32, device=device)
        tensors["outlier_columns"] = columns_NC.flatten().to(Mix64Layout.dtypes["outlier_columns"])
        tensors["outlier_values"] = torch.randn(n * count, generator=generator, device=device).mul_(0.05).half()
    linear = Mix64Linear(k, n, spec)
    linear.replace(**tensors)
    linear.arrange()
    rows = layout.cut_columns(tensors, spec, [(0, min(n, CHECKED_ROWS))])
    return linear, layout.decode(rows, spec, k).dequantize()


def _random_gptq(n: int, k: int, device: torch.device = CPU) -> tuple[QuantLinear, torch.Tensor]:
    group_size = 128 if k % 128 == 0 else 64
    spec, generator = QuantSpec(4, group_size), torch.Generator(device).manual_seed(0)
    words, groups = k * spec.bits // 32, k // group_size
    linear = QuantLinear(k, n, spec, GptqLayout(2), False, torch.float32)
    linear.g_idx = None
    words_CN = torch.randint(
        -(1 << 31), (1 << 31) - 1, (words, n), dtype=torch.int32, generator=generator, device=device
    )
    linear.replace(
        qweight=words_CN,
        qzeros=torch.full((groups, n * spec.bits // 32), -0x77777778, dtype=torch.int32, device=device),  # 8 everywhere
        scales=torch.rand(groups, n, generator=generator, device=device) * 1e-2,
    )
    W_KN = dequantize(linear.qweight, linear.scales, linear.qzeros, None, spec.bits, 2, torch.float32)
    linear.arrange()
    return linear, W_KN[:, :CHECKED_ROWS].T.contiguous()
