"""`bitshard convert`: a GPTQ checkpoint reordered for tensor parallelism, code for code the same weights.

MLP (2402.04925 Algorithm 3): the order that a down projection's `g_idx` asks for is given to the columns of the
matrices before it, so that down's groups come out consecutive and nothing is gathered between them. Attention: the same
through v where the order stays inside each KV group; what does not is left as it is and reported with its cost. Inputs
that come from the residual stream (q, k, v, gate, up) keep their `g_idx`: a local gather of a replicated activation.

Memory: up to three times the packed tensors of one decoder block (as read, as written, and copies of one matrix at a
byte per code), as much again where malloc keeps what is freed, and 24 bytes for each MLP channel of each block to hold
its order. What stays as it is, such as the embedding, is mapped from its file: memory that the system can take back.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from bitshard.checkpoint import Checkpoint
from bitshard.edit import BlockEdit
from bitshard.layout import FORMAT_VERSION, GptqLayout
from bitshard.models import mlp_paths, value_columns
from bitshard.plan import Padding, TPPlan, padding_for
from bitshard.progress import Progress, silent
from bitshard.quantconfig import QuantConfig
from bitshard.quantized import QuantizedWeight
from bitshard.reorder import attention_order, is_identity, mlp_order, tile_parts, value_columns_order
from bitshard.spec import QuantSpec
from bitshard.writer import OUTSIDE, Task, Writer, block_shard


@dataclass(frozen=True)
class ConvertReport:
    """What was done, for people and for `--json`.

    kept: row matrix whose `g_idx` stays irregular -> extra bytes of scales and zeros each rank holds at each degree.
    input_gathers: norms after which a replicated activation is gathered once.
    """

    out: str
    mlps_reordered: int
    attentions_reordered: int
    kept: Mapping[str, Mapping[int, int]]
    input_gathers: int
    degrees: Sequence[int]
    padded: Mapping[str, int]
    desc_act: bool


def convert(source: Path, out: Path, pad_to: int | None = None, progress: Progress = silent) -> ConvertReport:
    """Reorder the GPTQ checkpoint `source` into the new folder `out`; resumes what an earlier run left.

    pad_to: zero-pad MLP channels and whole KV groups until this tensor-parallel degree is legal.
    Raises CheckpointError, FormatError or PlanError, and leaves nothing under `out`, when it cannot.
    """
    checkpoint = Checkpoint.open(source)
    quantization, plan = checkpoint.gptq, checkpoint.plan()
    checkpoint.check_matrices()
    padding = None if pad_to is None else padding_for(plan, pad_to)
    blocks = list(range(plan.sizes.layers))
    shards = [OUTSIDE, *map(block_shard, blocks)]
    options = {"verb": "convert", "pad_to": pad_to, "format version": FORMAT_VERSION}
    task = Task(options, {"model": checkpoint.fingerprint()})
    edits = [block_edit(checkpoint, plan, layer, padding) for layer in blocks]
    writer = Writer(out, shards, task, GptqLayout.name)
    if not writer.has(OUTSIDE):
        writer.write(OUTSIDE, checkpoint.read(checkpoint.names_outside_blocks()))
    for layer in progress(blocks, "converting"):
        if not writer.has(block_shard(layer)):
            writer.write(block_shard(layer), _converted_block(checkpoint, layer, edits[layer]))
    config = {**checkpoint.config, **(padding.config_updates(plan.arch, checkpoint.config) if padding else {})}
    report = _report(checkpoint, out, plan, edits, padding)
    writer.finish(source, config, _quant_config(quantization, report, edits, source).to_json())
    return report


def block_edit(checkpoint: Checkpoint, plan: TPPlan, layer: int, padding: Padding | None) -> BlockEdit:
    """The orders that one block's own `g_idx` ask for, and its padding."""
    edit, prefix = BlockEdit(), f"{plan.arch.blocks}.{layer}."
    for columns, row in mlp_paths(plan.arch, plan.sizes):
        name = prefix + row
        if name in plan.gathered:
            perm = mlp_order(_g_idx(checkpoint, name))
            edit.rows[name] = perm
            for column in columns:
                edit.columns[prefix + column] = tile_parts(perm, plan.arch.mlp.parts)
    o_proj = prefix + plan.arch.attention.row
    if o_proj in plan.gathered:
        g_idx = _g_idx(checkpoint, o_proj)
        spec = plan.spec_of(o_proj)
        assert isinstance(spec, QuantSpec)  # a gathered matrix of a GPTQ checkpoint
        order = attention_order(g_idx, plan.sizes, spec.group(len(g_idx)))
        if order is None:
            edit.kept.append(o_proj)
        else:
            edit.rows[o_proj] = order
            _order_values(edit, plan, prefix, order)
    if padding:
        edit.pad(plan, padding, prefix)
    return edit


def _g_idx(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    g_idx = checkpoint.g_idx(name)
    assert g_idx is not None  # only a matrix with an irregular one is gathered
    return g_idx


def _order_values(edit: BlockEdit, plan: TPPlan, prefix: str, order_K: torch.Tensor) -> None:
    name, starts = value_columns(plan.arch, plan.sizes)
    width = starts[-1] + plan.sizes.head_dim
    columns = value_columns_order(order_K, plan.sizes, starts, width)
    if not is_identity(columns):
        edit.columns[prefix + name] = columns


def matrices_in_block(checkpoint: Checkpoint, layer: int) -> list[str]:
    """Names of a block's modules that hold tensors, matrices and norms alike, in file order."""
    return list(dict.fromkeys(name.rpartition(".")[0] for name in checkpoint.names_in_block(layer)))


def _converted_block(checkpoint: Checkpoint, layer: int, edit: BlockEdit) -> dict[str, torch.Tensor]:
    """All tensors of one block by name: matrices checked and edited, the rest as they are."""
    names = checkpoint.names_in_block(layer)
    tensors: dict[str, torch.Tensor] = {}
    for name in matrices_in_block(checkpoint, layer):
        own = [n for n in names if n.rpartition(".")[0] == name]
        if checkpoint.spec_of(name) is not None:
            weight = checkpoint.weight(name)
            assert isinstance(weight, QuantizedWeight)
            packed = checkpoint.matrix_tensors(name)
            if edit.touches(name):
                packed = checkpoint.gptq.layout.pack(edit.apply(name, weight))
        else:
            packed = {n.rpartition(".")[2]: tensor for n, tensor in checkpoint.read(own).items()}
            packed = edit.apply_dense(name, packed)
        tensors |= {f"{name}.{suffix}": tensor for suffix, tensor in packed.items()}
    return tensors


def _report(
    checkpoint: Checkpoint, out: Path, plan: TPPlan, edits: Sequence[BlockEdit], padding: Padding | None
) -> ConvertReport:
    kept = frozenset(name for edit in edits for name in edit.kept)
    sizes = plan.sizes
    if padding:
        sizes = replace(sizes, intermediate=padding.intermediate, heads=padding.heads, kv_heads=padding.kv_heads)
    after = replace(plan, sizes=sizes, gathered=kept)
    degrees = after.legal_degrees()
    linears = [pair for layer in range(sizes.layers) for pair in after.linears(layer)]
    cost = {
        name: {t: after.replicated_scale_bytes(name, linear, t) for t in degrees}
        for name, linear in linears
        if name in kept
    }
    columns = [name for name, linear in linears if linear.role == "column" and checkpoint.is_irregular(name)]
    norms = {(name.split(".")[len(plan.arch.blocks.split("."))], _norm_of(plan, name)) for name in columns}
    rows = [name for edit in edits for name in edit.rows]
    attentions = sum(name.endswith(plan.arch.attention.row) for name in rows)
    grown = padding and (padding.intermediate, padding.heads) != (plan.sizes.intermediate, plan.sizes.heads)
    return ConvertReport(
        out=str(out),
        mlps_reordered=len(rows) - attentions,
        attentions_reordered=attentions,
        kept=cost,
        input_gathers=len(norms),
        degrees=degrees,
        padded=vars(padding) if padding and grown else {},
        desc_act=bool(columns or kept),
    )


def _norm_of(plan: TPPlan, name: str) -> str:
    """The norm whose output a column-parallel matrix reads."""
    attention = plan.arch.attention
    return attention.norm if name.endswith(attention.column) else plan.arch.mlp.norm


def _quant_config(
    quantization: QuantConfig, report: ConvertReport, edits: Sequence[BlockEdit], source: Path
) -> QuantConfig:
    """The output's config. Where nothing moved the section is kept, so converting twice changes no byte."""
    assert isinstance(quantization.spec, QuantSpec)
    spec = replace(quantization.spec, desc_act=report.desc_act)
    overrides = tuple(
        (pattern, settings and {**settings, **({"desc_act": report.desc_act} if "desc_act" in settings else {})})
        for pattern, settings in quantization.overrides
    )
    section: Mapping[str, Any] = quantization.section
    moved = any(edit.columns or edit.rows or edit.wider or edit.longer for edit in edits)
    if moved or "tensor_parallel" not in section:
        digest = hashlib.sha256()
        for edit in edits:
            for name in sorted(edit.rows):
                digest.update(name.encode() + edit.rows[name].to(torch.int64).numpy().tobytes())
        before = section.get("provenance", {})
        section = {
            "version": FORMAT_VERSION,
            "layout": GptqLayout.name,
            "tensor_parallel": {
                "degrees": list(report.degrees),
                "local_order": {name: {str(t): b for t, b in cost.items()} for name, cost in report.kept.items()},
                "input_gathers": report.input_gathers,
            },
            "provenance": {
                "source": source.resolve().name,
                **before,
                "permutation_sha256": digest.hexdigest(),
                **({"padded": dict(report.padded)} if report.padded else {}),
            },
        }
    return replace(quantization, spec=spec, overrides=overrides, section=section)
