"""Fixtures every test may use: offline, two threads, the shared data folder when there is one."""

import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported anywhere
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of public data and models that the project never ships; tests that need it skip where it is unset."""
    folder = os.environ.get("SAFETY_LENS_SHARED")
    if not folder:
        pytest.skip("SAFETY_LENS_SHARED is unset: this test reads public data that the project does not ship")
    return Path(folder)
