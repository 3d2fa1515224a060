"""Fixtures that all tests share."""

from pathlib import Path

import pytest
import torch

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
