"""In a compiled graph: `mix64` matrices that read the same activations become one call of the C kernels.

A call costs some 20 us of Python and threads that wait for each other, whatever its size; with q, k and v in one and
gate and up in one, a token of a Llama-like model takes 4 calls a layer instead of 7. The same is one node of the graph:
matrices with a `strip_order`, or whose K is filled up to whole blocks, have inputs of their own and stay alone.
"""

from __future__ import annotations

from collections import defaultdict
from operator import getitem
from pathlib import Path

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

from bitshard import kernels
from bitshard.kernels import choose, mix64_linear, mix64_linears, wide_strips


class FuseLinears(CustomGraphPass):
    """For inductor's option `post_grad_custom_pre_pass`."""

    def __call__(self, graph: torch.fx.Graph) -> None:
        readers = defaultdict(list)
        for node in graph.find_nodes(op="call_function", target=mix64_linear):
            x, *_, outliers, _, _, _, _, arrangement, backend = node.args
            if arrangement == "cpu" and choose("mix64", "cpu", x.meta["val"].dtype, 1, backend) != "reference":
                readers[x, bool(outliers), backend].append(node)
        for nodes in readers.values():
            if len(nodes) > 1:
                _fuse(graph, nodes)

    def uuid(self) -> bytes:
        """inductor keeps what it compiled under this."""
        return bytes(get_hash_for_files((str(Path(__file__)), str(kernels.__file__))))


def _fuse(graph: torch.fx.Graph, nodes: list[torch.fx.Node]) -> None:
    x, _, _, _, _, _, _, _, _, _, backend = nodes[0].args
    _, qweights, _, metadata, outliers, rows, bits, fractions, *_ = zip(*(node.args for node in nodes), strict=True)
    scales2 = [tensors[0] for tensors in metadata]
    wides = [wide_strips(*mix) for mix in zip(bits, fractions, strict=True)]
    values = [node.meta["val"] for node in nodes]  # inductor's other passes look at them
    with graph.inserting_before(nodes[0]):  # weights that are computed come later; inductor sorts the graph afterwards
        weights = list(qweights), scales2, [tensor for tensors in outliers for tensor in tensors], list(rows), wides
        together = graph.call_function(mix64_linears, (x, *weights, backend))
        together.meta["val"] = torch.cat(values, dim=-1)
        parts = graph.call_function(torch.ops.aten.split_with_sizes.default, (together, list(rows), -1))
        parts.meta["val"] = values
        for i, node in enumerate(nodes):
            part = graph.call_function(getitem, (parts, i))
            part.meta.update(node.meta)
            node.replace_all_uses_with(part)
    for node in nodes:
        graph.erase_node(node)
