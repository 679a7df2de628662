"""Modules that run packed weights: QuantLinear, Mix64Linear, and Experts for a mixture of either."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn

from bitshard.bitpack import pack, packed_length
from bitshard.errors import SpecError
from bitshard.kernels import (
    Arrangement,
    choose,
    differentiable,
    gptq_linear,
    mix64_linear,
    mix64_linears,
    why_not_arranged,
    wide_strips,
)
from bitshard.layout import GptqLayout, Mix64Layout
from bitshard.quantized import trivial_g_idx
from bitshard.records import gptq_rows, mix64_lanes, mix64_rows, why_not_read
from bitshard.spec import BLOCK, STRIP, WORD_BITS, MixSpec, QuantSpec


class PackedLinear(nn.Module):
    """A linear layer over a layout's tensors, under their names on disk.

    in_features and out_features are the full sizes; a tensor-parallel rank holds a slice of the tensors.
    """

    # transformers' tensor parallelism then runs forward on local tensors and does the all-reduce and bias outside
    _hf_quantized_needs_local_tp = True
    cut = "plain"  # how a tensor-parallel slice is taken; see integrations.transformers
    qweight: nn.Parameter
    rows_dim: int  # of qweight, as the file has it
    layout_name: str
    spec: QuantSpec | MixSpec
    why_irregular: str  # no kernel reads it though it reads others of its spec

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.arrangement: Arrangement = "file"  # of the tensors; the others are what `arrange` makes
        self.file_shape: torch.Size | None = None  # of qweight, where it is in another arrangement
        self.backend = "exact"  # which kernel runs; see kernels

    @property
    def rows(self) -> int:
        """Output channels that this rank has."""
        return (self.file_shape or self.qweight.shape)[self.rows_dim]

    @property
    def columns(self) -> int:
        """Input channels that this rank has."""
        raise NotImplementedError

    def another_width(self, x: torch.Tensor) -> SpecError:
        """For an input [..., K] of another K than `columns`: a kernel would read what is not there."""
        found = f"{x.shape[-1]} channels" if x.dim() else "a single number"
        return SpecError(
            "input", found, f"{self.columns}, as this {self.layout_name} matrix has",
            "pass what the layer was made for",
        )  # fmt: skip

    def arrange(self) -> None:
        """Put the weights as the kernels of their device read them, if there are any that read them at all."""
        device = self.qweight.device.type
        if self.arrangement != "file" or why_not_arranged(device, self.layout_name):
            return
        if arranged := self.arranged({name: p.data for name, p in self.named_parameters(recurse=False)}, device):
            self.file_shape, self.arrangement = self.qweight.shape, "gpu" if device == "cuda" else "cpu"
            self.replace(**arranged)

    def arranged(self, tensors: dict[str, torch.Tensor], device: str) -> Mapping[str, torch.Tensor | None] | None:
        """Tensors as the kernels of a device read them, from `records`; None if they do not."""
        raise NotImplementedError

    def why_slow(self) -> str:
        """What kept `arrange` from finding a kernel that reads the weights, where it has left them as they were."""
        device = self.qweight.device.type
        why = why_not_arranged(device, self.layout_name) or why_not_read(self.spec, self.columns, device)
        return why or self.why_irregular

    def kernel(self, dtype: torch.dtype, tokens: int) -> str:
        """Which one runs. Raises SpecError when it is to be one that cannot."""
        return choose(self.layout_name, self.arrangement, dtype, tokens, self.backend)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> PackedLinear:
        """`model.to(dtype)` leaves scales as they are: kernels read them in the dtype they were arranged in."""

        def moved(tensor: torch.Tensor) -> torch.Tensor:
            found = fn(tensor)
            return found if found.dtype == tensor.dtype else tensor.to(found.device)

        super()._apply(moved, recurse)  # type: ignore[no-untyped-call]
        return self

    def replace(self, **tensors: torch.Tensor | None) -> None:
        """Other tensors, or none, under the public names."""
        for name, tensor in tensors.items():
            setattr(self, name, None if tensor is None else nn.Parameter(tensor, requires_grad=False))


class QuantLinear(PackedLinear):
    """A linear layer over GPTQ tensors.

    After the weights are in, `order_rows` sorts them by group once; from then on every scale is read in order and only
    `perm` is left of `g_idx`: the gather of the input that the file's order asks for, None when there is none.
    """

    rows_dim, layout_name = 1, GptqLayout.name
    spec: QuantSpec
    why_irregular = "groups of unequal length, as a rank has of an irregular order"
    perm: torch.Tensor | None
    sorted_perm: torch.Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        spec: QuantSpec,
        layout: GptqLayout,
        bias: bool,
        dtype: torch.dtype,
    ) -> None:
        super().__init__(in_features, out_features)
        self.spec, self.layout = spec, layout
        groups = in_features // spec.group(in_features)

        def frozen(*shape: int, dtype: torch.dtype = torch.int32) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape, dtype=dtype), requires_grad=False)

        self.qweight = frozen(packed_length(in_features, spec.bits), out_features)
        self.qzeros = frozen(groups, packed_length(out_features, spec.bits))
        self.scales = frozen(groups, out_features, dtype=dtype)
        self.g_idx: nn.Parameter | None = frozen(in_features)
        self.bias = frozen(out_features, dtype=dtype) if bias else None
        self.register_buffer("perm", None, persistent=False)
        # order of all K input channels, on ranks that sort before the cut
        self.register_buffer("sorted_perm", None, persistent=False)

    @property
    def columns(self) -> int:
        return (self.file_shape or self.qweight.shape)[0] * WORD_BITS // self.spec.bits

    def order_rows(self) -> None:
        """Sort the rows by group (stable, 2402.04925 Algorithm 1) and drop `g_idx` where groups come out whole.

        A rank that holds a slice of an irregular matrix keeps `g_idx`: its groups are of unequal length.
        """
        if self.g_idx is None:
            return
        g_idx = self.g_idx.data - self.g_idx.data.min() if self._owns_its_groups() else self.g_idx.data
        order = torch.argsort(g_idx, stable=True)
        if not torch.equal(order, torch.arange(len(order), device=order.device)):
            weight = self.layout.permute_rows(self.qweight.data, self.spec.bits, order)
            self.qweight = nn.Parameter(weight, requires_grad=False)
            self.perm = order
        regular = trivial_g_idx(len(g_idx), max(len(g_idx) // self.scales.shape[0], 1)).to(g_idx.device)
        sorted_g_idx = g_idx[order]
        self.g_idx = None if torch.equal(sorted_g_idx, regular) else nn.Parameter(sorted_g_idx, requires_grad=False)

    def leave_out(self) -> None:
        """Give up all tensors; `replace` puts a slice of them in their place."""
        for name in GptqLayout.suffixes:
            setattr(self, name, None)

    def keep_rows(self, rank: int, size: int) -> None:
        """Keep one rank's rows of a matrix that `order_rows` has sorted; whole groups, so their scales go along."""
        assert self.g_idx is None
        self.sorted_perm, self.perm = self.perm, None
        self.replace(
            qweight=self.qweight.data.chunk(size)[rank].clone(),
            qzeros=self.qzeros.data.chunk(size)[rank].clone() if len(self.qzeros) > 1 else self.qzeros.data,
            scales=self.scales.data.chunk(size)[rank].clone() if len(self.scales) > 1 else self.scales.data,
        )

    def arranged(self, tensors: dict[str, torch.Tensor], device: str) -> Mapping[str, torch.Tensor | None] | None:
        if device == "cpu":
            return gptq_rows(self.layout, tensors, self.spec)
        return {"qzeros": self.layout.unpack_zeros(tensors["qzeros"], self.spec.bits).contiguous()}

    def _owns_its_groups(self) -> bool:
        """A row slice with just its own groups' scales still counts groups from the whole matrix's start."""
        assert self.g_idx is not None
        return self.scales.shape[0] < self.in_features // self.spec.group(self.in_features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., K] -> [..., N]."""
        if x.shape[-1:] != (self.columns,):
            raise self.another_width(x)
        if self.perm is not None:
            x = x[..., self.perm]
        how = self.spec.bits, self.layout.zeros_version, self.arrangement, self.backend
        rest = self.qweight, self.scales, self.qzeros, self.g_idx, self.rows, *how
        y: torch.Tensor = differentiable(gptq_linear, x, *rest) if x.requires_grad else gptq_linear(x, *rest)
        return y if self.bias is None else y.add_(self.bias)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.spec.bits}-bit, group_size={self.spec.group_size}"


HEAD = QuantSpec(bits=8, group_size=64)
AT_ONCE = 4096  # rows that are rounded together: all of 151,936 x 896 would take nine bytes a weight for a moment


def fits_eight_bit(W_NK: torch.Tensor) -> bool:
    """Whether `eight_bit` takes this matrix and the C kernels run here."""
    return W_NK.device.type == "cpu" and W_NK.shape[1] % HEAD.group_size == 0 and not why_not_arranged("cpu")


def eight_bit(W_NK: torch.Tensor, bias_N: torch.Tensor | None = None) -> QuantLinear:
    """A dense matrix, any float dtype, rounded to the nearest of 8 bits in groups of 64, for the C kernels."""
    n, k = W_NK.shape
    qweight = torch.empty(k * HEAD.bits // WORD_BITS, n, dtype=torch.int32)
    scales_GN = torch.empty(k // HEAD.group_size, n, dtype=torch.float32)  # whatever the default dtype: vLLM sets it
    for start in range(0, n, AT_ONCE):
        rows = slice(start, start + AT_ONCE)
        W_GBR = W_NK[rows].detach().float().T.reshape(len(scales_GN), HEAD.group_size, -1)
        scales_GN[:, rows] = (W_GBR.abs().amax(1) / 127).clamp_(min=torch.finfo(torch.float32).tiny)
        codes_GBR = (W_GBR / scales_GN[:, None, rows]).round_().add_(128)
        qweight[:, rows] = pack(codes_GBR.view(k, -1).to(torch.uint8), HEAD.bits, dim=0)
    linear = QuantLinear(k, n, HEAD, GptqLayout(2), bias_N is not None, torch.float32)
    linear.g_idx, zeros_GN = None, torch.full(scales_GN.shape, 128, dtype=torch.uint8)
    linear.replace(qweight=qweight, scales=scales_GN, qzeros=zeros_GN)
    if bias_N is not None:
        linear.replace(bias=bias_N.detach())
    linear.arrange()
    linear.backend = "auto"
    return linear


class Mix64Linear(PackedLinear):
    """A linear layer over `mix64` tensors; empty until `replace` gives it a matrix's, or a rank's slice of them."""

    rows_dim, layout_name = 0, Mix64Layout.name
    spec: MixSpec
    why_irregular = "scales that float16 would round twice"
    strip_order: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(self, in_features: int, out_features: int, spec: MixSpec) -> None:
        super().__init__(in_features, out_features)
        self.spec = spec
        for suffix in Mix64Layout.suffixes:
            self.register_parameter(suffix, None)

    @property
    def columns(self) -> int:
        strips = (self.file_shape or self.qweight.shape)[1]
        return min(self.in_features, strips * STRIP)  # only a whole matrix has strips that are filled up

    def arranged(self, tensors: dict[str, torch.Tensor], device: str) -> Mapping[str, torch.Tensor | None] | None:
        return mix64_rows(tensors, self.spec) if device == "cpu" else mix64_lanes(tensors, self.spec)

    def tensors(self) -> tuple[list[Any], list[Any]]:
        """Those of the scales, and those of the outliers, if it has any."""
        own = self._parameters
        metadata = [own[suffix] for suffix in Mix64Layout.metadata[self.spec.metadata] if own[suffix] is not None]
        return metadata, [] if own["outlier_rows"] is None else [own[suffix] for suffix in Mix64Layout.outliers]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., K] -> [..., N]."""
        spec, own = self.spec, self._parameters  # a name looked up there takes a fifth of the time of an attribute
        rows, strips = self.file_shape or self.qweight.shape
        if x.shape[-1:] != (self.columns,):
            raise self.another_width(x)
        if unused := strips * STRIP - x.shape[-1]:
            x = F.pad(x, (0, unused))
        if own["strip_order"] is not None:
            x = x.reshape(*x.shape[:-1], strips, STRIP)[..., own["strip_order"].long(), :].flatten(-2)
        metadata, outliers = self.tensors()
        how = spec.bits, spec.fraction_4bit, spec.metadata, self.arrangement, self.backend
        rest = own["qweight"], own["qextra"], metadata, outliers, rows, *how
        y: torch.Tensor = differentiable(mix64_linear, x, *rest) if x.requires_grad else mix64_linear(x, *rest)
        return y if own["bias"] is None else y.add_(own["bias"])

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.spec}"


def hoist_gather(consumers: Sequence[nn.Module]) -> torch.Tensor | None:
    """Take the gather out of the matrices that read one activation, if they all ask for the same; returns its order."""
    linears = [module for module in consumers if isinstance(module, QuantLinear)]
    perms = [linear.perm for linear in linears if linear.perm is not None]
    if not perms or len(perms) < len(consumers) or any(not torch.equal(perm, perms[0]) for perm in perms):
        return None
    for linear in linears:
        linear.perm = None
    return perms[0]


def fits_one_call(parts: Sequence[PackedLinear]) -> bool:
    """Whether `side_by_side` takes these matrices: on a processor, with no strips to gather and no block to fill up."""
    mixed = [part for part in parts if isinstance(part, Mix64Linear) and part.arrangement == "cpu"]
    plain = all(part.strip_order is None and part.columns % BLOCK == 0 for part in mixed)
    return len(mixed) == len(parts) > 1 and plain and len({part.outlier_rows is None for part in mixed}) == 1


def side_by_side(parts: Sequence[Any], x: torch.Tensor) -> torch.Tensor:
    """What matrices of `mix64` make of one activation [..., K], in one call of the C kernels, without biases: [..., N].

    What it saves: `kernels.fuse`, which finds such matrices in a compiled graph.
    """
    if x.shape[-1:] != (parts[0].columns,):
        raise parts[0].another_width(x)
    metadata, outliers = zip(*(part.tensors() for part in parts), strict=True)
    y: torch.Tensor = mix64_linears(
        x,
        [part.qweight for part in parts],
        [scales2 for scales2, *_ in metadata],
        [tensor for three in outliers for tensor in three],
        [part.rows for part in parts],
        [wide_strips(part.spec.bits, part.spec.fraction_4bit) for part in parts],
        parts[0].backend,
    )
    return y


class Experts(nn.Module):
    """The experts of a Mixtral-like block, each with its own gate (w1), up (w3) and down (w2) matrix.

    transformers holds all experts' weights in two 3-D tensors; low-bit files hold a matrix for each. make_linear: name
    below the experts ("3.w1") -> module. Same call as transformers' MixtralExperts.
    """

    def __init__(
        self, num_experts: int, act_fn: Callable[[torch.Tensor], torch.Tensor], make_linear: Callable[[str], nn.Module]
    ) -> None:
        super().__init__()
        self.num_experts = num_experts
        for e in range(num_experts):
            self.add_module(str(e), nn.ModuleDict({w: make_linear(f"{e}.{w}") for w in ("w1", "w3", "w2")}))
        self.act_fn = act_fn
        for e in range(num_experts):  # the gather of an expert's input, where gate and up share one
            self.register_buffer(f"perm_{e}", None, persistent=False)

    def _experts(self) -> Iterator[tuple[int, nn.ModuleDict]]:
        for e in range(self.num_experts):
            yield e, cast(nn.ModuleDict, self.get_submodule(str(e)))

    def hoist_gathers(self) -> None:
        """One gather of each expert's input instead of one in gate and one in up."""
        for e, expert in self._experts():
            setattr(self, f"perm_{e}", hoist_gather([expert["w1"], expert["w3"]]))

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """hidden_states [tokens, hidden], top_k_index and top_k_weights [tokens, k] -> [tokens, hidden]."""
        out = torch.zeros_like(hidden_states)
        for e, expert in self._experts():
            tokens, slot = torch.where(top_k_index == e)
            if len(tokens) == 0:
                continue
            x = hidden_states[tokens]
            perm = self._buffers[f"perm_{e}"]
            if perm is not None:
                x = x[:, perm]
            y = expert["w2"](self.act_fn(expert["w1"](x)) * expert["w3"](x))
            out.index_add_(0, tokens, (y * top_k_weights[tokens, slot, None]).to(out.dtype))
        return out
