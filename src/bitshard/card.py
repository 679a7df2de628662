"""The model card of a quantized checkpoint, README.md: what was done, how to run it, what was measured."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bitshard import __version__
from bitshard.checkpoint import CARD, Checkpoint, reason
from bitshard.errors import CheckpointError
from bitshard.layout import GptqLayout
from bitshard.quantconfig import QuantConfig
from bitshard.spec import QuantSpec

NOTHING = "Nothing yet: `bitshard eval FOLDER --text FILE --against SOURCE --card` adds a line here.\n"
COLUMNS = (
    "text",
    "context",
    "stride",
    "windows",
    "backend",
    "perplexity",
    "16-bit",
    "KL",
    "same top token",
    "bitshard",
)
KEPT = re.compile(r"^(?:license|license_name|license_link|language): .+$", re.MULTILINE)  # of the source's own card


def model_card(source_folder: Path, quantization: QuantConfig, average_bits: float, errors: Mapping[str, float]) -> str:
    """The card of a checkpoint. errors: of each matrix's outputs, relative, on the calibration text."""
    provenance = quantization.section["provenance"]
    source, layout = provenance["source"], quantization.layout
    recipe = {name: value for name, value in provenance["recipe"].items() if name == "damp" or value}
    worst = max(errors, key=errors.__getitem__)
    facts = {
        "bits": f"{average_bits:.3f} on average, counted from the bytes of {len(errors)} matrices; the rest has 16",
        "format": f"{layout.name}, {', '.join(f'{name} {value}' for name, value in quantization.spec.facts().items())}",
        "recipe": ", ".join(f"{name} {value}" for name, value in recipe.items()),
        "calibration": f"{provenance['samples']} segments of {provenance['length']} tokens, seed {provenance['seed']}, "
        f"text with sha256 {provenance['calibration_sha256'][:12]}",
        "error of a matrix's outputs": f"{sum(errors.values()) / len(errors):.2%} of their square on average, "
        f"{errors[worst]:.2%} at most ({worst})",
        "made by": provenance["quantizer"],
    }
    table = "".join(f"| {name} | {value} |\n" for name, value in facts.items())
    base = f"base_model: {source}\n" if source.count("/") == 1 else ""
    gptq = isinstance(layout, GptqLayout)
    config = ", quantization_config=BitshardConfig()" if gptq else ""
    imported = "from bitshard.integrations.transformers import BitshardConfig\n" if gptq else ""
    method = ', quantization="bitshard"' if gptq else ""
    plain = ""
    if isinstance(layout, GptqLayout) and isinstance(quantization.spec, QuantSpec) and not quantization.spec.desc_act:
        version = "" if layout.zeros_version == 1 else " of version 2 (`gptq_v2`)"
        plain = f"It is an ordinary GPTQ file{version}, which vLLM and GPTQModel read; with bitshard's kernels:\n\n"
    original = source_folder / CARD
    readable = original.is_file() and os.access(original, os.R_OK)  # else Writer refuses to copy it
    head = original.read_text(encoding="utf-8", errors="ignore").split("\n---", 1)[0] if readable else ""
    kept = "".join(f"{line}\n" for line in KEPT.findall(head) if head.startswith("---"))
    return f"""---
library_name: transformers
pipeline_tag: text-generation
{base}{kept}tags: [bitshard, {layout.name}]
---

# {source.rpartition("/")[2]}, {average_bits:.2f} bits

| | |
|---|---|
{table}
## Run it

{plain}```
pip install bitshard
bitshard generate FOLDER "What is the capital of France?"
bitshard serve FOLDER
```

```python
from transformers import AutoModelForCausalLM
{imported}
AutoModelForCausalLM.from_pretrained("FOLDER"{config})

from vllm import LLM

LLM("FOLDER"{method})
```

## Measured

{NOTHING}"""


def require_card(folder: Path, reference: Path | None = None) -> str:
    """The text of a checkpoint's card; CheckpointError where there is none that a measurement can be added to, and for
    a reference that the card would call a 16-bit model though it is none.
    """
    if reference is not None and Checkpoint.open(reference).quantization is not None:
        raise CheckpointError(
            str(reference), "a quantized checkpoint", "the 16-bit model, as --card will say",
            "compare with that, or leave --card out",
        )  # fmt: skip
    path, found = folder / CARD, ""
    try:
        text = path.read_text(encoding="utf-8")
        found = "" if "\n## Measured\n" in text else "no section Measured"
    except (OSError, UnicodeDecodeError) as error:
        found = reason(error)
    if not found and not os.access(path, os.W_OK):
        found = "a file that cannot be written"
    if found:
        raise CheckpointError(str(path), found, "the card that `bitshard quantize` wrote", "leave --card out")
    return text


def add_measurement(folder: Path, text: Path, backend: str, found: Mapping[str, Any]) -> None:
    """A line of the card's last table: what `bitshard eval` found on a text, evaluate.Perplexity as a mapping."""
    card = require_card(folder)
    table = f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}\n"
    against = found["divergence"]
    values = (
        text.name.replace("|", "\\|"), found["context"], found["stride"], found["windows"], backend,
        f"{found['perplexity']:.2f}",
        f"{against['reference_perplexity']:.2f}" if against else "",
        f"{against['mean_kl']:.3f}" if against else "",
        f"{against['top1_agreement']:.1%}" if against else "",
        __version__,
    )  # fmt: skip
    before, heading, after = card.replace(NOTHING, table).partition("\n## Measured\n")
    measured, more, rest = after.partition("\n## ")
    row = f"| {' | '.join(map(str, values))} |\n"
    written = folder / f"{CARD}.partial"  # and not through a link, which another snapshot may share
    written.write_text(before + heading + measured.rstrip("\n") + "\n" + row + more + rest, encoding="utf-8")
    written.replace(folder / CARD)
