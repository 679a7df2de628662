"""The mix64 format: bytes against a decoder written from docs/format.md, golden files, checks, the op that runs it."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from bitshard.errors import FormatError
from bitshard.layout import Mix64Layout
from bitshard.mixed import MixedWeight, Outliers
from bitshard.nn import Mix64Linear
from bitshard.spec import MixSpec
from factory import random_mixed_weight

LAYOUT = Mix64Layout()
GOLDEN = Path(__file__).parent / "golden"
SPECS = [
    *(MixSpec(2, fraction) for fraction in (0.0, 0.25, 0.5, 1.0)),
    *(MixSpec(bits, 0.0) for bits in (3, 4, 8)),
    MixSpec(2, 0.25, "paper"),
]
# outliers lie in 2-bit strips alone, a strip order goes with anything
GOLDENS = {
    "fine": (MixSpec(), 70, 100, 0.05, True),
    "paper": (MixSpec(2, 0.25, "paper"), 259, 40, 0.05, False),
    "3-bit": (MixSpec(3, 0.0), 3, 64, 0.0, True),
    "8-bit": (MixSpec(8, 0.0), 2, 16, 0.0, True),
    "2-bit": (MixSpec(2, 0.0), 1, 70, 0.1, True),
    "half 4-bit": (MixSpec(2, 0.5), 5, 128, 0.1, True),
}


def random(spec: MixSpec, n: int, k: int, seed: int = 0, **options: Any) -> MixedWeight:
    return random_mixed_weight(n, k, spec, torch.Generator().manual_seed(seed), **options)


def by_hand(t: dict[str, torch.Tensor], spec: MixSpec, n: int, k: int) -> torch.Tensor:
    """docs/format.md word for word: one weight after another, in Python's integers and floats."""
    widths, tile = spec.widths, 256 if spec.metadata == "paper" else 64
    numbers = {name: tensor.tolist() for name, tensor in t.items()}
    words = {name: [[word & 0xFFFFFFFF for word in row] for row in numbers[name]]
             for name in ("qweight", "qextra") if name in t}  # fmt: skip
    strips = len(words["qweight"][0])
    order = numbers.get("strip_order", list(range(strips)))
    W = torch.zeros(n, k)
    for row in range(n):
        for strip in range(strips):
            block, place = divmod(strip, 4)
            width = widths[place]
            stream = words["qweight"][row][strip]
            if width > 2:
                extra, start = 0, 16 * sum(w - 2 for w in widths[:place])
                per_block = sum(w - 2 for w in widths) // 2
                for i, word in enumerate(words["qextra"][row][block * per_block : (block + 1) * per_block]):
                    extra |= word << (32 * i)
                stream |= (extra >> start & ((1 << 16 * (width - 2)) - 1)) << 32
            scale, zero = _scale_and_zero(numbers, spec, tile, row, block, place)
            for i in range(16):
                channel = 16 * order[strip] + i
                code = stream >> (width * i) & ((1 << width) - 1)
                if channel < k:
                    W[row, channel] = (code - zero) * scale
    for row in range(n if "outlier_rows" in t else 0):
        for i in range(numbers["outlier_rows"][row], numbers["outlier_rows"][row + 1]):
            strip, within = divmod(numbers["outlier_columns"][i], 16)
            W[row, 16 * order[strip] + within] += numbers["outlier_values"][i]
    return W


def _scale_and_zero(
    numbers: dict[str, Any], spec: MixSpec, tile: int, row: int, block: int, place: int
) -> tuple[float, int]:
    if spec.metadata == "fine":
        step, offset = numbers["scales2"][row // tile][4 * block + place]
        scale_code = numbers["qscales"][row][block] >> (4 * place) & 15
        zero_code = numbers["qzeros"][row][block] >> (2 * place) & 3
        zero = zero_code + (1 << (spec.widths[place] - 1)) - 2
        return _half(step * scale_code + offset), zero
    if place == 0:
        return numbers["row_scales"][row], numbers["row_zeros"][row // 2] >> (4 * (row % 2)) & 15
    meta, zeros2 = numbers["qmeta"][row][block], numbers["zeros2"][row // tile][block]
    step = numbers["scales2"][row // tile][block][place - 1]
    zero2 = zeros2 >> (4 * (place - 1)) & (7 if place < 3 else 15)
    scale_code = meta >> (6 + 3 * (place - 1)) & (7 if place < 3 else 15)
    return _half(step * scale_code + zero2 * step), meta >> (2 * (place - 1)) & 3


def _half(value: float) -> float:
    return torch.tensor(value, dtype=torch.float32).half().item()


def assert_same(one: MixedWeight, other: MixedWeight) -> None:
    for field in fields(MixedWeight):
        a, b = getattr(one, field.name), getattr(other, field.name)
        if isinstance(a, Outliers):
            assert isinstance(b, Outliers) and all(torch.equal(vars(a)[part], vars(b)[part]) for part in vars(a))
        elif isinstance(a, torch.Tensor):
            assert torch.equal(a, b) and a.dtype == b.dtype, field.name
        else:
            assert a == b, field.name


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(SPECS), st.integers(1, 130), st.integers(1, 200), st.sampled_from([0.0, 0.02]), st.booleans(),
    st.booleans(), st.integers(0, 1000),
)  # fmt: skip
def test_pack_and_unpack_are_inverse(
    spec: MixSpec, n: int, k: int, outliers: float, ordered: bool, bias: bool, seed: int
) -> None:
    if 2 not in spec.widths:
        outliers = 0.0
    weight = random(spec, n, k, seed, outliers=outliers, ordered=ordered, bias=bias)
    tensors = LAYOUT.pack(weight)
    unpacked = LAYOUT.unpack("m", tensors, spec, (k, n))
    assert_same(weight, unpacked)
    again = LAYOUT.pack(unpacked)
    assert tensors.keys() == again.keys() and all(torch.equal(tensors[s], again[s]) for s in tensors)
    sizes = {s: t.nbytes for s, t in tensors.items() if s != "bias"}
    shapes = {s: t.shape for s, t in tensors.items()}
    assert LAYOUT.matrix_bytes(shapes, spec, (k, n)) == sum(sizes.values())
    beside = sum(sizes.get(s, 0) for s in (*LAYOUT.outliers, "strip_order"))
    assert spec.code_bytes(k, n) + spec.scale_bytes(k, n) == sum(sizes.values()) - beside


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_bytes_mean_what_the_page_says(spec: MixSpec, ordered: bool) -> None:
    n, k = 67 if spec.metadata == "fine" else 258, 90
    weight = random(spec, n, k, outliers=0.05 if 2 in spec.widths else 0.0, ordered=ordered)
    assert torch.equal(by_hand(LAYOUT.pack(weight), spec, n, k), weight.dequantize())


@pytest.mark.parametrize("name", GOLDENS)
def test_golden_files(name: str) -> None:
    """Files written once, with the matrix they stood for then."""
    spec, n, k, outliers, ordered = GOLDENS[name]
    tensors = load_file(GOLDEN / f"mix64-{name.replace(' ', '-')}.safetensors")
    W_NK = tensors.pop("matrix")
    assert ("outlier_rows" in tensors, "strip_order" not in tensors) == (outliers > 0, ordered)
    weight = LAYOUT.unpack("m", tensors, spec, (k, n))
    assert torch.equal(weight.dequantize(), W_NK)
    packed = LAYOUT.pack(weight)
    assert packed.keys() == tensors.keys()
    for suffix, tensor in tensors.items():
        assert packed[suffix].dtype == tensor.dtype and torch.equal(packed[suffix], tensor), suffix


def test_the_worked_example() -> None:
    """docs/format.md, "One block by hand"."""
    codes = torch.tensor([*range(16), *[0, 1, 2, 3] * 4, *[3] * 16, *[1] * 16], dtype=torch.uint8)
    weight = MixedWeight(
        MixSpec(), 64, codes[None],
        scale_codes_NS=torch.tensor([[1, 2, 3, 15]], dtype=torch.uint8),
        zeros_NS=torch.tensor([[7, 2, 0, 1]], dtype=torch.uint8),
        steps_TS=torch.full((1, 4), 0.5), offsets_TS=torch.full((1, 4), 0.25),
    )  # fmt: skip
    tensors = LAYOUT.pack(weight)
    words = [f"{word & 0xFFFFFFFF:08x}" for suffix in ("qweight", "qextra") for word in tensors[suffix][0].tolist()]
    assert words == ["76543210", "e4e4e4e4", "ffffffff", "55555555", "fedcba98"]
    assert f"{int(tensors['qscales']) & 0xFFFF:04x} {int(tensors['qzeros']):02x}" == "f321 49"
    assert weight.dequantize()[0, [0, 15, 16, 32, 48]].tolist() == [-7 * 0.75, 8 * 0.75, -2 * 1.25, 3 * 1.75, 0]


def test_the_mix_of_the_default_is_2_9_bits() -> None:
    spec, (n, k) = MixSpec(), (4096, 4096)
    assert round((spec.code_bytes(k, n) + spec.scale_bytes(k, n)) * 8 / (n * k), 3) == 2.906


def packed(**options: Any) -> dict[str, torch.Tensor]:
    return LAYOUT.pack(random(MixSpec(), 70, 100, outliers=0.05, bias=True, **options))


def changed(suffix: str, place: tuple[int, ...], value: float) -> dict[str, torch.Tensor]:
    """One entry of one tensor replaced; uint16 has no item assignment everywhere, so it goes through int32."""
    tensor = packed(ordered=suffix != "strip_order")[suffix]
    wide = tensor.to(torch.int32) if tensor.dtype == torch.uint16 else tensor.clone()
    wide[place] = value
    return {suffix: wide.to(tensor.dtype)}


BROKEN = {
    "qweight is 1-D": ({"qweight": torch.zeros(8, dtype=torch.int32)}, r"m.qweight: found shape \[8\]"),
    "qextra": ({"qextra": torch.zeros(70, 3, dtype=torch.int32)}, r"m.qextra: found shape \[70, 3\]"),
    "tiles": ({"scales2": torch.zeros(1, 8, 2).half()}, r"m.scales2: found shape \[1, 8, 2\]; allowed: \[2, 8, 2\]"),
    "an array of the other metadata": (
        {"qmeta": torch.zeros(70, 2, dtype=torch.int16)}, "m.qmeta: found shape .* allowed: no such tensor"
    ),
    "dtype": ({"qscales": torch.zeros(70, 2, dtype=torch.int32)}, "m.qscales: found dtype torch.int32"),
    "step": (changed("scales2", (1, 3, 0), float("nan")), "m.scales2: found NaN"),
    "a scale that overflows": ({"scales2": torch.full((2, 8, 2), 6e4).half()}, "m.scales2: found a scale beyond"),
    "bias": (changed("bias", (0,), float("inf")), "m.bias: found NaN"),
    "outlier": (changed("outlier_values", (0,), float("inf")), "m.outlier_values: found NaN"),
    "first row": (changed("outlier_rows", (0,), 1), "m.outlier_rows: found rows from 1"),
    "last row": (changed("outlier_rows", (70,), 1), "m.outlier_rows: found rows"),
    "a row that falls": (changed("outlier_rows", (30,), 0), "m.outlier_rows: found rows"),
    "a column beyond the last": (changed("outlier_columns", (0,), 65535), "m.outlier_columns: found a column beyond"),
    "a column of the padding": (changed("outlier_columns", (0,), 101), "m.outlier_columns: found a column beyond"),
    "a column in a 4-bit strip": (changed("outlier_columns", (0,), 3), "only in 2-bit strips"),
    "a weight where nothing is": (changed("qweight", (5, 7), 0x0E4E4E4E), "m.qweight: found weights in channels"),
    "a strip there twice": (changed("strip_order", (0,), 1), "m.strip_order: found strips that are missing"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_tensor_is_named(case: str) -> None:
    changes, sentence = BROKEN[case]
    with pytest.raises(FormatError, match=sentence):
        LAYOUT.unpack("m", packed() | changes, MixSpec(), (100, 70))


def test_a_slot_below_an_outlier_that_is_not_zero_is_named() -> None:
    tensors = packed()
    column, row = int(tensors["outlier_columns"][0]), int((tensors["outlier_rows"][1:] == 0).sum())
    tensors["qweight"][row, column // 16] ^= 1 << (2 * (column % 16))
    with pytest.raises(FormatError, match=r"m\.qweight: found a weight in the place of an outlier"):
        LAYOUT.unpack("m", tensors, MixSpec(), (100, 70))


def test_columns_out_of_order_are_named() -> None:
    tensors = packed()
    columns = tensors["outlier_columns"].to(torch.int32)
    row = int(tensors["outlier_rows"].diff().argmax())
    start = int(tensors["outlier_rows"][row])
    columns[[start, start + 1]] = columns[[start + 1, start]]
    with pytest.raises(FormatError, match="columns out of order"):
        LAYOUT.unpack("m", tensors | {"outlier_columns": columns.to(torch.uint16)}, MixSpec(), (100, 70))


@pytest.mark.parametrize("suffix", ["qweight", "qextra", "qscales", "qzeros", "scales2", "outlier_rows"])
def test_a_missing_tensor_is_named(suffix: str) -> None:
    tensors = packed()
    del tensors[suffix]
    with pytest.raises(FormatError, match=rf"m\.{suffix}: found no such tensor"):
        LAYOUT.unpack("m", tensors, MixSpec(), (100, 70))


@pytest.mark.parametrize(
    ("suffix", "bit"), [("zeros2", 0x8), ("zeros2", 0x80), ("zeros2", 0x1000), ("row_zeros", 0x10)]
)
def test_bits_that_mean_nothing_are_zero(suffix: str, bit: int) -> None:
    spec = MixSpec(2, 0.25, "paper")
    tensors = LAYOUT.pack(random(spec, 7, 64))
    tensors[suffix].view(-1)[-1] |= bit
    with pytest.raises(FormatError, match=rf"m\.{suffix}: found bits set that mean nothing"):
        LAYOUT.unpack("m", tensors, spec, (64, 7))


def test_more_columns_than_16_bits_count_are_refused() -> None:
    weight = random(MixSpec(2, 0.0), 1, 1 << 16, outliers=0.001)
    LAYOUT.unpack("m", LAYOUT.pack(weight), weight.spec, (1 << 16, 1))
    wider = random(MixSpec(2, 0.0), 1, (1 << 16) + 64, outliers=0.001)
    with pytest.raises(FormatError, match="found 65600 input channels; allowed: 65536 at most"):
        LAYOUT.pack(wider)


def module(weight: MixedWeight) -> Mix64Linear:
    linear = Mix64Linear(weight.in_features, weight.out_features, weight.spec)
    linear.replace(**LAYOUT.pack(weight))
    return linear


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_identity_activations_give_the_matrix_bit_for_bit(spec: MixSpec, dtype: torch.dtype) -> None:
    weight = random(spec, 67, 90, outliers=0.05 if 2 in spec.widths else 0.0, ordered=spec.bits != 2)
    assert torch.equal(module(weight)(torch.eye(90, dtype=dtype)), weight.dequantize(dtype).T)


def test_the_module_adds_its_bias_and_takes_any_batch() -> None:
    weight = random(MixSpec(), 67, 90, outliers=0.05, ordered=False, bias=True)
    x = torch.randn(2, 3, 90, generator=torch.Generator().manual_seed(0))
    assert weight.bias_N is not None
    expected = x @ weight.dequantize().T + weight.bias_N.float()
    torch.testing.assert_close(module(weight)(x), expected, rtol=0, atol=1e-5)
    assert module(weight)(x[:, :0]).shape == (2, 0, 67)


@pytest.mark.parametrize("spec", [MixSpec(), MixSpec(3, 0.0), MixSpec(2, 0.25, "paper")], ids=str)
@pytest.mark.parametrize("ranks", [2, 3])
def test_slices_put_together_are_the_matrix(spec: MixSpec, ranks: int) -> None:
    """Columns of a rank are whole tiles, rows are whole blocks. Two parts, as of a fused matrix."""
    tile = spec.tile
    n, k = 2 * ranks * tile, 64 * ranks * 2
    weight = random(spec, n, k, outliers=0.05 if 2 in spec.widths else 0.0, bias=True)
    tensors, W_NK = LAYOUT.pack(weight), weight.dequantize()
    rows, columns = torch.zeros(n, 0), torch.zeros(n, k)
    for rank in range(ranks):
        local = LAYOUT.unpack("m", LAYOUT.cut_rows(tensors, spec, rank, ranks), spec, (k // ranks, n))
        rows = torch.cat([rows, local.dequantize()], dim=1)
        ranges = [(part * n // 2 + rank * tile, part * n // 2 + (rank + 1) * tile) for part in range(2)]
        local = LAYOUT.unpack("m", LAYOUT.cut_columns(tensors, spec, ranges), spec, (k, 2 * tile))
        places = torch.cat([torch.arange(*r) for r in ranges])
        columns[places] = local.dequantize()
        assert torch.equal(local.bias_N, weight.bias_N[places])
    assert torch.equal(rows, W_NK) and torch.equal(columns, W_NK)


def test_ranges_that_meet_are_one_cut() -> None:
    """A multi-query model's k and v: v begins inside a tile, behind k."""
    weight = random(MixSpec(), 64 + 2 * 16, 64, outliers=0.05)
    tensors = LAYOUT.pack(replace(weight, spec=weight.spec))
    cut = LAYOUT.cut_columns(tensors, weight.spec, [(64, 80), (80, 96)])
    assert torch.equal(LAYOUT.unpack("m", cut, weight.spec, (64, 32)).dequantize(), weight.dequantize()[64:])


def test_compile_and_meta() -> None:
    layer, x = module(random(MixSpec(), 67, 90, outliers=0.05, ordered=False)), torch.randn(3, 90)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), layer(x))
    assert layer.to("meta")(x.to("meta")).shape == (3, 67)
