"""transformers' own tensor parallelism for our modules: which matrices are cut, and how.

transformers reads each rank's slice of every tensor from disk through DTensor placements; the styles below say which
slice of `qweight`, `qzeros`, `scales`, `g_idx` and `bias` that is, for column- and row-parallel matrices. A style's
hooks then surround the module's forward.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import Placement, _StridedShard
from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES, ColwiseParallel, RowwiseParallel

from bitshard.errors import PlanError
from bitshard.models import mlp_paths
from bitshard.nn import PackedLinear, QuantLinear
from bitshard.parallel import Strategy, gather_permute_chunk
from bitshard.plan import TPPlan
from bitshard.spec import QuantSpec


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


def tp_plan(plan: TPPlan) -> dict[str, str]:
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


# dimension that is cut, by tensor; GPTQ's orientation is [K, N]
COLUMN_DIM = {"qweight": 1, "qzeros": 1, "scales": 1, "bias": 0}
ROW_DIM = {"qweight": 0, "qzeros": 0, "scales": 0, "g_idx": 0}


def _distribute(module: nn.Module, name: str, mesh: DeviceMesh, placement: Placement) -> None:
    parameter = module._parameters[name]
    if parameter is not None:
        sharded = distribute_tensor(parameter, mesh, [placement], src_data_rank=None)
        module._parameters[name] = nn.Parameter(sharded, requires_grad=False)


class _OneWay(torch.autograd.Function):
    """The input of a matrix that is cut: its gradient would be a sum over ranks that nobody takes here."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        raise PlanError("gradients", f"a model on {dist.get_world_size()} ranks", "one rank", "load it without a plan")


def _one_way(args: Any) -> Any:
    x = args[0]
    return (_OneWay.apply(x), *args[1:]) if x.requires_grad else args  # type: ignore[no-untyped-call]


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
            return _one_way(args), kwargs
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
            args = _one_way(args)
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
