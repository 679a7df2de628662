"""Orders that cost nothing at run time: which channels may trade places, and which order a GPTQ file asks for.

A row-parallel matrix with an irregular `g_idx` wants its input channels sorted by group (2402.04925, Algorithm 1).
Those channels are the output channels of the column-parallel matrices before it, so they can be produced in that order.
All permutations here are `perm[new] = old`.
"""

from __future__ import annotations

import torch

from bitshard.models import Shapes
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
