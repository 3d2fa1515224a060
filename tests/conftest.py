"""Fixtures that all tests share."""

import os
from pathlib import Path

import pytest
import torch

# Without a GPU the Triton kernels run in Triton's interpreter. It reads this when it is first imported, which
# Megatron-core does too, so it must be set before any test module is.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Workers run side by side: one thread each, and results that do not depend on the machine."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def videos_dir() -> Path:
    """Real video files of several codecs, which lie beside the repository where they are available."""
    directory = REPOSITORY.parent / "shared" / "videos"
    if not directory.is_dir():
        pytest.skip("no directory shared/videos beside the repository")
    return directory


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))
