"""The order of a whole model's channels, from how active its inputs are and how large the weights that read them.

A channel's sensitivity to rounding is H_jj |W_:j|^2 for one matrix; one that several matrices read has the sum of
theirs, each Hessian divided by its mean, so that a layer with large activations does not decide alone.
"""

from __future__ import annotations

import torch

from bitshard.blockwise import BlockwiseModel
from bitshard.models import mlp_paths
from bitshard.progress import Progress
from bitshard.reorder import ModelOrder, deal, deal_within, kv_group_order
from bitshard.spec import BLOCK


def choose_order(
    model: BlockwiseModel, tokens_SL: torch.Tensor, ranking: str, mixed: bool, progress: Progress
) -> tuple[ModelOrder, dict[str, torch.Tensor]]:
    """Run a 16-bit model, at its own sizes, over some segments; choose every free permutation (docs/design.md, Orders).

    Returns it, and how active the input channels of every matrix are, float32 [K] by full name, in the file's order.

    ranking: "hessian", or "range" to leave the activations out. mixed: deal to blocks of 64, each with its share of
    sensitive channels; else sort, so that groups of one width hold channels of like sensitivity.
    """
    checkpoint, arch, sizes = model.checkpoint, model.arch, model.checkpoint.sizes
    hidden_SLH = model.embed(tokens_SL, checkpoint.read)
    hidden_H = torch.zeros(sizes.hidden, dtype=torch.float64)
    intermediate, values, kv_groups = {}, [], []
    active: dict[str, torch.Tensor] = {}
    for layer in progress(range(sizes.layers), "ordering"):
        model.load(layer, checkpoint.read(checkpoint.names_in_block(layer)))
        mlps = mlp_paths(arch, sizes)
        readers = [
            arch.attention.column,
            (arch.attention.row,),
            *(m for columns, row in mlps for m in (columns, (row,))),
        ]
        activity = {names[0]: _Activity() for names in readers}
        hidden_SLH = model.run(layer, hidden_SLH, {name: seen.add for name, seen in activity.items()})

        def sensitivity(names: tuple[str, ...], of: dict[str, _Activity] = activity, at: int = layer) -> torch.Tensor:
            weights = sum(_weight_importance(model.linear(at, name).weight, ranking) for name in names)
            assert isinstance(weights, torch.Tensor)
            return weights if ranking == "range" else weights * of[names[0]].relative(weights)

        hidden_H += sum(sensitivity(columns) for columns in (arch.attention.column, *(c for c, _ in mlps)))
        for _, row in mlps:
            at_row = sensitivity((row,))
            intermediate[f"{arch.blocks}.{layer}.{row}"] = deal(at_row, BLOCK if mixed else len(at_row))
        at_o = sensitivity((arch.attention.row,))
        for names in readers:
            like_K = torch.ones(model.linear(layer, names[0]).in_features, dtype=torch.float64)
            active |= {f"{arch.blocks}.{layer}.{name}": activity[names[0]].relative(like_K).float() for name in names}
        kv_groups.append(kv_group_order(at_o.view(sizes.kv_heads, -1).sum(1)))
        values.append(deal_within(at_o, sizes, kv_groups[-1], BLOCK if mixed else sizes.head_dim))
        model.unload(layer)
    order = ModelOrder(
        hidden_H=deal(hidden_H, BLOCK if mixed else sizes.hidden),
        intermediate=intermediate,
        values_LJD=torch.stack(values),
        kv_groups_LJ=torch.stack(kv_groups),
    )
    return order, active


class _Activity:
    """Sum of squares of every channel of one input, and so the Hessian's diagonal."""

    def __init__(self) -> None:
        self._sum_K: torch.Tensor | None = None

    def add(self, x: torch.Tensor) -> None:
        sum_K = x.reshape(-1, x.shape[-1]).double().square().sum(0).cpu()
        self._sum_K = sum_K if self._sum_K is None else self._sum_K + sum_K

    def relative(self, like_K: torch.Tensor) -> torch.Tensor:
        """Over its mean; ones where no token came by."""
        if self._sum_K is None or not float(self._sum_K.sum()) > 0:
            return torch.ones_like(like_K)
        return self._sum_K / self._sum_K.mean()


def _weight_importance(W_NK: torch.Tensor, ranking: str) -> torch.Tensor:
    """Squared norm of each input channel's weights, or their squared range, float64 [K]."""
    W_NK = W_NK.double().cpu()
    return (W_NK.amax(0) - W_NK.amin(0)).square() if ranking == "range" else W_NK.square().sum(0)
