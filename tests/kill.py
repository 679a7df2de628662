"""Stand-ins for kill -9."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from bitshard.progress import Progress, T


class Killed(BaseException):
    """Stands for a kill: nothing in the library may catch it."""


def counting_down(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """A function that sets before which renaming or removal of a file, counted from then on, the run dies."""
    left = 0

    def dying(change: Any) -> Any:
        def wrapper(path: Path, *args: Any, **kwargs: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0:
                raise Killed
            return change(path, *args, **kwargs)

        return wrapper

    def set_left(count: int) -> None:
        nonlocal left
        left = count

    monkeypatch.setattr(Path, "rename", dying(Path.rename))
    monkeypatch.setattr(Path, "unlink", dying(Path.unlink))
    return set_left


def dies_at(block: int) -> Progress:
    """A progress that dies when this block is to be quantized."""

    def progress(items: Sequence[T], label: str, /) -> Iterator[T]:
        for item in items:
            if label.startswith("quantizing") and item == block:
                raise Killed
            yield item

    return progress
