"""The solver of mix64: what it reports is true, every code is one a file holds, no search hurts, no weight breaks it.

Shape legend: N output channels, K input channels, S strips of 16 input channels, T calibration tokens.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import pad

from bitshard.blockwise import BlockwiseModel
from bitshard.checkpoint import Checkpoint
from bitshard.errors import SolverError, SpecError
from bitshard.layout import Mix64Layout
from bitshard.mixed import MixedWeight, strip_widths, zero_bases
from bitshard.solver import mixed as solver
from bitshard.solver.allocate import (
    choose_outliers,
    choose_strips,
    fit_ranges,
    relative_errors,
    share_of_wide_strips,
    spend,
    strip_importance,
)
from bitshard.solver.gptq import SolveReport
from bitshard.solver.hessian import CORRECTION_DAMP, Hessian, inverse_factor, squared_outputs
from bitshard.solver.mixed import solve_mixed
from bitshard.spec import PAPER_RECIPES, STRIP, MixRecipe, MixSpec, QuantSpec, requested, zero_base

PAPER = MixSpec(2, 0.25, "paper")
SPECS = [
    *(MixSpec(2, fraction) for fraction in (0.0, 0.25, 0.5, 1.0)),
    *(MixSpec(bits, 0.0) for bits in (3, 4, 8)),
    PAPER,
]
SHAPES = [(1, 16), (70, 100), (257, 65), (5, 200)]  # N no multiple of 64, K neither of 64 nor of 16
MINMAX = MixRecipe(ranges="minmax")
DAMP = MixRecipe().damp


def name_of(spec: MixSpec) -> str:
    return f"{spec.bits}b {spec.fraction_4bit:g} {spec.metadata}"


def every(specs: list[MixSpec]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("spec", specs, ids=name_of)


def inputs(k: int, seed: int, tokens: int = 300) -> torch.Tensor:
    """Correlated inputs of very different sizes [T, K]."""
    generator = torch.Generator().manual_seed(seed)
    mix_KK = torch.randn(k, k, generator=generator) * float(k) ** -0.5 + torch.eye(k)
    return torch.randn(tokens, k, generator=generator) @ mix_KK * torch.exp(torch.randn(k, generator=generator))


def weights(n: int, k: int, seed: int) -> torch.Tensor:
    """With heavy tails, as trained ones have [N, K]."""
    W_NK = torch.randn(n, k, generator=torch.Generator().manual_seed(seed))
    return W_NK.mul(W_NK.abs()).mul(0.02)


def hessian(X_TK: torch.Tensor) -> torch.Tensor:
    H_KK: torch.Tensor = 2 / len(X_TK) * X_TK.T @ X_TK
    return H_KK


def output_error(W_NK: torch.Tensor, Q_NK: torch.Tensor, X_TK: torch.Tensor) -> float:
    """|(W - Q) X|^2 / |W X|^2 by its definition, in float64."""
    W_NK, Q_NK, X_TK = W_NK.double(), Q_NK.double(), X_TK.double()
    return float(((W_NK - Q_NK) @ X_TK.T).square().sum() / (W_NK @ X_TK.T).square().sum())


def solved(W_NK: torch.Tensor, X_TK: torch.Tensor, spec: MixSpec, recipe: MixRecipe) -> tuple[MixedWeight, SolveReport]:
    return solve_mixed(W_NK, hessian(X_TK), spec, recipe, "w")


def assert_storable(weight: MixedWeight) -> None:
    """Every value in its range, outliers in 2-bit strips alone over slots that are exactly zero, padding zero."""
    spec, (n, k) = weight.spec, weight.codes_NK.shape
    strips = k // STRIP
    widths_S, bases_S = strip_widths(spec, strips), zero_bases(spec, strips)
    assert (weight.codes_NK.view(n, strips, STRIP) < (1 << widths_S)[:, None]).all()
    if spec.metadata == "fine":
        assert (weight.zeros_NS >= bases_S).all() and (weight.zeros_NS <= bases_S + 3).all()
        assert (weight.scale_codes_NS < 16).all() and weight.row_scales_N is None
    else:
        assert (weight.zeros_NS[:, widths_S == 2] <= 3).all()
        assert (weight.zeros_NS[:, ::4] <= 15).all() and (weight.zeros_NS[:, ::4] == weight.zeros_NS[:, :1]).all()
        assert (weight.scale_codes_NS.view(n, -1, 4)[..., 1:] < torch.tensor([8, 8, 16])).all()
        zeros2_TS = (weight.offsets_TS / weight.steps_TS)[:, widths_S == 2].view(-1, 3)
        assert torch.equal(zeros2_TS, zeros2_TS.round()) and (zeros2_TS < torch.tensor([8, 8, 16])).all()
        assert weight.row_scales_N is not None and (weight.row_scales_N > 0).all()
    assert torch.equal(weight.steps_TS, weight.steps_TS.half().float())
    assert (weight.scales() > 0).all() and weight.scales().isfinite().all()
    if weight.outliers is not None:
        rows, columns = weight.outliers.rows(), weight.outliers.columns.long()
        assert (widths_S[columns // STRIP] == 2).all()
        assert torch.equal(weight.codes_NK[rows, columns], weight.zeros_NS[rows, columns // STRIP])
    # the layout looks through all of it again, padding included
    size = weight.in_features, n
    again = Mix64Layout().unpack("w", Mix64Layout().pack(weight), spec, size)
    assert torch.equal(again.dequantize(), weight.dequantize())


@pytest.mark.parametrize(
    ("ranges", "order", "outliers"), [("search", "model", 0.0), ("search", "none", 0.01), ("minmax", "model", 0.01)]
)
@every(SPECS)
def test_what_is_reported_is_what_the_codes_give(spec: MixSpec, ranges: str, order: str, outliers: float) -> None:
    if outliers and 2 not in spec.widths:
        outliers = 0.0
    for seed, (n, k) in enumerate(SHAPES):
        W_NK, X_TK = weights(n, k, seed), inputs(k, seed)
        weight, report = solved(W_NK, X_TK, spec, MixRecipe(order, ranges=ranges, outliers=outliers))
        assert_storable(weight)
        assert weight.dequantize().shape == (n, k)
        assert report.relative_error == pytest.approx(output_error(W_NK, weight.dequantize(), X_TK), rel=1e-3)
        assert (report.damp, report.dead) == (DAMP, 0)
        strip_order = order == "none" and len(set(spec.widths)) > 1
        assert (weight.strip_order_S is not None) == strip_order
        if outliers and k > 65:  # else fewer strips gain
            assert weight.outliers is not None and len(weight.outliers.values) == round(outliers * n * k)


@pytest.fixture(scope="module")
def trained(stories: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Matrices of the third block of stories260K, each with its inputs: K of 64 and 172."""
    checkpoint = Checkpoint.open(stories)
    model = BlockwiseModel(checkpoint, checkpoint.sizes, {}, torch.device("cpu"))
    tokens_SL = torch.randint(3, 512, (8, 64), generator=torch.Generator().manual_seed(0))
    hidden_SLH = model.embed(tokens_SL, checkpoint.read)
    names = "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    for layer in range(3):
        model.load(layer, checkpoint.read(checkpoint.names_in_block(layer)))
        watch = {name: xs.append for name, xs in seen.items()} if layer == 2 else {}
        hidden_SLH = model.run(layer, hidden_SLH, watch)
    return {name: (model.linear(2, name).weight.detach(), torch.cat(xs).flatten(0, 1)) for name, xs in seen.items()}


@every(SPECS)
def test_a_search_for_ranges_never_hurts(
    spec: MixSpec, trained: dict[str, tuple[torch.Tensor, torch.Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(solver, "PASSES", 0)
    cases = [*trained.values(), *((weights(n, k, seed), inputs(k, seed)) for seed, (n, k) in enumerate(SHAPES))]
    gains = []
    for i, (W_NK, X_TK) in enumerate(cases):
        outliers = 0.005 if i % 2 and 2 in spec.widths else 0.0
        recipe = MixRecipe("none" if i // 2 % 2 else "model", ranges="minmax", outliers=outliers)
        minmax = solved(W_NK, X_TK, spec, recipe)[1].relative_error
        search = solved(W_NK, X_TK, spec, replace(recipe, ranges="search"))[1].relative_error
        assert search <= minmax
        gains.append(search / minmax)
    assert sum(gains) / len(gains) < 0.95


@pytest.mark.parametrize("falling", [True, False])
def test_wide_strips_are_visited_last(falling: bool) -> None:
    """By sensitivity among equals; each channel once."""
    W_NK, X_TK, spec = weights(8, 192, 0), inputs(192, 0), MixSpec()
    visit_K = solver._Matrix.of(W_NK, hessian(X_TK), spec, MixRecipe()).visit(falling, "w")[0]
    strips = visit_K[::STRIP] // STRIP
    assert sorted(visit_K.tolist()) == [*range(192)] and torch.equal(visit_K // STRIP, strips.repeat_interleave(STRIP))
    assert strip_widths(spec, 12)[strips].tolist() == 9 * [2] + 3 * [4]
    sensitivity_S = (hessian(X_TK).diagonal() * W_NK.square().sum(0)).view(-1, STRIP).sum(1)[strips]
    for some in (sensitivity_S[:9], sensitivity_S[9:]):
        assert torch.equal(some, some.sort(descending=falling).values)


def test_where_the_search_hurts_minmax_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    found = solver._Matrix.solve

    def solve(matrix: Any, visit_K: torch.Tensor, R_KK: torch.Tensor, ranges: str) -> Any:
        state = found(matrix, visit_K, R_KK, "minmax")
        if ranges == "search":
            state.codes_NS, state.loss = 15 - state.codes_NS, 2 * state.loss
        return state

    monkeypatch.setattr(solver, "PASSES", 0)
    W_NK, X_TK = weights(64, 128, 0), inputs(128, 0)
    expected = solved(W_NK, X_TK, MixSpec(), MixRecipe(ranges="minmax"))[0]
    monkeypatch.setattr(solver._Matrix, "solve", solve)
    assert torch.equal(solved(W_NK, X_TK, MixSpec(), MixRecipe())[0].dequantize(), expected.dequantize())


def damped_loss(W_NK: torch.Tensor, Q_NK: torch.Tensor, H_KK: torch.Tensor) -> float:
    error_NK, H_KK = (W_NK - Q_NK).double(), H_KK.double()
    return float(((error_NK @ H_KK) * error_NK).sum() + DAMP * H_KK.diagonal().mean() * error_NK.square().sum())


@every(SPECS)
def test_refining_never_raises_the_loss(
    spec: MixSpec, trained: dict[str, tuple[torch.Tensor, torch.Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    cases = [*trained.values()][1::2] + [(weights(70, 100, 9), inputs(100, 9))]
    recipe = MixRecipe(outliers=0.01 if 2 in spec.widths else 0.0)
    ratios = []
    for W_NK, X_TK in cases:
        damped, plain = [], []
        for passes in (0, 1, 2):
            monkeypatch.setattr(solver, "PASSES", passes)
            weight, report = solved(W_NK, X_TK, spec, recipe)
            assert_storable(weight)
            damped.append(damped_loss(W_NK, weight.dequantize(), hessian(X_TK)))
            plain.append(report.relative_error)
        assert damped[2] <= damped[1] <= damped[0] and plain[1] <= plain[0]
        ratios.append(plain[1] / plain[0])
    assert min(ratios) < 0.99


@pytest.mark.parametrize("ranges", ["search", "minmax"])
@every(SPECS)
def test_feedback_beats_rounding_to_nearest(
    spec: MixSpec, ranges: str, trained: dict[str, tuple[torch.Tensor, torch.Tensor]]
) -> None:
    for W_NK, X_TK in trained.values():
        recipe = MixRecipe(ranges=ranges)
        rounded, _ = solve_mixed(W_NK, torch.eye(W_NK.shape[1]), spec, recipe, "w")
        found = solved(W_NK, X_TK, spec, recipe)[1].relative_error
        assert found < 0.8 * output_error(W_NK, rounded.dequantize(), X_TK)


def test_more_bits_lose_less(trained: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Also: strips of the most sensitive channels at 4 bits are worth more than any other quarter of them."""
    for W_NK, X_TK in trained.values():
        errors = [solved(W_NK, X_TK, spec, MixRecipe())[1].relative_error for spec in SPECS[:4]]
        assert errors == sorted(errors, reverse=True) and errors[1] < 0.8 * errors[0]
        chosen = solved(W_NK, X_TK, MixSpec(), MixRecipe("none"))[1]
        as_it_is = solved(W_NK, X_TK, MixSpec(), MixRecipe())[1]
        assert chosen.share_4bit > as_it_is.share_4bit
        with_outliers = solved(W_NK, X_TK, MixSpec(2, 0.0), MixRecipe(outliers=0.02))[1]
        assert with_outliers.relative_error < errors[0]
    for bits in (3, 4, 8):
        W_NK, X_TK = trained["mlp.down_proj"]
        assert solved(W_NK, X_TK, MixSpec(bits, 0.0), MixRecipe())[1].relative_error < errors[0] / 2


@every([MixSpec(), PAPER, MixSpec(4, 0.0)])
def test_lazy_feedback_is_the_same_feedback(spec: MixSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    W_NK, X_TK = weights(40, 300, 1), inputs(300, 1)
    at_once, _ = solved(W_NK, X_TK, spec, MINMAX)
    monkeypatch.setattr(solver, "LAZY", 1)
    one_by_one, _ = solved(W_NK, X_TK, spec, MINMAX)
    assert (at_once.codes_NK == one_by_one.codes_NK).float().mean() > 0.999  # but for what rounding tips


EDGES = {
    "all zero": torch.zeros(70, 100),
    "one huge weight": weights(70, 100, 0).index_put((torch.tensor(3), torch.tensor(40)), torch.tensor(100.0)),
    "constant rows": torch.linspace(-1, 1, 70)[:, None].expand(70, 100).clone(),
    "one-sided": weights(70, 100, 0).abs() + 0.01,
    "tiny": 1e-7 * torch.randn(70, 100, generator=torch.Generator().manual_seed(0)),
    "large": 1e4 * torch.randn(70, 100, generator=torch.Generator().manual_seed(0)),
    "a zero row": weights(70, 100, 0) * (torch.arange(70)[:, None] != 7),
}


@pytest.mark.parametrize("ranges", ["search", "minmax"])
@pytest.mark.parametrize("edge", EDGES)
@every(SPECS)
def test_strange_weights_stay_finite(spec: MixSpec, edge: str, ranges: str) -> None:
    W_NK, X_TK = EDGES[edge], inputs(100, 2)
    recipe = MixRecipe(ranges=ranges, outliers=0.01 if 2 in spec.widths else 0.0)
    weight, report = solved(W_NK, X_TK, spec, recipe)
    assert weight.dequantize().isfinite().all() and 0 <= report.relative_error < 1
    assert_storable(weight)
    if edge == "all zero":
        assert not weight.dequantize().any() and report.share_4bit == 0
    elif edge == "a zero row":
        assert not weight.dequantize()[7].any()
    elif edge != "tiny":  # less than fp16's smallest scale can show
        assert report.relative_error < {2: 0.3, 3: 0.1, 4: 0.03, 8: 1e-3}[min(spec.widths)]


@every(SPECS)
def test_dead_channels_become_zero_and_harm_nobody(spec: MixSpec) -> None:
    W_NK, X_TK, dead = weights(70, 128, 3), inputs(128, 3), torch.tensor([0, 40, 41, *range(96, 128)])
    X_TK[:, dead] = 0
    W_NK[:, 40] = 1e4
    for order in ("model", "none"):
        recipe = MixRecipe(order, outliers=0.01 if 2 in spec.widths else 0.0)
        weight, report = solved(W_NK, X_TK, spec, recipe)
        assert report.dead == 35 and not weight.dequantize()[:, dead].any()
        assert_storable(weight)
        assert report.relative_error == pytest.approx(output_error(W_NK, weight.dequantize(), X_TK), rel=1e-3)
    emptied = W_NK.index_fill(1, dead, 0.0)
    assert torch.equal(weight.codes_NK, solved(emptied, X_TK, spec, recipe)[0].codes_NK)


def test_all_channels_dead() -> None:
    weight, report = solve_mixed(weights(4, 30, 0), torch.zeros(30, 30), MixSpec(), MixRecipe(), "w")
    assert report.dead == 30 and report.relative_error == 0 and not weight.dequantize().any()


@every(SPECS)
def test_zeros_that_fill_up_a_block_change_nothing(spec: MixSpec) -> None:
    """K = 100 is solved as K = 128 with dead channels at the end is: the same codes."""
    W_NK, X_TK = weights(70, 128, 4), inputs(128, 4)
    X_TK[:, 100:] = 0
    for recipe in (MixRecipe(), MixRecipe("none")):
        whole, _ = solved(W_NK, X_TK, spec, recipe)
        cut, report = solved(W_NK[:, :100], X_TK[:, :100], spec, recipe)
        assert torch.equal(whole.dequantize()[:, :100], cut.dequantize()) and report.dead == 0


def test_outliers_never_lie_where_nothing_is() -> None:
    """65 channels fill one block and one channel of the next: three 2-bit strips of four hold nothing there."""
    weight, _ = solved(weights(70, 65, 0), inputs(65, 0), MixSpec(), MixRecipe(outliers=0.05))
    assert_storable(weight)
    assert weight.outliers is not None and (weight.outliers.columns < 65).all()
    assert len(weight.outliers.values) == 3 * 70  # at most one for each strip of a row


def test_more_damping_where_it_is_needed() -> None:
    """An eigenvalue of -0.05 needs more damping than 0.01 of the mean diagonal, 1; refining needs it too."""
    H_KK = torch.eye(64)
    H_KK[0, 1] = H_KK[1, 0] = 1.05
    weight, report = solve_mixed(weights(8, 64, 0), H_KK, MixSpec(), MixRecipe(damp=0.01), "w")
    assert report.damp == pytest.approx(0.1) and weight.dequantize().isfinite().all()


def test_a_factor_without_damping_retries_too() -> None:
    H_KK = torch.eye(16)
    H_KK[0, 1] = H_KK[1, 0] = 1.05
    U_KK, damp = inverse_factor(H_KK, torch.arange(len(H_KK)), "w", 0.0)
    assert damp == pytest.approx(0.1) and U_KK.isfinite().all()


NAN = torch.full((4, 16), torch.nan)


@pytest.mark.parametrize(
    ("W", "H", "says"),
    [
        (torch.ones(4, 16), -torch.eye(16), "not positive definite, even with damping 1"),
        (NAN, torch.eye(16), "NaN or infinite weights"),
        (NAN.nan_to_num(torch.inf), torch.eye(16), "NaN or infinite weights"),
        (torch.ones(4, 16), torch.eye(16) / 0, "NaN or infinite activations"),
        (torch.full((4, 16), 1e7), torch.eye(16), "a scale beyond fp16"),
        (torch.ones(4, 16), torch.full((16, 16), 1e-42) + torch.eye(16) * 1e-42, "a Hessian of numbers about 2e-42"),
    ],
    ids=["indefinite", "nan weight", "infinite weight", "infinite activation", "huge weight", "subnormal activation"],
)
@every([MixSpec(), PAPER])
def test_refuses_by_name(spec: MixSpec, W: torch.Tensor, H: torch.Tensor, says: str) -> None:
    with pytest.raises(SolverError, match=f"^model.layers.3.mlp.up_proj: found .*{says}"):
        solve_mixed(W, H, spec, MixRecipe(), "model.layers.3.mlp.up_proj")


DRIFT_OF = pytest.mark.parametrize("drift_of", ["inputs", "outputs"])


def drifting(X_TK: torch.Tensor, exact_TK: torch.Tensor, W_NK: torch.Tensor, drift_of: str) -> Hessian:
    """Of inputs that came in three parts, with what the 16-bit model had there."""
    found = Hessian(X_TK.shape[1], X_TK.device, drift_of)
    for x, other in zip(X_TK.chunk(3), exact_TK.chunk(3), strict=True):
        found.add(x[None], (other - x if drift_of == "inputs" else other @ W_NK.T - x @ W_NK.T)[None])
    return found


@DRIFT_OF
def test_without_drift_the_matrix_stays(drift_of: str) -> None:
    W_NK, X_TK = weights(6, 24, 0), inputs(24, 0)
    same = drifting(X_TK, X_TK, W_NK, drift_of)
    torch.testing.assert_close(same.corrected(W_NK, CORRECTION_DAMP), W_NK, rtol=0, atol=0)
    plain = Hessian(24, X_TK.device, drift_of)
    plain.add(X_TK)
    assert plain.corrected(W_NK, CORRECTION_DAMP) is W_NK
    assert Hessian(24, X_TK.device, drift_of).corrected(W_NK, CORRECTION_DAMP) is W_NK
    torch.testing.assert_close(plain.matrix(), same.matrix())


@DRIFT_OF
def test_a_linear_distortion_is_undone(drift_of: str) -> None:
    """X' = X A is made up for by W A^-1, as far as tokens tell it from chance; damping leaves a part."""
    W_NK, A_KK = (
        weights(6, 24, 0),
        torch.eye(24) + 0.02 * torch.randn(24, 24, generator=torch.Generator().manual_seed(1)),
    )
    left = {}
    for tokens in (12, 48, 24_000):
        X_TK = inputs(24, 0, tokens)
        target_TN = X_TK @ W_NK.T
        found = drifting(X_TK @ A_KK, X_TK, W_NK, drift_of)
        off_TN, before_TN = (X_TK @ A_KK @ Q_NK.T - target_TN for Q_NK in (found.corrected(W_NK, 1e-6), W_NK))
        left[tokens] = float(off_TN.norm() / before_TN.norm())
    assert left[12] == 1 and left[48] == pytest.approx(0.5, abs=0.01) and left[24_000] < 0.01
    found_NK = found.corrected(W_NK, CORRECTION_DAMP)
    assert 0.01 < (X_TK @ A_KK @ found_NK.T - target_TN).norm() / before_TN.norm() < 0.5


@DRIFT_OF
def test_channels_hardly_seen_keep_their_weights(drift_of: str) -> None:
    """Where noise is louder than what was seen, least squares turn weights off, which other text would need."""
    W_NK, tokens, noise = weights(6, 24, 0), 24_000, 0.1
    generator = torch.Generator().manual_seed(0)
    X_TK = torch.randn(tokens, 24, generator=generator) * torch.cat([torch.ones(12), torch.full((12,), 0.03)])
    noisy_TK = X_TK + noise * torch.randn(tokens, 24, generator=generator)
    found = drifting(noisy_TK, X_TK, W_NK, drift_of)
    quiet = slice(12, None)
    kept = [
        float((found.corrected(W_NK, damp)[:, quiet] * W_NK[:, quiet]).sum() / W_NK[:, quiet].square().sum())
        for damp in (0.01, CORRECTION_DAMP)
    ]
    assert kept[0] < 0.5 and kept[1] > 0.9


@DRIFT_OF
def test_drifts_in_bfloat16_correct_as_in_float32(drift_of: str) -> None:
    W_NK, X_TK = weights(6, 24, 0), inputs(24, 0, 3000)
    found, wanted = Hessian(24, X_TK.device, drift_of), Hessian(24, X_TK.device, drift_of)
    for x in X_TK.bfloat16().chunk(3):
        drift = 0.05 * x.roll(1, 1) if drift_of == "inputs" else 0.05 * x.roll(1, 1) @ W_NK.T.bfloat16()
        found.add(x, drift)
        wanted.add(x.float(), drift.float())
    change_NK = wanted.corrected(W_NK) - W_NK
    assert (found.corrected(W_NK) - wanted.corrected(W_NK)).norm() < 0.01 * change_NK.norm()


@DRIFT_OF
def test_dead_channels_are_not_corrected(drift_of: str) -> None:
    W_NK, X_TK, dead = weights(6, 24, 0), inputs(24, 0), torch.tensor([0, 5, 23])
    X_TK[:, dead] = 0
    found_NK = drifting(X_TK, 1.1 * X_TK, W_NK, drift_of).corrected(W_NK, CORRECTION_DAMP)
    assert torch.equal(found_NK[:, dead], W_NK[:, dead]) and not torch.equal(found_NK, W_NK)
    nothing = torch.zeros_like(X_TK)
    unseen = drifting(nothing, nothing, W_NK, drift_of)
    assert torch.equal(unseen.corrected(W_NK, CORRECTION_DAMP), W_NK)


@pytest.mark.parametrize("k", [1, 511, 512, 513, 1300])
def test_panels_change_nothing(k: int) -> None:
    """Hessians are summed and read, triangles inverted, in panels of 512; all are what the whole would be."""
    X_TK = inputs(k, k, 2 * k)
    found = Hessian(k, X_TK.device)
    found.add(X_TK)
    torch.testing.assert_close(found.matrix(), X_TK.T @ X_TK / k)
    W_NK = weights(6, k, 0)
    assert squared_outputs(W_NK, found.matrix()) == pytest.approx(float((X_TK @ W_NK.T).square().sum()) / k, rel=1e-4)
    U_KK, damp = inverse_factor(found.matrix(), torch.arange(k), "w", DAMP)
    damped_KK = found.matrix().double() + damp * found.matrix().diagonal().mean() * torch.eye(k)
    assert torch.equal(U_KK, U_KK.triu())
    torch.testing.assert_close(U_KK.double().T @ U_KK.double() @ damped_KK, torch.eye(k).double(), atol=1e-3, rtol=0)


@pytest.mark.parametrize("width", [2, 3, 4, 8])
def test_ranges(width: int) -> None:
    """Zeros in reach, the reported loss is that of rounding with them, and a search finds none worse than min-max."""
    generator = torch.Generator().manual_seed(width)
    W_RC, weights_RC = torch.randn(STRIP, 200, generator=generator), torch.rand(STRIP, 200, generator=generator)
    W_RC[:, :20] = W_RC[:, :20].abs()  # one-sided, both ways
    W_RC[:, 20:40] = -W_RC[:, 20:40].abs()
    W_RC[:, 40] = 0
    losses = {}
    for ranges in ("search", "minmax"):
        scales_C, zeros_C, loss_C = fit_ranges(W_RC, weights_RC, width, ranges)
        base = zero_base(width)
        assert ((zeros_C >= base) & (zeros_C <= base + 3)).all() and (scales_C > 0).all()
        codes_RC = ((W_RC / scales_C).round() + zeros_C).clamp(0, 2**width - 1)
        rounded_RC = (codes_RC - zeros_C) * scales_C
        torch.testing.assert_close(loss_C, (weights_RC * (rounded_RC - W_RC).square()).sum(0))
        losses[ranges] = loss_C
    assert losses["search"].sum() < losses["minmax"].sum()


@pytest.mark.parametrize("width", [3, 4, 8])
def test_minmax_ranges_hold_their_weights(width: int) -> None:
    """Also where all have one sign, and the zero that would be best is out of reach."""
    generator = torch.Generator().manual_seed(width)
    W_RC = torch.randn(STRIP, 200, generator=generator)
    W_RC[:, :50] = W_RC[:, :50].abs()
    W_RC[:, 50:100] = -W_RC[:, 50:100].abs()
    scales_C, zeros_C, _ = fit_ranges(W_RC, torch.ones(STRIP, 1), width, "minmax")
    codes_RC = ((W_RC / scales_C).round() + zeros_C).clamp(0, 2**width - 1)
    assert ((W_RC - (codes_RC - zeros_C) * scales_C).abs() <= 1.01 * scales_C).all()


def test_the_most_important_strips_stand_in_4_bit_places() -> None:
    importance_S = torch.tensor([1.0, 9, 2, 8, 0, 3, 7, 4])
    assert choose_strips(importance_S, MixSpec()).tolist() == [1, 0, 2, 4, 3, 5, 6, 7]
    assert choose_strips(importance_S, MixSpec(2, 0.5)).tolist() == [1, 3, 0, 2, 6, 7, 4, 5]
    assert choose_strips(torch.ones(8), MixSpec()).tolist() == [0, 2, 3, 4, 1, 5, 6, 7]  # ties: as they come


def test_ranking_by_range_leaves_the_inputs_out() -> None:
    W_NK, diagonal_K = torch.zeros(3, 64), torch.ones(64)
    W_NK[:, 20], W_NK[:, 40] = 2.0, 1.0  # strip 1 has the wider range, strip 2 the more active inputs
    diagonal_K[32:48] = 100
    by_range = strip_importance(W_NK, diagonal_K, "range")
    by_hessian = strip_importance(W_NK, diagonal_K, "hessian")
    assert by_range.tolist() == [0, 12, 3, 0] and by_hessian.tolist() == [0, 12, 300, 0]
    W_NK += weights(3, 64, 0)
    X_TK = diagonal_K.sqrt() * torch.randn(200, 64, generator=torch.Generator().manual_seed(0))
    for ranking, first in (("range", 1), ("hessian", 2)):
        weight, report = solved(W_NK, X_TK, MixSpec(), MixRecipe("none", ranking))
        assert weight.strip_order_S is not None and int(weight.strip_order_S[0]) == first
        assert (report.share_4bit > 0.9) == (ranking == "hessian")


def test_a_planted_outlier_is_found() -> None:
    """Two where 2 bits can have them; one in a 4-bit strip cannot be, but with 2 bits everywhere it can."""
    W_NK, diagonal_K = weights(8, 128, 0).clamp(-0.02, 0.02), torch.ones(128)
    W_NK[3, 5] = W_NK[5, 100] = 1.0
    W_NK[6, 41], diagonal_K[32:48] = 0.5, 4
    for ranges in ("search", "minmax"):
        chosen_NK = choose_outliers(W_NK, diagonal_K, MixSpec(), ranges, 2)
        assert chosen_NK.nonzero().tolist() == [[5, 100], [6, 41]]
        chosen_NK = choose_outliers(W_NK, diagonal_K, MixSpec(2, 0.0), ranges, 2)
        assert chosen_NK.nonzero().tolist() == [[3, 5], [6, 41]]
    weight, _ = solved(W_NK, inputs(128, 0), MixSpec(), MixRecipe(outliers=2 / W_NK.numel()))
    assert weight.outliers is not None and 100 in weight.outliers.columns.tolist()


@pytest.mark.parametrize("ranges", ["search", "minmax"])
def test_an_outlier_leaves_the_range_to_the_others(ranges: str) -> None:
    W_NK = torch.rand(64, 64, generator=torch.Generator().manual_seed(0))
    W_NK[5, 40] = 100.0
    recipe = MixRecipe(ranges=ranges, outliers=1 / W_NK.numel())
    weight, _ = solve_mixed(W_NK, torch.eye(64), MixSpec(), recipe, "w")
    assert weight.outliers is not None and weight.outliers.values.tolist() == [100]
    assert (weight.dequantize() - W_NK).abs().max() < 1 / 3  # one step


def test_the_share_of_the_error_in_4_bit_strips() -> None:
    W_NK, diagonal_K = torch.zeros(4, 128), torch.ones(128)
    W_NK[:, :16] = W_NK[:, 64:80] = weights(4, 16, 0)
    assert share_of_wide_strips(W_NK, diagonal_K, MixSpec()) == 1
    assert share_of_wide_strips(W_NK, diagonal_K, MixSpec(2, 0.0)) == 0
    assert share_of_wide_strips(W_NK.roll(16, 1), diagonal_K, MixSpec()) == 0
    assert share_of_wide_strips(W_NK.roll(16, 1), diagonal_K, MixSpec(2, 0.5)) == 1
    half_NK = W_NK + W_NK.roll(32, 1)
    assert share_of_wide_strips(half_NK, diagonal_K, MixSpec()) == pytest.approx(0.5)
    diagonal_K[32:48] = diagonal_K[96:112] = 3
    assert share_of_wide_strips(half_NK, diagonal_K, MixSpec()) == pytest.approx(0.25)


def test_what_each_fraction_leaves_wrong(trained: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
    for W_NK, X_TK in trained.values():
        errors = relative_errors(
            pad(W_NK, (0, -W_NK.shape[1] % 64)), pad(X_TK.square().sum(0), (0, -W_NK.shape[1] % 64))
        )
        assert errors == sorted(errors, reverse=True) and 0 < errors[3] < errors[0] / 10 and errors[0] < 1
    W_NK = torch.zeros(4, 128)
    assert relative_errors(W_NK, torch.ones(128)) == [0, 0, 0, 0]
    W_NK[:, :16] = W_NK[:, 64:80] = weights(4, 16, 0)  # the first strip of each block
    nothing, quarter, half, whole = relative_errors(W_NK, torch.ones(128))
    assert nothing > 5 * quarter and quarter == half == whole > 0


def test_bits_go_where_they_save_most() -> None:
    sizes = [[10, 12, 14, 18], [20, 24, 28, 36]]
    errors = [[1.0, 0.9, 0.8, 0.1], [1.0, 0.5, 0.4, 0.3]]
    # a matrix at a time: 0.9 for 8 bytes, 0.5 for 4, which is more for each, then what is left
    assert spend(errors, sizes, 30) == [0, 0]
    assert spend(errors, sizes, 33) == [1, 0]
    assert spend(errors, sizes, 34) == [0, 1]
    assert spend(errors, sizes, 38) == [2, 1]  # though [3, 0] would leave less: what saves most per byte goes first
    assert spend(errors, sizes, 42) == [3, 1]
    assert spend(errors, sizes, 99) == [3, 3]
    # over a choice that is no help by itself, and never to one that hurts
    assert spend([[1.0, 1.0, 0.2, 0.5]], [[10, 12, 14, 18]], 99) == [2]
    assert spend([[1.0, 1.0, 0.2, 0.5]], [[10, 12, 14, 18]], 13) == [0]
    # where the last choice, which has no outliers, is as small as another or the smallest of all
    for budget, chosen in {11: 3, 19: 3, 20: 2, 99: 2}.items():
        assert spend([[1.0, 0.5, 0.1, 0.3]], [[12, 14, 20, 11]], budget) == [chosen]
    assert spend([[1.0, 0.9, 0.8, 0.3]], [[12, 14, 18, 12]], 99) == [3]
    assert spend([[1.0, 0.9, 0.8, 0.3]], [[10, 14, 18, 18]], 99) == [3]


REFUSED_SPECS: dict[str, tuple[dict[str, Any], str]] = {
    "bits": ({"bits": 5, "fraction_4bit": 0.0}, "bits: found 5; allowed: 2, 3, 4 or 8"),
    "bits as text": ({"bits": "2"}, "bits: found '2'"),
    "bits as float": ({"bits": 2.0}, "bits: found 2.0"),
    "fraction": ({"fraction_4bit": 0.3}, "fraction_4bit: found 0.3; allowed: 0, 0.25, 0.5 or 1"),
    "fraction NaN": ({"fraction_4bit": float("nan")}, "fraction_4bit: found nan"),
    "fraction as text": ({"fraction_4bit": "0.25"}, "fraction_4bit: found '0.25'"),
    "fraction as truth": ({"fraction_4bit": True}, "fraction_4bit: found True"),
    "fraction of 3 bits": ({"bits": 3}, "fraction_4bit: found 0.25 with bits 3; allowed: 4-bit strips among 2-bit"),
    "metadata": ({"metadata": "coarse"}, "metadata: found 'coarse'; allowed: fine or paper"),
    "paper at 3 bits": ({"bits": 3, "fraction_4bit": 0.0, "metadata": "paper"}, r"metadata: found paper with strips"),
    "paper at a half": (
        {"fraction_4bit": 0.5, "metadata": "paper"},
        r"metadata: found paper with strips of \(4, 4, 2, 2\) bits",
    ),
}


@pytest.mark.parametrize("case", REFUSED_SPECS)
def test_a_spec_out_of_range(case: str) -> None:
    options, says = REFUSED_SPECS[case]
    with pytest.raises(SpecError, match=f"^{says}.*; to do: "):
        MixSpec(**options)


REFUSED_RECIPES: dict[str, tuple[dict[str, Any], str]] = {
    "order": ({"order": "act"}, "order: found 'act'; allowed: model or none"),
    "ranking": ({"ranking": "size"}, "ranking: found 'size'; allowed: hessian or range"),
    "ranges": ({"ranges": "mse"}, "ranges: found 'mse'; allowed: search or minmax"),
    "outliers below 0": ({"outliers": -0.1}, "outliers: found -0.1; allowed: a share of all weights from 0 to 0.05"),
    "too many outliers": ({"outliers": 0.06}, "outliers: found 0.06"),
    "budget of nothing": ({"average_bits": 0}, "average_bits: found 0; allowed: about 2.41"),
    "more than there is": (
        {"average_bits": 9.0},
        "average_bits: found 9.0; allowed: about 2.41, 2 bits for all strips, to 4.41",
    ),
    "budget NaN": ({"average_bits": float("nan")}, "average_bits: found nan"),
    "endless budget": ({"average_bits": float("inf")}, "average_bits: found inf"),
    "damping below 0": ({"damp": -0.1}, "damp: found -0.1; allowed: a share of the mean activity from 0 to 1"),
    "more damping than activity": ({"damp": 1.1}, "damp: found 1.1"),
    "damping NaN": ({"damp": float("nan")}, "damp: found nan"),
    "damping as text": ({"damp": "x"}, "damp: found 'x'"),
    "outliers as text": ({"outliers": "x"}, "outliers: found 'x'"),
    "no outliers": ({"outliers": None}, "outliers: found None"),
    "budget as text": ({"average_bits": "3"}, "average_bits: found '3'"),
    "budget as truth": ({"average_bits": True}, "average_bits: found True"),
    "correct as text": ({"correct": "no"}, "correct: found 'no'; allowed: true or false"),
    "outliers NaN": ({"outliers": float("nan")}, "outliers: found nan"),
}


@pytest.mark.parametrize("case", REFUSED_RECIPES)
def test_a_recipe_out_of_range(case: str) -> None:
    options, says = REFUSED_RECIPES[case]
    with pytest.raises(SpecError, match=f"^{says}.*; to do: "):
        MixRecipe(**options)


@every([MixSpec(3, 0.0), MixSpec(8, 0.0), MixSpec(2, 1.0)])
def test_outliers_need_2_bit_strips(spec: MixSpec) -> None:
    with pytest.raises(SpecError, match=r"^outliers: found 0.01 with strips . . . ., metadata fine; allowed: "):
        MixRecipe(outliers=0.01).check(spec)
    MixRecipe().check(spec)


def test_gptq_has_neither_outliers_nor_a_budget() -> None:
    for recipe in (MixRecipe(outliers=0.01), MixRecipe(average_bits=3)):
        with pytest.raises(SpecError, match=r"found .* with bits 4, group 128; allowed"):
            recipe.check(QuantSpec())


PLAIN_GPTQ = MixRecipe("none", "hessian", "minmax", 0.0, correct=False, damp=0.01)
REQUESTS: dict[str, tuple[str, str | None, dict[str, Any], tuple[QuantSpec | MixSpec, MixRecipe]]] = {
    "nothing": ("mix64", None, {"bits": None, "order": None}, (MixSpec(), MixRecipe(average_bits=2.91))),
    "3 bits": ("mix64", None, {"bits": 3}, (MixSpec(3, 0.0), MixRecipe())),
    "2 bits": ("mix64", None, {"bits": 2, "correct": False}, (MixSpec(), MixRecipe(correct=False))),
    "a budget": ("mix64", None, {"average_bits": 3.3}, (MixSpec(), MixRecipe(average_bits=3.3))),
    "unordered": ("mix64", None, {"order": "none"}, (MixSpec(), MixRecipe("none", average_bits=2.91))),
    "damped": ("mix64", None, {"damp": 0.01}, (MixSpec(), MixRecipe(average_bits=2.91, damp=0.01))),
    "plain 2 bits": ("mix64", None, {"fraction_4bit": 0.0}, (MixSpec(2, 0.0), MixRecipe())),
    "paper's metadata": (
        "mix64", None, {"metadata": "paper", "outliers": 0.01, "ranges": "minmax", "ranking": "range"},
        (PAPER, MixRecipe(ranking="range", ranges="minmax", outliers=0.01)),
    ),
    "gptq": ("gptq", None, {}, (QuantSpec(), PLAIN_GPTQ)),
    "gptq ordered": (
        "gptq", None, {"bits": 4, "order": "model", "group_size": 64, "sym": False},
        (QuantSpec(4, 64, False), replace(PLAIN_GPTQ, order="model")),
    ),
    "gptq corrected": ("gptq", None, {"correct": True}, (QuantSpec(), replace(PLAIN_GPTQ, correct=True))),
    "v1": ("mix64", "paper-v1", {}, (PAPER, replace(PLAIN_GPTQ, ranking="range", outliers=0.002))),
    "v4": ("mix64", "paper-v4", {"bits": None}, (PAPER, replace(PLAIN_GPTQ, outliers=0.005))),
}  # fmt: skip


@pytest.mark.parametrize("case", REQUESTS)
def test_what_is_asked_for(case: str) -> None:
    format, recipe, options, expected = REQUESTS[case]
    assert requested(format, recipe, options) == expected


REFUSED_REQUESTS: dict[str, tuple[str, str | None, dict[str, Any], str]] = {
    "format": ("awq", None, {}, "format: found 'awq'; allowed: mix64 or gptq"),
    "recipe": ("mix64", "paper-v2", {}, "recipe: found 'paper-v2'; allowed: paper-v1 or paper-v4"),
    "recipe and option": ("mix64", "paper-v1", {"bits": 2}, "recipe: found paper-v1 with bits; allowed: a recipe"),
    "recipe of gptq": ("gptq", "paper-v1", {}, "recipe: found paper-v1 with format gptq"),
    "gptq's option": (
        "mix64", None, {"group_size": 64}, "group_size: found 64; allowed: the options of format mix64, whose groups "
        "are strips of 16; to do: leave it out, or choose format gptq$"
    ),
    **{
        name: ("gptq", None, {name: value}, f"{name}: found .*the options of format gptq; .* choose format mix64$")
        for name, value in {"fraction_4bit": 0.5, "metadata": "fine", "outliers": 0.0, "ranking": "range",
                            "ranges": "minmax", "average_bits": 3.0}.items()
    },
    "bits": ("mix64", None, {"bits": 7}, "bits: found 7"),
    "gptq's bits": ("gptq", None, {"bits": 7}, "bits: found 7"),
    "fraction of 4 bits": ("mix64", None, {"bits": 4, "fraction_4bit": 0.25}, "fraction_4bit: found 0.25 with bits 4"),
    "budget and fraction": (
        "mix64", None, {"average_bits": 3.0, "fraction_4bit": 0.5}, "average_bits: found 3.0 with fraction_4bit 0.5"
    ),
    "budget and its own fraction": (
        "mix64", None, {"average_bits": 3.6, "fraction_4bit": 0.25}, "average_bits: found 3.6 with fraction_4bit 0.25"
    ),
    "budget of 3 bits": ("mix64", None, {"average_bits": 3.0, "bits": 3}, "average_bits: found 3 with strips 3 3 3 3"),
    "outliers of 4 bits": ("mix64", None, {"bits": 4, "outliers": 0.01}, "outliers: found 0.01 with strips 4 4 4 4"),
    "options of both formats": (
        "mix64", None, {"group_size": 64, "outliers": 0.005}, "group_size: found 64; .*; to do: leave it out$"
    ),
    "no such option": ("mix64", None, {"speed": 9}, "speed: found 9; .* options of format mix64; to do: leave it out$"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED_REQUESTS)
def test_what_cannot_be_asked_for(case: str) -> None:
    format, recipe, options, says = REFUSED_REQUESTS[case]
    with pytest.raises(SpecError, match=f"^{says}") as refused:
        requested(format, recipe, options)
    assert "; to do: " in str(refused.value)


def test_recipes_of_the_paper_are_whole() -> None:
    for spec, recipe in PAPER_RECIPES.values():
        recipe.check(spec)
        assert spec == PAPER and recipe.order == "none"
