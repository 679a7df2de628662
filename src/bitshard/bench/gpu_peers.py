from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Peer:
    name: str
    nbytes: int
    W_RK: torch.Tensor
    copy: Callable[[], Callable[[torch.Tensor], torch.Tensor]]


def peers(W_NK: torch.Tensor, rows: int) -> Iterator[tuple[str, Callable[[], Peer]]]:
    yield from ()
