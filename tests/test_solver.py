"""gptq against a slow twin that inverts the Hessian anew for every channel, and every way it says no."""

from dataclasses import replace

import pytest
import torch

from bitshard.errors import SolverError, SpecError
from bitshard.quantized import trivial_g_idx
from bitshard.solver.gptq import gptq
from bitshard.solver.hessian import Hessian
from bitshard.spec import QuantSpec

DAMP = 0.01


def problem(n: int, k: int, seed: int, tokens: int = 400) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights [N, K] and the Hessian of correlated inputs of very different sizes, float64."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(k, k, generator=generator, dtype=torch.float64) / k**0.5 + torch.eye(k, dtype=torch.float64)
    x = torch.randn(tokens, k, generator=generator, dtype=torch.float64) @ mix
    x *= torch.exp(torch.randn(k, generator=generator, dtype=torch.float64))
    return torch.randn(n, k, generator=generator), 2 / tokens * x.T @ x


def twin_grid(W: torch.Tensor, spec: QuantSpec) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero of one group of weights [N, R], by the definition."""
    low, high = W.min(1).values.clamp(max=0), W.max(1).values.clamp(min=0)
    if spec.sym:
        high = torch.maximum(high, -low)
        low = -high
    scale = ((high - low) / (2**spec.bits - 1)).half().double()
    zero = torch.full_like(scale, 2 ** (spec.bits - 1)) if spec.sym else (-low / scale).round().clamp(0, spec.max_code)
    return scale, zero


def twin(W_NK: torch.Tensor, H_KK: torch.Tensor, spec: QuantSpec) -> torch.Tensor:
    """GPTQ as the paper derives it (2210.17323 eq. 2 and 3): no blocks, no Cholesky, no reordered copies."""
    W, H = W_NK.double().clone(), H_KK + DAMP * H_KK.diagonal().mean() * torch.eye(len(H_KK))
    k, group = W.shape[1], spec.group(W.shape[1])
    left = H_KK.diagonal().argsort(descending=True, stable=True).tolist() if spec.desc_act else list(range(k))
    fixed = spec.static_groups or spec.group_size == -1
    runs = list(range(k)) if fixed else left
    group_of = {j: tuple(runs[i - i % group : i - i % group + group]) for i, j in enumerate(runs)}
    grids = {channels: twin_grid(W[:, channels], spec) for channels in group_of.values()} if fixed else {}
    Q = torch.empty_like(W)
    while left:
        j, *rest = left
        if group_of[j] not in grids:
            grids[group_of[j]] = twin_grid(W[:, group_of[j]], spec)
        scale, zero = grids[group_of[j]]
        Q[:, j] = ((W[:, j] / scale).round() + zero).clamp(0, spec.max_code).sub(zero) * scale
        inverse = torch.linalg.inv(H[left][:, left])
        W[:, left] -= torch.outer((W[:, j] - Q[:, j]) / inverse[0, 0], inverse[0])
        left = rest
    return Q


SPECS = [
    QuantSpec(bits, group, sym, desc_act, static)
    for bits, group, sym, desc_act, static in [
        (4, 8, True, False, False),
        (4, 8, True, True, False),
        (4, 8, True, True, True),
        (4, 8, False, True, False),
        (3, 24, False, False, True),
        (3, -1, True, True, False),
        (2, -1, False, False, False),
        (2, 8, False, True, False),
        (8, 24, True, True, True),
        (8, 8, False, False, False),
    ]
]


def name_of(spec: QuantSpec) -> str:
    flags = [name for name in ("sym", "desc_act", "static_groups") if getattr(spec, name)]
    return "-".join([f"{spec.bits}b", f"g{spec.group_size}", *flags])


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("spec", SPECS, ids=name_of)
def test_equals_the_slow_twin(spec: QuantSpec, seed: int) -> None:
    W, H = problem(5 + seed, 48, seed)
    weight, report = gptq(W, H, spec, "w", DAMP)
    assert torch.equal(weight.dequantize(torch.float64).T, twin(W, H, spec))
    assert report.damp == DAMP and report.dead == 0


@pytest.mark.parametrize("spec", SPECS, ids=name_of)
@pytest.mark.parametrize(("k", "group"), [(32, 8), (36, 12), (34, 17), (40, 20), (33, 1), (33, -1), (48, 24)])
def test_equals_the_slow_twin_over_several_blocks(
    k: int, group: int, spec: QuantSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Groups that end inside a lazy block of 16, on its edge and beyond it."""
    monkeypatch.setattr("bitshard.solver.gptq.BLOCK", 16)
    W, H = problem(3, k, seed=k)
    spec = replace(spec, group_size=group)
    assert torch.equal(gptq(W, H, spec, "w", DAMP)[0].dequantize(torch.float64).T, twin(W, H, spec))


@pytest.mark.parametrize("spec", SPECS, ids=name_of)
def test_better_than_rounding(spec: QuantSpec) -> None:
    W, H = problem(16, 96, seed=3)
    rounded, _ = gptq(W, torch.eye(96, dtype=torch.float64), QuantSpec(spec.bits, spec.group_size, spec.sym), "w", DAMP)
    error = W - rounded.dequantize().T
    rounding_error = float(((error.double() @ H) * error).sum() / ((W.double() @ H) * W).sum())
    assert gptq(W, H, spec, "w", DAMP)[1].relative_error < 0.8 * rounding_error


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_identity_hessian_rounds_to_nearest(bits: int, sym: bool) -> None:
    W, _ = problem(4, 32, seed=bits)
    spec = QuantSpec(bits, 16, sym)
    weight, _ = gptq(W, torch.eye(32, dtype=torch.float64), spec, "w", DAMP)
    for start in (0, 16):
        scale, zero = twin_grid(W[:, start : start + 16].double(), spec)
        codes = (W[:, start : start + 16] / scale[:, None]).round() + zero[:, None]
        found = weight.codes_KN[start : start + 16].T
        assert torch.equal(found.double(), codes.clamp(0, spec.max_code))


def test_order_follows_the_diagonal_and_rows_stay() -> None:
    W, H = problem(4, 48, seed=5)
    weight, _ = gptq(W, H, QuantSpec(4, 16, desc_act=True), "w", DAMP)
    order = torch.argsort(H.diagonal(), descending=True)
    assert torch.equal(weight.g_idx_K[order], trivial_g_idx(48, 16))
    for spec in (
        QuantSpec(4, 16),
        QuantSpec(4, 16, desc_act=True, static_groups=True),
        QuantSpec(4, -1, desc_act=True),
    ):
        assert gptq(W, H, spec, "w", DAMP)[0].is_trivial


def test_types_of_the_result() -> None:
    W, H = problem(4, 32, seed=0)
    weight, _ = gptq(W.half(), H.float(), QuantSpec(4, 16), "w", DAMP)
    types = [t.dtype for t in (weight.codes_KN, weight.scales_GN, weight.zeros_GN, weight.g_idx_K)]
    assert types == [torch.uint8, torch.float16, torch.uint8, torch.int32]


@pytest.mark.parametrize("sym", [True, False])
def test_one_sided_weights_keep_their_largest(sym: bool) -> None:
    W, H = problem(4, 32, seed=1)
    weight, _ = gptq(W.abs() + 1, H, QuantSpec(8, 32, sym), "w", DAMP)
    assert (weight.dequantize().T.amax(1) > 0.9 * (W.abs() + 1).amax(1)).all()


@pytest.mark.parametrize("desc_act", [True, False])
def test_dead_channels_become_zero_and_harm_nobody(desc_act: bool) -> None:
    W, H = problem(6, 40, seed=2)
    dead = torch.tensor([0, 7, 39])
    H[dead], H[:, dead] = 0.0, 0.0
    W[:, 7] = 1e4
    spec = QuantSpec(4, -1, desc_act=desc_act, sym=False)
    weight, report = gptq(W, H, spec, "w", DAMP)
    assert report.dead == 3 and not weight.dequantize()[dead].any()
    alive = torch.tensor([j for j in range(40) if j not in dead.tolist()])
    alone, _ = gptq(W[:, alive], H[alive][:, alive], spec, "w", DAMP)
    assert torch.equal(weight.dequantize()[alive], alone.dequantize())


def test_all_channels_dead() -> None:
    weight, report = gptq(torch.randn(4, 16), torch.zeros(16, 16), QuantSpec(4, 8), "w", DAMP)
    assert report.dead == 16 and report.relative_error == 0 and not weight.dequantize().any()


def test_tiny_and_zero_weights_stay_finite() -> None:
    _, H = problem(2, 16, seed=0)
    W = torch.zeros(3, 16)
    W[1] = 1e-9
    weight, _ = gptq(W, H, QuantSpec(4, 8), "w", DAMP)
    assert not weight.dequantize()[:, [0, 2]].any() and weight.dequantize().isfinite().all()


def test_retries_with_more_damping() -> None:
    """An eigenvalue of -0.05 needs more damping than 0.01 of the mean diagonal, 1."""
    H = torch.eye(16, dtype=torch.float64)
    H[0, 1] = H[1, 0] = 1.05
    _, report = gptq(torch.randn(4, 16), H, QuantSpec(4, 8), "w", DAMP)
    assert report.damp == pytest.approx(0.1)


BAD_H = -torch.eye(16)
NAN_W = torch.full((4, 16), float("nan"))


@pytest.mark.parametrize(
    ("W", "H", "spec", "kind", "says"),
    [
        (torch.randn(4, 16), BAD_H, QuantSpec(4, 8), SolverError, "not positive definite"),
        (NAN_W, torch.eye(16), QuantSpec(4, 8), SolverError, "NaN or infinite weights"),
        (NAN_W.nan_to_num(1).div(0), torch.eye(16), QuantSpec(4, 8), SolverError, "NaN or infinite weights"),
        (torch.randn(4, 16), torch.eye(16) / 0, QuantSpec(4, 8), SolverError, "NaN or infinite activations"),
        (torch.full((4, 16), 1e7), torch.eye(16), QuantSpec(4, 8), SolverError, "beyond fp16"),
        (torch.randn(4, 16), torch.eye(16), QuantSpec(4, 12), SpecError, "16 input channels"),
    ],
    ids=["indefinite", "nan weight", "infinite weight", "infinite activation", "huge weight", "group"],
)
def test_refuses_by_name(W: torch.Tensor, H: torch.Tensor, spec: QuantSpec, kind: type, says: str) -> None:
    with pytest.raises(kind, match=f"^model.layers.3.mlp.up_proj: found .*{says}"):
        gptq(W, H, spec, "model.layers.3.mlp.up_proj", DAMP)


def test_hessian_streams() -> None:
    x = torch.randn(3, 5, 7, 16)
    streamed = Hessian(16, torch.device("cpu"))
    for part in x:
        streamed.add(part.half())
    rows = x.half().float().reshape(-1, 16)
    assert streamed.count == 105
    torch.testing.assert_close(streamed.matrix(), 2 / 105 * rows.T @ rows)


def test_hessian_of_nothing_is_the_identity() -> None:
    empty = Hessian(4, torch.device("cpu"))
    empty.add(torch.empty(0, 4))
    assert torch.equal(empty.matrix(), torch.eye(4))
