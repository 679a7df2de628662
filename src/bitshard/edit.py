"""What happens to the matrices of one decoder block when a model is reordered or padded, quantized or 16-bit."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from bitshard.models import mlp_paths
from bitshard.plan import Padding, TPPlan
from bitshard.quantized import QuantizedWeight, insert


@dataclass
class BlockEdit:
    """What happens to the matrices of one decoder block, by full name. Reordering comes before padding."""

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
        """The same for what stays 16-bit: weight [N, K], bias [N]. What nothing touches is returned as it is."""
        if not self.touches(name):
            return tensors
        weight_KN = tensors["weight"].T
        out = dict(tensors)
        if name in self.rows:
            weight_KN = weight_KN[self.rows[name]]
        if name in self.longer:
            weight_KN = insert(weight_KN.T, [(weight_KN.shape[0], self.longer[name])], 0).T
        columns = self.columns.get(name, slice(None))
        out["weight"] = insert(weight_KN[:, columns], self.wider.get(name, []), 0).T.contiguous()
        if "bias" in tensors:
            out["bias"] = insert(tensors["bias"][columns], self.wider.get(name, []), 0)
        return out

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
