"""What happens to a model's tensors, block by block, when it is reordered or padded, quantized or 16-bit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch

from bitshard.errors import PlanError
from bitshard.models import mlp_paths
from bitshard.plan import Padding, TPPlan
from bitshard.quantized import QuantizedWeight, insert
from bitshard.reorder import ModelOrder, tile_parts


@dataclass
class BlockEdit:
    """What happens to the matrices and norms of one decoder block, or of what lies outside the blocks, by full name.

    Reordering comes before padding. A norm's channels are output channels.
    """

    columns: dict[str, torch.Tensor] = field(default_factory=dict)  # order of the output channels, perm[new] = old
    rows: dict[str, torch.Tensor] = field(default_factory=dict)  # order of the input channels
    wider: dict[str, list[tuple[int, int]]] = field(default_factory=dict)  # zero output channels: (position, count)
    longer: dict[str, int] = field(default_factory=dict)  # zero input channels at the end
    kept: list[str] = field(default_factory=list)  # row matrices whose g_idx stays irregular

    def touches(self, name: str) -> bool:
        return any(name in edits for edits in (self.columns, self.rows, self.wider, self.longer))

    def apply(self, name: str, weight: QuantizedWeight) -> QuantizedWeight:
        if name in self.rows:
            weight = weight.permute_rows(self.rows[name]).renumber_groups()
        if name in self.columns:
            weight = weight.permute_columns(self.columns[name])
        if name in self.wider:
            weight = weight.insert_columns(self.wider[name])
        return weight.append_rows(self.longer[name]) if name in self.longer else weight

    def apply_dense(self, name: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The same for what stays 16-bit: a matrix's weight [N, K] and bias [N], or a norm's, both [N].

        What nothing touches is returned as it is. Raises PlanError when an order does not fit a tensor.
        """
        if not self.touches(name):
            return tensors
        out = dict(tensors)
        for suffix in ("weight", "bias"):
            if suffix not in tensors:
                continue
            tensor, is_matrix = tensors[suffix], tensors[suffix].dim() > 1
            if name in self.columns:
                tensor = _select(f"{name}.{suffix}", tensor, 0, self.columns[name])
            if name in self.rows and is_matrix:
                tensor = _select(f"{name}.{suffix}", tensor, 1, self.rows[name])
            tensor = insert(tensor.movedim(0, -1), self.wider.get(name, []), 0).movedim(-1, 0)
            if name in self.longer and is_matrix:
                tensor = insert(tensor, [(tensor.shape[1], self.longer[name])], 0)
            out[suffix] = tensor.contiguous()
        return out

    def apply_all(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """`apply_dense` for 16-bit tensors by full name."""
        modules: dict[str, dict[str, torch.Tensor]] = {}
        for name, tensor in tensors.items():
            module, _, suffix = name.rpartition(".")
            modules.setdefault(module, {})[suffix] = tensor
        return {
            f"{module}.{suffix}": tensor
            for module, own in modules.items()
            for suffix, tensor in self.apply_dense(module, own).items()
        }

    def order_block(self, plan: TPPlan, order: ModelOrder, layer: int, names: Iterable[str]) -> None:
        """Reorder one 16-bit block: every freedom of its matrices, router and norms. names: all of its tensors.

        `order` was checked against the plan's sizes, which have no padding in.
        """
        arch, sizes, prefix = plan.arch, plan.sizes, f"{plan.arch.blocks}.{layer}."
        for name, linear in plan.linears(layer):
            on_stream = self.rows if linear.role == "column" else self.columns
            on_stream[name] = order.hidden_H
        if arch.mlp.router:
            self.rows[prefix + arch.mlp.router] = order.hidden_H
        for module in {name.removeprefix(prefix).rpartition(".")[0] for name in names}:
            if "." not in module:  # right below the block: a norm
                self.columns[prefix + module] = order.hidden_H
        q, k, v, o = order.heads(layer, sizes)
        self.rows[prefix + arch.attention.row] = o
        heads = [torch.cat([q, len(q) + k, len(q) + len(k) + v])] if arch.attention.fused else [q, k, v]
        self.columns |= {prefix + name: perm for name, perm in zip(arch.attention.column, heads, strict=True)}
        for columns, row in mlp_paths(arch, sizes):
            perm_I = order.intermediate[prefix + row]
            self.rows[prefix + row] = perm_I
            self.columns |= {prefix + column: tile_parts(perm_I, arch.mlp.parts) for column in columns}

    def order_outside(self, order: ModelOrder, tensors: Mapping[str, torch.Tensor]) -> None:
        """Reorder what lies outside the blocks: embeddings, the final norm and lm_head."""
        for name, tensor in tensors.items():
            module, _, suffix = name.rpartition(".")
            if suffix == "weight" and tensor.dim():  # a single number has no channels
                (self.columns if tensor.dim() == 1 else self.rows)[module] = order.hidden_H

    def pad(self, plan: TPPlan, padding: Padding, prefix: str) -> None:
        """Zero-pad the block below `prefix` from the plan's sizes: MLP channels, and whole KV groups."""
        arch, sizes = plan.arch, plan.sizes
        extra = padding.intermediate - sizes.intermediate
        if extra:
            for columns, row in mlp_paths(arch, sizes):
                self.longer[prefix + row] = extra
                for column in columns:
                    ends = [(part + 1) * sizes.intermediate for part in range(arch.mlp.parts)]
                    self.wider[prefix + column] = [(end, extra) for end in ends]
        q, kv = sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
        extra_q = (padding.heads - sizes.heads) * sizes.head_dim
        extra_kv = (padding.kv_heads - sizes.kv_heads) * sizes.head_dim
        if extra_q:
            self.longer[prefix + arch.attention.row] = extra_q
            if arch.attention.fused:
                places = [(q, extra_q), (q + kv, extra_kv), (q + 2 * kv, extra_kv)]
                self.wider[prefix + arch.attention.column[0]] = places
            else:
                for column, end, count in zip(
                    arch.attention.column, (q, kv, kv), (extra_q, extra_kv, extra_kv), strict=True
                ):
                    self.wider[prefix + column] = [(end, count)]


def _select(where: str, tensor: torch.Tensor, dim: int, perm: torch.Tensor) -> torch.Tensor:
    if tensor.shape[dim] != len(perm):
        raise PlanError(
            where,
            f"shape {list(tensor.shape)}",
            f"{len(perm)} channels in dimension {dim}, as its order has them",
            "correct config.json, or get the files again",
        )
    return tensor.index_select(dim, perm.to(tensor.device))
