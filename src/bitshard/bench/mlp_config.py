"""What `bench mlp` measures. The shapes are the paper's (2402.04925): K1, N1 and N2 of two matrices, no gate."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Any

import torch

from bitshard.errors import SpecError
from bitshard.spec import QuantSpec

SPEC = QuantSpec(bits=4, group_size=128, sym=True, desc_act=True)  # as in the authors' checkpoints

MODELS = {"llama-70b": (8192, 28672, 8192), "granite-20b": (6144, 24576, 6144)}
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
WEIGHTS = ("dense", "gptq")
BACKENDS = {"cpu": "gloo", "cuda": "nccl"}


@dataclass(frozen=True)
class Case:
    """One MLP: model name, "dense" or "gptq" weights, dtype of activations (and of dense weights and scales)."""

    model: str
    weights: str
    dtype: str

    def __str__(self) -> str:
        return f"{self.model} {self.weights} {self.dtype}"


@dataclass(frozen=True)
class MlpBench:
    """Every combination of models, weights, dtypes, ranks and tokens.

    scale divides all sizes, for machines smaller than the paper's. repetitions: timed calls of each; warmup: untimed
    ones before. seed: of weights and inputs. Raises SpecError for a name, number or size that does not fit.
    """

    models: tuple[str, ...] = tuple(MODELS)
    weights: tuple[str, ...] = WEIGHTS
    dtypes: tuple[str, ...] = ("fp16",)
    ranks: tuple[int, ...] = (1, 2, 4, 8)
    tokens: tuple[int, ...] = (1, 2, 4, 8, 16)
    scale: int = 1
    device: str = "cpu"
    repetitions: int = 50
    warmup: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        choices: list[tuple[str, tuple[str, ...], Any]] = [
            ("models", self.models, MODELS),
            ("weights", self.weights, WEIGHTS),
            ("dtypes", self.dtypes, DTYPES),
            ("device", (self.device,), BACKENDS),
        ]
        for name, found, allowed in choices:
            if not found or not set(found) <= set(allowed):
                raise SpecError(name, ", ".join(found) or "none", ", ".join(allowed), "choose among these")
        for name, numbers in [("ranks", self.ranks), ("tokens", self.tokens)]:
            if not numbers or min(numbers) < 1:
                raise SpecError(name, str(numbers), "one or more numbers from 1 up", "for example 1,2,4")
        for name in ("scale", "repetitions", "warmup"):
            if getattr(self, name) < 1:
                raise SpecError(name, str(getattr(self, name)), "a number from 1 up", "leave it at its default")
        for model in self.models:
            self._check_sizes(model)

    def _check_sizes(self, model: str) -> None:
        k1, n1, _ = self.sizes(model)
        group = SPEC.group_size
        divides = all(size % self.scale == 0 for size in MODELS[model])
        if not divides or k1 % group or any(n1 % (group * t) for t in self.ranks):
            raise SpecError(
                "scale",
                f"{self.scale}, which makes {model}'s K1 {k1} and N1 {n1}, on {max(self.ranks)} ranks",
                f"a divisor that leaves K1 a multiple of {group}, and N1 a multiple of {group} on every rank",
                "choose a smaller scale or fewer ranks",
            )

    def sizes(self, model: str) -> tuple[int, int, int]:
        """K1, N1, N2 after division by `scale`."""
        k1, n1, n2 = MODELS[model]
        return k1 // self.scale, n1 // self.scale, n2 // self.scale

    def cells(self) -> list[tuple[int, Case]]:
        """(ranks, case) of everything that one group of processes measures."""
        return [(t, Case(*case)) for t in self.ranks for case in product(self.models, self.weights, self.dtypes)]
