"""Architectures as data: which matrices a decoder block has, what ties their channels, where the sizes stand.

One table, `ARCHITECTURES`; a new architecture is a new row. Names are those of the checkpoint's tensors, relative to
the block; `renames` says where the running model keeps them under another name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from bitshard.errors import PlanError

Role = Literal["column", "row"]

LLAMA_KEYS = {
    "hidden": "hidden_size",
    "intermediate": "intermediate_size",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "layers": "num_hidden_layers",
    "experts": "num_local_experts",
}
BIGCODE_KEYS = LLAMA_KEYS | {"hidden": "n_embd", "intermediate": "n_inner", "heads": "n_head", "layers": "n_layer"}
CHATGLM_KEYS = LLAMA_KEYS | {
    "intermediate": "ffn_hidden_size",
    "kv_heads": "multi_query_group_num",
    "head_dim": "kv_channels",
    "layers": "num_layers",
}


@dataclass(frozen=True)
class Attention:
    """`norm` feeds the column-parallel matrices, whose heads feed the row-parallel one.

    fused: one matrix holds all q columns, then all k, then all v. divides: transformers refuses a number of heads that
    does not divide the residual stream, though they have a length of their own.
    """

    norm: str
    column: tuple[str, ...]
    row: str
    fused: bool = False
    divides: bool = False


@dataclass(frozen=True)
class Mlp:
    """`norm` feeds the column-parallel matrices; an element-wise activation (and product) feeds the row-parallel one.

    parts: how many hidden vectors lie side by side in the columns of each column matrix (2 for a fused gate_up_proj).
    experts: path of one expert with `{e}` for its number, or "" for a dense MLP; `column` and `row` are relative to it.
    router: the matrix that chooses the experts, from what `norm` feeds.
    """

    norm: str
    column: tuple[str, ...]
    row: str
    parts: int = 1
    experts: str = ""
    router: str = ""


@dataclass(frozen=True)
class Architecture:
    """A row of the table. `blocks`: path of the list of decoder blocks. `keys`: our size names -> config.json's.

    requires: config.json settings without which this row would be wrong. multi_query: one KV head when none is named.
    local_attributes: integers of the attention module that a rank must hold divided by the number of ranks, for the
    models whose forward does not read its sizes off the tensors.

    What has the channels of the residual stream follows from the roles: the inputs of column matrices and of a router,
    the outputs and biases of row matrices, every module right below a block (a norm), and outside the blocks the last
    dimension of every weight (embeddings, the final norm, lm_head). Norms inside attention are not on the stream.
    """

    model_types: tuple[str, ...]
    attention: Attention
    mlp: Mlp
    blocks: str = "model.layers"
    keys: Mapping[str, str] = field(default_factory=lambda: LLAMA_KEYS)
    requires: Mapping[str, Any] = field(default_factory=dict)
    multi_query: bool = False
    renames: tuple[tuple[str, str], ...] = ()
    local_attributes: tuple[str, ...] = ()

    def module_name(self, tensor_name: str) -> str:
        """The running model's name for a checkpoint name."""
        for old, new in self.renames:
            tensor_name = tensor_name.replace(old, new)
        return tensor_name


@dataclass(frozen=True)
class Shapes:
    """Sizes of one model, in channels, heads, blocks and experts (0 experts: a dense MLP)."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    layers: int
    experts: int


@dataclass(frozen=True)
class Linear:
    """One matrix of one decoder block: name below the block, [K, N] sizes, how tensor parallelism cuts it."""

    name: str
    role: Role
    in_features: int
    out_features: int


LLAMA_ATTENTION = Attention(
    norm="input_layernorm",
    column=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    row="self_attn.o_proj",
)
DIVIDING_ATTENTION = replace(LLAMA_ATTENTION, divides=True)
LLAMA_MLP = Mlp(norm="post_attention_layernorm", column=("mlp.gate_proj", "mlp.up_proj"), row="mlp.down_proj")

ARCHITECTURES = (
    Architecture(model_types=("llama",), attention=DIVIDING_ATTENTION, mlp=LLAMA_MLP),
    Architecture(model_types=("mistral", "qwen2", "qwen3", "granite"), attention=LLAMA_ATTENTION, mlp=LLAMA_MLP),
    Architecture(
        model_types=("glm", "glm4"),
        attention=LLAMA_ATTENTION,
        mlp=Mlp(norm="post_attention_layernorm", column=("mlp.gate_up_proj",), row="mlp.down_proj", parts=2),
    ),
    Architecture(
        model_types=("gemma3_text",),
        attention=DIVIDING_ATTENTION,
        mlp=Mlp(norm="pre_feedforward_layernorm", column=("mlp.gate_proj", "mlp.up_proj"), row="mlp.down_proj"),
    ),
    Architecture(
        model_types=("mixtral",),
        attention=LLAMA_ATTENTION,
        mlp=Mlp(
            norm="post_attention_layernorm",
            column=("w1", "w3"),
            row="w2",
            experts="block_sparse_moe.experts.{e}",
            router="block_sparse_moe.gate",
        ),
        renames=((".block_sparse_moe.", ".mlp."),),
    ),
    Architecture(
        model_types=("gpt_bigcode",),
        attention=Attention(norm="ln_1", column=("attn.c_attn",), row="attn.c_proj", fused=True),
        mlp=Mlp(norm="ln_2", column=("mlp.c_fc",), row="mlp.c_proj"),
        blocks="transformer.h",
        keys=BIGCODE_KEYS,
        requires={"multi_query": True},
        multi_query=True,
        local_attributes=("embed_dim", "num_heads", "num_key_value_groups"),
    ),
    Architecture(
        model_types=("chatglm",),
        attention=Attention(
            norm="input_layernorm",
            column=("self_attention.query_key_value",),
            row="self_attention.dense",
            fused=True,
        ),
        mlp=Mlp(
            norm="post_attention_layernorm",
            column=("mlp.dense_h_to_4h",),
            row="mlp.dense_4h_to_h",
            parts=2,
        ),
        blocks="transformer.encoder.layers",
        keys=CHATGLM_KEYS,
        requires={"multi_query_attention": True},
    ),
)


def architecture(config: Mapping[str, Any], where: str = "config.json") -> Architecture:
    """The row for a config.json, found at `where`; PlanError that says how to add one."""
    model_type = config.get("model_type")
    for row in ARCHITECTURES:
        if model_type in row.model_types:
            for key, needed in row.requires.items():
                if config.get(key, needed) != needed:
                    raise PlanError(
                        where, f"{key} = {config[key]!r}", f"{needed!r} for {model_type}", "use such a model"
                    )
            return row
    known = ", ".join(sorted(t for row in ARCHITECTURES for t in row.model_types))
    raise PlanError(
        where,
        f"model_type {model_type!r}",
        known,
        "add a row to ARCHITECTURES in bitshard/models.py: its block path, its column and row matrices, its norms",
    )


def shapes(arch: Architecture, config: Mapping[str, Any], where: str = "config.json") -> Shapes:
    """Sizes from a config.json, found at `where`, with the field's usual defaults for keys that may be missing."""

    def size(name: str, default: int | None = None) -> int:
        value = config.get(arch.keys[name])
        if value is None:
            value = default
        if type(value) is not int or value < 1:
            raise PlanError(
                where, f"{arch.keys[name]} = {value!r}", "a positive integer", "correct the model's config.json"
            )
        return value

    hidden, heads = size("hidden"), size("heads")
    kv_heads = size("kv_heads", 1 if arch.multi_query else heads)
    if heads % kv_heads:
        raise PlanError(
            where, f"{heads} heads over {kv_heads} KV heads", "whole groups of heads", "correct the model's config.json"
        )
    experts = size("experts") if arch.mlp.experts else 0
    chosen = config.get("num_experts_per_tok")
    if experts and chosen is not None and (type(chosen) is not int or not 1 <= chosen <= experts):
        raise PlanError(
            where, f"num_experts_per_tok = {chosen!r}", f"1 to {experts}, the experts of a block",
            "correct the model's config.json",
        )  # fmt: skip
    return Shapes(
        hidden=hidden,
        intermediate=size("intermediate", 4 * hidden),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=size("head_dim", hidden // heads),
        layers=size("layers"),
        experts=experts,
    )


def mlp_paths(arch: Architecture, sizes: Shapes) -> list[tuple[tuple[str, ...], str]]:
    """(column matrices, row matrix) of every MLP in a block: one, or one per expert."""
    prefixes = [arch.mlp.experts.format(e=e) + "." for e in range(sizes.experts)] if arch.mlp.experts else [""]
    return [(tuple(p + c for c in arch.mlp.column), p + arch.mlp.row) for p in prefixes]


def block_linears(arch: Architecture, sizes: Shapes) -> list[Linear]:
    """Every matrix of a decoder block that low-bit formats quantize, in the order it is used."""
    q, kv = sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
    widths = (q + 2 * kv,) if arch.attention.fused else (q, kv, kv)
    linears = [Linear(name, "column", sizes.hidden, n) for name, n in zip(arch.attention.column, widths, strict=True)]
    linears.append(Linear(arch.attention.row, "row", q, sizes.hidden))
    for columns, row in mlp_paths(arch, sizes):
        width = sizes.intermediate * arch.mlp.parts
        linears += [Linear(name, "column", sizes.hidden, width) for name in columns]
        linears.append(Linear(row, "row", sizes.intermediate, sizes.hidden))
    return linears


def value_columns(arch: Architecture, sizes: Shapes) -> tuple[str, list[int]]:
    """Where v lives: the matrix, and the first column of each KV head's `head_dim` columns."""
    d = sizes.head_dim
    if not arch.attention.fused:
        return arch.attention.column[-1], [j * d for j in range(sizes.kv_heads)]
    start = (sizes.heads + sizes.kv_heads) * d
    return arch.attention.column[0], [start + j * d for j in range(sizes.kv_heads)]
