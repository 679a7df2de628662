"""Quantized checkpoints in transformers: our modules for nn.Linear, run by transformers' own tensor parallelism.

transformers reads each rank's slice of every tensor from disk through DTensor placements; the styles below say which
slice of `qweight`, `qzeros`, `scales`, `g_idx` and `bias` that is, for column- and row-parallel matrices. What no
placement describes, `mix64` among it, is read and cut here. A style's hooks then surround the module's forward. Private
names of transformers are used in this file alone.
"""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import Placement, _StridedShard
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.distributed import DistributedConfig
from transformers.distributed.tensor_parallel import (
    ALL_PARALLEL_STYLES,
    ColwiseParallel,
    RowwiseParallel,
)
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from bitshard.checkpoint import Checkpoint
from bitshard.errors import CheckpointError, PlanError, SpecError
from bitshard.kernels import require_backend
from bitshard.layout import GptqLayout, Mix64Layout
from bitshard.models import mlp_paths
from bitshard.nn import Experts, Mix64Linear, PackedLinear, QuantLinear, eight_bit, fits_eight_bit, hoist_gather
from bitshard.parallel import Strategy, gather_permute_chunk
from bitshard.plan import TPPlan
from bitshard.spec import STRIP, MixSpec, QuantSpec

logger = logging.getLogger(__name__)


def load(
    path: Path,
    tp_size: int = 1,
    strategy: Strategy = "tp-aware",
    dtype: torch.dtype | None = None,
    backend: str = "exact",
) -> PreTrainedModel:
    """A causal language model of the checkpoint `path`, 16-bit or quantized, ready to generate.

    tp_size > 1: called on every rank of a torch.distributed job of that size. dtype: of activations; by default float32
    on a CPU and the checkpoint's own elsewhere. backend: see kernels. Raises PlanError when the degree or the strategy
    does not fit, and FormatError or CheckpointError when the files do not hold all of a model that transformers knows.
    """
    require_backend(backend)
    checkpoint = Checkpoint.open(path)
    if checkpoint.quantization is not None:
        checkpoint.check_matrices()
    config = load_config(path)
    if dtype is None:
        dtype = getattr(config, "dtype", None) if torch.cuda.is_available() else torch.float32
    kwargs: dict[str, Any] = {"dtype": dtype or torch.float32}
    if checkpoint.quantization is not None:
        config.quantization_config = BitshardConfig(str(path), tp_size, strategy, backend).to_dict()
    if tp_size > 1:
        require_degree(checkpoint.plan(), tp_size, strategy)
        kwargs["distributed_config"] = DistributedConfig(tp_size=tp_size, tp_plan="auto")
    elif torch.cuda.is_available():
        kwargs["device_map"] = "cuda"
    model, report = AutoModelForCausalLM.from_pretrained(
        path, config=config, **kwargs, output_loading_info=True, ignore_mismatched_sizes=True
    )
    # transformers fills what it cannot load with random numbers
    if report["missing_keys"] or report["mismatched_keys"]:
        absent, misshapen = sorted(report["missing_keys"]), sorted(report["mismatched_keys"])
        found = f"no tensor {absent[0]}" if absent else "{} of shape {}, not {}".format(*map(_plain, misshapen[0]))
        raise CheckpointError(
            str(path), found, "all tensors of the model, as config.json has it", "get the files again"
        )
    return cast(PreTrainedModel, model.eval())


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, torch.Size) else value


def load_config(path: Path) -> Any:
    """transformers' own config of a causal language model; CheckpointError when it knows none for this config.json."""
    try:
        config = AutoConfig.from_pretrained(path)
        known = type(config) in AutoModelForCausalLM._model_mapping
        if known:
            with torch.device("meta"):
                AutoModelForCausalLM.from_config(config)
    except Exception as error:  # whatever the classes of a foreign file may raise
        raise _unknown(path, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}") from None
    if not known:
        raise _unknown(path, f"model_type {config.model_type!r}, which is no causal language model")
    return config


def _unknown(path: Path, found: str) -> CheckpointError:
    return CheckpointError(
        str(path / "config.json"), found, "a causal language model that transformers knows", "use such a model"
    )


def require_tokens(model: PreTrainedModel, ids: torch.Tensor, length: int) -> None:
    """Raise an error unless the model can read these token ids, and as many as `length` in a row."""
    size, longest = (
        model.get_input_embeddings().num_embeddings,
        getattr(model.config, "max_position_embeddings", length),
    )
    if ids.numel() == 0:
        raise SpecError("text", "no tokens", "one or more", "write something")
    if int(ids.max()) >= size:
        raise CheckpointError(
            "tokenizer.json",
            f"token {int(ids.max())}",
            f"0 to {size - 1}, as the model has them",
            "copy the model's own",
        )
    if length > longest:
        raise SpecError("length", f"{length} tokens", f"{longest}, the model's longest", "ask for less")


def require_degree(plan: TPPlan, tp_size: int, strategy: Strategy) -> None:
    """Raise PlanError unless this strategy can run this model on `tp_size` ranks."""
    irregular = frozenset(name for name in plan.gathered if isinstance(plan.spec_of(name), QuantSpec))
    mlp_rows = [name for name in sorted(irregular) if not name.endswith(plan.arch.attention.row)]
    if strategy == "tp-aware" and mlp_rows:
        raise PlanError(
            mlp_rows[0],
            "an irregular g_idx",
            "consecutive groups for strategy tp-aware",
            "run `bitshard convert` first, or choose strategy local-sort",
        )
    if strategy == "naive":  # sorted before it is cut, so the cut must fall between groups everywhere
        plan = replace(plan, gathered=plan.gathered - irregular)
    plan.require(tp_size)


def _tp_plan(plan: TPPlan) -> dict[str, str]:
    """transformers' tensor-parallel plan: module name with `*` for numbers -> style.

    It takes the place of the model's own, which also cuts lm_head and so gathers the logits of every token.
    """
    arch, prefix = plan.arch, f"{plan.arch.blocks}.*."
    styles: dict[str, str] = {}
    for name in arch.attention.column:
        styles[prefix + name] = "bitshard_column"
    styles[prefix + arch.attention.row] = "bitshard_row"
    for columns, row in mlp_paths(arch, plan.sizes)[:1]:
        for column in columns:
            styles[prefix + column.replace(".0.", ".*.")] = "bitshard_column"
        styles[prefix + row.replace(".0.", ".*.")] = "bitshard_partial_row" if arch.mlp.experts else "bitshard_row"
    if arch.mlp.experts:
        styles[prefix + arch.mlp.experts.removesuffix(".{e}")] = "moe_tp_experts"
    return {arch.module_name(name): style for name, style in styles.items()}


@register_quantization_config("bitshard")
class BitshardConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """How to run a checkpoint: where it is, on how many ranks, with which strategy and kernel."""

    def __init__(
        self, path: str, tp_size: int = 1, strategy: Strategy = "tp-aware", backend: str = "exact", **_: Any
    ) -> None:
        self.quant_method = "bitshard"
        self.path, self.tp_size, self.strategy, self.backend = path, tp_size, strategy, backend


@register_quantizer("bitshard")
class BitshardQuantizer(HfQuantizer):  # type: ignore[misc]
    """Swaps modules before the weights are read, and puts rows, slices and gathers in order after."""

    requires_calibration = True

    def __init__(self, quantization_config: BitshardConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.checkpoint = Checkpoint.open(Path(quantization_config.path))
        self.plan = self.checkpoint.plan()
        self.linears = {name: linear for i in range(self.plan.sizes.layers) for name, linear in self.plan.linears(i)}

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        arch, self.dtype = self.plan.arch, kwargs.get("dtype") or model.dtype
        modules = {arch.module_name(name): name for name in self.checkpoint.matrices()}
        ignored = set(model._keys_to_ignore_on_load_unexpected or ())
        with torch.device("meta"):
            for layer in range(self.plan.sizes.layers if arch.mlp.experts else 0):
                self._replace_experts(model, layer)
            for module_name, name in modules.items():
                parent, linear = model.get_submodule(module_name.rpartition(".")[0]), self._quant_linear(name)
                setattr(parent, module_name.rpartition(".")[2], linear)
                if linear.cut == "ours":
                    ignored.add(re.escape(module_name))
                parent._is_hf_initialized = True  # else GPT-BigCode's initialiser looks for a dense weight in it
        model._keys_to_ignore_on_load_unexpected = ignored
        model.tp_plan = _tp_plan(self.plan)

    def _replace_experts(self, model: nn.Module, layer: int) -> None:
        arch, sizes = self.plan.arch, self.plan.sizes
        tensors = f"{arch.blocks}.{layer}.{arch.mlp.experts.removesuffix('.{e}')}"
        name = arch.module_name(tensors)
        widths = {"w1": (sizes.hidden, sizes.intermediate), "w2": (sizes.intermediate, sizes.hidden)}
        act_fn = cast(nn.Module, model.get_submodule(name).act_fn)

        def make_linear(below: str) -> nn.Module:
            return nn.Linear(*widths.get(below.rpartition(".")[2], widths["w1"]), bias=False)

        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, Experts(sizes.experts, act_fn, make_linear))

    def _quant_linear(self, name: str) -> PackedLinear:
        spec, layout = self.checkpoint.spec_of(name), self.checkpoint.layout
        shapes = self.checkpoint.shapes([f"{name}.g_idx", f"{name}.qweight", f"{name}.bias"])
        if isinstance(spec, MixSpec):
            n, strips = shapes[f"{name}.qweight"]
            k, _ = self.checkpoint.size_of(name) or (strips * STRIP, n)
            return Mix64Linear(k, n, spec)
        assert isinstance(spec, QuantSpec) and isinstance(layout, GptqLayout)
        words, n = shapes[f"{name}.qweight"]
        linear = QuantLinear(words * 32 // spec.bits, n, spec, layout, f"{name}.bias" in shapes, self.dtype)
        if f"{name}.g_idx" not in shapes:
            linear.g_idx = None
        linear.cut = self._cut(name) if self.quantization_config.tp_size > 1 else "plain"
        if linear.cut == "ours":
            linear.leave_out()
        return linear

    def _cut(self, name: str) -> str:
        """Which way a rank's slice is taken; the styles read it.

        "gathered": rows in file order, all scales. "sorted": cut here after sorting. "ours": read here, not by
        transformers. "parts": each of the vectors that lie side by side is cut.
        """
        below = name.removeprefix(f"{self.plan.arch.blocks}.").partition(".")[2]
        if name not in self.plan.gathered:
            if self.plan.arch.attention.fused and below in self.plan.arch.attention.column:
                return "ours"
            parts = self.plan.arch.mlp.parts
            return "parts" if parts > 1 and below in self.plan.arch.mlp.column else "plain"
        return "sorted" if self.quantization_config.strategy == "naive" else "gathered"

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        names = {self.plan.arch.module_name(name): name for name in self.checkpoint.matrices()}
        slow = defaultdict[str, list[str]](list)
        for module_name, name in names.items():
            linear = model.get_submodule(module_name)
            assert isinstance(linear, PackedLinear)
            _to_local(linear)
            if linear.cut == "ours":
                linear.replace(**self._own_tensors(name))
            if isinstance(linear, QuantLinear):
                linear.order_rows()
                if linear.cut == "sorted":
                    linear.keep_rows(dist.get_rank(), self.quantization_config.tp_size)
            linear.backend = self.quantization_config.backend
            if linear.backend != "reference":
                linear.arrange()
                if linear.arrangement == "file":
                    slow[linear.why_slow()].append(name)
        if not dist.is_initialized() or dist.get_rank() == 0:
            for why, those in slow.items():
                logger.warning(
                    "plain torch runs %d of %d matrices, %s first: %s", len(those), len(names), those[0], why
                )
        for layer in range(self.plan.sizes.layers):
            self._finish_block(model.get_submodule(f"{self.plan.arch.blocks}.{layer}"))
        head = cast(PreTrainedModel, model).get_output_embeddings()
        if self.quantization_config.backend == "auto" and fits_eight_bit(head):
            # in float32 it is read for longer than all blocks together: 545 MB of Qwen2.5-0.5B, whose blocks have 130
            rounded = eight_bit(cast(nn.Linear, head))
            rounded.backend = "auto"
            cast(PreTrainedModel, model).set_output_embeddings(rounded)
        return model

    def _own_tensors(self, name: str) -> dict[str, torch.Tensor]:
        """This rank's slice of a matrix that transformers does not read: of GPTQ, q with a shared k and v."""
        layout, spec, size = self.checkpoint.layout, self.checkpoint.spec_of(name), self.quantization_config.tp_size
        linear = self.linears.get(name)
        columns = []
        if linear and linear.role == "column" and size > 1:
            columns = self.plan.columns(linear.name, dist.get_rank(), size)
        if isinstance(layout, Mix64Layout):
            assert isinstance(spec, MixSpec)
            tensors = self.checkpoint.matrix_tensors(name)
            if columns:
                tensors = layout.cut_columns(tensors, spec, columns)
            elif linear and size > 1:
                tensors = layout.cut_rows(tensors, spec, dist.get_rank(), size)
        else:
            tensors = self.checkpoint.matrix_columns(name, columns)
            tensors |= {suffix: t.to(self.dtype) for suffix, t in tensors.items() if t.is_floating_point()}
        return {suffix: t.to("cuda") if torch.cuda.is_available() else t for suffix, t in tensors.items()}

    def _finish_block(self, block: nn.Module) -> None:
        arch, size = self.plan.arch, self.quantization_config.tp_size
        attention = block.get_submodule(arch.attention.row.rpartition(".")[0])
        if size > 1:
            for attribute in arch.local_attributes:
                setattr(attention, attribute, getattr(attention, attribute) // size)
        _hoist(block, arch.attention.norm, arch.attention.column)
        if arch.mlp.experts:
            experts = block.get_submodule(arch.module_name(f".{arch.mlp.experts}")[1:].removesuffix(".{e}"))
            assert isinstance(experts, Experts)
            experts.hoist_gathers()
        else:
            _hoist(block, arch.mlp.norm, arch.mlp.column)

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return dtype

    def is_serializable(self, **kwargs: Any) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        """Which experts a token goes to is found out in Python."""
        return not self.plan.arch.mlp.experts


def _hoist(block: nn.Module, norm: str, consumers: Sequence[str]) -> None:
    """One gather of the norm's output instead of one in each matrix that reads it."""
    perm = hoist_gather([block.get_submodule(name) for name in consumers])
    if perm is not None:
        block.get_submodule(norm).register_forward_hook(lambda module, args, out: out[..., perm])


def _to_local(linear: PackedLinear) -> None:
    """This rank's slice as a plain tensor: the op knows no DTensor."""
    for name, parameter in list(linear.named_parameters(recurse=False)):
        if isinstance(parameter, DTensor):
            setattr(linear, name, nn.Parameter(parameter.to_local(), requires_grad=False))


# dimension that is cut, by tensor; GPTQ's orientation is [K, N]
COLUMN_DIM = {"qweight": 1, "qzeros": 1, "scales": 1, "bias": 0}
ROW_DIM = {"qweight": 0, "qzeros": 0, "scales": 0, "g_idx": 0}


def _distribute(module: nn.Module, name: str, mesh: DeviceMesh, placement: Placement) -> None:
    parameter = module._parameters[name]
    if parameter is not None:
        sharded = distribute_tensor(parameter, mesh, [placement], src_data_rank=None)
        module._parameters[name] = nn.Parameter(sharded, requires_grad=False)


class ColumnStyle(ColwiseParallel):  # type: ignore[misc]
    """Column-parallel: output channels are cut, the input is replicated. Dense matrices are cut by transformers."""

    def shard_param(self, module: nn.Module, param: str, mesh: DeviceMesh) -> None:
        if not isinstance(module, QuantLinear):
            if not isinstance(module, PackedLinear):  # one that is empty until it is cut in BitshardQuantizer
                super().shard_param(module, param, mesh)
            return
        dim = COLUMN_DIM.get(param)
        placement: Placement = Replicate()
        if dim is not None:
            placement = _StridedShard(dim, split_factor=2) if module.cut == "parts" else Shard(dim)
        _distribute(module, param, mesh, placement)

    def transform_inputs_pre_forward(self, module: nn.Module, args: Any, kwargs: Any, mesh: DeviceMesh) -> Any:
        if isinstance(module, PackedLinear):
            return args, kwargs
        return super().transform_inputs_pre_forward(module, args, kwargs, mesh)


class RowStyle(RowwiseParallel):  # type: ignore[misc]
    """Row-parallel: input channels are cut, partial outputs are summed by one AllReduce, the bias is added after it."""

    def shard_param(self, module: nn.Module, param: str, mesh: DeviceMesh) -> None:
        if not isinstance(module, QuantLinear):
            if not isinstance(module, PackedLinear):  # one that is empty until it is cut in BitshardQuantizer
                super().shard_param(module, param, mesh)
            return
        cut = {"qweight", "g_idx"}
        if module.cut == "plain" and module.scales.shape[0] > 1:
            cut |= {"scales", "qzeros"}
        whole = module.cut == "sorted" or param not in cut
        _distribute(module, param, mesh, Replicate() if whole else Shard(ROW_DIM[param]))

    def transform_inputs_pre_forward(self, module: nn.Module, args: Any, kwargs: Any, mesh: DeviceMesh) -> Any:
        if isinstance(module, PackedLinear):
            if module.cut == "sorted":
                assert isinstance(module, QuantLinear) and module.sorted_perm is not None
                return (gather_permute_chunk(args[0], module.sorted_perm, mesh.get_group()), *args[1:]), kwargs
            return args, kwargs
        return super().transform_inputs_pre_forward(module, args, kwargs, mesh)

    def transform_output_post_forward(self, module: nn.Module, output: Any, mesh: DeviceMesh) -> Any:
        if not isinstance(module, PackedLinear):
            return super().transform_output_post_forward(module, output, mesh)
        dist.all_reduce(output, group=mesh.get_group())
        return output if module.bias is None else output + module.bias.to(output.dtype)


class PartialRowStyle(RowStyle):
    """Row-parallel inside an expert: the sum over ranks is taken once, over all experts."""

    def transform_output_post_forward(self, module: nn.Module, output: Any, mesh: DeviceMesh) -> Any:
        return output


ALL_PARALLEL_STYLES.register("bitshard_column", ColumnStyle())
ALL_PARALLEL_STYLES.register("bitshard_row", RowStyle())
ALL_PARALLEL_STYLES.register("bitshard_partial_row", PartialRowStyle())
