"""Fixtures that several test files share."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # torch reads it once; deterministic algorithms need it
if not torch.cuda.is_available():  # Triton reads it when it is first imported, which transformers does
    os.environ.setdefault("TRITON_INTERPRET", "1")

from dense import STORIES, stories_model  # noqa: E402

torch.set_num_threads(1)  # the tests' matrices are tiny: a second thread is only waited for


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Memory that nobody has written is NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def stories(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained stories260K model as a float32 transformers folder with its tokenizer."""
    if not STORIES.is_dir():
        pytest.skip(f"no {STORIES}: the shared assets are not on this machine")
    return stories_model(tmp_path_factory.mktemp("stories") / "stories260K")
