"""LoRA adapters beside packed matrices, by PEFT: `get_peft_model(model, adapted(LoraConfig(...), model))`."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from peft import LoraConfig
from peft.tuners.lora.gptq import GPTQLoraLinear
from transformers import PreTrainedModel

from bitshard.errors import PlanError
from bitshard.nn import Mix64Linear, PackedLinear, QuantLinear
from bitshard.versions import report_untested


class LoraLinear(GPTQLoraLinear):  # type: ignore[misc]
    """PEFT's own layer for packed matrices; it would ask for GPTQModel's."""

    def __init__(self, base_layer: Any, *args: Any, **kwargs: Any) -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Unsupported layer type")  # whose sizes it finds nevertheless
            super().__init__(base_layer, *args, **kwargs)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        fix = "dequantize() a model without adapters, and merge them into that"
        raise PlanError("adapters", "packed weights to merge them into", "adapters beside them", fix)


def adapted(config: LoraConfig, model: PreTrainedModel) -> LoraConfig:
    """`config`, that PEFT can apply it to this model, which the adapters must have been made for.

    Those of the model that a checkpoint was made of would not fit where its channels are in another order. Raises
    PlanError for adapters of anything else than this checkpoint, and for a model on several ranks.
    """
    report_untested("peft")
    made_for = config.base_model_name_or_path
    if made_for and not _same(made_for, model.name_or_path):
        raise PlanError(
            f"adapters of {made_for}", f"{model.name_or_path}, whose channels may be in an order of its own",
            "adapters that were trained on this checkpoint", "train them on it: bitshard's layers give gradients",
        )  # fmt: skip
    if (ranks := getattr(model, "_tp_size", None) or 1) > 1:
        raise PlanError("adapters", f"a model on {ranks} ranks", "one rank", "load it without a plan")
    if config.target_modules == "all-linear":  # PEFT looks for names of classes that it knows
        head = model.get_output_embeddings()  # rounded for `auto`
        packed = (n for n, module in model.named_modules() if isinstance(module, PackedLinear) and module is not head)
        config.target_modules = {name.rpartition(".")[2] for name in packed}
    config._register_custom_module({QuantLinear: LoraLinear, Mix64Linear: LoraLinear})
    return config


def _same(one: str, other: str) -> bool:
    return one == other or Path(one).resolve() == Path(other).resolve()
