"""The model card of a quantized checkpoint, README.md: what was done, how to run it, what was measured."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bitshard import __version__
from bitshard.checkpoint import CARD
from bitshard.errors import CheckpointError
from bitshard.layout import GptqLayout
from bitshard.quantconfig import QuantConfig
from bitshard.spec import QuantSpec

NOTHING = "Nothing yet: `bitshard eval FOLDER --text FILE --against SOURCE --card` adds a line here.\n"
COLUMNS = ("text", "context", "windows", "perplexity", "16-bit", "KL", "same top token", "bitshard")


def model_card(quantization: QuantConfig, average_bits: float, errors: Mapping[str, float]) -> str:
    """The card of a checkpoint. errors: of each matrix's outputs, relative, on the calibration text."""
    provenance = quantization.section["provenance"]
    source, layout = provenance["source"], quantization.layout
    recipe = {name: value for name, value in provenance["recipe"].items() if value not in (None, 0, 0.0, False)}
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
    ordinary = isinstance(quantization.spec, QuantSpec) and not quantization.spec.desc_act
    config = ", quantization_config=BitshardConfig()" if isinstance(layout, GptqLayout) else ""
    method = ', quantization="bitshard"' if isinstance(layout, GptqLayout) else ""
    plain = (
        "It is an ordinary GPTQ file, for any engine that reads these; with bitshard's kernels:\n\n" if ordinary else ""
    )
    return f"""---
library_name: transformers
pipeline_tag: text-generation
{base}tags: [bitshard, {layout.name}]
---

# {source.rpartition("/")[2]}, {average_bits:.2f} bits

| | |
|---|---|
{table}
## Run it

{plain}```
pip install bitshard
bitshard generate FOLDER "The capital of France is"
bitshard serve FOLDER
```

```python
from transformers import AutoModelForCausalLM
from bitshard.integrations.transformers import BitshardConfig

AutoModelForCausalLM.from_pretrained("FOLDER"{config})  # backend="auto" in BitshardConfig is the fastest

from vllm import LLM

LLM("FOLDER"{method})
```

## Measured

{NOTHING}"""


def require_card(folder: Path) -> str:
    """The text of a checkpoint's card; CheckpointError where there is none that a measurement can be added to."""
    path = folder / CARD
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    if "\n## Measured\n" not in text:
        raise CheckpointError(
            str(path), "no section Measured" if text else "no such file", "the card that `bitshard quantize` wrote",
            "leave --card out",
        )  # fmt: skip
    return text


def add_measurement(folder: Path, text: Path, found: Mapping[str, Any]) -> None:
    """A line of the card's last table: what `bitshard eval` found on a text, evaluate.Perplexity as a mapping."""
    card = require_card(folder)
    head = f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}\n"
    against = found["divergence"]
    values = (
        text.name, found["context"], found["windows"], f"{found['perplexity']:.2f}",
        f"{against['reference_perplexity']:.2f}" if against else "",
        f"{against['mean_kl']:.3f}" if against else "",
        f"{against['top1_agreement']:.1%}" if against else "",
        __version__,
    )  # fmt: skip
    row = f"| {' | '.join(map(str, values))} |\n"
    (folder / CARD).write_text(card.replace(NOTHING, head).rstrip("\n") + "\n" + row, encoding="utf-8")
