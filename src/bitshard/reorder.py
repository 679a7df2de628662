"""Orders that cost nothing at run time: which channels may trade places, and which order a GPTQ file asks for.

A row-parallel matrix with an irregular `g_idx` wants its input channels sorted by group (2402.04925, Algorithm 1).
Those channels are the output channels of the column-parallel matrices before it, so they can be produced in that order.
A 16-bit model is free to have all its channels in the order that quantizing wants; `ModelOrder` holds such orders.
All permutations here are `perm[new] = old`.
Shape legend: H hidden, I intermediate, K input channels, L layers, J KV heads, D channels of a head.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from bitshard.errors import PlanError
from bitshard.models import Architecture, Shapes, mlp_paths
from bitshard.quantized import trivial_g_idx


def mlp_order(g_idx_K: torch.Tensor) -> torch.Tensor:
    """Algorithm 1: the stable argsort of an MLP row matrix's `g_idx`. Computed once and used for every matrix."""
    return torch.argsort(g_idx_K, stable=True)


def tile_parts(perm: torch.Tensor, parts: int) -> torch.Tensor:
    """The same order for each of `parts` vectors that lie side by side (a fused gate_up_proj)."""
    return torch.cat([perm + part * len(perm) for part in range(parts)])


def attention_order(g_idx_K: torch.Tensor, sizes: Shapes, group: int) -> torch.Tensor | None:
    """The order of an output projection's input channels that v can produce, or None when none makes it regular.

    Free: one permutation of `head_dim` for each KV head, the same in every query head that shares it, because v is made
    once and repeated. The order sorts all those query heads at once where that is possible, which a
    lexicographic sort finds; it is returned only if every group is then a run of consecutive channels.
    """
    heads = g_idx_K.view(sizes.kv_heads, sizes.heads // sizes.kv_heads, sizes.head_dim)
    orders = []
    for head_RD in heads:
        order = torch.arange(sizes.head_dim)
        for g_idx_D in reversed(head_RD.unbind()):
            order = order[torch.argsort(g_idx_D[order], stable=True)]
        orders.append(order)
    perm = expand_value_order(torch.stack(orders), sizes)
    runs = torch.unique_consecutive(g_idx_K[perm], return_counts=True)
    whole = bool((runs[1] == group).all())
    return perm if whole and len(torch.unique(runs[0])) == len(runs[0]) else None


def expand_value_order(order_JD: torch.Tensor, sizes: Shapes) -> torch.Tensor:
    """One order of `head_dim` per KV head [J, D] -> the order of all heads * head_dim input channels of o."""
    repeats = sizes.heads // sizes.kv_heads
    per_head = order_JD.repeat_interleave(repeats, dim=0)
    return (per_head + torch.arange(sizes.heads)[:, None] * sizes.head_dim).flatten()


def value_columns_order(perm_K: torch.Tensor, sizes: Shapes, starts: list[int], width: int) -> torch.Tensor:
    """The order of the columns of the matrix that holds v, from the order of o's input channels.

    starts: first column of each KV head's v. width: all columns; those outside v stay where they are.
    """
    repeats = sizes.heads // sizes.kv_heads
    first_heads = perm_K.view(sizes.heads, sizes.head_dim)[::repeats]
    columns = torch.arange(width)
    for j, (order_D, start) in enumerate(zip(first_heads, starts, strict=True)):
        columns[start : start + sizes.head_dim] = start + order_D - j * repeats * sizes.head_dim
    return columns


def is_identity(perm: torch.Tensor) -> bool:
    return torch.equal(perm, torch.arange(len(perm)))


def is_consecutive(g_idx_K: torch.Tensor, group: int) -> bool:
    return torch.equal(g_idx_K.to(torch.int32), trivial_g_idx(len(g_idx_K), group))


@dataclass(frozen=True)
class ModelOrder:
    """Every free permutation of one 16-bit model, int64, `perm[new] = old`; each may be the identity.

    hidden_H: the residual stream. intermediate: [I] of each MLP, by the full name of its row matrix.
    kv_groups_LJ: whole KV groups, which are a k and a v head with the query heads that share them.
    values_LJD: inside each v head, where j counts heads as the file has them, before groups are moved.
    """

    hidden_H: torch.Tensor
    intermediate: Mapping[str, torch.Tensor]
    values_LJD: torch.Tensor
    kv_groups_LJ: torch.Tensor

    @classmethod
    def identity(cls, arch: Architecture, sizes: Shapes) -> ModelOrder:
        rows = [f"{arch.blocks}.{layer}.{row}" for layer in range(sizes.layers) for _, row in mlp_paths(arch, sizes)]
        return cls(
            hidden_H=torch.arange(sizes.hidden),
            intermediate={row: torch.arange(sizes.intermediate) for row in rows},
            values_LJD=torch.arange(sizes.head_dim).repeat(sizes.layers, sizes.kv_heads, 1),
            kv_groups_LJ=torch.arange(sizes.kv_heads).repeat(sizes.layers, 1),
        )

    def check(self, arch: Architecture, sizes: Shapes) -> None:
        """Raise PlanError, naming the order, unless every one is a permutation of this model's channels."""
        wanted = ModelOrder.identity(arch, sizes)
        odd = sorted(wanted.intermediate.keys() ^ self.intermediate.keys())
        if odd:
            raise PlanError(
                f"order of {odd[0]}", "one without the other", "an order for every MLP, and no more", "choose it again"
            )
        pairs = {name: (perm_I, wanted.intermediate[name]) for name, perm_I in self.intermediate.items()}
        pairs["hidden_H"] = self.hidden_H, wanted.hidden_H
        pairs["values_LJD"] = self.values_LJD, wanted.values_LJD
        pairs["kv_groups_LJ"] = self.kv_groups_LJ, wanted.kv_groups_LJ
        for name, (found, allowed) in pairs.items():
            if found.dtype != torch.int64 or not torch.equal(found.sort(-1).values, allowed):
                raise PlanError(
                    f"order of {name}",
                    f"{list(found.shape)} numbers that are no permutation",
                    f"{list(allowed.shape)} with each of 0 to {allowed.shape[-1] - 1} once",
                    "choose it again",
                )

    def heads(self, layer: int, sizes: Shapes) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Orders of the columns of q, k and v, and of the rows of o, in one layer."""
        groups_J, values_JD, d = self.kv_groups_LJ[layer], self.values_LJD[layer], sizes.head_dim
        q_width = sizes.heads // sizes.kv_heads * d  # of one group
        q = (groups_J[:, None] * q_width + torch.arange(q_width)).flatten()
        k = (groups_J[:, None] * d + torch.arange(d)).flatten()
        v = (torch.arange(sizes.kv_heads)[:, None] * d + values_JD).flatten()
        return q, k, v[k], expand_value_order(values_JD, sizes)[q]


def deal(sensitivity_K: torch.Tensor, block: int = 64) -> torch.Tensor:
    """The order [K] in which every aligned block has its most sensitive channels first and all have like shares.

    Channels are dealt from the most sensitive down, one to each block a round, the largest of a round to the block that
    has least so far. So the first n channels of all blocks together are the most sensitive ones there are, for every n:
    one deal serves strips of any width, 4-bit or not. The sums of two blocks differ by no more than two channels can.
    A last block of fewer channels takes part until it is full: its strips of high precision are as full as any.
    Channels of equal sensitivity keep their order. With block = K it is a plain descending sort.
    """
    sensitivity_K = sensitivity_K.detach().double().cpu()
    falling_K = torch.argsort(sensitivity_K, descending=True, stable=True)
    perm_K = torch.empty_like(falling_K)
    starts_B = torch.arange(0, len(perm_K), block)
    sums_B, dealt = torch.zeros(len(starts_B), dtype=torch.float64), 0
    for place in range(min(block, len(perm_K))):
        taking = int((starts_B + place < len(perm_K)).sum())  # all blocks, or all but the last
        poorest = torch.argsort(sums_B[:taking], stable=True)
        channels = falling_K[dealt : dealt + taking]
        perm_K[starts_B[poorest] + place] = channels
        sums_B[poorest] += sensitivity_K[channels]
        dealt += taking
    return perm_K


def deal_within(
    sensitivity_K: torch.Tensor, sizes: Shapes, kv_groups_J: torch.Tensor, block: int = 64, strip: int = 16
) -> torch.Tensor:
    """The order of each v head [J, D] that serves o's input channels best; K = heads * head_dim, in the file's order.

    The query heads of a KV group share its order, so their sensitivities are added. Where heads are whole blocks the
    order is dealt like any other. Else heads begin at different places of a block, which whole KV groups in their new
    order `kv_groups_J` decide: the most sensitive channels go where most of the group's heads meet a block's first
    strip. With 32 channels in a head that is every other head's first 16; a KV head that meets no first strip gains
    nothing, and no free order could change it.
    """
    shared = sizes.heads // sizes.kv_heads
    sensitivity_JD = sensitivity_K.detach().double().cpu().view(-1, shared, sizes.head_dim).sum(1)
    if sizes.head_dim % block == 0:
        return torch.stack([deal(sensitivity_D, block) for sensitivity_D in sensitivity_JD])
    heads_JR = torch.argsort(kv_groups_J)[:, None] * shared + torch.arange(shared)
    places_JRD = (heads_JR[..., None] * sizes.head_dim + torch.arange(sizes.head_dim)) % block
    best_first_JD = torch.argsort((places_JRD < strip).sum(1), descending=True, stable=True)
    falling_JD = torch.argsort(sensitivity_JD, descending=True, stable=True)
    return torch.empty_like(falling_JD).scatter_(1, best_first_JD, falling_JD)


def kv_group_order(sensitivity_J: torch.Tensor) -> torch.Tensor:
    """An order of whole KV groups [J] whose consecutive slices have like sums, for every number of ranks dividing J.

    Two groups trade places, the best pair first, as long as that makes the sums of all those slices more alike. Groups
    that are balanced as they are stay where they are.
    """
    sensitivity_J = sensitivity_J.detach().double().cpu()
    groups = len(sensitivity_J)
    order_J, enough = torch.arange(groups), 1e-9 * sensitivity_J.sum().square()
    while True:
        own_J = sensitivity_J[order_J]
        moved_JJ = own_J - own_J[:, None]  # what the place of the row gains, and that of the column loses
        change_JJ = torch.zeros_like(moved_JJ)  # of the slices' squared sums
        for ranks in range(2, groups):
            if groups % ranks == 0:
                rank_J = torch.arange(groups) // (groups // ranks)
                sums_J = own_J.view(ranks, -1).sum(1)[rank_J]
                change = moved_JJ * (sums_J[:, None] - sums_J + moved_JJ)
                change_JJ += ranks * change.masked_fill(rank_J[:, None] == rank_J, 0)
        best = int(change_JJ.argmin())
        if not change_JJ.flatten()[best] < -enough:
            return order_J
        a, b = divmod(best, groups)
        order_J[[a, b]] = order_J[[b, a]]
