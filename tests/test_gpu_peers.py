"""Other programs' kernels, by stand-ins with the signatures of the versions that gpu_peers.py names."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from bitshard.bench import gpu_peers
from bitshard.bench.gpu_peers import peers
from bitshard.bitpack import pack, unpack

N, K, ROWS = 64, 256, 16
NAMES = {
    "bitsandbytes": "bitsandbytes NF4",
    "gemlite": "gemlite 4-bit",
    "vllm": "Marlin 4-bit",
    "humming": "Humming 4-bit",
}


def dequantized(codes_NK: torch.Tensor, scales_NG: torch.Tensor) -> torch.Tensor:
    return (codes_NK.float() - 8) * scales_NG.float().repeat_interleave(codes_NK.shape[1] // scales_NG.shape[1], dim=1)


def fixed(tensor: torch.Tensor) -> torch.nn.Parameter:
    return torch.nn.Parameter(tensor, requires_grad=False)


@dataclass
class QuantState:
    absmax: torch.Tensor
    shape: torch.Size


class Params4bit(torch.nn.Parameter):
    def __new__(
        cls,
        data: torch.Tensor,
        requires_grad: bool = False,
        quant_state: QuantState | None = None,
        compress_statistics: bool = True,
        quant_type: str = "fp4",
    ) -> Params4bit:
        assert quant_type == "nf4" and not compress_statistics
        made = torch.Tensor._make_subclass(cls, data, requires_grad)
        made.quant_state = quant_state
        return made

    def to(self, device: torch.device, *rest: object) -> Params4bit:
        blocks = self.data.float().view(-1, 64)
        absmax = blocks.abs().amax(dim=1)
        self.quant_state = QuantState(absmax, self.shape)
        codes = (blocks / absmax[:, None] * 7).round().add(8).to(torch.uint8).view(-1, 2)
        self.data = (codes[:, :1] << 4) | codes[:, 1:]
        return self

    def __deepcopy__(self, memo: object) -> Params4bit:
        state = QuantState(self.quant_state.absmax.clone(), self.quant_state.shape)
        return Params4bit(self.data.clone(), False, state, False, "nf4")


def dequantize_4bit(A: torch.Tensor, quant_state: QuantState) -> torch.Tensor:
    assert A.shape[0] != 1
    codes = torch.stack((A >> 4, A & 15), dim=-1).view(-1, 64)
    return ((codes.float() - 8) / 7 * quant_state.absmax[:, None]).view(quant_state.shape).half()


class Linear4bit(torch.nn.Linear):
    def __init__(
        self,
        input_features: int,
        output_features: int,
        bias: bool = True,
        compute_dtype: torch.dtype | None = None,
        compress_statistics: bool = True,
        quant_type: str = "fp4",
        quant_storage: torch.dtype = torch.uint8,
        device: str | None = None,
    ) -> None:
        assert compute_dtype == torch.float16 and not bias
        super().__init__(input_features, output_features, bias, device)
        self.weight = Params4bit(self.weight.data, False, None, compress_statistics, quant_type)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, dequantize_4bit(self.weight.data, self.weight.quant_state))


class GemLiteLinear(torch.nn.Module):
    def __init__(self, W_q: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor) -> None:
        super().__init__()
        self.W_q = fixed(pack(W_q, 4, dim=1).T.contiguous())
        self.scales, self.zeros = fixed(scales.T.contiguous()), fixed((-zeros * scales).T.contiguous())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        codes_KN = unpack(self.W_q, 4, dim=0)
        group = len(codes_KN) // len(self.scales)
        scales_KN, zeros_KN = (each.float().repeat_interleave(group, dim=0) for each in (self.scales, self.zeros))
        return (x.float() @ (codes_KN * scales_KN + zeros_KN)).half()


class A16W4_HQQ_INT:
    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        assert device.type == "cpu" and dtype == torch.float16

    def from_weights(
        self, W_q: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, bias: torch.Tensor | None = None
    ) -> GemLiteLinear:
        assert W_q.dtype == torch.uint8 and scales.dtype == zeros.dtype == torch.float16
        return GemLiteLinear(W_q, scales, zeros)


def gptq_marlin_repack(
    b_q_weight: torch.Tensor, size_k: int, size_n: int, num_bits: int, is_a_8bit: bool = False
) -> torch.Tensor:
    assert b_q_weight.shape == (size_k * num_bits // 32, size_n) and b_q_weight.is_contiguous()
    return b_q_weight.flip(1).view(size_k // 16, -1)


def marlin_permute_scales(
    s: torch.Tensor, size_k: int, size_n: int, group_size: int, is_a_8bit: bool = False
) -> torch.Tensor:
    assert s.shape == (size_k // group_size, size_n)
    return s.flip(1).contiguous()


def apply_gptq_marlin_linear(
    input: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_zp: torch.Tensor,
    workspace: torch.Tensor | None,
    wtype: str,
    output_size_per_partition: int,
    input_size_per_partition: int,
) -> torch.Tensor:
    assert wtype == "4 bits less 8" and workspace is not None and len(workspace) == 4 and not len(weight_zp)
    codes_KN = unpack(weight.view(-1, output_size_per_partition).flip(1), 4, dim=0)
    assert len(codes_KN) == input_size_per_partition
    return (input.float() @ dequantized(codes_KN.T, weight_scale.flip(1).T).T).half()


@dataclass(repr=False, eq=False)
class HummingLayer(torch.nn.Module):
    shape_n: int
    shape_k: int
    weight_config: dict[str, Any]
    torch_dtype: torch.dtype

    def __post_init__(self) -> None:
        super().__init__()
        assert self.weight_config["dtype"] == "int4" and self.torch_dtype == torch.float16
        groups = self.shape_k // self.weight_config["group_size"]
        self.weight = fixed(torch.empty(self.shape_n, self.shape_k // 8, dtype=torch.int32))
        self.weight_scale = fixed(torch.empty(self.shape_n, groups, dtype=torch.float16))
        self.transformed = False

    def load_from_tensors(self, tensors: dict[str, torch.Tensor], prefix: str = "") -> None:
        self.load_state_dict(tensors, strict=False)

    def transform(self) -> None:
        self.transformed = True

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        assert self.transformed
        return (inputs.float() @ dequantized(unpack(self.weight, 4, dim=1), self.weight_scale).T).half()


MARLIN = SimpleNamespace(
    MARLIN_MAX_BLOCKS_PER_SM=4,
    apply_gptq_marlin_linear=apply_gptq_marlin_linear,
    marlin_make_empty=lambda device: fixed(torch.empty(0, dtype=torch.int32, device=device)),
    marlin_make_workspace_new=lambda device, max_blocks_per_sm=1: torch.zeros(max_blocks_per_sm, dtype=torch.int32),
    marlin_permute_scales=marlin_permute_scales,
)
MODULES: dict[str, dict[str, Any]] = {
    "bitsandbytes": {},
    "bitsandbytes.functional": {"dequantize_4bit": dequantize_4bit},
    "bitsandbytes.nn": {"Linear4bit": Linear4bit, "Params4bit": Params4bit},
    "gemlite": {},
    "gemlite.helper": {"A16W4_HQQ_INT": A16W4_HQQ_INT},
    "humming": {},
    "humming.layer": {"HummingLayer": HummingLayer},
    "vllm": {"_custom_ops": SimpleNamespace(gptq_marlin_repack=gptq_marlin_repack)},
    "vllm.model_executor.layers.quantization.utils": {"marlin_utils": MARLIN},
    "vllm.scalar_type": {"scalar_types": SimpleNamespace(uint4b8="4 bits less 8")},
}


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Puts the named programs into sys.modules, and hides those that are really there."""

    def put(*programs: str) -> None:
        for name, content in MODULES.items():
            module = ModuleType(name)
            module.__dict__.update(content, __spec__=ModuleSpec(name, None))
            monkeypatch.setitem(sys.modules, name, module if name.partition(".")[0] in programs else None)

    return put


def matrix(k: int = K) -> torch.Tensor:
    return torch.randn(N, k, generator=torch.Generator().manual_seed(0)).half()


def weights(call: Any) -> Iterable[torch.Tensor]:
    return (call.keywords["weight"],) if isinstance(call, partial) else call.parameters()


@pytest.mark.parametrize("program", NAMES)
@pytest.mark.parametrize("k", [K, 192])
def test_one(program: str, k: int, install: Callable[..., None]) -> None:
    install(program)
    W_NK, before_NK = matrix(k), matrix(k)
    ((name, make),) = peers(W_NK, ROWS)
    peer = make()
    assert torch.equal(W_NK, before_NK) and name == peer.name == NAMES[program]
    assert peer.W_RK.dtype == torch.float32 and peer.W_RK.shape == (ROWS, k)
    assert (peer.W_RK - W_NK[:ROWS].float()).norm() < 0.15 * W_NK[:ROWS].float().norm()
    groups = k // (128 if k == K else 64)
    scales = {"bitsandbytes": 4 * k // 64, "gemlite": 4 * groups}.get(program, 2 * groups)  # gemlite has zeros too
    assert peer.nbytes == N * (k // 2 + scales)

    first, second = peer.copy(), peer.copy()
    x_MK = torch.randn(5, k).half()
    exact_MR = x_MK.float() @ peer.W_RK.T
    for each in weights(first):
        each.data.zero_()  # the copies are not each other's
    y_MN = second(x_MK)
    assert y_MN.shape == (5, N) and y_MN.dtype == torch.float16
    assert (y_MN[:, :ROWS].float() - exact_MR).norm() < 1e-3 * exact_MR.norm()
    assert not torch.equal(first(x_MK), y_MN)


def test_the_same_codes_rounded_once(install: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    install(*NAMES)
    rounded, round_ = [], gpu_peers._round
    monkeypatch.setattr(gpu_peers, "_round", lambda W_NK: rounded.append(W_NK) or round_(W_NK))
    W_NK = matrix()
    made = [make() for _, make in peers(W_NK, ROWS)]
    assert [peer.name for peer in made] == list(NAMES.values()) and len(rounded) == 1
    gemlite, marlin, humming = (peer.W_RK for peer in made[1:])
    assert torch.equal(gemlite, marlin) and torch.equal(gemlite, humming)
    step_RK = (W_NK[:ROWS].float().view(ROWS, -1, 128).abs().amax(2) / 7.5).repeat_interleave(128, dim=1)
    assert ((gemlite - W_NK[:ROWS].float()).abs() <= 0.51 * step_RK).all()  # scales are rounded too


def test_one_that_fails_does_not_stop_the_next(install: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    install("gemlite", "humming")
    monkeypatch.delattr(sys.modules["gemlite.helper"], "A16W4_HQQ_INT")
    (failing, make), (name, other) = peers(matrix(), ROWS)
    with pytest.raises(ImportError, match="A16W4_HQQ_INT"):
        make()
    assert failing == "gemlite 4-bit" and other().name == name == "Humming 4-bit"


def test_nothing_installed(install: Callable[..., None]) -> None:
    install()
    assert list(peers(matrix(), ROWS)) == []
