"""How long work tells how far it is: any function that passes items through, such as a progress bar."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol, TypeVar

T = TypeVar("T")


class Progress(Protocol):
    """Called with the items and a label; yields the items."""

    def __call__(self, items: Sequence[T], label: str, /) -> Iterable[T]: ...


def silent(items: Sequence[T], label: str, /) -> Iterable[T]:
    return items
