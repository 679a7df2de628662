"""`bitshard verify`: every tensor of a checkpoint checked, and the proof that a converted one holds the same weights.

The proof does not trust what the file says of itself: the orders are taken again from the source's own `g_idx`, and
dequantized weights are compared bit for bit under them. Logits on the same tokens then show that the orders were legal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from bitshard.checkpoint import Checkpoint
from bitshard.convert import block_edit, matrices_in_block
from bitshard.edit import BlockEdit
from bitshard.errors import FormatError
from bitshard.integrations.transformers import load, load_config
from bitshard.layout import FLOATS, GptqLayout
from bitshard.mixed import MixedWeight
from bitshard.plan import Padding, TPPlan
from bitshard.progress import Progress, silent
from bitshard.quantized import QuantizedWeight

LOGIT_TOKENS = 32  # length of the random prompt whose logits are compared
LOGIT_TOLERANCE = 1e-4  # of the largest logit, in fp32: rounding alone gives 1e-7 to 1e-5, a wrong order about 1


@dataclass(frozen=True)
class Verification:
    """matrices: checked one by one. equal_matrices: of those, equal bit for bit to the source's under the permutation.

    logits_error: largest difference of logits, relative to the largest logit, or None when it was not asked for.
    """

    matrices: int
    equal_matrices: int | None
    logits_error: float | None


def verify(path: Path, against: Path | None = None, logits: bool = True, progress: Progress = silent) -> Verification:
    """Check every tensor of `path`; with `against`, prove that both hold the same model.

    Raises FormatError with the name of what is wrong, CheckpointError when files cannot be read.
    """
    checkpoint = Checkpoint.open(path)
    checkpoint.check_matrices()
    source = Checkpoint.open(against) if against else None
    source_plan = _plan_of_source(source, checkpoint) if source else None
    checked = equal = 0
    _check_floats(checkpoint, checkpoint.names_outside_blocks())
    for layer in progress(range(checkpoint.sizes.layers), "verifying"):
        _check_floats(checkpoint, checkpoint.names_in_block(layer))
        edit = _expected_edit(source, source_plan, checkpoint, layer) if source and source_plan else None
        for name in matrices_in_block(checkpoint, layer):
            checked += 1
            if checkpoint.spec_of(name) is None:
                found = _dense(checkpoint, name)
                expected = edit.apply_dense(name, _dense(source, name)) if source and edit else found
            else:
                found = _values(checkpoint.weight(name))
                expected = _values(_expected(edit, source, name)) if source and edit else found
            if found.keys() != expected.keys() or any(not torch.equal(found[k], expected[k]) for k in found):
                raise FormatError(
                    f"{path}: {name}", "other weights than the source's", "the same weights", "convert it again"
                )
            equal += source is not None
    if source:
        _compare_rest(checkpoint, source)
    error = _logits_error(path, against) if against and logits else None
    if error is not None and not error <= LOGIT_TOLERANCE:
        raise FormatError(
            str(path), f"logits off by {error:.1e} of the largest", f"{LOGIT_TOLERANCE:.0e}", "convert it again"
        )
    return Verification(checked, equal if source else None, error)


def _plan_of_source(source: Checkpoint, converted: Checkpoint) -> TPPlan:
    """The source's own plan, after a check that the other may have come from it: FormatError when it cannot have."""
    for checkpoint in (converted, source):
        if not isinstance(checkpoint.layout, GptqLayout):
            raise FormatError(
                str(checkpoint.path),
                f"layout {checkpoint.layout.name}, which no conversion writes or reads",
                "a GPTQ checkpoint and what it was converted to",
                "measure another by bitshard eval --against: what quantizing cost, or that an export cost nothing",
            )
    source.check_matrices()
    plan, new = source.plan(), converted.sizes
    padded = replace(plan.sizes, intermediate=new.intermediate, heads=new.heads, kv_heads=new.kv_heads)
    shrunk = new.intermediate < plan.sizes.intermediate or new.heads < plan.sizes.heads
    if padded != new or shrunk or converted.arch != source.arch:
        raise FormatError(
            str(converted.path), "another model than the source's", f"the sizes in {source.path / 'config.json'}",
            "name the checkpoint that this one was converted from",
        )  # fmt: skip
    names = [{name for name in c.files if not name.endswith(".g_idx")} for c in (converted, source)]
    for name in sorted(names[0] ^ names[1]):
        holder, other = (converted, source) if name in names[0] else (source, converted)
        raise FormatError(
            str(other.path),
            f"no tensor {name}, which {holder.path} has",
            "the same tensors in both",
            "convert it again",
        )
    return plan


def _check_floats(checkpoint: Checkpoint, names: Sequence[str]) -> None:
    """Every float is finite; scales and biases of quantized matrices have been checked before."""
    for name, tensor in checkpoint.read(names).items():
        if tensor.dtype in FLOATS and not bool(torch.isfinite(tensor).all()):
            raise FormatError(f"{checkpoint.path}: {name}", "NaN or infinite values", "finite floats", "get it again")


def _dense(checkpoint: Checkpoint, name: str) -> dict[str, torch.Tensor]:
    names = [n for n in checkpoint.files if n.rpartition(".")[0] == name]
    return {n.rpartition(".")[2]: tensor for n, tensor in checkpoint.read(names).items()}


def _expected(edit: BlockEdit, source: Checkpoint, name: str) -> QuantizedWeight:
    weight = source.weight(name)
    assert isinstance(weight, QuantizedWeight)  # both are GPTQ checkpoints
    return edit.apply(name, weight)


def _values(weight: QuantizedWeight | MixedWeight) -> dict[str, torch.Tensor]:
    bias = {} if weight.bias_N is None else {"bias": weight.bias_N}
    return {"weight": weight.dequantize(), **bias}


def _expected_edit(source: Checkpoint, plan: TPPlan, converted: Checkpoint, layer: int) -> BlockEdit:
    """What conversion must have done to this block: from the source's `g_idx` and the two configs' sizes alone."""
    new, old = converted.sizes, source.sizes
    padding = Padding(new.intermediate, new.heads, new.kv_heads)
    grown = (new.intermediate, new.heads, new.kv_heads) != (old.intermediate, old.heads, old.kv_heads)
    return block_edit(source, plan, layer, padding if grown else None)


def _compare_rest(checkpoint: Checkpoint, source: Checkpoint) -> None:
    """Tensors outside the blocks must be the same to the byte."""
    for name in source.names_outside_blocks():
        if not torch.equal(checkpoint.tensor(name), source.tensor(name)):
            raise FormatError(
                f"{checkpoint.path}: {name}", "another tensor than the source's", "the same tensor", "convert it again"
            )


def _logits_error(path: Path, against: Path) -> float:
    config = load_config(against)
    ids = torch.randint(0, config.vocab_size, (1, LOGIT_TOKENS), generator=torch.Generator().manual_seed(0))
    outputs = []
    for folder in (path, against):
        model = load(folder, dtype=torch.float32)
        with torch.no_grad():
            outputs.append(model(ids.to(model.device), use_cache=False).logits.float())
        del model
    return float((outputs[0] - outputs[1]).abs().max() / outputs[1].abs().max())
