"""Quantized checkpoints in vLLM: our modules for its linear layers, fused or not, under its tensor parallelism.

vLLM calls `register` in each of its processes, through the entry point `vllm.general_plugins`. From then on it knows
the quantization method `bitshard`, which `mix64` checkpoints name; GPTQ ones, act_order or not, are run by
`quantization="bitshard"`. Its loaders hand over a matrix's tensors one by one; when all are there, this rank's slice of
them becomes a module of nn.py. A fused layer (qkv_proj, gate_up_proj) has one for each of its matrices, as these may
have other fractions of 4-bit strips. Private names of vLLM are used in this file alone.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from vllm.config import get_current_vllm_config
from vllm.model_executor.kernels.linear import MPLinearKernel, MPLinearLayerConfig, choose_mp_linear_kernel
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearBase,
    LinearMethodBase,
    QKVParallelLinear,
    RowParallelLinear,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, UnquantizedEmbeddingMethod
from vllm.model_executor.models.utils import WeightsMapper
from vllm.model_executor.parameter import GroupQuantScaleParameter, PackedvLLMParameter
from vllm.model_executor.utils import set_weight_attrs
from vllm.platforms import current_platform
from vllm.scalar_type import scalar_types

from bitshard.checkpoint import Checkpoint
from bitshard.errors import PlanError
from bitshard.integrations.transformers import require_whole
from bitshard.kernels import BACKEND, require_backend
from bitshard.layout import Layout, Mix64Layout
from bitshard.models import architecture, block_linears, shapes
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
from bitshard.quantconfig import QuantConfig, parse_quant_config
from bitshard.spec import WORD_BITS, MixSpec, QuantSpec
from bitshard.versions import report_untested

logger = logging.getLogger(__name__)

reported = set[str]()  # why plain torch runs matrices
VLLMS = "vllm"  # beside our kernels' names, in BITSHARD_BACKEND: vLLM's own for uniform matrices
SHARDS = {"q": 0, "k": 1, "v": 2}  # vLLM's names of the matrices in qkv_proj
SYMMETRIC = {4: scalar_types.uint4b8, 8: scalar_types.uint8b128}  # codes whose zero point is in the middle


def register() -> None:
    """The entry point. That this module was imported has registered the method, however often this is called."""


@register_quantization_config("bitshard")
class BitshardConfig(QuantizationConfig):  # type: ignore[misc]
    """What a checkpoint's config.json says of its quantization, and which of vLLM's layers that is about."""

    def __init__(self, quantization: QuantConfig) -> None:
        super().__init__()
        report_untested("vllm")
        self.quantization = quantization
        asked = os.environ.get(BACKEND, "auto")
        # on a processor ours take half the time of vLLM's
        self.vllms = asked == VLLMS or asked == "auto" and not current_platform.is_cpu()
        self.backend = "auto" if asked == VLLMS else asked
        self.rounds_head = asked == "auto" and current_platform.is_cpu()  # as in transformers
        require_backend(self.backend)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> BitshardConfig:
        return cls(parse_quant_config(config, "config.json"))

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        """GPTQ where `quantization="bitshard"` asks for it: vLLM has refused act_order since 0.30."""
        return "bitshard" if user_quant == "bitshard" and hf_quant_cfg.get("quant_method") == "gptq" else None

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        config, where = hf_config.get_text_config().to_dict(), f"{model_name}, config.json"
        arch = architecture(config, where)
        sizes = shapes(arch, config, where)
        refused = {"a mixture of experts": sizes.experts, "q, k and v in one matrix": arch.attention.fused}
        for found in (what for what, so in refused.items() if so):
            raise PlanError(model_name, found, "other models", "run it with transformers: `bitshard generate`")
        if Path(model_name).is_dir():  # of quantized models vLLM does not ask whether all is there
            require_whole(Checkpoint.open(Path(model_name)))
        self.blocks, self.linears = arch.blocks, {linear.name for linear in block_linears(arch, sizes)}

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        if isinstance(layer, ParallelLMHead) and self.rounds_head:
            model = get_current_vllm_config().model_config
            return EightBitHead() if model.head_dtype == model.dtype else None  # else vLLM multiplies by itself
        if not isinstance(layer, LinearBase):
            return None
        if get_current_vllm_config().lora_config is not None:  # of the 16-bit model's order of channels, maybe
            fix = "adapters in transformers: docs/engines.md"
            raise PlanError("--enable-lora", "LoRA adapters", "none with bitshard's checkpoints in vLLM", fix)
        parent, _, own = prefix.rpartition(".")
        fused = self.packed_modules_mapping.get(own, [own])
        # a layer that vLLM thinks of as several matrices may be one in the file
        names = [prefix] if self._is_ours(prefix) else [f"{parent}.{name}" for name in fused]
        specs = {name: spec for name in names if self._is_ours(name) and (spec := self.quantization.spec_of(name))}
        if len(specs) < len(names):
            if specs:
                raise PlanError(
                    prefix, "16-bit and quantized matrices in one layer", "one of the two", "quantize all, or none"
                )
            return UnquantizedLinearMethod()
        return BitshardLinearMethod(self.quantization.layout, specs, self.backend, self.vllms)

    def _is_ours(self, name: str) -> bool:
        """Whether low-bit formats quantize this matrix: of a block, and no router."""
        return name.removeprefix(f"{self.blocks}.").partition(".")[2] in self.linears

    @staticmethod
    def get_checkpoint_weight_mapper() -> WeightsMapper:
        """Keeps g_idx, which vLLM's own methods do without."""
        return WeightsMapper()

    def get_name(self) -> str:
        return "bitshard"

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        return ["quantize_config.json"]  # of older quantizers, which have no section in config.json


class BitshardLinearMethod(LinearMethodBase):  # type: ignore[misc]
    """The matrices of one layer: what vLLM's loaders give of them is cut and becomes a PackedLinear each."""

    def __init__(self, layout: Layout, specs: Mapping[str, QuantSpec | MixSpec], backend: str, vllms: bool) -> None:
        """vllms: vLLM's own kernels run what they can."""
        self.layout: Any = layout  # either kind cuts the tensors of its own spec
        self.specs, self.backend, self.vllms = specs, backend, vllms

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra: Any,
    ) -> None:
        layer.loaded = [dict[str, torch.Tensor]() for _ in self.specs]
        for suffix in self._suffixes:
            # empty: how large a matrix's tensors are, and which it has, only the file says; vLLM warns of other dtypes
            dtype = params_dtype if suffix == "scales" else Mix64Layout.dtypes.get(suffix, torch.int32)
            parameter = nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
            set_weight_attrs(parameter, {"weight_loader": partial(_keep, layer, suffix)})
            layer.register_parameter(suffix, parameter)

    @property
    def _suffixes(self) -> list[str]:
        """Of the tensors that are ours to load; a bias is vLLM's."""
        return [suffix for suffix in self.layout.suffixes if suffix != "bias"]

    def process_weights_after_loading(self, layer: Any) -> None:
        if not hasattr(layer, "loaded"):
            raise PlanError(layer.prefix, "weights that come again", "one loading", "make the LLM anew")
        device, parts = layer.qweight.device, list[PackedLinear]()
        for index, (name, spec) in enumerate(self.specs.items()):
            tensors = {suffix: t.to(device) for suffix, t in self._cut(layer, index, name, spec).items()}
            parts.append(self._linear(layer, spec, tensors))
        for suffix in self._suffixes:
            delattr(layer, suffix)
        del layer.loaded
        layer.register_buffer("perm", hoist_gather(parts), persistent=False)  # one gather of what they all read
        self.kernel = self._vllms_kernel(layer, parts) if self.vllms else None
        if self.kernel is not None:
            return
        for part in parts if self.backend != "reference" else ():
            part.arrange()
            if part.arrangement == "file":
                _report(layer.prefix, part.why_slow())
        layer.parts, self.together = nn.ModuleList(parts), fits_one_call(parts)

    def _vllms_kernel(self, layer: Any, parts: list[PackedLinear]) -> MPLinearKernel | None:
        """vLLM's own kernel for all matrices as one, whose weights become `layer.packed`; None where ours must run."""
        spec = parts[0].spec
        if layer.params_dtype == torch.float32 or not isinstance(spec, QuantSpec) or spec.bits not in SYMMETRIC:
            return None
        tensors = [_plain(part, spec) for part in parts]
        plain = [found for found in tensors if found is not None]
        if len(plain) < len(parts):
            return None
        qweight, scales = (torch.cat(every, 1) for every in zip(*plain, strict=True))
        shape, partition = (layer.input_size, layer.output_size), (parts[0].columns, qweight.shape[1])
        weight, dtype = SYMMETRIC[spec.bits], layer.params_dtype
        config = MPLinearLayerConfig(shape, partition, weight, dtype, spec.group_size, zero_points=False)
        try:
            kernel = choose_mp_linear_kernel(config)(config, "qweight", "scales")
        except ValueError:  # it has none that takes this
            return None
        layer.packed, along = nn.Module(), {"input_dim": 0, "output_dim": 1, "weight_loader": None}
        pack = {"packed_dim": 0, "packed_factor": WORD_BITS // spec.bits}
        layer.packed.qweight = PackedvLLMParameter(data=qweight, **pack, **along)
        layer.packed.scales = GroupQuantScaleParameter(data=scales, **along)
        layer.packed.bias = None  # added here
        kernel.process_weights_after_loading(layer.packed)
        return kernel

    def _cut(self, layer: Any, index: int, name: str, spec: Any) -> dict[str, torch.Tensor]:
        """This rank's slice of one of the layer's matrices. Raises PlanError where a cut would split something."""
        tensors, size, rank, layout = layer.loaded[index], layer.tp_size, layer.tp_rank, self.layout
        layout.check(name, tensors, spec)  # C reads what the shapes promise
        if isinstance(layer, RowParallelLinear):
            _require(name, layer.input_size, size, *spec.row_cut(layer.input_size, layout.is_gathered(tensors, spec)))
            return dict(layout.cut_rows(tensors, spec, rank, size)) if size > 1 else tensors
        if size == 1 or not isinstance(layer, ColumnParallelLinear):
            return cast(dict[str, torch.Tensor], tensors)
        ranges, start = list[tuple[int, int]](), 0
        for part, width in enumerate(layer.output_partition_sizes):
            if len(self.specs) > 1 and part != index:
                continue  # another matrix
            # KV heads that are fewer than ranks are on several
            replicas = layer.num_kv_head_replicas if part and isinstance(layer, QKVParallelLinear) else 1
            whole = width * size // replicas
            _require(name, whole, size // replicas, *spec.column_cut(whole))
            ranges.append((start + rank // replicas * width, start + (rank // replicas + 1) * width))
            start += whole
        return dict(layout.cut_columns(tensors, spec, ranges))

    def _linear(self, layer: Any, spec: QuantSpec | MixSpec, tensors: dict[str, torch.Tensor]) -> PackedLinear:
        linear: PackedLinear
        if isinstance(spec, MixSpec):
            linear = Mix64Linear(layer.input_size, len(tensors["qweight"]), spec)
            linear.replace(**tensors)
        else:
            n = tensors["qweight"].shape[1]
            linear = QuantLinear(layer.input_size, n, spec, self.layout, False, layer.params_dtype)
            linear.replace(**{"g_idx": None, **tensors, "scales": tensors["scales"].to(layer.params_dtype)})
            linear.order_rows()
        linear.backend = self.backend
        return linear

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        if layer.perm is not None:
            x = x[..., layer.perm]
        y: torch.Tensor
        if self.kernel is not None:
            y = self.kernel.apply_weights(layer.packed, x)
        elif self.together:
            y = side_by_side(layer.parts, x)
        else:
            outputs = [part(x) for part in layer.parts]
            y = outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)
        return y if bias is None else y + bias


class EightBitHead(UnquantizedEmbeddingMethod):  # type: ignore[misc]
    """The output matrix, rounded to 8 bits when it is there: by far the largest one that no file of ours quantizes."""

    def __init__(self) -> None:
        self.rounded: QuantLinear | None = None
        self.tied = False

    def tie_weights(self, layer: Any, embed_tokens: nn.Module) -> Any:
        self.tied = True
        return super().tie_weights(layer, embed_tokens)

    def process_weights_after_loading(self, layer: Any) -> None:
        if not fits_eight_bit(layer.weight):
            super().process_weights_after_loading(layer)
            return
        self.rounded = eight_bit(layer.weight)
        if not self.tied:
            layer.weight = nn.Parameter(layer.weight.new_empty(0), requires_grad=False)

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        if self.rounded is None:
            return cast(torch.Tensor, super().apply(layer, x, bias))
        y: torch.Tensor = self.rounded(x)
        return y if bias is None else y + bias


def _plain(part: PackedLinear, spec: QuantSpec) -> tuple[torch.Tensor, torch.Tensor] | None:
    """qweight and scales where there is nothing else to a matrix of this spec: every zero point is in the middle."""
    if not isinstance(part, QuantLinear) or part.spec != spec or part.perm is not None or part.g_idx is not None:
        return None
    middle = part.layout.unpack_zeros(part.qzeros.data, spec.bits) == 1 << (spec.bits - 1)
    return (part.qweight.data, part.scales.data) if bool(middle.all()) else None


def _keep(layer: Any, suffix: str, parameter: nn.Parameter, loaded: torch.Tensor, shard: Any = None) -> None:
    """vLLM's loaders call it with a whole tensor of one matrix; shard: which of a fused layer's."""
    layer.loaded[SHARDS.get(shard, shard) or 0][suffix] = loaded.cpu()  # where they are checked and cut


def _report(prefix: str, why: str) -> None:
    """Once for each cause."""
    if why not in reported:
        reported.add(why)
        logger.warning("plain torch runs matrices, those of %s first: %s", prefix, why)


def _require(name: str, channels: int, size: int, unit: int, what: str) -> None:
    if channels % size or channels // size % unit:
        raise PlanError(
            name, f"tensor_parallel_size {size}: {channels} channels / {size} splits {what}",
            "the degrees that `bitshard plan` lists", "choose one of these",
        )  # fmt: skip
