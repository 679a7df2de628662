"""The gptq layout: real files unpack and pack to the same bytes, and every broken tensor is named."""

import pytest
import torch

from bitshard.checkpoint import Checkpoint
from bitshard.errors import FormatError
from bitshard.layout import GptqLayout
from bitshard.nn import QuantLinear
from bitshard.spec import QuantSpec
from factory import ASSETS, random_weight

REAL = ASSETS / "gptq-smollm2-4l"
needs_assets = pytest.mark.skipif(not REAL.is_dir(), reason=f"no {REAL}: the shared assets are not on this machine")


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_zeros_round_trip_for_every_value(bits: int, version: int) -> None:
    layout = GptqLayout(1 if version == 1 else 2)
    zeros = torch.arange(96 * 4, dtype=torch.int64).view(4, 96).remainder(1 << bits).to(torch.uint8)
    assert torch.equal(layout.unpack_zeros(layout.pack_zeros(zeros, bits), bits), zeros)


def test_version_1_stores_zeros_minus_one() -> None:
    zeros = torch.full((1, 8), 8, dtype=torch.uint8)
    assert GptqLayout(1).pack_zeros(zeros, 4).tolist() == [[0x77777777]]
    assert GptqLayout(2).pack_zeros(zeros, 4).tolist() == [[0x88888888 - (1 << 32)]]


@needs_assets
@pytest.mark.parametrize("name", ["sym-g64-v1", "asym-g32-v2"])
def test_a_peers_file_packs_back_to_its_own_bytes(name: str) -> None:
    checkpoint = Checkpoint.open(REAL / name)
    for module in checkpoint.matrices():
        packed = checkpoint.gptq.layout.pack(checkpoint.weight(module))
        for suffix, tensor in checkpoint.matrix_tensors(module).items():
            assert torch.equal(packed[suffix], tensor), f"{module}.{suffix}"


def broken(**changes: torch.Tensor) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return GptqLayout(2).pack(random_weight(64, 16, QuantSpec(4, 16, False, True), generator)) | changes


NAN = torch.full((4, 16), float("nan"))
CASES = {
    "scales": ({"scales": NAN}, "m.scales: found NaN"),
    "g_idx too high": ({"g_idx": torch.full((64,), 4, dtype=torch.int32)}, "m.g_idx: found groups 4 to 4"),
    "g_idx negative": ({"g_idx": torch.arange(-1, 63, dtype=torch.int32) // 16}, "m.g_idx: found groups -1"),
    "groups of unequal size": (
        {"g_idx": torch.tensor([0] * 15 + [1] * 17 + [2] * 16 + [3] * 16, dtype=torch.int32)},
        "groups of 15 to 17 channels",
    ),
    "qweight rows": ({"qweight": torch.zeros(7, 16, dtype=torch.int32)}, r"m.g_idx: found shape \[64\]"),
    "qzeros columns": ({"qzeros": torch.zeros(4, 3, dtype=torch.int32)}, r"m.qzeros: found shape \[4, 3\]"),
    "dtype": ({"qweight": torch.zeros(8, 16, dtype=torch.int64)}, "m.qweight: found dtype torch.int64"),
    "bias": ({"bias": torch.zeros(15)}, r"m.bias: found shape \[15\]"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_broken_tensor_is_named(case: str) -> None:
    changes, sentence = CASES[case]
    with pytest.raises(FormatError, match=sentence):
        GptqLayout(2).unpack("m", broken(**changes), QuantSpec(4, 16, False, True))


def test_a_missing_tensor_is_named() -> None:
    tensors = broken()
    del tensors["qzeros"]
    with pytest.raises(FormatError, match=r"m\.qzeros: found no such tensor"):
        GptqLayout(2).unpack("m", tensors, QuantSpec(4, 16, False, True))


@pytest.mark.parametrize("version", [1, 2])
def test_a_symmetric_file_shows_a_wrong_version(version: int) -> None:
    spec = QuantSpec(4, 16, True)
    right, wrong = (GptqLayout(1), GptqLayout(2)) if version == 1 else (GptqLayout(2), GptqLayout(1))
    tensors = right.pack(random_weight(64, 16, spec, torch.Generator().manual_seed(0)))
    right.unpack("m", tensors, spec)
    with pytest.raises(FormatError, match=f"right only in version {version}"):
        wrong.unpack("m", tensors, spec)


@pytest.mark.parametrize("suffix", ["g_idx"])
def test_g_idx_may_be_missing(suffix: str) -> None:
    spec = QuantSpec(4, 16, False)
    tensors = GptqLayout(2).pack(random_weight(64, 16, spec, torch.Generator().manual_seed(0)))
    whole = GptqLayout(2).unpack("m", tensors, spec)
    del tensors[suffix]
    assert torch.equal(GptqLayout(2).unpack("m", tensors, spec).dequantize(), whole.dequantize())


@pytest.mark.parametrize("order", ["in order", "act_order", "one group"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("ranks", [2, 3])
def test_slices_put_together_are_the_matrix(ranks: int, bits: int, order: str) -> None:
    """Columns of a rank are whole words of zeros, rows whole groups, or whole words where all scales go along."""
    k, n, generator = 64 * ranks, 64 * ranks, torch.Generator().manual_seed(bits)
    spec = QuantSpec(bits, -1 if order == "one group" else 32, sym=False, desc_act=order == "act_order")
    g_order = torch.randperm(k, generator=generator) if order == "act_order" else None
    layout, weight = GptqLayout(2), random_weight(k, n, spec, generator, g_order, bias=True)
    tensors, W_KN = layout.pack(weight), weight.dequantize()
    assert layout.is_gathered(tensors, spec) == (order == "act_order")
    rows, columns = torch.zeros(0, n), torch.zeros(k, n)
    for rank in range(ranks):
        cut = layout.cut_rows(tensors, spec, rank, ranks)
        local = QuantLinear(k // ranks, n, spec, layout, False, torch.float32)
        local.replace(**{"g_idx": None, **cut, "bias": None, "scales": cut["scales"].float()})
        local.order_rows()
        rows = torch.cat([rows, local(torch.eye(k // ranks))])
        ranges = [(part * n // 2 + rank * 32, part * n // 2 + (rank + 1) * 32) for part in range(2)]
        places = torch.cat([torch.arange(*r) for r in ranges])
        part = layout.unpack("m", layout.cut_columns(tensors, spec, ranges), spec, (k, 64))
        columns[:, places] = part.dequantize()
        assert weight.bias_N is not None and part.bias_N is not None
        assert torch.equal(part.bias_N, weight.bias_N[places])
    assert torch.equal(rows, W_KN) and torch.equal(columns, W_KN)
