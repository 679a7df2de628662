"""Packed layouts, `gptq` and `mix64`: the only place where the logical value of a matrix becomes bytes and back.

docs/format.md is the contract. `gptq`, the public format, K input and N output channels, G groups, b bits:

| name    | dtype            | shape          | order                                             |
|---------|------------------|----------------|---------------------------------------------------|
| qweight | int32            | [K*b/32, N]    | codes packed along K, bitpack's order             |
| qzeros  | int32            | [G, N*b/32]    | zeros packed along N; version 1 stores them minus one |
| scales  | float16/32, bf16 | [G, N]         |                                                   |
| g_idx   | int32            | [K], may be missing | group of each input channel                  |
| bias    | float            | [N], may be missing |                                              |

`mix64`, ours, B blocks of 64 input channels, S = 4 B strips of 16, T tiles of output channels:

| name            | dtype   | shape     | order                                                        |
|-----------------|---------|-----------|--------------------------------------------------------------|
| qweight         | int32   | [N, S]    | the first 32 bits of every strip's codes                     |
| qextra          | int32   | [N, B*e]  | the rest of them, block by block; missing at 2 bits          |
| scales2         | float16 | [T, S, 2] | step and offset of a strip's scales; "paper": [T, B, 3] steps |
| qscales, qzeros | int16, uint8 | [N, B] | "fine": four 4-bit scale codes, four 2-bit zero codes        |
| qmeta           | int16   | [N, B]    | "paper": zero codes of 2, 2, 2 bits, scale codes of 3, 3, 4  |
| zeros2          | int16   | [T, B]    | "paper": offsets of the scales, in steps, 4, 4 and 8 bits    |
| row_scales, row_zeros | float16, uint8 | [N], [N/2] | "paper": of all 4-bit strips of a row           |
| outlier_rows, outlier_columns, outlier_values | int32, uint16, float16 | [N+1], [nnz], [nnz] | CSR; may be missing |
| strip_order     | int16   | [S], may be missing | the input's strip that stands at each place        |
| bias            | float   | [N], may be missing |                                                    |
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from math import ceil, prod
from typing import Any, ClassVar, Literal, Protocol

import torch

from bitshard.bitpack import pack, packed_length, unpack
from bitshard.errors import FormatError
from bitshard.mixed import MixedWeight, Outliers, strip_widths, zero_bases
from bitshard.quantized import QuantizedWeight, trivial_g_idx
from bitshard.spec import BLOCK, STRIP, WORD_BITS, MixSpec, QuantSpec, codes_per_pack

FORMAT_VERSION = 1  # of what bitshard writes beside the public tensors: config section and safetensors metadata
FLOATS = (torch.float16, torch.bfloat16, torch.float32)
MAX_COLUMNS = 1 << 16  # outlier_columns are 16-bit
# fields of packed metadata, lowest bits first
FINE_SCALES, FINE_ZEROS = (4, 4, 4, 4), (2, 2, 2, 2)
PAPER_ZEROS, PAPER_SCALES, PAPER_ZEROS2 = (2, 2, 2), (3, 3, 4), (4, 4, 8)


class Layout(Protocol):
    """What readers and writers ask of a layout. `spec` and weights are of its own kind; tensors come by suffix."""

    @property
    def name(self) -> str: ...

    @property
    def method(self) -> str:
        """`quant_method` in config.json."""
        ...

    @property
    def suffixes(self) -> tuple[str, ...]: ...

    @property
    def order_suffix(self) -> str:
        """The tensor that says in which order a matrix wants its input, where that is not the model's."""
        ...

    def check_shapes(
        self, name: str, shapes: Mapping[str, Sequence[int]], spec: Any, size: tuple[int, int] | None = None
    ) -> tuple[int, int]:
        """K and N of a matrix from its tensors' shapes; FormatError when they do not fit each other, or `size`.

        size: K and N as config.json has them, where it does.
        """
        ...

    def check(
        self, name: str, tensors: Mapping[str, torch.Tensor], spec: Any, size: tuple[int, int] | None = None
    ) -> None:
        """Everything that a reader relies on, or FormatError with the tensor's name."""
        ...

    def unpack(
        self, name: str, tensors: Mapping[str, torch.Tensor], spec: Any, size: tuple[int, int] | None = None
    ) -> QuantizedWeight | MixedWeight:
        """Tensors to the logical value, after `check`."""
        ...

    def pack(self, weight: Any) -> dict[str, torch.Tensor]:
        """The exact inverse of `unpack`."""
        ...

    def matrix_bytes(self, shapes: Mapping[str, Sequence[int]], spec: Any, size: tuple[int, int]) -> int:
        """Bytes of all tensors of a matrix of K and N channels, without its bias, which is no weight."""
        ...


@dataclass(frozen=True)
class GptqLayout:
    """The public GPTQ format. zeros_version: 1 stores every zero minus one (AutoGPTQ), 2 as it is (GPTQModel)."""

    zeros_version: Literal[1, 2]

    name: ClassVar[str] = "gptq"
    method: ClassVar[str] = "gptq"
    suffixes: ClassVar[tuple[str, ...]] = ("qweight", "qzeros", "scales", "g_idx", "bias")
    order_suffix: ClassVar[str] = "g_idx"

    def unpack(
        self, name: str, tensors: Mapping[str, torch.Tensor], spec: QuantSpec, size: tuple[int, int] | None = None
    ) -> QuantizedWeight:
        """Tensors by suffix -> logical value. FormatError names the matrix and what is wrong with it."""
        self.check(name, tensors, spec, size)
        qweight, scales = tensors["qweight"], tensors["scales"]
        codes = unpack(qweight, spec.bits, dim=0)
        zeros = self.unpack_zeros(tensors["qzeros"], spec.bits)
        g_idx = tensors.get("g_idx")
        if g_idx is None:
            g_idx = trivial_g_idx(codes.shape[0], spec.group(codes.shape[0]))
        return QuantizedWeight(spec, codes, scales, zeros, g_idx.to(torch.int32), tensors.get("bias"))

    def pack(self, weight: QuantizedWeight) -> dict[str, torch.Tensor]:
        """Logical value -> tensors by suffix, `g_idx` always among them. The exact inverse of `unpack`."""
        tensors = {
            "qweight": pack(weight.codes_KN, weight.spec.bits, dim=0),
            "qzeros": self.pack_zeros(weight.zeros_GN, weight.spec.bits),
            "scales": weight.scales_GN.contiguous(),
            "g_idx": weight.g_idx_K.to(torch.int32).contiguous(),
        }
        if weight.bias_N is not None:
            tensors["bias"] = weight.bias_N.contiguous()
        return tensors

    def matrix_bytes(self, shapes: Mapping[str, Sequence[int]], spec: QuantSpec, size: tuple[int, int]) -> int:
        """`g_idx` counts where there is one, even in order; scales count as 16 bits."""
        return spec.code_bytes(*size) + spec.scale_bytes(*size) + (4 * size[0] if "g_idx" in shapes else 0)

    def unpack_zeros(self, qzeros: torch.Tensor, bits: int) -> torch.Tensor:
        """[G, N*bits/32] words to the true zeros, uint8 [G, N]."""
        if self.zeros_version == 1 and bits != 3:
            qzeros = (qzeros.long() + _ones(bits)).to(torch.int32)  # keeps the low 32 bits
        zeros = unpack(qzeros, bits, dim=1)
        if self.zeros_version == 1 and bits == 3:
            zeros = (zeros + 1) & 7
        return zeros

    def pack_zeros(self, zeros_GN: torch.Tensor, bits: int) -> torch.Tensor:
        if self.zeros_version == 1 and bits == 3:
            return pack((zeros_GN + 7) & 7, bits, dim=1)
        qzeros = pack(zeros_GN, bits, dim=1)
        return (qzeros.long() - _ones(bits)).to(torch.int32) if self.zeros_version == 1 else qzeros

    def cut_columns(
        self, tensors: Mapping[str, torch.Tensor], spec: QuantSpec, ranges: Sequence[tuple[int, int]]
    ) -> dict[str, torch.Tensor]:
        """The output channels [start, stop) of `ranges`, whole words of zeros each."""
        cut = {}
        for suffix, tensor in tensors.items():
            bits = spec.bits if suffix == "qzeros" else WORD_BITS  # how much of a word one channel takes
            parts = [tensor[..., a * bits // WORD_BITS : b * bits // WORD_BITS] for a, b in ranges]
            cut[suffix] = tensor if suffix == "g_idx" else torch.cat(parts, -1)
        return cut

    def cut_rows(
        self, tensors: Mapping[str, torch.Tensor], spec: QuantSpec, rank: int, size: int
    ) -> dict[str, torch.Tensor]:
        """One rank's input channels, `size` ranks holding as many each; its own scales, or all if gathered."""
        cut, gathered = dict(tensors), self.is_gathered(tensors, spec)
        for suffix in ("qweight", "g_idx") if gathered else ("qweight", "qzeros", "scales"):
            if suffix in cut and len(cut[suffix]) > 1:
                cut[suffix] = tensors[suffix].chunk(size)[rank].contiguous()
        if not gathered:
            cut.pop("g_idx", None)
        return cut

    def is_gathered(self, tensors: Mapping[str, torch.Tensor], spec: QuantSpec) -> bool:
        """Whether the order asks for the input in another one."""
        g_idx = tensors.get("g_idx")
        return g_idx is not None and not torch.equal(g_idx, trivial_g_idx(len(g_idx), spec.group(len(g_idx))))

    def permute_rows(self, qweight: torch.Tensor, bits: int, perm_K: torch.Tensor) -> torch.Tensor:
        """Packed rows in another order, `perm[new] = old`, without the other tensors."""
        return pack(unpack(qweight, bits, dim=0)[perm_K], bits, dim=0)

    def check(
        self, name: str, tensors: Mapping[str, torch.Tensor], spec: QuantSpec, size: tuple[int, int] | None = None
    ) -> None:
        """Shapes, dtypes and values that any reader relies on; codes can hold anything, so qweight is not read."""
        self.check_shapes(name, {suffix: tensor.shape for suffix, tensor in tensors.items()}, spec, size)
        for suffix in ("qweight", "qzeros"):
            if tensors[suffix].dtype != torch.int32:
                raise FormatError(
                    f"{name}.{suffix}", f"dtype {tensors[suffix].dtype}", "int32",
                    "pack the file with 32-bit words (pack_dtype int32)",
                )  # fmt: skip
        for suffix in ("scales", "bias"):
            if suffix in tensors and tensors[suffix].dtype not in FLOATS:
                raise FormatError(
                    f"{name}.{suffix}", f"dtype {tensors[suffix].dtype}", "float16, bfloat16 or float32",
                    "get the file again",
                )  # fmt: skip
            if suffix in tensors and not bool(torch.isfinite(tensors[suffix]).all()):
                raise FormatError(f"{name}.{suffix}", "NaN or infinite values", "finite floats", "quantize it again")
        if "g_idx" in tensors:
            check_g_idx(name, tensors["g_idx"], spec)
        elif spec.irregular:
            raise FormatError(
                f"{name}.g_idx", "no such tensor, and desc_act=true", "a g_idx, as the order of channels is free",
                "get the file again, or correct desc_act",
            )  # fmt: skip
        if spec.sym:
            self._check_version(name, self.unpack_zeros(tensors["qzeros"], spec.bits), 1 << (spec.bits - 1))

    def _check_version(self, name: str, zeros_GN: torch.Tensor, middle: int) -> None:
        """A symmetric weight has one possible zero, so it shows when the declared version is the wrong one."""
        off_by_one = middle + 1 if self.zeros_version == 1 else middle - 1
        if bool((zeros_GN == off_by_one).all()):
            raise FormatError(
                f"{name}.qzeros",
                f"sym=true with zeros that are right only in version {3 - self.zeros_version}, "
                f"declared as version {self.zeros_version}",
                "checkpoint_format 'gptq' with zeros stored minus one, or 'gptq_v2' with zeros as they are",
                "correct checkpoint_format in config.json and quantize_config.json",
            )

    def check_shapes(
        self, name: str, shapes: Mapping[str, Sequence[int]], spec: QuantSpec, size: tuple[int, int] | None = None
    ) -> tuple[int, int]:
        """The sizes K and N of a matrix from the shapes of its tensors by suffix; FormatError when they do not fit.

        size: K and N as config.json has them, where it does.
        """
        for suffix in ("qweight", "qzeros", "scales"):
            if suffix not in shapes:
                raise FormatError(
                    f"{name}.{suffix}",
                    "no such tensor",
                    "qweight, qzeros and scales for each matrix",
                    "get the file again",
                )
        words, n = shapes["qweight"] if len(shapes["qweight"]) == 2 else (0, 0)
        k = words * WORD_BITS // spec.bits
        if size and k and (k, n) != size:
            raise FormatError(
                f"{name}.qweight",
                f"{k} x {n} channels",
                f"{size[0]} x {size[1]} channels, as config.json has it",
                "correct bits or sizes in config.json, or get the files again",
            )
        groups = ceil(k / spec.group(k)) if k else 0
        expected = {
            "qweight": (packed_length(k, spec.bits), n),
            "qzeros": (groups, packed_length(n, spec.bits)),
            "scales": (groups, n),
            "g_idx": (k,),
            "bias": (n,),
        }
        for suffix, shape in expected.items():
            if suffix in shapes and (tuple(shapes[suffix]) != shape or 0 in shape):
                raise FormatError(
                    f"{name}.{suffix}",
                    f"shape {list(shapes[suffix])}",
                    f"{list(shape)} for {k} x {n} at {spec.bits} bits, group_size {spec.group_size}",
                    "check bits and group_size in the config, or get the file again",
                )
        if k % spec.group(k) or n % codes_per_pack(spec.bits):
            raise FormatError(
                name,
                f"{k} input and {n} output channels",
                f"input channels in whole groups of {spec.group(k)}, output channels in whole words of "
                f"{codes_per_pack(spec.bits)}",
                "quantize with a group_size that divides, or with padding (`--max-tp 1`)",
            )
        return k, n


@dataclass(frozen=True)
class Mix64Layout:
    """bitshard's own format: strips of two widths in aligned words, scale codes, second-order scales, outliers."""

    name: ClassVar[str] = "mix64"
    method: ClassVar[str] = "bitshard"
    dtypes: ClassVar[Mapping[str, torch.dtype]] = {
        "qweight": torch.int32,
        "qextra": torch.int32,
        "scales2": torch.float16,
        "qscales": torch.int16,
        "qzeros": torch.uint8,
        "qmeta": torch.int16,
        "zeros2": torch.int16,
        "row_scales": torch.float16,
        "row_zeros": torch.uint8,
        "outlier_rows": torch.int32,
        "outlier_columns": torch.uint16,
        "outlier_values": torch.float16,
        "strip_order": torch.int16,
    }
    suffixes: ClassVar[tuple[str, ...]] = (*dtypes, "bias")
    order_suffix: ClassVar[str] = "strip_order"
    metadata: ClassVar[Mapping[str, tuple[str, ...]]] = {  # suffixes, by MixSpec.metadata
        "fine": ("scales2", "qscales", "qzeros"),
        "paper": ("scales2", "qmeta", "zeros2", "row_scales", "row_zeros"),
    }
    outliers: ClassVar[tuple[str, ...]] = ("outlier_rows", "outlier_columns", "outlier_values")

    def unpack(
        self, name: str, tensors: Mapping[str, torch.Tensor], spec: MixSpec, size: tuple[int, int] | None = None
    ) -> MixedWeight:
        """Tensors by suffix -> logical value. FormatError names the matrix and what is wrong with it.

        size: K and N; without it all stored input channels are real.
        """
        self.check(name, tensors, spec, size)
        return self.decode(tensors, spec, size[0] if size else tensors["qweight"].shape[1] * STRIP)

    def decode(self, tensors: Mapping[str, torch.Tensor], spec: MixSpec, in_features: int) -> MixedWeight:
        """`unpack` of tensors that were checked before."""
        outliers = None
        if "outlier_rows" in tensors:
            outliers = _outliers(tensors)
        return MixedWeight(
            spec,
            in_features,
            codes_NK=unpack_strips(tensors["qweight"], tensors.get("qextra"), spec),
            **_unpack_metadata(tensors, spec),
            outliers=outliers,
            strip_order_S=tensors["strip_order"].long() if "strip_order" in tensors else None,
            bias_N=tensors.get("bias"),
        )

    def pack(self, weight: MixedWeight) -> dict[str, torch.Tensor]:
        """Logical value -> tensors by suffix. The exact inverse of `unpack`, for values that the format can hold."""
        tensors = pack_strips(weight.codes_NK, weight.spec)
        tensors |= _pack_paper(weight) if weight.spec.metadata == "paper" else _pack_fine(weight)
        if weight.outliers is not None:
            if weight.codes_NK.shape[1] > MAX_COLUMNS:
                raise FormatError(
                    "outlier_columns", f"{weight.codes_NK.shape[1]} input channels", f"{MAX_COLUMNS} at most",
                    "quantize without outliers",
                )  # fmt: skip
            columns = weight.outliers.columns.to(torch.uint16)
            tensors |= zip(self.outliers, (weight.outliers.row_starts, columns, weight.outliers.values), strict=True)
        if weight.strip_order_S is not None:
            tensors["strip_order"] = weight.strip_order_S.to(torch.int16)
        if weight.bias_N is not None:
            tensors["bias"] = weight.bias_N
        return {suffix: tensor.contiguous() for suffix, tensor in tensors.items()}

    def cut_columns(
        self, tensors: Mapping[str, torch.Tensor], spec: MixSpec, ranges: Sequence[tuple[int, int]]
    ) -> dict[str, torch.Tensor]:
        """The output channels [start, stop) of `ranges`, which begin at a multiple of a tile or where another ends."""
        merged: list[tuple[int, int]] = []
        for start, stop in ranges:
            joins = bool(merged) and merged[-1][1] == start
            merged[-1:] = [(merged[-1][0], stop)] if joins else [*merged[-1:], (start, stop)]
        per_entry = {"scales2": spec.tile, "zeros2": spec.tile, "row_zeros": 2}  # output channels of an entry of dim 0
        cut = {}
        for suffix, tensor in tensors.items():
            if suffix == "strip_order":
                cut[suffix] = tensor
            elif suffix not in self.outliers:
                channels = per_entry.get(suffix, 1)
                cut[suffix] = torch.cat([tensor[a // channels : ceil(b / channels)] for a, b in merged])
        if "outlier_rows" in tensors:
            outliers = _outliers(tensors)
            rows = torch.cat([torch.arange(a, b) for a, b in merged])
            local = torch.full((len(outliers.row_starts) - 1,), -1).index_put((rows,), torch.arange(len(rows)))
            cut |= _outlier_tensors(outliers, local[outliers.rows()], outliers.columns, len(rows))
        return cut

    def is_gathered(self, tensors: Mapping[str, torch.Tensor], spec: MixSpec) -> bool:
        """Whether the strips ask for the input in another order."""
        return "strip_order" in tensors

    def cut_rows(
        self, tensors: Mapping[str, torch.Tensor], spec: MixSpec, rank: int, size: int
    ) -> dict[str, torch.Tensor]:
        """One rank's blocks of input channels, `size` ranks holding as many each; no `strip_order`."""
        cut = {
            suffix: tensor.chunk(size, dim=1)[rank].contiguous() if tensor.dim() > 1 else tensor
            for suffix, tensor in tensors.items()
            if suffix not in self.outliers
        }
        if "outlier_rows" in tensors:
            outliers, width = _outliers(tensors), cut["qweight"].shape[1] * STRIP
            columns = outliers.columns - rank * width
            rows = torch.where((columns >= 0) & (columns < width), outliers.rows(), -1)
            cut |= _outlier_tensors(outliers, rows, columns, len(cut["qweight"]))
        return cut

    def matrix_bytes(self, shapes: Mapping[str, Sequence[int]], spec: MixSpec, size: tuple[int, int]) -> int:
        """Every tensor as it is stored."""
        return sum(prod(shape) * self.dtypes[suffix].itemsize for suffix, shape in shapes.items() if suffix != "bias")

    def check_shapes(
        self, name: str, shapes: Mapping[str, Sequence[int]], spec: MixSpec, size: tuple[int, int] | None = None
    ) -> tuple[int, int]:
        """K and N of a matrix from the shapes of its tensors by suffix; FormatError when they do not fit.

        size: K and N as config.json has them; without it all stored input channels are real.
        """
        if len(shapes.get("qweight", ())) != 2 or 0 in shapes["qweight"]:
            found = f"shape {list(shapes['qweight'])}" if "qweight" in shapes else "no such tensor"
            raise FormatError(
                f"{name}.qweight", found, "output channels x strips of input channels", "get the file again"
            )
        n, strips = shapes["qweight"]
        k, expected_n = size or (strips * STRIP, n)
        if (strips * STRIP, n) != (spec.blocks(k) * BLOCK, expected_n):
            raise FormatError(
                f"{name}.qweight",
                f"{strips * STRIP} x {n} channels",
                f"{k} x {expected_n} channels in whole blocks of {BLOCK}, as config.json has it",
                "correct config.json, or get the files again",
            )
        entries = tuple(shapes.get("outlier_values", (0,)))
        required = {"qweight": (n, strips), **_metadata_shapes(spec, n, strips)}
        outliers = {"outlier_rows": (n + 1,), "outlier_columns": entries[:1], "outlier_values": entries[:1]}
        if not shapes.keys().isdisjoint(outliers):
            required |= outliers
        expected = {**required, "strip_order": (strips,), "bias": (n,)}
        for suffix in (*required, *shapes):
            found = f"shape {list(shapes[suffix])}" if suffix in shapes else "no such tensor"
            if suffix not in expected or suffix not in shapes or tuple(shapes[suffix]) != expected[suffix]:
                raise FormatError(
                    f"{name}.{suffix}",
                    found,
                    f"{list(expected[suffix]) if suffix in expected else 'no such tensor'} for {k} x {n} in strips of "
                    f"{', '.join(map(str, spec.widths))} bits, metadata {spec.metadata}",
                    "check bits, fraction_4bit and metadata in the config, or get the file again",
                )
        return k, n

    def check(
        self, name: str, tensors: Mapping[str, torch.Tensor], spec: MixSpec, size: tuple[int, int] | None = None
    ) -> None:
        """Everything that a reader relies on. Of the codes, only those that must equal their zero are read."""
        k, _ = self.check_shapes(name, {suffix: tensor.shape for suffix, tensor in tensors.items()}, spec, size)
        for suffix, tensor in tensors.items():
            allowed = FLOATS if suffix == "bias" else (self.dtypes[suffix],)
            if tensor.dtype not in allowed:
                raise FormatError(
                    f"{name}.{suffix}", f"dtype {tensor.dtype}", " or ".join(map(str, allowed)), "get the file again"
                )
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise FormatError(f"{name}.{suffix}", "NaN or infinite values", "finite floats", "quantize it again")
        _check_padding_bits(name, tensors)
        if "strip_order" in tensors:
            _check_strip_order(name, tensors["strip_order"])
        metadata = _unpack_metadata(tensors, spec)
        unused, codes_NU = _unused_channels(tensors, spec, k)
        if not bool(torch.isfinite(MixedWeight(spec, k, codes_NU, **metadata).scales()).all()):
            raise FormatError(f"{name}.scales2", "a scale beyond float16", "scales up to 65504", "quantize it again")
        if bool((codes_NU != metadata["zeros_NS"][:, unused // STRIP]).any()):
            raise FormatError(
                f"{name}.qweight", f"weights in channels beyond the {k} that there are", "codes equal to their zero",
                "quantize it again",
            )  # fmt: skip
        if "outlier_rows" in tensors:
            _check_outliers(name, tensors, spec, unused, metadata["zeros_NS"])


def _ones(bits: int) -> int:
    """A one in every field of a word. Version 1 files are made by subtracting it from whole words, borrow and all."""
    return sum(1 << i for i in range(0, 32, bits))


def check_g_idx(name: str, g_idx: torch.Tensor, spec: QuantSpec) -> None:
    """Every input channel is in a group that exists, and all groups are full."""
    if g_idx.dim() != 1 or len(g_idx) == 0 or g_idx.dtype not in (torch.int32, torch.int64):
        raise FormatError(
            f"{name}.g_idx", f"{g_idx.dtype} {list(g_idx.shape)}", "int32, one for each channel", "get the file again"
        )
    group = spec.group(len(g_idx))
    groups = len(g_idx) // group
    low, high = int(g_idx.min()), int(g_idx.max())
    if low < 0 or high >= groups:
        raise FormatError(
            f"{name}.g_idx", f"groups {low} to {high}", f"0 to {groups - 1}", "get the file again or quantize it again"
        )
    sizes = torch.bincount(g_idx.long(), minlength=groups)
    if bool((sizes != group).any()):
        raise FormatError(
            f"{name}.g_idx",
            f"groups of {int(sizes.min())} to {int(sizes.max())} channels",
            f"{groups} groups of {group}",
            "quantize it again with a group_size that divides the input channels",
        )


def _metadata_shapes(spec: MixSpec, n: int, strips: int) -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors of a `mix64` matrix but qweight and what may be missing anywhere."""
    blocks, tiles = strips * STRIP // BLOCK, spec.tiles(n)
    extra = {"qextra": (n, blocks * spec.extra_words)} if spec.extra_words else {}
    if spec.metadata == "fine":
        return {**extra, "qscales": (n, blocks), "qzeros": (n, blocks), "scales2": (tiles, strips, 2)}
    return {
        **extra,
        "qmeta": (n, blocks),
        "scales2": (tiles, blocks, 3),
        "zeros2": (tiles, blocks),
        "row_scales": (n,),
        "row_zeros": (ceil(n / 2),),
    }


def pack_strips(codes_NK: torch.Tensor, spec: MixSpec) -> dict[str, torch.Tensor]:
    """Codes to qweight and qextra. A strip's bit stream is `width` half words: two in qweight, the rest in qextra."""
    n, k = codes_NK.shape
    main, extra, first = [], [], 0
    for width, count in _runs(spec):
        codes = codes_NK.view(n, k // BLOCK, BLOCK)[:, :, first : first + count * STRIP]
        assert int(codes.max()) < 1 << width
        halves = pack(codes.reshape(-1), width, dim=0).view(torch.int16).view(n, k // BLOCK, count, width)
        main.append(halves[..., :2])
        extra.append(halves[..., 2:].flatten(2))
        first += count * STRIP
    arrays = {"qweight": torch.cat(main, dim=2), **({"qextra": torch.cat(extra, dim=2)} if spec.extra_words else {})}
    return {suffix: array.view(n, -1).view(torch.int32) for suffix, array in arrays.items()}


def unpack_strips(qweight: torch.Tensor, qextra: torch.Tensor | None, spec: MixSpec) -> torch.Tensor:
    """The exact inverse of `pack_strips`: uint8 [N, K]."""
    n, strips = qweight.shape
    blocks = strips * STRIP // BLOCK
    main = qweight.contiguous().view(torch.int16).view(n, blocks, 4, 2)
    rest = main.new_empty(n, blocks, 0)
    if qextra is not None:
        # flat, as a dimension of one word may have any stride
        rest = qextra.reshape(-1).view(torch.int16).view(n, blocks, 2 * spec.extra_words)
    codes = []
    for width, count in _runs(spec):
        own = rest[:, :, : count * (width - 2)].reshape(n, blocks, count, width - 2)
        words = torch.cat([main[:, :, :count], own], dim=3).view(-1).view(torch.int32)
        codes.append(unpack(words, width, dim=0).view(n, blocks, count * STRIP))
        main, rest = main[:, :, count:], rest[:, :, count * (width - 2) :]
    return torch.cat(codes, dim=2).view(n, blocks * BLOCK)


def _runs(spec: MixSpec) -> list[tuple[int, int]]:
    """(width, number of strips) of a block's runs of equal width, in order."""
    return [(width, len(list(run))) for width, run in groupby(spec.widths)]


def _pack_fine(weight: MixedWeight) -> dict[str, torch.Tensor]:
    n, strips = weight.scale_codes_NS.shape
    codes = weight.scale_codes_NS.view(n, -1, 4)
    zeros = (weight.zeros_NS - zero_bases(weight.spec, strips).to(weight.zeros_NS.device)).view(n, -1, 4)
    return {
        "scales2": torch.stack([weight.steps_TS, weight.offsets_TS], dim=2).to(torch.float16),
        "qscales": _join(codes, FINE_SCALES).to(torch.int16),
        "qzeros": _join(zeros, FINE_ZEROS).to(torch.uint8),
    }


def _pack_paper(weight: MixedWeight) -> dict[str, torch.Tensor]:
    assert weight.row_scales_N is not None  # metadata "paper" has them
    n = weight.out_features
    zeros, codes = (values_NS.view(n, -1, 4) for values_NS in (weight.zeros_NS, weight.scale_codes_NS))
    steps, offsets = (
        values_TS.view(len(values_TS), -1, 4)[..., 1:] for values_TS in (weight.steps_TS, weight.offsets_TS)
    )
    zeros2 = torch.where(steps == 0, 0, offsets / steps).round().to(torch.int32)
    row_zeros = torch.cat([zeros[:, 0, 0], zeros.new_zeros(n % 2)]).view(-1, 2)
    return {
        "scales2": steps.to(torch.float16),
        "qmeta": _join(torch.cat([zeros[..., 1:], codes[..., 1:]], dim=2), PAPER_ZEROS + PAPER_SCALES).to(torch.int16),
        "zeros2": _join(zeros2, PAPER_ZEROS2).to(torch.int16),
        "row_scales": weight.row_scales_N,
        "row_zeros": _join(row_zeros, (4, 4)).to(torch.uint8),
    }


def _unpack_metadata(tensors: Mapping[str, torch.Tensor], spec: MixSpec) -> dict[str, Any]:
    """The fields of MixedWeight that scales are made of."""
    scales2 = tensors["scales2"].float()
    if spec.metadata == "fine":
        n, blocks = tensors["qscales"].shape
        bases = zero_bases(spec, 4 * blocks).to(scales2.device)
        return {
            "scale_codes_NS": _split(tensors["qscales"], FINE_SCALES).view(n, 4 * blocks),
            "zeros_NS": _split(tensors["qzeros"], FINE_ZEROS).view(n, 4 * blocks) + bases,
            "steps_TS": scales2[..., 0],
            "offsets_TS": scales2[..., 1],
        }
    n, blocks = tensors["qmeta"].shape
    fields = _split(tensors["qmeta"], PAPER_ZEROS + PAPER_SCALES)
    row_zeros = _split(tensors["row_zeros"], (4, 4)).view(-1)[:n, None, None].expand(n, blocks, 1)
    offsets = scales2 * _split(tensors["zeros2"], PAPER_ZEROS2)

    def with_wide_strip(values: torch.Tensor, wide: torch.Tensor | None = None) -> torch.Tensor:
        first = torch.zeros_like(values[..., :1]) if wide is None else wide
        return torch.cat([first, values], dim=2).view(len(values), 4 * blocks)

    return {
        "scale_codes_NS": with_wide_strip(fields[..., 3:]),
        "zeros_NS": with_wide_strip(fields[..., :3], row_zeros),
        "steps_TS": with_wide_strip(scales2),
        "offsets_TS": with_wide_strip(offsets),
        "row_scales_N": tensors["row_scales"],
    }


def _outliers(tensors: Mapping[str, torch.Tensor]) -> Outliers:
    starts, columns, values = (tensors[suffix] for suffix in Mix64Layout.outliers)
    return Outliers(starts, columns.to(torch.int32), values)


def _outlier_tensors(
    outliers: Outliers, rows: torch.Tensor, columns: torch.Tensor, out_features: int
) -> dict[str, torch.Tensor]:
    """Tensors by suffix of the outliers whose new row is 0 or more; rows must be in rising order."""
    kept = rows >= 0
    counts = torch.bincount(rows[kept], minlength=out_features)
    starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).to(torch.int32)
    arrays = starts, columns[kept].to(torch.uint16), outliers.values[kept]
    return dict(zip(Mix64Layout.outliers, arrays, strict=True))


def _join(values: torch.Tensor, widths: Sequence[int]) -> torch.Tensor:
    """Fields in the last dimension to one int32 each, lowest bits first."""
    starts = (0, *accumulate(widths))
    assert all(not bool((v >> w).any()) for v, w in zip(values.unbind(-1), widths, strict=True))
    return torch.stack([v.to(torch.int32) << s for v, s in zip(values.unbind(-1), starts, strict=False)]).sum(0)


def _split(words: torch.Tensor, widths: Sequence[int]) -> torch.Tensor:
    """The exact inverse of `_join`: uint8 [..., fields]."""
    starts = (0, *accumulate(widths))
    fields = [(words.to(torch.int32) >> s) & ((1 << w) - 1) for w, s in zip(widths, starts, strict=False)]
    return torch.stack(fields, dim=-1).to(torch.uint8)


def _check_padding_bits(name: str, tensors: Mapping[str, torch.Tensor]) -> None:
    """Bits that stand for nothing are zero, so that equal matrices are equal bytes."""
    wrong = None
    if "zeros2" in tensors and bool((tensors["zeros2"].to(torch.int32) & ~0x0F77).any()):
        wrong = "zeros2"
    if "row_zeros" in tensors and len(tensors["row_scales"]) % 2 and int(tensors["row_zeros"][-1]) > 15:
        wrong = "row_zeros"
    if wrong:
        raise FormatError(f"{name}.{wrong}", "bits set that mean nothing", "zeros there", "get the file again")


def _check_strip_order(name: str, strip_order: torch.Tensor) -> None:
    if not torch.equal(strip_order.sort().values, torch.arange(len(strip_order)).to(strip_order)):
        raise FormatError(
            f"{name}.strip_order", "strips that are missing or there twice",
            f"each of 0 to {len(strip_order) - 1} once", "get the file again",
        )  # fmt: skip


def _unused_channels(tensors: Mapping[str, torch.Tensor], spec: MixSpec, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Stored channels that stand for none of the K real ones, int64 [U], and their codes, uint8 [N, U]."""
    qweight, qextra = tensors["qweight"], tensors.get("qextra")
    n, strips = qweight.shape
    order_S = tensors.get("strip_order", torch.arange(strips)).long()
    channels = (order_S[:, None] * STRIP + torch.arange(STRIP, device=order_S.device)).view(-1)
    unused = (channels >= k).nonzero()[:, 0]
    blocks, within = torch.unique(unused // BLOCK, return_inverse=True)
    words = qweight.view(n, -1, 4)[:, blocks].view(n, 4 * len(blocks))
    if qextra is not None:
        qextra = qextra.view(n, -1, spec.extra_words)[:, blocks].view(n, spec.extra_words * len(blocks))
    return unused, unpack_strips(words, qextra, spec)[:, within * BLOCK + unused % BLOCK]


def _check_outliers(
    name: str, tensors: Mapping[str, torch.Tensor], spec: MixSpec, unused: torch.Tensor, zeros_NS: torch.Tensor
) -> None:
    """CSR in order and in range, in 2-bit strips only, over slots that dequantize to zero."""
    starts, columns = tensors["outlier_rows"], tensors["outlier_columns"].long()
    if int(starts[0]) != 0 or int(starts[-1]) != len(columns) or bool((starts.diff() < 0).any()):
        raise FormatError(
            f"{name}.outlier_rows", f"rows from {int(starts[0])} to {int(starts[-1])}, or not rising",
            f"starts that rise from 0 to {len(columns)}", "get the file again",
        )  # fmt: skip
    rows = _outliers(tensors).rows()
    strips = tensors["qweight"].shape[1]
    wrong = None
    if bool((columns >= strips * STRIP).any()) or bool(torch.isin(columns, unused).any()):
        wrong = "a column beyond the last input channel", "columns of real channels"
    elif bool(((rows * MAX_COLUMNS + columns).diff() <= 0).any()):
        wrong = "columns out of order", "columns that rise within a row"
    elif bool((strip_widths(spec, strips).to(columns.device)[columns // STRIP] != 2).any()):
        wrong = "an outlier in a strip of more than 2 bits", "outliers only in 2-bit strips"
    if wrong:
        raise FormatError(f"{name}.outlier_columns", *wrong, "get the file again or quantize it again")
    words = tensors["qweight"][rows, columns // STRIP]
    codes = (words >> (2 * (columns % STRIP)).to(torch.int32)) & 3
    if bool((codes != zeros_NS[rows, columns // STRIP]).any()):
        raise FormatError(
            f"{name}.qweight", "a weight in the place of an outlier", "a code equal to its zero", "quantize it again"
        )
